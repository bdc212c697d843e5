"""The clips of batch renormalization open as in the paper, in whatever length of run."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from normkit.core.schedule import RenormSchedule
from normkit.errors import NormValueError


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (22_500, 2.0, 5 * 17.5 / 20),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (40_000, 3.0, 5.0),
        (10**6, 3.0, 5.0),
    ],
)
@pytest.mark.parametrize("kind", ["number", "numpy", "torch"])
def test_the_papers_steps(step, r_max, d_max, kind):
    xp = torch if kind == "torch" else np
    at = {"number": np.float64(step), "numpy": np.array(step), "torch": torch.tensor(step, dtype=torch.float64)}[kind]
    found = RenormSchedule().at(xp, at)
    # a quotient, a product and a sum
    np.testing.assert_allclose([float(v) for v in found], [r_max, d_max], rtol=3 * 2.0**-52)


@pytest.mark.parametrize("steps", [100, 1_000, 130_000])
def test_fractions_of_a_run(steps):
    """Batch norm until 4 %, d open at 19 %, r open at 31 % of the run."""
    schedule = RenormSchedule.for_steps(steps)
    for fraction, r_max, d_max in ((0.0, 1, 0), (0.04, 1, 0), (0.19, None, 5), (0.31, 3, 5), (1.0, 3, 5)):
        r, d = schedule.at(np, np.float64(round(fraction * steps)))
        assert r_max is None or r == r_max
        assert d == d_max
    r, _ = schedule.at(np, np.float64(0.175 * steps))  # half way between 4 and 31 %
    assert r == pytest.approx(2.0, abs=2 * 0.5 / (0.27 * steps))  # ends are rounded to whole steps
    r, d = schedule.at(np, np.float64(0.05 * steps))
    assert r > 1
    assert d > 0


def test_a_step_function():
    schedule = RenormSchedule(r_max=2.0, d_max=4.0, start=3, r_end=3, d_end=3)
    assert [tuple(map(float, schedule.at(np, np.array(i)))) for i in (2, 3, 4)] == [(1, 0), (2, 4), (2, 4)]
    assert [tuple(map(float, schedule.at(torch, torch.tensor(i)))) for i in (2, 3)] == [(1, 0), (2, 4)]


def test_the_shortest_run_still_opens():
    r, d = RenormSchedule.for_steps(1).at(np, np.array(1))
    assert (float(r), float(d)) == (3.0, 5.0)


def test_ends_before_the_start_are_refused():
    message = "`r_end` and `d_end` must not come before `start`; got start=10, r_end=20, d_end=5"
    with pytest.raises(NormValueError, match=re.escape(message)):
        RenormSchedule(start=10, r_end=20, d_end=5)
