"""From a short name of the catalog to a layer, and the `norm` that a user's function calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import errors, nnx

from normkit.core.algebra import usual_groups
from normkit.core.catalog import CATALOG, check_position, find
from normkit.core.constraints import Integer, check
from normkit.core.schedule import RenormSchedule, momentum_for
from normkit.errors import NormTypeError, NormValueError, message
from normkit.nnx import further, layers

__all__ = ["Block", "Identity", "NormFactory", "norm_factory", "norm_layer"]

# In a short run the running statistics must follow within it, and before the clips of renorm open.
_RENORM_MOMENTUM = 0.95


def norm_layer(name: str, num_features: int, *, axis: int = -1, steps: int | None = None) -> nnx.Module:
    """Return a layer of that normalizer for inputs (N, *S, C), or (N, C, *S) with `axis=1`.

    Batch norm keeps debiased statistics: with Flax' momentum of 0.99 the first ones would weigh 14 % after 198 steps.
    Epsilon is the catalog's, so that frameworks can be compared; Flax' own are partly others.

    Args:
        name: short name in the catalog: batch, ghost, renorm, instance, group, layer, rms, frn, evonorm_b0, evonorm_s0,
            dyt, grn. `frn` learns its epsilon, as in the paper where there is a single position, so that it takes
            tables.
        num_features: channels C.
        axis: where the channels are: -1 or 1.
        steps: length of the training; scales momentum and batch renormalization's schedule to it.

    Raises:
        NormValueError: for an unknown name (with the nearest ones); the layer's first call tells where it has nothing
        to normalize over.
    """
    epsilon = find(name).eps
    check("norm_layer", {"num_features": Integer(1)}, {"num_features": num_features})
    if axis not in (-1, 1):
        raise NormValueError(message("`axis` must be -1 or 1", repr(axis)))
    common: dict[str, Any] = {"epsilon": epsilon, "rngs": nnx.Rngs(0)}  # draws nothing: parameters are 1 and 0
    batch: dict[str, Any] = {"axis": axis, "momentum": momentum_for(steps), "debiased": True, **common}
    renorm: dict[str, Any] = (
        {} if steps is None else {"schedule": RenormSchedule.for_steps(steps), "momentum": _RENORM_MOMENTUM}
    )
    rows: dict[str, Any] = {"reduction_axes": axis, "feature_axes": axis, **common}
    makers: dict[str, Callable[[], nnx.Module]] = {
        "batch": lambda: layers.BatchNorm(num_features, **batch),
        "ghost": lambda: layers.GhostBatchNorm(num_features, virtual_batch_size=16, **batch),
        "renorm": lambda: layers.BatchRenorm(num_features, axis=axis, **common, **renorm),
        "instance": lambda: InstanceNorm(num_features, feature_axes=axis, **common),
        "group": lambda: GroupNorm(num_features, axis=axis, **common),
        "layer": lambda: layers.LayerNorm(num_features, **rows),
        "rms": lambda: layers.RMSNorm(num_features, **rows),
        "frn": lambda: further.FilterResponseNorm(num_features, axis=axis, learn_epsilon=True, **common),
        "evonorm_b0": lambda: further.EvoNormB0(num_features, **batch),
        "evonorm_s0": lambda: EvoNormS0(num_features, axis=axis, **common),
        "dyt": lambda: further.DynamicTanh(num_features, axis=axis),
        "grn": lambda: further.GlobalResponseNorm(num_features, axis=axis, **common),
    }
    return makers[name]()


def norm_factory(norm: str, position: str, steps: int | None) -> NormFactory:
    """The `norm` that a user's function calls; see :class:`NormFactory`. `norm` is a short name or `none`."""
    return NormFactory(norm, position, steps)


