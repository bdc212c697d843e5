"""Rules about statistics hold exactly: merged equals all at once, conventions are inverses, folding changes nothing."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.core import algebra
from normkit.errors import NormValueError

EPS = 2.0**-52
# Multiples of 1/32: exact in float64 and as fractions, so the oracle is exact arithmetic.
values = st.integers(-(2**12), 2**12).map(lambda n: Fraction(n, 32))
batches = st.lists(st.lists(values, min_size=0, max_size=6), min_size=1, max_size=5).filter(any)
offsets = st.sampled_from([Fraction(0), Fraction(10**3), Fraction(10**6), Fraction(-(10**9))])


def moments(data):
    mean = sum(data, Fraction(0)) / len(data)
    return mean, sum(((v - mean) ** 2 for v in data), Fraction(0)) / len(data)


def merged(groups):
    counts = [len(g) for g in groups]
    found = [moments(g) if g else (Fraction(0), Fraction(0)) for g in groups]
    return algebra.merge(counts, [np.array([float(m)]) for m, _ in found], [np.array([float(v)]) for _, v in found])


def bounds(groups):
    """Return how far mean and variance may be: the given means are rounded to EPS/2 of their size, once."""
    everything = [v for g in groups for v in g]
    mean, var = moments(everything)
    size = float(max(abs(v) for v in everything))
    spread = float(max(abs(v - mean) for v in everything))
    return 4 * EPS * size, 8 * EPS * (float(var) + size * spread) + (4 * EPS * size) ** 2


@settings(max_examples=300, deadline=None)
@given(batches, offsets)
def test_merged_equals_all_at_once(groups, offset):
    groups = [[v + offset for v in g] for g in groups]
    mean, var = moments([v for g in groups for v in g])
    found = merged(groups)
    near_mean, near_var = bounds(groups)
    assert found.count == sum(map(len, groups))
    assert abs(found.mean[0] - float(mean)) <= near_mean
    assert abs(found.var[0] - float(var)) <= near_var


@settings(max_examples=100, deadline=None)
@given(batches, offsets, st.integers(1, 4))
def test_rebatching_changes_nothing(groups, offset, cut):
    """Merging some first and the rest later, or in another order, gives the same moments."""
    groups = [[v + offset for v in g] for g in groups]
    at_once = merged(groups)
    first, rest = groups[:cut], groups[cut:]
    near_mean, near_var = bounds(groups)
    if any(first) and any(rest):
        a, b = merged(first), merged(rest)
        nested = algebra.merge([b.count, a.count], [b.mean, a.mean], [b.var, a.var])
        assert abs(nested.mean[0] - at_once.mean[0]) <= 2 * near_mean
        assert abs(nested.var[0] - at_once.var[0]) <= 2 * near_var


@pytest.mark.parametrize("mean", [1 / 3, 1e9 + 1 / 3, -1e15 / 7])
def test_equal_means_stay_what_they_are(mean):
    """Bit by bit, however far from zero: the merged mean is a sum of differences."""
    found = algebra.merge([3, 1, 7, 11], [np.array([mean])] * 4, [np.array([0.0])] * 4)
    assert found.mean[0] == mean
    assert found.var[0] == 0.0


def test_empty_batches_may_carry_nan():
    found = algebra.merge([2, 0], [np.array([1.0]), np.array([np.nan])], [np.array([3.0]), np.array([np.nan])])
    assert (found.count, found.mean[0], found.var[0]) == (2, 1.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0.0, 0.0], [1.0]), "must have one entry per batch; got 1, 2 and 1"),
        (([0, 0], [0.0, 0.0], [1.0, 1.0]), "must be >= 0 with at least one above 0; got [0, 0]"),
        (([2, -1], [0.0, 0.0], [1.0, 1.0]), "must be >= 0 with at least one above 0; got [2, -1]"),
        (([], [], []), "must be >= 0 with at least one above 0; got []"),
    ],
)
def test_merge_refuses(arguments, message):
    with pytest.raises(NormValueError, match=re.escape(message)):
        algebra.merge(*arguments)


@given(st.floats(0, 1e6), st.integers(2, 10**6))
def test_bessel_undoes_itself(var, n):
    # two products of a rounded quotient: four half spacings
    assert algebra.biased(algebra.unbiased(var, n), n) == pytest.approx(var, rel=2 * EPS)
    data = np.random.default_rng(n).standard_normal(min(n, 50))
    want = np.var(data, ddof=1)
    assert algebra.unbiased(np.var(data), len(data)) == pytest.approx(want, rel=len(data) * EPS)


def test_one_value_has_no_unbiased_variance():
    for function in (algebra.biased, algebra.unbiased):
        with pytest.raises(NormValueError, match="at least 2 values; got 1"):
            function(1.0, 1)


@pytest.mark.parametrize("convention", ["torch", "keras", "flax", "onnx"])
@given(momentum=st.floats(0, 1))
def test_rate_of_is_its_own_inverse(convention, momentum):
    rate = algebra.rate_of(momentum, convention)
    assert algebra.rate_of(rate, convention) == pytest.approx(momentum, abs=EPS)  # 1 - (1 - m) rounds once
    assert rate == (momentum if convention == "torch" else 1 - momentum)


def test_rate_of_refuses_unknown_conventions():
    with pytest.raises(NormValueError, match="must be torch, keras, flax or onnx; got 'mxnet'"):
        algebra.rate_of(0.1, "mxnet")  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "steps"), [(0.1, 44), (0.01, 459), (0.001, 4603)])
def test_steps_until_the_first_value_weighs_one_percent(rate, steps):
    assert algebra.remaining(rate, steps) <= 0.01 < algebra.remaining(rate, steps - 1)


@pytest.mark.parametrize("channels", range(1, 200))
@pytest.mark.parametrize("at_most", [1, 8, 32])
def test_groups_for(channels, at_most):
    divisors = [g for g in range(1, channels + 1) if channels % g == 0 and g <= at_most]
    assert algebra.groups_for(channels, at_most) == divisors[-1]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_changes_nothing(axis, has_bias, affine):
    rng = np.random.default_rng(0)
    out, inputs = 5, 4
    weight = rng.standard_normal((out, inputs))
    x = rng.standard_normal((7, inputs))
    bias = rng.standard_normal(out) if has_bias else None
    gamma, beta = (rng.standard_normal(out), rng.standard_normal(out)) if affine else (None, None)
    mean, var = rng.standard_normal(out), rng.uniform(0.1, 2, out)
    before = x @ weight.T + (0 if bias is None else bias)
    want = (before - mean) / np.sqrt(var + 1e-5) * (1 if gamma is None else gamma) + (0 if beta is None else beta)
    scale, shift = algebra.scale_shift(gamma, beta, mean, var, 1e-5)
    stored = np.moveaxis(weight, 0, axis)
    folded, new_bias = algebra.fold_after(stored, bias, scale, shift, axis=axis)
    found = x @ np.moveaxis(folded, axis, 0).T + new_bias
    # Sums of four products of order 1, times scales up to 3: some tens of half spacings.
    np.testing.assert_allclose(found, want, rtol=0, atol=64 * EPS * np.abs(want).max())


def test_folding_on_the_wrong_axis_is_refused():
    with pytest.raises(NormValueError, match=re.escape("for each of the 4 output channels (axis 1); got shape (5,)")):
        algebra.fold_after(np.zeros((5, 4)), None, np.ones(5), np.zeros(5), axis=1)


@given(batches, offsets)
@settings(max_examples=50, deadline=None)
def test_pooled_moments_are_those_of_exact_arithmetic(groups, offset):
    everything = [v + offset for g in groups for v in g]
    mean, var = moments(everything)
    found = algebra.pooled(np.array([[float(v)] for v in everything]), axis=1)
    near, nearer = bounds([everything])
    # Sums of up to 30 values, one rounding each.
    assert abs(found.mean[0] - float(mean)) <= 30 * near
    assert abs(found.var[0] - float(var)) <= 30 * nearer + (30 * near) ** 2
    assert found.count == len(everything)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_pooled_moments_of_what_the_mask_shows(axis):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(5, 3, 7)), rng.random((5, 1)) < 0.5
    rows = [row for sample, shown in zip(x, mask, strict=True) for row in sample.T if shown[0]]
    found = algebra.pooled(np.moveaxis(x, 1, axis), axis, mask if axis else np.broadcast_to(mask, (5, 7)))
    np.testing.assert_allclose(found.mean, np.mean(rows, axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.var, np.var(rows, axis=0), rtol=1e-12)
    with pytest.raises(NormValueError, match="moments need at least one value; got none in shape"):
        algebra.pooled(x, 1, np.zeros((5, 1), bool))


def test_without_the_variance_between_means_variances_are_averaged():
    found = algebra.merge((1, 3), ([0.0], [4.0]), ([2.0], [6.0]), between=False)
    assert (found.count, found.mean[0], found.var[0]) == (4, 3.0, 5.0)


def test_entropy_of_scores_and_of_probabilities():
    scores = np.array([[1000.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, -1.0, 0.5]])  # the first overflows if taken as it is
    chances = [np.exp(row - max(row)) / sum(np.exp(row - max(row))) for row in scores]
    expected = np.mean([-sum(p * np.log(p) for p in row if p > 0) for row in chances])
    # Probabilities that underflow to 0 contribute nothing, those of 1e-16 next to nothing.
    assert algebra.entropy(scores) == pytest.approx(expected, rel=1e-12)
    assert algebra.entropy(chances) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [None, np.array([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])])
def test_folding_before_a_grouped_map(groups, bias):
    rng = np.random.default_rng(3)
    scale, shift, x = rng.normal(size=12), rng.normal(size=12), rng.normal(size=(7, 12))
    weight = rng.normal(size=(6, 12 // groups))

    def grouped(weight, x):  # one small matrix per group
        pairs = zip(np.split(weight, groups), np.split(x, groups, axis=1), strict=True)
        return np.concatenate([part @ w.T for w, part in pairs], axis=1)

    folded, new_bias = algebra.fold_before(weight, bias, scale, shift, groups=groups)
    want = grouped(weight, scale * x + shift) + (0 if bias is None else bias)
    # Sums of twelve products of order 1: some tens of half spacings.
    np.testing.assert_allclose(grouped(folded, x) + new_bias, want, rtol=0, atol=64 * EPS * np.abs(want).max())
    keras, _ = algebra.fold_before(weight.T, bias, *(np.resize(v, 12 // groups) for v in (scale, shift)), axis=-2)
    assert keras.shape == weight.T.shape


def test_folding_after_a_grouped_transposed_map():
    rng = np.random.default_rng(4)
    groups, scale, shift, x = 2, rng.normal(size=6), rng.normal(size=6), rng.normal(size=(5, 8))
    weight = rng.normal(size=(8, 3))  # inputs of all groups, outputs of one

    def grouped(weight):
        pairs = zip(np.split(weight, groups), np.split(x, groups, axis=1), strict=True)
        return np.concatenate([part @ w for w, part in pairs], axis=1)

    folded, bias = algebra.fold_after(weight, None, scale, shift, axis=1, groups=groups)
    want = scale * grouped(weight) + shift
    np.testing.assert_allclose(grouped(folded) + bias, want, rtol=0, atol=64 * EPS * np.abs(want).max())
