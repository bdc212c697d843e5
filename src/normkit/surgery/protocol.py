"""What a framework has to offer so that norm layers can be read and written: `normkit.<framework>.porting`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from normkit.core.algebra import Pooled
from normkit.core.record import NormRecord, TrackedLayer
from normkit.errors import NormTypeError, message
from normkit.frameworks import framework_of, part

__all__ = ["Decide", "Porting", "Recording", "States", "Subject", "opened", "porting", "recording", "states"]

_MODELS = {
    "torch": "a torch.nn.Module",
    "keras": "a Sequential or Functional model of Keras",
    "nnx": "an nnx.Module",
}


class Porting(Protocol):
    """The module `normkit.<framework>.porting`."""

    def walk(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Every norm layer, with its path, once; also those that `read` refuses."""

    def read(self, layer: Any) -> NormRecord | None:
        """The values of a layer, None where it is no norm that we know.

        Raises NormValueError for one that is not built yet, or that computes what no record can say.
        """

    def make(self, record: NormRecord, axis: int) -> Any:
        """A layer like this, with first values and channels on `axis`. Raises NormValueError where there is none."""

    def targets(self, layer: Any) -> Iterator[tuple[str, Any]]:
        """What its values are written to, each with its role: `gamma`, `beta`, `mean`, `var`, `std` or `count`."""

    def assign(self, target: Any, value: Any) -> None:
        """Write a value to one of them."""


Decide = Callable[[int, Callable[[], Pooled]], Pooled]


class Recording(Protocol):
    """The module `normkit.<framework>.recording`: what norms with kept statistics are given, and what they keep."""

    def tracked(self, model: Any) -> Iterator[TrackedLayer]:
        """The norm layers whose kept statistics may be replaced, each once: not the frozen ones."""

    def watching(
        self, model: Any, layers: Sequence[TrackedLayer], decide: Decide
    ) -> contextlib.AbstractContextManager[Callable[[Any], Any]]:
        """Inside, the result runs the model on a batch in evaluation mode and returns its outputs.

        Whenever one of the layers is called, `decide(number of the layer, measure)` says by which mean and biased
        variance it normalizes; `measure()` gives those of its input, in float64. Leaving restores everything.
        """

    def kept(self, layer: Any) -> Mapping[str, NDArray[Any]]:
        """What the layer keeps, under its own names."""

    def moments(self, layer: Any) -> tuple[NDArray[Any] | None, NDArray[Any]]:
        """The kept mean, None where it keeps none, and variance, in float64."""

    def as_kept(self, layer: Any, mean: NDArray[Any], var: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """This mean and variance in the form in which the layer keeps them."""

    def keep(self, layer: Any, values: Mapping[str, NDArray[Any]]) -> None:
        """Write what the layer keeps."""

    def given(self, model: Any, x: Any) -> Any:
        """Inputs or targets as this model takes them."""

    def array(self, outputs: Any) -> NDArray[Any]:
        """The outputs of a model as one array, the first of several."""

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes that train together, in the order of their ranks."""


class States(Protocol):
    """The module `normkit.<framework>.states`: what of a norm layer is trained."""

    def freeze(self, model: Any, affine: bool) -> int:
        """Freeze kept statistics, with `affine` gamma and beta too. Returns how many layers were frozen."""

    def unfreeze(self, model: Any) -> int:
        """Undo `freeze`. Returns how many layers were frozen."""

    def grouped(self, model: Any, weight_decay: float, biases: bool) -> Any:
        """See `normkit.param_groups`."""


class Subject(Protocol):
    """A model that was looked into, to be changed."""

    without_optimizer: str  # what is to be said of optimizers where none is given

    def check(self, inplace: bool, optimizer: Any) -> None:
        """Raise where the framework cannot do that."""


def opened(module: str, model: Any, *arguments: Any, frameworks: Sequence[str] = ("torch",)) -> Any:
    """A model looked into by `normkit.<framework>.<module>`. Raises NormTypeError for one of another framework."""
    framework = framework_of(model)
    if framework not in frameworks:
        must = f"`model` must be {', or '.join(_MODELS[name] for name in frameworks)}"
        raise NormTypeError(message(must, f"a model of {framework}"))
    return part(framework, module).opened(model, *arguments)


def recording(framework: str) -> Recording:
    """The recording module of a framework."""
    return cast(Recording, part(framework, "recording"))


def states(framework: str) -> States:
    """The states module of a framework."""
    return cast(States, part(framework, "states"))


def porting(framework: str) -> Porting:
    """The porting module of a framework. Raises NormValueError or MissingExtraError where there is none."""
    return cast(Porting, part(framework, "porting"))
