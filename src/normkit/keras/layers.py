"""The normalizers as layers of Keras 3, on TensorFlow, JAX and PyTorch.

Those that Keras has subclass it and can take its place anywhere: same arguments in the same order, same defaults, same
weights in the same order under the same names (files can be exchanged in both directions, but for
  a layer that counts its updates in a weight that Keras has not), and on the same weights the
same numbers, where Keras' own are right. Other than there,

- variances are means of squared deviations on every backend, in float32 or wider, and deviations are centred;
- moving statistics are float32 or wider whatever the dtype policy;
- `mask` goes with any `axis`, and masked outputs are 0 and get no gradient (Keras' own normalizes them, too);
- `call(inputs, mask=None, sample_weight=None)` wherever statistics are taken over samples or positions. `mask`: True
  (or not 0) is real data; the input's shape without its channel axis, where lengths of 1 are repeated and axes missing
  at the end are added, so that the mask of an Embedding, (batch, time), is enough. `sample_weight`: >= 0 (nobody looks,
  as a graph cannot), of shape (batch,) or as `mask`; only proportions count. In a model of mixed precision it is
  rounded like every input;
- a single value has no spread and is normalized to beta, as in Keras; :mod:`normkit.torch` refuses it, as PyTorch does.

A layer contains no mathematics. Loading a `.keras` file needs `import normkit.keras` first; without it Keras says that
it could not locate the class, with the module `normkit.keras.layers` in the config that it prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import keras
from keras import ops

from normkit.core import catalog
from normkit.core.constraints import Integer, Optional, Real
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import NormSpec
from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.keras._arrays import ARRAYS, Arrays, over_replicas, wide
from normkit.keras._execute import by_channel, by_rows, evaluate, hidden, keep, normalize, rate_at, renorm
from normkit.keras._layer import (
    axis_of,
    cast_like,
    channel_axis,
    check_debiased,
    check_groups,
    checked,
    register,
    sample_axis_apart,
    weighted_input,
    widened,
)

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "GhostBatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
]


@register
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization (arXiv:1502.03167) over all axes but `axis`, in place of `keras.layers.BatchNormalization`.

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta, per channel.

    Shapes: input of two axes or more with C channels on `axis`, output the same; gamma, beta, moving_mean,
    moving_variance (C,), the moving ones in float32 or wider.

    Training (`training=True` and `trainable`): mean and biased variance of the batch. Then
    `moving = momentum * moving + (1 - momentum) * batch`, with the biased variance; PyTorch's momentum is one minus
    this one, and its running variance is the unbiased one. Evaluation, and with `trainable=False` training as well: the
    moving statistics. The paper instead averages the statistics of many batches once, after training.

    First values: gamma 1, beta 0, moving_mean 0, moving_variance 1. After T steps the first values still weigh
    momentum^T: .80 after 22 steps. For short runs use `debiased=True`, `momentum=None` or a smaller momentum.

    With `renorm=True` this is batch renormalization (arXiv:1702.03275), as in Keras: in training normalized =
    (x - mean) / std * r + d with std = sqrt(var + epsilon), r = clip(std / renorm_stddev, rmin, rmax) and
    d = clip((mean - renorm_mean) / renorm_stddev, -dmax, dmax), constants of the backward pass. renorm_mean and
    renorm_stddev follow with `renorm_momentum`; moving_stddev averages the standard deviation with `momentum`, and
    moving_variance = moving_stddev^2 - epsilon. First values: renorm_mean 0, renorm_stddev and moving_stddev 1.

    Args:
        axis: of the channels.
        momentum: weight of the old value; None averages all batches equally.
        epsilon: added to the variance.
        center, scale: with beta, with gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer, beta_regularizer,
            gamma_regularizer, beta_constraint, gamma_constraint: as in Keras.
        renorm: batch renormalization.
        renorm_clipping: dictionary of `rmin`, `rmax`, `dmax`; what is missing does not clip.
        renorm_momentum: as `momentum`, for the statistics that correct those of the batch.
        synchronized: statistics over all replicas, each position counting once, also with a mask or weights and unequal
            batches. On TensorFlow under a tf.distribute strategy, on PyTorch where torch.distributed is initialized;
            on JAX `keras.distribution` does so anyway, and this is an error.
        virtual_batch_size: ghost batches (arXiv:1705.08741): in training groups of so many consecutive samples have
            statistics of their own. Those left over form a short group, a single left over value joins the group before
            it. All groups enter the moving statistics as one update, means weighted by size and variances pooled.
        renorm_schedule: a :class:`normkit.core.schedule.RenormSchedule`, or its fields in a dictionary: r_max and d_max
            by the number of updates, instead of `renorm_clipping`.
        debiased: take the first values' share out of the moving statistics, which is right from the first step on.
        bessel: keep the unbiased variance n/(n-1) var; no matter with `renorm`, which keeps the standard deviation.
        nonfinite: "skip" leaves the moving statistics as they are for a batch with NaN or infinity, "update" does not
            look, as Keras.
        **kwargs: of every layer: `name`, `dtype`, `trainable`.

    `momentum=None`, `debiased` and `renorm_schedule` count the updates in one more weight, `count`, after Keras' own.

    Raises:
        NormValueError: for arguments out of range, an `axis` that the input has not, a mask of another shape.
        NormTypeError: for arguments of another type.

    >>> import numpy as np
    >>> from normkit.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.9)
    >>> x = np.array([[1.0, 200.0], [2.0, 220.0], [3.0, 180.0], [6.0, 200.0]], "float32")
    >>> y = keras.ops.convert_to_numpy(layer(x, training=True))
    >>> print(y.round(2) + 0.0)
    [[-1.07  0.  ]
     [-0.53  1.41]
     [ 0.   -1.41]
     [ 1.6   0.  ]]
    >>> print(keras.ops.convert_to_numpy(layer.moving_mean).round(4))
    [ 0.3 20. ]
    """

    momentum: float | None
    synchronized: bool
    virtual_batch_size: int | None
    renorm_schedule: RenormSchedule | None
    debiased: bool
    bessel: bool
    nonfinite: str
    count: Any

    def __init__(
        self,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        virtual_batch_size: int | None = None,
        renorm_schedule: RenormSchedule | Mapping[str, Any] | None = None,
        debiased: bool = False,
        bessel: bool = False,
        nonfinite: str = "skip",
        **kwargs: Any,
    ) -> None:
        checked(
            self,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            renorm=renorm,
            renorm_momentum=renorm_momentum,
            synchronized=synchronized,
            virtual_batch_size=virtual_batch_size,
            debiased=debiased,
            bessel=bessel,
            nonfinite=nonfinite,
        )
        if not isinstance(axis, Integral) or isinstance(axis, bool):
            raise NormTypeError(message(f"{type(self).__name__}: `axis` must be one whole number", repr(axis)))
        self._check_together(momentum, debiased, renorm, renorm_clipping, renorm_schedule, virtual_batch_size)
        if synchronized and virtual_batch_size is not None:
            must = f"{type(self).__name__}: ghost batches have statistics of their own and cannot be `synchronized`"
            raise NormValueError(message(must))
        super().__init__(
            axis=axis,
            momentum=0.99 if momentum is None else momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=None if renorm_clipping is None else dict(renorm_clipping),
            renorm_momentum=renorm_momentum,
            **kwargs,
        )
        if synchronized:
            over_replicas()  # a backend that cannot is an error here, not in the first step
        self.synchronized = synchronized
        self.momentum = momentum
        self.virtual_batch_size = virtual_batch_size
        self.renorm_schedule = _schedule(self, renorm_schedule)
        self.debiased = debiased
        self.bessel = bessel
        self.nonfinite = nonfinite
        self.count = None

    def _check_together(
        self, momentum: Any, debiased: bool, renorm: bool, clipping: Any, schedule: Any, size: int | None
    ) -> None:
        """Refuse arguments that contradict each other."""
        owner = type(self).__name__
        check_debiased(self, momentum, debiased)
        if not renorm and (clipping or schedule is not None):
            must = f"{owner}: `renorm_clipping` and `renorm_schedule` must go with `renorm=True`"
            raise NormValueError(message(must))
        if clipping and schedule is not None:
            raise NormValueError(message(f"{owner}: `renorm_clipping` and `renorm_schedule` must not both be given"))
        if renorm and size is not None:
            raise NormValueError(message(f"{owner}: `renorm` and `virtual_batch_size` must not both be given"))
        for name, value in (clipping or {}).items():
            if name not in ("rmin", "rmax", "dmax"):
                hint = nearest(str(name), ("rmin", "rmax", "dmax"))
                raise NormValueError(message(f"{owner}: `renorm_clipping` must have known keys", repr(name), hint))
            if not Optional(Real(0.0)).allows(value):
                must = f"{owner}: `renorm_clipping[{name!r}]` must be None or a number of at least 0"
                raise NormValueError(message(must, repr(value)))
        low, high = ((clipping or {}).get(name) for name in ("rmin", "rmax"))
        if low is not None and high is not None and low > high:
            raise NormValueError(message(f"{owner}: `rmin` must not be above `rmax`", f"{low} and {high}"))

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        axis = channel_axis(self, input_shape)
        if axis == 0 and self.virtual_batch_size is not None:
            must = f"{type(self).__name__}: ghost batches need the samples on axis 0"
            raise NormValueError(message(must, f"axis={self.axis}"))
        super().build(tuple(input_shape))
        if self.momentum is None or self.debiased or self.renorm_schedule is not None:
            self.count = self.add_weight(name="count", shape=(), initializer="zeros", dtype="int32", trainable=False)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Make a weight; what is kept stays float32 or wider: in half precision an average stops moving."""
        if not kwargs.get("trainable", True) and kwargs.get("dtype") is None:
            kwargs["dtype"] = wide(self.variable_dtype)
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        learning = bool(training) and self.trainable
        reduce = over_replicas() if self.synchronized and learning else None
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight, reduce)
        spec, gamma, beta = self._spec(len(x.shape), axis), cast_like(x, self.gamma), cast_like(x, self.beta)
        if not learning:
            kept = {"mean": cast_like(x, self.moving_mean), "var": cast_like(x, self.moving_variance)}
            y = evaluate(spec, x, kept, gamma, beta, eps=self.epsilon)
        else:
            sizes = () if self.virtual_batch_size is None else (("n", self.virtual_batch_size),)
            xp = ARRAYS if reduce is None else Arrays(reduce)
            correct = self._correction(x) if self.renorm else None
            y, spec, p, moments = normalize(
                spec, x, gamma, beta, eps=self.epsilon, sizes=sizes, weight=weight, correct=correct, xp=xp
            )
            self._keep(spec, p, moments)
        return ops.cast(hidden(y, real), self.compute_dtype)

    def _spec(self, ndim: int, axis: int) -> NormSpec:
        kind = catalog.RENORM if self.renorm else catalog.BATCH if self.virtual_batch_size is None else catalog.GHOST
        return by_channel(kind, ndim, axis, self.bessel)

    def _correction(self, x: Any) -> Any:
        """Return renorm's correction, from the statistics before this batch."""
        # As in Keras. With epsilon inside it is never below that root, except at first if it was initialized so.
        std = ARRAYS.clip(cast_like(x, self.renorm_stddev), math.sqrt(self.epsilon), None)
        kept = {"mean": cast_like(x, self.renorm_mean), "std": std}
        if self.renorm_schedule is not None:
            r_max, d_max = self.renorm_schedule.at(ARRAYS, ops.cast(self.count, x.dtype))
            return renorm(kept, 1.0 / r_max, r_max, d_max)
        clips = self.renorm_clipping or {}
        return renorm(kept, clips.get("rmin"), clips.get("rmax"), clips.get("dmax"))

    def _keep(self, spec: NormSpec, p: NormPlan, moments: Sequence[Moments]) -> None:
        rate = rate_at(self.momentum, self.debiased, self.count, self.moving_mean.dtype)
        options: dict[str, Any] = {"eps": self.epsilon, "nonfinite": self.nonfinite}
        if not self.renorm:
            moving = {"mean": self.moving_mean, "var": self.moving_variance}
            keep(spec, p, moments, [(moving, rate)], self.count, **options)
            return
        moving = {"mean": self.moving_mean, "std": self.moving_stddev}
        correcting = {"mean": self.renorm_mean, "std": self.renorm_stddev}
        groups = [(moving, rate), (correcting, 1.0 - self.renorm_momentum)]
        before = self.moving_stddev + 0.0
        keep(spec, p, moments, groups, self.count, **options)
        variance = ops.relu(ops.square(self.moving_stddev) - self.epsilon)
        # Before the first update it is 1 as the deviation is, and a batch that was skipped leaves it so.
        same = ops.equal(self.moving_stddev, before)
        self.moving_variance.assign(ops.where(same, ops.convert_to_tensor(self.moving_variance), variance))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        schedule = self.renorm_schedule
        return {
            **super().get_config(),
            "virtual_batch_size": self.virtual_batch_size,
            "renorm_schedule": None if schedule is None else asdict(schedule),
            "debiased": self.debiased,
            "bessel": self.bessel,
            "nonfinite": self.nonfinite,
        }


