"""NK4xx: planted faults are found, their healthy twins are not, end to end and on evidence made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import normkit  # noqa: E402
import normkit.torch as nk  # noqa: E402
from normkit.checks.evidence import Call, Data, Evidence, Layer  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402


def call(model, x):
    """A forward pass of the user's: the flow of data, which takes longest to read, is not looked at."""
    return model(x[0] if isinstance(x, list | tuple) else x)


def diagnosed(model, data, code):
    return normkit.check(model, data, select=[code], forward=call).findings


def found(model, data, code):
    """Severity and path of what one rule finds."""
    return [(finding.severity, finding.path) for finding in diagnosed(model, data, code)]


def maps(size=8, batches=6, spatial=(4, 4), offset=0.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, *spatial, generator=generator) + offset for _ in range(batches)]


def samples(count, size, **options):
    data = TensorDataset(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)))
    return DataLoader(data, size, **options)


def behind(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm)


def table():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))


# A norm, and the shape of maps at which it has a single value per statistic, and at which it has enough.
SINGLE = {
    "batch": (lambda: nn.BatchNorm2d(4), (1, 1), (4, 4)),
    "renorm": (lambda: nk.BatchRenorm2d(4), (1, 1), (4, 4)),
    "instance": (lambda: nn.InstanceNorm2d(4), (1, 1), (4, 4)),
    "tracked instance": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (1, 1), (4, 4)),
    "group": (lambda: nn.GroupNorm(4, 4), (1, 1), (4, 4)),
    "layer": (lambda: nn.LayerNorm(1), (1, 1), None),
    "rms": (lambda: nn.RMSNorm(1), (1, 1), None),
    "layer 2d": (lambda: nk.LayerNorm2d(4), None, (1, 1)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_value(name):
    make, few, enough = SINGLE[name]
    size = 1 if name in ("batch", "renorm") else 2
    if few is not None:
        findings = diagnosed(behind(make()), maps(size, spatial=few), "NK401")
        assert [(finding.severity, finding.path) for finding in findings] == [("error", "1")]
        shape = " x ".join(map(str, (size, 4, *few)))
        assert findings[0].words.startswith(f"a single value per statistic in inputs {shape}: ")
        assert findings[0].fix is not None
    if enough is not None:
        assert not found(behind(make()), maps(size, spatial=enough), "NK401")


def test_a_single_value_that_evaluation_does_not_survive_is_a_finding():
    diagnosis = normkit.check(behind(nn.InstanceNorm2d(4)), maps(2, spatial=(1, 1)))
    assert diagnosis.sentence.startswith("1 error in 1 layer, ")
    assert diagnosis.skipped["gap"].startswith("evaluation fails: ValueError: Expected more than 1 spatial element")
    # What else fails is the user's to know.
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        normkit.check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 1)), [torch.randn(8, 4)])


def test_one_sample_is_enough_for_evaluation():
    one = [torch.randn(1, 4)] * 2
    assert found(table(), one, "NK401") == [("error", "1")]
    assert found(table().eval(), one, "NK401") == [("warning", "1")]
    assert not found(normkit.freeze(table()), one, "NK401")


@pytest.mark.parametrize(
    ("loader", "severities"),
    [
        (samples(17, 8, shuffle=True), ["error"]),
        (samples(17, 8), ["warning"]),
        (samples(17, 8, shuffle=True, drop_last=True), []),
        (samples(16, 8, shuffle=True), []),
        (samples(18, 8, shuffle=True), []),
    ],
    ids=["one left over", "in order", "left out", "none", "two"],
)
def test_a_single_value_in_the_last_batch(loader, severities):
    # Two batches are looked at: the last one is only reckoned with.
    findings = normkit.check(table(), loader, select=["NK401"], forward=call, steps=2).findings
    assert [finding.severity for finding in findings] == severities
    assert all(finding.fix.line == "DataLoader(..., drop_last=True)" for finding in findings)
    # Maps have more positions.
    convolution = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3))
    assert not normkit.check(convolution, loader, select=["NK401"], forward=call, steps=2).findings


def test_few_values_and_the_four_ways_out():
    torch.manual_seed(0)
    data = list(torch.randn(40, 4, 64).unbind())
    model = nn.BatchNorm1d(64)
    finding = normkit.check(model, data, select=["NK402"], forward=call, steps=40).findings[0]
    assert finding.severity == "warning"
    # 4 independent values: noise 1 / sqrt(4) in the mean. Measured with 39 * 64 degrees of freedom, to 1.4 %.
    assert finding.evidence["mean"] == pytest.approx(0.5, rel=0.05)
    # The deviation of 4 normal values scatters by sqrt(1 - 1/4 - E[s]^2), E[s] = sqrt(2/4) Gamma(2) / Gamma(1.5).
    expected = np.sqrt(3 / 4 - 2 / np.pi)
    assert finding.evidence["std"] == pytest.approx(expected, rel=0.05)
    assert finding.evidence["noise is"] == "measured"
    ways = (finding.fix.line, *finding.fix.others)
    assert ways == (
        'normkit.replace(model, {"batch": "group"})',
        'normkit.replace(model, {"batch": "renorm"})',
        "normkit.freeze(model)",
        "normkit.sync(model)",
    )
    for line in ways[:3]:
        scope = {"normkit": normkit, "model": nn.Sequential(nn.BatchNorm1d(64))}
        changed = eval(line, scope)
        assert not found(changed, data[:6], "NK402"), line


