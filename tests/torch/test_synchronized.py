"""Synchronized batch norm in a group of one process: the same numbers as without. Several processes are in
test_distributed.py and in tests/surgery/test_sync.py."""

from __future__ import annotations

import inspect
import itertools
import json
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import normkit
import normkit.torch as nk
from normkit.errors import NormError
from normkit.kernels import instruction_sets, registry
from normkit.torch import _compiled as compiled
from normkit.torch import coverage, functional, layers
from normkit.torch.factory import norm_layer


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The calls of one step.
HALVES = ["forward", "forward", "backward", "gradient"]


@pytest.fixture
def called(monkeypatch):
    """The names of the compiled functions that are called for a group of processes."""
    names = []

    class Calls:
        def __getattr__(self, name):
            names.append(name)
            return getattr(native, name)

    native = compiled._native
    if native is not None:
        monkeypatch.setattr(compiled, "_native", Calls())
    return names


CASES = {
    "images": (values(5, 3, 4, 2), {}),
    "rows": (values(6, 3), {}),
    "volumes, float64": (values(4, 3, 2, 2, 2).double(), {}),
    "far from zero": (1e4 + values(8, 3, 5), {}),
    "channels last": (values(5, 3, 4, 2).to(memory_format=torch.channels_last), {}),
    "bfloat16": (values(5, 3, 4, 2).bfloat16(), {}),
    "mask": (values(5, 3, 4), {"mask": values(5, 4, seed=1) > 0}),
    "mask and residual": (
        values(5, 3, 4, 2).to(memory_format=torch.channels_last),
        {"mask": values(5, 4, 2, seed=1) > 0, "residual": values(5, 3, 4, 2, seed=5), "activation": "silu"},
    ),
    "weights": (values(5, 3, 4), {"sample_weight": 100 * values(5, seed=1).abs()}),
    "constant": (torch.ones(4, 3, 2), {}),
    "biased": (values(5, 3, 4), {"bessel": False}),
    "activation": (values(5, 3, 4), {"activation": "relu"}),
    "residual": (values(5, 3, 4, 2), {"activation": "gelu", "residual": values(5, 3, 4, 2, seed=5)}),
    "residual alone": (values(5, 3, 4).bfloat16(), {"residual": values(5, 3, 4, seed=5).bfloat16()}),
    "another layout": (values(5, 3, 4, 2).transpose(2, 3), {"activation": "silu"}),
    "float16": (values(5, 3, 4).half(), {}),
}
# What the compiled halves take; the formula takes the others, and all where it is chosen.
OF_THE_FORMULA = {"volumes, float64", "float16", "weights"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [None, "formula"])
def test_one_process_in_a_group_is_one_without_in_float64(group, case, kernel, called):
    given, options = CASES[case]
    found = []
    for processes, x in ((None, given.double()), (group, given)):
        if "residual" in options:
            options = options | {"residual": options["residual"].to(x)}
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.zeros(3, dtype=wide), torch.ones(3, dtype=wide)
        affine = [values(3, seed=seed).bfloat16().to(x) for seed in (2, 3)]  # the same in every type
        leaves = [t.clone().requires_grad_() for t in (x, *affine)]
        with nk.use_kernel(kernel) if kernel is not None else nullcontext():
            y = functional.batch_norm(
                leaves[0], mean, var, *leaves[1:], training=True, process_group=processes, **options
            )
            gradients = torch.autograd.grad(y, leaves, values(*y.shape, seed=4).bfloat16().to(y))
        found.append((y, mean, var, *gradients))
    halves = [] if kernel is not None or case in OF_THE_FORMULA or not instruction_sets() else HALVES
    assert called == halves
    # Some tens of roundings of sums in another order; in half precision one of the output.
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(given.dtype, 2e-5)
    for mine, expected in zip(found[1], found[0], strict=True):
        assert (mine - expected).abs().max() <= limit * expected.abs().max().clamp(min=1)


