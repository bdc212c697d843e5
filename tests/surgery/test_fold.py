"""Folding gives the same outputs, or says why not; the original stays as it was."""

import copy
import io
import json
import re

import onnx.reference
import pytest
import torch
import torch.nn.functional as F
from architectures import randomized
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normkit
from normkit import torch as ours
from normkit.errors import NormError
from normkit.surgery import folding
from normkit.torch import folding as torch_folding
from normkit.torch.sites import sites

pytestmark = pytest.mark.filterwarnings("ignore:nothing was folded")

# Of the largest output. A fold rounds each weight once, 6e-8 or 1e-16; the limits are the issue's.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def same(before, after, dtype):
    assert before.shape == after.shape
    assert (before - after).abs().max() <= CLOSE[dtype] * before.abs().max()


def check(model, shape, dtype=torch.float64, changed=None):
    """Fold, compare on the example and elsewhere, and see that the original is bit for bit what it was."""
    torch.manual_seed(0)
    model = randomized(model).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folded, report = normkit.fold(model, x, return_report=True)
    with torch.no_grad():
        for inputs in (x, 3 * torch.randn(shape, dtype=dtype) + 1):
            same(model(inputs), folded(inputs), dtype)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in folded.parameters()}
    assert all(p.dtype == dtype for p in folded.parameters())
    if changed is not None:
        assert [edit.path for edit in report.done] == changed, report
    return folded, report


class Frozen(nn.Module):
    """A norm of kept statistics that is none of torch's classes."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(-1, 1, 1) + (self.bias - self.running_mean * scale).reshape(-1, 1, 1)


class Transposed(nn.Module):
    """Linear on the last axis, batch norm on axis 1, as in models of sequences."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.linear(x)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return self.norm_free(y)

    @staticmethod
    def norm_free(y):
        return F.relu(y)


class Flattened(Transposed):
    """LeViT's way: all positions as rows."""

    def forward(self, x):
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


