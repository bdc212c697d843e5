"""Small helpers for networks without norms: SkipInit, gains of activations, adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from normkit.core.constraints import Constraint, Integer, Real, check
from normkit.core.weights import clipping_factor, gain_after
from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.torch._execute import accumulator
from normkit.torch.functional import ACTIVATIONS

__all__ = ["SkipInit", "activation_gain", "adaptive_gradient_clipping"]

_CLIPPING: dict[str, Constraint] = {"clipping": Real(0.0, above=True), "eps": Real(0.0, above=True), "dim": Integer(0)}
_SKIP = {"initial": Real()}


class SkipInit(nn.Module):
    """SkipInit (arXiv:2002.10444): a trained scalar at the end of a residual branch, at first 0.

    y = residual + alpha * x, without `residual` alpha * x. A block so begins as the identity, which norms in the branch
    bring about too, and deep networks train without them. `normkit.param_groups` leaves alpha undecayed.

    Shapes: residual and output that of the input; alpha (). Training and evaluation are the same.

    Args:
        initial: first value of alpha.
        device, dtype: of alpha.

    Raises:
        NormValueError: for a first value that is not finite.

    >>> skip = SkipInit()
    >>> x = torch.randn(2, 3)
    >>> torch.equal(skip(torch.relu(x), residual=x), x)
    True
    """

    def __init__(
        self,
        initial: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check("SkipInit", _SKIP, {"initial": initial})
        self.initial = initial
        self.alpha = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return alpha to its first value."""
        nn.init.constant_(self.alpha, self.initial)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Scale the branch and add it; see the class."""
        y = x * self.alpha.to(x.dtype)
        return y if residual is None else y + residual

    def extra_repr(self) -> str:
        """What torch prints of a layer."""
        return f"initial={self.initial}"


def activation_gain(activation: str | Callable[[Tensor], Tensor]) -> float:
    """Return gamma with var(gamma * activation(z)) = 1 for standard normal z, as networks without norms need it.

    Computed by quadrature in float64: sqrt(2 / (1 - 1/pi)) for ReLU (arXiv:2101.08692).

    Args:
        activation: relu, relu6, leaky_relu, silu, gelu, gelu_tanh or hardswish, or a function of tensors. One that has
            jumps or kinks elsewhere than at whole numbers is integrated less exactly.

    Raises:
        NormValueError: for an unknown name, with the nearest ones.

    >>> round(activation_gain("relu"), 4), round(activation_gain(torch.tanh), 4)
    (1.7129, 1.5925)
    """
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        must = "activation_gain: `activation` must be known"
        raise NormValueError(message(must, repr(activation), nearest(activation, ACTIVATIONS)))
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    with torch.no_grad():
        return gain_after(lambda z: function(torch.from_numpy(z)).numpy())


def adaptive_gradient_clipping(
    parameters: Tensor | Iterable[Tensor], clipping: float = 0.01, eps: float = 1e-3, *, dim: int = 0
) -> Tensor:
    """Scale down gradients that are large beside their weights, unit by unit and in place (arXiv:2102.06171).

    G_i <- G_i * min(1, clipping * max(||W_i||, eps) / ||G_i||), with Euclidean norms over a unit: a slice along `dim`
    of weights, and the whole of a bias, a scalar, or a gain of shape (C, 1, 1, 1). Call it after `backward`, with a
    gradient scaler after `unscale_`, and before the step. Parameters without a gradient are passed over, gradients that
    are not finite stay so.

    Args:
        parameters: all but those of the last linear layer, which the authors leave unclipped.
        clipping: the authors take 0.01 at a batch of 4096, more for smaller batches.
        eps: the norm that weights count for at least, so that those at 0 move.
        dim: axis of the units; 1 for transposed convolutions without groups.

    Returns:
        The share of units whose gradient was scaled down, a tensor, 0 where there are no gradients.

    Raises:
        NormTypeError: for sparse gradients.
        NormValueError: for `clipping` and `eps` that are not above 0.

    >>> weight = nn.Parameter(torch.ones(2, 4))
    >>> (weight * torch.tensor([[1e-3], [5.0]])).sum().backward()
    >>> adaptive_gradient_clipping([weight]), weight.grad[:, 0]
    (tensor(0.5000), tensor([0.0010, 0.0100]))
    """
    check("adaptive_gradient_clipping", _CLIPPING, {"clipping": clipping, "eps": eps, "dim": dim})
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [(p.detach(), p.grad.detach()) for p in given if p.grad is not None]
    for _, gradient in gradients:
        if gradient.layout != torch.strided:
            must = "adaptive_gradient_clipping: gradients must be dense"
            raise NormTypeError(message(must, f"layout {gradient.layout}", "leave the embedding out"))
    clipped, units = torch.zeros(()), 0
    for weight, gradient in gradients:
        axes = _within_units(weight, dim)
        wide = accumulator(gradient.dtype)
        factor = clipping_factor(torch, gradient.to(wide), weight.to(wide), axes, clipping=clipping, eps=eps)
        gradient.copy_(gradient * factor)
        clipped = clipped.to(factor.device) + (factor < 1).sum()
        units += factor.numel()
    return clipped / max(1, units)


def _within_units(weight: Tensor, dim: int) -> tuple[int, ...]:
    """The axes of a unit: all but that of the units; all where only one axis is longer than 1."""
    vector = sum(length > 1 for length in weight.shape) <= 1
    if not vector and dim >= weight.dim():
        must = "adaptive_gradient_clipping: `dim` must be an axis of all weights"
        raise NormValueError(message(must, f"{dim}, shape {tuple(weight.shape)}"))
    return tuple(axis for axis in range(weight.dim()) if vector or axis != dim)
