"""What is to be compared, as frozen values with a canonical form: the same question always has the same key."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from normkit.core.catalog import CATALOG
from normkit.errors import NormTypeError, NormValueError, message, nearest

__all__ = ["FRAMEWORKS", "INPUTS", "MOMENTUM", "PROTOCOL", "Config", "TrialConfig", "Variant"]

PROTOCOL = 1  # raised whenever the same configuration would be trained or measured in another way
MOMENTUM = 0.9
FRAMEWORKS = ("torch", "keras", "nnx")
INPUTS = ("none", "max", "minmax", "standard")
POSITIONS = ("before", "after")


class Variant(NamedTuple):
    """A normalizer and where it stands: before or after the activation. `none` is no normalization."""

    name: str
    position: str = "before"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `NAME[:before|:after]`. Raises NormValueError with the nearest names for an unknown one."""
        name, colon, position = text.strip().partition(":")
        known = ("none", *CATALOG)
        if name not in known:
            raise NormValueError(message("a norm must be a known short name", repr(name), nearest(name, known)))
        if colon and position not in POSITIONS:
            must = "the position of a norm must be `before` or `after` the activation"
            raise NormValueError(message(must, repr(position), f"write {name} or {name}:after"))
        if colon and name == "none":
            raise NormValueError(message("`none` has no position", repr(text), "write none"))
        return cls(name, position or "before")

    @property
    def label(self) -> str:
        """The short name as typed: `batch` or `batch:after`."""
        return self.name if self.position == "before" else f"{self.name}:{self.position}"

    @property
    def words(self) -> str:
        """The name in a sentence: `batch norm`, `batch norm after the activation`, `none`."""
        if self.name == "none":
            return "none"
        words = CATALOG[self.name].name.replace("_", " ").replace("rms", "RMS")
        return words if self.position == "before" else f"{words} after the activation"

    @property
    def over_batch(self) -> bool:
        """Whether its statistics are taken over the samples of a batch."""
        return self.name != "none" and "n" in CATALOG[self.name].over.split()


