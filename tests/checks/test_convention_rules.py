"""NK8xx: every rule finds its planted fault, and is silent on the healthy twin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks.evidence import Call, Evidence, Layer  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402

rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 0.5 + 2


def found(code, model, data=rows):
    return normkit.check(model, data, select=[code], steps=4).findings


def batches(shift=0.0, count=8, size=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator) * (1 + k % 2) + shift + 4 * (k % 2) for k in range(count)]


def network(momentum, data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum))
    for _ in range(8):
        for x in data:
            model(x)
    return model


# -- NK801 ------------------------------------------------------------------------------------------------------------


def test_a_momentum_of_keras():
    (finding,) = found("NK801", network(0.99, batches()), batches())
    assert (finding.path, finding.severity) == ("1", "error")  # the last batch is not the data
    assert finding.words == "momentum 0.99 keeps 99 % of the last batch alone"
    assert finding.cause == "a momentum of another framework (0.99)"
    assert finding.fix.line == "model[1].momentum = 0.01; normkit.recalibrate(model, data)"
    assert finding.fix.arguments == {"path": "1", "value": pytest.approx(0.01)}
    assert not finding.fix.safe
    assert not found("NK801", network(0.01, batches()), batches())


def test_a_momentum_that_has_done_no_harm():
    model = network(0.99, [rows])
    (finding,) = found("NK801", model)
    assert (finding.severity, finding.cause) == ("warning", None)
    assert finding.fix.line == "model[1].momentum = 0.01"
    for momentum in (0.1, 0.003, 0.5, None):
        model[1].momentum = momentum
        assert not found("NK801", model)


def test_a_new_model_is_not_blamed_on_its_momentum():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.9997))
    (finding,) = found("NK801", model, batches())
    assert (finding.severity, finding.cause) == ("warning", None)
    assert finding.words.startswith("momentum 0.9997 ")


def test_a_momentum_of_zero_never_moves():
    model = network(0.0, [rows])
    (finding,) = found("NK801", model)
    assert finding.words == "momentum 0 never moves its statistics"
    assert finding.severity == "error"
    assert finding.fix.arguments["value"] == 0.1
    assert not found("NK801", normkit.freeze(model))
    bare = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.99, track_running_stats=False))
    assert not found("NK801", bare)


def test_the_fix_of_a_momentum_is_what_it_says():
    data = batches()
    model = network(0.99, data)
    (finding,) = found("NK801", model, data)
    exec(finding.fix.line, {"normkit": normkit, "model": model, "data": data})
    assert not found("NK801", model, data)


def layer(**values):
    record = NormRecord("batch", (2,), -1, 1e-3, kept={"mean": np.zeros(2), "var": np.ones(2)}, rate=values.pop("rate"))
    return Layer("bn", "BatchNormalization", record, **values)


@pytest.mark.parametrize(("momentum", "right"), [(0.1, 0.9), (1.0, 0.99), (0.0, 0.99)])
def test_a_momentum_of_torch_in_keras(momentum, right):
    seen = Evidence("keras", "Functional", (layer(momentum=momentum, rate=1 - momentum),))
    (finding,) = RULES["NK801"](seen)
    assert finding.fix.arguments["value"] == pytest.approx(right)
    for usual in (0.99, 0.9, 0.999, 0.5):
        healthy = dataclasses.replace(seen, layers=(layer(momentum=usual, rate=1 - usual),))
        assert not RULES["NK801"](healthy)


# -- NK802 ------------------------------------------------------------------------------------------------------------


def norms(*eps):
    return nn.Sequential(*[nn.LayerNorm(3, eps=value) for value in eps])


def test_an_eps_unlike_that_of_its_siblings():
    (finding,) = found("NK802", norms(1e-5, 1e-5, 1e-3, 1e-5, 1e-5))
    assert (finding.path, finding.severity) == ("2", "info")
    assert finding.words == "eps 0.001; 4 of 5 LayerNorm have 1e-05"
    assert finding.fix.line == "model[2].eps = 1e-05"
    assert not found("NK802", norms(*[1e-5] * 5))
    assert not found("NK802", norms(1e-5, 1e-5, 1e-3))  # too few to speak of a custom
    assert not found("NK802", norms(1e-5, 1e-5, 1e-5, 1e-6, 1e-6, 1e-6))  # two customs
    kinds = nn.Sequential(*norms(*[1e-5] * 4), nn.BatchNorm1d(3, eps=1e-3), nn.RMSNorm(3, eps=1e-6))
    assert not found("NK802", kinds)


class Mine(nn.Module):
    """A layer norm in the type of its input."""

    def __init__(self, features, eps):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def test_an_eps_that_float16_cannot_hold():
    (finding,) = found("NK802", nn.Sequential(Mine(3, 1e-8)).half())
    assert finding.severity == "warning"
    assert finding.words == "eps 1e-08 is 0 in float16, the type of its input"
    (note,) = found("NK802", nn.Sequential(nn.LayerNorm(3, eps=1e-12)).half())
    assert note.severity == "info"
    assert not found("NK802", nn.Sequential(Mine(3, 1e-5)).half())
    assert not found("NK802", nn.Sequential(Mine(3, 1e-8)).bfloat16())
    assert not found("NK802", nn.Sequential(Mine(3, 1e-8)))


# -- NK803, NK804 -----------------------------------------------------------------------------------------------------


def test_a_mean_far_from_zero():
    years = torch.randn(64, 3) * 5 + 2000
    (finding,) = found("NK803", nn.Sequential(nn.BatchNorm1d(3)), years)
    assert (finding.path, finding.severity) == ("0", "warning")
    assert 350 < finding.evidence["ratio"] < 500  # 400, but for the sample
    assert not found("NK803", nn.Sequential(nn.BatchNorm1d(3)), years - 1900)
    assert not found("NK803", nn.Sequential(nn.RMSNorm(3)), years)


def test_a_constant_has_no_digits_to_lose():
    constant = torch.cat([torch.randn(64, 2), torch.ones(64, 1)], dim=1)
    assert not found("NK803", nn.Sequential(nn.BatchNorm1d(3)), constant)


def test_the_end_of_float16():
    model = nn.Sequential(nn.LayerNorm(3))
    large = torch.randn(64, 3).clamp(-3, 3)
    large[0, 0] = 20000
    (finding,) = found("NK804", model.half(), large)
    assert (finding.path, finding.severity) == ("0", "warning")
    assert finding.words == "its float16 input reaches 2e+04; the type ends at 65504"
    assert not found("NK804", model.half(), large / 2)
    assert not found("NK804", model.bfloat16(), large)
    assert not found("NK804", model.float(), large)
    (finding,) = found("NK804", model.half(), large * 4)
    assert finding.severity == "error"


def test_of_several_calls_the_worst_counts():
    calls = [Call(k, (4, 3), "float16", 4, None, None, ratio, 1.0, True) for k, ratio in enumerate((3.0, 150.0, 8.0))]
    record = NormRecord("layer", (3,), -1, 1e-5)
    seen = Evidence("torch", "Model", (Layer("norm", "LayerNorm", record),), calls={"norm": calls})
    (finding,) = RULES["NK803"](seen)
    assert finding.evidence["ratio"] == 150.0
    assert not RULES["NK803"](seen, {"ratio": 200.0})
