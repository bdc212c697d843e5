"""What goes into the activations of a model: its forward pass as JAX traces it, run with these values kept.

A trace shows every call of an activation, under whatever name it was imported and in whatever attribute it is held,
since JAX keeps the names of its compiled functions there; only gelu, which is none, is made one for the time being.
During the trace the `__call__` of the model's classes says which module is running, and which arrays a norm takes and
gives.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from numpy.typing import NDArray

from normkit.errors import NormTypeError, message
from normkit.nnx.factory import Identity

if TYPE_CHECKING:
    from normkit.experiments.protocol import SiteValues

__all__ = [
    "ACTIVATIONS",
    "TRANSPARENT",
    "as_arrays",
    "calls_replaced",
    "forward",
    "inside",
    "probe",
    "probe_parts",
    "results",
]

# By the name that JAX gives the function or the operation, with the name that PyTorch has for the same.
ACTIVATIONS = {name: name for name in (
    "celu", "elu", "gelu", "leaky_relu", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "sparse_plus",
    "sparse_sigmoid", "squareplus", "tanh",
)} | {
    "hard_sigmoid": "hardsigmoid", "hard_silu": "hardswish", "hard_tanh": "hardtanh", "log_sigmoid": "logsigmoid",
    "logistic": "sigmoid", "soft_sign": "softsign",
}  # fmt: skip
TRANSPARENT = frozenset(("jit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "closed_call"))
_SCOPE = "normkit"


def probe(model: nnx.Module, x: Any, *, train: bool = True) -> Sequence[SiteValues]:
    """Every call of an activation in one forward pass, in the order of the calls; softmax is none.

    A call is named by the module that makes it, with a number where that makes several. Channels are on the last axis,
    unless the norm beside the call has them elsewhere. gamma and beta are those of the norm that gave the very array
    that goes in, or that takes the one that comes out: after a residual sum there is none.

    What runs in a loop of JAX (`nnx.scan`, `nnx.vmap`) is passed over; what runs in `nnx.jit` or `nnx.remat` inside the
    model is named by the module around it.

    Args:
        model: any nnx.Module that can be traced, as under nnx.jit. Nothing of it changes.
        x: input of the model; a mapping gives named arguments, a tuple or list several.
        train: as after model.train(), else as after model.eval().

    Raises NormTypeError where the model does not take such inputs, and whatever the model raises.

    >>> import normkit
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), jax.nn.relu)
    >>> seen = normkit.activations(model, np.random.default_rng(0).normal(size=(64, 8)))
    >>> [(site.name, site.activation, round(site.std, 1), site.gamma_mean) for site in seen.sites]
    [('Sequential', 'relu', 1.0, 1.0)]
    """
    copy = nnx.clone(model)
    if train:
        copy.train()
    else:
        copy.eval()
    return probe_parts(*nnx.split(copy), as_arrays(x, model))


def probe_parts(graph: Any, state: Any, x: Any) -> Sequence[SiteValues]:
    """As :func:`probe`, of a model in parts."""
    from normkit.experiments.protocol import SiteValues

    seen = _seen(graph, state, x)
    modules = list(_modules(nnx.merge(graph, state)).values())
    calls, numbers = Counter(site.name for site in seen.sites), Counter[str]()
    found = []
    for site, (given, taken) in zip(seen.sites, seen.values, strict=True):
        numbers[site.name] += 1
        norm = None if site.norm is None else modules[site.norm][0]
        found.append(
            SiteValues(
                name=f"{site.name} {numbers[site.name]}" if calls[site.name] > 1 else site.name,
                activation=site.activation,
                input=_array(given),
                output=_array(taken),
                axis=_axis(norm),
                gamma=_values(norm, "scale"),
                beta=_values(norm, "bias"),
            )
        )
    return found


def forward(model: nnx.Module, x: Any) -> Any:
    """Call a model on arrays: a mapping gives named arguments, a tuple or list several.

    Raises NormTypeError where it takes other arguments, and whatever the model raises.
    """
    positional = tuple(x) if isinstance(x, tuple | list) else () if isinstance(x, Mapping) else (x,)
    named = dict(x) if isinstance(x, Mapping) else {}
    if not callable(model):
        raise NormTypeError(message(f"{type(model).__name__} must have a method __call__"))
    try:
        return model(*positional, **named)
    except TypeError:
        try:
            inspect.signature(model).bind(*positional, **named)
        except TypeError as error:
            must = f"{type(model).__name__} must take the inputs it is given ({error})"
            got = f"the names {', '.join(named)}" if named else f"{len(positional)} without a name"
            hint = "give inputs alone, without targets" if len(positional) > 1 else None
            raise NormTypeError(message(must, got, hint)) from None
        raise


def as_arrays(x: Any, model: nnx.Module) -> Any:
    """What a model is given as arrays of JAX, also inside mappings, tuples and lists.

    Floating point values take the type of the model's parameters, whole numbers JAX' own.
    """
    return converted(x, floating(nnx.state(model, nnx.Param)))


def floating(parameters: Any) -> Any:
    """The floating point type of parameters."""
    kinds = (leaf.dtype for leaf in jax.tree.leaves(parameters))
    return next((kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)), jnp.float32)


def converted(x: Any, kind: Any, move: Callable[[Any], Any] = lambda x: x) -> Any:
    """As :func:`as_arrays`, floating point values as `kind`, and after `move`."""
    if isinstance(x, Mapping):
        return {key: converted(part, kind, move) for key, part in x.items()}
    if isinstance(x, tuple | list):
        return tuple(converted(part, kind, move) for part in x)
    if isinstance(x, jax.Array):
        return move(x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x)
    if not hasattr(x, "dtype"):
        return x
    x = move(np.asarray(x))
    if x.dtype.kind not in "biuf":
        raise NormTypeError(message("arrays must hold numbers", f"dtype {x.dtype}"))
    return jnp.asarray(x, kind if x.dtype.kind == "f" else None)


class _Site(NamedTuple):
    """What a trace tells of a call; `norm` is the number of a module."""

    name: str
    activation: str
    norm: int | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["sites"])
class _Seen:
    """Calls and their values; what is no array travels beside those that JAX compiles."""

    def __init__(self, values: Sequence[tuple[Any, Any]], sites: tuple[_Site, ...]) -> None:
        self.values, self.sites = values, sites


@functools.partial(jax.jit, static_argnums=0)
def _seen(graph: Any, state: Any, x: Any) -> _Seen:
    names: list[str] = []

    def run(state: Any, x: Any) -> Any:
        model = nnx.merge(graph, state, copy=True)
        modules = _modules(model)
        names.extend(name for _, name in modules.values())
        with _marking(modules), _visible_gelu():
            return forward(model, x)

    traced = jax.make_jaxpr(run)(state, x)
    given = jax.tree.leaves((state, x))
    run_again = _Rerun(names, parameters=jax.tree.leaves(state))
    run_again(traced.jaxpr, traced.consts, given, "")
    return _Seen(run_again.values, tuple(_Site(**site) for site in run_again.sites))


class _Rerun:
    """Runs a trace operation by operation and keeps what goes into the activations and comes out of them."""

    def __init__(self, names: list[str], parameters: Sequence[Any]) -> None:
        self.sites: list[dict[str, Any]] = []
        self.values: list[tuple[Any, Any]] = []
        self._names = names
        self._parameters = {id(value) for value in parameters}
        # By identity; `values` and `_kept` keep what is meant alive.
        self._gave: dict[int, int] = {}
        self._took: dict[int, dict[str, Any]] = {}
        self._kept: list[Any] = []

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Any], given: Sequence[Any], around: str) -> list[Any]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            scope = f"{around}/{equation.source_info.name_stack}"
            outputs = self._run(equation, [read(variable) for variable in equation.invars], scope)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _run(self, equation: JaxprEqn, given: list[Any], scope: str) -> list[Any]:
        kind = equation.primitive.name
        if kind == "name" and equation.params["name"].startswith(_SCOPE):
            _, what, number = equation.params["name"].split()
            self._mark(what, int(number), given[0])
            return given
        activation = ACTIVATIONS.get(equation.params["name"] if kind == "jit" else kind)
        within = inside(equation) if kind in TRANSPARENT else None
        x = next((value for value in given if self._is_batch(value)), None) if activation else None
        if within is not None and x is None:
            return self(*within, given, scope)
        outputs = results(equation, given)
        if x is not None:
            running = [int(number) for number in re.findall(rf"{_SCOPE}(\d+)", scope)]
            site = {"name": self._names[running[-1]], "activation": activation, "norm": self._gave.get(id(x))}
            self.sites.append(site)
            self.values.append((x, outputs[0]))
            self._took[id(outputs[0])] = site
        return outputs

    def _mark(self, what: str, number: int, value: Any) -> None:
        self._kept.append(value)
        if what == "gives":
            self._gave[id(value)] = number
        elif id(value) in self._took and self._took[id(value)]["norm"] is None:
            self._took[id(value)]["norm"] = number

    def _is_batch(self, x: Any) -> bool:
        """Whether this is an array of channels over a batch: a gate made of a parameter alone is none."""
        return np.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating) and id(x) not in self._parameters


def results(equation: JaxprEqn, given: Sequence[Any]) -> list[Any]:
    """What an operation of a trace gives for these values."""
    parameters = equation.primitive.get_bind_params(equation.params)
    functions: Sequence[Any] = ()
    if not isinstance(parameters, dict):  # JAX before 0.10
        functions, parameters = parameters
    outputs = equation.primitive.bind(*functions, *given, **parameters)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def inside(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The trace that an operation consists of, and its constants; None where it is not made of others."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        within = equation.params.get(name)
        if isinstance(within, ClosedJaxpr):
            return within.jaxpr, within.consts
        if isinstance(within, Jaxpr):
            return within, ()
    return None


@contextlib.contextmanager
def calls_replaced(kinds: Iterable[Any], replaced: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the `__call__` of each class is what `replaced` makes of it: Python looks it up on the class alone."""
    calls = {kind: next((vars(k)["__call__"] for k in kind.__mro__ if "__call__" in vars(k)), None) for kind in kinds}
    own = {kind: "__call__" in vars(kind) for kind in calls}
    try:
        for kind, call in calls.items():
            if call is not None:
                kind.__call__ = replaced(call)
        yield
    finally:
        for kind, call in calls.items():
            if own[kind]:
                kind.__call__ = call
            elif "__call__" in vars(kind):
                del kind.__call__


