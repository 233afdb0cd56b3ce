"""Every method once more: slow, with plain autograd, and without a line of the package.

One loop runs all bodies forward and keeps all graphs; then each gradient is asked for by
`torch.autograd.grad`. Bodies and heads run once per batch, so BatchNorm counts once. The weights
move at the end of the batch, by one SGD over everything: that this equals stepping each module at
once is part of what the tests show.

Legend (k counts from 0 here): x_k hidden state after body k, l_k loss, theta_k the body's
parameters, w_k those of head and loss. e_k = d l_k / d x_{k-1}, g_out(k) = d l_k / d x_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = list[torch.Tensor]
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LocalLoss(Protocol):
    """The loss of the modules that have a head: see `reference_losses.py`."""

    def __call__(
        self,
        k: int,
        output: torch.Tensor,
        hidden: torch.Tensor,
        target: torch.Tensor,
        x0: torch.Tensor,
    ) -> torch.Tensor:
        """l_k; x0 is the batch as the loader gave it."""

    def parameters(self, k: int) -> list[nn.Parameter]:
        """The loss's own parameters for head k."""


@dataclass
class Coupling:
    """`kind` is "isolated", "backlink" or "sgr"; the rest as in the papers."""

    kind: str = "isolated"
    weight: float = 1.0
    length: int | None = None
    distance: str = "squared_l2"
    every: int = 1
    warmup: int = 0


@dataclass
class Step:
    """What one batch gave: l_k, J_k (l_k and its penalty), R_k, and gradients by parameter id."""

    losses: Tensors = field(default_factory=list)
    objectives: Tensors = field(default_factory=list)
    penalties: Tensors = field(default_factory=list)
    gradients: dict[int, torch.Tensor | None] = field(default_factory=dict)


def distance(own: torch.Tensor, other: torch.Tensor, kind: str) -> torch.Tensor:
    """D(g_in, g_out), sample by sample, on the gradients of the samples' own losses."""
    n = len(own)
    terms = []
    for i in range(n):
        a, b = own[i].reshape(-1) * n, other[i].reshape(-1) * n
        if kind == "squared_l2":
            terms.append(((a - b) ** 2).sum())
        elif kind == "mse":
            terms.append(((a - b) ** 2).mean())
        elif kind == "cosine":
            terms.append(1 - (a @ b) / (a.norm() * b.norm()))
        elif kind == "normalized_l2":
            terms.append((a / a.norm() - b / b.norm()).norm())
        else:
            raise ValueError(kind)
    return torch.stack(terms).mean()


class Reference:
    """Local learning by the book.

    Args:
        units: For each local module its units, in order; called one after another.
        heads: K - 1 head modules.
        loss: Of all local modules but the last.
        last_criterion: The last one's.
        coupling: What neighbours tell each other.
        optimizer: Over all parameters at once.
        streams: Per local module the state of the generator that body, head and loss draw from;
            None draws nothing.
    """

    def __init__(
        self,
        units: Sequence[Sequence[nn.Module]],
        heads: Sequence[nn.Module],
        loss: LocalLoss,
        last_criterion: Criterion,
        coupling: Coupling,
        optimizer: torch.optim.Optimizer,
        streams: Sequence[torch.Tensor] | None = None,
    ) -> None:
        assert len(units) == len(heads) + 1
        self.units, self.heads = units, heads
        self.loss, self.last_criterion = loss, last_criterion
        self.coupling = coupling
        self.optimizer = optimizer
        self.streams = None if streams is None else list(streams)
        self.batch = 0

    def theta(self, k: int, length: int | None = None) -> list[nn.Parameter]:
        """Parameters of body k, or of its last `length` units, that are trained."""
        units = list(self.units[k])
        if length is not None:
            units = units[max(0, len(units) - length) :]
        return [p for unit in units for p in unit.parameters() if p.requires_grad]

    def weights(self, k: int) -> list[nn.Parameter]:
        """w_k."""
        if k == len(self.heads):
            return []
        return [*self.heads[k].parameters(), *self.loss.parameters(k)]

    @contextmanager
    def _drawing(self, k: int) -> Iterator[None]:
        """Draws come from module k's stream."""
        if self.streams is None:
            before = torch.get_rng_state()
            yield
            assert torch.equal(before, torch.get_rng_state()), "something draws: pass streams"
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.streams[k])
            yield
            self.streams[k] = torch.get_rng_state()

    def step(self, x: torch.Tensor, target: torch.Tensor) -> Step:
        """One batch."""
        result, coupling = Step(), self.coupling
        leaves: Tensors = []
        hiddens: Tensors = []
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for k, units in enumerate(self.units):
                given = x if k == 0 else hiddens[-1]
                leaves.append(given.detach().clone().requires_grad_())
                hidden = leaves[-1].clone()  # a unit may begin by overwriting its input
                with self._drawing(k):
                    for unit in units:
                        hidden = unit(hidden)
                    if k < len(self.heads):
                        output = self.heads[k](hidden.clone())
                        loss = self.loss(k, output, hidden.clone(), target, x)
                    else:
                        loss = self.last_criterion(hidden, target)
                hiddens.append(hidden)
                result.losses.append(loss)
        for k in range(len(self.units)):
            objective, penalty = result.losses[k], torch.zeros(())
            if coupling.kind == "sgr" and k > 0 and self.batch % coupling.every == 0:
                penalty = self._penalty(k, result.losses, leaves, hiddens)
                objective = objective + self._weight() * penalty
            result.objectives.append(objective)
            result.penalties.append(penalty)
            own = self.theta(k)
            self._add(result, objective, [*own, *self.weights(k)])
            if coupling.kind == "backlink" and k < len(self.units) - 1:
                self._add_link(result, k, result.losses[k + 1], leaves[k + 1], hiddens[k])
        self._apply(result)
        self.batch += 1
        return result

    def _add(self, result: Step, objective: torch.Tensor, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            return
        gradients = torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert id(parameter) not in result.gradients
            result.gradients[id(parameter)] = gradient

    def _add_link(
        self,
        result: Step,
        k: int,
        next_loss: torch.Tensor,
        next_leaf: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """weight * e_{k+1} d x_k / d theta_k, through the tail of body k."""
        (error,) = torch.autograd.grad(next_loss, next_leaf, retain_graph=True)
        tail = self.theta(k, self.coupling.length)
        if not tail:
            return
        links = torch.autograd.grad(hidden, tail, error, retain_graph=True, allow_unused=True)
        for parameter, link in zip(tail, links, strict=True):
            own = result.gradients[id(parameter)]
            if link is not None:
                link = self.coupling.weight * link
                result.gradients[id(parameter)] = link if own is None else own + link

    def _penalty(self, k: int, losses: Tensors, leaves: Tensors, hiddens: Tensors) -> torch.Tensor:
        """R_k; g_out(k-1) is that of l_{k-1} alone, without the penalty of k-1."""
        (own,) = torch.autograd.grad(losses[k], leaves[k], create_graph=True)
        (before,) = torch.autograd.grad(losses[k - 1], hiddens[k - 1], retain_graph=True)
        return distance(own, before.detach(), self.coupling.distance)

    def _weight(self) -> float:
        if self.batch + 1 < self.coupling.warmup:
            return self.coupling.weight * (self.batch + 1) / self.coupling.warmup
        return self.coupling.weight

    def _apply(self, result: Step) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                gradient = result.gradients.get(id(parameter))
                parameter.grad = None if gradient is None else gradient.detach().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
