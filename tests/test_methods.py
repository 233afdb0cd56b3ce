"""Every method and every combination: three steps inside a Trainer equal `reference.py`.

Compared in float64 to 1e-10: losses, what is back-propagated, gradients by name, and all weights
and buffers of network and heads after the fit, momentum and weight decay included. The reference
keeps all graphs and steps once at the end of the batch, so the comparison also shows that stepping
each module at once changes nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks import Cnn, Mlp, PreAct, ResNet, Tagger, Vit
from reference import Coupling, Reference, Step
from settings import ScaledCrossEntropy, batches, fit, learner_of, make
from torch import nn

from lightning_local import LocalLearner, Partition, couplings, heads, methods
from lightning_local.methods import LocalMethod

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # float64; sums run in another order
Link, Reconcile = couplings.BackwardLink, couplings.GradientReconciliation
SGR_WEIGHT = 0.05


@dataclass
class Case:
    """A method on a network.

    `sizes` is how many units each local module must get, `frozen` which units don't train.
    """

    id: str
    network: type[nn.Module]
    method: Any
    sizes: list[int]
    coupling: Coupling = field(default_factory=Coupling)
    partition: Any = "units"
    frozen: tuple[int, ...] = ()


def link(**options: Any) -> Coupling:
    return Coupling("backlink", **options)


def sgr(**options: Any) -> Coupling:
    return Coupling("sgr", **{"weight": SGR_WEIGHT, **options})


def sgr_method(**options: Any) -> LocalMethod:
    return methods.SGR(**{"weight": SGR_WEIGHT, **options})


def augmented(**options: Any) -> LocalMethod:
    return LocalMethod(heads.Augmented(1), coupling=options.pop("coupling", None))


CASES = [
    # greedy
    Case("greedy-cnn", Cnn, methods.Greedy(), [1] * 5),
    Case("greedy-cnn-2", Cnn, methods.Greedy(), [3, 2], partition=2),
    Case("greedy-cnn-3", Cnn, methods.Greedy(), [2, 2, 1], partition=3),
    Case("greedy-cnn-points", Cnn, methods.Greedy(), [1, 3, 1], partition=["blocks.0", "blocks.3"]),
    Case(
        "greedy-cnn-partition",
        Cnn,
        methods.Greedy(),
        [4, 1],
        partition=Partition(split_points=["blocks.3"]),
    ),
    Case("greedy-resnet", ResNet, methods.Greedy(), [1] * 5),
    Case("greedy-preact", PreAct, methods.Greedy(), [1] * 4),
    Case("greedy-mlp", Mlp, methods.Greedy(), [1] * 4),
    Case("greedy-vit", Vit, methods.Greedy(), [1] * 4),
    Case("greedy-tagger", Tagger, methods.Greedy(), [1] * 4),
    Case("conv-cnn", Cnn, methods.Greedy(head=heads.Conv()), [1] * 5),
    Case("conv-vit", Vit, methods.Greedy(head=heads.Conv(16)), [1] * 4),
    # AugLocal: the last depth + 1 units are one module, before the cuts are made
    Case("auglocal-resnet", ResNet, methods.AugLocal(depth=2), [1, 1, 3]),
    Case("auglocal-resnet-1", ResNet, methods.AugLocal(depth=1), [1, 1, 1, 2]),
    Case("auglocal-resnet-0", ResNet, methods.AugLocal(depth=0, pyramid=0), [1] * 5),
    Case("auglocal-resnet-3-of-5", ResNet, methods.AugLocal(depth=1), [2, 3], partition=3),
    Case(
        "auglocal-points",
        ResNet,
        methods.AugLocal(depth=2),
        [2, 2, 1],
        partition=["layer1.0", "layer2.0"],
    ),
    Case("auglocal-copy-resnet", ResNet, methods.AugLocal(depth=2, block="copy"), [1, 1, 3]),
    Case("auglocal-init-resnet", ResNet, methods.AugLocal(depth=2, init="copy"), [1, 1, 3]),
    Case("auglocal-cnn", Cnn, methods.AugLocal(depth=2), [1, 1, 3]),
    Case("auglocal-preact", PreAct, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-mlp", Mlp, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-vit", Vit, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-tagger", Tagger, methods.AugLocal(depth=1), [1, 1, 2]),
    # BackLink
    Case("backlink-cnn", Cnn, methods.BackLink(), [1] * 5, link()),
    Case("backlink-cnn-2", Cnn, methods.BackLink(weight=0.3), [3, 2], link(weight=0.3), 2),
    Case(
        "backlink-cnn-3-tail",
        Cnn,
        methods.BackLink(weight=2.0, length=1),
        [2, 2, 1],
        link(weight=2.0, length=1),
        3,
    ),
    Case(
        "backlink-points-tail",
        Cnn,
        methods.BackLink(length=2),
        [3, 1, 1],
        link(length=2),
        ["blocks.2", "blocks.3"],
    ),
    Case("backlink-resnet", ResNet, methods.BackLink(), [2, 2, 1], link(), 3),
    Case("backlink-preact", PreAct, methods.BackLink(), [1] * 4, link()),
    Case("backlink-preact-tail", PreAct, methods.BackLink(length=1), [2, 2], link(length=1), 2),
    Case("backlink-mlp", Mlp, methods.BackLink(weight=0.5), [1] * 4, link(weight=0.5)),
    Case("backlink-vit", Vit, methods.BackLink(), [2, 2], link(), 2),
    Case("backlink-tagger", Tagger, methods.BackLink(), [1] * 4, link()),
    # SGR
    *(
        Case(
            f"sgr-cnn-{name}",
            Cnn,
            sgr_method(distance=name),
            [2, 2, 1],
            sgr(distance=name),
            3,
        )
        for name in ("squared_l2", "mse", "cosine", "normalized_l2")
    ),
    Case("sgr-units", Cnn, sgr_method(), [1] * 5, sgr()),
    Case("sgr-every", Cnn, sgr_method(every=2), [3, 2], sgr(every=2), 2),
    Case("sgr-warmup", Cnn, sgr_method(warmup=2), [3, 2], sgr(warmup=2), 2),
    Case("sgr-warmup-5", Cnn, sgr_method(warmup=5), [3, 2], sgr(warmup=5), 2),
    Case("sgr-resnet", ResNet, sgr_method(), [2, 2, 1], sgr(), 3),
    Case("sgr-preact", PreAct, sgr_method(), [1] * 4, sgr()),
    Case("sgr-mlp", Mlp, sgr_method(), [1] * 4, sgr()),
    Case("sgr-vit", Vit, sgr_method(), [1] * 4, sgr()),
    Case("sgr-tagger", Tagger, sgr_method(distance="cosine"), [2, 2], sgr(distance="cosine"), 2),
    # combinations that no paper has
    Case("augmented-link", ResNet, augmented(coupling=Link(0.7)), [1, 1, 1, 2], link(weight=0.7)),
    Case("auglocal-link-cnn", Cnn, methods.AugLocal(depth=2, coupling=Link()), [1, 1, 3], link()),
    Case(
        "auglocal-link-preact",
        PreAct,
        methods.AugLocal(depth=1, coupling=Link()),
        [1, 1, 2],
        link(),
    ),
    Case("augmented-sgr", ResNet, augmented(coupling=Reconcile(SGR_WEIGHT)), [1, 1, 1, 2], sgr()),
    Case(
        "auglocal-sgr-vit",
        Vit,
        methods.AugLocal(depth=1, coupling=Reconcile(SGR_WEIGHT, "cosine")),
        [1, 1, 2],
        sgr(distance="cosine"),
    ),
    Case("linear-link", Cnn, methods.Greedy(coupling=Link(length=1)), [3, 2], link(length=1), 2),
    Case("linear-sgr", Cnn, methods.Greedy(coupling=Reconcile(SGR_WEIGHT)), [2, 2, 1], sgr(), 3),
    Case("linear-link-mlp", Mlp, methods.BackLink(head=heads.Linear()), [2, 2], link(), 2),
    Case("linear-sgr-mlp", Mlp, sgr_method(head=heads.Linear()), [2, 2], sgr(), 2),
    # a head that begins by overwriting the hidden state, which the next body needs as it was
    *(
        Case(
            f"overwriting-head-{how.kind}",
            PreAct,
            methods.AugLocal(depth=1, coupling=coupling),
            [3, 1],
            how,
            ["blocks.2"],
        )
        for coupling, how in (
            (couplings.Isolated(), Coupling()),
            (Link(), link()),
            (Reconcile(SGR_WEIGHT), sgr()),
        )
    ),
    # frozen units: one, or all of a module
    *(
        Case(f"frozen-{name}-{'-'.join(map(str, units))}", Cnn, method, [2, 2, 1], how, 3, units)
        for name, method, how in (
            ("greedy", methods.Greedy(), Coupling()),
            ("backlink", methods.BackLink(), link()),
            ("tail", methods.BackLink(length=1), link(length=1)),
            ("sgr", sgr_method(), sgr()),
        )
        for units in ((0,), (0, 1), (2, 3))
    ),
]


def grouped(pieces: list[nn.Module], sizes: list[int]) -> list[list[nn.Module]]:
    assert sum(sizes) == len(pieces)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [pieces[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class Twin:
    """The reference on deep copies of the learner's module and heads, under the same names."""

    def __init__(self, learner: LocalLearner, case: Case) -> None:
        self.module: Any = copy.deepcopy(learner.module)
        own_heads = [module.head for module in learner.local_modules]
        assert own_heads[-1] is None
        self.heads: list[Any] = copy.deepcopy(own_heads[:-1])
        self.named = {f"module.{name}": p for name, p in self.module.named_parameters()}
        for k, head in enumerate(self.heads):
            for name, p in head.named_parameters():
                self.named[f"local_modules.{k}.head.{name}"] = p
        self.reference = Reference(
            units=grouped(self.module.net.pieces(), case.sizes),
            heads=self.heads,
            criterion=ScaledCrossEntropy(),
            last_criterion=self.module.loss,
            coupling=case.coupling,
            optimizer=torch.optim.SGD(self.named.values(), lr=0.1, momentum=0.9, weight_decay=1e-2),
        )

    def check_state(self, learner: LocalLearner) -> None:
        expected = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for k, head in enumerate(self.heads):
            for name, value in head.state_dict().items():
                expected[f"local_modules.{k}.head.{name}"] = value
        found = learner.state_dict()
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=_at(name))


