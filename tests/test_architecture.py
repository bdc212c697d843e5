"""Which part may import which, what `import normkit` does, and that public names stay what they are."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import importable

import normkit

ROOT = Path(normkit.__file__).parent
FRAMEWORKS = {"torch", "keras", "tensorflow", "jax", "flax"}
# Each part and what it may import of normkit at module level; nobody imports upwards.
BELOW = {
    "errors": set(),
    "files": {"errors"},
    "frameworks": {"errors"},
    "tables": {"errors", "files"},
    "processes": set(),
    "core": {"errors"},
    "kernels": {"errors", "core"},
    "torch": {"errors", "core", "kernels", "surgery", "checks", "tables"},
    "keras": {"errors", "core", "kernels", "surgery", "checks"},
    "nnx": {"errors", "core", "kernels", "surgery"},
    "testing": {"errors", "core", "checks"},
    "experiments": {"errors", "files", "frameworks", "processes", "tables", "core", "kernels"},
    "surgery": {"errors", "frameworks", "tables", "core"},
    "checks": {"errors", "files", "frameworks", "tables", "core", "surgery"},
    "teaching": {"errors", "files", "frameworks", "tables", "core", "surgery", "checks"},
    "studies": {"errors", "files", "frameworks", "tables", "experiments"},
    "report": {"errors", "tables", "core", "experiments", "checks", "studies", "teaching"},
    "benchmarking": {"errors", "processes", "tables", "core", "kernels", "testing"},
    "cli": {"errors", "files", "frameworks", "tables", "core", "kernels", "surgery", "experiments", "report", "checks"}
    | {"benchmarking", "studies", "teaching"},
}
# Files that hold a framework's side of something and may import it at the top.
FRAMEWORK_FILES = {
    "torch": ("torch/", "testing/torch", "benchmarking/peers/torch"),
    "keras": ("keras/", "testing/keras", "benchmarking/peers/keras"),
    "tensorflow": ("benchmarking/peers/keras",),
    "jax": ("nnx/", "testing/nnx", "benchmarking/peers/jax"),
    "flax": ("nnx/", "testing/nnx"),
}


def sources():
    return sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool):
    """Names of the modules a file imports; with `top_level` only outside functions."""
    tree = ast.parse(path.read_text())
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    checked = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
               for n in ast.walk(node)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in checked or (top_level and id(node) in inside):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction_of_imports(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert part in BELOW, f"a new part: say here what `{part}` may import"
    for name in imports(path, top_level=True):
        top, _, rest = name.partition(".")
        if top == "normkit":
            other = rest.split(".")[0]
            allowed = BELOW[part] | {part}
            assert other in allowed, f"{path.relative_to(ROOT)} imports {name}; {part} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_frameworks_stay_at_the_edges(path):
    here = str(path.relative_to(ROOT))
    allowed = {name for name, places in FRAMEWORK_FILES.items() if here.startswith(places)}
    for name in imports(path, top_level=True):
        top = name.split(".")[0]
        assert top not in FRAMEWORKS - allowed, f"{here} imports {name} at module level"
    if part_of(path) == "core":
        for name in imports(path, top_level=False):
            top = name.split(".")[0]
            known = top in ("numpy", "normkit") or top in sys.stdlib_module_names
            assert known, f"core imports NumPy and the standard library only; {here} imports {name}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "torch keras tensorflow jax flax sklearn matplotlib optuna rich typer numpy"


def test_importing_normkit_imports_no_framework():
    code = f"import sys, normkit; print([m for m in '{HEAVY}'.split() if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("module", ["normkit.core.catalog", "normkit.testing", "normkit.experiments", "normkit.report"])
def test_neutral_parts_import_no_framework(module):
    code = f"import sys, {module}; print([m for m in 'torch keras tensorflow jax flax'.split() if m in sys.modules])"
    assert run(code) == "[]"


def test_importing_changes_nothing_global():
    code = """
import os, random, warnings, numpy as np, torch
before = (dict(os.environ), random.getstate(), torch.get_rng_state().sum(), torch.get_default_dtype(),
          torch.get_num_threads(), list(warnings.filters), str(np.random.get_state()))
import normkit, normkit.torch, normkit.testing, normkit.experiments
after = (dict(os.environ), random.getstate(), torch.get_rng_state().sum(), torch.get_default_dtype(),
         torch.get_num_threads(), list(warnings.filters), str(np.random.get_state()))
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    assert run(code) == "[]"


def all_modules():
    found = pkgutil.walk_packages([str(ROOT)], "normkit.", onerror=lambda name: None)
    return [m.name for m in found if not m.name.endswith("__main__") and importable(m.name)]


def test_public_names_survive_the_import_of_every_module():
    """Importing `normkit.x.y` sets the attribute `x` on the package: a package named like a verb would replace it."""
    for name in all_modules():
        importlib.import_module(name)
    for name in normkit.__all__:
        value = getattr(normkit, name)
        assert callable(value) or isinstance(value, str), f"normkit.{name} has become {value!r}"
    assert not set(normkit.__all__) & {name.split(".")[1] for name in all_modules()}


def test_names_are_listed_and_documented():
    for name in normkit.__all__:
        if not name.startswith("__"):
            assert getattr(normkit, name).__doc__, f"normkit.{name} has no docstring"
    assert set(normkit.__all__) <= set(dir(normkit))
    with pytest.raises(AttributeError, match="no attribute 'compair'"):
        normkit.compair  # noqa: B018


def test_every_module_has_a_docstring_that_says_what_it_is():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} says nothing about itself"
