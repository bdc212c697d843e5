"""What a framework has to offer to be trained with: one small module, `normkit.<framework>.training`.

This is the only door from experiments to a framework, and it opens when a trial starts.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normkit.errors import MissingExtraError, NormError, message

__all__ = ["Trainer", "Training", "training"]


class Trainer(Protocol):
    """A network in training: plain SGD with momentum on the mean cross entropy."""

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it, in nats."""

    def evaluate(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> tuple[float, int]:
        """Sum of the losses and number of right answers, in evaluation mode; changes nothing."""

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by name: the same names in every variant."""


class Training(Protocol):
    """The module `normkit.<framework>.training`."""

    def trainer(
        self,
        *,
        model: str,
        shape: tuple[int, ...],
        classes: int,
        norm: str,
        position: str,
        lr: float,
        momentum: float,
        seed: int,
        steps: int,
    ) -> Trainer:
        """A network with weights drawn from `seed`; raises NormValueError where this norm or model makes no sense."""

    def limit_threads(self, count: int) -> None:
        """Let this process compute with so many threads."""

    def versions(self) -> dict[str, str]:
        """Names and versions of what trains."""


def training(framework: str) -> Training:
    """The training module of a framework. Raises MissingExtraError where the framework is not installed."""
    try:
        return cast(Training, importlib.import_module(f"normkit.{framework}.training"))
    except NormError:
        raise
    except ImportError as error:
        must = f"training with {framework} needs a package that is not installed ({error})"
        raise MissingExtraError(message(must, hint=f"pip install 'normkit[{framework}]'")) from error
