"""Time spent per area, printed beside its budget at the end of every run."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

# Most of the time of JAX' tests is compiling code that runs once: LLVM need not optimize it. Read when JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

HERE = Path(__file__).parent
# Seconds on two cores. Areas are the folders of this directory.
BUDGETS = {
    "core": 60,
    "torch": 240,
    "conformance": 240,
    "keras_layers": 60,  # the example, missing frameworks
    **{f"keras {backend}": 120 for backend in ("tensorflow", "jax", "torch")},
    "nnx": 120,
    "experiments": 300,
    "report": 60,
    "surgery": 120,
    "checks": 120,
    "cli": 60,
    "benchmarking": 45,
    "docs": 60,
    "teaching": 60,
    "studies": 60,
    "kernels": 60,
    "project": 60,
}
SHARED = {"torch": "torch", "conformance": "torch"}  # areas that share a budget
_spent: dict[str, float] = defaultdict(float)
_count: dict[str, int] = defaultdict(int)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-kernels", action="store_true", help="as if installed where no C++ compiler works")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-kernels"):
        sys.modules["normkit.kernels._native"] = None  # type: ignore[assignment]  # importing it fails


def area_of(nodeid: str) -> str:
    parts = Path(nodeid.split("::")[0]).parts
    inside = parts[1:] if parts and parts[0] == HERE.name else parts
    area = inside[0] if len(inside) > 1 else "project"
    backend = f"keras {nodeid.partition('[')[2].rstrip(']')}"
    return backend if area == "keras_layers" and backend in BUDGETS else area


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _spent[area_of(report.nodeid)] += report.duration
    _count[area_of(report.nodeid)] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("time per area")
    for area in sorted(_spent):
        budget = BUDGETS.get(area)
        seconds = sum(s for a, s in _spent.items() if SHARED.get(a, a) == SHARED.get(area, area))
        mark = "no budget" if budget is None else "over budget" if seconds > budget else "ok"
        line = f"{area:16} {_count[area]:5} tests {_spent[area]:7.1f} s of {budget} s  {mark}"
        terminalreporter.write_line(line)
