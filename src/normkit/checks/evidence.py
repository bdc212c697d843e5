"""What was seen of a model, as plain values. Rules read these and nothing else, whatever the framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from normkit.core.algebra import Pooled, merge
from normkit.core.record import NormRecord
from normkit.surgery.graph import Graph

__all__ = [
    "PARTS",
    "Call",
    "Data",
    "Dependence",
    "Evidence",
    "Gap",
    "Group",
    "Input",
    "Layer",
    "Part",
    "Step",
    "apart",
    "pooled",
]

# What can be examined, and be missing: a rule names what it needs.
Part = Literal["layers", "graph", "calls", "trained calls", "gap", "dependence", "step", "optimizer", "data", "ranks"]
PARTS: tuple[Part, ...] = get_args(Part)

# Norms whose statistics are those of the samples of a batch together.
_OVER_SAMPLES = frozenset(("batch", "ghost", "renorm", "sync", "frozen"))
# Of padding in sequences. Kernels add up in another order at the border, so that equal inputs give outputs that differ
# in their last digits; two neighbours may be alike by chance; and a stack of convolutions that pad mixes other values
# into the last positions, here at most into one of eight.
_SAME = 1e-6
_RUN = 3
_BORDER = 8
# A variance of two means from samples is beyond chance at this ratio to what is expected: 97.5 % of F(1, 14), of two
# times 8 samples, were all channels alike.
_BEYOND = 6.3
_KNOWN = 8  # samples, below which nothing is known of how their mean scatters


@dataclass(frozen=True)
class Layer:
    """One norm layer.

    Attributes:
        path: where it is registered first.
        kind: name of its class.
        record: what it computes, and its values.
        how: `class` or `probe`, see :class:`normkit.surgery.sites.Site`.
        training: whether it is in training mode.
        frozen: whether it keeps its statistics in training too: by `normkit.freeze`, by evaluation mode inside a model
            in training mode, by `trainable=False` of Keras.
        momentum: as its framework writes it, None where it has none.
        dtypes: role (`gamma`, `beta`, `mean`, `var`, `std`) to name of the type (`float32`).
        trained: whether gamma or beta get gradients; None where it has neither.
        parameters: role (`gamma`, `beta`) to path, as in `Evidence.parameters`.
        stuck: whether it stays in training mode when its model is put in evaluation mode.
        steps: of the optimizer that the model itself holds, None without one: as many updates of its statistics, if it
            was trained in all of them and they were not loaded.
        inferring: whether the model itself calls it with `training=False`.
    """

    path: str
    kind: str
    record: NormRecord
    how: Literal["class", "probe"] = "class"
    training: bool = False
    frozen: bool = False
    momentum: float | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    trained: bool | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    stuck: bool = False
    steps: int | None = None
    inferring: bool = False

    @property
    def tracks(self) -> bool:
        """Whether it keeps statistics, by which it normalizes in evaluation."""
        return bool(self.record.kept)

    @property
    def over_samples(self) -> bool:
        """Whether its statistics are those of all samples of a batch together."""
        return self.record.kind in _OVER_SAMPLES

    @property
    def by_batch(self) -> bool:
        """Whether it takes the statistics of its batch in evaluation, too."""
        return self.over_samples and self.record.kind != "frozen" and (self.stuck or not self.tracks)

    @property
    def synchronized(self) -> bool:
        """Whether its batch is that of all processes."""
        return self.record.kind == "sync" or self.kind.startswith("Sync")


@dataclass(frozen=True)
class Call:
    """One call of a norm layer: what went in.

    Attributes:
        batch: number of the batch.
        shape: of the input.
        dtype: name of its type.
        count: values behind one statistic, in the smallest group.
        mean, var: per channel, biased, in float64; None for norms that take statistics of every sample by itself.
        between: per channel, the unbiased variance of the means of single samples; None as `mean`, for one sample, and
            with a mask.
        ratio: the largest |mean| / sqrt(var + eps) of a statistic; constants (var <= eps), which have no digits to
            lose, are left out.
        largest: the largest |x|, of what is finite.
        finite: whether all of the input is.
        padded: share of the positions of sequences that lie in constant runs at one end; 0 for other inputs.
    """

    batch: int
    shape: tuple[int, ...]
    dtype: str
    count: int
    mean: NDArray[Any] | None
    var: NDArray[Any] | None
    ratio: float
    largest: float
    finite: bool
    padded: float = 0.0
    between: NDArray[Any] | None = None

    @classmethod
    def of(cls, x: NDArray[Any], record: NormRecord, batch: int, dtype: str, mask: NDArray[Any] | None = None) -> Call:
        """Measure an input.

        Args:
            x: as the layer is given it.
            record: of the layer.
            batch: number of the batch.
            dtype: name of the type of the input, which NumPy may not have.
            mask: True where positions are real, shaped as x without its channels, or broadcastable to that.
        """
        finite = np.isfinite(x)
        whole = bool(finite.all())
        wide = np.where(finite, x, 0).astype(np.float64) if not whole else np.asarray(x, dtype=np.float64)
        groups = _grouped(wide, record, mask)
        mean = groups.mean(axis=-2) if groups.size else np.zeros(groups.shape[-1])
        var = np.square(groups - mean[..., None, :]).mean(axis=-2) if groups.size else np.zeros(groups.shape[-1])
        over = record.kind in _OVER_SAMPLES
        count = groups.shape[-2]
        if record.kind == "ghost" and record.virtual_batch_size and x.shape[0]:
            count = count * min(record.virtual_batch_size, x.shape[0]) // x.shape[0]
        return cls(
            batch=batch,
            shape=tuple(x.shape),
            dtype=dtype,
            count=int(count),
            mean=mean if over else None,
            var=var if over else None,
            ratio=float((np.abs(mean) / np.sqrt(var + record.eps))[var > record.eps].max(initial=0.0)),
            largest=float(np.abs(wide).max(initial=0.0)),
            finite=whole,
            padded=_padded(wide, record.axis) if mask is None else 0.0,
            between=_between(wide, record.axis) if over and mask is None and len(x) > 1 else None,
        )


@dataclass(frozen=True)
class Gap:
    """The same batches in three ways, dropout off in all.

    Attributes:
        measure: `loss`; or `outputs`, where the numbers are root mean square changes of the outputs against those with
            the statistics of the batch, over the deviation of these from sample to sample.
        batches: how many.
        train: norms take the statistics of the batch, as in training.
        eval: norms take what they keep.
        recalibrated: norms take the population statistics of these batches.
        error: standard error of the difference of `eval` and `train` over the batches; 0 for a single one.
        moved: root mean square change of the outputs between `train` and `eval`, over their deviation from sample to
            sample; NaN where it is not known.
        first: the layer, in the order of the calls, whose kept statistics differ first from those of the data.
    """

    measure: Literal["loss", "outputs"]
    batches: int
    train: float
    eval: float
    recalibrated: float
    error: float
    first: str | None = None
    moved: float = float("nan")

    @property
    def closed(self) -> float:
        """The share of the gap that population statistics close; 0 without a gap."""
        gap = self.eval - self.train
        return (self.eval - self.recalibrated) / gap if gap > 0 else 0.0


@dataclass(frozen=True)
class Dependence:
    """Whether evaluation of a sample depends on the rest of its batch.

    Attributes:
        change: largest difference of the outputs of samples alone and in their batch, over the largest output.
        suspects: paths of norms that take the statistics of the batch in evaluation.
    """

    change: float
    suspects: tuple[str, ...]


class Input(NamedTuple):
    """What a norm was called on: by what it is told from another; per channel mean, variance, variance of the mean."""

    shape_and_sums: tuple[Any, ...]
    mean: NDArray[Any]
    var: NDArray[Any]
    noise: NDArray[Any]

    @classmethod
    def of(cls, x: NDArray[Any], axis: int) -> Input:
        """Measure an input with its channels on `axis`."""
        rows = np.moveaxis(x.astype(np.float64), axis, -1)
        own = (rows.shape, float(rows.sum()), float(np.square(rows).sum()))
        samples = rows.reshape(rows.shape[0], -1, rows.shape[-1]).mean(axis=1)
        # Positions of one sample are alike: its mean counts once.
        known = len(samples) >= _KNOWN
        noise = samples.var(axis=0, ddof=1) / len(samples) if known else np.full(rows.shape[-1], np.inf)
        rows = rows.reshape(-1, rows.shape[-1])
        return cls(own, rows.mean(axis=0), rows.var(axis=0), noise)


@dataclass(frozen=True)
class Step:
    """One training step: forward and backward on one batch.

    Attributes:
        updates: by path: how often its statistics were updated.
        distinct: by path: how many of its calls had inputs of their own; the others repeat one, as checkpointing does.
        moved: paths of the layers whose kept statistics changed.
        spread: by path, of layers called on several inputs: how far the means of two of them lie apart, see
            :func:`normkit.checks.evidence.apart`.
        repeated: by path: how many of its calls were made inside the backward pass.
    """

    updates: Mapping[str, int]
    distinct: Mapping[str, int]
    moved: frozenset[str]
    spread: Mapping[str, float] = field(default_factory=dict)
    repeated: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        calls: Mapping[str, Sequence[Input]],
        eps: Mapping[str, float],
        updates: Mapping[str, int],
        moved: frozenset[str],
        repeated: Mapping[str, int],
    ) -> Step:
        """From all that norms in training were called on, by path, outside the backward pass, and their eps."""
        inputs = {path: list({own.shape_and_sums: own for own in given}.values()) for path, given in calls.items()}
        distinct = {path: len(own) for path, own in inputs.items()}
        spread = {path: _spread(own, eps[path]) for path, own in inputs.items() if len(own) > 1}
        return cls(updates, distinct, moved, spread, repeated)


@dataclass(frozen=True)
class Group:
    """A group of parameters of an optimizer.

    Attributes:
        weight_decay: of the group.
        lr: learning rate.
        paths: of its parameters in the model; those that the model has not are missing.
        foreign: how many parameters it holds that the model has not.
    """

    weight_decay: float
    lr: float
    paths: frozenset[str]
    foreign: int = 0


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        sizes: of the batches that were looked at.
        samples: in the whole data, None where it is not known.
        batch_size: that the loader is set to, None where it is not known.
        drop_last: whether a short last batch is left out, None where it is not known.
        shuffled: whether the order is random, None where it is not known.
        classes: of each batch that was looked at: class to number of samples; empty where targets are no classes.
        source: what makes the batches: `DataLoader`, `PyDataset`, `tf.data`; "" for anything else.
    """

    sizes: tuple[int, ...]
    samples: int | None = None
    batch_size: int | None = None
    drop_last: bool | None = None
    shuffled: bool | None = None
    classes: tuple[Mapping[int, int], ...] = ()
    source: str = ""

    @property
    def last(self) -> int | None:
        """The size of the last batch of an epoch, where it is known."""
        if self.samples is None or not self.batch_size:
            return None
        rest = self.samples % self.batch_size
        return self.batch_size if rest == 0 or self.drop_last else rest


