"""Cuts any network into bodies that compose back to it exactly.

What a unit is stands in `units.py`, how glue is traced in `tracing.py`, the code that runs in
`body.py`, what a user may ask for in `partition.py`.

Legend: n units, K local modules; a split point is the name of a submodule after which to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_local.body import Body, prediction
from lightning_local.composition import check_composition
from lightning_local.dryrun import Boundary, Values, boundary, run_values
from lightning_local.nodes import GlueError
from lightning_local.partition import Partition, check_names
from lightning_local.questions import Asked
from lightning_local.slicing import place, slices
from lightning_local.traced import Trace
from lightning_local.tracing import REMEDY, TraceError, trace
from lightning_local.units import find_units, has_hooks, opens_candidates

__all__ = ["Cutter", "Cutting"]


@dataclass(frozen=True)
class Cutting:
    """A cut network.

    Attributes:
        split_points: Names after which the network was cut, K - 1 of them.
        bodies: The K bodies, in order.
        boundaries: The form of the hidden state after each body but the last.
        unit_points: Names after which the units end, all but the last unit.
        units: One body per unit, for heads that imitate later units.
        unit_boundaries: The form of what each unit returns, for all but the last unit; None where
            it is not clear.
        last_unit: For each body the index of the last unit that has a part in it.
        pieces: For each body its units, or parts of units, as bodies of their own.
        output: What the network returns: a tensor without data, or a structure of them.
    """

    split_points: tuple[str, ...]
    bodies: tuple[Body, ...]
    boundaries: tuple[Boundary, ...]
    unit_points: tuple[str, ...]
    units: tuple[Body, ...]
    unit_boundaries: tuple[Boundary | None, ...]
    last_unit: tuple[int, ...]
    pieces: tuple[tuple[Body, ...], ...]
    output: Any


def _check_hooks(network: nn.Module, opened: Iterable[str]) -> None:
    for path in opened:
        if has_hooks(network.get_submodule(path)):
            raise ValueError(
                f"`{path or type(network).__name__}` has forward or backward hooks, and cuts lie "
                "inside it, so that its hooks would never run: put them on a submodule that is not "
                "cut, or keep it whole with Partition(leaves=[...])."
            )


def _followed(
    network: nn.Module,
    opens: Callable[[str, nn.Module], bool],
    inputs: Sequence[Any],
    given: Mapping[str, Any],
) -> tuple[Trace, Values]:
    """A trace whose glue runs, with its values; modules whose glue doesn't are left whole.

    Raises:
        TraceError: The network's own doesn't.
        Exception: A module called there fails, with what it raises.
    """
    failed: dict[str, str] = {}
    while True:
        traced = trace(
            network, lambda p, m: p not in failed and opens(p, m), training=True, **given
        )
        try:
            values = run_values(network, traced, inputs)
        except GlueError as error:
            path, reason = _failure(network, traced, error)
            if not path:
                raise _refusal(error, reason) from error
            failed[path] = reason
            continue
        traced.opaque |= failed
        return traced, values


def _failure(network: nn.Module, traced: Trace, error: GlueError) -> tuple[str, str]:
    """In which module's glue a node failed, and what to say of it."""
    path = traced.scopes[error.node]
    where = type(network.get_submodule(path)).__name__
    return path, (
        f"The forward of {where} can't be followed by torch.fx: it decides by what only a run can "
        f"tell, such as isinstance or hasattr (`{error.node.name}`: {error}).\n"
    )


def _refusal(error: GlueError, reason: str) -> BaseException:
    """What to raise: what a module of the user's raised, or what glue can't be followed for."""
    own = error.__cause__ if error.node.op == "call_module" else None
    return own or TraceError(f"{reason}{REMEDY}")


def _valued(
    network: nn.Module, traced: Trace, inputs: Sequence[Any], training: bool = True
) -> Values:
    """The values of a trace whose modules have to be opened.

    Raises:
        TraceError: Glue fails.
        Exception: A module called there fails, with what it raises.
    """
    try:
        return run_values(network, traced, inputs, training)
    except GlueError as error:
        raise _refusal(error, _failure(network, traced, error)[1]) from error


def _obstacle(network: nn.Module, opaque: Mapping[str, str]) -> str:
    def size(path: str) -> tuple[int, int]:
        return sum(p.numel() for p in network.get_submodule(path).parameters()), -len(path)

    return opaque[max(opaque, key=size)] + REMEDY if opaque else ""


