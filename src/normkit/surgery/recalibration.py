"""The verb `recalibrate`: population statistics in place of running averages that have not converged."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from normkit.core.algebra import Pooled, merge, unbiased
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.protocol import recording

__all__ = ["recalibrate"]

_CHUNK = 256  # samples of an array that make a batch


def recalibrate(model: Any, data: Any) -> Any:
    """Replace the running statistics of every batch norm by those of the whole data, in place.

    One pass over the data, in which batch norms use their batches' statistics, as in training, and everything else is
    in evaluation mode (no dropout). A layer's new mean and variance are those of all its inputs as one batch: batches
    are weighted by their sizes, and the variance between their means counts, so how the data is cut into batches
    changes nothing at the first layer and little below it. Sums are kept in float64. Weights, modes, momentum, counts
    and random numbers stay as they are; frozen layers (in evaluation mode or, in Keras, not trainable) are left out.
    Where the pass fails nothing is changed.

    Args:
        model: a torch.nn.Module or a Keras model.
        data: inputs (N, ...) as one array or tensor, taken in batches of 256; or an iterable of batches, each an array
            or a tuple whose first element is the input. The labels are not used. Batches of one size that fills memory
            well, in an order that mixes the classes, come closest to training.

    Returns:
        The model.

    Raises:
        NormTypeError: for what is no model or no data.
        NormValueError: for a model without batch norms that could be recalibrated, and without data.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> x = 5 + torch.randn(1000, 3)
        >>> out = normkit.recalibrate(model, x).eval()(x)
        >>> bool(out.mean(0).abs().max() < 1e-4), bool((out.std(0) - 1).abs().max() < 1e-3)
        (True, True)
    """
    module = recording(framework_of(model))
    layers = list(module.recalibrated(model))
    if not layers:
        must = "`model` must hold batch norms with running statistics that are not frozen"
        raise NormValueError(message(must, type(model).__name__))
    moments: dict[int, Pooled] = {}

    def seen(number: int, count: float, mean: np.ndarray, var: np.ndarray) -> None:
        batch = Pooled(count, mean, var)
        before = moments.get(number)
        moments[number] = batch if before is None else merge(*zip(before, batch, strict=True))

    with module.watching(model, layers, seen) as forward:
        empty = True
        for x in _batches(data):
            empty = False
            forward(x)
    if empty:
        raise NormValueError(message("`data` must hold at least one batch", "none"))
    for number, found in moments.items():
        module.keep(layers[number], found.mean, found.var, functools.partial(unbiased, count=found.count))
    return model


def _batches(data: Any) -> Iterator[Any]:
    if hasattr(data, "shape") and hasattr(data, "__getitem__"):
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
        return
    if not isinstance(data, Iterable) or isinstance(data, str | dict):
        must = "`data` must be an array, a tensor, or an iterable of batches"
        raise NormTypeError(message(must, type(data).__name__))
    for batch in data:
        yield batch[0] if isinstance(batch, tuple | list) else batch
