"""A Lightning strategy on a ("stage", "data") mesh: which process this is, and what it asks others.

What a value is reduced over follows from who has one: replicas of a stage, or all processes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.utilities.distributed import (
    _all_gather_ddp_if_available,
    _sync_ddp_if_available,
)
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero as pl_rank_zero
from lightning_utilities.core import rank_zero

from lightning_local.distributed_links import DistributedLinks
from lightning_local.in_step import InStep
from lightning_local.placement import check_placement
from lightning_local.processes import Processes
from lightning_local.ranges import count

__all__ = ["MeshStrategy"]


class MeshStrategy(ParallelStrategy):
    """Who is where, without anything of local learning.

    Args:
        num_stages: Stages, or `"auto"`.
        data_parallel: Replicas of each stage.
        placement: The stage of each local module, or None.
        timeout: How long a process waits for another one.
        options: As Lightning's strategies take them.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        num_stages: int | Literal["auto"],
        data_parallel: int,
        placement: list[int] | None,
        timeout: timedelta,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        name = "LocalParallelStrategy"
        if num_stages != "auto":
            num_stages = count(name, "num_stages", num_stages, 1, "a number of stages or 'auto'")
        self._num_stages = num_stages
        self._data_parallel = count(name, "data_parallel", data_parallel, 1, "a number of replicas")
        self._placement = check_placement(placement)
        if self._placement and num_stages not in ("auto", self._placement[-1] + 1):
            raise ValueError(
                f"{name}(num_stages={num_stages}, placement={placement}): the placement is for "
                f"{self._placement[-1] + 1} stages; leave num_stages out, or make them equal."
            )
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise ValueError(f"{name}(timeout={timeout!r}): expected a timedelta above 0.")
        self._timeout = timeout
        self.num_nodes = 1
        self._processes: Processes | None = None
        self._links: DistributedLinks | None = None
        self._in_step: InStep | None = None

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def world_size(self) -> int:
        """How many processes see different data, which is what users scale by."""
        return self._data_parallel

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning has to divide the data."""
        return self._data_parallel > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the data: replicas differ, stages don't."""
        rank = self._processes.replica if self._processes is not None else 0
        return {"num_replicas": self._data_parallel, "rank": rank}

    @property
    def _stages(self) -> int:
        """The number of stages, once devices and nodes are known."""
        total = self.num_processes * self.num_nodes
        if self._num_stages == "auto":
            stages, rest = divmod(total, self._data_parallel)
            if self._placement is not None:
                stages = self._placement[-1] + 1
                rest = total - stages * self._data_parallel
        else:
            stages = self._num_stages
            rest = total - stages * self._data_parallel
        if rest or not stages:
            raise ValueError(
                f"LocalParallelStrategy(num_stages={self._num_stages!r}, "
                f"data_parallel={self._data_parallel}) needs "
                f"{stages or 1} x {self._data_parallel} = {(stages or 1) * self._data_parallel} "
                f"processes, and Trainer(devices={self.num_processes}, num_nodes={self.num_nodes}) "
                f"has {self.num_processes} x {self.num_nodes} = {total}: make the products equal."
            )
        return stages

    def set_world_ranks(self) -> None:
        """Tells Lightning which process this is."""
        environment = self.cluster_environment
        if environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.num_nodes * self.num_processes)
        for module in (rank_zero, pl_rank_zero):
            module.rank_zero_only.rank = self.global_rank

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        _ = self._stages  # a wrong product is told when the Trainer is made
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _SubprocessScriptLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes
            )

    def _is_broken(self) -> bool:
        """Whether stages are at different places, since something failed."""
        learner: Any = self.lightning_module
        if learner is None or learner.trainer.state.status != "interrupted":
            return False
        return self._in_step is None or not self._in_step.agreed

    def barrier(self, name: str | None = None) -> None:
        """Waits for all processes."""
        if self._processes is not None and not self._is_broken():
            self._processes.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """One process's object for all; by the clock, the first stage's."""
        if self._processes is None or self._is_broken():
            return obj
        if self._in_step is not None and self._in_step.deciding:
            return self._processes.decide(bool(obj))
        return self._processes.broadcast(obj, src)

    def reduce(
        self,
        tensor: torch.Tensor | Any,
        group: Any | None = None,
        reduce_op: Any = "mean",
    ) -> Any:
        """Over the replicas of this stage: other stages have no such value."""
        if not isinstance(tensor, torch.Tensor) or self._data_parallel == 1:
            return tensor
        assert self._processes is not None
        hosts = tensor.device.type == "cpu"
        group = self._processes.data_hosts if hosts else self._processes.data_group
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    def all_gather(
        self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False
    ) -> torch.Tensor:
        """From the replicas of this stage, `(data_parallel, ...)`; as it is where there is one."""
        if self._data_parallel == 1:
            return tensor
        assert self._processes is not None
        group = self._processes.data_group
        return _all_gather_ddp_if_available(tensor, group=group, sync_grads=sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Over all processes."""
        if self._processes is None or self._is_broken():
            return decision
        votes = int(self._processes.add_up(torch.tensor(int(decision))).item())
        return votes == self._processes.size if all else votes > 0
