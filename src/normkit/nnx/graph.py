"""Reading who feeds whom from a model of Flax NNX: its forward pass as JAX traces it.

Norms and linear maps leave the number of each call in the names of the operations they are made of, and are one node
per call; every other operation is a node of its own. Compiled functions within (`nnx.jit`, `nnx.remat`, those of
jax.numpy) are followed; what a loop or a mapped function (`nnx.scan`, `nnx.vmap`) runs is no call of a layer.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from normkit.errors import NormError, NormTypeError, message
from normkit.nnx.maps import LinearMap, Mapper, mapper
from normkit.nnx.porting import NAMES
from normkit.nnx.probe import ACTIVATIONS, TRANSPARENT, calls_replaced, forward, inside, results
from normkit.surgery.graph import Graph, Node

__all__ = ["Flow", "capture", "joined", "variables"]

_SCOPE = "normkit"
_TAG = "_normkit_number"  # of a module while it is traced: it is still there after nnx.jit took the model apart
_ROLES = {"kernel": "weight", "bias": "bias"}
# Operations that only move values, by the plain names of what they do.
# fmt: off
_MOVES = {
    "broadcast_in_dim": "expand", "copy": "clone", "dynamic_slice": "getitem", "gather": "getitem", "name": "identity",
    "optimization_barrier": "identity", "pad": "pad", "reshape": "reshape", "rev": "getitem",
    "sharding_constraint": "identity", "slice": "slice", "squeeze": "squeeze", "stop_gradient": "detach",
    "transpose": "permute",
}
# fmt: on
# What those compiled functions consist of that only move values.
_PIECES = frozenset((*_MOVES, "concatenate", "convert_element_type", "jit"))


@dataclass
class Flow:
    """A graph, and what stands behind it.

    Attributes:
        maps: by the path of its kernel, the path of a layer and the linear map that it is.
        asked: by the path of a norm, the `use_running_average` of its calls, None where one gave none.
        obstacles: by the path of a norm, why it has to stay: it is called with more than its input.
        functions: what the nodes compute that have one input.
    """

    graph: Graph = field(init=False)
    maps: dict[str, tuple[str, LinearMap]] = field(default_factory=dict)
    asked: dict[str, list[bool | None]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    functions: dict[int, Callable[[Any], Any]] = field(default_factory=dict)

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        """Apply what a node does to whole numbers >= 0; None where that is not known, or gives others too."""
        function = self.functions.get(node.id)
        if function is None:
            return None
        moved = np.asarray(function(np.asarray(values[node.inputs[0]], dtype=np.int32)))
        return None if moved.size and moved.min() < 0 else moved  # a gather beyond the end gives a negative number


class _Call(NamedTuple):
    """One call of a module; `roles`, by path of its variables, where it is to be one node."""

    path: str
    kind: str
    roles: Mapping[str, str] | None
    map: LinearMap | None


def capture(model: nnx.Module, given: Any, norms: Collection[str]) -> Flow:
    """Trace one forward pass in evaluation mode, without running it. Nothing of the model changes.

    Args:
        model: one that can be traced, as under nnx.jit.
        given: arrays that it takes; what is no array is not traced.
        norms: paths of the layers that are to be one node, besides the linear maps.

    Raises NormTypeError where it cannot be traced.
    """
    copy = nnx.clone(model)
    copy.eval()
    recorder = _Recorder(copy, norms)
    graphdef, state = nnx.split(copy)
    leaves, tree = jax.tree.flatten(given)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def run(state: Any, arrays: Sequence[Any]) -> Any:
        twin = nnx.merge(graphdef, state, copy=True)
        before = [variable.get_value() for variable in variables(twin).values()]
        traced = iter(arrays)
        whole = [next(traced) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        output = forward(twin, jax.tree.unflatten(tree, whole))
        return before, output, nnx.state(twin)

    try:
        with calls_replaced({type(module) for _, module in nnx.iter_modules(copy)}, recorder.recorded):
            traced, shapes = jax.make_jaxpr(run, return_shape=True)(state, arrays)
    except NormError:
        raise
    except Exception as error:
        must = f"`model` must be one that JAX can trace, as under nnx.jit ({error})"
        raise NormTypeError(message(must, f"{type(model).__name__}, {type(error).__name__}")) from error
    first, second, _ = (len(jax.tree.leaves(part)) for part in shapes)
    reader = _Reader(recorder)
    reader.read(traced.jaxpr, traced.consts, len(arrays), (first, first + second))
    return recorder.flow


def variables(model: nnx.Module) -> dict[str, Any]:
    """The variables of one array each, once, by their first paths."""
    found = ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable))
    return {joined(*path): variable for path, variable in found if hasattr(variable.get_value(), "dtype")}


def joined(*parts: Any) -> str:
    """A path; the model itself has none."""
    return ".".join(str(part) for part in parts if part != "")


class _Recorder:
    """Says which module is running while a model is traced, and keeps what it is called with."""

    def __init__(self, model: nnx.Module, norms: Collection[str]) -> None:
        self.flow = Flow()
        self.calls: list[_Call] = []
        own = variables(model)
        self.states = list(own)
        first = {id(variable): path for path, variable in own.items()}
        self._modules: list[tuple[str, Mapper | None, Mapping[str, str] | None]] = []
        for number, (path, module) in enumerate(nnx.iter_modules(model)):
            setattr(module, _TAG, number)
            maps, norm = mapper(module), joined(*path) in norms
            names = {name: name for name in NAMES.values()} if norm else _ROLES
            held = {name: id(getattr(module, name, None)) for name in names}
            roles = {first[key]: names[name] for name, key in held.items() if key in first}
            self._modules.append((joined(*path), maps, roles if norm or maps is not None else None))
        self._running: list[int] = []

    def recorded(self, call: Any) -> Callable[..., Any]:
        """A `__call__` that puts its operations under the number of the call."""

        @functools.wraps(call)
        def replaced(module: Any, *args: Any, **kwargs: Any) -> Any:
            number, bound = vars(module).get(_TAG), call.__get__(module, type(module))
            if number is None or self._running[-1:] == [number]:  # the latter calls its parent's
                return bound(*args, **kwargs)
            self._running.append(number)
            try:
                self.calls.append(self._call(type(module).__name__, number, bound, args, kwargs))
                with jax.named_scope(f"{_SCOPE}{len(self.calls) - 1}"):
                    return bound(*args, **kwargs)
            finally:
                self._running.pop()

        return replaced

    def _call(self, kind: str, number: int, bound: Any, args: Any, kwargs: Any) -> _Call:
        path, maps, roles = self._modules[number]
        if roles is None:
            return _Call(path, kind, None, None)
        call = inspect.signature(bound).bind(*args, **kwargs)
        x, *more = call.args
        given = {**dict(zip(list(call.arguments)[1:], more, strict=False)), **call.kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if maps is not None:
            how = maps(np.ndim(x), given.get("einsum_str"))
            kernel = next((state for state, role in roles.items() if role == "weight"), None)
            if how is None or kernel is None:
                return _Call(path, kind, None, None)
            self.flow.maps[kernel] = path, how
            return _Call(path, how.op, roles, how)
        self.flow.asked.setdefault(path, []).append(given.pop("use_running_average", None))
        if given:
            self.flow.obstacles[path] = f"{path} is called with {', '.join(given)}"
        return _Call(path, kind, roles, None)


@dataclass(eq=False)
class _Value:
    """What stands for a value of the trace: one that a node gives, one of the model's own, or one that is known."""

    shape: tuple[int, ...]
    node: int | None = None
    state: str | None = None
    known: Any = None
    own: bool = False


