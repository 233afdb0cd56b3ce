"""What is alive when, and who may touch whose gradient: counted, never timed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from networks import Cnn, PreAct, Vit
from settings import batches, learner_of, make, run
from torch import nn
from torch.utils.data import DataLoader, Dataset

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, couplings, heads, methods
from lightning_local.links import InProcessLinks
from lightning_local.message import Message
from lightning_local.meter import LiveBytes

COUPLINGS = {
    "isolated": couplings.Isolated(),
    "link": couplings.BackwardLink(),
    "tail": couplings.BackwardLink(length=1),
    "none": couplings.BackwardLink(length=0),
    "sgr": couplings.GradientReconciliation(0.05),
}
LINKED = ("link", "tail", "none")
SIZES = [2, 2, 1]  # units of Cnn's three local modules


def cnn_learner(coupling: couplings.Coupling) -> LocalLearner:
    return learner_of(make(Cnn), methods.LocalMethod(heads.Conv(16), coupling=coupling), 3)


def names_of(learner: LocalLearner, k: int, length: int | None = None) -> set[str]:
    """Names of body k's parameters, or of those of its last `length` units."""
    first = sum(SIZES[:k])
    units = learner.module.net.pieces()[first : first + SIZES[k]]
    if length is not None:
        units = units[max(0, len(units) - length) :]
    mine = {id(p) for unit in units for p in unit.parameters()}
    return {name for name, p in learner.named_parameters() if id(p) in mine}


def head_of(learner: LocalLearner, k: int) -> set[str]:
    return {n for n, _ in learner.named_parameters() if n.startswith(f"local_modules.{k}.head.")}


def present(learner: LocalLearner) -> dict[str, torch.Tensor]:
    """The gradients that exist now."""
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


class Spy(InProcessLinks):
    """Links that keep what passes, and the gradients that exist when an error is taken."""

    def __init__(self, learner: LocalLearner) -> None:
        super().__init__()
        self.learner = learner
        self.messages: list[Message] = []
        self.errors: list[torch.Tensor] = []
        self.before_link: dict[int, dict[str, torch.Tensor]] = {}

    def send(self, k: int, message: Message) -> None:
        self.messages.append(message)
        super().send(k, message)

    def return_error(self, k: int, error: torch.Tensor) -> None:
        self.errors.append(error)
        super().return_error(k, error)

    def await_error(self, k: int) -> torch.Tensor:
        self.before_link[k] = present(self.learner)
        return super().await_error(k)


