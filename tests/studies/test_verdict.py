"""What checks say of numbers made by hand, and what they say together."""

import itertools

import pytest

from normkit.studies.measurements import Measured, Measurements
from normkit.studies.verdict import (
    Check,
    Level,
    alike,
    at_least,
    at_least_times,
    at_most_times,
    below,
    combined,
    decided,
    differs,
    exceeds,
    fewer_steps,
    learns,
    less_time,
    near,
    not_worse,
    positive,
    similar_steps,
    wider,
)

H, P, N, U = Level.HOLDS, Level.PARTLY, Level.NOT, Level.UNKNOWN


def made(norm="batch", mean=0.9, spread=0.002, seeds=5, **values):
    """Seeds spread evenly around a mean."""
    final = tuple(mean + spread * (n - (seeds - 1) / 2) * (-1) ** n for n in range(seeds)) if mean is not None else ()
    return Measured("", norm, seeds=seeds, final=final, examples=450, **{"budget": 200, "epochs": 6, **values})


@pytest.mark.parametrize(
    ("outcomes", "level"),
    [
        ((True, True), H), ((False,), N), ((True, False), P), ((True, None), U), ((False, None), U), ((None,), U),
        ((True, False, None), P), ((), U),
    ],
)  # fmt: skip
def test_checks_together(outcomes, level):
    assert decided(Check("", outcome) for outcome in outcomes) == level


@pytest.mark.parametrize("levels", list(itertools.product(Level, repeat=2)))
def test_networks_together_follow_the_same_rule(levels):
    """As if the checks of all had been put in one heap, where each verdict stands for the checks that make it."""
    stands = {H: (True,), P: (True, False), N: (False,), U: (None,)}
    assert combined(levels) == decided(Check("", outcome) for level in levels for outcome in stands[level])


@pytest.mark.parametrize(
    ("check", "first", "second", "holds"),
    [
        (at_least, made(mean=0.95), made(mean=0.9), True),
        (at_least, made(mean=0.91), made(mean=0.9), False),
        (at_least, made(mean=0.94, spread=0.05), made(mean=0.9, spread=0.001), None),
        (at_least, made(mean=0.95, seeds=2), made(mean=0.9, seeds=2), None),
        (at_least, made(), made(mean=None), True),
        (at_least, made(mean=None), made(), False),
        (at_least, made(mean=None), made(mean=None), None),
        (not_worse, made(mean=0.89), made(mean=0.9), True),
        (not_worse, made(mean=0.8), made(mean=0.9), False),
        (not_worse, made(mean=0.87, spread=0.05), made(mean=0.9, spread=0.001), None),
        (not_worse, made(mean=0.89, seeds=2), made(mean=0.9, seeds=2), None),
        (not_worse, made(mean=None), made(), False),
        (alike, made(mean=0.91), made(mean=0.9), True),
        (alike, made(mean=0.8), made(mean=0.9), False),
        (alike, made(mean=0.95), made(mean=0.9), False),
        (alike, made(mean=0.9, spread=0.05), made(mean=0.9, spread=0.001), None),
        (alike, made(mean=None), made(), False),
        (differs, made(mean=0.91), made(mean=0.9), False),
        (differs, made(mean=0.8), made(mean=0.9), True),
        (differs, made(mean=0.9, spread=0.05), made(mean=0.9, spread=0.001), None),
        (differs, made(mean=None), made(), True),
        (differs, made(mean=None), made(mean=None), None),
    ],
)
def test_accuracies_are_compared_by_their_interval(check, first, second, holds):
    found = check(first, second, 0.03)
    assert found.holds is holds, found.said
    assert "asked for" in found.said or "diverged" in found.said


@pytest.mark.parametrize(
    ("check", "values", "holds"),
    [
        (exceeds, (0.2, 0.21, 0.19, 0.2, 0.2), True),
        (exceeds, (0.01, 0.02, 0.0, 0.01, 0.01), False),
        (exceeds, (0.3, 0.0, 0.3, 0.0, 0.1), None),
        (exceeds, (0.5, 0.5), None),
        (exceeds, (), None),
        (below, (0.01, 0.02, 0.0, 0.01, 0.01), True),
        (below, (0.2, 0.21, 0.19, 0.2, 0.2), False),
        (below, (0.3, 0.0, 0.3, 0.0, 0.1), None),
        (below, (0.0, 0.0), None),
    ],
)
def test_one_value_per_seed_against_a_margin(check, values, holds):
    assert check("it", values, 0.1).holds is holds


