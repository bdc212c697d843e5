"""The compiled module, or its absence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from normkit.kernels import instruction_sets


def test_instruction_sets_end_with_what_always_works():
    found = instruction_sets()
    compiled = importlib.util.find_spec("normkit.kernels._native") is not None
    assert bool(found) == compiled
    if compiled:
        assert found[-1] == "baseline"
        assert set(found) <= {"avx512", "avx2", "baseline"}
        info = Path("/proc/cpuinfo")
        if not info.exists() or "flags" not in info.read_text():
            pytest.skip("nothing to compare with on this system")
        flags = next(line for line in info.read_text().splitlines() if line.startswith("flags")).split()
        assert ("avx2" in found) == ({"avx2", "fma"} <= set(flags))


def test_without_the_compiled_module_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "normkit.kernels._native", None)
    monkeypatch.delattr("normkit.kernels._native", raising=False)
    assert instruction_sets() == ()