@dataclass(frozen=True)
class Evidence:
    """All that was seen. A part that was not examined is missing from `examined`, and `skipped` says why.

    Attributes:
        framework: `torch` or `keras`.
        backend: of Keras, else the framework.
        model: name of the model's class.
        training: whether the model was given in training mode; None where models have no mode.
        name: what the user calls it in code, for the lines to paste.
        data_name: the same for the data.
        layers: the norms, in the order of their calls where it is known.
        parameters: by path, whether they get gradients.
        graph: who feeds whom.
        calls: by path, in the pass in which norms take the statistics of the batch and dropout is off.
        trained_calls: by path, in a pass in training mode, dropout on, on the same batches.
        gap, dependence, step, groups, data: what these parts found.
        processes: how many train together.
        ranks: by path: how far the means that processes keep lie apart, see :func:`normkit.checks.evidence.apart`.
        skipped: part to reason; also the path of a norm that could not be read.
    """

    framework: str
    model: str
    layers: tuple[Layer, ...]
    backend: str = ""
    name: str = "model"
    data_name: str = "data"
    parameters: Mapping[str, bool] = field(default_factory=dict)
    graph: Graph | None = None
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    trained_calls: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    gap: Gap | None = None
    dependence: Dependence | None = None
    step: Step | None = None
    groups: tuple[Group, ...] = ()
    data: Data | None = None
    training: bool | None = None
    processes: int = 1
    ranks: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def examined(self) -> frozenset[str]:
        """The parts that were."""
        return frozenset(PARTS) - self.skipped.keys()

    def at(self, path: str) -> str:
        """A part of the model in code: `model.backbone[0]`, `model.get_layer("conv1_bn")`."""
        if self.framework == "keras":
            return self.name + "".join(f'.get_layer("{part}")' for part in path.split("/") if part)
        parts = path.split(".") if path else []
        if not all(part.isdigit() or part.isidentifier() for part in parts):
            return f'{self.name}.get_submodule("{path}")'
        return self.name + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)

    @cached_property
    def by_path(self) -> Mapping[str, Layer]:
        """The layers."""
        return {layer.path: layer for layer in self.layers}

    @cached_property
    def population(self) -> Mapping[str, Pooled]:
        """By path: mean and biased variance of all batches together, of norms over samples that were called."""
        return pooled(self.calls)

    @cached_property
    def trained_population(self) -> Mapping[str, Pooled]:
        """The same in training mode, dropout on."""
        return pooled(self.trained_calls)


