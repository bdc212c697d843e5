"""Only what some rule looks at is examined: so each has to say what it looks at."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from digits import dense, fit, images, loader, loss  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks import engine  # noqa: E402
from normkit.checks.evidence import PARTS  # noqa: E402
from normkit.checks.examination import Request, examine  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402

# What of the evidence a part gives.
FIELDS = {
    "graph": {"graph": None},
    "calls": {"calls": {}},
    "trained calls": {"trained_calls": {}},
    "gap": {"gap": None},
    "dependence": {"dependence": None},
    "step": {"step": None},
    "optimizer": {"groups": ()},
    "data": {"data": None},
    "ranks": {"ranks": {}},
}


def drifting():
    model = fit(images(), loader(), 1)
    model[:-1].requires_grad_(False)
    return model


MODELS = {
    "drifting": drifting,
    "dropout": lambda: fit(dense(dropout=0.5), loader(), 1),
    "momentum": lambda: fit(dense(momentum=0.9), loader(size=2), 1, rate=0.01),
    "batch": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, track_running_stats=False)),
    "eps": lambda: nn.Sequential(nn.Flatten(), *[nn.BatchNorm1d(64, eps=eps) for eps in (1e-5,) * 4 + (1e-3,)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_rule_looks_at_nothing_else(name):
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = examine(Request(model, loader(size=4), optimizer, loss, None, 4, lambda _: None))
    for rule in RULES.values():
        if not seen.examined.issuperset(rule.needs):
            continue
        without = dict.fromkeys(FIELDS.keys() - {*rule.needs, *rule.uses}, "")
        fields = {field: empty for part in without for field, empty in FIELDS[part].items()}
        reduced = replace(seen, skipped={**seen.skipped, **without}, **fields)
        assert rule(reduced) == rule(seen), rule.code


def test_every_part_is_known_here():
    assert {*FIELDS, "layers"} == set(PARTS)


def test_what_nobody_asks_for_is_not_run(monkeypatch):
    calls = []
    model = fit(dense(), loader(), 1)
    model.register_forward_hook(lambda *_: calls.append(1))
    for select, passes in ((["NK103"], 3), (["NK106"], 4), (["NK201"], 1)):  # kept; batch and population; in training
        calls.clear()
        found = normkit.check(model, loader(), loss=loss, steps=2, select=select, show_progress=False)
        assert len(calls) == 2 * passes, select
        assert not found.skipped.keys() & {"step", "graph", "dependence"}
    assert engine.chosen(["NK103"])[0].uses == ("calls",)
