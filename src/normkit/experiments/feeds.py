"""Where a trial's batches come from: arrays, the user's data sets, or the user's loaders."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit.errors import NormTypeError, NormValueError, message
from normkit.experiments.code import call, takes
from normkit.experiments.conditions import AS_USUAL, Conditions, by_pairs
from normkit.experiments.data import Dataset, Prepared, from_arrays, is_arrays, prepare
from normkit.experiments.protocol import Batch

__all__ = ["ArrayFeed", "DatasetFeed", "Feed", "LoaderFeed", "epoch_seed", "feed_for"]

_CHUNK = 1000  # samples per evaluation call, for memory
_HELD = 1  # seed of the samples that a data set without a validation part gives for it


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of the random numbers of one epoch; that of the trial itself is for the network."""
    return seed + 1000 * (epoch + 1)


class Feed(ABC):
    """Batches of training, validation and test.

    Attributes:
        shape: of one sample, None where samples are no arrays.
        outputs: outputs that a network needs: classes, or numbers per sample; None where it is not known.
        classes: number of classes, None where numbers are predicted.
        spread: variance and mean absolute deviation of the numbers to predict, None for classes or where not known.
        samples: of the training part.
        own_batches: the batch size that the user's loader gives, None where it can be chosen.
        scalable: whether inputs can be scaled.
        tested: whether there is a test part of its own; else the validation part takes its place.
        fingerprint: of the content, as far as it can be known; empty where the code alone tells it.
    """

    shape: tuple[int, ...] | None
    outputs: int | None
    classes: int | None
    spread: tuple[float, float] | None
    samples: int
    own_batches: int | None = None
    scalable: bool = False
    tested: bool = True
    fingerprint: str

    @abstractmethod
    def steps(self, batch_size: int) -> int:
        """Batches per epoch."""

    @abstractmethod
    def batches(self, inputs: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """The training batches of one epoch, the same for all variants."""

    @abstractmethod
    def validation(self, inputs: str) -> Iterable[Batch]:
        """The part that chooses the rate."""

    @abstractmethod
    def test(self, inputs: str) -> Iterable[Batch]:
        """The part that is scored once, after training."""


class ArrayFeed(Feed):
    """Arrays, shuffled anew each epoch, in full batches only: a short one would have statistics of its own."""

    scalable = True

    def __init__(self, data: Dataset, conditions: Conditions = AS_USUAL) -> None:
        self.data, self._prepared = data, dict[str, Prepared]()
        self._conditions = conditions
        self.shape, self.classes, self.fingerprint = data.shape, data.classes, data.fingerprint
        self.outputs = data.outputs
        first = self._parts("none")
        self.samples = len(first.train.y)
        self.spread = None if data.classes else _spread(first.train.y)

    def __str__(self) -> str:
        return str(self.data)

    def steps(self, batch_size: int) -> int:
        """Full batches."""
        return self.samples // batch_size

    def batches(self, inputs: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """In an order that depends on seed and epoch alone."""
        x, y = self._parts(inputs).train
        for number, rows in enumerate(_rows(len(y), batch_size, seed, epoch)):
            if self._conditions.by_class:
                rows = rows[by_pairs(y[rows], seed, epoch, number)]
            yield x[rows], y[rows]

    def validation(self, inputs: str) -> Iterator[Batch]:
        """A fifth of the training data, stratified."""
        return _chunks(*self._parts(inputs).validation)

    def test(self, inputs: str) -> Iterator[Batch]:
        """The test data."""
        return _chunks(*self._parts(inputs).test)

    def under(self, conditions: Conditions) -> ArrayFeed:
        """The same data under other conditions. Raises NormValueError where it cannot be under these."""
        for name in ("label_noise", "by_class", "appearance"):
            if getattr(conditions, name) and self.classes is None:
                raise NormValueError(message(f"{name} must be asked of data with classes", "numbers to predict"))
        for name in ("appearance", "sequences"):
            if getattr(conditions, name) and not self.data.is_images:
                got = f"rows of {self.data.shape[0]} columns"
                raise NormValueError(message(f"{name} must be asked of images", got))
        return ArrayFeed(self.data, conditions)

    def _parts(self, inputs: str) -> Prepared:
        if inputs not in self._prepared:
            self._prepared[inputs] = prepare(self.data, inputs, self._conditions)
        return self._prepared[inputs]


class DatasetFeed(Feed):
    """Data sets with a length and samples (x, y) by number, as PyTorch's: sampled anew each epoch, augmentation too.

    Without a validation part a random fifth of the training samples becomes it.
    """

    def __init__(self, name: str, parts: Sequence[Any]) -> None:
        self.name = name
        train, *middle, last = parts if len(parts) > 1 else (parts[0], None)
        for part in parts:
            if len(part) == 0:
                raise NormValueError(message(f"every part of {name} must hold samples", "an empty data set"))
        rows = np.arange(len(train))
        self.tested = last is not None
        self._test = last
        self._validation: tuple[Any, NDArray[np.int64]]
        self.held_out = not middle  # validation comes from the training samples
        if middle:
            self._validation = middle[0], np.arange(len(middle[0]))
        else:
            held = np.random.default_rng(_HELD).permutation(rows)[: max(1, len(train) // 5)]
            self._validation = train, np.sort(held)
            rows = np.setdiff1d(rows, held)
        self._train, self._kept = train, rows
        self.samples = len(rows)
        digest, targets = _Digest(name), []
        for part in parts:
            digest.part()
            for row in range(len(part)):
                x, y = _pair(name, part[row])
                digest.add([x], [y])
                if part is train:
                    targets.append(np.asarray(y))
        self.shape = digest.shape
        self.classes, self.outputs, self.spread = _targets(np.stack(targets)[rows])
        self.fingerprint = digest.text()

    def __str__(self) -> str:
        return f"{self.name}: {self.samples} samples for training"

    def steps(self, batch_size: int) -> int:
        """Full batches."""
        return self.samples // batch_size

    def batches(self, inputs: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:  # noqa: ARG002
        """In an order that depends on seed and epoch alone."""
        for rows in _rows(self.samples, batch_size, seed, epoch):
            yield self._collated(self._train, self._kept[rows])

    def validation(self, inputs: str) -> Iterator[Batch]:  # noqa: ARG002
        """The validation part."""
        part, rows = self._validation
        for start in range(0, len(rows), _CHUNK):
            yield self._collated(part, rows[start : start + _CHUNK])

    def test(self, inputs: str) -> Iterator[Batch]:
        """The test part, or the validation part where there is none."""
        if self._test is None:
            yield from self.validation(inputs)
            return
        for start in range(0, len(self._test), _CHUNK):
            yield self._collated(self._test, np.arange(start, min(start + _CHUNK, len(self._test))))

    def _collated(self, part: Any, rows: NDArray[np.int64]) -> Batch:
        pairs = [_pair(self.name, part[int(row)]) for row in rows]
        try:
            return np.stack([np.asarray(x) for x, _ in pairs]), np.stack([np.asarray(y) for _, y in pairs])
        except ValueError as error:
            must = f"samples of {self.name} must have the same shape"
            raise NormValueError(message(must, str(error), "give loaders with a collate function")) from error


class LoaderFeed(Feed):
    """Loaders that give batches (x, y), as PyTorch's. They shuffle with seeded random numbers, global or their own.

    `make(batch_size)` gives (train, validation) or (train, validation, test); without a test part the validation part
    is scored in its place. A pass over the training part counts its batches; every epoch must have as many.
    """

    def __init__(self, name: str, make: Callable[[int | None], Sequence[Any]], own: bool) -> None:
        self.name, self._make, self._made = name, make, dict[int | None, Sequence[Any]]()
        self._counts: dict[int | None, int] = {}
        self._own = own
        digest, targets, sizes = _Digest(name), [], []
        for number, loader in enumerate(self._parts(None)):
            digest.part()
            for x, y in self._batches(loader, 0):
                y = np.asarray(y)
                if y.ndim == 0:
                    must = f"a batch of {name} must have a target for each of its samples"
                    raise NormValueError(message(must, "a single one", "lists are taken for batches (x, y)"))
                digest.add(x, y)
                if number == 0:
                    targets.append(y)
                    sizes.append(len(y))
        if not sizes:
            raise NormValueError(message(f"the training loader of {name} must give batches", "none"))
        self._counts[None] = len(sizes)
        self.own_batches = sizes[0] if own else None
        self.samples = sum(sizes)
        self.tested = len(self._parts(None)) > 2
        self.shape = digest.shape
        together = np.concatenate(targets) if len({target.shape[1:] for target in targets}) == 1 else None
        self.classes, self.outputs, self.spread = (None, None, None) if together is None else _targets(together)
        self.fingerprint = digest.text()

    def __str__(self) -> str:
        return f"{self.name}: loaders, {self.samples} samples for training"

    def steps(self, batch_size: int) -> int:
        """Batches of one pass over the training loader."""
        asked = None if self._own else batch_size
        if asked not in self._counts:
            self._counts[asked] = sum(1 for _ in self._batches(self._parts(asked)[0], 0))
        return self._counts[asked]

    def batches(self, inputs: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:  # noqa: ARG002
        """Whatever the loader gives. Raises NormValueError where it gives another number of batches than before."""
        expected, count = self.steps(batch_size), 0
        for batch in self._batches(self._parts(None if self._own else batch_size)[0], epoch_seed(seed, epoch)):
            count += 1
            if count <= expected:
                yield batch
        if count != expected:
            must = f"the training loader of {self.name} must give the same number of batches in every epoch"
            raise NormValueError(message(must, f"{expected}, then {count}"))

    def validation(self, inputs: str) -> Iterator[Batch]:  # noqa: ARG002
        """The second loader."""
        yield from self._some(1, "validation")

    def test(self, inputs: str) -> Iterator[Batch]:
        """The third loader, or the second where there is none."""
        if self.tested:
            yield from self._some(2, "test")
        else:
            yield from self.validation(inputs)

    def _some(self, number: int, part: str) -> Iterator[Batch]:
        empty = True
        for batch in self._batches(self._parts(next(iter(self._made)))[number], 0):
            empty = False
            yield batch
        if empty:
            raise NormValueError(message(f"the {part} loader of {self.name} must give batches", "none"))

    def _batches(self, loader: Any, seed: int) -> Iterator[Batch]:
        # A loader with random numbers of its own would go on from trial to trial.
        for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator: Any = getattr(owner, "generator", None)
            if hasattr(generator, "manual_seed"):
                generator.manual_seed(seed)
        for batch in loader:
            yield _pair(self.name, batch)

    def _parts(self, batch_size: int | None) -> Sequence[Any]:
        if batch_size not in self._made:
            self._made[batch_size] = self._make(batch_size)
        return self._made[batch_size]


def feed_for(name: str, value: Any, loss: str | None, batch_sizes: Sequence[int] | None) -> Feed:
    """The feed for what a `file.py:name` gave, which may be a function that gives it, also one of `batch_size`."""
    if isinstance(value, Dataset):
        return ArrayFeed(value)
    if callable(value) and not hasattr(value, "__getitem__"):
        if takes(value, "batch_size"):
            smallest = min(batch_sizes or (32,))

            def make(batch_size: int | None) -> Sequence[Any]:
                return _named(name, call(name, value, batch_size=smallest if batch_size is None else batch_size))

            return LoaderFeed(name, make, own=False)
        value = call(name, value)
    if is_arrays(value):
        return ArrayFeed(from_arrays(name, value, loss))
    parts = _named(name, value)
    if all(hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, list) for part in parts):
        return DatasetFeed(name, parts)
    if len(parts) < 2:
        must = f"{name} must give at least a training and a validation loader"
        raise NormValueError(message(must, "one loader", "give (train, validation) or (train, validation, test)"))
    feed = LoaderFeed(name, lambda _: parts, own=True)
    if batch_sizes is not None and tuple(batch_sizes) != (feed.own_batches,):
        must = f"`batch_sizes` must be left to the loaders of {name}"
        hint = "write a function of `batch_size` that gives the loaders"
        raise NormValueError(message(must, ", ".join(map(str, batch_sizes)), hint))
    return feed


_WHAT = "arrays (x_train, y_train, x_test, y_test), data sets or loaders (train, validation, test)"


def _named(name: str, value: Any) -> list[Any]:
    """Train, validation and test, as far as they are there."""
    if isinstance(value, Mapping):
        unknown = set(value) - {"train", "validation", "test"}
        if unknown or "train" not in value:
            raise NormValueError(message(f"{name} must give {_WHAT}", f"the names {', '.join(map(str, value))}"))
        return [value[part] for part in ("train", "validation", "test") if part in value]
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if not 1 <= len(parts) <= 3 or any(not hasattr(p, "__iter__") and not hasattr(p, "__getitem__") for p in parts):
        got = ", ".join(type(part).__name__ for part in parts[:5])
        raise NormTypeError(message(f"{name} must give {_WHAT}", got or "nothing"))
    return parts


def _pair(name: str, batch: Any) -> Batch:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"{len(batch)} values" if isinstance(batch, tuple | list) else type(batch).__name__
    hint = "write a training loop of your own: def train(trial): ..."
    raise NormValueError(message(f"{name} must give pairs (x, y)", got, hint))


def _rows(samples: int, batch_size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng([seed, 0])
    for _ in range(epoch + 1):
        order = rng.permutation(samples)
    for start in range(0, samples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _chunks(x: NDArray[Any], y: NDArray[Any]) -> Iterator[Batch]:
    for start in range(0, len(y), _CHUNK):
        yield x[start : start + _CHUNK], y[start : start + _CHUNK]


def _targets(y: NDArray[Any]) -> tuple[int | None, int | None, tuple[float, float] | None]:
    """Classes, outputs and spread of all targets of the training part."""
    if y.dtype.kind in "iub":
        if y.min() < 0:
            raise NormValueError(message("labels must be at least 0", y.min()))
        classes = int(y.max()) + 1
        return classes, classes, None
    return None, int(np.prod(y.shape[1:])), _spread(y)


def _spread(y: NDArray[Any]) -> tuple[float, float]:
    y = y.astype(np.float64)
    return float(y.var(axis=0).mean()), float(np.abs(y - np.median(y, axis=0)).mean())


class _Digest:
    """A hash of all samples, whatever their order in each part, since loaders shuffle. Refuses values like NaN."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shape: tuple[int, ...] | None = None  # of a sample, None where samples are no arrays
        self._sums: list[int] = []

    def part(self) -> None:
        """Another part begins."""
        self._sums.append(0)

    def add(self, xs: Any, ys: Any) -> None:
        """Count samples in."""
        if not (isinstance(xs, list) or hasattr(xs, "shape")):
            xs = [repr(type(xs))] * len(ys)  # a mapping of arrays, or the like: only the targets tell
        for x, y in zip(xs, ys, strict=False):
            digest = hashlib.sha256()
            for array in (np.asarray(x), np.asarray(y)):
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    must = f"samples of {self.name} must be finite"
                    raise NormValueError(message(must, f"{array[~np.isfinite(array)].flat[0]}"))
                digest.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())
            self._sums[-1] += int.from_bytes(digest.digest()[:8], "little")
            self.shape = np.shape(x) if np.ndim(x) else None

    def text(self) -> str:
        """Sixteen hexadecimal digits."""
        return hashlib.sha256(repr((self.shape, self._sums)).encode()).hexdigest()[:16]
