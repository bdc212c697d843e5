"""The suite's own tools: rounding, layouts, comparisons, the choice of checks and the table of exceptions."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.testing import (
    CHECKS,
    EPS,
    LAYOUTS,
    arranged,
    assert_close,
    checks_for,
    conform,
    formula_subject,
    ids,
    pairs,
    rounded,
    tolerance,
)
from normkit.testing.torch import DTYPES, place

BATCH = formula_subject("batch")


def test_importing_the_suite_imports_no_framework():
    code = "import sys, normkit.testing; print([m for m in ('torch', 'keras', 'jax', 'pytest') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", EPS)
@given(value=st.floats(width=32))
def test_rounding_is_that_of_torch(dtype, value):
    want = torch.tensor(value, dtype=torch.float64).to(DTYPES[dtype]).to(torch.float64).numpy()
    assert np.array_equal(rounded(np.array(value), dtype), want, equal_nan=True)


@pytest.mark.parametrize("dtype", EPS)
def test_ties_limits_and_eps(dtype):
    eps = EPS[dtype]
    assert torch.finfo(DTYPES[dtype]).eps == eps
    halves = np.array([1 + eps / 2, 1 + 3 * eps / 2, np.inf, -np.inf, 0.0])
    assert rounded(halves, dtype).tolist() == [1.0, 1 + 2 * eps, np.inf, -np.inf, 0.0]
    top = torch.finfo(DTYPES[dtype]).max
    assert rounded(np.array(top), dtype) == top


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="`dtype` must be one of float64, float32, float16, bfloat16; got 'int8'"):
        rounded(np.zeros(1), "int8")


def test_tolerance_by_hand():
    half, single = EPS["float16"], EPS["float32"]
    types = {"output": "float16", "accumulator": "float32"}
    assert tolerance(2.0, **types) == 2.0 * (0.5 * half + 3 * single)
    assert tolerance(2.0, condition=9.0, **types) == 2.0 * (0.5 * half + 3 * single * 10)
    assert tolerance(2.0, terms=5.0, **types) == 2.0 * 0.5 * half + 5.0 * 3 * single
    assert tolerance(2.0, roundings=2, **types) == 2.0 * (half + 3 * single)


def test_a_failure_says_what_where_and_how_much():
    expected = np.ones((2, 3))
    actual = expected.copy()
    actual[1, 2] += 1e-3
    actual[0, 1] += 1e-4
    with pytest.raises(AssertionError) as caught:
        assert_close("y of mine", actual, expected, 1e-5)
    assert str(caught.value) == (
        "y of mine: 2 of 6 values differ, the worst at (1, 2)\n"
        "  expected:   1.000000000E+00\n"
        "  actual:     1.001000000E+00\n"
        "  difference: 1.000E-03\n"
        "  tolerance:  1.000E-05"
    )


@pytest.mark.parametrize(
    ("actual", "expected", "allowed"),
    [
        (np.array([np.nan]), np.array([1.0]), 1e9),
        (np.array([1.0]), np.array([np.nan]), 1e9),
        (np.array([np.inf]), np.array([-np.inf]), 1e9),
        (np.array([np.inf]), np.array([1.0]), 1e9),
        (np.array([1.0]), np.array([1.0 + 2e-16]), 0.0),
        (np.array([[1.0]]), np.array([1.0]), 1e9),
        (None, np.array([1.0]), 1e9),
    ],
)
def test_what_never_agrees(actual, expected, allowed):
    with pytest.raises(AssertionError):
        assert_close("y", actual, expected, allowed)


def test_what_agrees():
    special = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert_close("y", special, special.copy(), 0.0)
    assert_close("y", np.array([1.0, 2.0]), np.array([1.1, 2.0]), np.array([0.11, 0.0]))
    assert_close("y", np.zeros((0, 3)), np.zeros((0, 3)), 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_change_strides(layout):
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    placed, strides = arranged(x, layout), place(torch.from_numpy(x), layout).stride()
    assert np.array_equal(placed, x)
    assert tuple(s // 8 for s in placed.strides) == strides
    assert strides == {"channels_last": (60, 1, 15, 3), "strided": (120, 40, 10, 2)}.get(layout, (60, 20, 5, 1))
    dy = np.repeat(x[:1], 2, axis=0)
    gradient, t = arranged(dy, layout, gradient=True), place(torch.from_numpy(dy), layout, gradient=True)
    assert np.array_equal(gradient, dy)
    assert np.array_equal(t.numpy(), dy)
    if layout == "expanded":
        assert gradient.strides[0] == t.stride(0) == 0


def test_the_gaps_of_strided_arrays_are_nan():
    placed = arranged(np.ones((2, 3)), "strided")
    assert placed.base is not None
    assert np.isnan(placed.base[:, 1::2]).all()


def test_capabilities_choose_the_checks():
    names = {check.__name__ for check in checks_for(BATCH)}
    layer = {check.__name__ for check in checks_for(formula_subject("layer"))}
    assert {"check_kept", "check_mask", "check_bessel"} <= names
    assert not {"check_kept", "check_mask", "check_bessel", "check_schedule"} & layer
    assert "check_schedule" in {check.__name__ for check in checks_for(formula_subject("renorm"))}
    found = pairs([BATCH])
    assert "check_large_mean-numpy-batch-float64" in ids(found)
    assert {check.__name__ for check, _ in found} == names


def test_every_check_says_what_it_checks():
    assert all(name == check.__name__ and check.__doc__ for name, (check, _) in CHECKS.items())


def test_exceptions_must_fail():
    check = CHECKS["check_outputs"][0]
    listed = replace(BATCH, exceptions={"check_outputs": "some reason"})
    with pytest.raises(AssertionError, match=re.escape("passes check_outputs: remove the exception (some reason)")):
        conform(check, listed)
    wrong = replace(listed, run=lambda call: replace(BATCH.run(call), y=0 * call.x))
    conform(check, wrong)
    with pytest.raises(AssertionError, match="check_outputs: y of numpy-batch-float64"):
        conform(check, replace(wrong, exceptions={}))


def test_exceptions_must_name_checks():
    with pytest.raises(ValueError, match="`exceptions` must name checks; got check_output"):
        checks_for(replace(BATCH, exceptions={"check_output": "misspelled"}))


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="`layouts` must be among"):
        CHECKS["check_layouts"][0](replace(BATCH, layouts=("contiguous", "diagonal")))


def test_every_check_is_public():
    import normkit.testing

    public = {name for name in normkit.testing.__all__ if name.startswith("check_")}
    assert public == set(CHECKS)
    assert all(getattr(normkit.testing, name) is CHECKS[name][0] for name in public)
