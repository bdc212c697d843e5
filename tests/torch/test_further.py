"""Filter response norm, EvoNorm, dynamic tanh and global response norm as layers: what their papers say, and torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit
import normkit.torch as nk
from normkit.core.catalog import CATALOG, find
from normkit.errors import NormValueError
from normkit.torch import functional, further

NEAR = 1e-12  # of values of order 1 in float64: some hundred roundings
X = torch.randn(5, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def spread(layer):
    """The layer in float64 with parameters unlike their first values."""
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.double().parameters():
        parameter.data.uniform_(0.3, 1.2, generator=generator)
    return layer


MADE = {
    "frn": lambda: nk.FilterResponseNorm(6),
    "learned frn": lambda: nk.FilterResponseNorm(6, learn_eps=True),
    "evonorm_b0": lambda: nk.EvoNormB0(6),
    "evonorm_s0": lambda: nk.EvoNormS0(6, 3),
    "dyt": lambda: nk.DynamicTanh(6, channels_last=False),
    "grn": lambda: nk.GlobalResponseNorm(6, channels_last=False),
}
ALONE = [name for name in MADE if name != "evonorm_b0"]


def test_every_formula_has_a_layer_and_a_short_name():
    assert {type(make()).__name__ for make in MADE.values()} == set(further.__all__)
    short = {name for name, spec in CATALOG.items() if spec.formula != "standard"}
    assert {type(nk.norm_layer(name, 6, 2)).__name__ for name in short} == set(further.__all__)
    assert all(type(make()).spec.formula == find(name).formula for name, make in MADE.items() if name in short)


# 20, 21 and 23 of the notes on the papers.


@pytest.mark.parametrize("name", ALONE)
def test_no_sample_sees_another(name):
    """REPRO 20, 21, 23, exact: bit by bit, whatever the batch."""
    layer = spread(MADE[name]())
    whole = layer(X)
    assert torch.equal(layer(X[:1]), whole[:1])
    assert torch.equal(layer(X[[3, 0, 2]]), whole[[3, 0, 2]])


def test_filter_response_norm_does_not_see_the_scale():
    """REPRO 20, exact: x -> a x with a > 0, for every image and channel its own."""
    layer = spread(nk.FilterResponseNorm(6, eps=0.0))
    a = torch.rand(5, 6, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(layer(a * X), layer(X), rtol=0, atol=NEAR)
    assert (layer(-X) - layer(X)).abs().max() > 1e-3
    assert (layer(X + 1) - layer(X)).abs().max() > 1e-3


def test_filter_response_norm_of_one_position_is_its_sign():
    """REPRO 20, exact: at 1x1 with eps -> 0; a threshold far below leaves it alone."""
    layer = nk.FilterResponseNorm(6, eps=0.0).double()
    nn.init.constant_(layer.tau, -9.0)
    torch.testing.assert_close(layer(X[:, :, :1, :1]), X[:, :, :1, :1].sign(), rtol=0, atol=NEAR)
    with pytest.raises(NormValueError, match=r"must have positions to take statistics over; got shape.*learn_eps=True"):
        layer(X[:, :, 0, 0])
    learned = nk.FilterResponseNorm(6, learn_eps=True).double()
    assert learned.learned_eps.item() == pytest.approx(1e-4, rel=1e-6)
    x = X[:, :, 0, 0]
    torch.testing.assert_close(learned(x), (x / (x**2 + 1e-6 + learned.learned_eps).sqrt()).clamp(min=0))


def test_evonorm_without_its_activation_is_affine():
    """REPRO 21, exact: timm's apply_act=False. Nothing is kept then, and v is no parameter."""
    for layer in (nk.EvoNormS0(6, 3, apply_act=False), nk.EvoNormB0(6, apply_act=False)):
        spread(layer)
        gamma, beta = (t.reshape(6, 1, 1) for t in (layer.weight, layer.bias))
        assert torch.equal(layer(X), X * gamma + beta)
        assert set(dict(layer.named_parameters())) == {"weight", "bias"}
        assert all(torch.equal(b, torch.ones_like(b)) for b in layer.buffers())


