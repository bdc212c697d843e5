"""The verb `compare`: make the question complete, train the grid, judge, write."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normkit.errors import NormTypeError, NormValueError, message
from normkit.experiments.code import Code, refuse_when_imported, takes
from normkit.experiments.comparison import Comparison
from normkit.experiments.conditions import Conditions
from normkit.experiments.config import GOALS, Config, Task, is_reference
from normkit.experiments.connection import import_optuna
from normkit.experiments.data import DEFAULT_DATA, Dataset, from_arrays, is_arrays, load
from normkit.experiments.devices import cores, crew_size, gpus, may_use
from normkit.experiments.progress import NoProgress, Progress, progress
from normkit.experiments.questions import Question
from normkit.experiments.results import TrialResult
from normkit.experiments.runner import Crew, run_trials
from normkit.experiments.session import Job, Plan
from normkit.experiments.store import Store
from normkit.files import OutputFolder
from normkit.kernels import instruction_sets

__all__ = ["checked_workers", "compare"]

TRIALS, LOG = "trials.db", "output.log"  # in the output folder
_DEFAULT = Config()


def compare(
    model: str | Callable[..., Any] | None = None,
    data: Any = None,
    *,
    run: str | Callable[..., Any] | None = None,
    norms: Sequence[str] | None = None,
    lrs: Sequence[float] = _DEFAULT.lrs,
    batch_sizes: Sequence[int] | None = None,
    inputs: str | Sequence[str] | None = None,
    seeds: int = _DEFAULT.seeds,
    epochs: int = _DEFAULT.epochs,
    loss: str | Callable[..., Any] | None = None,
    optimizer: str | Callable[..., Any] | None = None,
    metric: str | Callable[..., Any] | None = None,
    goal: str | None = None,
    target: float | None = None,
    framework: str = _DEFAULT.framework,
    conditions: Sequence[Conditions | Mapping[str, Any]] = _DEFAULT.conditions,
    pruner: str | None = _DEFAULT.pruner,
    workers: int | None = None,
    storage: str | None = None,
    out: str | os.PathLike[str] | None = None,
    command: str | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Train every norm at every learning rate, batch size, input scaling and seed, and judge each at its own best rate.

    The rate is chosen by the mean of the metric over the seeds on a validation part; the test part is scored once per
    trial, after training, and read for the chosen rate alone. All variants of a seed start from the same weights and
    see the same samples in the same order for the same number of steps. Differences are paired by seed and corrected
    for their number (see :func:`normkit.experiments.analysis.summarize`).

    Finished trials are kept in the output folder, or in `storage`: the same call goes on where an earlier one ended,
    however it ended, and processes that run it at the same time share the work.

    Args:
        model: `cnn` or `mlp`; by default the convolutional network for images, the perceptron for tables. Or a function
            `build(norm)` that returns a network, itself or as `file.py:build`; in it `norm(num_features)` gives a
            layer, `norm(num_features, activation)` one with its activation, in the order that the variant says. In
            Keras `norm()` and `norm(activation="relu")` do; in Flax NNX it is `build(norm, rngs)`. A `build()` of
            PyTorch, or of a Sequential or Functional Keras model, needs no `norm`: norms are put between its maps and
            activations (:func:`normkit.insert`), or in the place of those it has (:func:`normkit.replace`).
        data: `digits`, the path of an .npz file with x_train, y_train, x_test, y_test, a name or id of OpenML,
            `file.py:name`, or the thing itself: those four arrays, data sets, or loaders (train, validation, test).
        run: instead of both, a training loop `train(trial)`, itself or as `file.py:train`: any task and framework. It
            reads `trial.norm`, `trial.lr`, `trial.batch_size`, `trial.seed` and calls
            `trial.report(step, loss=..., accuracy=...)`; it may return the metric on test data.
        norms: short names, `NAME[:before|:after]` the activation; `none` is no normalization, and the baseline.
        lrs: learning rates.
        batch_sizes: samples per step; by default 32, or what the loaders give.
        inputs: scaling of the inputs, one or several of `none`, `max`, `minmax`, `standard`.
        seeds: number of seeds. Fewer than 5 are a screening; below 3 nothing can be told from chance.
        epochs: passes over the training data.
        loss: `cross_entropy`, `mse`, `mae`, or a function of (outputs, targets); by default what the targets ask for.
        optimizer: `sgd` (with momentum 0.9), `adam`, `adamw`, or a function of (parameters, rate).
        metric: what variants are judged by: `accuracy`, `loss`, or a function of (outputs, targets); of a loop the
            name of what it reports.
        goal: `max` or `min`, for a metric of your own.
        target: value of the metric whose first crossing is timed; 0.95 for accuracy.
        framework: what trains: `torch`, `keras` (on the backend that KERAS_BACKEND names) or `nnx`.
        conditions: what is changed about data and network for all variants, one set of conditions after the other:
            `[{}, {"label_noise": 0.3}]` compares on clean labels and on noisy ones (see
            :class:`normkit.experiments.conditions.Conditions`).
        pruner: `median` or `hyperband` of Optuna give up trials that fall behind the other rates of their norm, to save
            time; None trains all to the end. A rate of which a seed was pruned has lost: it is not the best one, and
            does not count as working.
        workers: processes, one thread each; by default one per core, or one per GPU where there are several and what
            trains may use them (a loop, Keras, NNX).
        storage: where trials are kept, a storage URL of Optuna; by default `trials.db` in `out`. With neither nothing
            is kept. On a database server, `normkit worker` lets other machines help.
        out: folder for `report.html`, `results.json` and the figures; None writes nothing.
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
    refuse_when_imported("normkit.compare")
    code: dict[str, Code] = {}
    if callable(model) and takes(model, "trial") and not takes(model, "norm"):
        model, run = None, model
    named: dict[str, Any] = {"model": model, "run": run, "loss": loss, "optimizer": optimizer, "metric": metric}
    texts = {name: _text(value, code) for name, value in named.items()}
    data, arrays = _data(data, texts["loss"], code)
    config = Config(
        **texts,
        data=data,
        norms=norms,  # type: ignore[arg-type]  # Config makes tuples of them, and words what it refuses
        lrs=lrs,  # type: ignore[arg-type]
        batch_sizes=batch_sizes,  # type: ignore[arg-type]
        inputs=(inputs,) if isinstance(inputs, str) else inputs,  # type: ignore[arg-type]
        seeds=seeds,
        epochs=epochs,
        goal=goal,
        target=target,
        framework=framework,
        conditions=conditions,  # type: ignore[arg-type]
        pruner=pruner,
    )
    workers = checked_workers(workers)
    teller: Progress = progress() if show_progress else NoProgress()
    if out is None:
        return _run(config, arrays, code, workers, storage, None, command, teller)
    from normkit.report import render  # what the report needs must be there before the training, not after

    render.require()

    def load_tools() -> None:
        import_optuna()
        render.load()

    with OutputFolder(out) as folder:
        comparison = _run(config, arrays, code, workers, storage, folder, command, teller, load_tools)
        comparison.save(out)
    return comparison


def _run(
    config: Config,
    arrays: Dataset | None,
    code: dict[str, Code],
    workers: int | None,
    storage: str | None,
    out: Path | None,
    command: str | None,
    teller: Progress,
    meanwhile: Callable[[], None] = import_optuna,
) -> Comparison:
    begun = time.perf_counter()
    data = arrays
    if data is None and not config.run and config.data not in code:
        data = load(config.data or DEFAULT_DATA, config.loss)
    job = Job(config, data, code)
    # What is named as a model may turn out to be a loop.
    devices = gpus() if may_use(config) or config.model in code else ()
    with Crew(job, 1, out / LOG if out else None, devices) as crew:
        plan = crew.plan(meanwhile)
        crew.size = crew_size(workers, plan.job.config, devices)
        url = storage or (f"sqlite:///{(out / TRIALS).absolute()}" if out else None)
        with Store.of(plan.job.config, url, out) as store:
            if url is not None:
                question = Question.of(plan)
                store.describe(question.name, question.to_dict())
            results, trained = _trained(plan, crew, store, teller)
    task = plan.task or _task_of(plan.job.config, results)
    return Comparison(
        config=plan.job.config,
        task=task,
        data=plan.data,
        trials=tuple(results),
        environment=_environment(plan, min(crew.size, len(results)), trained, storage, command, begun),
        notes=(*plan.notes, *_notes(results)),
    )


def _trained(plan: Plan, crew: Crew, store: Store, teller: Progress) -> tuple[list[TrialResult], int]:
    """All results in the order of the trials, and how many were trained here."""
    keys = [trial.key() for trial in plan.trials]
    kept = len(store.finished_keys() & set(keys))
    counted = f"{len(keys)} trial{'s' * (len(keys) > 1)}"
    processes = min(crew.size, len(keys))
    where = f" on {plan.data}" if plan.data else ""
    text = f"{plan.job.config.subject}{where}: {counted}, {processes} worker{'s' * (processes > 1)}"
    teller.start(len(keys), text + (f", {kept} kept from before" if kept else ""), kept)
    trained = 0

    def done(result: TrialResult | None, _: int) -> None:
        nonlocal trained
        trained += result is not None
        teller.advance(str(result.config) if result else "by another process")

    try:
        found = run_trials(plan.trials, crew, store, done)
    finally:
        teller.stop()
    return [found[key] for key in keys], trained


def _environment(
    plan: Plan, workers: int, trained: int, storage: str | None, command: str | None, begun: float
) -> dict[str, Any]:
    from normkit import __version__

    return {
        "versions": {"normkit": __version__, "python": platform.python_version(), **plan.versions},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "instruction_sets": list(instruction_sets()),
        "workers": workers,
        "seconds": round(time.perf_counter() - begun, 1),
        "started": trained,
        "command": command,
        "storage": storage and storage.partition("://")[0],  # not the address: it may hold a password
        **plan.words,
    }


def _notes(results: Sequence[TrialResult]) -> list[str]:
    versions = {result.versions for result in results if result.versions}
    if len(versions) > 1:
        return ["The trials were run with different versions of what trains: run all anew to compare times."]
    return []


def _task_of(config: Config, results: Sequence[TrialResult]) -> Task:
    """What a loop turned out to report."""
    metrics = sorted({result.metric for result in results if result.curve})
    if len(metrics) > 1:
        must = f"every trial of {config.subject} must report the same metric"
        raise NormValueError(message(must, " and ".join(metrics), f"metric={metrics[0]}"))
    metric = metrics[0] if metrics else "accuracy"
    target = config.target if config.target is not None or metric != "accuracy" else 0.95
    return Task(metric, GOALS[metric], target)


def _text(value: Any, code: dict[str, Code]) -> str | None:
    """The name of a function or object in the question; `code` gets what stands behind it."""
    if value is None or isinstance(value, str):
        if value is not None and is_reference(value):
            code[value] = Code.named(value)
        return value
    if isinstance(value, os.PathLike):
        raise NormTypeError(message("a function must be named as file.py:name", os.fspath(value)))
    carried = Code.of(value)
    if code.get(carried.label, carried).fingerprint != carried.fingerprint:
        carried = carried._replace(label=f"{carried.label}-{len(code)}")  # two functions of one name
    code[carried.label] = carried
    return carried.label


def _data(value: Any, loss: str | None, code: dict[str, Code]) -> tuple[str | None, Dataset | None]:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str | None) and is_arrays(value):
        return "python:arrays", from_arrays("arrays", value, loss)
    return _text(value, code), None


def checked_workers(workers: int | None) -> int | None:
    """A number of processes; None leaves it to the machine. Raises NormTypeError or NormValueError."""
    if workers is None:
        return None
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise NormTypeError(message("`workers` must be a whole number", repr(workers)))
    if workers < 1:
        raise NormValueError(message("`workers` must be at least 1", workers))
    return workers
