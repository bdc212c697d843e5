"""Keras' side of `normkit.check`: what norms are given in every mode, and what a training step does to them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from normkit.checks.evidence import Group, Input, Layer, Step
from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.keras import probe
from normkit.keras.graph import capture, functional, stock
from normkit.keras.porting import is_norm, read, targets
from normkit.keras.porting import walk as norms
from normkit.keras.probe import by_path, check_built
from normkit.keras.recording import array, called_after, given, kept, real
from normkit.surgery import batches
from normkit.surgery.graph import Graph

if TYPE_CHECKING:
    from normkit.checks.examination import Batch, Loss, Mode, See

__all__ = [
    "backend",
    "graph",
    "groups",
    "layers",
    "loader",
    "loss",
    "optimizer",
    "parameters",
    "running",
    "step",
    "stuck",
    "unread",
    "untouched",
]

Forward = Callable[[Any, Any], Any]


def layers(model: Any) -> tuple[Layer, ...]:
    """See `normkit.checks.examination.Examination`."""
    check_built(model)
    names = {id(variable): path for path, variable, _ in _weights(model)}
    held = optimizer(model)
    steps = None if held is None else int(ops.convert_to_numpy(held.iterations))
    inferring = _inferring(model)
    found = []
    for path, layer, record in _readable(model):
        own = {role: variable for role, variable in targets(layer) if role != "count"}
        trained = [own[role].trainable and layer.trainable for role in ("gamma", "beta") if role in own]
        found.append(
            Layer(
                path=path,
                kind=type(layer).__name__,
                record=record,
                frozen=bool(record.kept) and not layer.trainable,
                momentum=getattr(layer, "momentum", None),
                dtypes={role: keras.backend.standardize_dtype(variable.dtype) for role, variable in own.items()},
                trained=any(trained) if trained else None,
                parameters={role: names[id(own[role])] for role in ("gamma", "beta") if role in own},
                steps=steps if record.kept and layer.trainable else None,
                inferring=id(layer) in inferring,
            )
        )
    return tuple(found)


def backend() -> str:
    """See `normkit.checks.examination.Examination`."""
    return str(keras.config.backend())


def unread(model: Any) -> Mapping[str, str]:
    """See `normkit.checks.examination.Examination`."""
    paths, found = {id(layer): path for path, layer in by_path(model)}, {}
    for _, layer in norms(model):
        try:
            read(layer)
        except NormValueError as error:
            found[paths[id(layer)]] = f"a {type(layer).__name__} is not looked into: {error}"
    return found


def parameters(model: Any) -> Mapping[str, bool]:
    """See `normkit.checks.examination.Examination`."""
    return {path: variable.trainable and layer.trainable for path, variable, layer in _weights(model)}


def graph(model: Any, x: Any) -> Graph:
    """See `normkit.checks.examination.Examination`. Raises NormTypeError for a model with a `call` of its own."""
    if functional(model) is None:
        must = "a model must be Sequential or Functional for its flow of data to be seen"
        raise NormTypeError(message(must, f"{type(model).__name__}, which has a `call` of its own"))
    flow = capture(model, given(model, x))
    # The first of several paths may be another one here.
    paths = {flow.paths[id(layer)]: path for path, layer in by_path(model) if id(layer) in flow.paths}
    names = {id(variable): path for path, variable, _ in _weights(model)}
    states = {path: names.get(id(variable), path) for path, variable in flow.variables.items()}
    nodes = [
        replace(
            node,
            path=paths.get(node.path, node.path),
            state={role: states.get(path, path) for role, path in node.state.items()},
        )
        for node in flow.graph.nodes
    ]
    return Graph(flow.graph.how, tuple(nodes))


def untouched(model: Any) -> contextlib.AbstractContextManager[None]:
    """See `normkit.checks.examination.Examination`."""
    return probe.untouched(model, weights=True)


@contextlib.contextmanager
def running(model: Any, mode: Mode, see: See | None, forward: Forward | None) -> Iterator[Callable[[Batch], Any]]:
    """See `normkit.checks.examination.Examination`."""
    seen = _readable(model)
    taking: frozenset[str] | None = None

    def before(number: int, named: Mapping[str, Any]) -> Mapping[str, Any]:
        path = seen[number][0]
        x = _values(next(iter(named.values())))
        if see is not None and x is not None:
            dtype = keras.backend.standardize_dtype(next(iter(named.values())).dtype)
            see(path, x, dtype, real(named, x.ndim))
        return {"training": True} if taking is not None and path in taking else {}

    def run(batch: Batch) -> Any:
        nonlocal taking
        if mode == "batch" and taking is None:
            taking = _taking(model, batch, forward, training=True)
        with called_after([layer for _, layer, _ in seen], before):
            return _run(model, batch, forward, training=mode == "train")

    with probe.untouched(model, weights=mode == "train"):
        yield run


def stuck(model: Any, batch: Batch, forward: Forward | None) -> frozenset[str]:
    """See `normkit.checks.examination.Examination`. Only a call shows which layers are given `training=True`."""
    return _taking(model, batch, forward, training=False)


def step(model: Any, batch: Batch, _: Loss | None, forward: Forward | None) -> Step:
    """See `normkit.checks.examination.Examination`. The forward pass updates statistics; a backward pass adds none."""
    tracked = [(path, layer, record) for path, layer, record in _readable(model) if record.kept]
    calls: dict[str, list[Input]] = {path: [] for path, *_ in tracked}

    def before(number: int, named: Mapping[str, Any]) -> Mapping[str, Any]:
        path, layer, record = tracked[number]
        x = _values(next(iter(named.values())))
        if named.get("training") and layer.trainable and x is not None:
            calls[path].append(Input.of(x, record.axis))
        return {}

    def values() -> dict[str, Mapping[str, np.ndarray]]:
        return {path: kept(layer) for path, layer, _ in tracked}

    with untouched(model):
        old, counts = values(), _counts(tracked)
        with called_after([layer for _, layer, _ in tracked], before):
            _run(model, batch, forward, training=True)
        new, counted = values(), _counts(tracked)
    moved = frozenset(
        path
        for path in old
        if any(not np.array_equal(old[path][name], new[path][name], equal_nan=True) for name in old[path])
    )
    updates = {path: counted[path] - counts[path] if path in counts else len(own) for path, own in calls.items()}
    return Step.of(calls, {path: record.eps for path, _, record in tracked}, updates, moved, {})


def groups(model: Any, optimizer: Any) -> tuple[Group, ...]:
    """See `normkit.checks.examination.Examination`."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        must = "`optimizer` must be a keras.optimizers.Optimizer"
        raise NormTypeError(message(must, type(optimizer).__name__))
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    names = {id(variable): path for path, variable, _ in _weights(model)}
    held = inner._trainable_variables if inner.built else model.trainable_variables
    weight_decay, lr = float(inner.weight_decay or 0.0), float(ops.convert_to_numpy(inner.learning_rate))
    parts: dict[float, list[str | None]] = {}
    for variable in held:
        decay = weight_decay if inner._use_weight_decay(variable) else 0.0
        parts.setdefault(decay, []).append(names.get(id(variable)))
    return tuple(
        Group(decay, lr, frozenset(path for path in paths if path is not None), paths.count(None))
        for decay, paths in parts.items()
    )