def test_evonorm_b0_evaluates_as_it_trains_where_the_variance_is_that_of_the_batch():
    """REPRO 21, exact: at momentum 1 without Bessel's factor the kept variance is the batch's."""
    layer = spread(nk.EvoNormB0(6, momentum=1.0, bessel=False))
    trained = layer(X)
    torch.testing.assert_close(layer.running_var, X.var((0, 2, 3), correction=0))
    torch.testing.assert_close(layer.eval()(X), trained, rtol=0, atol=NEAR)
    assert (layer(X[:1]) - layer.train()(X[:1])).abs().max() > 1e-3


def test_dynamic_tanh_is_bounded_and_sees_one_token():
    """REPRO 23, exact: |y - beta| <= |gamma|, the slope gamma alpha (1 - tanh^2), and every value for itself."""
    layer = spread(nk.DynamicTanh(6))
    tokens = X.permute(0, 2, 3, 1).reshape(5, 12, 6)
    for scale in (1.0, 1e4):
        assert ((layer(scale * tokens) - layer.bias).abs() <= layer.weight.abs() * (1 + NEAR)).all()
    slope = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), tokens[:1, :2])
    flat = slope.reshape(12, 12)
    want = layer.weight * layer.alpha * (1 - torch.tanh(layer.alpha * tokens[0, :2]) ** 2)
    torch.testing.assert_close(flat.diagonal(), want.flatten().detach(), rtol=0, atol=NEAR)
    assert torch.equal(flat, flat.diagonal().diag())


def test_global_response_norm_begins_as_the_identity():
    """As ConvNeXt V2 does: gamma and beta are 0."""
    layer = nk.GlobalResponseNorm(6, channels_last=False).double()
    assert torch.equal(layer(X), X)
    assert layer(X).requires_grad


@pytest.mark.parametrize("kind", [nk.DynamicTanh, nk.GlobalResponseNorm])
def test_channels_first_and_last(kind):
    first, last = spread(kind(6, channels_last=False)), spread(kind(6))
    y = last(X.movedim(1, -1).contiguous())
    torch.testing.assert_close(y.movedim(-1, 1), first(X), rtol=0, atol=NEAR)
    assert y.is_contiguous()


def test_channels_of_zeros_have_finite_slopes():
    x = X.clone()
    x[:, 0] = 0
    for name, make in MADE.items():
        given = x.clone().requires_grad_()
        layer = spread(make())
        layer(given).sum().backward()
        found = [given.grad, *(parameter.grad for parameter in layer.parameters())]
        assert all(bool(torch.isfinite(g).all()) for g in found), name


# As layers of PyTorch.


def test_names_are_those_of_the_checkpoints_of_others():
    """Timm's FilterResponseNormTlu2d, EvoNorm2dB0, EvoNorm2dS0 and GlobalResponseNorm, and DynamicTanh's authors'."""
    names = {name: set(make().state_dict()) for name, make in MADE.items()}
    assert names == {
        "frn": {"weight", "bias", "tau"},
        "learned frn": {"weight", "bias", "tau", "learned_eps"},
        "evonorm_b0": {"weight", "bias", "v", "running_var"},
        "evonorm_s0": {"weight", "bias", "v"},
        "dyt": {"weight", "bias", "alpha"},
        "grn": {"weight", "bias"},
    }
    assert nk.DynamicTanh(6).alpha.shape == (1,)


def test_in_half_precision_the_kept_variance_stays_float32():
    layer = nk.EvoNormB0(6).bfloat16()
    assert layer.running_var.dtype == torch.float32
    assert layer(X.bfloat16()).dtype == layer.v.dtype == torch.bfloat16
    assert (layer.running_var != 1).all()


