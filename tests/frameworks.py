"""Which modules of the package can be imported here: those of a framework that is missing cannot."""

from __future__ import annotations

import importlib.util

__all__ = ["importable"]

NEEDS = {"keras": ("keras",), "nnx": ("flax", "optax")}


def importable(module: str) -> bool:
    """Whether the framework that a module of normkit belongs to is installed."""
    needed = [packages for part, packages in NEEDS.items() if part in module.split(".")]
    return all(importlib.util.find_spec(package) is not None for packages in needed for package in packages)
