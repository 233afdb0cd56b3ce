"""Tiny modules and data, and a quiet Trainer that records what it does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from networks import CLASSES, Cnn, Mlp, PreAct, ResNet, Tagger, Vit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, Partition
from lightning_local.cutting import Cutter, Cutting
from lightning_local.partition import choose_points

torch.set_num_threads(1)  # equality to the last bit needs one order of sums


class ScaledCrossEntropy(nn.Module):
    """Cross entropy times a number; one prediction per token is fine too."""

    def __init__(self, scale: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits, target = logits.flatten(0, -2), target.flatten()
        loss = functional.cross_entropy(logits, target, label_smoothing=self.smoothing)
        return self.scale * loss


class Lit(L.LightningModule):
    """A plain module. Its own loss is not the heads' (label smoothing), so a mix-up shows."""

    def __init__(self, net: nn.Module, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.net = net
        self.lr, self.momentum = lr, momentum
        self.loss = ScaledCrossEntropy(smoothing=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decay = 1e-2 if self.momentum else 0.0
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum, weight_decay=decay)


_IMAGE, _TOKENS = (3, 8, 8), (6, 5)
_SHAPES = {Cnn: _IMAGE, ResNet: _IMAGE, PreAct: _IMAGE, Mlp: (7,), Vit: _TOKENS, Tagger: _TOKENS}


def make(
    network: type[nn.Module], dtype: torch.dtype = torch.float64, seed: int = 3, **options: Any
) -> Lit:
    """A module around a tiny network; norms get weights that are not all the same."""
    torch.manual_seed(seed)
    lit = Lit(network(), **options).to(dtype)
    for name, parameter in lit.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return lit


def cut_network(
    network: nn.Module,
    request: Partition,
    inputs: Sequence[Any],
    tail_units: int = 0,
    name: str = "network",
) -> Cutting:
    """Cuts a network as asked."""
    cutter = Cutter(network, request, inputs, name)
    points = request.split_points
    if points is None:
        points = choose_points(cutter.unit_points, request, tail_units, name)
    return cutter.cut(points)


def batches(
    network: type[nn.Module], count: int = 3, size: int = 6, dtype: torch.dtype = torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same batches in every call."""
    generator = torch.Generator().manual_seed(17)
    target = (size, _SHAPES[network][0]) if network is Tagger else (size,)
    return [
        (
            torch.randn(size, *_SHAPES[network], generator=generator, dtype=dtype),
            torch.randint(CLASSES, target, generator=generator),
        )
        for _ in range(count)
    ]


def learner_of(module: Lit, method: Any, partition: Any = "units", **options: Any) -> LocalLearner:
    """A learner that is built already, so that its heads can be copied before the fit."""
    torch.manual_seed(5)
    learner = LocalLearner(module, method, partition, criterion=ScaledCrossEntropy(), **options)
    if learner.num_modules != 1:
        dtype = next(module.parameters()).dtype
        learner.build(batches(type(module.net), 1, dtype=dtype)[0][0])
    return learner


class Recorder(L.Callback):
    """What a fit did, seen through hooks alone.

    Attributes:
        losses: Per step what was back-propagated, in order.
        gradients: Per step the gradients that each optimizer stepped with, by name.
        logged: Per step the logged metrics.
    """

    def __init__(self) -> None:
        self.losses: list[list[torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor | None]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append([])
        self.gradients.append({})

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        self.losses[-1].append(loss.detach().clone())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in module.named_parameters():
            if id(p) in mine:
                assert name not in self.gradients[-1], f"{name} is in two optimizers"
                self.gradients[-1][name] = None if p.grad is None else p.grad.clone()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def run(module: L.LightningModule, data: Any, epochs: int = 1, **trainer: Any) -> None:
    """Runs a quiet Trainer over fresh copies of the batches, in order, or over a loader."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    if not isinstance(data, DataLoader):
        data = DataLoader(copy.deepcopy(list(data)), batch_size=None)
    L.Trainer(**{**arguments, **trainer}).fit(module, data)


def fit(
    module: L.LightningModule, data: Sequence[Any], epochs: int = 1, **trainer: Any
) -> Recorder:
    """The same, recorded: gradients are copied."""
    recorder = Recorder()
    run(module, data, epochs, callbacks=[recorder, *trainer.pop("callbacks", [])], **trainer)
    return recorder
