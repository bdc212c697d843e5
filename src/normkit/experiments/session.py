"""What happens in a worker: the user's code is loaded, the question is made complete, trials are run.

User code never runs in the process that asked: a file that trains on import, a model that crashes or a seed that is set
stays here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from normkit.errors import NormError, NormRuntimeError, NormTypeError, NormValueError, message
from normkit.experiments.code import Code, content_hash, files_of_the_user, takes
from normkit.experiments.conditions import Conditions
from normkit.experiments.config import GOALS, MOMENTUM, NORMS, Config, Task, TrialConfig, Variant, bare, short
from normkit.experiments.data import DEFAULT_DATA, Dataset
from normkit.experiments.feeds import ArrayFeed, DatasetFeed, Feed, feed_for
from normkit.experiments.loop import run_loop
from normkit.experiments.protocol import Training, training
from normkit.experiments.results import Stops, TrialResult, never
from normkit.experiments.trial import Recipe, run_trial, seed_everything, trainer_for
from normkit.frameworks import FRAMEWORKS

__all__ = ["Job", "Plan", "Session"]

_TARGET = 0.95  # accuracy
_LOSSES = {"cross_entropy": "mean cross entropy", "mse": "mean squared error", "mae": "mean absolute error"}
_OPTIMIZERS = {"sgd": f"SGD with momentum {MOMENTUM}", "adam": "Adam", "adamw": "AdamW"}
_BATCH_SIZES = (32,)


class Job(NamedTuple):
    """The question as it travels to a worker.

    `code` holds what stands behind each name of the user's in it; `files` the user's files that planning it loaded,
    with a hash of each, empty before.
    """

    config: Config
    data: Dataset | None
    code: dict[str, Code]
    files: dict[str, str] = {}  # noqa: RUF012  # never written to


class Plan(NamedTuple):
    """The question made complete.

    Attributes:
        job: with nothing left open.
        task: None for a loop whose first report decides the metric.
        data: in words.
        trials: every training run.
        words: loss and optimizer in words.
        notes: what was decided, in sentences.
        versions: of what trains.
    """

    job: Job
    task: Task | None
    data: str
    trials: tuple[TrialConfig, ...]
    words: dict[str, str]
    notes: tuple[str, ...]
    versions: dict[str, str]


class Session:
    """One question in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._values: dict[str, Any] = {}  # what was loaded: once, so that a file may be edited meanwhile
        self._feed: Feed | None = None
        self._under: dict[Conditions, Feed] = {}
        for file, digest in job.files.items():
            if not Path(file).is_file() or content_hash(Path(file)) != digest:
                must = f"{Path(file).name} must stay as it is while trials are run"
                raise NormRuntimeError(message(must, "a change", "run the same command again"))

    @cached_property
    def training(self) -> Training:
        """The framework's side; loaded when it is needed, since a loop of the user's may need none of ours."""
        found = training(self.job.config.framework)
        found.limit_threads(1)
        return found

    def plan(self) -> Plan:
        """Load everything, build every variant once, and decide what was left open.

        Raises NormError for what would only fail after minutes.
        """
        config = self.job.config
        if config.model in self.job.code:
            function = self._function("model")
            if takes(function, "trial") and not takes(function, "norm"):
                config = dataclasses.replace(config, model=None, run=config.model)
                self.job = self.job._replace(config=config, data=None)
        return self._plan_loop() if config.run else self._plan_model()

    def run(self, config: TrialConfig, stops: Stops = never) -> TrialResult:
        """One trial; `stops` is asked after every evaluation whether it is to be given up."""
        asked = self.job.config
        if asked.run:
            train = self._function("run")
            seeded = self._framework_is_there()
            result = self._looped(config, train, seeded, stops)
            # A loop that loaded the framework only now did so with random numbers that no seed had set.
            again = not seeded and self._framework_is_there()
            return self._looped(config, train, True, stops) if again else result
        return run_trial(config, self._recipe(), self._fed_under(config.conditions), self.training, stops)

    def _looped(self, config: TrialConfig, train: Any, seeded: bool, stops: Stops) -> TrialResult:
        seed_everything(config.seed, self.training if seeded else None)
        return run_loop(config, train, self.job.config.metric, lambda: self.training, stops)

    def _plan_loop(self) -> Plan:
        config = self.job.config
        if not takes(self._function("run"), "trial"):
            must = f"{config.subject} must take `trial`"
            raise NormValueError(message(must, hint="def train(trial): ... or, for a model, def build(norm): ..."))
        config = dataclasses.replace(
            config,
            norms=config.norms or tuple(norm for norm in NORMS if Variant.parse(norm).position == "before"),
            batch_sizes=config.batch_sizes or _BATCH_SIZES,
        )
        task = None
        if config.metric is not None:
            goal = config.goal or GOALS[config.metric]
            task = Task(config.metric, goal, _target(config, config.metric))
        self.job = self.job._replace(config=config)
        there = self._framework_is_there()
        versions, notes = (self.training.versions(), self.training.remarks(None)) if there else ({}, ())
        trials = tuple(config.trials(self._fingerprint(), ""))
        return Plan(self.job, task, "", trials, {}, notes, versions)

    def _plan_model(self) -> Plan:
        self.job.config.check_model()
        feed, config, notes = self._fed(), self.job.config, []
        loss = config.loss or ("cross_entropy" if feed.classes else "mse")
        if loss == "cross_entropy" and feed.classes is None and feed.spread is not None:
            must = "`loss` must be mse or mae where real numbers are to be predicted"
            raise NormValueError(message(must, "cross_entropy", "for classes convert the labels with .astype(int)"))
        metric = config.metric or ("accuracy" if loss == "cross_entropy" else "loss")
        if metric == "accuracy" and feed.classes is None and feed.spread is not None:
            raise NormValueError(message("`metric` must be loss or your own where numbers are to be predicted", metric))
        images = feed.shape is not None and len(feed.shape) == 3
        model = config.model or ("cnn" if images else "mlp")
        if model == "cnn" and not images:
            got = "samples that are no arrays" if feed.shape is None else f"rows of {feed.shape[0]} columns"
            raise NormValueError(message("`cnn` must be given images", got, "use mlp"))
        if config.inputs is not None and not feed.scalable and config.inputs != ("none",):
            must = "`inputs` must be none for data sets and loaders, which scale their samples themselves"
            raise NormValueError(message(must, ", ".join(config.inputs)))
        sizes = config.batch_sizes or ((feed.own_batches,) if feed.own_batches else _BATCH_SIZES)
        config = dataclasses.replace(
            config,
            model=model,
            data=config.data or DEFAULT_DATA,
            loss=loss,
            metric=metric,
            goal=config.goal or GOALS[metric],
            optimizer=config.optimizer or "sgd",
            batch_sizes=sizes,
            inputs=config.inputs or (("standard",) if feed.scalable else ("none",)),
            target=_target(config, metric),
        )
        for size in sizes:
            if feed.steps(size) < 1:
                must = "a batch size must be at most the number of samples left for training"
                raise NormValueError(message(must, f"{size} and {feed.samples}"))
        self.job = self.job._replace(config=config)
        for conditions in config.conditions:
            self._fed_under(conditions)
            for size in sizes:
                if size % (conditions.norm_batch or size):
                    must = "a batch size must be a multiple of `norm_batch`"
                    raise NormValueError(message(must, f"{size} and {conditions.norm_batch}"))
        norms, dropped = self._usable(config.norms)
        config = dataclasses.replace(config, norms=norms)
        self.job = self.job._replace(config=config)
        notes += dropped
        if isinstance(feed, ArrayFeed) and feed.classes is None:
            notes.append(
                "The numbers to predict are scaled to mean 0 and standard deviation 1 by the training part: a mean "
                "squared error of 1 is what guessing their mean gives."
            )
        if not feed.tested:
            notes.append("There is no test part: the validation part that chose the rates is reported in its place.")
        elif isinstance(feed, DatasetFeed) and feed.held_out:
            notes.append("A random fifth of the training samples chose the rates.")
        notes += self.training.remarks(config.epochs * min(feed.steps(size) for size in sizes))
        spread = feed.spread or (None, None)
        surprise = math.log(feed.classes) if feed.classes else None
        guess = {"cross_entropy": surprise, "mse": spread[0], "mae": spread[1]}.get(loss)
        chances = {"accuracy": 1 / feed.classes if feed.classes else None, "loss": guess}
        task = Task(bare(metric), config.goal or "max", config.target, guess, chances.get(metric))
        data = f"{short(config.data or '')} {feed.fingerprint}"
        trials = tuple(config.trials(self._fingerprint(), data))
        words = {
            "loss": _LOSSES.get(loss, short(loss)),
            "optimizer": _OPTIMIZERS.get(str(config.optimizer), short(str(config.optimizer))),
        }
        return Plan(self.job, task, str(feed), trials, words, tuple(notes), self.training.versions())

    def _usable(self, asked: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[str]]:
        """Take a step with every variant. Of norms that were asked for each must work, of the default ones some."""
        if asked is not None:
            for norm in asked:
                self._tried(norm)
            return asked, []
        able, notes = [], []
        for norm in NORMS:
            try:
                self._tried(norm)
                able.append(norm)
            except NormValueError as error:
                if norm == "none":
                    raise
                notes.append(f"Left out: {error}.")
        return tuple(able), notes

    def _tried(self, norm: str) -> None:
        config = self.job.config
        assert config.batch_sizes is not None
        small = dataclasses.replace(
            config, norms=(norm,), batch_sizes=(min(config.batch_sizes),), lrs=config.lrs[:1], seeds=1
        )
        firsts = {trial.conditions: trial for trial in small.trials("", "")}
        for trial in firsts.values():
            self._stepped(norm, trial)

    def _stepped(self, norm: str, trial: TrialConfig) -> None:
        config, feed = self.job.config, self._fed_under(trial.conditions)
        try:
            seed_everything(trial.seed, self.training)
            trainer = trainer_for(trial, self._recipe(), feed, self.training)
            trainer.step(*next(feed.batches(trial.inputs, trial.batch_size, trial.seed, 0)))
            trainer.evaluate([next(iter(feed.validation(trial.inputs)))])
        except NormValueError as error:
            raise NormValueError(f"`{norm}` cannot be used in {config.subject}: {error}") from error
        except NormError:
            raise
        except Exception as error:  # of the network on this data: a wrong width, a missing nn.Flatten
            must = f"{config.subject} must take a step on this data"
            raise NormValueError(message(must, f"{type(error).__name__}: {error}".splitlines()[0])) from error

    def _recipe(self) -> Recipe:
        config = self.job.config
        assert config.metric is not None
        made = {name: self._function(name) for name in ("model", "loss", "optimizer", "metric")}
        return Recipe(**made, metric_name=bare(config.metric))

    def _function(self, name: str) -> Any:
        """What stands behind a name of the question: the name itself, or the user's function."""
        text = getattr(self.job.config, name)
        if text not in self.job.code:
            return text
        value = self._loaded(text)
        if not isinstance(value, Callable):  # type: ignore[arg-type]
            raise NormTypeError(message(f"{text} must be a function", type(value).__name__))
        return value

    def _loaded(self, text: str) -> Any:
        if text not in self._values:
            code = self.job.code[text]
            guarded = code.may_import(_module(self.job.config.framework)) and self._framework_is_there(load=True)
            self._values[text] = code.load(self.training.no_training if guarded else None)
        return self._values[text]

    def _fingerprint(self) -> str:
        """Of all code of the user's that is loaded by now; what a function will import later is not seen."""
        self.job = self.job._replace(files=files_of_the_user())
        found = sorted((Path(file).name, digest) for file, digest in self.job.files.items())
        found += sorted((code.label, code.fingerprint) for code in self.job.code.values() if code.pickled)
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else ""

    def _fed(self) -> Feed:
        if self._feed is None:
            config = self.job.config
            data: Any = self.job.data
            if data is None:
                assert config.data is not None
                data = self._loaded(config.data)
            seed_everything(0, self.training)  # what is drawn while the data is read has the same fingerprint each time
            self._feed = feed_for(short(config.data or DEFAULT_DATA), data, config.loss, config.batch_sizes)
        return self._feed

    def _fed_under(self, conditions: Conditions) -> Feed:
        feed = self._fed()
        if not conditions.of_data:
            return feed
        if not isinstance(feed, ArrayFeed):
            must = f"data must be arrays under these conditions: {', '.join(conditions.of_data)}"
            raise NormValueError(message(must, "data sets or loaders"))
        if conditions not in self._under:
            self._under[conditions] = feed.under(conditions)
        return self._under[conditions]

    def _framework_is_there(self, *, load: bool = False) -> bool:
        """Whether it is loaded; `load` tries to. A loop of the user's may do without it, or use another one."""
        config = self.job.config
        if config.run and not load and _module(config.framework) not in sys.modules:
            return False
        try:
            return self.training is not None
        except ImportError:
            if config.run:
                return False
            raise


def _module(framework: str) -> str:
    """The package that is imported for it."""
    return FRAMEWORKS[framework].partition(".")[0]


def _target(config: Config, metric: str) -> float | None:
    return _TARGET if config.target is None and metric == "accuracy" else config.target
