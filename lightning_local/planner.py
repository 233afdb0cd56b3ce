"""Where to cut a network for a memory budget, or for a number of stages: `plan_partition`.

Peaks are rehearsed on fake tensors (`rehearsal.py`): no device and no data are needed, and nothing
of the learner changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_local.balancing import Atoms, find_atoms, memory_costs, time_costs
from lightning_local.build import Builder
from lightning_local.dividing import divide
from lightning_local.local_module import LocalModule
from lightning_local.measuring import device_to_time, measure_seconds
from lightning_local.methods import EndToEnd
from lightning_local.plan import Choice, Plan, Rung, Stretch
from lightning_local.ranges import count, number, size
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Rehearsed, Setting, prepared

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["plan_partition"]


def plan_partition(
    learner: LocalLearner,
    batch: Any = None,
    *,
    batch_size: int | None = None,
    memory: str | float | None = None,
    stages: int | None = None,
    reserve: float = 0.1,
    precision: str = "32-true",
    accumulate_grad_batches: int = 1,
    measure: str | torch.device | None = None,
) -> Plan:
    """Predicts memory for growing numbers of local modules and recommends a partition.

    Args:
        learner: The module, with the method; its own partition says what may be cut.
        batch: A batch as the module's `training_step` takes it, of any number of samples; default
            the module's `example_input_array`, with a made-up target.
        batch_size: Number of samples to plan for; default those of the batch.
        memory: Bytes to stay below (on each device), such as `"8GiB"`; the fewest local modules
            that do are recommended.
        stages: Number of devices; that many local modules, whose largest share of time is as small
            as it can be, are recommended.
        reserve: Share of the budget, from 0 to 0.9, that is left for what is not predicted:
            workspaces of kernels, gaps of the allocator.
        precision: As the Trainer's.
        accumulate_grad_batches: As the Trainer's.
        measure: A device on which units are timed, for shares of time; default FLOPs.

    Raises:
        TypeError: `learner` is no LocalLearner.
        ValueError: An argument is out of its range, there is neither batch nor example, or the
            network can't be cut.

    Example:
        >>> from lightning_local import LocalLearner, plan_partition
        >>> from lightning.pytorch.demos.boring_classes import DemoModel
        >>> learner = LocalLearner(DemoModel(), "Greedy")
        >>> plan_partition(learner, (torch.rand(4, 32), torch.zeros(4).long())).end_to_end > 0
        True
    """
    owner = "plan_partition"
    if batch_size is not None:
        batch_size = count(owner, "batch_size", batch_size, 1, "a number of samples")
    if stages is not None:
        stages = count(owner, "stages", stages, 2, "a number of devices")
    reserve = number(owner, "reserve", reserve, 0.9, what="a share")
    limit = None if memory is None else size(owner, "memory", memory)
    builder, setting = prepared(learner, batch, batch_size)
    setting = replace(setting, precision=precision, accumulates=accumulate_grad_batches > 1)
    planner = _Planner(learner, builder, setting, measure)
    plan = planner.plan(limit, None if limit is None else int(limit * (1 - reserve)), stages)
    if batch is None and batch_size is None:
        note = f"planned for the example's batch of {setting.batch_size}: pass batch_size"
        plan = replace(plan, notes=(*plan.notes, note))
    return plan


class _Planner:
    """The search, with what it found out already."""

    def __init__(
        self, learner: LocalLearner, builder: Builder, setting: Setting, measure: Any
    ) -> None:
        self._learner, self._builder, self._setting = learner, builder, setting
        self._device = device_to_time(measure)
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._local: dict[tuple[Any, ...], tuple[list[LocalModule], Rehearsed]] = {}

    @cached_property
    def _whole(self) -> Rehearsed:
        return rehearse(self._learner, [], EndToEnd(), self._setting)

    @cached_property
    def _atoms(self) -> Atoms:
        return find_atoms(self._learner, self._builder, self._setting, self._fakes)

    @cached_property
    def _seconds(self) -> list[tuple[float, float]]:
        if self._device is None:
            return []
        return measure_seconds(self._builder, self._atoms.cutting, self._setting, self._device)

    @cached_property
    def _times(self) -> NDArray[np.float64]:
        return time_costs(self._builder, self._atoms.modules, self._seconds)

    @cached_property
    def _memory(self) -> NDArray[np.float64]:
        return memory_costs(self._atoms.rehearsed)

    def _rehearsed(
        self, points: tuple[str, ...], recompute: dict[int, str] | None = None
    ) -> tuple[list[LocalModule], Rehearsed]:
        """Local modules for some split points, and a step of them."""
        key = (points, *sorted((recompute or {}).items()))
        if key not in self._local:
            if points == self._atoms.points and not recompute:
                self._local[key] = (list(self._atoms.modules), self._atoms.rehearsed)
            else:
                _, modules = self._builder.make(points, recompute or "none", self._fakes)
                method = self._builder.method
                result = rehearse(self._learner, modules, method, self._setting, fakes=self._fakes)
                self._local[key] = (modules, result)
        return self._local[key]

    def _points(self, parts: int, costs: NDArray[np.float64] | None = None) -> tuple[str, ...]:
        return self._atoms.points_of(divide(self._memory if costs is None else costs, parts))

    def _peak(self, parts: int) -> int:
        if parts == 1:
            return self._whole.peak
        return self._rehearsed(self._points(parts))[1].peak

    def plan(self, budget: int | None, limit: int | None, stages: int | None) -> Plan:
        """See `plan_partition`; `limit` is the budget without the reserve."""
        most = len(self._atoms.modules) if self._builder.method.head is not None else 1
        if stages is not None and stages > most:
            raise ValueError(
                f"plan_partition(stages={stages}): `{self._builder.name}` can be cut into at most "
                f"{most} local modules with this method: pass {most} or less."
            )
        parts = [1]
        while parts[-1] * 2 < most:
            parts.append(parts[-1] * 2)
        parts += [most] if most > 1 else []
        rungs = []
        for each in parts:
            points = self._points(each) if each > 1 else ()
            checkpointed = None
            if each > 1:
                modules = [self._builder.whole(points)]
                checkpointed = rehearse(self._learner, modules, EndToEnd(), self._setting).peak
            rungs.append(Rung(each, checkpointed, self._peak(each), points))
        if stages is not None:
            choice = self._for_stages(stages, limit)
        elif limit is not None:
            choice = self._for_budget(parts, limit)
        else:
            choice = self._for_nothing(rungs)
        notes = dict.fromkeys([*self._whole.notes, *self._atoms.rehearsed.notes])
        name = type(self._learner.module).__name__
        return Plan(
            title=f"{name}, {type(self._builder.method).__name__}, batch of "
            f"{self._setting.batch_size}, {self._setting.precision}",
            end_to_end=self._whole.peak,
            units=self._stretches(self._atoms.points),
            rungs=tuple(rungs),
            choice=choice,
            request=self._builder.request,
            budget=budget,
            measured=self._device is not None,
            notes=tuple(notes),
        )

    def _for_nothing(self, rungs: Sequence[Rung]) -> Choice:
        least = min(rung.local for rung in rungs)
        best = next(rung for rung in rungs if rung.local <= 1.1 * least)
        return self._chosen(
            best.points, "Recommended: of these numbers the smallest within 10% of the least memory"
        )

    def _for_budget(self, parts: Sequence[int], limit: int) -> Choice:
        if self._whole.peak <= limit:
            return self._chosen((), "End to end fits: local learning is not needed for memory.")
        low = 1
        for high in parts[1:]:
            if self._peak(high) <= limit:
                break
            low = high
        else:
            least = min(parts[1:], key=self._peak, default=1)
            closest = [self._recomputing(self._points(each), limit) for each in (1, least)]
            return min(closest, key=lambda choice: choice.peak)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._peak(middle) <= limit else (middle, high)
        return self._chosen(
            self._points(high), "Recommended: the fewest local modules within the budget"
        )

    def _for_stages(self, stages: int, limit: int | None) -> Choice:
        points = self._points(stages, self._times)
        choice = self._chosen(
            points, f"Recommended: {stages} local modules, one per stage, of even time"
        )
        if limit is not None and max(self._stage_peaks(choice)) > limit:
            choice = self._recomputing(points, limit, per_stage=True)
        return replace(choice, stages=self._stage_peaks(choice))

    def _recomputing(self, points: tuple[str, ...], limit: int, per_stage: bool = False) -> Choice:
        """Recomputes in the local modules that are over the limit, where that takes less memory.

        The peak of a local module of one small unit may rise with it.
        """

        def peaks(choice: Choice) -> tuple[int, ...]:
            if per_stage:
                return self._stage_peaks(choice)
            return tuple(part.needs.peak for part in choice.modules) or (choice.peak,)

        predicted = [self._chosen(points, "")]
        for mode in ("body", "blocks"):
            recompute, now = predicted[-1].recompute, peaks(predicted[-1])
            over = [k for k, peak in enumerate(now) if peak > limit]
            tried = peaks(self._chosen(points, "", {**recompute, **dict.fromkeys(over, mode)}))
            lower = [k for k in over if tried[k] < now[k]]
            if lower:
                recompute = {**recompute, **dict.fromkeys(lower, mode)}
                predicted.append(self._chosen(points, "", dict(sorted(recompute.items()))))
        choice = min(predicted, key=lambda each: max(peaks(each)))
        fits = max(peaks(choice)) <= limit
        closest = "this partition" if points else "end to end"
        closest += ", recomputing where that lowers the peak," if choice.recompute else ""
        reason = "Recommended: within the budget, recomputing in those that would exceed it"
        if not fits:
            reason = (
                f"Nothing fits with this method: {closest} comes closest. Lower the batch size "
                "(and accumulate gradients), the precision, or the method's heads"
            )
        return replace(choice, fits=fits, reason=reason)

    def _chosen(
        self, points: tuple[str, ...], reason: str, recompute: dict[int, str] | None = None
    ) -> Choice:
        result = self._rehearsed(points, recompute)[1] if points else self._whole
        stretches = self._stretches(points, recompute) if points else ()
        return Choice(
            points, dict(recompute or {}), result.peak, result.static, stretches, reason=reason
        )

    def _stage_peaks(self, choice: Choice) -> tuple[int, ...]:
        """Each stage holds the weights and states of its own local module only."""
        needs = [stretch.needs for stretch in choice.modules]
        held = [part.body + part.head + part.optimizer for part in needs]
        return tuple(part.peak - sum(held) + own for part, own in zip(needs, held, strict=True))

    def _stretches(
        self, points: tuple[str, ...], recompute: dict[int, str] | None = None
    ) -> tuple[Stretch, ...]:
        modules, result = self._rehearsed(points, recompute)
        cutting = self._builder.cutter.cut(points)
        atoms = [self._atoms.points.index(p) for p in points] + [len(self._atoms.modules) - 1]
        first, unit, times, found = 0, 0, [], []
        for last in atoms:
            times.append(float(self._times[first, last]))
            first = last + 1
        for k, (module, needs) in enumerate(zip(modules, result.modules, strict=True)):
            found.append(
                Stretch(
                    name=points[k] if k < len(points) else "(end)",
                    units=(unit, max(unit, cutting.last_unit[k])),
                    needs=needs,
                    flops=(module.body_flops, module.head_flops),
                    share=times[k] / (sum(times) or 1.0),
                )
            )
            unit = cutting.last_unit[k] + 1
        return tuple(found)
