"""The Keras example runs on digits and on a file, shows the trap and its remedies, and says what it cannot use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("keras")
pytest.importorskip("tensorflow")
EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_mnist_cnn.py"
CLOSED = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody answers there


def run(tmp_path, *arguments, script=(EXAMPLE,)):
    """Offline, with nothing that Keras downloaded before."""
    env = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "keras_backend")}
    env |= {**CLOSED, "KERAS_HOME": str(tmp_path / "keras"), "TF_ENABLE_ONEDNN_OPTS": "0"}
    command = [sys.executable, *script, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)


def accuracies(text):
    """Name of a variant to its accuracies: of training where it was trained, and of validation."""
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines() if re.search(r"\d\.\d\d$", line)]
    return {name: [float(value) for value in values] for name, *values in lines}


def test_on_digits_the_moving_averages_mislead_and_every_remedy_helps(tmp_path):
    done = run(tmp_path, "--epochs", "4", "--out", "picture.png")
    assert done.returncode == 0, done.stderr
    found = accuracies(done.stdout)
    assert len(found) == 6
    train, validation = found.pop("BatchNormalization()")
    assert train > 0.97
    assert validation < 0.6
    plain = found.pop("no batch normalization")
    for name, values in found.items():
        assert values[-1] > max(0.93, plain[-1] - 0.02), name
    assert "on tensorflow" in done.stdout
    assert "0.99^88 = 0.41 after 88 steps" in done.stdout
    assert "Small variances drown in it" in done.stdout
    assert "Cause: statistics not converged: 41 % of the initial value left, first at " in done.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "picture" in path.name or "tmp" in path.name] == ["picture.png"]


def test_a_file_as_keras_stores_mnist(tmp_path):
    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels] = 255
        parts |= {f"x_{part}": images, f"y_{part}": labels.astype(np.uint8)}
    np.savez(tmp_path / "mnist.npz", **parts)
    done = run(tmp_path, "--data", "mnist.npz", "--out", "picture.svg")
    assert done.returncode == 0, done.stderr
    assert "mnist.npz: 96 images for training, 32 for validation; 2 steps of 64, Adam" in done.stdout
    assert (tmp_path / "picture.svg").read_text().rstrip().endswith("</svg>")


WRONG = {
    "mnist offline": (
        ["--data", "mnist"],
        r"mnist must be downloaded once \(.*\). hint: offline take --data path/to/mni",
    ),
    "no file": (
        ["--data", "missing.npz"],
        "--data must be digits, mnist or an .npz file that holds x_train.*missing.npz",
    ),
    "no archive": (["--data", str(EXAMPLE)], "--data must be digits, mnist or an .npz file"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1; got 0"),
    "out": (["--out", "picture.txt"], "--out must end in .png, .svg or .pdf, in a folder that exists; got picture.txt"),
    "folder": (["--out", "missing/picture.png"], "in a folder that exists; got missing/picture.png"),
}


ALL = f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import keras_mnist_cnn
for arguments in {[arguments for arguments, _ in WRONG.values()]!r}:
    sys.argv[1:] = arguments
    try:
        keras_mnist_cnn.main()
    except SystemExit as ended:
        print("exit", ended.code, file=sys.stderr)
"""


def test_what_cannot_be_used_is_said_and_nothing_is_trained(tmp_path):
    """All in one process: loading TensorFlow takes longest."""
    done = run(tmp_path, "-c", ALL, script=())
    assert done.returncode == 0, done.stderr
    *told, rest = done.stderr.split("exit 2\n")
    assert rest == ""
    for (_, said), text in zip(WRONG.values(), told, strict=True):
        assert re.search(said, text), text
    assert "accuracy" not in done.stdout
