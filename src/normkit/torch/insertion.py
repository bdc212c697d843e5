"""PyTorch's side of `normkit.insert`: norms made, given to layers as children, and set by an example."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.algebra import Pooled, merge
from normkit.errors import NormTypeError, NormValueError, message
from normkit.surgery import batches
from normkit.surgery.conversion import write
from normkit.surgery.graph import Graph
from normkit.surgery.insertion import (
    Place,
    as_identity,
    check_identity,
    check_place,
    subtracts,
    without_bias,
)
from normkit.surgery.plan import Edit
from normkit.torch import further, porting
from normkit.torch.factory import norm_layer
from normkit.torch.graph import capture, computes_as_named
from normkit.torch.probe import as_tensors, forward, untouched
from normkit.torch.sites import sites
from normkit.torch.surgery import (
    Subject,
    Transaction,
    carry,
    check_runs,
    copied,
    evaluated,
    largest_change,
    obstacle,
    split,
    transaction,
)

__all__ = ["opened", "take_out"]

_CHILD = "norm"
# Norms that no record has.
_ALONE = tuple(getattr(further, name) for name in further.__all__)
# Of the largest output, in float32 and wider: gamma and beta are rounded once, which depth amplifies. In narrower types
# as many spacings.
_UNCHANGED = 1e-5


def opened(model: nn.Module, norm: str | Callable[..., Any], example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_runs(model, example)
    return _Opened(model, norm, example)


def take_out(changes: Transaction, model: nn.Module, path: str) -> bool:
    """Take out a norm that was inserted, and with it the class that called it; False where it was not inserted."""
    owner, name = split(model, path)
    if not isinstance(owner, _Behind) or name != _CHILD:
        return False
    changes.child(path, None, type(owner).__bases__[1])
    return True


class _Behind:
    """In front of a layer's class: its output goes through its child `norm`.

    A class of its own, since what else could hold the norm takes something away: a container renames the layer's
    parameters, and hides its attributes from code that reads `conv.weight`; a hook is seen in no printed, exported or
    counted model. This way the layer is the same object with the same parameters under the same names, is still an
    instance of its class, and shows the norm among its children.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.norm(super().forward(*args, **kwargs))  # type: ignore[attr-defined,misc]

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # The class is made when it is needed, so pickle would not find it by its name.
        side, kind = type(self).__bases__
        return _blank, (side, kind), self.__getstate__()


