"""A model of ours as one of Keras' own layers, so that what is shipped needs no normkit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from normkit.errors import NormTypeError, NormValueError, message
from normkit.keras import layers as ours

__all__ = ["as_plain"]

# Each of our classes, the most derived first, with Keras' own and the arguments that this one has not.
_TRAINING_ONLY = ("virtual_batch_size", "renorm_schedule", "debiased", "bessel", "nonfinite")
_STOCK: dict[Any, tuple[Any, tuple[str, ...]]] = {
    ours.BatchNormalization: (keras.layers.BatchNormalization, _TRAINING_ONLY),
    ours.InstanceNormalization: (keras.layers.GroupNormalization, ()),
    ours.GroupNormalization: (keras.layers.GroupNormalization, ()),
    ours.LayerNormalization: (keras.layers.LayerNormalization, ()),
    ours.RMSNormalization: (keras.layers.RMSNormalization, ()),
}


def as_plain(model: Any) -> Any:
    """Return a new model with Keras' own layers in place of ours, and the same weights and predictions.

    For shipping: it loads where normkit is not installed. Training it further is possible and is Keras' training:
    `virtual_batch_size`, `renorm_schedule`, `debiased`, `bessel` and `nonfinite` are gone, and `momentum=None` becomes
    0.99. Debiased and cumulative moving statistics are ordinary values that evaluate the same. Positions that a mask
    hides are 0 in the output of our batch normalization and normalized like the others in that of Keras: nothing may
    read them behind it. Where they are outputs of the model themselves, they differ.

    Args:
        model: a built Sequential or Functional model, also with nested ones, or a single layer of ours.

    Raises:
        NormValueError: where a prediction would not be the same: a layer called with a mask that Keras' own ignores, or
            with sample weights; batch normalization with a mask before a layer that knows no masks; a layer of ours
            that a custom layer holds and does not name in its config. Where there is a layer that Keras has not:
            FilterResponseNormalization, EvoNormB0, EvoNormS0, DynamicTanh, GlobalResponseNormalization and the LSTM
            cells.
        NormTypeError: for a subclassed model, whose layers cannot be told from its config.

    >>> from normkit.keras import GhostBatchNormalization, as_plain
    >>> model = keras.Sequential([keras.Input((4,)), GhostBatchNormalization(virtual_batch_size=8, name="norm")])
    >>> type(as_plain(model).get_layer("norm")).__module__.split(".")[0]
    'keras'
    """
    _refuse_unknown(model)
    if type(model) in _STOCK:
        if not model.built:
            raise NormValueError(message("as_plain: the layer must be built", model.name, "call it on an input once"))
        _refuse_masks(model)
        plain = _plain(model)
        plain.build(model._build_shapes_dict["input_shape"])
        plain.set_weights(_shared(model))
        return plain
    if not isinstance(model, keras.Sequential | keras.Function):
        must = "as_plain: `model` must be a Sequential or Functional model, or a layer of normkit.keras"
        raise NormTypeError(message(must, type(model).__name__))
    if not model.built:
        raise NormValueError(message("as_plain: the model must be built", model.name, "call it on an input once"))
    for layer in _ours_in(model):
        _refuse_masks(layer)
    plain = keras.models.clone_model(model, clone_function=_plain, recursive=True)
    left = [layer.name for layer in _ours_in(plain)]
    if left:
        must = "as_plain: every layer of normkit must stand in the model itself or in the config of the layer around it"
        raise NormValueError(message(must, ", ".join(left)))
    plain.set_weights(_shared(model))
    return plain


def _refuse_unknown(model: Any) -> None:
    """Raise where there is a layer of ours that Keras has not."""
    layers = model._flatten_layers() if isinstance(model, keras.layers.Layer) else ()
    unknown = {
        f"{layer.name} ({type(layer).__name__})"
        for layer in layers
        if keras.saving.get_registered_name(type(layer)).startswith("normkit>") and not isinstance(layer, tuple(_STOCK))
    }
    if unknown:
        must = "as_plain: every layer of normkit must have a counterpart in Keras"
        raise NormValueError(message(must, ", ".join(sorted(unknown)), "ship the model with normkit installed"))


def _ours_in(model: Any) -> Iterator[Any]:
    return (layer for layer in model._flatten_layers() if isinstance(layer, tuple(_STOCK)))


def _shared(model: Any) -> list[Any]:
    """Return the values of all weights that Keras' own layers have as well."""
    layers = model._flatten_layers()
    counts = {id(layer.count) for layer in layers if isinstance(layer, ours.BatchNormalization)}
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights if id(weight) not in counts]


def _plain(layer: Any) -> Any:
    """Return a fresh layer with the same config: Keras' own for ours, also inside wrappers."""
    for kind, (stock, unknown) in _STOCK.items():
        if isinstance(layer, kind):
            return stock.from_config(_config(kind, layer.get_config(), unknown))
    return type(layer).from_config(_rewritten(layer.get_config()))


def _config(kind: Any, config: dict[str, Any], unknown: tuple[str, ...]) -> dict[str, Any]:
    config = {name: value for name, value in config.items() if name not in unknown}
    if kind is ours.InstanceNormalization:
        config["groups"] = -1
    if "momentum" in config and config["momentum"] is None:
        config["momentum"] = 0.99
    if config.get("synchronized") and keras.config.backend() != "tensorflow":
        config["synchronized"] = False
    return config


def _rewritten(config: Any) -> Any:
    """Return a config with the entries of our layers replaced, wherever they are."""
    if isinstance(config, list | tuple):
        return type(config)(_rewritten(value) for value in config)
    if not isinstance(config, dict):
        return config
    name = str(config.get("registered_name"))
    if name.startswith("normkit>"):
        layer = getattr(ours, name.removeprefix("normkit>"), None)
        for kind, (stock, unknown) in _STOCK.items():
            if layer is not None and issubclass(layer, kind):
                inner = _config(kind, config["config"], unknown)
                return {**keras.saving.serialize_keras_object(stock.from_config(inner)), "build_config": None}
    return {key: _rewritten(value) for key, value in config.items()}


def _refuse_masks(layer: Any) -> None:
    """Raise where the model calls this layer with something that Keras' own does not take."""
    batch = isinstance(layer, ours.BatchNormalization)
    rows = isinstance(layer, ours.LayerNormalization | ours.RMSNormalization)
    for node in () if rows else layer._inbound_nodes:
        given = node.arguments.kwargs
        (inputs, *_) = node.input_tensors
        masked = given.get("mask") is not None or getattr(inputs, "_keras_mask", None) is not None
        if given.get("sample_weight") is not None or (masked and not batch):
            what = "sample weights" if given.get("sample_weight") is not None else "a mask"
            must = f"as_plain: {layer.name} must not be called with {what}, which Keras' own layer does not take"
            raise NormValueError(message(must))
        reader = _reads_hidden(layer) if masked else None
        if reader is not None:
            must = f"as_plain: masked positions behind {layer.name} must not be read: Keras' own layer leaves values"
            raise NormValueError(message(must, f"{reader}, which knows no masks"))


def _reads_hidden(layer: Any) -> str | None:
    """The name of a layer that sees what stands at masked positions behind this one, None where there is none."""
    for node in layer._outbound_nodes:
        if not getattr(node.operation, "supports_masking", False):
            return str(node.operation.name)
        carried = any(getattr(output, "_keras_mask", None) is not None for output in node.output_tensors)
        reader = _reads_hidden(node.operation) if carried else None
        if reader is not None:
            return reader
    return None
