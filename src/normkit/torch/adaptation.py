"""Entropy minimization of gamma and beta in PyTorch, for `normkit.adapt`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.record import TrackedLayer
from normkit.errors import NormValueError, message
from normkit.torch.probe import as_tensors, forward, untouched

__all__ = ["affine", "minimize_entropy", "restorer"]


def affine(layers: Sequence[TrackedLayer]) -> list[nn.Parameter]:
    """Gamma and beta of these layers, each once."""
    return list({id(p): p for tracked in layers for p in tracked.layer.parameters(recurse=False)}.values())


def restorer(parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """A function that gives parameters the values back that they have now."""
    kept = [parameter.detach().clone() for parameter in parameters]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)

    return restore


def minimize_entropy(model: nn.Module, layers: Sequence[TrackedLayer], data: Iterable[Any], lr: float) -> None:
    """One step of Adam per batch on gamma and beta, against the mean entropy of the predictions for that batch.

    The layers normalize by their batch, with gradients through its statistics; everything else is in evaluation mode.
    Gradients that parameters hold, whether they need some, modes, buffers and random numbers are afterwards as before.
    """
    parameters = affine(layers)
    held = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.enable_grad())
        model.eval()
        for tracked in layers:
            tracked.layer.training = True
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for x in data:
                loss = _entropy(forward(model, as_tensors(x, model)))
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        finally:
            for parameter, before, needed in held:
                parameter.grad = before
                parameter.requires_grad_(needed)


def _entropy(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        must = 'with `method="entropy"` the model must give scores of at least 2 classes, (N, classes)'
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise NormValueError(message(must, got))
    with torch.no_grad():
        probabilities = bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())
    chances = outputs if probabilities else outputs.softmax(1)
    # Where a chance is 0 its gradient is not finite.
    return torch.special.entr(chances.clamp_min(torch.finfo(chances.dtype).tiny)).sum(1).mean()
