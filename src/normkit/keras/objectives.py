"""Losses, metrics and optimizers by name, or the user's own; what they give is checked before it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from normkit.errors import NormValueError, message

__all__ = [
    "are_shares",
    "by_name",
    "called",
    "check",
    "correct",
    "joined",
    "losses",
    "mean_loss",
    "named",
    "number",
    "optimizer_for",
]

# As PyTorch's defaults, so that the same question has the same answer with every framework.
_OPTIMIZERS: dict[str, Callable[[float], keras.optimizers.Optimizer]] = {
    "adam": lambda lr: keras.optimizers.Adam(lr, epsilon=1e-8),
    "adamw": lambda lr: keras.optimizers.AdamW(lr, weight_decay=0.01, epsilon=1e-8),
}
_LEAST = 1e-7  # a share of 0 has no logarithm


def called(function: Callable[..., Any], *arguments: Any, **named_arguments: Any) -> Any:
    """Call a function of the user's; what it raises becomes a NormValueError that names it."""
    from normkit.experiments.code import call

    return call(named(function), function, *arguments, **named_arguments)


def named(function: Callable[..., Any]) -> str:
    """The name of a function of the user's."""
    return getattr(function, "__name__", type(function).__name__)


def check(what: str, shape: Any, targets: Any) -> None:
    """Raise NormValueError where targets do not fit outputs of this shape, for a named loss or for `accuracy`."""
    for name, value in (("outputs", shape), ("targets", getattr(targets, "shape", None))):
        if not isinstance(value, tuple):
            hint = "a loss and a metric of your own take (outputs, targets) as they are"
            raise NormValueError(message(f"{what} needs {name} that are one array", type(value).__name__, hint))
    if what in ("mse", "mae"):
        # Without that a column (N, 1) for targets (N,) would spread to (N, N).
        if shape[:1] != targets.shape[:1] or np.prod(shape) != np.prod(targets.shape):
            got = f"{shape} and {targets.shape}"
            raise NormValueError(message(f"{what} needs as many outputs as targets for every sample", got))
        return
    column = targets.ndim == 2 and targets.shape[1] == 1
    advice = "y.argmax(-1)" if targets.shape == shape else "y.squeeze(1)" if column else None
    if targets.dtype.kind == "f":
        hint = advice or "y.astype(int), or the loss mse for numbers to predict"
        raise NormValueError(message(f"{what} needs labels that are whole numbers", str(targets.dtype), hint))
    if len(shape) < 2 or shape[:-1] != targets.shape:
        must = f"{what} needs outputs (N, *S, classes) and labels (N, *S)"
        raise NormValueError(message(must, f"{shape} and {targets.shape}", advice))
    if targets.size:
        low, high, classes = int(targets.min()), int(targets.max()), shape[-1]
        if low < 0 or high >= classes:
            worst = low if low < 0 else high
            hint = "labels count from 0" if low < 0 else f"the last layer needs {high + 1} outputs"
            got = f"label {worst} and {classes} outputs"
            raise NormValueError(message(f"{what} needs labels below the number of outputs", got, hint))


def are_shares(outputs: NDArray[Any]) -> bool:
    """Whether outputs are shares of classes, as a softmax gives them: at least 0 and 1 in sum, for every sample."""
    if outputs.ndim < 2 or not (outputs >= 0).all():
        return False
    return bool(np.allclose(outputs.sum(-1), 1, atol=1e-2 if outputs.dtype == np.float16 else 1e-3))


def by_name(loss: str) -> Callable[[Any, Any], Any]:
    """A named loss as a function of outputs and targets. The first outputs tell whether they are shares of classes."""
    shares: bool | None = None

    def mean(outputs: Any, targets: Any) -> Any:
        nonlocal shares
        if shares is None:
            known = ops.convert_to_numpy(targets)
            if loss == "cross_entropy" and (known == np.rint(known)).all():
                known = known.astype(int)  # models are given everything in the type they compute in
            check(loss, tuple(outputs.shape), known)
            shares = loss == "cross_entropy" and are_shares(ops.convert_to_numpy(outputs))
        labels = ops.cast(targets, "int32") if loss == "cross_entropy" else targets
        return mean_loss(loss, outputs, labels, shares)

    return mean


