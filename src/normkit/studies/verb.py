"""The verb `study`: run the comparisons of a study and let its criterion judge them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.experiments import Comparison, compare
from normkit.experiments.config import MODELS, is_reference
from normkit.experiments.data import Dataset, from_arrays, is_arrays, load
from normkit.experiments.verb import TRIALS
from normkit.files import OutputFolder
from normkit.studies.measurements import Measurements, measured
from normkit.studies.outcome import Case, Outcome, Outcomes, Overview
from normkit.studies.presets import STUDIES, Effort, Part, Study, find

__all__ = ["compared", "study"]


def study(
    name: str | None = None,
    data: Any = None,
    *,
    model: str | None = None,
    quick: bool = False,
    seeds: int | None = None,
    workers: int | None = None,
    storage: str | None = None,
    out: str | os.PathLike[str] | None = None,
    command: str | None = None,
    show_progress: bool = True,
) -> Outcome | Outcomes | Overview:
    """Try a claim about normalization on this machine, and say whether it holds here.

    A study is a few comparisons (:func:`normkit.compare`) in circumstances of its own, such as random labels, and a
    criterion that was fixed before. It is tried on a perceptron and on a convolutional network, in PyTorch; the verdict
    is `holds`, `holds partly`, `does not hold here` or `not enough evidence`, with the numbers it rests on.

    Finished runs are kept in the output folder, or in `storage`: the same call goes on where an earlier one ended.

    Args:
        name: of the study, or `all`; None lists what there is.
        data: `digits`, `wine`, the path of an .npz file, a name or id of OpenML, or arrays, as for
            :func:`normkit.compare`; by default what the study was made for. It must have classes.
        model: `mlp` or `cnn` alone; by default both where the data are images.
        quick: fewer seeds, rates and networks: an impression, and often `not enough evidence`.
        seeds: number of seeds; below 3 nothing can be told.
        workers: processes, one thread each; by default one per core.
        storage: where runs are kept, a storage URL of Optuna; by default `trials.db` in `out`. With neither nothing is
            kept.
        out: folder in which every study gets one of its name, with `report.html` and `results.json`; `all` also has a
            table, in the folder itself. None writes nothing.
        command: how this was started, for the report.
        show_progress: tell about progress on standard error.

    Returns:
        What was found; `print` it, show it in a notebook, or `save` it. For `all` one result with a table; without a
        name the list of studies.

    Raises:
        NormError: for anything that cannot be run; nothing is written then.

    Example:
        >>> import normkit
        >>> print(normkit.study().table().rows[3][0])
        learning-rate
        >>> found = normkit.study("learning-rate", quick=True)  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
    """
    if name is None:
        return Overview()
    asked = tuple(STUDIES.values()) if name == "all" else (find(name),)
    if model is not None and model not in MODELS:
        raise NormValueError(message("`model` must be a known one", repr(model), nearest(str(model), MODELS)))
    if not isinstance(quick, bool):
        raise NormTypeError(message("`quick` must be True or False", repr(quick)))
    sources = None if data is None else ((data, _loaded(data)),)

    def run(folder: Path | None) -> Outcome | Outcomes:
        url = storage or (f"sqlite:///{(folder / TRIALS).absolute()}" if folder else None)
        shared = {"workers": workers, "storage": url, "show_progress": show_progress}
        found, left_out = [], []
        for one in asked:
            effort = one.effort(quick=quick, seeds=seeds, models=None if model is None else (model,))
            try:
                found.append(_run(one, sources, effort, quick, command, shared))
            except NormValueError as error:
                if name != "all":
                    raise
                left_out.append((one.name, str(error)))  # a table has no light; the other studies can be run
        return found[0] if name != "all" else Outcomes(tuple(found), tuple(left_out))

    if out is None:
        return run(None)
    from normkit.report import render  # what the report needs must be there before the training, not after

    render.require()
    with OutputFolder(out) as folder:
        result = run(folder)
        result.save(folder if isinstance(result, Outcomes) else folder / result.study.name)
    return result


def _run(
    study: Study,
    sources: tuple[tuple[Any, Dataset], ...] | None,
    effort: Effort,
    quick: bool,
    command: str | None,
    shared: dict[str, Any],
) -> Outcome:
    begun = time.perf_counter()
    against = study.against(range(effort.seeds))
    cases = []
    for data, loaded in sources or tuple((name, _loaded(name)) for name in study.data):
        models = [model for model in effort.models if model == "mlp" or loaded.is_images]
        if not models:
            raise NormValueError(message("`cnn` must be given images", f"{loaded}", "use mlp"))
        for model in models:
            parts = study.parts_for(model)
            if not parts:
                others = " and ".join(dict.fromkeys(name for part in study.parts for name in part.models))
                raise NormValueError(message(f"`model` of {study.name} must be {others}", model))
            comparisons = tuple(compared(part, effort, model, data, **shared) for part in parts)
            pairs = zip(parts, comparisons, strict=True)
            found = Measurements((m for part, comparison in pairs for m in measured(comparison, part.names())), against)
            cases.append(Case(loaded.name, model, found, study.checks(found), comparisons))
    return Outcome(study, quick, tuple(cases), _environment(cases, time.perf_counter() - begun, command))


def compared(part: Part, effort: Effort, model: str, data: Any, **shared: Any) -> Comparison:
    """The comparison that a part of a study is; `shared` are further arguments of :func:`normkit.compare`."""
    return compare(
        model,
        data,
        norms=part.norms,
        lrs=part.lrs or effort.lrs,
        batch_sizes=(part.batch_size,),
        inputs=part.inputs,
        seeds=effort.seeds,
        epochs=part.epochs or effort.epochs,
        conditions=tuple(arm.conditions for arm in part.arms),
        **shared,
    )


def _loaded(data: Any) -> Dataset:
    """The data as the engine will see it. Raises NormValueError for what a study cannot be tried on."""
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if isinstance(data, str) and not is_reference(data):
        found = load(data)
    elif not isinstance(data, str) and is_arrays(data):
        found = from_arrays("arrays", data)
    else:
        must = "`data` of a study must be digits, wine, an .npz file, a name or id of OpenML, or four arrays"
        raise NormValueError(message(must, data if isinstance(data, str) else type(data).__name__))
    if found.classes is None:
        raise NormValueError(message("`data` of a study must have classes", "numbers to predict"))
    return found


def _environment(cases: list[Case], seconds: float, command: str | None) -> dict[str, Any]:
    known = [comparison.environment for case in cases for comparison in case.comparisons]
    kept = "versions", "system", "cores", "instruction_sets", "optimizer", "loss"
    return {
        **{name: known[0][name] for name in kept if name in known[0]},
        "workers": max(one["workers"] for one in known),
        "seconds": round(seconds, 1),
        "started": sum(one["started"] for one in known),
        "command": command,
    }
