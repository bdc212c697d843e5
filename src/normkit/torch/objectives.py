"""Losses, metrics and optimizers by name, or the user's own; what they give is checked before it is trusted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.errors import NormValueError, message

__all__ = ["by_name", "called", "correct", "joined", "losses", "mean_loss", "named", "number", "optimizer_for"]

_LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "mae": F.l1_loss}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def called(function: Callable[..., Any], *arguments: Any, **named_arguments: Any) -> Any:
    """Call a function of the user's; what it raises becomes a NormValueError that names it."""
    from normkit.experiments.code import call

    return call(named(function), function, *arguments, **named_arguments)


def named(function: Callable[..., Any]) -> str:
    """The name of a function of the user's."""
    return getattr(function, "__name__", type(function).__name__)


def by_name(loss: str) -> Callable[[Any, Any], Tensor]:
    """A named loss as a function of outputs and targets."""
    return functools.partial(mean_loss, loss)


def mean_loss(loss: str | Callable[..., Any], outputs: Any, targets: Any) -> Tensor:
    """The mean loss of a batch, a scalar. Raises NormValueError where outputs and targets do not fit."""
    if isinstance(loss, str):
        return _LOSSES[loss](*_fitted(loss, outputs, targets))
    value = called(loss, outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        hint = "return the mean over the batch: .mean()"
        raise NormValueError(message(f"{named(loss)} must return a tensor with one number", got, hint))
    return value.reshape(())


def losses(loss: str, outputs: Any, targets: Any) -> Tensor:
    """The named loss of each sample (N,), in float64."""
    return _by_sample(_LOSSES[loss](*_fitted(loss, outputs, targets), reduction="none"))


def correct(outputs: Any, targets: Any) -> Tensor:
    """The share of right classes of each sample (N,), in float64: 0 or 1 where a sample has one label."""
    scores, labels = _labelled("accuracy", outputs, targets)
    return _by_sample(scores.argmax(1) == labels)


def number(metric: Callable[..., Any], outputs: Any, targets: Any) -> float:
    """The user's metric of all samples. Raises NormValueError where it is no number."""
    value = called(metric, outputs, targets)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise NormValueError(message(f"{named(metric)} must return one number", got)) from error


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one: tensors along their first axis, those in tuples and mappings one by one."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(joined(parts) for parts in zip(*batches, strict=True))
    if not isinstance(first, Tensor):
        must = "a metric of your own needs outputs and targets that are tensors, or tuples or dictionaries of them"
        raise NormValueError(message(must, type(first).__name__))
    if len({batch.shape[1:] for batch in batches}) > 1:
        shapes = " and ".join(str(tuple(shape)) for shape in {batch.shape: None for batch in batches})
        raise NormValueError(message("a metric of your own needs samples of one shape in all batches", shapes))
    return torch.cat(list(batches))


def optimizer_for(
    optimizer: str | Callable[..., Any], parameters: list[nn.Parameter], lr: float, momentum: float
) -> torch.optim.Optimizer:
    """The optimizer of a trial. Raises NormValueError where the user's function gives none that can be used."""
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    if isinstance(optimizer, str):
        return _OPTIMIZERS[optimizer](parameters, lr=lr)
    made = called(optimizer, parameters, lr)
    if not isinstance(made, torch.optim.Optimizer):
        must = f"{named(optimizer)} must return a torch.optim.Optimizer"
        raise NormValueError(message(must, type(made).__name__, "return torch.optim.SGD(parameters, lr=lr)"))
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        must = f"{named(optimizer)} must return an optimizer that steps without a closure"
        raise NormValueError(message(must, type(made).__name__))
    return made


def _fitted(loss: str, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    return (_labelled if loss == "cross_entropy" else _shaped)(loss, outputs, targets)


def _labelled(what: str, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Outputs (N, K, *S) and labels (N, *S) from 0 to K - 1."""
    _check_tensors(what, outputs, targets)
    if targets.is_floating_point() or targets.is_complex():
        advice = "y.long(), or the loss mse for numbers to predict"
        raise NormValueError(message(f"{what} needs labels that are whole numbers", str(targets.dtype), advice))
    if outputs.dim() < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        hint = None
        if outputs.dim() > 2 and outputs.shape[:-1] == targets.shape:
            hint = "the classes come second, outputs.movedim(-1, 1)"
        elif targets.dim() == 2 and targets.shape[1] == 1:
            hint = "y.squeeze(1)"
        got = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise NormValueError(message(f"{what} needs outputs (N, classes, *S) and labels (N, *S)", got, hint))
    classes, labels = outputs.shape[1], targets.long()
    if labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            worst = low if low < 0 else high
            advice = "labels count from 0" if low < 0 else f"the last layer needs {high + 1} outputs"
            got = f"label {worst} and {classes} outputs"
            raise NormValueError(message(f"{what} needs labels below the number of outputs", got, advice))
    return outputs, labels


def _shaped(what: str, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Outputs in the shape of the targets: a column (N, 1) for targets (N,) would spread to (N, N)."""
    _check_tensors(what, outputs, targets)
    if outputs.shape[:1] != targets.shape[:1] or outputs.numel() != targets.numel():
        got = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise NormValueError(message(f"{what} needs as many outputs as targets for every sample", got))
    return outputs.reshape(targets.shape), targets.to(outputs.dtype)


def _check_tensors(what: str, outputs: Any, targets: Any) -> None:
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            hint = "a loss and a metric of your own take (outputs, targets) as they are"
            raise NormValueError(message(f"{what} needs {name} that are a tensor", type(value).__name__, hint))


def _by_sample(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1).mean(1)
