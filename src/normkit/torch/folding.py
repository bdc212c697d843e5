"""PyTorch's side of `normkit.fold`: the model looked into, the folds carried out and tried."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.surgery.folding import Change, Fold
from normkit.surgery.graph import Node
from normkit.surgery.sites import Site
from normkit.torch.graph import capture
from normkit.torch.probe import as_tensors
from normkit.torch.sites import sites
from normkit.torch.surgery import (
    Subject,
    Transaction,
    carry,
    check_runs,
    copied,
    largest_change,
    outputs,
    split,
    tensors_in,
    transaction,
)

__all__ = ["drop_affine", "opened"]

# Of the largest output. Folding rounds at 1e-16, which depth amplifies. A model that computes parts in float32 whatever
# its type passes a change of 1e-16 on as a spacing of float32, 6e-8, now and then. In another type: a hundred spacings.
_CLOSE = 1e-10
_CLOSE_NARROW = 1e-6
_SPACINGS = 100
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def opened(model: nn.Module, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_runs(model, example)
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.folding.Opened`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self.sites = tuple(sites(model))
        norms = {id(model.get_submodule(site.path)) for site in self.sites}
        self._flow = capture(model, as_tensors(example, model), lambda module: id(module) in norms)
        self.graph = self._flow.graph
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        if node.id not in self._flow.functions:
            return None
        given = {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
        moved = self._flow.run(node, given)
        return moved.numpy() if isinstance(moved, Tensor) else moved

    def shape(self, state: str) -> tuple[int, ...]:
        owner, name = split(self._model, state)
        return tuple(getattr(owner, name).shape)

    def bias_beside(self, weight: str) -> str | None:
        owner, name = split(self._model, weight)
        return weight.removesuffix("weight") + "bias" if name == "weight" and "bias" in owner._parameters else None

    def obstacle(self, norm: str, weight: str) -> str | None:
        map_path = weight.rpartition(".")[0]
        if parametrize.is_parametrized(self._modules[map_path]) or any(
            path.startswith(f"{map_path}.parametrizations") for path in self._modules
        ):
            return f"the weight of {map_path} is parametrized"
        # Hooks on what holds both see the same values as before.
        for path in sorted(self._holders(norm) ^ self._holders(map_path)):
            if any(getattr(self._modules[path], name) for name in _HOOKS):
                return f"{path} has hooks"
        return None

    def settle(self, folds: Sequence[Fold]) -> dict[int, str]:
        if not folds:
            return {}
        trial = _Trial(self._model, self._example)
        with transaction(trial.model) as together:
            for fold in folds:
                _apply(together, trial.model, fold)
            if trial.difference() is None:
                return {}
            together.undo()
        rejected = {}
        for number, fold in enumerate(folds):
            with transaction(trial.model) as alone:
                _apply(alone, trial.model, fold)
                reason = trial.difference()
                if reason is not None:
                    rejected[number] = reason
                    alone.undo()
        return rejected

    def finish(self, folds: Sequence[Fold], *, inplace: bool, optimizer: Any) -> tuple[Any, float]:
        before = outputs(self._model, as_tensors(self._example, self._model))
        old = dict(self._model.named_parameters())
        result = self._model if inplace else copied(self._model)
        with transaction(result) as changes:
            for fold in folds:
                _apply(changes, result, fold)
            after = outputs(result, as_tensors(self._example, result))
            if optimizer is not None:
                carry(optimizer, old, dict(result.named_parameters()))
        return result, largest_change(before, after)

    def _holders(self, path: str) -> set[str]:
        """A layer, by all its paths, and all that it lies in, but the model."""
        layer = self._modules[path]
        found = {other for other, module in self._modules.items() if module is layer and other}
        return found | {other[:at] for other in found for at, letter in enumerate(other) if letter == "."}


class _Trial:
    """A copy of the model in float64, and its outputs before anything was changed."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = copied(model)
        try:
            self.model.double()
            self._close = _CLOSE_NARROW if self._run(example) else _CLOSE
        except Exception:  # a model that cannot be run in float64 is tried as it is
            self.model = copied(model)
            self._run(example)
            types = [p.dtype for p in model.parameters() if p.is_floating_point()]
            self._close = _SPACINGS * max((torch.finfo(dtype).eps for dtype in types), default=2.0**-23)

    def difference(self) -> str | None:
        """How the outputs differ from those before, None where they do not."""
        try:
            after = [outputs(self.model, given) for given in self._given]
        except Exception as error:
            return f"folded, the model fails: {type(error).__name__}"
        worst = max(itertools.starmap(largest_change, zip(self._before, after, strict=True)))
        return None if worst <= self._close else f"folded, the outputs change by {worst:.1e} of the largest"

    def _run(self, example: Any) -> bool:
        """Whether anything is computed in a type narrower than float64."""
        given = as_tensors(example, self.model)
        self._given = [given]
        with _Narrow() as narrow:
            self._before = [outputs(self.model, given)]
        other = _random(given)
        with contextlib.suppress(Exception):  # the model may not take any inputs: special tokens must be in place
            self._before.append(outputs(self.model, other))
            self._given.append(other)
        return narrow.seen


