"""docs/rules.md says what the rules say."""

from pathlib import Path

from normkit.checks.pages import main, page, rates
from normkit.checks.rule import RULES

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_the_page_is_up_to_date():
    measured = rates(PAGE.parents[1] / "benchmarks" / "check_rates.csv")
    assert PAGE.read_text() == page(measured), "python -m normkit.checks.pages docs/rules.md"


def test_every_rule_has_a_place_that_its_findings_point_to(tmp_path):
    main([str(tmp_path / "rules.md")])
    text = (tmp_path / "rules.md").read_text()
    for rule in RULES.values():
        assert rule.url == f"docs/rules.md#{rule.code.lower()}"
        assert f'<a id="{rule.code.lower()}"></a>' in text
        assert rule.story in text


def test_rates_are_shares_of_the_trials():
    planted = {"code": "NK102", "fault": "off by", "strength": "0.5", "trials": "8", "found": "6", "serious": "2"}
    none = {"code": "NK102", "fault": "none", "strength": "", "trials": "50", "found": "6", "serious": "1"}
    assert "| [NK102](#nk102) | off by | 0.5: 75 % | 8 | 2 % | 10 % |" in page([planted, none])
    assert "How often they are right" not in page()


def test_every_rule_that_one_process_of_pytorch_can_break_was_measured():
    measured = rates(PAGE.parents[1] / "benchmarks" / "check_rates.csv")
    assert {row["code"] for row in measured} == set(RULES) - {"NK305", "NK901", "NK902"}
    loud = [
        row["code"] for row in measured if row["fault"] == "none" and int(row["serious"]) > 0.05 * int(row["trials"])
    ]
    assert not loud, f"limits of {loud} blame healthy networks"
