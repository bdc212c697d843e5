"""What goes into the activations of a model: one forward pass, looked at from outside, that changes nothing."""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from numpy.typing import NDArray

from normkit.errors import NormTypeError, NormValueError, message

if TYPE_CHECKING:
    from normkit.experiments.protocol import SiteValues

__all__ = [
    "as_arrays",
    "by_path",
    "check_built",
    "named_layers",
    "own_errors",
    "probe",
    "restored",
    "untouched",
]

_LAYERS = {
    keras.layers.ReLU: "relu",
    keras.layers.LeakyReLU: "leaky_relu",
    keras.layers.PReLU: "prelu",
    keras.layers.ELU: "elu",
}
_NONE = ("linear", "softmax", "log_softmax", "sparsemax")  # no activations of hidden layers


def probe(model: Any, x: Any, *, train: bool = True) -> Sequence[SiteValues]:
    """Every call of an activation in one forward pass, in the order of the calls; softmax and linear are none.

    Seen are activation layers and what layers hold as their `activation`, which is called in an eager pass; not a
    function called directly inside `call`, nor what recurrent layers do. A call is named by the path of its layer
    inside the model, with a number where that is called several times.

    Channels are on the last axis, unless the layer that ran last before the call says otherwise: a convolution with
    `data_format="channels_first"`, a norm with another `axis`.

    gamma and beta are those of the norm that gave the very tensor that goes in, or that takes the one that comes out:
    after a residual sum there is none.

    Args:
        model: any Keras model or layer that is built. Variables are afterwards as before, random numbers of its
            layers, of Python and of NumPy too.
        x: input of the model.
        train: with `training=True`, else in inference.

    Raises NormValueError for a model that is not built, and whatever the model raises.

    >>> import normkit
    >>> from keras import layers
    >>> model = keras.Sequential([keras.Input((8,)), layers.Dense(16), layers.BatchNormalization(), layers.ReLU()])
    >>> seen = normkit.activations(model, np.random.default_rng(0).normal(size=(64, 8)))
    >>> [(site.name, site.activation, round(site.std, 1), site.gamma_mean) for site in seen.sites]
    [('re_lu', 'relu', 1.0, 1.0)]
    """
    check_built(model)
    watch = _Watch(model)
    with untouched(model), watch.hooked():
        model(as_arrays(x), training=train)
    return watch.sites()


def as_arrays(x: Any, floating: str | None = None) -> Any:
    """Arrays and tensors of any framework as NumPy arrays, also those inside mappings, tuples and lists.

    Floating point values take the type `floating`, None for Keras' `floatx`; whole numbers keep theirs.
    """
    if isinstance(x, Mapping):
        return {key: as_arrays(part, floating) for key, part in x.items()}
    if isinstance(x, tuple | list):
        return tuple(as_arrays(part, floating) for part in x)
    if not hasattr(x, "shape"):
        return x
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.dtype.kind not in "biuf":
        raise NormTypeError(message("arrays must hold numbers", f"dtype {array.dtype}"))
    return array.astype(floating or keras.config.floatx()) if array.dtype.kind == "f" else array


def check_built(model: Any) -> None:
    """Raise NormValueError for a model whose weights are only made in its first call."""
    if not model.built:
        must = "a model must be built, so that all weights are there from the start"
        raise NormValueError(message(must, f"{model.name}, which is not", "begin it with keras.Input, or call it once"))


def named_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer inside a model with its path, in order, each once.

    The numbers in names that Keras gave count from the start of the model: Keras counts on from one model to the next.
    """
    seen: set[int] = set()
    counts: Counter[str] = Counter()

    def walk(layer: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            name, automatic = inner.name, _snake(type(inner).__name__)
            if re.fullmatch(rf"{automatic}(_\d+)?", name):
                name = f"{automatic}_{counts[automatic]}" if counts[automatic] else automatic
                counts[automatic] += 1
            yield "/".join((*path, name)), inner
            yield from walk(inner, (*path, name))

    yield from walk(model, ())


def by_path(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer with the names that lead to it, as `get_layer` takes them; the first of several; the model as "".

    Where a model has several layers of one name, as one with a `call` of its own may, the further ones have a number.
    """
    seen: set[int] = set()
    counts = Counter[str]()

    def walk(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
        if id(layer) not in seen:
            seen.add(id(layer))
            counts[path] += 1
            path = f"{path} ({counts[path]})" if counts[path] > 1 else path
            yield path, layer
            for inner in layer._flatten_layers(include_self=False, recursive=False):
                yield from walk(inner, f"{path}/{inner.name}" if path else inner.name)

    yield from walk(model, "")


@contextlib.contextmanager
def untouched(model: Any, *, weights: bool = False) -> Iterator[None]:
    """Leave variables and random numbers as they were. Inside, no gradients are kept.

    With `weights` those that are trained, too, which few layers write: spectral normalization does, in training.
    """
    with restored(model.variables if weights else model.non_trainable_variables), _without_gradients():
        yield


@contextlib.contextmanager
def restored(variables: Iterable[keras.Variable]) -> Iterator[None]:
    """Leave these variables and the random numbers as they were."""
    drawn = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)  # by functions that are given no seed
    states_of_keras = () if drawn is None else (drawn.state,)
    held = [(variable, _array(variable)) for variable in (*variables, *states_of_keras)]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a user's call may draw from them
    with own_errors(), _forked():
        try:
            yield
        finally:
            for variable, value in held:
                variable.assign(value)
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, drawn)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Let errors through as they are: Keras makes new ones, with the whole call in their text and no traceback."""
    filtering = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtering:
            keras.config.enable_traceback_filtering()


def _forked() -> contextlib.AbstractContextManager[Any]:
    """Random numbers of PyTorch's own, where it computes."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng()


