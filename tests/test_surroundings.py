"""What a user's project does around a module goes on in a learner: callbacks, optimizers, hooks."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from simple import Lit, Net, data, fit, greedy
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, methods, plan_partition

WRAPS = {
    "plain": lambda module: module,
    "EndToEnd": lambda module: LocalLearner(module, methods.EndToEnd()),
    "Greedy": greedy,
}
wrapped = pytest.mark.parametrize("wrap", list(WRAPS.values()), ids=list(WRAPS))


class Aliased(nn.Module):
    """A layer has two names, as in `self.first = self.layers[0]`."""

    def __init__(self, alias):
        super().__init__()
        norm = nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.layers = nn.Sequential(norm, nn.Linear(8, 8), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        if alias:
            self.first, self.norm = self.layers[0], norm[1]

    def forward(self, x):
        return self.fc(self.layers(x.flatten(1)))


@pytest.mark.parametrize("method", ["Greedy", "AugLocal", "SGR"])
def test_a_layer_with_two_names_is_trained_as_one(method, quiet):
    networks = [Aliased(alias=False), Aliased(alias=True)]
    networks[1].load_state_dict(networks[0].state_dict(), strict=False)
    for network in networks:
        made = copy.deepcopy(methods.METHODS[method])()
        fit(LocalLearner(Lit(network), made, ["layers.0"]), quiet)
    state = networks[1].state_dict()
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("options", [{}, {"method": "EndToEnd", "recompute": "blocks"}])
def test_looking_at_it_leaves_its_weights(options):
    network = Aliased(alias=True)
    before = dict(network.named_parameters())
    learner = LocalLearner(Lit(network), **{"method": "Greedy", **options})
    if not options:
        plan_partition(learner, (torch.randn(4, 1, 6, 6), torch.zeros(4, dtype=torch.long)))
    learner.build(torch.randn(4, 1, 6, 6))
    assert all(before[name] is p for name, p in network.named_parameters())


class Weighted(Lit):
    factor = 1.0

    def training_step(self, batch, batch_idx):
        self.seen.append((self.factor, float(getattr(self, "extra", 0))))
        return self.factor * functional.cross_entropy(self(batch[0]), batch[1])


class Anneals(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.factor = 1.0 / (1 + trainer.current_epoch)
        pl_module.extra = torch.tensor(float(trainer.current_epoch))


@wrapped
def test_what_a_callback_sets_the_step_sees(wrap, quiet):
    module = Weighted()
    fit(wrap(module), quiet, epochs=2, callbacks=[Anneals()])
    assert module.seen == [(1.0, 0.0)] * 3 + [(0.5, 1.0)] * 3


@wrapped
def test_a_batch_size_is_found(wrap, quiet, tmp_path):
    class Sized(Lit):
        batch_size = 4

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return data(size=self.batch_size)

    module = Sized()
    finder = pl_callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=4)
    options = {**quiet, "default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer = L.Trainer(max_steps=1, callbacks=[finder], **options)
    trainer.fit(wrap(module), val_dataloaders=data(shuffle=False))
    assert module.batch_size == finder.optimal_batch_size > 4


class Overrides(Lit):
    evals = clips = 0

    def eval(self):
        self.evals += 1
        return super().eval()

    def clip_gradients(self, optimizer, **options):
        self.clips += 1
        super().clip_gradients(optimizer, **options)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}])
def test_overridden_methods_are_called(options, quiet):
    counts = []
    for wrap in WRAPS.values():
        module = Overrides()
        fit(wrap(module), quiet, epochs=1, **options)
        counts.append((module.evals, module.clips))
    assert counts[0] == counts[1]
    assert counts[2] == (counts[0][0], 4 * counts[0][1])


class Looks(L.Callback):
    def setup(self, trainer, pl_module, stage):
        self.seen = trainer.accumulate_grad_batches, trainer.gradient_clip_val
        trainer.accumulate_grad_batches = 3


@wrapped
def test_flags_are_there_in_setup(wrap, quiet):
    looks = Looks()
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer = fit(wrap(Lit()), quiet, epochs=1, callbacks=[looks], **options)
    assert looks.seen == (2, 0.5)
    assert trainer.global_step == 1


class Again(torch.optim.SGD):
    """Evaluates the loss at two points, as SAM does."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


