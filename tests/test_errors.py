"""Bad input ends in one error that names it, what is allowed and what to do; nothing saved is hurt.

A table of mistakes that users make. Details of each area are tested beside it.
"""

import functools
import re
import traceback
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as cbs
from simple import CLASSES, Lit, Net, data, fit, greedy, wrap
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import (
    EarlyExit,
    LocalLearner,
    LocalParallelStrategy,
    LocalSummary,
    Partition,
    heads,
    losses,
    methods,
    plan_partition,
)
from lightning_local.methods import LocalMethod

PACKAGE = str(Path(LocalLearner.__init__.__code__.co_filename).parent)
CASES = {}
# Of the run that is under way: arguments of a quiet Trainer, and a folder with a checkpoint.
NOW = {}


def case(words, kind=ValueError):
    """Adds a case; `words` are in its message, in this order."""

    def add(function):
        CASES[function.__name__] = (function, words, kind)
        return function

    return add


def argument(name, make, *words, kind=ValueError):
    """Adds a case of a constructor."""
    CASES[name] = (make, words, kind)


def fitted(learner, loader=None, **options):
    return fit(learner, NOW["quiet"], epochs=1, loader=loader, **options)


def loader_of(x, y, size=8):
    return DataLoader(TensorDataset(x, y), size)


X, Y = torch.randn(16, 1, 6, 6), torch.arange(16) % CLASSES

# Arguments.
argument("module", lambda: greedy(Net()), "got a Net", "pass a", kind=TypeError)
argument("method", lambda: LocalLearner(Lit(), "auglocl"), "'auglocl'", "Did you mean 'AugLocal'")
argument("method type", lambda: LocalLearner(Lit(), 3), "3", "pass one of", kind=TypeError)
argument("one module", lambda: LocalLearner(Lit(), "EndToEnd", 2), "partition=2", "leave partition")
argument("partition", lambda: LocalLearner(Lit(), "SGR", "blocks"), "'blocks'", "pass 'units'")
argument("no request", lambda: greedy(Lit(), partition=None), "None", "'units'", kind=TypeError)
argument("no module", lambda: LocalLearner(Lit(), "SGR", 0), "num_modules=0", "pass a positive int")
argument("both", lambda: Partition(2, ["a"]), "both num_modules and", "pass one of the two")
argument("twice", lambda: Partition(split_points=["a", "a"]), "'a'", "once is enough")
argument("text", lambda: Partition(split_points="a"), "'a'", "pass a list", kind=TypeError)
argument("granularity", lambda: Partition(granularity="all"), "'all'", "'finest'")
argument("balance", lambda: Partition(balance="time"), "balance='time'", "needs num_modules")
argument("name", lambda: greedy(Lit(), partition=["stm"]), "`stm`", "closest names are: stem")
argument("features", lambda: greedy(Lit(), out_features=0), "out_features=0", "1 or more")
argument(
    "schedule", lambda: greedy(Lit(), lr_scheduler=print), "lr_scheduler", "pass both, or neither"
)
argument(
    "recompute", lambda: greedy(Lit(), recompute="all"), "'all'", "'blocks'", "list of indices"
)
argument(
    "mode", lambda: greedy(Lit(), recompute={0: "all"}), "'all'", "of local module 0", "'body'"
)
argument("index", lambda: greedy(Lit(), recompute=[-1]), "[-1]", "counted from 0")
argument("kind", lambda: greedy(Lit(), recompute=True), "True", "such as [0, 1]", kind=TypeError)
argument("mode of compile", lambda: greedy(Lit(), compile="fast"), "'fast'", "'reduce-overhead'")
argument("compile", lambda: greedy(Lit(), compile=3), "3", "True, False or one", kind=TypeError)
argument("network", lambda: greedy(Lit(), network="net"), "'net'", "pass one of 'network'")
argument("depth", lambda: heads.Augmented(depth=-1), "depth=-1", "0 or more")
argument("widen", lambda: heads.Conv(widen=0), "widen=0", "above 0")
argument("bias", lambda: heads.MLP(bias="no"), "bias='no'", "True or False")
argument("zero", lambda: heads.Linear(zero_init=1), "zero_init=1", "True or False")
argument("beta", lambda: methods.PredSim(beta=2), "beta=2", "0 to 1")
argument("distance", lambda: methods.SGR(distance="l1"), "distance='l1'", "'squared_l2'")
argument("length", lambda: methods.BackLink(length=-1), "length=-1", "None", "0 or more")
argument("statistics", lambda: losses.InfoPro(([0.5], [0.0])), "standard deviations")
argument(
    "lists", lambda: losses.InfoPro(([0.5], [0.5, 0.5])), "two lists of one number per channel"
)
argument("weights", lambda: losses.InfoPro(([0.5], [0.5]), lam_first=5), "lam_first", "two numbers")
argument("needed", lambda: LocalLearner(Lit(), "InfoPro"), "pass methods.InfoPro(denormalize=")
argument("pieces", lambda: LocalMethod(heads.Linear), "head", "heads.", kind=TypeError)
argument("threshold", lambda: EarlyExit(1.5), "threshold=1.5", "0 to 1")
argument("stages", lambda: LocalParallelStrategy(num_stages=0), "num_stages=0")
argument(
    "order", lambda: LocalParallelStrategy(placement=[0, 2]), "[0, 2]", "in order", "[0, 0, 1]"
)
argument("places", lambda: LocalParallelStrategy(placement="01"), "'01'", "list", kind=TypeError)
argument(
    "backend",
    lambda: LocalParallelStrategy(process_group_backend="mpi"),
    *("'mpi'", "expected 'nccl'"),
)
argument("budget", lambda: plan_partition(greedy(Lit()), (X, Y), memory="much"), "'much'", "'8GiB'")
argument("example", lambda: plan_partition(greedy(Lit())), "pass a batch", "example_input_array")