def _modules(model: nnx.Module) -> dict[int, tuple[nnx.Module, str]]:
    """Every module with its path, by identity, in an order that is the same for models that are built alike."""
    named = ((module, ".".join(map(str, path))) for path, module in nnx.iter_modules(model))
    return {id(module): (module, path or type(model).__name__) for module, path in named}


@contextlib.contextmanager
def _marking(modules: Mapping[int, tuple[nnx.Module, str]]) -> Iterator[None]:
    """Let modules leave marks in a trace: a scope around their calls, and names for what norms take and give."""
    numbers = {key: number for number, key in enumerate(modules)}
    running: list[int] = []

    def marked(call: Any) -> Callable[..., Any]:
        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = call.__get__(self, type(self))
            if id(self) not in numbers or running[-1:] == [id(self)]:  # the latter calls its parent's
                return bound(*args, **kwargs)
            number, beside = numbers[id(self)], _is_norm(self) or isinstance(self, Identity)
            running.append(id(self))
            try:
                with jax.named_scope(f"{_SCOPE}{number}"):
                    if beside and args:
                        args = (_named(args[0], f"{_SCOPE} takes {number}"), *args[1:])
                    y = bound(*args, **kwargs)
                    return _named(y, f"{_SCOPE} gives {number}") if beside else y
            finally:
                running.pop()

        return functools.wraps(call)(replaced)

    with calls_replaced({type(module) for module, _ in modules.values()}, marked):
        yield


