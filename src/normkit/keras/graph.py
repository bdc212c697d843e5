"""Reading who feeds whom from a Sequential or Functional model, which keeps its calls, also from nested ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

from normkit.keras.porting import is_norm
from normkit.keras.probe import untouched
from normkit.surgery.graph import KNOWN, Graph, Node

__all__ = ["Flow", "capture", "functional", "stock"]

_CONVOLUTIONS = {getattr(layers, f"Conv{n}D"): f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {getattr(layers, f"Conv{n}DTranspose"): f"conv_transpose{n}d" for n in (1, 2, 3)}
_DEPTHWISE = {getattr(layers, f"DepthwiseConv{n}D"): f"conv{n}d" for n in (1, 2)}
_SEPARABLE = {getattr(layers, f"SeparableConv{n}D"): f"conv{n}d" for n in (1, 2)}
_MAPS = {layers.Dense: "linear", **_CONVOLUTIONS, **_TRANSPOSED, **_DEPTHWISE}
# Layers and functions of Keras by class, with the plain name of what they do where that is another.
# fmt: off
_NAMES = {
    **dict.fromkeys(("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout", "GaussianDropout",
                     "GaussianNoise"), "dropout"),
    **{f"ZeroPadding{n}D": "pad" for n in (1, 2, 3)},
    **{f"Cropping{n}D": "slice" for n in (1, 2, 3)},
    **dict.fromkeys(("GroupQueryAttention", "GroupedQueryAttention", "MultiHeadAttention"),
                    "multi_head_attention_forward"),
    **dict.fromkeys(("AdditiveAttention", "Attention", "Dot", "DotProductAttention"), "matmul"),
    **dict.fromkeys(("HardSilu", "hard_silu", "hard_swish"), "hardswish"),
    **dict.fromkeys(("LeakyReLU", "LeakyRelu"), "leaky_relu"),
    "ActivityRegularization": "identity", "BatchNorm": "batch_norm", "BroadcastTo": "expand", "EinsumDense":
    "einsum_dense", "ExpandDims": "unsqueeze", "GetItem": "getitem", "LayerNorm": "layer_norm", "Moveaxis": "movedim",
    "Multiply": "mul", "RepeatVector": "expand", "RMSNorm": "rms_norm", "SimpleRNN": "rnn_tanh",
    "UnitNormalization": "normalize", "hard_sigmoid": "hardsigmoid", "hard_tanh": "hardtanh",
    "log_sigmoid": "logsigmoid", "tanh_shrink": "tanhshrink",
}
# fmt: on
_NO_ACTIVATIONS = ("linear", "log_softmax", "sparsemax")


@dataclass
class Flow:
    """A graph, and what stands behind it.

    Attributes:
        paths: of each layer, by its identity: the names of the models that hold it and its own, the first where several
            do.
        variables: by their paths in `Node.state`.
        depthwise: paths of the kernels that have one input per group.
        obstacles: path and reason of each norm that is not called in inference.
        calls: the call of Keras behind each node that is one.
    """

    graph: Graph = field(init=False)
    paths: dict[int, str] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    depthwise: set[str] = field(default_factory=set)
    obstacles: dict[str, str] = field(default_factory=dict)
    calls: dict[int, Any] = field(default_factory=dict)

    def run(self, node: Node, values: Mapping[int, np.ndarray]) -> np.ndarray | None:
        """Apply what a node does to whole numbers; None where it is not one call of one input and one output."""
        call = self.calls.get(node.id)
        if call is None or len(call.outputs) != 1 or len(call.input_tensors) != 1:
            return None
        # Whole numbers are not cast to the type that a layer computes in, which may be too narrow for them.
        given = ops.convert_to_tensor(np.asarray(values[node.inputs[0]], dtype="int32"))
        args, kwargs = call.arguments.fill_in({id(call.input_tensors[0]): given})
        return np.asarray(ops.convert_to_numpy(call.operation(*args, **kwargs)))


class _Seen(NamedTuple):
    number: int
    value: Any


def functional(model: Any) -> Any:
    """The calls of a Sequential or Functional model; None for anything else, or where `call` is not that of Keras."""
    if not isinstance(model, keras.Sequential | keras.Function) or not stock(type(model).call):
        return None
    return model._functional if isinstance(model, keras.Sequential) else model


def stock(kind: Any) -> bool:
    """Whether a class or function is of Keras or ours, so that its name says what it computes."""
    return kind.__module__.partition(".")[0] in ("keras", "normkit")


def capture(model: Any, given: Any) -> Flow:
    """Follow the calls of one forward pass in inference, layer by layer; variables and random numbers stay.

    Args:
        model: one that `functional` knows.
        given: tensors that it takes.
    """
    function = functional(model)
    with untouched(model):
        reader = _Reader()
        values = function._standardize_inputs(given)
        inputs = [_Seen(reader.add("input", shape=value.shape), value) for value in values]
        for output in reader.walk(function, inputs):
            reader.add("output", inputs=(output.number,), shape=output.value.shape)
    reader.flow.graph = Graph("functional", tuple(reader.nodes))
    return reader.flow


class _Reader:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.flow = Flow()
        self._states: dict[int, str] = {}

    def add(self, op: str, *, shape: Sequence[int] | None, **values: Any) -> int:
        """A further node; its number."""
        self.nodes.append(Node(len(self.nodes), op, shape=None if shape is None else tuple(map(int, shape)), **values))
        return self.nodes[-1].id

    def walk(self, function: Any, given: Sequence[_Seen], within: str = "", training: bool = False) -> list[_Seen]:
        """The calls of a model, from its inputs to its outputs."""
        known = dict(zip(map(id, function.inputs), given, strict=True))
        for _, calls in sorted(function._nodes_by_depth.items(), reverse=True):
            for call in calls:
                if not call.is_input and all(id(x) in known for x in call.input_tensors):
                    found = self._call(call, known, within, training)
                    known.update(zip(map(id, call.outputs), found, strict=True))
        return [known[id(x)] for x in function.outputs]

    def _call(self, call: Any, known: Mapping[int, _Seen], within: str, training: bool) -> Iterable[_Seen]:
        layer = call.operation
        inputs = [known[id(x)] for x in call.input_tensors]
        args, kwargs = call.arguments.fill_in({key: seen.value for key, seen in known.items()})
        training = bool(kwargs.get("training") or training)
        path = self.flow.paths.setdefault(id(layer), f"{within}{layer.name}")
        inner = functional(layer)
        more = {name for name, value in kwargs.items() if value is not None} - {"training"}
        if inner is not None and len(args) == 1 and not isinstance(args[0], Mapping) and not more:
            values = inner._standardize_inputs(args[0])
            own = [_Seen(seen.number, value) for seen, value in zip(inputs, values, strict=True)]
            return self.walk(inner, own, f"{path}/", training)
        if getattr(layer, "_call_has_training_arg", False):
            kwargs["training"] = False
        results = keras.tree.flatten(layer(*args, **kwargs))
        number = self._add(call, path, tuple(seen.number for seen in inputs), results, training)
        if training and is_norm(layer):
            self.flow.obstacles[path] = f"{path} is called with training=True"
        return (_Seen(number, result) for result in results)

    def _add(self, call: Any, path: str, inputs: tuple[int, ...], results: list[Any], training: bool) -> int:
        """The nodes of one call of a layer or function; the number of the last."""
        layer, shape = call.operation, results[0].shape if len(results) == 1 else None
        kind = type(layer)
        changed = getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False)
        if kind in {**_MAPS, **_SEPARABLE} and not changed:
            number = self._add_map(layer, path, inputs, shape)
            name = _activation(layer.activation)
            return number if name == "linear" else self.add(name, path=path, inputs=(number,), shape=shape)
        name = kind.__name__
        op = _NAMES.get(name, name if is_norm(layer) else name.lower()) if stock(kind) else name
        if kind is layers.Activation:
            name = _activation(layer.activation)
            op = "identity" if name == "linear" else name
        options = {"training": training} if op == "dropout" else {}
        if op == "pad" and not isinstance(layer, keras.layers.Layer):
            options = {"mode": layer.mode}
        whole = isinstance(layer, keras.layers.Layer)
        state = {v.path: self._state(f"{path}.{v.name}", v) for v in layer.variables} if whole else {}
        number = self.add(op, path=path, layer=whole, inputs=inputs, shape=shape, state=state, options=options)
        self.flow.calls[number] = call
        return number

    def _add_map(self, layer: Any, path: str, inputs: tuple[int, ...], shape: Any) -> int:
        kind = type(layer)
        options: dict[str, Any] = {"padding": getattr(layer, "padding", "valid"), "groups": getattr(layer, "groups", 1)}
        if getattr(layer, "data_format", None) == "channels_last":
            options["axis"] = -1
        op, kernel = {**_MAPS, **_SEPARABLE}[kind], "kernel"
        if kind in _SEPARABLE:
            spread = self._state(f"{path}.depthwise_kernel", layer.depthwise_kernel)
            self.flow.depthwise.add(spread)
            first = {**options, "groups": layer.depthwise_kernel.shape[-2]}
            inputs = (self.add(op, path=path, inputs=inputs, shape=None, state={"weight": spread}, options=first),)
            options, kernel = {**options, "padding": "valid"}, "pointwise_kernel"
        state = {"weight": self._state(f"{path}.{kernel}", getattr(layer, kernel))}
        if layer.use_bias:
            state["bias"] = self._state(f"{path}.bias", layer.bias)
        if kind in _DEPTHWISE:
            self.flow.depthwise.add(state["weight"])
            options["groups"] = layer.kernel.shape[-2]
        whole = kind not in _SEPARABLE and layer.activation is keras.activations.linear
        return self.add(op, path=path, layer=whole, inputs=inputs, shape=shape, state=state, options=options)

    def _state(self, path: str, variable: Any) -> str:
        """The path of a variable, the first where it has several."""
        first = self._states.setdefault(id(variable), path)
        self.flow.variables[first] = variable
        return first


def _activation(function: Any) -> str:
    """The plain name of what a layer takes as its activation; `activation` for one without such a name."""
    name = getattr(function, "__name__", type(function).__name__)
    name = _NAMES.get(name, name.lower())
    return name if name in KNOWN or name in _NO_ACTIVATIONS else "activation"