# Modules.


@case(["network='network' or 'other'"])
def two_networks():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.other = Net()

    greedy(Two())


@case(["automatic_optimization = False", "wrap a module with automatic"])
def manual_optimization():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    greedy(Manual())


@case(["overrides optimizer_step"])
def own_optimizer_step():
    class Steps(Lit):
        def optimizer_step(self, *args, **kwargs):
            pass

    greedy(Steps())


@case(["has no parameters", "pass network="])
def no_parameters():
    class Empty(Lit):
        def __init__(self):
            super().__init__(nn.Flatten())
            self.scale = nn.Parameter(torch.ones(()))

    fitted(greedy(Empty(), network="network"))


@case(["asks for 9 local modules", "has 4 units", "at most 4"])
def too_many_modules():
    fitted(greedy(Lit(), partition=9))


@case(["['blocks', 'stem']", "not in the order", "pass ['stem', 'blocks']"])
def split_points_out_of_order():
    fitted(greedy(Lit(), partition=["blocks", "stem"]))


@case(["Nothing follows split point `fc`", "leave it out"])
def a_split_point_at_the_end():
    fitted(greedy(Lit(), partition=["stem", "fc"]))


@case(["last 4 units", "4 units", "a depth of at most"])
def a_head_deeper_than_the_network():
    fitted(LocalLearner(Lit(), methods.AugLocal(depth=3)))


@case(["weight` is used on both sides of a cut", "Untie it"])
def tied_weights():
    net = Net()
    net.blocks[2].conv.weight = net.blocks[0].conv.weight
    fitted(greedy(Lit(net)))


@case(["recompute names local module 7", "from 0 to 3"])
def recompute_beyond_the_last():
    fitted(greedy(Lit(), recompute=[7]))


@case(["returned None", "return an optimizer"])
def no_optimizer():
    class None_(Lit):
        def configure_optimizers(self):
            return None

    fitted(greedy(None_()))


@case(["returned 2 optimizers", "Return one"])
def two_optimizers():
    class Several(Lit):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    fitted(greedy(Several()))


@case(["LBFGS", "use another optimizer"])
def an_optimizer_with_a_closure():
    class Closure(Lit):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    fitted(greedy(Closure()))


@case(["left out 1 of the", "local module 0", "requires_grad_(False)"])
def an_optimizer_that_drops_parameters():
    fitted(greedy(Lit(), optimizer=lambda params: torch.optim.SGD(list(params)[1:], 0.1)))


@case(["returned a int for local module 0", "torch.optim.Optimizer"])
def a_callable_that_makes_no_optimizer():
    fitted(greedy(Lit(), optimizer=lambda params: 3))


