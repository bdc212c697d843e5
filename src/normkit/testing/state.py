"""Checks of what is kept between calls: statistics, their updates, their count, and what never enters them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from normkit.core.schedule import RenormSchedule
from normkit.testing.compare import GRADIENTS, agree, bound, same
from normkit.testing.precision import EPS, assert_close
from normkit.testing.subject import Call, Subject
from normkit.testing.suite import check
from normkit.testing.values import offsets, shifted

Array = np.ndarray


def tracks(subject: Subject) -> bool:
    """Return whether anything is kept between calls."""
    return subject.tracks


@check(tracks)
def check_kept(subject: Subject) -> None:
    """One training batch enters what is kept, with its rate, in every shape; evaluation changes nothing."""
    for shape in subject.shapes:
        for rate in (0.1, 0.5, 0.0):
            agree(subject, subject.call(shape, seed=20, rate=rate), ("kept",))
        call = subject.call(shape, seed=20, training=False)
        found = agree(subject, call, ("kept",))
        for name, value in (call.kept or {}).items():
            same(subject, f"kept {name} after evaluation", found.kept[name].reshape(-1), value.reshape(-1))


@check(tracks)
def check_statistics(subject: Subject) -> None:
    """Statistics are right to the digits of the accumulator, whatever the input's type, also far from zero.

    At rate 1 the kept values are those of the batch. Sums in a half type, or E[x^2] - E[x]^2, show here even where the
    rounding of the output hides them.
    """
    agree(subject, subject.call(seed=21, rate=1.0), ("kept",))
    for offset in offsets(subject):
        agree(subject, shifted(subject, offset, rate=1.0), ("kept",))


def batches(subject: Subject, steps: int) -> list[Array]:
    """Return inputs of `steps` training batches."""
    return [subject.call(seed=100 + step).x for step in range(steps)]


def seen(subject: Subject, x: Array) -> dict[str, Array]:
    """Return what the kept statistics see of one batch, by the oracle."""
    return subject.expected(replace(subject.call(), x=x, dy=None, rate=1.0)).kept


@check(tracks)
def check_many_steps(subject: Subject) -> None:
    """After T steps the same layer holds the closed form: sum_t rate (1-rate)^(T-t) batch_t + (1-rate)^T first."""
    steps, rate = 7, 0.25
    *history, last = batches(subject, steps)
    call = subject.call(seed=22, rate=rate, history=tuple(history))
    found = subject.run(replace(call, x=last, dy=None))
    for name, first in (call.kept or {}).items():
        values = [seen(subject, x)[name] for x in (*history, last)]
        want = (1 - rate) ** steps * first
        for t, value in enumerate(values):
            want = want + rate * (1 - rate) ** (steps - 1 - t) * value.reshape(first.shape)
        _close(subject, name, found.kept[name], want, steps)
    _counted(subject, found.count, steps)


@check(lambda subject: subject.tracks and subject.cumulative)
def check_cumulative(subject: Subject) -> None:
    """With rate None the kept values are the plain average of all batches, whatever the first value, and it resumes."""
    steps = 5
    *history, last = batches(subject, steps)
    call = subject.call(seed=23, rate=None, history=tuple(history))
    found = subject.run(replace(call, x=last, dy=None))
    values = [seen(subject, x) for x in (*history, last)]
    for name in call.kept or {}:
        _close(subject, name, found.kept[name], np.mean([value[name] for value in values], axis=0), steps)
    _counted(subject, found.count, steps)
    resumed = replace(call, history=(), x=last, dy=None, count=4)
    agree(subject, resumed, ("kept",))


def _close(subject: Subject, name: str, actual: Array, want: Array, steps: int) -> None:
    """Compare kept values: each step rounds a statistic, two products and their sum, 4 in all."""
    size = max(1.0, float(np.max(np.abs(want))))
    label = f"kept {name} of {subject.name} after {steps} steps"
    assert_close(label, actual.reshape(-1), want.reshape(-1), 4.0 * steps * EPS[subject.accumulator] * size)


def _counted(subject: Subject, actual: int | None, want: int) -> None:
    """Compare the number of updates."""
    if subject.counts and actual != want:
        raise AssertionError(f"count of {subject.name}: expected {want}, actual {actual}")


@check(tracks)
def check_evaluation_after_training(subject: Subject) -> None:
    """The same layer, trained and then evaluated, uses what it kept."""
    agree(subject, subject.call(seed=24, training=False, history=tuple(batches(subject, 3))), ("y", "kept"))


@check(lambda subject: subject.bessel and any(t.name == "var" for t in subject.spec.tracked))
def check_bessel(subject: Subject) -> None:
    """`bessel` chooses n/(n-1) for the kept variance and touches neither outputs nor the mean.

    Without it, one batch at rate 1 makes evaluation equal training, which is what the choice is for.
    """
    call = subject.call(seed=25, rate=1.0)
    for bessel in (True, False):
        agree(subject, replace(call, bessel=bessel), ("y", *GRADIENTS, "kept"))
    trained = subject.run(replace(call, bessel=False, dy=None))
    evaluated = subject.run(
        subject.rounded(replace(call, bessel=False, dy=None, training=False, kept=_shaped(call, trained.kept)))
    )
    if not subject.crosses_samples or len(subject.spec.axes[0]) > 1:
        return  # several statistics per channel: no single kept value equals them
    same(subject, "y in evaluation", evaluated.y, trained.y, bound(subject, call))


@check(lambda subject: subject.tracks and bool(subject.nonfinite))
def check_nonfinite(subject: Subject) -> None:
    """A batch with inf or NaN gives non-finite outputs (a loss scaler must see it).

    With "skip" it leaves every kept value and the count of the whole layer as they were; with "update" it enters.
    """
    plain = subject.call(seed=26, dy=None)
    for bad in (np.inf, -np.inf, np.nan):
        x = plain.x.copy()
        x.reshape(-1)[x.size // 2] = bad
        for choice in subject.nonfinite:
            call = replace(plain, x=x, nonfinite=choice)
            found = subject.run(call)
            if np.all(np.isfinite(found.y)):
                raise AssertionError(f"{subject.name}: the outputs of a batch with {bad} are all finite")
            if choice == "update":
                if all(np.all(np.isfinite(value)) for value in found.kept.values()):
                    raise AssertionError(f"{subject.name}: nonfinite='update', yet {bad} entered nothing")
                _counted(subject, found.count, 1)
                continue
            for name, value in (call.kept or {}).items():
                label = f"kept {name} after a batch with {bad}"
                same(subject, label, found.kept[name].reshape(-1), value.reshape(-1))
            _counted(subject, found.count, 0)
            # The next batch enters as if nothing had been.
            after = subject.run(replace(call, x=plain.x, history=(x,)))
            agree(subject, plain, ("kept",), outcome=after)


@check(lambda subject: subject.spec.renorm)
def check_schedule(subject: Subject) -> None:
    """The clips of batch renormalization follow the number of updates before the batch, batch norm at first."""
    schedule = RenormSchedule(r_max=2.0, d_max=1.5, start=2, r_end=6, d_end=4)
    for updates in (0, 1, 2, 3, 5, 9):
        agree(subject, subject.call(seed=27, schedule=schedule, count=updates), ("y", *GRADIENTS, "kept"))
    history = tuple(batches(subject, 3))
    agree(subject, subject.call(seed=27, schedule=schedule, count=1, history=history), ("y", "kept"))


def _shaped(call: Call, kept: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.reshape(kept[name], value.shape) for name, value in (call.kept or {}).items()}
