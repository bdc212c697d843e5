"""Deliberately broken norms. Each breaks one thing, and the check named with it must notice.

`Whole` is batch norm written out once more, in pieces that can be exchanged; unbroken it passes every check, so a twin
fails because of what it breaks and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from normkit.core import catalog, formula
from normkit.core.plan import plan
from normkit.core.spec import NormSpec
from normkit.testing import LAYOUTS, Call, Outcome, Subject, arranged, formula_subject, rounded
from normkit.testing.formulas import run_formula

Array = np.ndarray


class Whole:
    """Batch norm (or RMS norm over the channels with `centre = False`) in exchangeable pieces, correct as it stands."""

    spec: NormSpec = catalog.BATCH
    dtype = "float32"

    def __init__(self) -> None:
        self.wide = np.float64 if self.dtype == "float64" else np.float32
        self.kept: dict[str, Array] = {}
        self.count = 0

    # What a twin may exchange.

    def first(self, channels: int) -> dict[str, Array]:
        return {"mean": np.zeros(channels, self.wide), "var": np.ones(channels, self.wide)}

    def first_gamma(self, channels: int) -> Array:
        return np.ones(channels, self.wide)

    def read(self, x: Array) -> Array:
        return x

    def refuse(self, x: Array, training: bool, affine: int) -> None:
        if x.shape[1] != affine:
            raise ValueError(f"{x.shape[1]} channels instead of {affine}")
        if training and x.size == x.shape[1]:
            raise ValueError("one value per channel")

    def hide(self, real: Array, values: Array) -> Array:
        return np.where(real, values, 0)

    def weights(self, call: Call, x: Array) -> Array:
        shape = (x.shape[0], 1, *x.shape[2:])
        w = np.ones(shape, self.wide)
        if call.weight is not None:
            each = call.weight.ndim == 1
            w = w * call.weight.reshape(-1, *(1 for _ in shape[1:]) if each else shape[1:]).astype(self.wide)
        return w if call.mask is None else w * call.mask.reshape(shape)

    def mean(self, x: Array, w: Array) -> Array:
        total = self.total(w)
        return self.sum(x * w) / np.where(total > 0, total, 1)

    def var(self, x: Array, w: Array, mean: Array) -> Array:
        total = self.total(w)
        return self.sum((x - mean) ** 2 * w) / np.where(total > 0, total, 1)

    def total(self, w: Array) -> Array:
        return np.sum(w, keepdims=True)

    def effective(self, w: Array) -> float:
        squares = float(np.sum(w * w))
        return float(np.sum(w)) ** 2 / squares if squares else 0.0

    def std(self, var: Array, eps: float) -> Array:
        return np.sqrt(var + self.wide(eps))

    def batch(self, mean: Array, var: Array, n: float, bessel: bool) -> dict[str, Array]:
        return {"mean": mean.reshape(-1), "var": var.reshape(-1) * self.wide(n / (n - 1) if bessel else 1)}

    def rate(self, call: Call) -> float:
        return 1 / (self.count + 1) if call.rate is None else call.rate

    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        if n <= 1 or (call.nonfinite != "update" and not all(np.isfinite(v).all() for v in batch.values())):
            return
        rate = self.wide(self.rate(call))
        self.kept = {k: (1 - rate) * v + rate * batch[k] for k, v in self.kept.items()}
        self.count += 1

    def evaluated(self, x: Array, call: Call) -> tuple[Array, Array]:
        shape = [1, -1, *(1 for _ in x.shape[2:])]
        return self.kept["mean"].reshape(shape), self.kept["var"].reshape(shape)

    def output(self, normalized: Array, gamma: Array, beta: Array) -> Array:
        return normalized * gamma + beta

    def dx(self, gh: Array, h: Array, w: Array, std: Array) -> Array:
        total = self.total(w)
        share = w / np.where(total > 0, total, 1)
        return (gh - share * self.sum(gh) - share * h * self.sum(gh * h)) / std

    def dgamma(self, dy: Array, h: Array, x: Array) -> Array:
        return self.sum(dy * h).reshape(-1)

    def finish(self, outcome: Outcome, call: Call) -> Outcome:
        return outcome

    # What stays.

    def sum(self, values: Array) -> Array:
        return np.sum(values, axis=tuple(i for i in range(values.ndim) if i != 1), keepdims=True)

    def narrow(self, values: Array) -> Array:
        return rounded(values, self.dtype)

    def run(self, call: Call) -> Outcome:
        with np.errstate(all="ignore"):
            channels = (call.made_for or call.x.shape)[1]
            given = self.first(channels) if call.kept is None else call.kept
            self.kept = {k: np.asarray(v).astype(self.wide) for k, v in given.items()}
            self.count = call.count
            for x in call.history:
                self.step(replace(call, training=True, mask=None, weight=None, dy=None), x)
            y, dx, dgamma, dbeta = self.step(call, call.x)
            kept = {k: v.astype(np.float64) for k, v in self.kept.items()}
            return self.finish(Outcome(y, dx, dgamma, dbeta, kept, self.count), call)

    def step(self, call: Call, values: Array) -> tuple[Any, ...]:
        x = self.read(arranged(values.astype(self.wide), call.layout))
        channels = (call.made_for or x.shape)[1]
        self.refuse(x, call.training, channels)
        shape = [1, -1, *(1 for _ in x.shape[2:])]
        gamma = self.first_gamma(channels) if call.gamma is None else call.gamma.astype(self.wide)
        beta = np.zeros(channels, self.wide) if call.beta is None else call.beta.astype(self.wide)
        gamma, beta = gamma.reshape(shape), beta.reshape(shape)
        real = None if call.mask is None else call.mask.reshape(x.shape[0], 1, *x.shape[2:])
        x = x if real is None else self.hide(real, x)
        w = self.weights(call, x)
        if call.training:
            mean = self.mean(x, w)
            var = self.var(x, w, mean)
            n = self.effective(w) * x.size / max(w.size * x.shape[1], 1)
            bessel = call.bessel is not False
            self.update(self.batch(mean, var, n, bessel) if n > 1 else {}, call, n)
        else:
            mean, var = self.evaluated(x, call)
        std = self.std(var, call.eps)
        h = (x - mean) / std
        y = self.output(h, gamma, beta)
        y = self.narrow(y if real is None else self.hide(real, y))
        if call.dy is None:
            return y, None, None, None
        dy = arranged(call.dy.astype(self.wide), call.layout, gradient=True)
        dy = dy if real is None else self.hide(real, dy)
        gh = dy * gamma
        dx = self.dx(gh, h, w, std) if call.training else gh / std
        return y, self.narrow(dx), self.narrow(self.dgamma(dy, h, x)), self.narrow(self.sum(dy).reshape(-1))


def subject(kind: type[Whole]) -> Subject:
    """Return the subject of a (broken) Whole: a fresh one for every call."""
    dtype = kind.dtype
    accumulator = "float64" if dtype == "float64" else "float32"
    settings: dict[str, Any] = {
        "spec": catalog.BATCH,
        "shapes": ((5, 6, 3, 2), (4, 6), (3, 2, 7)),
        "sizes": lambda shape: (("c", shape[1]),),
        "layouts": LAYOUTS,
        "masks": True,
        "weights": True,
        "bessel": True,
        "nonfinite": ("skip", "update"),
        "cumulative": True,
    }
    return Subject(
        name=kind.__name__,
        run=lambda call: kind().run(call),
        dtype=dtype,
        accumulator=accumulator,
        **settings,
    )


class Whole64(Whole):
    dtype = "float64"


class WholeHalf(Whole):
    dtype = "float16"


class WholeBrain(Whole):
    dtype = "bfloat16"


class Twin(NamedTuple):
    check: str
    what: str
    subject: Subject
    error: type[Exception] = AssertionError  # what the check must raise; the twin's own error where it refuses too much


TWINS: list[Twin] = []


def twin(*checks: str, error: type[Exception] = AssertionError) -> Callable[[type[Whole]], type[Whole]]:
    """Add a broken Whole for every check that must notice it."""

    def add(kind: type[Whole]) -> type[Whole]:
        for check in checks:
            TWINS.append(Twin(check, kind.__name__, subject(kind), error))
        return kind

    return add


def claims(entry: str, run: Callable[[Call], Outcome], what: str, *checks: str, **known: Any) -> None:
    """Add a subject that claims to be an entry of the catalog and runs something else."""
    honest = formula_subject(entry, dtype=known.pop("dtype", "float32"))
    for check in checks:
        TWINS.append(Twin(check, what, replace(honest, name=what, run=run, **known)))


# Statistics.


@twin("check_outputs", "check_gradients", "check_undo")
class UnbiasedNormalization(Whole):
    def var(self, x: Array, w: Array, mean: Array) -> Array:
        n = x.size / x.shape[1]
        return super().var(x, w, mean) * self.wide(n / (n - 1))


@twin("check_large_mean", "check_statistics", "check_layouts")
class MeanOfSquaresMinusSquareOfMean(Whole):
    def var(self, x: Array, w: Array, mean: Array) -> Array:
        return np.maximum(self.mean(x * x, w) - mean * mean, 0)


@twin("check_large_mean", "check_statistics")
class MeanOfSquaresMinusSquareOfMean64(MeanOfSquaresMinusSquareOfMean):
    dtype = "float64"


@twin("check_statistics", "check_large_mean")
class SumsInHalf(WholeHalf):
    def mean(self, x: Array, w: Array) -> Array:
        total = np.sum(w)
        return self.sum_in_half(x * w) / np.where(total > 0, total, 1).astype(self.wide)

    def sum_in_half(self, values: Array) -> Array:
        running = np.zeros((1, values.shape[1], *(1 for _ in values.shape[2:])))
        moved = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        for column in moved.T:
            running = rounded(running + column.reshape(running.shape), self.dtype)
        return running.astype(self.wide)


@twin("check_statistics", "check_large_mean")
class SumsInBrainHalf(SumsInHalf):
    dtype = "bfloat16"


@twin("check_large_values")
class SquaresInHalf(WholeHalf):
    def var(self, x: Array, w: Array, mean: Array) -> Array:
        return self.mean(rounded((x - mean) ** 2, "float16").astype(np.float32), w)


@twin("check_eps", "check_undo", "check_rescaled")
class EpsOutsideTheRoot(Whole):
    def std(self, var: Array, eps: float) -> Array:
        return np.sqrt(var) + self.wide(eps)


@twin("check_eps", "check_rescaled")
class EpsHardCoded(Whole):
    def std(self, var: Array, eps: float) -> Array:
        return np.sqrt(var + self.wide(1e-5))


@twin("check_constant_slice")
class NoEps(Whole):
    def std(self, var: Array, eps: float) -> Array:
        return np.sqrt(var)


@twin("check_undo")
class StdForcedToOne(Whole):
    def output(self, normalized: Array, gamma: Array, beta: Array) -> Array:
        return super().output(normalized / np.std(normalized), gamma, beta)


@twin("check_one_channel")
class SqueezedChannel(Whole):
    def output(self, normalized: Array, gamma: Array, beta: Array) -> Array:
        return normalized if normalized.shape[1] == 1 else super().output(normalized, gamma, beta)


@twin("check_single_axes")
class NoMinimum(Whole):
    def refuse(self, x: Array, training: bool, affine: int) -> None:
        return None


@twin("check_single_axes", "check_batch_of_one", error=ValueError)
class NeedsTwoSamples(Whole):
    def refuse(self, x: Array, training: bool, affine: int) -> None:
        if len(x) == 1:
            raise ValueError("expected more than one sample")


@twin("check_batch_of_one")
class OneSampleIsEvaluated(Whole):
    def mean(self, x: Array, w: Array) -> Array:
        return self.evaluated(x, Call(x))[0] if len(x) == 1 else super().mean(x, w)


@twin("check_wrong_shape")
class Broadcasts(Whole):
    def refuse(self, x: Array, training: bool, affine: int) -> None:
        if x.shape[1] not in (1, affine):
            raise ValueError("channels")


@twin("check_empty_batch")
class CountsNothing(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        super().update(batch, call, n)
        self.count += not call.x.size


@twin("check_empty_batch", "check_all_masked", "check_zero_weight")
class UpdatesFromNothing(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        super().update(batch, call, n)
        if n == 0:
            self.kept = {k: v * np.float32(0.9) for k, v in self.kept.items()}


@twin("check_layouts")
class IgnoresStrides(Whole):
    def read(self, x: Array) -> Array:
        return np.ravel(x, order="K").reshape(x.shape)


@twin("check_output_type")
class WideOutput(WholeHalf):
    def narrow(self, values: Array) -> Array:
        return rounded(values, "float32")


# Gradients.


@twin("check_gradients", "check_gradcheck")
class GradientWithoutMean(Whole64):
    def dx(self, gh: Array, h: Array, w: Array, std: Array) -> Array:
        return (gh - w / w.sum() * h * self.sum(gh * h)) / std


@twin("check_gradients", "check_gradcheck")
class GradientWithoutVariance(Whole64):
    def dx(self, gh: Array, h: Array, w: Array, std: Array) -> Array:
        return (gh - w / w.sum() * self.sum(gh)) / std


@twin("check_gradients", "check_gradcheck")
class GammaGradientFromInput(Whole64):
    def dgamma(self, dy: Array, h: Array, x: Array) -> Array:
        return self.sum(dy * x).reshape(-1)


@twin("check_inputs_intact")
class GradientOverwritesGradient(Whole64):
    def finish(self, outcome: Outcome, call: Call) -> Outcome:
        if call.dy is not None:
            call.dy[...] = outcome.dx
        return outcome


@twin("check_inputs_intact")
class KeptAliasesItsArgument(Whole):
    def finish(self, outcome: Outcome, call: Call) -> Outcome:
        for name, value in (call.kept or {}).items():
            value[...] = outcome.kept[name]
        return outcome


@twin("check_inputs_intact")
class ReportsAChange(Whole):
    def finish(self, outcome: Outcome, call: Call) -> Outcome:
        return replace(outcome, changed=("x",))


_calls = itertools.count()


@twin("check_repeated_call")
class RemembersCalls(Whole):
    def output(self, normalized: Array, gamma: Array, beta: Array) -> Array:
        return super().output(normalized, gamma, beta) + self.wide(1e-6) * next(_calls)


# What is kept.


@twin("check_first_values")
class VarianceStartsAtZero(Whole):
    def first(self, channels: int) -> dict[str, Array]:
        return {"mean": np.zeros(channels, self.wide), "var": np.zeros(channels, self.wide)}


@twin("check_first_values")
class GammaStartsAtZero(Whole):
    def first_gamma(self, channels: int) -> Array:
        return np.zeros(channels, self.wide)


@twin("check_kept", "check_many_steps")
class MomentumSwapped(Whole):
    def rate(self, call: Call) -> float:
        return 1 - super().rate(call)


@twin("check_kept", "check_statistics")
class KeepsStd(Whole):
    def batch(self, mean: Array, var: Array, n: float, bessel: bool) -> dict[str, Array]:
        found = super().batch(mean, var, n, bessel)
        return {**found, "var": np.sqrt(found["var"])}


@twin("check_kept", "check_statistics", "check_bessel")
class BesselMissing(Whole):
    def batch(self, mean: Array, var: Array, n: float, bessel: bool) -> dict[str, Array]:
        return super().batch(mean, var, n, False)


@twin("check_kept", "check_statistics", "check_bessel")
class BesselTwice(Whole):
    def batch(self, mean: Array, var: Array, n: float, bessel: bool) -> dict[str, Array]:
        found = super().batch(mean, var, n, bessel)
        return {**found, "var": found["var"] * self.wide(n / (n - 1) if bessel else 1)}


@twin("check_bessel")
class BesselAlways(Whole):
    def batch(self, mean: Array, var: Array, n: float, bessel: bool) -> dict[str, Array]:
        return super().batch(mean, var, n, True)


@twin("check_kept", "check_many_steps")
class FirstBatchReplaces(Whole):
    def rate(self, call: Call) -> float:
        return 1.0 if self.count == 0 else super().rate(call)


@twin("check_kept", "check_evaluation_after_training", "check_batch_mates")
class EvaluationUpdates(Whole):
    def evaluated(self, x: Array, call: Call) -> tuple[Array, Array]:
        mean = self.mean(x, np.ones_like(x[:, :1]))
        self.kept = {**self.kept, "mean": self.kept["mean"] * 0 + mean.reshape(-1)}
        return super().evaluated(x, call)


@twin("check_many_steps", "check_kept")
class NeverCounts(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        super().update(batch, call, n)
        self.count = call.count


@twin("check_statistics", "check_kept")
class KeptInHalf(WholeHalf):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        super().update(batch, call, n)
        self.kept = {k: rounded(v, "float16").astype(np.float32) for k, v in self.kept.items()}


@twin("check_cumulative")
class NoneIsZero(Whole):
    def rate(self, call: Call) -> float:
        return call.rate or 0.0


@twin("check_cumulative")
class CumulativeOffByOne(Whole):
    def rate(self, call: Call) -> float:
        return 1 / (self.count + 2) if call.rate is None else call.rate


@twin("check_evaluation_after_training")
class EvaluatesStale(Whole):
    def evaluated(self, x: Array, call: Call) -> tuple[Array, Array]:
        shape = [1, -1, *(1 for _ in x.shape[2:])]
        first = call.kept or self.first(x.shape[1])
        return first["mean"].astype(self.wide).reshape(shape), first["var"].astype(self.wide).reshape(shape)


@twin("check_nonfinite")
class NonFiniteEnters(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        super().update(batch, replace(call, nonfinite="update"), n)


@twin("check_nonfinite")
class NonFiniteIsCounted(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        before = self.count
        super().update(batch, call, n)
        self.count = before + 1


@twin("check_nonfinite")
class NonFiniteSkipsOneChannel(Whole):
    def update(self, batch: dict[str, Array], call: Call, n: float) -> None:
        before, count = self.kept, self.count
        super().update(batch, replace(call, nonfinite="update"), n)
        if call.nonfinite != "update":
            self.kept = {k: np.where(np.isfinite(v), v, before[k]) for k, v in self.kept.items()}
            self.count = count


@twin("check_nonfinite")
class NonFiniteIsHidden(Whole):
    def output(self, normalized: Array, gamma: Array, beta: Array) -> Array:
        return np.nan_to_num(super().output(normalized, gamma, beta), posinf=0, neginf=0)


# Relations.


@twin("check_permuted_batch")
class FirstSampleWeighsTwice(Whole):
    def mean(self, x: Array, w: Array) -> Array:
        w = w.copy()
        w[:1] *= 2
        return super().mean(x, w)


@twin("check_batch_mates")
class LastBitsDependOnBatch(Whole):
    def evaluated(self, x: Array, call: Call) -> tuple[Array, Array]:
        mean, var = super().evaluated(x, call)
        return mean * self.wide(1 + 2.0**-22 * (len(x) % 2)), var


# Masks and weights.


@twin("check_mask", "check_padding")
class CountsPadding(Whole):
    def total(self, w: Array) -> Array:
        return np.full((1,) * w.ndim, w.size, w.dtype)


@twin("check_mask", "check_padding")
class BesselCountsPadding(Whole):
    def effective(self, w: Array) -> float:
        return float(w.size) if np.any(w) else 0.0


@twin("check_mask", "check_all_masked")
class MaskedOutputIsBeta(Whole):
    def hide(self, real: Array, values: Array) -> Array:
        return values


@twin("check_mask_all_true", "check_mask")
class MaskInverted(Whole):
    def run(self, call: Call) -> Outcome:
        return super().run(call if call.mask is None else replace(call, mask=~call.mask))


@twin("check_masked_garbage")
class MultipliesByMask(Whole):
    def hide(self, real: Array, values: Array) -> Array:
        return values * real


@twin("check_zero_weight", "check_all_masked")
class DividesByNothing(Whole):
    def mean(self, x: Array, w: Array) -> Array:
        return self.sum(x * w) / np.sum(w)


@twin("check_sample_weight", "check_repeated_samples")
class WeightsOverCount(Whole):
    def total(self, w: Array) -> Array:
        return np.full((1,) * w.ndim, np.count_nonzero(w), w.dtype)


@twin("check_sample_weight", "check_repeated_samples")
class WeightsIgnored(Whole):
    def weights(self, call: Call, x: Array) -> Array:
        return super().weights(replace(call, weight=None), x)


@twin("check_weight_scale", "check_sample_weight")
class WeightsAreCounts(Whole):
    def effective(self, w: Array) -> float:
        return float(np.sum(w))


# Other normalizers, by claiming one and running another.


def other(spec: NormSpec, entry: str, dtype: str = "float32") -> Callable[[Call], Outcome]:
    """Return a run of another spec with the sizes of this entry."""
    sizes = formula_subject(entry).sizes
    wide = "float64" if dtype == "float64" else "float32"
    return lambda call: run_formula(spec, sizes, dtype, wide, call)


claims(
    "batch", other(replace(catalog.BATCH, over="*s"), "batch"), "ReducesOverTheWrongAxis", "check_outputs", "check_kept"
)
claims("layer_2d", other(replace(catalog.BATCH, tracked=(), minimum=1), "layer_2d"), "BatchNormInsteadOfLayerNorm",
       "check_outputs", "check_batch_mates")  # fmt: skip
claims(
    "rms_2d",
    other(replace(catalog.RMS_2D, center=True), "rms_2d"),
    "RMSNormThatCentres",
    "check_rescaled",
    "check_outputs",
)
claims(
    "layer_2d",
    other(replace(catalog.LAYER_2D, center=False), "layer_2d"),
    "LayerNormThatDoesNotCentre",
    "check_rescaled",
)
claims("rms", other(catalog.RMS, "rms"), "IgnoresOnePlusW", "check_outputs", "check_gradients",
       spec=replace(catalog.RMS, gain="1+w"))  # fmt: skip
claims("one_group", other(catalog.GROUP, "group"), "AnotherNumberOfGroups", "check_outputs", "check_gradients")


# Ghost batches.


def _ghost(call: Call) -> Outcome:
    return other(catalog.GHOST, "ghost")(call)


def remainder_dropped(call: Call) -> Outcome:
    """Leave the short last group out of what is kept."""
    whole = _ghost(call)
    full = len(call.x) - len(call.x) % 2
    if not call.training or not full or full == len(call.x) or call.mask is not None or call.weight is not None:
        return whole
    return replace(whole, kept=_ghost(replace(call, x=call.x[:full], dy=None)).kept)


def remainder_unnormalized(call: Call) -> Outcome:
    """Return the short last group as it came."""
    whole = _ghost(call)
    full = len(call.x) - len(call.x) % 2
    y = whole.y.copy()
    if call.training and full > 0:
        y[full:] = call.x[full:]
    return replace(whole, y=y)


def sequential_updates(call: Call) -> Outcome:
    """Make one update for each group, as the paper does and this library does not."""
    whole = _ghost(call)
    if not call.training or call.mask is not None or call.weight is not None or len(call.x) < 4:
        return whole
    one = other(catalog.BATCH, "batch")
    kept = call.kept
    for start in range(0, len(call.x) - 1, 2):
        kept = one(replace(call, x=call.x[start : start + 2], dy=None, kept=kept, history=())).kept
    return replace(whole, kept=kept or {})


def no_groups(call: Call) -> Outcome:
    """Run plain batch norm."""
    return other(catalog.BATCH, "batch")(call)


claims("ghost", remainder_dropped, "GhostRemainderDropped", "check_kept")
claims("ghost", remainder_unnormalized, "GhostRemainderUnnormalized", "check_outputs")
claims("ghost", sequential_updates, "GhostSequentialUpdates", "check_kept")
claims("ghost", no_groups, "GhostWithoutGroups", "check_outputs", "check_gradients", "check_kept")


# Batch renormalization.


def renormalized(call: Call, correction: Callable[..., tuple[Array, Array]], keep: str = "std") -> Outcome:
    """Run batch renormalization in training with another correction (or another kept statistic)."""
    few = call.x.size < 2 * call.x.shape[1]
    if few or not call.training or call.history or call.dy is None or call.mask is not None or call.weight is not None:
        return other(catalog.RENORM, "renorm", "float64")(call)
    p = plan(catalog.RENORM, call.x.ndim, (("c", call.x.shape[1]),))
    r_max, d_max = (1.0, 0.0) if call.schedule is None else map(float, call.schedule.at(np, call.count))

    def correct(mean: Array, std: Array) -> formula.Correction:
        shape = mean.shape
        kept = {name: value.reshape(shape) for name, value in (call.kept or {}).items()}
        r, d = correction(mean, std, kept["mean"], kept["std"], call.rate)
        return formula.Correction(np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max))

    spec = catalog.RENORM
    y, moments = formula.normalize(np, spec, p, call.x, call.gamma, call.beta, eps=call.eps, correct=correct)
    g = formula.backward(np, spec, p, call.dy, call.x, call.gamma, call.beta, moments, eps=call.eps)
    batch, known = formula.merged(np, spec, p, moments, eps=call.eps)
    if keep == "var":
        batch = {**batch, "std": batch["std"] ** 2}
    if keep == "unbiased":
        n = call.x.size / call.x.shape[1]
        batch = {**batch, "std": batch["std"] * np.sqrt(n / (n - 1))}
    kept = formula.updated(np, spec, call.kept or {}, batch, known, call.rate)
    return Outcome(y, g.x, g.gamma, g.beta, kept, call.count + 1)


def right(mean: Array, std: Array, kept_mean: Array, kept_std: Array, rate: float) -> tuple[Array, Array]:
    return std / kept_std, (mean - kept_mean) / kept_std


def inverted(mean: Array, std: Array, kept_mean: Array, kept_std: Array, rate: float) -> tuple[Array, Array]:
    return kept_std / std, (mean - kept_mean) / kept_std


def after_update(mean: Array, std: Array, kept_mean: Array, kept_std: Array, rate: float) -> tuple[Array, Array]:
    return right(mean, std, kept_mean + rate * (mean - kept_mean), kept_std + rate * (std - kept_std), rate)


def by_batch_std(mean: Array, std: Array, kept_mean: Array, kept_std: Array, rate: float) -> tuple[Array, Array]:
    return std / kept_std, (mean - kept_mean) / std


EXACT = {"dtype": "float64"}
claims(
    "renorm", lambda call: renormalized(call, inverted), "RenormInverted", "check_outputs", "check_schedule", **EXACT
)
claims(
    "renorm",
    lambda call: renormalized(call, after_update),
    "RenormAfterUpdate",
    "check_outputs",
    "check_schedule",
    **EXACT,
)
claims("renorm", lambda call: renormalized(call, by_batch_std), "RenormShiftByBatchStd", "check_schedule", **EXACT)
claims(
    "renorm",
    lambda call: renormalized(call, right, "var"),
    "RenormKeepsVariance",
    "check_kept",
    "check_schedule",
    **EXACT,
)
claims("renorm", lambda call: renormalized(call, right, "unbiased"), "RenormKeepsUnbiasedStd", "check_kept", **EXACT)
claims(
    "renorm",
    lambda call: renormalized(replace(call, schedule=None), right),
    "RenormWithoutSchedule",
    "check_schedule",
    "check_outputs",
    **EXACT,
)
claims(
    "renorm",
    lambda call: replace(renormalized(replace(call, count=call.count + 1), right), count=call.count + 1),
    "RenormScheduleOneStepAhead",
    "check_schedule",
    **EXACT,
)
CONTROLS = [
    subject(Whole),
    subject(Whole64),
    subject(WholeHalf),
    subject(WholeBrain),
    replace(
        formula_subject("renorm"),
        name="RenormInPieces",
        run=lambda call: renormalized(call, right),
        gradients="training",
    ),
]