BEFORE = {
    "conv1d": ([nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()], (2, 3, 9)),
    "conv2d, no bias": ([nn.Conv2d(3, 6, 3, bias=False, padding=1), nn.BatchNorm2d(6)], (2, 3, 7, 7)),
    "conv3d": ([nn.Conv3d(3, 6, 2, stride=2), nn.BatchNorm3d(6)], (2, 3, 5, 5, 5)),
    "grouped, dilated": ([nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6, eps=1e-3)], (2, 4, 9, 9)),
    "depthwise": ([nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)], (2, 4, 7, 7)),
    "reflected border": ([nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)], (2, 3, 7, 7)),
    "transposed 1d": ([nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)], (2, 4, 5)),
    "transposed, grouped": (
        [nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1, bias=False), nn.BatchNorm2d(6)],
        (2, 4, 5, 5),
    ),
    "transposed 3d": ([nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6)], (2, 4, 3, 3, 3)),
    "linear": ([nn.Linear(5, 6), nn.BatchNorm1d(6)], (8, 5)),
    "without gamma and beta": ([nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False)], (8, 5)),
    "sequence": ([Transposed()], (2, 7, 5)),
    "positions as rows": ([Flattened()], (2, 7, 5)),
    "through dropout": ([nn.Conv2d(3, 6, 3), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm2d(6)], (2, 3, 7, 7)),
    "frozen": ([nn.Conv2d(3, 6, 3), Frozen(6)], (2, 3, 7, 7)),
    "ours": ([nn.Conv2d(3, 6, 3), ours.BatchNorm2d(6)], (2, 3, 7, 7)),
    "ours, frozen": ([nn.Conv2d(3, 6, 3), ours.GhostBatchNorm2d(6, virtual_batch_size=2)], (2, 3, 7, 7)),
    "with its activation": ([nn.Conv2d(3, 6, 3), ours.NormAct(ours.BatchNorm2d(6), "gelu")], (2, 3, 7, 7)),
    "renorm": ([nn.Conv2d(3, 6, 3), ours.BatchRenorm2d(6)], (2, 3, 7, 7)),
    "instance norm with statistics": (
        [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)], (2, 3, 7, 7),
    ),
    "two in a row": ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], (2, 3, 7, 7)),
    "no batch axis": ([nn.Conv2d(3, 6, 3), nn.Unflatten(0, (1, 6)), nn.BatchNorm2d(6)], (3, 7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("case", BEFORE)
def test_batch_norm_goes_into_the_map_before_it(case, dtype):
    layers, shape = copy.deepcopy(BEFORE[case])
    folded, report = check(nn.Sequential(*layers), shape, dtype)
    assert not report.kept, report
    assert not list(sites(folded))
    assert report.how == "dynamo"


class Several(nn.Module):
    """One norm, three linear maps."""

    def __init__(self, norm, bias=True):
        super().__init__()
        self.norm, self.maps = norm, nn.ModuleList([nn.Linear(6, 5, bias=bias and n == 0) for n in range(3)])

    def forward(self, x):
        y = self.norm(x)
        return torch.cat([one(y) for one in self.maps], -1)


class Windows(nn.Module):
    """Swin's windows: positions are moved about between norm and map."""

    def __init__(self):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.norm(x).roll((1, 1), (1, 2)).view(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5)
        return self.map(y.reshape(-1, 4, 6))


BEHIND = {
    "conv without padding": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False, stride=2)], (2, 4, 7, 7)),
    "depthwise": ([nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)], (2, 4, 7, 7)),
    "valid": ([nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding="valid")], (2, 4, 7)),
    "same, one by one": ([nn.BatchNorm1d(4), nn.Conv1d(4, 6, 1, padding="same")], (2, 4, 7)),
    "circular border": ([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")], (2, 4, 7, 7)),
    "linear": ([nn.BatchNorm1d(6), nn.Linear(6, 4)], (8, 6)),
    "flattened maps": ([nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 5, 4)], (2, 3, 4, 5)),
    "layer norm": ([nn.LayerNorm(6), nn.Linear(6, 4, bias=False)], (2, 7, 6)),
    "layer norm over maps": ([nn.LayerNorm((3, 4, 5)), nn.Flatten(), nn.Linear(60, 4)], (2, 3, 4, 5)),
    "layer norm 2d": ([ours.LayerNorm2d(4), nn.Conv2d(4, 6, 2)], (2, 4, 5, 5)),
    "RMS norm": ([nn.RMSNorm(6), nn.Linear(6, 4, bias=False)], (2, 7, 6)),
    "RMS norm, 1 + w": ([ours.RMSNorm(6, gain="1+w"), nn.Linear(6, 4)], (2, 7, 6)),
    "group norm": ([nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3)], (2, 4, 5, 5)),
    "RMS norm, transposed": ([ours.RMSNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)], (2, 4, 5, 5)),
    "several": ([Several(nn.LayerNorm(6))], (2, 7, 6)),
    "several, batch norm": ([Several(nn.BatchNorm1d(6))], (8, 6)),
    "windows": ([Windows()], (2, 4, 4, 6)),
}


@pytest.mark.parametrize("case", BEHIND)
def test_norms_go_into_the_maps_behind_them(case):
    layers, shape = copy.deepcopy(BEHIND[case])
    folded, report = check(nn.Sequential(*layers), shape)
    assert len(report.done) == 1, report
    assert not report.kept
    for module in folded.modules():
        if "Norm" in type(module).__name__:  # layer, RMS and group norm stay, without gamma and beta
            assert not list(module.parameters())


def test_a_shift_of_zero_needs_no_bias_and_may_meet_padding():
    norm = nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(norm, nn.Conv2d(4, 6, 3, padding=1, bias=False)).double().eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 7, 7).double()
    folded = normkit.fold(model, x)
    same(model(x), folded(x), torch.float64)
    assert folded[1].bias is None
    assert isinstance(folded[0], nn.Identity)