@pytest.mark.parametrize(
    ("data", "severities"),
    [
        (maps(15, spatial=(1, 1)), ["info"]),  # 15 values: noise 0.26
        (maps(2, spatial=(2, 2)), ["warning"]),  # 8: 0.35
        (maps(8, spatial=(4, 4)), []),  # 128
        (maps(32, spatial=(1, 1)), []),
        (maps(2, batches=2, spatial=(2, 2)), ["warning"]),  # two batches: expected, not measured
        ([x[:, :, :1, :1].expand(-1, -1, 4, 4) for x in maps(4)], ["warning"]),  # 64 values, of which 4 tell something
    ],
    ids=["15", "8", "128", "32", "2 batches", "alike"],
)
def test_few_values(data, severities):
    finding = diagnosed(nn.BatchNorm2d(4), data, "NK402")
    assert [one.severity for one in finding] == severities
    assert all(one.evidence["noise is"] == ("measured" if len(data) > 3 else "expected") for one in finding)


@pytest.mark.parametrize(
    ("options", "severities"),
    [
        ({"shuffle": True}, ["warning"]),
        ({}, ["info"]),
        ({"shuffle": True, "drop_last": True}, []),
    ],
)
def test_a_short_last_batch(options, severities):
    loader = samples(3 * 32 + 7, 32, **options)
    findings = diagnosed(table(), loader, "NK403")
    assert [finding.severity for finding in findings] == severities
    assert all(finding.words == "the last batch of an epoch has 7 of 32 samples" for finding in findings)
    for healthy in (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), normkit.freeze(table())):
        assert not found(healthy, loader, "NK403")
    assert not found(table(), samples(3 * 32 + 8, 32, shuffle=True), "NK403")


def test_the_last_batch_explains_a_gap():
    torch.manual_seed(0)
    loader = samples(2 * 32 + 2, 32, shuffle=True)
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.9), nn.Linear(4, 1))
    for (x,) in [*loader, *samples(2, 2)]:
        model(x)
    diagnosis = normkit.check(model, loader, select=["NK101", "NK102", "NK403"], forward=call)
    assert "Cause: the last batch of 2 samples, first at " in diagnosis.sentence
    assert diagnosis.sentence.endswith("Do: DataLoader(..., drop_last=True)")
    # With a slow average it explains nothing.
    model[0].momentum = 0.1
    assert "last batch" not in normkit.check(model, loader, forward=call).sentence


@pytest.mark.parametrize(
    ("norm", "spatial", "severities"),
    [
        (nn.GroupNorm(2, 4), (1, 1), ["warning"]),  # 2 values
        (nn.GroupNorm(2, 4), (2, 1), ["info"]),  # 4
        (nn.GroupNorm(2, 4), (2, 2), []),  # 8
        (nn.InstanceNorm2d(4), (2, 1), ["warning"]),
        (nn.InstanceNorm2d(4), (2, 2), ["info"]),
        (nn.InstanceNorm2d(4), (4, 4), []),
        (nn.LayerNorm(2), (1, 2), ["warning"]),
        (nn.LayerNorm((4, 1, 2)), (1, 2), []),
        (nk.LayerNorm2d(4), (4, 4), ["info"]),
        (nn.RMSNorm(2), (1, 2), []),  # takes one number of two
        (nn.BatchNorm2d(4), (1, 1), []),
    ],
    ids=str,
)
def test_few_values_of_a_sample(norm, spatial, severities):
    assert [severity for severity, _ in found(norm, maps(4, 2, spatial), "NK404")] == severities


def seen(count, shape, data=None, **options):
    """One batch norm, called once."""
    record = NormRecord("batch", (4,), 1, 1e-5, kept={"mean": np.zeros(4), "var": np.ones(4)})
    layer = replace(Layer("norm", "BatchNorm2d", record, training=True), **options)
    call = Call(0, shape, "float32", count, np.zeros(4), np.ones(4), 0.0, 1.0, True)
    return Evidence("torch", "Net", (layer,), calls={"norm": [call]}, data=data, training=True)


def test_by_hand_the_last_batch_is_reckoned_with_positions():
    data = Data((8,), samples=17, batch_size=8, drop_last=False, shuffled=True)
    assert [finding.severity for finding in RULES["NK401"](seen(8, (8, 4), data))] == ["error"]
    assert not RULES["NK401"](seen(16, (8, 4, 2), data))
    assert not RULES["NK401"](seen(8, (8, 4), replace(data, drop_last=True)))
    assert not RULES["NK401"](seen(8, (8, 4), data, frozen=True))
    assert not RULES["NK401"](seen(0, (0, 4), data)), "an empty batch has no statistics at all"


def test_by_hand_synchronized_layers_have_the_batch_of_all():
    few = seen(4, (4, 4), kind="SyncBatchNorm")
    assert RULES["NK402"](few)
    assert not RULES["NK402"](replace(few, processes=8))
    assert RULES["NK402"](replace(seen(4, (4, 4)), processes=8))


def test_by_hand_keras_has_lines_of_its_own():
    finding = RULES["NK402"](replace(seen(4, (4, 4)), framework="keras", backend="jax"))[0]
    assert finding.fix.line == "normkit.keras.GroupNormalization(groups=groups)"
    assert "normkit.freeze(model)" in finding.fix.others
