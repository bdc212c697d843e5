"""Checks of relations that hold whatever the numbers are: permuted, rescaled, re-batched, undone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from normkit.core.axes import tokens
from normkit.core.plan import parts, plan
from normkit.testing.compare import bound, moved, same
from normkit.testing.precision import EPS
from normkit.testing.subject import Call, Subject
from normkit.testing.suite import check
from normkit.testing.values import modes, trainable

Array = np.ndarray


@check()
def check_permuted_batch(subject: Subject) -> None:
    """Samples in another order give the same outputs and gradients, in that order (ghost batches: within a group)."""
    call = subject.call(seed=30)
    order = np.arange(len(call.x))
    step = subject.group_of_samples(call.x.shape) or max(len(order), 1)
    for start in range(0, len(order) - step + 1, step):
        order[start : start + step] = order[start : start + step][::-1]
    for training in modes(subject):
        given = subject.call(seed=30, training=training)
        dy = None if given.dy is None else given.dy[order]
        first, second = subject.run(given), subject.run(replace(given, x=given.x[order], dy=dy))
        same(subject, "y of the permuted batch", second.y, first.y[order], bound(subject, given))
        if first.dx is not None and second.dx is not None:
            same(subject, "dx of the permuted batch", second.dx, first.dx[order], bound(subject, given, "dx"))


@check()
def check_rescaled(subject: Subject) -> None:
    """Units do not matter: norm(a x, a^2 eps) = norm(x, eps), and norm(a x + b) likewise where the mean is taken out.

    Data are eighths and a = 4, b = 8, so that every input is exact in every type. Without centring, adding a constant
    must change the output.
    """
    base = subject.call(seed=31, dy=None)
    eighths = np.clip(np.rint(base.x * 8), -32, 32) / 8
    for training in modes(subject):
        call = replace(base, x=eighths, training=training)
        first = subject.run(call)
        for a, b in ((4.0, 0.0), (1.0, 8.0), (4.0, 8.0)):
            other = subject.rounded(replace(call, x=a * eighths + b, kept=moved(call, a, b), eps=a * a * call.eps))
            second = subject.run(other)
            if b and not subject.spec.center:
                if np.max(np.abs(second.y - first.y)) < 1e-3:
                    raise AssertionError(f"{subject.name}: adding {b} changes nothing, but no mean is taken out")
                continue
            same(subject, f"y of {a:g} x + {b:g}", second.y, first.y, bound(subject, other))


@check()
def check_batch_mates(subject: Subject) -> None:
    """Where no statistic crosses samples (always in evaluation) a sample's output does not depend on its batch."""
    for training in modes(subject):
        if training and subject.crosses_samples:
            continue
        for shape in subject.shapes:
            call = subject.call(shape, seed=32, training=training)
            whole = subject.run(call)
            limit = 0.0 if subject.rowwise else bound(subject, call)
            for first, last in ((0, 1), (1, 2), (1, shape[0]), (0, shape[0] - 1)):
                part = (last - first, *shape[1:])
                if last - first < 1 or (training and not trainable(subject, part)):
                    continue
                dy = None if call.dy is None else call.dy[first:last]
                alone = subject.run(replace(call, x=call.x[first:last], dy=dy))
                same(subject, f"y of samples {first} to {last}", alone.y, whole.y[first:last], limit)


@check(lambda subject: subject.gamma and (subject.beta or not subject.spec.center))
def check_undo(subject: Subject) -> None:
    """gamma = sqrt(var + eps) and beta = mean give x back; the normalized values have std sqrt(var/(var+eps)), not 1.

    Statistics that share a gamma are made equal by repeating the data along the axes that have neither.
    """
    shape = subject.shapes[0]
    group = subject.group_of_samples(shape)
    shape = (2 * group, *shape[1:]) if group else shape
    call = replace(subject.call(shape, seed=33, dy=None, schedule=None), eps=0.25)
    named = tokens(subject.spec, len(shape), subject.sizes(shape))
    known = {*subject.spec.over_names, *subject.spec.affine_names}
    x = call.x[np.arange(shape[0]) % group] if group else call.x
    for axis, token in enumerate(named):
        if not known & set(token):
            x = np.repeat(np.take(x, [0], axis=axis), shape[axis], axis=axis)
    mean, var = moments(subject, x)
    exact = _undoing(subject, replace(call, x=x), mean, np.sqrt(var + call.eps))
    found = subject.run(exact)
    # gamma and beta are themselves rounded to the type of x: half a spacing of x - mean and of mean.
    slack = 0.5 * EPS[subject.dtype] * float(np.max(np.abs(x - mean)) + np.max(np.abs(mean)))
    same(subject, "x, normalized and undone,", found.y, x, bound(subject, exact) + slack)
    plain = replace(exact, gamma=None, beta=None)
    _, spread = moments(subject, subject.run(plain).y)
    same(subject, "std of the normalized values", np.sqrt(spread), np.sqrt(var / (var + 0.25)), bound(subject, plain))
    if subject.tracks:
        kept = {name: np.reshape(value, [n if i in subject.parameter_axes(shape) else 1 for i, n in enumerate(shape)])
                for name, value in (call.kept or {}).items()}  # fmt: skip
        std = kept["std"] if "std" in kept else np.sqrt(kept["var"] + call.eps)
        full = [np.broadcast_to(value, shape) for value in (kept["mean"], std)]
        evaluated = _undoing(subject, replace(call, training=False), *full)
        slack = 0.5 * EPS[subject.dtype] * float(np.max(np.abs(call.x - full[0])) + np.max(np.abs(full[0])))
        limit = bound(subject, evaluated) + slack
        same(subject, "x, normalized and undone in evaluation,", subject.run(evaluated).y, call.x, limit)


def moments(subject: Subject, x: Array) -> tuple[Array, Array]:
    """Return mean (0 without centring) and variance of the slice of every element, in the shape of x."""
    p = plan(subject.spec, x.ndim, subject.sizes(x.shape))
    ((_, _, view),) = parts(p, x.shape)
    v = x.reshape(view)
    mean = np.mean(v, axis=p.reduce, keepdims=True) * subject.spec.center
    var = np.mean((v - mean) ** 2, axis=p.reduce, keepdims=True)
    return tuple(np.broadcast_to(value, view).reshape(x.shape) for value in (mean, var))  # type: ignore[return-value]


def _undoing(subject: Subject, call: Call, mean: Array, std: Array) -> Call:
    """Return the call with gamma and beta that undo these statistics."""
    axes = subject.parameter_axes(call.x.shape)
    first = tuple(slice(None) if axis in axes else 0 for axis in range(call.x.ndim))
    gamma = std[first] - (1.0 - subject.spec.first_gain)
    return subject.rounded(replace(call, gamma=gamma, beta=mean[first] if subject.beta else None))
