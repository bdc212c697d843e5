"""NK1xx: evaluation is worse than training, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from normkit.checks.evidence import Evidence, Gap, Layer
from normkit.checks.findings import Finding, Fix, Severity, number, share
from normkit.checks.rule import Limits, rule
from normkit.core.algebra import Pooled, remaining

__all__ = ["STALE", "harmful", "recalibration", "stale"]

# A channel is off by this many standard deviations of the mean or this factor of the variance, a layer by this share of
# its channels.
STALE = {"shift": 0.25, "ratio": 2.0, "share": 0.05}
_GAP = {"ratio": 1.1, "errors": 3.0, "outputs": 0.3}


def recalibration(seen: Evidence) -> Fix:
    """The fix for kept statistics that are not those of the data."""
    return Fix(f"normkit.recalibrate({seen.name}, {seen.data_name})", verb="recalibrate", safe=True)


def stale(layer: Layer, population: Pooled, limits: Limits) -> float:
    """The share of channels whose kept statistics are not those of the data.

    |kept mean - mean| / sqrt(var + eps) > limits["shift"], or a ratio of variances outside [1/limits["ratio"],
    limits["ratio"]], eps added to both.
    """
    var, mean = layer.record.variance(), layer.record.kept["mean"]
    assert var is not None
    eps = layer.record.eps
    moved = np.abs(mean - population.mean) / np.sqrt(population.var + eps) > limits["shift"]
    ratio = (var + eps) / (population.var + eps)
    return float((moved | (ratio > limits["ratio"]) | (ratio < 1 / limits["ratio"]) | ~np.isfinite(ratio)).mean())


def harmful(seen: Evidence) -> bool:
    """Whether statistics that are off can be an error: not where evaluation is seen to be as good as training."""
    return seen.gap is None or _grown(seen.gap, _GAP)


def _grown(gap: Gap, limits: Limits) -> bool:
    if gap.measure == "outputs":
        return not gap.eval <= limits["outputs"]
    grown = gap.eval > limits["ratio"] * gap.train and gap.eval - gap.train > limits["errors"] * gap.error
    return grown or not bool(np.isfinite(gap.eval))


@rule("NK101", "evaluation is worse than training", "gap", limits=_GAP)
def gap(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """The same batches, once with the statistics of each batch and once with the kept ones, dropout off in both.

    What differs is normalization alone. It is a gap if the loss grows by more than `ratio` and by more than `errors`
    standard errors over the batches; without a loss, if outputs move by more than `outputs` of their size. The other
    rules of this family say why.
    """
    found = seen.gap
    assert found is not None
    if found.measure == "loss":
        words = f"loss {number(found.eval)} in evaluation, {number(found.train)} with the statistics of the batches"
    else:
        words = f"outputs move by {share(found.eval)} of their size between training and evaluation"
    if _grown(found, limits):
        values = {"train": found.train, "eval": found.eval, "recalibrated": found.recalibrated, "error": found.error}
        yield Finding("error", found.first or "", words, values)


@rule("NK102", "kept statistics are not those of the data", "layers", "calls", limits={**STALE, "error": 0.5})
def stale_statistics(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """In evaluation a batch norm normalizes by averages kept in training.

    They go stale where weights moved after the last updates: weight averaging, pruning, quantization, a loaded
    checkpoint of other data, a backbone that drifted. A channel is off if its kept mean is further than `shift`
    standard deviations from that of the data, or the variances differ by more than the factor `ratio`; a layer, if more
    than `share` of its channels are; an error beyond `error`, unless evaluation is seen to be as good as training: of
    a channel that hardly varies little may depend. Recalibrating replaces them by those of the data.

    Statistics that are those of the data in training mode are not stale: what differs then is dropout and what else is
    random in training.
    """
    for layer in seen.layers:
        population = seen.population.get(layer.path)
        if not layer.tracks or not layer.over_samples or population is None:
            continue
        trained = seen.trained_population.get(layer.path, population)
        off = min(stale(layer, population, limits), stale(layer, trained, limits))
        if off > limits["share"]:
            severity: Severity = "error" if off > limits["error"] and harmful(seen) else "warning"
            words = f"kept statistics are not those of the data in {share(off)} of the channels"
            yield Finding(severity, layer.path, words, {"share": off}, recalibration(seen), "stale statistics", 1.0)


@rule("NK103", "statistics not converged", "layers", limits={"left": 0.05})
def not_converged(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Running averages start at mean 0 and variance 1, and (1 - rate)^updates of that is still in them.

    With a momentum of 0.99 in Keras 176 steps leave 17 %, far more than the true variance of many a layer. Train
    longer, use a faster momentum, or recalibrate. Where the statistics are seen to be those of the data, as after
    recalibrating, nothing is said.

    Keras counts no updates. There the steps of the compiled model's optimizer stand for them, but only where data shows
    that it fits: taking the initial value out must bring the statistics closer to those of the data.
    """
    for layer in seen.layers:
        record = layer.record
        updates = layer.steps if record.count is None else record.count
        if not layer.tracks or record.rate is None or record.debiased or not updates:
            continue
        population, left = seen.population.get(layer.path), remaining(record.rate, updates)
        off = None if population is None else stale(layer, population, STALE)
        if left <= limits["left"] or (off is not None and off <= STALE["share"]):
            continue
        cause = words = f"statistics not converged: {share(left)} of the initial value left"
        if record.count is None:
            if population is None or off is None or stale(_debiased(layer, left), population, STALE) >= off:
                continue
            words = f"{cause} after {updates} steps of the model's optimizer"
        values = {"left": left, "updates": updates, "rate": record.rate}
        yield Finding("warning", layer.path, words, values, recalibration(seen), cause, 3.0)


def _debiased(layer: Layer, left: float) -> Layer:
    """The same layer with its first values, mean 0 and variance 1, taken out of what it keeps."""
    kept = {name: (value - (left if name == "var" else 0.0)) / (1 - left) for name, value in layer.record.kept.items()}
    return replace(layer, record=replace(layer.record, kept=kept))
