"""NK4xx: too few values behind a statistic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from normkit.checks.evidence import Call, Data, Evidence, Layer
from normkit.checks.findings import Finding, Fix, Severity, number
from normkit.checks.rule import RULES, Limits, rule
from normkit.checks.statistics import scatter

_ENOUGH = 4  # batches, below which nothing is said of how their statistics scatter


class _Noise(NamedTuple):
    """How far statistics of a batch are from those of all data, over all channels, in deviations.

    Attributes:
        mean: root mean square of (mean of a batch - mean) / sigma.
        std: the same of standard deviation of a batch / sigma - 1.
        measured: over the batches; else what independent values would give, 1 / sqrt(n) and 1 / sqrt(2 n).
    """

    mean: float
    std: float
    measured: bool


@rule("NK401", "a single value per statistic", "layers", "calls", uses=("data",))
def single_value(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """One value is its own mean and has no variance: what is left of it is beta, or its sign where nothing is centred.

    Batch and instance norm raise an error in PyTorch then ("Expected more than 1 value per channel"), at the end of an
    epoch if only the last batch holds a single sample, which is why that is looked for as well. Layer and group norm
    give beta without a word: `GroupNorm(4, 4)` on 1 x 1 maps gives zeros (pytorch#19250, #45687).

    A warning for a short last batch if data is known to be read in order, as for evaluation, and for a model in
    evaluation mode that was given one sample.
    """
    for layer in seen.layers:
        calls = [call for call in seen.calls.get(layer.path, ()) if call.count]
        if layer.frozen or not calls:
            continue
        if min(call.count for call in calls) == 1:
            shape = " x ".join(map(str, next(call.shape for call in calls if call.count == 1)))
            words = f"a single value per statistic in inputs {shape}: {_left(layer)}"
            alone = layer.over_samples and not layer.by_batch and seen.training is False and _one_sample(seen)
            yield Finding("warning" if alone else "error", layer.path, words, {"values": 1}, _more_values(seen, layer))
        elif layer.over_samples and seen.data is not None and _in_last(calls[0], layer, seen.data) == 1:
            severity: Severity = "warning" if seen.data.shuffled is False else "error"
            words = f"a single value per statistic in the last batch of an epoch ({seen.data.last} sample)"
            yield Finding(severity, layer.path, words, {"values": 1, "last": seen.data.last}, _without_last(seen))


@rule("NK402", "few values per statistic", "layers", "calls", limits={"values": 16, "noise": 0.3, "samples": 16})
def few_values(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """A batch norm sees a sample through the statistics of its batch, which are noise where values are few.

    Independent values leave noise 1 / sqrt(n) in the mean: a quarter of a deviation at 16, a half at 4. Positions of
    one image are not independent, so noise is measured: the deviation over the batches of the mean of a batch, in
    deviations of the data, and of its standard deviation. Below `values` per statistic it is worth to know, beyond
    `noise` a warning, also with more values of less than `samples` samples. With fewer than 4 batches the noise of
    independent values is taken. Gradient accumulation does not help, as each batch is normalized by itself.

    Four ways out: group norm, which needs no batch; batch renormalization, which corrects by kept statistics; frozen
    statistics, of a pretrained model; statistics over all processes.
    """
    for layer in seen.layers:
        calls = _alike(seen.calls.get(layer.path, ()))
        spared = layer.frozen or (layer.synchronized and seen.processes > 1)
        if layer.record.kind not in ("batch", "sync") or spared or not calls or calls[0].count < 2:
            continue
        count, samples = calls[0].count, calls[0].shape[0]
        noise = _noise(calls, layer.record.eps)
        loud = noise.mean > limits["noise"]
        if not (count < limits["values"] or (samples < limits["samples"] and loud and noise.measured)):
            continue
        severity: Severity = "warning" if loud else "info"
        how = "measured" if noise.measured else "expected"
        size = f"{number(noise.mean)} in the mean, {number(noise.std)} in the deviation"
        words = f"{count} values per statistic: noise of {size}"
        values: dict[str, float | int | str | None] = {"values": count, "samples": samples, "noise is": how}
        values |= {"mean": noise.mean, "std": noise.std}
        yield Finding(severity, layer.path, words, values, _ways_out(seen))


@rule("NK403", "a short last batch", "layers", "data", limits={"share": 0.25, "rate": 0.3})
def short_last_batch(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """What is left over of an epoch makes a batch of its own, whose statistics are noise.

    It is the last that running averages see before evaluation, and weighs as much as a whole one. Said where it is
    smaller than `share` of a batch and norms of the batch are there; for data that is read in order, as for evaluation,
    it is a note. It explains a gap if kept statistics are off and a batch weighs at least `rate` in them.
    """
    data = seen.data
    assert data is not None
    taking = [layer for layer in seen.layers if layer.over_samples and not layer.frozen]
    if not taking or data.last is None or not data.batch_size or data.last >= limits["share"] * data.batch_size:
        return
    severity: Severity = "info" if data.shuffled is False else "warning"
    words = f"the last batch of an epoch has {data.last} of {data.batch_size} samples"
    fast = max((layer.record.rate or 0.0 for layer in taking if layer.tracks), default=0.0)
    off = fast >= limits["rate"] and bool(RULES["NK102"](seen))
    cause = f"the last batch of {data.last} sample{'s' if data.last > 1 else ''}" if off else None
    values = {"last": data.last, "batch size": data.batch_size, "rate": fast}
    yield Finding(severity, "", words, values, _without_last(seen), cause, 2.0 if off else 0.0)


@rule("NK404", "few values in the statistics of a sample", "layers", "calls", limits={"values": 8, "harm": 4})
def few_values_of_a_sample(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Layer, group and instance norm take mean and variance out of every sample: two numbers of the n that there are.

    Of 2 values only the order is left, of 4 half. Below `harm` values it is a warning, below `values` worth to know.
    Groups are usually of 4 maps or 16 features at least (:func:`normkit.core.algebra.usual_groups`).
    """
    for layer in seen.layers:
        counts = [call.count for call in seen.calls.get(layer.path, ()) if call.count]
        if layer.record.kind not in ("layer", "group", "instance") or layer.frozen or not counts:
            continue
        count = min(counts)
        if 1 < count < limits["values"]:
            severity: Severity = "warning" if count < limits["harm"] else "info"
            words = f"{count} values per statistic, of which mean and variance take two"
            yield Finding(severity, layer.path, words, {"values": count}, _more_values(seen, layer))


def _one_sample(seen: Evidence) -> bool:
    return seen.data is not None and max(seen.data.sizes, default=0) == 1


def _in_last(call: Call, layer: Layer, data: Data) -> int | None:
    """Values per statistic in the last batch, from a call in a whole one."""
    size = data.sizes[call.batch]
    if data.last is None or not size:
        return None
    each = math.prod(call.shape) // math.prod(layer.record.shape)
    return round(each * data.last / size)


def _alike(calls: Sequence[Call]) -> list[Call]:
    """The first call in every batch, of batches of the most common size."""
    first = {call.batch: call for call in reversed(calls) if call.mean is not None and call.finite and call.count}
    common = Counter(call.count for call in first.values()).most_common(1)
    return [first[batch] for batch in sorted(first) if first[batch].count == common[0][0]]


def _noise(calls: Sequence[Call], eps: float) -> _Noise:
    count = calls[0].count
    if len(calls) < _ENOUGH:
        return _Noise(1 / math.sqrt(count), 1 / math.sqrt(2 * count), measured=False)
    seen = scatter(calls, eps)
    assert seen is not None
    return _Noise(seen.noise, seen.noise_of_std, measured=True)


def _left(layer: Layer) -> str:
    if layer.record.kind == "rms":
        return "nothing but its sign is left"
    return "it has no variance" if layer.over_samples else "nothing of the input is left"


def _more_values(seen: Evidence, layer: Layer) -> Fix:
    """What puts more values behind a statistic of this layer."""
    channels = layer.record.shape[0]
    if layer.over_samples:
        return _ways_out(seen)
    if seen.framework == "keras":
        return Fix("keras.layers.GroupNormalization(groups=1)")
    if layer.record.kind == "group" and layer.record.groups != 1:
        return Fix(f"torch.nn.GroupNorm(1, {channels})")
    if layer.record.kind == "instance" and channels > 1:
        return Fix(f'normkit.replace({seen.name}, {{"{layer.path}": "group"}})')
    return Fix(f'normkit.remove({seen.name}, "{layer.path}")')


def _ways_out(seen: Evidence) -> Fix:
    """The four ways out of small batches, a line of code each."""
    if seen.framework == "keras":
        lines = ("GroupNormalization(groups=groups)", "BatchRenormalization()", "BatchNormalization(synchronized=True)")
        group, renorm, sync = (f"normkit.keras.{line}" for line in lines)
    else:
        group, renorm = (f'normkit.replace({seen.name}, {{"batch": "{name}"}})' for name in ("group", "renorm"))
        sync = f"normkit.sync({seen.name})"
    return Fix(group, others=(renorm, f"normkit.freeze({seen.name})", sync))


def _without_last(seen: Evidence) -> Fix:
    assert seen.data is not None
    source, size = seen.data.source, seen.data.batch_size or "batch_size"
    if source == "tf.data":
        return Fix(f"{seen.data_name}.unbatch().batch({size}, drop_remainder=True)")
    if source == "PyDataset":
        return Fix(f"num_batches = property(lambda self: samples // {size})  # of the PyDataset")
    if seen.framework == "keras" and not source:
        return Fix(f"model.fit(x[: len(x) // {size} * {size}], ...)  # and y")
    return Fix("DataLoader(..., drop_last=True)")
