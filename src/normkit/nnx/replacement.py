"""The side of Flax NNX of `normkit.replace` and `normkit.remove`: norms made, and put in the place of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.nnx import layers, porting
from normkit.nnx.factory import Identity
from normkit.nnx.graph import variables
from normkit.nnx.probe import as_arrays, calls_replaced, forward
from normkit.nnx.sites import sites
from normkit.nnx.states import given_class, keep_mode
from normkit.nnx.surgery import Subject, modules, place
from normkit.surgery.conversion import write
from normkit.surgery.sites import Site

__all__ = ["opened"]

_NAMES = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
_OURS = {getattr(nnx, name): getattr(layers, name) for name in _NAMES}  # ours derive from Flax' own
_VALUES = tuple(porting.NAMES.values())


def opened(model: nnx.Module, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError where the example does not fit it, and whatever the model raises."""
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.replacement.Opened`."""

    def __init__(self, model: nnx.Module, example: Any) -> None:
        super().__init__(model, example)
        self._layers = modules(model)
        self._made: dict[str, nnx.Module] = {}
        self.sites = tuple(site for site in sites(model) if site.path)  # the model itself has no place in a model
        self._ndims = {} if example is None else self._called_with()

    def layer(self, path: str) -> Any:
        return self._layers[path]

    def obstacle(self, path: str) -> str | None:  # noqa: ARG002  # NNX has no hooks
        return None

    def ndim(self, path: str) -> int | None:
        return self._ndims.get(path)

    def make(self, path: str, record: NormRecord) -> str:
        old = self.layer(path)
        made = porting.make(record, -1 if self.ndim(path) == 2 else record.axis)
        made.dtype, made.param_dtype = old.dtype, old.param_dtype
        for variable in variables(made).values():
            if isinstance(variable, nnx.Param):
                variable.set_value(jnp.asarray(variable.get_value(), old.param_dtype))
        write(porting, made, record)
        return self.take(path, made)

    def take(self, path: str, layer: Any) -> str:
        made = Identity() if layer is None else layer
        if not isinstance(made, nnx.Module):
            must = "functions in `norms` must give an nnx.Module"
            raise NormTypeError(message(must, type(made).__name__))
        self._made[path] = made
        return type(made).__name__

    def counterpart(self, site: Site) -> str:
        layer = self.layer(site.path)
        kind = given_class(layer)
        if kind not in _OURS:
            own = kind.__module__.startswith("normkit.")
            raise NormValueError(
                "it is ours already" if own else "it has a class of its own, which others may look for"
            )
        names = [name for name in inspect.signature(kind.__init__).parameters if hasattr(layer, name)]
        made = _OURS[kind](**{name: getattr(layer, name) for name in names}, rngs=nnx.Rngs(0))
        write(porting, made, site.record)
        return self.take(site.path, made)

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        self.check(inplace, optimizer)
        return self.changed(self._exchange, inplace)

    def _exchange(self, model: nnx.Module) -> None:
        found = modules(model)
        for path, made in self._made.items():
            _take_over(made, found[path])
            place(model, found[path], made)

    def _called_with(self) -> dict[str, int]:
        copy = nnx.clone(self._model)
        copy.eval()
        own = modules(copy)
        norms = {id(own[site.path]): site.path for site in self.sites}
        found: dict[str, int] = {}

        def seen(call: Any) -> Callable[..., Any]:
            def run(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
                if id(layer) in norms:
                    found[norms[id(layer)]] = np.ndim(x)
                return call(layer, x, *args, **kwargs)

            return run

        with calls_replaced({type(layer) for layer in own.values() if id(layer) in norms}, seen):
            forward(copy, as_arrays(self._example, copy))
        return found


def _take_over(made: Any, old: Any) -> None:
    """What stays: variables of the same meaning and value, their types, the mode, and whether it is frozen."""
    for name in _VALUES:
        mine, its = getattr(made, name, None), getattr(old, name, None)
        if not (isinstance(mine, nnx.Variable) and isinstance(its, nnx.Variable)) or mine.shape != its.shape:
            continue
        if np.array_equal(mine.get_value(), its.get_value()) and mine.dtype == its.dtype:
            setattr(made, name, its)
        elif isinstance(mine, nnx.Param):
            object.__setattr__(mine, "__class__", type(its))
    keep_mode(old, made)
