"""The embedded networks of `normkit compare`, as in :mod:`normkit.torch.models`, with the channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
import numpy as np

from normkit.core.catalog import CATALOG
from normkit.errors import NormValueError, message
from normkit.keras.factory import norm_layer
from normkit.keras.probe import named_layers

__all__ = ["build", "initialize", "weighted_layers"]

_CHANNELS = ((12, 12, 12), (24, 24, 24))  # three convolutions, halve, three convolutions, average
_HIDDEN = (128,) * 10
_LAST = "channels_last"


def build(
    model: str, *, shape: tuple[int, ...], classes: int, norm: str, position: str, steps: int, seed: int
) -> keras.Sequential:
    """Build `cnn` or `mlp` with `norm` `before` or `after` every activation, and none after the classifier.

    A norm that is an activation as well takes its place.

    `cnn` takes images (H, W, C) of at least 4 x 4, made for 8 x 8 to 28 x 28; `mlp` takes rows, and images as rows.
    `steps` is the length of the training, which momentum and batch renormalization's schedule are scaled to. Raises
    NormValueError.
    """
    number = 0

    def block(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
        nonlocal number
        number += 1
        act = keras.layers.ReLU(name=f"relu_{number}")
        if norm == "none":
            return [layer, act]
        normalization = norm_layer(norm, steps=steps)
        if CATALOG[norm].activates:
            return [layer, normalization]
        return [layer, normalization, act] if position == "before" else [layer, act, normalization]

    stack: list[keras.layers.Layer] = []
    if model == "cnn":
        if len(shape) != 3 or min(shape[:2]) < 4:
            must = "`cnn` must be given images of at least 4 x 4"
            raise NormValueError(message(must, f"samples of shape {shape}", "use mlp"))
        halved = [side // 2 for side in shape[:2]]
        for stage in _CHANNELS:
            stack += [keras.layers.MaxPooling2D(2, data_format=_LAST)] if stack else []
            for channels in stage:
                stack += block(keras.layers.Conv2D(channels, 3, padding="same", data_format=_LAST))
        # Two by two averages, as AdaptiveAvgPool2d(2) takes them: of an odd side the middle belongs to both.
        pool = [math.ceil(side / 2) for side in halved]
        stack.append(keras.layers.AveragePooling2D(pool, [side // 2 for side in halved], data_format=_LAST))
    else:
        if norm in ("instance", "evonorm_b0"):
            raise NormValueError(
                message(f"{CATALOG[norm].name} needs spatial axes to normalize over", "mlp", "use layer")
            )
        stack += _flattened(len(shape))
        for width in _HIDDEN:
            stack += block(keras.layers.Dense(width))
    if model == "cnn":
        stack += _flattened(3)
    network = keras.Sequential([keras.Input(shape), *stack, keras.layers.Dense(classes)])
    initialize(network, seed)
    return network


def weighted_layers(network: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The convolutional and dense layers, in order."""
    return [layer for _, layer in named_layers(network) if layer.built and hasattr(layer, "kernel")]


def initialize(network: keras.layers.Layer, seed: int) -> None:
    """He initialization, N(0, 2 / inputs), biases 0. Each layer draws from a generator of its own.

    The numbers and the order of the features are those of :mod:`normkit.torch.models`, whose weights are (outputs,
    inputs, *window); those of Keras are (*window, inputs, outputs).
    """
    for number, layer in enumerate(weighted_layers(network)):
        *window, inputs, outputs = layer.kernel.shape
        drawn = np.random.default_rng([seed, 1, number]).standard_normal((outputs, inputs, *window))
        drawn = np.moveaxis(drawn, (0, 1), (-1, -2)) * math.sqrt(2 / (inputs * math.prod(window)))
        layer.kernel.assign(drawn.astype(np.float32))
        layer.bias.assign(np.zeros(outputs, np.float32))


def _flattened(ndim: int) -> Sequence[keras.layers.Layer]:
    """Rows of features in PyTorch's order, channel by channel, so that the weights behind mean the same."""
    order = [keras.layers.Permute((3, 1, 2))] if ndim == 3 else []
    return [*order, keras.layers.Flatten(data_format=_LAST)]
