"""What is decided once about a call: nothing is remembered that another call should not have."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import needs_kernels

import normkit.torch as nk
from normkit.torch import _compiled as compiled
from normkit.torch import functional as nf

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(compiled, "_known", {})


def given(**changed):
    of = {"weight": torch.ones(4), "bias": torch.zeros(4), "training": True, "momentum": 1.0, "activation": "relu"}
    return of | {"running_mean": torch.zeros(4), "running_var": torch.ones(4)} | changed


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"momentum": True}, "`momentum` must be"),  # equal to 1.0
        ({"momentum": None}, "needs `num_batches_tracked`"),
        ({"nonfinite": "drop"}, "`nonfinite` must be"),
        ({"bessel": 1}, "`bessel` must be"),
        ({"activation": "rely"}, "`activation` must be known"),
        ({"weight": torch.ones(3)}, "`weight` must have 4 values"),
        ({"bias": torch.ones(3)}, "`bias` must have 4 values"),
        ({"running_var": torch.ones(3)}, "`running_var` must have 4 values"),
        ({"residual": torch.ones(2, 4, 3)}, "`residual` must have the shape"),
    ],
)
def test_what_is_wrong_stays_wrong_after_a_call_that_was_right(changed, says):
    x = torch.randn(2, 4, 5)
    nf.batch_norm(x, **given())
    assert len(compiled._known) == 1
    with pytest.raises((ValueError, TypeError), match=says):
        nf.batch_norm(x, **given(**changed))
    with pytest.raises(ValueError, match="at least 2 values"):
        nf.batch_norm(torch.randn(1, 4, 1), **given())


def test_a_layer_that_changes_its_types_is_another_case():
    torch.manual_seed(0)
    layer, x = nk.BatchNorm2d(4), torch.randn(3, 4, 5, 5)
    for change in (lambda: layer, layer.bfloat16, layer.float, layer.eval, layer.double):
        change()
        x = x.to(layer.weight.dtype)
        twin = nk.BatchNorm2d(4).to(x.dtype).train(layer.training)
        twin.load_state_dict(layer.state_dict())
        y = layer(x)
        with nk.use_kernel("formula"):
            other = twin(x)
        torch.testing.assert_close(y, other, rtol=2**-7 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_a_choice_by_hand_is_no_other_choice():
    layer, x = nk.LayerNorm(6), torch.randn(3, 6)
    layer(x)
    with nk.use_kernel("reference"), pytest.raises(RuntimeError, match="computes outputs only"):
        layer(x)
    with nk.use_kernel("native"):
        layer(x)
        with pytest.raises(ValueError, match="must cover the input"):
            layer(x.double())


def test_how_many_are_remembered(monkeypatch):
    monkeypatch.setattr(compiled, "_CASES", 3)
    layer = nk.GroupNorm(2, 4)
    for n in range(1, 12):
        x = torch.randn(n, 4, 5)
        with nk.use_kernel("formula"):
            want = layer(x)
        torch.testing.assert_close(layer(x), want)
        assert 1 <= len(compiled._known) <= 3


def test_a_counter_of_another_type_is_counted():
    number = torch.zeros((), dtype=torch.int32)
    for _ in range(2):
        nf.batch_norm(torch.randn(2, 4, 5), **given(num_batches_tracked=number))
    assert number == 2
