"""Precisions; fp16 with one loss scaler per local module on the CPU, where a scaler works too."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from simple import METHODS, Lit, run, wrap

from lightning_local import LocalLearner, couplings, heads, losses, methods
from lightning_local.links import InProcessLinks
from lightning_local.methods import LocalMethod

PIXELS = ([0.5], [0.1])
COMBINED = {
    "predsim-sgr": lambda: methods.PredSim(coupling=couplings.GradientReconciliation()),
    "contrast-link": lambda: methods.InfoPro(
        denormalize=PIXELS, task="contrast", coupling=couplings.BackwardLink()
    ),
    "augmented-infopro-sgr": lambda: LocalMethod(
        heads.Augmented(1), losses.InfoPro(PIXELS), couplings.GradientReconciliation()
    ),
}
LOCAL = {**{n: make for n, make in METHODS.items() if n != "EndToEnd"}, **COMBINED}


def plain_module(module):
    return module


def half(interval=4):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


class Spy(InProcessLinks):
    """Links that keep the types of what passes."""

    def __init__(self):
        super().__init__()
        self.gradients = set()

    def send(self, k, message):
        if message.gradient is not None:
            self.gradients.add(message.gradient.dtype)
        super().send(k, message)

    def return_error(self, k, error):
        self.gradients.add(error.dtype)
        super().return_error(k, error)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
@pytest.mark.parametrize("method", LOCAL)
def test_precisions_train_every_method(precision, method, quiet):
    """And gradients cross a boundary in float32, or in float64 if that is the precision."""
    links = Spy()

    def make(module):
        learner = LocalLearner(module, LOCAL[method]())
        learner.links = links
        return learner

    trainer, learner = run(make, quiet, epochs=1, precision=precision)
    assert trainer.global_step == 3
    assert all(p.isfinite().all() for p in learner.parameters())
    coupled = not isinstance(learner.method.coupling, couplings.Isolated)
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert links.gradients == ({wanted} if coupled else set())


@pytest.mark.parametrize("method", LOCAL)
def test_bf16_is_near_float32(method, quiet):
    """Each module's loss of the first steps, under autocast and without."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        recorded = []

        class Watch(L.Callback):
            def on_before_backward(self, trainer, module, loss, recorded=recorded):
                recorded.append(float(loss.detach()))

        def make(module):
            return LocalLearner(module, LOCAL[method]())

        run(make, quiet, epochs=1, precision=precision, callbacks=[Watch()])
        found.append(torch.tensor(recorded))
    assert len(found[0]) > 3
    # bf16 has 8 bits: 0.4 % per operation.
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", LOCAL)
def test_fp16_has_one_scaler_per_module(method, quiet):
    """Growth every four steps, whatever K; with one module as in the plain run."""
    plain = half()
    run(plain_module, quiet, plugins=[plain], epochs=4)
    expected = plain.scaler.get_scale()
    assert expected == 2.0**11

    def make(module):
        return LocalLearner(module, LOCAL[method]())

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