class Steps(L.Callback):
    """The gradients that exist when each optimizer steps, and those left after a batch."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at_step: dict[int, dict[str, torch.Tensor]] = {}
        self.left: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        k = trainer.optimizers.index(optimizer)
        self.order.append(k)
        self.at_step[k] = present(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.left.append(present(module))


@pytest.mark.parametrize("name", COUPLINGS)
def test_messages_carry_no_graph(name: str) -> None:
    learner = cnn_learner(COUPLINGS[name])
    learner.links = spy = Spy(learner)
    run(learner, batches(Cnn, 2))
    assert len(spy.messages) == 2 * 3
    for i, message in enumerate(spy.messages):
        gradient = message.gradient
        assert (gradient is not None) == (name == "sgr" and i % 3 > 0)
        tensors = [*message.values, *([] if gradient is None else [gradient])]
        assert all(isinstance(value, torch.Tensor) for value in tensors)
        assert not any(value.requires_grad or value.grad_fn for value in tensors)
        if gradient is not None:
            assert gradient.shape == message.values[0].shape
    assert len(spy.errors) == (2 * 2 if name in LINKED else 0)
    assert not any(error.requires_grad for error in spy.errors)


@pytest.mark.parametrize("name", COUPLINGS)
def test_gradients_exist_in_one_module_only(name: str) -> None:
    learner = cnn_learner(COUPLINGS[name])
    learner.links = spy = Spy(learner)
    steps = Steps()
    run(learner, batches(Cnn, 2), callbacks=[steps])
    assert steps.order == [0, 1, 2] * 2
    assert steps.left == [{}, {}], "gradients stay after the step"
    linked = name in LINKED
    for k in range(3):
        own = names_of(learner, k) | head_of(learner, k)
        # A linked module waits for its successor's own backward, so both have gradients then.
        neighbour = (
            names_of(learner, k + 1) | head_of(learner, k + 1) if linked and k < 2 else set()
        )
        assert set(steps.at_step[k]) == own | neighbour
    assert set(spy.before_link) == ({0, 1} if linked else set())


@pytest.mark.parametrize(("name", "length"), [("link", None), ("tail", 1), ("none", 0)])
def test_a_link_reaches_the_tail_of_one_body(name: str, length: int | None) -> None:
    learner = cnn_learner(COUPLINGS[name])
    learner.links = spy = Spy(learner)
    steps = Steps()
    run(learner, batches(Cnn, 1), callbacks=[steps])
    for k in (0, 1):
        before, after = spy.before_link[k], steps.at_step[k]
        assert set(before) == set(after)
        changed = {n for n in after if not torch.equal(before[n], after[n])}
        assert changed == names_of(learner, k, length)


def test_tails_of_explicit_cuts_count_units() -> None:
    learner = learner_of(make(Cnn), methods.BackLink(length=2), ["blocks.2"])
    learner.links = spy = Spy(learner)
    steps = Steps()
    run(learner, batches(Cnn, 1), callbacks=[steps])
    changed = {n for n, g in steps.at_step[0].items() if not torch.equal(spy.before_link[0][n], g)}
    expected = {f"module.net.blocks.{i}" for i in (1, 2)}
    assert {".".join(n.split(".")[:4]) for n in changed} == expected


class Graphs:
    """Which local modules have a graph with saved tensors: autograd holds our boxes, we weakly."""

    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()

    def __init__(self, learner: LocalLearner) -> None:
        self.current: tuple[int, str] | None = None
        self.boxes: list[tuple[tuple[int, str], weakref.ref[Any]]] = []
        self.alive_at_start: list[set[tuple[int, str]]] = []
        self.pairs: set[tuple[int, ...]] = set()
        for k, module in enumerate(learner.local_modules):
            module.register_forward_pre_hook(self._starts(k))
            if module.head is not None:
                module.head.register_forward_pre_hook(self._enters(k, "head"))

    def _starts(self, k: int) -> Any:
        def hook(*args: Any) -> None:
            self.alive_at_start.append(self.alive())
            self.current = (k, "body")

        return hook

    def _enters(self, k: int, part: str) -> Any:
        def hook(*args: Any) -> None:
            self.current = (k, part)

        return hook

    def alive(self) -> set[tuple[int, str]]:
        self.boxes = [(owner, box) for owner, box in self.boxes if box() is not None]
        return {owner for owner, _ in self.boxes}

    def pack(self, tensor: torch.Tensor) -> Any:
        box = self.Box(tensor)
        assert self.current is not None
        self.boxes.append((self.current, weakref.ref(box)))
        self.pairs.add(tuple(sorted({k for k, _ in self.alive()})))
        return box

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed must be freed by its last reference, not some time later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("network", [Cnn, PreAct, Vit], ids=lambda network: network.__name__)
@pytest.mark.parametrize("name", COUPLINGS)
def test_at_most_one_or_two_graphs_are_alive(name: str, network: type[nn.Module]) -> None:
    method = methods.LocalMethod(heads.Conv(16), coupling=COUPLINGS[name])
    learner = learner_of(make(network), method)
    graphs = Graphs(learner)
    with graphs.watching():
        run(learner, batches(network, 2))
    count = learner.num_modules
    assert count >= 4
    linked = name in LINKED
    expected = {(k,) for k in range(count)}
    if linked:
        # Module k's graph waits for k + 1, and is gone before k + 2 starts.
        expected |= {(k, k + 1) for k in range(count - 1)}
        assert graphs.pairs == expected - {(k,) for k in range(1, count)} | {(0,)}
    else:
        assert graphs.pairs == expected
    for i, alive in enumerate(graphs.alive_at_start):
        # Of the waiting module the body alone is kept: its head has done its work.
        waits = linked and i % count > 0
        assert alive == ({(i % count - 1, "body")} if waits else set())
    assert graphs.alive() == set()


class Images(Dataset):
    """A batch of 4, which makes the momentum, then one of 128; made when asked for."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (4, 128)[index]
        return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


def peak(method: methods.LocalMethod | None) -> int:
    """Most bytes alive inside `Trainer.fit`, weights, gradients and momentum included."""
    torch.manual_seed(0)
    module: Any = LitClassifier(CifarResNet(32))
    if method is not None:
        module = LocalLearner(module, method)
        module.build(torch.zeros(2, 3, 32, 32))
    with LiveBytes([*module.parameters(), *module.buffers()]) as counter:
        run(module, DataLoader(Images(), batch_size=None))
    return counter.peak


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_peak_memory_of_resnet32() -> None:
    """One unit per module, batch 128; bytes, so the same on any machine."""
    plain = peak(None)
    shares = {
        "greedy": peak(methods.Greedy()) / plain,
        "auglocal": peak(methods.AugLocal(depth=2)) / plain,
    }
    assert plain > 250 * 2**20  # 2,464 MiB at batch 1024 in the papers' code
    assert shares["greedy"] <= 0.20, shares
    assert shares["auglocal"] <= 0.30, shares


def test_live_bytes_counts_storages_once() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    with LiveBytes([weight]) as counter:
        view = torch.ones(1000)[10:].view(-1)
        assert counter.live == 8000
        del view
        assert counter.live == 4000
        loss = (weight * 2).relu().sum()
        assert counter.live == 8004  # the ReLU keeps its result
        loss.backward()
        del loss
        assert counter.live == 8000  # the weight and its gradient
        weight.grad = None
    assert counter.live == 4000
    assert counter.peak >= 12_004