class Once(torch.optim.SGD):
    """The same, with other weights."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)
        with torch.enable_grad():
            closure()
        return super().step()


@pytest.mark.parametrize("kind", [Again, Once])
@pytest.mark.parametrize("wrap", ["EndToEnd", "Greedy"])
def test_an_optimizer_that_evaluates_the_loss_again_is_refused(kind, wrap, quiet):
    module = Lit()
    module.configure_optimizers = lambda: kind(module.parameters(), 0.1)
    with pytest.raises(ValueError, match=f"{kind.__name__} evaluates the loss again within one"):
        fit(WRAPS[wrap](module), quiet)


def test_a_scheduler_that_is_kept_is_refused(quiet):
    module = Lit()

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        module.kept = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return optimizer

    module.configure_optimizers = configure
    with pytest.raises(ValueError, match="made a scheduler and did not return it"):
        fit(greedy(module), quiet)


def test_step_hooks_run_for_each_local_module(quiet):
    module, ran = Lit(), []

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        optimizer.register_step_pre_hook(lambda *args: ran.append("before"))
        optimizer.register_step_post_hook(lambda *args: ran.append("after"))
        return optimizer

    module.configure_optimizers = configure
    fit(greedy(module), quiet, epochs=1)
    assert ran == ["before", "after"] * 4 * 3


def test_an_optimizer_with_states_from_the_start_is_saved(quiet, tmp_path):
    module = Lit()
    module.configure_optimizers = lambda: torch.optim.Adagrad(module.parameters(), 0.1)
    trainer = fit(greedy(module), quiet, epochs=1)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    states = torch.load(tmp_path / "it.ckpt", weights_only=True)["optimizer_states"]
    assert all(len(s["state"]) == len(s["param_groups"][0]["params"]) for s in states)


class Needs(torch.optim.Adagrad):
    def __init__(self, params, needed):
        super().__init__(params, lr=needed)


def test_one_that_can_not_be_made_again_is_named(quiet):
    module = Lit()
    module.configure_optimizers = lambda: Needs(module.parameters(), 0.1)
    with pytest.raises(ValueError, match="Needs keeps a state .* can't be made for the heads"):
        fit(greedy(module), quiet)


def test_a_layer_thaws_under_the_learners_own_optimizer(quiet):
    class Thaws(Lit):
        def on_train_epoch_start(self):
            self.network.stem.requires_grad_(self.current_epoch > 0)

    module = Thaws()
    module.network.stem.requires_grad_(False)
    before = module.network.stem.weight.clone()
    learner = LocalLearner(module, "Greedy", optimizer=lambda p: torch.optim.SGD(p, 0.1))
    fit(learner, quiet, epochs=2)
    assert not torch.equal(module.network.stem.weight, before)


def test_a_method_of_the_module_is_a_criterion(quiet):
    class Own(Lit):
        def criterion(self, output, target):
            self.seen.append((self.current_epoch, self.trainer.max_epochs))
            return functional.cross_entropy(output, target)

    module = Own()
    fit(LocalLearner(module, "Greedy", criterion=module.criterion), quiet, epochs=2)
    assert {epoch for epoch, _ in module.seen} == {0, 1}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_gradients_are_zeroed_outside_of_the_steps_precision(precision, quiet):
    class Asks(Lit):
        def on_before_zero_grad(self, optimizer):
            self.seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))

    module = Asks()
    fit(WRAPS["EndToEnd"](module), quiet, epochs=1, precision=precision)
    assert set(module.seen) == {(False, torch.float32)}


def test_one_module_goes_on_after_a_loss_that_is_not_finite(quiet):
    class Bad(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 0 else 1)

        def on_after_backward(self):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_()

    states = []
    for wrap in ("plain", "EndToEnd"):
        L.seed_everything(0, verbose=False)
        module = Bad()
        fit(WRAPS[wrap](module), quiet, epochs=1, log_every_n_steps=1)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_heads_that_copy_units_have_no_hooks_of_the_users(quiet):
    counts = []
    for method in (methods.Greedy(), methods.AugLocal(depth=1, block="copy")):
        network, calls = Net(), []

        def count(layer, given, output, calls=calls):
            calls.extend([1] * (type(output) is torch.Tensor))

        network.fc.register_forward_hook(count)
        fit(LocalLearner(Lit(network), method, 2), quiet, epochs=1, limit_val_batches=0)
        counts.append(len(calls))
    assert counts == [3, 3]
