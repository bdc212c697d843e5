"""The verb `adapt`: statistics of another domain, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from normkit.core.algebra import Pooled, entropy, merge
from normkit.core.constraints import Constraint, OneOf, Real, check
from normkit.core.record import TrackedLayer
from normkit.errors import NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery import batches
from normkit.surgery.population import Measure, layers_of, population, replaced, score
from normkit.surgery.protocol import Recording, recording
from normkit.surgery.recalibration import ARGUMENTS, measure_of

__all__ = ["adapt"]

_ARGUMENTS: dict[str, Constraint] = {
    **ARGUMENTS,
    "method": OneOf(("statistics", "entropy")),
    "prior": Real(0.0),
    "lr": Real(0.0, above=True),
}


def adapt(
    model: Any,
    data: Any,
    *,
    method: str = "statistics",
    prior: float = 0.0,
    lr: float = 1e-3,
    exact: bool = False,
    steps: int | None = None,
    held_out: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    keep: str = "new",
    return_report: bool = False,
) -> Any:
    """Adapt a trained model to another domain by samples of it without labels, in place.

    `method="statistics"` (AdaBN, arXiv:1603.04779) replaces the kept statistics of every batch norm by those of the new
    domain, as `normkit.recalibrate` finds them. With a `prior` the old ones count as so many samples: for n new ones
    mean = (prior mean_old + n mean_new) / (prior + n), and the variance is that of both together, the distance between
    the means included. Few samples need it: those of a single class say nothing of the domain.

    `method="entropy"` (TENT, arXiv:2006.10726; PyTorch only) first takes one step of Adam per batch on gamma and beta
    of these layers, against the mean entropy of the predictions, with batches normalized by their own statistics. The
    paper predicts by the statistics of each test batch; here those of the whole data are kept, and predictions do not
    depend on the batch. Small or one-sided batches, and many passes, make it worse.

    The report has the mean entropy of the predictions before and after, in evaluation mode, where outputs are scores of
    classes (N, classes), else the change of the outputs; with `loss` and `held_out` that loss. A low entropy is no
    proof of being right: where some labels are known, use them. `report.undo()` gives everything back.

    Args:
        model: a torch.nn.Module, a built Keras model or an nnx.Module.
        data: inputs of the new domain, as for `normkit.recalibrate`; read several times.
        method: "statistics" or "entropy".
        prior: samples that the old statistics count for; 0 forgets them.
        lr: of `method="entropy"`.
        exact, steps, held_out, loss, return_report: as for `normkit.recalibrate`.
        keep: "new", or "best", which goes back to what was before where the measure has grown.

    Returns:
        The model, or (model, report).

    Raises:
        NormTypeError, NormValueError: as `normkit.recalibrate`; for `method="entropy"` with other frameworks, several
            processes, no gamma and beta, or outputs that are no scores of classes.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> x = torch.randn(500, 3)
        >>> there = normkit.recalibrate(model, x).eval()(x)
        >>> elsewhere = normkit.adapt(model, 10 * x + 7)(10 * x + 7)
        >>> torch.allclose(there, elsewhere, atol=1e-3)
        True
    """
    given = {"method": method, "prior": prior, "lr": lr, "exact": exact, "steps": steps}
    check("adapt", _ARGUMENTS, {**given, "keep": keep, "return_report": return_report})
    framework = framework_of(model)
    side = recording(framework)
    layers = layers_of(side, model)
    batches.repeatable("data", data)
    tune, restore = _nothing, _nothing
    if method == "entropy":
        tune, restore = _tuning(framework, side, model, layers, lambda: batches.inputs(data, steps), lr)
    measure = _measure(side, model, data, steps, held_out, loss)
    if keep == "best" and measure.name == "outputs":
        must = '`keep="best"` needs `loss` and `held_out` where outputs are no scores of classes'
        raise NormValueError(message(must))

    def find() -> Mapping[int, Pooled]:
        tune()
        found = population(side, model, layers, data, steps, exact)
        if not prior:
            return found
        samples = sum(side.gathered(sum(map(batches.size, batches.inputs(data, steps)))))
        return {place: _blended(side, layers[place], new, prior, samples) for place, new in found.items()}

    report = replaced(side, layers, find, measure, keep, restore)
    return (model, report) if return_report else model


def _blended(side: Recording, layer: TrackedLayer, new: Pooled, prior: float, samples: int) -> Pooled:
    mean, var = side.moments(layer.layer)
    mean = new.mean if mean is None else mean
    both = merge((prior, samples), (mean, new.mean), (var, new.var), between=layer.pooled)
    return Pooled(new.count, both.mean, both.var)


def _tuning(
    framework: str,
    side: Recording,
    model: Any,
    layers: Sequence[TrackedLayer],
    data: Callable[[], Iterator[Any]],
    lr: float,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What tunes gamma and beta, and what takes it back."""
    if framework != "torch":
        must = '`method="entropy"` is available for PyTorch'
        raise NormValueError(message(must, framework, 'method="statistics"'))
    if len(side.gathered(None)) > 1:
        raise NormValueError(message('`method="entropy"` must run in one process', "several"))
    from normkit.torch import adaptation

    parameters = adaptation.affine(layers)
    if not parameters:
        raise NormValueError(message('`method="entropy"` needs batch norms with gamma and beta', "none"))
    restore = adaptation.restorer(parameters)
    return lambda: adaptation.minimize_entropy(model, layers, data(), lr), restore


def _nothing() -> None:
    pass


def _measure(
    side: Recording, model: Any, data: Any, steps: int | None, held_out: Any, loss: Callable[[Any, Any], Any] | None
) -> Measure:
    """The loss where there is one, else the entropy of scores of classes, else the change of the outputs."""
    if loss is not None:
        return measure_of(side, model, held_out, loss)
    if held_out is not None:
        data, steps = held_out, None
        batches.repeatable("held_out", data)
    with side.watching(model, (), lambda _, measure: measure()) as forward:
        first = next(batches.inputs(data), None)
        shape = () if first is None else np.shape(side.array(forward(first)))
    if len(shape) != 2 or shape[1] < 2:
        return measure_of(side, model, data, None, steps)
    return Measure("entropy", lambda: score(side, model, data, lambda outputs, _: entropy(side.array(outputs)), steps))
