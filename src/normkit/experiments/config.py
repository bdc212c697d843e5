"""What is to be compared, as frozen values with a canonical form: the same question always has the same key."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from normkit.core.catalog import CATALOG, check_position
from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.experiments.conditions import AS_USUAL, Conditions
from normkit.experiments.pruning import PRUNERS
from normkit.frameworks import check_framework

__all__ = [
    "GOALS",
    "INPUTS",
    "LOSSES",
    "MODELS",
    "MOMENTUM",
    "NORMS",
    "OPTIMIZERS",
    "PROTOCOL",
    "Config",
    "Task",
    "TrialConfig",
    "Variant",
    "bare",
    "is_reference",
    "short",
]

PROTOCOL = 2  # raised whenever the same configuration would be trained or measured in another way
MOMENTUM = 0.9
INPUTS = ("none", "max", "minmax", "standard")
MODELS = ("cnn", "mlp")
LOSSES = ("cross_entropy", "mse", "mae")
OPTIMIZERS = ("sgd", "adam", "adamw")
GOALS = {"accuracy": "max", "loss": "min"}
NORMS = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms")
POSITIONS = ("before", "after")
_KINDS: dict[Any, str] = {(int, float): "a number", int: "a whole number", str: "a name"}


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
        check_position(name, position)
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
    """One training run, with everything that decides its outcome.

    `code` and `data` are fingerprints of the user's files and of the data, so that a file that changed gives another
    key; `loss`, `optimizer` and `metric` are names or references `file.py:name`, empty for what goes without saying.
    """

    framework: str
    model: str
    code: str
    data: str
    norm: str
    lr: float
    batch_size: int
    inputs: str
    seed: int
    epochs: int
    loss: str
    optimizer: str
    metric: str
    conditions: Conditions = AS_USUAL

    def canonical(self) -> str:
        """The configuration as JSON with sorted keys, with everything that decides the outcome."""
        plain = asdict(self)
        changed = self.conditions.changes()
        # A trial under no conditions keeps the key it had before there were any.
        plain |= {"conditions": changed} if changed else {}
        if not changed:
            del plain["conditions"]
        return json.dumps({**plain, "momentum": MOMENTUM, "protocol": PROTOCOL}, sort_keys=True)

    def key(self) -> str:
        """Sixteen hexadecimal digits that stay the same between runs, machines and versions of Python."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        inputs = f", inputs {self.inputs}" if self.inputs else ""
        under = f", {self.conditions}" if self.conditions.changes() else ""
        return f"{self.norm}, rate {self.lr:g}, batch size {self.batch_size}{inputs}{under}, seed {self.seed}"


class Task(NamedTuple):
    """What the variants are judged by.

    Attributes:
        metric: its name; `accuracy` is a share and shown in percent.
        goal: `max` or `min`.
        target: the value whose first crossing is timed, None where there is none.
        guess: the loss of the best constant guess: ln(classes), the variance of the targets; None where unknown.
        chance: the metric of that guess, None where unknown.
    """

    metric: str
    goal: str
    target: float | None
    guess: float | None = None
    chance: float | None = None

    @property
    def is_share(self) -> bool:
        """Whether values are shares, shown in percent."""
        return self.metric == "accuracy"

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.goal == "max" else -1

    def reached(self, value: float) -> bool:
        """Whether a value is at the target or better."""
        return self.target is not None and self.sign * value >= self.sign * self.target


