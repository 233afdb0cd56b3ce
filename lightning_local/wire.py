"""Blocking transfers of packed objects between two processes, in one direction."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_local.transport import Packed, as_bytes, from_bytes, restored, unpack

__all__ = ["Received", "Wire"]

# Bytes of the first part of a header; most headers are smaller.
_HEAD = 1 << 14


@dataclass
class Received:
    """An object and a batch that have arrived.

    Attributes:
        obj: They.
        tensors: All in it.
        event: What the device has to wait for before they are there; None on the CPU.
    """

    obj: tuple[Any, Any]
    tensors: list[torch.Tensor]
    event: torch.cuda.Event | None


class Wire:
    """Blocking transfers between this process and a peer, in one direction.

    Args:
        peer: Global rank of the other process.
        group: gloo group for headers and for what is in the host's memory.
        direct: Group that moves tensors on the device; None sends them through the host's memory.
        device: Where received tensors belong.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        direct: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._peer = peer
        self._group = group
        self._direct = direct
        self._device = device
        cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if cuda:
            # torch's own streams and events have no types.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def now(self) -> torch.cuda.Event | None:
        """A mark behind what the calling thread has asked of the device so far."""
        if self._stream is None:
            return None
        return _mark(torch.cuda.current_stream(self._device))

    def send(self, packed: Packed, after: torch.cuda.Event | None = None) -> None:
        """Returns once the peer has taken everything (or, on the device, once that is ordered)."""
        if self._stream is None:
            self._send(packed)
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._send(packed)

    def _send(self, packed: Packed) -> None:
        size = len(packed.header)
        head = bytearray(max(_HEAD, size + 8))
        head[:8] = size.to_bytes(8, "little")
        head[8 : 8 + size] = packed.header
        data = torch.frombuffer(head, dtype=torch.uint8)
        dist.send(data[:_HEAD], self._peer, group=self._group)
        if data.numel() > _HEAD:
            dist.send(data[_HEAD:], self._peer, group=self._group)
        for tensor in packed.tensors:
            if tensor.numel() == 0:
                continue
            if self._stream is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
                if self._direct is not None:
                    dist.send(as_bytes(tensor), self._peer, group=self._direct)
                    continue
                tensor = tensor.to("cpu", non_blocking=True)
                self._stream.synchronize()
            dist.send(as_bytes(tensor), self._peer, group=self._group)

    def receive(self) -> Received:
        """The next object."""
        if self._stream is None:
            return Received(*self._receive(), None)
        with torch.cuda.stream(self._stream):
            obj, tensors = self._receive()
        return Received(obj, tensors, _mark(self._stream))

    def _receive(self) -> tuple[tuple[Any, Any], list[torch.Tensor]]:
        head = torch.empty(_HEAD, dtype=torch.uint8)
        dist.recv(head, self._peer, group=self._group)
        size = int.from_bytes(head[:8].numpy().tobytes(), "little")
        if size + 8 > _HEAD:
            rest = torch.empty(size + 8 - _HEAD, dtype=torch.uint8)
            dist.recv(rest, self._peer, group=self._group)
            head = torch.cat([head, rest])
        forms, body = pickle.loads(head[8 : 8 + size].numpy().tobytes())
        tensors = []
        for form in forms:
            here = torch.device("cpu") if form.host else self._device
            direct = self._direct if here.type == "cuda" else None
            tensor, data = from_bytes(form, here if direct is not None else torch.device("cpu"))
            if form.data:
                data.copy_(torch.frombuffer(bytearray(form.data), dtype=torch.uint8))
            elif data.numel():
                group = direct if direct is not None else self._group
                dist.recv(data, self._peer, group=group)
            tensors.append(restored(tensor.to(here, non_blocking=True), form))
        return unpack(body, tensors, self._device), tensors

    def take(self, received: Received) -> tuple[Any, Any]:
        """The object; the calling thread's stream waits until its tensors are there."""
        if received.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(received.event)
            for tensor in received.tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return received.obj

    def enter_thread(self) -> None:
        """To be called first in a thread of its own."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
    event.record(stream)
    return event
