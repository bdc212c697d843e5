"""The loss of a batch as a function of the parameters of the layers, as `normkit.experiments.landscape` asks for it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normkit.torch import objectives
from normkit.torch.models import weighted_layers
from normkit.torch.probe import as_tensors, forward, untouched

__all__ = ["TorchSurface", "layered", "vectors"]


class TorchSurface:
    """See :class:`normkit.experiments.protocol.Surface`. It works on a copy of the network in float64."""

    def __init__(self, network: nn.Module, loss: str | Callable[..., Any], x: Any, y: Any) -> None:
        self._network = copy.deepcopy(network).double().train()
        self._loss = loss
        self._inputs, self._targets = as_tensors(x, self._network), as_tensors(y, self._network)
        self._layers = layered(self._network)

    @property
    def weights(self) -> tuple[int, ...]:
        """How many of the first entries of each vector are the weight's."""
        return tuple(layer[0].numel() for layer in self._layers)

    def __call__(self, layers: Sequence[NDArray[np.float64]]) -> tuple[float, list[NDArray[np.float64]]]:
        """The loss where the parameters are these, and its gradient layer by layer.

        Running statistics and random numbers are each time as they were at first.
        """
        with untouched(self._network):
            for parameters, vector in zip(self._layers, layers, strict=True):
                parts = torch.from_numpy(vector).split([parameter.numel() for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part.view_as(parameter))
            with torch.enable_grad():
                loss = objectives.mean_loss(self._loss, forward(self._network, self._inputs), self._targets)
                every = list(itertools.chain.from_iterable(self._layers))
                slopes = iter(torch.autograd.grad(loss, every, materialize_grads=True))
        return loss.item(), [_vector([next(slopes) for _ in parameters]) for parameters in self._layers]


def layered(network: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters layer by layer: of a dense or convolutional layer, and of what follows until the next.

    The weight of the layer comes first. What stands in front of the first layer belongs to it.
    """
    starts = set(weighted_layers(network))
    first: list[nn.Parameter] = []
    found: list[list[nn.Parameter]] = []
    for module in network.modules():
        if module in starts:
            found.append([])
        (found[-1] if found else first).extend(p for p in module.parameters(recurse=False) if p.requires_grad)
    found[0] += first
    return found


def vectors(network: nn.Module) -> list[NDArray[np.float64]]:
    """A copy of the parameters in float64, layer by layer."""
    return [_vector(parameters) for parameters in layered(network)]


def _vector(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors]).cpu().numpy()
