"""What is measured against formulas, on networks so small that another way of computing it is at hand."""

import torch

from normkit.torch import quantities


def test_mean_squares_of_residual_sums(monkeypatch):
    """The first block by hand, from the same random numbers."""
    monkeypatch.setattr(quantities, "_WIDTH", 64)
    monkeypatch.setattr(quantities, "_NETWORKS", 1)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=generator).double()
    w = torch.randn(64, 64, generator=generator).double() / 32**0.5
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    for norm, inside in (("none", x), ("batch", normed)):
        found = quantities.residual_powers(norm, 2, 3)
        assert len(found) == 3
        torch.testing.assert_close(found[0], float((x**2).mean()), rtol=1e-6, atol=0)
        expected = float(((x + inside.clamp(min=0) @ w.T) ** 2).mean())
        torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=0)  # float32 against float64


def test_variances_behind_dropout_follow_the_weights(monkeypatch):
    """Keeping all but 0 of it gives the same variance twice; global random numbers are left alone."""
    monkeypatch.setattr(quantities, "_WIDTH", 32)
    before = torch.random.get_rng_state()
    assert abs(quantities.dropout_ratio(1.0, True, 0) - 1) < 1e-3  # one variance within batches, one over all
    assert 0.3 < quantities.dropout_ratio(0.5, True, 0) < 0.5 < quantities.dropout_ratio(0.7, True, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
