"""RMS norm rounds where the models it is named after do: `transformers`' own layers, bit for bit in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import normkit.torch as nk

pytest.importorskip("transformers")

BITS = {torch.bfloat16: 8, torch.float16: 11}  # of a number, the leading one included
# Both compute in float32, sums and roots in another order, and so differ by a few of its spacings before they round.
WIDE = 8 * 2.0**-24


def theirs(cast, features, dtype):
    """The layer and the gain of ours."""
    if cast == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm
    else:
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as Norm
    layer = Norm(features, eps=1e-6)
    with torch.no_grad():
        layer.weight.add_(torch.randn(features) / 2)
    return layer.to(dtype), "w" if cast == "llama" else "1+w"


def between_two(value, dtype):
    """Whether exact values lie so near to the middle between two half numbers that float32 may take the other one."""
    value = np.abs(value)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(value, torch.finfo(dtype).tiny))) + 1 - BITS[dtype])
    return np.abs(value / spacing % 1 - 0.5) * spacing <= WIDE * value


@pytest.mark.parametrize("features", [7, 96, 768])
@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_outputs_are_those_of_transformers_to_the_bit(cast, dtype, features):
    torch.manual_seed(0)
    torch.compiler.reset()  # of which layers were compiled before
    layer, gain = theirs(cast, features, dtype)
    ours = nk.RMSNorm(features, 1e-6, dtype=dtype, gain=gain, cast=cast)
    ours.load_state_dict(layer.state_dict())
    x = (3 * torch.randn(64, features) + 1).to(dtype)
    expected = layer(x).detach()
    wide = x.double().numpy()
    exact = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-6)
    if cast == "gemma":  # which rounds after the gain
        exact = exact * (1 + layer.weight.detach().double().numpy())
    for computed in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        found = computed(x).detach()
        assert found.dtype == dtype
        differ = (found != expected).numpy()
        assert not (differ & ~between_two(exact, dtype)).any()
        assert differ.mean() < 1e-3
    for other in {"llama", "gemma", "none"} - {cast}:
        ours.cast = other
        assert (ours(x) != expected).double().mean() > 0.01, "the casts differ where it matters"


@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_gradients_are_those_of_transformers(cast):
    torch.manual_seed(0)
    layer, gain = theirs(cast, 96, torch.bfloat16)
    ours = nk.RMSNorm(96, 1e-6, dtype=torch.bfloat16, gain=gain, cast=cast)
    ours.load_state_dict(layer.state_dict())
    x, dy = (torch.randn(64, 96).bfloat16() for _ in range(2))
    found = []
    for norm in (layer, ours):
        given = x.clone().requires_grad_()
        norm(given).backward(dy)
        found.append((given.grad, norm.weight.grad))
    for mine, its in zip(*found, strict=True):
        # Differences of nearly equal terms: some values in a thousand round the other way.
        assert (mine != its).double().mean() < 0.01
        torch.testing.assert_close(mine, its, rtol=2**-7, atol=1e-3)


def test_in_single_precision_there_is_nothing_to_cast():
    torch.manual_seed(0)
    x = torch.randn(8, 96)
    layer, gain = theirs("gemma", 96, torch.float32)
    for cast in ("llama", "gemma", "none"):
        ours = nk.RMSNorm(96, 1e-6, gain=gain, cast=cast)
        ours.load_state_dict(layer.state_dict())
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-6, atol=1e-6)
