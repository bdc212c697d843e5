"""Norms become identities, and nothing else changes."""

import pytest
import torch
from architectures import built
from torch import nn

import normkit
from normkit.errors import NormError


def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
    ).eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("which", "gone"),
    [
        ("batch", ["1"]),
        ("4", ["4"]),
        ([nn.GroupNorm, "batch"], ["1", "4"]),
        (lambda path, _: path > "1", ["4"]),
    ],
)
def test_norms_that_are_named_go(which, gone):
    before = model()
    result, report = normkit.remove(before, which, example=X, return_report=True)
    assert [edit.path for edit in report.done] == gone
    assert [str(n) for n, layer in enumerate(result) if isinstance(layer, nn.Identity)] == gone
    assert not [layer for layer in before if isinstance(layer, nn.Identity)]
    expected = nn.Sequential(*(layer for n, layer in enumerate(before) if str(n) not in gone))
    assert torch.equal(result(X), expected(X))
    measured = (before(X) - expected(X)).abs().max() / before(X).abs().max()
    assert report.difference == pytest.approx(measured.item())
    assert "fold" in normkit.remove.__doc__


def test_dry_run_and_in_place_and_optimizer():
    one = model()
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    assert not isinstance(one[1], nn.Identity)
    report = normkit.remove(one, "batch", dry_run=True)
    assert type(one[1]) is nn.BatchNorm2d
    assert report.difference is None
    assert normkit.remove(one, "batch", inplace=True, optimizer=optimizer) is one
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in one.parameters()}


def test_an_architecture_without_its_norms_runs():
    before, x = built("llama")
    result, report = normkit.remove(before, "rms", example=x, return_report=True)
    assert len(report.done) == 5
    assert not any("norm" in key for key in result.state_dict())


@pytest.mark.parametrize(
    ("which", "said"),
    [("layer", "must mean a layer"), (3, "must hold paths, classes"), ([], "must have a norm that can be removed")],
)
def test_bad_arguments(which, said):
    with pytest.raises(NormError, match=said):
        normkit.remove(model(), which)