def test_no_gradient_but_one_that_is_asked_for(group):
    """Some of x, residual, gamma and beta need none; without a gradient of x no other process is asked."""
    shapes = (5, 3, 4), (5, 3, 4), (3,), (3,)
    for needs in itertools.product([False, True], repeat=4):
        if not any(needs):
            continue
        found = []
        for dtype, processes in ((torch.float64, None), (torch.float32, group)):
            leaves = [
                values(*shape, seed=k).to(dtype).requires_grad_(need)
                for k, (shape, need) in enumerate(zip(shapes, needs, strict=True))
            ]
            x, residual, gamma, beta = leaves
            options = {"training": True, "residual": residual, "activation": "silu", "process_group": processes}
            y = functional.batch_norm(x, None, None, gamma, beta, **options)
            y.backward(values(5, 3, 4, seed=9).to(dtype))
            found.append([leaf.grad for leaf in leaves])
        for mine, expected, need in zip(found[1], found[0], needs, strict=True):
            assert (mine is None) == (not need)
            if mine is not None:
                torch.testing.assert_close(mine.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.skipif(not instruction_sets(), reason="the package was installed without compiled kernels")
def test_a_rule_about_a_layout_or_a_size_does_not_part_the_processes(group, called, tmp_path, monkeypatch):
    """One process may be told so and another not; what each of them exchanges has to be the same."""
    for rule, expected in (({"layout": "contiguous"}, HALVES[:2]), ({"below": 10**6}, HALVES[:2]), ({}, [])):
        path = tmp_path / f"{len(rule)}.json"
        path.write_text(json.dumps({"rules": [rule | {"normalizer": "batch_norm", "use": "formula"}]}))
        monkeypatch.setenv("NORMKIT_KERNELS", str(path))
        registry._rules.cache_clear()
        called.clear()
        functional.batch_norm(values(5, 3, 4), None, None, training=True, process_group=group)
        assert called == expected
    monkeypatch.undo()
    registry._rules.cache_clear()


def test_the_table_of_kernels_is_what_happens(group, called):
    rows = [row for row in coverage.coverage().rows if row.normalizer == coverage.SYNCHRONIZED]
    assert {row.kernel for row in rows} == ({"native", "formula"} if instruction_sets() else {"formula"})
    for row in rows:
        form = getattr(torch, row.layout if row.layout == "channels_last" else "contiguous_format")
        x = values(5, 3, 4, 2).to(getattr(torch, row.dtype)).contiguous(memory_format=form)
        called.clear()
        functional.batch_norm(x, None, None, training=True, process_group=group)
        assert bool(called) == (row.kernel == "native") == (not row.why_not_native), row


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_kept_and_not_warned_of(group, bad, recwarn):
    x = values(5, 3, 4)
    x[2, 1, 3] = bad
    mean, var, number = torch.zeros(3), torch.ones(3), torch.tensor(0)
    arguments = {"training": True, "num_batches_tracked": number, "process_group": group}
    y = functional.batch_norm(x, mean, var, **arguments)
    assert y[:, 1].isnan().any()
    torch.testing.assert_close(y[:, ::2], functional.batch_norm(x[:, ::2], None, None, training=True))
    assert not mean.any()
    assert number == 0
    assert not recwarn.list


def test_what_native_does_not_cover_is_an_error_where_it_is_chosen(group):
    with nk.use_kernel("native"), pytest.raises(NormError, match="must cover the input"):
        functional.batch_norm(values(5, 3, 4).double(), None, None, training=True, process_group=group)


def test_second_derivatives_of_the_halves_are_those_of_the_formula(group):
    found = []
    for dtype, processes in ((torch.float64, None), (torch.float32, group)):
        x, gamma = values(4, 2, 3).to(dtype).requires_grad_(), values(2, seed=1).to(dtype).requires_grad_()
        y = functional.batch_norm(x, None, None, gamma, training=True, activation="silu", process_group=processes)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (x, gamma)))
    for mine, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("axis", [1, -1])
def test_activation_and_residual_are_handed_on(group, axis):
    """To the layer itself, so that padding is 0 behind the residual too, and one kernel does it all."""
    torch.manual_seed(0)
    plain = nk.NormAct(nk.BatchNorm1d(3), "silu")
    synced = nk.NormAct(normkit.sync(norm_layer("batch", 3, axis=axis)), "silu")
    assert type(synced.norm) is nk.SyncBatchNorm
    assert layers._fusable(synced.norm)
    x, residual, mask = values(5, 3, 4), values(5, 3, 4, seed=1), values(5, 4, seed=2) > 0
    for mode in (True, False):
        expected = plain.train(mode)(x, residual=residual, mask=mask)
        y = synced.train(mode)(x.movedim(1, axis), residual=residual.movedim(1, axis), mask=mask)
        torch.testing.assert_close(y.movedim(axis, 1), expected, rtol=0, atol=1e-5)
    assert not layers._fusable(normkit.sync(torch.nn.BatchNorm1d(3))), "it evaluates by torch's own function"
    assert not layers._fusable(type("Derived", (nk.SyncBatchNorm,), {})(3))