class _Narrow(TorchDispatchMode):
    """Sees whether anything is computed in a type narrower than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            self.seen |= tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.numel() > 0
        return output


def _random(given: Any) -> Any:
    """Inputs like the example: floating point values of its mean and deviation, others of its own in another order."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(given, Mapping):
        return {key: _random(part) for key, part in given.items()}
    if isinstance(given, tuple):
        return tuple(map(_random, given))
    if not isinstance(given, Tensor) or not given.numel():
        return given
    if given.is_floating_point():
        drawn = torch.randn(given.shape, generator=generator, dtype=torch.float64).to(given)
        spread = given.std(correction=0)
        return given.mean() + torch.where(spread > 0, spread, torch.ones_like(spread)) * drawn
    order = torch.randperm(given.numel(), generator=generator).to(given.device)
    return given.flatten()[order].reshape(given.shape)


def _apply(changes: Transaction, model: nn.Module, fold: Fold) -> None:
    for change in fold.changes:
        _change(changes, model, change)
    path = fold.site.path
    norm = model.get_submodule(path)
    if fold.leaves == "nothing":
        changes.replace(path, nn.Identity())
    elif fold.leaves == "bare":
        names = {role: name for role, name in fold.site.names.items() if role in ("gamma", "beta")}
        if fold.site.how == "class":
            drop_affine(changes, model, fold.site, names.values())
            return
        # What its forward does without them is not known; with what changes nothing it is.
        for role, name in names.items():
            if getattr(norm, name) is not None:
                neutral = float(role == "gamma" and fold.site.record.gain == "w")
                changes.write(f"{path}.{name}", torch.full_like(getattr(norm, name), neutral))


def drop_affine(changes: Transaction, model: nn.Module, site: Site, names: Iterable[str]) -> None:
    """Take these parameters out of a norm of a known class, and say so in its flag."""
    norm = model.get_submodule(site.path)
    present = [name for name in names if getattr(norm, name) is not None]
    for name in present:
        changes.set(f"{site.path}.{name}", None)
    for flag in ("affine", "elementwise_affine"):
        if present and flag in vars(norm):
            changes.attribute(f"{site.path}.{flag}", False)


def _change(changes: Transaction, model: nn.Module, change: Change) -> None:
    if change.side == "bias":
        assert change.bias is not None
        changes.set(change.bias, None)
        return
    owner, name = split(model, change.weight)
    weight = getattr(owner, name)
    bias = None if change.bias is None else getattr(*split(model, change.bias))
    new, shifted = change.applied(_array(weight), None if bias is None else _array(bias))
    changes.write(change.weight, new)
    if bias is not None and change.bias is not None:
        changes.write(change.bias, shifted)
    elif shifted is not None:
        assert change.bias is not None
        changes.set(change.bias, shifted, like=weight)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
