"""The peer that is a program of its own: named reasons where it cannot run, right results where it can."""

import os
from pathlib import Path

import numpy as np
import pytest

from normkit.benchmarking import exact
from normkit.benchmarking.cases import TINY, Case
from normkit.benchmarking.gates import verdicts
from normkit.benchmarking.harness import measure
from normkit.benchmarking.peers import PEERS, Peer, Units, chosen, found, onednn
from normkit.benchmarking.results import Measurements
from normkit.errors import NormRuntimeError

(PEER,) = chosen(PEERS, "onednn")
COPY = "bench_twins:copy"
UNITS = Units(Peer("copy", COPY, (), ""), Peer("least", COPY, (), ""))
present = pytest.mark.skipif(bool(PEER.missing()), reason=str(PEER.missing()))
ODD = (3, 5, 3, 2)  # no vector fits


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A compiler that prints what it is told to."""

    def write(text: str) -> None:
        script = tmp_path / "compiler"
        script.write_text(f"#!/bin/sh\ncat > /dev/null\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return write


@pytest.mark.skipif(os.name != "posix", reason="a compiler in the shell's language")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo '2 6 3'", None),
        ("echo '3 5 3'", "benchmarks/onednn.cpp is written for oneDNN 2, and 3.5.3 is there"),
        ("echo", "oneDNN's oneapi/dnnl/dnnl_version.h is not there: apt-get install libdnnl-dev"),
        ("exit 1", "oneDNN's oneapi/dnnl/dnnl_version.h is not there: apt-get install libdnnl-dev"),
    ],
)
def test_the_version_decides(scripted, text, said):
    scripted(text)
    assert onednn.missing() == said


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    here, missing = found([PEER])
    assert here == ()
    assert missing == {
        "onednn": "the C++ compiler /nonexistent is not there: apt-get install g++, or name another by CXX"
    }
    monkeypatch.setattr(onednn, "SOURCE", Path("/nonexistent"))
    assert "it comes with a checkout" in onednn.missing()


def test_a_program_that_does_not_compile_says_why(scripted):
    scripted("echo 'no room' >&2; exit 1")
    onednn._library.cache_clear()
    with pytest.raises(NormRuntimeError, match="did not compile: no room"):
        onednn.fused(Case("batch", TINY, "relu"), exact.given(Case("batch", TINY, "relu")))


def test_it_is_asked_about_batch_norm_alone():
    assert PEER.applies(Case("batch", TINY, "relu"))
    assert not PEER.applies(Case("group", TINY, "relu"))


SHAPES = [(shape, layout) for shape in (TINY, ODD) for layout in ("contiguous", "channels_last")]


@present
@pytest.mark.parametrize(("shape", "layout"), [*SHAPES, ((6, 5), "contiguous")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_right_and_lie_where_they_lay(shape, layout, training, activation, dtype):
    case = Case("batch", shape, activation, layout, dtype, training)
    numbers = exact.given(case)
    try:
        runner = onednn.fused(case, numbers)
    except NormRuntimeError as error:
        if dtype == "float32" or "oneDNN has no such batch norm" not in str(error):
            raise
        pytest.skip(str(error))
    results = runner.step()
    first, places = runner.outputs(results), {name: value.ctypes.data for name, value in results.items()}
    assert first.keys() == ({"y", "dx", "dgamma", "dbeta"} if training else {"y"})
    assert exact.wrong(case, numbers, {"onednn": first}, {"onednn": PEER.room}) == {}
    results = runner.step()
    assert {name: value.ctypes.data for name, value in results.items()} == places
    for name, value in runner.outputs(results).items():
        np.testing.assert_array_equal(value, first[name])


@present
def test_the_running_statistics_move_as_pytorchs():
    import torch

    case = Case("batch", ODD)
    numbers = exact.given(case)
    runner = onednn.fused(case, numbers)
    runner.step()
    mean, var = (torch.from_numpy(np.array(values)) for values in (numbers.mean, numbers.var))
    torch.nn.functional.batch_norm(torch.from_numpy(np.array(numbers.x)), mean, var, training=True, momentum=0.1)
    for name, expected in (("mean", mean), ("var", var)):
        np.testing.assert_allclose(runner.tensor(name), expected.numpy(), rtol=1e-5)


@present
def test_it_takes_part_and_its_gate_is_judged():
    case = Case("batch", TINY, "relu", "channels_last")
    result = measure([case], [PEER], ["fresh"], rounds=1, threads=1, timeout=60.0, tell=print, keep=lambda _: None,
                     units=UNITS)  # fmt: skip
    assert result.faults == ()
    assert result.of(case, "fresh", "onednn").ms > 0
    assert f"onednn={onednn.version()}" in result.rows[0].circumstances["versions"].split()


def test_the_gate_holds_it_against_ours_in_channels_last():
    from test_bench import made_up

    rows = [
        made_up(Case("batch", (2, 3, 4, 4), "relu", layout), peer, ms)
        for layout, ours, theirs in (("channels_last", 2.0, 3.0), ("contiguous", 2.0, 1.0))
        for peer, ms in (("normkit", ours), ("onednn", theirs))
    ]
    (verdict,) = [v for v in verdicts(Measurements(tuple(rows), ("normkit", "onednn"))) if "oneDNN" in v.gate.text]
    assert (verdict.value, verdict.cases, verdict.passed) == (1.5, 1, True)
