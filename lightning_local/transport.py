"""Objects with tensors on the wire: a header that describes them, then the tensors' own bytes.

A message carries shapes, strides and types itself, so batches of any size and structure pass.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Form",
    "Packed",
    "Unread",
    "as_bytes",
    "from_bytes",
    "object_bytes",
    "object_from",
    "pack",
    "restored",
    "unpack",
]


# Bytes of tensors that are not worth a transfer of their own.
_SMALL = 1 << 11


_UNREAD = (
    "{} reads the network's input, which is not sent to the stage that runs the step: pass "
    "LocalParallelStrategy(send_input=True), or read it in on_after_batch_transfer, which runs "
    "where the data are."
)


class Unread(torch.Tensor):
    """Stands for the network's input where only its form is known; reading it is an error."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Unread:
        """A tensor without values.

        Args:
            cls: This class.
            shape: Of the input.
            dtype: Of the input.
            device: Where the reader's tensors are.
        """
        make = torch.Tensor._make_wrapper_subclass
        made: Unread = make(cls, shape, dtype=dtype, device=device)
        return made

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # torch prints values
        """Its form."""
        return f"Unread(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no class and function
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation needs values, but `detach`, by which torch makes a plain alias."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise RuntimeError(_UNREAD.format(func))

    def numpy(self, *, force: bool = False) -> Any:
        """Not to be had."""
        raise RuntimeError(_UNREAD.format("numpy()"))

    def tolist(self) -> Any:
        """Not to be had."""
        raise RuntimeError(_UNREAD.format("tolist()"))


@dataclass(frozen=True)
class Form:
    """What a receiver has to know of a tensor.

    Attributes:
        shape: Sizes.
        stride: Strides; the bytes are sent in memory's order.
        dtype: Type.
        kind: Tensor subclass to make of it, and its attributes; None for a plain tensor.
        host: It stays in the host's memory.
        data: Its bytes, where they are few and in the host's memory; sent with the header.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    kind: tuple[Any, dict[str, Any]] | None
    host: bool
    data: bytes | None = None


@dataclass
class Packed:
    """An object ready to be sent.

    Attributes:
        header: The object, with numbers for tensors, and the tensors' forms.
        tensors: Dense and detached, in the header's order, but those that it contains.
    """

    header: bytes
    tensors: list[torch.Tensor]


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.hidden: Collection[int] = ()
        self.fresh: Collection[int] | None = None
        self._numbers: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        self.forms: list[Form] = []
        self._alive: list[Any] = []  # an id means something only while its object lives

    def persistent_id(self, obj: Any) -> Any:
        """What is not pickled: tensors with plain memory, and this process's device."""
        if isinstance(obj, torch.device) and obj.type not in ("cpu", "meta"):
            return ("device",)
        if not isinstance(obj, torch.Tensor):
            return None
        if isinstance(obj, Unread):
            return "unread", tuple(obj.shape), obj.dtype
        if obj.layout != torch.strided or obj.is_quantized or obj.is_nested:
            # As torch saves them: plain pickling keeps a sparse tensor alive that is unpickled.
            return "saved", object_bytes(obj.detach()).numpy().tobytes(), obj.device.type == "cpu"
        if id(obj) in self._numbers:
            return "tensor", self._numbers[id(obj)]
        if id(obj) in self.hidden:
            return "unread", tuple(obj.shape), obj.dtype
        plain = obj.detach().resolve_conj().resolve_neg()
        kind = None
        if type(obj) not in (torch.Tensor, torch.nn.Parameter):
            kind = (type(obj), dict(vars(obj)))
            plain = plain.as_subclass(torch.Tensor)
        if torch.empty_like(plain, device="meta").stride() != plain.stride():
            plain = plain.contiguous()  # overlapping, or with gaps
        number = self._numbers[id(obj)] = len(self.forms)
        self._alive.append(obj)
        host, data = plain.device.type == "cpu", None
        if host and plain.numel() * plain.element_size() <= _SMALL:
            data = as_bytes(plain).numpy().tobytes()
        else:
            # By the time it is sent, who read the batch may have put the next one there.
            reused = self.fresh is not None and id(obj) not in self.fresh
            same = plain.untyped_storage()._cdata == obj.untyped_storage()._cdata
            self.tensors.append(plain.clone() if reused and same else plain)
        self.forms.append(Form(tuple(plain.shape), plain.stride(), plain.dtype, kind, host, data))
        return "tensor", number


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._device = device

    def persistent_load(self, pid: Any) -> Any:
        """The tensor a number stands for; the device here instead of the sender's."""
        if pid[0] == "device":
            return self._device
        if pid[0] == "unread":
            return Unread(pid[1], pid[2], self._device)
        if pid[0] == "saved":
            tensor = object_from(torch.frombuffer(bytearray(pid[1]), dtype=torch.uint8))
            return tensor if pid[2] else tensor.to(self._device)
        return self._tensors[pid[1]]


def pack(
    obj: Any,
    batch: Any = None,
    hidden: Collection[int] = (),
    fresh: Collection[int] | None = None,
) -> Packed:
    """Takes an object apart.

    Args:
        obj: Anything that can be pickled; tensors anywhere in it.
        batch: Another one.
        hidden: Ids of tensors that are `Unread` in `batch`, unless `obj` has them, too.
        fresh: Ids of tensors that nobody overwrites; all others are copied now. None: nobody does.

    Raises:
        TypeError: Something in it can't be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.fresh = fresh
    try:
        pickler.dump(obj)
        pickler.hidden = hidden
        pickler.dump(batch)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"A batch has to reach other processes, and this one can't be pickled: {error}. Let "
            "the dataset or collate_fn return tensors, numbers, strings and plain containers."
        ) from error
    return Packed(pickle.dumps((pickler.forms, file.getvalue())), pickler.tensors)


def unpack(body: bytes, tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[Any, Any]:
    """Puts an object and a batch together again.

    Args:
        body: The second part of a header.
        tensors: Those of the header's forms, in order.
        device: Of this process.
    """
    unpickler = _Unpickler(io.BytesIO(body), tensors, device)
    return unpickler.load(), unpickler.load()


def restored(tensor: torch.Tensor, form: Form) -> torch.Tensor:
    """A received tensor as the class that it was."""
    if form.kind is None:
        return tensor
    made: torch.Tensor = tensor.as_subclass(form.kind[0])
    vars(made).update(form.kind[1])
    return made


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in memory's order, without a copy."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
    return flat.view(torch.uint8)


def from_bytes(form: Form, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty tensor of a form, and its bytes to be filled."""
    tensor = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device)
    return tensor, as_bytes(tensor)


def object_bytes(obj: Any) -> torch.Tensor:
    """A state as bytes in the host's memory."""
    file = io.BytesIO()
    torch.save(obj, file, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def object_from(data: torch.Tensor) -> Any:
    """The state that `object_bytes` has made bytes of."""
    # From a process of this very run; states may hold any class of the user's.
    file = io.BytesIO(data.numpy().tobytes())
    return torch.load(file, map_location="cpu", weights_only=False)
