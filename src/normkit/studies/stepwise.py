"""The noise of batch statistics by time step: what a criterion sees of it, and the table of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from normkit.experiments.results import StepNoise
from normkit.tables import Table

__all__ = ["KINDS", "LEGEND", "growth", "noise_table", "step_noise"]

KINDS = ("W x", "U h", "c")  # what is normalized, in the order of the results
LEGEND = (
    "batch statistics by step: how far those of the trained network lie apart over the batches of an epoch; before the "
    "stroke the standard deviation of the batch mean in % of that of all values of the step, behind it that of the "
    "batch variance in % of its mean; medians over the channels, means over the seeds. Expected: that of means of so "
    "many independent values, sqrt(mean of 1 / values). Alive: sequences of a batch that have not ended, mean over the "
    "batches; all: one statistic of all steps."
)
_VALUES = {True: "sequences alive", False: "values in a statistic"}

Seeds = Sequence[Sequence[StepNoise]]  # of every seed the steps


def growth(seeds: Seeds, kind: int, first: int) -> list[float]:
    """Noise of the means at the last step / at step `first`, per seed; nothing where it is not known of every seed."""
    pairs = [(steps[-1].means[kind], steps[first].means[kind]) for steps in seeds]
    return [last / begin for last, begin in pairs] if all(a > 0 and b > 0 for a, b in pairs) else []


def noise_table(found: Iterable[tuple[str, Seeds]]) -> Table | None:
    """A column per step, a row per circumstance and thing that is normalized; None where nothing was measured.

    Of how many values the statistics are is said once for neighbours that share it.
    """
    known = [(name, seeds) for name, seeds in found if seeds]
    if not known:
        return None
    steps = max(len(seeds[0]) for _, seeds in known)
    rows: list[tuple[str, ...]] = []
    said: list[str] = []
    for name, seeds in known:
        columns = list(zip(*seeds, strict=True))
        kinds = KINDS[: len(columns[0][0].means)]
        lines = [(name, kind, [_noise(column, place) for column in columns]) for place, kind in enumerate(kinds)]
        values = [_mean([step.alive for step in column], ".1f") for column in columns]
        if values != said:
            expected = [_mean([100 * step.expected for step in column], ".0f") for column in columns]
            lines = [(_VALUES[len(columns) > 1], "", values), ("expected noise", "", expected), *lines]
            said = values
        for where, of, cells in lines:
            rows.append((where, of, *cells, *[""] * steps) if len(cells) == 1 else (where, of, "", *cells))
    return Table(("circumstance", "of", "all", *(str(n + 1) for n in range(steps))), rows, words=2)


def step_noise(step: StepNoise) -> dict[str, Any]:
    """Plain values for JSON; what is not known is None."""
    kinds = {name: list(map(_known, getattr(step, name))) for name in ("means", "variances")}
    return {"alive": step.alive, "expected": _known(step.expected), **kinds}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _noise(column: Sequence[StepNoise], kind: int) -> str:
    both = [step.means[kind] for step in column], [step.variances[kind] for step in column]
    mean, variance = (_mean([100 * value for value in values], ".0f") for values in both)
    return "-" if mean == variance == "-" else f"{mean}/{variance}"


def _mean(values: Sequence[float], form: str) -> str:
    mean = statistics.fmean(values)
    return format(mean, form) if math.isfinite(mean) else "-"
