"""PyTorch's side of `normkit.sync` and `normkit.unsync`: batch norms that change their class and stay what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from normkit.errors import NormTypeError, NormValueError, message
from normkit.torch import factory, layers
from normkit.torch.graph import computes_as_named
from normkit.torch.probe import check_sized
from normkit.torch.sites import recognize
from normkit.torch.surgery import Subject, Transaction, called_with, changed, check_plain, check_runs, obstacle
from normkit.torch.synchronized import GroupHolder, SyncBatchNorm, check_group

__all__ = ["opened"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_SYNCHRONIZED = (SyncBatchNorm, nn.SyncBatchNorm)
_SIZED = [f"BatchNorm{n}d" for n in (1, 2, 3)]
# What may become synchronized and come back, with the numbers of axes it takes.
_KINDS: dict[type[nn.Module], tuple[int, ...]] = {
    getattr(home, name): getattr(layers, name)._dims for home in (nn, layers) for name in _SIZED
} | {factory.BatchNorm: factory.BatchNorm._dims}
_OWN = ("turned_from", "_process_group", "_dims")  # of a synchronized layer alone
_OURS = ("bessel", "nonfinite", "__module__")  # of our layers alone


class _Turn(NamedTuple):
    """What a layer becomes: its class, and what it gains and loses beside that."""

    kind: type[nn.Module]
    gains: Mapping[str, Any]
    loses: tuple[str, ...]


def opened(model: nn.Module, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_plain(model)
    check_sized(model)
    if example is not None:
        check_runs(model, example)
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.synchronization.Opened`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._turns: dict[str, _Turn] = {}
        together = [path for path, _ in self.layers(synchronized=True)]
        self._ndims = None if example is None else called_with(model, together, example)

    def layers(self, *, synchronized: bool) -> Iterator[tuple[str, str]]:
        wanted = _SYNCHRONIZED if synchronized else (_BATCH_NORM, SyncBatchNorm, layers._BatchRenorm)
        for path, module in self._model.named_modules():
            if isinstance(module, wanted) or (not synchronized and _computes_batch_norm(path, module)):
                yield path, type(module).__name__

    def synchronize(self, path: str, process_group: Any) -> tuple[str, str]:
        check_group("sync", process_group)
        layer = self._layer(path)
        kind = type(layer)
        group = getattr(layer, "process_group", None) if process_group is None else process_group
        if kind is SyncBatchNorm:
            if layer.process_group is group:
                raise NormValueError("it is synchronized already")
            self._turns[path] = _Turn(kind, {"_process_group": GroupHolder(group)}, ())
            return kind.__name__, "with another process group"
        if kind is not nn.SyncBatchNorm and kind not in _KINDS:
            raise NormValueError(_stays(layer))
        gains = {"bessel": True, "nonfinite": "skip", **_present(layer, "bessel", "nonfinite")}
        gains |= {"__module__": layers.KEPT_WHOLE, "turned_from": kind, "_process_group": GroupHolder(group)}
        if kind in _KINDS:
            gains["_dims"] = _KINDS[kind]
        self._turns[path] = _Turn(SyncBatchNorm, gains, ("process_group",))
        return SyncBatchNorm.__name__, "statistics of the batches of all processes"

    def separate(self, path: str) -> tuple[str, str]:
        layer = self._layer(path)
        if type(layer) not in _SYNCHRONIZED:
            raise NormValueError(_stays(layer))
        was = getattr(layer, "turned_from", None)
        if was in _KINDS:
            kind, why = was, "what it was before"
        else:
            theirs = nn.SyncBatchNorm in (was, type(layer))
            kind, ndim = self._sized(path, nn if theirs else layers)
            why = f"its input has {ndim} axes"
        loses = (*_OWN, "process_group", *(_OURS if kind.__module__.startswith("torch.") else ()))
        self._turns[path] = _Turn(kind, {}, loses)
        return kind.__name__, why

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        def change(changes: Transaction, _: nn.Module) -> None:
            for path, turn in self._turns.items():
                changes.become(path, *turn)

        return changed(self._model, change, example=self._example, inplace=inplace, optimizer=optimizer)

    def _layer(self, path: str) -> Any:
        reason = obstacle(self._model, path)
        if reason is not None:
            raise NormValueError(reason)
        return self._model.get_submodule(path)

    def _sized(self, path: str, home: Any) -> tuple[type[nn.Module], int]:
        """The batch norm for what a layer is called with."""
        if self._ndims is None:
            must = f"unsync: `example` must be given, for {path or 'the layer'} fits any number of axes"
            raise NormTypeError(message(must, "none", "example=inputs that the model takes"))
        ndim = self._ndims.get(path)
        name = next((n for n in _SIZED if ndim in getattr(layers, n)._dims), None)
        if name is None:
            got = "it is not called on this example" if ndim is None else f"its input has {ndim} axes"
            raise NormValueError(f"{got}: which batch norm stands there is not known")
        assert ndim is not None
        return getattr(home, name), ndim


def _computes_batch_norm(path: str, module: nn.Module) -> bool:
    """Whether a layer of another class is a batch norm by its numbers, one that can be trained."""
    site = recognize(path, module)
    return (
        site is not None
        and site.how == "probe"
        and site.record.kind == "batch"
        and next(module.parameters(), None) is not None
    )


def _stays(layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, layers._GhostBatchNorm):
        return "its groups are smaller than one batch on purpose"
    if isinstance(layer, layers._BatchRenorm):
        return "it corrects small batches by its running statistics, and has no synchronized form"
    if not isinstance(layer, _BATCH_NORM):
        return f"{kind} is no class of torch.nn or ours: how it trains is not known"
    if not computes_as_named(layer):
        return f"{kind} has a forward of its own, which another class would drop"
    return f"{kind} is a class of its own, which others may look for"


def _present(layer: nn.Module, *names: str) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in names if name in vars(layer)}
