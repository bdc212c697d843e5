"""Training with Keras on any of its backends, as `normkit.experiments.protocol` asks for it."""

from __future__ import annotations

import contextlib
import importlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree
from numpy.typing import NDArray

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.keras import objectives
from normkit.keras.factory import norm_factory
from normkit.keras.graph import functional
from normkit.keras.models import build, initialize, weighted_layers
from normkit.keras.probe import as_arrays, check_built, own_errors, probe, restored, untouched
from normkit.surgery.variants import normalized

if TYPE_CHECKING:
    from normkit.experiments.protocol import Batch, Scores, Setup, SiteValues

__all__ = [
    "KerasTrainer",
    "limit_threads",
    "no_training",
    "norm_factory",
    "probe",
    "remarks",
    "seed",
    "trainer",
    "versions",
]


class KerasTrainer:
    """A network in training; see :class:`normkit.experiments.protocol.Trainer`.

    Images that come with their channels first are turned, unless Keras itself is set to `channels_first`.
    """

    def __init__(self, compiled: Compiled, metric: str | Callable[..., Any]) -> None:
        self.compiled, self.network = compiled, compiled.network
        self._loss, self._metric = compiled.objective, metric
        self._shapes: dict[Any, Any] = {}  # of the outputs for inputs of a shape, both without the samples

    def step(self, x: Any, y: Any) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it, penalties of the layers included.

        Raises NormValueError where outputs and targets do not fit the loss.
        """
        x, y = turned(as_arrays(x)), as_arrays(y)
        self._check(x, y)
        with own_errors():
            try:
                return float(self.compiled.train_on_batch(x, y))
            except (ValueError, RuntimeError) as error:
                if "No gradients provided" not in str(error) and "does not require grad" not in str(error):
                    raise
                must = "the loss must depend on the outputs in a way that has a gradient"
                raise NormValueError(message(must, "a constant", "use keras.ops in it and not NumPy")) from error

    def prepare(self, x: Any, y: Any) -> None:
        """Compile what a step on batches of this shape needs; changes nothing."""
        with restored((*self.network.variables, *self.compiled.optimizer.variables)):
            self.step(x, y)

    def evaluate(self, batches: Iterable[Batch], *, as_trained: bool = False) -> Scores:
        """Score batches, in inference or `as_trained`; changes nothing, moving statistics included.

        A loss of the user's, which gives means, is averaged with the sizes of the batches; a metric of the user's sees
        all samples at once, as arrays.
        """
        from normkit.experiments.protocol import Scores

        losses: list[NDArray[np.float64]] = []
        metrics: list[NDArray[np.float64]] = []
        kept: list[tuple[Any, Any]] = []
        with untouched(self.network):
            for x, y in batches:
                targets = as_arrays(y)
                tensors = self.network(turned(as_arrays(x)), training=as_trained)
                outputs = tree.map_structure(ops.convert_to_numpy, tensors)
                if isinstance(self._loss, str):
                    objectives.check(self._loss, getattr(outputs, "shape", outputs), targets)
                    losses.append(objectives.losses(self._loss, outputs, targets, objectives.are_shares(outputs)))
                else:
                    given = tree.map_structure(ops.convert_to_tensor, targets)
                    mean = float(objectives.mean_loss(self._loss, tensors, given, False))
                    losses.append(np.full(_size(targets), mean))
                if self._metric == "accuracy":
                    objectives.check("accuracy", getattr(outputs, "shape", outputs), targets)
                    metrics.append(objectives.correct(outputs, targets))
                elif not isinstance(self._metric, str):
                    kept.append((outputs, targets))
        if not losses:
            raise NormValueError(message("there must be batches to score", "none"))
        loss = np.concatenate(losses)
        if not isinstance(self._metric, str):
            return Scores(float(loss.mean()), objectives.number(self._metric, *objectives.joined(kept)), None)
        examples = loss if self._metric == "loss" else np.concatenate(metrics)
        known = self._metric == "accuracy" or isinstance(self._loss, str)
        return Scores(float(loss.mean()), float(examples.mean()), examples if known else None)

    def probe(self, x: Any) -> Sequence[SiteValues]:
        """Every call of an activation in a forward pass in training mode; changes nothing."""
        return probe(self.network, turned(as_arrays(x)))

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by their order."""
        layers = weighted_layers(self.network)
        return {f"layer {n}": np.array(ops.convert_to_numpy(layer.kernel)) for n, layer in enumerate(layers)}

    def _check(self, x: Any, y: Any) -> None:
        """Look at the outputs for every new shape of inputs: a compiled step does not check its labels."""
        key = tuple(array.shape[1:] for array in tree.flatten(x))
        if key not in self._shapes:
            with untouched(self.network):
                outputs = self.network(x, training=False)
            if ops.is_tensor(outputs):
                self._shapes[key] = tuple(outputs.shape[1:])
                self.compiled.shares = objectives.are_shares(ops.convert_to_numpy(outputs))
            else:
                self._shapes[key] = outputs
        if isinstance(self._loss, str):
            rest = self._shapes[key]
            objectives.check(self._loss, (_size(x), *rest) if isinstance(rest, tuple) else rest, y)


