"""Reading who feeds whom from a PyTorch model: its traced program, or where that fails the order of its layers."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from normkit.surgery.graph import Graph, How, Node
from normkit.torch.layers import NormAct
from normkit.torch.probe import untouched

__all__ = ["Flow", "capture", "computes_as_named"]

# The arguments by name of the functions whose options matter for changing a model.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "pad": ("input", "pad", "mode", "value"),
    **dict.fromkeys(_DROPOUTS, ("input", "p", "training", "inplace")),
    **{f"{name}_as": ("input", "other") for name in ("expand", "reshape", "view")},
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _CONV_TRANSPOSED for n in (1, 2, 3)},
}


class _Traced(NamedTuple):
    """A program, and which of its inputs is which parameter or buffer."""

    module: fx.GraphModule
    state: Mapping[str, str]


class _Done(Exception):  # noqa: N818  # no error: tracing has ended
    pass


class Flow(NamedTuple):
    """A graph, and the traced functions behind its nodes, which can be run."""

    graph: Graph
    functions: Mapping[int, fx.Node]

    def run(self, node: Node, values: Mapping[int, Tensor]) -> Any:
        """Apply the function of a node to other values; an input without a value is taken as zeros."""
        function = self.functions[node.id]

        def value(argument: fx.Node) -> Any:
            if argument.meta["normkit"] in values:
                return values[argument.meta["normkit"]]
            return torch.zeros(_shape(argument) or ())

        args, kwargs = fx.map_arg((function.args, function.kwargs), value)
        if function.op == "call_method":
            return getattr(args[0], str(function.target))(*args[1:], **kwargs)
        assert callable(function.target)
        return function.target(*args, **kwargs)


def capture(model: nn.Module, given: Any, whole: Callable[[nn.Module], bool]) -> Flow:
    """Trace one forward pass without running it; modes, state and random numbers stay as they are.

    Dynamo sees nearly every model as one program. Where it does not, `torch.export` may; where that fails too, only the
    order within plain `nn.Sequential` is known. `graph.how` says which was used.

    Args:
        model: in the mode in which it is to be seen.
        given: tensors of the type and on the device of the model; a mapping gives named arguments, a tuple several.
        whole: which layers are to be one node though they call several functions, such as norms.
    """
    args = tuple(given) if isinstance(given, tuple | list) else () if isinstance(given, Mapping) else (given,)
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    for how, tracer in (("dynamo", _dynamo), ("export", _export)):
        with contextlib.suppress(Exception), untouched(model), _silent(), _apart(model):
            traced = tracer(model, args, kwargs)
            if traced is not None:
                return _Reader(model, whole).read(how, traced)  # type: ignore[arg-type]
    with untouched(model):
        return Flow(_from_modules(model, args, kwargs), {})


@contextlib.contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """A norm with a hook is called by its `NormAct`, which else runs norm and activation as one."""
    norms = {module.norm for module in model.modules() if isinstance(module, NormAct)}
    handles = [norm.register_forward_hook(lambda *_: None) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What a tracer cannot follow it says in many ways: warnings, the log, the program printed to stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced | None:
    # A fresh code object: what Dynamo compiles it keeps with the code, and this code goes away with the function. The
    # model's own forward is inlined, so what was compiled for it stays, and nothing is added to its cache.
    run = types.FunctionType(_call.__code__.replace(co_name="normkit_capture"), globals())
    found: list[_Traced] = []
    names = {id(tensor): path for path, tensor in _state(model)}

    def record(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def stop(*tensors: Any) -> Any:
            holders = module.graph.find_nodes(op="placeholder")
            state = {h.name: names[id(t)] for h, t in zip(holders, tensors, strict=True) if id(t) in names}
            found.append(_Traced(module, state))
            raise _Done  # before anything runs

        return stop

    with torch.compiler.set_stance("default"), contextlib.suppress(_Done):
        torch.compile(run, backend=record, fullgraph=True, dynamic=False)(model, args, kwargs)
    return found[0] if found else None


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
    program = torch.export.export(model, args, kwargs, strict=False)
    signature = program.graph_signature
    names = {path: path for path, _ in _state(model)}
    first = {id(tensor): path for path, tensor in _state(model)}
    tensors = dict(_state(model, every=True))
    state = {
        holder: names.get(path) or first[id(tensors[path])]
        for holder, path in (signature.inputs_to_parameters | signature.inputs_to_buffers).items()
    }
    return _Traced(program.graph_module, state)


def _state(model: nn.Module, *, every: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their first path, or by every path."""
    yield from model.named_parameters(remove_duplicate=not every)
    yield from model.named_buffers(remove_duplicate=not every)


def computes_as_named(module: nn.Module) -> bool:
    """Whether forward is that of torch.nn or ours: a subclass may compute anything."""
    if "forward" in vars(module):
        return False
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return owner.__module__.startswith(("torch.nn.", "normkit.torch."))


