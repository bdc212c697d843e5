"""The short examples run, and batch norm trains where the same network without it does not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"torch": ("torch",), "nnx": ("jax", "flax", "optax")}


@pytest.mark.parametrize("framework", NEEDS)
def test_the_small_cnn(framework):
    required = framework in os.environ.get("NORMKIT_REQUIRE", "").replace(",", " ").split()
    for package in NEEDS[framework]:
        if importlib.util.find_spec(package) is None and not required:
            pytest.skip(f"examples/{framework}_cnn.py is not run: {package} is not installed")
    path = EXAMPLES / f"{framework}_cnn.py"
    command = [sys.executable, "-W", "error::UserWarning", path, "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    header, *rows = (line.rsplit(maxsplit=2) for line in done.stdout.splitlines())
    assert header == ["test accuracy at rate", "0.003", "0.1"]
    shares = {name.strip(): [float(share.strip("%")) for share in values] for name, *values in rows}
    assert list(shares) == ["none", "before the activation", "after the activation"]
    assert min(shares["before the activation"][1], shares["after the activation"][1]) > 85
    assert shares["none"][0] < 85 < shares["before the activation"][0]
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 60
