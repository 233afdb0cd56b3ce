"""Cuts any network into bodies that compose back to it exactly.

Here: what a user asks for (`Partition`), which cuts follow from it, and the cut network. What a
unit is stands in `units.py`, how glue is traced in `tracing.py`, the code that runs in `body.py`.

Legend: n units, K local modules; a split point is the name of a submodule after which to cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_local.body import Body
from lightning_local.dryrun import Boundary, boundary, check_composition, run_values
from lightning_local.slicing import place, slices
from lightning_local.tracing import trace
from lightning_local.units import find_units, has_hooks, opens_candidates

__all__ = ["Cutting", "Partition", "check_names", "choose_points", "cut_network"]


@dataclass(frozen=True)
class Partition:
    """What the user asks for: into how many local modules, or where, to cut a network.

    Args:
        num_modules: Number of local modules K (1 is end to end); contiguous runs of units whose
            lengths differ by at most one. None means one local module per unit.
        split_points: Names of submodules after which to cut, instead of `num_modules`; K - 1 of
            them, in the order in which the network runs them.
        leaves: Paths of submodules that are never cut.
        granularity: `"blocks"` never splits a block (a module of a user's class of which a
            container holds two or more); `"finest"` may.
        layout: Where hidden states have their channels: `"auto"` finds out at each boundary,
            `"channels_first"` or `"channels_last"` says so for all.

    Raises:
        ValueError: An argument is out of its range, or two exclude each other.

    Example:
        >>> Partition(split_points=["layer1", "layer3"]).split_points
        ('layer1', 'layer3')
    """

    num_modules: int | None = None
    split_points: Sequence[str] | None = None
    leaves: Sequence[str] = field(default=())
    granularity: str = "blocks"
    layout: str = "auto"

    def __post_init__(self) -> None:
        """Checks the request."""
        for name, value, allowed in (
            ("granularity", self.granularity, ("blocks", "finest")),
            ("layout", self.layout, ("auto", "channels_first", "channels_last")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"Partition({name}={value!r}) is not known: pass one of {allowed}."
                )
        for name, names in (("split_points", self.split_points or ()), ("leaves", self.leaves)):
            if isinstance(names, str) or not all(isinstance(n, str) for n in names):
                raise TypeError(f"Partition({name}={names!r}): pass a list of names of submodules.")
        if self.num_modules is not None and (
            isinstance(self.num_modules, bool)
            or not isinstance(self.num_modules, int)
            or self.num_modules < 1
        ):
            raise ValueError(
                f"Partition(num_modules={self.num_modules!r}): a network is cut into 1 (end to "
                "end) or more local modules; pass a positive int, or None for one per unit."
            )
        if self.split_points is not None:
            if self.num_modules is not None:
                raise ValueError(
                    "Partition got both num_modules and split_points; K split points already make "
                    "K + 1 local modules: pass one of the two."
                )
            points = tuple(self.split_points)
            twice = sorted({p for p in points if points.count(p) > 1})
            if twice:
                raise ValueError(
                    f"Partition(split_points=...) names {twice} twice: once is enough."
                )
            object.__setattr__(self, "split_points", points)
        object.__setattr__(self, "leaves", tuple(self.leaves))

    @staticmethod
    def of(request: Partition | int | Sequence[str] | Sequence[int] | str) -> Partition:
        """The request as a `Partition`: an int is `num_modules`, a list `split_points`.

        The names in an `nn.Sequential` are numbers, which YAML reads as such.
        """
        if isinstance(request, Partition):
            return request
        if isinstance(request, str):
            if request != "units":
                close = difflib.get_close_matches(request, ["units"])
                raise ValueError(
                    f"partition={request!r} is not known: pass 'units', a number of local modules, "
                    "a list of split points, or a Partition."
                    + (" Did you mean 'units'?" if close else "")
                )
            return Partition()
        if isinstance(request, int):
            return Partition(num_modules=request)
        named = isinstance(request, Sequence) and all(
            isinstance(p, (str, int)) and not isinstance(p, bool) for p in request
        )
        if not named:
            raise TypeError(f"partition={request!r}: split points are names of submodules (str).")
        return Partition(split_points=[str(point) for point in request])


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
        output: What the network returns: a tensor without data, or a structure of them.
    """

    split_points: tuple[str, ...]
    bodies: tuple[Body, ...]
    boundaries: tuple[Boundary, ...]
    unit_points: tuple[str, ...]
    units: tuple[Body, ...]
    unit_boundaries: tuple[Boundary | None, ...]
    last_unit: tuple[int, ...]
    output: Any


def check_names(network: nn.Module, request: Partition, name: str) -> None:
    """What can be said about a request before anything runs.

    Raises:
        ValueError: The network has no parameters, or no submodule of a name that was given.
    """
    if next(network.parameters(), None) is None:
        raise ValueError(
            f"`{name}` ({type(network).__name__}) has no parameters, so there is nothing to train "
            "locally: pass network=... with the attribute that holds the layers."
        )
    known = {path for path, _ in network.named_modules() if path}
    for path in (*(request.split_points or ()), *request.leaves):
        if path not in known:
            kind = "Leaf" if path in request.leaves else "Split point"
            raise _unknown(network, path, kind)
    for point in request.split_points or ():
        for leaf in request.leaves:
            if point.startswith(leaf + "."):
                raise ValueError(f"Split point `{point}` lies in `{leaf}`, one of the leaves.")


