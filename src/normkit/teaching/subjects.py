"""What is shown: an entry of the catalog by its name, or a norm layer of a framework by its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normkit.core.algebra import remaining
from normkit.core.axes import Sizes
from normkit.core.catalog import CATALOG, DYNAMIC_TANH_2D, INSTANCE_TRACKED, LAYER_2D, RMS_2D, find
from normkit.core.constraints import Integer, Optional, check
from normkit.core.record import NormRecord
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import NormSpec
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of, part
from normkit.surgery.protocol import porting, recording
from normkit.teaching.entries import ENTRIES
from normkit.teaching.forms import title_of

__all__ = ["RATE", "Subject", "by_layer", "by_name"]

Array = np.ndarray[Any, Any]

RATE = 0.1  # weight of a new batch in what is kept: PyTorch's momentum
_OPEN = RenormSchedule()  # at its end, where the clips are open


@dataclass(frozen=True)
class Subject:
    """A normalizer with its values.

    Attributes:
        name: short name in the catalog.
        title: what it is, in words.
        spec: of it, as this layer has it.
        eps: added to the variance.
        sizes: static sizes.
        last: whether the channels are on the last axis of the input.
        gamma, beta: None where there are none.
        others: the spec's further parameters by name; those that are missing have their first values.
        kept: by name, before this batch; those that are missing have their first values.
        count: batches behind what is kept.
        rate: weight of a new batch; None averages all batches equally.
        debiased: whether the first values' share is taken out after every batch.
        clips: (r_max, d_max) of batch renormalization.
    """

    name: str
    title: str
    spec: NormSpec
    eps: float
    sizes: Sizes = ()
    last: bool = False
    gamma: Array | None = None
    beta: Array | None = None
    others: Mapping[str, Array] = field(default_factory=dict)
    kept: Mapping[str, Array] = field(default_factory=dict)
    count: int = 0
    rate: float | None = RATE
    debiased: bool = False
    clips: tuple[float, float] = (1.0, 0.0)

    def weight(self) -> float:
        """Of this batch in what is kept after it."""
        if self.rate is None:
            return 1.0 / (self.count + 1)
        return self.rate / (1.0 - remaining(self.rate, self.count + 1)) if self.debiased else self.rate

    def left(self) -> float:
        """What the first values of the kept statistics still weigh after this batch."""
        return 0.0 if self.rate is None or self.debiased else remaining(self.rate, self.count + 1)


def by_name(
    name: str,
    shape: tuple[int, ...],
    *,
    groups: int | None = None,
    virtual_batch_size: int | None = None,
    gamma: Any = None,
    beta: Any = None,
) -> Subject:
    """A new layer of a normalizer, for an input of this shape. Raises NormValueError for what does not fit."""
    spec = find(name)
    limits = {"groups": Optional(Integer(1)), "virtual_batch_size": Optional(Integer(2))}
    check("show", limits, {"groups": groups, "virtual_batch_size": virtual_batch_size})
    names = {part for token in spec.axes for part in token}
    for argument, value, needed in (("groups", groups, "g"), ("virtual_batch_size", virtual_batch_size, "m")):
        if value is not None and needed not in names:
            must = f"`{argument}` must be left out for a normalizer without it"
            raise NormValueError(message(must, f"{value} for {name}"))
    sizes: Sizes = ()
    if "g" in names:
        channels = shape[1] if len(shape) > 1 else 1
        sizes = (("g", groups if groups is not None else math.gcd(2, channels)),)
    if "m" in names:
        sizes = (("n", virtual_batch_size if virtual_batch_size is not None else 2),)
    if "*c" in spec.affine_names:
        sizes = (("*c", shape[-1:]),)
    if gamma is None and spec.gain == "w" and spec.first_gain == 0:
        gamma = 1.0  # a new layer of it passes x on, which shows nothing
    return Subject(
        name,
        title_of(spec),
        spec,
        spec.eps,
        sizes,
        gamma=_given("gamma", gamma),
        beta=_given("beta", beta),
        clips=(_OPEN.r_max, _OPEN.d_max) if spec.renorm else (1.0, 0.0),
    )


def by_layer(layer: Any) -> Subject:
    """A norm layer of PyTorch, Keras or NNX, with the values it has.

    Raises NormTypeError for what is no layer, NormValueError for a layer that is no norm we know, a model, frozen
    batch norm, or a layer that is not built.
    """
    kind, framework = type(layer).__name__, framework_of(layer)
    ours = type(layer).__module__.startswith("normkit.")  # others have classes of these names too
    for name, entry in ENTRIES.items():
        if ours and CATALOG[name].formula != "standard" and kind in getattr(entry, framework):
            return _further(name, layer)
    record = _record(layer)
    if record is None:
        raise NormValueError(message("`layer` must be a norm layer, or a name of the catalog", kind, _inside(layer)))
    if record.frozen:
        must = "`layer` must take statistics of its input in training"
        raise NormValueError(message(must, f"{kind}, which is {record.words}"))
    spec, sizes = _spec(record)
    return Subject(
        record.kind,
        f"{kind}: {record.words}",
        spec,
        record.eps,
        sizes,
        last=record.axis == -1 and "*c" not in spec.affine_names,
        gamma=record.gamma,
        beta=record.beta,
        kept=record.kept,
        count=record.count or 0,
        rate=record.rate,
        debiased=record.debiased,
        clips=_clips(record),
    )


# What frameworks call the same, in one layer or another.
_GAMMA, _BETA = ("weight", "gamma", "scale"), ("bias", "beta")
_EPS, _LEARNED_EPS = ("eps", "epsilon"), ("learned_eps", "learned_epsilon")
_VARIANCE, _COUNT = ("running_var", "moving_variance", "var"), ("num_batches_tracked", "count")


def _further(name: str, layer: Any) -> Subject:
    """A layer whose formula has parameters of its own."""
    kind, spec = type(layer).__name__, CATALOG[name]
    gamma = _read(layer, *_GAMMA)
    if gamma is None:
        raise NormValueError(message("`layer` must be built", kind, "call it on a batch first"))
    others = {other: _read(layer, other) for other, _ in spec.others}
    missing = [other for other, values in others.items() if values is None]
    if missing:
        must = f"`layer` must have its {missing[0]}"
        raise NormValueError(message(must, f"{kind} without: only gamma x + beta is left of it"))
    last, groups = _channels_last(layer), getattr(layer, "groups", None)
    known: Sizes = () if groups is None else (("g", int(groups)),)
    if "*c" in spec.affine_names:
        spec = spec if last or gamma.ndim > 1 else DYNAMIC_TANH_2D
    if "*c" in spec.affine_names:
        last, known = False, (("*c", gamma.shape),)
    elif ("c",) in spec.axes:
        known = (*known, ("c", gamma.size))
    variance, count = _read(layer, *_VARIANCE), _read(layer, *_COUNT)
    bessel = getattr(layer, "bessel", True)
    momentum = getattr(layer, "momentum", None)
    # Of the old values elsewhere, of the new batch in PyTorch.
    rate = momentum if momentum is None or framework_of(layer) == "torch" else 1.0 - momentum
    eps, learned = _named(layer, *_EPS), _read(layer, *_LEARNED_EPS)
    return Subject(
        name,
        f"{kind}: {title_of(spec)}",
        replace(spec, tracked=tuple(replace(t, bessel=bessel) for t in spec.tracked)),
        (spec.eps if eps is None else float(eps)) + (0.0 if learned is None else abs(float(learned))),
        known,
        last=last,
        gamma=gamma,
        beta=_read(layer, *_BETA),
        others={other: values for other, values in others.items() if values is not None},
        kept={} if variance is None else {"var": variance},
        count=0 if count is None else int(count),
        rate=rate,
        debiased=getattr(layer, "debiased", False),
    )


def _read(layer: Any, *names: str) -> Array | None:
    """The first of these tensors that there is, as an array; None for none."""
    value = _named(layer, *names)
    return None if value is None else recording(framework_of(layer)).array(value)


def _named(layer: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(layer, name, None)) is not None), None)


def _channels_last(layer: Any) -> bool:
    axis = getattr(layer, "axis", None)
    if axis is None:
        return bool(getattr(layer, "channels_last", False))
    if axis not in (1, -1):
        hint = "name the last axis -1"
        raise NormValueError(message("the channels of `layer` must be on axis 1 or -1", f"axis={axis}", hint))
    return bool(axis == -1)


def _record(layer: Any) -> NormRecord | None:
    framework = framework_of(layer)
    if framework == "torch":  # knows layers by their numbers too
        site = part(framework, "sites").recognize("", layer)
        return None if site is None else site.record
    return porting(framework).read(layer)


def _inside(layer: Any) -> str | None:
    """The hint for a model: which of its layers are norms."""
    paths = [path for path, _ in porting(framework_of(layer)).walk(layer)]
    return f"the norms of this model are {', '.join(paths[:5])}" if paths else None


def _spec(record: NormRecord) -> tuple[NormSpec, Sizes]:
    """What a record computes, and the sizes that it fixes."""
    spec, (first, *_) = find(record.kind), record.shape
    if "*c" in spec.affine_names:
        if record.axis == 1:
            spec = LAYER_2D if spec.center else RMS_2D
    elif record.kind == "instance" and record.kept:
        spec = INSTANCE_TRACKED
    tracked = tuple(replace(t, bessel=record.bessel) if t.name == "var" else t for t in spec.tracked)
    spec = replace(spec, gain=record.gain, tracked=tracked if record.kept else ())  # type: ignore[arg-type]
    sizes: dict[str, int | None] = {"g": record.groups, "n": record.virtual_batch_size}
    known: Sizes = tuple((name, size) for name, size in sizes.items() if size is not None)
    if "*c" in spec.affine_names:
        return spec, (("*c", record.shape),)
    return spec, known if ("c",) not in spec.axes else (*known, ("c", first))


def _clips(record: NormRecord) -> tuple[float, float]:
    if record.kind != "renorm":
        return 1.0, 0.0
    schedule = record.schedule()
    r_max, d_max = schedule.at(np, record.count or 0)
    return float(r_max), float(d_max)


def _given(name: str, values: Any) -> Array | None:
    if values is None:
        return None
    try:
        return np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise NormTypeError(message(f"`{name}` must be numbers", repr(values))) from None
