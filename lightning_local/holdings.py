"""The weights of a network of which each stage trains a part."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torchmetrics
from torch import nn
from torch.optim import Optimizer
from torchmetrics.metric import jit_distributed_available
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_local.placement import extra_states, owners, tensors_per_module
from lightning_local.processes import Processes
from lightning_local.replicas import Replicas

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["Holdings", "sync_metrics", "unsync_metrics"]


class Holdings:
    """Every process has the whole network; what counts is what its stage holds.

    Args:
        learner: Whose network, with its heads.
        processes: Who is where.
        stages: The local modules of each stage.
        replicas: Those of this stage; None if there is one.
    """

    def __init__(
        self,
        learner: LocalLearner,
        processes: Processes,
        stages: Sequence[range],
        replicas: Replicas | None,
    ) -> None:
        self._learner = learner
        self._processes = processes
        self._stages = stages
        self._replicas = replicas
        self._guarded: nn.Module | None = None
        self._shared = False

    def _tensors(self) -> list[dict[str, torch.Tensor]]:
        # Asked for each time: buffers are other objects once they are on another device.
        return tensors_per_module(self._learner)

    def _state(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Copies in the host's memory, and which of them are buffers that are not saved."""
        private = []
        for name in tensors:
            path, _, own = name.rpartition(".")
            if own in self._learner.get_submodule(path)._non_persistent_buffers_set:
                private.append(name)
        return {"tensors": {n: t.detach().cpu() for n, t in tensors.items()}, "private": private}

    def _put(self, state: Mapping[str, Any]) -> None:
        """Puts another process's tensors in place; buffers may have been made there, or grown."""
        for name, tensor in state["tensors"].items():
            path, _, own = name.rpartition(".")
            module = self._learner.get_submodule(path)
            here: Any = getattr(module, own, None)
            if isinstance(here, nn.Parameter) or _fits(here, tensor):
                with torch.no_grad():
                    here.copy_(tensor)
            else:
                module.register_buffer(own, tensor, persistent=name not in state["private"])

    def guard(self) -> None:
        """Metrics are those of the replicas; the whole network can't be called.

        Only this stage's weights are current, and others' would give wrong numbers in silence.
        """
        sync_metrics(self._processes)
        self._shared = False
        network, processes = self._learner.network, self._processes
        if processes.num_stages == 1 or "forward" in vars(network):
            return
        stage = self._processes.describe(processes.stage, processes.replica)

        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"The network was called outside of a step, on {stage}, where only this stage's "
                "weights are current: call it in training_step, validation_step, test_step or "
                "predict_step, or after the run, when every process has the whole network."
            )

        self._guarded = network
        network.__dict__["forward"] = forward

    def unguard(self) -> None:
        """Everything is as before."""
        unsync_metrics()
        if self._guarded is not None:
            self._guarded.__dict__.pop("forward", None)
            self._guarded = None

    def to_device(self, device: torch.device) -> None:
        """Moves what this stage holds or reads; the rest stays where it is."""
        if device.type == "cpu":
            return
        owned = self._stages[self._processes.stage]
        tensors = self._tensors()
        needed = {id(t) for k in owned for t in tensors[k].values()}
        modules = self._learner.modules_in_order()
        for k in owned if modules else ():
            body = modules[k].body
            needed |= {id(t) for t in (*body.buffers(), *map(body.original, body.forms))}
        if owned[0] == 0:
            # What transfer hooks may use, which run where the data are.
            known = owners(self._learner)
            every = (*self._learner.parameters(), *self._learner.buffers())
            needed |= {id(t) for t in every if id(t) not in known}
        _move(self._learner, needed, device)

    def make_replicas_alike(self, buffers_alone: bool = False) -> None:
        """Gives this stage's replicas the weights of the first, or its running statistics."""
        if self._replicas is None:
            return
        tensors = self._tensors()
        for k in self._stages[self._processes.stage]:
            every = tensors[k].values()
            chosen = [t for t in every if not (buffers_alone and isinstance(t, nn.Parameter))]
            self._replicas.copy_first(chosen)

    def collect(self) -> None:
        """Brings all stages' weights to rank 0, where they are written from."""
        processes, tensors = self._processes, self._tensors()
        extra = self._extra_states()
        for s, owned in enumerate(self._stages):
            source = processes.rank_of(s, 0)
            for k in owned if source else ():
                mine = self._state(tensors[k]) if processes.rank == source else None
                theirs = processes.to_writer(mine, source)
                if theirs is not None:
                    self._put(theirs)
        if extra is not None:
            found = processes.gather(extra)
            for states in found or ():
                self._set_extra_states(states)

    def optimizer_state(self, k: int, optimizer: Optimizer) -> dict[str, Any]:
        """The state of local module k's optimizer on rank 0; nothing elsewhere."""
        processes = self._processes
        stage = next(s for s, owned in enumerate(self._stages) if k in owned)
        mine = optimizer.state_dict() if processes.stage == stage else {}
        return processes.to_writer(mine, processes.rank_of(stage, 0)) or {}

    def share(self) -> None:
        """Brings all stages' weights to all processes, once: each then has the trained network."""
        if self._shared:
            return
        self._shared = True
        processes, tensors = self._processes, self._tensors()
        for s, owned in enumerate(self._stages):
            source = processes.rank_of(s, 0)
            for k in owned:
                mine = self._state(tensors[k]) if processes.rank == source else None
                theirs = processes.spread(mine, source)
                if s != processes.stage:
                    self._put(theirs)
        extra = self._extra_states()
        if extra is not None:
            for s in range(len(self._stages)):
                self._set_extra_states(processes.broadcast(extra, processes.rank_of(s, 0)))

    def _extra_states(self) -> dict[str, Any] | None:
        """Those of this stage; None if the whole network has none."""
        found = extra_states(self._learner)
        if not any(found):
            return None
        owned = self._stages[self._processes.stage]
        return {name: module.get_extra_state() for k in owned for name, module in found[k]}

    def _set_extra_states(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            self._learner.get_submodule(name).set_extra_state(state)


def _fits(here: Any, there: torch.Tensor) -> bool:
    """Whether one can be copied into the other: not with several numbers in one place."""
    if not isinstance(here, torch.Tensor):
        return False
    if here.layout != torch.strided or here.shape != there.shape or here.dtype != there.dtype:
        return False
    return torch.empty_like(here, device="meta").stride() == here.stride()


def _move(module: nn.Module, needed: set[int], device: torch.device) -> None:
    """`module.to(device)` for those of its tensors that are needed."""
    tensors = [*module.parameters(), *module.buffers()]
    inside = [id(t) in needed for t in tensors]
    if all(inside):  # also without tensors: metrics keep theirs elsewhere
        module.to(device)
        return
    if not any(inside):
        return
    for parameter in module.parameters(recurse=False):
        if id(parameter) in needed:
            parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        if id(buffer) in needed:
            module._buffers[name] = buffer.to(device)
    for child in module.children():
        _move(child, needed, device)


# torchmetrics asks all processes as soon as there is a process group, and only the last stage's
# replicas have the same metrics. It is its class that is told, for as long as a run lasts: a metric
# may be made in a hook, or be no submodule.
_data_group: Any = None
_own_sync = torchmetrics.Metric.sync


def _over_replicas(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    return gather_all_tensors(tensor, group=_data_group)


def _replicated() -> bool:
    return _data_group is not None


def _sync(
    self: torchmetrics.Metric,
    dist_sync_fn: Any = None,
    process_group: Any = None,
    should_sync: bool = True,
    distributed_available: Any = None,
) -> None:
    if distributed_available is None:
        distributed_available = self.distributed_available_fn
    if distributed_available is jit_distributed_available:
        distributed_available = _replicated
    dist_sync_fn = dist_sync_fn or _over_replicas
    _own_sync(self, dist_sync_fn, process_group, should_sync, distributed_available)


def sync_metrics(processes: Processes) -> None:
    """Lets metrics be computed over the replicas of a stage."""
    global _data_group
    _data_group = processes.data_group if processes.num_replicas > 1 else None
    torchmetrics.Metric.sync = _sync  # type: ignore[method-assign]


def unsync_metrics() -> None:
    """Metrics are again as torchmetrics makes them."""
    global _data_group
    _data_group = None
    torchmetrics.Metric.sync = _own_sync  # type: ignore[method-assign]