@pytest.mark.parametrize(
    ("factors", "holds"),
    [
        ((2.5, 3.0, 2.8, 2.6, 2.9), True),
        ((1.1, 1.0, 1.2, 1.1, 1.0), False),
        ((1.0, 5.0, 1.2, 3.0, 2.0), None),
        ((2.5, 2.6), None),
        ((), None),
    ],
)
def test_factors_per_seed(factors, holds):
    assert at_least_times("it", factors, 2.0).holds is holds
    assert at_most_times("it", factors, 2.0).holds is (None if holds is None else not holds)


@pytest.mark.parametrize(
    ("factors", "holds"),
    [
        ((1.1, 1.0, 0.95, 1.05, 1.0), True),
        ((2.5, 3.0, 2.8, 2.6, 2.9), False),
        ((0.4, 0.35, 0.4, 0.3, 0.4), False),
        ((1.0, 5.0, 1.2, 3.0, 2.0), None),
        ((1.0, 1.0), None),
        ((), None),
    ],
)
def test_near_one(factors, holds):
    assert near("it", factors, 1.5).holds is holds


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((0.2, 0.21, 0.19), True),
        ((-0.2, -0.21, -0.19), False),
        ((0.3, -0.3, 0.2), None),
        ((0.2, 0.2), None),
        ((), None),
    ],
)
def test_above_zero(values, holds):
    assert positive("it", values).holds is holds


def reached(*steps, budget=200, **values):
    return made(steps=steps, seconds=tuple(s and s / 10 for s in steps), step_seconds=0.1, budget=budget, **values)


@pytest.mark.parametrize("check", [lambda a, b: fewer_steps(a, b, 1.5), less_time])
@pytest.mark.parametrize(
    ("first", "second", "holds"),
    [
        (reached(40, 42, 41, 40, 44), reached(90, 95, 100, 92, 99), True),
        (reached(90, 95, 100, 92, 99), reached(40, 42, 41, 40, 44), False),
        (reached(40, 150, 60, 30, 44), reached(90, 95, 60, 92, 50), None),
        (reached(40, 42), reached(90, 95), None),
        (reached(40, 42, 41, 40, 44), reached(None, None, 150, 160, 190), True),  # its budget stands for a seed
        (reached(40, 42, 41, 40, 44), reached(), True),  # the other diverged at every rate
        (reached(40, None, 41, 40, 44), reached(90, 95, 100, 92, 99), False),
        (reached(40, None, 41, 40, 44), reached(90, 95, None, 92, 99), None),
    ],
)
def test_steps_and_seconds_to_the_target(check, first, second, holds):
    assert check(first, second).holds is holds


def test_a_little_faster_is_not_the_factor_that_was_asked_for():
    few, more = reached(40, 41, 40, 41, 40), reached(48, 49, 48, 49, 48)
    assert fewer_steps(few, more, 1.5).holds is False
    assert less_time(few, more).holds is True


@pytest.mark.parametrize(
    ("second", "holds"),
    [
        (reached(45, 44, 46, 42, 43), True),
        (reached(90, 95, 100, 92, 99), False),
        (reached(20, 80, 30, 70, 40), None),
        (reached(45, None, 46, 42, 43), None),
    ],
)
def test_similar_steps(second, holds):
    assert similar_steps(reached(44, 43, 45, 44, 42), second, 1.5).holds is holds


RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def usable(*rates, seeds=5):
    return made(rates=RATES, usable=rates, seeds=seeds)


@pytest.mark.parametrize(
    ("first", "second", "holds"),
    [
        (usable(0.01, 0.1), usable(0.01), True),
        (usable(0.01, 0.03), usable(0.01), False),
        (usable(0.3, 1.0), usable(0.3), None),  # larger ones were not tried
        (usable(1.0), usable(0.01), True),
        (usable(0.1), usable(), True),
        (usable(), usable(0.1), False),
        (usable(), usable(), None),
        (usable(0.1, seeds=2), usable(0.01, seeds=2), None),
    ],
)
def test_the_ratio_of_largest_rates(first, second, holds):
    assert wider(first, second, 8).holds is holds


def test_learning_needs_a_rate_and_three_seeds():
    assert [learns(m).holds for m in (usable(0.1), usable(), usable(0.1, seeds=2))] == [True, False, None]


def test_measurements_are_found_by_what_they_are():
    found = Measurements([made("batch"), made("none"), Measured("x", "none"), Measured("x", "none", "max")])
    assert found.one("none").norm == "none"
    assert found.one("none", "x", inputs="max").label == "none (x, inputs max)"
    assert found.arms() == ("", "x")
    with pytest.raises(LookupError, match="2 measurements of none x"):
        found.one("none", "x")
    with pytest.raises(LookupError, match="0 measurements"):
        found.one("layer")