def _without_gradients() -> contextlib.AbstractContextManager[Any]:
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


class _Watch:
    """Sees what layers are called on, by putting functions of its own in their place."""

    def __init__(self, model: Any) -> None:
        self._layers = list(named_layers(model))
        if not self._layers:  # a lone layer
            self._layers = [(model.name, model)]
        self._axis = 1 if keras.config.image_data_format() == "channels_first" else -1
        # By the identity of tensors, which are kept so that it stays theirs.
        self._gave: dict[int, tuple[Any, Any]] = {}
        self._took: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._seen: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """With the functions in place."""
        replaced = []
        recurrent = {
            id(inner)
            for _, layer in self._layers
            if isinstance(layer, keras.layers.RNN) or hasattr(layer, "state_size")
            for inner in layer._flatten_layers()
        }
        for path, layer in self._layers:
            if id(layer) in recurrent:
                continue
            held = vars(layer).get("activation")
            if callable(held) and not isinstance(held, keras.layers.Layer):
                replaced.append((layer, "activation", held))
                object.__setattr__(layer, "activation", self._activation(path, layer, held))
            object.__setattr__(layer, "call", self._call(path, layer, layer.call))
        try:
            yield
        finally:
            for _, layer in self._layers:
                vars(layer).pop("call", None)
            for layer, name, held in replaced:
                object.__setattr__(layer, name, held)

    def sites(self) -> list[SiteValues]:
        """What was seen."""
        from normkit.experiments.protocol import SiteValues

        calls, numbers = Counter(site["name"] for site in self._seen), Counter[str]()
        found = []
        for site in self._seen:
            norm, name = site.pop("norm"), site["name"]
            numbers[name] += 1
            if calls[name] > 1:
                site["name"] = f"{name} {numbers[name]}"
            gamma, beta = (None, None) if norm is None else _affine(norm)
            found.append(SiteValues(**site, gamma=gamma, beta=beta))
        return found

    def _call(self, path: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        kind = next((name for known, name in _LAYERS.items() if isinstance(layer, known)), None)
        norm = _is_norm(layer)

        def run(*args: Any, **kwargs: Any) -> Any:
            taken = self._took.get(id(args[0])) if args else None
            if norm and taken is not None and taken[1]["norm"] is None:
                taken[1]["norm"] = layer
            y = call(*args, **kwargs) if kind is None else self._watched(path, layer, kind, call, args, kwargs)
            if norm:
                self._gave[id(y)] = y, layer
            axis = _axis_of(layer)
            self._axis = self._axis if axis is None else axis
            return y

        return run

    def _activation(self, path: str, layer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        kind = getattr(function, "__name__", type(function).__name__)
        if kind in _NONE:
            return function
        return lambda *args, **kwargs: self._watched(path, layer, kind, function, args, kwargs)

    def _watched(self, path: str, layer: Any, kind: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        x = args[0] if args else kwargs.get("inputs", kwargs.get("x"))
        try:
            before, after = _array(x), _array(y)
        except Exception:  # every backend has its own: inside a transform or a graph values cannot be read
            return y
        if before.ndim > 1:
            given, own = self._gave.get(id(x)), _axis_of(layer)
            axis = 1 if before.ndim == 2 else self._axis if own is None else own
            norm = None if given is None else given[1]
            site = {"name": path, "activation": kind, "input": before, "output": after, "axis": axis, "norm": norm}
            self._seen.append(site)
            self._took[id(y)] = y, site
        return y


def _is_norm(layer: Any) -> bool:
    named = any("norm" in kind.__name__.lower() for kind in type(layer).__mro__)
    return named and (hasattr(layer, "gamma") or isinstance(getattr(layer, "scale", None), keras.Variable))


def _affine(norm: Any) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    gamma = norm.gamma if hasattr(norm, "gamma") else norm.scale
    gamma, beta = (None if value is None else _array(value).ravel() for value in (gamma, getattr(norm, "beta", None)))
    return gamma, beta


def _axis_of(layer: Any) -> int | None:
    """The axis of the channels of a layer's output, None where the layer does not tell."""
    form = getattr(layer, "data_format", None)
    if form is not None:
        return 1 if form == "channels_first" else -1
    if _is_norm(layer):
        axis = getattr(layer, "axis", None)
        return axis if isinstance(axis, int) else None
    return -1 if hasattr(layer, "kernel") or hasattr(layer, "embeddings") else None


def _array(x: Any) -> NDArray[Any]:
    """A copy as an array, in float32 at least."""
    narrow = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
    return np.array(ops.convert_to_numpy(ops.cast(x, "float32") if narrow else x))


def _snake(name: str) -> str:
    """The name that Keras gives to a layer of this class."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