# Steps.


def stepping(step):
    class Odd(Lit):
        training_step = step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    fitted(greedy(Odd()))


@case(["another input than the batch's", "on_after_batch_transfer"])
def an_input_changed_in_the_step():
    stepping(lambda self, b, batch_idx: functional.cross_entropy(self(b[0] + 1.0), b[1]))


class Scaled(Net):
    def forward(self, x, scale=1.0):
        return super().forward(x * scale)


@case(["with 2 inputs", "gives 1", "LocalLearner(unpack=...)", "leave the loss"])
def an_input_that_is_not_in_the_batch():
    class Odd(Lit):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.network(batch[0], scale=2.0), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    fitted(greedy(Odd(Scaled())))


@case(["called the network twice", "join the views"])
def two_calls():
    stepping(lambda self, b, batch_idx: functional.cross_entropy(self(b[0]) + self(b[0]), b[1]))


@case(["did not call the network", "call the network once"])
def no_call():
    stepping(lambda self, b, batch_idx: self.network.fc.weight.sum())


@case(["returned NoneType without a loss", "return the loss"])
def a_skipped_batch():
    stepping(lambda self, b, batch_idx: self(b[0]) and None if False else (self(b[0]), None)[1])


@case(["a loss of shape (4,)", "return a scalar"])
def a_loss_that_is_no_scalar():
    stepping(lambda self, b, batch_idx: self(b[0]).mean(0))


@case(["depends on network.stem.weight and 7 more", "teaches the last one alone", "weight_decay"])
def a_penalty_on_all_weights():
    def step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.parameters())
        return functional.cross_entropy(self(batch[0]), batch[1]) + 1e-4 * penalty

    stepping(step)


# Batches.


@case(["The batch is a list of 3", "pass LocalLearner(unpack="])
def a_batch_of_three():
    fitted(greedy(Lit()), DataLoader(list(zip(X, Y, Y, strict=True)), 8))


@case(["a dict with the keys ['a', 'b']", "Expected are (x, y)"])
def a_dict_with_other_keys():
    fitted(greedy(Lit()), DataLoader([{"a": x, "b": y} for x, y in zip(X, Y, strict=True)], 8))


@case(["is empty", "at least one batch"])
def an_empty_loader():
    L.Trainer(**NOW["quiet"], max_epochs=1).fit(greedy(Lit()), DataLoader([]), data(shuffle=False))


@case(["read only once", "set example_input_array"])
def a_stream_that_is_read_once():
    fitted(greedy(Lit()), iter([(X[:8], Y[:8])]))


@case(["class 9", "4 outputs", "0 to 3", "as many outputs"])
def a_label_out_of_range():
    fitted(greedy(Lit()), loader_of(X, Y.masked_fill(Y == 1, 9)))


@case(["torch.float32 of shape (8, 2)", "neither class indices", "criterion="])
def targets_that_are_numbers():
    fitted(greedy(Lit()), loader_of(X, torch.randn(16, 2)))


@case(["indices of shape (8, 1)", "wants (8,)", "one index per prediction"])
def targets_with_a_dimension_more():
    fitted(greedy(Lit()), loader_of(X, Y[:, None]))


@case(["returned (16, 4)", "reduction='mean'"])
def a_criterion_without_a_mean():
    fitted(greedy(Lit(), criterion=lambda output, target: output))


@case(["denormalize", "[0, 1]", "mean and the standard deviation"])
def images_in_another_scale():
    fitted(LocalLearner(Lit(), methods.InfoPro(denormalize=([0.5], [3.0])), 3))


@case(["local module 2 of 4 was NaN", "in batch 1", "lower the learning rate"], FloatingPointError)
def a_loss_that_is_nan():
    class Bad(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.network.blocks[1].conv.weight.data.fill_(float("nan"))

    fitted(greedy(Bad()), log_every_n_steps=1)


@case(["differentiates gradients once more", "replace the layer"])
def a_layer_without_a_second_derivative():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.Linear(9, 9), nn.Hardsigmoid())
    net.append(nn.Linear(9, CLASSES))
    fitted(LocalLearner(Lit(net), "SGR", 3))


# The Trainer.


