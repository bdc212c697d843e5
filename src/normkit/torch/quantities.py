"""What papers have formulas for, measured on random networks with layers of this package: a study compares the two."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normkit.torch.factory import norm_layer

__all__ = ["dropout_ratio", "residual_powers"]

_WIDTH, _SAMPLES = 512, 512
# With batch norm branches share their means over the samples, whose products vanish in the mean over networks alone:
# one network is off by some 2 percent, and the mean of these by less than 1.
_NETWORKS = 8
_BATCHES = 8


def residual_powers(norm: str, blocks: int, seed: int) -> tuple[float, ...]:
    """Mean squares of x in x + W relu(norm(x)), from the input, N(0, 1), to the end; W ~ N(0, 2 / width).

    Without norm each block doubles it: relu halves the mean square, W doubles it, and the sum of x and something
    independent of it adds them up. With batch norm a block adds 1 (arXiv:2002.10444). The means over some networks.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = [_powers(norm, blocks, generator) for _ in range(_NETWORKS)]
    return tuple(sum(powers) / _NETWORKS for powers in zip(*found, strict=True))


def _powers(norm: str, blocks: int, generator: torch.Generator) -> list[float]:
    x = torch.randn(_SAMPLES, _WIDTH, generator=generator)
    powers = [_power(x)]
    for _ in range(blocks):
        weight = torch.randn(_WIDTH, _WIDTH, generator=generator) * math.sqrt(2 / _WIDTH)
        inside = x if norm == "none" else norm_layer(norm, _WIDTH, 0)(x)
        x = x + torch.relu(inside) @ weight.T
        powers.append(_power(x))
    return powers


def dropout_ratio(keep: float, rectified: bool, seed: int) -> float:
    """Variance in evaluation / variance that batch norm keeps in training, of what dropout and a linear layer give it.

    Inputs are N(0, 1), independent of each other, `rectified` by relu or not. The mean over the channels of each.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)  # dropout takes no generator
        dropout, linear, norm = nn.Dropout(1 - keep), nn.Linear(_WIDTH, _WIDTH), norm_layer("batch", _WIDTH, 0)
        norm.momentum = None  # type: ignore[assignment]  # the average of all batches
        linear.weight.normal_(0, math.sqrt(1 / _WIDTH), generator=generator)
        for _ in range(_BATCHES):
            x = torch.randn(_SAMPLES, _WIDTH, generator=generator)
            x = torch.relu(x) if rectified else x
            norm(linear(dropout(x)))
            seen.append(linear(x))
    kept = norm.running_var
    assert isinstance(kept, Tensor)
    return float(torch.cat(seen).var(0).mean() / kept.mean())


def _power(x: Tensor) -> float:
    return float(x.double().square().mean())