def _unknown(network: nn.Module, point: str, kind: str) -> ValueError:
    names = [name for name, _ in network.named_modules() if name]
    close = difflib.get_close_matches(point, names, n=3) or names[:3]
    return ValueError(
        f"{kind} `{point}` is no submodule of {type(network).__name__}; the closest names "
        f"are: {', '.join(close)}."
    )


def _check_hooks(network: nn.Module, opened: Iterable[str]) -> None:
    for path in opened:
        if has_hooks(network.get_submodule(path)):
            raise ValueError(
                f"`{path or type(network).__name__}` has forward or backward hooks, and cuts lie "
                "inside it, so that its hooks would never run: put them on a submodule that is not "
                "cut, or keep it whole with Partition(leaves=[...])."
            )


def choose_points(
    units: Sequence[str], request: Partition, tail_units: int, network: str = "network"
) -> tuple[str, ...]:
    """Split points for a request, given the n units' own (n - 1 names).

    Args:
        units: Names after which units end, all but the last.
        request: What the user asked for; not with explicit split points.
        tail_units: The last `tail_units + 1` units stay in one local module.
        network: What to call the network in an error.

    Raises:
        ValueError: More local modules than units, or a tail that takes all of them.
    """
    n = len(units) + 1
    wanted = n if request.num_modules is None else request.num_modules
    if wanted > n:
        raise ValueError(
            f"partition={wanted} asks for {wanted} local modules, but `{network}` has {n} units: "
            f"pass at most {n}, or 'units'; Partition(granularity='finest') may split blocks too."
        )
    lengths = [n // wanted + (k < n % wanted) for k in range(wanted)]
    ends = [sum(lengths[: k + 1]) - 1 for k in range(wanted - 1)]
    kept = [end for end in ends if end <= n - 2 - tail_units]
    if wanted > 1 and not kept:
        raise ValueError(
            f"The head asks for the last {tail_units + 1} units in one local module, and "
            f"`{network}` has {n} units in {wanted} local modules, so nothing is left to cut: use "
            f"a depth of at most {n - 2 - ends[0]}, or pass explicit split points."
        )
    return tuple(units[end] for end in kept)


def cut_network(
    network: nn.Module,
    request: Partition,
    inputs: Sequence[Any],
    *,
    tail_units: int = 0,
    name: str = "network",
) -> Cutting:
    """Cuts a network.

    Args:
        network: The network; it is not changed.
        request: What the user asked for.
        inputs: Its positional inputs, for the dry run; real tensors of any batch size.
        tail_units: See `choose_points`.
        name: The network's name in errors.

    Raises:
        ValueError: The network has no parameters, can't be traced, or can't be cut as asked.
    """
    check_names(network, request, name)
    opens = opens_candidates(network, request.leaves, request.granularity)
    coarse = trace(network, opens, training=True, num_inputs=len(inputs))
    unit_points = find_units(network, coarse, run_values(network, coarse, inputs))
    if request.split_points is None:
        points = choose_points(unit_points, request, tail_units, name)
    else:
        points = tuple(request.split_points)
    parts = [path.split(".") for path in (*unit_points, *points)]
    around = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    _check_hooks(network, ["", *sorted(around)])
    traces = {
        mode: trace(
            network, lambda p, _: p in around, training=mode, num_inputs=len(inputs), strict=True
        )
        for mode in (True, False)
    }
    values = run_values(network, traces[True], inputs)
    places = [place(network, traces[True], p) for p in points]
    if places != sorted(set(places)):
        ordered = dict(sorted(zip(places, points, strict=True)))
        raise ValueError(
            f"Split points {list(points)} are not in the order in which the network runs, or two "
            f"name the same place: pass {list(ordered.values())}."
        )
    unit_places = [place(network, traces[True], p) for p in unit_points]
    layout = request.layout

    def form(point: str) -> Boundary:
        return boundary(traces[True], values, place(network, traces[True], point), point, layout)

    bodies = slices(network, traces, points, unit_points)
    units = slices(network, traces, unit_points, unit_points, exclusive=False)
    check_composition(network, bodies, inputs)
    output = values.nodes[traces[True].nodes[-1]]
    if isinstance(output, torch.Tensor) and output.ndim > 1:
        bodies[-1].out_features = units[-1].out_features = output.shape[-1]
    return Cutting(
        split_points=points,
        bodies=bodies,
        boundaries=tuple(form(p) for p in points),
        unit_points=tuple(unit_points),
        units=units,
        unit_boundaries=tuple(_form_or_none(form, p) for p in unit_points),
        last_unit=(*(sum(u < end for u in unit_places) for end in places), len(unit_points)),
        output=tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), output
        ),
    )


def _form_or_none(form: Callable[[str], Boundary], point: str) -> Boundary | None:
    """The form at a unit's end, where nobody cuts: unclear is no error unless a head needs it."""
    try:
        return form(point)
    except ValueError:
        return None
