"""A learner and `reference.py` side by side: cases, copies under the same names, comparisons."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from networks import Cnn, Mlp, PreAct, ResNet, Tagger, Vit
from reference import Coupling, Reference, Step
from reference_losses import CrossEntropy
from settings import Lit, ScaledCrossEntropy, batches, fit, learner_of, make
from torch import nn

from lightning_local import LocalLearner

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # float64; sums run in another order

RGB = ((0.45, 0.5, 0.55), (0.08, 0.1, 0.09))
# For each network a mean and a deviation that bring its inputs, which are normal, into [0, 1].
DENORMALIZE: dict[type[nn.Module], tuple[tuple[float, ...], tuple[float, ...]]] = {
    **dict.fromkeys((Cnn, ResNet, PreAct), RGB),
    Mlp: ((0.5, 0.45, 0.55, 0.5, 0.5, 0.5, 0.5), (0.1, 0.09, 0.08, 0.1, 0.1, 0.1, 0.07)),
    **dict.fromkeys((Vit, Tagger), ((0.5, 0.45, 0.55, 0.5, 0.5), (0.1, 0.09, 0.08, 0.1, 0.07))),
}


@dataclass
class Case:
    """A method on a network.

    `sizes` is how many units each local module must get, `frozen` which units don't train,
    `dropout` the probability of a dropout behind every activation of the network.
    """

    id: str
    network: type[nn.Module]
    method: Any
    sizes: list[int]
    coupling: Coupling = field(default_factory=Coupling)
    partition: Any = "units"
    frozen: tuple[int, ...] = ()
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    dropout: float = 0.0


def drop_out(network: nn.Module, p: float) -> None:
    """Puts a dropout behind each activation; no name of a parameter changes."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.ReLU, nn.GELU)):
                setattr(module, name, nn.Sequential(child, nn.Dropout(p)))


class FirstStreams(L.Callback):
    """The state of every local module's generator before the first batch."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.states = [state.clone() for state in module.streams.save()["cpu"]]


def grouped(pieces: list[nn.Module], sizes: list[int]) -> list[list[nn.Module]]:
    assert sum(sizes) == len(pieces)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [pieces[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class Twin:
    """The reference on deep copies of the learner's module, heads and losses' networks."""

    def __init__(self, learner: LocalLearner, case: Case) -> None:
        self.module: Any = copy.deepcopy(learner.module)
        modules = list(learner.local_modules)
        assert modules[-1].head is None
        assert modules[-1].objective is None
        loss = copy.deepcopy(case.loss)
        self.groups: dict[str, nn.Module] = {"module": self.module}
        heads, parts = [], []
        for k, each in enumerate(modules[:-1]):
            heads.append(copy.deepcopy(each.head))
            self.groups[f"local_modules.{k}.head"] = heads[-1]
            part = copy.deepcopy(getattr(each.objective, loss.part)) if loss.part else None
            parts.append(part)
            if part is not None:
                self.groups[f"local_modules.{k}.objective.{loss.part}"] = part
        loss.start(ScaledCrossEntropy(), parts)
        self.named = {
            f"{prefix}.{name}": p
            for prefix, group in self.groups.items()
            for name, p in group.named_parameters()
        }
        self.reference = Reference(
            units=grouped(self.module.net.pieces(), case.sizes),
            heads=heads,
            loss=loss,
            last_criterion=self.module.loss,
            coupling=case.coupling,
            optimizer=torch.optim.SGD(self.named.values(), lr=0.1, momentum=0.9, weight_decay=1e-2),
        )

    def check_state(self, learner: LocalLearner) -> None:
        expected = {
            f"{prefix}.{name}": value
            for prefix, group in self.groups.items()
            for name, value in group.state_dict().items()
        }
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
        assert (found is None) == (value is None), f"{name}: {found} {value}"
        if value is not None:
            torch.testing.assert_close(found, value, **TOLERANCE, msg=_at(name))


def module_of(case: Case) -> Lit:
    lit = make(case.network)
    if case.dropout:
        drop_out(lit.net, case.dropout)
    for i in case.frozen:
        lit.net.pieces()[i].requires_grad_(False)
    return lit


def check_three_steps(case: Case) -> None:
    """Losses, gradients, logged values, weights and buffers of three steps."""
    learner = learner_of(module_of(case), case.method, case.partition)
    twin = Twin(learner, case)
    data = batches(case.network)
    streams = FirstStreams()
    record = fit(learner, data, callbacks=[streams])
    if case.dropout:
        assert len(streams.states) == len(case.sizes)
        twin.reference.streams = streams.states
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
