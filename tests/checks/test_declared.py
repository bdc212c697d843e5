"""A rule says what it looks at: what no rule asks for is not examined, so a part left out would be missing from it."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest

from normkit.checks import rules  # noqa: F401  # fills RULES
from normkit.checks.rule import RULES

# Attributes of the evidence, and the part that gives them.
PARTS = {
    "graph": "graph",
    "calls": "calls",
    "population": "calls",
    "trained_calls": "trained calls",
    "trained_population": "trained calls",
    "gap": "gap",
    "dependence": "dependence",
    "step": "step",
    "groups": "optimizer",
    "data": "data",
    "ranks": "ranks",
}


def looked_at(function, done):
    """The parts that a function reads of `seen`, in the functions that it calls too."""
    done.add(function)
    module = sys.modules[function.__module__]
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "seen":
            found |= {PARTS[node.attr]} & set(PARTS.values()) if node.attr in PARTS else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = getattr(module, node.func.id, None)
            if inspect.isfunction(called) and called.__module__.startswith("normkit.checks") and called not in done:
                found |= looked_at(called, done)
    return found


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_rule_declares_what_it_looks_at(code):
    rule = RULES[code]
    assert looked_at(rule.run, set()) <= {*rule.needs, *rule.uses}


def test_what_is_looked_at_is_found():
    assert "gap" in looked_at(RULES["NK101"].run, set())
    assert "calls" in looked_at(RULES["NK102"].run, set())


def test_what_nobody_asks_for_is_not_run():
    torch = pytest.importorskip("torch")
    import normkit

    calls = []
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [(torch.randn(8, 3), torch.zeros(8, dtype=torch.long)) for _ in range(4)]

    def run(code):
        calls.clear()
        found = normkit.check(model, data, loss="cross_entropy", select=[code], show_progress=False)
        assert not found.skipped.keys() - {"optimizer"}
        return len(calls)

    alone = run("NK201")  # of the layers alone
    assert run("NK103") == alone + 2 * len(data)  # with statistics of batches, and of all data
    assert run("NK106") == alone + 3 * len(data)  # and in training mode
