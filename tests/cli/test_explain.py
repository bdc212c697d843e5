"""`normkit explain` of normalizers, and `normkit list`."""

import json
import sys

import numpy as np
import pytest

import normkit
from normkit.cli import main
from normkit.core.catalog import CATALOG

MINE = """
import numpy as np

print("imported")
batches = [(np.array([[1.0, 2.0], [5.0, 4.0]]), np.array([0, 1])), (np.zeros((1, 2)), np.array([0]))]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    np.save("x.npy", np.arange(6.0).reshape(3, 2))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_the_list(capsys):
    assert main(["list"]) == 0
    assert "PyTorch BatchNorm1d/2d/3d; Keras BatchNormalization; NNX BatchNorm" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(CATALOG)


def test_a_normalizer_is_explained(capsys):
    assert main(["explain", "batch"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("batch norm (batch): ")
    assert "https://arxiv.org/abs/1502.03167" in shown
    assert main(["explain", "batch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nnx"] == ["BatchNorm"]


def test_numbers(folder, capsys):
    assert main(["explain", "batch", "--numbers"]) == 0
    assert capsys.readouterr().out == f"{normkit.show('batch')}\n"
    assert main(["explain", "batch", "--numbers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["mean"]["after"] == pytest.approx([0.3, 20])


def test_own_data(folder, capsys):
    assert main(["explain", "layer", "--numbers", "--data", "x.npy", "--json", "--out", "seen.html"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["values"] == [[0, 1], [2, 3], [4, 5]]
    assert "<svg" in (folder / "seen.html").read_text()
    assert main(["explain", "batch", "--numbers", "--data", "mine.py:batches", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"][0]["values"] == [[1, 2], [5, 4]]  # the first batch
    assert "imported" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bach"], "did you mean batch"),
        (["NK12"], "did you mean NK102"),
        (["NK102", "--numbers"], "`--numbers` needs a normalizer; got the rule NK102"),
        (["batch", "--data", "x.npy"], "`--data` needs --numbers"),
        (["batch", "--numbers", "--data", "none.npy"], "`--data` must be a .npy file of arrays that can be read"),
        (["instance", "--numbers", "--data", "x.npy"], "a statistic must have at least 2 values"),
        (["batch", "--out", "a.svg"], "`--out` must end in .txt, .json, .html"),
        (["batch", "--out", "none/a.txt"], "`--out` must be a file in a folder that exists"),
    ],
)
def test_wrong_usage_is_one_line(folder, capsys, arguments, said):
    before = sorted(folder.iterdir())
    assert main(["explain", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(folder.iterdir()) == before
