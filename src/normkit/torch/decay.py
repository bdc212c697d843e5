"""Weight decay of the hidden layers, and the growing rate that does the same where their scale does not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import NormValueError, message
from normkit.torch.models import weighted_layers

__all__ = ["decayed", "shrinking"]


def decayed(network: nn.Module, lr: float, momentum: float, decay: float, *, as_rate: bool = False) -> torch.optim.SGD:
    """SGD that decays the weights of all dense and convolutional layers but the last, and nothing else.

    With `as_rate` none is decayed; their rate grows instead (see :func:`shrinking`). Where the scale of a weight does
    not matter, as in front of batch norm, the network is the same after every step.

    Raises NormValueError for a growing rate where decay and rate are too large for one.
    """
    weights: list[Tensor] = [layer.weight for layer in weighted_layers(network)[:-1]]
    chosen = set(map(id, weights))
    others: list[Tensor] = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    if as_rate:
        return _Growing(others, weights, lr, momentum, shrinking(lr, momentum, decay))
    groups: list[dict[str, Any]] = [{"params": others}, {"params": weights, "weight_decay": decay}]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def shrinking(lr: float, momentum: float, decay: float) -> float:
    """By what factor a decay shrinks weights in each step, gradients left out, once momentum has settled.

    SGD with momentum m, rate r and decay d is w'' = (1 + m - r d) w' - m w - r g(w'). For w_t = a^t u_t, and gradients
    of a scale-invariant loss, g(w_t) = a^-t g(u_t), that is SGD without decay,

        u'' - u' = m/a² (u' - u) - r a^-(2t+1) g(u'),    where a² - (1 + m - r d) a + m = 0:

    in PyTorch's form of momentum, the same momentum m at the rate r a^-(2t+1), with a first velocity of
    -(1 - a) w_0 / (r a). Returns the larger a. After Li & Arora 2019 (arXiv:1910.07454).

    Raises NormValueError where no a is real.
    """
    half = (1 + momentum - lr * decay) / 2
    if half * half < momentum:
        most = (1 - math.sqrt(momentum)) ** 2 / lr
        must = f"`weight_decay` must be at most {most:.3g} at rate {lr:g}, to be had by a growing rate"
        raise NormValueError(message(must, f"{decay:g}"))
    return half + math.sqrt(half * half - momentum)


class _Growing(torch.optim.SGD):
    """SGD in which the rate of some weights grows by a^-2 in every step."""

    def __init__(self, others: list[Tensor], weights: list[Tensor], lr: float, momentum: float, factor: float) -> None:
        groups: list[dict[str, Any]] = [{"params": others}, {"params": weights, "lr": lr / factor}]
        super().__init__(groups, lr=lr, momentum=momentum)
        self._factor = factor
        for weight in weights:
            self.state[weight]["momentum_buffer"] = weight.detach() * (-(1 - factor) / (lr * factor))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """An update, and the larger rate of the next."""
        loss = super().step(closure)
        self.param_groups[1]["lr"] /= self._factor**2
        return loss
