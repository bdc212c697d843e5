"""The formula with sums over processes, in a group of one process: the same numbers as without. Several processes are
in tests/surgery/test_sync.py."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

import normkit.torch as nk
from normkit.errors import NormError
from normkit.torch import functional


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "images": (values(5, 3, 4, 2), {}),
    "rows": (values(6, 3), {}),
    "volumes, float64": (values(4, 3, 2, 2, 2).double(), {}),
    "far from zero": (1e4 + values(8, 3, 5), {}),
    "channels last": (values(5, 3, 4, 2).to(memory_format=torch.channels_last), {}),
    "bfloat16": (values(5, 3, 4, 2).bfloat16(), {}),
    "mask": (values(5, 3, 4), {"mask": values(5, 4, seed=1) > 0}),
    "weights": (values(5, 3, 4), {"sample_weight": 100 * values(5, seed=1).abs()}),
    "constant": (torch.ones(4, 3, 2), {}),
    "biased": (values(5, 3, 4), {"bessel": False}),
    "activation": (values(5, 3, 4), {"activation": "relu"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_process_in_a_group_is_one_without_in_float64(group, case):
    given, options = CASES[case]
    found = []
    for processes, x in ((None, given.double()), (group, given)):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.zeros(3, dtype=wide), torch.ones(3, dtype=wide)
        affine = [values(3, seed=seed).bfloat16().to(x) for seed in (2, 3)]  # the same in every type
        leaves = [t.clone().requires_grad_() for t in (x, *affine)]
        y = functional.batch_norm(leaves[0], mean, var, *leaves[1:], training=True, process_group=processes, **options)
        gradients = torch.autograd.grad(y, leaves, values(*y.shape, seed=4).bfloat16().to(y))
        found.append((y, mean, var, *gradients))
    # Some tens of roundings of sums in another order; in bfloat16 one of the output.
    limit = 8e-3 if given.dtype == torch.bfloat16 else 2e-5
    for mine, expected in zip(found[1], found[0], strict=True):
        assert (mine - expected).abs().max() <= limit * expected.abs().max().clamp(min=1)


def test_second_derivatives_go_through_the_processes(group):
    x = values(4, 2, 3).double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: functional.batch_norm(x, None, None, training=True, process_group=group), x
    )


def test_evaluation_asks_no_other_process(group, monkeypatch):
    x, layer = values(5, 3, 4), nk.SyncBatchNorm(3).eval()
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("asked"))
    kept = layer.running_mean, layer.running_var
    torch.testing.assert_close(functional.batch_norm(x, *kept, process_group=group), layer(x))
    layer(x, mask=x[:, 0] > 0)
    untracked = nk.SyncBatchNorm(3, track_running_stats=False).eval()
    torch.testing.assert_close(untracked(x), nk.BatchNorm1d(3)(x))


def test_alone_one_value_per_channel_is_refused(group):
    with pytest.raises(NormError, match="at least 2 values per channel"):
        nk.SyncBatchNorm(3)(values(1, 3))
    with pytest.raises(NormError, match="`process_group` must be a group"):
        nk.SyncBatchNorm(3, process_group=3)
    assert nk.SyncBatchNorm(3, process_group=group).process_group is group


@pytest.mark.parametrize("mode", [True, False])
def test_alone_it_is_its_twin_of_torch(mode):
    theirs = (torch.nn.BatchNorm2d if mode else torch.nn.SyncBatchNorm)(3, 1e-3, 0.2)  # that one trains on GPUs only
    ours, x = nk.SyncBatchNorm(3, 1e-3, 0.2), values(5, 3, 4, 2)
    for layer in (ours.train(mode), theirs.train(mode)):
        torch.nn.init.uniform_(layer.weight, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert str(ours).partition("(")[2] == str(theirs).partition("(")[2]
    positions = [list(inspect.signature(kind).parameters)[:8] for kind in (nk.SyncBatchNorm, torch.nn.SyncBatchNorm)]
    assert positions[0] == positions[1]
