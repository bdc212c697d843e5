"""The embedded networks of `normkit compare`: small, plain, and the same in every variant but for the norm."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normkit.core.catalog import CATALOG
from normkit.errors import NormValueError, message
from normkit.torch.factory import norm_layer

__all__ = ["build", "initialize", "weighted_layers"]

_CHANNELS = ((12, 12, 12), (24, 24, 24))  # three convolutions, halve, three convolutions, average
_HIDDEN = (128,) * 10


def build(
    model: str, *, shape: tuple[int, ...], classes: int, norm: str, position: str, steps: int, seed: int
) -> nn.Sequential:
    """Build `cnn` or `mlp` with `norm` `before` or `after` every activation, and none after the classifier.

    A norm that is an activation as well takes its place.

    `cnn` takes images (C, H, W) of at least 4 x 4, made for 8 x 8 to 28 x 28; `mlp` takes rows, and images as rows.
    `steps` is the length of the training, which batch renormalization takes its schedule from. Raises NormValueError.
    """

    def block(layer: nn.Module, features: int, spatial: int) -> list[nn.Module]:
        if norm == "none":
            return [layer, nn.ReLU()]
        normalization = norm_layer(norm, features, spatial, steps=steps)
        if CATALOG[norm].activates:
            return [layer, normalization]
        return [layer, normalization, nn.ReLU()] if position == "before" else [layer, nn.ReLU(), normalization]

    layers: list[nn.Module] = []
    if model == "cnn":
        if len(shape) != 3 or min(shape[1:]) < 4:
            must = "`cnn` must be given images of at least 4 x 4"
            raise NormValueError(message(must, f"samples of shape {shape}", "use mlp"))
        features = shape[0]
        for number, stage in enumerate(_CHANNELS):
            layers += [nn.MaxPool2d(2)] if number else []
            for channels in stage:
                layers += block(nn.Conv2d(features, channels, 3, padding=1), channels, 2)
                features = channels
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        features *= 4
    else:
        layers.append(nn.Flatten())
        features = math.prod(shape)
        for width in _HIDDEN:
            layers += block(nn.Linear(features, width), width, 0)
            features = width
    network = nn.Sequential(*layers, nn.Linear(features, classes))
    initialize(network, seed)
    return network


def weighted_layers(network: nn.Module) -> list[_ConvNd | nn.Linear]:
    """The convolutional and dense layers, in order."""
    return [module for module in network.modules() if isinstance(module, _ConvNd | nn.Linear)]


def initialize(network: nn.Module, seed: int) -> None:
    """He initialization, N(0, 2 / inputs), biases 0. Each layer draws from a generator of its own.

    So a layer starts alike whatever stands between the layers. NumPy draws, so that other frameworks can start alike.
    """
    with torch.no_grad():
        for number, layer in enumerate(weighted_layers(network)):
            inputs = layer.weight[0].numel()
            drawn = np.random.default_rng([seed, 1, number]).standard_normal(layer.weight.shape)
            layer.weight.copy_(torch.from_numpy(drawn * math.sqrt(2 / inputs)))
            assert layer.bias is not None
            layer.bias.zero_()
