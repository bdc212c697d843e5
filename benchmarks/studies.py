"""Whether studies reach the same verdict with other seeds, and how near each check is to its threshold.

    python benchmarks/studies.py train-eval-gap non-iid --repeats 5 --model mlp

appends to benchmarks/studies.csv: one row per repeat and check, with what it said. A repeat takes the next seeds of one
long comparison: with 3 seeds a study, seeds 0 to 2, then 3 to 5, and so on. So the repeats share nothing but the data.
Runs are kept in a file, and a call that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from normkit.experiments import Comparison
from normkit.studies.measurements import Measurements, measured
from normkit.studies.presets import STUDIES, find
from normkit.studies.verb import compared
from normkit.studies.verdict import decided

COLUMNS = ("study", "model", "version", "seeds", "repeat", "verdict", "check", "holds", "said")


def taken(comparison: Comparison, repeat: int, seeds: int) -> Comparison:
    """The part of a long comparison that a repeat sees."""
    mine = range(repeat * seeds, (repeat + 1) * seeds)
    return dataclasses.replace(
        comparison,
        config=dataclasses.replace(comparison.config, seeds=seeds),
        trials=tuple(trial for trial in comparison.trials if trial.config.seed in mine),
    )


def rows(name: str, model: str, repeats: int, quick: bool, storage: str, workers: int) -> Iterator[dict[str, object]]:
    study = find(name)
    effort = study.effort(quick=quick)
    parts = study.parts_for(model)
    for data in study.data:
        long = effort._replace(seeds=repeats * effort.seeds)
        whole = [compared(part, long, model, data, storage=storage, workers=workers) for part in parts]
        for repeat in range(repeats):
            each = (
                measured(taken(comparison, repeat, effort.seeds), part.names())
                for part, comparison in zip(parts, whole, strict=True)
            )
            mine = range(repeat * effort.seeds, (repeat + 1) * effort.seeds)
            found = Measurements(itertools.chain.from_iterable(each), study.against(mine))
            checks = study.checks(found)
            for number, check in enumerate(checks):
                yield {
                    "study": name,
                    "model": f"{model} on {data}",
                    "version": "quick" if quick else "full",
                    "seeds": effort.seeds,
                    "repeat": repeat,
                    "verdict": decided(checks),
                    "check": number,
                    "holds": {True: "yes", False: "no", None: "open"}[check.holds],
                    "said": check.said,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="mlp", choices=("mlp", "cnn"))
    parser.add_argument("--full", action="store_true", help="the full version; else the quick one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("normkit-studies/calibration.db"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    asked = parser.parse_args()
    asked.runs.parent.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{asked.runs.absolute()}"
    kept = []
    if asked.out.exists():
        with asked.out.open(newline="") as file:
            kept = list(csv.DictReader(file))
    for name in STUDIES if asked.studies == ["all"] else asked.studies:
        new = list(rows(name, asked.model, asked.repeats, not asked.full, storage, asked.workers))
        again = {(row["study"], row["model"], row["version"]) for row in new}
        kept = [row for row in kept if (row["study"], row["model"], row["version"]) not in again] + new
        with asked.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        verdicts = [row["verdict"] for row in new if row["check"] == 0]
        print(f"{name}: {', '.join(f'{verdicts.count(v)} x {v}' for v in dict.fromkeys(verdicts))}")


if __name__ == "__main__":
    main()
