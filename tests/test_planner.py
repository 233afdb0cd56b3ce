"""Predicted memory is measured memory, and plans keep what they promise."""

import itertools
from functools import partial
from pathlib import Path
from types import MethodType

import lightning as L
import numpy as np
import pytest
import simple
import torch
import yaml
from networks import PreAct, ResNet, Vit
from settings import batches, make
from torch import nn
from torch.utils.data import DataLoader

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, Partition, methods, plan_partition
from lightning_local.cli import main
from lightning_local.dividing import additive, divide
from lightning_local.meter import LiveBytes, existing
from lightning_local.ranges import size
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Setting, prepared

ROOT = Path(__file__).parent.parent
SAMPLES = 32


def learner_of(network=ResNet, method="Greedy", partition="units", **options):
    L.seed_everything(0, verbose=False)
    return LocalLearner(make(network, torch.float32), method, partition, **options)


def batch_of(network=ResNet, samples=SAMPLES):
    (x, y), *_ = batches(network, dtype=torch.float32)
    repeats = -(-samples // len(x))
    return torch.cat([x] * repeats)[:samples].clone(), torch.cat([y] * repeats)[:samples].clone()


class Peak(L.Callback):
    """Live bytes in the second batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.live = LiveBytes(existing(module, trainer.optimizers, batch))
            self.live.__enter__()

    def on_train_batch_end(self, trainer, module, *args):
        if args[-1] == 1:
            self.live.__exit__(None, None, None)


def measured(learner, batch, quiet, **options):
    peak = Peak()
    trainer = L.Trainer(**quiet, max_epochs=1, callbacks=[peak], **options)
    trainer.fit(learner, DataLoader([batch] * 2, batch_size=None))
    return peak.live.peak


@pytest.mark.parametrize("method", sorted(simple.METHODS))
@pytest.mark.parametrize("network", [ResNet, Vit])
def test_a_step_on_fakes_predicts_a_fit(network, method, quiet):
    """Metrics and the loop's own numbers are not rehearsed; torch's fake of a batch norm's backward
    makes what the real one leaves out, which counts where it is called by itself."""
    batch = batch_of(network)
    partition = 1 if method == "EndToEnd" else "units"
    learner = learner_of(network, simple.METHODS[method](), partition)
    found = measured(learner, batch, quiet)
    expected = rehearse(
        learner, learner.modules_in_order(), learner.method, Setting(batch, SAMPLES)
    )
    assert not expected.notes
    assert found == pytest.approx(expected.peak, rel=0.04 if method == "SGR" else 0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "body"},
        {"recompute": "blocks"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2},
    ],
)
def test_it_does_under_a_trainers_options(options, quiet):
    recompute = options.pop("recompute", "none")
    batch = batch_of()
    for method, partition in (("BackLink", 2), ("EndToEnd", 1)):
        learner = learner_of(ResNet, methods.METHODS[method](), partition, recompute=recompute)
        found = measured(learner, batch, quiet, **options)
        setting = Setting(
            batch,
            SAMPLES,
            options.get("precision", "32-true"),
            options.get("accumulate_grad_batches", 1) > 1,
        )
        expected = rehearse(learner, learner.modules_in_order(), learner.method, setting)
        assert found == pytest.approx(expected.peak, rel=0.05)


def test_a_rehearsal_changes_nothing_and_scales_with_the_batch():
    learner = learner_of(ResNet, "BackLink")
    x, y = batch_of()
    learner.build(x)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    state = torch.get_rng_state()
    peaks = [
        rehearse(
            learner, learner.modules_in_order(), learner.method, Setting((x[:2], y[:2]), n)
        ).peak
        for n in (8, 16, 32)
    ]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(learner.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_step_that_reads_numbers_is_replaced_with_a_note():
    learner = learner_of()

    def step(batch, batch_idx):
        loss = nn.functional.cross_entropy(learner.module(batch[0]), batch[1])
        return loss if loss.item() > 0 else None

    learner.module.training_step = step
    plan = plan_partition(learner, batch_of())
    assert "training_step can't run without numbers" in plan.notes[0]
    assert plan.end_to_end > plan.choice.static > 0


def test_divisions_are_the_best_ones():
    generator = np.random.default_rng(0)
    for n, count in ((1, 1), (5, 2), (6, 3), (7, 7), (8, 4)):
        costs = generator.random((n, n)) + additive(generator.random(n))
        found = divide(costs, count)
        assert [k for block in found for k in block] == list(range(n))

        def largest(ends, costs=costs):
            return max(costs[i, j - 1] for i, j in itertools.pairwise(ends))

        every = itertools.combinations(range(1, n), count - 1)
        best = min(largest((0, *ends, n)) for ends in every)
        assert max(costs[block[0], block[-1]] for block in found) == best


@pytest.mark.parametrize("balance", ["memory", "time"])
def test_a_balanced_partition_evens_out(balance):
    """A pre-activation network halves its maps on the way, so equal numbers of units don't."""
    shares = {}
    batch = batch_of(PreAct)
    for kind in ("units", balance):
        learner = learner_of(PreAct, "Greedy", Partition(3, balance=kind))
        learner.planned_batch_size = 64
        learner.build(batch[0][:2])
        modules = learner.modules_in_order()
        if balance == "time":
            shares[kind] = max(module.body_flops + module.head_flops for module in modules)
        else:
            shares[kind] = rehearse(learner, modules, learner.method, Setting(batch, 64)).peak
    assert shares[balance] <= shares["units"]


def test_a_plan_is_the_fewest_local_modules_within_the_budget(quiet):
    batch = batch_of(samples=64)
    learner = learner_of()
    free = plan_partition(learner, batch)
    assert free.rungs[0].local == free.end_to_end
    limit = (free.end_to_end + min(rung.local for rung in free.rungs)) // 2
    plan = plan_partition(learner, batch, memory=limit, reserve=0)
    assert plan.choice.fits
    assert plan.choice.peak <= limit
    fewer = [rung for rung in plan.rungs if rung.parts <= len(plan.choice.points)]
    assert all(rung.local > limit for rung in fewer)
    given = yaml.safe_load(plan.yaml())
    other = learner_of(ResNet, "Greedy", given["partition"])
    assert measured(other, batch, quiet) <= limit
    assert other.split_points == plan.choice.points
    for words in ("budget", "+ checkpointing", "the fewest local modules", "Paste below"):
        assert words in str(plan)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_tight_budget_recomputes(quiet):
    """Where heads are large, their activations and the body's need not be alive together."""
    batch = torch.randn(256, 3, 8, 8), torch.zeros(256).long()

    def made(**options):
        L.seed_everything(0, verbose=False)
        module = LitClassifier(CifarResNet(20))
        return LocalLearner(module, methods.AugLocal(depth=3), **options)

    plan = plan_partition(made(), batch, memory=14_250_000, reserve=0)
    assert min(rung.local for rung in plan.rungs) > 14_250_000
    assert plan.choice.recompute
    assert plan.choice.fits
    found = measured(made(**yaml.safe_load(plan.yaml())), batch, quiet)
    assert found == pytest.approx(plan.choice.peak, rel=0.02)
    assert found <= 14_250_000


def test_a_balanced_cut_is_kept_in_a_checkpoint(tmp_path, quiet):
    path = tmp_path / "a.ckpt"
    batches = DataLoader([batch_of()], batch_size=None)
    learner = learner_of(PreAct, "Greedy", Partition(2, balance="memory"))
    trainer = L.Trainer(**quiet, max_epochs=1)
    trainer.fit(learner, batches)
    trainer.save_checkpoint(path)
    other = learner_of(PreAct, "Greedy", Partition(3, balance="memory"))
    with pytest.warns(UserWarning, match="are used"):
        L.Trainer(**quiet, max_epochs=2).fit(other, batches, ckpt_path=path)
    assert other.split_points == learner.split_points


def test_an_optimizer_that_reads_numbers_is_replaced_with_a_note():
    learner = learner_of(ResNet, optimizer=torch.optim.Adafactor)
    builder, setting = prepared(learner, batch_of(), SAMPLES)
    _, modules = builder.make(builder.points())
    result = rehearse(learner, modules, learner.method, setting)
    assert "two numbers per parameter" in result.notes[0]
    assert result.modules[1].optimizer > 2 * result.modules[1].gradient


def test_a_command_lines_optimizer_is_not_touched():
    """LightningCLI puts a method on the learner that holds an optimizer of the real weights."""
    learner = learner_of()
    held = torch.optim.Adam(learner.module.parameters())
    learner.configure_optimizers = MethodType(partial(lambda held, _: held, held), learner)
    builder, setting = prepared(learner, batch_of(), SAMPLES)
    _, modules = builder.make(builder.points())
    result = rehearse(learner, modules, learner.method, setting)
    assert not result.notes
    assert all(part.optimizer > 2 * part.gradient for part in result.modules)
    assert not held.state
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_stages_get_even_shares_of_time(tmp_path):
    learner = learner_of(PreAct)
    plan = plan_partition(learner, batch_of(PreAct), stages=2, measure="cpu")
    assert len(plan.choice.stages) == len(plan.choice.modules) == 2
    assert plan.measured
    assert sum(part.share for part in plan.choice.modules) == pytest.approx(1)
    assert all(0 < peak < plan.choice.peak for peak in plan.choice.stages)
    tight = plan_partition(learner, batch_of(PreAct), stages=2, memory="1kB")
    assert not tight.choice.fits
    assert tight.choice.recompute
    assert plan.save_picture(tmp_path / "plan.png").stat().st_size > 10_000


def test_without_data_an_example_is_enough():
    learner, batch = learner_of(), batch_of()
    learner.module.example_input_array = batch[0][:1]
    builder, made_up = prepared(learner, None, SAMPLES)
    peaks = [
        rehearse(learner, [], methods.EndToEnd(), setting).peak
        for setting in (made_up, Setting(batch, SAMPLES))
    ]
    assert peaks[0] == peaks[1]
    assert builder.cutter.unit_points


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "'8GiB'"),
        ({"memory": -1}, "number of bytes"),
        ({"stages": 1}, "2 or more"),
        ({"stages": 99}, "at most"),
        ({"batch_size": 0}, "1 or more"),
        ({"reserve": 2}, "0 to 0.9"),
    ],
)
def test_what_a_plan_can_not_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_partition(learner_of(), batch_of(), **options)


