"""SkipInit, gains of activations and adaptive gradient clipping; how signals grow in residual networks (19a)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import normkit.torch as nk
from normkit.errors import NormError
from normkit.torch.functional import ACTIVATIONS

G = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("branch", ["plain", "batch", "skip"])
def test_growth_of_signals_in_residual_networks(branch):
    """REPRO 19a, x + W relu(norm(x)): E[x^2] doubles per block without norms, with batch norm it grows by 1."""
    torch.manual_seed(0)
    width, depth = 256, 16
    x = torch.randn(256, width)
    squares = [x.square().mean().item()]
    for _ in range(depth):
        linear, skip = nn.Linear(width, width, bias=False), nk.SkipInit()
        nn.init.kaiming_normal_(linear.weight)
        with torch.no_grad():
            y = nk.BatchNorm1d(width)(x) if branch == "batch" else x
            y = linear(torch.relu(y))
            x = skip(y, residual=x) if branch == "skip" else x + y
        squares.append(x.square().mean().item())
    blocks = np.arange(depth + 1)
    if branch == "plain":
        assert abs(np.polyfit(blocks, np.log2(squares), 1)[0] - 1) < 0.1
    elif branch == "batch":
        assert abs(np.polyfit(blocks, squares, 1)[0] - 1) < 0.15
    else:
        assert squares == [squares[0]] * (depth + 1)


def test_scaled_standardization_keeps_the_variance_through_depth():
    """What the gains are for: 20 plain maps and ReLUs, E[var] within a third of 1; without gamma it dies away."""
    torch.manual_seed(0)
    ends = {}
    for activation in ("relu", None):
        x = torch.randn(128, 200)
        for _ in range(20):
            x = nk.scaled_weight_standardization(nn.Linear(200, 200, bias=False), activation=activation)(torch.relu(x))
            x = x.detach()
        ends[activation] = x.var(dim=0).mean().item()
    assert abs(ends["relu"] - 1) < 1 / 3
    assert ends[None] < 1e-6


def test_skip_init_is_a_scalar_that_is_trained():
    skip, x, r = nk.SkipInit(0.5), torch.randn(3, 4, generator=G), torch.randn(3, 4, generator=G)
    assert torch.equal(skip(x), 0.5 * x)
    assert torch.equal(skip(x, residual=r), 0.5 * x + r)
    skip(x, residual=r).sum().backward()
    torch.testing.assert_close(skip.alpha.grad, x.sum())
    assert skip(x.bfloat16()).dtype == torch.bfloat16
    assert {n: p.shape for n, p in skip.state_dict().items()} == {"alpha": ()}
    assert nk.SkipInit().alpha.item() == 0
    nn.init.ones_(skip.alpha)
    skip.reset_parameters()
    assert skip.alpha.item() == 0.5
    assert repr(skip) == "SkipInit(initial=0.5)"
    with pytest.raises(NormError, match="SkipInit: `initial` must be a finite number; got nan"):
        nk.SkipInit(math.nan)


# In closed form, from the moments of half a normal distribution.
CLOSED = {
    "relu": math.sqrt(2 / (1 - 1 / math.pi)),
    # var(max(z, s z)) = (1 + s^2) / 2 - (1 - s)^2 / (2 pi)
    "leaky_relu": 1 / math.sqrt((1 + 0.01**2) / 2 - (1 - 0.01) ** 2 / (2 * math.pi)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gains_of_activations(name):
    gamma = nk.activation_gain(name)
    if name in CLOSED:
        assert gamma == pytest.approx(CLOSED[name], rel=1e-13)
    # Equally probable values instead of quadrature: the mid points of 100 000 quantiles, of which the outermost are
    # some 1e-5 of the variance.
    z = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    assert gamma == pytest.approx(1 / ACTIVATIONS[name](z).std(correction=0).item(), rel=1e-4)


def test_gains_of_functions_and_unknown_names():
    assert nk.activation_gain(lambda z: 2 * z) == pytest.approx(0.5, rel=1e-13)
    with pytest.raises(NormError, match=r"`activation` must be known; got 'rleu'\. hint: did you mean relu"):
        nk.activation_gain("rleu")


# Adaptive gradient clipping.


def parameter(weight, gradient, dtype=torch.float64):
    made = nn.Parameter(torch.tensor(weight, dtype=dtype))
    made.grad = torch.tensor(gradient, dtype=dtype)
    return made


def clipped(weight, gradient, lam, eps):
    """As published, row by row."""
    rows = [(weight, gradient)] if sum(n > 1 for n in weight.shape) < 2 else list(zip(weight, gradient, strict=True))
    found = []
    for w, g in rows:
        length, limit = math.sqrt((g * g).sum()), lam * max(math.sqrt((w * w).sum()), eps)
        found.append(limit * g / length if length > limit else g)
    return np.stack(found).reshape(gradient.shape)


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (4, 3, 2), (4, 3, 2, 2), (4, 1, 1, 1), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("lam", [0.01, 0.16, 2.0])
def test_units_are_clipped_as_published(shape, lam):
    rng = np.random.default_rng(0)
    weight, gradient = (np.asarray(rng.standard_normal(shape)) for _ in range(2))
    weight = weight * np.logspace(-1, 1, len(weight)).reshape(-1, *(1,) * (len(shape) - 1)) if shape else weight
    if len(shape) > 1:
        weight[0] = 0.0  # which only eps lets move
    p = parameter(weight, gradient)
    share = nk.adaptive_gradient_clipping([p], lam, eps=1e-3)
    expected = clipped(weight, gradient, lam, 1e-3)
    np.testing.assert_allclose(p.grad.numpy(), expected, rtol=1e-13)
    moved = expected != gradient
    by_unit = moved.reshape(len(moved), -1).any(axis=1) if sum(n > 1 for n in shape) > 1 else np.asarray([moved.any()])
    assert share.item() == pytest.approx(by_unit.mean())


def test_a_single_tensor_others_without_gradient_and_the_axis_of_outputs():
    p = parameter(np.ones((2, 3)), np.ones((2, 3)))
    assert nk.adaptive_gradient_clipping(p, 0.1).item() == 1
    transposed = parameter([[3.0, 0.0], [4.0, 1.0]], [[0.0, 0.0], [10.0, 0.1]])
    share = nk.adaptive_gradient_clipping(iter([transposed, nn.Parameter(torch.ones(2))]), 0.5, dim=1)
    torch.testing.assert_close(transposed.grad, torch.tensor([[0.0, 0.0], [2.5, 0.1]], dtype=torch.float64))
    assert share.item() == 0.5
    assert nk.adaptive_gradient_clipping([nn.Parameter(torch.ones(2))]).item() == 0


def test_small_gradients_are_untouched_to_the_bit_and_others_stay_visible():
    rng = np.random.default_rng(0)
    small = parameter(rng.standard_normal((3, 4)), 1e-3 * rng.standard_normal((3, 4)), torch.float32)
    before = small.grad.clone()
    assert nk.adaptive_gradient_clipping([small]).item() == 0
    assert torch.equal(small.grad, before)
    bad = parameter(np.ones((2, 2)), [[math.nan, 1.0], [math.inf, 1.0]])
    nk.adaptive_gradient_clipping([bad])
    assert bad.grad[0, 0].isnan()
    assert bad.grad[1, 0].isnan()
    half = parameter(np.ones((1, 4)), np.full((1, 4), 1e4), torch.float16)  # whose squares are infinite in float16
    nk.adaptive_gradient_clipping([half])
    torch.testing.assert_close(half.grad, torch.full((1, 4), 0.01, dtype=torch.float16))


def test_wrong_arguments_of_clipping():
    p = parameter(np.ones((2, 3)), np.ones((2, 3)))
    for name in ("clipping", "eps"):
        with pytest.raises(NormError, match=f"`{name}` must be a finite number above 0; got 0"):
            nk.adaptive_gradient_clipping([p], **{name: 0.0})
    with pytest.raises(NormError, match=r"`dim` must be an axis of all weights; got 2, shape \(2, 3\)"):
        nk.adaptive_gradient_clipping([p], dim=2)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NormError, match="gradients must be dense; got layout"):
        nk.adaptive_gradient_clipping([p, *embedding.parameters()])
    assert torch.equal(p.grad, torch.ones_like(p)), "nothing was changed"