class _InFront(_Behind):
    """The same for what goes into a layer."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super(_Behind, self).forward(self.norm(x), *args, **kwargs)  # type: ignore[attr-defined,misc]


@functools.cache
def _with_norm(side: type, kind: type) -> type[nn.Module]:
    return type(f"{kind.__name__}WithNorm", (side, kind), {"__module__": __name__, "__doc__": side.__doc__})


def _blank(side: type, kind: type) -> nn.Module:
    made = _with_norm(side, kind)
    return made.__new__(made)


class _Opened(Subject):
    """See `normkit.surgery.insertion.Opened`."""

    def __init__(self, model: nn.Module, norm: str | Callable[..., Any], example: Any) -> None:
        self._model, self._norm, self._example = model, norm, example
        self._made: dict[Place, nn.Module] = {}
        self._freed: set[Place] = set()  # where the bias goes
        self.sites = tuple(sites(model))
        alone = {path for path, module in model.named_modules() if isinstance(module, _ALONE)}
        norms = {id(model.get_submodule(path)) for path in (*alone, *(site.path for site in self.sites))}
        graph = capture(model, as_tensors(example, model), lambda module: id(module) in norms).graph
        nodes = (dataclasses.replace(n, op="normalize") if n.path in alone else n for n in graph.nodes)
        self.graph = Graph(graph.how, tuple(nodes))

    def layers(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules())

    def holds_layers(self, path: str) -> bool:
        return any(True for _ in self._model.get_submodule(path).children())

    def obstacle(self, path: str) -> str | None:
        layer = self._model.get_submodule(path)
        if hasattr(layer, _CHILD):
            return f"it has an attribute `{_CHILD}` already"
        return obstacle(self._model, path)

    def prepared(self, place: Place) -> Edit:
        channels = place.shape[place.axis]
        spatial = len(place.shape) - 2
        last = place.axis == -1 and spatial > 0
        if not isinstance(self._norm, str):
            norm = self._norm(channels, **({"axis": -1} if last else {}))
        elif last:
            norm = norm_layer(self._norm, channels, axis=-1)
        else:
            norm = norm_layer(self._norm, channels, spatial)
        if not isinstance(norm, nn.Module):
            raise NormTypeError(message("`norm` must give a torch.nn.Module", type(norm).__name__))
        record = porting.read(norm)
        check_place(record, place)
        self._made[place] = norm
        layer = self._model.get_submodule(place.path)
        old, name = type(layer).__name__, type(norm).__name__
        why = place.why
        if subtracts(record, place) and self._may_lose_bias(place, layer):
            self._freed.add(place)
            why += "; its bias goes, the norm subtracts it again"
        where = f"{old}, {name} behind it" if place.side == "output" else f"{name} in front of {old}"
        return Edit(place.path, old, where, why)

    def finish(
        self, places: Sequence[Place], *, identity: bool, data: Any, inplace: bool, optimizer: Any
    ) -> tuple[Any, float]:
        before = evaluated(self._model, self._example)
        old = dict(self._model.named_parameters())
        result = self._model if inplace else copied(self._model)
        with transaction(result) as changes:
            norms = {place: _put(changes, result, place, self._made[place]) for place in places}
            if identity:
                _calibrate(result, list(norms.values()), [self._example] if data is None else batches.inputs(data))
            for place in self._freed & norms.keys():
                _move_bias(changes, result, place, norms[place])
            change = largest_change(before, evaluated(result, self._example))
            if identity:
                _check_unchanged(result, change)
            if optimizer is not None:
                carry(optimizer, old, dict(result.named_parameters()))
        return result, change

    def _may_lose_bias(self, place: Place, layer: nn.Module) -> bool:
        if place.bias is None or not computes_as_named(layer) or len(self.graph.readers(place.bias)) > 1:
            return False
        shared = [name for name, p in self._model.named_parameters(remove_duplicate=False) if p is layer.bias]
        return len(shared) == 1


def _put(changes: Transaction, model: nn.Module, place: Place, norm: nn.Module) -> nn.Module:
    layer = model.get_submodule(place.path)
    own = next((p for p in layer.parameters(recurse=False) if p.is_floating_point()), None)
    like = own if own is not None else next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    norm = copy.deepcopy(norm).to(like.device, like.dtype).train(layer.training)
    if own is not None:
        norm.requires_grad_(own.requires_grad)
    side = _Behind if place.side == "output" else _InFront
    changes.child(f"{place.path}.{_CHILD}", norm, _with_norm(side, type(layer)))  # type: ignore[arg-type]
    return norm


def _calibrate(model: nn.Module, norms: Sequence[nn.Module], data: Iterable[Any]) -> None:
    """Make each norm give in evaluation what comes in, by the statistics of all batches together."""
    seen: dict[nn.Module, Pooled] = {}

    def pass_on(norm: nn.Module, given: tuple[Tensor, ...], _: Any) -> Tensor:
        record = porting.read(norm)
        assert record is not None
        x = given[0].detach().double().movedim(record.axis, -1).flatten(0, -2)
        if len(x):
            batch = Pooled(len(x), x.mean(0).cpu().numpy(), x.var(0, correction=0).cpu().numpy())
            seen[norm] = merge(*zip(seen[norm], batch, strict=True)) if norm in seen else batch
        return given[0]

    for norm in norms:
        check_identity(porting.read(norm), type(norm).__name__)
    with contextlib.ExitStack() as stack, untouched(model):
        for norm in norms:
            stack.callback(norm.register_forward_hook(pass_on).remove)
        model.eval()
        for batch in data:
            forward(model, as_tensors(batch, model))
    if not seen:
        raise NormValueError(message("`data` must hold at least one batch", "none"))
    for norm, found in seen.items():
        record = porting.read(norm)
        assert record is not None
        write(porting, norm, as_identity(record, found))


def _check_unchanged(model: nn.Module, change: float) -> None:
    """Raise NormValueError where the outputs are not those of before, up to rounding."""
    types = [p.dtype for p in model.parameters() if p.is_floating_point()]
    narrow = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    limit = _UNCHANGED * max(1.0, narrow / torch.finfo(torch.float32).eps)
    if not change <= limit:  # NaN is no agreement
        must = f'with `init="identity"` outputs on the example must stay within {limit:.0e} of the largest'
        hint = 'values far from zero or not finite, or a norm that computes more than its class says; init="fresh"'
        raise NormValueError(message(must, f"a change of {change:.1e}; nothing was inserted", hint))


def _move_bias(changes: Transaction, model: nn.Module, place: Place, norm: nn.Module) -> None:
    """Take a bias out; what is kept of the map's outputs moves by it."""
    assert place.bias is not None
    owner, name = split(model, place.bias)
    bias = getattr(owner, name).detach().double().cpu().numpy()
    record = porting.read(norm)
    assert record is not None
    changes.set(place.bias, None)
    write(porting, norm, without_bias(record, bias))