def test_a_norm_of_another_class_keeps_gamma_as_a_one():
    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)

    norm = Gemma()
    nn.init.normal_(norm.weight)
    folded, _ = check(nn.Sequential(norm, nn.Linear(6, 4)), (3, 6), changed=["0"])
    assert folded[0].weight.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("norm", "removed"),
    [
        (nn.InstanceNorm2d(6), True),
        (nn.GroupNorm(6, 6), True),
        (nn.BatchNorm2d(6, track_running_stats=False), True),
        (nn.GroupNorm(3, 6), False),
        (nn.LayerNorm(5), False),
    ],
)
def test_a_bias_goes_only_where_it_is_subtracted_again(norm, removed):
    folded, report = check(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU()), (2, 3, 7, 7))
    assert (folded[0].bias is None) == removed, report
    assert ("0.bias" in {edit.path for edit in report.done}) == removed


def test_a_bias_that_is_part_of_kept_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.ReLU())
    assert not normkit.fold(model, X, dry_run=True).done


class Branches(nn.Module):
    """A norm whose input, or whose output, is read by something else too."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.norm, self.last, self.where = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), where

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(F.relu(y) if self.where == "behind" else y)
        if self.where == "before":
            return F.relu(z) + y
        if self.where == "in place":
            F.relu(y, inplace=True)
            return F.relu(self.norm(y))
        if self.where == "twice":
            return F.relu(self.norm(F.relu(z)))
        if self.where == "shared":
            return F.relu(z) + F.relu(self.conv(F.relu(z)))
        if self.where == "weight":
            return F.relu(z) + self.conv.weight.sum()
        if self.where == "function":
            return F.relu(z) + F.relu(F.batch_norm(x, self.norm.running_mean, self.norm.running_var))
        return self.last(z) + z


def hooked(layer, kind="forward"):
    getattr(layer, f"register_{kind}_hook")(lambda *_: None)
    return layer


def two_names(layer):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), layer)
    model.append(nn.Sequential(model[0], nn.BatchNorm2d(3)))
    return model


def training(model):
    model[-1].train()
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONV = nn.Conv2d(3, 3, 1)
REFUSED = {
    "its input is read again": (Branches("before"), "the output of conv2d at conv before it is read 2 times"),
    "written in place": (Branches("in place"), "called 2 times"),
    "its output is read again": (Branches("behind"), "relu is before it; add is behind it"),
    "called twice": (Branches("twice"), "it is called 2 times"),
    "map called twice": (Branches("shared"), "conv2d at conv has a weight that is used 2 times"),
    "weight read elsewhere": (Branches("weight"), "conv2d at conv has a weight that is used 2 times"),
    "one map, two norms": (two_names(nn.Identity()), "conv2d at 0 has a weight that is used 2 times"),
    "training": (training(nn.Sequential(CONV, nn.BatchNorm2d(3))), r"in training mode: call model.eval\(\) first"),
    "hook on the norm": (nn.Sequential(CONV, hooked(nn.BatchNorm2d(3))), "1 has hooks"),
    "hook on the map": (nn.Sequential(hooked(nn.Conv2d(3, 3, 1), "full_backward"), nn.BatchNorm2d(3)), "0 has hooks"),
    "hook between": (nn.Sequential(hooked(nn.Sequential(CONV)), nn.BatchNorm2d(3)), "0 has hooks"),
    "parametrized": (nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), "0 is computed"),
    "activation between": (nn.Sequential(CONV, nn.ReLU(), nn.BatchNorm2d(3)), "relu at 1 is before it; the output of"),
    "padding": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)), "reach beyond the input"),
    "transposed": (nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 2)), "reach beyond the input"),
    "zeros beside": (nn.Sequential(nn.BatchNorm2d(3), nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3)), "pad at 1 .* adds zeros"),
    "no kept statistics": (nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(3)), "its statistics are those of the input"),
    "another channel": (nn.Sequential(nn.BatchNorm2d(3), nn.Linear(4, 4)), "change their channel"),
    "pixels": (nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.BatchNorm2d(3)), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", [name for name in REFUSED if name != "pixels"])
def test_what_cannot_be_folded_stays_and_the_report_says_why(case):
    model, reason = copy.deepcopy(REFUSED[case])
    training = [module.training for module in model.modules()]
    randomized(model)
    for module, mode in zip(model.modules(), training, strict=True):
        module.training = mode if case == "training" else False
    x = torch.randn(2, 3, 4, 4)
    report = normkit.fold(model, x, dry_run=True)
    assert any(re.search(reason, edit.reason) for edit in report.kept), report
    folded = normkit.fold(model, x)
    assert type(folded) is type(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_channels_that_come_from_several_of_the_map_are_folded_where_each_has_one_scale():
    """Pixel shuffle: four channels of the map make one of the norm."""
    check(nn.Sequential(*REFUSED["pixels"][0]), (2, 3, 4, 4))


def trained(*more):
    torch.manual_seed(0)
    return randomized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *more))


def test_what_does_not_change_is_kept():
    """Hooks, tied weights, `requires_grad`, modes and attributes of parameters come along."""
    model = trained(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Dropout())
    model[4].weight = model[3].weight
    model[3].weight.requires_grad_(False)
    model[3].weight.decay = 0.5
    model[0].weight.requires_grad_(False)
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    model[5].train()
    folded, report = normkit.fold(model, X, return_report=True)
    assert len(report.done) == 1
    assert folded[4].weight is folded[3].weight is not model[3].weight
    assert folded[3].weight.decay == 0.5
    assert [p.requires_grad for p in (folded[0].weight, folded[0].bias, folded[3].weight)] == [False] * 3
    assert [m.training for m in folded.modules()] == [m.training for m in model.modules()]
    seen.clear()
    folded(X)
    assert seen == [1]
    assert [name for name, _ in folded.named_children()] == [name for name, _ in model.named_children()]


def test_a_norm_that_is_registered_twice_goes_at_both_places():
    conv, norm, _ = trained()
    model = _Twice(conv, norm).eval()
    folded = normkit.fold(model, X)
    assert folded.norm is folded.names["other"]
    assert isinstance(folded.norm, nn.Identity)


class _Twice(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm, self.names = conv, norm, nn.ModuleDict({"other": norm})

    def forward(self, x):
        return self.names["other"](self.conv(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_folded_in_float64_and_rounded_once(dtype):
    model = trained().to(dtype)
    folded = normkit.fold(model, X)
    exact = normkit.fold(copy.deepcopy(model).double(), X)
    for name, value in folded.state_dict().items():
        assert torch.equal(value, exact.state_dict()[name].to(dtype))


def test_in_place_changes_the_model_itself_and_keeps_its_parameters():
    model = trained()
    before, weight = model(X), model[0].weight
    result, report = normkit.fold(model, X, inplace=True, return_report=True)
    assert result is model
    assert model[0].weight is weight
    assert report.difference < CLOSE[torch.float32]
    same(before, model(X), torch.float32)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", range(3))
def test_in_place_is_all_or_nothing(monkeypatch, error, moment):
    """The first fold is carried out when the second fails, or both are when the last forward pass does."""
    model = trained(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(6), nn.Linear(6, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers, parameters, before = list(model.modules()), list(model.parameters()), model(X)
    finish, change = torch_folding._Opened.finish, torch_folding._change

    def failing(self, folds, **options):
        assert len(folds) == 3
        left = [moment + 1]

        def counted(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise error("in the middle")
            change(*arguments)

        monkeypatch.setattr(torch_folding, "_change", counted)
        return finish(self, folds, **options)

    if moment == 2:  # all changes are made, then the model is run
        outputs = torch_folding.outputs
        monkeypatch.setattr(torch_folding, "outputs", _raising_after_folding(outputs, error))
    else:
        monkeypatch.setattr(torch_folding._Opened, "finish", failing)
    with pytest.raises(error, match="in the middle"):
        normkit.fold(model, X, inplace=True)
    assert list(model.modules()) == layers
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), before)
    assert model[5].elementwise_affine


def _raising_after_folding(outputs, error):
    def run(model, given):
        folded = isinstance(model[1], nn.Identity) and next(model.parameters()).dtype == torch.float32
        if folded:
            raise error("in the middle")
        return outputs(model, given)

    return run


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_made_before_trains_the_result(inplace):
    model = trained(nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": [*model[1].parameters(), *model[4].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    moments = optimizer.state[model[4].weight]["momentum_buffer"]
    folded, report = normkit.fold(model, X, inplace=inplace, optimizer=optimizer, return_report=True)
    assert not report.notes
    assert [{id(p) for p in group["params"]} for group in optimizer.param_groups] == [
        {id(folded[0].weight), id(folded[0].bias)}, {id(folded[4].weight), id(folded[4].bias)},
    ]  # fmt: skip
    assert optimizer.state[folded[4].weight]["momentum_buffer"] is moments
    before = copy.deepcopy(folded.state_dict())
    optimizer.zero_grad()
    folded(X).sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in folded.state_dict().items())
    assert normkit.fold(trained(), X, dry_run=True).notes == (
        "an optimizer made before holds the old parameters: give it as `optimizer`",
    )


@pytest.mark.parametrize("wrong", ["all", "one"])
def test_a_fold_that_changes_the_outputs_is_taken_back(monkeypatch, wrong):
    """A twin of the algebra that forgets eps, as a rule or at one layer."""
    right = folding.scale_shift

    def forgetful(gamma, beta, mean, var, eps):
        return right(gamma, beta, mean, var, 0.0 if wrong == "all" or len(mean) == 5 else eps)

    monkeypatch.setattr(folding, "scale_shift", forgetful)
    model = trained(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    folded, report = normkit.fold(model, X, return_report=True)
    assert [edit.path for edit in report.kept] == (["1", "4", "6"] if wrong == "all" else ["4"])
    for edit in report.kept:
        measured = re.fullmatch(r"folded, the outputs change by (\S+) of the largest", edit.reason)
        assert 1e-10 < float(measured[1]) < 1e-3
    same(model(X), folded(X), torch.float32)


class Reads(nn.Module):
    """Reads an attribute of the norm that an identity has not, and in what no tracer sees."""

    def __init__(self, what):
        super().__init__()
        self.body, self.what = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), what

    def forward(self, x):
        y = self.body(x)
        if self.what == "weight":
            return y * self.body[0].weight.detach().numpy().tolist()[0][0][0][0]
        return y.relu() + self.body[1].eps if self.what == "eps" else y.relu()


def test_a_model_that_reads_the_norm_itself_keeps_it():
    report = normkit.fold(randomized(Reads("eps")), X, dry_run=True)
    assert report.kept[0].reason == "folded, the model fails: AttributeError"


@pytest.mark.parametrize("what", ["", "weight"])
def test_where_tracing_fails_sequences_are_folded_and_tried(monkeypatch, what):
    def none(*_):
        raise RuntimeError("cannot be traced")

    for tracer in ("_dynamo", "_export"):
        monkeypatch.setattr(f"normkit.torch.graph.{tracer}", none)
    model = randomized(Reads(what))
    folded, report = normkit.fold(model, X, return_report=True)
    assert report.how == "modules"
    same(model(X), folded(X), torch.float32)
    # What forward does with the weight could not be seen; that the outputs change was.
    assert len(report.done) == (not what)
    assert not what or "the outputs change" in report.kept[0].reason


def test_export_is_read_like_dynamo(monkeypatch):
    def none(*_):
        raise RuntimeError("cannot be traced")

    monkeypatch.setattr("normkit.torch.graph._dynamo", none)
    layers = [
        nn.ConvTranspose2d(3, 4, 3, groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 3),
    ]
    _, report = check(nn.Sequential(*layers, nn.Dropout(), nn.BatchNorm2d(2)), (2, 3, 5, 5), changed=["1", "3", "6"])
    assert report.how == "export"
    report = normkit.fold(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)).eval(), X, dry_run=True)
    assert not report.kept  # fresh statistics shift nothing, so padding does not matter
    report = normkit.fold(randomized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))), X, dry_run=True)
    assert "reach beyond the input" in report.kept[0].reason


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter about itself
def test_what_is_folded_can_be_exported():
    model = trained(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 2)
    )
    folded = normkit.fold(model, X)
    program = torch.export.export(folded, (X,))
    same(model(X), program.module()(X), torch.float32)
    buffer = io.BytesIO()
    torch.onnx.export(folded, (X,), dynamo=True, verbose=False).save(buffer)
    proto = onnx.load_from_string(buffer.getvalue())
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    session = onnx.reference.ReferenceEvaluator(proto)
    found = session.run(None, {proto.graph.input[0].name: X.numpy()})[0]
    same(model(X), torch.from_numpy(found), torch.float32)


def test_a_report_is_a_table_a_page_and_values(tmp_path):
    model = trained(nn.BatchNorm2d(4), nn.ReLU())
    report = normkit.fold(model, X, dry_run=True)
    assert str(report).splitlines() == [
        "fold Sequential: 1 edits, 1 refused; the whole forward pass was traced (Dynamo)",
        "an optimizer made before holds the old parameters: give it as `optimizer`",
        "layer  is           becomes   why",
        "1      BatchNorm2d  identity  into 0",
        "3      BatchNorm2d  stays     relu at 2 is before it; relu at 4 is behind it",
    ]
    assert isinstance(model[1], nn.BatchNorm2d)
    assert report._repr_html_().count("<tr>") == 3
    saved = json.loads(report.save(tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["edits"][0]["into"] == ["0.weight"]
    assert report.save(tmp_path / "report.txt").read_text() == f"{report}\n"
    with pytest.raises(NormError, match=r"must end in .txt, .json or .html"):
        report.save(tmp_path / "report.csv")
    _, done = normkit.fold(model, X, return_report=True)
    assert "outputs on the example change by" in str(done)
    again = normkit.fold(normkit.fold(model, X), X, dry_run=True)
    assert [edit.path for edit in again.edits] == ["3"]


class Mute(nn.Module):
    def forward(self, x):
        return "nothing to compare"


class Strict(nn.Module):
    """Takes texts that begin with the token 1 only, and makes float32 of them whatever its type."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(9, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))

    def forward(self, tokens):
        if not bool((tokens[:, 0] == 1).all()):
            raise ValueError("no text")
        return self.body(self.table(tokens).float())


