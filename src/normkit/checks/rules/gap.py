"""NK1xx: evaluation is worse than training, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from normkit.checks.evidence import Call, Data, Evidence, Layer
from normkit.checks.findings import Finding, Fix, Severity, number, share
from normkit.checks.rule import Limits, rule
from normkit.checks.statistics import STALE, fresh, new, scatter, stale
from normkit.core.algebra import remaining

__all__ = ["harmful", "recalibration"]

_GAP = {"ratio": 1.1, "errors": 3.0, "moved": 0.25, "outputs": 0.3, "beyond": 1.5}
_CLOSED = 0.5  # a gap of which recalibrating closes this share comes from the kept statistics
_NOISE = 0.3  # of the means of batches, in deviations: that of 11 values
_MIXED = {"dispersion": 4.0, "deviations": 4.0, "batches": 4}


def recalibration(seen: Evidence) -> Fix:
    """The fix for kept statistics that are not those of the data."""
    return Fix(f"normkit.recalibrate({seen.name}, {seen.data_name})", verb="recalibrate", safe=True)


def harmful(seen: Evidence) -> bool:
    """Whether statistics that are off can be an error: not where evaluation is seen to be as good as training."""
    return seen.gap is None or _wide(seen, _GAP)


@rule("NK101", "evaluation is worse than training", "gap", uses=("calls", "data"), limits=_GAP)
def gap(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """The same batches, once with the statistics of each batch and once with the kept ones, dropout off in both.

    What differs is normalization alone. It is a gap if the loss grows by more than the factor `ratio` and by more than
    `errors` standard errors over the batches, and outputs move by more than `moved` of their deviation from sample to
    sample: a loss of nearly 0 doubles easily. Without a loss, outputs have to move by more than `outputs`, and `beyond`
    times as far as they do with the statistics of all data, since those of small batches scatter in any healthy model.
    The other rules of this family say why. Of a model that was never trained nothing is said.
    """
    if not _wide(seen, limits):
        return
    found = seen.gap
    assert found is not None
    words = f"outputs move by {share(found.eval)} of their size between training and evaluation"
    if found.measure == "loss":
        words = f"loss {number(found.eval)} in evaluation, {number(found.train)} with the statistics of the batches"
    values = {"train": found.train, "eval": found.eval, "recalibrated": found.recalibrated, "error": found.error}
    severity: Severity = "warning" if _noise(seen, _NOISE) and not _of_kept(seen) and not _ordered(seen) else "error"
    if _of_kept(seen):
        cause = "kept statistics are not those of the data"
        yield Finding(severity, found.first or "", words, values, recalibration(seen), cause, 0.1)
    else:
        yield Finding(severity, found.first or "", words, values)


@rule(
    "NK102",
    "kept statistics are not those of the data",
    "layers",
    "calls",
    uses=("data", "trained calls", "gap"),
    limits={**STALE, "error": 0.5},
)
def stale_statistics(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """In evaluation a batch norm normalizes by averages kept in training.

    They go stale where weights moved after the last updates: weight averaging, pruning, quantization, a loaded
    checkpoint of other data, a backbone that drifted. A channel is off if its kept mean is further than `shift`
    standard deviations from that of the data, or the variances differ by more than the factor `ratio`, and either by
    more than `errors` standard errors of what so few batches, and an average of the last ones, can tell; a layer, if
    more than `share` of its channels are, since one of 16 is often off in healthy networks that still learn. It is an
    error beyond `error`, unless evaluation is seen to be as good as training: little may depend on a channel that
    hardly varies. Recalibrating replaces them by those of the data. For frozen layers, which keep them on purpose, it
    is a note; for batches that do not hold a mixture of the data, never an error.

    Statistics that are those of the data in training mode are not stale: what differs then is dropout and what else is
    random in training.
    """
    for layer in _tracking(seen):
        passes = (seen.calls, seen.trained_calls if layer.path in seen.trained_calls else seen.calls)
        off = min(stale(layer, calls.get(layer.path, ()), limits) for calls in passes)
        if fresh(layer) or off <= limits["share"]:
            continue
        words = f"kept statistics are not those of the data in {share(off)} of the channels"
        if layer.frozen:
            yield Finding("info", layer.path, f"frozen, and {words}", {"share": off})
            continue
        severity: Severity = "error" if off > limits["error"] and harmful(seen) and not _ordered(seen) else "warning"
        yield Finding(severity, layer.path, words, {"share": off}, recalibration(seen), "stale statistics", 1.0)


@rule("NK103", "statistics not converged", "layers", uses=("calls",), limits={"left": 0.05})
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
        if not layer.tracks or not record.rate or record.debiased or not updates:
            continue
        calls, left = seen.calls.get(layer.path, ()), remaining(record.rate, updates)
        off = None if scatter(calls, record.eps) is None else stale(layer, calls, STALE)
        if left <= limits["left"] or (off is not None and off <= STALE["share"]):
            continue
        cause = words = f"statistics not converged: {share(left)} of the initial value left"
        if record.count is None:
            if off is None or stale(_debiased(layer, left), calls, STALE) >= off:
                continue
            words = f"{cause} after {updates} steps of the model's optimizer"
        values = {"left": left, "updates": updates, "rate": record.rate}
        yield Finding("warning", layer.path, words, values, recalibration(seen), cause, 3.0)


def _debiased(layer: Layer, left: float) -> Layer:
    """The same layer with its first values, mean 0 and variance 1, taken out of what it keeps."""
    kept = {name: (value - (left if name == "var" else 0.0)) / (1 - left) for name, value in layer.record.kept.items()}
    if "var" in kept:  # below 0 where the first value was never in it
        kept["var"] = np.maximum(kept["var"], 0.0)
    return replace(layer, record=replace(layer.record, kept=kept))


@rule("NK104", "statistics never trained", "layers")
def never_trained(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """A layer keeps exactly mean 0 and variance 1, its first values: in evaluation it does not normalize at all.

    Of a whole model that was not trained yet, this is a note. It is an error where gamma and beta were trained, or
    batches counted: weights were loaded without the buffers, the momentum is 0, or the layer was in evaluation mode
    while its neighbours learned. A new layer among trained ones is a warning. Recalibrating gives it statistics.
    """
    tracking = list(_tracking(seen))
    untouched = [layer for layer in tracking if fresh(layer)]
    if untouched and all(new(layer) for layer in tracking):
        yield Finding("info", "", "not trained yet: what a norm keeps was not judged", {"layers": len(untouched)})
        return
    for layer in untouched:
        words = "keeps mean 0 and variance 1, the values it started with"
        if layer.record.count:
            words += f", after {layer.record.count} batches"
        severity: Severity = "warning" if new(layer) else "error"
        weight = 0.9 if new(layer) else 4.0  # that a layer is new is known to whoever added it
        values = {"updates": layer.record.count}
        yield Finding(severity, layer.path, words, values, recalibration(seen), "statistics never trained", weight)


@rule(
    "NK105",
    "the model leans on the statistics of small batches",
    "gap",
    "calls",
    uses=("data",),
    limits={"noise": _NOISE},
)
def small_batches(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Statistics of few values scatter, and a network can learn to read its batch instead of its samples.

    Said where evaluation is worse than training, population statistics do not help, and at some layer the means of the
    batches scatter by more than `noise` standard deviations (that is 1/sqrt(n) for n independent values). No statistics
    mend that: train with larger batches, batch renorm (arXiv:1702.03275) or group norm (arXiv:1803.08494).
    """
    if not _wide(seen, _GAP) or _of_kept(seen) or _ordered(seen):
        return
    line = f'{seen.name} = normkit.replace({seen.name}, {{"batch": "renorm"}})  # or "group"; then train again'
    for layer in _tracking(seen):
        found = scatter(seen.calls.get(layer.path, ()), layer.record.eps)
        if found is None or layer.frozen or not found.noise > limits["noise"]:
            continue
        std = float(np.sqrt(np.square(found.std).mean()))
        words = f"means of batches scatter by {number(found.noise)} standard deviations, deviations by {share(std)}"
        cause = "statistics of small batches, which the model leans on"
        values = {"noise": found.noise, "noise of std": std, "samples": found.samples}
        yield Finding("warning", layer.path, words, values, Fix(line), cause, 0.5)


