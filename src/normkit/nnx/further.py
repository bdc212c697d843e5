"""Normalizers that Flax has not: with an activation, without statistics, of responses.

As in :mod:`normkit.nnx.layers`: computed in float32 or wider, boolean `mask` and `sample_weight` where statistics are
taken over samples or positions, no mathematics in a layer. The channels are on any `axis` but the first. Filter
response norm and EvoNorm are activations as well: nothing belongs behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from normkit.core import activated, catalog, formula
from normkit.core.algebra import groups_for
from normkit.core.axes import Sizes
from normkit.core.constraints import check
from normkit.core.plan import NormPlan
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message
from normkit.nnx import _execute
from normkit.nnx.layers import _CONSTRAINTS, _constructor, _Tracking

__all__ = ["DynamicTanh", "EvoNormB0", "EvoNormS0", "FilterResponseNorm", "GlobalResponseNorm"]

_FIRST_LEARNED_EPSILON = 1e-4  # as in the code of the paper


class _Further(nnx.Module):
    """Parameters of one value per channel with the first values of the catalog, and the way to the formula."""

    _spec: ClassVar[NormSpec]
    num_features: int
    axis: int

    def _setup(self, num_features: int, axis: int, dtype: Any, param_dtype: Any, **checked: Any) -> None:
        check(type(self).__name__, _CONSTRAINTS, {"num_features": num_features, **checked})
        self.num_features = num_features
        self.axis = axis
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = dtypes.promote_dtype
        self.scale = nnx.Param(jnp.full((num_features,), self._spec.first_gain, param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_features,), param_dtype))
        for name, first in self._spec.others:
            setattr(self, name, nnx.Param(jnp.full(() if name == "alpha" else (num_features,), first, param_dtype)))

    def _features(self, x: Any) -> int:
        """The axis of the channels. Raises where the input has not so many, or where it is that of the samples."""
        owner = type(self).__name__
        (axis,) = features = _execute.canonical(owner, "axis", self.axis, x.ndim)
        _execute.check_features(owner, x, features, self.num_features)
        if axis == 0 and self._spec.over:
            raise NormValueError(message(f"{owner}: the samples must be on axis 0", f"the features, axis={self.axis}"))
        return axis

    def _placed(self, ndim: int, axis: int, over: tuple[int, ...], sizes: Sizes = ()) -> tuple[NormSpec, NormPlan]:
        return _execute.placed(self._spec, ndim, over, (axis,), axis if sizes else None, sizes)


def _positions(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(1, ndim) if i != axis)


class FilterResponseNorm(_Further):
    """Filter response normalization with its thresholded linear unit (arXiv:1911.09737).

    y = max(x / sqrt(mean(x^2) + epsilon) * scale + bias, tau), with the mean over the positions of each channel of each
    sample. Norm and activation in one: no further activation belongs behind it. The mean is not subtracted.

    Shapes: input (N, *S, C), or the channels on another `axis`, output the same; scale, bias, tau (C,). Training and
    evaluation are the same. First values: scale 1, bias 0, tau 0. The paper warms its learning rate up.

    Args:
        num_features: number of channels C.
        axis: of the channels.
        epsilon: added to the mean square.
        learn_epsilon: add |e| as well, with a trained number e for the layer, first 1e-4. The paper does so where
            channels have a single position, whose normalized value is otherwise its sign. `epsilon` stays below it.
        dtype: of the result; None: that of input and parameters together.
        param_dtype: of the parameters.
        rngs: taken like those of every layer; nothing is drawn.

    Raises:
        NormValueError: for an input without positions, unless `learn_epsilon`; for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> x = jnp.array([[[3.0], [-1.0], [1.0], [-5.0]]])  # the mean square is 9
    >>> print(np.asarray(FilterResponseNorm(1)(x)).round(2).ravel())
    [1.   0.   0.33 0.  ]
    """

    _spec = catalog.FRN
    tau: Any

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        epsilon: float = 1e-6,
        learn_epsilon: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        self._setup(num_features, axis, dtype, param_dtype, epsilon=epsilon, learn_epsilon=learn_epsilon)
        self.epsilon = epsilon
        first = jnp.full((), _FIRST_LEARNED_EPSILON, param_dtype)
        self.learned_epsilon = nnx.Param(first) if learn_epsilon else nnx.data(None)

    def __call__(self, x: Any, *, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        x = _execute.array(owner, x)
        axis = self._features(x)
        over = _positions(x.ndim, axis)
        if not over and self.learned_epsilon is None:
            must = f"{owner}: the input must have positions to take statistics over"
            raise NormValueError(message(must, f"shape {x.shape}", "learn_epsilon=True, as in the paper"))
        spec, p = self._placed(x.ndim, axis, over)
        x, scale, bias, result = _execute.promoted(self, x)
        x, real, weight = _execute.prepare(owner, x, (axis,), mask, sample_weight, short=True)
        eps: Any = self.epsilon
        if self.learned_epsilon is not None:
            eps = eps + jnp.abs(self.learned_epsilon[...]).astype(x.dtype)
        y, _ = formula.normalize(jnp, spec, p, x, scale, bias, eps=eps, weight=weight)
        return _execute.finish(activated.thresholded(jnp, p, y, self.tau[...].astype(x.dtype)), real, result)


class EvoNormB0(_Tracking, nnx.Module):
    """EvoNorm-B0 (arXiv:2004.02967), which stands for batch norm and activation together.

    y = x / max(sqrt(var_batch + epsilon), v * x + sqrt(var_instance + epsilon)) * scale + bias, with the biased
    variances of a channel over the batch and its positions, and over the positions of the sample.

    Shapes: input (N, *S, C) with at least one axis of positions, or the channels on another `axis`, output the same;
    scale, bias, v and var (C,), var in float32. First values: scale, v and var 1, bias 0.

    Training (`use_running_average=False`): the variance of the batch, over several devices that of all of them; then
    `var = momentum * var + (1 - momentum) * batch`. Evaluation: the kept variance, and the instance's own.

    Args:
        num_features: number of channels C.
        bessel, nonfinite, debiased: as of :class:`normkit.nnx.BatchNorm`.
        arguments: those of Flax' batch norm; momentum may be None.

    Raises:
        NormValueError: for an input without positions, whose instances have no variance; for inputs that do not fit.
        NormRuntimeError: as batch norm.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> layer = EvoNormB0(1, momentum=0.5, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[[1.0], [-1.0]], [[3.0], [-3.0]]])  # variances 5, and 1 and 9 of the samples
    >>> print(np.asarray(layer(x)).round(2).ravel(), layer.var[...])
    [ 0.45 -0.45  0.5  -1.34] [3.]
    """

    _spec = catalog.EVONORM_B0

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
        construct: Any = nnx.BatchNorm.__init__
        construct(self, num_features, **arguments)  # everything of Flax' batch norm, which it is not, but for:
        del self.mean
        self.v = nnx.Param(jnp.ones((num_features,), self.param_dtype))
        self.bessel = bessel
        self.nonfinite = nonfinite
        self.debiased = debiased
        self._add_count(debiased or self.momentum is None)

    set_view = nnx.BatchNorm.set_view
    mean: Any
    param_dtype: Any

    def _evaluated(
        self, spec: NormSpec, p: NormPlan, x: Any, kept: Mapping[str, Any], scale: Any, bias: Any, weight: Any
    ) -> Any:
        return self._divided(jnp, spec, p, x, scale, bias, weight, kept)[0]

    def _trained(
        self, xp: Any, spec: NormSpec, p: NormPlan, x: Any, scale: Any, bias: Any, weight: Any, correct: Any
    ) -> tuple[Any, list[formula.Moments]]:
        del correct
        y, moments = self._divided(xp, spec, p, x, scale, bias, weight, None)
        return y, [moments]

    def _divided(
        self, xp: Any, spec: NormSpec, p: NormPlan, x: Any, scale: Any, bias: Any, weight: Any, kept: Any
    ) -> Any:
        axis = self.axis % x.ndim
        over = _positions(x.ndim, axis)
        if not over or axis == 0:
            must = f"{type(self).__name__}: the input must have positions, over which each instance has a variance"
            raise NormValueError(message(must, f"shape {x.shape}", "use EvoNormS0, which has groups of channels"))
        _, instance = _execute.placed(catalog.INSTANCE, x.ndim, over, (axis,), None, ())
        v = self.v[...].astype(x.dtype)
        return activated.evonorm_b0(
            jnp, spec, p, instance, x, v, scale, bias, eps=self.epsilon, weight=weight, kept=kept, together=xp
        )


class EvoNormS0(_Further):
    """EvoNorm-S0 (arXiv:2004.02967), which stands for group norm and activation together.

    y = x * sigmoid(v * x) / sqrt(var + epsilon) * scale + bias, with the biased variance of each group of channels of
    each sample over its channels and positions.

    Shapes: input (N, *S, C), or the channels on another `axis`, output the same; scale, bias, v (C,). Training and
    evaluation are the same. First values: scale and v 1, bias 0.

    Args:
        num_features: number of channels C.
        groups: must divide the channels.
        axis: of the channels.
        epsilon: added to the variance.
        dtype, param_dtype, rngs: as of :class:`FilterResponseNorm`.

    Raises:
        NormValueError: where groups do not divide channels; for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> print(np.asarray(EvoNormS0(2, groups=1)(jnp.array([[2.0, -2.0]]))).round(2))
    [[ 0.88 -0.12]]
    """

    _spec = catalog.EVONORM_S0
    v: Any

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        *,
        axis: int = -1,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        self._setup(num_features, axis, dtype, param_dtype, epsilon=epsilon, groups=groups)
        if num_features % groups:
            hint = f"use {groups_for(num_features, groups)} or normkit.groups_for({num_features})"
            must = f"{type(self).__name__}: `num_features` must be divisible by `groups`"
            raise NormValueError(message(must, f"{num_features} and {groups}", hint))
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: Any, *, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        x = _execute.array(owner, x)
        axis = self._features(x)
        spec, p = self._placed(x.ndim, axis, (*_positions(x.ndim, axis), axis), (("g", self.groups),))
        x, scale, bias, result = _execute.promoted(self, x)
        x, real, weight = _execute.prepare(owner, x, (axis,), mask, sample_weight, short=True)
        v = self.v[...].astype(x.dtype)
        y = activated.evonorm_s0(jnp, spec, p, x, v, scale, bias, eps=self.epsilon, weight=weight)
        return _execute.finish(y, real, result)


class DynamicTanh(_Further):
    """Dynamic tanh (arXiv:2503.10622), in the place of layer norm and without statistics.

    y = scale * tanh(alpha * x) + bias.

    Shapes: any input with C channels on `axis`, output the same; scale and bias (C,), alpha one number. Training and
    evaluation are the same. First values: alpha 0.5, scale 1, bias 0.

    Args:
        num_features: number of channels C.
        axis: of the channels.
        alpha_init_value: first value of alpha.
        dtype, param_dtype, rngs: as of :class:`FilterResponseNorm`.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> print(np.asarray(DynamicTanh(3)(jnp.array([[-9.0, 0.0, 1.0]]))).round(2))
    [[-1.    0.    0.46]]
    """

    _spec = catalog.DYNAMIC_TANH
    alpha: Any

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        alpha_init_value: float = 0.5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        self._setup(num_features, axis, dtype, param_dtype, alpha_init_value=alpha_init_value)
        self.alpha = nnx.Param(jnp.full((), alpha_init_value, param_dtype))

    def __call__(self, x: Any) -> Any:
        """Compute; see the class."""
        x = _execute.array(type(self).__name__, x)
        axis = self._features(x)
        x, scale, bias, result = _execute.promoted(self, x)
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        y = activated.dynamic_tanh(jnp, x, self.alpha[...].astype(x.dtype), scale.reshape(shape), bias.reshape(shape))
        return _execute.finish(y, None, result)


class GlobalResponseNorm(_Further):
    """Global response normalization of ConvNeXt V2 (arXiv:2301.00808), behind the activation of its MLP.

    y = scale * (x * g / (mean(g) + epsilon)) + bias + x, with g = sqrt(sum(x^2)) over the positions of each channel of
    each sample, and its mean over the channels: channels compete, and the input is added. A channel of zeros has the
    response 0, with a slope of 0.

    Shapes: input (N, *S, C), or the channels on another `axis`, output the same; scale and bias (C,). Training and
    evaluation are the same. First values: scale and bias 0, so that it begins as the identity.

    Args:
        num_features: number of channels C.
        axis: of the channels.
        epsilon: added to the mean of the responses.
        dtype, param_dtype, rngs: as of :class:`FilterResponseNorm`.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> layer = GlobalResponseNorm(2)
    >>> layer.scale[...] = jnp.ones(2)
    >>> x = jnp.array([[[3.0, 0.0], [4.0, 1.0]]])  # responses 5 and 1, their mean 3
    >>> print(np.asarray(layer(x)).round(2)[0])
    [[ 8.    0.  ]
     [10.67  1.33]]
    """

    _spec = catalog.GLOBAL_RESPONSE

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        self._setup(num_features, axis, dtype, param_dtype, epsilon=epsilon)
        self.epsilon = epsilon

    def __call__(self, x: Any, *, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        owner = type(self).__name__
        x = _execute.array(owner, x)
        axis = self._features(x)
        _, p = self._placed(x.ndim, axis, _positions(x.ndim, axis))
        x, scale, bias, result = _execute.promoted(self, x)
        x, real, weight = _execute.prepare(owner, x, (axis,), mask, sample_weight, short=True)
        y = activated.global_response(jnp, p, x, scale, bias, eps=self.epsilon, channel=axis, weight=weight)
        return _execute.finish(y, real, result)