@contextlib.contextmanager
def _visible_gelu() -> Iterator[None]:
    """Make jax.nn.gelu leave its name in a trace. Alone among the activations it is a plain function of others."""
    gelu = jax.nn.gelu
    code = getattr(gelu, "__code__", None)
    if code is None:  # compiled, as the others are
        yield
        return
    plain = types.FunctionType(code, gelu.__globals__, "gelu", gelu.__defaults__)
    _gelu["jit"] = jax.jit(plain, static_argnames=("approximate",))
    try:
        gelu.__code__ = _named_gelu.__code__  # the function itself, since models hold it under many names
        yield
    finally:
        gelu.__code__ = code


_gelu: dict[str, Any] = {}


def _named_gelu(x: Any, approximate: bool = True) -> Any:
    # Runs among the global names of JAX.
    from normkit.nnx import probe

    return probe._gelu["jit"](x, approximate=approximate)


def _named(x: Any, name: str) -> Any:
    return checkpoint_name(x, name) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x


def _is_norm(module: nnx.Module) -> bool:
    named = any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
    scale = getattr(module, "scale", None)
    return named and isinstance(scale, nnx.Variable) and np.ndim(scale.get_value()) == 1


def _axis(norm: Any) -> int:
    axis = getattr(norm, "axis", getattr(norm, "feature_axes", -1))
    return axis if isinstance(axis, int) else -1


def _values(norm: Any, name: str) -> NDArray[Any] | None:
    variable = getattr(norm, name, None)
    return _array(variable.get_value()) if isinstance(variable, nnx.Variable) else None


def _array(x: Any) -> NDArray[Any]:
    x = np.asarray(x)
    return x if x.dtype == np.float64 else x.astype(np.float32)
