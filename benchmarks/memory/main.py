"""Peak memory of every method on networks of all sizes: predicted, and measured beside that.

python -m benchmarks.memory.main            the table, from steps on fake tensors
python -m benchmarks.memory.main --check    predictions beside fits on the CPU, small networks
python -m benchmarks.memory.main --cuda     the table's rows in fits on a GPU
"""

from __future__ import annotations

import argparse
import logging
import time
import traceback
import warnings
from typing import Any

from benchmarks.memory import files, picture
from benchmarks.memory.configurations import CONFIGURATIONS, LABELS, Configuration, checked
from benchmarks.memory.networks import SMALL, SUBJECTS
from benchmarks.memory.rows import ERROR, Maker, checked_row, fitted_row, predicted_row

NETWORKS = {**SUBJECTS, **SMALL}
METHODS = list(dict.fromkeys(c.name for n in NETWORKS for c in (*CONFIGURATIONS, *checked(n))))


def run(name: str, make: Maker, options: Any) -> None:
    """Makes the rows that are missing; what was made stays, whenever this ends.

    Args:
        name: Of the JSON file.
        make: Makes one row.
        options: Of the command line.
    """
    small = name == "check"
    subjects = SMALL if small else SUBJECTS
    table = files.Table(name, list(NETWORKS), LABELS)
    for network in subjects:
        if options.only_network and network not in options.only_network:
            continue
        batch = options.batch or subjects[network].batch_size
        for configuration in checked(network) if small else CONFIGURATIONS:
            first = configuration.label == "end to end"
            wanted = not options.only_method or configuration.name in options.only_method
            place = (network, batch, configuration.name, configuration.recompute)
            known = table.get(place)
            again = options.again or options.print or known is None
            again = again or str(known["note"]).startswith(ERROR)
            if not (again and wanted) and not (first and known is None):
                continue
            start = time.monotonic()
            whole = None if first else table.exact((network, batch, "end to end", "none"))
            row, exact = _tried(make, network, configuration, batch, options, whole)
            table.put(place, row, exact)
            print(f"{time.monotonic() - start:.0f} s", _short(row), flush=True)
            if not options.print:
                table.write(precision=options.precision)


def _tried(
    make: Maker,
    network: str,
    configuration: Configuration,
    batch: int,
    options: Any,
    whole: Any,
) -> Any:
    """A row; with a note in place of numbers where it can't be made."""
    try:
        return make(network, configuration, batch, options, whole)
    except Exception as error:
        traceback.print_exc()
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        row = {
            "network": network,
            "batch": batch,
            "method": configuration.name,
            "recompute": configuration.recompute,
            "note": ERROR + problem[:120].replace("|", "/"),
        }
        return row, {}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if v != ""}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--check", action="store_true", help="predictions beside fits on the CPU")
    kind.add_argument("--cuda", action="store_true", help="the table's rows in fits on a GPU")
    parser.add_argument("--only-network", nargs="*", choices=NETWORKS)
    parser.add_argument("--only-method", nargs="*", choices=METHODS)
    parser.add_argument("--batch", type=int, help="samples; default each network's own")
    parser.add_argument("--precision", default="32-true", help="with --cuda")
    parser.add_argument("--accelerator", default="gpu", help="with --cuda; cpu is for --print")
    parser.add_argument("--again", action="store_true", help="rows that are there already too")
    parser.add_argument("--table", action="store_true", help="only rewrite pages and pictures")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name, make = "result", predicted_row
    if options.check:
        name, make, options.accelerator = "check", checked_row, "cpu"
    elif options.cuda:
        name, make = "result_cuda", fitted_row
        if options.accelerator == "cpu" and not options.print:
            parser.error("--accelerator cpu needs --print: result_cuda.json is a GPU's.")
    if options.table:
        for each in files.PAGES:
            if files.read(each):
                files.Table(each, list(NETWORKS), LABELS).renew()
    else:
        run(name, make, options)
    if not options.print:
        picture.draw()


if __name__ == "__main__":
    main()