def optimizer(model: Any) -> Any:
    """See `normkit.checks.examination.Examination`."""
    return getattr(model, "optimizer", None)


def loss(model: Any, given: Loss | None) -> Loss | None:
    """See `normkit.checks.examination.Examination`. A loss of Keras takes the targets first."""
    if given is not None:
        of_keras = isinstance(given, keras.losses.Loss) or getattr(given, "__module__", "").partition(".")[0] == "keras"
        return (lambda outputs, targets: given(targets, outputs)) if of_keras else given
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or not stock(type(model).compute_loss):
        return None
    # A new one: the first call shapes it, and it counts what it sees. Penalties of weights are the same in all modes.
    own = type(compiled)(compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names)
    return lambda outputs, targets: own(targets, outputs)


def loader(data: Any) -> Mapping[str, Any]:
    """See `normkit.checks.examination.Examination`."""
    if isinstance(data, keras.utils.PyDataset):
        return _of_py_dataset(data)
    tensorflow, torch = sys.modules.get("tensorflow"), sys.modules.get("torch")
    if tensorflow is not None and isinstance(data, tensorflow.data.Dataset):
        return _of_tf_data(data)
    if torch is not None and isinstance(data, torch.utils.data.DataLoader):
        from normkit.torch import examination

        return examination.loader(data)
    return {}


