"""From a short name of the catalog to a layer, and the `norm` that a user's function calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from normkit.core.algebra import usual_groups
from normkit.core.catalog import CATALOG, check_position, find
from normkit.core.constraints import Integer, check
from normkit.core.schedule import RenormSchedule, momentum_for
from normkit.errors import NormTypeError, NormValueError, message
from normkit.keras import further, layers

__all__ = ["NormFactory", "norm_factory", "norm_layer"]

# In a short run the statistics must follow within it, and before the clips of renorm open.
_RENORM_MOMENTUM = 0.95


def norm_layer(name: str, *, axis: int = -1, steps: int | None = None) -> keras.layers.Layer:
    """Return a layer of that normalizer, with the eps of the catalog.

    Moving averages are debiased: in a short training Keras' own would still hold their first values at its end.

    Args:
        name: short name in the catalog: batch, ghost, renorm, instance, group, layer, rms, frn, evonorm_b0, evonorm_s0,
            dyt, grn. `frn` learns its epsilon, as in the paper where there is a single position, so that it takes
            tables.
        axis: where the channels are, -1 or 1.
        steps: length of the training; momentum and batch renormalization's schedule are scaled to it.

    Raises NormValueError for an unknown name (with the nearest ones). A normalizer without anything to normalize over
    tells that when it is built.
    """
    spec = find(name)
    if axis not in (1, -1):
        raise NormValueError(message("`axis` must be -1 or 1", repr(axis)))
    common: dict[str, Any] = {"axis": axis, "epsilon": spec.eps}
    moving = {**common, "momentum": momentum_for(steps), "debiased": True}
    if name == "renorm" and steps is not None:
        moving |= {"momentum": _RENORM_MOMENTUM, "renorm_momentum": _RENORM_MOMENTUM}
        moving["renorm_schedule"] = RenormSchedule.for_steps(steps)
    makers: dict[str, Callable[[], keras.layers.Layer]] = {
        "batch": lambda: layers.BatchNormalization(**moving),
        "ghost": lambda: layers.GhostBatchNormalization(**moving, virtual_batch_size=16),
        "renorm": lambda: layers.BatchRenormalization(**moving),
        "instance": lambda: layers.InstanceNormalization(**common),
        "group": lambda: GroupNormalization(**common),
        "layer": lambda: layers.LayerNormalization(**common),
        "rms": lambda: layers.RMSNormalization(**common),
        "frn": lambda: further.FilterResponseNormalization(**common, learn_epsilon=True),
        "evonorm_b0": lambda: further.EvoNormB0(**moving),
        "evonorm_s0": lambda: EvoNormS0(**common),
        "dyt": lambda: further.DynamicTanh(axis),
        "grn": lambda: further.GlobalResponseNormalization(**common),
    }
    return makers[name]()


def norm_factory(norm: str, position: str, steps: int | None) -> NormFactory:
    """The `norm` that a user's function calls; see :class:`NormFactory`. `norm` is a short name or `none`."""
    return NormFactory(norm, position, steps)


class NormFactory:
    """Gives the layers of one variant: `norm(num_features=None, activation=None, *, axis=-1)`.

    The layer takes channels on `axis` (-1, or 1) and any number of spatial axes; how many channels there are it sees
    for itself. With an activation, a name, a function or a layer, both come as one Sequential: act(norm(x)), or
    norm(act(x)) in a variant that stands after the activation. Of `frn`, `evonorm_b0` and `evonorm_s0`, which stand for
    both, the layer comes alone. `none` gives the identity. No random numbers are drawn,
    so that the rest of a model starts alike in every variant.

    Attributes:
        name: the variant as typed: `batch`, `batch:after`.
        position: `before` or `after` the activation.

    Raises NormValueError where the variant stands after the activation and none is given.

    >>> norm = norm_factory("batch", "after", None)
    >>> [type(layer).__name__ for layer in norm(activation="relu").layers]
    ['Activation', 'BatchNormalization']
    """

    def __init__(self, norm: str, position: str, steps: int | None) -> None:
        if norm != "none":
            find(norm)
        check_position(norm, position)
        self.name = norm if position == "before" else f"{norm}:{position}"
        self.position = position
        self._norm, self._steps = norm, steps
        self._given: list[keras.layers.Layer] = []

    def __str__(self) -> str:
        return self.name

    def __call__(
        self, num_features: int | None = None, activation: Any = None, *, axis: int = -1
    ) -> keras.layers.Layer:
        """A layer; see the class."""
        if num_features is not None:
            check("norm", {"num_features": Integer(1)}, {"num_features": num_features})
        if axis not in (1, -1):
            raise NormValueError(message("norm: `axis` must be -1 or 1", repr(axis)))
        act = None if activation is None else _activation(activation)
        if act is None and self.position == "after":
            must = f"{self} stands after the activation, so `norm` must be given the activation too"
            hint = 'norm(activation="relu") puts either first, as the variant asks'
            raise NormValueError(message(must, "no activation", hint))
        layer: keras.layers.Layer = keras.layers.Identity()
        if self._norm != "none":
            layer = norm_layer(self._norm, axis=axis, steps=self._steps)
            self._given.append(layer)
        if act is None or (self._norm != "none" and CATALOG[self._norm].activates):
            return layer
        return keras.Sequential([layer, act] if self.position == "before" else [act, layer])

    def check_used(self, model: keras.layers.Layer, name: str) -> None:
        """Raise NormValueError unless every layer that was given, and at least one, is part of `model`."""
        found = {id(layer) for layer in model._flatten_layers()}
        missing = sum(id(layer) not in found for layer in self._given)
        if self._norm != "none" and (missing or not self._given):
            must = f"{name} does not use the norm it was given: every layer of `norm` must be part of the model"
            got = f"{missing} of {len(self._given)} that are not" if self._given else "no call of norm"
            hint = "keras.Sequential([..., norm(), ...]), or self.norm1 = norm() in a model of your own"
            raise NormValueError(message(must, got, hint))


class _FreeGroups(keras.layers.Layer):
    """In front of a layer with groups: `groups=None` chooses their number by the input."""

    axis: int
    groups: int

    def __init__(self, groups: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(1 if groups is None else groups, *args, **kwargs)
        self._free = groups is None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        channels = input_shape[self.axis] if len(input_shape) > 1 else None
        if self._free and channels is not None:
            self.groups = usual_groups(channels, spatial=len(input_shape) > 2)
        super().build(input_shape)


@keras.saving.register_keras_serializable(package="normkit", name="FreeGroupNormalization")
class GroupNormalization(_FreeGroups, layers.GroupNormalization):
    """Group norm that chooses its number of groups by the input, with `groups=None`."""


@keras.saving.register_keras_serializable(package="normkit", name="FreeEvoNormS0")
class EvoNormS0(_FreeGroups, further.EvoNormS0):
    """EvoNorm-S0 that chooses its number of groups by the input, with `groups=None`."""


def _activation(activation: Any) -> keras.layers.Layer:
    if isinstance(activation, keras.layers.Layer):
        return activation
    if isinstance(activation, str):
        try:
            return keras.layers.Activation(activation)
        except ValueError as error:
            must = "norm: `activation` must be a name that Keras knows, a function or a layer"
            raise NormValueError(message(must, repr(activation), '"relu"')) from error
    if isinstance(activation, type) or not callable(activation):
        got = f"the class {activation.__name__}" if isinstance(activation, type) else repr(activation)
        raise NormTypeError(message("norm: `activation` must be a name, a function or a layer", got, '"relu"'))
    return keras.layers.Activation(activation)
