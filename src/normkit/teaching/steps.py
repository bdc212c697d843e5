"""The verb `show`: one batch through a normalizer, every step of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.checks.output import wrapped
from normkit.core.catalog import CATALOG, find
from normkit.errors import NormTypeError, NormValueError, message
from normkit.tables import Result, Table
from normkit.teaching import words
from normkit.teaching.cells import Labels
from normkit.teaching.examples import example
from normkit.teaching.subjects import by_layer, by_name
from normkit.teaching.walk import Walk, walk

__all__ = ["Steps", "show"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Steps(Result):
    """Every step of one batch through a normalizer: print it, show it in a notebook, or save it.

    Attributes:
        walk: the numbers.
        data: what the values are, in a sentence; "" for the user's own.
        reading: what normalizing them means, in a sentence, likewise.
    """

    walk: Walk
    data: str = ""
    reading: str = ""

    @property
    def y(self) -> Array:
        """The output in training, with the channels on the second axis."""
        return self.walk.steps[-1].values

    def table(self) -> Table:
        """The values after every step."""
        return next(s.table for s in words.sections(self.walk)[2:] if s.table is not None)

    def __str__(self) -> str:
        parts = [words.title(self.walk)]
        if self.data:
            parts.append("\n".join(wrapped(f"{self.data[:1].upper()}{self.data[1:]}. {self.reading}".strip())))
        for at, section in enumerate(words.sections(self.walk), start=1):
            said = [line for sentence in section.words for line in wrapped(sentence, "   ", "   ")]
            lines = [f"{at}. {section.heading}", *said]
            if section.table is not None:
                lines += ["", *(f"     {line}".rstrip() for line in str(section.table).splitlines())]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what stands in the text, unrounded, in the shape of the input."""
        own = self.walk
        statistics = [
            {"letter": s.letter, "where": s.where, "count": len(s.values), "mean": s.mean, "var": s.var, "std": s.std}
            | ({} if s.r is None else {"r": s.r, "d": s.d})
            for s in own.statistics
        ]
        kept = {
            one.name: {"before": one.before.tolist(), "batch": one.batch.tolist(), "after": one.after.tolist()}
            for one in own.kept
        }
        undo = own.undo and {"gamma": own.undo.gamma.tolist(), "beta": own.undo.beta.tolist(), "y": own.undo.y.tolist()}
        return {
            "name": own.subject.name,
            "title": own.subject.title,
            "eps": own.subject.eps,
            "shares": own.shares.tolist(),
            "statistics": statistics,
            "steps": [{"name": s.name, "formula": s.formula, "values": s.values.tolist()} for s in own.steps],
            "rate": own.subject.weight() if own.kept else None,
            "kept": kept,
            "evaluation": own.evaluation.tolist(),
            "undo": undo,
        }

    def _repr_html_(self) -> str:
        if importlib.util.find_spec("jinja2") is None:  # the look is that of the report, which is an extra
            return super()._repr_html_()
        from normkit.report.steps import fragment

        return fragment(self)

    def _formats(self) -> Mapping[str, Callable[[], str | bytes]]:
        def page() -> str:
            from normkit.report.steps import page

            return page(self)

        def grid() -> str:
            from normkit.report.grids import picture

            return picture([(self.walk.subject.name, self.walk)])

        return {**super()._formats(), ".html": page, ".svg": grid}


def show(
    layer: Any,
    x: Any = None,
    *,
    groups: int | None = None,
    virtual_batch_size: int | None = None,
    gamma: Any = None,
    beta: Any = None,
) -> Steps:
    """Follow one batch through a normalizer with a pencil.

    Every step in numbers: which values share a statistic, mean and variance, the normalized values, scaled and shifted,
    the running values after this batch, the first sample in evaluation, and the gamma and beta that undo it all.
    Computed in float64 by the formulas that every layer of normkit runs, whatever type and mode the layer has; the
    layer stays as it is.

    Args:
        layer: a short name of the catalog, for a new layer; or a norm layer of PyTorch, Keras or NNX, ours or the
            framework's own, with the parameters and running values that it has.
        x: a batch that fits the layer: an array, a tensor, or nested lists. For a name the channels are on the second
            axis, the last one for layer and RMS norm; left out it is a small example.
        groups: of group norm by name; 2 by default.
        virtual_batch_size: of ghost batch norm by name; 2 by default.
        gamma, beta: for a name: a number, or one per channel (per feature).

    Returns:
        The steps: `print` them, show them in a notebook, or `save` them as .txt, .html, .json or, the picture of who
        shares a statistic, as .svg.

    Raises:
        NormTypeError: for what is neither a name nor a layer, and values that are no numbers.
        NormValueError: for an unknown name, a layer that is no norm or not built, an input that does not fit or is not
            finite, and arguments that this normalizer has not.

    Example:
        >>> import normkit
        >>> seen = normkit.show("batch", [[1, 200], [2, 220], [3, 180], [6, 200]])
        >>> [(s.mean, s.var) for s in seen.walk.statistics]
        [(3.0, 3.5), (200.0, 200.0)]
        >>> seen.y[:, 0].round(2).tolist()
        [-1.07, -0.53, 0.0, 1.6]
        >>> [one.after.round(2).tolist() for one in seen.walk.kept]  # running mean and variance
        [[0.3, 20.0], [1.37, 27.57]]
    """
    options = {"groups": groups, "virtual_batch_size": virtual_batch_size, "gamma": gamma, "beta": beta}
    if isinstance(layer, str):
        spec = find(layer)
        labels: Labels = ()
        said = ("", "")
        if x is None:
            data = example(spec)
            values, labels, said = data.x, data.labels, (data.words, data.reading)
        else:
            values = _values(x)
        return Steps(walk(by_name(layer, values.shape, **options), values, labels), *said)
    given = [name for name, value in options.items() if value is not None]
    if given:
        must = "a layer has its own values, so others must be left out"
        raise NormTypeError(message(must, ", ".join(given), f'show("{next(iter(CATALOG))}", x, ...) takes them'))
    subject = by_layer(layer)
    if x is None:
        raise NormTypeError(message("`x` must be a batch for the layer", "none"))
    values = _values(x)
    if subject.last and values.ndim > 2:
        values = np.moveaxis(values, -1, 1)
    return Steps(walk(subject, values))


def _values(x: Any) -> Array:
    """The input in float64. Raises NormTypeError for what is no numbers, NormValueError for none or not finite ones."""
    plain = x.detach().cpu() if hasattr(x, "detach") else x
    try:
        values = np.asarray(plain.double() if hasattr(plain, "double") else plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        must = "`x` must be numbers, every row as many"
        raise NormTypeError(message(must, f"{type(x).__name__} ({error})")) from None
    if not values.size or not values.ndim:
        raise NormValueError(message("`x` must hold a batch of values", f"shape {values.shape}"))
    if not np.isfinite(values).all():
        raise NormValueError(message("`x` must be finite", f"{int((~np.isfinite(values)).sum())} values that are not"))
    return values
