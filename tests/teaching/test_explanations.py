"""What is told of every normalizer: all of it there, its layers real, its story that of the docstring."""

import importlib
import json

import numpy as np
import pytest
from frameworks import importable

from normkit.core import catalog
from normkit.core.catalog import CATALOG
from normkit.core.plan import plan
from normkit.teaching.cells import letter, places, sharing
from normkit.teaching.entries import ENTRIES
from normkit.teaching.explanations import explanation, listing
from normkit.teaching.forms import FORMS, formula_of
from normkit.teaching.stories import story


def test_there_is_an_entry_for_everything_in_the_catalog():
    assert set(ENTRIES) == set(CATALOG)
    assert {spec.formula for spec in CATALOG.values()} - {"standard"} == set(FORMS)


@pytest.mark.parametrize("framework", ["torch", "keras", "nnx"])
def test_layers_are_those_of_the_framework(framework):
    home = f"normkit.{framework}"
    if not importable(home):
        pytest.skip(f"{framework} is not installed")
    module = importlib.import_module(home)
    for name, entry in ENTRIES.items():
        for layer in getattr(entry, framework):
            assert hasattr(module, layer), f"{name}: {home} has no {layer}"


@pytest.mark.parametrize("name", CATALOG)
def test_every_normalizer_is_explained(name):
    found = explanation(name)
    text = str(found)
    assert all(len(line) <= 120 for line in text.splitlines())
    for part in (found.formula, found.entry.line, found.entry.pitfalls[0][:20], "shapes: ", "pitfalls", "PyTorch "):
        assert part in text
    assert found.paper.startswith("https://arxiv.org/abs/")
    assert bool(found.axes) == bool(CATALOG[name].over_names)
    assert found.story.shapes
    assert found.story.modes
    assert json.loads(json.dumps(found.to_dict()))["name"] == name
    assert found.formula in found._repr_html_().replace("&#x27;", "'")


def test_a_story_is_that_of_the_docstring():
    from normkit.torch.layers import GroupNorm

    told = story("torch/layers.py", "GroupNorm")
    words = " ".join(GroupNorm.__doc__.split())
    for text in (*told.what, told.modes, told.first[1:], told.shapes[1:]):
        assert text in words
    assert told.what == ("One group is layer norm over (C, *S), one channel per group is instance norm.",)
    assert told.first == "Weight 1, bias 0."
    with pytest.raises(KeyError):
        story("torch/layers.py", "NoSuchNorm")


def test_the_list():
    found = listing()
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()][:-1] == list(CATALOG)
    assert found.to_dict()["batch"]["torch"] == ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
    assert found._repr_html_().count("<tr>") == len(CATALOG) + 1


def test_formulas_follow_the_spec():
    assert formula_of(catalog.BATCH) == "y = (x - mean) / sqrt(variance + eps) * gamma + beta"
    assert formula_of(catalog.RMS) == "y = x / sqrt(mean(x^2) + eps) * gamma"
    assert "* r + d" in formula_of(catalog.RENORM)


def test_who_shares_a_statistic():
    shape = (2, 4, 2, 1)
    group = sharing(plan(catalog.GROUP, 4, (("g", 2),)), shape)
    assert group[..., 0].tolist() == [[[0, 0], [0, 0], [1, 1], [1, 1]], [[2, 2], [2, 2], [3, 3], [3, 3]]]
    np.testing.assert_array_equal(places(plan(catalog.GROUP, 4, (("g", 2),)), shape)[0, :, 0, 0], range(4))
    # Groups of 2 of 5 samples: the last one is short, unless it would be of a single value.
    ghost = sharing(plan(catalog.GHOST, 3, (("n", 2),)), (5, 1, 2))
    assert ghost[:, 0, 0].tolist() == [0, 0, 1, 1, 2]
    ghost = sharing(plan(catalog.GHOST, 2, (("n", 2),)), (5, 1))
    assert ghost[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert letter(27) == "AB"
