"""The list of checks, which of them fit a subject, and how a known failure is held."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from normkit.testing.subject import Subject

__all__ = ["CHECKS", "check", "checks_for", "conform", "ids", "pairs"]

Check = Callable[[Subject], None]

# Every check by name, with the condition under which it means something.
CHECKS: dict[str, tuple[Check, Callable[[Subject], bool]]] = {}


def check(when: Callable[[Subject], bool] = lambda _: True) -> Callable[[Check], Check]:
    """Register a check for the subjects that satisfy `when`."""

    def register(function: Check) -> Check:
        @functools.wraps(function)
        def named(subject: Subject) -> None:
            try:
                function(subject)
            except AssertionError as error:
                raise AssertionError(f"{function.__name__}: {error}") from None

        CHECKS[function.__name__] = (named, when)
        return named

    return register


def checks_for(subject: Subject) -> list[Check]:
    """Return the checks that fit what the subject can do."""
    unknown = set(subject.exceptions) - set(CHECKS)
    if unknown:
        raise ValueError(f"{subject.name}: `exceptions` must name checks; got {', '.join(sorted(unknown))}")
    return [function for function, when in CHECKS.values() if when(subject)]


def conform(function: Check, subject: Subject) -> None:
    """Run a check; one listed in `subject.exceptions` must fail, so that the list cannot outlive its reasons."""
    reason = subject.exceptions.get(function.__name__)
    if reason is None:
        function(subject)
        return
    try:
        function(subject)
    except Exception:
        return
    raise AssertionError(f"{subject.name} passes {function.__name__}: remove the exception ({reason})")


def pairs(subjects: Iterable[Subject]) -> list[tuple[Check, Subject]]:
    """Return every (check, subject) that belongs together, for `pytest.mark.parametrize`."""
    return [(function, subject) for subject in subjects for function in checks_for(subject)]


def ids(found: Iterable[tuple[Check, Subject]]) -> list[str]:
    """Return readable ids for :func:`pairs`: `check_large_mean-numpy-batch-float32`."""
    return [f"{function.__name__}-{subject.name}" for function, subject in found]
