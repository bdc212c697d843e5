"""Parametrizations of weights: weight norm and weight standardization, for `torch.nn.utils.parametrize`.

:func:`weight_norm` and its like register them on a layer, with a unit per output of the layer. What is trained then
lies in `layer.parametrizations`, so an optimizer is made afterwards; `layer.weight` is computed whenever it is read,
and `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` leaves its last value as a plain parameter.
Names and shapes in the `state_dict` of weight norm are those of `torch.nn.utils.parametrizations.weight_norm`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.constraints import Constraint, Flag, Integer, Optional, Real, check
from normkit.core.plan import compile_plan, plan
from normkit.core.spec import ARGUMENTS, NormSpec
from normkit.core.weights import WEIGHT_NORM, WEIGHT_STANDARDIZATION, gain_of_norm, gain_of_scaled
from normkit.errors import NormTypeError, NormValueError, message
from normkit.torch._execute import accumulator, normalize
from normkit.torch.normalizer_free import activation_gain
from normkit.torch.probe import as_tensors, check_sized, forward, untouched

__all__ = [
    "ScaledWeightStandardization",
    "WeightNorm",
    "WeightStandardization",
    "initialize_weight_norm",
    "scaled_weight_standardization",
    "weight_norm",
    "weight_standardization",
]

Dim = int | Literal["output"] | None

_MAPS = (nn.Linear, nn.modules.conv._ConvNd)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_SMALLEST = -sys.maxsize  # any whole number: how many axes there are is seen later
_ARGUMENTS: dict[str, Constraint] = {
    "dim": Optional(Integer(_SMALLEST)),
    "groups": Integer(1),
    "eps": ARGUMENTS["eps"],
    "gamma": Real(0.0, above=True),
    "gain": Flag(),
}


class _PerUnit(nn.Module):
    """Takes weights apart into units: the slices along `dim`, for `dim=None` all weights as one.

    Grouped transposed convolutions keep weights as (inputs, outputs of a group, *S): with `dim=1` and `groups`, a unit
    has the inputs of its group alone.
    """

    def __init__(self, dim: int | None, groups: int) -> None:
        super().__init__()
        check(type(self).__name__, _ARGUMENTS, {"dim": dim, "groups": groups})
        if groups > 1 and dim != 1:
            must = f"{type(self).__name__}: `dim` must be 1 with `groups`, as in transposed convolutions"
            raise NormValueError(message(must, dim))
        self.dim, self.groups = dim, groups

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"dim={self.dim}" + (f", groups={self.groups}" if self.groups > 1 else "")

    def _rows(self, weight: Tensor) -> Tensor:
        """Shape (units, *): weights of a unit in a row."""
        if self.dim is None:
            return weight.unsqueeze(0)
        if self.groups == 1:
            return weight.movedim(self.dim, 0)
        return weight.unflatten(0, (self.groups, -1)).movedim(2, 1).flatten(0, 1)

    def _back(self, rows: Tensor) -> Tensor:
        if self.dim is None:
            return rows.squeeze(0)
        if self.groups == 1:
            return rows.movedim(0, self.dim)
        return rows.unflatten(0, (self.groups, -1)).movedim(1, 2).flatten(0, 1)

    def _kept(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one value per unit, which for `groups=1` broadcasts against the weights."""
        if self.dim is None:
            return ()
        units = shape[self.dim] * self.groups
        return tuple(units if axis == self.dim % len(shape) else 1 for axis in range(len(shape)))

    def _normalized(self, spec: NormSpec, weight: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        """`gain` has one value per unit."""
        rows = self._rows(weight)
        p = (compile_plan if torch.compiler.is_compiling() else plan)(spec, rows.dim())
        y, _ = normalize(spec, p, rows, None if gain is None else gain.reshape(-1), None, eps)
        return self._back(y.to(weight.dtype))

    def _check(self, weight: Tensor) -> None:
        """Raise NormTypeError and NormValueError for weights that have no such units."""
        who = type(self).__name__
        if not weight.is_floating_point():
            raise NormTypeError(message(f"{who}: weights must be floating point", weight.dtype))
        shape = tuple(weight.shape)
        if self.dim is not None and not -len(shape) <= self.dim < len(shape):
            raise NormValueError(message(f"{who}: `dim` must be an axis of the weights", f"{self.dim}, shape {shape}"))
        if self.groups > 1 and shape[0] % self.groups:
            raise NormValueError(message(f"{who}: `groups` must divide the inputs", f"{self.groups}, shape {shape}"))


class WeightNorm(_PerUnit):
    """Weight normalization (arXiv:1602.07868): length and direction of each unit's weights are trained apart.

    weight = g * v / ||v||, with the Euclidean norm over a unit.

    Shapes: v and weight are alike; g is 1 but along `dim`, () for `dim=None`. In the state g is `original0`, v is
    `original1`. First values: v the weight that was there, g its norm, so nothing changes; for those of the paper see
    :func:`initialize_weight_norm`. Norms accumulate in float32 or wider.

    The gradient of v is at right angles to v, so under plain gradient descent ||v|| only grows and steps in direction
    shrink by themselves. Weight decay of v undoes that and changes nothing else; weight decay of g is that of the
    function. `normkit.param_groups` decays v, and leaves g alone as it does gamma.

    Args:
        dim: the axis of the units; None for one norm of all weights.
        groups: of a transposed convolution, with `dim=1`.

    Raises:
        NormValueError: for units whose weights are all 0, which have no direction, where weights are given.

    >>> layer = weight_norm(nn.Linear(2, 1, bias=False))
    >>> layer.weight = torch.tensor([[3.0, 4.0]])
    >>> {name: p.detach() for name, p in layer.parametrizations.weight.named_parameters()}
    {'original0': tensor([[5.]]), 'original1': tensor([[3., 4.]])}
    """

    def __init__(self, dim: int | None = 0, *, groups: int = 1) -> None:
        super().__init__(dim, groups)

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weights."""
        fan_in = v.numel() // max(1, g.numel())
        return self._normalized(WEIGHT_NORM, v, gain_of_norm(g.to(accumulator(v.dtype)), fan_in), WEIGHT_NORM.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return g and v that give these weights."""
        self._check(weight)
        rows = self._rows(weight).flatten(1)
        length = torch.linalg.vector_norm(rows, dim=1, dtype=accumulator(weight.dtype))
        if not length.is_meta and not bool(length.all()):
            must = "WeightNorm: every unit must have a weight that is not 0, for a direction"
            got = f"{int((length == 0).sum())} of {length.numel()} units without"
            raise NormValueError(message(must, got, "draw the weights first, or begin with g at 0"))
        return length.to(weight.dtype).reshape(self._kept(weight.shape)), weight


class WeightStandardization(_PerUnit):
    """Weight standardization (arXiv:1903.10520): the weights of each unit have mean 0 and variance 1.

    weight = (v - mean) / sqrt(var + eps), with the biased variance over a unit.

    Shapes: v, in the state `original`, and weight are alike. There is no gain: a norm behind the layer is to take the
    scale out again; without one, see :class:`ScaledWeightStandardization`. What is assigned to `layer.weight` is v. The
    authors' code instead divides by std + eps with the unbiased deviation, and eps = 1e-5; we follow their formula.

    Args:
        dim: the axis of the units; None for statistics of all weights.
        groups: of a transposed convolution, with `dim=1`.
        eps: added to the variance.

    Raises:
        NormValueError: for units of a single weight, which would always be 0, where weights are given.

    >>> layer = weight_standardization(nn.Linear(4, 1, bias=False))
    >>> layer.weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> layer.weight.detach().round(decimals=2) + 0.0
    tensor([[-1.0700, -0.5300,  0.0000,  1.6000]])
    """

    def __init__(self, dim: int | None = 0, *, groups: int = 1, eps: float = WEIGHT_STANDARDIZATION.eps) -> None:
        super().__init__(dim, groups)
        check(type(self).__name__, _ARGUMENTS, {"eps": eps})
        self.eps = eps

    def forward(self, v: Tensor) -> Tensor:
        """Return the weights."""
        return self._normalized(WEIGHT_STANDARDIZATION, v, self._gains(v), self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weights as they are: they are what is standardized."""
        self._check(weight)
        fan_in = self._rows(weight)[0].numel() if weight.numel() else 0
        if fan_in < WEIGHT_STANDARDIZATION.minimum:
            must = f"{type(self).__name__}: a unit must have at least two weights"
            raise NormValueError(message(must, f"{fan_in}, shape {tuple(weight.shape)}"))
        return weight

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{super().extra_repr()}, eps={self.eps}"

    def _gains(self, v: Tensor) -> Tensor | None:  # noqa: ARG002  # a place for a subclass
        return None


class ScaledWeightStandardization(WeightStandardization):
    """Weight standardization that keeps the variance of the inputs, for networks without norms (arXiv:2101.08692).

    weight = (v - mean) / sqrt(var + eps) * gain * gamma / sqrt(fan_in), with fan_in the number of a unit's weights.

    Shapes: as :class:`WeightStandardization`; gain, a parameter of this module, is 1 but along `dim`. First values:
    gain 1. Inputs of the activation in front are taken for standard normal; :func:`normkit.torch.activation_gain` is
    the gamma that makes good for the variance it takes away. The authors' code divides by
    sqrt(max(var * fan_in, 1e-4)); like timm we add eps to the variance. `normkit.param_groups` leaves gain undecayed.

    Args:
        shape: of the weights.
        dim, groups, eps: as :class:`WeightStandardization`.
        gamma: of the activation in front of the layer.
        gain: with a gain per unit that is trained.
        device, dtype: of the gain.

    Raises:
        NormValueError: as :class:`WeightStandardization`.

    >>> layer = scaled_weight_standardization(nn.Conv2d(8, 4, 3), activation="relu")
    >>> layer(torch.relu(torch.randn(64, 8, 9, 9))).var().sub(1).abs() < 0.2
    tensor(True)
    """

    gain: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        dim: int | None = 0,
        *,
        groups: int = 1,
        gamma: float = 1.0,
        eps: float = WEIGHT_STANDARDIZATION.eps,
        gain: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, groups=groups, eps=eps)
        check(type(self).__name__, _ARGUMENTS, {"gamma": gamma, "gain": gain})
        self._check(torch.empty(tuple(shape), device="meta"))
        self.gamma = gamma
        first = nn.Parameter(torch.ones(self._kept(shape), device=device, dtype=dtype)) if gain else None
        self.register_parameter("gain", first)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{super().extra_repr()}, gamma={self.gamma:.6g}" + (", gain=False" if self.gain is None else "")

    def _gains(self, v: Tensor) -> Tensor:
        rows = self._rows(v)
        wide = accumulator(v.dtype)
        gain = torch.ones(rows.shape[:1], device=v.device, dtype=wide) if self.gain is None else self.gain.to(wide)
        return gain_of_scaled(gain, self.gamma, v.numel() // max(1, rows.shape[0]))


def weight_norm(module: nn.Module, name: str = "weight", dim: Dim = "output") -> nn.Module:
    """Register :class:`WeightNorm` on a layer, in place, and return the layer.

    Args:
        module: any layer with weights.
        name: of the weights.
        dim: the axis of the units, None for all weights as one; "output" is 0, PyTorch's own default, but for
            transposed convolutions, whose outputs are in axis 1 and, with groups, in axis 0 too.

    Raises:
        NormTypeError: for what is no layer.
        NormValueError: where there are no such weights, or with such a norm already; see the class.

    >>> weight_norm(nn.ConvTranspose2d(4, 6, 3)).parametrizations.weight.original0.shape
    torch.Size([1, 6, 1, 1])
    """
    weight, units = _opened("weight_norm", module, name, dim)
    return _registered(module, name, WeightNorm(**units), weight)


def weight_standardization(
    module: nn.Module, name: str = "weight", dim: Dim = "output", *, eps: float = WEIGHT_STANDARDIZATION.eps
) -> nn.Module:
    """Register :class:`WeightStandardization` on a layer, in place, and return the layer.

    Args and errors are those of :func:`weight_norm`.

    >>> layer = weight_standardization(nn.Conv2d(3, 8, 3))
    >>> layer.weight.std(dim=(1, 2, 3), correction=0).sub(1).abs().max() < 1e-3
    tensor(True)
    """
    weight, units = _opened("weight_standardization", module, name, dim)
    return _registered(module, name, WeightStandardization(**units, eps=eps), weight)


def scaled_weight_standardization(
    module: nn.Module,
    name: str = "weight",
    dim: Dim = "output",
    *,
    activation: str | None = None,
    gain: bool = True,
    eps: float = WEIGHT_STANDARDIZATION.eps,
) -> nn.Module:
    """Register :class:`ScaledWeightStandardization` on a layer, in place, and return the layer.

    Args and errors are those of :func:`weight_norm`; `activation` is the name of the one in front of the layer, for its
    gamma.

    >>> layer = scaled_weight_standardization(nn.Linear(50, 8), activation="relu")
    >>> layer.weight.detach().square().sum(dim=1).round(decimals=1)[0]  # 2 / (1 - 1/pi)
    tensor(2.9000)
    """
    weight, units = _opened("scaled_weight_standardization", module, name, dim)
    gamma = 1.0 if activation is None else activation_gain(activation)
    made = ScaledWeightStandardization(
        weight.shape, **units, gamma=gamma, eps=eps, gain=gain, device=weight.device, dtype=weight.dtype
    )
    return _registered(module, name, made, weight)


def initialize_weight_norm(model: nn.Module, inputs: Any) -> nn.Module:
    """Set length and bias of all weight normalized maps so that their outputs on a batch have mean 0 and variance 1.

    Per output channel, over samples and positions: g <- g / std, bias <- (bias - mean) / std, layer by layer in the
    order in which one forward pass calls them, each on what the layers before it now give. That is the data-dependent
    initialization of arXiv:1602.07868, for drawn v (the paper: standard deviation 0.05) and bias 0. A layer without a
    bias keeps its mean; of a layer that is called several times the first call counts.

    The model runs in the modes it is in; buffers and random numbers stay as they were. Do it before the model is
    wrapped by DistributedDataParallel, which gives all processes the values of one.

    Args:
        model: with :class:`WeightNorm` on weights of linear maps and convolutions. Changed in place, all or nothing.
        inputs: a batch; a tuple or list holds several arguments, a mapping named ones.

    Returns:
        The model.

    Raises:
        NormValueError: where there is no such map, one that is not called, or one whose outputs do not vary or are not
            finite on the batch; for a `dim` that is not that of the outputs.

    >>> model = nn.Sequential(weight_norm(nn.Linear(3, 50)), nn.Tanh(), weight_norm(nn.Linear(50, 2)))
    >>> y = initialize_weight_norm(model, torch.randn(64, 3))(torch.randn(64, 3))
    """
    check_sized(model)
    found = {path: module for path, module in model.named_modules() if _is_normalized_map(module)}
    if not found:
        must = "initialize_weight_norm: `model` must have weight normalized linear maps or convolutions"
        raise NormValueError(message(must, "none", "normkit.torch.weight_norm(layer)"))
    for path, module in found.items():
        _check_initializable(path, module)
    paths = {module: path for path, module in found.items()}
    before = [(p, p.detach().clone()) for module in paths for p in _trained(module)]

    def standardize(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return _standardized(paths.pop(module), module, output) if module in paths else None

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(model))
            if "torch._dynamo" in sys.modules:  # what is compiled runs as it was written, with these hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in found.values():
                stack.callback(module.register_forward_hook(standardize).remove)
            forward(model, as_tensors(inputs, model))
        if paths:
            must = "initialize_weight_norm: every weight normalized map must be called by the model"
            raise NormValueError(message(must, f"none of {', '.join(paths.values())}"))
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    return model


def _opened(who: str, module: Any, name: str, dim: Dim) -> tuple[Tensor, dict[str, Any]]:
    """The weights of that name, and how they are divided into units."""
    if not isinstance(module, nn.Module):
        raise NormTypeError(message(f"{who}: `module` must be a torch.nn.Module", type(module).__name__))
    check_sized(module)
    parametrized = parametrize.is_parametrized(module, name)
    weight = getattr(module, name) if parametrized else module._parameters.get(name)
    if weight is None:
        held = ", ".join(own for own, p in module._parameters.items() if p is not None) or "no parameters"
        must = f"{who}: `name` must be that of a parameter of {type(module).__name__}"
        raise NormValueError(message(must, repr(name), f"it has {held}"))
    behind: Any = module.parametrizations if parametrized else {name: ()}
    if any(isinstance(p, _PerUnit) for p in behind[name]):
        must = f"{who}: weights must not be normalized already"
        raise NormValueError(message(must, f"`{name}` of {type(module).__name__}", "remove_parametrizations first"))
    if dim != "output":
        return weight, {"dim": dim, "groups": 1}
    return weight, _output(module, name)


def _output(module: Any, name: str) -> dict[str, Any]:
    if name == "weight" and isinstance(module, _TRANSPOSED):
        return {"dim": 1, "groups": module.groups}
    return {"dim": 0, "groups": 1}


def _registered(module: nn.Module, name: str, made: _PerUnit, weight: Tensor) -> nn.Module:
    made._check(weight)
    made.train(module.training)
    parametrize.register_parametrization(module, name, made)
    return module


def _is_normalized_map(module: Any) -> bool:
    named = isinstance(module, _MAPS) and parametrize.is_parametrized(module, "weight")
    return named and isinstance(module.parametrizations.weight[0], WeightNorm)


def _check_initializable(path: str, module: Any) -> None:
    norms = module.parametrizations.weight
    units = {"dim": norms[0].dim, "groups": norms[0].groups}
    axes = norms.original1.dim()
    if units["dim"] is None or {**units, "dim": units["dim"] % axes} != _output(module, "weight"):
        must = f"initialize_weight_norm: the norms of {path} must be those of its outputs"
        raise NormValueError(message(must, f"dim={units['dim']}", 'weight_norm(layer, dim="output")'))
    if len(norms) > 1 or parametrize.is_parametrized(module, "bias"):
        must = f"initialize_weight_norm: {path} must have no parametrization but weight norm"
        raise NormValueError(message(must, ", ".join(module.parametrizations)))


def _trained(module: Any) -> list[Tensor]:
    """Length and bias of a weight normalized map."""
    bias = module._parameters["bias"]
    return [module.parametrizations.weight.original0, *([] if bias is None else [bias])]


def _standardized(path: str, module: nn.Module, output: Tensor) -> Tensor:
    """Set length and bias of a map, and return the output that it has with them."""
    spatial = len(getattr(module, "kernel_size", ()))
    channels = output.detach().movedim(-1 - spatial, -1).flatten(0, -2).double()
    std, mean = channels.std(dim=0, correction=0), channels.mean(dim=0)
    bad = int((~((std > 0) & std.isfinite())).sum())
    if bad:
        must = f"initialize_weight_norm: outputs of {path or 'the model'} must vary over the batch and be finite"
        raise NormValueError(message(must, f"{bad} of {len(std)} channels that are not", "a larger batch"))
    length, *bias = _trained(module)
    length.copy_(length.double() / std.reshape(length.shape))
    around = torch.zeros_like(mean)
    for shift in bias:
        shift.copy_((shift.double() - mean) / std)
        around = mean
    shape = (-1, *(1,) * spatial)
    scaled = (output.double() - around.reshape(shape)) / std.reshape(shape)
    # With a bias the mean goes; without, outputs are only divided.
    return scaled.to(output.dtype)