@dataclass(frozen=True)
class Config:
    """The whole comparison: every norm is trained at every rate, batch size, kind of input scaling and seed.

    Attributes:
        model: `cnn`, `mlp`, or `file.py:build` for a function that takes `norm`; None takes the convolutional network
            for images and the perceptron for tables.
        run: `file.py:train` for a function that takes `trial` and trains by itself; then model and data are its own.
        data: `digits`, the path of an .npz file, name or id of a data set of OpenML, or `file.py:name`; None takes
            digits.
        norms: short names, `NAME[:before|:after]`; None takes all that make sense for the model.
        lrs: learning rates.
        batch_sizes: samples per step; None takes 32, or what a loader gives.
        inputs: how the inputs are scaled: `none`, `max`, `minmax`, `standard`; None standardizes arrays.
        seeds: number of seeds; each gives initial weights and an order of the data.
        epochs: passes over the training part.
        loss: `cross_entropy`, `mse`, `mae` or `file.py:name`; None decides by the labels.
        optimizer: `sgd` (momentum 0.9), `adam`, `adamw` or `file.py:name`; None takes sgd.
        metric: `accuracy`, `loss`, `file.py:name`, in a loop the name of what it reports; None decides by the loss.
        goal: whether the metric is to be `max` or `min`; known for accuracy and loss.
        target: value of the metric whose first crossing is timed; None takes 0.95 for accuracy, else nothing.
        framework: the framework that trains.
        conditions: what is changed about data and network, one set of them after the other; nothing by default.
        pruner: what gives up trials that fall behind the other rates of their norm: `median` or `hyperband`; None does
            not.

    Raises NormValueError or NormTypeError for anything that cannot be run.
    """

    model: str | None = None
    run: str | None = None
    data: str | None = None
    norms: tuple[str, ...] | None = None
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    batch_sizes: tuple[int, ...] | None = None
    inputs: tuple[str, ...] | None = None
    seeds: int = 5
    epochs: int = 6
    loss: str | None = None
    optimizer: str | None = None
    metric: str | None = None
    goal: str | None = None
    target: float | None = None
    framework: str = "torch"
    conditions: tuple[Conditions, ...] = (AS_USUAL,)
    pruner: str | None = None

    def __post_init__(self) -> None:
        _check_functions(self)
        check_framework(self.framework)
        if self.norms is not None:
            # Stored as typed in canonical order of writing: `batch:before` and `batch` are one variant.
            labels = tuple(Variant.parse(norm).label for norm in _listed("norms", self.norms, str))
            object.__setattr__(self, "norms", _once("norms", labels))
        lrs = tuple(float(lr) for lr in _listed("lrs", self.lrs, (int, float)))
        for lr in lrs:
            if not (lr > 0 and math.isfinite(lr)):
                raise NormValueError(message("every learning rate in `lrs` must be positive and finite", f"{lr:g}"))
        object.__setattr__(self, "lrs", _once("lrs", tuple(sorted(lrs))))
        if self.batch_sizes is not None:
            sizes = _listed("batch_sizes", self.batch_sizes, int)
            for size in sizes:
                _at_least_one("every batch size in `batch_sizes`", size)
            object.__setattr__(self, "batch_sizes", _once("batch_sizes", sizes))
        if self.inputs is not None:
            inputs = _listed("inputs", self.inputs, str)
            for mode in inputs:
                if mode not in INPUTS:
                    must = "every input scaling in `inputs` must be a known one"
                    raise NormValueError(message(must, repr(mode), nearest(mode, INPUTS)))
            object.__setattr__(self, "inputs", _once("inputs", inputs))
        _at_least_one("`seeds`", self.seeds)
        _at_least_one("`epochs`", self.epochs)
        if self.run is None and not is_reference(self.model or ""):
            self.check_model()
        _check_judging(self)
        _check_conditions(self)
        if self.pruner is not None and self.pruner not in PRUNERS:
            must = "`pruner` must be a known one"
            raise NormValueError(message(must, repr(self.pruner), nearest(str(self.pruner), PRUNERS)))

    def check_model(self) -> None:
        """Raise NormValueError for what only a loop of the user's may be asked; whether it is one its file tells."""
        metric = self.metric
        if metric is not None and metric not in GOALS and not is_reference(metric):
            must = "`metric` must be a known one or file.py:name"
            raise NormValueError(message(must, repr(metric), nearest(metric, tuple(GOALS))))
        for variant in self.variants:
            if variant.over_batch and 1 in (self.batch_sizes or ()):
                must = f"`{variant.label}` must see at least 2 samples per step, it takes statistics over the batch"
                hint = "leave out batch size 1, or use layer or group"
                raise NormValueError(message(must, "batch size 1", hint))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The norms, parsed."""
        return tuple(Variant.parse(norm) for norm in self.norms or ())

    @property
    def subject(self) -> str:
        """What is trained, in a word: `cnn`, `mine.py:build`."""
        return short(self.run or self.model or "")

    def trials(self, code: str, data: str) -> Iterator[TrialConfig]:
        """Every training run, seed by seed; `code` and `data` are the fingerprints of what is trained.

        Nothing may be left open by then. The inputs of a loop are its own business, and called ``.
        """
        assert self.norms is not None
        assert self.batch_sizes is not None
        scalings = ("",) if self.run else self.inputs
        assert scalings is not None
        grid = itertools.product(range(self.seeds), self.conditions, scalings, self.batch_sizes, self.norms, self.lrs)
        for seed, conditions, inputs, batch_size, norm, lr in grid:
            yield TrialConfig(
                framework=self.framework,
                model=self.subject,
                code=code,
                data=data,
                norm=norm,
                lr=lr,
                batch_size=batch_size,
                inputs=inputs,
                seed=seed,
                epochs=self.epochs,
                loss=short(self.loss or ""),
                optimizer=short(self.optimizer or ""),
                metric=short(self.metric or ""),
                conditions=conditions,
            )


def is_reference(text: str) -> bool:
    """Whether this is `file.py:name`, or `python:name` for an object that was handed over in Python."""
    return ".py:" in text or text.startswith("python:")


def short(text: str) -> str:
    """`/a/b/mine.py:build` as `mine.py:build`; other names as they are."""
    return text.replace("\\", "/").rsplit("/", 1)[-1] if is_reference(text) else text


def bare(text: str) -> str:
    """`mine.py:build` as `build`; other names as they are."""
    return text.rpartition(":")[2] if is_reference(text) else text


def _check_functions(config: Config) -> None:
    if config.run is not None:
        if config.model is not None:
            got = f"{config.model} and {config.run}"
            raise NormValueError(message("`model` and `run` must not be given both", got))
        if not is_reference(str(config.run)):
            hint = "normkit compare train.py:train"
            raise NormValueError(message("`run` must be file.py:name", repr(config.run), hint))
        for name in ("data", "inputs", "loss", "optimizer"):
            if getattr(config, name) is not None:
                must = f"`{name}` must be left to a training loop of your own, which has its own"
                raise NormValueError(message(must, repr(getattr(config, name))))
    for name, known in (("model", MODELS), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
        value = getattr(config, name)
        if value is None or value in known or is_reference(str(value)):
            continue
        must = f"`{name}` must be a known one or file.py:name"
        hint = "write file.py:build" if str(value).endswith(".py") else nearest(str(value), known)
        raise NormValueError(message(must, repr(value), hint))


def _check_judging(config: Config) -> None:
    metric, goal, target = config.metric, config.goal, config.target
    if metric is not None and config.run is not None and is_reference(metric):
        must = "`metric` of a training loop must be the name of what it reports"
        raise NormValueError(message(must, short(metric)))
    if goal not in (None, "min", "max"):
        raise NormValueError(message("`goal` must be min or max", repr(goal), nearest(str(goal), ("min", "max"))))
    if metric is not None and metric not in GOALS and goal is None:
        must = f"`goal` must be given for a metric of your own ({short(metric)})"
        raise NormValueError(message(must, hint='goal="min" or goal="max"'))
    if goal is not None and GOALS.get(metric or "", goal) != goal:
        raise NormValueError(message(f"`goal` of {metric} must be {GOALS[metric or '']}", goal))
    if target is None:
        return
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise NormTypeError(message("`target` must be a number", repr(target)))
    if not math.isfinite(target):
        raise NormValueError(message("`target` must be finite", f"{target:g}"))
    if metric == "accuracy" and not 0 < target <= 1:
        must = "`target` must be a share above 0 and at most 1"
        raise NormValueError(message(must, f"{target:g}", "95 % is written 0.95"))


def _check_conditions(config: Config) -> None:
    made = tuple(map(Conditions.made, _listed("conditions", config.conditions, (Conditions, Mapping))))
    object.__setattr__(config, "conditions", _once("conditions", made))
    for conditions in made:
        if changes := conditions.changes():
            if config.run is not None:
                must = "`conditions` must be left to a training loop of your own, which has its own"
                raise NormValueError(message(must, ", ".join(changes)))
            if config.framework != "torch" and conditions.of_torch:
                must = f"these conditions must be trained with PyTorch: {', '.join(conditions.of_torch)}"
                raise NormValueError(message(must, config.framework, 'framework="torch"'))
            if config.model is not None and config.model not in MODELS and conditions.of_network:
                must = f"these conditions must be asked of cnn or mlp: {', '.join(conditions.of_network)}"
                raise NormValueError(message(must, short(config.model), "change your own model instead"))


def _listed(name: str, values: Any, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    # A lone string is a sequence of letters, which nobody means.
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise NormTypeError(message(f"`{name}` must be a list or tuple", repr(values)))
    if not values:
        raise NormValueError(message(f"`{name}` must name at least one value", "none"))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            kinds = _KINDS.get(kind, "a mapping of names to values")
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
