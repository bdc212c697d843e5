"""The verb `activations`: what goes into the activations of a model, from its input to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from normkit.errors import MissingExtraError, NormTypeError, NormValueError, message
from normkit.experiments.protocol import training
from normkit.experiments.results import SiteStats
from normkit.experiments.sites import Sites
from normkit.frameworks import framework_of
from normkit.tables import Result, Table, number, plain

__all__ = ["Activations", "activations"]

_HEADINGS = ("site", "activation", "mean", "std", "dead %", "gamma", "beta")


@dataclass(frozen=True)
class Activations(Result):
    """The inputs of all activations of a model over one batch.

    Attributes:
        model: name of the model's class.
        sites: one entry per call, in the order of the calls.
    """

    model: str
    sites: tuple[SiteStats, ...]

    def table(self) -> Table:
        """One row per site."""
        return Table(_HEADINGS, [_row(site) for site in self.sites], words=2)

    def _repr_html_(self) -> str:
        try:
            return super()._repr_html_() + self._svg()
        except MissingExtraError:  # the table needs nothing
            return super()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        return {"model": self.model, "sites": [plain(site._asdict()) for site in self.sites]}

    def _formats(self) -> Mapping[str, Callable[[], str | bytes]]:
        return {".svg": self._svg, ".png": self._png, **super()._formats()}

    def _svg(self) -> str:
        _require()
        from normkit.report import draw, figures

        return draw.standalone(draw.draw_depth(figures.depth({self.model: self.sites}), "depth"))

    def _png(self) -> bytes:
        _require()
        from normkit.report import draw, figures

        return draw.depth_png(figures.depth({self.model: self.sites}))


def activations(model: Any, batch: Any, *, train: bool = True) -> Activations:
    """Measure what goes into every activation of a model in one forward pass.

    For every call of an activation (relu, gelu, silu, tanh, sigmoid and their kin, as a layer, a function or a method,
    in place or not; softmax is none):

    - the mean of its input over all values;
    - the standard deviation of its input within the channels, sqrt(mean over the channels of var(channel)), variances
      over batch and positions. Without normalization it often runs towards 0 with depth, or grows without bound; behind
      batch norm it is 1 at the start;
    - the share of channels whose *output* is constant over the batch: nothing of the input passes through them;
    - gamma and beta of the norm that directly feeds it, or that it feeds.

    Nothing changes: modes, running statistics, hooks and random numbers are afterwards as before, and no gradient is
    kept. Activations inside a fused operation, such as a recurrent layer, are not seen, and in Keras not those called
    as functions inside a layer's `call` (examples: :func:`normkit.keras.probe.probe`, :func:`normkit.nnx.probe.probe`).

    Args:
        model: a torch.nn.Module, a built Keras model or an nnx.Module; its weights, type and device stay as they are.
        batch: inputs of the model alone, without targets: a tensor or array (N, ...); a dictionary of them, which the
            model takes by name; a tuple or list of them, which it takes in order. Floating point values take the type
            of the model's weights. With a single sample no channel of a table is called constant.
        train: measure in training mode, where batch norm uses the batch; else in evaluation mode.

    Returns:
        The measurements; `print` them, show them in a notebook, or `save` them.

    Raises:
        NormTypeError: for a model of no known framework, a batch that is none, inputs that the model does not take.
        NormValueError: where no activation is called, for an empty batch, for lazy layers and for models of Keras that
            are not built.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        >>> seen = normkit.activations(model, torch.randn(64, 8))
        >>> [(site.name, site.activation, round(site.std, 2), site.gamma_mean) for site in seen.sites]
        [('2', 'relu', 1.0, 1.0)]
    """
    if not _is_batch(batch):
        must = "`batch` must be a tensor or an array, or a dictionary, tuple or list of them"
        raise NormTypeError(message(must, type(batch).__name__, "next(iter(loader))[0] takes the inputs of a loader"))
    if _is_empty(batch):
        raise NormValueError(message("`batch` must hold at least one value in every part", "an empty one"))
    name = type(model).__name__
    sites = Sites().measure(training(framework_of(model)).probe(model, batch, train=train))
    if not sites:
        must = "`model` must call an activation, such as relu or gelu, outside of fused operations"
        raise NormValueError(message(must, f"{name}, which calls none"))
    return Activations(name, sites)


def _is_batch(batch: Any) -> bool:
    if isinstance(batch, Mapping | tuple | list):
        parts = list(batch.values() if isinstance(batch, Mapping) else batch)
        return bool(parts) and any(_is_batch(part) for part in parts)
    return hasattr(batch, "shape") and hasattr(batch, "dtype")


def _is_empty(batch: Any) -> bool:
    if isinstance(batch, Mapping | tuple | list):
        return any(map(_is_empty, batch.values() if isinstance(batch, Mapping) else batch))
    return 0 in tuple(getattr(batch, "shape", ()))


def _require() -> None:
    from normkit.report.render import require

    require()


def _row(site: SiteStats) -> tuple[str, ...]:
    return (
        site.name,
        site.activation,
        number(site.mean),
        number(site.std),
        number(100 * site.dead),
        _spread(site.gamma_mean, site.gamma_std),
        _spread(site.beta_mean, site.beta_std),
    )


def _spread(mean: float | None, std: float | None) -> str:
    return "-" if mean is None or std is None else f"{mean:.3g} ± {std:.2g}"
