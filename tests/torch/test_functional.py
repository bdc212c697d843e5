"""The functions: torch's argument order, RMS norm's casts, the pre-norm forms, and the wording of errors."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit.torch as nk
from normkit.core.catalog import CATALOG
from normkit.core.spec import ARGUMENTS
from normkit.errors import NormError, NormTypeError, NormValueError
from normkit.kernels.native import available
from normkit.torch import functional, normalizer_free, use_kernel, weights

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 8, 5, 3, generator=G) * 2 + 1


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"])
def test_torchs_arguments_come_first_in_torchs_order(name):
    ours, theirs = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (functional, F))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("cast", ["gemma", "llama", "none"])
@pytest.mark.parametrize("gain", ["w", "1+w"])
def test_rms_norm_casts(cast, gain):
    x, w = (torch.randn(s, generator=G).bfloat16() for s in ((64, 96), (96,)))
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    by = w.float() + (gain == "1+w")
    expected = {
        "gemma": (normalized * by).bfloat16(),
        "llama": normalized.bfloat16() * (w if gain == "w" else 1 + w),
        "none": x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6).bfloat16() * (w if gain == "w" else 1 + w),
    }
    found = functional.rms_norm(x, (96,), w, 1e-6, gain=gain, cast=cast)
    off = (found.float() - expected[cast].float()).abs() / expected[cast].float().abs().clamp(min=1e-3)
    # the last bit of a value may fall the other way in float32 already: at most one value in a hundred, by 1 ulp (2^-7)
    assert off.max() <= 2**-7
    assert (off > 0).float().mean() < 0.01
    others = [expected[k] for k in expected if k != cast]
    assert all((found != other).float().mean() > 0.02 for other in others), "the casts differ where it matters"


def test_rms_norm_default_is_torchs():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, w = torch.randn(8, 16, generator=G).to(dtype), torch.rand(16, generator=G).to(dtype)
        torch.testing.assert_close(functional.rms_norm(x, (16,), w), F.rms_norm(x, (16,), w))
        tiny = x * 1e-6  # where eps decides
        torch.testing.assert_close(functional.rms_norm(tiny, (16,), w), F.rms_norm(tiny, (16,), w))


def test_pre_norm_forms_return_output_and_sum():
    r, w, b = torch.randn(X.shape, generator=G), torch.rand(3, generator=G), torch.rand(3, generator=G)
    y, total = functional.add_layer_norm(X, r, (3,), w, b)
    torch.testing.assert_close(total, X + r)
    torch.testing.assert_close(y, F.layer_norm(X + r, (3,), w, b))
    y, total = functional.add_rms_norm(X, r, (3,), w, 1e-6)
    torch.testing.assert_close(total, X + r)
    torch.testing.assert_close(y, F.rms_norm(X + r, (3,), w, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("uses", ["y", "total", "both"])
def test_pre_norm_forms_have_the_gradients_of_two_steps(norm, uses, dtype):
    """Compiled, in one pass, against two steps of the formula in float64; in float32 second gradients as well."""
    shapes = (4, 7, 33), (4, 7, 33), (33,), (33,)
    leaves = [torch.randn(shape, generator=G).to(dtype).requires_grad_() for shape in shapes]
    leaves = leaves[: 4 if norm == "layer" else 3]
    seeds = [torch.randn(shapes[0], generator=G).to(dtype) for _ in range(2)]

    def gradients(tensors, whole):
        x, r, *affine = tensors
        named = functional.add_layer_norm if norm == "layer" else functional.add_rms_norm
        pair = named(x, r, (33,), *affine, eps=1e-5)
        chosen = {"y": pair[:1], "total": pair[1:], "both": pair}[uses]
        given = {"y": seeds[:1], "total": seeds[1:], "both": seeds}[uses]
        wanted = tensors if uses != "total" else tensors[:2]
        first = torch.autograd.grad(chosen, wanted, [s.to(x.dtype) for s in given], create_graph=whole)
        if not whole or uses == "total":
            return (*pair, *first)
        return (*pair, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted[:3]))

    exact = [t.detach().double().requires_grad_() for t in leaves]
    for whole in (False, True) if dtype == torch.float32 else (False,):
        found = gradients(leaves, whole)
        with use_kernel("formula"):
            expected = gradients(exact, whole)
        for f, e in zip(found, expected, strict=True):
            # A few roundings of the largest value: sums over 28 rows of second gradients lose some digits.
            step = 2e-6 if dtype == torch.float32 else 2**-6
            assert f.dtype == dtype
            assert (
                float((f.detach().double() - e.detach()).abs().max())
                <= 10 * step * float(e.detach().abs().max()) + 1e-12
            )


def test_pre_norm_forms_are_one_kernel_and_broadcast_as_before():
    x, r = torch.randn(4, 64, generator=G), torch.randn(64, generator=G)
    y, total = functional.add_layer_norm(x, r, (64,))  # no kernel adds a row to a matrix
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.layer_norm(x + r, (64,)))
    y, total = functional.add_layer_norm(x.requires_grad_(), x.detach(), (64,))
    assert (y.grad_fn is total.grad_fn) == (available() is not None)
    with pytest.raises(NormError, match="weight"):
        functional.add_layer_norm(x, x, (64,), torch.ones(3))


def test_layer_norm_2d_is_layer_norm_over_channels():
    w, b = torch.rand(8, generator=G), torch.rand(8, generator=G)
    expected = F.layer_norm(X.movedim(1, -1), (8,), w, b, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(functional.layer_norm_2d(X, w, b), expected, rtol=0, atol=2e-6)
    expected = F.rms_norm(X.movedim(1, -1), (8,), w, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(functional.rms_norm_2d(X, w), expected, rtol=0, atol=2e-6)


def test_gradients_reach_a_residual_that_is_used_twice():
    """A backward that overwrote the incoming gradient would give 9 here instead of 12."""
    x = torch.randn(6, 4, requires_grad=True)
    r = torch.full((6, 4), 3.0, requires_grad=True)
    y = functional.batch_norm(x, None, None, training=True, residual=r)
    (y + 3 * r).sum().backward()
    torch.testing.assert_close(r.grad, torch.full((6, 4), 4.0))
    assert x.grad.abs().max() < 1e-5


WRONG = {
    "channels": (
        lambda: nk.BatchNorm2d(4)(X),
        r"`weight` must have 8 values for an input of shape \(4, 8, 5, 3\); got 4",
    ),
    "axes": (lambda: nk.BatchNorm2d(8)(X[0]), r"BatchNorm2d: the input must be 4D; got 3D, shape \(8, 5, 3\)"),
    "axes-1d": (lambda: nk.BatchNorm1d(8)(X), "BatchNorm1d: the input must be 2D or 3D; got 4D"),
    "one value": (
        lambda: nk.BatchNorm1d(8)(X[:1, :, 0, 0]),
        r"training needs at least 2 values per channel; got 1 for an input of shape \(1, 8\). hint: drop_last=True",
    ),
    "one position": (lambda: nk.InstanceNorm2d(8)(X[:, :, :1, :1]), "a map needs at least 2 positions; got 1"),
    "groups": (
        lambda: nk.GroupNorm(32, 72),
        r"`num_channels` must be divisible by `num_groups`; got 72 and 32. hint: use 24 or normkit.groups_for\(72\)",
    ),
    "group input": (lambda: nk.GroupNorm(2, 4)(X), "the input must have 4 channels in its second axis"),
    "group count": (lambda: functional.group_norm(X, 3), "the length of axis 1 must be divisible by 3; got shape"),
    "normalized_shape": (
        lambda: nk.LayerNorm(5)(X),
        r"axis 3 of the input must have length 5; got shape \(4, 8, 5, 3\)",
    ),
    "zero shape": (lambda: nk.LayerNorm(0), "`normalized_shape` must be whole numbers of at least 1; got 0"),
    "empty shape": (lambda: nk.LayerNorm(()), "`normalized_shape` must be whole numbers of at least 1"),
    "half statistics": (
        lambda: functional.batch_norm(X, torch.zeros(8), None),
        "running_mean and running_var must be given together; got only running_mean",
    ),
    "mask shape": (
        lambda: nk.BatchNorm2d(8)(X, mask=torch.ones(4, 8, 5, 3, dtype=torch.bool)),
        r"`mask` must broadcast to \(4, 5, 3\), the input's shape \(4, 8, 5, 3\) without its channel axis; got shape",
    ),
    "negative weight": (
        lambda: nk.BatchNorm2d(8)(X, sample_weight=torch.tensor([1.0, -1.0, 1.0, 1.0])),
        "`sample_weight` must be finite and >= 0; got -1",
    ),
    "residual": (lambda: functional.layer_norm(X, (3,), residual=X[:1]), "`residual` must have the shape of the input"),
    "gain": (lambda: nk.RMSNorm(3, gain="2w"), "RMSNorm: `gain` must be one of 'w', '1\\+w'; got '2w'"),
    "cast": (
        lambda: functional.rms_norm(X, (3,), cast="x"),  # although in float32 there is nothing to cast
        "`cast` must be 'llama', 'gemma' or 'none'; got 'x'",
    ),
    "virtual batch": (
        lambda: nk.GhostBatchNorm2d(8, virtual_batch_size=1),
        "`virtual_batch_size` must be a whole number of at least 2; got 1",
    ),
    "name": (lambda: nk.norm_layer("bach", 8, 2), "must be in the catalog; got 'bach'. hint: did you mean batch"),
    "no groups": (lambda: functional.group_norm(X, 0), "`num_groups` must be a whole number of at least 1; got 0"),
    "ghost size": (
        lambda: functional.ghost_batch_norm(X, None, None, virtual_batch_size=0),
        "`virtual_batch_size` must be a whole number of at least 2; got 0",
    ),
    "nonfinite": (
        lambda: functional.batch_norm(X, None, None, nonfinite="ignore"),
        "`nonfinite` must be one of 'skip', 'update'; got 'ignore'",
    ),
    "no count": (
        lambda: functional.batch_norm(X, torch.zeros(8), torch.ones(8), training=True, momentum=None),
        "`momentum=None` averages all batches and needs `num_batches_tracked`",
    ),
    "instance of a table": (lambda: nk.norm_layer("instance", 8, 0), "instance_norm needs spatial axes"),
}
WRONG_TYPE = {
    "integers": (lambda: nk.BatchNorm2d(8)(X.long()), "the input must be a floating point tensor; got torch.int64"),
    "array": (lambda: functional.layer_norm(X.numpy(), (3,)), "the input must be a floating point tensor; got ndarray"),
    "mask": (
        lambda: nk.BatchNorm2d(8)(X, mask=torch.ones(4, 5, 3)),
        r"`mask` must be boolean; got torch.float32. hint: True marks real data",
    ),
    "mask array": (lambda: nk.BatchNorm2d(8)(X, mask=X[:, 0].numpy() > 0), "`mask` must be a tensor; got ndarray"),
    "bessel": (lambda: functional.batch_norm(X, None, None, bessel="x"), "`bessel` must be True or False; got 'x'"),
    "no activation": (lambda: nk.NormAct(nk.BatchNorm2d(8), None), "`activation` must be a name; got None"),
    "schedule": (lambda: nk.BatchRenorm2d(8, schedule=3), "`schedule` must be a normkit RenormSchedule; got 3"),
    "features": (lambda: nk.BatchNorm2d("8"), "`num_features` must be a whole number of at least 1; got '8'"),
    "norm": (lambda: nk.NormAct("batch"), "`norm` must be a layer; got str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case):
    make, expected = WRONG[case]
    with pytest.raises(NormValueError, match=expected):
        make()


@pytest.mark.parametrize("case", WRONG_TYPE)
def test_wrong_types(case):
    make, expected = WRONG_TYPE[case]
    with pytest.raises(NormTypeError, match=expected):
        make()


OTHERS = {"NormAct", *normalizer_free.__all__, *weights.__all__}  # no norms of values
LAYERS = [getattr(nk, name) for name in nk.__all__ if name[0].isupper() and name not in OTHERS]
RECURRENT = dict.fromkeys(("BatchNormLSTM", "BatchNormGRU", "LayerNormLSTM", "LayerNormGRU"), (8, 8))
FIRST = {"LayerNorm": 8, "RMSNorm": 8, "GroupNorm": (2, 8), **RECURRENT}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.__name__)
def test_every_constrained_argument_refuses_every_bad_value(layer):
    given = FIRST.get(layer.__name__, 8)
    given = given if isinstance(given, tuple) else (given,)
    parameters = inspect.signature(layer.__init__).parameters
    constrained = [n for n in parameters if n in ARGUMENTS]
    assert constrained
    leading = [n for n in parameters if n != "self"][: len(given)]
    for name in constrained:
        for bad in ARGUMENTS[name].bad():
            if name == "eps" and bad is None:
                continue
            arguments = {**dict(zip(leading, given, strict=True)), name: bad}
            with pytest.raises((NormValueError, NormTypeError), match=f"`{name}` must be") as caught:
                layer(**arguments)
            assert ARGUMENTS[name].words() in str(caught.value)
            assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CATALOG)
def test_a_layer_for_every_entry_of_the_catalog(name, spatial):
    if name in ("instance", "evonorm_b0") and spatial == 0:
        pytest.skip("nothing to normalize over, refused: see WRONG")
    layer = nk.norm_layer(name, 8, spatial, steps=100)
    x = torch.randn(6, 8, *(3,) * spatial, generator=G)
    y = layer(x)
    assert y.shape == x.shape
    assert isinstance(layer, nn.Module)
    # What activates leaves only what is positive: of single positions, which frn makes signs, half are 1.
    assert abs(y.mean()) < (0.8 if CATALOG[name].activates else 0.5)
