"""Arrays to train on: loaded, checked, split and scaled with NumPy."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normkit.errors import MissingExtraError, NormValueError, message
from normkit.experiments.conditions import AS_USUAL, Conditions, cut, lit, spoiled_inputs, spoiled_labels

__all__ = [
    "DEFAULT_DATA",
    "KEYS",
    "Dataset",
    "Part",
    "Prepared",
    "from_arrays",
    "is_arrays",
    "load",
    "prepare",
    "scale",
    "split",
]

DEFAULT_DATA = "digits"
KEYS = ("x_train", "y_train", "x_test", "y_test")
REGRESSION = ("mse", "mae")
_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST"}
_EMBEDDED = {"digits": 450, "wine": 45}  # samples of the test part: about a quarter
_FEW = 20  # distinct whole numbers in a float array: probably classes, so we ask
_SPLIT_SEED = 0  # of the test part of digits
_VALIDATION_SEED = 1  # of the validation fifth: one for all variants and all seeds


class Part(NamedTuple):
    """Inputs (N, C, H, W) or (N, F), float32, and labels (N,), int64, or values to predict (N,) or (N, K), float32."""

    x: NDArray[np.float32]
    y: NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Training and test data as loaded, images as (N, C, H, W).

    Labels count from 0 to `classes` - 1; `classes` is None where numbers are to be predicted.
    """

    name: str
    train: Part
    test: Part
    classes: int | None

    @property
    def is_images(self) -> bool:
        """Whether a sample is (C, H, W)."""
        return self.train.x.ndim == 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (F,)."""
        return self.train.x.shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the content."""
        digest = hashlib.sha256()
        for array in (*self.train, *self.test):
            digest.update(str((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        kind = "images of " + " x ".join(map(str, self.shape)) if self.is_images else f"rows of {self.shape[0]} columns"
        what = "numbers to predict" if self.classes is None else f"{self.classes} classes"
        return f"{self.name}: {len(self.train.y)} + {len(self.test.y)} {kind}, {what}"

    @property
    def outputs(self) -> int:
        """Number of outputs a network needs: the classes, or the numbers to predict per sample."""
        return self.classes or math.prod(self.train.y.shape[1:])


def load(source: str, loss: str | None = None) -> Dataset:
    """Load `digits` or `wine` from scikit-learn, an .npz file, or a data set of OpenML.

    Digits are 8 x 8 scans in ten classes, wine has three classes and 13 columns, from 0.1 to 1 680. The file
    holds x_train, y_train, x_test and y_test; x is (N, F), (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float; y
    holds whole numbers for classes, or real numbers to predict (then N or N x K). The channel axis is the one
    smaller than both others. Everything else is a name (`mnist` is mnist_784) or an id of OpenML, which scikit-learn
    fetches once and keeps; a quarter becomes the test part (of MNIST the last 10 000).
    `loss` decides for `mse` and `mae` that whole numbers are to be predicted rather than classified.
    Raises NormValueError for data that is missing or cannot be used, saying where.
    """
    if source in _EMBEDDED:
        return _embedded(source)
    path = Path(source)
    if path.suffix == ".npz":
        if not path.is_file():
            raise NormValueError(message("`data` must be a file that exists", repr(source)))
        return from_arrays(path.name, _read(path), loss)
    if path.suffix or len(path.parts) != 1:
        must = "`data` must be digits, the path of an .npz file, file.py:name, or a name or id of OpenML"
        raise NormValueError(message(must, repr(source), "save x_train, y_train, x_test, y_test with numpy.savez"))
    return _openml(source, loss)


def is_arrays(value: Any) -> bool:
    """Whether this is ((x_train, y_train), (x_test, y_test)), the four in a row, or a mapping with their names."""
    if isinstance(value, Mapping):
        return set(KEYS) <= set(value)
    flat = _flat(value)
    return len(flat) == 4 and all(hasattr(part, "shape") for part in flat)


def from_arrays(name: str, value: Any, loss: str | None = None) -> Dataset:
    """Check arrays as :func:`is_arrays` describes them. Raises NormValueError for what cannot be used."""
    arrays = (
        {key: value[key] for key in KEYS} if isinstance(value, Mapping) else dict(zip(KEYS, _flat(value), strict=True))
    )
    return _checked(name, {key: np.asarray(array) for key, array in arrays.items()}, loss)


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, tuple | list):
        return []
    if len(value) == 2 and all(isinstance(part, tuple | list) and len(part) == 2 for part in value):
        return [*value[0], *value[1]]
    return list(value)


def split(y: NDArray[Any], count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the rest and of `count` samples. Whole numbers are classes: each gives its share, rounded.

    The shares that were rounded down furthest give the samples that are still missing.
    """
    if y.dtype.kind == "f":
        y = np.zeros(len(y), np.int64)
    classes, sizes = np.unique(y, return_counts=True)
    exact = sizes * count / len(y)
    taken = np.floor(exact).astype(int)
    order = np.argsort(-(exact - taken), kind="stable")
    taken[order[: count - taken.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(y), dtype=bool)
    for label, take in zip(classes, taken, strict=True):
        chosen[rng.permutation(np.flatnonzero(y == label))[:take]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class Prepared(NamedTuple):
    """The three parts, scaled alike. Numbers to predict have mean 0 and standard deviation 1 in the training part."""

    train: Part
    validation: Part
    test: Part


def prepare(data: Dataset, inputs: str, conditions: Conditions = AS_USUAL) -> Prepared:
    """Set a stratified fifth of the training data apart for validation and scale all three parts.

    `inputs` is fitted on what is left for training, spoiled samples included. Labels and inputs are spoiled in that
    part alone: what chooses the rate and what is reported stay clean.
    """
    rest, held = split(data.train.y, round(len(data.train.y) / 5), _VALIDATION_SEED)
    (x, y), test = data.train, data.test.x
    if conditions.appearance:
        x, test = lit(conditions.appearance, data.train, data.test, data.classes or 1)
    mine = spoiled_inputs(x[rest], conditions.outliers) if conditions.outliers else x[rest]
    xs = scale(inputs, mine, x[held], test)
    if conditions.sequences:  # after scaling, so that padding is 0
        xs = [cut(part, number) for number, part in enumerate(xs)]
    ys = [y[rest], y[held], data.test.y]
    if conditions.label_noise:
        ys[0] = spoiled_labels(ys[0], conditions.label_noise, data.outputs)
    if data.classes is None:
        ys = list(scale("standard", *ys))
    return Prepared(*(Part(part, labels) for part, labels in zip(xs, ys, strict=True)))


def scale(inputs: str, fitted: NDArray[Any], *others: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Scale all arrays by what `fitted` says: images with one value per channel, tables with one per column.

    `max` divides by max|x|, `minmax` maps to 0..1, `standard` to mean 0 and standard deviation 1, `none` only converts
    to float32. What is constant in `fitted` becomes 0. One value per pixel would blow up pixels that are almost always
    empty: 88 standard deviations on digits.
    """
    axes = (0, 2, 3) if fitted.ndim == 4 else (0,)
    x = fitted.astype(np.float64)
    shift: Any = np.zeros_like(x, shape=(1,))
    width: Any = np.ones_like(shift)
    if inputs == "max":
        width = np.abs(x).max(axes, keepdims=True)
    elif inputs == "minmax":
        shift = x.min(axes, keepdims=True)
        width = x.max(axes, keepdims=True) - shift
    elif inputs == "standard":
        shift = x.mean(axes, keepdims=True)
        # The spread of a constant column is rounding, not 0, where its value is no binary fraction.
        constant = x.max(axes, keepdims=True) == x.min(axes, keepdims=True)
        width = np.where(constant, 0.0, x.std(axes, keepdims=True))
    factor = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
    return [((array.astype(np.float64) - shift) * factor).astype(np.float32) for array in (fitted, *others)]


def _embedded(source: str) -> Dataset:
    table = _table(source)
    x, y = table[:, :-1].astype(np.float32), table[:, -1].astype(np.int64)
    if source == "digits":
        x = x.reshape(-1, 1, 8, 8)
    train, test = split(y, _EMBEDDED[source], _SPLIT_SEED)
    return Dataset(source, Part(x[train], y[train]), Part(x[test], y[test]), classes=int(y.max()) + 1)


def _table(source: str) -> NDArray[np.float64]:
    """A table that scikit-learn brings with it; the label is the last column.

    Read without importing it, which takes a second or more, longer than small networks train.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        must = f"the data `{source}` needs scikit-learn, which is not installed"
        raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'"))
    folder = Path(found.origin).parent / "datasets" / "data"
    name, heading = {"digits": ("digits.csv.gz", 0), "wine": ("wine_data.csv", 1)}[source]
    return np.loadtxt(folder / name, delimiter=",", skiprows=heading)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Opened here, because NumPy leaves the file of a broken archive open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                got = ", ".join(file.files) or "nothing"
                raise NormValueError(message(f"{path.name} must hold {', '.join(KEYS)}", f"{got}", f"add {missing[0]}"))
            return {key: _array(path, file, key) for key in KEYS}
    except NormValueError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        # TypeError: a lone array under the name .npz is no context manager.
        must = f"{path.name} must be an .npz archive that numpy.savez wrote"
        raise NormValueError(message(must, str(error).splitlines()[0])) from error


def _array(path: Path, file: Any, key: str) -> NDArray[Any]:
    try:
        return np.asarray(file[key])
    except ValueError as error:
        # NumPy refuses object arrays here, because unpickling them would run code from the file.
        must = f"{key} in {path.name} must be an array of numbers"
        raise NormValueError(message(must, "Python objects", "convert it with numpy.stack or .astype")) from error


def _openml(source: str, loss: str | None) -> Dataset:
    try:
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        must = f"the data `{source}` of OpenML needs scikit-learn, which is not installed"
        raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error
    asked: dict[str, Any] = (
        {"data_id": int(source)}
        if source.isdecimal()
        else {"name": _OPENML.get(source.lower(), source), "version": "active"}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several active versions: the newest is taken, and named below
            bunch = fetch_openml(**asked, as_frame=False, parser="liac-arff")
    except Exception as error:
        must = f"`data` must be digits, an .npz file, file.py:name, or a data set of OpenML; `{source}` cannot be had"
        hint = "known without a connection: digits" if isinstance(error, OSError) else "see openml.org for names"
        raise NormValueError(message(f"{must} ({type(error).__name__}: {error})", hint=hint)) from error
    x, y = np.asarray(bunch.data, dtype=np.float32), np.asarray(bunch.target)
    if loss not in REGRESSION and y.dtype.kind not in "fc":
        _, y = np.unique(y.astype(str), return_inverse=True)
    elif y.dtype.kind not in "uif":
        raise NormValueError(message(f"the target of {source} must be numbers for {loss}", f"dtype {y.dtype}"))
    if x.shape[1] == 784 and "mnist" in str(bunch.details.get("name", source)).lower():
        x = x.reshape(-1, 28, 28)
    if len(y) == 70_000 and x.ndim == 3:
        train, test = np.arange(60_000), np.arange(60_000, 70_000)  # as MNIST was published
    else:
        train, test = split(y, round(len(y) / 4), _SPLIT_SEED)
    name = f"{bunch.details.get('name', source)} (OpenML {bunch.details.get('id', source)})"
    arrays = {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
    return _checked(name, arrays, loss)


def _checked(name: str, arrays: dict[str, NDArray[Any]], loss: str | None) -> Dataset:
    for key in KEYS:
        if arrays[key].size == 0:
            raise NormValueError(message(f"{key} must not be empty", f"shape {arrays[key].shape}"))
    numbers = loss in REGRESSION or (arrays["y_train"].dtype.kind == "f" and loss != "cross_entropy")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if y.ndim == 2 and y.shape[1] == 1:  # as Keras stores CIFAR
            y = arrays[f"y_{part}"] = y[:, 0]
        _check_inputs(f"x_{part}", x)
        if numbers:
            _check_numbers(f"y_{part}", y, loss)
        else:
            _check_labels(f"y_{part}", y)
        if len(x) != len(y):
            must = f"x_{part} and y_{part} must have the same length"
            raise NormValueError(message(must, f"{len(x)} and {len(y)}"))
    for kind, what in (("x", "samples"), ("y", "values")):
        if arrays[f"{kind}_train"].shape[1:] != arrays[f"{kind}_test"].shape[1:]:
            got = f"{arrays[f'{kind}_train'].shape[1:]} and {arrays[f'{kind}_test'].shape[1:]}"
            must = f"{what} of {kind}_train and {kind}_test must have the same shape"
            raise NormValueError(message(must, got))
    if len(arrays["y_train"]) < 10:
        must = "x_train must hold at least 10 samples, a fifth is set apart for validation"
        raise NormValueError(message(must, len(arrays["y_train"])))
    recode, classes = (lambda y: y.astype(np.float32), None) if numbers else _coded(arrays["y_train"], arrays["y_test"])
    nchw = _layout(arrays["x_train"].shape)
    parts = [
        Part(np.ascontiguousarray(nchw(arrays[f"x_{part}"]), dtype=np.float32), recode(arrays[f"y_{part}"]))
        for part in ("train", "test")
    ]
    return Dataset(name, parts[0], parts[1], classes=classes)


def _coded(train: NDArray[Any], test: NDArray[Any]) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], int]:
    """The function that counts labels from 0, and the number of classes."""
    classes = np.unique(train)
    if len(classes) < 2:
        raise NormValueError(message("y_train must hold at least 2 classes", f"only {classes[0]}"))
    unknown = np.setdiff1d(test, classes)
    if len(unknown):
        must = "every label of y_test must appear in y_train"
        raise NormValueError(message(must, ", ".join(map(str, unknown[:5]))))
    return lambda y: np.searchsorted(classes, y).astype(np.int64), len(classes)


def _check_inputs(key: str, x: NDArray[Any]) -> None:
    if x.ndim not in (2, 3, 4):
        raise NormValueError(message(f"{key} must be (N, F), (N, H, W), (N, H, W, C) or (N, C, H, W)", x.shape))
    if x.dtype.kind not in "uif":
        raise NormValueError(message(f"{key} must hold real numbers", f"dtype {x.dtype}"))
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(x.astype(np.float32))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        value = "NaN" if np.isnan(x[first]) else f"{x[first]:g}"
        must = f"{key} must be finite in float32"
        raise NormValueError(message(must, f"{int(bad.sum())} values that are not, the first at {first} is {value}"))


def _check_numbers(key: str, y: NDArray[Any], loss: str | None) -> None:
    if y.ndim not in (1, 2) or y.dtype.kind not in "uif":
        raise NormValueError(message(f"{key} must be real numbers (N,) or (N, K)", f"{y.dtype} of shape {y.shape}"))
    if not np.isfinite(y).all():
        raise NormValueError(message(f"{key} must be finite", f"{y[~np.isfinite(y)][0]}"))
    if loss is None and np.equal(y, np.round(y)).all() and len(np.unique(y)) <= _FEW:
        must = f"{key} must be whole numbers for classes, or real numbers to predict"
        hint = "for classes convert it with .astype(int); to predict these numbers give the loss, mse or mae"
        raise NormValueError(message(must, f"whole numbers as {y.dtype}", hint))


def _check_labels(key: str, y: NDArray[Any]) -> None:
    if y.ndim != 1:
        hint = "turn one-hot rows into numbers with .argmax(1)" if y.ndim == 2 else None
        raise NormValueError(message(f"{key} must be (N,)", f"shape {y.shape}", hint))
    if y.dtype.kind not in "ui":
        must = f"{key} must hold whole numbers, one per class"
        raise NormValueError(message(must, f"dtype {y.dtype}", "convert it with .astype(int)"))
    if y.min() < 0:
        first = int(np.argmax(y < 0))
        raise NormValueError(message(f"{key} must hold labels of at least 0", f"{y[first]} at {first}"))


def _layout(shape: tuple[int, ...]) -> Any:
    """The function that brings inputs of this shape to (N, C, H, W), or leaves (N, F) alone."""
    if len(shape) == 2:
        return lambda x: x
    if len(shape) == 3:
        return lambda x: x[:, None]
    _, a, b, c = shape
    # At most one of the two can hold: a channel axis is smaller than both axes of the image.
    if c < min(a, b):
        return lambda x: x.transpose(0, 3, 1, 2)
    if a < min(b, c):
        return lambda x: x
    # Rather refused than trained on pictures cut the wrong way.
    must = "x_train must have a channel axis, first or last, that is smaller than both axes of the image"
    raise NormValueError(message(must, shape, "save images of one channel as (N, H, W)"))
