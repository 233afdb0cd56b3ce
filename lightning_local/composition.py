"""The proof that bodies are the network: chained, they run its operations on its values' forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_local.fake_run import on_a_copy, on_fakes

__all__ = ["check_composition"]

# Marks of a profiler on containers; and what depends on how long Python keeps a tensor.
_SKIPPED = ("profiler.", "prim.device")
_PLAIN = (int, float, complex, str, type(None), torch.dtype)
# An operation and the forms of its arguments.
_Operation = tuple[Any, ...]
_Run = Callable[..., list[_Operation]]


# torch leaves TorchDispatchMode untyped, hence the two ignores.
class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not str(func).startswith(_SKIPPED):
            self.operations.append((str(func), *map(_form, tree_leaves((args, kwargs)))))
        return func(*args, **kwargs)


def _form(value: Any) -> Any:
    """What has to be the same of an argument: a tensor's shape and dtype, another one's value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return value if isinstance(value, _PLAIN) else type(value).__name__


def check_composition(network: nn.Module, bodies: Any, inputs: Sequence[Any]) -> None:
    """The chained bodies have to run the same operations as the network.

    Numbers in which both differ from themselves, run twice, are left out: those of random
    generators of its own.

    Raises:
        ValueError: They don't.
    """

    def whole(host: nn.Module, *values: Any) -> list[_Operation]:
        log = _Log()
        with log:
            host(*values)
        return log.operations

    def chained(host: nn.Module, *values: Any) -> list[_Operation]:
        log = _Log()
        with log:
            for body in bodies:
                values = body.codes[host.training].function(host, *values)
        return log.operations

    one_code = all(body.codes[True].source == body.codes[False].source for body in bodies)
    for training in (True,) if one_code else (True, False):
        expected, found = _both(network, (whole, chained), inputs, training)
        if expected != found:
            again = _both(network, (whole, chained), inputs, training)
            parting = _parting((expected, found), (again[0], again[1]))
            if parting is not None:
                raise ValueError(
                    f"Traced, {type(network).__name__} runs other operations than by itself "
                    f"({parting[1]} instead of {parting[0]}): its forward asks for types, draws "
                    "random numbers of Python or NumPy, or does other things that tracing can't "
                    "follow. Move that code into a submodule of its own."
                )


def _both(
    network: nn.Module, runs: tuple[_Run, _Run], inputs: Sequence[Any], training: bool
) -> list[list[_Operation]]:
    """Both on fakes; if one can't be, both on real copies, since the operations differ a little."""
    try:
        return [on_fakes(network, run, inputs, training, real=False) for run in runs]
    except Exception:  # whatever fakes can't run may still run
        return [on_a_copy(network, run, inputs, training) for run in runs]


def _parting(
    once: tuple[Sequence[_Operation], Sequence[_Operation]],
    again: tuple[Sequence[_Operation], Sequence[_Operation]],
) -> tuple[str, str] | None:
    """Where a network and its bodies part, in words, other than each does from itself; or None."""
    for a, b, a_again, b_again in zip(*once, *again, strict=False):
        if len({operation[0] for operation in (a, b, a_again, b_again)}) > 1:
            return a[0], b[0]
        lengths = {len(operation) for operation in (a, b, a_again, b_again)}
        if len(lengths) > 1 or any(
            x != y and (x == x_again or y == y_again)
            for x, y, x_again, y_again in zip(a, b, a_again, b_again, strict=True)
        ):
            return _words(a), _words(b)
    return None if len(once[0]) == len(once[1]) else ("one more", "one more")


def _words(operation: _Operation) -> str:
    forms = (str(list(f[0])) if isinstance(f, tuple) else str(f) for f in operation[1:])
    return f"{operation[0]} of {', '.join(forms)}"
