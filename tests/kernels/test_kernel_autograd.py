"""The compiled kernels inside PyTorch: autograd's habits, aliases, layouts, what is kept, and who else may watch."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import needs_kernels
from torch import nn
from torch.func import functional_call, grad, vmap

import normkit.torch as nk
from normkit.torch import _compiled as compiled
from normkit.torch import functional as nf
from normkit.torch import use_kernel

pytestmark = needs_kernels
ATOL = 2e-5  # 170 roundings of float32 in units of the largest value: two orders of summation are 10 apart

LAYERS = {
    "batch": lambda: nk.BatchNorm2d(6),
    "ghost": lambda: nk.GhostBatchNorm2d(6, virtual_batch_size=2),
    "instance": lambda: nk.InstanceNorm2d(6, affine=True),
    "instance-tracked": lambda: nk.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "group": lambda: nk.GroupNorm(2, 6),
    "layer": lambda: nk.LayerNorm([6, 5, 5]),
    "layer_2d": lambda: nk.LayerNorm2d(6),
    "rms": lambda: nk.RMSNorm(5),
    "rms_2d": lambda: nk.RMSNorm2d(6, gain="1+w"),
}
ONLY_CONTIGUOUS = {"layer", "rms"}
ONLY_LAST = {"layer_2d", "rms_2d"}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [
    (name, layout)
    for name, layout in itertools.product(LAYERS, FORMATS)
    if not (name in ONLY_CONTIGUOUS and layout == "channels_last")
    and not (name in ONLY_LAST and layout == "contiguous")
]
every = pytest.mark.parametrize(("name", "layout"), CASES)


def made(name, training=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LAYERS[name]().train(training)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
        for key, b in layer.named_buffers():
            if key.startswith("running"):
                b.uniform_(0.5, 1.5)
    return layer.to(dtype)


def data(layout="contiguous", dtype=torch.float32, seed=1, n=4):
    x = torch.randn(n, 6, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return x.to(dtype).contiguous(memory_format=FORMATS[layout])


def gradients(layer, x, dy, *, activation="silu", residual=None, kernel=None):
    """Output, gradients and buffers of one step."""
    layer = nk.NormAct(layer, activation)
    leaves = [x.detach().requires_grad_()]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    with use_kernel(kernel) if kernel else nullcontext():
        y = layer(*leaves)
        found = torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)
    return [y.detach(), *found, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every
def test_native_and_formula_are_twins(name, layout, dtype, training):
    x, residual, dy = (data(layout, dtype, seed) for seed in (1, 2, 3))
    # In bfloat16 the formula rounds before the residual and the activation too: three roundings and their slopes.
    room = ATOL if dtype == torch.float32 else 2**-6
    for activation, r in (("leaky_relu", None), ("gelu", residual)):
        steps = [
            gradients(made(name, training), x, dy, activation=activation, residual=r, kernel=kernel)
            for kernel in ("native", "formula")
        ]
        for mine, other in zip(*steps, strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=0, atol=room * max(1.0, float(other.abs().max())))


@pytest.fixture
def counted(monkeypatch):
    """How often the compiled kernels were called."""
    calls = {"forward": 0, "backward": 0}

    class Counting:
        def __getattr__(self, name):
            if name in calls:
                calls[name] += 1
            return getattr(native, name)

    native = compiled._native
    monkeypatch.setattr(compiled, "_native", Counting())
    return calls


@every
def test_double_backward(name, layout, counted):
    x = data(layout).double()

    def penalty(layer, x, **how):
        y = (nf.ACTIVATIONS["silu"](layer(x)) ** 2).sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        wanted = [x, *layer.parameters()]
        # A shift is no longer in the gradient of some; it gets none.
        return torch.autograd.grad((slope**2).sum(), wanted, allow_unused=True)

    right = penalty(made(name, dtype=torch.float64), x.clone().requires_grad_())
    got = penalty(made(name), x.float().contiguous(memory_format=FORMATS[layout]).requires_grad_())
    assert counted["forward"] == 1
    for mine, other in zip(got, right, strict=True):
        if other is None:
            assert mine is None or not mine.any()
        else:
            size = float(other.abs().max())
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-4 * max(size, 1.0))


@every
def test_a_retained_graph_and_hooks_and_kept_gradients(name, layout):
    x, dy = data(layout).requires_grad_(), data(layout, seed=5)
    kept = dy.clone()
    y = nk.NormAct(made(name), "relu")(x)
    seen = []
    y.register_hook(lambda g: seen.append(g.clone()))
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(first, second)
    assert torch.equal(dy, kept)  # the user's own tensor: never written
    assert all(torch.equal(g, kept) for g in seen)


@every
def test_several_forwards_before_one_backward(name, layout):
    layer = made(name)
    xs = [data(layout, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    sum((layer(x) ** 2).sum() for x in xs).backward()
    for x in xs:
        alone = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        (made(name)(alone) ** 2).sum().backward()
        assert torch.equal(x.grad, alone.grad)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@every
def test_x_is_its_own_residual(name, layout, activation):
    """And, without an activation, gradients that several consumers are handed are not written into."""

    def run(x, kernel):
        with use_kernel(kernel):
            layer = made(name)
            h = x * 1.0
            y = _norm(layer, h, activation)
            (y * 3 + h).sum().backward()
            return x.grad

    def _norm(layer, h, activation):
        if activation is None:
            return layer(h) + h
        return nk.NormAct(layer, activation)(h, h)

    one, two = (run(data(layout).requires_grad_(), kernel) for kernel in ("native", "formula"))
    torch.testing.assert_close(one, two, rtol=0, atol=ATOL)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_residual_without_an_activation_passes_its_gradient_on(layout):
    x, r = (data(layout, seed=seed).requires_grad_() for seed in (1, 2))
    w, b = (torch.ones(6, requires_grad=True) for _ in range(2))
    y = nf.batch_norm(x, None, None, w, b, training=True, residual=r)
    dy = data(layout, seed=3)
    kept = dy.clone()
    y.backward(dy)
    assert torch.equal(r.grad, kept)
    r.grad.add_(1)  # a gradient that is accumulated into must be nobody else's
    assert torch.equal(dy, kept)


@pytest.mark.parametrize("layout", FORMATS)
def test_buffers_that_change_between_forward_and_backward(layout):
    layer = made("batch", training=False)
    x = data(layout).requires_grad_()
    y = nk.NormAct(layer, "silu")(x)
    (right,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        layer.running_mean.add_(5)
        layer.running_var.mul_(7)
    (after,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(after, right)


def test_parameters_that_change_between_forward_and_backward_are_an_error():
    layer = made("batch")
    y = layer(data().requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every
def test_gradients_in_other_layouts(name, layout):
    """Expanded from one number, as `.sum()` gives them; of the other layout; every second value of a larger one."""
    other = "contiguous" if layout == "channels_last" else "channels_last"
    plain = data(layout, seed=3)
    twice = torch.empty(4, 12, 5, 10)
    strided = twice[:, ::2, :, ::2].copy_(plain)
    for dy in (torch.tensor(0.7).expand(4, 6, 5, 5), data(other, seed=3), strided):
        x = data(layout)
        right = gradients(made(name), x, dy.contiguous(memory_format=FORMATS[layout]), residual=plain)
        got = gradients(made(name), x, dy, residual=plain)
        for mine, same in zip(got, right, strict=True):
            assert torch.equal(mine, same)


@every
def test_a_residual_in_another_layout(name, layout):
    other = "contiguous" if layout == "channels_last" else "channels_last"
    x, dy = data(layout), data(layout, seed=3)
    r = data(layout, seed=2)
    right = gradients(made(name), x, dy, residual=r)
    got = gradients(made(name), x, dy, residual=r.contiguous(memory_format=FORMATS[other]))
    for mine, same in zip(got, right, strict=True):
        assert torch.equal(mine, same)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every
def test_only_what_is_asked_for_gets_a_gradient(name, layout, training):
    x, dy = data(layout), data(layout, seed=3)
    whole = gradients(made(name, training), x, dy, residual=None)
    layer = made(name, training)
    layer.requires_grad_(False)
    assert not nk.NormAct(layer, "silu")(x).requires_grad
    layer.weight.requires_grad_(True)
    y = nk.NormAct(layer, "silu")(x)
    y.backward(dy)
    assert torch.equal(layer.weight.grad, whole[2])
    if getattr(layer, "bias", None) is not None:
        assert layer.bias.grad is None
    layer.requires_grad_(False)
    alone = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(nk.NormAct(layer, "silu")(alone), alone, dy)
    assert torch.equal(dx, whole[1])


@pytest.mark.parametrize("start", [1, 2, 3])
def test_inputs_that_start_at_an_odd_place(start):
    memory = torch.randn(4 * 6 * 25 + 8)
    x = memory[start : start + 600].view(4, 6, 5, 5)
    assert torch.equal(made("batch")(x), made("batch")(x.clone()))


def test_autocast(counted):
    """A convolution in bfloat16 and a norm whose parameters stay float32, as autocast leaves them."""
    conv, layer = nn.Conv2d(6, 6, 3), made("batch")
    x = data(n=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h = conv(x)
        y = nk.NormAct(layer, "relu")(h)
    assert h.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.float32
    assert counted == {"forward": 1, "backward": 1}


def test_half_parameters_get_half_gradients(counted):
    layer = made("batch").bfloat16()
    y = layer(data(dtype=torch.bfloat16).requires_grad_())
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert counted == {"forward": 1, "backward": 1}


@every
def test_the_kernels_run(name, layout, counted):
    gradients(made(name), data(layout), data(layout, seed=3))
    assert counted == {"forward": 1, "backward": 1}


def test_whoever_watches_gets_plain_operations(counted):
    """torch.func, vmap, compile and export see operations they know; no address leaves a traced program."""
    layer = made("layer")
    x = data()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return (functional_call(layer, parameters, (x,)) ** 2).sum()

    slopes = grad(loss)(parameters, x)
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    exported = torch.export.export(made("batch").eval(), (x,)).module()(x)
    compiled_ = torch.compile(made("group"), backend="eager", fullgraph=True)(x)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    assert counted == {"forward": 0, "backward": 0}
    eager = made("layer")
    (eager(x) ** 2).sum().backward()
    torch.testing.assert_close(slopes["weight"], eager.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(per_sample["weight"].sum(0), eager.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, made("batch").eval()(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled_, made("group")(x), rtol=0, atol=1e-5)


class Wrapped(torch.Tensor):
    """A subclass that sees the operations done to it."""


def test_a_subclass_gets_plain_operations(counted):
    y = made("layer")(data().as_subclass(Wrapped))
    assert isinstance(y, Wrapped)
    assert counted["forward"] == 0


@pytest.mark.parametrize("activation", ["silu", "hardswish", "relu6"])
@pytest.mark.parametrize("layout", FORMATS)
def test_bytes_kept_for_backward(activation, layout):
    """Convolution, norm, activation, convolution: the norm keeps what the first convolution gave, the second
    convolution what it is given, and nobody keeps the input of the activation."""
    channels = 16
    first, second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
    x = torch.randn(4, channels, 12, 12).contiguous(memory_format=FORMATS[layout])

    def kept(run):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(x)
        del y
        known = {p.untyped_storage().data_ptr() for m in (first, second) for p in m.parameters()}
        return sum(size for place, size in storages.items() if place not in known)

    layer = nk.NormAct(nk.BatchNorm2d(channels), activation)
    tensor = x.numel() * x.element_size()
    small = 100 * channels * 4  # gamma, beta, statistics
    ours = kept(lambda x: second(layer(first(x))))
    assert 3 * tensor <= ours <= 3 * tensor + small  # x, the first convolution's output, the activation's
    plain = nn.BatchNorm2d(channels)
    torchs = kept(lambda x: second(nf.ACTIVATIONS[activation](plain(first(x)))))
    assert torchs >= 4 * tensor  # what is saved here: the test measures what it says


@pytest.mark.parametrize("layout", FORMATS)
def test_evaluation_does_not_depend_on_the_batch_around_the_limit_of_one_thread(layout, threads):
    """Bit for bit, with the batch below and above the size from which several threads work."""
    torch.set_num_threads(2)
    size = compiled._ALONE // 4
    x = torch.randn(8, 16, size // 64, 4).contiguous(memory_format=FORMATS[layout])
    layers = [nk.BatchNorm2d(16).eval(), nk.InstanceNorm2d(16).eval(), nk.GroupNorm(4, 16).eval()]
    layers.append(nk.LayerNorm(x.shape[1:]) if layout == "contiguous" else nk.LayerNorm2d(16))
    for layer in layers:
        whole = layer(x)
        for k in range(1, 8):
            assert torch.equal(layer(x[:k]), whole[:k]), f"{layer}, batch of {k}"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_agree(threads):
    x, dy = torch.randn(48, 16, 10, 10), torch.randn(48, 16, 10, 10)
    assert x.numel() > compiled._ALONE
    for layout in FORMATS.values():
        steps = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            steps.append(
                gradients(nk.BatchNorm2d(16), x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout))
            )
        for step in steps[1:]:
            for mine, other in zip(step, steps[0], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_statistics_that_are_not_finite_do_not_enter_the_buffers():
    layer = made("batch")
    before = [b.clone() for b in layer.buffers()]
    x = data()
    x[0, 0, 0, 0] = float("nan")
    assert layer(x).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_no_gradient_and_inference_mode():
    layer, x = made("batch", training=False), data()
    right = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), right)
    with torch.inference_mode():
        assert torch.equal(layer(x), right)
    assert not F.relu(right).isnan().any()
