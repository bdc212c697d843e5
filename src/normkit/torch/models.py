"""The embedded networks of `normkit compare`: small, plain, and the same in every variant but for the norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normkit.core.catalog import CATALOG
from normkit.errors import NormValueError, message
from normkit.torch.factory import norm_layer
from normkit.torch.layers import GhostBatchNorm1d, GhostBatchNorm2d
from normkit.torch.sequences import RowLSTM

if TYPE_CHECKING:
    from normkit.experiments.conditions import Conditions

__all__ = ["build", "initialize", "weighted_layers"]

_CHANNELS = (12, 24)  # of the convolutions before and after the images are halved
_DEPTH = {"cnn": 6, "mlp": 10}  # hidden layers
_WIDTH = 128


class _InGroups(nn.Module):
    """Gives a norm the samples of a batch group by group in training, as several workers with batches of their own do.

    For norms that cannot do it themselves. The running statistics are updated by every group.
    """

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self.size = norm, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(group) for group in x.split(self.size)]) if self.training else self.norm(x)


def build(
    model: str,
    *,
    shape: tuple[int, ...],
    classes: int,
    norm: str,
    position: str,
    steps: int,
    seed: int,
    groups: int = 1,
    conditions: Conditions | None = None,
) -> nn.Module:
    """Build `cnn` or `mlp` with `norm` `before` or `after` every activation, and none after the classifier.

    A norm that is an activation as well takes its place.

    `cnn` takes images (C, H, W) of at least 4 x 4, made for 8 x 8 to 28 x 28; `mlp` takes rows, and images as rows.
    `steps` is the length of the training, which batch renormalization takes its schedule from; `conditions` change the
    network as they say, `groups` is the number of groups of samples that their `norm_batch` makes of a batch. Raises
    NormValueError.
    """
    asked: dict[str, Any] = conditions.changes() if conditions is not None else {}
    if sequences := asked.get("sequences"):
        if model != "mlp":
            raise NormValueError(message("`sequences` must be asked of mlp, whose place an LSTM takes", model))
        others = (
            [name for name in conditions.of_network if name not in ("sequences", "gamma", "batch_spread")]
            if conditions
            else []
        )
        if others:
            raise NormValueError(message("`sequences` must come without other changes of network", ", ".join(others)))
        return RowLSTM(shape, classes, norm, sequences, asked.get("gamma"), seed)
    dropout, depth = asked.get("dropout", 0.0), asked.get("depth") or _DEPTH[model]

    def block(layer: nn.Module, features: int, spatial: int) -> list[nn.Module]:
        made = [layer, nn.ReLU()]
        if norm != "none":
            normalization = _normalization(norm, features, spatial, steps, groups, asked)
            if CATALOG[norm].activates:
                made = [layer, normalization]
            else:
                made.insert(1 if position == "before" else 2, normalization)
        return [*made, nn.Dropout(dropout)] if dropout else made

    layers: list[nn.Module] = []
    if model == "cnn":
        if len(shape) != 3 or min(shape[1:]) < 4:
            must = "`cnn` must be given images of at least 4 x 4"
            raise NormValueError(message(must, f"samples of shape {shape}", "use mlp"))
        features = shape[0]
        layers += [norm_layer("batch", features, 2)] if asked.get("input_norm") else []
        for number, channels in enumerate(_CHANNELS):
            layers += [nn.MaxPool2d(2)] if number else []
            for _ in range((depth + 1 - number) // 2):
                layers += block(nn.Conv2d(features, channels, 3, padding=1), channels, 2)
                features = channels
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        features *= 4
    else:
        layers.append(nn.Flatten())
        features = math.prod(shape)
        layers += [norm_layer("batch", features, 0)] if asked.get("input_norm") else []
        for _ in range(depth):
            layers += block(nn.Linear(features, _WIDTH), _WIDTH, 0)
            features = _WIDTH
    network = nn.Sequential(*layers, nn.Linear(features, classes))
    initialize(network, seed, asked.get("weights", 1.0))
    return network


def _normalization(norm: str, features: int, spatial: int, steps: int, groups: int, asked: dict[str, Any]) -> nn.Module:
    """The norm of a block, over groups of samples and with another momentum where that is asked for."""
    size, momentum = asked.get("norm_batch"), asked.get("momentum")
    if norm == "batch" and size is not None:
        # The groups of ghost batch norm make one update together, so that momentum means what it does without them.
        kind = GhostBatchNorm2d if spatial else GhostBatchNorm1d
        layer: nn.Module = kind(features, virtual_batch_size=size)
    else:
        layer = norm_layer(norm, features, spatial, steps=steps * groups)
    if momentum is not None and hasattr(layer, "momentum"):
        layer.momentum = momentum
    if norm == "renorm" and size is not None and groups > 1:
        before: Any = layer.momentum
        layer.momentum = 1 - (1 - before) ** (1 / groups)  # the same per step as without groups
        layer = _InGroups(layer, size)
    return layer


def weighted_layers(network: nn.Module) -> list[_ConvNd | nn.Linear]:
    """The convolutional and dense layers, in order."""
    return [module for module in network.modules() if isinstance(module, _ConvNd | nn.Linear)]


def initialize(network: nn.Module, seed: int, factor: float = 1.0) -> None:
    """He initialization, N(0, 2 / inputs) times a factor, biases 0. Each layer draws from a generator of its own.

    So a layer starts alike whatever stands between the layers. NumPy draws, so that other frameworks can start alike.
    """
    with torch.no_grad():
        for number, layer in enumerate(weighted_layers(network)):
            inputs = layer.weight[0].numel()
            drawn = np.random.default_rng([seed, 1, number]).standard_normal(layer.weight.shape)
            layer.weight.copy_(torch.from_numpy(drawn * math.sqrt(2 / inputs) * factor))
            assert layer.bias is not None
            layer.bias.zero_()
