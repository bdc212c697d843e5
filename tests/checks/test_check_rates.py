"""The script that measures rates measures them."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")  # scikit-learn reads its photographs by it

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "check_rates.py"


def test_a_rule_on_one_model(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    target = tmp_path / "rates.csv"
    script["main"](["--rules", "NK201", "--models", "mlp", "--seeds", "1", "--healthy", "0", "--out", str(target)])
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["code"], row["strength"]) for row in rows] == [("NK201", "one"), ("NK201", "all")]
    assert all(row["found"] == row["serious"] == row["trials"] == "2" for row in rows)  # a model of each data set


def test_every_rule_is_planted_or_named():
    script = runpy.run_path(str(SCRIPT))
    planted = {fault.code for fault in script["FAULTS"]}
    assert planted.isdisjoint(script["NOT_PLANTED"])
    assert planted.union(script["NOT_PLANTED"]) == set(script["RULES"])
