"""Settings of `normkit check` from pyproject.toml and from comments."""

from __future__ import annotations

import pytest

from normkit.checks.findings import Finding
from normkit.checks.settings import Settings, comments, configured
from normkit.errors import NormError

TABLE = """
[tool.normkit.check]
select = ["NK1"]
ignore = ["NK103"]
steps = 2
limits = {NK102 = {share = 0.1}}
allow = {NK102 = ["backbone.*"]}
"""


def test_the_nearest_file_upwards_counts(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(TABLE)
    found = configured(inner)
    assert found["steps"] == 2
    settings = Settings.of(found["select"], found["ignore"], found["limits"], found["allow"])
    assert settings.limits == {"NK102": {"share": 0.1}}
    assert settings.allow == {"NK102": ("backbone.*",)}
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.other]\n")
    assert configured(inner) == {}  # that one is nearer, and says nothing


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.normkit.check]\nselct = []", "must hold known keys; got 'selct'. hint: did you mean select?"),
        ("[tool.normkit]\ncheck = 3", "must be a table; got 3"),
        ("[tool.normkit.check", "must be a file of TOML that can be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, said):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(NormError) as raised:
        configured(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_comments_allow_by_path_or_everywhere():
    source = """
x = "# normkit: ignore[NK101]"  # a string is no comment
y = 3  # normkit: ignore[NK102, NK103] backbone.*, head
# normkit: ignore[NK1]
# normkit: ignored things are none
"""
    found = list(comments(source, "net.py"))
    assert found == [("NK102", ("backbone.*", "head")), ("NK103", ("backbone.*", "head")), ("NK1", ("*",))]
    settings = Settings.of(allow={"NK102": ["stem"]}).allowing(found[:2])
    for path, allowed in [("stem", True), ("backbone.0.norm", True), ("head", True), ("head.norm", False), ("", False)]:
        assert settings.allows(Finding("error", path, "", code="NK102")) == allowed
    assert not settings.allows(Finding("error", "stem", "", code="NK103"))
    everywhere = Settings().allowing(found[2:])
    assert everywhere.allows(Finding("error", "", "", code="NK102"))
    assert not everywhere.allows(Finding("error", "", "", code="NK201"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("# normkit: ignore", "line 2 of net.py: a comment must name rules"),
        ("# normkit: ignore[]", "line 2 of net.py: a comment must name rules"),
        ("# normkit: ignore[NK999] x", "`line 2 of net.py` must hold codes of rules"),
    ],
)
def test_a_comment_that_says_nothing_is_an_error(line, said):
    with pytest.raises(NormError) as raised:
        list(comments(f"\n{line}\n", "net.py"))
    assert said in str(raised.value)
