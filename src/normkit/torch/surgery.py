"""Copying a PyTorch model, replacing layers and values in it, all or nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core import algebra
from normkit.errors import NormTypeError, message
from normkit.surgery.plan import OLD_OPTIMIZER
from normkit.torch.probe import as_tensors, check_sized, forward, untouched

__all__ = [
    "Subject",
    "Transaction",
    "called_with",
    "carry",
    "changed",
    "check_plain",
    "check_runs",
    "copied",
    "evaluated",
    "largest_change",
    "obstacle",
    "outputs",
    "split",
    "tensors_in",
    "transaction",
]


class Subject:
    """What holds of every change of a PyTorch model: see `normkit.surgery.protocol.Subject`."""

    without_optimizer = OLD_OPTIMIZER

    def check(self, inplace: bool, optimizer: Any) -> None:
        """PyTorch can do both."""


def check_plain(model: nn.Module) -> None:
    """Raise NormTypeError for a model whose layers are hidden: compiled, scripted, wrapped for several devices."""
    hint = {
        "OptimizedModule": "give model._orig_mod, and compile the result",
        "DistributedDataParallel": "give model.module, and wrap the result",
        "DataParallel": "give model.module, and wrap the result",
        "FullyShardedDataParallel": "change the model before it is sharded",
    }.get(type(model).__name__)
    if isinstance(model, torch.jit.ScriptModule):
        hint = "give the model it was made from"
    if hint is not None:
        raise NormTypeError(message("`model` must be a plain torch.nn.Module", type(model).__name__, hint))


def check_runs(model: nn.Module, example: Any) -> None:
    """Raise where a model cannot be looked into, or says itself that the example does not fit."""
    check_plain(model)
    check_sized(model)
    with untouched(model):
        output = forward(model, as_tensors(example, model))
    if not any(True for _ in tensors_in(output)):
        must = "`model` must return tensors, also within mappings, sequences and data classes, to be compared"
        raise NormTypeError(message(must, type(output).__name__))


def outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """The tensors that the model gives on these inputs, in the mode it is in."""
    with untouched(model):
        return [tensor.detach().clone() for tensor in tensors_in(forward(model, as_tensors(given, model)))]


def evaluated(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that the model gives on an example in evaluation mode."""
    with untouched(model):
        return outputs(model.eval(), as_tensors(example, model))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, mappings and data classes."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from tensors_in(part)
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in([getattr(output, name) for name in output.__dataclass_fields__])


def called_with(model: nn.Module, paths: Iterable[str], example: Any) -> dict[str, int]:
    """Number of axes of what the layers at these paths are called with on an example; nothing for those it misses."""
    found: dict[str, int] = {}
    with contextlib.ExitStack() as stack, untouched(model):
        for path in paths:

            def called(_: nn.Module, given: tuple[Any, ...], path: str = path) -> None:
                if given and isinstance(given[0], Tensor):
                    found[path] = given[0].dim()

            stack.callback(model.get_submodule(path).register_forward_pre_hook(called).remove)
        forward(model, as_tensors(example, model))
    return found


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest difference of an output, over its largest value."""
    wide = [[tensor.double().cpu().numpy() for tensor in tensors] for tensors in (before, after)]
    return algebra.largest_change(*wide)


def copied(model: nn.Module) -> Any:
    """A deep copy: hooks, tied weights, modes, `requires_grad` and attributes set on parameters are those of `model`.

    Gradients are not copied. Raises NormTypeError where a part cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        must = f"`model` must be one that copy.deepcopy takes ({error})"
        raise NormTypeError(message(must, type(model).__name__, "inplace=True")) from error
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.__dict__.update(mine.__dict__)  # deepcopy drops them
    return twin


def obstacle(model: nn.Module, path: str) -> str | None:
    """Why a layer cannot be given another class or be replaced; None where it can."""
    layer = model.get_submodule(path)
    if parametrize.is_parametrized(layer):
        return "it is parametrized"
    if "forward" in vars(layer):
        return "its forward was replaced by another function"
    owners = [module for module in model.modules() if layer in module.children()]
    if any(isinstance(owner, nn.TransformerEncoderLayer) for owner in owners):
        return "nn.TransformerEncoderLayer reads its weight in evaluation without calling it"
    return None


def split(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, buffer or layer, and its name there."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def changed(
    model: nn.Module, change: Callable[[Transaction, nn.Module], None], *, example: Any, inplace: bool, optimizer: Any
) -> tuple[Any, float | None]:
    """The model, or a copy of it, with all that `change` does to it or nothing; an optimizer goes along.

    Also by how much the outputs on the example change in evaluation, None without an example.
    """
    before = None if example is None else evaluated(model, example)
    old = dict(model.named_parameters())
    result = model if inplace else copied(model)
    with transaction(result) as changes:
        change(changes, result)
        after = None if example is None else evaluated(result, example)
        if optimizer is not None:
            carry(optimizer, old, dict(result.named_parameters()))
    return result, None if before is None or after is None else largest_change(before, after)


