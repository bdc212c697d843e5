"""The embedded networks of `normkit compare`, as :mod:`normkit.torch.models` has them: same weights, same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit.core.catalog import CATALOG
from normkit.errors import NormValueError, message
from normkit.nnx.factory import Function, norm_layer

__all__ = ["build", "initialize", "weighted_layers"]

_CHANNELS = ((12, 12, 12), (24, 24, 24))  # three convolutions, halve, three convolutions, average
_HIDDEN = (128,) * 10
_WEIGHTED = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.ConvTranspose | nnx.Einsum


def build(
    model: str, *, shape: tuple[int, ...], classes: int, norm: str, position: str, steps: int, seed: int
) -> nnx.Sequential:
    """Build `cnn` or `mlp` with `norm` `before` or `after` every activation, and none after the classifier.

    A norm that is an activation as well takes its place.

    `shape` is that of a sample with its channels first, (C, H, W); the network takes them last, (N, H, W, C). `cnn`
    takes images of at least 4 x 4, made for 8 x 8 to 28 x 28; `mlp` takes rows, and images as rows. `steps` is the
    length of the training. Raises NormValueError.
    """

    def block(layer: nnx.Module, features: int) -> list[Callable[..., Any]]:
        if norm == "none":
            return [layer, Function(jax.nn.relu)]
        if CATALOG[norm].activates:
            return [layer, norm_layer(norm, features, steps=steps)]
        both = [norm_layer(norm, features, steps=steps), Function(jax.nn.relu)]
        return [layer, *(both if position == "before" else both[::-1])]

    start: dict[str, Any] = {
        "kernel_init": nnx.initializers.zeros_init(),
        "rngs": nnx.Rngs(0),
    }  # the weights are drawn below
    layers: list[Callable[..., Any]] = []
    if model == "cnn":
        if len(shape) != 3 or min(shape[1:]) < 4:
            must = "`cnn` must be given images of at least 4 x 4"
            raise NormValueError(message(must, f"samples of shape {shape}", "use mlp"))
        features = shape[0]
        for number, stage in enumerate(_CHANNELS):
            layers += [_halved] if number else []
            for channels in stage:
                layers += block(nnx.Conv(features, channels, (3, 3), **start), channels)
                features = channels
        layers += [_averaged, _flat]
        features *= 4
    else:
        layers.append(_flat)
        features = math.prod(shape)
        for width in _HIDDEN:
            layers += block(nnx.Linear(features, width, **start), width)
            features = width
    network = nnx.Sequential(*layers, nnx.Linear(features, classes, **start))
    initialize(network, seed)
    return network


def weighted_layers(network: nnx.Module) -> list[Any]:
    """The convolutional and dense layers, in an order that is the same in every variant."""
    return [module for _, module in nnx.iter_modules(network) if isinstance(module, _WEIGHTED)]


def initialize(network: nnx.Module, seed: int) -> None:
    """He initialization, N(0, 2 / inputs), biases 0. Each layer draws from a generator of its own.

    So a layer starts alike whatever stands between the layers. The numbers are drawn in the order of PyTorch's axes,
    (outputs, inputs, *window), and then moved.
    """
    for number, layer in enumerate(weighted_layers(network)):
        *window, inputs, outputs = layer.kernel.shape
        drawn = np.random.default_rng([seed, 1, number]).standard_normal((outputs, inputs, *window))
        scaled = drawn * math.sqrt(2 / (inputs * math.prod(window)))
        layer.kernel[...] = jnp.asarray(np.moveaxis(scaled, (0, 1), (-1, -2)), jnp.float32)


def _halved(x: Any) -> Any:
    return nnx.max_pool(x, (2, 2), (2, 2))


def _averaged(x: Any) -> Any:
    """To 2 x 2, the windows of odd sizes overlapping by one, as in torch.nn.AdaptiveAvgPool2d(2)."""
    size = x.shape[1:3]
    return nnx.avg_pool(x, tuple(-(-s // 2) for s in size), tuple(s // 2 for s in size))


def _flat(x: Any) -> Any:
    """Samples as rows, channel by channel."""
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