def mean_loss(loss: str | Callable[..., Any], outputs: Any, targets: Any, shares: bool) -> Any:
    """The mean loss of a batch, a scalar tensor, for a step. With `shares` outputs are those of a softmax."""
    if loss == "cross_entropy":
        each = ops.sparse_categorical_crossentropy(targets, outputs, from_logits=not shares)
        return ops.mean(each)
    if isinstance(loss, str):
        error = ops.reshape(outputs, ops.shape(targets)) - ops.cast(targets, outputs.dtype)
        return ops.mean(ops.square(error) if loss == "mse" else ops.abs(error))
    # Losses of Keras take the targets first.
    ordered = (targets, outputs) if isinstance(loss, keras.losses.Loss) else (outputs, targets)
    value = called(loss, *ordered)
    if not hasattr(value, "shape") or not keras.ops.is_tensor(value) or np.prod(value.shape) != 1:
        got = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        hint = "return the mean over the batch: keras.ops.mean(...)"
        raise NormValueError(message(f"{named(loss)} must return a tensor with one number", got, hint))
    return ops.reshape(value, ())


def losses(loss: str, outputs: NDArray[Any], targets: NDArray[Any], shares: bool) -> NDArray[np.float64]:
    """The named loss of each sample (N,)."""
    exact = outputs.astype(np.float64)
    if loss != "cross_entropy":
        error = exact.reshape(targets.shape) - targets
        return _by_sample(np.square(error) if loss == "mse" else np.abs(error))
    if shares:
        exact = np.log(np.clip(exact, _LEAST, 1 - _LEAST))
    with np.errstate(all="ignore"):  # of a network that diverges
        shifted = exact - exact.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return _by_sample(-np.take_along_axis(logs, targets[..., None].astype(np.int64), -1)[..., 0])


def correct(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """The share of right classes of each sample (N,): 0 or 1 where a sample has one label."""
    return _by_sample(outputs.argmax(-1) == targets)


def number(metric: Callable[..., Any], outputs: Any, targets: Any) -> float:
    """The user's metric of all samples, given as arrays. Raises NormValueError where it is no number."""
    value = called(metric, outputs, targets)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise NormValueError(message(f"{named(metric)} must return one number", got)) from error


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one: arrays along their first axis, those in tuples and mappings one by one."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(joined(parts) for parts in zip(*batches, strict=True))
    if not isinstance(first, np.ndarray):
        must = "a metric of your own needs outputs and targets that are arrays, or tuples or dictionaries of them"
        raise NormValueError(message(must, type(first).__name__))
    if len({batch.shape[1:] for batch in batches}) > 1:
        shapes = " and ".join(str(tuple(shape)) for shape in {batch.shape: None for batch in batches})
        raise NormValueError(message("a metric of your own needs samples of one shape in all batches", shapes))
    return np.concatenate(batches)


def optimizer_for(
    optimizer: str | Callable[..., Any], parameters: list[Any], lr: float, momentum: float
) -> keras.optimizers.Optimizer:
    """The optimizer of a trial. Raises NormValueError where the user's function gives none."""
    if optimizer == "sgd":
        return keras.optimizers.SGD(lr, momentum=momentum)
    if isinstance(optimizer, str):
        return _OPTIMIZERS[optimizer](lr)
    made = called(optimizer, parameters, lr)
    if not isinstance(made, keras.optimizers.Optimizer):
        must = f"{named(optimizer)} must return a keras.optimizers.Optimizer"
        raise NormValueError(message(must, type(made).__name__, "return keras.optimizers.SGD(lr)"))
    return made


def _by_sample(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64).reshape(len(values), -1).mean(1)