def _of_py_dataset(data: Any) -> Mapping[str, Any]:
    """It counts batches, whose size only the batches tell: the first, and the last, which may be shorter."""
    if data.num_batches is None:
        return {"source": "PyDataset"}
    sizes = [batches.size(next(batches.inputs([data[number]]))) for number in (0, data.num_batches - 1)]
    return {"source": "PyDataset", "batch_size": sizes[0], "samples": sizes[0] * (data.num_batches - 1) + sizes[1]}


def _of_tf_data(data: Any) -> Mapping[str, Any]:
    """From the operation that makes batches, which the operations behind it hold one in the other."""
    number, part, shuffled = int(data.cardinality()), data, False
    while not hasattr(part, "_batch_size") and hasattr(part, "_input_dataset"):
        part = part._input_dataset
        shuffled |= "Shuffle" in type(part).__name__
    if not hasattr(part, "_batch_size") or int(part.cardinality()) != number:
        return {"source": "tf.data"}  # batches come from a generator, or are left out or repeated later on
    known = {"source": "tf.data", "batch_size": int(part._batch_size), "drop_last": bool(part._drop_remainder)}
    samples = int(part._input_dataset.cardinality())
    return {**known, "samples": samples} if samples >= 0 else known


def _readable(model: Any) -> list[tuple[str, Any, NormRecord]]:
    """The norms that a record can say, with their paths."""
    found = []
    for path, layer in by_path(model):
        with contextlib.suppress(NormValueError):
            record = read(layer) if is_norm(layer) else None
            if record is not None:
                found.append((path, layer, record))
    return found


def _inferring(model: Any) -> set[int]:
    """The identities of the layers that are called with `training=False`, also in a model that is."""
    found = set()
    for _, layer in by_path(model):
        inner = functional(layer)
        for calls in () if inner is None else inner._nodes_by_depth.values():
            for call in calls:
                if not call.is_input and call.arguments.kwargs.get("training") is False:
                    found |= {id(own) for own in call.operation._flatten_layers()}
    return found


def _weights(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """What may be trained, with its path, each once, and the layer that made it."""
    seen = set()
    for path, layer in by_path(model):
        for variable in layer._trainable_variables:
            if id(variable) not in seen:
                seen.add(id(variable))
                yield f"{path}.{variable.name}" if path else variable.name, variable, layer


def _taking(model: Any, batch: Batch, forward: Forward | None, *, training: bool) -> frozenset[str]:
    """Paths of the norms that keep statistics, but take those of the batch when the model is called so."""
    tracked = [(path, layer) for path, layer, record in _readable(model) if record.kept and layer.trainable]
    found = set()

    def before(number: int, named: Mapping[str, Any]) -> Mapping[str, Any]:
        if named.get("training"):
            found.add(tracked[number][0])
        return {}

    with probe.untouched(model, weights=training), called_after([layer for _, layer in tracked], before):
        _run(model, batch, forward, training=training)
    return frozenset(found)


class _Called:
    """The model in a mode, for a function that calls it without saying which."""

    def __init__(self, model: Any, training: bool) -> None:
        self._model, self._training = model, training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **{**kwargs, "training": self._training})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _run(model: Any, batch: Batch, forward: Forward | None, *, training: bool) -> Any:
    if forward is not None:
        return forward(_Called(model, training), batch.raw)
    return model(given(model, batch.x), training=training)


def _values(x: Any) -> np.ndarray | None:
    """The input of a layer, in float64; None inside a graph or a transform, where it has no values."""
    try:
        return array(x)
    except Exception:  # every backend has its own
        return None


def _counts(tracked: Sequence[tuple[str, Any, NormRecord]]) -> dict[str, int]:
    """The updates so far, of layers that count them."""
    return {
        path: int(ops.convert_to_numpy(layer.count.value))
        for path, layer, record in tracked
        if record.count is not None
    }
