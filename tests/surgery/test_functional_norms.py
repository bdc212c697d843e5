"""Batch norms that are functions: what each verb makes of them."""

import pytest
import torch
import torch.nn.functional as F
from architectures import randomized
from torch import nn

import normkit
import normkit.torch as ours
from normkit.errors import NormError

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Holds the tensors of a batch norm, and calls the function."""

    def __init__(self, norm=F.batch_norm):
        super().__init__()
        self.conv, self.head, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), norm
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        kept = self.running_mean, self.running_var
        return self.head(self.norm(self.conv(x), *kept, self.weight, self.bias, self.training).relu())


def model():
    return randomized(nn.Sequential(Block()))


STATE = "0.running_mean, 0.running_var, 0.weight, 0.bias"


def test_fold_says_what_is_called_where_and_what_to_write_instead():
    given = model()
    folded, report = normkit.fold(given, X, return_report=True)
    (edit,) = report.edits
    assert (edit.path, edit.old, edit.new) == ("0", "batch_norm", None)
    assert edit.reason == (
        f"it is a function that this forward calls with {STATE}, and cannot be taken out: make it a layer, "
        "nn.BatchNorm2d(4)"
    )
    assert torch.equal(folded(X), given(X))
    with pytest.warns(UserWarning, match="nothing was folded; 0: it is a function that this forward calls"):
        normkit.fold(model(), X)
    with pytest.warns(UserWarning, match="nothing was folded; batch_norm: it is a function"):
        normkit.fold(randomized(Block()), X)


def test_fold_folds_what_is_a_layer_beside_it():
    both = randomized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Block()))
    folded, report = normkit.fold(both, X, return_report=True)
    assert [(edit.path, edit.new) for edit in report.edits] == [("1", "identity"), ("2", None)]
    torch.testing.assert_close(folded(X), both(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "instead"),
    [
        (lambda y, mean, var, w, b, training: F.layer_norm(y, y.shape[2:]), "nn.LayerNorm"),
        (lambda y, mean, var, w, b, training: F.group_norm(y, 2, w, b), "nn.GroupNorm"),
        (lambda y, mean, var, w, b, training: F.instance_norm(y, mean, var, w, b, training), r"nn.InstanceNorm2d\(4\)"),
    ],
)
def test_other_functions_too(function, instead):
    report = normkit.fold(randomized(Block(function)), X, dry_run=True)
    assert len(report.edits) == 1
    with pytest.warns(UserWarning, match=f"make it a layer, {instead}"):
        normkit.fold(randomized(Block(function)), X)


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_insert_counts_it_as_a_norm(how, monkeypatch):
    if how == "export":
        monkeypatch.setattr("normkit.torch.graph._dynamo", lambda *_: None)
    report = normkit.insert(model(), "batch", X, dry_run=True)
    assert report.how == how
    assert {edit.path: edit.reason for edit in report.edits} == {
        "0.conv": "batch_norm at 0 normalizes its output already",
        "0.head": "no linear map follows it: it gives an output of the model",
    }


SAID = r"running statistics in batch norms alone.*got running_mean and running_var of {}.*nn.BatchNorm2d"


def test_recalibrate_says_that_it_is_not_reached():
    both = nn.Sequential(nn.BatchNorm2d(3), Block())
    with pytest.warns(UserWarning, match="recalibrate and adapt reach " + SAID.format(1)):
        normkit.recalibrate(both, X)
    assert both[0].running_mean.any()
    assert not both[1].running_mean.any()
    with pytest.warns(UserWarning, match=SAID.format("Block")), pytest.raises(NormError, match="must hold batch norms"):
        normkit.recalibrate(Block(), X)


def test_freeze_says_that_it_is_not_reached():
    both = nn.Sequential(nn.BatchNorm2d(3), Block())
    with pytest.warns(UserWarning, match="freeze reaches " + SAID.format(1)):
        normkit.freeze(both)
    both.train()(X)
    assert not both[0].running_mean.any()
    assert both[1].running_mean.any()


def test_layers_with_running_statistics_of_another_kind_are_named():
    both = nn.Sequential(nn.BatchNorm2d(3), ours.BatchNormLSTM(3, 2))
    said = r"freeze reaches running statistics in batch norms alone.*running_mean_\w+ and running_\w+ of 1"
    with pytest.warns(UserWarning, match=said):
        normkit.freeze(both)
