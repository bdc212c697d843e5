"""PyTorch's side of `normkit.replace` and `normkit.remove`: norms made, and put in the place of others."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.surgery.conversion import write
from normkit.surgery.sites import Site
from normkit.torch import layers, porting
from normkit.torch.insertion import take_out
from normkit.torch.sites import sites
from normkit.torch.surgery import Subject, Transaction, called_with, changed, check_plain, check_runs, obstacle

__all__ = ["opened"]

_SIZED = tuple(f"{family}Norm{n}d" for family in ("Batch", "Instance") for n in (1, 2, 3))
_NAMES = (*_SIZED, "GroupNorm", "LayerNorm", "RMSNorm")
_OURS = {getattr(nn, name): getattr(layers, name) for name in _NAMES}  # ours derive from torch.nn's
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# Of the values of a layer in bfloat16. Another place of the rounding changes a quarter of them, another order of the
# sums next to none.
_ROUNDED_ELSEWHERE = 0.01


def opened(model: nn.Module, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_plain(model)
    if example is not None:
        check_runs(model, example)
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.replacement.Opened`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._made: dict[str, nn.Module] = {}
        self.sites = tuple(site for site in sites(model) if site.path)  # the model itself has no place in a model
        self._sites = {site.path: site for site in self.sites}
        self._ndims = {} if example is None else called_with(model, self._sites, example)

    def layer(self, path: str) -> nn.Module:
        return self._model.get_submodule(path)

    def obstacle(self, path: str) -> str | None:
        return obstacle(self._model, path)

    def ndim(self, path: str) -> int | None:
        return self._ndims.get(path)

    def make(self, path: str, record: NormRecord) -> str:
        made = porting.make(record, record.axis)
        name = self.take(path, made)
        write(porting, made, record)  # only now, in the type of the model
        return name

    def take(self, path: str, layer: Any) -> str:
        made = nn.Identity() if layer is None else layer
        if not isinstance(made, nn.Module):
            must = "functions in `norms` must give a torch.nn.Module"
            raise NormTypeError(message(must, type(made).__name__))
        old = self.layer(path)
        tensors = [t for t in (*old.parameters(False), *old.buffers(False)) if t.is_floating_point()]
        like = tensors[0] if tensors else next(self._model.parameters(), torch.empty(0))
        self._made[path] = made.to(like.device, like.dtype)
        return type(made).__name__

    def counterpart(self, site: Site) -> str:
        layer = self.layer(site.path)
        if site.how == "probe":
            return self._counterpart_of_probed(site, layer)
        kind = _OURS.get(type(layer))
        if kind is None:
            own = type(layer).__module__.startswith("normkit.")
            raise NormValueError(
                "it is ours already" if own else "it has a class of its own, which others may look for"
            )
        arguments = {
            name: getattr(layer, name) for name in inspect.signature(type(layer)).parameters if hasattr(layer, name)
        }
        if "bias" in arguments:
            arguments["bias"] = layer.bias is not None
        made = kind(**arguments)
        made._parameters.update(layer._parameters)
        made._buffers.update(layer._buffers)
        return self.take(site.path, made)

    def _counterpart_of_probed(self, site: Site, layer: nn.Module) -> str:
        if any(porting.NAMES[role] != name for role, name in site.names.items()):
            raise NormValueError("its parameters have other names than ours")
        name = self.make(site.path, site.record)
        made = self._made[site.path]
        if isinstance(made, layers.RMSNorm):
            cast = _cast(layer, made, site.record)
            if cast is None:
                raise NormValueError(f"it rounds bfloat16 elsewhere than our {name}")
            made.cast = cast
        return name

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        return changed(self._model, self._change, example=self._example, inplace=inplace, optimizer=optimizer)

    def _change(self, changes: Transaction, result: nn.Module) -> None:
        for path, made in self._made.items():
            if isinstance(made, nn.Identity) and take_out(changes, result, path):
                continue
            _take_over(made, result.get_submodule(path), self._sites[path])
            changes.replace(path, made)


def _take_over(made: nn.Module, old: nn.Module, site: Site) -> None:
    """What stays the same object: parameters with the same meaning and shape, hooks."""
    for name in _HOOKS:
        if vars(old)[name]:
            vars(made)[name] = vars(old)[name]
    same_gain = getattr(made, "gain", "w") == site.record.gain
    for role in ("gamma", "beta"):
        own = old._parameters.get(site.names.get(role, ""))
        new = made._parameters.get(porting.NAMES[role])
        if own is None or new is None:
            continue
        if own.shape == new.shape and (role == "beta" or same_gain) and torch.equal(own, new):
            made._parameters[porting.NAMES[role]] = own
        else:
            new.requires_grad_(own.requires_grad)


def _cast(layer: nn.Module, made: layers.RMSNorm, record: NormRecord) -> str | None:
    """The place of the rounding with which our layer gives in bfloat16 what the other gives."""
    x = torch.randn(64, record.shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs, mine = (copy.deepcopy(one).cpu().bfloat16() for one in (layer, made))
    generator = torch.Generator()
    for parameter in (*theirs.parameters(), *mine.parameters()):
        parameter.data.uniform_(0.5, 1.5, generator=generator.manual_seed(1))
    shares = {}
    with torch.no_grad():
        wanted = theirs(x)
        for cast in ("llama", "gemma", "none"):
            mine.cast = cast  # type: ignore[assignment]
            shares[cast] = (mine(x).to(wanted.dtype) != wanted).double().mean().item()
    best = min(shares, key=shares.__getitem__)
    return best if shares[best] <= _ROUNDED_ELSEWHERE else None