class Compiled(keras.Model):
    """A network with its loss, for Keras' own training step: it is compiled as the backend compiles.

    Attributes:
        objective: the loss by name, or the user's function.
        shares: whether outputs are those of a softmax, which must be known before the first step.
    """

    def __init__(
        self, network: Any, loss: str | Callable[..., Any], optimizer: keras.optimizers.Optimizer, **named: Any
    ) -> None:
        super().__init__(**named)
        self.network, self.objective, self.shares = network, loss, False
        self.built = True
        self.compile(optimizer, jit_compile=keras.config.backend() == "jax")
        optimizer.build(network.trainable_variables)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """The network."""
        return self.network(x, training=training)

    def compute_loss(self, x: Any, y: Any, y_pred: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        """The mean loss, and the penalties of the layers."""
        targets = tree.map_structure(ops.convert_to_tensor, y)  # on PyTorch they come as they were given
        return sum(self.losses, objectives.mean_loss(self.objective, y_pred, targets, self.shares))


class _Kept(NamedTuple):
    """A compiled step with the first values of its variables, and who trains with it."""

    compiled: Compiled
    first: list[tuple[Any, NDArray[Any]]]
    user: weakref.ref[KerasTrainer]


_kept: dict[Setup, _Kept] = {}


def trainer(setup: Setup) -> KerasTrainer:
    """A network with weights drawn from the seed.

    A function of the user's that takes no `norm` gets the variant's norms by `normkit.insert`, or by `normkit.replace`
    where its network has norms.

    Raises NormValueError where this norm or model makes no sense, and where a function of the user's raises, gives
    something else than it must, does not use the norm it was given, or has no place for `after`.
    """
    if not isinstance(setup.model, str):
        return KerasTrainer(_compiled(_built(setup.model, setup), setup), setup.metric)
    # To compile takes longer than to train. So a network of ours is used again where only rate and seed are others,
    # once nobody else trains with it.
    key = setup._replace(lr=0.0, seed=0, metric="")
    kept = _kept.get(key)
    if kept is None or kept.user() is not None:
        network = build(
            setup.model,
            shape=_turned_shape(setup.shape),
            classes=setup.classes,
            norm=setup.norm,
            position=setup.position,
            steps=setup.steps,
            seed=setup.seed,
        )
        compiled = _compiled(network, setup)
        variables = (*network.variables, *compiled.optimizer.variables)
        first = [(variable, np.array(ops.convert_to_numpy(variable))) for variable in variables]
    else:
        compiled, first = kept.compiled, kept.first
        for variable, value in first:
            variable.assign(value)
        compiled.optimizer.learning_rate = setup.lr
        initialize(compiled.network, setup.seed)
    made = KerasTrainer(compiled, setup.metric)
    if isinstance(setup.loss, str) and isinstance(setup.optimizer, str):
        _kept[key] = _Kept(compiled, first, weakref.ref(made))
    return made


def seed(seed: int) -> None:
    """Seed Keras' own random numbers, with Python's and NumPy's, from which it draws seeds."""
    keras.utils.set_random_seed(seed)


@contextlib.contextmanager
def no_training(what: str) -> Iterator[None]:
    """Inside, a step of any optimizer raises NormValueError that names the file `what`."""

    def refuse(optimizer: keras.optimizers.Optimizer, *_: Any, **__: Any) -> None:
        must = f"{what} must not train when it is imported"
        hint = 'put the training under `if __name__ == "__main__":`'
        raise NormValueError(message(must, f"a step of {type(optimizer).__name__}", hint))

    held = vars(keras.optimizers.Optimizer).get("apply")
    keras.optimizers.Optimizer.apply = refuse
    try:
        yield
    finally:
        if held is None:
            del keras.optimizers.Optimizer.apply
        else:
            keras.optimizers.Optimizer.apply = held


def limit_threads(count: int) -> None:
    """Let this process compute with so many threads: on TensorFlow and JAX only before they compute first."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it has computed before
            tf.config.threading.set_intra_op_parallelism_threads(count)
            tf.config.threading.set_inter_op_parallelism_threads(count)
    elif backend == "torch":
        import torch

        torch.set_num_threads(count)
    else:
        os.environ["NPROC"] = str(count)  # which XLA asks for the size of its pools
        if count == 1:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def versions() -> dict[str, str]:
    """Names and versions of what trains."""
    backend = keras.config.backend()
    return {"keras": keras.__version__, backend: importlib.import_module(backend).__version__}


def remarks(steps: int | None) -> tuple[str, ...]:
    """What a reader should know of trainings of so many steps, None in a loop of the user's, in sentences."""
    from normkit.experiments.protocol import COMPILED, debiased

    compiled = steps is not None and keras.config.backend() != "torch"
    return (debiased("Keras'", steps), COMPILED) if compiled else (debiased("Keras'", steps),)


def turned(x: Any) -> Any:
    """Images (N, C, H, W) as (N, H, W, C), everything else as it is.

    Images whose last axis is smaller than both others have their channels there already.
    """
    if keras.config.image_data_format() == "channels_first":
        return x
    return tree.map_structure(lambda a: a.transpose(0, 2, 3, 1) if _channels_first(np.shape(a)) else a, x)


def _turned_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if _channels_first((1, *shape)) else shape


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and not shape[3] < min(shape[1:3])


def _compiled(network: Any, setup: Setup) -> Compiled:
    optimizer = objectives.optimizer_for(setup.optimizer, network.trainable_variables, setup.lr, setup.momentum)
    return Compiled(network, setup.loss, optimizer)


def _built(function: Callable[..., Any], setup: Setup) -> Any:
    from normkit.experiments.code import takes_norm

    name = objectives.named(function)
    given = takes_norm(function, name, "norm() is the layer")
    norm = norm_factory(setup.norm, setup.position, setup.steps)
    seed(setup.seed)
    with own_errors():
        network = objectives.called(function, **({"norm": norm} if given else {}))
        if not isinstance(network, keras.layers.Layer):
            got = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
            raise NormValueError(message(f"{name} must return a Keras model", got, "end it with `return model`"))
        if given:
            norm.check_used(network, name)
        if not network.built and setup.shape:
            x = turned(np.zeros((2, *setup.shape), keras.config.floatx()))
            objectives.called(network, x, training=False)
    check_built(network)
    if not network.trainable_variables:
        must = f"{name} must return a model that has parameters to train"
        raise NormValueError(message(must, f"{type(network).__name__} without any"))
    return network if given else _normalized(network, name, setup)


def _normalized(network: Any, name: str, setup: Setup) -> Any:
    """A network of a function that takes no norm, with the norm of the variant."""
    if functional(network) is None:
        must = f"{name} must return a Sequential or Functional model, into which norms can be put, or take `norm`"
        raise NormValueError(message(must, type(network).__name__, f"def {name}(norm): ... norm() is the layer"))
    norm = norm_factory(setup.norm, "before", setup.steps)

    def like(record: NormRecord, ndim: int | None) -> keras.layers.Layer:
        layer = norm(axis=record.axis)
        spatial = (None,) * ((ndim or 2) - 2)
        layer.build((None, *record.shape, *spatial) if record.axis == 1 else (None, *spatial, record.shape[-1]))
        return layer

    return normalized(
        network,
        name,
        setup.norm,
        None if setup.norm == "none" else norm,
        like,
        position=setup.position,
        example=None if setup.example is None else lambda: turned(as_arrays(setup.example())),  # type: ignore[misc]
        inplace=False,
    )


def _size(values: Any) -> int:
    """Number of samples of a batch."""
    if isinstance(values, Mapping | tuple):
        return _size(next(iter(values.values() if isinstance(values, Mapping) else values)))
    return len(values)
