"""The verb `recalibrate`: population statistics in place of running averages that have not converged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from normkit.core.constraints import Constraint, Flag, Integer, OneOf, Optional, check
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery import batches
from normkit.surgery.population import Measure, layers_of, population, replaced, score
from normkit.surgery.protocol import Recording, recording

__all__ = ["ARGUMENTS", "measure_of", "recalibrate"]

ARGUMENTS: dict[str, Constraint] = {
    "exact": Flag(),
    "steps": Optional(Integer(1)),
    "keep": OneOf(("new", "best")),
    "return_report": Flag(),
}


def recalibrate(
    model: Any,
    data: Any,
    *,
    exact: bool = False,
    steps: int | None = None,
    held_out: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    keep: str = "new",
    return_report: bool = False,
) -> Any:
    """Replace the running statistics of every batch norm by those of the whole data, in place.

    mean = sum n_k mean_k / n, var = sum n_k (var_k + (mean_k - mean)^2) / n over the batches k of n_k values: the
    moments of all inputs of a layer as one batch (arXiv:2105.07576, "precise" batch norm), in float64, whatever the
    size and the order of the batches. The layers keep them by their own convention: with Bessel's factor or without, as
    a standard deviation for renorm. Instance norm keeps averages over samples, as its running statistics are.

    The model runs in evaluation mode (no dropout), but for the statistics themselves: every batch is normalized by its
    own, which is what deeper layers were trained on. Their inputs thus depend, a little, on how the data is cut. With
    `exact` a layer sees inputs normalized by the population statistics of the layers before it: the result is that of
    one giant batch. That takes as many passes over the data as norms are called.

    Nothing else changes: weights, modes, momentum, counts of batches, random numbers. Frozen layers keep what they have
    (`normkit.freeze`, evaluation mode inside a training model, in Keras `trainable=False`; calling a layer with
    `training=False` protects nothing there, as it does not in training). Where anything fails or is
    interrupted, nothing changes at all. Masks that our layers are called with are heeded; sample weights are refused.

    New statistics are not always better: after averaging of weights the averaged ones can be enough. Look at the
    report, or let `keep="best"` decide on data that took no part.

    Where torch.distributed is running, the statistics are those of the data of all processes, the same everywhere, and
    every process has to call this. Numbers of batches may differ.

    Args:
        model: a torch.nn.Module, a built Keras model or an nnx.Module.
        data: inputs (N, ...) as one array or tensor, taken in batches of at most 256, or a pair of such inputs and
            targets; or an iterable of batches, each an array, a dictionary of named inputs, or a tuple whose first
            element is the input. Batches of one size that fills memory well, in an order that mixes the classes, come
            closest to training.
        exact: layer by layer. `data` must then give the same samples every time it is read.
        steps: take so many batches, at most; some thousand samples are plenty. None: all.
        held_out: data to measure on before and after, like `data`, with targets. Without `loss`, inputs alone will do,
            and the change of the outputs is measured.
        loss: `loss(outputs, targets)`, the mean over a batch; lower is better.
        keep: "new", or "best", which takes the new statistics only where the loss is no higher with them.
        return_report: return (model, report); the report prints, has one row per layer, and can `undo()`.

    Returns:
        The model, or (model, report).

    Raises:
        NormTypeError: for what is no model or no data.
        NormValueError: for a model without batch norms that could be recalibrated, or that calls none of them; without
            data; for batches with one value per channel (unless `exact`), or values that are not finite; for
            `keep="best"` without a loss.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> x = 5 + torch.randn(1000, 3)
        >>> out = normkit.recalibrate(model, x).eval()(x)
        >>> bool(out.mean(0).abs().max() < 1e-4), bool((out.std(0) - 1).abs().max() < 1e-3)
        (True, True)
        >>> model, report = normkit.recalibrate(model, x, held_out=x, return_report=True)
        >>> [(layer.path, layer.values) for layer in report.layers], report.after  # the same data again: no change
        ([('1', 1000)], 0.0)
    """
    check("recalibrate", ARGUMENTS, {"exact": exact, "steps": steps, "keep": keep, "return_report": return_report})
    side = recording(framework_of(model))
    layers = layers_of(side, model)
    if exact:
        batches.repeatable("data", data)
    measure = measure_of(side, model, held_out, loss)
    if keep == "best" and measure.name != "loss":
        must = '`keep="best"` needs `loss` and `held_out`'
        raise NormValueError(message(must, hint="loss=torch.nn.functional.cross_entropy, held_out=loader"))
    report = replaced(side, layers, lambda: population(side, model, layers, data, steps, exact), measure, keep)
    return (model, report) if return_report else model


def measure_of(
    side: Recording, model: Any, held_out: Any, loss: Callable[[Any, Any], Any] | None, steps: int | None = None
) -> Measure:
    """What to measure before and after, on at most `steps` batches; measured twice, in this order."""
    if loss is not None and not callable(loss):
        raise NormTypeError(message("`loss` must be a function of outputs and targets", repr(loss)))
    if held_out is None:
        if loss is not None:
            raise NormValueError(message("`loss` needs data to be measured on", hint="held_out=loader"))
        return Measure("", lambda: None)
    batches.repeatable("held_out", held_out)
    if loss is not None:
        return Measure("loss", lambda: score(side, model, held_out, loss, steps))
    return Measure("outputs", _Outputs(side, model, held_out, steps))


class _Outputs:
    """The change of the outputs since the first call: the root of its mean square, over that of the outputs."""

    def __init__(self, side: Recording, model: Any, held_out: Any, steps: int | None) -> None:
        self._side, self._model, self._held_out, self._steps = side, model, held_out, steps
        self._before: list[np.ndarray] = []

    def __call__(self) -> float | None:
        found: list[np.ndarray] = []

        def changed(outputs: Any, _: Any) -> float:
            found.append(self._side.array(outputs))
            return float(np.square(found[-1] - self._before[len(found) - 1]).mean()) if self._before else 0.0

        change = score(self._side, self._model, self._held_out, changed, self._steps)
        if not self._before:
            self._before = found
            return None
        size = sum(float(np.square(y).sum()) for y in self._before) / sum(y.size for y in self._before)
        return math.sqrt(change / size if size else change)
