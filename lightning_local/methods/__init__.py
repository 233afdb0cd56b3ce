"""Methods of local learning: one paper per file, one line in `METHODS`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from lightning_local.methods.auglocal import AugLocal
from lightning_local.methods.backlink import BackLink
from lightning_local.methods.base import LocalMethod
from lightning_local.methods.dgl import DGL
from lightning_local.methods.end_to_end import EndToEnd
from lightning_local.methods.greedy import Greedy
from lightning_local.methods.infopro import InfoPro
from lightning_local.methods.predsim import PredSim
from lightning_local.methods.sgr import SGR

__all__ = [
    "DGL",
    "METHODS",
    "SGR",
    "AugLocal",
    "BackLink",
    "EndToEnd",
    "Greedy",
    "InfoPro",
    "LocalMethod",
    "PredSim",
    "get_method",
]

METHODS: dict[str, type[LocalMethod]] = {
    "EndToEnd": EndToEnd,
    "Greedy": Greedy,
    "DGL": DGL,
    "PredSim": PredSim,
    "InfoPro": InfoPro,
    "AugLocal": AugLocal,
    "BackLink": BackLink,
    "SGR": SGR,
}


def get_method(method: LocalMethod | str) -> LocalMethod:
    """A method from its name (in any case) or as it is.

    Raises:
        ValueError: No method has that name (the closest one is suggested), or the one that has
            needs arguments.
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
    preset = METHODS[names[method.lower()]]
    needed = [
        f"{name}=..."
        for name, parameter in inspect.signature(preset).parameters.items()
        if parameter.default is parameter.empty
    ]
    if needed:
        made = f"{preset.__name__}({', '.join(needed)})"
        raise ValueError(
            f"method={method!r} has no default for everything: pass methods.{made}, or in YAML its "
            "class_path and init_args."
        )
    make: Callable[[], LocalMethod] = preset
    return make()
