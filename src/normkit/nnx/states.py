"""What of the norm layers of an NNX model is trained: freezing, and the weight decay of every parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from normkit.core.decay import looks_like_a_norm, undecayed
from normkit.nnx.porting import is_norm

__all__ = ["FrozenParam", "freeze", "given_class", "grouped", "is_frozen", "keep_mode", "unfreeze"]

_MARK = "_normkit_froze"  # on the class of a frozen layer: the class that it had


class FrozenParam(nnx.Variable):
    """A gamma or beta that is not trained: no `nnx.Param`, so gradients and optimizers of those pass it over."""


def is_frozen(layer: Any) -> bool:
    """Whether `freeze` froze this layer's statistics."""
    return hasattr(layer, _MARK)


def given_class(layer: Any) -> Any:
    """The class of a layer, also of a frozen one."""
    return getattr(layer, _MARK, type(layer))


def keep_mode(old: Any, new: Any) -> None:
    """Let a layer train or evaluate as the one in whose place it comes, and be frozen as that is."""
    if hasattr(old, "use_running_average") and hasattr(new, "use_running_average"):
        vars(new)["use_running_average"] = vars(old)["use_running_average"]
        if is_frozen(old) and not is_frozen(new):
            object.__setattr__(new, "__class__", _frozen(given_class(new)))


def freeze(model: Any, affine: bool) -> int:
    """See `normkit.surgery.protocol.States`."""
    unfreeze(model)
    found = 0
    for _, layer in nnx.iter_modules(model):
        tracking = hasattr(layer, "use_running_average")
        if not is_norm(layer) or not (affine or tracking):
            continue
        found += 1
        if tracking:
            object.__setattr__(layer, "__class__", _frozen(type(layer)))
        for name in ("scale", "bias") if affine else ():
            variable = getattr(layer, name, None)
            if type(variable) is nnx.Param:
                object.__setattr__(variable, "__class__", FrozenParam)
    return found


def unfreeze(model: Any) -> int:
    """See `normkit.surgery.protocol.States`."""
    found = 0
    for _, layer in nnx.iter_modules(model):
        variables = [getattr(layer, name, None) for name in ("scale", "bias")] if is_norm(layer) else []
        frozen = [variable for variable in variables if isinstance(variable, FrozenParam)]
        found += is_frozen(layer) or bool(frozen)
        if is_frozen(layer):
            object.__setattr__(layer, "__class__", getattr(layer, _MARK))
        for variable in frozen:
            object.__setattr__(variable, "__class__", nnx.Param)
    return found


def grouped(model: Any, weight_decay: float, biases: bool) -> Callable[[Any], Any]:
    """See `normkit.surgery.protocol.States`: a function from parameters to the weight decay of each."""
    norms = {path for path, module in nnx.iter_modules(model) if is_norm(module) or _called_a_norm(module)}

    def decay(path: Any, value: Any) -> float:
        *owner, name = (key.key for key in path if hasattr(key, "key"))  # a variable's own value has none
        exempt = undecayed(str(name), np.shape(value), norm=tuple(owner) in norms, biases=biases)
        return 0.0 if exempt else weight_decay

    return functools.partial(jax.tree_util.tree_map_with_path, decay)


@functools.cache
def _frozen(kind: Any) -> type:
    """The class of a frozen layer: evaluates, whatever `model.train()`, a view or a call asks for.

    An object can only change to a class that derives from its own alone.
    """

    def asked(self: Any, value: bool | None) -> None:
        self.__dict__["use_running_average"] = value

    def call(self: Any, x: Any, use_running_average: bool | None = None, **named: Any) -> Any:  # noqa: ARG001
        return kind.__call__(self, x, True, **named)

    members = {
        "use_running_average": property(lambda self: True, asked),  # noqa: ARG005
        "__call__": call,
        # This class has no name to be found by.
        "__reduce__": lambda self: (_restored, (kind, dict(vars(self)))),
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        _MARK: kind,
    }
    return type(kind)(kind.__name__, (kind,), members)  # type: ignore[no-any-return]


def _restored(kind: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_frozen(kind))
    vars(layer).update(attributes)
    return layer


def _called_a_norm(module: Any) -> bool:
    own = (value for value in vars(module).values() if isinstance(value, nnx.Param))
    return looks_like_a_norm(type(module), (np.shape(param.get_value()) for param in own))