def test_a_plan_needs_a_learner_a_method_and_an_example():
    with pytest.raises(TypeError, match="LocalLearner around"):
        plan_partition(make(ResNet, torch.float32), batch_of())
    with pytest.raises(ValueError, match="no local modules to plan"):
        plan_partition(learner_of(ResNet, "EndToEnd"), batch_of())
    with pytest.raises(ValueError, match="example_input_array"):
        plan_partition(learner_of())
    with pytest.raises(ValueError, match="needs num_modules"):
        Partition(balance="memory")
    assert [size("", "", text) for text in ("1kB", "2 KiB", "1.5MiB", 7)] == [
        1000,
        2048,
        1572864,
        7,
    ]


def test_the_command(capsys, monkeypatch, tmp_path):
    """A configuration of `fit` with a Trainer that this machine can't make."""
    monkeypatch.chdir(ROOT)
    picture = tmp_path / "plan.png"
    config = str(ROOT / "examples/image_classification/digits_parallel.yaml")
    options = ["--memory", "1MB", "--batch_size", "32", "--picture", str(picture)]
    options += ["--trainer.accelerator", "gpu", "--model.init_args.method", "Greedy"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", config, *options])
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "Nothing fits" in text
    assert "each unit as a local module" in text
    assert "partition:\n- " in text
    assert picture.exists()
