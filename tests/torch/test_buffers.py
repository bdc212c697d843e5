"""Kept statistics: their type, when they are written, and when they are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit.torch as nk
from normkit.core.schedule import RenormSchedule

LAYERS = {
    "batch": lambda **k: nk.BatchNorm2d(4, **k),
    "ghost": lambda **k: nk.GhostBatchNorm2d(4, virtual_batch_size=2, **k),
    "renorm": lambda **k: nk.BatchRenorm2d(4, **k),
    "instance": lambda **k: nk.InstanceNorm2d(4, affine=True, track_running_stats=True, **k),
}
every = pytest.mark.parametrize("name", LAYERS)


def batch(seed=0, n=5):
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 3


def floats(layer):
    return {name: b for name, b in layer.named_buffers() if b.is_floating_point()}


@every
@pytest.mark.parametrize("narrow", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: nn.Sequential(m).half()[0],
], ids=["half", "bfloat16", "to", "parent"])  # fmt: skip
def test_narrowing_the_layer_leaves_float32_statistics_with_all_digits(name, narrow):
    layer = LAYERS[name]()
    layer(batch())
    before = {k: v.clone() for k, v in floats(layer).items()}
    layer = narrow(layer)
    assert next(layer.parameters()).dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(floats(layer), before, rtol=0, atol=0)
    assert layer(batch().to(next(layer.parameters()).dtype)).dtype == next(layer.parameters()).dtype


@every
def test_double_widens(name):
    layer = LAYERS[name]().double()
    assert {b.dtype for b in floats(layer).values()} == {torch.float64}
    layer(batch().double())
    assert {b.dtype for b in floats(layer.float()).values()} == {torch.float32}


@every
def test_assigned_half_state_is_widened(name):
    state = {k: v.half() if v.is_floating_point() else v for k, v in LAYERS[name]().state_dict().items()}
    layer = LAYERS[name]()
    layer.load_state_dict(state, assign=True)
    assert {b.dtype for b in floats(layer).values()} == {torch.float32}


@every
def test_constructed_in_half(name):
    layer = LAYERS[name](dtype=torch.bfloat16)
    assert {b.dtype for b in floats(layer).values()} == {torch.float32}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    y = layer(batch().bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@every
def test_on_meta_and_back(name):
    layer = LAYERS[name]().to("meta").to_empty(device="cpu")
    layer.reset_parameters()
    expected = LAYERS[name]()
    torch.testing.assert_close(layer(batch()), expected(batch()))


def test_a_small_momentum_still_moves_the_average_in_bfloat16():
    """In bfloat16 buffers the average of torch.nn stops at half way: the change is rounded away."""
    ours, theirs = nk.BatchNorm1d(1, momentum=1e-3).bfloat16(), nn.BatchNorm1d(1, momentum=1e-3).bfloat16()
    x = torch.tensor([[3.0], [5.0]], dtype=torch.bfloat16)
    for _ in range(3000):
        ours(x)
        theirs(x)
    truth = 4 * (1 - (1 - 1e-3) ** 3000)
    assert abs(ours.running_mean.item() - truth) < 1e-3
    assert abs(theirs.running_mean.item() - truth) > 0.5


def test_autocast_keeps_statistics_and_input_type():
    layer = nn.Sequential(nn.Conv2d(4, 4, 1), nk.BatchNorm2d(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(batch())
    assert y.dtype == torch.bfloat16
    assert layer[1].running_mean.dtype == torch.float32
    y.float().sum().backward()


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing_unless_asked(name, bad):
    x = batch()
    x[1, 2, 0, 0] = bad
    layer = LAYERS[name]()
    layer(batch())
    before = copy.deepcopy(layer.state_dict())
    y = layer(x)
    assert not y.isfinite().all(), "a gradient scaler must see it"
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer(batch(1))
    assert all(b.isfinite().all() for b in floats(layer).values())
    asked = LAYERS[name](nonfinite="update")
    asked(x)
    assert not all(b.isfinite().all() for b in floats(asked).values())
    if name != "instance":
        assert asked.num_batches_tracked == 1


@every
def test_the_count_covers_the_whole_layer(name):
    """One bad channel of four: the good channels are not updated either, or they would disagree with the count."""
    x = batch()
    x[0, 3] = float("nan")
    layer = LAYERS[name]()
    layer(x)
    torch.testing.assert_close(layer.state_dict(), LAYERS[name]().state_dict(), rtol=0, atol=0)


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(name, reentrant):
    layer, plain = LAYERS[name](), LAYERS[name]()
    x, y = batch().requires_grad_(), batch().requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(x.grad, y.grad)


@every
@pytest.mark.parametrize("training", [True, False])
def test_several_forwards_before_one_backward(name, training):
    layer = LAYERS[name]().train(training)
    xs = [batch(k).requires_grad_() for k in range(3)]
    copies = [copy.deepcopy(layer)]
    sum(layer(x).pow(3).sum() for x in xs).backward()
    for x, k in zip(xs, range(3), strict=True):
        alone = batch(k).requires_grad_()
        other = copy.deepcopy(copies[0])
        if training:
            for j in range(k):  # renorm depends on what was kept before
                other(batch(j))
        other(alone).pow(3).sum().backward()
        torch.testing.assert_close(x.grad, alone.grad)


@every
def test_cumulative_average_weighs_all_batches_alike(name):
    layer = LAYERS[name](momentum=None)
    for k in range(4):
        layer(batch(k))
    assert layer.num_batches_tracked == 4
    expected = torch.stack([batch(k).mean((0, 2, 3)) for k in range(4)]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected, rtol=0, atol=2e-6)  # a few eps of values near 3


def test_biased_variance_makes_training_and_evaluation_agree():
    layer = nk.BatchNorm2d(4, momentum=1.0, bessel=False)
    y = layer(batch())
    torch.testing.assert_close(layer.eval()(batch()), y, rtol=0, atol=2e-6)
    other = nk.BatchNorm2d(4, momentum=1.0)
    y = other(batch())
    assert (other.eval()(batch()) - y).abs().max() > 1e-2
    assert "bessel=False" in repr(layer)
    assert "bessel" not in repr(other)


@pytest.mark.parametrize("name", ["batch", "ghost", "instance"])
def test_tracking_switched_off_later_is_off(name):
    """torch.nn then trains on batch statistics and evaluates with stale ones."""
    layer = LAYERS[name]()
    layer(batch())
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(batch(1))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    expected = LAYERS[name]()(batch(2)) if name != "ghost" else nk.GhostBatchNorm2d(4, virtual_batch_size=2)(batch(2))
    torch.testing.assert_close(layer.eval()(batch(2)), expected)


@every
def test_evaluation_of_one_sample_never_depends_on_its_batch(name):
    layer = LAYERS[name]()
    for k in range(3):
        layer(batch(k))
    layer.eval()
    x = batch(9, 8)
    whole = layer(x)
    for n in (1, 3, 8):
        assert torch.equal(layer(x[:n]), whole[:n]), "bitwise"


def test_ghost_statistics_pool_the_groups():
    layer = nk.GhostBatchNorm2d(4, momentum=1.0, virtual_batch_size=2)
    x = batch(n=7)
    y = layer(x)
    groups = [x[0:2], x[2:4], x[4:6], x[6:7]]
    for part, out in zip(groups, (y[0:2], y[2:4], y[4:6], y[6:7]), strict=True):
        torch.testing.assert_close(out, nk.BatchNorm2d(4)(part))
    squares = sum(g.var((0, 2, 3), correction=0) * g[:, 0].numel() for g in groups)
    torch.testing.assert_close(layer.running_var, squares / sum(g[:, 0].numel() - 1 for g in groups))
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_ghost_leftover_of_one_value_joins_the_group_before():
    layer = nk.GhostBatchNorm1d(4, virtual_batch_size=3)
    x = torch.randn(7, 4)
    y = layer(x)
    torch.testing.assert_close(y[:3], nk.BatchNorm1d(4)(x[:3]))
    torch.testing.assert_close(y[3:], nk.BatchNorm1d(4)(x[3:]))


def test_renorm_without_clips_is_evaluation_with_the_statistics_before():
    """Inside the clips the training output is the evaluation output (arXiv:1702.03275, section 3)."""
    open_wide = RenormSchedule(r_max=1e6, d_max=1e6, start=0, r_end=0, d_end=0)
    layer = nk.BatchRenorm2d(4, schedule=open_wide)
    for k in range(3):
        layer(batch(k))
    expected = copy.deepcopy(layer).eval()(batch(3))
    torch.testing.assert_close(layer(batch(3)), expected, rtol=0, atol=5e-6)


def test_renorm_before_its_start_is_batch_norm():
    layer, plain = nk.BatchRenorm2d(4), nk.BatchNorm2d(4)
    for k in range(3):
        torch.testing.assert_close(layer(batch(k)), plain(batch(k)), rtol=0, atol=2e-6)


def test_renorm_follows_its_schedule():
    layer = nk.BatchRenorm1d(2, schedule=RenormSchedule.for_steps(100))
    seen = []
    for _ in range(40):
        seen.append(tuple(float(v) for v in layer.clips()))
        layer(torch.randn(4, 2))
    assert seen[4] == (1.0, 0.0)
    assert seen[5][0] > 1
    assert seen[5][1] > 0
    assert seen[19][1] == 5.0 > seen[18][1]
    assert seen[31][0] == 3.0 > seen[30][0]


@every
def test_a_mask_that_leaves_one_value_leaves_what_is_kept(name):
    """Without a mask a single value is refused; behind a mask it is simply not enough to learn from."""
    mask = torch.zeros(5, 3, 3, dtype=torch.bool)
    mask[0, 1, 1] = True
    layer = LAYERS[name]()
    layer(batch(), mask=mask)
    torch.testing.assert_close(layer.state_dict(), LAYERS[name]().state_dict(), rtol=0, atol=0)


@every
@pytest.mark.parametrize("training_between", [True, False])
def test_evaluation_before_training_and_one_backward(name, training_between):
    """What the first forward saved must not be the buffer that the second one writes."""
    layer, alone = LAYERS[name](), LAYERS[name]()
    x, other = batch().requires_grad_(), batch().requires_grad_()
    y = layer.eval()(x)
    if training_between:
        layer.train()(batch(1))
    y.pow(3).sum().backward()
    alone.eval()(other).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)


def test_renorm_refuses_to_be_checkpointed_once_its_clips_are_open():
    """Run again, it would correct by statistics that have moved: other gradients, silently."""
    layer = nk.BatchRenorm2d(4, schedule=RenormSchedule(start=0, r_end=0, d_end=0))
    y = checkpoint(layer, batch().requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="must not run this forward again"):
        y.sum().backward()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(32, 8, 56, 56), (8192, 8), (32, 8, 3136)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_many_values_far_from_zero(shape, offset, training):
    """1e5 values per channel, in every layout; naive sums over a column give a variance 57 times too large."""
    dims = len(shape) - 2
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if dims == 2 else [x]
    axes = [0, *range(2, len(shape))]
    exact = x.double()
    mean, var = exact.mean(axes, keepdim=True), exact.var(axes, correction=0, keepdim=True)
    expected = (exact - mean) / (var + 1e-5).sqrt()
    for laid in layouts:
        layer = getattr(nk, f"BatchNorm{max(1, dims)}d")(8, momentum=1.0, bessel=False)
        y = layer(laid)
        if not training:
            y = layer.eval()(laid)
        # float32 keeps a mean to half a spacing, 6e-8 of it; the output is off by that in standard deviations
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-6 + 2e-7 * offset)
        torch.testing.assert_close(layer.running_var.double(), var.flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(16, 4), (4, 4, 5, 5)], ids=str)
def test_evaluation_works_on_the_deviation(shape):
    """x * scale + shift would be off by 5e-4 here: 1e4 * eps / 2."""
    layer = getattr(nk, f"BatchNorm{max(1, len(shape) - 2)}d")(4).eval()
    layer.running_mean.fill_(1e4)
    layer.running_var.fill_(0.7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1e4
    expected = (x.double() - 1e4) / (0.7 + 1e-5) ** 0.5
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e19])
def test_only_proportions_of_weights_count(scale):
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    a, b = nk.BatchNorm2d(4), nk.BatchNorm2d(4)
    torch.testing.assert_close(b(batch(), sample_weight=weight * scale), a(batch(), sample_weight=weight))
    torch.testing.assert_close(b.state_dict(), a.state_dict())
