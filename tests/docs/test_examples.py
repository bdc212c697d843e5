"""Every example in a docstring and every Python block in the README and the docs is run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from frameworks import importable

import normkit

ROOT = Path(__file__).parents[2]
MODULES = [
    m.name
    for m in pkgutil.walk_packages(normkit.__path__, "normkit.", onerror=lambda name: None)
    if not m.name.endswith(("__main__", "_native"))
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if not importable(name):
        pytest.skip(f"{name} is not looked at: its framework is not installed")
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_on_pages(page, tmp_path, monkeypatch):
    """Blocks of a page run in order and share their names; files they write go to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    missing = [module for module in ("normkit.keras", "normkit.nnx") if module in text and not importable(module)]
    if missing:
        pytest.skip(f"{page.name} is not run: the framework of {' and '.join(missing)} is not installed")
    names: dict = {}
    for block in BLOCK.findall(text):
        if ">>>" in block:
            parsed = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            runner.run(parsed, clear_globs=False)
            assert runner.summarize(verbose=False).failed == 0
            names = parsed.globs
        else:
            exec(compile(block, str(page), "exec"), names)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text())):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


PUBLIC = [(m, n) for m in ("normkit", "normkit.torch", "normkit.torch.functional", "normkit.core.algebra")
          for n in importlib.import_module(m).__all__ if not n.startswith("__")]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_names_say_what_they_are(module, name):
    value = getattr(importlib.import_module(module), name)
    if callable(value):
        assert value.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in importlib.import_module("normkit.torch").__all__ if n[0].isupper()])
def test_layers_document_formula_shapes_errors_and_an_example(name):
    text = getattr(importlib.import_module("normkit.torch"), name).__doc__
    for needed in ("Shapes:", "Args:", "Raises:", ">>>"):
        assert needed in text, f"{name} lacks {needed}"
