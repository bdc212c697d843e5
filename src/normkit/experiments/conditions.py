"""What a comparison may change about data, network and evaluation beside its norms and rates, the same for all of them.

Nothing is changed by default, so that a trial under `Conditions()` is the trial there was without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from normkit.core.constraints import Constraint, Flag, Integer, OneOf, Optional, Real, check
from normkit.errors import NormTypeError, NormValueError, message, nearest

__all__ = [
    "APPEARANCES",
    "AS_USUAL",
    "DECAYS",
    "OUTLIER",
    "POPULATIONS",
    "SEQUENCES",
    "Conditions",
    "by_pairs",
    "cut",
    "lit",
    "spoiled_inputs",
    "spoiled_labels",
]

OUTLIER = 10.0  # an outlier is a sample so many times as large
APPEARANCES = ("", "random", "tied", "swapped", "shifted")
POPULATIONS = ("", "training", "test")
DECAYS = ("", "rate")
SEQUENCES = ("", "counted", "masked", "inputs", "steps")
SHORTEST = 3  # rows of a sequence
_NOISE, _OUTLIERS, _LIGHT, _PAIRS, _LENGTHS = (
    2,
    3,
    4,
    5,
    6,
)  # of the seeds: what is spoiled is the same for all variants and all trials
_CONTRAST, _BRIGHTNESS = (0.4, 1.6), (-0.5, 0.5)  # between these; brightness in units of the largest pixel
_DARK = 0.5, 1.0  # contrast and brightness of the test images of `shifted`: pale, and as bright as can be


@dataclass(frozen=True)
class Conditions:
    """What all variants of a comparison share beside the question.

    Of the data (arrays only):

    Attributes:
        label_noise: share of the training labels that are drawn anew, from all classes.
        outliers: share of the training inputs that are multiplied by 10.
        appearance: contrast and brightness of images: `random` for each image, `tied` to its class, `swapped` (tied in
            training, tied to another class in the test part), `shifted` (only the test part is pale and bright).
        by_class: order the samples of every batch by pairs of classes, so that groups of `norm_batch` see about two.

    Of the embedded networks, in PyTorch:

    Attributes:
        weights: factor of all initial weights.
        depth: hidden layers; None keeps 10 of the perceptron and 6 of the convolutional network.
        dropout: probability of a zero behind every hidden activation.
        input_norm: begin with batch norm.
        norm_batch: samples that share batch statistics in training, None for all of a batch.
        momentum: what a batch adds to running statistics, by PyTorch's convention; Keras' 0.99 is 0.01 here.

    Of images read row by row, in PyTorch's perceptron, whose place an LSTM takes:

    Attributes:
        sequences: every image is cut to its first rows, 3 to all, and padded with zeros. What batch norm does: one
            statistic over time with the padding in it (`counted`) or without it (`masked`), both of W x alone; or
            statistics of each step without padding, of W x alone (`inputs`) or of W x, U h and c (`steps`). Other norms
            never see padding.
        gamma: first value of all gains of the LSTM; None keeps that of each layer.
        batch_spread: after training, how much the statistics of batch norm vary between the batches of an epoch is
            measured at every step.

    Of the evaluation, in PyTorch:

    Attributes:
        population: `training` or `test`: after training the statistics of that part take the place of running ones.

    Of the training and what is looked at in it, in PyTorch's embedded networks:

    Attributes:
        weight_decay: times the weights of the hidden layers, added to their gradients (SGD alone); biases, gamma, beta
            and the classifier have none.
        decay_as: `rate`: in place of that decay the learning rate of these weights grows, by as much as makes no
            difference to weights whose scale does not matter.
        landscape: the loss around the network and the shift between its layers are measured at so many steps.

    Raises NormValueError or NormTypeError for values that make no sense.
    """

    label_noise: float = 0.0
    outliers: float = 0.0
    appearance: str = ""
    by_class: bool = False
    weights: float = 1.0
    depth: int | None = None
    dropout: float = 0.0
    input_norm: bool = False
    norm_batch: int | None = None
    momentum: float | None = None
    population: str = ""
    weight_decay: float = 0.0
    decay_as: str = ""
    landscape: int = 0
    sequences: str = ""
    gamma: float | None = None
    batch_spread: bool = False

    CONSTRAINTS: ClassVar[dict[str, Constraint]] = {
        "label_noise": Real(0.0, 1.0),
        "outliers": Real(0.0, 1.0),
        "appearance": OneOf(APPEARANCES),
        "by_class": Flag(),
        "weights": Real(0.0, above=True),
        "depth": Optional(Integer(2)),  # the convolutional network has two stages
        "dropout": Real(0.0, 0.99),
        "input_norm": Flag(),
        "norm_batch": Optional(Integer(2)),
        "momentum": Optional(Real(0.0, 1.0, above=True)),
        "population": OneOf(POPULATIONS),
        "weight_decay": Real(0.0),
        "decay_as": OneOf(DECAYS),
        "landscape": Integer(0),
        "sequences": OneOf(SEQUENCES),
        "gamma": Optional(Real(0.0, above=True)),
        "batch_spread": Flag(),
    }
    _DATA: ClassVar[tuple[str, ...]] = ("label_noise", "outliers", "appearance", "by_class")
    _BOTH: ClassVar[tuple[str, ...]] = ("sequences",)  # of the data, and of the network that reads them
    _TORCH: ClassVar[tuple[str, ...]] = ("population",)  # of any network of PyTorch; the others: of the embedded ones

    def __post_init__(self) -> None:
        check("Conditions", self.CONSTRAINTS, asdict(self))
        if self.decay_as and not self.weight_decay:
            raise NormValueError(message("`decay_as` must come with a `weight_decay` above 0", self.decay_as))
        if self.gamma is not None and not self.sequences:
            raise NormValueError(message("`gamma` must come with `sequences`", f"{self.gamma:g}"))
        if self.batch_spread and not self.sequences:
            raise NormValueError(message("`batch_spread` must come with `sequences`", "True alone"))

    @classmethod
    def made(cls, value: Conditions | Mapping[str, Any]) -> Conditions:
        """From a mapping of names to values. Raises NormValueError for unknown names, with the nearest known ones."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise NormTypeError(message("conditions must be a mapping of names to values", repr(value)))
        known = tuple(field.name for field in fields(cls))
        for name in value:
            if name not in known:
                must = "a condition must be a known one"
                raise NormValueError(message(must, repr(name), nearest(str(name), known)))
        return cls(**value)

    def changes(self) -> dict[str, Any]:
        """What is not as usual."""
        usual = type(self).__dataclass_fields__
        return {name: value for name, value in asdict(self).items() if value != usual[name].default}

    @property
    def of_data(self) -> tuple[str, ...]:
        """The names of those changes that only arrays allow."""
        return tuple(name for name in self.changes() if name in (*self._DATA, *self._BOTH))

    @property
    def of_torch(self) -> tuple[str, ...]:
        """The names of those changes that only PyTorch has."""
        return tuple(name for name in self.changes() if name not in self._DATA)

    @property
    def of_network(self) -> tuple[str, ...]:
        """The names of those changes that only the embedded networks have."""
        return tuple(name for name in self.of_torch if name not in self._TORCH)

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            return f"{value:g}" if isinstance(value, float) else str(value)

        return ", ".join(
            name.replace("_", " ") + ("" if value is True else f" {shown(value)}")
            for name, value in self.changes().items()
        )


