"""Training with Flax NNX, as `normkit.experiments.protocol` asks for it.

A model is kept in parts: its description, which JAX compiles for, and its values, which go in and out. So the trials of
one variant share what is compiled, whatever their weights and their rate.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from normkit.errors import NormValueError, message
from normkit.nnx import objectives
from normkit.nnx.factory import norm_factory
from normkit.nnx.models import build, weighted_layers
from normkit.nnx.probe import converted, floating, forward, probe, probe_parts

if TYPE_CHECKING:
    from normkit.experiments.protocol import Batch, Scores, Setup, SiteValues

__all__ = [
    "NNXTrainer",
    "limit_threads",
    "no_training",
    "norm_factory",
    "probe",
    "remarks",
    "seed",
    "trainer",
    "versions",
]


class NNXTrainer:
    """A network in training; see :class:`normkit.experiments.protocol.Trainer`.

    Inputs with four axes are images: those with channels first, as the feeds give them, are brought to (N, H, W, C).
    """

    def __init__(
        self,
        network: nnx.Module,
        optimizer: str | Callable[..., Any],
        lr: float,
        momentum: float,
        loss: str | Callable[..., Any],
        metric: str | Callable[..., Any],
    ) -> None:
        self._loss, self._metric = loss, metric
        network.eval()
        self._evaluating = nnx.graphdef(network)
        network.train()
        self._training, parameters, self._rest = _parts(network)
        self._parameters = nnx.to_pure_dict(parameters)
        self._kind = floating(parameters)
        self._optimizer, self._rate = objectives.optimizer_for(optimizer, self._parameters, lr, momentum)
        self._optimizer_state = self._optimizer.init(self._parameters)
        self._stepped = False

    @property
    def network(self) -> nnx.Module:
        """The network as it is now, in training mode."""
        return nnx.merge(self._training, self._parameters, self._rest)

    def step(self, x: Any, y: Any) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it.

        Raises NormValueError where outputs and targets do not fit the loss, and for a batch of one sample in a network
        with batch norm.
        """
        loss, classes, gradients, rest = self._gradients(x, y)
        self._check_labels(classes, y)
        if not self._stepped and not isinstance(self._loss, str) and not any(map(jnp.any, jax.tree.leaves(gradients))):
            must = "the loss must depend on the outputs in a way that has a gradient"
            raise NormValueError(message(must, "a constant", "do not use stop_gradient or NumPy in it"))
        self._stepped, self._rest = True, rest
        self._parameters, self._optimizer_state = self._updated(gradients)
        return float(loss)

    def prepare(self, x: Any, y: Any) -> None:
        """Compile what a step on batches of this shape needs; changes nothing."""
        jax.block_until_ready(self._updated(self._gradients(x, y)[2]))

    def evaluate(self, batches: Iterable[Batch], *, as_trained: bool = False) -> Scores:
        """Score batches, in evaluation mode or `as_trained`; changes nothing, statistics included.

        A loss of the user's, which gives means, is averaged with the sizes of the batches; a metric of the user's sees
        all samples at once.
        """
        from normkit.experiments.protocol import Scores

        losses: list[NDArray[Any]] = []
        metrics: list[NDArray[Any]] = []
        kept: list[tuple[Any, Any]] = []
        graph, metric = self._training if as_trained else self._evaluating, self._metric
        for x, y in batches:
            targets = converted(y, self._kind)
            loss, right, classes, outputs = _scored(
                graph, self._loss, metric == "accuracy", self._parameters, self._rest, self._given(x), targets
            )
            self._check_labels(classes, y)
            losses.append(np.broadcast_to(np.asarray(loss, np.float64), _size(targets)))
            if metric == "accuracy":
                metrics.append(np.asarray(right, np.float64))
            elif not isinstance(metric, str):
                kept.append((outputs, targets))
        if not losses:
            raise NormValueError(message("there must be batches to score", "none"))
        loss = np.concatenate(losses)
        if not isinstance(metric, str):
            return Scores(float(loss.mean()), objectives.number(metric, *objectives.joined(kept)), None)
        examples = loss if metric == "loss" else np.concatenate(metrics)
        known = metric == "accuracy" or isinstance(self._loss, str)
        return Scores(float(loss.mean()), float(examples.mean()), examples if known else None)

    def probe(self, x: Any) -> Sequence[SiteValues]:
        """Every call of an activation in a forward pass in training mode; changes nothing, statistics included."""
        return probe_parts(self._training, nnx.merge_state(nnx.State(self._parameters), self._rest), self._given(x))

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by their order."""
        layers = weighted_layers(self.network)
        return {f"layer {number}": np.array(layer.kernel[...]) for number, layer in enumerate(layers)}

    def _gradients(self, x: Any, y: Any) -> Any:
        targets = converted(y, self._kind)
        return _gradients(self._training, self._loss, self._parameters, self._rest, self._given(x), targets)

    def _updated(self, gradients: Any) -> Any:
        return _updated(self._optimizer, self._rate, gradients, self._optimizer_state, self._parameters)

    def _given(self, x: Any) -> Any:
        return converted(x, self._kind, _channels_last)

    def _check_labels(self, classes: Any, y: Any) -> None:
        if int(classes):
            objectives.check_labels("cross_entropy" if self._loss == "cross_entropy" else "accuracy", int(classes), y)


def trainer(setup: Setup) -> NNXTrainer:
    """A network with weights drawn from the seed.

    A function of the user's that takes `rngs` is given the random numbers of the seed, nnx.Rngs(seed).

    Raises NormValueError where this norm or model makes no sense, and where a function of the user's raises, gives
    something else than it must, does not use the norm it was given, or has no place for `after`.
    """
    if isinstance(setup.model, str):
        network: nnx.Module = build(
            setup.model,
            shape=setup.shape,
            classes=setup.classes,
            norm=setup.norm,
            position=setup.position,
            steps=setup.steps,
            seed=setup.seed,
        )
    else:
        network = _built(setup.model, setup)
    return NNXTrainer(network, setup.optimizer, setup.lr, setup.momentum, setup.loss, setup.metric)


def seed(seed: int) -> None:
    """Nothing: JAX draws from keys that are passed on, and keeps none of its own."""


@contextlib.contextmanager
def no_training(what: str) -> Iterator[None]:
    """Inside, an update of parameters by NNX or Optax raises NormValueError that names the file `what`."""
    active = True

    def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def guard(*arguments: Any, **named: Any) -> Any:
            if active:  # who imported the name meanwhile keeps this function
                must = f"{what} must not train when it is imported"
                hint = 'put the training under `if __name__ == "__main__":`'
                raise NormValueError(message(must, f"a call of {name}", hint))
            return function(*arguments, **named)

        return guard

    update, apply = nnx.Optimizer.update, optax.apply_updates
    nnx.Optimizer.update = guarded(update, "nnx.Optimizer.update")  # type: ignore[method-assign]
    optax.apply_updates = guarded(apply, "optax.apply_updates")
    try:
        yield
    finally:
        active = False
        nnx.Optimizer.update = update  # type: ignore[method-assign]
        optax.apply_updates = apply


def limit_threads(count: int) -> None:
    """Let this process compute with so many threads; before its first computation, since JAX then makes its threads."""
    os.environ["NPROC"] = str(count)  # the size of the pool of XLA on CPUs


def versions() -> dict[str, str]:
    """Names and versions of what trains."""
    return {"jax": jax.__version__, "flax": flax.__version__}


def remarks(steps: int | None) -> tuple[str, ...]:
    """What a reader should know of trainings of so many steps, None in a loop of the user's, in sentences."""
    from normkit.experiments.protocol import COMPILED, debiased

    return (debiased("Flax'", steps),) if steps is None else (debiased("Flax'", steps), COMPILED)


