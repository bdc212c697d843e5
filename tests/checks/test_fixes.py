"""`Diagnosis.fix`: what is done, that it is measured, and that everything is undone where it makes things worse."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from test_engine import arrays, check, codes, network, stale  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks import rules  # noqa: E402
from normkit.checks.findings import Finding, Fix  # noqa: E402
from normkit.checks.fixes import VERBS, Subject, planned, repaired  # noqa: E402


def state(model):
    """Everything of a model that a fix may touch."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    own = [(type(m), m.training, getattr(m, "momentum", None), getattr(m, "eps", None)) for m in model.modules()]
    return values, own, [p.requires_grad for p in model.parameters()]


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_stale_statistics_are_recalibrated_and_checked_again():
    model = stale()
    x, _ = arrays()
    found = check(model, x)
    assert "NK102" in codes(found)
    better = found.fix()
    assert better.healthy
    assert better.notes == ("done: normkit.recalibrate(model, data)",)
    assert [fix.verb for fix in better.fixed] == ["recalibrate"]
    # Of the one norm that sees the data themselves the statistics are known.
    inputs = torch.from_numpy(x) @ model[0].weight.detach().T
    assert torch.allclose(model[1].running_mean, inputs.mean(0), atol=1e-5)
    assert codes(better.fix()) == []  # nothing is left to do


CHANGES = {
    "momentum": {"path": "1", "value": 0.5},
    "eps": {"path": "1", "value": 0.5},
    "freeze": {"path": ""},
    "replace": {"path": "1", "norm": "group"},
    "remove": {"path": "1"},
    "recalibrate": {},
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_changes_the_model_and_can_be_taken_back(verb):
    model = stale()
    before = state(model)
    subject = Subject(model, arrays()[0], 8, lambda: None)
    undo = VERBS[verb].run(subject, **CHANGES[verb])
    assert not same(before, state(model))
    undo()
    assert same(before, state(model))
    model(torch.from_numpy(arrays()[0]))  # and it runs, hooks and all


def test_a_part_of_a_model_is_frozen_with_all_its_norms():
    model = nn.ModuleDict({"body": network(), "bodybuilder": nn.BatchNorm1d(4)})
    VERBS["freeze"].run(Subject(model, None, 1, lambda: None), path="body")
    model.train()
    assert not model["body"][1].training
    assert model["bodybuilder"].training


def test_each_change_once_in_order_and_the_unsafe_ones_on_request():
    recalibrate = Fix("normkit.recalibrate(model, data)", "recalibrate", safe=True)
    momentum = Fix("model[1].momentum = 0.1", "momentum", {"path": "1", "value": 0.1})
    person = Fix("DataLoader(..., drop_last=True)")
    findings = [Finding("error", "1", "", fix=fix) for fix in (recalibrate, recalibrate, person, momentum, None)]
    chosen, left = planned(findings, unsafe=False)
    assert (chosen, left) == ([recalibrate], [person, momentum])
    chosen, left = planned(findings, unsafe=True)
    assert (chosen, left) == ([momentum, recalibrate], [person])


def test_a_model_that_is_worse_for_it_is_as_it_was():
    """The labels are what the model says by the statistics that it keeps: any others are worse."""
    model = stale()
    x, _ = arrays()
    with torch.no_grad():
        model[3].weight *= 50  # it is sure
    labels = model.eval()(torch.from_numpy(x)).argmax(1).numpy()
    model.train()
    found = check(model, (x, labels), loss="cross_entropy")
    assert "NK102" in codes(found)
    before = state(model)
    after = found.fix()
    assert same(before, state(model))
    assert after.fixed == ()
    assert after.notes[0].startswith("undone: normkit.recalibrate(model, data): the loss in evaluation is ")
    assert codes(after) == codes(found)


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = stale()
    found = check(model, arrays()[0])
    before = state(model)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repaired(Subject(model, arrays()[0], 8, broken), found, False)
    assert same(before, state(model))


def test_what_a_verb_refuses_is_said():
    found = check(stale())  # without data there is nothing to recalibrate with
    asked = Finding("warning", "1", "", fix=Fix("normkit.recalibrate(model, data)", "recalibrate", safe=True))
    after = dataclasses.replace(found, findings=(asked,)).fix()
    assert after.notes[0].startswith("not done: normkit.recalibrate(model, data): `data` must be")


def asked_by_rules():
    """Every change that a rule asks for: file, verb, names of its arguments."""
    for path in sorted(Path(rules.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fix"):
                continue
            given = dict(zip(("line", "verb", "arguments"), node.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in node.keywords}
            if "verb" in given:
                names = [key.value for key in given["arguments"].keys] if "arguments" in given else []
                yield path.name, given["verb"].value, names


@pytest.mark.parametrize(("file", "verb", "names"), list(asked_by_rules()))
def test_what_rules_ask_for_is_a_verb_with_these_arguments(file, verb, names):
    assert verb in VERBS
    assert names == list(inspect.signature(VERBS[verb].run).parameters)[1:]


def test_layers_of_keras_are_not_exchanged(monkeypatch):
    monkeypatch.setattr("normkit.checks.fixes.framework_of", lambda model: "keras")
    said = r"layers to be exchanged in place; got a model of keras\. hint: take the model that the line returns"
    with pytest.raises(normkit.NormError, match=said):
        Subject(network(), None, 1, lambda: None).structure()
    found = check(stale())
    line = 'model = normkit.replace(model, {"1": "group"})'
    asked = Finding("warning", "1", "", fix=Fix(line, "replace", {"path": "1", "norm": "group"}, safe=True))
    after = dataclasses.replace(found, findings=(asked,)).fix()
    assert after.notes[0].startswith(f"not done: {line}: `model` must be a torch.nn.Module")
