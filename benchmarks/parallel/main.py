"""Time of a step in several processes: methods against their own bounds and exact pipelines."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.parallel import jobs
from benchmarks.parallel.fleet import Fleet
from benchmarks.parallel.jobs import METHODS, SCHEDULES, Case
from benchmarks.parallel.picture import draw, drawn
from benchmarks.parallel.recording import Times, as_stages, best_sizes, bound
from benchmarks.report import renew_table, write

HERE = Path(__file__).parent
# Share of the work that the first of two stages gets in the unbalanced split.
UNBALANCED = 0.33
EXACT = "end to end"


class Bench:
    """What was measured so far.

    Args:
        fleet: Measures.
        options: The benchmark's.

    Attributes:
        results: For each case one entry per round: what each process has recorded.
    """

    def __init__(self, fleet: Fleet, options: argparse.Namespace) -> None:
        self.fleet = fleet
        self.options = options
        self.results: dict[Case, list[list[dict[str, Any]]]] = {}
        self.screened: dict[Case, list[dict[str, Any]]] = {}
        self.rounds = 0

    def once(self, case: Case, **changed: Any) -> list[dict[str, Any]]:
        """One run; what each stage has recorded, the first stage first."""
        options = argparse.Namespace(**{**vars(self.options), **changed})
        function = jobs.pipeline if case.micro else jobs.fit
        found = self.fleet.run(case.processes, function, options, case)
        if not case.micro:
            found.sort(key=lambda result: result["owned"])
        where = f"{case.processes} x {case.threads}, {split(case)}"
        print(f"{1000 * found[-1]['step']:8.1f} ms  {title(case)}, {where}", flush=True)
        return found

    def cases(self) -> list[Case]:
        """Everything to time in each round, in an order that keeps comparable things together."""
        options, size = self.options, self.options.stages
        short = {"batches": max(2, options.batches // 2)}
        print("To find balanced splits, and the best micro-batches:")
        alone = {n: self.once(Case(n), **short)[0]["times"] for n in options.only}
        units = self.fleet.run(1, jobs.time_units, options)[0]
        total, first = sum(t.own for t in units.values()), 1
        shares = {c: sum(units[k].own for k in range(c)) / total for c in units}
        most = min(map(len, [units, *alone.values()])) - size + 1
        first = min(range(1, most + 1), key=lambda c: abs(shares[c] - 2 / size * UNBALANCED))

        def splits(times: dict[int, Times]) -> dict[str, tuple[int, ...]]:
            return {
                "balanced": tuple(best_sizes(times, size)),
                "unbalanced": tuple(best_sizes(times, size, first)),
            }

        found = [Case(EXACT), Case(EXACT, threads=size), Case(EXACT, size, replicas=size)]
        for split, sizes in splits(units).items():
            tried = [
                Case(schedule, size, split=split, sizes=sizes, micro=micro)
                for schedule in SCHEDULES
                for micro in options.micro
                if micro >= size
            ]
            for case in tried:
                self.screened[case] = self.once(case, **short)
            tried.sort(key=lambda case: float(self.screened[case][-1]["step"]))
            found += tried[: options.keep]
        for name, times in alone.items():
            found.append(Case(name))
            for split, sizes in splits(times).items():
                if split == "balanced" or name in options.unbalanced:
                    found.append(Case(name, size, split=split, sizes=sizes))
            if name == "Greedy":
                found += [Case(name, threads=size), Case(name, size, replicas=size)]
        return found

    def measure(self) -> None:
        """Rounds of all cases, to and fro, while there is time."""
        begin = time.monotonic()
        cases, longest = self.cases(), 0.0
        while self.rounds < self.options.rounds:
            start = time.monotonic()
            if self.rounds and start - begin + longest > 60 * self.options.minutes:
                break
            self.rounds += 1
            print(f"Round {self.rounds}, after {start - begin:.0f} s:")
            for case in cases if self.rounds % 2 else cases[::-1]:
                self.results.setdefault(case, []).append(self.once(case))
            longest = max(longest, time.monotonic() - start)
        self.results = {case: self.results[case] for case in cases}

    def row(self, case: Case) -> dict[str, Any]:
        """Medians over the rounds; ratios are those of a round."""
        rounds = self.results[case]
        steps = [1000 * results[-1]["step"] for results in rounds]
        base = self.results[Case(EXACT if case.micro else case.name)]
        ratios = [b[0]["step"] / r[-1]["step"] for b, r in zip(base, rounds, strict=True)]
        least, share, loaded = [], [], []
        if case.sizes and not case.micro:
            stages = as_stages(case.sizes)
            for alone, results in zip(base, rounds, strict=True):
                step = results[-1]["step"]
                least.append(1000 * bound(alone[0]["times"], stages))
                share.append(least[-1] / 1000 / step)
                times = {k: t for result in results for k, t in result["times"].items()}
                loaded.append(bound(times, stages) / step)
        return {
            "what": title(case),
            "processes x threads": f"{case.processes} x {case.threads}",
            "split": split(case),
            "step, ms": statistics.median(steps),
            "spread, ms": f"{min(steps):.0f} to {max(steps):.0f}",
            "images/s": round(1000 * self.options.batch / statistics.median(steps)),
            "speed-up": statistics.median(ratios),
            "bound, ms": statistics.median(least) if least else "-",
            "share of bound": f"{statistics.median(share):.1%}" if share else "-",
            "under load": f"{statistics.median(loaded):.1%}" if loaded else "-",
        }

    def facts(self) -> dict[str, Any]:
        """What else belongs to the result."""
        options = self.options
        own = {
            case.name: " ".join(f"{1000 * t.own:.3g}" for t in rounds[-1][0]["times"].values())
            for case, rounds in self.results.items()
            if case == Case(case.name) and case.name in METHODS
        }
        tried = {
            f"{title(case)}, {split(case)}": round(1000 * results[-1]["step"], 1)
            for case, results in self.screened.items()
        }
        inside = {
            f"{title(case)}, {split(case)}": [_parts(stage) for stage in rounds[-1]]
            for case, rounds in self.results.items()
            if case.sizes and not case.micro
        }
        return {
            "network": f"CifarResNet({options.depth})",
            "batch": options.batch,
            "seed": 0,
            "batches timed": options.batches,
            "rounds": self.rounds,
            "work of each local module alone, ms": own,
            "a step of each stage in the last round, ms": inside,
            "all pipelines tried, ms": tried,
        }

    def timeline(self) -> dict[str, Any]:
        """What the picture shows: the last round's runs with balanced stages."""
        chosen = [
            case
            for case in self.results
            if case.split == "balanced" and case.name in ("Greedy", "BackLink")
        ]
        exact = {
            case: self.results.get(case, [results])[-1]
            for case, results in self.screened.items()
            if case.split == "balanced" and case.name == "1F1B"
        }
        shown = {f"{title(c)}, {split(c)}": self.results[c][-1] for c in chosen}
        if exact:
            best = min(exact, key=lambda case: float(exact[case][-1]["step"]))
            shown[f"{title(best)}, {split(best)}"] = exact[best]
        network = f"CifarResNet({self.options.depth}), batch {self.options.batch}"
        panels = {name: drawn([r["spans"] for r in stages]) for name, stages in shown.items()}
        return {"network": network, "panels": panels}