def _built(function: Callable[..., Any], setup: Setup) -> nnx.Module:
    from normkit.experiments.code import takes

    name = objectives.named(function)
    given = {"rngs": nnx.Rngs(setup.seed)} if takes(function, "rngs") else {}
    try:
        inspect.signature(function).bind(norm=None, **given)
    except (TypeError, ValueError) as error:
        must = f"{name} must take a parameter `norm`, perhaps `rngs`, and no other without a default ({error})"
        hint = f"def {name}(norm, rngs): ... norm(64) is the layer for 64 channels"
        raise NormValueError(message(must, hint=hint)) from None
    norm = norm_factory(setup.norm, setup.position, setup.steps)
    network = objectives.called(function, norm=norm, **given)
    if not isinstance(network, nnx.Module):
        got = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
        raise NormValueError(message(f"{name} must return an nnx.Module", got, "end it with `return model`"))
    norm.check_used(network, name)
    if not jax.tree.leaves(nnx.state(network, nnx.Param)):
        got = f"{type(network).__name__} without any"
        raise NormValueError(message(f"{name} must return a model that has parameters to train", got))
    return network


def _parts(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The description of a model, its parameters, and all other state: statistics, random numbers."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graph, parameters, rest


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(graph: Any, loss: Any, parameters: Any, rest: Any, x: Any, y: Any) -> Any:
    """The loss, the number of classes or 0, the gradients, and all other state after the step."""

    def run(parameters: Any) -> tuple[Any, tuple[Any, Any]]:
        model = nnx.merge(graph, parameters, rest, copy=True)
        outputs = forward(model, x)
        mean = objectives.mean_loss(loss, outputs, y)
        nnx.pop(model, nnx.Intermediate)
        _, _, after = _parts(model)
        before: Any = jax.tree.structure(rest)
        if before != jax.tree.structure(after):
            must = "a model must have all its variables when it is built"
            raise NormValueError(message(must, f"{type(model).__name__}, which makes some when it is called"))
        return mean, (_classes(loss == "cross_entropy", outputs), after)

    (mean, (classes, after)), gradients = jax.value_and_grad(run, has_aux=True)(parameters)
    return mean, classes, gradients, after


# Apart from the gradients: an optimizer of the user's is made anew in each trial, and only this is compiled anew then.
@functools.partial(jax.jit, static_argnums=0)
def _updated(optimizer: Any, rate: Any, gradients: Any, state: Any, parameters: Any) -> Any:
    updates, state = optimizer.update(gradients, state, parameters)
    return jax.tree.map(lambda p, u: (p + rate * u).astype(p.dtype), parameters, updates), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scored(graph: Any, loss: Any, accuracy: bool, parameters: Any, rest: Any, x: Any, y: Any) -> Any:
    """The loss of each sample or of all, who is right, the number of classes or 0, and the outputs."""
    outputs = forward(nnx.merge(graph, parameters, rest, copy=True), x)
    each = objectives.losses(loss, outputs, y) if isinstance(loss, str) else objectives.mean_loss(loss, outputs, y)
    right = objectives.correct(outputs, y) if accuracy else None
    return each, right, _classes(accuracy or loss == "cross_entropy", outputs), outputs


def _classes(labelled: bool, outputs: Any) -> Any:
    return outputs.shape[-1] if labelled else 0


def _channels_last(x: Any) -> Any:
    """Images as (N, H, W, C): as in the data of a comparison, the channel axis is the one smaller than both others."""
    return x if x.ndim != 4 or x.shape[3] < min(x.shape[1:3]) else x.transpose(0, 2, 3, 1)


def _size(targets: Any) -> int:
    """Number of samples of a batch, by its targets."""
    return len(jax.tree.leaves(targets)[0])
