"""Which frameworks there are, whose a model is, and the modules `normkit.<framework>.<part>` that know them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from normkit.errors import MissingExtraError, NormError, NormTypeError, NormValueError, message, nearest

__all__ = ["FRAMEWORKS", "check_framework", "framework_of", "is_layer", "part"]

# Each with the class that its models have. Keras first: on PyTorch its layers are modules of torch as well.
FRAMEWORKS = {"keras": "keras.layers.Layer", "nnx": "flax.nnx.Module", "torch": "torch.nn.Module"}


def check_framework(framework: Any) -> None:
    """Raise NormValueError, with the nearest name, for an unknown one."""
    if framework not in FRAMEWORKS:
        must = "`framework` must be a known one"
        raise NormValueError(message(must, repr(framework), nearest(str(framework), FRAMEWORKS)))


def framework_of(value: Any) -> str:
    """The framework of a model or layer. Raises NormTypeError for anything else."""
    for name, kind in FRAMEWORKS.items():
        module, _, base = kind.rpartition(".")
        # A model of a framework that was never imported cannot exist.
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], base)):
            return name
    must = "a model must be a torch.nn.Module, a Keras layer or model, or an nnx.Module"
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise NormTypeError(message(must, got))


def is_layer(value: Any) -> bool:
    """Whether it is a layer or model of a framework."""
    try:
        framework_of(value)
    except NormTypeError:
        return False
    return True


def part(framework: str, name: str) -> Any:
    """The module `normkit.<framework>.<name>`.

    Raises NormValueError for an unknown framework, MissingExtraError where it is not installed.
    """
    check_framework(framework)
    try:
        return importlib.import_module(f"normkit.{framework}.{name}")
    except NormError:
        raise
    except ImportError as error:
        must = f"{framework} needs a package that is not installed ({error})"
        raise MissingExtraError(message(must, hint=f"pip install 'normkit[{framework}]'")) from error
