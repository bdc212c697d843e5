"""Keras' side of `normkit.replace` and `normkit.remove`: norms made, and put in the place of others."""

from __future__ import annotations

from typing import Any

import keras

from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.keras import layers, porting
from normkit.keras.probe import own_errors
from normkit.keras.recording import array
from normkit.keras.surgery import Changes, Subject, check_known, check_runs, like, named_in, rebuilt, sites
from normkit.surgery.conversion import write
from normkit.surgery.sites import Site

__all__ = ["opened"]

_NAMES = ("BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization")
_OURS = {getattr(keras.layers, name): getattr(layers, name) for name in _NAMES}


def opened(model: Any, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    if example is None:
        check_known(model)
    else:
        check_runs(model, example)
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.replacement.Opened`."""

    def __init__(self, model: Any, example: Any) -> None:
        super().__init__(model, example)
        self._paths = named_in(model)
        self.sites = tuple(sites(self._layers, self._paths))
        self._by_path = {self._paths.get(number, layer.path): layer for number, layer in self._layers.items()}
        self._made: dict[str, tuple[Any, list[Any]]] = {}  # a layer, and the values of its weights

    def layer(self, path: str) -> Any:
        return self._by_path[path]

    def obstacle(self, path: str) -> str | None:
        return None if id(self.layer(path)) in self._paths else "another layer calls it"

    def ndim(self, path: str) -> int | None:
        return len(_shape(self.layer(path)))

    def make(self, path: str, record: NormRecord) -> str:
        made = porting.make(record, -1 if self.ndim(path) == 2 else record.axis)
        write(porting, made, record)
        return self.take(path, made)

    def take(self, path: str, layer: Any) -> str:
        old = self.layer(path)
        made = keras.layers.Identity() if layer is None else layer
        if not isinstance(made, keras.layers.Layer):
            must = "functions in `norms` must give a keras.layers.Layer"
            raise NormTypeError(message(must, type(made).__name__))
        if not made.built:
            with own_errors():
                made.build(_shape(old))
        new = like(made, old.name, old)
        _check_calls(old, new)
        self._made[path] = new, [array(variable.value) for variable in made.variables]
        return type(new).__name__

    def counterpart(self, site: Site) -> str:
        old = self.layer(site.path)
        kind = _OURS.get(type(old))
        if kind is None:
            raise NormValueError("it is ours already")
        made = kind.from_config(old.get_config())
        made.build(_shape(old))
        for source, target in zip(old.variables, made.variables, strict=True):
            target.assign(source.value)
        return self.take(site.path, made)

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        self.check(inplace, optimizer)
        instead = {path: new for path, (new, _) in self._made.items()}
        result, _ = rebuilt(self._model, self._paths, Changes(instead=instead))
        for new, values in self._made.values():
            for target, value in zip(new.variables, values, strict=True):
                target.assign(value)
        return result, None if self._example is None else self.change(result)


def _shape(layer: Any) -> tuple[int | None, ...]:
    """Of what a layer was built for."""
    return tuple(layer._build_shapes_dict["input_shape"])


def _check_calls(old: Any, new: Any) -> None:
    """Raise NormValueError where a layer is called with weights of samples that the new one does not take."""
    for call in old._inbound_nodes:
        weighed = call.arguments.kwargs.get("sample_weight") is not None
        if weighed and "sample_weight" not in new._call_signature.parameters:
            raise NormValueError(f"it is called with `sample_weight`, which {type(new).__name__} does not take")
