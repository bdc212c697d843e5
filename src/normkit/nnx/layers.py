"""The normalizers of Flax NNX, each in front of its parent in `flax.nnx`, whose place it can take anywhere.

Same constructor arguments in the same order, same defaults, same parameters and statistics under the same names, same
type of the result, and on the same weights the same numbers. What is different:

- `use_fast_variance` is accepted and means nothing: the variance is the mean of squared deviations, which is as fast
  under XLA and right where the mean is large. Flax' E[x^2] - E[x]^2 is 0 or noise there.
- Running statistics take part in float32 also where `dtype` is a half type; Flax rounds them to it in evaluation.
- `mask` is boolean, True = real data, and broadcastable to the input as in Flax. Where statistics are taken over
  samples or positions, a mask with as many axes as the input has without its features is understood as one of
  positions. Outputs at masked positions are 0 and get no gradient; Flax normalizes them.
- Over several devices (`axis_name`) the sums are added up, and so are the counts: statistics are those of all real
  positions together. Flax averages the means of the devices, NaN if one has nothing real. What a shard_map gives a
  device has the same shape everywhere; unequal batches are padded and masked.
- `sample_weight`, real and >= 0, of the shape of a mask or (N,): weights of positions, of which only the proportions
  count.

Statistics are state, which only `nnx.jit`, `nnx.grad`, `nnx.vmap` and the like, or `nnx.split` and, inside of the
function, `nnx.merge(..., copy=True)`, can carry through a transform. Under `vmap` either give `axis_name` to layer and
vmap, and the lanes share statistics, or give every lane a state of its own (`nnx.StateAxes({...: 0})`).

A layer contains no mathematics: it calls :mod:`normkit.core.formula`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import errors, nnx
from jax import lax

from normkit.core import catalog, formula
from normkit.core.algebra import groups_for, rate_of
from normkit.core.axes import Sizes
from normkit.core.constraints import Constraint, Flag, Integer, Optional, Real, check
from normkit.core.plan import NormPlan
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import ARGUMENTS, NormSpec
from normkit.errors import NormRuntimeError, NormTypeError, NormValueError, message
from normkit.nnx import _execute

__all__ = ["BatchNorm", "BatchRenorm", "GhostBatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]

_CONSTRAINTS: Mapping[str, Constraint] = {
    **{name: ARGUMENTS[name] for name in ("num_features", "momentum", "virtual_batch_size", "bessel", "nonfinite")},
    "epsilon": ARGUMENTS["eps"],
    **dict.fromkeys(("debiased", "use_bias", "use_scale", "learn_epsilon"), Flag()),
    "alpha_init_value": Real(),
    "groups": Integer(1),
    "use_running_average": Optional(Flag()),
    "num_groups": Optional(Integer(1)),
    "group_size": Optional(Integer(1)),
}


def _constructor(parent: Any) -> Callable[[Any], Any]:
    """Make a constructor take the arguments of `parent`, as the installed Flax has them, and its own, all checked."""
    theirs = inspect.signature(parent.__init__).parameters.values()

    def decorate(init: Any) -> Any:
        known = {p.name for p in theirs}
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        signature = inspect.Signature([*theirs, *(p for p in own if p.name not in known)])

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            check(type(self).__name__, _CONSTRAINTS, signature.bind(self, *args, **kwargs).arguments)
            init(self, *args, **kwargs)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        return __init__

    return decorate


def _differs(old: Any, new: Any) -> bool:
    """Whether the lanes of a vmap would write different values to one variable.

    JAX has no public name for that. Where this looks in vain, JAX has an error of its own, which says less.
    """
    return getattr(old, "batch_dim", None) is None and getattr(new, "batch_dim", None) is not None


@functools.cache
def _biased(spec: NormSpec) -> NormSpec:
    return replace(spec, tracked=tuple(replace(t, bessel=False) for t in spec.tracked))


class _Tracking:
    """What batch norm, ghost batch norm and batch renormalization share: statistics that are kept between calls."""

    _spec: ClassVar[NormSpec]
    _sizes: Sizes = ()
    num_features: int
    axis: int
    momentum: Any
    epsilon: float
    use_running_average: bool | None
    axis_name: Any
    axis_index_groups: Any
    bessel: bool = False
    nonfinite: str
    debiased: bool = False
    schedule: RenormSchedule
    var: Any
    count: Any = None

    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None, sample_weight: Any = None
    ) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        evaluating = self.use_running_average if use_running_average is None else use_running_average
        if evaluating is None:
            must = f"{owner}: `use_running_average` must be given, to the constructor, the call or nnx.view"
            raise NormValueError(message(must, hint="False trains, True evaluates"))
        x = _execute.array(owner, x)
        features = _execute.canonical(owner, "axis", self.axis, x.ndim)
        _execute.check_features(owner, x, features, self.num_features)
        over = tuple(axis for axis in range(x.ndim) if axis not in features)
        ghost = bool(self._sizes)
        if ghost and over[:1] != (0,):
            raise NormValueError(message(f"{owner}: the samples must be on axis 0", f"the features, axis={self.axis}"))
        spec = self._spec if self.bessel else _biased(self._spec)
        spec, p = _execute.placed(spec, x.ndim, over, features, 0 if ghost else None, self._sizes)
        kept: dict[str, Any] = {t.name: getattr(self, t.name)[...] for t in spec.tracked}
        x, scale, bias, result = _execute.promoted(self, x, *kept.values())
        kept = {name: value.astype(x.dtype) for name, value in kept.items()}
        if evaluating:
            x, real, weight = _execute.prepare(owner, x, features, mask, short=True)
            return _execute.finish(self._evaluated(spec, p, x, kept, scale, bias, weight), real, result)
        # A ghost batch is one device's own; what it kept is shared.
        shared = _execute.lanes(owner, self.axis_name, self.axis_index_groups)
        across = (self.axis_name, self.axis_index_groups)
        x, real, weight = _execute.prepare(owner, x, features, mask, sample_weight, short=True, across=across)
        correct = None
        if spec.renorm:
            correct = formula.renorm(jnp, kept, *self.schedule.at(jnp, self.count[...]), stop=lax.stop_gradient)
        y, moments = self._trained(jnp if ghost else shared, spec, p, x, scale, bias, weight, correct)
        batch, known = formula.merged(shared if ghost else jnp, spec, p, moments, eps=self.epsilon)
        if known is not False:  # an empty batch is none
            self._keep(spec, kept, batch, known)
        return _execute.finish(y, real, result)

    def _evaluated(
        self, spec: NormSpec, p: NormPlan, x: Any, kept: Mapping[str, Any], scale: Any, bias: Any, weight: Any
    ) -> Any:
        """The output by the kept statistics; `weight` is for formulas that look at the input as well."""
        del weight
        return formula.evaluate(jnp, spec, p, x, kept, scale, bias, eps=self.epsilon)

    def _trained(
        self, xp: Any, spec: NormSpec, p: NormPlan, x: Any, scale: Any, bias: Any, weight: Any, correct: Any
    ) -> tuple[Any, list[formula.Moments]]:
        """The output by the statistics of the batch, and these."""
        return formula.normalize(xp, spec, p, x, scale, bias, eps=self.epsilon, weight=weight, correct=correct)

    def _keep(self, spec: NormSpec, kept: Mapping[str, Any], batch: Mapping[str, Any], known: Any) -> None:
        """Let the statistics of a batch enter the kept ones."""
        if self.nonfinite == "skip":
            known = known & jnp.stack([jnp.isfinite(value).all() for value in batch.values()]).all()
        new = formula.updated(jnp, spec, kept, batch, known, self._rate())
        if any(_differs(kept[name], value) for name, value in new.items()):
            must = f"{type(self).__name__}: running statistics must have one value for all lanes of a vmap"
            hint = "give layer and vmap the same axis_name, or every lane a state of its own (nnx.StateAxes({...: 0}))"
            raise NormRuntimeError(message(must, "one for every lane", hint))
        if self.count is not None:
            new["count"] = self.count[...] + jnp.any(known)
        try:
            for name, value in new.items():
                variable = getattr(self, name)
                variable[...] = lax.stop_gradient(value.astype(variable[...].dtype))
        except errors.TraceContextError as error:
            must = f"{type(self).__name__}: running statistics must belong to the transform that updates them"
            hint = (
                "use nnx.jit, nnx.grad, nnx.vmap, nnx.scan or nnx.remat and pass the model as an argument, or call "
                "nnx.merge(..., copy=True) inside the transformed function and return nnx.state(model, nnx.BatchStat); "
                "with use_running_average=True nothing is written"
            )
            raise NormRuntimeError(message(must, "a layer from outside of it", hint)) from error

    def _rate(self) -> Any:
        """Return the weight of this batch in what is kept.

        After t batches a debiased average has rate / (1 - (1 - rate)^t): that is the moving average with what its first
        value still weighs taken out at every step. Taken out at the end it would be a small difference of large
        numbers, and the buffers themselves would mean something else than those of batch norm.
        """
        if self.momentum is None:
            return 1.0 / (self.count[...] + 1.0)
        rate = rate_of(self.momentum, "flax")
        if not self.debiased or rate in (0.0, 1.0):
            return rate
        t = self.count[...] + 1.0
        return jnp.where(t == 1.0, 1.0, rate / -jnp.expm1(t * jnp.log1p(-rate)))

    def _add_count(self, needed: bool) -> None:
        if needed:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))


class BatchNorm(_Tracking, nnx.BatchNorm):
    """Batch normalization (arXiv:1502.03167).

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, per feature.

    Shapes: input (N, *S, C), or the features on another `axis`, output the same; scale, bias, mean and var (C,), mean
    and var in float32.

    Training (`use_running_average=False`): mean and biased variance of the batch, over all axes but the features'. Then
    `kept = momentum * kept + (1 - momentum) * batch`, with the biased variance as in Flax unless `bessel=True`.
    Evaluation: the kept statistics; nothing is read from the batch. The paper averages the statistics of many batches
    once, after training, with the unbiased variance; the running average is what practice settled on. A single value
    per feature has the variance 0: it normalizes to bias, as in Flax.

    First values: scale 1, bias 0, mean 0, var 1. With Flax' momentum of 0.99 those still weigh 0.37 after 100 steps,
    so evaluation is far off early in training: `debiased=True` or `momentum=None` is right from step 1.

    Args:
        num_features: number of features C.
        use_running_average: False trains, True evaluates; `model.train()`, `model.eval()` and the call decide it, too.
        axis: of the features.
        momentum: weight of the kept statistics, one minus that of the batch; None averages all batches equally.
        epsilon: added to the variance.
        dtype: of the result; None: that of input, statistics and parameters together.
        param_dtype: of scale and bias.
        use_bias, use_scale: without, there is none.
        bias_init, scale_init: their first values.
        axis_name: of the devices, or lanes of a vmap, that share statistics.
        axis_index_groups: groups of them; needs `pmap`, or `shard_map` with check_vma=False.
        use_fast_variance: means nothing here, see the top of this module.
        promote_dtype: Flax' promotion of (x, mean, var, scale, bias).
        rngs: for the first values.
        bias_metadata, scale_metadata: of the parameters.
        bessel: keep the unbiased variance n/(n-1) var, as PyTorch does.
        nonfinite: "skip" leaves everything kept as it was after a batch whose statistics are not finite; "update" lets
            them in, as Flax does.
        debiased: take out what the first values still weigh, at every step. Adds a variable `count`, as momentum=None.

    Raises:
        NormValueError: for inputs that do not fit.
        NormRuntimeError: where the statistics cannot be written, see the top of this module.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> layer = BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.0, 200.0], [2.0, 220.0], [3.0, 180.0], [6.0, 200.0]])
    >>> print(np.asarray(layer(x)).round(2) + 0.0)
    [[-1.07  0.  ]
     [-0.53  1.41]
     [ 0.   -1.41]
     [ 1.6   0.  ]]
    >>> layer.eval()
    >>> print(layer.mean[...], np.asarray(layer(x[:1])).round(2))  # after one step evaluation is far off
    [ 0.3 20. ] [[ 0.63 39.37]]
    """

    _spec = catalog.BATCH

    @_constructor(nnx.BatchNorm)
    def __init__(
        self,
        num_features: int,
        *,
        bessel: bool = False,
        nonfinite: str = "skip",
        debiased: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(num_features, **arguments)
        self.bessel = bessel
        self.nonfinite = nonfinite
        self.debiased = debiased
        self._add_count(debiased or self.momentum is None)


class GhostBatchNorm(BatchNorm):
    """Ghost batch normalization (arXiv:1705.08741): batch norm over groups of `virtual_batch_size` samples in training.

    The noise of small batches at the speed of large ones. Consecutive samples form a group; those left over form one
    short group, and a single left over value joins the group before it. All groups enter the running statistics as one
    update (means weighted by size, variances pooled), where the paper makes one update per group. Evaluation,
    parameters, statistics and their names are those of batch norm, so that state moves between the two.

    With `axis_name` every device forms groups of its own samples, and the groups of all devices make the one update.

    Shapes: input (N, *S, C), or the features on another `axis` than 0, output the same; everything else (C,).

    Args:
        num_features: number of features C.
        virtual_batch_size: samples in a group, at least 2.
        arguments: as batch norm.

    Raises:
        NormValueError, NormRuntimeError: as batch norm.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> layer = GhostBatchNorm(1, virtual_batch_size=2, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0], [3.0], [100.0], [300.0]])).round(2).T)
    [[-1.  1. -1.  1.]]
    """

    _spec = catalog.GHOST

    @_constructor(BatchNorm)
    def __init__(self, num_features: int, *, virtual_batch_size: int = 32, **arguments: Any) -> None:
        super().__init__(num_features, **arguments)
        self.virtual_batch_size = virtual_batch_size

    @property
    def _sizes(self) -> Sizes:  # type: ignore[override]
        return (("n", self.virtual_batch_size),)


class BatchRenorm(_Tracking, nnx.Module):
    """Batch renormalization (arXiv:1702.03275): batch norm whose training output agrees with evaluation, within clips.

    Training: y = ((x - batch mean) / s * r + d) * scale + bias with s = sqrt(batch var + epsilon),
    r = clip(s / std, 1/r_max, r_max) and d = clip((batch mean - mean) / std, -d_max, d_max), which are constants of the
    backward pass. Evaluation: y = (x - mean) / std * scale + bias.

    Shapes: input (N, *S, C), or the features on another `axis`, output the same; scale, bias, mean and std (C,). The
    standard deviation, not the variance, is averaged, with epsilon inside and without Bessel's factor, as in the paper:
    training and evaluation use the same number, so its bias cancels.

    First values: scale 1, bias 0, mean 0, std 1, count 0. The clips follow `schedule` by count. The default is the
    paper's, made for some 130 000 steps; for a run of T steps use `RenormSchedule.for_steps(T)`, and a momentum with
    3 / (1 - momentum) steps before the clips open.

    Args:
        num_features: number of features C.
        schedule: r_max and d_max as a function of the step.
        nonfinite: as batch norm.
        arguments: those of Flax' batch norm; momentum may be None.

    Raises:
        NormValueError, NormRuntimeError: as batch norm.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from normkit.core.schedule import RenormSchedule
    >>> layer = BatchRenorm(64, momentum=0.95, schedule=RenormSchedule.for_steps(1000), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 8, 8, 64))).shape
    (4, 8, 8, 64)
    """

    _spec = catalog.RENORM

    @_constructor(nnx.BatchNorm)
    def __init__(
        self,
        num_features: int,
        *,
        schedule: RenormSchedule | None = None,
        nonfinite: str = "skip",
        **arguments: Any,
    ) -> None:
        if schedule is not None and not isinstance(schedule, RenormSchedule):
            must = f"{type(self).__name__}: `schedule` must be a normkit RenormSchedule"
            raise NormTypeError(message(must, repr(schedule), "RenormSchedule.for_steps(total_steps)"))
        construct: Any = nnx.BatchNorm.__init__
        construct(self, num_features, **arguments)  # everything of Flax' batch norm, which it is not, but for:
        del self.var
        self.std = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        self.schedule = RenormSchedule() if schedule is None else schedule
        self.nonfinite = nonfinite
        self._add_count(True)

    set_view = nnx.BatchNorm.set_view


class LayerNorm(nnx.LayerNorm):
    """Layer normalization (arXiv:1607.06450).

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, mean and variance over `reduction_axes` of each sample.

    Shapes: input any, output the same; scale and bias (num_features,), laid along `feature_axes`. A single value
    normalizes to 0, so its output is the bias. Training and evaluation are the same.

    First values: scale 1, bias 0.

    Args:
        num_features: number of values of scale and bias.
        reduction_axes: of mean and variance.
        feature_axes: of scale and bias.
        arguments: as `flax.nnx.LayerNorm`; `mask` has the axes of the input, see the top of this module.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> print(np.asarray(LayerNorm(4, rngs=nnx.Rngs(0))(jnp.array([[1.0, 2.0, 3.0, 6.0]]))).round(2))
    [[-1.07 -0.53  0.    1.6 ]]
    """

    @_constructor(nnx.LayerNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        """Normalize; see the class."""
        return _rows(self, catalog.LAYER, x, mask)


class RMSNorm(nnx.RMSNorm):
    """Root mean square normalization (arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + epsilon) * scale, the mean over `reduction_axes` of each sample.

    Shapes: input any, output the same; scale (num_features,), laid along `feature_axes`. Training and evaluation are
    the same.

    First value: scale 1.

    Args:
        num_features: number of values of scale.
        reduction_axes: of the mean square.
        feature_axes: of scale.
        arguments: as `flax.nnx.RMSNorm`; `mask` has the axes of the input, see the top of this module.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> print(np.asarray(RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, 4.0]]))).round(3))
    [[0.849 1.131]]
    """

    @_constructor(nnx.RMSNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        """Normalize; see the class."""
        return _rows(self, catalog.RMS, x, mask)


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization (arXiv:1607.08022): each channel of each sample over its positions.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias.

    Shapes: input (N, *S, C), output the same; scale and bias (C,). A map of a single position normalizes to bias.
    Training and evaluation are the same.

    First values: scale 1, bias 0.

    Args:
        num_features: number of channels C.
        feature_axes: of the channels, where they are not last; all axes but those and the first are positions.
        arguments: as `flax.nnx.InstanceNorm`.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> print(InstanceNorm(1, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [3.0]], [[100.0], [300.0]]])).round(2)[..., 0])
    [[-1.  1.]
     [-1.  1.]]
    """

    @_constructor(nnx.InstanceNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __call__(self, x: Any, *, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        x = _execute.array(owner, x)
        features = _execute.canonical(owner, "feature_axes", self.feature_axes, x.ndim)
        if 0 in features:
            must = f"{owner}: the samples must be on axis 0"
            raise NormValueError(message(must, f"features on axes {features}"))
        over = tuple(axis for axis in range(1, x.ndim) if axis not in features)
        return _untracked(self, catalog.INSTANCE, x, over, features, self.num_features, mask, sample_weight, short=True)


class GroupNorm(nnx.GroupNorm):
    """Group normalization (arXiv:1803.08494): groups of channels of each sample over their channels and positions.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias.

    Shapes: input (N, *S, C), output the same; scale and bias (C,). A group of a single value normalizes to 0. Training
    and evaluation are the same.

    First values: scale 1, bias 0.

    Args:
        num_features: number of channels C, divisible by the number of groups.
        num_groups: number of groups; None where `group_size` is given.
        group_size: channels in a group.
        reduction_axes: of mean and variance, the last one included; every other axis has statistics of its own. Flax
            documents that, but computes it only where one axis is left out.
        arguments: as `flax.nnx.GroupNorm`.

    Raises:
        NormValueError: for a number of groups that does not divide the channels; for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> print(np.asarray(GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 100.0, 300.0]]))).round(2))
    [[-1.  1. -1.  1.]]
    """

    @_constructor(nnx.GroupNorm)
    def __init__(
        self, num_features: int, num_groups: int | None = 32, group_size: int | None = None, **arguments: Any
    ) -> None:
        owner = type(self).__name__
        if (num_groups is None) == (group_size is None):
            must = f"{owner}: one of `num_groups` and `group_size` must be given"
            got = f"num_groups={num_groups}, group_size={group_size}"
            raise NormValueError(message(must, got, "num_groups=None leaves the choice to `group_size`"))
        name, divisor = ("group_size", group_size) if num_groups is None else ("num_groups", num_groups)
        if divisor is not None and num_features % divisor:
            must = f"{owner}: `num_features` must be divisible by `{name}`"
            hint = f"num_groups={groups_for(num_features)} divides it"
            raise NormValueError(message(must, f"{num_features} and {divisor}", hint))
        super().__init__(num_features, num_groups, group_size, **arguments)

    def __call__(self, x: Any, *, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        x = _execute.array(owner, x)
        last = x.ndim - 1
        given = (*range(1, last), last) if self.reduction_axes is None else self.reduction_axes
        over = _execute.canonical(owner, "reduction_axes", given, x.ndim)
        if last not in over:
            must = f"{owner}: `reduction_axes` must include the last axis, which has the groups"
            raise NormValueError(message(must, f"{self.reduction_axes} of {x.ndim} axes"))
        sizes = (("g", self.num_groups),)
        length = self.num_groups * self.group_size
        return _untracked(
            self, catalog.GROUP, x, over, (last,), length, mask, sample_weight, short=True, split=last, sizes=sizes
        )


def _rows(layer: Any, spec: NormSpec, x: Any, mask: Any) -> Any:
    """Run a layer with `reduction_axes` and `feature_axes`."""
    owner = type(layer).__name__
    x = _execute.array(owner, x)
    over = _execute.canonical(owner, "reduction_axes", layer.reduction_axes, x.ndim)
    features = _execute.canonical(owner, "feature_axes", layer.feature_axes, x.ndim)
    return _untracked(layer, spec, x, over, features, layer.num_features, mask, None, short=False)


def _untracked(
    layer: Any,
    spec: NormSpec,
    x: Any,
    over: tuple[int, ...],
    features: tuple[int, ...],
    length: int,
    mask: Any,
    sample_weight: Any,
    *,
    short: bool,
    split: int | None = None,
    sizes: Sizes = (),
) -> Any:
    """Run a layer that keeps nothing."""
    owner = type(layer).__name__
    _execute.check_features(owner, x, features, length)
    spec, p = _execute.placed(spec, x.ndim, over, features, split, sizes)
    x, scale, bias, result = _execute.promoted(layer, x)
    xp = _execute.lanes(owner, layer.axis_name, layer.axis_index_groups)
    across = (layer.axis_name, layer.axis_index_groups)
    x, real, weight = _execute.prepare(owner, x, features, mask, sample_weight, short=short, across=across)
    y, _ = formula.normalize(xp, spec, p, x, scale, bias, eps=layer.epsilon, weight=weight)
    return _execute.finish(y, real, result)
