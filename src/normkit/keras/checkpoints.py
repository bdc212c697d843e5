"""Weights of Keras models in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from normkit.errors import NormValueError, message

__all__ = ["check_suffix", "content", "load"]

_SUFFIX = ".weights.h5"


def check_suffix(path: Path) -> None:
    """Raise NormValueError for a name that weights are not kept under."""
    if not path.name.endswith(_SUFFIX):
        raise NormValueError(
            message(f"weights of a Keras model must be in a file that ends in {_SUFFIX}", repr(str(path)))
        )


def load(model: Any, path: Path) -> None:
    """Load a file into a model. Raises NormValueError for files that cannot be read, or that do not fit."""
    check_suffix(path)
    try:
        model.load_weights(path)
    except Exception as error:  # whatever HDF5 and Keras find
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise NormValueError(message(f"{path.name} must hold the weights of this model", words[0])) from error


def content(model: Any, path: Path) -> bytes:
    """What a file with this name holds for the weights of a model."""
    check_suffix(path)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        model.save_weights(written)
        return written.read_bytes()
