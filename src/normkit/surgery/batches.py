"""Data as users have it: one array, a loader, a list of batches, with labels or without."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from normkit.errors import NormTypeError, NormValueError, message

__all__ = ["inputs", "labelled", "raw", "repeatable", "size", "whole"]

_CHUNK = 256  # samples of an array that make a batch, at most


def inputs(data: Any, steps: int | None = None) -> Iterator[Any]:
    """The inputs of the model, batch by batch, of at most `steps` batches. Raises NormTypeError for what is no data."""
    return (x for x, _ in labelled(data, steps))


def labelled(data: Any, steps: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Inputs and targets, batch by batch; targets are None where there are none. Data as in :func:`inputs`."""
    return (parts for _, parts in raw(data, steps))


def raw(data: Any, steps: int | None = None, batch_size: int | None = None) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Every batch as the data gives it, and its inputs and targets as in :func:`labelled`.

    Arrays are cut into batches of `batch_size`, the last one shorter; by default of nearly equal sizes.
    """
    for batch in itertools.islice(_batches(data, batch_size), steps):
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        yield batch, (parts[0], parts[1] if len(parts) > 1 else None)


def size(x: Any) -> int:
    """The number of samples of a batch: the length of its first array."""
    while isinstance(x, Mapping | tuple | list):
        x = next(iter(x.values() if isinstance(x, Mapping) else x))
    return len(x)


def whole(data: Any) -> bool:
    """Whether data is all samples as arrays, inputs alone or with targets, and no iterable of batches."""
    return _is_array(data) or _is_pair(data)


def repeatable(name: str, data: Any) -> None:
    """Raise NormValueError for data that is gone once it has been read."""
    if isinstance(data, Iterator):
        must = f"`{name}` must be data that can be read several times"
        raise NormValueError(message(must, f"a {type(data).__name__}", "give a list of batches, or a loader"))


def _batches(data: Any, batch_size: int | None = None) -> Iterator[Any]:
    if _is_array(data):
        yield from _chunks(data, batch_size)
        return
    if _is_pair(data):
        yield from zip(*(_chunks(part, batch_size) for part in data), strict=True)
        return
    if not isinstance(data, Iterable) or isinstance(data, str | Mapping):
        must = "`data` must be an array, a tensor, or an iterable of batches"
        hint = "a list of it: [data] is one batch of named inputs" if isinstance(data, Mapping) else None
        raise NormTypeError(message(must, type(data).__name__, hint))
    yield from data


def _is_array(data: Any) -> bool:
    return hasattr(data, "__getitem__") and len(getattr(data, "shape", ())) > 0


def _is_pair(data: Any) -> bool:
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    # Named inputs with targets that are one array; two mappings are two batches.
    inputs = list(data[0].values()) if isinstance(data[0], Mapping) else [data[0]]
    return all(map(_is_array, (*inputs, data[1]))) and {len(part) for part in inputs} == {len(data[1])}


def _chunks(data: Any, batch_size: int | None = None) -> Iterator[Any]:
    if isinstance(data, Mapping):
        for chunk in zip(*(_chunks(part, batch_size) for part in data.values()), strict=True):
            yield dict(zip(data, chunk, strict=True))
        return
    size = len(data)
    if batch_size is not None:
        yield from (data[start : start + batch_size] for start in range(0, size, batch_size))
        return
    # Parts of nearly the same size: a last one of few samples would have no statistics to speak of.
    parts = max(1, math.ceil(size / _CHUNK)) if size else 0
    for part in range(parts):
        yield data[part * size // parts : (part + 1) * size // parts]
