"""LSTM cells with normalization inside, for `keras.layers.RNN(cell)`, on TensorFlow, JAX and PyTorch.

Both are `keras.layers.LSTMCell` with its arguments, kernels, gate order and dropout, and with gains of their own. Norms
are computed in float32 or wider. Keras has no counterpart, so `as_plain` refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import backend, ops

from normkit.core import catalog, formula, recurrent
from normkit.errors import NormRuntimeError, NormValueError, message
from normkit.keras._arrays import ARRAYS, wide
from normkit.keras._execute import by_channel, by_rows, normalize, observed, rate_at
from normkit.keras._layer import cast_like, check_debiased, checked, register

__all__ = ["BatchNormLSTMCell", "LayerNormLSTMCell"]

_KINDS = ("input", "recurrent", "cell")  # what is normalized: W_x x, W_h h and c


class _NormLSTMCell(keras.layers.LSTMCell):
    """An LSTM cell that normalizes W_x x, W_h h and, on the way to the output, c."""

    epsilon: float

    def _build_gains(self, input_shape: Sequence[int | None], first: float) -> None:
        super().build(input_shape)
        initializer = keras.initializers.Constant(first)
        for kind, width in zip(_KINDS, self._widths(), strict=True):
            gamma = self.add_weight(name=f"{kind}_gamma", shape=(width,), initializer=initializer, autocast=False)
            setattr(self, f"{kind}_gamma", gamma)
        self.cell_beta = self.add_weight(name="cell_beta", shape=(self.units,), initializer="zeros", autocast=False)

    def _widths(self) -> tuple[int, int, int]:
        return 4 * self.units, 4 * self.units, self.units

    def _step(self, inputs: Any, h: Any, c: Any, dropping: bool, norm: Any) -> tuple[Any, Any]:
        """Return the new (h, c), where `norm` is called with a kind, an input in the wide type, gamma and beta."""

        def normed(kind: str, x: Any) -> Any:
            x = ops.cast(x, wide(backend.standardize_dtype(x.dtype)))
            gamma, beta = getattr(self, f"{kind}_gamma"), self.cell_beta if kind == "cell" else None
            return ops.cast(norm(kind, x, cast_like(x, gamma), cast_like(x, beta)), self.compute_dtype)

        # Masks of Keras' dropout, the same for all steps: one, or one for each gate.
        kept = super().get_dropout_mask(inputs) if dropping and 0.0 < self.dropout < 1.0 else None
        kept_h = super().get_recurrent_dropout_mask(h) if dropping and 0.0 < self.recurrent_dropout < 1.0 else None
        z = normed("input", _product(inputs, self.kernel, kept))
        z = z + normed("recurrent", _product(h, self.recurrent_kernel, kept_h))
        return recurrent.lstm_step(
            ops.split(z if self.bias is None else z + self.bias, 4, axis=1),
            c,
            activation=self.activation,
            recurrent_activation=self.recurrent_activation,
            norm=lambda c: normed("cell", c),
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this cell again."""
        return {**super().get_config(), "epsilon": self.epsilon}


def _product(x: Any, kernel: Any, kept: Any) -> Any:
    if not isinstance(kept, list):
        return ops.matmul(x if kept is None else x * kept, kernel)
    parts = zip(kept, ops.split(kernel, len(kept), axis=1), strict=True)
    return ops.concatenate([ops.matmul(x * mask, part) for mask, part in parts], axis=1)


