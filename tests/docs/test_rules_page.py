"""docs/rules.md says what the rules say."""

from pathlib import Path

from normkit.checks.pages import main, page
from normkit.checks.rule import RULES

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m normkit.checks.pages docs/rules.md"


def test_every_rule_has_a_place_that_its_findings_point_to(tmp_path):
    main([str(tmp_path / "rules.md")])
    text = (tmp_path / "rules.md").read_text()
    for rule in RULES.values():
        assert rule.url == f"docs/rules.md#{rule.code.lower()}"
        assert f'<a id="{rule.code.lower()}"></a>' in text
        assert rule.story in text