def _at(name: str) -> Any:
    return lambda message: f"{name}: {message}"


def check_step(
    expected: Step, twin: Twin, losses: list[torch.Tensor], gradients: dict[str, Any]
) -> None:
    assert len(losses) == len(expected.objectives)
    for k, (found, value) in enumerate(zip(losses, expected.objectives, strict=True)):
        torch.testing.assert_close(found, value.detach(), **TOLERANCE, msg=_at(f"loss {k}"))
    assert set(gradients) == set(twin.named)
    for name, parameter in twin.named.items():
        value = expected.gradients.get(id(parameter))
        found = gradients[name]
        assert (found is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found, value, **TOLERANCE, msg=_at(name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_three_steps_equal_the_reference(case: Case) -> None:
    lit = make(case.network)
    for i in case.frozen:
        lit.net.pieces()[i].requires_grad_(False)
    learner = learner_of(lit, case.method, case.partition)
    twin = Twin(learner, case)
    data = batches(case.network)
    record = fit(learner, data)
    assert learner.trainer.global_step == 3
    for t, batch in enumerate(data):
        step = twin.reference.step(*batch)
        check_step(step, twin, record.losses[t], record.gradients[t])
        for k, loss in enumerate(step.losses):
            logged = record.logged[t][f"local/{k:02d}/loss"]
            assert logged == pytest.approx(float(loss.detach()), rel=1e-6)  # logged in float32
            name = f"local/{k:02d}/reconciliation"
            if case.coupling.kind == "sgr" and k > 0 and t % case.coupling.every == 0:
                ratio = float(step.penalties[k].detach() / loss.detach())
                assert record.logged[t][name] == pytest.approx(ratio, rel=1e-6)
    twin.check_state(learner)