class _Reader:
    """From a traced program to nodes."""

    def __init__(self, model: nn.Module, whole: Callable[[nn.Module], bool]) -> None:
        self._whole = whole
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._first = {id(module): path for path, module in model.named_modules()}

    def read(self, how: How, traced: _Traced) -> Flow:
        numbers: dict[Any, int] = {}
        members: dict[int, list[fx.Node]] = {}
        paths: dict[int, str] = {}
        makers: dict[int, Any] = {}  # the innermost call that each node belongs to
        for node in traced.module.graph.nodes:
            if node.op == "get_attr" or node.name in traced.state:
                continue
            stack = list(self._stack(node)) if node.op.startswith("call") else []
            kept = next(((call, path) for call, path in stack if self._whole(self._modules[path])), None)
            call, path = kept or (stack[-1] if stack else (None, ""))
            number = numbers.setdefault(call if kept else node.name, len(numbers))
            members.setdefault(number, []).append(node)
            paths[number], makers[number] = path, call
            node.meta["normkit"] = number
        functions = Counter(makers.values())
        nodes = []
        for number, group in members.items():
            path, call = paths[number], makers[number]
            leaf = not any(True for _ in self._modules[path].children())
            nodes.append(self._node(number, group, path, leaf and functions[call] == 1, traced.state))
        single = {number: group[0] for number, group in members.items() if len(group) == 1}
        return Flow(Graph(how, tuple(nodes)), {n: f for n, f in single.items() if f.op.startswith("call")})

    def _stack(self, node: fx.Node) -> Iterator[tuple[Any, str]]:
        for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
            # Dynamo's keys are the numbers of the objects, `@1` marks the second call; export has paths.
            number, _, again = str(key).partition("@")
            path = self._first.get(int(number)) if number.isdigit() else None
            if path is None:
                path = self._first[id(self._modules[re.sub(r"@\d+$", "", name)])]
            yield (number, again, name), path

    def _node(self, number: int, group: list[fx.Node], path: str, layer: bool, state: Mapping[str, str]) -> Node:
        last = group[-1]
        op = _name(last) if len(group) == 1 else type(self._modules[path]).__name__
        if last.op in ("placeholder", "output"):
            op, layer = "input" if last.op == "placeholder" else "output", False
        inside = set(group)
        inputs, reads, options = dict[int, None](), dict[str, str](), dict[str, Any]()
        for node in group:
            roles = _ARGUMENTS.get(_name(node), ())
            named = {roles[at] if at < len(roles) else str(at): value for at, value in enumerate(node.args)}
            for role, value in (named | dict(node.kwargs)).items():
                if role == "other":  # only its shape is read
                    continue
                for part in [value] if isinstance(value, fx.Node) else _nodes(value):
                    if part.name in state:
                        reads[role if role not in reads else f"{role} {len(reads)}"] = state[part.name]
                    elif part not in inside and "normkit" in part.meta:
                        inputs[part.meta["normkit"]] = None
                if len(group) == 1 and not isinstance(value, fx.Node) and op != "output":
                    options[role] = value
        return Node(number, op, path, layer, tuple(inputs), _shape(last), reads, options)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _name(node: fx.Node) -> str:
    """The plain name of a function: `relu` of torch.relu, F.relu, Tensor.relu_ and aten.relu.default."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "_opname", None) or getattr(target, "__name__", "")
    name = re.sub(r"^_+|_+$", "", str(name))
    return {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "concat": "cat"}.get(name, name)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else None


def _from_modules(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The chains of plain `nn.Sequential`; what comes before and after each is unknown."""
    calls: list[tuple[nn.Module, tuple[int, ...] | None]] = []

    def called(module: nn.Module, _: Any, output: Any) -> None:
        calls.append((module, tuple(output.shape) if isinstance(output, Tensor) else None))

    handles = [m.register_forward_hook(called) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    paths = {id(module): path for path, module in model.named_modules()}
    state = {id(tensor): path for path, tensor in _state(model)}
    after = _followers(model)
    nodes: list[Node] = []
    given: dict[int, int] = {}  # the last node of a layer
    for module, shape in calls:
        if any(True for _ in module.children()):
            continue
        before = [given[id(one)] for one, following in after.items() if following is module and id(one) in given]
        if not before:
            nodes.append(Node(len(nodes), "unknown"))
            before = [nodes[-1].id]
        own = {**module._parameters, **module._buffers}
        reads = {name: state[id(value)] for name, value in own.items() if value is not None}
        names = ("stride", "padding", "dilation", "groups")
        options = {name: getattr(module, name) for name in names if hasattr(module, name)}
        if getattr(module, "padding_mode", "zeros") != "zeros":
            options["padding"] = module.padding_mode
        if isinstance(module, nn.modules.dropout._DropoutNd):
            options |= {"p": module.p, "training": module.training}
        op = type(module).__name__
        if computes_as_named(module):
            op = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op.replace("LU", "lu")).lower()
        nodes.append(Node(len(nodes), op, paths[id(module)], True, tuple(before[-1:]), shape, reads, options))
        given[id(module)] = len(nodes) - 1
    read = {number for node in nodes for number in node.inputs}
    for node in list(nodes):
        if node.op != "unknown" and node.id not in read:
            nodes.append(Node(len(nodes), "unknown", inputs=(node.id,)))
    return Graph("modules", tuple(nodes))


def _followers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each layer in an unchanged `nn.Sequential` the layer that takes its output, through nested ones."""

    def ends(module: nn.Module) -> tuple[nn.Module, nn.Module]:
        if type(module) is nn.Sequential and len(module):
            return ends(module[0])[0], ends(module[-1])[1]
        return module, module

    found = {}
    for module in model.modules():
        if type(module) is nn.Sequential:
            for one, following in zip(list(module)[:-1], list(module)[1:], strict=True):
                found[ends(one)[1]] = ends(following)[0]
    return found