class Cutter:
    """A traced network with its units, ready to be cut.

    Args:
        network: The network; it is not changed.
        request: What the user asked for; explicit split points may lie inside units.
        inputs: Its positional inputs, for the dry run; real tensors of any batch size.
        name: The network's name in errors.

    Attributes:
        unit_points: Names after which the units end, all but the last unit.
        units: One body per unit.
        unit_boundaries: The form of what each unit returns, for all but the last unit; None where
            it is not clear.
        output: What the network returns: a tensor without data, or a structure of them.
        obstacle: Why there are no units inside the largest module that can't be followed; empty
            where everything could be.

    Raises:
        ValueError: The network has no parameters, or can't be traced or cut as asked.
    """

    def __init__(
        self, network: nn.Module, request: Partition, inputs: Sequence[Any], name: str = "network"
    ) -> None:
        check_names(network, request, name)
        self.network, self.name = network, name
        opens = opens_candidates(network, request.leaves, request.granularity)
        given: dict[str, Any] = {"num_inputs": len(inputs)}
        given["decide"] = partial(Asked, network, inputs)
        coarse, values = _followed(network, opens, inputs, given)
        self.obstacle = _obstacle(network, coarse.opaque)
        coarse.forget_constants(values.nodes, values.weights)
        self.unit_points = tuple(find_units(network, coarse, values))
        points = tuple(request.split_points or ())
        parts = [path.split(".") for path in (*self.unit_points, *points)]
        around = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
        _check_hooks(network, ["", *sorted(around)])
        self._traces = {
            mode: trace(network, lambda p, _: p in around, training=mode, strict=True, **given)
            for mode in (True, False)
        }
        self._values = _valued(network, self._traces[True], inputs)
        if self._traces[True].forget_constants(self._values.nodes, self._values.weights):
            evaluated = _valued(network, self._traces[False], inputs, training=False)
            self._traces[False].forget_constants(evaluated.nodes, evaluated.weights)
        self._layout = request.layout
        self._unit_places = [self._place(p) for p in self.unit_points]
        places = [self._place(p) for p in points]
        if places != sorted(set(places)):
            ordered = dict(sorted(zip(places, points, strict=True)))
            raise ValueError(
                f"Split points {list(points)} are not in the order in which the network runs, or "
                f"two name the same place: pass {list(ordered.values())}."
            )
        self.units = self._slices(self.unit_points, exclusive=False)
        self.unit_boundaries = tuple(_form_or_none(self._form, p) for p in self.unit_points)
        # All places where this cutter cuts. Bodies are runs of the pieces between them.
        named = {self._place(p): p for p in (*points, *self.unit_points)}
        self._piece_places = sorted(named)
        self._pieces = self.units
        if len(named) > len(self.unit_points):
            self._pieces = self._slices([named[p] for p in self._piece_places], exclusive=False)
        check_composition(network, self._pieces, inputs)
        output = self._values.nodes[self._traces[True].nodes[-1]]
        self._output_features = None
        predicted = prediction(output)
        if isinstance(predicted, torch.Tensor) and predicted.ndim > 1:
            self._output_features = predicted.shape[-1]
            self.units[-1].out_features = predicted.shape[-1]
        self.output = tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), output
        )

    def separable(self) -> tuple[str, ...]:
        """Those of the unit points that separate no tensor's users from one another."""
        spans: dict[int, list[int]] = {}
        for k, unit in enumerate(self.units):
            for parameter in unit.parameters():
                spans.setdefault(id(parameter), []).append(k)
        held = {u for users in spans.values() for u in range(users[0], users[-1])}
        return tuple(point for u, point in enumerate(self.unit_points) if u not in held)

    def _place(self, point: str) -> int:
        return place(self.network, self._traces[True], point)

    def _form(self, point: str) -> Boundary:
        return boundary(self._traces[True], self._values, self._place(point), point, self._layout)

    def stretches(self, points: Sequence[str]) -> tuple[Body, ...]:
        """The network between `points`, whose parts may share parameters."""
        return self._slices(points, exclusive=False)

    def _slices(self, points: Sequence[str], exclusive: bool) -> tuple[Body, ...]:
        return slices(self.network, self._traces, points, self.unit_points, exclusive)

    def cut(self, points: Sequence[str]) -> Cutting:
        """Cuts.

        Args:
            points: Ends of units, or split points of the request.

        Raises:
            ValueError: It can't be cut there.
        """
        ends = [self._place(point) for point in points]
        bodies = self._slices(points, exclusive=True)
        bodies[-1].out_features = self._output_features
        edges = [-1, *ends, len(self._traces[True].nodes)]
        starts = [-1, *self._piece_places]
        return Cutting(
            split_points=tuple(points),
            bodies=bodies,
            boundaries=tuple(self._form(point) for point in points),
            unit_points=self.unit_points,
            units=self.units,
            unit_boundaries=self.unit_boundaries,
            last_unit=(
                *(sum(unit < end for unit in self._unit_places) for end in ends),
                len(self.unit_points),
            ),
            pieces=tuple(
                tuple(
                    piece
                    for piece, at in zip(self._pieces, starts, strict=True)
                    if start <= at < stop
                )
                for start, stop in zip(edges, edges[1:], strict=False)
            ),
            output=self.output,
        )


def _form_or_none(form: Callable[[str], Boundary], point: str) -> Boundary | None:
    """The form at a unit's end, where nobody cuts: unclear is no error unless a head needs it."""
    try:
        return form(point)
    except ValueError:
        return None