class NormFactory:
    """Gives the layers of one variant: `norm(num_features, activation=None, *, axis=-1)`.

    The layer takes channels on `axis` (-1 as everywhere in Flax, or 1) and any number of spatial axes. With an
    activation, a module or a function, both come as one module: act(norm(x)), or norm(act(x)) in a variant that stands
    after the activation. Of `frn`, `evonorm_b0` and `evonorm_s0`, which stand for both, the layer comes alone. `none`
    gives the identity. No random numbers are drawn, so that the rest of a model starts
    alike in every variant.

    Attributes:
        name: the variant as typed: `batch`, `batch:after`.
        position: `before` or `after` the activation.

    Raises NormValueError where the variant stands after the activation and none is given.

    >>> import jax
    >>> norm = norm_factory("batch", "after", None)
    >>> block = norm(64, jax.nn.relu)
    >>> block.position, type(block.norm).__name__
    ('after', 'BatchNorm')
    """

    def __init__(self, norm: str, position: str, steps: int | None) -> None:
        if norm != "none":
            find(norm)
        check_position(norm, position)
        self.name = norm if position == "before" else f"{norm}:{position}"
        self.position = position
        self._norm, self._steps = norm, steps
        self._given: list[nnx.Module] = []

    def __str__(self) -> str:
        return self.name

    def __call__(
        self, num_features: int, activation: Callable[[Any], Any] | None = None, *, axis: int = -1
    ) -> nnx.Module:
        """A layer for `num_features` channels; see the class."""
        check("norm", {"num_features": Integer(1)}, {"num_features": num_features})
        if axis not in (-1, 1):
            raise NormValueError(message("norm: `axis` must be -1 or 1", repr(axis)))
        if activation is not None and (isinstance(activation, type) or not callable(activation)):
            got = f"the class {activation.__name__}" if isinstance(activation, type) else repr(activation)
            raise NormTypeError(message("norm: `activation` must be a function or a module", got, "jax.nn.relu"))
        if activation is None and self.position == "after":
            must = f"{self} stands after the activation, so `norm` must be given the activation too"
            hint = f"norm({num_features}, jax.nn.relu) puts either first, as the variant asks"
            raise NormValueError(message(must, f"norm({num_features})", hint))
        layer: nnx.Module = Identity(axis)
        if self._norm != "none":
            layer = norm_layer(self._norm, num_features, axis=axis, steps=self._steps)
            self._given.append(layer)
        if activation is None or (self._norm != "none" and CATALOG[self._norm].activates):
            return layer
        return Block(layer, activation, self.position)

    def check_used(self, model: nnx.Module, name: str) -> None:
        """Raise NormValueError unless every layer that was given, and at least one, is part of `model`."""
        found = {id(module) for _, module in nnx.iter_modules(model)}
        missing = sum(id(layer) not in found and not _made_in_transform(layer) for layer in self._given)
        if self._norm != "none" and (missing or not self._given):
            must = f"{name} does not use the norm it was given: every layer of `norm` must be part of the model"
            got = f"{missing} of {len(self._given)} that are not" if self._given else "no call of norm"
            hint = "self.norm1 = norm(64), or nnx.List and nnx.Sequential"
            raise NormValueError(message(must, got, hint))


class Identity(nnx.Module):
    """Gives what it takes; knows where the channels are."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:
        """The input, whatever else a norm in its place was given."""
        return x


class Function(nnx.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, x: Any) -> Any:
        """The function's result."""
        return self.function(x)


class Block(nnx.Module):
    """A norm and an activation, the norm `before` or `after`."""

    def __init__(self, norm: nnx.Module, activation: Callable[[Any], Any], position: str) -> None:
        self.norm = norm
        self.activation = activation if isinstance(activation, nnx.Module) else Function(activation)
        self.position = position

    def __call__(self, x: Any) -> Any:
        """act(norm(x)), or norm(act(x))."""
        both = (self.norm, self.activation)
        first, second = both if self.position == "before" else both[::-1]
        return second(first(x))


class InstanceNorm(layers.InstanceNorm):
    """Instance norm for at least one spatial axis."""

    def __call__(self, x: Any, **options: Any) -> Any:
        """Normalize."""
        if x.ndim < 3:
            got = f"shape {tuple(x.shape)}"
            raise NormValueError(
                message("instance_norm needs spatial axes to normalize over", got, "use layer or group")
            )
        return super().__call__(x, **options)


class GroupNorm(layers.GroupNorm):
    """Group norm for any number of spatial axes, channels on `axis`; whether there are any decides how many groups."""

    def __init__(self, num_features: int, *, axis: int, **arguments: Any) -> None:
        super().__init__(num_features, num_groups=usual_groups(num_features, spatial=True), **arguments)
        self.axis = axis

    def __call__(self, x: Any, **options: Any) -> Any:
        """Normalize."""
        features = self.num_groups * self.group_size
        groups = usual_groups(features, spatial=x.ndim > 2)
        if groups != self.num_groups:
            self.num_groups, self.group_size = groups, features // groups
        return jnp.moveaxis(super().__call__(jnp.moveaxis(x, self.axis, -1), **options), -1, self.axis)


class EvoNormS0(further.EvoNormS0):
    """EvoNorm-S0 for any number of spatial axes; whether there are any decides how many groups."""

    def __init__(self, num_features: int, **arguments: Any) -> None:
        super().__init__(num_features, usual_groups(num_features, spatial=True), **arguments)

    def __call__(self, x: Any, **options: Any) -> Any:
        """Normalize."""
        groups = usual_groups(self.num_features, spatial=x.ndim > 2)
        if groups != self.groups:
            self.groups = groups
        return super().__call__(x, **options)


def _made_in_transform(layer: Any) -> bool:
    """Whether a transform such as nnx.vmap made this layer, which then gave others in its place."""
    try:
        layer.scale[...] = layer.scale[...]
    except errors.TraceContextError:
        return True
    return False
