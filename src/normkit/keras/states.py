"""What of the norm layers of a Keras model is trained: freezing, and the variables without weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normkit.core.decay import looks_like_a_norm, undecayed
from normkit.errors import NormValueError, message
from normkit.keras.porting import is_norm
from normkit.keras.probe import check_built

__all__ = ["freeze", "grouped", "unfreeze"]

_BEFORE = "_trainable_before_normkit_froze_it"


def freeze(model: Any, affine: bool) -> int:
    """See `normkit.surgery.protocol.States`."""
    if not affine:
        must = "`affine` must be True in Keras, where `trainable=False` freezes statistics, gamma and beta together"
        raise NormValueError(message(must, hint="layer.trainable = False, and gamma and beta in layers of their own"))
    found = [layer for layer in _layers(model) if is_norm(layer)]
    for layer in found:
        if not hasattr(layer, _BEFORE):
            setattr(layer, _BEFORE, layer.trainable)
        layer.trainable = False
    return len(found)


def unfreeze(model: Any) -> int:
    """See `normkit.surgery.protocol.States`."""
    found = [layer for layer in _layers(model) if hasattr(layer, _BEFORE)]
    for layer in found:
        layer.trainable = getattr(layer, _BEFORE)
        delattr(layer, _BEFORE)
    return len(found)


def grouped(model: Any, weight_decay: float, biases: bool) -> list[dict[str, Any]]:
    """See `normkit.surgery.protocol.States`."""
    check_built(model)
    exempt = {id(variable) for layer in _layers(model) for variable in _undecayed(layer, biases)}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": value} for value in (weight_decay, 0.0)]
    for variable in {id(variable): variable for variable in model.trainable_variables}.values():
        groups[id(variable) in exempt]["params"].append(variable)
    return [group for group in groups if group["params"]]


def _layers(model: Any) -> Iterator[Any]:
    return iter({id(layer): layer for layer in model._flatten_layers(include_self=True, recursive=True)}.values())


def _undecayed(layer: Any, biases: bool) -> Iterator[Any]:
    own = layer._trainable_variables
    norm = is_norm(layer) or looks_like_a_norm(type(layer), (variable.shape for variable in own))
    for variable in own:
        if undecayed(variable.name, variable.shape, norm=norm, biases=biases):
            yield variable
