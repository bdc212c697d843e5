"""Losses, metrics and optimizers by name, or the user's own; what they give is checked before it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normkit.errors import NormValueError, message

__all__ = ["called", "check_labels", "correct", "joined", "losses", "mean_loss", "named", "number", "optimizer_for"]

_CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
_DISTANCES: dict[str, Callable[[Any], Any]] = {"mse": jnp.square, "mae": jnp.abs}
# At a rate of 1: the rate multiplies what they give, so that another one needs no new compilation. The decay of AdamW
# is PyTorch's, Optax' own is a hundredth of it.
_OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(1.0),
    "adamw": optax.adamw(1.0, weight_decay=0.01),
}
_sgd: dict[float, optax.GradientTransformation] = {}


def called(function: Callable[..., Any], *arguments: Any, **named_arguments: Any) -> Any:
    """Call a function of the user's; what it raises becomes a NormValueError that names it."""
    from normkit.experiments.code import call

    return call(named(function), function, *arguments, **named_arguments)


def named(function: Callable[..., Any]) -> str:
    """The name of a function of the user's."""
    return getattr(function, "__name__", type(function).__name__)


def mean_loss(loss: str | Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """The mean loss of a batch, a scalar. Raises NormValueError where outputs and targets do not fit."""
    if isinstance(loss, str):
        return losses(loss, outputs, targets).mean()
    value = called(loss, outputs, targets)
    if not isinstance(value, jax.Array) or value.size != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, jax.Array) else type(value).__name__
        hint = "return the mean over the batch: .mean()"
        raise NormValueError(message(f"{named(loss)} must return an array of JAX with one number", got, hint))
    return value.reshape(())


def losses(loss: str, outputs: Any, targets: Any) -> Any:
    """The named loss of each sample (N,)."""
    if loss == "cross_entropy":
        each = _CROSS_ENTROPY(*_labelled(loss, outputs, targets))
    else:
        outputs, targets = _shaped(loss, outputs, targets)
        each = _DISTANCES[loss](outputs - targets)
    return _by_sample(each)


def correct(outputs: Any, targets: Any) -> Any:
    """The share of right classes of each sample (N,): 0 or 1 where a sample has one label."""
    scores, labels = _labelled("accuracy", outputs, targets)
    return _by_sample((scores.argmax(-1) == labels).astype(jnp.float32))


def check_labels(what: str, classes: int, labels: Any) -> None:
    """Raise NormValueError for labels that are not from 0 to `classes` - 1; a compiled step could not."""
    labels = np.asarray(labels)
    if not labels.size:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        worst = low if low < 0 else high
        advice = "labels count from 0" if low < 0 else f"the last layer needs {high + 1} outputs"
        got = f"label {worst} and {classes} outputs"
        raise NormValueError(message(f"{what} needs labels below the number of outputs", got, advice))


def number(metric: Callable[..., Any], outputs: Any, targets: Any) -> float:
    """The user's metric of all samples. Raises NormValueError where it is no number."""
    value = called(metric, outputs, targets)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        got = f"shape {tuple(value.shape)}" if isinstance(value, jax.Array) else type(value).__name__
        raise NormValueError(message(f"{named(metric)} must return one number", got)) from error


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one: arrays along their first axis, those in tuples and mappings one by one."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(joined(parts) for parts in zip(*batches, strict=True))
    if not isinstance(first, jax.Array):
        must = "a metric of your own needs outputs and targets that are arrays, or tuples or dictionaries of them"
        raise NormValueError(message(must, type(first).__name__))
    if len({batch.shape[1:] for batch in batches}) > 1:
        shapes = " and ".join(str(tuple(shape)) for shape in {batch.shape: None for batch in batches})
        raise NormValueError(message("a metric of your own needs samples of one shape in all batches", shapes))
    return jnp.asarray(np.concatenate(list(map(np.asarray, batches))))


def optimizer_for(
    optimizer: str | Callable[..., Any], parameters: Any, lr: float, momentum: float
) -> tuple[optax.GradientTransformation, float]:
    """The optimizer of a trial, and the rate that its updates are to be multiplied by.

    Raises NormValueError where the user's function gives none that can be used.
    """
    if optimizer == "sgd":
        return _sgd.setdefault(momentum, optax.sgd(1.0, momentum)), lr
    if isinstance(optimizer, str):
        return _OPTIMIZERS[optimizer], lr
    made = called(optimizer, parameters, lr)
    if not isinstance(made, optax.GradientTransformation):
        must = f"{named(optimizer)} must return a transformation of Optax"
        raise NormValueError(message(must, type(made).__name__, "return optax.sgd(lr)"))
    try:
        jax.eval_shape(lambda given: made.update(given, made.init(given), given), parameters)
    except Exception as error:
        must = f"{named(optimizer)} must return an optimizer that updates from gradients and parameters alone"
        raise NormValueError(message(must, f"{type(error).__name__}: {error}")) from error
    return made, 1.0


def _labelled(what: str, outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Outputs (N, *S, K) and labels (N, *S)."""
    _check_arrays(what, outputs, targets)
    if jnp.issubdtype(targets.dtype, jnp.inexact):
        advice = "y.astype(int), or the loss mse for numbers to predict"
        raise NormValueError(message(f"{what} needs labels that are whole numbers", str(targets.dtype), advice))
    if outputs.ndim < 2 or outputs.shape[:-1] != targets.shape:
        hint = None
        if outputs.ndim > 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
            hint = "the classes come last, jnp.moveaxis(outputs, 1, -1)"
        elif targets.ndim == 2 and targets.shape[1] == 1:
            hint = "y.squeeze(1)"
        got = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise NormValueError(message(f"{what} needs outputs (N, *S, classes) and labels (N, *S)", got, hint))
    return outputs, targets.astype(jnp.int32)


def _shaped(what: str, outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Outputs in the shape of the targets: a column (N, 1) for targets (N,) would spread to (N, N)."""
    _check_arrays(what, outputs, targets)
    if outputs.shape[:1] != targets.shape[:1] or outputs.size != targets.size:
        got = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise NormValueError(message(f"{what} needs as many outputs as targets for every sample", got))
    return outputs.reshape(targets.shape), targets.astype(outputs.dtype)


def _check_arrays(what: str, outputs: Any, targets: Any) -> None:
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, jax.Array):
            hint = "a loss and a metric of your own take (outputs, targets) as they are"
            raise NormValueError(message(f"{what} needs {name} that are an array", type(value).__name__, hint))


def _by_sample(values: Any) -> Any:
    return values.reshape(len(values), -1).mean(1)