@register
class LayerNormLSTMCell(_NormLSTMCell):
    """An LSTM cell with layer normalization (arXiv:1607.06450), for `keras.layers.RNN(cell)`.

    (i, f, g, o) = LN(W_x x) + LN(W_h h) + b
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(LN(c'))

    LN is over all 4 * units values of a sample, and over the units of c'. Each has a gain; that of c' has a bias too,
    and b is the bias of the others.

    Shapes: input (batch, features), states h and c (batch, units), output h'. Weights as `keras.layers.LSTMCell`, then
    input_gamma, recurrent_gamma (4 * units,), cell_gamma, cell_beta (units,). Training differs from evaluation by
    dropout only. First values: gains 1, cell_beta 0, the others as in Keras, with 1 for the forget gate.

    Args:
        units: of the output.
        epsilon: added to the variances.
        **kwargs: of `keras.layers.LSTMCell`: activation, recurrent_activation, use_bias, kernel_initializer,
            recurrent_initializer, bias_initializer, unit_forget_bias, regularizers, constraints, dropout,
            recurrent_dropout, seed.

    Raises:
        NormValueError, NormTypeError: for arguments out of range.

    >>> from normkit.keras import LayerNormLSTMCell
    >>> layer = keras.layers.RNN(LayerNormLSTMCell(3), return_sequences=True)
    >>> tuple(layer(keras.ops.ones((2, 5, 4))).shape)
    (2, 5, 3)
    """

    def __init__(self, units: int, *args: Any, epsilon: float = 1e-5, **kwargs: Any) -> None:
        checked(self, units=units, epsilon=epsilon)
        super().__init__(units, *args, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        self._build_gains(input_shape, 1.0)

    def call(self, inputs: Any, states: Sequence[Any], training: bool = False) -> tuple[Any, list[Any]]:
        """Make one step; see the class."""

        def norm(_: str, x: Any, gamma: Any, beta: Any) -> Any:
            return normalize(by_rows(catalog.LAYER, 2, (1,)), x, gamma, beta, eps=self.epsilon)[0]

        h, c = self._step(inputs, *states, training, norm)
        return h, [h, c]


_SPEC = by_channel(catalog.BATCH, 2, 1)
# The step is a state and so in the compute dtype, where bfloat16 counts to 256 only: two digits count to 65536.
_BASE = 256


@register
class BatchNormLSTMCell(_NormLSTMCell):
    """An LSTM cell with batch normalization (arXiv:1603.09025), for `keras.layers.RNN(cell)`.

    (i, f, g, o) = BN(W_x x) + BN(W_h h) + b
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(BN(c'))

    The recurrence of c itself is not normalized. Each BN has a gain; that of c' has a bias too, and b is the bias of
    the others.

    Training (`training=True` and `trainable`): mean and biased variance of the batch, at each time step its own. Each
    of the first `max_steps` steps then has a row of moving statistics: `moving = momentum * moving + (1 - momentum) *
    batch`. Later steps are normalized by their batch and not kept. Evaluation: the moving statistics of the step, after
    `max_steps` those of the last.

    Shapes: input (batch, features), output h' (batch, units). States h, c (batch, units) and the number of steps
    (batch, 2), in two digits. Weights as `keras.layers.LSTMCell`, then input_gamma, recurrent_gamma (4 * units,),
    cell_gamma, cell_beta (units,), and not trained input_mean, input_variance, recurrent_mean, recurrent_variance
    (max_steps, 4 * units), cell_mean, cell_variance (max_steps, units), in float32 or wider, and with `momentum=None`
    or `debiased` the number of updates, count (max_steps,). First values: gains 0.1, as with 1 the
    gradients vanish over time; cell_beta and means 0, variances 1; the others as in Keras, with 1 for the forget gate.

    Masks: `keras.layers.RNN` keeps the old state at masked positions but does not tell the cell, so masked samples
    enter the statistics of the batch. A sample's step is the number of its real positions so far, and the row that a
    batch enters that of its furthest sample. Batches of one length avoid both.

    JAX: `keras.layers.RNN` loops by `lax.scan`, out of which nothing can be kept. Training there needs `unroll=True`;
    evaluation does not. In a loop of your own, each call is one update.

    Args:
        units: of the output.
        max_steps: number of time steps with statistics of their own, the length of the longest training sequence.
        momentum: weight of the old value; None averages all batches equally, as the paper does after training.
        epsilon: added to the variances. Where all samples are alike, as in the corners of images, it is all there is;
            the paper adds noise to the first state instead.
        debiased: take the first values' share out of the moving statistics, which is right from the first step on.
        nonfinite: "skip" leaves the moving statistics as they are for a batch with NaN or infinity, "update" does not
            look.
        **kwargs: of `keras.layers.LSTMCell`: activation, recurrent_activation, use_bias, kernel_initializer,
            recurrent_initializer, bias_initializer, unit_forget_bias, regularizers, constraints, dropout,
            recurrent_dropout, seed.

    Raises:
        NormValueError, NormTypeError: for arguments out of range; for an initial state without the number of steps.
        NormRuntimeError: for training on JAX without `unroll=True`.

    >>> import numpy as np
    >>> from normkit.keras import BatchNormLSTMCell
    >>> cell = BatchNormLSTMCell(3, max_steps=5, momentum=0.0)
    >>> layer = keras.layers.RNN(cell, unroll=True)
    >>> x = np.random.default_rng(0).random((8, 5, 4)).astype("float32")
    >>> trained = layer(x, training=True)
    >>> print(np.allclose(keras.ops.convert_to_numpy(trained), keras.ops.convert_to_numpy(layer(x)), atol=1e-5))
    True
    """

    def __init__(
        self,
        units: int,
        *args: Any,
        max_steps: int,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        debiased: bool = False,
        nonfinite: str = "skip",
        **kwargs: Any,
    ) -> None:
        checked(self, units=units, max_steps=max_steps, momentum=momentum, epsilon=epsilon, debiased=debiased)
        checked(self, nonfinite=nonfinite)
        check_debiased(self, momentum, debiased)
        super().__init__(units, *args, **kwargs)
        self.max_steps = max_steps
        self.momentum = momentum
        self.epsilon = epsilon
        self.debiased = debiased
        self.nonfinite = nonfinite
        self.state_size = [units, units, 2]
        self.count: Any = None
        self._before: dict[str, Any] | None = None
        self._outside: Any = None

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights."""
        self._build_gains(input_shape, recurrent.GAMMA)
        kept: dict[str, Any] = {"trainable": False, "autocast": False}
        for kind, width in zip(_KINDS, self._widths(), strict=True):
            for name, first in (("mean", "zeros"), ("variance", "ones")):
                options = {"initializer": first, "dtype": wide(self.variable_dtype), **kept}
                moving = self.add_weight(name=f"{kind}_{name}", shape=(self.max_steps, width), **options)
                setattr(self, f"{kind}_{name}", moving)
        if self.momentum is None or self.debiased:
            options = {"initializer": "zeros", "dtype": "int32", **kept}
            self.count = self.add_weight(name="count", shape=(self.max_steps,), **options)

    def call(self, inputs: Any, states: Sequence[Any], training: bool = False) -> tuple[Any, list[Any]]:
        """Make one step; see the class."""
        if len(states) != 3:
            must = f"{type(self).__name__}: the states must be h, c and the number of steps, (batch, 2)"
            raise NormValueError(message(must, f"{len(states)}", "zeros for a sequence that starts here"))
        h, c, digits = states
        low, high = ops.split(ops.cast(digits, "int32"), 2, axis=1)
        step = ops.reshape(low + _BASE * high, (-1,))
        row = ops.minimum(step, self.max_steps - 1)
        seen: dict[str, tuple[dict[str, Any], Any]] = {}

        def by_batch(kind: str, x: Any, gamma: Any, beta: Any) -> Any:
            y, spec, p, moments = normalize(_SPEC, x, gamma, beta, eps=self.epsilon)
            seen[kind] = observed(spec, p, moments, eps=self.epsilon, nonfinite=self.nonfinite)
            return y

        def by_kept(kind: str, x: Any, gamma: Any, beta: Any) -> Any:
            mean, var = (cast_like(x, ops.take(moving, row, axis=0)) for moving in self._moving(kind).values())
            return recurrent.evaluated_at(ARRAYS, x, mean, var, gamma, beta, eps=self.epsilon)

        if training and self.trainable:
            self._refuse_scan()
            h, c = self._step(inputs, h, c, training, by_batch)
            self._keep(ops.max(step, initial=0), seen)
        else:
            h, c = self._step(inputs, h, c, training, by_kept)
        low, high = (low + 1) % _BASE, high + (low + 1) // _BASE
        return h, [h, c, ops.cast(ops.concatenate([low, high], axis=1), digits.dtype)]

    def _moving(self, kind: str) -> dict[str, Any]:
        return {"mean": getattr(self, f"{kind}_mean"), "var": getattr(self, f"{kind}_variance")}

    def _kept(self) -> dict[str, Any]:
        """Return every variable that a step updates, by its name."""
        moving = [variable for kind in _KINDS for variable in self._moving(kind).values()]
        return {variable.name: variable for variable in (*moving, *([] if self.count is None else [self.count]))}

    def _keep(self, step: Any, seen: dict[str, tuple[dict[str, Any], Any]]) -> None:
        """Let the statistics of a batch enter the row of a step, if it has one; all of them, or none."""
        if any(known is False for _, known in seen.values()):
            return
        known = functools.reduce(ops.logical_and, [ops.all(known) for _, known in seen.values()])
        here = ops.logical_and(ops.equal(ops.arange(self.max_steps), step), known)
        before = self._before or {name: ops.convert_to_tensor(variable) for name, variable in self._kept().items()}
        row = ops.minimum(step, self.max_steps - 1)
        count = None if self.count is None else ops.take(before["count"], row)
        rate = rate_at(self.momentum, self.debiased, count, self.cell_mean.dtype)
        for kind, (batch, _) in seen.items():
            moving = self._moving(kind)
            old = {name: ops.take(before[variable.name], row, axis=0) for name, variable in moving.items()}
            new = formula.updated(ARRAYS, _SPEC, old, batch, True, rate)
            for name, variable in moving.items():
                value = ops.cast(new[name], variable.dtype)
                variable.assign(ops.where(here[:, None], value, ops.convert_to_tensor(variable)))
        if count is not None:
            self.count.assign(ops.where(here, count + 1, ops.convert_to_tensor(self.count)))

    def get_dropout_mask(self, step_input: Any) -> Any:
        """Remember the statistics before this sequence; `keras.layers.RNN` calls this before its loop.

        Keras makes some steps twice: the first, to learn the type of the output, and one for each cell of a stack.
        Updated from what was before the sequence, a row comes out the same however often its step is made.
        """
        self._before = {name: ops.copy(variable) for name, variable in self._kept().items()}
        self._outside = _trace()
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self) -> None:
        """Forget what was remembered; `keras.layers.RNN` calls this after its loop."""
        self._before = self._outside = None
        super().reset_dropout_mask()

    def _refuse_scan(self) -> None:
        if self._before is not None and self._outside != _trace():
            must = f"{type(self).__name__}: training on JAX must unroll the loop, else no statistics can be kept"
            raise NormRuntimeError(message(must, hint="keras.layers.RNN(cell, unroll=True)"))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this cell again."""
        names = ("max_steps", "momentum", "debiased", "nonfinite")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _trace() -> Any:
    """Return what JAX is tracing into; None on other backends."""
    if backend.backend() != "jax":
        return None
    from jax.extend import core

    return core.get_opaque_trace_state(convention="normkit")
