"""NK7xx: every rule finds its planted fault, and is silent on the healthy twin."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import normkit  # noqa: E402
import normkit.torch as nt  # noqa: E402


def network():
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    )


def found(code, model, optimizer):
    return normkit.check(model, optimizer=optimizer, select=[code]).findings


def sgd(parameters, decay=0.0):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=decay)


def test_weight_decay_on_norms_is_said_once():
    model = network()
    (finding,) = found("NK701", model, torch.optim.AdamW(model.parameters()))  # 0.01 by default
    assert (finding.path, finding.severity) == ("", "info")
    assert finding.words == "weight decay on gamma or beta of all 2 norms"
    assert finding.fix.line == "normkit.param_groups(model, weight_decay=0.01)"
    groups = eval(finding.fix.line, {"normkit": normkit, "model": model})
    assert not found("NK701", model, sgd(groups))
    assert not found("NK701", model, sgd(model.parameters()))


def test_weight_decay_on_some_norms_names_them():
    model = network()
    others = [p for name, p in model.named_parameters() if not name.startswith("1.")]
    optimizer = sgd([{"params": others, "weight_decay": 0.1}, {"params": model[1].parameters()}])
    (finding,) = found("NK701", model, optimizer)
    assert finding.path == "4"
    assert finding.words == "weight decay on gamma or beta, unlike 1 of 2 norms"


def test_a_gain_that_decay_pulls_to_one():
    gemma = nn.Sequential(nn.Linear(3, 4), nt.RMSNorm(4, gain="1+w"))
    assert not found("NK701", gemma, sgd(gemma.parameters(), 0.1))
    plain = nn.Sequential(nn.Linear(3, 4), nt.RMSNorm(4))
    assert len(found("NK701", plain, sgd(plain.parameters(), 0.1))) == 1


def test_parameters_without_gradients_are_not_decayed():
    model = network()
    normkit.freeze(model, affine=True)
    assert not found("NK701", model, sgd(model.parameters(), 0.1))
    assert not found("NK702", model, sgd([p for p in model.parameters() if p.requires_grad], 0.1))


def test_norms_that_no_group_holds():
    model = network()
    maps = [p for path in (0, 3, 5) for p in model[path].parameters()]
    findings = found("NK702", model, sgd(maps))
    assert [(f.path, f.severity) for f in findings] == [("1", "warning"), ("4", "warning")]
    assert not found("NK702", model, sgd(model.parameters()))
    norms = [*model[1].parameters(), *model[4].parameters()]
    assert not found("NK702", model, [sgd(maps), torch.optim.Adam(norms)])
    (finding,) = found("NK702", model, sgd([*maps, *norms[:-1]]))
    assert finding.words == "4.bias is held by no optimizer"


def test_a_head_may_be_trained_alone():
    model = network()
    assert not found("NK702", model, sgd(model[5].parameters()))


def test_an_optimizer_made_before_surgery():
    old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = sgd(old.parameters())
    copied = normkit.insert(old, "batch", torch.randn(4, 3))
    (finding,) = found("NK702", copied, optimizer)
    assert (finding.path, finding.severity) == ("", "error")
    assert finding.words == "the optimizer holds none of the parameters of this model, but 4 of another"
    normkit.insert(old, "batch", torch.randn(4, 3), inplace=True)
    (finding,) = found("NK702", old, optimizer)
    assert (finding.path, finding.severity) == ("0.norm", "error")
    assert "it holds 1 parameters that the model has not" in finding.words
    fresh = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    taken = sgd(fresh.parameters())
    changed = normkit.insert(fresh, "batch", torch.randn(4, 3), optimizer=taken)
    assert not found("NK702", changed, taken)


def test_one_optimizer_for_two_models():
    one, two = network(), network()
    assert not found("NK702", one, sgd([*one.parameters(), *two.parameters()]))
    assert not found("NK702", one, sgd([*one[5].parameters(), *two.parameters()]))  # a head, and a head of the loss


def test_a_shared_norm_is_known_by_its_first_path():
    model = network()
    model.again = model[1]
    assert not found("NK702", model, sgd(model.parameters()))


def test_rules_need_an_optimizer():
    diagnosis = normkit.check(network(), select=["NK7"])
    assert not diagnosis.rules
    assert diagnosis.skipped["optimizer"] == "none was given"
    assert dataclasses.is_dataclass(diagnosis)