class Transaction:
    """Changes of a model, each with what undoes it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo: list[Callable[[], Any]] = []

    def replace(self, path: str, new: nn.Module) -> None:
        """Put a layer in the place of another, everywhere that one is registered."""
        old = self._model.get_submodule(path)
        for parent in list(self._model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old:
                    self._undo.append(_setter(parent._modules, name, old))
                    parent._modules[name] = new
        new.train(old.training)

    def child(self, path: str, new: nn.Module | None, kind: type[nn.Module]) -> None:
        """Give a layer a child at `path`, or take it out (None), and a class that fits; it stays the same object."""
        owner, name = split(self._model, path)
        before, old = type(owner), owner._modules.get(name)
        self._undo.append(lambda: _adopt(owner, name, old, before))
        _adopt(owner, name, new, kind)

    def become(self, path: str, kind: type[nn.Module], gains: Mapping[str, Any], loses: Iterable[str] = ()) -> None:
        """Give a layer another class and what that needs; all else of it, and the object, stay the same."""
        layer = self._model.get_submodule(path)
        before, members = type(layer), dict(vars(layer))
        self._undo.append(lambda: _become(layer, before, members))
        kept = {name: value for name, value in members.items() if name not in set(loses)}
        _become(layer, kind, {**kept, **gains})

    def write(self, path: str, value: Any) -> None:
        """Give a parameter or buffer other values of the same shape; it stays the same object."""
        owner, name = split(self._model, path)
        tensor: Tensor = getattr(owner, name)
        before = tensor.detach().clone()
        self._undo.append(lambda: _write(tensor, before))
        _write(tensor, value)

    def set(self, path: str, value: Any, like: Tensor | None = None) -> None:
        """Make or take out (None) a parameter; a new one has the type, device and `requires_grad` of `like`."""
        owner, name = split(self._model, path)
        self._undo.append(_setter(owner._parameters, name, owner._parameters[name]))
        if value is not None:
            assert like is not None
            made = torch.as_tensor(value).to(like.device, like.dtype)
            value = nn.Parameter(made, requires_grad=like.requires_grad)
        owner._parameters[name] = value

    def attribute(self, path: str, value: Any) -> None:
        """Set an existing plain attribute of a layer."""
        owner, name = split(self._model, path)
        self._undo.append(_setter(vars(owner), name, vars(owner)[name]))
        vars(owner)[name] = value

    def undo(self) -> None:
        """Take back everything."""
        while self._undo:
            self._undo.pop()()


@contextlib.contextmanager
def transaction(model: nn.Module) -> Iterator[Transaction]:
    """Inside, changes of the model that are taken back where anything fails, Ctrl-C included."""
    changes = Transaction(model)
    try:
        yield changes
    except BaseException:
        changes.undo()
        raise


def carry(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Move the groups and the state of an optimizer to the parameters of a changed model, by their paths.

    A parameter that is new joins the group of the one before it in the order of the model, one that is gone leaves.
    """
    paths = {parameter: path for path, parameter in before.items()}
    joining: dict[str, list[str]] = {}  # to the path of a known one, the new ones that follow it
    known = next((path for path in after if path in before), "")
    for new in after:
        if new in before:
            known = new
        else:
            joining.setdefault(known, []).append(new)
    groups = []
    state: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        kept: list[nn.Parameter] = []
        for parameter in group["params"]:
            path = paths.get(parameter)
            if path is not None and path not in after:
                continue
            moved = parameter if path is None else after[path]
            kept.append(moved)
            if parameter in optimizer.state and moved.shape == parameter.shape:
                state[moved] = optimizer.state[parameter]
            kept += [after[new] for new in joining.get(path or "", ())]
        groups.append(kept)
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = kept
    optimizer.state.clear()
    optimizer.state.update(state)


def _setter(values: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    def set_back() -> None:
        values[name] = value

    return set_back


def _adopt(owner: nn.Module, name: str, child: nn.Module | None, kind: type[nn.Module]) -> None:
    owner._modules.pop(name, None)
    if child is not None:
        owner._modules[name] = child
    owner.__class__ = kind


def _become(layer: nn.Module, kind: type[nn.Module], members: Mapping[str, Any]) -> None:
    layer.__class__ = kind
    vars(layer).clear()
    vars(layer).update(members)


def _write(tensor: Tensor, value: Any) -> None:
    with torch.no_grad():
        tensor.copy_(torch.as_tensor(value))
