"""Limit cases and invariances that the rules of the methods force.

Equal means bit for bit unless a tolerance says why. Gradients are those that each optimizer steps
with, read by a hook.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from networks import CLASSES, Cnn, Mlp, PreAct, ResNet, Vit
from settings import Lit, Recorder, ScaledCrossEntropy, batches, fit, learner_of, make
from torch import nn

from lightning_local import LocalLearner, couplings, heads, methods
from lightning_local.methods import LocalMethod

Gradients = dict[str, torch.Tensor | None]
DISTANCES = ("squared_l2", "mse", "cosine", "normalized_l2")
NEUTRAL = {
    "backlink-weight": couplings.BackwardLink(weight=0.0),
    "backlink-length": couplings.BackwardLink(length=0),
    **{f"sgr-{name}": couplings.GradientReconciliation(0.0, name) for name in DISTANCES},
}
NEUTRAL_HEADS = {Cnn: heads.Conv(), PreAct: heads.Linear(), Mlp: heads.Conv(16)}


def same(found: Gradients, expected: Gradients) -> set[str]:
    """Names of the tensors that are equal bit for bit."""
    assert set(found) == set(expected)
    return {
        name
        for name, value in expected.items()
        if (found[name] is None and value is None)
        or (found[name] is not None and value is not None and torch.equal(found[name], value))
    }


def trained(
    network: type[nn.Module], method: Any, partition: Any = 3, steps: int = 4, **options: Any
) -> tuple[LocalLearner, Recorder]:
    dtype = options.pop("dtype", torch.float32)
    learner = learner_of(make(network, dtype, **options), method, partition)
    return learner, fit(learner, batches(network, steps, dtype=dtype))


def gradients(
    network: type[nn.Module],
    method: Any,
    partition: Any = 3,
    scales: dict[int, float] | None = None,
) -> Gradients:
    """Gradients of the first step, float64; `scales` multiplies the losses of some modules."""
    learner = learner_of(make(network), method, partition)
    for k, scale in (scales or {}).items():
        if k == learner.num_modules - 1:
            learner.module.loss.scale = scale
        else:
            learner.local_modules[k].objective.criterion.scale = scale
    return fit(learner, batches(network, 1)).gradients[0]


def owner(network: type[nn.Module], sizes: list[int]) -> dict[str, int]:
    """For each parameter of the user's module, by name, the index of its local module."""
    lit = make(network)
    pieces = lit.net.pieces()
    index = {}
    for k, size in enumerate(sizes):
        for _ in range(size):
            index.update({id(p): k for p in pieces.pop(0).parameters()})
    return {f"module.{name}": index[id(p)] for name, p in lit.named_parameters()}


def body_names(network: type[nn.Module], sizes: list[int], k: int) -> set[str]:
    return {name for name, j in owner(network, sizes).items() if j == k}


def head_names(found: Gradients, k: int) -> set[str]:
    return {name for name in found if name.startswith(f"local_modules.{k}.")}


@functools.cache
def greedy(network: type[nn.Module]) -> tuple[LocalLearner, Recorder]:
    return trained(network, methods.Greedy(head=NEUTRAL_HEADS[network]))


