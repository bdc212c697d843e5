"""What a framework has to offer to be trained with: one small module, `normkit.<framework>.training`.

This is the only door from experiments to a framework, and it opens when a trial starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normkit.core.algebra import remaining
from normkit.core.schedule import MOMENTUM, momentum_for
from normkit.experiments.conditions import AS_USUAL, Conditions
from normkit.frameworks import part

__all__ = [
    "COMPILED",
    "Batch",
    "BatchStatistics",
    "ProbedTrainer",
    "RecalibratingTrainer",
    "Scores",
    "SequenceTrainer",
    "Setup",
    "SiteValues",
    "Surface",
    "Trainer",
    "Training",
    "Vector",
    "debiased",
    "training",
]

COMPILED = "Steps are compiled before they are timed."
Vector = NDArray[np.float64]  # of one axis
Batch = tuple[Any, Any]  # inputs and targets: NumPy arrays, or whatever a loader of that framework gives


class Setup(NamedTuple):
    """What a trainer is made of.

    `model` is `cnn`, `mlp` or a function that returns a network; `shape` and `classes` are for the embedded models,
    `example` gives inputs for a network whose function takes no `norm`. `loss` is a name or a function of (outputs,
    targets) that gives the mean; `optimizer` a name or a function of (parameters, rate); `metric` a name or a function
    of (outputs, targets) that gives a number. `conditions` of the network are for PyTorch's embedded models; `groups`
    says into how many parts batch statistics split a batch.
    """

    model: str | Callable[..., Any]
    shape: tuple[int, ...]
    classes: int
    norm: str
    position: str
    lr: float
    momentum: float
    loss: str | Callable[..., Any]
    optimizer: str | Callable[..., Any]
    metric: str | Callable[..., Any]
    seed: int
    steps: int
    example: Callable[[], Any] | None = None
    conditions: Conditions = AS_USUAL
    groups: int = 1


class Scores(NamedTuple):
    """Mean loss, metric over all samples, and the metric of each sample where it is a mean over them."""

    loss: float
    metric: float
    examples: NDArray[Any] | None


class SiteValues(NamedTuple):
    """One call of an activation: its input and output as arrays, with the axis of the channels.

    `gamma` and `beta` belong to the norm whose output is the input, or whose input is the output.
    """

    name: str
    activation: str
    input: NDArray[Any]
    output: NDArray[Any]
    axis: int
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None


class Trainer(Protocol):
    """A network in training."""

    def step(self, x: Any, y: Any) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it.

        Raises NormValueError for labels that the network has no output for.
        """

    def prepare(self, x: Any, y: Any) -> None:
        """Compile what a step on batches of this shape needs, where the framework compiles. Changes nothing."""

    def evaluate(self, batches: Iterable[Batch], *, as_trained: bool = False) -> Scores:
        """Score batches in evaluation mode; with `as_trained` in training mode. Changes nothing, buffers included."""

    def probe(self, x: Any) -> Sequence[SiteValues]:
        """Every call of an activation in a forward pass in training mode. Changes nothing, buffers included."""

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by name: the same names in every variant."""


class RecalibratingTrainer(Trainer, Protocol):
    """What PyTorch's trainer can do besides, and conditions ask of no other."""

    def recalibrate(self, batches: Iterable[Batch]) -> None:
        """Put statistics of all these inputs in the place of running ones, where the network keeps any."""


class Surface(Protocol):
    """The mean loss of one batch in training mode, as a function of the parameters of the layers.

    A layer's parameters are one vector: its weight, then its bias and what follows until the next layer, as a norm's
    gamma and beta.
    """

    @property
    def weights(self) -> tuple[int, ...]:
        """How many of the first entries of each vector are the weight's."""

    def __call__(self, layers: Sequence[Vector]) -> tuple[float, list[Vector]]:
        """The loss where the parameters are these, and its gradient layer by layer, both computed in float64."""


class ProbedTrainer(Trainer, Protocol):
    """What PyTorch's trainer can do besides, and conditions ask of no other."""

    def layers(self) -> list[Vector]:
        """A copy of the parameters, layer by layer."""

    def surface(self, x: Any, y: Any) -> Surface:
        """The loss of this batch; using it changes nothing of the network."""


class BatchStatistics(NamedTuple):
    """What batch norm takes from a batch of sequences, step by step; as one step where it takes all together.

    Attributes:
        counts: (T,), values that each statistic is of.
        means, variances: (T, channels) for each thing that is normalized, the variance biased. Without meaning where
            the count is below 2.
    """

    counts: NDArray[np.int64]
    means: tuple[NDArray[np.float64], ...]
    variances: tuple[NDArray[np.float64], ...]


class SequenceTrainer(Trainer, Protocol):
    """What PyTorch's trainer can do besides, and conditions ask of no other."""

    def statistics(self, batches: Iterable[Batch]) -> Iterator[BatchStatistics]:
        """Those that batch norm takes of each batch in training mode; none without batch norm. Changes nothing."""


class Training(Protocol):
    """The module `normkit.<framework>.training`."""

    def trainer(self, setup: Setup) -> Trainer:
        """A network with weights drawn from the seed.

        Raises NormValueError where this norm or model makes no sense, and where a function of the user's raises,
        gives something that is no network, does not use the norm it was given, or has no place for `after`.
        """

    def norm_factory(self, norm: str, position: str, steps: int | None) -> Callable[..., Any]:
        """The `norm` that a user's function calls: `norm(num_features, activation=None, *, axis)` gives a layer.

        `axis` is the framework's own by default; where its layers find the number of channels, it may be left out.
        """

    def probe(self, model: Any, x: Any, *, train: bool = True) -> Sequence[SiteValues]:
        """As :meth:`Trainer.probe`, for any model of this framework."""

    def seed(self, seed: int) -> None:
        """Seed the framework's own random numbers."""

    def no_training(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Inside, an optimizer step raises NormValueError that names `what`: a file must not train on import."""

    def limit_threads(self, count: int) -> None:
        """Let this process compute with so many threads."""

    def versions(self) -> dict[str, str]:
        """Names and versions of what trains."""

    def remarks(self, steps: int | None) -> tuple[str, ...]:
        """What a reader should know of trainings of so many steps, None in a loop of the user's, in sentences."""


def debiased(whose: str, steps: int | None) -> str:
    """The sentence for a framework whose own moving averages would keep their first values for long."""
    momentum = momentum_for(steps)
    kept = f"Batch norms keep debiased moving averages with momentum {momentum:.3g}"
    if steps is None or momentum == MOMENTUM:
        return f"{kept}, which hold nothing of their first values at any time."
    left = remaining(1 - MOMENTUM, steps)
    return f"{kept}: {whose} own, {MOMENTUM}, would still hold {left:.0%} of their first values after {steps} steps."


def training(framework: str) -> Training:
    """The training module of a framework. Raises MissingExtraError where the framework is not installed."""
    return cast(Training, part(framework, "training"))