@dataclass(frozen=True)
class TrialConfig:
    """One training run. `data` is the fingerprint of the arrays, so a file that changed gives another key."""

    framework: str
    model: str
    data: str
    norm: str
    lr: float
    batch_size: int
    inputs: str
    seed: int
    epochs: int

    def canonical(self) -> str:
        """The configuration as JSON with sorted keys, with everything that decides the outcome."""
        return json.dumps({**asdict(self), "momentum": MOMENTUM, "protocol": PROTOCOL}, sort_keys=True)

    def key(self) -> str:
        """Sixteen hexadecimal digits that stay the same between runs, machines and versions of Python."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.norm}, rate {self.lr:g}, batch size {self.batch_size}, inputs {self.inputs}, seed {self.seed}"


@dataclass(frozen=True)
class Config:
    """The whole comparison: every norm is trained at every rate, batch size, kind of input scaling and seed.

    Attributes:
        model: `cnn` or `mlp`; None takes the convolutional network for images and the perceptron for tables.
        data: `digits` or the path of an .npz file.
        norms: short names, `NAME[:before|:after]`.
        lrs: learning rates.
        batch_sizes: samples per step.
        inputs: how the inputs are scaled: `none`, `max`, `minmax`, `standard`.
        seeds: number of seeds; each gives initial weights and an order of the data.
        epochs: passes over the training part.
        target: validation accuracy, as a share, whose first crossing is timed.
        framework: the framework that trains.

    Raises NormValueError or NormTypeError for anything that cannot be run.
    """

    model: str | None = None
    data: str = "digits"
    norms: tuple[str, ...] = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms")
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    batch_sizes: tuple[int, ...] = (32,)
    inputs: tuple[str, ...] = ("standard",)
    seeds: int = 3
    epochs: int = 6
    target: float = 0.95
    framework: str = "torch"

    def __post_init__(self) -> None:
        _check_model(self.model)
        _check_framework(self.framework)
        # Stored as typed in canonical order of writing: `batch:before` and `batch` are one variant.
        labels = tuple(Variant.parse(norm).label for norm in _listed("norms", self.norms, str))
        object.__setattr__(self, "norms", _once("norms", labels))
        lrs = tuple(float(lr) for lr in _listed("lrs", self.lrs, (int, float)))
        for lr in lrs:
            if not (lr > 0 and math.isfinite(lr)):
                raise NormValueError(message("every learning rate in `lrs` must be positive and finite", f"{lr:g}"))
        object.__setattr__(self, "lrs", _once("lrs", tuple(sorted(lrs))))
        sizes = _listed("batch_sizes", self.batch_sizes, int)
        for size in sizes:
            _at_least_one("every batch size in `batch_sizes`", size)
        object.__setattr__(self, "batch_sizes", _once("batch_sizes", sizes))
        inputs = _listed("inputs", self.inputs, str)
        for mode in inputs:
            if mode not in INPUTS:
                must = "every input scaling in `inputs` must be a known one"
                raise NormValueError(message(must, repr(mode), nearest(mode, INPUTS)))
        object.__setattr__(self, "inputs", _once("inputs", inputs))
        _at_least_one("`seeds`", self.seeds)
        _at_least_one("`epochs`", self.epochs)
        if isinstance(self.target, bool) or not isinstance(self.target, int | float):
            raise NormTypeError(message("`target` must be a number", repr(self.target)))
        if not 0 < self.target <= 1:
            must = "`target` must be a share above 0 and at most 1"
            raise NormValueError(message(must, f"{self.target:g}", "95 % is written 0.95"))
        for variant in self.variants:
            if 1 in sizes and variant.over_batch:
                must = f"`{variant.label}` must see at least 2 samples per step, it takes statistics over the batch"
                hint = "leave out batch size 1, or use layer or group"
                raise NormValueError(message(must, "batch size 1", hint))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The norms, parsed."""
        return tuple(Variant.parse(norm) for norm in self.norms)

    def trials(self, fingerprint: str) -> Iterator[TrialConfig]:
        """Every training run, seed by seed. `model` must be decided by then; `fingerprint` stands for the data."""
        assert self.model is not None
        grid = itertools.product(range(self.seeds), self.inputs, self.batch_sizes, self.norms, self.lrs)
        for seed, inputs, batch_size, norm, lr in grid:
            yield TrialConfig(self.framework, self.model, fingerprint, norm, lr, batch_size, inputs, seed, self.epochs)


def _check_model(model: str | None) -> None:
    if model is None or model in ("cnn", "mlp"):
        return
    if ".py" in str(model):
        must = "`model` must be one of the embedded models for now, models of your own are not available yet"
        raise NormValueError(message(must, repr(model), "use cnn or mlp"))
    raise NormValueError(message("`model` must be an embedded model", repr(model), nearest(str(model), ("cnn", "mlp"))))


def _check_framework(framework: str) -> None:
    if framework not in FRAMEWORKS:
        must = "`framework` must be a known one"
        raise NormValueError(message(must, repr(framework), nearest(framework, FRAMEWORKS)))
    if framework != "torch":
        must = "`framework` must be torch for now, training with the others is not available yet"
        raise NormValueError(message(must, repr(framework), "use torch"))


def _listed(name: str, values: Any, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    # A lone string is a sequence of letters, which nobody means.
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise NormTypeError(message(f"`{name}` must be a list or tuple", repr(values)))
    if not values:
        raise NormValueError(message(f"`{name}` must name at least one value", "none"))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            kinds = "a number" if kind == (int, float) else {int: "a whole number", str: "a name"}[kind]  # type: ignore[index]
            raise NormTypeError(message(f"every value of `{name}` must be {kinds}", repr(value)))
    return tuple(values)


def _once(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise NormValueError(message(f"`{name}` must name each value once", f"{value} twice"))
    return values


def _at_least_one(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise NormTypeError(message(f"{what} must be a whole number", repr(value)))
    if value < 1:
        raise NormValueError(message(f"{what} must be at least 1", value))
