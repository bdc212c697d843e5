"""NK2xx: each finds what was planted in the values a norm holds, and says nothing of a healthy twin."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from digits import fit, images, loader, loss  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.torch import BatchNorm2d, BatchRenorm2d  # noqa: E402


@pytest.fixture(scope="module")
def healthy():
    return fit(images(), loader(), 3, settle=True)


@pytest.fixture
def model(healthy):
    return copy.deepcopy(healthy)


def found(model, data=None, **options):
    result = normkit.check(model, data, show_progress=False, **{"select": ["NK2"], **options})
    return [(finding.code, finding.severity, finding.path) for finding in result.findings]


@pytest.mark.parametrize("data", [None, loader()], ids=["alone", "with data"])
def test_healthy_models_are_healthy(healthy, data):
    assert not found(healthy, data)
    assert not found(images(), data)  # new
    renorm = normkit.replace(healthy, {"batch": "renorm"})
    assert isinstance(renorm[1], BatchRenorm2d)
    assert not found(renorm, data)
    with torch.no_grad():
        healthy[4].weight[0] = 0  # one gamma of 8 is 12 %
    assert found(healthy, data) == [("NK206", "info", "4")]
    with torch.no_grad():
        healthy[4].weight[0] = 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_batch_with_nan(model, name, value):
    getattr(model[4], name)[3] = value
    assert found(model) == [("NK201", "error", "4")]
    result = normkit.check(model, loader(), loss=loss, show_progress=False, select=["NK1", "NK2"])
    if value != value:  # infinite statistics may still give finite outputs
        assert "Cause: NaN in the kept statistics, first at 4." in result.sentence
    normkit.recalibrate(model, loader())
    assert not found(model, loader())


def test_nan_comes_by_training(model):
    """The natural way: one bad sample. Our layers leave such a batch out."""
    ours = BatchNorm2d(8)
    x = torch.randn(4, 8, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    for layer in (model[1], ours):
        layer.train()(x)
    assert ("NK201", "error", "1") in found(model)
    assert not found(nn.Sequential(ours))


def test_nan_in_gamma(model):
    with torch.no_grad():
        model[1].weight[0] = float("nan")
    assert found(model) == [("NK201", "error", "1")]


def test_negative_variance(model):
    model[4].running_var[2] = -1e-7
    assert found(model) == [("NK202", "error", "4")]


def test_zero_variance(model):
    """In all channels it was never computed; in one that is alive it is wrong, as data shows."""
    whole = copy.deepcopy(model)
    whole[4].running_var.zero_()
    assert ("NK202", "error", "4") in found(whole)
    model[4].running_var[2] = 0
    assert "NK202" not in {code for code, _, _ in found(model)}
    assert ("NK202", "error", "4") in found(model, loader())
    normkit.recalibrate(model, loader())
    assert not found(model, loader())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(model, kind):
    half = model.to(kind)
    assert [(code, severity) for code, severity, _ in found(half)] == [("NK203", "warning")] * 3
    assert {severity for _, severity, _ in found(half.eval())} == {"info"}
    result = normkit.check(half.train(), show_progress=False, select=["NK203"])
    exec(result.findings[0].fix.line, {"model": half})  # the advice, followed
    assert not found(half)


def test_half_precision_of_our_layers():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), BatchNorm2d(8)).bfloat16()
    assert not found(model)


def test_updates_are_lost_in_half_precision():
    """What the story of NK203 says."""
    layer = nn.BatchNorm1d(1, momentum=1e-3).bfloat16().train()
    for _ in range(3000):
        layer(torch.tensor([[3.7], [3.9]], dtype=torch.bfloat16))
    assert layer.running_mean.item() < 2.5  # of 3.8, of which 95 % should be there


@pytest.mark.parametrize(("dead", "severity"), [(1, "info"), (6, "warning")])
def test_dead_channels(model, dead, severity):
    with torch.no_grad():
        model[0].weight[:dead] = 0
    normkit.recalibrate(model, loader())
    assert ("NK204", severity, "1") in found(model)


def test_few_dead_channels_are_nothing():
    layer = nn.BatchNorm2d(64)
    layer.running_var[0] = 1e-9
    assert not [code for code, _, _ in found(nn.Sequential(layer)) if code == "NK204"]


@pytest.mark.parametrize(("gamma", "severity"), [(1.5, "info"), (30.0, "warning")])
def test_huge_gain(model, gamma, severity):
    """A channel that hardly varies is multiplied by gamma / sqrt(var + eps)."""
    with torch.no_grad():
        model[1].weight[0] = gamma
        model[1].running_var[0] = 5e-5
    assert found(model) == [("NK205", severity, "1")]


@pytest.mark.parametrize(("many", "severity"), [(1, "info"), (6, "warning")])
def test_gamma_of_0(model, many, severity):
    with torch.no_grad():
        model[4].weight[:many] = 1e-6
    assert found(model) == [("NK206", severity, "4")]


def test_gamma_of_0_by_weight_decay():
    """The natural way: a branch that gets no gradient, under weight decay."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(16, 4)) * 0).sum().backward()
        optimizer.step()
    assert ("NK206", "warning", "1") in found(model)


def test_gamma_starts_at_0_at_the_end_of_branches():
    model = images()
    nn.init.zeros_(model[8].weight)
    assert not found(model)
    assert ("NK206", "warning", "8") in found(_trained(model))
    group = nn.GroupNorm(2, 8)
    nn.init.zeros_(group.weight)
    assert not found(nn.Sequential(group))


def _trained(model):
    """Gamma of the last norm stays at 0, statistics move."""
    model[8].weight.requires_grad_(False)
    return fit(model, loader(), 1)
