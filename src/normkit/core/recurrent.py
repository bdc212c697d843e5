"""The LSTM with normalizers inside, for any array library (arXiv:1603.09025, arXiv:1607.06450).

(i, f, g, o) = norm(W_x x) + norm(W_h h) + b
c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
h' = sigmoid(o) * tanh(norm(c'))

The recurrence of c itself is not normalized. Layers make the gates and say what `norm` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["GAMMA", "evaluated_at", "lstm_step"]

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


def evaluated_at(xp: Any, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, eps: float) -> Any:
    """Return (x - mean) / sqrt(var + eps) * gamma + beta with a mean and a variance for each sample; beta may be None.

    Samples of one batch can stand at different time steps, whose statistics differ.
    """
    y = (x - mean) * (gamma / xp.sqrt(var + eps))
    return y if beta is None else y + beta
