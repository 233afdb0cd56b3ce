"""Checks of arguments that are numbers or names: what was wrong, the allowed range, the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["count", "number", "one_of", "size"]


def count(owner: str, name: str, value: int, least: int, what: str = "a whole number") -> int:
    """A whole number of at least `least`.

    Raises:
        ValueError: It is something else; says what it counts.
    """
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not whole or not math.isfinite(value) or value < least:
        raise ValueError(f"{owner}({name}={value!r}): pass {what}, {least} or more.")
    return int(value)


def number(
    owner: str,
    name: str,
    value: float,
    high: float | None = None,
    *,
    positive: bool = False,
    what: str = "a number",
) -> float:
    """A finite number, 0 or more (above 0 if `positive`), and up to `high`.

    Raises:
        ValueError: It is something else; says what it means.
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < 0 or (positive and value == 0) or (high is not None and value > high):
        least = "above 0" if positive else "0 or more" if high is None else f"0 to {high:g}"
        raise ValueError(f"{owner}({name}={value!r}): pass {what}, {least}.")
    return float(value)


def one_of(owner: str, name: str, value: str, allowed: Sequence[str]) -> str:
    """One of several names.

    Raises:
        ValueError: It is another.
    """
    if value not in allowed:
        raise ValueError(f"{owner}({name}={value!r}): pass one of {list(allowed)}.")
    return value


_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def size(owner: str, name: str, value: str | float) -> int:
    """A number of bytes, such as `"8GiB"`, `"500 MB"` or `8e9`.

    Raises:
        ValueError: It is something else, or not above 0.
    """
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is not None:
        power = " kmgt".index(found[2].lower() or " ")
        value = float(found[1]) * (1024 if found[3] else 1000) ** power
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 2**63:
        raise ValueError(
            f"{owner}({name}={value!r}): pass a number of bytes, or one with a unit such as '8GiB' "
            "or '500MB'."
        )
    return int(value)