@rule("NK106", "dropout before batch norm", "calls", "trained calls", limits={"low": 0.9, "high": 1.1})
def dropout(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Dropout shifts the variance of what a batch norm is given, and in evaluation it is gone.

    x d / (1 - p), where d is 1 with probability 1 - p, has the variance (var + mean^2) / (1 - p) - mean^2: more than
    twice that of x for p = 0.5. The layer keeps it, and divides by too much in evaluation (arXiv:1801.05134). Measured
    on the same batches with dropout on and off: the median over living channels of the ratio of variances outside
    [`low`, `high`], with the kept variance off in the same direction. Put dropout behind the last batch norm; for a
    trained model recalibrate, which is done with dropout off.
    """
    for layer in _tracking(seen):
        on = scatter(seen.trained_calls.get(layer.path, ()), layer.record.eps)
        off = scatter(seen.calls.get(layer.path, ()), layer.record.eps)
        kept = layer.record.deviation()
        if on is None or off is None or kept is None or fresh(layer) or layer.frozen:
            continue
        eps = layer.record.eps
        alive = off.population.var > eps
        if not alive.any():
            continue
        ratio = float(np.median(on.population.var[alive] / off.population.var[alive]))
        own = float(np.median((np.square(kept) / (off.population.var + eps))[alive]))
        if min(ratio, own) > limits["high"] or max(ratio, own) < limits["low"]:
            words = f"dropout makes the variance of its input {number(ratio)} times what it is in evaluation"
            cause = "dropout before batch norm shifts its variance"
            yield Finding("warning", layer.path, words, {"ratio": ratio, "kept": own}, recalibration(seen), cause, 2.0)


@rule("NK107", "Bessel's factor matters", "calls", uses=("gap",), limits={"factor": 1.1})
def bessel(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Training divides by the variance of n values, evaluation by n / (n - 1) times as much on average.

    Both are what PyTorch does. With 2 values the factor is 2, with 10 it is 1.1. More values per statistic are the
    remedy; our layers take `bessel=False`, which keeps what training divides by.
    """
    explains = seen.gap is not None and _wide(seen, _GAP) and not _of_kept(seen)
    for layer in _tracking(seen):
        counts = [call.count for call in seen.calls.get(layer.path, ()) if call.count > 1]
        if not layer.record.bessel or layer.frozen or not counts:
            continue
        n = min(counts)
        factor = n / (n - 1)
        if factor > limits["factor"]:
            words = f"keeps {number(factor)} times the variance that training divides by, from {n} values"
            fix = Fix(f"normkit.{seen.framework}.{layer.kind}(..., bessel=False)  # or larger batches")
            cause = f"Bessel's factor of {number(factor)}" if explains else None
            yield Finding("info", layer.path, words, {"factor": factor, "values": n}, fix, cause, 0.4)


@rule("NK108", "batches are no random samples of the data", "calls", "data", uses=("gap",), limits=_MIXED)
def ordered(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Batch norm takes a batch for a random sample. Sorted by class, each batch is centred on its own class.

    Two measures over the batches that were looked at, both about 1 for random ones: the variance of the means of
    batches at the first batch norm over that expected from how samples differ within batches (samples, not positions:
    those of one image are alike); and, where targets are classes, chi square of the classes per batch over its degrees
    of freedom. It is said beyond `dispersion`, beyond `deviations` standard deviations of the measure, with `batches`
    at least. A model that was trained on such batches evaluates badly whatever it keeps: shuffle, and train again. Data
    to evaluate on may be sorted; so without a gap it is a note.
    """
    found = _dispersion(seen, limits)
    if found is None:
        return
    value, what = found
    assert seen.data is not None
    words = f"batches are no random samples: {what} differ {number(value)} times as much between them as by chance"
    line = (
        f"{seen.data_name} = DataLoader(dataset, batch_size={max(seen.data.sizes)}, shuffle=True)  # then train again"
    )
    if seen.framework == "keras":
        line = f"{seen.name}.fit(..., shuffle=True)  # tf.data: shuffle over the whole data"
    wide = seen.gap is not None and _wide(seen, _GAP)
    severity: Severity = "error" if wide and not _of_kept(seen) else "warning" if wide else "info"
    cause = f"batches are no random samples ({what} differ between them)" if wide else None
    yield Finding(severity, "", words, {"dispersion": value}, Fix(line), cause, 2.5)


def _tracking(seen: Evidence) -> Iterator[Layer]:
    """The norms over samples that keep statistics."""
    return (layer for layer in seen.layers if layer.tracks and layer.over_samples)


def _wide(seen: Evidence, limits: Limits) -> bool:
    """Whether there is a gap, as NK101 says."""
    found = seen.gap
    if found is None or all(new(layer) for layer in _tracking(seen)):
        return False
    if found.measure == "outputs":
        beyond = not np.isfinite(found.eval) or found.eval > limits["beyond"] * found.recalibrated
        return bool(not found.eval <= limits["outputs"] and beyond)
    if not np.isfinite(found.eval):
        return bool(np.isfinite(found.train))
    grown = found.eval - found.train
    large = grown > (limits["ratio"] - 1) * abs(found.train) and grown > limits["errors"] * found.error
    return large and not found.moved <= limits["moved"]


def _of_kept(seen: Evidence) -> bool:
    """Whether the gap comes from the kept statistics: those of the data close it."""
    found = seen.gap
    return found is not None and (found.closed >= _CLOSED or np.isfinite(found.recalibrated) > np.isfinite(found.eval))


def _noise(seen: Evidence, limit: float) -> bool:
    """Whether the means of batches scatter a lot at some layer."""
    found = (scatter(seen.calls.get(layer.path, ()), layer.record.eps) for layer in _tracking(seen))
    return any(one is not None and one.noise > limit for one in found)


def _ordered(seen: Evidence) -> bool:
    """Whether the batches are no random samples, as NK108 says, or all hold the same single class."""
    if seen.data is None:
        return False
    alone = seen.data.classes and len({kind for batch in seen.data.classes for kind in batch}) == 1
    return bool(alone) or _dispersion(seen, _MIXED) is not None


def _dispersion(seen: Evidence, limits: Limits) -> tuple[float, str] | None:
    """How far batches are from random ones, and what tells; None where nothing does."""
    assert seen.data is not None
    measures = [(*_of_classes(seen.data), "classes"), (*_of_inputs(seen), "inputs")]
    for value, freedom, batches, what in measures:
        if batches >= limits["batches"] and value > max(limits["dispersion"], _bound(freedom, limits["deviations"])):
            return value, what
    return None


def _of_classes(data: Data) -> tuple[float, int, int]:
    """Chi square of the table of batches and classes over its degrees of freedom; these; the number of batches."""
    kinds = sorted({kind for batch in data.classes for kind in batch})
    if len(kinds) < 2 or len(data.classes) < 2:
        return 0.0, 1, 0
    table = np.array([[batch.get(kind, 0) for kind in kinds] for batch in data.classes], dtype=np.float64)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float((np.square(table - expected) / expected).sum() / freedom), freedom, len(table)


def _of_inputs(seen: Evidence) -> tuple[float, int, int]:
    """The same of the means of batches at the first norm. Later ones are given what is normalized per batch already."""
    for layer in seen.layers:
        calls: Sequence[Call] = seen.calls.get(layer.path, ())
        if layer.over_samples and calls:
            found = scatter(calls[: len(seen.data.sizes)] if seen.data else calls, layer.record.eps)
            return (0.0, 1, 0) if found is None else (found.dispersion, max(1, found.batches - 1), found.batches)
    return 0.0, 1, 0


def _bound(freedom: int, deviations: float) -> float:
    """A quantile of chi square over its degrees of freedom (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return float((1 - spread + deviations * np.sqrt(spread)) ** 3)
