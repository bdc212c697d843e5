"""How often the analysis claims what is not so; the whole table is benchmarks/false_claims.csv."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulated():
    spec = importlib.util.spec_from_file_location("false_claims", BENCHMARKS / "false_claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["false_claims"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("seeds", "profile"), [(5, 0.5), (9, 1.0), (10, 0.5)])
def test_equal_variants_are_told_apart_in_at_most_5_percent_of_comparisons(simulated, seeds, profile):
    claims, _ = simulated.rates(1000, seeds=seeds, examples=450, profile=profile)
    assert claims <= 0.05


def test_without_the_correction_most_comparisons_would_claim_something(simulated, monkeypatch):
    """The twin that must fail: 27 differences among 7 variants, each at 5 %."""
    monkeypatch.setattr("normkit.experiments.analysis.adjusted", lambda p_values, weights: p_values)
    assert simulated.rates(100, seeds=10, examples=450, profile=0.5)[0] > 0.3


def test_against_the_observed_best_alone_is_no_way_out(simulated):
    """The best of seven looks better than none without being so: an interval for it alone is not 95 %."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        (group,) = simulated.summarize(simulated.comparison(rng, seeds=10, examples=450, profile=0.5), simulated.TASK)
        best = max((d for d in group.against_baseline if d.quantity == "final"), key=lambda d: d.value)
        wrong += best.low > 0
    assert wrong / 200 > 0.07


@pytest.mark.parametrize(("examples", "least"), [(450, 0.8), (2000, 0.9)])
def test_two_points_are_found_with_ten_seeds(simulated, examples, least):
    assert simulated.rates(200, seeds=10, examples=examples, profile=0.5, gain=0.02)[1] >= least


def test_the_committed_table_says_the_same(simulated):
    with (BENCHMARKS / "false_claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == simulated.COLUMNS
    equal = [row for row in rows if float(row["gain"]) == 0]
    assert len(equal) == 27
    assert all(float(row["claims"]) <= 0.05 for row in equal)
