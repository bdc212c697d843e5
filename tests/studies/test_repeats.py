"""What a study says of its own repeats is what the committed calibration measured."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from normkit.studies import STUDIES

CSV = Path(__file__).parents[2] / "benchmarks" / "studies.csv"


def repeats():
    """By study: network, version and seeds, and how often each verdict was reached."""
    found = {}
    with CSV.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["check"] == "0":
                key = f"{row['model']}, {row['version']} version, {row['seeds']} seeds each"
                found.setdefault(row["study"], {}).setdefault(key, []).append(row["verdict"])
    return found


def test_the_page_names_every_study():
    page = (CSV.parents[1] / "docs" / "studies.md").read_text()
    assert [name for name in STUDIES if f"| `{name}`" not in page] == []


@pytest.mark.parametrize("name", STUDIES)
def test_repeats_are_those_of_the_calibration(name):
    cases = [
        f"{case}: {', '.join(f'{count} x {verdict}' for verdict, count in Counter(verdicts).most_common())}"
        for case, verdicts in repeats().get(name, {}).items()
    ]
    assert STUDIES[name].repeated == "; ".join(cases)
