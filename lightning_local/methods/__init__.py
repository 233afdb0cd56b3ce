"""Methods of local learning: one paper per file, one line in `METHODS`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from lightning_local.methods.auglocal import AugLocal
from lightning_local.methods.backlink import BackLink
from lightning_local.methods.base import LocalMethod
from lightning_local.methods.end_to_end import EndToEnd
from lightning_local.methods.greedy import Greedy
from lightning_local.methods.sgr import SGR

__all__ = [
    "METHODS",
    "SGR",
    "AugLocal",
    "BackLink",
    "EndToEnd",
    "Greedy",
    "LocalMethod",
    "get_method",
]

METHODS: dict[str, Callable[[], LocalMethod]] = {
    "EndToEnd": EndToEnd,
    "Greedy": Greedy,
    "AugLocal": AugLocal,
    "BackLink": BackLink,
    "SGR": SGR,
}


def get_method(method: LocalMethod | str) -> LocalMethod:
    """A method from its name (in any case) or as it is.

    Raises:
        ValueError: No method has that name; the closest one is suggested.
        TypeError: Neither a name nor a method.
    """
    if isinstance(method, LocalMethod):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"method={method!r}: pass one of {list(METHODS)} or an instance of LocalMethod."
        )
    names = {name.lower(): name for name in METHODS}
    if method.lower() not in names:
        last = method.lower().rpartition(".")[2]
        close = difflib.get_close_matches(last, names, n=1)
        hint = f" Did you mean {names[close[0]]!r}?" if close else ""
        raise ValueError(f"method={method!r} is not known: pass one of {list(METHODS)}.{hint}")
    return METHODS[names[method.lower()]]()
