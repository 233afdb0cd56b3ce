"""Predicted memory is measured memory, and a rehearsal leaves nothing behind."""

import threading
from functools import partial
from types import MethodType

import pytest
import simple
import torch
from live import SAMPLES, batch_of, learner_of, measured
from networks import ResNet, Vit
from torch import nn

from lightning_local import methods, plan_partition
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Setting, prepared


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
    assert found == pytest.approx(expected.peak, rel=0.02)


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


def test_what_can_not_be_copied_is_named():
    learner = learner_of()
    learner.module.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Lit can't be copied \(TypeError: cannot pickle '_th"):
        plan_partition(learner, batch_of())
