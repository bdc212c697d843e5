"""What PyTorch does to functions, done to our layers: torch.func, forward AD, double backward, fx, compile, export."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import normkit.torch as nk
from normkit.errors import NormRuntimeError

MAKERS = {
    "BatchNorm2d": lambda: nk.BatchNorm2d(6),
    "BatchNorm2d-cumulative": lambda: nk.BatchNorm2d(6, momentum=None),
    "BatchNorm2d-untracked": lambda: nk.BatchNorm2d(6, track_running_stats=False),
    "GhostBatchNorm2d": lambda: nk.GhostBatchNorm2d(6, virtual_batch_size=3),
    "BatchRenorm2d": lambda: nk.BatchRenorm2d(6),
    "InstanceNorm2d": lambda: nk.InstanceNorm2d(6, affine=True),
    "InstanceNorm2d-tracked": lambda: nk.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "LayerNorm": lambda: nk.LayerNorm(4),
    "LayerNorm2d": lambda: nk.LayerNorm2d(6),
    "GroupNorm": lambda: nk.GroupNorm(2, 6),
    "RMSNorm": lambda: nk.RMSNorm(4),
    "RMSNorm2d": lambda: nk.RMSNorm2d(6),
    "NormAct": lambda: nk.NormAct(nk.BatchNorm2d(6), "silu"),
}
TRACKED = {name for name, make in MAKERS.items() if any(True for _ in make().buffers())}
N = 7  # with groups of 3, a group of 1 x 4 x 4 values is left over


def layer(name, training, dtype=torch.float64):
    torch.manual_seed(0)
    made = MAKERS[name]().to(dtype).train(training)
    with torch.no_grad():
        for p in made.parameters():
            p.uniform_(0.5, 1.5)
    return made


def data(dtype=torch.float64, n=N):
    return torch.randn(n, 6, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 + 1


def eager_gradient(made, x):
    x = x.clone().requires_grad_()
    (made(x) ** 3).sum().backward()
    return x.grad


both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
every = pytest.mark.parametrize("name", MAKERS)
TIGHT = {"rtol": 0, "atol": 1e-9}  # float64: 1e7 eps of room for another order of operations, 1e-9 below any mistake


@both_modes
@every
def test_func_grad_and_jacobians(name, training):
    made, x = layer(name, training), data()
    expected = eager_gradient(copy.deepcopy(made), x)
    torch.testing.assert_close(grad(lambda a: (made(a) ** 3).sum())(x), expected, **TIGHT)
    rows = jacrev(lambda a: (made(a) ** 3).sum((1, 2, 3)))(x)
    torch.testing.assert_close(rows.sum(0), expected, **TIGHT)
    _, along = jvp(lambda a: (made(a) ** 3).sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum(), rtol=0, atol=1e-7)
    column = jacfwd(lambda shift: (made(x + shift) ** 3).sum())(torch.zeros((), dtype=x.dtype))
    torch.testing.assert_close(column, expected.sum(), rtol=0, atol=1e-7)


@both_modes
@every
def test_func_grad_of_parameters(name, training):
    made, x = layer(name, training), data()
    other = copy.deepcopy(made)
    (other(x) ** 3).sum().backward()
    found = grad(lambda p: (functional_call(made, p, (x,)) ** 3).sum())(dict(made.named_parameters()))
    for key, p in other.named_parameters():
        torch.testing.assert_close(found[key], p.grad, **TIGHT)
    for a, b in zip(made.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)  # the transform updates the statistics like the eager step


@both_modes
@every
def test_vmap_of_grad(name, training):
    made, xs = layer(name, training), torch.stack([data(), data() * 3])
    run = vmap(grad(lambda a: (made(a) ** 3).sum()))
    if training and name in TRACKED:
        before = copy.deepcopy(made.state_dict())
        with pytest.raises(NormRuntimeError, match="one value, but under `vmap` every lane has its own"):
            run(xs)
        torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)
        return
    expected = torch.stack([eager_gradient(made, x) for x in xs])
    torch.testing.assert_close(run(xs), expected, **TIGHT)


def test_vmap_over_models_with_their_own_statistics():
    """An ensemble: stacked parameters and buffers, each lane its own model."""
    models = [layer("BatchNorm2d", True) for _ in range(3)]
    xs = torch.stack([data() * (k + 1) for k in range(3)])
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def run(p, b, x):
        return functional_call(base, (p, b), (x,))

    y = vmap(run)(params, buffers, xs)
    for k, model in enumerate(models):
        torch.testing.assert_close(y[k], model(xs[k]), **TIGHT)
        torch.testing.assert_close(buffers["running_mean"][k], model.running_mean, **TIGHT)


@both_modes
@every
def test_forward_mode(name, training):
    made, x = layer(name, training), data()
    t = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    expected = (eager_gradient(copy.deepcopy(made), x) * t).sum()
    with forward_ad.dual_level():
        y = (made(forward_ad.make_dual(x, t)) ** 3).sum()
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-7)


@both_modes
@every
def test_gradcheck_and_double_backward(name, training):
    """Finite differences of first and second derivatives, for every path an eager call can take."""
    made = layer(name, training)
    small = data(n=3)[:, :, :2].clone().requires_grad_()
    kept = [b.clone() for b in made.buffers()]

    def run(x):  # from the same kept statistics every time
        for buffer, value in zip(made.buffers(), kept, strict=True):
            buffer.data.copy_(value)
        return made(x)

    assert torch.autograd.gradcheck(run, (small,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (small,), fast_mode=True)
    last = small.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(run, (last,), fast_mode=True)


@every
def test_symbolic_trace_keeps_the_layer_and_its_mode(name):
    made = layer(name, True, torch.float32)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), made, nn.ReLU())
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = data(torch.float32)
    torch.testing.assert_close(traced(x), model(x))
    for mode in (False, True):  # a frozen mode would show here
        torch.testing.assert_close(traced.train(mode)(x), model.train(mode)(x))


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"BatchRenorm2d", "NormAct"}))
def test_symbolic_trace_of_a_layer_alone(name):
    """A root is always traced through: one call of our function remains."""
    made = layer(name, False, torch.float32)
    torch.testing.assert_close(torch.fx.symbolic_trace(made)(data(torch.float32)), made(data(torch.float32)))


def test_symbolic_trace_through_the_functions():
    class Own(nn.Module):
        def forward(self, x):
            return nk.functional.layer_norm(nk.functional.group_norm(x, 2), (4,))

    traced = torch.fx.symbolic_trace(Own())
    assert [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"] == ["group_norm", "layer_norm"]
    torch.testing.assert_close(traced(data()), Own()(data()))


@both_modes
@every
def test_compile_in_one_graph_for_every_batch_size(name, training):
    torch._dynamo.reset()
    made = layer(name, training, torch.float32)
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 8, 11):
        a, b = data(torch.float32, n).requires_grad_(), data(torch.float32, n).requires_grad_()
        ya, yb = compiled(a), made(b)
        # float32 in another order of operations; outputs are below 10 and their gradients below 100
        torch.testing.assert_close(ya, yb, rtol=0, atol=2e-5)
        (ya**2).sum().backward()
        (yb**2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2e-4)
    for p, q in zip(compiled.buffers(), made.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm"])
def test_compile_with_the_default_backend(name):
    torch._dynamo.reset()
    made = layer(name, True, torch.float32)
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, dynamic=True)
    for n in (6, 9):
        torch.testing.assert_close(compiled(data(torch.float32, n)), made(data(torch.float32, n)), rtol=0, atol=2e-5)


LOAD = """
import sys, torch
sys.modules["normkit"] = None  # importing it would fail
program = torch.export.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), y, rtol=0, atol=2e-5)
print("loaded", len(list(program.graph.nodes)))
"""


def test_export_loads_where_normkit_is_not_installed(tmp_path):
    layers = [layer(name, False, torch.float32) for name in MAKERS if name != "NormAct"]
    model = nn.Sequential(*layers, nk.NormAct(nk.BatchNorm2d(6), "relu")).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (data(torch.float32, 5),), dynamic_shapes=({0: batch},))
    foreign = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"} - {
        "aten",
        "<built-in function getitem>",
    }
    assert not {t for t in foreign if "normkit" in t}, foreign
    torch.export.save(program, tmp_path / "model.pt2")
    x = data(torch.float32, 9)
    torch.save((x, model(x)), tmp_path / "case.pt")
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model.pt2", tmp_path / "case.pt"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "loaded" in ran.stdout


def test_export_uses_operations_other_runtimes_know():
    model = nn.Sequential(nk.BatchNorm2d(6), nk.LayerNorm(4), nk.GroupNorm(2, 6), nk.RMSNorm(4)).eval()
    program = torch.export.export(model, (data(torch.float32),))
    found = [n.target.__name__.split(".")[0] for n in program.graph.nodes if n.op == "call_function"]
    assert found == ["batch_norm", "layer_norm", "group_norm", "rms_norm"]


@pytest.mark.parametrize("masked", [False, True])
def test_first_gradients_of_a_layer_used_twice_do_not_depend_on_create_graph(masked):
    made = layer("GhostBatchNorm2d", True)
    mask = torch.rand(N, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None

    def run():
        return (torch.tanh(made(torch.sin(made(data(), mask)), mask)) ** 3).sum()

    plain = torch.autograd.grad(run(), list(made.parameters()))
    graphed = torch.autograd.grad(run(), list(made.parameters()), create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(b, a, **TIGHT)


def test_vmap_over_renorms_with_their_own_statistics():
    models = [layer("BatchRenorm2d", True) for _ in range(2)]
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    xs = torch.stack([data(), data() * 2])
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(params, buffers, xs)
    for k, model in enumerate(models):
        torch.testing.assert_close(y[k], model(xs[k]), **TIGHT)
