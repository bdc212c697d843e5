"""What a framework has to offer so that norm layers can be read and written: `normkit.<framework>.porting`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, message
from normkit.frameworks import part

__all__ = ["Porting", "Recording", "porting", "recording"]


class Porting(Protocol):
    """The module `normkit.<framework>.porting`."""

    def walk(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Every norm layer that can be read, with its path, once."""

    def read(self, layer: Any) -> NormRecord | None:
        """The values of a layer, None where it is no norm that we know."""

    def make(self, record: NormRecord, axis: int) -> Any:
        """A layer with these values and channels on `axis`."""

    def write(self, layer: Any, record: NormRecord) -> None:
        """Write parameters and kept statistics into a layer that has them."""


class Recording(Protocol):
    """The module `normkit.<framework>.recording`: what goes into the batch norms of a model."""

    def recalibrated(self, model: Any) -> Iterator[Any]:
        """The batch norms whose running statistics may be replaced, each once."""

    def watching(
        self, model: Any, layers: Sequence[Any], seen: Callable[[int, float, NDArray[Any], NDArray[Any]], None]
    ) -> contextlib.AbstractContextManager[Callable[[Any], Any]]:
        """Inside, the result runs the model on a batch: its batch norms in training mode, all else in evaluation.

        `seen` is told the number of the layer, the count of values and their mean and biased variance per channel, in
        float64. Leaving restores modes, running statistics and random numbers.
        """

    def keep(
        self, layer: Any, mean: NDArray[Any], var: NDArray[Any], unbiased: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        """Make these the running statistics of a layer, by its own convention of the variance."""


def recording(framework: str) -> Recording:
    """The recording module of a framework. Raises NormTypeError where there is none."""
    if framework == "nnx":
        must = "recalibrating a model of Flax NNX is not available yet"
        raise NormTypeError(message(must, hint="collect the moments of its inputs with normkit.core.algebra.merge"))
    return cast(Recording, part(framework, "recording"))


def porting(framework: str) -> Porting:
    """The porting module of a framework. Raises NormValueError or MissingExtraError where there is none."""
    return cast(Porting, part(framework, "porting"))
