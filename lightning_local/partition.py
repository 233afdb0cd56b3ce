"""What a user asks for (`Partition`), and which cuts follow from it; `cutting.py` cuts.

Legend: n units, K local modules; a split point is the name of a submodule after which to cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

__all__ = ["Partition", "check_names", "choose_points"]


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
        balance: What `num_modules` local modules have in equal shares: `"units"`; `"memory"`, the
            peak of each while it trains with the learner's method; `"time"`, the FLOPs of a
            training step. The last two move with method, network and batch size, and make the
            largest share as small as it can be.
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
    balance: str = "units"

    def __post_init__(self) -> None:
        """Checks the request."""
        for name, value, allowed in (
            ("granularity", self.granularity, ("blocks", "finest")),
            ("layout", self.layout, ("auto", "channels_first", "channels_last")),
            ("balance", self.balance, ("units", "memory", "time")),
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
        if self.balance != "units" and self.num_modules is None:
            raise ValueError(
                f"Partition(balance={self.balance!r}) needs num_modules: one local module per unit "
                "and explicit split points leave nothing to balance."
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
            raise TypeError(
                f"partition={request!r}: pass 'units', a number of local modules, a list of names "
                "of submodules to cut after, or a Partition."
            )
        return Partition(split_points=[str(point) for point in request])


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
            inner = path.removeprefix("module.").removeprefix(f"{name}.")
            if inner in known:
                raise ValueError(
                    f"{kind} `{path}` is no submodule of the network, `{name}` "
                    f"({type(network).__name__}), and names are relative to that: pass {inner!r}."
                )
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


def choose_points(
    units: Sequence[str],
    request: Partition,
    tail_units: int,
    network: str = "network",
    obstacle: str = "",
) -> tuple[str, ...]:
    """Split points for a request, given the n units' own (n - 1 names).

    Args:
        units: Names after which units end, all but the last.
        request: What the user asked for; not with explicit split points.
        tail_units: The last `tail_units + 1` units stay in one local module.
        network: What to call the network in an error.
        obstacle: Why it has no more units, if that is known.

    Raises:
        ValueError: More local modules than units, or a tail that takes all of them.
    """
    n = len(units) + 1
    wanted = n if request.num_modules is None else request.num_modules
    if wanted > n:
        raise ValueError(
            f"partition={wanted} asks for {wanted} local modules, but `{network}` has {n} units: "
            f"pass at most {n}, or 'units'; Partition(granularity='finest') may split blocks too."
            + (f" {obstacle}" if obstacle else "")
        )
    lengths = [n // wanted + (k < n % wanted) for k in range(wanted)]
    ends = [sum(lengths[: k + 1]) - 1 for k in range(wanted - 1)]
    kept = [end for end in ends if end <= n - 2 - tail_units]
    if wanted > 1 and not kept:
        finer = f"'units' ({n - tail_units} local modules then), " if n - 1 > tail_units else ""
        raise ValueError(
            f"The head asks for the last {tail_units + 1} units in one local module, and "
            f"`{network}` has {n} units in {wanted} local modules, so nothing is left to cut: pass "
            f"{finer}a depth of at most {n - 2 - ends[0]}, or explicit split points."
        )
    return tuple(units[end] for end in kept)