def pooled(calls: Mapping[str, Sequence[Call]]) -> dict[str, Pooled]:
    """By path: the moments of all calls together that are finite, of norms over samples."""
    found = {}
    for path, own in calls.items():
        parts = [(call.count, call.mean, call.var) for call in own if call.mean is not None and call.finite]
        if sum(count for count, _, _ in parts):
            found[path] = merge(*zip(*parts, strict=True))
    return found


def apart(means: NDArray[Any], variances: NDArray[Any], noise: NDArray[Any] | float, eps: float) -> float:
    """How far two means lie apart, typically, in standard deviations of what they are means of.

    d^2 = mean over channels of 2 (V - noise) / (mean variance + eps), V the unbiased variance of the means (calls,
    channels) from call to call: two that differ by d deviations in every channel give d. `noise` is what V would be for
    inputs drawn from one distribution; 0 where V is not beyond what chance makes of that.
    """
    sigma = variances.mean(axis=0) + eps
    between, chance = (means.var(axis=0, ddof=1) / sigma).mean(), (noise / sigma).mean()
    return float(np.sqrt(2 * (between - chance))) if between > _BEYOND * chance else 0.0


def _spread(inputs: Sequence[Input], eps: float) -> float:
    """How far their means lie apart beyond what the choice of samples does, in deviations."""
    means, variances, noise = (np.stack([own[place] for own in inputs]) for place in (1, 2, 3))
    return apart(means, variances, noise.mean(axis=0), eps)


