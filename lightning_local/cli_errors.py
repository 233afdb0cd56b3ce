"""What the command line says of a wrong value: our message, and where it stands."""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
import os
import re
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_local import couplings, heads, losses, methods
from lightning_local.callbacks import LocalSummary
from lightning_local.early_exit import EarlyExit
from lightning_local.learner import LocalLearner
from lightning_local.partition import Partition
from lightning_local.strategy import LocalParallelStrategy

__all__ = ["Parser", "Refusal", "kinds", "options_of", "place_of", "raised_by"]


class Parser(LightningArgumentParser):
    """Says what is wrong, without the usage and the whole configuration around it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with status 2 and the shortened message."""
        debugged = os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "0", "no", "false")
        if debugged or not self.exit_on_error:
            super().error(message, ex)
        text = message if isinstance(ex, Refusal) else _shortened(message)
        self.exit(2, f"error: {text}\n{_suggestion(message)}")


class Refusal(ValueError):
    """What a class of ours says of a value, and where in the configuration that is."""


def raised_by(error: BaseException) -> str:
    """The package whose `raise` it was; `""` for what just happens, such as `None + 1`."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or at.tb_frame.f_code.co_code[at.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return ""
    return str(at.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def place_of(node: Any, name: str, given: Mapping[str, Any], at: str = "") -> str:
    """The key under which a configuration has a class with these arguments, or `""`."""
    inner = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(inner, dict):
        return ""
    path, options = inner.get("class_path"), inner
    named = inner.keys() == given.keys()  # of a class that alone can be there
    if isinstance(path, str):
        options = {**inner.get("init_args", {}), **inner.get("dict_kwargs", {})}
        named = path.rpartition(".")[2] == name
    plain = {k: v for k, v in given.items() if v is None or isinstance(v, (str, int, float))}
    if named and all(options.get(k) == v for k, v in plain.items()):
        return at
    found = (place_of(child, name, given, f"{at}.{key}".strip(".")) for key, child in inner.items())
    return next(filter(None, found), "")


_NOISE = re.compile(
    r" *(- )?(Does not validate|Subtypes:|Errors:$|Given value( type|: NestedArg|: \.\.\.))"
)


def _shortened(message: str) -> str:
    """A parser's message without dumps of the configuration and what else a value could be."""
    message = re.sub(r"Namespace\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "...", message)
    lines = dict.fromkeys(line.rstrip() for line in message.splitlines() if line.strip())
    kept = [line for line in lines if len(line) < 400 and not _NOISE.match(line)]
    # Where one alternative went wrong further in, that the value is none of the others is no news.
    told = {found[1] for line in kept if (found := re.match("( *- )(?!Expected an? <)", line))}
    kept = [line for line in kept if re.split("Expected an? <", line)[0] not in told]
    return "\n".join(kept[:12] + (["  ..."] if len(kept) > 12 else []))


@functools.cache
def kinds() -> dict[str, type]:
    """What of this package a configuration may name."""
    public = [getattr(m, n) for m in (methods, heads, losses, couplings) for n in m.__all__]
    public += [LocalLearner, LocalParallelStrategy, LocalSummary, EarlyExit, Partition]
    return {kind.__name__: kind for kind in public if isinstance(kind, type)}


_UNKNOWN = (
    r"Option '([\w.]+)' is not accepted",
    r"Expected a path but ([\w.]+) either not accessible",
    r"Unrecognized arguments: --([\w.]+)",
    r"has no attribute '([\w.]+)'",
)


# A class's options stood beside its `class_path`, or there was no `class_path`: jsonargparse takes
# them for those of the class that any such value has.
_NO_INIT_ARGS = r"Option 'class_path' is not|class_path 'lightning\.Lightning(Data)?Module'"


def _suggestion(message: str) -> str:
    """The name closest to one that a message calls unknown, or those that there are."""
    if re.search(_NO_INIT_ARGS, message):
        return "A class is given as {class_path: package.Class, init_args: {its options}}.\n"
    names = sorted({*kinds(), *(name for kind in kinds().values() for name in options_of(kind))})
    for word in (found for pattern in _UNKNOWN for found in re.findall(pattern, message)):
        last = word.rpartition(".")[2]
        close = difflib.get_close_matches(last, names, 1, 0.7)
        if close and close[0] != last:
            return f"Did you mean {close[0]!r}, not {last!r}?\n"
    found = re.search(r"class_path '[\w.]*?(\w+)':\s+" + _UNKNOWN[0], message)
    if found is None or found[1] not in kinds():
        return ""
    return f"{found[1]} takes: {', '.join(options_of(kinds()[found[1]]))}.\n"


def options_of(owner: type) -> dict[str, inspect.Parameter]:
    """The constructor's named parameters, with their types resolved."""
    found: dict[str, inspect.Parameter] = {}
    for kind in owner.__mro__:
        constructor = vars(kind).get("__init__")
        if not isinstance(constructor, FunctionType):
            continue
        passes_on = False
        for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                passes_on |= parameter.kind == parameter.VAR_KEYWORD
            elif name not in found:
                found[name] = parameter.replace(annotation=_resolved(parameter, constructor))
        if not passes_on:  # what stands in **kwargs is the next class's
            break
    return found


def _resolved(parameter: inspect.Parameter, owner: FunctionType) -> Any:
    """An annotation; anything is accepted where only a type checker knows its names."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, owner.__globals__)
    except NameError:
        return Any
