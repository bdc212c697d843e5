"""From a short name of the catalog to a layer, and the `norm` that a user's function calls."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from normkit.core.algebra import usual_groups
from normkit.core.catalog import CATALOG, check_position, find
from normkit.core.constraints import Integer, check
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormTypeError, NormValueError, message
from normkit.torch import further, layers

__all__ = ["ANYWHERE", "Anywhere", "NormFactory", "norm_factory", "norm_layer"]

# In a short run the running statistics must follow within it, and before the clips of renorm open.
_RENORM_MOMENTUM = 0.05


def norm_layer(
    name: str, num_features: int, spatial: int | None = None, *, axis: int = 1, steps: int | None = None
) -> nn.Module:
    """Return a layer of that normalizer for inputs (N, C, *S), or (N, *S, C) with `axis=-1`.

    Args:
        name: short name in the catalog: batch, ghost, renorm, instance, group, layer, rms, frn, evonorm_b0, evonorm_s0,
            dyt, grn. `frn` learns its eps, as in the paper where there is a single position, so that it takes tables.
        num_features: channels C.
        spatial: number of axes in S: 0 for a table, 2 for an image; None for a layer that takes 0 to 3.
        axis: where the channels are: 1, or -1 as in a transformer, which needs `spatial=None`.
        steps: length of the training; scales batch renormalization's schedule to it.

    Raises:
        NormValueError: for an unknown name (with the nearest ones), and where a normalizer has nothing to normalize
        over; with `spatial=None` the layer's first call tells that.
    """
    spec = find(name)
    check("norm_layer", _ARGUMENTS, {"num_features": num_features, "spatial": 0 if spatial is None else spatial})
    if spatial is not None and spatial > 3:
        raise NormValueError(message("`spatial` must be at most 3", spatial))
    if axis not in ((1, -1) if spatial is None else (1,)):
        allowed = "1 or -1" if spatial is None else "1 where `spatial` is given"
        raise NormValueError(message(f"`axis` must be {allowed}", repr(axis)))
    if name in ("instance", "evonorm_b0") and spatial == 0:
        raise _no_positions(spec.name, "a table (N, C)")
    last = spatial == 0 or axis == -1

    def family(kind: str) -> Callable[..., nn.Module]:
        return ANYWHERE[kind] if spatial is None else getattr(layers, f"{kind}{max(1, spatial)}d")

    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: family("BatchNorm")(num_features),
        "ghost": lambda: family("GhostBatchNorm")(num_features, virtual_batch_size=16),
        "renorm": lambda: family("BatchRenorm")(
            num_features,
            **({} if steps is None else {"schedule": RenormSchedule.for_steps(steps), "momentum": _RENORM_MOMENTUM}),
        ),
        "instance": lambda: family("InstanceNorm")(num_features, affine=True),
        "group": lambda: (
            GroupNorm(num_features)
            if spatial is None
            else layers.GroupNorm(usual_groups(num_features, spatial=spatial > 0), num_features)
        ),
        "layer": lambda: (layers.LayerNorm if last else layers.LayerNorm2d)(num_features),
        "rms": lambda: (layers.RMSNorm if last else layers.RMSNorm2d)(num_features),
        "frn": lambda: (FilterResponseNorm if spatial is None else further.FilterResponseNorm)(
            num_features, learn_eps=True
        ),
        "evonorm_b0": lambda: (EvoNormB0 if spatial is None else further.EvoNormB0)(num_features),
        "evonorm_s0": lambda: (
            EvoNormS0(num_features)
            if spatial is None
            else further.EvoNormS0(num_features, usual_groups(num_features, spatial=spatial > 0))
        ),
        "dyt": lambda: further.DynamicTanh(num_features, channels_last=last),
        "grn": lambda: further.GlobalResponseNorm(num_features, channels_last=last),
    }
    layer = makers[name]()
    if isinstance(layer, Anywhere):
        layer.axis = axis
    return layer


def norm_factory(norm: str, position: str, steps: int | None) -> NormFactory:
    """The `norm` that a user's function calls; see :class:`NormFactory`. `norm` is a short name or `none`."""
    return NormFactory(norm, position, steps)


