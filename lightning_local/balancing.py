"""Where to cut so that memory or time of the local modules is as even as it can be.

What a local module of several units would cost is put together from what each unit costs by
itself, so that all cuts can be compared; what a chosen cut really needs is rehearsed.

Legend: n atoms, the smallest local modules there can be: units, of which the last ones are joined
when a head asks for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_local.arguments import ends_to_end
from lightning_local.build import Builder
from lightning_local.cutting import Cutting
from lightning_local.dividing import divide
from lightning_local.local_module import LocalModule
from lightning_local.partition import Partition
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Rehearsed, Setting

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["Atoms", "find_atoms", "memory_costs", "split_points", "time_costs"]


@dataclass(frozen=True)
class Atoms:
    """The finest cut, with what each of its local modules needs.

    Attributes:
        points: Split points between the atoms, n - 1 of them.
        cutting: The cut.
        modules: The local modules.
        rehearsed: A step of them.
    """

    points: tuple[str, ...]
    cutting: Cutting
    modules: Sequence[LocalModule]
    rehearsed: Rehearsed

    def points_of(self, blocks: Sequence[range]) -> tuple[str, ...]:
        """Split points of local modules that are runs of atoms."""
        return tuple(self.points[block.stop - 1] for block in blocks[:-1])


def find_atoms(
    learner: LocalLearner, builder: Builder, setting: Setting, fakes: FakeTensorMode
) -> Atoms:
    """Cuts at every unit whose end a head can stand at, and rehearses that; heads are fakes.

    Raises:
        ValueError: The network can't be cut.
    """
    finest = builder.points(Partition())
    forms = dict(zip(builder.cutter.unit_points, builder.cutter.unit_boundaries, strict=True))
    points = tuple(point for point in finest if forms[point] is not None)
    # With tied weights everywhere, cutting says which they are.
    apart = set(builder.cutter.separable())
    points = tuple(point for point in points if point in apart) or points
    cutting, modules = builder.make(points, fakes=fakes)
    return Atoms(
        points, cutting, modules, rehearse(learner, modules, builder.method, setting, fakes=fakes)
    )


def memory_costs(rehearsed: Rehearsed) -> NDArray[np.float64]:
    """Bytes that a local module of atoms i to j would add to what is always there, `(n, n)`."""
    parts = rehearsed.modules
    activations = np.array([0, *np.cumsum([part.body_activation for part in parts])])
    gradients = np.array([0, *np.cumsum([part.gradient for part in parts])])
    heads = np.array([part.head_activation for part in parts])
    extra = np.array(
        [
            max(0, part.peak - rehearsed.static - part.body_activation - part.head_activation)
            for part in parts
        ]
    )
    whole = activations[None, 1:] - activations[:-1, None] + (heads + extra)[None, :]
    stepping = gradients[None, 1:] - gradients[:-1, None]
    costs: NDArray[np.float64] = np.maximum(whole, stepping).astype(float)
    return costs


def time_costs(
    builder: Builder, modules: Sequence[LocalModule], seconds: Sequence[tuple[float, float]] = ()
) -> NDArray[np.float64]:
    """FLOPs, or seconds, of a step of a local module of atoms i to j, `(n, n)`.

    Args:
        builder: Whose method.
        modules: The atoms.
        seconds: Measured times of a forward of each atom's body and head, if there are some.
    """
    forward = seconds or [(module.body_flops, module.head_flops) for module in modules]
    sums = np.cumsum([0.0, *(body for body, _ in forward)])
    n, coupling = len(modules), builder.method.coupling
    units = np.cumsum([0, *(max(1, len(module.body.units)) for module in modules)])
    costs = np.full((n, n), np.inf)
    for i in range(n):
        for j in range(i, n):
            body, head = float(sums[j + 1] - sums[i]), forward[j][1]
            count = int(units[j + 1] - units[i])
            backward = coupling.backward_flops(body, head, units=count, first=i == 0)
            costs[i, j] = body + head + backward
    return costs


def split_points(learner: LocalLearner, builder: Builder) -> tuple[str, ...]:
    """Where the learner's partition asks to cut.

    Raises:
        ValueError: It asks for more local modules than there can be.
    """
    request = builder.request
    if request.balance == "units" or request.num_modules == 1:
        points = builder.points()
        if not points and not ends_to_end(request):
            remedy = "Partition(granularity='finest') or explicit split points may cut it."
            rank_zero_warn(
                f"`{builder.name}` has one unit, so it is trained end to end, without local "
                f"modules. {builder.cutter.obstacle or remedy}"
            )
        return points
    builder.points(Partition(num_modules=request.num_modules))  # the checks of a plain request
    setting = Setting.without_data(learner, builder, learner.planned_batch_size)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    atoms = find_atoms(learner, builder, setting, fakes)
    costs = (
        memory_costs(atoms.rehearsed)
        if request.balance == "memory"
        else time_costs(builder, atoms.modules)
    )
    count = min(request.num_modules or len(costs), len(costs))
    return atoms.points_of(divide(costs, count))
