"""The rows of the three tables, one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.memory.configurations import OTHERS, Configuration, reason_against
from benchmarks.memory.fits import fit
from benchmarks.memory.networks import SMALL, SUBJECTS
from benchmarks.memory.predicted import predict

__all__ = ["ERROR", "Maker", "checked_row", "fitted_row", "predicted_row"]

MIB = 2**20
ERROR = "error: "
Row = dict[str, Any]
# Exact numbers of a row, in bytes and FLOPs, and those of its network end to end.
Exact = dict[str, int]


def _start(network: str, configuration: Configuration, batch: int, *columns: str) -> Row:
    return {
        "network": network,
        "batch": batch,
        "method": configuration.name,
        "recompute": configuration.recompute,
        **dict.fromkeys(columns, ""),
        "note": reason_against(network, configuration),
    }


def _mebibytes(size: int) -> int | float:
    """As a table shows it."""
    return round(size / MIB) if size >= 100 * MIB else size / MIB


def predicted_row(
    network: str, configuration: Configuration, batch: int, options: Any, base: Exact | None
) -> tuple[Row, Exact]:
    """A row of the table."""
    row = _start(
        network, configuration, batch, "K", "head parameters", "static, MiB", "peak, MiB",
        "peak, x", "others, x", "FLOPs, x",
    )  # fmt: skip
    row["others, x"] = OTHERS.get((network, configuration.label), "")
    if row["note"]:
        return row, {}
    found = predict(SUBJECTS[network], configuration, batch)
    exact = {"peak": found.peak, "static": found.static, "FLOPs": found.flops}
    base = base or exact
    row["K"], row["head parameters"] = found.num_modules, found.head_parameters
    row["static, MiB"], row["peak, MiB"] = _mebibytes(found.static), _mebibytes(found.peak)
    row["peak, x"] = found.peak / base["peak"]
    row["FLOPs, x"] = found.flops / base["FLOPs"]
    row["note"] = "; ".join(found.notes)
    return row, exact


def fitted_row(
    network: str, configuration: Configuration, batch: int, options: Any, base: Exact | None
) -> tuple[Row, Exact]:
    """Prediction and measurement of a row of the table."""
    row = _start(
        network, configuration, batch, "K", "predicted, MiB", "measured, MiB",
        "measured / predicted", "measured, x",
    )  # fmt: skip
    if row["note"]:
        return row, {}
    subject = SUBJECTS[network]
    found = predict(subject, configuration, batch, options.precision)
    row["K"], row["predicted, MiB"] = found.num_modules, _mebibytes(found.peak)
    measured = fit(subject, configuration, batch, options)
    if measured is None:
        row["note"] = "out of memory"
        return row, {"predicted": found.peak}
    exact = {"peak": measured, "predicted": found.peak}
    row["measured, MiB"] = _mebibytes(measured)
    row["measured / predicted"] = measured / found.peak
    whole = (base or exact).get("peak")
    row["measured, x"] = measured / whole if whole else ""
    return row, exact


def checked_row(
    network: str, configuration: Configuration, batch: int, options: Any, base: Exact | None
) -> tuple[Row, Exact]:
    """Prediction and measurement on the CPU, of a small network."""
    row = _start(network, configuration, batch, "K", "predicted, MiB", "measured, MiB", "error, %")
    if row["note"]:
        return row, {}
    subject = SMALL[network]
    found = predict(subject, configuration, batch)
    measured = fit(subject, configuration, batch, options)
    assert measured is not None
    row["K"] = found.num_modules
    row["predicted, MiB"], row["measured, MiB"] = _mebibytes(found.peak), _mebibytes(measured)
    row["error, %"] = 100 * (found.peak / measured - 1)
    return row, {"peak": measured, "predicted": found.peak}


Maker = Callable[[str, Configuration, int, Any, "Exact | None"], tuple[Row, Exact]]