@pytest.mark.parametrize("network", NEUTRAL_HEADS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_coupling_is_greedy(network: type[nn.Module], name: str) -> None:
    method = LocalMethod(NEUTRAL_HEADS[network], coupling=NEUTRAL[name])
    learner, record = trained(network, method)
    other, expected = greedy(network)
    assert set(learner.state_dict()) == set(other.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(learner.state_dict()[key], value), key
    for found, wanted in zip(record.losses, expected.losses, strict=True):
        assert all(map(torch.equal, found, wanted))


def test_sgr_of_weight_zero_is_greedy_with_attention() -> None:
    """To rounding only: SGR needs the plain attention kernel, the others run the fused one."""
    learner, _ = trained(Vit, methods.SGR(weight=0.0), dtype=torch.float64)
    other, _ = trained(Vit, methods.Greedy(head=heads.Conv()), dtype=torch.float64)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(learner.state_dict()[key], value, rtol=1e-10, atol=1e-10)


COUPLINGS = {
    "link": couplings.BackwardLink,
    "tail": lambda weight: couplings.BackwardLink(weight, length=1),
    **{
        name: functools.partial(couplings.GradientReconciliation, distance=name)
        for name in DISTANCES
    },
}


@pytest.mark.parametrize(
    ("network", "name"),
    [*((Cnn, name) for name in COUPLINGS), (ResNet, "squared_l2"), (Vit, "cosine"), (Vit, "tail")],
)
def test_gradients_are_linear_in_the_weight(network: type[nn.Module], name: str) -> None:
    make_coupling = COUPLINGS[name]
    sizes = [2, 2] if network is Vit else [3, 2]
    weight = 0.25
    zero, once, twice = (
        gradients(network, LocalMethod(heads.Conv(16), coupling=make_coupling(w)), 2)
        for w in (0.0, weight, 2 * weight)
    )
    receiver = 0 if isinstance(make_coupling(1.0), couplings.BackwardLink) else 1
    moved = set()
    for key in zero:
        step = once[key] - zero[key]
        scale = float(once[key].abs().max()) + 1e-9
        # A difference of gradients loses the digits of the larger one.
        torch.testing.assert_close(twice[key] - zero[key], 2 * step, rtol=1e-9, atol=1e-12 * scale)
        if float(step.abs().max()) > 1e-9 * scale:
            moved.add(key)
    body = body_names(network, sizes, receiver)
    assert moved, "the coupling did nothing"
    assert moved <= body, "a neighbour got the coupling's gradient"
    # Module 0 learns from BackLink, module 1 from SGR; the other one and the head see nothing.
    assert set(zero) - body <= same(once, zero)
    if name == "tail":
        last_unit = body_names(network, [1, 1, 2] if network is Vit else [2, 1, 2], 1)
        assert moved <= last_unit


def reach(kind: str, j: int, network: type[nn.Module], sizes: list[int], found: Gradients) -> set:
    """Names of the parameters that l_j may reach."""
    names = body_names(network, sizes, j) | head_names(found, j)
    if kind == "link" and j > 0:
        names |= body_names(network, sizes, j - 1)
    if kind == "sgr" and j + 1 < len(sizes):
        names |= body_names(network, sizes, j + 1) | head_names(found, j + 1)
    return names


@pytest.mark.parametrize("j", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["isolated", "link", "sgr"])
def test_a_loss_reaches_its_own_module_and_at_most_one_neighbour(kind: str, j: int) -> None:
    """Scaling l_j leaves every other gradient as it was, to the last bit.

    For K = 3 or more this holds the bounded path of BackLink (l_3 gives theta_1 exactly nothing)
    and that SGR sends the gradient of l_k alone, without the share of R_k.
    """
    coupling = {
        "isolated": couplings.Isolated(),
        "link": couplings.BackwardLink(),
        "sgr": couplings.GradientReconciliation(0.05),
    }[kind]
    sizes = [2, 1, 1, 1]
    method = LocalMethod(heads.Conv(16), coupling=coupling)
    before = gradients(Cnn, method, 4)
    after = gradients(Cnn, method, 4, scales={j: 3.0})
    allowed = reach(kind, j, Cnn, sizes, before)
    changed = set(before) - same(after, before)
    assert changed <= allowed
    # A bias behind a BatchNorm and the like may have a gradient of zero; a weight has not.
    assert {name for name in allowed if "conv" in name} <= changed


def test_two_modules_without_the_first_loss_are_backpropagation() -> None:
    found = gradients(Cnn, methods.BackLink(), 2, scales={0: 0.0})
    lit = make(Cnn)
    plain = fit(lit, batches(Cnn, 1)).gradients[0]
    for name, value in plain.items():
        # The factor 0 on l_1 is added; nothing else differs.
        torch.testing.assert_close(found[f"module.{name}"], value, rtol=1e-12, atol=1e-15)
    for name in head_names(found, 0):
        assert not found[name].any(), name


def test_backlink_is_not_backpropagation_of_the_sum() -> None:
    """The trap of methods.md: links that are chained lead to the gradient of all losses' sum."""
    found = gradients(Cnn, methods.BackLink(), 3)
    lit = make(Cnn)
    learner, criterion = learner_of(lit, methods.BackLink(), 3), ScaledCrossEntropy()
    x, y = batches(Cnn, 1)[0]
    hidden, total = x, torch.zeros((), dtype=x.dtype)
    pieces = lit.net.pieces()
    for k, size in enumerate([2, 2, 1]):
        for _ in range(size):
            hidden = pieces.pop(0)(hidden)
        head = learner.local_modules[k].head
        total = total + (lit.loss(hidden, y) if head is None else criterion(head(hidden), y))
    total.backward()
    name = "blocks.{}.conv.weight"
    weights = [lit.net.get_parameter(name.format(i)) for i in range(5)]
    link = [found["module.net." + name.format(i)] for i in range(5)]
    torch.testing.assert_close(link[4], weights[4].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(link[3], weights[3].grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(link[0], weights[0].grad, rtol=1e-3)


@pytest.mark.parametrize(("partition", "length"), [(2, 3), (2, 7), ("units", 1)])
def test_full_length_is_the_whole_module(partition: Any, length: int) -> None:
    learner, _ = trained(Cnn, methods.BackLink(length=length), partition)
    whole, _ = trained(Cnn, methods.BackLink(length=None), partition)
    for key, value in whole.state_dict().items():
        assert torch.equal(learner.state_dict()[key], value), key


@pytest.mark.parametrize(
    "method",
    [methods.BackLink(), methods.SGR(weight=0.1), methods.AugLocal()],
    ids=["link", "sgr", "aug"],
)
def test_one_module_is_plain_training(method: LocalMethod) -> None:
    plain = make(Cnn, torch.float32)
    fit(plain, batches(Cnn, dtype=torch.float32))
    lit = make(Cnn, torch.float32)
    if isinstance(method.coupling, couplings.Isolated):
        learner = learner_of(lit, method, 1)
    else:
        with pytest.warns(UserWarning, match="no effect with one local module"):
            learner = learner_of(lit, method, 1)
    fit(learner, batches(Cnn, dtype=torch.float32))
    for key, value in plain.state_dict().items():
        assert torch.equal(learner.state_dict()[f"module.{key}"], value), key


def test_couplings_have_no_parameters() -> None:
    shapes = [
        {name: p.shape for name, p in learner_of(make(Cnn), method, 3).named_parameters()}
        for method in (
            methods.Greedy(head=heads.Conv()),
            methods.BackLink(),
            methods.SGR(weight=0.1),
        )
    ]
    assert shapes[0] == shapes[1] == shapes[2]


class TwoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_gradients_have_no_distance(distance: str) -> None:
    """Head 1 and body 2 are the same linear map and so are their losses: g_in(2) = g_out(1)."""
    states, x = [], batches(Mlp)[0][0]
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        lit = Lit(TwoLinear(), momentum=0.0).double()
        lit.loss.smoothing = 0.0
        torch.manual_seed(2)
        learner = LocalLearner(
            lit,
            methods.SGR(weight=weight, distance=distance, head=heads.Linear()),
            2,
            criterion=ScaledCrossEntropy(),
        )
        learner.build(x)
        linear = [m for m in learner.local_modules[0].head.modules() if isinstance(m, nn.Linear)]
        linear[0].load_state_dict(lit.net.second.state_dict())
        record = fit(learner, batches(Mlp, 1))
        floor = 1e-6 if distance == "normalized_l2" else 0.0  # under the root: 1e-12
        ratio = record.logged[0]["local/01/reconciliation"]
        loss = float(record.losses[0][0])
        assert ratio * loss == pytest.approx(floor, abs=1e-12)
        assert math.isclose(float(record.losses[0][1]), loss + weight * floor, rel_tol=1e-12)
        states.append(learner.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-12, atol=1e-12)
