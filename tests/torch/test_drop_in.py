"""Our layers in the place of torch.nn's: same arguments, same state, same numbers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

import normkit.torch as nk

PAIRS = {
    name: (getattr(nk, name), getattr(nn, name))
    for name in (
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
        "LayerNorm",
        "GroupNorm",
        "RMSNorm",
    )
}
SHAPES = {"1d": (5, 6, 7), "2d": (5, 6, 4, 3), "3d": (3, 6, 4, 3, 2)}
MAKE = {
    **{name: ((6,), SHAPES[name[-2:]]) for name in PAIRS if name[-1] == "d"},
    "LayerNorm": (((4, 3),), SHAPES["2d"]),
    "GroupNorm": ((3, 6), SHAPES["2d"]),
    "RMSNorm": ((3,), SHAPES["2d"]),
}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def close(ours, theirs, scale=1.0):
    """Both round: each may be off by a few eps of the largest term, and sums of up to 400 terms add their own."""
    eps = torch.finfo(theirs.dtype).eps
    magnitude = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=32 * eps * magnitude * scale)


def laid_out(x, layout):
    if layout == "channels_last" and x.dim() in LAYOUTS:
        return x.contiguous(memory_format=LAYOUTS[x.dim()])
    if layout == "strided":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def same_step(ours, theirs, x, layout="contiguous"):
    """Run both once and compare outputs, gradients and buffers."""
    a = laid_out(x.clone(), layout).requires_grad_()
    b = laid_out(x.clone(), layout).requires_grad_()
    ya, yb = ours(a), theirs(b)
    assert ya.dtype == yb.dtype
    close(ya, yb)
    g = torch.randn(yb.shape, dtype=yb.dtype, generator=torch.Generator().manual_seed(1))
    ya.backward(g)
    yb.backward(g)
    close(a.grad, b.grad)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        close(p.grad, q.grad, scale=4)
    for (name, p), (other, q) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        close(p, q) if p.is_floating_point() else torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", PAIRS)
def test_subclass_with_torchs_signature(name):
    ours, theirs = PAIRS[name]
    assert issubclass(ours, theirs)
    mine, parent = (inspect.signature(c.__init__).parameters for c in (ours, theirs))
    shared = [p for p in mine.values() if p.name in parent]
    assert [(p.name, p.default, p.kind) for p in shared] == [
        (q.name, inspect.Parameter.empty if q.default is q.empty else q.default, q.kind) for q in parent.values()
    ]
    added = [p for p in mine.values() if p.name not in parent]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added), "additions must be keyword only"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PAIRS)
def test_same_numbers_and_state(name, training, layout):
    ours, theirs = PAIRS[name]
    arguments, shape = MAKE[name]
    torch.manual_seed(0)
    theirs = theirs(*arguments)
    ours = ours(*arguments)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
        for b in theirs.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 2.0)
    assert ours.load_state_dict(theirs.state_dict()) == nn.Module().load_state_dict({})
    assert repr(ours) == repr(theirs)
    ours.train(training)
    theirs.train(training)
    for _ in range(3):
        x = torch.randn(shape) * 2 + 3
        ours.zero_grad()
        theirs.zero_grad()
        same_step(ours, theirs, x, layout)
    assert theirs.load_state_dict(ours.state_dict()) is not None
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", [n for n in PAIRS if n[-1] == "d"])
@pytest.mark.parametrize("options", [
    {"affine": False}, {"track_running_stats": False}, {"affine": True, "track_running_stats": True},
    {"momentum": 0.3}, {"eps": 0.1}, {"bias": False}, {"momentum": None},
], ids=str)  # fmt: skip
def test_options_mean_what_they_mean_in_torch(name, options):
    if name.startswith("Instance") and "momentum" in options:
        options = {**options, "track_running_stats": True}
        if options["momentum"] is None:
            pytest.skip("torch's instance norm takes None for 0 and never updates; ours averages")
    ours, theirs = (c(6, **options) for c in PAIRS[name])
    torch.manual_seed(0)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        same_step(ours, theirs, torch.randn(SHAPES[name[-2:]]))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_pickle_deepcopy_and_save(name):
    layer = PAIRS[name][0](*MAKE[name][0])
    x = torch.randn(MAKE[name][1])
    layer(x)
    layer.eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def samples():
    for info in module_db:
        kind = info.module_cls.__name__
        if kind in PAIRS:
            for training in (True, False):
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
                )
                for i, sample in enumerate(inputs):
                    yield pytest.param(kind, sample, training, id=f"{kind}-{'train' if training else 'eval'}-{i}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("kind", "sample", "training"), list(samples()))
def test_torchs_own_sample_inputs(kind, sample, training, layout):
    """PyTorch's database of modules lists constructor and forward arguments for every norm layer."""
    made = sample.constructor_input
    torch.manual_seed(0)
    theirs = PAIRS[kind][1](*made.args, **made.kwargs)
    ours = PAIRS[kind][0](*made.args, **made.kwargs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    theirs.train(training)
    (x,) = sample.forward_input.args
    assert not sample.forward_input.kwargs
    try:
        theirs(x.clone())
    except ValueError:
        with pytest.raises(ValueError, match=r"must|needs"):
            ours(x.clone())
        return
    theirs.load_state_dict(ours.state_dict())
    same_step(ours, theirs, x, layout)


def test_the_sample_database_covers_every_pair():
    assert {info.module_cls.__name__ for info in module_db} >= set(PAIRS)


def test_converted_state_without_a_counter():
    """Checkpoints older than num_batches_tracked still load."""
    state = {k: v for k, v in nn.BatchNorm2d(4).state_dict().items() if k != "num_batches_tracked"}
    layer = nk.BatchNorm2d(4)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0


def test_layer_of_another_framework_version_keeps_its_bias_choice():
    assert nk.BatchNorm2d(4, bias=False).bias is None
    assert nk.GroupNorm(2, 4, bias=False).bias is None
    assert nk.LayerNorm(4, bias=False).bias is None


def test_torchs_own_tools_accept_the_layers():
    conv, bn = nn.Conv2d(3, 6, 3), nk.BatchNorm2d(6)
    x = torch.randn(8, 3, 7, 7)
    for _ in range(3):
        bn(conv(x))
    bn.eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), bn)
    torch.testing.assert_close(fused(x), bn(conv(x)), rtol=0, atol=1e-5)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn))[0], nn.SyncBatchNorm)
    model = nn.Sequential(nk.BatchNorm2d(3))
    torch.optim.swa_utils.update_bn([x[:4], x[4:]], model)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert model[0].momentum == 0.1


def test_instance_norm_warns_of_other_channels_like_torch():
    for layer in (nk.InstanceNorm2d(4), nn.InstanceNorm2d(4)):
        with pytest.warns(UserWarning, match="num_features"):
            layer(torch.randn(2, 6, 3, 3))
    with pytest.raises(ValueError, match="must have 6 values"):
        nk.InstanceNorm2d(4, affine=True)(torch.randn(2, 6, 3, 3))
