"""How a diagnosis reads: one sentence, blocks of at most 100 columns, annotations, JSON, a page."""

from __future__ import annotations

import json
import re

import pytest

from normkit.checks.findings import Diagnosis, Finding, Fix
from normkit.checks.output import blocks, github

MANY = tuple(
    Finding(
        "error" if n < 40 else "warning",
        f"backbone.layer{n // 10}.{n % 10}.norm",
        f"kept statistics are not those of the data in {n if n in (5, 7, 9, 11) else 88} % of the channels",
        {"share": float("nan") if n == 3 else n / 100},
        Fix("normkit.recalibrate(model, data)", "recalibrate", safe=True),
        code="NK102",
        title="kept statistics are not those of the data",
    )
    for n in range(53)
)
OTHER = Finding(
    "info", "", "weight decay: 5 %, and <b>", {}, Fix("a", others=("b",)), code="NK701", title="weight decay, on norms"
)


def made(**changes):
    given = {
        "model": "ResNet",
        "sentence": "44 errors: a long sentence " + "of words " * 20,
        "findings": (*MANY, OTHER),
        "layers": 53,
        "rules": ("NK102", "NK701"),
        "skipped": {"optimizer": "none was given"},
        **changes,
    }
    return Diagnosis(**given)


def test_findings_of_a_rule_are_one_block_per_severity():
    first, second, third = blocks(made().findings)
    assert [(b.severity, b.code) for b in (first, second, third)] == [
        ("error", "NK102"),
        ("warning", "NK102"),
        ("info", "NK701"),
    ]
    assert first.entries[0][0].endswith("and 33 more")  # 36 of the 40 read the same
    assert (len(first.entries), first.more) == (3, 2)
    shown = sum(int(re.search(r"and (\d+) more", where)[1]) + 3 if "more" in where else 1 for where, _ in first.entries)
    assert shown + first.more == 40
    assert first.lines == ("normkit.recalibrate(model, data)",)
    assert (third.lines, third.others) == (("a",), ("b",))


def test_the_text_is_narrow_and_begins_with_the_sentence():
    sentence, *lines = str(made()).splitlines()
    assert sentence == made().sentence
    assert max(map(len, lines)) <= 100
    assert "error NK102  kept statistics are not those of the data" in lines
    assert lines[-1] == "not examined: optimizer: none was given"
    assert "    or: b" in lines
    assert not any(line.lstrip().startswith("%") for line in lines)


def test_a_healthy_model_is_one_line():
    assert str(made(sentence="no normalization problem found", findings=(), skipped={})).splitlines() == [
        "no normalization problem found"
    ]


def test_annotations_are_escaped_workflow_commands():
    lines = github(made(), "net.py").splitlines()
    assert lines[0].startswith("::notice title=normkit check,file=net.py::44 errors")
    assert [re.match(r"::(\w+) ", line)[1] for line in lines[1:]] == ["error", "warning", "notice"]
    assert "::notice title=NK701 weight decay%2C on norms,file=net.py::weight decay: 5 %25, and <b>" in lines[3]


def test_json_holds_every_finding_with_its_page():
    found = json.loads(json.dumps(made().to_dict(), allow_nan=False))
    assert len(found["findings"]) == 54
    assert found["findings"][0]["url"] == "docs/rules.md#nk102"
    assert found["findings"][3]["evidence"] == {"share": None}


@pytest.mark.parametrize("suffix", [".txt", ".json", ".html"])
def test_files(tmp_path, suffix):
    if suffix == ".html":
        pytest.importorskip("jinja2")
    text = made().save(tmp_path / f"x{suffix}").read_text()
    assert "backbone.layer0.0.norm" in text
    if suffix == ".html":
        assert "&lt;b&gt;" in text
        assert not re.search(r'(src|href)="(?!data:)', text)  # nothing to load
        assert text.startswith("<!doctype html>")
        assert len(text) < 60_000


def test_a_notebook_shows_the_page_or_without_jinja2_a_table(monkeypatch):
    pytest.importorskip("jinja2")
    assert '<div class="normkit">' in made()._repr_html_()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<table>" in made()._repr_html_()
