"""The compiled steps of an LSTM between its norms: against float64 by autograd, on guarded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import EPS32, SETS, WIDTHS, Guarded, needs_kernels

from normkit.kernels.native import available

pytestmark = needs_kernels
native = available()
# The activations are good to 2 roundings, each formula adds up to four; magnitudes are below `LARGEST` squared.
ROOM = 16


def numbers(rng, *shape):
    return Guarded(rng.uniform(-3, 3, shape))


def wide(array, shape):
    return torch.from_numpy(array.values.reshape(shape).copy()).requires_grad_()


def step(z, before, normed):
    """What an LSTM does, in float64: the state that goes into the norm, and the output behind it."""
    i, f, g, o = z.chunk(4, 1)
    return torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(o) * torch.tanh(normed)


def near(label, array, want):
    """Every value within roundings of the largest."""
    array.check(label)
    found, want = array.values, want.detach().numpy().ravel()
    assert np.abs(found - want).max() <= ROOM * EPS32 * max(1.0, np.abs(want).max()), label


@pytest.mark.parametrize("more", [False, True], ids=["alone", "gradients-from-elsewhere"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", SETS)
def test_a_step_and_its_gradients(which, threads, more):
    place, w = SETS.index(which), WIDTHS[which]
    for n, units in [(1, 1), (3, 7), (5, w - 1), (4, w), (2, w + 1), (3, 2 * w + 3)]:
        rng = np.random.default_rng(units)
        state = n, units
        gates, before, shown = numbers(rng, n, 4 * units), numbers(rng, *state), numbers(rng, *state)
        dh, dc, from_norm, more_h, more_c = (numbers(rng, *state) for _ in range(5))
        cell, out, dgates, dshown = (Guarded(np.zeros(s)) for s in (state, state, (n, 4 * units), state))
        z, b, normed = wide(gates, (n, 4 * units)), wide(before, state), wide(shown, state)
        want_cell, want_out = step(z, b, normed)
        into = [torch.from_numpy(d.values.reshape(state).copy()) for d in (dh, dc, from_norm, more_h, more_c)]
        d_out = into[0] + into[3] if more else into[0]
        d_cell = into[1] + into[2] + into[4] if more else into[1] + into[2]
        want = torch.autograd.grad([want_cell, want_out], [z, b, normed], [d_cell, d_out])

        args = place, n, units
        native.cell_state(*args, gates.address, before.address, cell.address, threads)
        near("cell", cell, want_cell)
        native.cell_output(*args, gates.address, shown.address, out.address, threads)
        near("out", out, want_out)
        other_h, other_c = (t.address if more else 0 for t in (more_h, more_c))
        native.cell_output_backward(
            *args, dh.address, other_h, gates.address, shown.address, dgates.address, dshown.address, threads
        )
        native.cell_state_backward(
            *args, dc.address, from_norm.address, other_c, gates.address, before.address, dgates.address, threads
        )
        for label, array, gradient in (
            ("gates", dgates, want[0]),
            ("before", dc, want[1]),
            ("normed", dshown, want[2]),
        ):
            near(label, array, gradient)
        for array in (gates, before, shown, dh, from_norm, more_h, more_c):
            array.check("an input")


@pytest.mark.parametrize("which", SETS)
def test_the_hyperbolic_tangent_keeps_its_digits_near_zero_and_its_ends(which):
    x = np.concatenate([np.logspace(-30, 1.5, 400), [0.0, 0.625, 88.0, 3e38, np.inf]]).astype(np.float32)
    x = np.concatenate([x, -x, [np.nan]])
    gates, shown, out = Guarded(np.full((1, 4 * x.size), 1.0)), Guarded(x), Guarded(np.zeros(x.size))
    native.cell_output(SETS.index(which), 1, x.size, gates.address, shown.address, out.address, 1)
    want = np.tanh(x.astype(np.float64))
    np.testing.assert_allclose(shown.values, want, rtol=4 * EPS32, atol=1e-44)  # atol: the last subnormal
