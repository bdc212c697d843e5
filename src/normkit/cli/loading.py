"""What commands are given of the user's: the function that builds a model, its weights, data."""

from __future__ import annotations

import contextlib
import inspect
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from normkit.errors import NormTypeError, NormValueError, message
from normkit.experiments.code import call
from normkit.experiments.config import is_reference
from normkit.frameworks import framework_of, part
from normkit.surgery import batches

__all__ = ["Checkpoint", "Data", "Model", "builder", "function", "inputs", "loaded", "writable"]

_MODELS = {"torch": "a PyTorch model", "keras": "a Keras model", "nnx": "an nnx.Module"}

Model = Annotated[str, typer.Argument(help="file.py:build, a function build() that returns a PyTorch model.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="State dict to load first, .pt or .safetensors. [default: as build() gives]", show_default=False),
]
Data = Annotated[
    str,
    typer.Option(
        help="Inputs: an .npy file, an .npz file (its x, its x_train, else its first array), or file.py:name for an "
        "array, a tensor, a loader, or a function that returns one.",
        show_default=False,
    ),
]


def builder(label: str, user: Callable[[str], Any], frameworks: Sequence[str] = ("torch",)) -> Callable[[], Any]:
    """The function that builds the user's model, called without arguments. Raises for what is none."""
    if not is_reference(label):
        must = "the model must be a function in a file"
        raise NormValueError(message(must, repr(label), "write file.py:build"))
    build = user(label)
    if not callable(build):
        raise NormTypeError(message(f"{label} must be a function", type(build).__name__))
    with contextlib.suppress(ValueError):  # a function without a signature is simply called
        try:
            inspect.signature(build).bind()
        except TypeError as error:
            hint = "def build_for_this(): return build(torch.nn.BatchNorm2d)"
            raise NormTypeError(message(f"{label} must be a function that needs no arguments", error, hint)) from None

    def built() -> Any:
        model = call(label, build)
        framework = framework_of(model)
        if framework not in frameworks:
            must = f"{label} must return {' or '.join(_MODELS[name] for name in frameworks)}"
            raise NormTypeError(message(must, f"one of {framework}", "use the functions of normkit in Python"))
        return model

    return built


def loaded(build: Callable[[], Any], checkpoint: Path | None) -> Any:
    """The model, with the weights of a file."""
    model = build()
    if checkpoint is not None:
        part(framework_of(model), "checkpoints").load(model, checkpoint)
    return model


def inputs(source: str, user: Callable[[str], Any], *, labels: bool = False) -> Any:
    """The user's data; with `labels` inputs and targets, where an archive has them."""
    if is_reference(source):
        data = user(source)
        if callable(data) and not hasattr(data, "__getitem__"):
            data = call(source, data)
    else:
        data = _array(Path(source), labels)
    batches.repeatable("--data", data)
    return data


def _array(path: Path, labels: bool) -> Any:
    if path.suffix not in (".npy", ".npz"):
        must = "`--data` must be an .npy or .npz file, or file.py:name"
        raise NormValueError(message(must, repr(str(path))))
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            names = [name for name in ("x", "x_train", *found.files) if name in found.files]
            if names:
                targets = {"x": "y", "x_train": "y_train"}.get(names[0])
                return (found[names[0]], found[targets]) if labels and targets in found.files else found[names[0]]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        must = f"`--data` must be a {path.suffix} file of arrays that can be read"
        raise NormValueError(message(must, f"{path} ({error})")) from error
    raise NormValueError(message(f"{path.name} must hold an array", "none"))


def writable(option: str, path: Path) -> None:
    """Raise NormValueError, before the work, for a file that could not be written after it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        must = f"`{option}` must be a file in a folder that exists and can be written"
        raise NormValueError(message(must, str(path)))


def function(model: str) -> str:
    """The name of the function in `file.py:name`."""
    return model.rpartition(":")[2]