@pytest.mark.filterwarnings("ignore")  # of torch.export about the condition
def test_a_model_that_takes_neither_float64_nor_other_inputs_is_tried_on_what_it_takes():
    model = randomized(Strict())
    tokens = torch.tensor([[1, 2, 3], [1, 4, 5]])
    trial = torch_folding._Trial(model, tokens)
    assert (len(trial._given), trial._close) == (1, 100 * torch.finfo(torch.float32).eps)
    folded, report = normkit.fold(model, tokens, return_report=True)
    assert not report.kept, report
    same(model(tokens), folded(tokens), torch.float32)


@pytest.mark.parametrize(
    ("model", "example", "said"),
    [
        (3, X, "a model must be a torch.nn.Module"),
        (nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), X, "must know the size of their input"),
        (nn.BatchNorm2d(3), (X, X), "must take the inputs it is given"),
        (torch.compile(nn.BatchNorm2d(3)), X, "give model._orig_mod"),
        (nn.DataParallel(nn.BatchNorm2d(3)), X, "give model.module"),
        (Mute(), X, "must return tensors, .*; got str"),
    ],
)
def test_what_cannot_be_looked_into(model, example, said):
    with pytest.raises(NormError, match=said):
        normkit.fold(model, example)


def test_what_the_model_says_against_the_example_is_heard():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        normkit.fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.ones(2, 5))


def test_that_nothing_was_folded_is_said_where_no_report_is_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"nothing was folded; 1: it is in training mode: call model.eval\(\) first"):
        normkit.fold(model, X)
