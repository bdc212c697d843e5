"""The cases of `cases/`, once for each backend of Keras, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BACKENDS = ("tensorflow", "jax", "torch")


def available(*modules: str) -> None:
    """Skip by name where a framework is missing; fail where NORMKIT_REQUIRE (names, with commas) lists it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    required = os.environ.get("NORMKIT_REQUIRE", "").replace(",", " ").split()
    assert not set(missing) & set(required), f"NORMKIT_REQUIRE={' '.join(required)}, but {missing} cannot be imported"
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: keras on {modules[-1]} not tested")


def environment(backend: str) -> dict[str, str]:
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "NORMKIT_KERAS_CASES": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }


def run(backend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment(backend), timeout=900
    )


ON_MODELS = ("check", "fold", "insert", "models", "port", "probe", "replace", "states", "training")


@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend):
    """In two processes at a time: those of the layers, and those of what works on models."""
    available("keras", backend)
    files = sorted(map(str, (HERE / "cases").glob("test_*.py")))
    on_models = [file for file in files if file.removesuffix(".py").endswith(ON_MODELS)]
    halves = [sorted(set(files) - set(on_models)), on_models]
    with ThreadPoolExecutor(len(halves)) as pool:
        both = list(pool.map(lambda half: run(backend, "-m", "pytest", *half, "-p", "no:cacheprovider"), halves))
    for done in both:
        print(f"{backend}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:]}")
    for done in both:
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_examples_in_docstrings(backend):
    available("keras", backend)
    code = """
import doctest, normkit.keras.further, normkit.keras.layers, normkit.keras.plain, normkit.keras.recurrent
for module in (normkit.keras.further, normkit.keras.layers, normkit.keras.plain, normkit.keras.recurrent):
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed, (module, failed, tried)
"""
    done = run(backend, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_keras_the_extra_is_named():
    code = """
import sys
sys.modules["keras"] = None  # as if it were not installed
import normkit
try:
    import normkit.keras
except normkit.NormError as error:
    print(type(error).__name__, error)
"""
    done = run("torch", "-c", code)
    assert done.stdout.startswith("MissingExtraError normkit.keras needs Keras 3"), done.stdout + done.stderr
    assert "pip install 'normkit[keras]'" in done.stdout


@pytest.mark.parametrize("backend", ["numpy", "tensorflw"])
def test_a_backend_that_does_not_train_is_refused(backend):
    available("keras")
    done = run(backend, "-c", "import normkit.keras")
    assert f"NormValueError: KERAS_BACKEND must be tensorflow, jax or torch; got '{backend}'" in done.stderr


def test_a_file_read_without_the_import_names_the_package(tmp_path):
    available("keras", "torch")
    path = str(tmp_path / "m.keras")
    code = f"""
import keras, normkit.keras
model = keras.Sequential([keras.Input((3,)), normkit.keras.BatchNormalization()])
model.save({path!r})
"""
    done = run("torch", "-c", code)
    assert done.returncode == 0, done.stderr
    done = run("torch", "-c", f"import keras; keras.models.load_model({path!r})")
    assert done.returncode != 0
    assert "Could not locate class 'BatchNormalization'" in done.stderr
    assert "'module': 'normkit.keras.layers'" in done.stderr
