"""Checks of one call against the oracle: ordinary data, large means, extreme shapes, memory layouts, narrow types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from normkit.testing.compare import GRADIENTS, agree, moved, same
from normkit.testing.precision import EPS, assert_close, narrower, rounded
from normkit.testing.subject import LAYOUTS, Call, Subject
from normkit.testing.suite import check

Array = np.ndarray


def modes(subject: Subject) -> tuple[bool, ...]:
    """Return the values of `training` that make a difference: both where something is kept."""
    return (True, False) if subject.tracks else (True,)


def trainable(subject: Subject, shape: tuple[int, ...]) -> bool:
    """Return whether every statistic of such a batch has the values it needs."""
    return subject.values_per_statistic(shape) >= subject.spec.minimum


@check()
def check_outputs(subject: Subject) -> None:
    """Outputs agree with the oracle, in every shape, in training and evaluation."""
    for shape in subject.shapes:
        for training in (True, False):
            agree(subject, subject.call(shape, seed=1, training=training), ("y",))


@check(lambda subject: subject.gradients != "never")
def check_gradients(subject: Subject) -> None:
    """Gradients of x, gamma and beta agree with the oracle, in every shape, in training and evaluation."""
    for shape in subject.shapes:
        for training in (True, False):
            agree(subject, subject.call(shape, seed=2, training=training), GRADIENTS)


@check()
def check_output_type(subject: Subject) -> None:
    """Outputs and the gradient of x are numbers of the input's type."""
    for training in modes(subject):
        found = subject.run(subject.call(seed=3, training=training))
        same(subject, "y, rounded to the type of x,", rounded(found.y, subject.dtype), found.y)
        if found.dx is not None:
            same(subject, "dx, rounded to the type of x,", rounded(found.dx, subject.dtype), found.dx)


@check()
def check_inputs_intact(subject: Subject) -> None:
    """A call writes to none of its arguments: autograd hands the same dy to several consumers, residuals reuse x."""
    for training in modes(subject):
        call = subject.call(seed=4, training=training)
        names = ("x", "dy", "gamma", "beta")
        before = {name: np.copy(getattr(call, name)) for name in names if getattr(call, name) is not None}
        kept = {name: np.copy(value) for name, value in (call.kept or {}).items()}
        found = subject.run(call)
        if found.changed:
            raise AssertionError(f"{subject.name}: the call wrote to {', '.join(found.changed)}")
        for name, value in before.items():
            same(subject, f"argument {name}", getattr(call, name), value)
        for name, value in kept.items():
            same(subject, f"argument kept {name}", (call.kept or {})[name], value)


@check()
def check_repeated_call(subject: Subject) -> None:
    """The same call gives the same bits: nothing is remembered but what is kept."""
    for training in modes(subject):
        call = subject.call(seed=5, training=training)
        first, second = subject.run(call), subject.run(call)
        same(subject, "y of a repeated call", second.y, first.y)
        if first.dx is not None:
            same(subject, "dx of a repeated call", second.dx, first.dx)


@check()
def check_first_values(subject: Subject) -> None:
    """A new layer has gain 1, beta 0, and the first values its spec declares."""
    call = replace(subject.call(seed=6), gamma=None, beta=None, kept=None, dy=None)
    agree(subject, call, ("y",))
    if subject.tracks:
        agree(subject, replace(call, training=False), ("y", "kept"))


@check()
def check_eps(subject: Subject) -> None:
    """Eps is added to the variance, inside the root: seen where the variance is as small as eps."""
    call = subject.call(seed=7)
    for eps, size in ((1e-3, 0.03), (0.25, 0.5)):
        small = subject.rounded(replace(call, x=call.x * size, kept=moved(call, size), eps=eps))
        agree(subject, small)


@check()
def check_large_mean(subject: Subject) -> None:
    """A mean far from zero costs no digits: outputs and gradients at mean/std up to min(1e4, 0.1/eps(input))."""
    for offset in offsets(subject):
        for training in modes(subject):
            agree(subject, shifted(subject, offset, training=training))


def offsets(subject: Subject) -> tuple[float, ...]:
    """Return means, in standard deviations, up to where the input's own rounding would hide the data."""
    top = min(1e4, 0.1 / EPS[subject.dtype])
    return (*(offset for offset in (10.0, 300.0) if offset < top), top, -top)


def shifted(subject: Subject, offset: float, **changes: Any) -> Call:
    """Return a call with mean/std near `offset` in every statistic; what is kept lies near it."""
    call = subject.call(seed=8, **changes)
    rng = np.random.default_rng(8)
    x = rng.standard_normal(call.x.shape) + offset
    kept = {name: value + offset if name == "mean" else value for name, value in (call.kept or {}).items()}
    return subject.rounded(replace(call, x=x, kept=kept))


@check(lambda subject: narrower(subject.dtype, subject.accumulator))
def check_large_values(subject: Subject) -> None:
    """Squares are formed in the accumulator: values of 3000 overflow float16 once squared, and are ordinary data."""
    call = subject.call(seed=9)
    agree(subject, subject.rounded(replace(call, x=call.x * 1000.0, kept=moved(call, 1000.0))))


@check()
def check_constant_slice(subject: Subject) -> None:
    """A slice without spread gives beta (RMS norm: of zeros), finite gradients, and no NaN."""
    for value in (0.0, 3.0):
        call = subject.call(seed=10)
        found = agree(subject, replace(call, x=np.full(call.x.shape, value)))
        if not np.all(np.isfinite(found.y)):
            raise AssertionError(f"{subject.name}: a constant slice gives non-finite outputs")


