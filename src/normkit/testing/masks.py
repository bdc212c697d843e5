"""Checks of masks and sample weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from normkit.testing.compare import EVERYTHING, agree, bound, same
from normkit.testing.precision import EPS
from normkit.testing.subject import Call, Subject
from normkit.testing.suite import check
from normkit.testing.values import modes

Array = np.ndarray


def masks(subject: Subject) -> bool:
    """Return whether a call may have a mask."""
    return subject.masks


def weights(subject: Subject) -> bool:
    """Return whether a call may have a sample weight."""
    return subject.weights


def positions(subject: Subject, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a mask: that of x without its channel axis."""
    axis = subject.channel_axis(shape)
    return (*shape[:axis], *shape[axis + 1 :])


def masked(subject: Subject, shape: tuple[int, ...], seed: int) -> Array:
    """Return a random mask that leaves each sample at least two positions where it has so many."""
    rng = np.random.default_rng([seed, *shape])
    mask = rng.random(positions(subject, shape)) < 0.7
    if mask.ndim > 1:
        flat = mask.reshape(len(mask), -1)
        flat[:, :2] = True
        flat[:, 2:3] = False
    else:
        mask[:3], mask[3:4] = True, False
    return mask


@check(masks)
def check_mask(subject: Subject) -> None:
    """Masked positions are in no statistic; their output is 0 and nothing flows back through them."""
    for shape in subject.shapes:
        mask = masked(subject, shape, 40)
        for training in modes(subject):
            call = subject.call(shape, seed=40, training=training, mask=mask)
            found = agree(subject, call, EVERYTHING)
            hidden = ~_full(subject, mask, shape)
            for name in ("y", "dx"):
                value = getattr(found, name)
                if value is not None:
                    same(subject, f"{name} at masked positions", value[hidden], np.zeros(int(hidden.sum())))


@check(masks)
def check_mask_all_true(subject: Subject) -> None:
    """A mask that hides nothing changes nothing."""
    for training in modes(subject):
        call = subject.call(seed=41, training=training)
        agree(subject, replace(call, mask=np.ones(positions(subject, call.x.shape), dtype=bool)), EVERYTHING)


@check(masks)
def check_padding(subject: Subject) -> None:
    """Padded and masked equals unpadded: outputs, gradients, kept statistics and count.

    Padding is added along the last axis of space and, where groups of samples do not move with it, as whole samples.
    """
    shape = subject.shapes[0]
    small = subject.call(shape, seed=42, rate=1.0)
    longer = 0 if len(subject.spec.axes[0]) > 1 else 2
    wider = 3 if len(shape) > 2 else 0
    padded = (shape[0] + longer, *shape[1:-1], shape[-1] + wider)
    inside = tuple(slice(0, n) for n in shape)
    mask = np.zeros(padded, dtype=bool)
    mask[inside] = True
    mask = np.take(mask, 0, axis=subject.channel_axis(shape))
    for training in modes(subject):
        call = replace(small, training=training, dy=small.dy if subject.differentiates(training) else None)
        first = subject.run(call)
        arrays: dict[str, Any] = {name: _padded(getattr(call, name), padded, inside) for name in ("x", "dy")}
        second = subject.run(replace(call, mask=mask, **arrays))
        same(subject, "y inside the padding", second.y[inside], first.y, bound(subject, call))
        for name in ("dx", "dgamma", "dbeta"):
            value, want = getattr(second, name), getattr(first, name)
            if want is not None:
                same(subject, name, value[inside] if name == "dx" else value, want, bound(subject, call, name))
        for name, want in first.kept.items():
            same(subject, f"kept {name}", second.kept[name], want, bound(subject, call, name))
        if first.count != second.count:
            raise AssertionError(f"count of {subject.name}: {second.count} padded, {first.count} unpadded")


def _padded(values: Array | None, shape: tuple[int, ...], inside: tuple[slice, ...]) -> Array | None:
    if values is None:
        return None
    wide = np.full(shape, 7.0)
    wide[inside] = values
    return wide


@check(masks)
def check_masked_garbage(subject: Subject) -> None:
    """Whatever stands at masked positions, NaN and infinity included, changes nothing and comes out nowhere."""
    shape = subject.shapes[0]
    mask = masked(subject, shape, 43)
    hidden = ~_full(subject, mask, shape)
    for training in modes(subject):
        clean = subject.call(shape, seed=43, training=training, mask=mask)
        for garbage in (np.nan, np.inf, 6e4):
            x = np.where(hidden, garbage, clean.x)
            dy = None if clean.dy is None else np.where(hidden, garbage, clean.dy)
            agree(subject, clean, EVERYTHING, outcome=subject.run(subject.rounded(replace(clean, x=x, dy=dy))))


