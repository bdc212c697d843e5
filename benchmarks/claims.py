"""Measure on digits how soon batch norm reaches 95 % and which rates it stands, against no normalization.

    python benchmarks/claims.py --seeds 9

writes benchmarks/claims.csv: for each model all seeds together, and every run of three seeds apart, to show how much
they vary. Steps and rates repeat exactly on one kind of processor; another rounds
otherwise, which a training amplifies (none 104, batch 42 steps here were 97 and 43 there). Seconds never repeat and are
left out.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from normkit.experiments import compare
from normkit.experiments.analysis import VariantSummary, summarize
from normkit.experiments.config import Config

COLUMNS = (
    "model", "seeds", "norm", "best_rate", "steps_to_95", "reached", "budget", "largest_rate", "test_accuracy"
)  # fmt: skip


def row(model: str, seeds: range, variant: VariantSummary) -> dict[str, object]:
    steps = "" if variant.mean_steps is None else f"{variant.mean_steps:.1f}"
    return {
        "model": model,
        "seeds": f"{seeds.start}-{seeds.stop - 1}",
        "norm": variant.norm,
        "best_rate": variant.best_lr,
        "steps_to_95": steps,
        "reached": sum(step is not None for step in variant.steps_to_target),
        "budget": variant.budget,
        "largest_rate": variant.largest_lr,
        "test_accuracy": f"{variant.mean_final:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    rows = []
    for model in ("cnn", "mlp"):
        result = compare(model, norms=("none", "batch"), lrs=Config().lrs, seeds=arguments.seeds)
        runs = [range(arguments.seeds), *(range(k, k + 3) for k in range(0, arguments.seeds - 2, 3))]
        for seeds in runs:
            trials = [trial for trial in result.trials if trial.config.seed in seeds]
            (group,) = summarize(trials, result.task)
            rows += [row(model, seeds, variant) for variant in group.variants]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