@check()
def check_one_channel(subject: Subject) -> None:
    """One channel is an ordinary case: agrees with the oracle in training and evaluation."""
    shape = list(subject.shapes[0])
    for axis in subject.parameter_axes(subject.shapes[0]):
        shape[axis] = 1
    for training in modes(subject):
        agree(subject, subject.call(tuple(shape), seed=11, training=training))


@check()
def check_single_axes(subject: Subject) -> None:
    """Each axis of length 1, once: right where a statistic has enough values, a clear ValueError where not."""
    shape = subject.shapes[0]
    singles = [tuple(1 if i == axis else n for i, n in enumerate(shape)) for axis in range(len(shape))]
    for single in (*singles, (1,) * len(shape)):
        if subject.tracks:
            agree(subject, subject.call(single, seed=12, training=False))
        call = subject.call(single, seed=12)
        if trainable(subject, single):
            agree(subject, call)
            continue
        try:
            subject.run(call)
        except ValueError as error:
            if not str(error).strip():
                raise AssertionError(f"the ValueError of {subject.name} for shape {single} says nothing") from None
        else:
            few = f"a statistic would have fewer than {subject.spec.minimum} values"
            raise AssertionError(f"{subject.name}: training on shape {single} must raise ValueError: {few}")


@check(lambda subject: subject.gamma or subject.tracks)
def check_wrong_shape(subject: Subject) -> None:
    """An input that does not fit gamma is refused (ValueError or RuntimeError), not broadcast."""
    call = subject.call(seed=13)
    axis = subject.parameter_axes(call.x.shape)[-1]
    wide = np.concatenate([call.x, call.x], axis=axis)
    narrow = np.take(call.x, [0], axis=axis)
    for x in (wide, narrow):
        try:
            subject.run(replace(call, x=x, dy=None, made_for=call.x.shape))
        except (ValueError, RuntimeError):
            continue
        raise AssertionError(f"{subject.name}: made for {call.x.shape}, it accepts an input of shape {x.shape}")


@check(lambda subject: len(subject.layouts) > 1)
def check_layouts(subject: Subject) -> None:
    """Strides change no number: every layout agrees with the oracle, in training and evaluation, also far from zero."""
    for layout in subject.layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"{subject.name}: `layouts` must be among {', '.join(LAYOUTS)}; got {layout!r}")
        for training in modes(subject):
            for call in (subject.call(seed=14, training=training), shifted(subject, 100.0, training=training)):
                dy = call.dy
                if dy is not None and layout == "expanded":
                    dy = np.broadcast_to(dy[:1], dy.shape).copy()
                agree(subject, replace(call, layout=layout, dy=dy))


@check()
def check_empty_batch(subject: Subject) -> None:
    """No samples: an empty output of the right shape, zero gradients of gamma and beta, nothing kept or counted."""
    shape = (0, *subject.shapes[0][1:])
    for training in modes(subject):
        call = subject.call(shape, seed=15, training=training)
        found = subject.run(call)
        same(subject, "y", found.y, np.zeros(shape))
        for name in ("gamma", "beta"):
            value = getattr(call, name)
            if value is not None and call.dy is not None:
                same(subject, f"d{name}", getattr(found, f"d{name}"), np.zeros(value.shape))
        for name, value in (call.kept or {}).items():
            same(subject, f"kept {name}", found.kept[name].reshape(-1), value.reshape(-1))
        if subject.tracks and subject.counts and found.count != (subject.counts_empty and training):
            raise AssertionError(f"count of {subject.name} after an empty batch: {found.count}")


@check()
def check_batch_of_one(subject: Subject) -> None:
    """A batch of one sample with several positions is legal wherever a statistic has enough values."""
    for shape in subject.shapes:
        single = (1, *shape[1:])
        for training in modes(subject):
            if not training or trainable(subject, single):
                agree(subject, subject.call(single, seed=16, training=training))


@check(lambda subject: subject.dtype == "float64" and subject.gradients != "never")
def check_gradcheck(subject: Subject) -> None:
    """Directional derivatives by central differences of the subject's own outputs.

    The error of a central difference is h^2 times a third derivative of order 1 plus eps/h: 1e-9 for h = 1e-5. Allowed
    is 1e-6 of the largest derivative. Corrections of batch renormalization are constants of the backward pass: they are
    checked where they are clipped, which makes them constant.
    """
    step = 1e-5
    for training in modes(subject):
        call = subject.call(seed=17, training=training)
        if call.dy is None:
            continue
        if subject.spec.renorm:
            far = {name: value - 50.0 if name == "mean" else value * 0.01 for name, value in (call.kept or {}).items()}
            call = replace(call, kept=far if training else call.kept)
        found = subject.run(call)
        gradients = {"x": found.dx, "gamma": found.dgamma, "beta": found.dbeta}
        rng = np.random.default_rng(17)
        for name, gradient in gradients.items():
            value = getattr(call, name)
            if value is None:
                continue
            if gradient is None:
                raise AssertionError(f"{subject.name}: no gradient of {name}")
            for _ in range(3):
                direction = rng.standard_normal(value.shape)
                points: list[Any] = [{name: value + sign * step * direction} for sign in (1.0, -1.0)]
                ahead, behind = (float(np.sum(subject.run(replace(call, **at, dy=None)).y * call.dy)) for at in points)
                slope = float(np.sum(gradient * direction))
                size = float(np.sqrt(np.sum(gradient**2) * np.sum(direction**2))) + 1e-3 * abs(ahead)
                label = f"derivative by {name} of {subject.name}, training={training}"
                assert_close(label, np.array(slope), np.array((ahead - behind) / (2 * step)), 1e-6 * size)