def _grouped(x: NDArray[Any], record: NormRecord, mask: NDArray[Any] | None) -> NDArray[Any]:
    """The values as (..., behind one statistic, statistics)."""
    axis = record.axis
    if record.kind in ("layer", "rms"):
        axes = len(record.shape)
        rows = np.moveaxis(x, axis, -1) if axes == 1 else x.reshape(*x.shape[: x.ndim - axes], -1)
        return rows.reshape(-1, rows.shape[-1]).T
    rows = np.moveaxis(x, axis, -1)
    if record.kind in _OVER_SAMPLES:
        if mask is not None:
            return rows[np.broadcast_to(mask, rows.shape[:-1])]
        return rows.reshape(-1, rows.shape[-1])
    rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])  # sample, position, channel
    if record.kind == "group" and record.groups:
        parts = rows.reshape(*rows.shape[:2], record.groups, -1)
        return np.moveaxis(parts, 2, 3).reshape(rows.shape[0], -1, record.groups)
    return rows


def _between(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """The variance over samples of their means, which positions of one sample, alike as they are, do not make small."""
    rows = np.moveaxis(x, axis, -1)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1]).mean(axis=1).var(axis=0, ddof=1)


def _padded(x: NDArray[Any], axis: int) -> float:
    """The share of positions in runs at one end of the sequences in which no channel changes.

    Padding stays constant behind maps and activations, but for a border where convolutions mix in other values. A
    layer that gives the same everywhere is no padding: there must be runs of several lengths.
    """
    if x.ndim != 3 or x.shape[0] < 2:
        return 0.0
    rows = np.moveaxis(x, axis, -1)
    close = _SAME * np.abs(rows).max(initial=0.0)
    same = (np.abs(np.diff(rows, axis=1)) <= close).all(axis=-1)
    ends = [_runs(same[:, ::direction], rows.shape[1] // _BORDER) for direction in (1, -1)]
    return max(float(runs.sum() / rows[..., 0].size) if len(np.unique(runs)) > 1 else 0.0 for runs in ends)


def _runs(same: NDArray[Any], border: int) -> NDArray[Any]:
    """By sequence: positions in the first run of equal neighbours, if it begins within the border."""
    places = np.arange(same.shape[1])
    start = np.where(same, places, same.shape[1]).min(axis=1, initial=same.shape[1])
    end = np.where(~same & (places > start[:, None]), places, same.shape[1]).min(axis=1, initial=same.shape[1])
    runs = np.where(start <= border, end - start + 1, 0)
    return np.where(runs >= _RUN, runs, 0)
