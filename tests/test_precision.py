"""fp16: one loss scaler per local module, on the CPU, where a scaler works too."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from simple import Lit, run, wrap

from lightning_local import LocalLearner, methods


def plain_module(module):
    return module


def half(interval=4):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "SGR", "AugLocal"])
def test_fp16_has_one_scaler_per_module(method, quiet):
    """Growth every four steps, whatever K; with one module as in the plain run."""
    plain = half()
    run(plain_module, quiet, plugins=[plain], epochs=4)
    expected = plain.scaler.get_scale()
    assert expected == 2.0**11

    def make(module):
        return LocalLearner(module, methods.AugLocal(depth=1) if method == "AugLocal" else method)

    clipping = {"gradient_clip_val": 0.01}
    plugin = half()
    trainer, learner = run(make, quiet, plugins=[plugin], epochs=4, **clipping)
    states = learner.loop.scalers.save()
    assert [state["scale"] for state in states] == [expected] * learner.num_modules
    assert trainer.global_step == 12


def test_fp16_with_one_module_equals_the_plain_run(quiet):
    _, plain = run(plain_module, quiet, plugins=[half()], gradient_clip_val=0.1)
    _, local = run(wrap(1), quiet, plugins=[half()], gradient_clip_val=0.1)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, local.module.state_dict()[name]), name


def test_an_overflow_in_one_module_leaves_the_others_scales(quiet):
    class Poison(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            body = pl_module.local_modules[1].body
            gradient = next(iter(body.parameters())).grad
            if trainer.global_step == 1 and gradient is not None:
                gradient.fill_(float("inf"))

    _, learner = run(wrap("units"), quiet, plugins=[half(100)], callbacks=[Poison()], epochs=1)
    scales = [state["scale"] for state in learner.loop.scalers.save()]
    assert scales == [2.0**8, 2.0**7, 2.0**8, 2.0**8]
    assert all(p.isfinite().all() for p in learner.parameters())


class Scales(L.Callback):
    """Another scale for each local module."""

    def __init__(self, exponents):
        self.exponents = exponents

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        states = pl_module.loop.scalers.save()
        changed = [
            {**state, "scale": 2.0**e} for state, e in zip(states, self.exponents, strict=True)
        ]
        pl_module.loop.scalers.load(changed)


LINKED = {
    "BackLink": methods.BackLink,
    "SGR": lambda: methods.SGR(weight=3.0, distance="cosine"),
}


@pytest.mark.parametrize("method", LINKED)
@pytest.mark.parametrize("window", [1, 2])
def test_what_crosses_a_boundary_knows_no_scale(method, window, quiet):
    """Scales are powers of two, so other ones change no digit but those that underflow."""
    weights = []
    for exponents in ((10, 10, 10, 10), (10, 4, 13, 8)):
        _, learner = run(
            lambda m: LocalLearner(m, LINKED[method]()), quiet, lambda: Lit(), plugins=[half(1000)],
            callbacks=[Scales(exponents)], epochs=1, accumulate_grad_batches=window,
        )  # fmt: skip
        weights.append(dict(learner.named_parameters()))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=2e-4)
    _, isolated = run(
        lambda m: LocalLearner(m, methods.LocalMethod(LINKED[method]().head)),
        quiet, plugins=[half(1000)], epochs=1, accumulate_grad_batches=window,
    )  # fmt: skip
    name = "module.network.blocks.1.conv.weight"
    apart = (dict(isolated.named_parameters())[name] - weights[0][name]).abs().max()
    assert apart > 2e-3, "the coupling does too little for this test to mean anything"
