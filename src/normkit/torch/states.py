"""What of the norm layers of a PyTorch model is trained: freezing, and the groups of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normkit.core.decay import looks_like_a_norm, undecayed
from normkit.torch.further import EvoNormB0
from normkit.torch.normalizer_free import SkipInit
from normkit.torch.porting import is_norm
from normkit.torch.probe import check_sized
from normkit.torch.sites import warn_of_unreached
from normkit.torch.weights import ScaledWeightStandardization, WeightNorm

__all__ = ["freeze", "grouped", "is_frozen", "keeps", "unfreeze"]

_ALL_GAINS = (ScaledWeightStandardization, SkipInit)  # modules whose parameters are gains
_WITH_LENGTHS = (WeightNorm, parametrizations._WeightNorm)  # parametrizations of which the first tensor is a gain


class _Frozen:
    """Stands in for a frozen layer's method `train`: the layer stays in evaluation, whatever the model is set to.

    It lies in the layer's own `__dict__`, which comes before the method of the class. So the class, its name, hooks and
    `state_dict` are what they were, and copies and pickles of the layer are frozen as well.
    """

    def __init__(self, layer: nn.Module, affine: bool) -> None:
        self.layer = layer
        self.asked = layer.training
        self.trained = [p for p in layer.parameters() if p.requires_grad] if affine else []

    def __call__(self, mode: bool = True) -> nn.Module:
        self.asked = mode
        for child in self.layer.children():
            child.train(mode)
        return self.layer


class _Kept:
    """Stands in for `reset_running_stats`, with which `torch.optim.swa_utils.update_bn` begins on all batch norms."""

    def __call__(self) -> None:
        """Keep them."""


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` froze this layer."""
    return isinstance(layer.__dict__.get("train"), _Frozen)


def freeze(model: nn.Module, affine: bool) -> int:
    """See `normkit.surgery.protocol.States`."""
    check_sized(model)
    warn_of_unreached("freeze reaches", model, _reached)
    unfreeze(model)
    # With `affine=False` only what has running statistics can be frozen.
    found = [m for m in model.modules() if _reached(m) and (affine or keeps(m))]
    for layer in found:
        frozen = _Frozen(layer, affine)
        layer.eval()
        layer.__dict__["train"] = frozen
        if hasattr(layer, "reset_running_stats"):
            layer.__dict__["reset_running_stats"] = _Kept()
        for parameter in frozen.trained:
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer moves whatever has a gradient, by weight decay alone if it is 0
    return len(found)


def _reached(layer: nn.Module) -> bool:
    return is_norm(layer) or isinstance(layer, EvoNormB0)


def keeps(layer: nn.Module) -> bool:
    """Whether a norm has running statistics."""
    return any(getattr(layer, name, None) is not None for name in ("running_mean", "running_var"))


def unfreeze(model: nn.Module) -> int:
    """See `normkit.surgery.protocol.States`."""
    found = [module for module in model.modules() if is_frozen(module)]
    for layer in found:
        frozen = layer.__dict__.pop("train")
        layer.__dict__.pop("reset_running_stats", None)
        layer.train(frozen.asked)
        for parameter in frozen.trained:
            parameter.requires_grad_(True)
    return len(found)


def grouped(model: nn.Module, weight_decay: float, biases: bool) -> list[dict[str, Any]]:
    """See `normkit.surgery.protocol.States`."""
    check_sized(model)
    exempt = {id(parameter) for module in model.modules() for parameter in _undecayed(module, biases)}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": value} for value in (weight_decay, 0.0)]
    for parameter in model.parameters():  # each once, also where modules share it
        if parameter.requires_grad:
            groups[id(parameter) in exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _undecayed(module: nn.Module, biases: bool) -> Iterator[nn.Parameter]:
    own = list(_named(module))
    norm = is_norm(module) or looks_like_a_norm(type(module), (parameter.shape for _, parameter, _ in own))
    for name, parameter, gain in own:
        if gain or undecayed(name, parameter.shape, norm=norm, biases=biases):
            yield parameter


def _named(module: Any) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Parameters of a module's own and, by their names, those behind parametrized tensors; and which are gains."""
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        # torch.nn.utils.weight_norm, from before there were parametrizations, names length and direction so.
        length = name.endswith("_g") and f"{name.removesuffix('_g')}_v" in own
        yield name, parameter, length or isinstance(module, _ALL_GAINS)
    if parametrize.is_parametrized(module):
        for name, behind in module.parametrizations.items():
            for original, parameter in behind.named_parameters(recurse=False):
                yield name, parameter, original == "original0" and isinstance(behind[0], _WITH_LENGTHS)
