"""What is tested: a normalizer by somebody, in one type, behind one function from a call to its outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normkit.core.axes import Sizes, tokens
from normkit.core.plan import count, parts, plan
from normkit.core.reference import Reference, reference
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import NormSpec
from normkit.testing.precision import rounded

__all__ = ["LAYOUTS", "Call", "Expected", "Outcome", "Subject", "arranged", "chosen"]

Array = np.ndarray
Shape = tuple[int, ...]

# How the arrays of a call lie in memory.
#   contiguous     x and dy in C order
#   channels_last  x with its second axis innermost, dy in C order (autograd mixes them, too)
#   strided        x and dy are every other element of arrays whose other elements are NaN
#   expanded       x in C order, dy one sample repeated with stride 0, as the gradient of a sum is
LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")


@dataclass(frozen=True)
class Call:
    """One forward pass, a backward pass where `dy` is given, and the state before it.

    Arrays are float64, already rounded to the subject's type (`kept`: to its accumulator).
    """

    x: Array
    gamma: Array | None = None  # None: as the layer is made
    beta: Array | None = None
    dy: Array | None = None
    training: bool = True
    kept: Mapping[str, Array] | None = None  # by name, "mean", "var" or "std"; None: as the layer is made
    count: int = 0  # updates before this call
    history: tuple[Array, ...] = ()  # training batches the same layer sees before x
    rate: float | None = 0.1  # weight of a batch in what is kept; None: cumulative average
    eps: float = 1e-5
    mask: Array | None = None  # of the shape of x without its channel axis; True = real
    weight: Array | None = None  # sample weight: (N,), or of the shape of a mask
    bessel: bool | None = None  # None: as the layer is made
    nonfinite: str | None = None  # "skip" or "update"; None: as the layer is made
    schedule: RenormSchedule | None = None  # batch renormalization only; None: batch norm
    layout: str = "contiguous"
    made_for: Shape | None = None  # input shape the layer is made for; None: that of x


@dataclass(frozen=True)
class Outcome:
    """What a call gave, in float64. Gradients are None without `dy`, `kept` is empty where nothing is tracked."""

    y: Array
    dx: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    kept: Mapping[str, Array] = field(default_factory=dict)
    count: int | None = None  # None: not counted
    changed: tuple[str, ...] = ()  # arguments the call wrote to, which none may


@dataclass(frozen=True)
class Expected:
    """What the oracle says about a call."""

    reference: Reference
    kept: dict[str, Array]
    count: int


@dataclass(frozen=True)
class Subject:
    """A normalizer under test. What it can do is data, and chooses its checks.

    Attributes:
        name: for test ids.
        spec: what it claims to compute.
        run: one call on a fresh instance.
        shapes: of inputs; the first is used by every check, the others by the comparisons with the oracle.
        sizes: static sizes for an input shape, as for a plan.
        dtype: type of inputs, outputs, gamma and beta.
        accumulator: type of statistics, kept values and sums.
        layouts: how inputs may lie in memory, see LAYOUTS.
        gamma, beta: whether it has them.
        masks, weights: whether a call may have a mask, a sample weight.
        bessel: whether a call may choose Bessel's correction.
        nonfinite: choices for a batch that is not finite.
        cumulative: whether rate None is a cumulative average.
        counts: whether it counts updates.
        counts_empty: whether an empty batch counts as one, as in PyTorch.
        gradients: "always", "training" (no backward pass with kept statistics) or "never".
        rowwise: whether, where no statistic crosses samples, a sample gives the same *bits* in every batch.
        roundings: see `tolerance`.
        oracle: what it is compared with, called like :func:`normkit.core.reference.reference`.
        exceptions: checks it is known to fail, each with the reason.
    """

    name: str
    spec: NormSpec
    run: Callable[[Call], Outcome]
    shapes: tuple[Shape, ...]
    sizes: Callable[[Shape], Sizes] = lambda _: ()
    dtype: str = "float32"
    accumulator: str = "float32"
    layouts: tuple[str, ...] = ("contiguous",)
    gamma: bool = True
    beta: bool = True
    masks: bool = False
    weights: bool = False
    bessel: bool = False
    nonfinite: tuple[str, ...] = ()
    cumulative: bool = False
    counts: bool = True
    counts_empty: bool = False
    gradients: str = "always"
    rowwise: bool = True
    roundings: int = 1
    oracle: Callable[..., Reference] = reference
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def tracks(self) -> bool:
        """Whether anything is kept between calls."""
        return bool(self.spec.tracked)

    @property
    def crosses_samples(self) -> bool:
        """Whether a statistic in training is taken over more than one sample (the first axis)."""
        return any(part in self.spec.over_names for part in self.spec.axes[0])

    def group_of_samples(self, shape: Shape) -> int:
        """Return how many samples share statistics where the batch is split in groups, 0 where it is not."""
        size = dict(self.sizes(shape)).get(self.spec.axes[0][-1], 0) if len(self.spec.axes[0]) > 1 else 0
        return size if isinstance(size, int) else 0

    def differentiates(self, training: bool) -> bool:
        """Return whether a call in this mode has gradients."""
        return self.gradients == "always" or (self.gradients == "training" and (training or not self.tracks))

    def parameter_axes(self, shape: Shape) -> tuple[int, ...]:
        """Return the axes of the input that gamma and beta have."""
        named = tokens(self.spec, len(shape), self.sizes(shape))
        return tuple(axis for axis, token in enumerate(named) if token[0] in self.spec.affine_names)

    def parameter_shape(self, shape: Shape) -> Shape:
        """Return the shape of gamma and beta."""
        return tuple(shape[axis] for axis in self.parameter_axes(shape))

    def values_per_statistic(self, shape: Shape) -> int:
        """Return the least number of values behind a statistic in training."""
        p = plan(self.spec, len(shape), self.sizes(shape))
        return min((count(p, view) for _, _, view in parts(p, shape)), default=0)

    def channel_axis(self, shape: Shape) -> int:
        """Return the axis a mask leaves out."""
        return self.parameter_axes(shape)[-1]

    def call(self, shape: Shape | None = None, *, seed: int = 0, **changes: Any) -> Call:
        """Return a call with random data in which no two axes look alike, and whatever `changes` says instead."""
        shape = self.shapes[0] if shape is None else shape
        rng = np.random.default_rng([seed, *shape])
        x = 1.5 * rng.standard_normal(shape)
        for axis, length in enumerate(shape):
            offsets = rng.uniform(-1.0, 1.0, length)
            x += offsets.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        dy = rng.standard_normal(shape)
        affine = self.parameter_shape(shape)
        signs = np.where(rng.random(affine) < 0.5, -1.0, 1.0)
        gain = rng.uniform(0.5, 1.5, affine) * signs
        gamma = gain - (1.0 - self.spec.first_gain) if self.gamma else None
        beta = rng.uniform(0.5, 1.5, affine) if self.beta else None
        kept: dict[str, Array] = {t.name: rng.uniform(0.5, 1.5, affine) for t in self.spec.tracked}
        schedule = RenormSchedule(r_max=1.5, d_max=0.5, start=0, r_end=0, d_end=0) if self.spec.renorm else None
        given = Call(x=x, gamma=gamma, beta=beta, dy=dy, kept=kept, schedule=schedule, layout=self.layouts[0])
        given = replace(given, eps=self.spec.eps, **changes)
        if not self.differentiates(given.training):
            given = replace(given, dy=None)
        return self.rounded(given)

    def rounded(self, call: Call) -> Call:
        """Return the call with every array rounded to the types of this subject."""

        def narrow(values: Array | None) -> Array | None:
            return None if values is None else rounded(values, self.dtype)

        kept = None if call.kept is None else {k: rounded(v, self.accumulator) for k, v in call.kept.items()}
        history = tuple(rounded(x, self.dtype) for x in call.history)
        x = rounded(call.x, self.dtype)
        return replace(
            call, x=x, gamma=narrow(call.gamma), beta=narrow(call.beta), dy=narrow(call.dy), kept=kept, history=history
        )

    def over_channels(self, values: Array | None, shape: Shape) -> Array | None:
        """Return a mask or sample weight, which has no channel axis, in the shape of x."""
        if values is None:
            return None
        if values.ndim == 1 and len(shape) > 2:
            values = values.reshape(-1, *(1 for _ in shape[2:]))
        return np.broadcast_to(np.expand_dims(values, self.channel_axis(shape)), shape)

    def expected(self, call: Call) -> Expected:
        """Return what the oracle says about this call, its history included."""
        spec, shape = chosen(self.spec, call.bessel), call.x.shape
        kept, updates = dict(call.kept or {}), call.count
        mask, weight = self.over_channels(call.mask, shape), self.over_channels(call.weight, shape)
        steps = [(x, True, None) for x in call.history] + [(call.x, call.training, call.dy)]
        for x, training, dy in steps:
            clips = (
                {}
                if call.schedule is None
                else dict(zip(("r_max", "d_max"), map(float, call.schedule.at(np, updates)), strict=True))
            )
            found = self.oracle(
                spec, x, call.gamma, call.beta,
                sizes=self.sizes(x.shape), eps=call.eps, dy=dy, mask=mask, weight=weight, kept=kept, training=training,
                rate=1.0 / (updates + 1) if call.rate is None else call.rate, **clips,
            )  # fmt: skip
            kept = found.kept
            updates += training and _counts(mask, weight, x)
        return Expected(found, kept, updates)


def chosen(spec: NormSpec, bessel: bool | None) -> NormSpec:
    """Return the spec with a choice of Bessel's correction for the kept variance; None leaves it."""
    if bessel is None:
        return spec
    tracked = tuple(replace(t, bessel=bessel) if t.name == "var" else t for t in spec.tracked)
    return replace(spec, tracked=tracked)


def _counts(mask: Array | None, weight: Array | None, x: Array) -> bool:
    """Return whether a batch has anything to update with."""
    share = np.ones(x.shape) if weight is None else weight
    return bool(np.any(share > 0 if mask is None else (share > 0) & mask))


def arranged(values: Array, layout: str, *, gradient: bool = False) -> Array:
    """Return the same values, lying in memory as `layout` says."""
    if layout == "channels_last" and not gradient and values.ndim > 2:
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
    if layout == "strided":
        spaced = np.full((*values.shape[:-1], 2 * values.shape[-1]), math.nan, dtype=values.dtype)
        spaced[..., ::2] = values
        return spaced[..., ::2]
    if layout == "expanded" and gradient:
        return np.broadcast_to(values[:1].copy(), values.shape)
    return np.array(values, order="C")
