"""Recurrent networks with normalizers inside, for any array library (arXiv:1603.09025, arXiv:1607.06450).

LSTM: (i, f, g, o) = norm(W_x x) + norm(W_h h) + b
      c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
      h' = sigmoid(o) * tanh(norm(c'))
GRU:  (r, z, n) and (r_h, z_h, n_h) = norm(W_x x) + b, norm(W_h h) + b_h
      h' = (1 - sigmoid(z + z_h)) * tanh(n + sigmoid(r + r_h) * n_h) + sigmoid(z + z_h) * h

The recurrences of c, and of h in the GRU, are not normalized. Layers make the gates and say what `norm` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["GAMMA", "evaluated_at", "gru_step", "layer_norm_groups", "lstm_step"]

# First gamma of recurrent batch norm: with unit variance tanh and sigmoid saturate and gradients vanish over time.
GAMMA = 0.1


def lstm_step(
    gates: Sequence[Any],
    c: Any,
    *,
    activation: Callable[[Any], Any],
    recurrent_activation: Callable[[Any], Any],
    norm: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """Return the new (h, c) from the gates i, f, g, o before their activations, and the old c."""
    i, f, g, o = gates
    c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)
    return recurrent_activation(o) * activation(norm(c)), c


def gru_step(
    of_input: Sequence[Any],
    of_state: Sequence[Any],
    h: Any,
    *,
    activation: Callable[[Any], Any],
    recurrent_activation: Callable[[Any], Any],
) -> Any:
    """Return the new h from the gates r, z, n of the input and of the state, before their activations, and the old h.

    The reset gate acts on what the state contributes to n, as in PyTorch; z is the weight of the old state.
    """
    (r, z, n), (r_h, z_h, n_h) = of_input, of_state
    n = activation(n + recurrent_activation(r + r_h) * n_h)
    return n + recurrent_activation(z + z_h) * (h - n)


def layer_norm_groups(gates: int, units: int) -> tuple[int, ...]:
    """Return how many values of W x, side by side, layer norm takes together (arXiv:1607.06450, supplement).

    In the LSTM all four gates; in the GRU the two gates, and the candidate by itself.
    """
    return (4 * units,) if gates == 4 else (2 * units, units)


def evaluated_at(xp: Any, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, eps: float) -> Any:
    """Return (x - mean) / sqrt(var + eps) * gamma + beta with a mean and a variance for each sample; beta may be None.

    Samples of one batch can stand at different time steps, whose statistics differ.
    """
    y = (x - mean) * (gamma / xp.sqrt(var + eps))
    return y if beta is None else y + beta