@dataclass
class _Part:
    """A node in the making.

    Attributes:
        numbers: of the node that takes the inputs, of its own and of the one that gives the outputs; a map from or to
            several axes is one between nodes that flatten.
        gave: what other nodes read of it.
    """

    op: str
    call: _Call | None
    numbers: tuple[int, int, int]
    inputs: dict[int, None] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    gave: dict[_Value, None] = field(default_factory=dict)


class _Reader:
    """From a trace to nodes."""

    def __init__(self, recorder: _Recorder) -> None:
        self._flow, self._calls, self._states = recorder.flow, recorder.calls, recorder.states
        self._parts: list[_Part] = []
        self._by_last: dict[int, _Part] = {}
        self._whole: dict[str, _Part] = {}
        self._numbers = self._instances = 0

    def read(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: int, ends: tuple[int, int]) -> None:
        """Make the graph.

        Args:
            jaxpr, consts: of a function of the model's state and of this number of inputs.
            ends: its results are the variables as they were, the outputs up to the second number, the state.
        """
        owned = len(jaxpr.invars) - inputs
        known: dict[Any, _Value] = {v: _Value((), own=True) for v in jaxpr.invars[:owned]}
        states: Sequence[Any] = jaxpr.outvars[: ends[0]]
        for variable, path in zip(states, self._states, strict=True):
            known[variable].state = path
        known |= {v: _given(v, value) for v, value in zip(jaxpr.constvars, consts, strict=True)}
        for variable in jaxpr.invars[owned:]:
            known[variable] = self._value(variable, self._add("input"))
        found = self._walk(jaxpr, known, "")
        changed = [value for value in found[ends[1] :] if not value.own]
        for value in (*found[ends[0] : ends[1]], *changed):  # what the model keeps for later is an output too
            self._take(self._add("output"), [value])
        nodes = [node for part in self._parts for node in self._nodes(part)]
        self._flow.graph = Graph("jaxpr", tuple(sorted(nodes, key=lambda node: node.id)))

    def _walk(self, jaxpr: Jaxpr, known: dict[Any, _Value], around: str) -> list[_Value]:
        def look(variable: Any) -> _Value:
            return _given(variable, variable.val) if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            scope = f"{around}/{equation.source_info.name_stack}"
            values = self._equation(equation, [look(variable) for variable in equation.invars], scope)
            known.update(zip(equation.outvars, values, strict=True))
        return [look(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: JaxprEqn, given: list[_Value], scope: str) -> list[_Value]:
        within = inside(equation) if equation.primitive.name in TRANSPARENT else None
        part = self._part(scope)
        kept = part is None and (_activation(equation) is not None or (within is not None and _rearranges(within[0])))
        if within is not None and not kept:
            self._instances += 1
            inner, consts = within
            known = {v: _given(v, value) for v, value in zip(inner.constvars, consts, strict=True)}
            known |= zip(inner.invars, given, strict=True)
            return self._walk(inner, known, f"{scope}/@{self._instances}")
        if all(value.known is not None for value in given) and not equation.effects:
            outputs = results(equation, [value.known for value in given])
            return [_given(v, value) for v, value in zip(equation.outvars, outputs, strict=True)]
        if part is None:
            part = self._single(equation, given, scope)
        self._take(part, given)
        return [self._value(variable, part) for variable in equation.outvars]

    def _part(self, scope: str) -> _Part | None:
        """That of the outermost call around an operation which is to be one node."""
        for match in _numbers(scope):
            call = self._calls[int(match[1])]
            if call.roles is not None:
                key = scope[: match.end()]  # with the numbers of the compiled functions that it runs in
                if key not in self._whole:
                    self._whole[key] = self._add(call.kind, call)
                return self._whole[key]
        return None

    def _single(self, equation: JaxprEqn, given: list[_Value], scope: str) -> _Part:
        calls = [self._calls[int(match[1])] for match in _numbers(scope)]
        path = calls[-1].path if calls else ""
        flowing = [at for at, value in enumerate(given) if value.known is None]
        op = equation.primitive.name
        function: Callable[[Any], Any] | None = None
        options: dict[str, Any] = {}
        if _activation(equation) is not None:
            op = str(_activation(equation))
        elif flowing == [0] and given[0].node is not None:
            within = inside(equation)
            if within is not None:
                op, function = "view", functools.partial(_rearranged, *within, given)
            elif op in _MOVES:
                op, function = _MOVES[op], functools.partial(_again, equation, given)
            elif op == "convert_element_type" and _floating(equation.invars[0]) and _floating(equation.outvars[0]):
                op = "identity"
            if "pad" in _primitives(equation):  # with zeros; jnp.pad in another mode puts slices together
                op, options = "pad", {"mode": "constant"}
        part = self._add(op, _Call(path, op, None, None), options)
        if function is not None:
            self._flow.functions[part.numbers[1]] = function
        return part

    def _add(self, op: str, call: _Call | None = None, options: Mapping[str, Any] | None = None) -> _Part:
        how = None if call is None else call.map
        start = self._numbers
        first, last = start, start
        middle = start
        if how is not None and how.inputs > 1:
            middle = last = first + 1
        if how is not None and len(how.outputs) > 1:
            last = middle + 1
        self._numbers = last + 1
        part = _Part(op, call, (first, middle, last), options=options or ({} if how is None else how.options))
        self._parts.append(part)
        self._by_last[last] = part
        return part

    def _take(self, part: _Part, given: Sequence[_Value]) -> None:
        roles = {} if part.call is None or part.call.roles is None else part.call.roles
        for value in given:
            if value.state is not None and value.state not in part.state.values():
                part.state[roles.get(value.state, str(len(part.state)))] = value.state
            elif value.node is not None and value.node != part.numbers[2]:
                part.inputs[value.node] = None
                self._by_last[value.node].gave[value] = None

    def _value(self, variable: Any, part: _Part) -> _Value:
        return _Value(variable.aval.shape, node=part.numbers[2])

    def _nodes(self, part: _Part) -> Iterator[Node]:
        (first, middle, last), inputs = part.numbers, tuple(part.inputs)
        shape = next(iter(part.gave)).shape if len(part.gave) == 1 else None
        whole = part.call is not None and part.call.roles is not None
        path = "" if part.call is None else part.call.path
        how = None if part.call is None else part.call.map
        if how is not None and first != middle:
            yield Node(first, "flatten", path, inputs=inputs)
            self._flow.functions[first] = functools.partial(_flattened, axes=how.inputs)
            inputs = (first,)
        flat = shape
        if how is not None and middle != last:
            flat = None if shape is None else (*shape[: -len(how.outputs)], math.prod(how.outputs))
        yield Node(middle, part.op, path, whole, inputs, flat, part.state, part.options)
        if how is not None and middle != last:
            yield Node(last, "unflatten", path, inputs=(middle,), shape=shape)
            self._flow.functions[last] = functools.partial(_spread, lengths=how.outputs)


def _flattened(x: np.ndarray, axes: int) -> np.ndarray:
    return x.reshape(*x.shape[:-axes], -1)


def _spread(x: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    return x.reshape(*x.shape[:-1], *lengths)


def _given(variable: Any, value: Any) -> _Value:
    return _Value(variable.aval.shape, known=value)


def _numbers(scope: str) -> Iterator[re.Match[str]]:
    """The calls around an operation, from the outside; none below a transform, which is `vmap(...)` in a scope.

    There a layer sees other axes than the operation has.
    """
    plain, transformed, _ = scope.partition("(")
    return re.finditer(rf"(?<![^/]){_SCOPE}(\d+)(?![^/])", plain.rpartition("/")[0] if transformed else plain)


def _activation(equation: JaxprEqn) -> str | None:
    name = equation.primitive.name
    return ACTIVATIONS.get(equation.params["name"] if name == "jit" else name)


def _primitives(equation: JaxprEqn) -> set[str]:
    within = inside(equation)
    names = {equation.primitive.name}
    return names if within is None else names.union(*map(_primitives, within[0].eqns))


def _rearranges(jaxpr: Jaxpr) -> bool:
    """Whether a compiled function puts values of its input together in another way, and does nothing else."""
    names = set().union(*map(_primitives, jaxpr.eqns))
    return "concatenate" in names and names <= _PIECES


def _rearranged(jaxpr: Jaxpr, consts: Sequence[Any], given: Sequence[_Value], x: np.ndarray) -> Any:
    values = [x, *(value.known for value in given[1:])]
    return _run(jaxpr, consts, values)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], given: Sequence[Any]) -> Any:
    """The first result of such a function for whole numbers, which keep their type."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))
    for equation in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else known[v] for v in equation.invars]
        within = inside(equation)
        if within is not None:
            outputs = [_run(*within, values)]
        elif equation.primitive.name == "convert_element_type":
            outputs = values
        else:
            outputs = results(equation, values)
        known.update(zip(equation.outvars, outputs, strict=True))
    result: Any = jaxpr.outvars[0]
    return known[result]


def _again(equation: JaxprEqn, given: Sequence[_Value], x: np.ndarray) -> Any:
    return results(equation, [x, *(value.known for value in given[1:])])[0]


def _floating(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.aval.dtype, jnp.floating))
