"""Every constraint of every constructor refuses its own bad values, in its own words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from normkit.core import algebra
from normkit.core.catalog import BATCH
from normkit.core.constraints import Flag, Integer, OneOf, Optional, Real, check
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import ARGUMENTS, NormSpec
from normkit.errors import NormTypeError, NormValueError

EVERY = {
    "low 2": Integer(2),
    "any real": Real(),
    "0 to 1": Real(0.0, 1.0),
    "above 0": Real(0.0, above=True),
    "at most 1": Real(high=1.0),
    "flag": Flag(),
    "one of": OneOf(("a", "b")),
    "optional": Optional(Real(0.0)),
    **{f"ARGUMENTS {name}": constraint for name, constraint in ARGUMENTS.items()},
}
# Constructors and functions that check by these constraints: (make with one argument, its constraints).
MAKERS = {
    "NormSpec": (lambda **bad: replace(BATCH, **bad), NormSpec.CONSTRAINTS),
    "RenormSchedule": (lambda **bad: RenormSchedule(**bad), RenormSchedule.CONSTRAINTS),
    "RenormSchedule.for_steps": (lambda **bad: RenormSchedule.for_steps(**bad), {"steps": Integer(1)}),
    "groups_for": (
        lambda **bad: algebra.groups_for(**{"channels": 8, **bad}),
        {"channels": Integer(1), "at_most": Integer(1)},
    ),
    "rate_of": (lambda **bad: algebra.rate_of(**bad, convention="torch"), {"momentum": Real(0.0, 1.0)}),
}
CASES = [
    (owner, make, name, constraint, bad)
    for owner, (make, constraints) in MAKERS.items()
    for name, constraint in constraints.items()
    for bad in constraint.bad()
]


@pytest.mark.parametrize("constraint", EVERY.values(), ids=EVERY)
def test_bad_values_are_refused(constraint):
    values = list(constraint.bad())
    assert values
    for value in values:
        assert not constraint.allows(value)
        with pytest.raises((NormValueError, NormTypeError)) as caught:
            check("Owner", {"thing": constraint}, {"thing": value})
        assert str(caught.value) == f"Owner: `thing` must be {constraint.words()}; got {value!r}"


@pytest.mark.parametrize(
    ("owner", "make", "name", "constraint", "bad"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_constructors_refuse_them(owner, make, name, constraint, bad):
    with pytest.raises(
        (NormValueError, NormTypeError), match=re.escape(f"`{name}` must be {constraint.words()}; got {bad!r}")
    ):
        make(**{name: bad})


@pytest.mark.parametrize(
    ("constraint", "good"),
    [
        (Integer(2), (2, 3, 10**9)),
        (Real(0.0, 1.0), (0, 1, 0.5, 0.0, 1.0)),
        (Real(0.0, above=True), (1e-300, 1)),
        (Flag(), (True, False)),
        (OneOf(("a", "b")), ("a", "b")),
        (Optional(Integer(1)), (None, 1)),
    ],
)
def test_good_values_pass(constraint, good):
    assert all(constraint.allows(value) for value in good)
    check("Owner", {"thing": constraint}, dict.fromkeys(["thing"], good[0]))


def test_numpy_numbers_pass():
    import numpy as np

    assert Integer(1).allows(np.int64(3))
    assert Real(0.0).allows(np.float32(0.5))


def test_kinds_of_error():
    with pytest.raises(NormTypeError):
        check("Owner", {"n": Integer(1)}, {"n": "3"})
    with pytest.raises(NormValueError):
        check("Owner", {"n": Integer(1)}, {"n": 0})
    with pytest.raises(NormValueError):
        check("Owner", {"n": OneOf(("a",))}, {"n": "b"})
    check("Owner", {"n": Integer(1)}, {"other": "not checked"})


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Integer(2), "a whole number of at least 2"),
        (Real(), "a finite number"),
        (Real(0.0), "a finite number of at least 0"),
        (Real(0.0, above=True), "a finite number above 0"),
        (Real(0.0, 1.0), "a finite number of at least 0 and of at most 1"),
        (Real(high=1.0), "a finite number of at most 1"),
        (Optional(Flag()), "None or True or False"),
        (OneOf(("skip", "update")), "one of 'skip', 'update'"),
    ],
)
def test_words(constraint, words):
    assert constraint.words() == words