def test_checkpointing_counts_a_batch_once():
    plain, twice = spread(nk.EvoNormB0(6)), spread(nk.EvoNormB0(6))
    plain(X).sum().backward()
    checkpoint(twice, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert torch.equal(plain.running_var, twice.running_var)


def test_they_are_traced_exported_and_transformed():
    model = nn.Sequential(*(spread(make()) for make in MADE.values()))
    want = model.eval()(X)
    traced = torch.fx.symbolic_trace(model)
    assert [type(module) for module in traced.children()] == [type(module) for module in model]  # kept whole
    torch.testing.assert_close(traced(X), want)
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), want)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).sum())(parameters)
    model(X).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_in_training_they_compile_whole_and_keep_what_they_see():
    model = nn.Sequential(nk.EvoNormB0(6), nk.FilterResponseNorm(6)).double()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), twin(X))
    torch.testing.assert_close(model[0].running_var, twin[0].running_var)


def test_no_weight_decays():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *(make() for make in MADE.values()))
    decayed, plain = normkit.param_groups(model, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert len(plain["params"]) == sum(1 for _ in model.parameters()) - 1


def test_insert_leaves_them_where_they_are_and_refuses_those_that_are_activations():
    x = torch.randn(4, 3, 6, 6)
    for name, make in MADE.items():
        model = nn.Sequential(nn.Conv2d(3, 6, 1), make(), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        report = normkit.insert(model, "batch", x, dry_run=True)
        assert "normalizes its output already" in {edit.path: edit.reason for edit in report.kept}["0"], name
        assert [edit.path for edit in report.edits] == ["3"]
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    for name in ("frn", "evonorm_b0", "evonorm_s0"):
        with pytest.raises(NormValueError, match=f"in front of an activation, whose place {name} would have to take"):
            normkit.insert(plain, name, x)
    inserted = normkit.insert(plain, "dyt", x)
    assert isinstance(inserted[0].norm, nk.DynamicTanh)
    assert inserted(x).shape == (4, 2, 6, 6)


BAD = {
    "groups": (lambda: nk.EvoNormS0(6, 4), r"divisible by `groups`; got 6 and 4. hint: use 3 or normkit.groups_for\(6"),
    "channels": (lambda: nk.FilterResponseNorm(5)(X), "must have 5 channels in its second axis"),
    "no positions": (lambda: nk.EvoNormB0(6)(X[:, :, 0, 0]), "over which each instance has a variance.*evonorm_s0"),
    "one value": (lambda: nk.EvoNormB0(6)(X[:1, :, :1, :1]), "training needs at least 2 values per channel"),
    "several axes": (lambda: nk.DynamicTanh((6, 4), channels_last=False), "must be one number, that of the channels"),
    "eps": (lambda: nk.GlobalResponseNorm(6, eps=-1.0), "`eps` must be a finite number of at least 0"),
    "v": (lambda: functional.evonorm_s0(X, 3, *torch.ones(2, 6), torch.ones(5)), "`v` must have 6 values"),
    "tau": (lambda: functional.filter_response_norm(X, *torch.ones(2, 6), torch.ones(2)), "`tau` must have 6 values"),
    "uncounted": (
        lambda: functional.evonorm_b0(X, torch.ones(6), *torch.ones(3, 6), training=True, momentum=None),
        "`momentum=None` averages all batches and needs `num_batches_tracked`",
    ),
    "position": (lambda: nk.norm_layer("evonorm_b0", 6, 0), "evonorm_b0 needs spatial axes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused(case):
    call, text = BAD[case]
    with pytest.raises(NormValueError, match=text):
        call()


@pytest.mark.parametrize("name", [name for name in MADE if name != "dyt"])
def test_masked_positions_are_left_out(name):
    mask = torch.from_numpy(np.random.default_rng(0).random((5, 4, 3)) < 0.6)
    mask[:, 0] = True
    layer, bad = spread(MADE[name]()), X.masked_fill(~mask[:, None], torch.nan)
    y = layer(bad, mask=mask)
    assert torch.equal(y, layer(X.masked_fill(~mask[:, None], 7.0), mask=mask))
    assert (y[(~mask)[:, None].expand_as(y)] == 0).all()
