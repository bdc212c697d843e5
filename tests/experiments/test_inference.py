import math

import numpy as np
import pytest
from scipy import stats

from normkit.experiments.inference import adjusted, estimate


@pytest.mark.parametrize("n", [3, 4, 9, 30])
def test_a_t_interval(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    found = estimate(values)
    expected = stats.ttest_1samp(values, 0.0)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p == pytest.approx(expected.pvalue)


def test_fewer_than_three_give_a_mean_and_nothing_else():
    assert estimate([1.0, 2.0]) == (1.5, None, None, None)


@pytest.mark.parametrize(("values", "p"), [((0.0, 0.0, 0.0), 1.0), ((0.5, 0.5, 0.5), 0.0)])
def test_values_that_are_equal_on_no_grid_are_certain(values, p):
    found = estimate(values)
    assert (found.low, found.high, found.p) == (values[0], values[0], p)


def test_a_grid_adds_its_rounding():
    found = estimate([0.5] * 4, resolution=0.1)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(0.1**2 / 12 / 4))


def test_interval_covers_as_often_as_it_says():
    """2 000 draws: 95 % +- 1.5 points is three standard errors. A percentile bootstrap covers 74 % at three seeds."""
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 2.0, (2000, 3))
    covered = np.mean([e.low <= 1.0 <= e.high for e in map(estimate, draws)])
    assert 0.935 < covered < 0.965


def two_way(rng, n, m, seeds, examples, both):
    return (
        rng.normal(0, seeds, (n, 1)) + rng.normal(0, examples, (1, m)) + rng.normal(0, both, (n, m))
        if seeds or examples or both
        else np.zeros((n, m))
    )


@pytest.mark.parametrize(("seeds", "examples", "both"), [(1.0, 0, 0), (0.1, 2.0, 1.0), (0.02, 0.1, 3.0)])
def test_coverage_with_examples_drawn_anew(seeds, examples, both):
    """Of a population of seeds and examples whose mean is 0; never far below 95 %, at most conservative."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(600):
        drawn = two_way(rng, 10, 200, seeds, examples, both)
        found = estimate(drawn.mean(1), examples=drawn)
        hits.append(found.low <= 0 <= found.high)
    assert np.mean(hits) > 0.93


def test_without_the_examples_the_interval_would_be_too_narrow():
    rng = np.random.default_rng(1)
    draws = [two_way(rng, 10, 200, 0.1, 2.0, 1.0) for _ in range(300)]
    assert np.mean([e.low <= 0 <= e.high for e in (estimate(d.mean(1)) for d in draws)]) < 0.6


def test_the_variance_is_that_of_resampling_seeds_and_examples():
    """The oracle resamples: seeds alone and examples alone, minus what both share."""
    rng = np.random.default_rng(2)
    data = two_way(rng, 12, 80, 0.5, 1.0, 1.5)
    n, m = data.shape
    seeds = data[rng.integers(0, n, (20_000, n))].mean((1, 2)).var() * n / (n - 1)
    examples = data.T[rng.integers(0, m, (20_000, m))].mean((1, 2)).var() * m / (m - 1)
    residuals = data - data.mean(0) - data.mean(1, keepdims=True) + data.mean()
    expected = seeds + examples - (residuals**2).sum() / ((n - 1) * (m - 1)) / (n * m)
    found = estimate(data.mean(1), examples=data)
    reach = (found.high - found.low) / 2
    # Its quantile lies between that of 11 degrees of freedom and the normal one; 20 000 draws are right to 2 %.
    low, high = (stats.t.ppf(0.975, df) * math.sqrt(expected) for df in (math.inf, n - 1))
    assert 0.98 * low < reach < 1.02 * high


def test_holm():
    assert adjusted([0.01, 0.04, 0.03, 0.005], [1.0] * 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([], []) == []
    assert adjusted([0.5, 0.9], [1.0, 1.0]) == [1.0, 1.0]


def test_holm_with_weights_gives_the_larger_weight_more_of_the_level():
    assert adjusted([0.01, 0.01], [1.0, 0.1]) == pytest.approx([0.011, 0.011])
    assert adjusted([0.2, 0.01], [1.0, 0.1]) == pytest.approx([0.2, 0.11])
    assert adjusted([0.2, 0.001], [1.0, 0.1]) == pytest.approx([0.2, 0.011])


@pytest.mark.parametrize("weights", [(1.0,) * 10, (1.0,) * 4 + (0.1,) * 6])
def test_any_false_claim_is_as_rare_as_it_says(weights):
    """5 % +- 1.5 points at 2 000 draws of ten independent tests."""
    p = np.random.default_rng(3).random((2000, 10))
    assert np.mean([min(adjusted(row, weights)) <= 0.05 for row in p.tolist()]) < 0.065