AS_USUAL = Conditions()


def lit(
    appearance: str, train: tuple[NDArray[Any], NDArray[Any]], test: tuple[NDArray[Any], NDArray[Any]], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images (N, C, H, W) of both parts under another light: contrast * x + brightness * max|x of the training part|.

    A light tied to the class takes the one of each class from an even scale; `swapped` gives a test image the light of
    the class half the scale away.
    """
    top = float(np.abs(train[0]).max())
    shown = []
    for number, (x, y) in enumerate((train, test)):
        rng = np.random.default_rng([_LIGHT, number])
        contrast, brightness = np.ones(len(x)), np.zeros(len(x))
        if appearance == "random":
            contrast, brightness = (rng.uniform(*span, len(x)) for span in (_CONTRAST, _BRIGHTNESS))
        elif appearance in ("tied", "swapped"):
            at = (y + classes // 2) % classes if appearance == "swapped" and number == 1 else y
            share = at / max(1, classes - 1)
            contrast, brightness = (low + share * (high - low) for low, high in (_CONTRAST, _BRIGHTNESS))
        elif appearance == "shifted" and number == 1:
            contrast, brightness = (np.full(len(x), value) for value in _DARK)
        column = (slice(None), None, None, None)
        shown.append((contrast[column] * x + top * brightness[column]).astype(np.float32))
    return shown[0], shown[1]


def cut(x: NDArray[Any], part: int) -> NDArray[np.float32]:
    """Images (N, C, H, W) cut to 3 to H rows, padded with 0: (N, C + 1, H, W), the last channel 1 where a row is real.

    The lengths are drawn evenly, for each part with its own number.
    """
    lengths = np.random.default_rng([_LENGTHS, part]).integers(min(SHORTEST, x.shape[2]), x.shape[2] + 1, len(x))
    real = np.arange(x.shape[2]) < lengths[:, None]
    shown = np.broadcast_to(real[:, None, :, None], (len(x), 1, *x.shape[2:]))
    return np.concatenate([x * shown, shown], axis=1).astype(np.float32)


def by_pairs(y: NDArray[Any], seed: int, epoch: int, batch: int) -> NDArray[np.int64]:
    """The order of a batch in which two classes take turns until both are used up, then the next two.

    Which two is drawn anew for every batch. A single class would be too much: batch norm would take its mean away, and
    the class with it.
    """
    classes = np.random.default_rng([seed, _PAIRS, epoch, batch]).permutation(np.unique(y))
    place = {label: number for number, label in enumerate(classes)}
    seen = dict.fromkeys(place, 0)
    keys = []
    for label in y:
        keys.append((place[label] // 2, seen[label], place[label]))
        seen[label] += 1
    return np.array(sorted(range(len(y)), key=keys.__getitem__), dtype=np.int64)


def spoiled_labels(y: NDArray[Any], share: float, classes: int) -> NDArray[Any]:
    """A share of the labels drawn anew from all classes, of which one in `classes` stays right by chance."""
    rng = np.random.default_rng(_NOISE)
    chosen = rng.permutation(len(y))[: round(share * len(y))]
    spoiled = y.copy()
    spoiled[chosen] = rng.integers(classes, size=len(chosen))
    return spoiled


def spoiled_inputs(x: NDArray[Any], share: float) -> NDArray[Any]:
    """A share of the samples, `OUTLIER` times as large."""
    chosen = np.random.default_rng(_OUTLIERS).permutation(len(x))[: round(share * len(x))]
    spoiled = x.copy()
    spoiled[chosen] *= OUTLIER
    return spoiled