def title(case: Case) -> str:
    """A case in words, without its split."""
    if case.micro:
        return f"{EXACT}, {case.name}, {case.micro} micro-batches"
    if case.replicas > 1:
        return f"{case.name}, {'DDP' if case.name == EXACT else f'{case.replicas} replicas'}"
    return case.name


def _parts(stage: dict[str, Any]) -> str:
    """What a stage's step consists of; the rest is the loop around the local modules."""
    parts = {"work": sum(t.own for t in stage["times"].values()), **stage["handing over"]}
    parts["rest"] = stage["step"] - sum(parts.values())
    return ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items())


def split(case: Case) -> str:
    """How many local modules, or units, each stage has."""
    return f"{case.split} {'+'.join(map(str, case.sizes))}" if case.sizes else "-"


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=14, help="of the ResNet")
    parser.add_argument("--batch", type=int, default=64, help="of all replicas together")
    parser.add_argument("--stages", type=int, default=2, help="processes, and threads of one")
    parser.add_argument("--batches", type=int, default=8, help="timed in each run")
    parser.add_argument("--warm-up", type=int, default=4, help="batches before them")
    parser.add_argument("--cool-down", type=int, default=3, help="batches behind them")
    parser.add_argument("--rounds", type=int, default=5, help="the medians count")
    parser.add_argument("--minutes", type=float, default=7, help="no round that would end later")
    parser.add_argument("--micro", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--keep", type=int, default=2, help="pipelines per split in all rounds")
    parser.add_argument("--shown", type=int, default=6, help="batches in the picture")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--unbalanced", nargs="*", choices=METHODS, default=["Greedy", "BackLink"])
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--backend", help="default gloo, on GPUs nccl")
    parser.add_argument("--quick", action="store_true", help="tiny, writes nothing")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    parser.add_argument("--table", action="store_true", help="only renew table and picture")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
        draw(json.loads((HERE / "timeline.json").read_text()), HERE / "timeline.png")
        return
    if options.quick:
        tiny = {"depth": 8, "batch": 8, "batches": 3, "warm_up": 2, "cool_down": 1, "rounds": 1}
        vars(options).update(tiny, micro=[2, 4], keep=1, only=["Greedy", "BackLink"], print=True)
    if options.batch % options.stages and not options.quick:
        parser.error(f"--batch {options.batch} can't be divided among {options.stages} replicas")
    options.backend = options.backend or ("gloo" if options.accelerator == "cpu" else "nccl")
    with Fleet(options.stages, options) as fleet:
        bench = Bench(fleet, options)
        bench.measure()
    rows = [bench.row(case) for case in bench.results]
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if options.print:
        print(json.dumps(bench.facts(), indent=2))
        with tempfile.TemporaryDirectory() as folder:
            draw(bench.timeline(), Path(folder) / "timeline.png")
        return
    (HERE / "timeline.json").write_text(json.dumps(bench.timeline()) + "\n")
    draw(bench.timeline(), HERE / "timeline.png")
    write(HERE, rows, **bench.facts())


if __name__ == "__main__":
    main()