class NormFactory:
    """Gives the layers of one variant: `norm(num_features, activation=None, *, axis=1)`.

    The layer takes channels on `axis` (1, or -1 as in a transformer) and any number of spatial axes. With an
    activation, a layer or a function, both come as one module: act(norm(x)), or norm(act(x)) in a variant that stands
    after the activation. Of `frn`, `evonorm_b0` and `evonorm_s0`, which stand for both, the layer comes alone. `none`
    gives the identity. No random numbers are drawn, so that the rest of a model starts
    alike in every variant.

    Attributes:
        name: the variant as typed: `batch`, `batch:after`.
        position: `before` or `after` the activation.

    Raises NormValueError where the variant stands after the activation and none is given.

    >>> norm = norm_factory("batch", "after", None)
    >>> [name for name, _ in norm(64, nn.ReLU()).named_children()]
    ['activation', 'norm']
    """

    _numbers = itertools.count()

    def __init__(self, norm: str, position: str, steps: int | None) -> None:
        if norm != "none":
            find(norm)
        check_position(norm, position)
        self.name = norm if position == "before" else f"{norm}:{position}"
        self.position = position
        self._norm, self._steps = norm, steps
        self._number, self._count = next(self._numbers), 0

    def __str__(self) -> str:
        return self.name

    def __call__(
        self, num_features: int, activation: Callable[[Any], Any] | None = None, *, axis: int = 1
    ) -> nn.Module:
        """A layer for `num_features` channels; see the class."""
        check("norm", {"num_features": Integer(1)}, {"num_features": num_features})
        if axis not in (1, -1):
            raise NormValueError(message("norm: `axis` must be 1 or -1", repr(axis)))
        if activation is not None and (isinstance(activation, type) or not callable(activation)):
            got = f"the class {activation.__name__}" if isinstance(activation, type) else repr(activation)
            raise NormTypeError(message("norm: `activation` must be a layer or a function", got, "nn.ReLU()"))
        if activation is None and self.position == "after":
            must = f"{self} stands after the activation, so `norm` must be given the activation too"
            hint = f"norm({num_features}, nn.ReLU()) puts either first, as the variant asks"
            raise NormValueError(message(must, f"norm({num_features})", hint))
        layer: nn.Module = nn.Identity()
        if self._norm != "none":
            layer = norm_layer(self._norm, num_features, axis=axis, steps=self._steps)
            # A mark and not the layer itself: nn.TransformerEncoder and others put copies of it into the model.
            layer.__dict__["_given"] = self._number, self._count
            self._count += 1
        if activation is None or (self._norm != "none" and CATALOG[self._norm].activates):
            return layer
        act = activation if isinstance(activation, nn.Module) else _Function(activation)
        both = [("norm", layer), ("activation", act)]
        return nn.Sequential(OrderedDict(both if self.position == "before" else both[::-1]))

    def check_used(self, model: nn.Module, name: str) -> None:
        """Raise NormValueError unless every layer that was given, and at least one, is part of `model`."""
        found = {module.__dict__.get("_given") for module in model.modules()}
        missing = sum((self._number, number) not in found for number in range(self._count))
        if self._norm != "none" and (missing or not self._count):
            must = f"{name} does not use the norm it was given: every layer of `norm` must be part of the model"
            got = f"{missing} of {self._count} that are not" if self._count else "no call of norm"
            hint = "self.norm1 = norm(64), or nn.Sequential and nn.ModuleList; a plain list hides layers"
            raise NormValueError(message(must, got, hint))


class _Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class Anywhere(nn.Module):
    """Takes 0 to 3 spatial axes, and the channels on `axis`: 1, or -1."""

    _dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    axis = 1
    num_features: int

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        run = super()._run  # type: ignore[misc]  # of the layer behind this class
        channels, other = self._channels(), -self.axis
        if input.dim() > 2 and input.shape[self.axis] != channels and input.shape[other] == channels:
            must = f"{type(self).__name__}: the channels must be on axis {self.axis}"
            raise NormValueError(message(must, f"shape {tuple(input.shape)}", f"norm({channels}, axis={other})"))
        if self.axis == 1:
            return run(input, **options)
        if options.get("residual") is not None:
            options["residual"] = options["residual"].movedim(-1, 1)
        # Contiguous, since code around the norms of a transformer calls view().
        return run(input.movedim(-1, 1), **options).movedim(1, -1).contiguous()

    def _channels(self) -> int:
        return self.num_features

    def extra_repr(self) -> str:
        """What torch prints of a layer."""
        return super().extra_repr() + ("" if self.axis == 1 else f", axis={self.axis}")


class BatchNorm(Anywhere, layers._BatchNorm, nn.modules.batchnorm._BatchNorm):
    """Batch norm for any number of spatial axes."""


class GhostBatchNorm(Anywhere, layers._GhostBatchNorm, nn.modules.batchnorm._BatchNorm):
    """Ghost batch norm for any number of spatial axes."""


class BatchRenorm(Anywhere, layers._BatchRenorm):
    """Batch renormalization for any number of spatial axes."""


class InstanceNorm(Anywhere, layers._InstanceNorm, nn.modules.instancenorm._InstanceNorm):
    """Instance norm for 1 to 3 spatial axes."""

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        if input.dim() < 3:
            raise _no_positions("instance_norm", f"shape {tuple(input.shape)}")
        return super()._run(input, **options)


class GroupNorm(Anywhere, layers.GroupNorm):
    """Group norm for any number of spatial axes; whether there are any decides the number of groups."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(usual_groups(num_channels, spatial=True), num_channels)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        groups = usual_groups(self.num_channels, spatial=input.dim() > 2)
        if groups != self.num_groups:
            self.num_groups = groups
        return super()._run(input, **options)

    def _channels(self) -> int:
        return self.num_channels


class FilterResponseNorm(Anywhere, further.FilterResponseNorm):
    """Filter response norm for any number of spatial axes."""


class EvoNormB0(Anywhere, further.EvoNormB0):
    """EvoNorm-B0 for 1 to 3 spatial axes."""


class EvoNormS0(Anywhere, further.EvoNormS0):
    """EvoNorm-S0 for any number of spatial axes; whether there are any decides the number of groups."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, usual_groups(num_features, spatial=True))

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        groups = usual_groups(self.num_features, spatial=input.dim() > 2)
        if groups != self.groups:
            self.groups = groups
        return super()._run(input, **options)


def _no_positions(name: str, got: str) -> NormValueError:
    return NormValueError(message(f"{name} needs spatial axes to normalize over", got, "use layer or group"))


_ARGUMENTS = {"num_features": Integer(1), "spatial": Integer(0)}
ANYWHERE = {kind.__name__: kind for kind in (BatchNorm, GhostBatchNorm, BatchRenorm, InstanceNorm)}
