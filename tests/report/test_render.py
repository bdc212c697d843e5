"""The page as text: small, self-contained, escaped, and what it says about how it was made."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made import ENVIRONMENT, grid, make_comparison, make_trial, regression, settings

from normkit.experiments.config import Task
from normkit.report import render, words


class _Reader(HTMLParser):
    """Tags that are balanced, what would be loaded, headings."""

    VOID = ("meta", "link")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.headings = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def read(page):
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


@pytest.mark.parametrize(("make", "drawn"), [(grid, 6), (regression, 4), (settings, 13)])
def test_a_page_needs_nothing_else(make, drawn):
    made = make()
    page = render.page(made)
    assert len(page.encode()) < 500_000
    assert page.count("<svg ") == drawn
    assert read(page).loads == []
    assert "@import" not in page
    assert "url(http" not in page
    assert page.count("prefers-color-scheme: dark") >= 2
    for sentence in words.sentences(made)[: len(made.groups)]:
        assert sentence[-30:].replace(" %", "\u00a0%") in page
    assert page == render.page(made)
    fragment = render.fragment(made)
    assert fragment.lstrip().startswith("<style>")
    assert "<html" not in fragment


def test_figures_that_nothing_is_known_for_are_left_out():
    assert [h for h in read(render.page(grid())).headings if "ctivations" in h] == [
        "Activations at initialization", "Activations after training"
    ]  # fmt: skip
    headings = read(render.page(regression())).headings
    assert "Activations at initialization" not in headings
    assert "Where they end" in headings
    lost = make_comparison([make_trial(norm, diverged=True, values=(0.1,)) for norm in ("none", "batch")])
    assert render.page(lost).count("<svg ") == 1


def test_everything_as_files():
    files = render.pictures(regression())
    assert sorted(files) == [f"{n}.{e}" for n in ("costs", "curves", "final", "rates") for e in ("png", "svg")]
    for name, content in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content.encode())
        else:
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
    made = make_comparison([make_trial(batch_size=size, inputs=mode) for size in (8, 32) for mode in ("none", "max")])
    assert {"curves-8-none.svg", "curves-32-max.png", "costs-8-max.svg"} <= set(render.pictures(made))


def test_many_settings_stay_under_500_kilobytes():
    sizes = range(2, 42)
    norms = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms")
    values = [0.1 + 0.02 * n for n in range(35)]
    made = make_comparison([make_trial(norm, batch_size=size, values=values) for size in sizes for norm in norms])
    page = render.page(made)
    assert 400_000 < len(page.encode()) < 500_000
    drawn = page.count("<svg ")
    assert drawn >= 4
    assert f"{40 * 4 - drawn} figures are not drawn here" in page
    assert page.count('class="found several"') == 40


def test_text_that_alone_is_too_long_is_cut():
    sizes = range(2, 402)
    made = make_comparison([make_trial(norm, batch_size=size) for size in sizes for norm in ("none", "batch", "rms")])
    page = render.page(made)
    assert len(page.encode()) < 500_000
    kept = page.count('class="found several"')
    assert 20 < kept < 400
    assert f"{400 - kept} further settings are left out" in page


def test_what_the_user_typed_is_escaped():
    evil = "</script><script>alert('1')</script><b>"
    made = make_comparison(
        [make_trial(norm, metric=evil, inputs="") for norm in ("none", "batch")],
        Task(evil, "max", 0.5),
        {"command": evil, "system": evil, "loss": evil, "versions": {evil: evil}},
        [evil],
        evil,
        run=f"train.py:{evil}",
        metric=evil,
        goal="max",
    )
    page = render.page(made)
    assert read(page).loads == []
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert" in page
    for name, content in render.pictures(made).items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content.encode())


def facts(page):
    made = page[page.index("How this was made") :]
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", made))


def test_how_it_was_made():
    made = grid()
    assert facts(render.page(made)) == {
        "Command": "normkit compare cnn",
        "Data": "digits: 1797 scans",
        "Model": "cnn",
        "Framework": "torch",
        "Loss": "mean cross entropy",
        "Optimizer": "SGD, momentum 0.9, constant rate",
        "Judged by": "accuracy, more is better",
        "Norms": "none, batch, batch:after, layer, group, renorm, rms",
        "Learning rates": "0.003, 0.01, 0.03, 0.1, 0.3, 1",
        "Batch sizes": "32",
        "Inputs": "standard",
        "Seeds": "5 (0 to 4)",
        "Epochs": "6",
        "Trials": "210, 30 of them run now and 180 kept from before, in 61 s",
        "Machine": "2 cores, 2 workers, Linux x86_64, avx2",
        "Versions": "normkit 0.1.0, python 3.11, torch 2",
    }


def test_rows_that_are_not_known_are_left_out():
    made = regression()
    for name in ENVIRONMENT:
        made.environment.pop(name, None)
    made.environment["storage"] = "sqlite"
    shown = facts(render.page(made))
    assert shown["Storage"] == "sqlite"
    assert shown["Loop"] == "train.py:train"
    assert shown["Trials"] == "18"
    assert not {"Machine", "Versions", "Loss", "Optimizer", "Data", "Model", "Framework"} & set(shown)


def test_only_columns_that_are_shown_are_explained():
    page = render.page(regression())
    assert "<dt>evaluation - training</dt>" not in page
    assert "<dt>steps, seconds" not in page
    assert "<dt>memory</dt>" in page
    assert "<dt>evaluation - training</dt>" in render.page(grid())