@check(masks)
def check_all_masked(subject: Subject) -> None:
    """A batch without a real position: zeros out, zero gradients, nothing kept or counted, no NaN."""
    for training in modes(subject):
        call = subject.call(seed=44, training=training)
        call = replace(call, mask=np.zeros(positions(subject, call.x.shape), dtype=bool))
        found = subject.run(call)
        same(subject, "y", found.y, np.zeros(call.x.shape))
        for name in ("dx", "dgamma", "dbeta"):
            value = getattr(found, name)
            if value is not None:
                same(subject, name, value, np.zeros(value.shape))
        _unchanged(subject, call, found.kept, found.count)


@check(weights)
def check_sample_weight(subject: Subject) -> None:
    """Weights, one for each position or (where statistics cross samples) each sample, agree with the oracle."""
    for shape in subject.shapes:
        rng = np.random.default_rng([45, *shape])
        weight = rng.integers(1, 9, positions(subject, shape)) / 4.0
        weight[0] = 0.0 if subject.crosses_samples and len(subject.spec.axes[0]) == 1 else weight[0]
        for training in modes(subject):
            agree(subject, subject.call(shape, seed=45, training=training, weight=weight), EVERYTHING)
        if subject.crosses_samples:
            each = rng.integers(1, 9, shape[0]) / 4.0
            agree(subject, subject.call(shape, seed=45, weight=each), EVERYTHING)
        if subject.masks:
            mask = masked(subject, shape, 45)
            agree(subject, subject.call(shape, seed=45, weight=weight + 0.25, mask=mask), EVERYTHING)


@check(lambda subject: subject.weights and subject.crosses_samples and len(subject.spec.axes[0]) == 1)
def check_repeated_samples(subject: Subject) -> None:
    """A sample of weight 3 does to outputs and to the kept mean what three equal samples do."""
    call = subject.call(seed=46, rate=1.0)
    times = np.arange(len(call.x)) % 3 + 1
    repeated = np.repeat(np.arange(len(call.x)), times)
    dy = None if call.dy is None else call.dy[repeated] / times[repeated].reshape(-1, *(1 for _ in call.x.shape[1:]))
    many = replace(call, x=call.x[repeated], dy=dy)
    first = subject.run(replace(call, weight=times.astype(np.float64)))
    second = subject.run(many)
    same(subject, "y", first.y[repeated], second.y, bound(subject, many))
    if first.dx is not None and second.dx is not None:
        summed = np.add.reduceat(second.dx, np.flatnonzero(np.r_[True, np.diff(repeated) > 0]), axis=0)
        # Dividing dy by 3 rounds it, and each copy's dx is rounded: three more half spacings each.
        slack = 3 * EPS[subject.dtype] * float(np.max(np.abs(first.dx)))
        same(subject, "dx", first.dx, summed, bound(subject, many, "dx") + slack)
    if "mean" in first.kept:
        same(subject, "kept mean", first.kept["mean"], second.kept["mean"], bound(subject, many, "mean"))


@check(weights)
def check_weight_scale(subject: Subject) -> None:
    """Only ratios of weights matter: 8 w gives what w gives, the kept variance included (Kish's effective number)."""
    for factor in (8.0, 0.125):
        call = subject.call(seed=47, rate=1.0)
        rng = np.random.default_rng(47)
        weight = rng.integers(1, 9, positions(subject, call.x.shape)) / 4.0
        first = subject.run(replace(call, weight=weight))
        second = subject.run(replace(call, weight=weight * factor))
        for name in ("y", "dx"):
            if getattr(first, name) is not None:
                same(subject, name, getattr(second, name), getattr(first, name), bound(subject, call, name))
        for name, want in first.kept.items():
            same(subject, f"kept {name}", second.kept[name], want, bound(subject, call, name))


@check(weights)
def check_zero_weight(subject: Subject) -> None:
    """A batch of weight 0 has no statistics: nothing is kept or counted and nothing becomes NaN."""
    call = subject.call(seed=48)
    call = replace(call, weight=np.zeros(positions(subject, call.x.shape)))
    found = subject.run(call)
    for name in ("y", "dx", "dgamma", "dbeta"):
        value = getattr(found, name)
        if value is not None and not np.all(np.isfinite(value)):
            raise AssertionError(f"{name} of {subject.name} is not finite for a batch of weight 0")
    _unchanged(subject, call, found.kept, found.count)


def _unchanged(subject: Subject, call: Call, kept: Mapping[str, Array], count: int | None) -> None:
    for name, value in (call.kept or {}).items():
        same(subject, f"kept {name}", kept[name].reshape(-1), value.reshape(-1))
    if subject.tracks and subject.counts and count != call.count:
        raise AssertionError(f"count of {subject.name}: expected {call.count}, actual {count}")


def _full(subject: Subject, mask: Array, shape: tuple[int, ...]) -> Array:
    full = subject.over_channels(mask, shape)
    assert full is not None
    return full
