"""The benchmark's tables: a JSON file each, and the page that shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import report

__all__ = ["HERE", "PAGES", "Table", "read"]

HERE = Path(__file__).parent
PAGES = {"result": "README.md", "check": "CHECK.md", "result_cuda": "CUDA.md"}
Row = dict[str, Any]
Place = tuple[str, int, str, str]


def read(name: str) -> dict[str, Any]:
    """What was written before; nothing without a file.

    Args:
        name: A key of `PAGES`.
    """
    path = HERE / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


class Table:
    """Rows by their network, batch size, method and recomputation.

    Args:
        name: A key of `PAGES`; what was written before is there.
        networks: In their order.
        labels: Of methods with their recomputation, in their order.
    """

    def __init__(self, name: str, networks: Sequence[str], labels: Sequence[str]) -> None:
        self._name, self._networks, self._labels = name, networks, labels
        found = read(name)
        self._rows: dict[Place, Row] = {
            (row["network"], row["batch"], row["method"], row["recompute"]): row
            for row in found.get("rows", ())
        }
        self._exact: dict[str, dict[str, int]] = found.get("exact", {})

    def get(self, place: Place) -> Row | None:
        """A row, if it is there."""
        return self._rows.get(place)

    def exact(self, place: Place) -> dict[str, int] | None:
        """Its numbers that are not rounded."""
        return self._exact.get(_name(place))

    def put(self, place: Place, row: Row, exact: dict[str, int]) -> None:
        """Adds or replaces a row."""
        self._rows[place], self._exact[_name(place)] = row, exact

    def write(self, **facts: Any) -> None:
        """Writes JSON file and page; an interruption leaves them as they were."""
        places = sorted(self._rows, key=self._order)
        columns = max((self._rows[place] for place in places), key=len)
        rows = [{name: self._rows[p].get(name, "") for name in columns} for p in places]
        exact = {_name(place): self._exact[_name(place)] for place in places}
        with _staged(self._name) as folder:
            report.write(folder, rows, **facts, exact=exact)

    def renew(self) -> None:
        """Writes the page again."""
        with _staged(self._name) as folder:
            report.renew_table(folder)

    def _order(self, place: Place) -> Any:
        network, batch, method, recompute = place
        label = method if recompute == "none" else f"{method}, {recompute}"
        known = self._labels.index(label) if label in self._labels else len(self._labels)
        return self._networks.index(network), batch, known


def _name(place: Place) -> str:
    return " | ".join(map(str, place))


@contextmanager
def _staged(name: str) -> Iterator[Path]:
    """A folder in which the files have the names that `report` knows."""
    names = {f"{name}.json": "result.json", PAGES[name]: "README.md"}
    with TemporaryDirectory(dir=HERE, prefix=".") as parent:
        folder = Path(parent) / HERE.name
        folder.mkdir()
        for own, general in names.items():
            if (HERE / own).exists():
                shutil.copyfile(HERE / own, folder / general)
        yield folder
        for own, general in names.items():
            (folder / general).replace(HERE / own)
