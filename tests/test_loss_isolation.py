"""Which loss reaches which parameters, for the presets whose losses have networks of their own.

A loss is scaled from outside, by a hook on the objective, or by the user's own loss in the last
module. Gradients are those that each optimizer steps with, float64.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from networks import Cnn, Tagger
from settings import batches, fit, learner_of, make
from test_limit_cases import Gradients, body_names, head_names, reach, same
from torch import nn
from twin import DENORMALIZE, RGB

from lightning_local import LocalLearner, couplings, losses, methods
from lightning_local.couplings import Coupling
from lightning_local.methods import LocalMethod

PRESETS: dict[str, Any] = {
    "dgl": methods.DGL,
    "predsim": functools.partial(methods.PredSim, pool_features=32),
    "infopro": functools.partial(methods.InfoPro, denormalize=RGB),
    "contrast": functools.partial(methods.InfoPro, denormalize=RGB, task="contrast"),
}
COUPLINGS: dict[str, Coupling] = {
    "isolated": couplings.Isolated(),
    "link": couplings.BackwardLink(),
    "sgr": couplings.GradientReconciliation(0.05),
}
SIZES = [2, 1, 1, 1]


def gradients(learner: LocalLearner, scales: dict[int, float] | None = None) -> Gradients:
    """Gradients of a first step; the learner is left as it was."""
    before = copy.deepcopy(learner.state_dict())
    hooks, last = [], learner.num_modules - 1
    for k, scale in (scales or {}).items():
        if k < last:
            hook = functools.partial(scaled, scale)
            hooks.append(learner.local_modules[k].objective.register_forward_hook(hook))
    learner.module.loss.scale = (scales or {}).get(last, 1.0)
    found = fit(learner, batches(type(learner.module.net), 1)).gradients[0]
    for handle in hooks:
        handle.remove()
    learner.load_state_dict(before)
    return found


def scaled(scale: float, module: nn.Module, args: Any, loss: torch.Tensor) -> torch.Tensor:
    return scale * loss


@pytest.mark.parametrize(
    ("preset", "kind"), [("dgl", "isolated"), *itertools.product(list(PRESETS)[1:], COUPLINGS)]
)
def test_a_loss_reaches_its_own_module_and_at_most_one_neighbour(preset: str, kind: str) -> None:
    """Scaling l_j, image and similarity terms included, leaves all others to the last bit."""
    learner = learner_of(make(Cnn), PRESETS[preset](coupling=COUPLINGS[kind]), 4)
    before = gradients(learner)
    for j in range(4):
        after = gradients(learner, {j: 3.0})
        changed = set(before) - same(after, before)
        assert changed <= reach(kind, j, Cnn, SIZES, before)
        own = body_names(Cnn, SIZES, j) | head_names(before, j)
        if kind == "link" and j > 0:
            own |= body_names(Cnn, SIZES, j - 1)
        # A bias in front of a BatchNorm has a gradient of zero; a weight has not.
        assert {name for name in own if name.endswith("weight")} <= changed
        if kind == "sgr" and j < 3:
            assert {name for name in body_names(Cnn, SIZES, j + 1) if "conv" in name} <= changed
        if kind == "isolated":
            for name in own:
                torch.testing.assert_close(after[name], 3 * before[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("preset", ["predsim", "infopro", "contrast"])
def test_gradients_live_in_one_module(preset: str) -> None:
    """With every other loss at zero, only what l_j reaches has a gradient that is not zero."""
    learner = learner_of(make(Cnn), PRESETS[preset](), 4)
    for j in range(4):
        found = gradients(learner, {k: 0.0 for k in range(4) if k != j})
        alive = {name for name, g in found.items() if g is not None and g.any()}
        assert alive <= body_names(Cnn, SIZES, j) | head_names(found, j)
        assert alive


def parts(network: type[nn.Module], loss: Any, full: LocalLearner) -> Gradients:
    """Gradients of a loss, from the weights of `full`; None where it has no such parameter."""
    method = LocalMethod(full.method.head, loss)
    learner = learner_of(make(network), method)
    state = full.state_dict()
    learner.load_state_dict({name: state[name] for name in learner.state_dict()})
    return gradients(learner)


@pytest.mark.parametrize("network", [Cnn, Tagger])
def test_predsim_is_the_sum_of_its_parts(network: type[nn.Module]) -> None:
    """Similarity reaches body and projection, the criterion body and classifier."""
    full = learner_of(make(network), methods.PredSim(beta=0.7, pool_features=32))
    sim = parts(network, losses.PredSim(parts="sim"), full)
    pred = parts(network, losses.PredSim(parts="pred"), full)
    for name, found in gradients(full).items():
        last = name in body_names(network, [1] * full.num_modules, full.num_modules - 1)
        if ".projection." in name:
            assert name not in pred
            expected = 0.7 * sim[name]
        elif ".head." in name:
            assert name not in sim
            expected = 0.3 * pred[name]
        else:
            expected = sim[name] if last else 0.7 * sim[name] + 0.3 * pred[name]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("task", ["softmax", "contrast"])
@pytest.mark.parametrize("network", [Cnn, Tagger])
def test_infopro_is_the_sum_of_its_parts(network: type[nn.Module], task: str) -> None:
    """The image reaches body and decoder, the task body and head."""

    def loss(first: tuple[float, float], last: tuple[float, float]) -> losses.InfoPro:
        return losses.InfoPro(DENORMALIZE[network], task, first, last)

    full = learner_of(make(network), LocalMethod(methods.SGR().head, loss((3.0, 0.5), (1.0, 0.7))))
    image = parts(network, loss((1.0, 0.0), (1.0, 0.0)), full)
    only_task = parts(network, loss((0.0, 1.0), (0.0, 1.0)), full)
    num_modules = full.num_modules
    owners = {
        name: k
        for k in range(num_modules)
        for name in body_names(network, [1] * num_modules, k) | head_names(image, k)
    }
    for name, found in gradients(full).items():
        k = owners[name]
        r = k / (num_modules - 2)
        lam = (3.0 - 2.0 * r, 0.5 + 0.2 * r)
        if ".decoder." in name:
            assert name not in only_task  # no reconstruction, no decoder
            expected = lam[0] * image[name]
        elif ".head." in name:
            assert image[name] is None
            expected = lam[1] * only_task[name]
        elif k == num_modules - 1:
            expected = image[name]
        else:
            expected = lam[0] * image[name] + lam[1] * only_task[name]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
