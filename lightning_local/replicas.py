"""Data parallelism: the replicas of a stage step with the mean of their gradients.

One flat all_reduce per local module and type of number, after its last backward. A wrapper that
hooks into autograd would be wrong where a module gets two backwards (a backward link).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

__all__ = ["Pending", "Replicas"]


class Pending:
    """Gradients on their way.

    Args:
        replicas: Whose.
        parameters: In the same order on all replicas.
    """

    def __init__(self, replicas: Replicas, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._size = replicas.size
        by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_type.setdefault(parameter.dtype, []).append(parameter)
        self._parts = []
        for group in by_type.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([g.to_dense().reshape(-1) for g in gradients])
            work = dist.all_reduce(flat, group=replicas.group, async_op=True)
            assert work is not None
            self._parts.append((work, flat, group))

    def wait(self) -> None:
        """Puts the means in place; the device waits, not the host."""
        for work, flat, group in self._parts:
            work.wait()
            flat /= self._size
            start = 0
            for parameter in group:
                part = flat[start : start + parameter.numel()].view(parameter.shape)
                if parameter.grad is None:
                    parameter.grad = part.clone()
                else:
                    parameter.grad.copy_(part)
                start += parameter.numel()


class Replicas:
    """The replicas of this process's stage.

    Args:
        group: For tensors on the device.
        hosts: The same processes, for tensors in the host's memory.
        size: How many.
        first: Global rank of replica 0.
    """

    def __init__(
        self, group: dist.ProcessGroup, hosts: dist.ProcessGroup, size: int, first: int
    ) -> None:
        self.group = group
        self.size = size
        self._hosts = hosts
        self._first = first
        # Local modules of which every parameter had a gradient, on all replicas.
        self._full: dict[int, bool] = {}

    def average(self, k: int, parameters: Iterable[torch.nn.Parameter]) -> Pending:
        """Starts to average the gradients of local module k.

        A parameter without a gradient on all replicas keeps none, as in one process; where only
        some replicas have one, it counts as zero on the others. Modules whose first step used
        everything are not asked again: a parameter that none uses later has a gradient of zero.
        """
        used = [p for p in parameters if p.requires_grad]
        if not self._full.get(k, False):
            present = torch.tensor([p.grad is not None for p in used], dtype=torch.uint8)
            if used:
                dist.all_reduce(present, dist.ReduceOp.MAX, group=self._hosts)
            self._full.setdefault(k, bool(present.all()))
            used = [p for p, some in zip(used, present.tolist(), strict=True) if some]
        return Pending(self, used)

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives all replicas the first one's values."""
        for tensor in tensors:
            data = tensor.detach().contiguous()
            group = self._hosts if data.device.type == "cpu" else self.group
            dist.broadcast(data, self._first, group=group)
            if data.data_ptr() != tensor.data_ptr():
                with torch.no_grad():
                    tensor.copy_(data)
