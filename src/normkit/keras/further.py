"""Normalizers that Keras has not: with an activation, without statistics, of responses.

As in :mod:`normkit.keras.layers`: computed in float32 or wider, `mask` and `sample_weight` where statistics are taken
over samples or positions, no mathematics in a layer. All weights stay unrounded in mixed precision. None of them has a
counterpart in Keras, so `as_plain` refuses them, and a file needs `import normkit.keras` wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from normkit.core import activated, catalog
from normkit.core.plan import plan
from normkit.errors import NormValueError, message
from normkit.keras._arrays import ARRAYS, wide
from normkit.keras._execute import by_channel, countable, hidden, keep, normalize, rate_at
from normkit.keras._layer import (
    axis_of,
    cast_like,
    check_debiased,
    check_groups,
    checked,
    register,
    sample_axis_apart,
    weighted_input,
    widened,
)

__all__ = ["DynamicTanh", "EvoNormB0", "EvoNormS0", "FilterResponseNormalization", "GlobalResponseNormalization"]


class _ByChannel(keras.layers.Layer):
    """A layer with weights of one value per channel, each with an initializer, a regularizer and a constraint."""

    FIRST: ClassVar[Mapping[str, str]]  # name of each weight and its first values

    def __init__(self, axis: int, **kwargs: Any) -> None:
        self._rules: dict[str, dict[str, Any]] = {
            name: {
                "initializer": keras.initializers.get(kwargs.pop(f"{name}_initializer", first)),
                "regularizer": keras.regularizers.get(kwargs.pop(f"{name}_regularizer", None)),
                "constraint": keras.constraints.get(kwargs.pop(f"{name}_constraint", None)),
            }
            for name, first in self.FIRST.items()
        }
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build_weights(self, shape: Sequence[Any], ndim: int | None) -> None:
        """Make the weights for an input of this shape; later ones must have `ndim` axes, where it is given."""
        channels = shape[self.axis]
        self.input_spec = keras.layers.InputSpec(ndim=ndim, axes={self.axis: channels})
        for name, rules in self._rules.items():
            weight = self.add_weight(name=name, shape=(channels,), autocast=False, **rules)
            setattr(self, name, weight)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        serialized = {
            f"{name}_{kind}": getattr(keras, f"{kind}s").serialize(rule)
            for name, rules in self._rules.items()
            for kind, rule in rules.items()
        }
        return {**super().get_config(), "axis": self.axis, **serialized}


def _refuse_single_values(layer: Any, shape: Sequence[Any], hint: str) -> None:
    must = f"{type(layer).__name__}: the input must have positions to take statistics over"
    raise NormValueError(message(must, f"shape {tuple(shape)}", hint))


@register
class FilterResponseNormalization(_ByChannel):
    """Filter response normalization with its thresholded linear unit (arXiv:1911.09737).

    y = max(x / sqrt(mean(x^2) + epsilon) * gamma + beta, tau), with the mean over the positions of each channel of each
    sample. Norm and activation in one: no further activation belongs behind it. The mean is not subtracted.

    Shapes: input (batch, *positions) with C channels on `axis`, output the same; gamma, beta, tau (C,). Training and
    evaluation are the same and nothing is kept. First values: gamma 1, beta 0, tau 0. Masked positions are left out of
    the mean and 0 in the output. The paper warms its learning rate up.

    Args:
        axis: of the channels.
        epsilon: added to the mean square.
        learn_epsilon: add |e| as well, with a trained number e for the layer, first 1e-4. The paper does so where
            channels have a single position, whose normalized value is otherwise its sign. `epsilon` stays below it, so
            that a channel of zeros is not divided by zero.
        **kwargs: gamma_initializer, gamma_regularizer, gamma_constraint, and the same of beta and tau; `name`, `dtype`
            and `trainable` as in every layer.

    Raises:
        NormValueError: for an input without positions, unless `learn_epsilon`; for an `axis` that the input has not.

    >>> import numpy as np
    >>> from normkit.keras import FilterResponseNormalization
    >>> x = np.array([[[3.0], [-1.0], [1.0], [-5.0]]], "float32")  # the mean square is 9
    >>> print(keras.ops.convert_to_numpy(FilterResponseNormalization()(x)).round(2).ravel())
    [1.   0.   0.33 0.  ]
    """

    FIRST: ClassVar = {"gamma": "ones", "beta": "zeros", "tau": "zeros"}
    gamma: Any
    beta: Any
    tau: Any

    def __init__(self, axis: int = -1, epsilon: float = 1e-6, *, learn_epsilon: bool = False, **kwargs: Any) -> None:
        checked(self, epsilon=epsilon, learn_epsilon=learn_epsilon)
        super().__init__(axis, **kwargs)
        self.epsilon = epsilon
        self.learn_epsilon = learn_epsilon
        self.learned_epsilon: Any = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        sample_axis_apart(self, input_shape)
        if len(input_shape) == 2 and not self.learn_epsilon:
            _refuse_single_values(self, input_shape, "learn_epsilon=True, as in the paper")
        self.build_weights(input_shape, len(input_shape))
        if self.learn_epsilon:
            first = keras.initializers.Constant(1e-4)
            self.learned_epsilon = self.add_weight(name="learned_epsilon", shape=(), initializer=first, autocast=False)

    def call(self, inputs: Any, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight)
        eps: Any = self.epsilon
        if self.learned_epsilon is not None:
            eps = eps + ops.abs(cast_like(x, self.learned_epsilon))
        gamma, beta, tau = (cast_like(x, weight) for weight in (self.gamma, self.beta, self.tau))
        spec = by_channel(catalog.FRN, len(x.shape), axis)
        y, _, p, _ = normalize(spec, x, gamma, beta, eps=eps, weight=weight)
        return ops.cast(hidden(activated.thresholded(ARRAYS, p, y, tau), real), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "epsilon": self.epsilon, "learn_epsilon": self.learn_epsilon}


@register
class EvoNormB0(_ByChannel):
    """EvoNorm-B0 (arXiv:2004.02967), which stands for batch norm and activation together.

    y = x / max(sqrt(var_batch + epsilon), v * x + sqrt(var_instance + epsilon)) * gamma + beta, with the biased
    variances of a channel over the batch and its positions, and over the positions of the sample.

    Shapes: input (batch, *positions) with C channels on `axis`, output the same; gamma, beta, v, moving_variance (C,),
    the last in float32 or wider. First values: gamma, v and moving_variance 1, beta 0.

    Training (`training=True` and `trainable`): the variance of the batch; then
    `moving = momentum * moving + (1 - momentum) * batch`. Evaluation: the moving variance, and the instance's own.
    Masked positions are left out of both and 0 in the output.

    Args:
        axis: of the channels.
        momentum: weight of the old value; None averages all batches equally.
        epsilon: added to the variances.
        debiased, bessel, nonfinite: as of :class:`normkit.keras.BatchNormalization`.
        **kwargs: gamma_initializer, gamma_regularizer, gamma_constraint, and the same of beta and v; `name`, `dtype`
            and `trainable` as in every layer.

    `momentum=None` and `debiased` count the updates in one more weight, `count`.

    Raises:
        NormValueError: for an input without positions, whose instances have no variance; for an `axis` that the input
            has not.

    >>> import numpy as np
    >>> from normkit.keras import EvoNormB0
    >>> layer = EvoNormB0(momentum=0.5)
    >>> x = np.array([[[1.0], [-1.0]], [[3.0], [-3.0]]], "float32")  # variances 5, and 1 and 9 of the samples
    >>> print(keras.ops.convert_to_numpy(layer(x, training=True)).round(2).ravel())
    [ 0.45 -0.45  0.5  -1.34]
    >>> print(keras.ops.convert_to_numpy(layer.moving_variance))
    [3.]
    """

    FIRST: ClassVar = {"gamma": "ones", "beta": "zeros", "v": "ones"}
    gamma: Any
    beta: Any
    v: Any

    def __init__(
        self,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        *,
        debiased: bool = False,
        bessel: bool = False,
        nonfinite: str = "skip",
        **kwargs: Any,
    ) -> None:
        checked(self, momentum=momentum, epsilon=epsilon, debiased=debiased, bessel=bessel, nonfinite=nonfinite)
        check_debiased(self, momentum, debiased)
        super().__init__(axis, **kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.debiased = debiased
        self.bessel = bessel
        self.nonfinite = nonfinite
        self.moving_variance: Any = None
        self.count: Any = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        axis = sample_axis_apart(self, input_shape)
        if len(input_shape) == 2:
            _refuse_single_values(self, input_shape, "use EvoNormS0, which has groups of channels")
        self.build_weights(input_shape, len(input_shape))
        kept = {"trainable": False, "autocast": False}
        self.moving_variance = self.add_weight(
            name="moving_variance",
            shape=(input_shape[axis],),
            initializer="ones",
            dtype=wide(self.variable_dtype),
            **kept,
        )
        if self.momentum is None or self.debiased:
            self.count = self.add_weight(name="count", shape=(), initializer="zeros", dtype="int32", **kept)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight)
        spec = by_channel(catalog.EVONORM_B0, len(x.shape), axis, self.bessel)
        p, instance = plan(spec, len(x.shape)), plan(by_channel(catalog.INSTANCE, len(x.shape), axis), len(x.shape))
        v, gamma, beta = (cast_like(x, weight) for weight in (self.v, self.gamma, self.beta))
        learning = training and self.trainable
        y, moments = activated.evonorm_b0(
            ARRAYS,
            spec,
            p,
            instance,
            x,
            v,
            gamma,
            beta,
            eps=self.epsilon,
            weight=countable(p, x, weight),
            kept=None if learning else {"var": cast_like(x, self.moving_variance)},
        )
        if moments is not None:
            rate = rate_at(self.momentum, self.debiased, self.count, self.moving_variance.dtype)
            moving = [({"var": self.moving_variance}, rate)]
            keep(spec, p, [moments], moving, self.count, eps=self.epsilon, nonfinite=self.nonfinite)
        return ops.cast(hidden(y, real), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        names = ("momentum", "epsilon", "debiased", "bessel", "nonfinite")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@register
class EvoNormS0(_ByChannel):
    """EvoNorm-S0 (arXiv:2004.02967), which stands for group norm and activation together.

    y = x * sigmoid(v * x) / sqrt(var + epsilon) * gamma + beta, with the biased variance of each group of channels of
    each sample over its channels and positions.

    Shapes: input of two axes or more with samples on axis 0 and C channels on `axis`, output the same; gamma, beta, v
    (C,). Training and evaluation are the same and nothing is kept. First values: gamma and v 1, beta 0. Masked
    positions are left out of the variance and 0 in the output.

    Args:
        groups: must divide the channels (`normkit.groups_for` finds a number that does).
        axis: of the channels.
        epsilon: added to the variance.
        **kwargs: gamma_initializer, gamma_regularizer, gamma_constraint, and the same of beta and v; `name`, `dtype`
            and `trainable` as in every layer.

    Raises:
        NormValueError: where groups do not divide channels, or are single values; for an `axis` that the input has not.

    >>> import numpy as np
    >>> from normkit.keras import EvoNormS0
    >>> y = EvoNormS0(groups=1)(np.array([[2.0, -2.0]], "float32"))
    >>> print(keras.ops.convert_to_numpy(y).round(2))
    [[ 0.88 -0.12]]
    """

    FIRST: ClassVar = {"gamma": "ones", "beta": "zeros", "v": "ones"}
    gamma: Any
    beta: Any
    v: Any

    def __init__(self, groups: int = 32, axis: int = -1, epsilon: float = 1e-5, **kwargs: Any) -> None:
        checked(self, groups=groups, epsilon=epsilon)
        super().__init__(axis, **kwargs)
        self.groups = int(groups)
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        axis = sample_axis_apart(self, input_shape)
        channels: Any = input_shape[axis]
        check_groups(self, channels)
        if len(input_shape) == 2 and channels == self.groups:
            _refuse_single_values(self, input_shape, "use fewer groups")
        self.build_weights(input_shape, len(input_shape))

    def call(self, inputs: Any, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight)
        spec = by_channel(catalog.EVONORM_S0, len(x.shape), axis)
        p = plan(spec, len(x.shape), (("g", self.groups),))
        v, gamma, beta = (cast_like(x, weight) for weight in (self.v, self.gamma, self.beta))
        weight = countable(p, x, weight)
        y = activated.evonorm_s0(ARRAYS, spec, p, x, v, gamma, beta, eps=self.epsilon, weight=weight)
        return ops.cast(hidden(y, real), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "groups": self.groups, "epsilon": self.epsilon}


@register
class DynamicTanh(_ByChannel):
    """Dynamic tanh (arXiv:2503.10622), in the place of layer norm and without statistics.

    y = gamma * tanh(alpha * x) + beta.

    Shapes: any input with C channels on `axis`, output the same; gamma and beta (C,), alpha one number. Training and
    evaluation are the same and nothing is kept. First values: alpha 0.5, gamma 1, beta 0. The paper's language models
    start with a larger alpha in attention than elsewhere, and with smaller ones the wider they are.

    Args:
        axis: of the channels.
        alpha: its first value.
        **kwargs: gamma_initializer, gamma_regularizer, gamma_constraint, and the same of beta; `name`, `dtype` and
            `trainable` as in every layer.

    Raises:
        NormValueError: for an `axis` that the input has not.

    >>> import numpy as np
    >>> from normkit.keras import DynamicTanh
    >>> print(keras.ops.convert_to_numpy(DynamicTanh()(np.array([[-9.0, 0.0, 1.0]], "float32"))).round(2))
    [[-1.    0.    0.46]]
    """

    FIRST: ClassVar = {"gamma": "ones", "beta": "zeros"}
    gamma: Any
    beta: Any

    def __init__(self, axis: int = -1, alpha: float = 0.5, **kwargs: Any) -> None:
        checked(self, alpha=alpha)
        super().__init__(axis, **kwargs)
        self._first_alpha = alpha
        self.alpha: Any = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        axis_of(self, self.axis, input_shape)
        self.build_weights(input_shape, None)
        first = keras.initializers.Constant(self._first_alpha)
        self.alpha = self.add_weight(name="alpha", shape=(), initializer=first, autocast=False)

    def call(self, inputs: Any) -> Any:
        """Compute; see the class."""
        x = widened(self, inputs)
        shape = [1] * len(x.shape)
        shape[self.axis] = -1
        gamma, beta = (ops.reshape(cast_like(x, weight), shape) for weight in (self.gamma, self.beta))
        y = activated.dynamic_tanh(ARRAYS, x, cast_like(x, self.alpha), gamma, beta)
        return ops.cast(y, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "alpha": self._first_alpha}


@register
class GlobalResponseNormalization(_ByChannel):
    """Global response normalization of ConvNeXt V2 (arXiv:2301.00808), behind the activation of its MLP.

    y = gamma * (x * g / (mean(g) + epsilon)) + beta + x, with g = sqrt(sum(x^2)) over the positions of each channel of
    each sample, and its mean over the channels: channels compete, and the input is added. A channel of zeros has the
    response 0, with a slope of 0.

    Shapes: input (batch, *positions) with C channels on `axis`, output the same; gamma and beta (C,). Training and
    evaluation are the same and nothing is kept. First values: gamma and beta 0, so that it begins as the identity.
    Masked positions are left out of the sum and 0 in the output.

    Args:
        axis: of the channels.
        epsilon: added to the mean of the responses.
        **kwargs: gamma_initializer, gamma_regularizer, gamma_constraint, and the same of beta; `name`, `dtype` and
            `trainable` as in every layer.

    Raises:
        NormValueError: for an `axis` that the input has not.

    >>> import numpy as np
    >>> from normkit.keras import GlobalResponseNormalization
    >>> x = np.array([[[3.0, 0.0], [4.0, 1.0]]], "float32")  # responses 5 and 1, their mean 3
    >>> print(keras.ops.convert_to_numpy(GlobalResponseNormalization(gamma_initializer="ones")(x)).round(2)[0])
    [[ 8.    0.  ]
     [10.67  1.33]]
    """

    FIRST: ClassVar = {"gamma": "zeros", "beta": "zeros"}
    gamma: Any
    beta: Any

    def __init__(self, axis: int = -1, epsilon: float = 1e-6, **kwargs: Any) -> None:
        checked(self, epsilon=epsilon)
        super().__init__(axis, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        sample_axis_apart(self, input_shape)
        self.build_weights(input_shape, len(input_shape))

    def call(self, inputs: Any, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize; see the class."""
        x, real, weight, axis = weighted_input(self, inputs, mask, sample_weight)
        p = plan(by_channel(catalog.GLOBAL_RESPONSE, len(x.shape), axis), len(x.shape))
        gamma, beta = (cast_like(x, weight) for weight in (self.gamma, self.beta))
        y = activated.global_response(ARRAYS, p, x, gamma, beta, eps=self.epsilon, channel=axis, weight=weight)
        return ops.cast(hidden(y, real), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "epsilon": self.epsilon}
