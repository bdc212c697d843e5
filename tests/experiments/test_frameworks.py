"""The command line with Keras and Flax NNX, from the question to the report, and what it says where one is missing."""

from __future__ import annotations

import json
import os

import pytest
from frameworks import importable

import normkit
from normkit.cli import main
from normkit.errors import MissingExtraError, NormValueError
from normkit.frameworks import part

SMALL = ["--lrs", "0.03", "--seeds", "1", "--epochs", "1", "--workers", "1"]
MODELS = {
    "keras": """
import keras

def build(norm):
    layers = [keras.layers.Flatten(), keras.layers.Dense(8), norm(activation="relu"), keras.layers.Dense(10)]
    return keras.Sequential(layers)

def train(trial):
    layers = [keras.Input((3,)), keras.layers.Dense(4), trial.norm(), trial.norm(4, "relu")]
    trial.report(1, loss=len(keras.Sequential(layers).weights))
""",
    "nnx": """
import jax
from flax import nnx

def build(norm, rngs):
    layers = [nnx.Linear(64, 8, rngs=rngs), norm(8, jax.nn.relu), nnx.Linear(8, 10, rngs=rngs)]
    return nnx.Sequential(lambda x: x.reshape(len(x), -1), *layers)

def train(trial):
    layer = trial.norm(4, jax.nn.relu)
    trial.report(1, loss=len(jax.tree.leaves(nnx.state(layer))))
""",
}


@pytest.mark.parametrize("framework", MODELS)
def test_models_and_loops_of_a_framework(framework, tmp_path, monkeypatch, capsys):
    if not importable(framework):
        pytest.skip(f"{framework} not installed")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODELS[framework])
    common = ["--norms", "none,batch", "--framework", framework, *SMALL]
    assert main(["compare", "mine.py:build", *common, "--out", "built"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    told = "debiased moving averages with momentum 0.9"
    assert told in shown
    assert "Steps are compiled before they are timed." in shown or os.environ.get("KERAS_BACKEND") == "torch"
    assert f"Next: normkit compare mymodel.py:build --data my.npz --framework {framework}" in shown
    assert told in (tmp_path / "built" / "report.html").read_text()
    trials = json.loads((tmp_path / "built" / "results.json").read_text())["trials"]
    assert [trial["diverged"] for trial in trials] == [False, False]
    assert main(["compare", "mine.py:train", *common, "--out", "trained"]) == 0
    none, batch = json.loads((tmp_path / "trained" / "results.json").read_text())["trials"]
    assert batch["final"] > none["final"], "the norm has weights"


@pytest.mark.parametrize(
    ("framework", "hidden", "said"),
    [
        ("keras", "keras", r"needs Keras 3 and one of its backends.*pip install 'normkit\[keras\]'"),
        ("nnx", "flax", r"needs JAX and Flax.*pip install 'normkit\[nnx\]'"),
    ],
)
def test_a_framework_that_is_missing_names_its_extra(framework, hidden, said, tmp_path, monkeypatch):
    # Workers are processes of their own: there it is hidden by a file that cannot be imported.
    (tmp_path / f"{hidden}.py").write_text(f"raise ModuleNotFoundError('hidden', name={hidden!r})")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match=said):
        normkit.compare("mlp", framework=framework, norms=("none",), lrs=(0.1,), seeds=1, epochs=1, workers=1)


def test_a_backend_of_keras_that_is_missing_is_named(tmp_path, monkeypatch):
    pytest.importorskip("keras")
    (tmp_path / "tensorflow.py").write_text("raise ModuleNotFoundError('hidden', name='tensorflow')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    with pytest.raises(MissingExtraError, match=r"Keras needs its backend, tensorflow, .*or set KERAS_BACKEND"):
        normkit.compare("mlp", framework="keras", norms=("none",), lrs=(0.1,), seeds=1, epochs=1, workers=1)


def test_an_unknown_framework_is_told_the_nearest():
    with pytest.raises(NormValueError, match=r"got 'kears'. hint: did you mean keras"):
        part("kears", "training")
