"""NormAct: one function with a child of ours, child and then activation with any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit.torch as nk
from normkit.errors import NormValueError
from normkit.torch import functional
from normkit.torch.layers import _OURS, _fusable

X = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
R = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(1))
NORMS = {
    "BatchNorm2d": lambda: nk.BatchNorm2d(8),
    "GhostBatchNorm2d": lambda: nk.GhostBatchNorm2d(8, virtual_batch_size=2),
    "BatchRenorm2d": lambda: nk.BatchRenorm2d(8),
    "InstanceNorm2d": lambda: nk.InstanceNorm2d(8),
    "GroupNorm": lambda: nk.GroupNorm(4, 8),
    "LayerNorm": lambda: nk.LayerNorm((5, 5)),
    "LayerNorm2d": lambda: nk.LayerNorm2d(8),
    "RMSNorm": lambda: nk.RMSNorm(5),
    "RMSNorm2d": lambda: nk.RMSNorm2d(8),
}
TORCH = {
    "relu": torch.relu,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


def test_every_activation_is_tested():
    assert set(TORCH) == set(functional.ACTIVATIONS)


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("norm", NORMS)
def test_activation_of_norm_plus_residual(norm, activation):
    layer = nk.NormAct(NORMS[norm](), activation)
    expected = TORCH[activation](NORMS[norm]()(X) + R)
    torch.testing.assert_close(layer(X, R), expected, rtol=0, atol=5e-6)  # a few eps of values below 6
    torch.testing.assert_close(layer(X), TORCH[activation](NORMS[norm]()(X)), rtol=0, atol=5e-5)


def test_the_fused_call_is_taken_exactly_where_nothing_else_happens():
    plain = nk.BatchNorm2d(8)
    assert _fusable(plain)
    hooked = nk.BatchNorm2d(8)
    hooked.register_forward_hook(lambda *_: None)
    assert not _fusable(hooked)

    class Own(nk.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + 100

    assert not _fusable(Own(8))
    assert nk.NormAct(Own(8))(X).min() > 90, "a subclass' forward is not passed over"
    assert not _fusable(nn.BatchNorm2d(8))
    assert {layer.__name__ for layer in _OURS} >= set(NORMS)


def test_hooks_of_the_child_run():
    seen = []
    layer = nk.NormAct(nk.BatchNorm2d(8))
    layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.min().item()))
    layer(X)
    assert len(seen) == 1
    assert seen[0] < 0, "the hook sees what the norm gives, before the activation"


def test_a_foreign_child_keeps_its_behaviour():
    foreign = nn.BatchNorm2d(8)
    layer = nk.NormAct(foreign, "silu")
    torch.testing.assert_close(layer(X, R), torch.nn.functional.silu(nn.BatchNorm2d(8)(X) + R))
    assert foreign.num_batches_tracked == 1


def test_tools_find_the_norm_and_its_names():
    layer = nk.NormAct(nk.BatchNorm2d(8))
    assert isinstance(layer.norm, nn.BatchNorm2d)
    assert set(layer.state_dict()) == {f"norm.{k}" for k in nn.BatchNorm2d(8).state_dict()}


def test_trace_shows_norm_and_activation_apart():
    traced = torch.fx.symbolic_trace(nn.Sequential(nk.NormAct(nk.BatchNorm2d(8), "relu")))
    kinds = [(n.op, str(n.target)) for n in traced.graph.nodes if n.op.startswith("call")]
    assert kinds[0] == ("call_module", "0.norm")
    assert "relu" in kinds[1][1]
    torch.testing.assert_close(traced(X), torch.relu(nk.BatchNorm2d(8)(X)))


def test_mask_goes_to_the_norm():
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    mask[:, 3:] = False
    y = nk.NormAct(nk.BatchNorm2d(8), "silu")(X, R, mask=mask)
    assert not y[:, :, 3:].any(), "masked positions are 0, residual included"


def test_unknown_activation_names_the_nearest():
    with pytest.raises(NormValueError, match=r"`activation` must be known; got 'rellu'. hint: did you mean relu"):
        nk.NormAct(nk.BatchNorm2d(8), "rellu")
    with pytest.raises(NormValueError, match="did you mean relu"):
        functional.group_norm(X, 4, activation="rellu")


@pytest.mark.parametrize("activation", TORCH)
def test_padding_of_a_residual_reaches_no_gradient(activation):
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    mask[:, 3:] = False
    x, r = X.clone().requires_grad_(), R.clone()
    r[:, :, 3:] = float("nan")
    r.requires_grad_()
    layer = nk.NormAct(nk.BatchNorm2d(8), activation)
    layer(x, r, mask=mask).sum().backward()
    for t in (x, r, *layer.parameters()):
        assert t.grad.isfinite().all()


def test_a_replaced_forward_and_global_hooks_are_respected():
    layer = nk.NormAct(nk.BatchNorm2d(8))
    layer.norm.forward = lambda x: torch.full_like(x, 7.0)
    assert (layer(X) == 7).all()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        nk.NormAct(nk.BatchNorm2d(8))(X)
    finally:
        handle.remove()
    assert nk.BatchNorm2d in seen
