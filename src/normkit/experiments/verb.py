"""The verb `compare`: check everything, train the grid, judge, write."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from normkit.errors import NormRuntimeError, NormTypeError, NormValueError, message
from normkit.experiments.analysis import Group, summarize
from normkit.experiments.config import Config, TrialConfig, Variant
from normkit.experiments.data import Dataset, load, prepare
from normkit.experiments.files import OutputFolder, write
from normkit.experiments.progress import NoProgress, Progress, progress
from normkit.experiments.protocol import Training, training
from normkit.experiments.runner import cores, run_trials
from normkit.experiments.trial import TrialResult, steps_per_epoch, trainer_for
from normkit.kernels import instruction_sets

__all__ = ["Comparison", "compare"]

FORMAT = 1  # of results.json
_DEFAULT = Config()


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        config: the question.
        data: the data, in words.
        classes: number of classes.
        trials: every trial, seed by seed.
        environment: how it was produced: versions, cores, workers, seconds, command.
    """

    config: Config
    data: str
    classes: int
    trials: tuple[TrialResult, ...]
    environment: dict[str, Any]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The summary of every variant, one group per batch size and input scaling."""
        return summarize(self.trials, self.config.target, self.classes)

    def __str__(self) -> str:
        from normkit.report.words import text

        return text(self)

    def _repr_html_(self) -> str:
        from normkit.report.render import fragment

        return fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON: question, environment, sentences, summary, trials."""
        from normkit.report.words import sentences

        return {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "data": self.data,
            "classes": self.classes,
            "environment": self.environment,
            "sentences": sentences(self),
            "summary": [
                {**group.setting._asdict(), "variants": [variant.to_dict() for variant in group.variants]}
                for group in self.groups
            ],
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def save(self, path: str | os.PathLike[str] = "normkit-report") -> Path:
        """Write `report.html` and `results.json` into the folder `path`, each whole or not at all.

        Returns the path of the report. Raises NormRuntimeError where the folder cannot be written.
        """
        from normkit.report.render import page
        from normkit.report.words import to_json

        texts = {"results.json": to_json(self), "report.html": page(self)}
        with OutputFolder(path) as folder:
            for name, text in texts.items():
                try:
                    write(folder / name, text)
                except OSError as error:
                    must = f"{name} must fit into the output folder"
                    raise NormRuntimeError(message(must, f"{folder} ({error.strerror})")) from error
        return folder / "report.html"


def compare(
    model: str | None = None,
    data: str = _DEFAULT.data,
    *,
    norms: Sequence[str] = _DEFAULT.norms,
    lrs: Sequence[float] = _DEFAULT.lrs,
    batch_sizes: Sequence[int] = _DEFAULT.batch_sizes,
    inputs: str | Sequence[str] = _DEFAULT.inputs,
    seeds: int = _DEFAULT.seeds,
    epochs: int = _DEFAULT.epochs,
    target: float = _DEFAULT.target,
    framework: str = _DEFAULT.framework,
    workers: int | None = None,
    out: str | os.PathLike[str] | None = None,
    command: str | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Train every norm at every learning rate, batch size, input scaling and seed, and judge each at its own best rate.

    The rate is chosen by the mean accuracy over the seeds on a stratified fifth of the training data; the test data is
    scored once per trial, after training, and read for the chosen rate alone. All variants of a seed start from the
    same weights and see the same samples in the same order for the same number of steps (SGD, momentum 0.9).

    Args:
        model: `cnn` or `mlp`; by default the convolutional network for images, the perceptron for tables.
        data: `digits` or the path of an .npz file with x_train, y_train, x_test, y_test.
        norms: short names, `NAME[:before|:after]` the activation; `none` is no normalization.
        lrs: learning rates.
        batch_sizes: samples per step.
        inputs: scaling of the inputs, one or several of `none`, `max`, `minmax`, `standard`.
        seeds: number of seeds.
        epochs: passes over the training data.
        target: validation accuracy whose first crossing is timed, as a share.
        framework: what trains.
        workers: processes, one thread each; by default one per core.
        out: folder for `report.html` and `results.json`; None writes nothing.
        command: how this was started, for the report.
        show_progress: tell about progress on standard error.

    Returns:
        The comparison; `print` it, show it in a notebook, or `save` it.

    Raises:
        NormError: for anything that cannot be run, before training where that can be known; nothing is written then.

    Example:
        >>> import normkit
        >>> result = normkit.compare("mlp", norms=("none", "batch"), lrs=(0.03,), seeds=1)  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    if isinstance(inputs, str):
        inputs = (inputs,)
    config = Config(
        model=model,
        data=data,
        norms=norms,  # type: ignore[arg-type]  # Config makes tuples of them, and words what it refuses
        lrs=lrs,  # type: ignore[arg-type]
        batch_sizes=batch_sizes,  # type: ignore[arg-type]
        inputs=inputs,  # type: ignore[arg-type]
        seeds=seeds,
        epochs=epochs,
        target=target,
        framework=framework,
    )
    workers = _checked_workers(workers)
    if out is None:
        return _run(config, workers, command, show_progress)
    from normkit.report import render  # what the report needs must be there before the training, not after

    render.require()
    with OutputFolder(out):
        comparison = _run(config, workers, command, show_progress)
        comparison.save(out)
    return comparison


def _run(config: Config, workers: int, command: str | None, show_progress: bool) -> Comparison:
    loaded = load(config.data)
    config = dataclasses.replace(config, model=config.model or ("cnn" if loaded.is_images else "mlp"))
    module = training(config.framework)
    trials = list(config.trials(loaded.fingerprint))
    _check_trials(config, trials, loaded, module)
    begun = time.perf_counter()
    teller: Progress = progress() if show_progress else NoProgress()
    workers = min(workers, len(trials))
    counted = f"{len(trials)} trials" if len(trials) > 1 else "1 trial"
    processes = f"{workers} workers" if workers > 1 else "1 worker"
    teller.start(len(trials), f"{config.model} on {loaded}: {counted}, {processes}")
    try:
        results = run_trials(trials, loaded, workers, lambda result: teller.advance(str(result.config)))
    finally:
        teller.stop()
    from normkit import __version__

    environment = {
        "versions": {"normkit": __version__, "python": platform.python_version(), **module.versions()},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "instruction_sets": list(instruction_sets()),
        "workers": workers,
        "seconds": round(time.perf_counter() - begun, 1),
        "command": command,
    }
    return Comparison(config, str(loaded), loaded.classes, tuple(results), environment)


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return cores()
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise NormTypeError(message("`workers` must be a whole number", repr(workers)))
    if workers < 1:
        raise NormValueError(message("`workers` must be at least 1", workers))
    return workers


def _check_trials(config: Config, trials: list[TrialConfig], loaded: Dataset, module: Training) -> None:
    """Build every variant once and refuse here what would only fail after minutes."""
    if config.model == "cnn" and not loaded.is_images:
        must = "`cnn` must be given images"
        raise NormValueError(message(must, f"rows of {loaded.shape[0]} columns", "use mlp"))
    data = prepare(loaded, config.inputs[0])
    samples = len(data.train.y)
    for size in config.batch_sizes:
        if steps_per_epoch(samples, size) < 1:
            must = "a batch size must be at most the number of samples left for training"
            raise NormValueError(message(must, f"{size} and {samples}"))
    for norm in config.norms:
        trial = next(trial for trial in trials if trial.norm == norm)
        try:
            trainer_for(trial, data, loaded.classes, module)
        except NormValueError as error:
            label = Variant.parse(norm).label
            raise NormValueError(f"`{label}` cannot be used in {config.model}: {error}") from error