def _schedule(layer: Any, given: RenormSchedule | Mapping[str, Any] | None) -> RenormSchedule | None:
    if given is None or isinstance(given, RenormSchedule):
        return given
    fields = tuple(RenormSchedule.CONSTRAINTS)
    if not isinstance(given, Mapping) or set(given) - set(fields):
        must = f"{type(layer).__name__}: `renorm_schedule` must be a RenormSchedule or a dictionary of its fields"
        raise NormTypeError(message(must, repr(given), f"fields: {', '.join(fields)}"))
    return RenormSchedule(**given)


def BatchRenormalization(  # noqa: N802
    axis: int = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    *,
    renorm_schedule: RenormSchedule | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> BatchNormalization:
    """Batch renormalization (arXiv:1702.03275): a :class:`BatchNormalization` with `renorm=True` and a schedule.

    The layer *is* a BatchNormalization: formula, training, evaluation and first values stand there. So files of weights
    can be exchanged, in which Keras calls a layer by its class.

    Shapes: input of two axes or more with C channels on `axis`, output the same; weights (C,).

    Args:
        axis, momentum, epsilon, center, scale: as there.
        renorm_schedule: default the paper's, batch norm for 5 000 steps and clips that open until step 40 000. For a
            run of T steps use `RenormSchedule.for_steps(T)`.
        **kwargs: the other arguments of :class:`BatchNormalization`; with `renorm_clipping` there is no schedule.

    Raises:
        NormValueError: as :class:`BatchNormalization`.

    >>> from normkit.core.schedule import RenormSchedule
    >>> from normkit.keras import BatchRenormalization
    >>> layer = BatchRenormalization(momentum=0.95, renorm_schedule=RenormSchedule.for_steps(1000))
    >>> tuple(layer(keras.ops.ones((8, 4)), training=True).shape)
    (8, 4)
    """
    if renorm_schedule is None and not kwargs.get("renorm_clipping"):
        renorm_schedule = RenormSchedule()
    kwargs = {"renorm": True, "renorm_schedule": renorm_schedule, **kwargs}
    return BatchNormalization(axis, momentum, epsilon, center, scale, **kwargs)


def GhostBatchNormalization(  # noqa: N802
    axis: int = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    *,
    virtual_batch_size: int = 32,
    **kwargs: Any,
) -> BatchNormalization:
    """Ghost batch normalization (arXiv:1705.08741): a :class:`BatchNormalization` with a `virtual_batch_size`.

    The layer *is* a BatchNormalization: formula, training, evaluation and first values stand there. So files of weights
    can be exchanged, in which Keras calls a layer by its class.

    Shapes: input of two axes or more with C channels on `axis`, output the same; weights (C,).

    Args:
        axis, momentum, epsilon, center, scale: as there.
        virtual_batch_size: samples in a group, at least 2.
        **kwargs: the other arguments of :class:`BatchNormalization`.

    Raises:
        NormValueError: as :class:`BatchNormalization`.

    >>> import numpy as np
    >>> from normkit.keras import GhostBatchNormalization
    >>> layer = GhostBatchNormalization(virtual_batch_size=2)
    >>> y = layer(np.array([[1.0], [3.0], [100.0], [300.0]], "float32"), training=True)
    >>> print(keras.ops.convert_to_numpy(y).round(2).ravel())
    [-1.  1. -1.  1.]
    """
    return BatchNormalization(axis, momentum, epsilon, center, scale, virtual_batch_size=virtual_batch_size, **kwargs)


@register
class LayerNormalization(keras.layers.LayerNormalization):
    """Layer normalization (arXiv:1607.06450) of each sample over `axis`, in place of `keras.layers.LayerNormalization`.

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta, with the biased variance over all of `axis`.

    Shapes: any input, output the same; gamma and beta have the lengths of `axis`, in the order of the axes. Training
    and evaluation are the same and nothing is kept. First values: gamma 1, beta 0.

    Args:
        axis: one axis or several.
        epsilon: added to the variance.
        center, scale: with beta, with gamma.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint,
            **kwargs: as in Keras. With the deprecated `rms_scaling=True` Keras' own code runs.

    Raises:
        NormValueError: for an `axis` that the input has not, or twice.

    >>> import numpy as np
    >>> from normkit.keras import LayerNormalization
    >>> y = LayerNormalization(epsilon=1e-5)(np.array([[1.0, 2.0, 3.0, 6.0]], "float32"))
    >>> print(keras.ops.convert_to_numpy(y).round(2) + 0.0)
    [[-1.07 -0.53  0.    1.6 ]]
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        checked(self, epsilon=epsilon, center=center, scale=scale)
        super().__init__(axis, epsilon, center, scale, *args, **kwargs)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        self.axis = _row_axes(self, input_shape)
        super().build(tuple(input_shape))
        self.input_spec = _lengths_at(self.axis, input_shape)

    def call(self, inputs: Any) -> Any:
        """Normalize; see the class."""
        if self.rms_scaling:
            return super().call(inputs)
        return _by_rows(self, catalog.LAYER, inputs, self.gamma, self.beta)


@register
class RMSNormalization(keras.layers.RMSNormalization):
    """Root mean square normalization (arXiv:1910.07467) over `axis`, in place of `keras.layers.RMSNormalization`.

    y = x / sqrt(mean(x^2) + epsilon) * scale: no mean, no beta. The paper adds epsilon outside the root; like nearly
    all later code we add it inside.

    Shapes: any input, output the same; scale has the lengths of `axis`, in the order of the axes. Training and
    evaluation are the same and nothing is kept. First value: scale 1. In mixed precision scale is not rounded, other
    than in Keras.

    Args:
        axis: one axis or several.
        epsilon: added to the mean square.
        **kwargs: of every layer: `name`, `dtype`, `trainable`.

    Raises:
        NormValueError: for an `axis` that the input has not, or twice.

    >>> import numpy as np
    >>> from normkit.keras import RMSNormalization
    >>> y = RMSNormalization()(np.array([[3.0, 4.0]], "float32"))  # 3 and 4 over the root of 12.5
    >>> print(keras.ops.convert_to_numpy(y).round(4))
    [[0.8485 1.1314]]
    """

    def __init__(self, axis: int | Sequence[int] = -1, epsilon: float = 1e-6, **kwargs: Any) -> None:
        checked(self, epsilon=epsilon)
        super().__init__(axis, epsilon, **kwargs)
        self.supports_masking = True  # each position is normalized alone; Keras' own drops the mask with a warning

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weight."""
        self.axis = _row_axes(self, input_shape)
        super().build(tuple(input_shape))
        self.input_spec = _lengths_at(self.axis, input_shape)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Make a weight, which is not rounded to the type of the inputs."""
        return super().add_weight(*args, **{"autocast": False, **kwargs})

    def call(self, x: Any) -> Any:
        """Normalize; see the class."""
        return _by_rows(self, catalog.RMS, x, self.scale, None)


@register
class GroupNormalization(keras.layers.GroupNormalization):
    """Group normalization (arXiv:1803.08494), in place of `keras.layers.GroupNormalization`.

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta, with the biased variance of each group of channels of each
    sample over its channels and positions.

    Shapes: input of two axes or more with samples on axis 0 and C channels on `axis`, output the same; gamma, beta
    (C,). Training and evaluation are the same and nothing is kept. A group of one value is normalized to beta. First
    values: gamma 1, beta 0. A mask, which Keras' own layer ignores, keeps padding out of the statistics.

    Args:
        groups: must divide the channels (`normkit.groups_for` finds a number that does); -1: one for each channel.
        axis: of the channels.
        epsilon: added to the variance.
        center, scale: with beta, with gamma.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint,
            **kwargs: as in Keras.

    Raises:
        NormValueError: where groups do not divide channels; for an `axis` that the input has not.

    >>> import normkit
    >>> from normkit.keras import GroupNormalization
    >>> layer = GroupNormalization(normkit.groups_for(72))
    >>> tuple(layer(keras.ops.ones((2, 4, 4, 72))).shape), layer.groups
    ((2, 4, 4, 72), 24)
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        checked(self, epsilon=epsilon, center=center, scale=scale)
        if groups != -1 and not Integer(1).allows(groups):
            must = f"{type(self).__name__}: `groups` must be a whole number of at least 1, or -1 for one per channel"
            raise NormValueError(message(must, repr(groups)))
        super().__init__(int(groups), axis, epsilon, center, scale, *args, **kwargs)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        channels: Any = input_shape[sample_axis_apart(self, input_shape)]
        if self.groups != -1:
            check_groups(self, channels)
        super().build(tuple(input_shape))

    def call(self, inputs: Any, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        return self._run(catalog.GROUP, (("g", self.groups),), inputs, mask, sample_weight)

    def _run(self, spec: NormSpec, sizes: Any, inputs: Any, mask: Any, sample_weight: Any) -> Any:
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight)
        gamma, beta = cast_like(x, self.gamma), cast_like(x, self.beta)
        placed = by_channel(spec, len(x.shape), axis)
        y, *_ = normalize(placed, x, gamma, beta, eps=self.epsilon, sizes=sizes, weight=weight)
        return ops.cast(hidden(y, real), self.compute_dtype)


@register
class InstanceNormalization(GroupNormalization):
    """Instance normalization (arXiv:1607.08022): each channel of each sample over its own positions.

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta, with the biased variance.

    Shapes: input (batch, *positions) with C channels on `axis`, output the same; gamma, beta (C,). Training and
    evaluation are the same and nothing is kept. Weights, defaults and numbers are those of Keras'
    `GroupNormalization(groups=-1)`. First values: gamma 1, beta 0.

    Args:
        axis: of the channels.
        epsilon: added to the variance.
        center, scale: with beta, with gamma.
        **kwargs: as :class:`GroupNormalization`, but `groups`.

    Raises:
        NormValueError: for an input without positions, whose channels would have a single value each; for an `axis`
            that the input has not.

    >>> import numpy as np
    >>> from normkit.keras import InstanceNormalization
    >>> images = np.random.default_rng(0).random((2, 8, 8, 3)).astype("float32")
    >>> darker = 0.2 * images + 0.1  # another contrast and brightness: the same output
    >>> one, other = (keras.ops.convert_to_numpy(InstanceNormalization(epsilon=1e-9)(x)) for x in (images, darker))
    >>> print(np.allclose(one, other, atol=1e-4))
    True
    """

    def __init__(
        self, axis: int = -1, epsilon: float = 1e-3, center: bool = True, scale: bool = True, **kwargs: Any
    ) -> None:
        if "groups" in kwargs:
            must = f"{type(self).__name__}: `groups` must not be given, each channel is one"
            raise NormValueError(message(must, repr(kwargs["groups"]), "use GroupNormalization"))
        super().__init__(-1, axis, epsilon, center, scale, **kwargs)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        if len(input_shape) == 2:
            must = f"{type(self).__name__}: the input must have positions to take statistics over"
            raise NormValueError(message(must, f"shape {tuple(input_shape)}", "use LayerNormalization"))
        super().build(input_shape)

    def call(self, inputs: Any, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        return self._run(catalog.INSTANCE, (), inputs, mask, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {name: value for name, value in super().get_config().items() if name != "groups"}


def _row_axes(layer: Any, shape: Sequence[Any]) -> Any:
    """Return the axes in Keras' order, counted from the front where some are counted from the front and some are not.

    Keras sorts them as they are, which puts -1 before 1 and gamma in another order than the axes of the input.
    """
    given = layer.axis if isinstance(layer.axis, Sequence) else [layer.axis]
    found = [axis_of(layer, axis, shape) for axis in given]
    if len(set(found)) < len(found) or not found:
        must = f"{type(layer).__name__}: `axis` must name one axis or several, each once"
        raise NormValueError(message(must, f"{layer.axis} for an input of shape {tuple(shape)}"))
    return sorted(found) if min(given) < 0 <= max(given) else layer.axis


def _lengths_at(axes: Any, shape: Sequence[Any]) -> Any:
    return keras.layers.InputSpec(axes={axis: shape[axis] for axis in axes})


def _by_rows(layer: Any, spec: NormSpec, inputs: Any, gamma: Any, beta: Any) -> Any:
    x = widened(layer, inputs)
    axes = tuple(sorted(axis % len(x.shape) for axis in layer.axis))
    placed = by_rows(spec, len(x.shape), axes)
    y, *_ = normalize(placed, x, cast_like(x, gamma), cast_like(x, beta), eps=layer.epsilon)
    return ops.cast(y, layer.compute_dtype)