@case(["LearningRateFinder does not work", "plain"])
def a_callback_that_can_not_work():
    fitted(greedy(Lit()), callbacks=[cbs.LearningRateFinder()])


@case(["LocalSummary is for a LocalLearner", "wrap the module"], TypeError)
def a_summary_of_a_plain_module():
    fitted(Lit(), callbacks=[LocalSummary()])


@case(["EarlyExit needs heads", "AugLocal"])
def early_exit_without_heads():
    L.Trainer(**NOW["quiet"], callbacks=[EarlyExit()]).test(
        LocalLearner(WithTest(), "EndToEnd"), data(shuffle=False)
    )


class WithTest(Lit):
    def test_step(self, batch, batch_idx):
        self(batch[0])


@case(["torch.compile(learner)", "LocalLearner(compile=True)"])
def a_compiled_learner():
    fitted(torch.compile(greedy(Lit()), backend="eager"))


# Checkpoints.


def resumed(learner, path=None):
    L.Trainer(**NOW["quiet"], max_epochs=2).fit(
        learner, data(), data(shuffle=False), ckpt_path=path or NOW["file"]
    )


@case(["truncated", "resume from an older one"])
def a_truncated_file():
    path = NOW["file"].with_name("cut.ckpt")
    path.write_bytes(NOW["file"].read_bytes()[:2000])
    resumed(wrap(2)(Lit()), path)


@case(["another network", "other shapes", "Build the module as it was"])
def a_file_of_another_network():
    resumed(wrap(2)(Lit(Net(width=7))))


@case(["method Linear x CrossEntropy x Isolated", "has MLP", "use the method of the checkpoint"])
def a_file_of_another_method():
    resumed(LocalLearner(Lit(), "DGL", 2))


@case(["has 2 local modules", "pass partition=['blocks.0']"])
def a_file_of_local_modules_for_one():
    resumed(LocalLearner(Lit(), "Greedy", 1))


def altered(change):
    content = torch.load(NOW["file"], weights_only=True)
    change(content["lightning_local"])
    path = NOW["file"].with_name("altered.ckpt")
    torch.save(content, path)
    resumed(wrap(2)(Lit()), path)


@case(["tensors of heads", "it lacks"])
def a_file_without_its_heads():
    altered(lambda entry: entry["heads"].clear())


@case(["version 99", "install a newer one"])
def a_file_of_a_newer_format():
    altered(lambda entry: entry.update(version=99))


@case(["one of the module inside", "load it with that class"], TypeError)
def a_file_loaded_as_a_learner():
    LocalLearner.load_from_checkpoint(NOW["file"])


@case(["written by the plain module", "wrap that in a new LocalLearner"])
def a_file_of_the_plain_module():
    path = NOW["file"].with_name("plain.ckpt")
    fitted(Lit()).save_checkpoint(path)
    resumed(wrap(2)(Lit()), path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from fleet import QUIET

    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    fit(wrap(2)(Lit()), dict(QUIET), epochs=1).save_checkpoint(path)
    return path


@functools.cache
def outcome(name):
    """The error of a case, its message and where it was raised."""
    function, _, _ = CASES[name]
    try:
        function()
    except Exception as error:
        caught = error
    else:
        pytest.fail("nothing was raised")
    frames = traceback.extract_tb(caught.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    where = (ours[-1].filename, ours[-1].lineno) if ours else None
    last = frames[-1].filename.startswith(PACKAGE)
    return caught, str(caught), where if last else None


@pytest.mark.filterwarnings("ignore:Using torch.compile:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_explained(name, quiet, checkpoint):
    NOW.update(quiet=quiet, file=checkpoint)
    before = checkpoint.read_bytes()
    error, message, where = outcome(name)
    _, words, kind = CASES[name]
    assert type(error) is kind, repr(error)
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message
    assert where is not None, "not raised by us"
    assert checkpoint.read_bytes() == before


def test_there_are_many_mistakes_and_none_is_explained_like_another(quiet, checkpoint):
    NOW.update(quiet=quiet, file=checkpoint)
    found = [outcome(name) for name in CASES]
    messages, places = {message for _, message, _ in found}, {where for _, _, where in found}
    assert len(messages) == len(CASES) >= 60
    assert len(places) >= 40
