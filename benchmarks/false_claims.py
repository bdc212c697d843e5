"""How often `normkit compare` claims a difference where there is none, and how often it finds one of two points.

    python benchmarks/false_claims.py --comparisons 1000

writes benchmarks/false_claims.csv. Every simulated comparison goes through the real analysis. Its trials are made like
this: each test example has a difficulty of its own, which each variant finds somewhat easier or harder (`profile`), and
each seed shifts a whole network a little; all of it is drawn anew, test set included. `claims` is the share of
comparisons that claim any difference, in accuracy or in steps, among 7 variants; `found` the share that claims batch
against none in accuracy, where batch is truly better by `gain`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import expit

from normkit.experiments.analysis import summarize
from normkit.experiments.config import NORMS, Task, TrialConfig
from normkit.experiments.results import Evaluation, TrialResult, packed

TASK = Task("accuracy", "max", 0.95)
COLUMNS = ("seeds", "examples", "profile", "gain", "comparisons", "claims", "found")
DIFFICULTY, SEED_SHIFT, STEP_SPREAD = 2.0, 0.15, 0.15  # standard deviations: logits, logits, log steps
BUDGET, EVERY, STEPS = 196, 7, 60  # steps of a trial, between evaluations, to the target on average


@cache
def easiness(accuracy: float, profile: float) -> float:
    """The shift of logits with which a network is right on this share of all examples there are."""
    population = np.sqrt(DIFFICULTY**2 + profile**2) * np.random.default_rng(0).normal(size=100_000)
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(population + middle).mean() < accuracy else (low, middle)
    return low


def comparison(
    rng: np.random.Generator, *, seeds: int, examples: int, profile: float, gain: float = 0.0, accuracy: float = 0.96
) -> Iterator[TrialResult]:
    """The trials of one simulated comparison. `gain` is how much better batch truly is, as a share."""
    difficulty = rng.normal(0, DIFFICULTY, examples)
    for norm in NORMS:
        mine = difficulty + rng.normal(0, profile, examples)
        mine += easiness(accuracy + (gain if norm == "batch" else 0.0), profile)
        for seed in range(seeds):
            right = (rng.random(examples) < expit(mine + rng.normal(0, SEED_SHIFT))).astype(float)
            yield trial(norm, seed, right, STEPS * np.exp(rng.normal(0, STEP_SPREAD)))


def trial(norm: str, seed: int, right: np.ndarray, steps: float) -> TrialResult:
    curve = tuple(Evaluation(at, at / 1000, 0.1, 0.96 if at >= steps else 0.5) for at in range(0, BUDGET + 1, EVERY))
    config = TrialConfig(
        framework="torch", model="mlp", code="", data="simulated", norm=norm, lr=0.1, batch_size=32, inputs="none",
        seed=seed, epochs=7, loss="cross_entropy", optimizer="sgd", metric="accuracy",
    )  # fmt: skip
    return TrialResult(
        config=config, metric="accuracy", curve=curve, train_losses=(0.1,), steps=BUDGET, seconds=0.2,
        diverged=False, final=float(right.mean()), examples=packed(right),
    )  # fmt: skip


def rates(comparisons: int, **settings: float) -> tuple[float, float]:
    """The shares of comparisons with any claim, and with the claim that batch is better than none."""
    rng = np.random.default_rng(1)
    claims = found = 0
    for _ in range(comparisons):
        (group,) = summarize(comparison(rng, **settings), TASK)  # type: ignore[arg-type]
        claimed = [d for d in group.against_baseline + group.pairs if d.claimed]
        claims += bool(claimed)
        found += any((d.first, d.second, d.quantity) == ("batch", "none", "final") and d.value > 0 for d in claimed)
    return claims / comparisons, found / comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    equal = [(seeds, 450, profile, 0.0) for seeds in (3, 4, 5, 6, 7, 8, 9, 10, 20) for profile in (0.0, 0.5, 1.0)]
    better = [(seeds, examples, 0.5, 0.02) for seeds in (5, 10, 20) for examples in (450, 2000)]
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for seeds, examples, profile, gain in equal + better:
            found = rates(arguments.comparisons, seeds=seeds, examples=examples, profile=profile, gain=gain)
            writer.writerow((seeds, examples, profile, gain, arguments.comparisons, *found))
            file.flush()
            print(seeds, examples, profile, gain, *found)


if __name__ == "__main__":
    main()
