import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import bench_twins
import numpy as np
import pytest
import torch

from normkit.benchmarking import exact, results
from normkit.benchmarking.cases import GRID, QUICK, TINY, Case, chosen
from normkit.benchmarking.gates import GATES, verdicts
from normkit.benchmarking.harness import measure
from normkit.benchmarking.page import page
from normkit.benchmarking.peers import PEERS, Peer, Units
from normkit.benchmarking.peers import chosen as chosen_peers
from normkit.benchmarking.peers import torch as torch_peers
from normkit.benchmarking.plot import figure
from normkit.benchmarking.results import Measurement, Measurements
from normkit.cli import main
from normkit.errors import NormRuntimeError, NormValueError
from normkit.experiments.devices import cores

SMALL = Case("batch", (4, 3, 2, 2), "relu")
LARGER = Case("batch", (8, 3, 2, 2), "relu")
UNITS = Units(Peer("copy", "bench_twins:copy", (), ""), Peer("least", "bench_twins:least", (), ""))
RIGHT = Peer("right", "bench_twins:right", (), "", room=1.0)


def twin(name: str, **options) -> Peer:
    return Peer(name, f"bench_twins:{name}", (), "", **options)


def run(cases, peers, *, memories=("fresh",), rounds=2, timeout=60.0, tell=lambda _: None, keep=lambda _: None):
    return measure(
        cases, peers, memories, rounds=rounds, threads=1, timeout=timeout, tell=tell, keep=keep, units=UNITS
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    told, kept = [], []
    other = replace(RIGHT, name="other", room=16.0)
    return run(QUICK, [RIGHT, other], tell=told.append, keep=kept.append), told, kept


def test_two_peers_on_every_kind_of_case(measured):
    result, told, kept = measured
    assert result.faults == ()
    assert result.cases() == [(case, "fresh") for case in QUICK]
    assert [row.peer for row in result.rows] == ["right", "other"] * len(QUICK)
    assert [row for rows in kept for row in rows] == list(result.rows)
    for row in result.rows:
        assert 0 < row.lower_ms <= row.ms <= row.upper_ms or row.rounds < 3
        assert row.copies == row.ms / row.copy_ms
        assert row.least == row.ms / row.least_ms
    assert len(told) == len(QUICK)
    assert told[0].startswith(f"[1/{len(QUICK)}] batch+relu 8x16x4x4 contiguous float32, fresh memory: right ")


def test_the_table_has_copies_and_ratios(measured):
    table = measured[0].table()
    assert table.headings == ["case", "memory", "copy ms", "right ms", "copies", "least traffic", "other / right"]
    own, other = measured[0].rows[:2]
    assert table.rows[0][-2:] == [f"{own.ms / own.least_ms:.3g}", f"{other.ms / own.ms:.2f}"]


@pytest.mark.parametrize("training", [True, False])
def test_the_units_read_and_write_what_a_step_has_to(training):
    case = Case("batch", TINY, None, "channels_last", training=training)
    numbers = exact.given(case)
    copied, least = (runner(case, numbers) for runner in (torch_peers.copy, torch_peers.least))
    np.testing.assert_array_equal(copied.outputs(copied.step())["y"], numbers.x)
    found = least.outputs(least.step())
    expected = {"y": numbers.x, "dx": numbers.x + numbers.dy} if training else {"y": numbers.x}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    made = least.step()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in made)
    assert len({t.data_ptr() for t in (least.x, least.dy, *made)}) == 2 + len(made)


def test_a_unit_that_fails_leaves_nothing_to_compare_with():
    broken = UNITS._replace(least=twin("raises"))
    result = measure([SMALL], [RIGHT], ["fresh"], rounds=1, threads=1, timeout=60.0, tell=print,
                     keep=lambda _: None, units=broken)  # fmt: skip
    assert result.rows == ()
    assert [fault.peer for fault in result.faults] == ["raises"]


def test_wrong_outputs_are_caught_and_not_timed():
    lies = [twin(name) for name in bench_twins.LIES]
    case = Case("batch", (16, 3, 4, 4), "relu")
    result = run([case], [RIGHT, *lies], rounds=1)
    assert {fault.peer for fault in result.faults} == set(bench_twins.LIES)
    assert [row.peer for row in result.rows] == ["right"]
    assert all(fault.what.startswith("is wrong: ") for fault in result.faults)
    assert "y against the formula: 1 of 768 values differ" in str(result)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_one_wrong_value_is_seen_in_every_kind_of_case(case, monkeypatch):
    monkeypatch.setattr(exact, "_AT_ONCE", case.values // 3)  # in several parts
    numbers = exact.given(case)
    good = bench_twins.right(case, numbers).step()
    if case.dtype == "bfloat16":
        good = {name: exact.rounded(value, case.dtype) for name, value in good.items()}
    bad = {**good, "y": good["y"].copy()}
    bad["y"][(-1,) * len(case.shape)] += 0.5
    assert list(exact.wrong(case, numbers, {"good": good, "bad": bad}, {"good": 1.0, "bad": 16.0})) == ["bad"]


def test_the_oracle_agrees_with_the_formula_and_is_asked():
    case, numbers = SMALL, exact.given(SMALL)
    parts = list(exact.samples(case))
    assert len(parts) == 4
    for part in parts:
        whole = exact.by_formula(case, numbers, next(exact.parts(case)))
        own = exact.by_oracle(case, numbers, part)
        for name, value in own.values.items():
            place = part.place if name in ("y", "dx") else part.channels
            np.testing.assert_allclose(value, whole.values[name][place], rtol=1e-10, atol=1e-12)


def test_the_slope_of_silu():
    z = np.linspace(-5, 5, 11)
    up, down = (exact.activated("silu", z + step)[0] for step in (1e-6, -1e-6))
    np.testing.assert_allclose(exact.activated("silu", z)[1], (up - down) / 2e-6, atol=1e-8)


def test_peers_that_fail_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_PID", str(tmp_path / "pid"))
    third = Case("batch", (2, 3, 2, 2), "relu")
    peers = [
        RIGHT,
        twin("dies"),
        twin("raises"),
        twin("hangs_on_large"),
        twin("no_such"),
        replace(RIGHT, name="x", needs=("nope",)),
    ]
    result = run([SMALL, LARGER, third], peers, rounds=1, timeout=3.0)
    assert [row.peer for row in result.rows] == ["right", "hangs_on_large", "right", "right", "hangs_on_large"]
    said = [f"{fault.peer} {fault.what}" for fault in result.faults]
    assert f"raises failed while making {SMALL} ready: ValueError: does not do that" in said
    assert any(text.startswith(f"no_such failed while making {SMALL} ready: AttributeError") for text in said)
    # These end the process: it is started again once.
    assert [text for text in said if text.startswith("dies")] == [
        f"dies died (SIGKILL) while making {case} ready" for case in (SMALL, LARGER)
    ]
    assert [text for text in said if text.startswith("hangs")] == [
        f"hangs_on_large took more than 3 s while making {LARGER} ready"
    ]
    assert result.missing == {"x": "nope is not installed"}
    assert "x was left out: nope is not installed" in str(result)
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_ctrl_c_ends_the_processes_and_keeps_what_is_finished(tmp_path, monkeypatch):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pid = tmp_path / "pid"
    monkeypatch.setenv("BENCH_PID", str(pid))

    def interrupt():
        while not pid.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    csv = tmp_path / "rows.csv"
    result = run([SMALL, LARGER], [RIGHT, twin("hangs_on_large")], keep=lambda rows: results.append(csv, rows))
    assert result.interrupted
    assert {row.case for row in result.rows} == {SMALL}
    kept, finished = ([row.row() for row in rows] for rows in (results.read(csv, ()).rows, result.rows))
    for row in (*kept, *finished):
        del row["copies"]  # of times with six digits its last one may be another
    assert kept == finished
    assert not alive(int(pid.read_text()))
    assert "interrupted" in str(result)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_recycled_memory_takes_no_new_pages():
    result = run([SMALL], [twin("large")], memories=("recycled", "fresh"), rounds=1)
    recycled, fresh = (result.of(SMALL, memory, "large") for memory in ("recycled", "fresh"))
    assert recycled.faults == 0
    assert fresh.faults >= 20  # 48 MB in pages of 2 MB, where numpy gets those it asks for


def made_up(
    case=SMALL, peer="normkit", ms=4.0, copy_ms=1.0, least_ms=2.0, memory="recycled", date="2026-01-02T00:00:00+00:00"
):
    under = dict.fromkeys(results.CIRCUMSTANCES, "-") | {"date": date, "threads": "2", "versions": "a=1 b=2"}
    return Measurement(case, memory, peer, ms, ms, ms, copy_ms, least_ms, None, 3, under)


def test_rows_are_appended_whole_and_read_again(tmp_path):
    csv = tmp_path / "rows.csv"
    rows = [made_up(), made_up(replace(SMALL, training=False, activation=None), ms=1 / 3)]
    results.append(csv, rows[:1])
    results.append(csv, [])
    results.append(csv, rows[1:])
    lines = csv.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].split(",") == list(results.COLUMNS)
    again = results.read(csv, ["normkit"]).rows
    assert again[0] == rows[0]
    assert again[1].case == rows[1].case
    assert again[1].ms == pytest.approx(1 / 3, rel=1e-5)  # six digits are kept


def test_two_processes_append_to_one_file(tmp_path):
    csv = tmp_path / "rows.csv"
    results.append(csv, [made_up()])
    threads = [threading.Thread(target=lambda: [results.append(csv, [made_up()] * 3) for _ in range(20)]) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(csv.read_text().splitlines()) == 2 + 120
    assert len(results.read(csv, ()).rows) == 121


def test_a_case_comes_from_the_newest_run_that_holds_the_first_peer(tmp_path):
    csv = tmp_path / "rows.csv"
    old, new, newest = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))
    rows = [made_up(ms=1, date=old), made_up(ms=2, date=new), made_up(peer="torch", date=old),
            made_up(peer="torch", date=newest), made_up(LARGER, peer="torch", date=old)]  # fmt: skip
    results.append(csv, rows)
    assert results.read(csv, ["normkit"]).rows == (rows[1], rows[4])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "must have the columns of `normkit bench`; got a, b"),
        ("", "must have the columns"),
        (",".join(results.COLUMNS) + "\nbatch,relu\n", "every row of the CSV file must be whole"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(NormValueError, match=said):
        results.read(tmp_path / "x.csv", ())


def test_other_columns_are_not_appended_to(tmp_path):
    csv = tmp_path / "x.csv"
    csv.write_text("a,b\n")
    with pytest.raises(NormValueError, match="must have the columns"):
        results.append(csv, [made_up()])
    assert csv.read_text() == "a,b\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    with pytest.raises(NormRuntimeError, match="must be a file that can be written; got /dev/full"):
        results.append(Path("/dev/full"), [made_up()])


def test_every_gate_is_about_something():
    for gate in GATES:
        assert any(gate.pick(case) for case in GRID), gate.text


def verdict(rows, text):
    given = Measurements(tuple(rows), ("normkit",))
    return next(v for v in verdicts(given) if text in v.gate.text)


def test_gates_say_met_and_missed_honestly():
    quick, slow = (made_up(case, ms=ms) for case, ms in ((SMALL, 2.0), (LARGER, 8.0)))
    mean = verdict([quick, slow], "batch norm + ReLU, float32, in copies")
    assert mean.value == pytest.approx(4.0)  # sqrt(2 * 8)
    assert (mean.passed, mean.cases, mean.worst) == (False, 2, str(LARGER))
    assert verdict([quick], "batch norm + ReLU, float32, in copies").passed is True
    assert verdict([quick, slow], "the same, the worst case").value == 8.0
    assert verdict([quick], "RMS norm, float32, eager").passed is None
    # The faster way of PyTorch counts.
    eager = [made_up(peer="torch", ms=9.0), made_up(peer="torch-inplace", ms=4.0)]
    assert verdict([quick, *eager], "batch norm + ReLU, float32, eager").value == 2.0
    tiny = Case("batch", TINY, "relu")
    small = verdict([made_up(tiny, ms=3.0), made_up(tiny, "torch", ms=2.0)], "our time over eager's")
    assert (small.value, small.passed) == (1.5, False)
    half = replace(SMALL, dtype="bfloat16")
    twice = verdict([quick, made_up(half, ms=4.0)], "bfloat16 in copies, of float32's")
    assert (twice.value, twice.passed) == (2.0, False)
    # Below half a millisecond of eager's nothing is asked of the slow.
    assert verdict([made_up(ms=0.6), made_up(peer="torch", ms=0.4)], "any case").value is None
    assert verdict([made_up(ms=0.6), made_up(peer="torch", ms=0.5)], "any case").passed is False


def test_the_page_states_the_gates_beside_what_was_measured(tmp_path):
    csv = tmp_path / "rows.csv"
    results.append(csv, [made_up(ms=4.0), made_up(peer="torch", ms=12.0)])
    written = tmp_path / "page.md"
    assert main(["bench", "--from", str(csv), "--page", str(written)]) == 0
    text = written.read_text()
    assert (
        "| batch norm + ReLU, float32, in copies | recycled | geometric mean | at most 3.2 | 4 | **missed** |" in text
    )
    assert "eager's time over ours | recycled | geometric mean | at least 2.5 | 3 | met | 1 case" in text
    assert "| batch+relu 4x3x2x2 contiguous float32 | recycled | 1 | 4 | 4 | 2 | 3.00 |" in text
    assert "2 threads, kernels for -; a 1, b 2." in text
    assert "Nothing has been measured" in page(Measurements((), ()))


def test_numbers_first_then_a_picture(measured, tmp_path):
    dots = figure(measured[0])
    assert dots.lines == [str(case) for case in QUICK]
    assert dots.copies["other"][3] == measured[0].rows[7].copies
    picture = measured[0].save(tmp_path / "bench.svg").read_text()
    assert "batch+relu 8x16x4x4 contiguous float32 eval" in picture
    assert measured[0].save(tmp_path / "again.svg").read_text() == picture
    lonely = Measurements((made_up(), made_up(LARGER, "torch")), ("normkit", "torch"))
    assert figure(lonely).copies == {"normkit": [4.0, None], "torch": [None, 4.0]}


def test_cases_are_chosen_by_words():
    names = [str(case) for case in chosen(GRID, "rms float32, eval channels_last bfloat16")]
    assert names == ["rms 4096x512 contiguous float32", "batch+relu 32x64x56x56 channels_last bfloat16 eval"]
    assert chosen(GRID, None) == GRID
    assert len(set(GRID)) == len(GRID)
    with pytest.raises(NormValueError, match=r"must name cases by words of theirs; got 'nothing'. hint: known: batch"):
        chosen(GRID, "rms, nothing")


def test_peers_are_chosen_by_name():
    assert [peer.name for peer in chosen_peers(PEERS, "torch,normkit,torch")] == ["torch", "normkit"]
    with pytest.raises(NormValueError, match="did you mean torch"):
        chosen_peers(PEERS, "torhc")
    with pytest.raises(NormValueError, match="at least one"):
        chosen_peers(PEERS, ",")
    assert len({peer.name for peer in PEERS}) == len(PEERS)


def test_bench_from_the_command_line(tmp_path, capfd):
    csv, plot, written = tmp_path / "b.csv", tmp_path / "b.svg", tmp_path / "b.md"
    cases = ["--quick", "--cases", "batch bfloat16, eval, group", "--peers", "normkit,torch-inplace"]
    files = ["--csv", str(csv), "--plot", str(plot), "--page", str(written)]
    arguments = ["bench", *cases, "--rounds", "1", "--json", *files]
    assert main(arguments) == 0
    shown = capfd.readouterr()
    told = json.loads(shown.out)
    assert [row["peer"] for row in told["rows"]] == ["normkit", "torch-inplace"] * 3
    assert told["rows"][0]["threads"] == cores()
    assert "torch=" in told["rows"][0]["versions"]
    assert len(told["gates"]) == len(GATES)
    assert shown.err.startswith("[1/3] batch+relu 8x16x4x4 channels_last bfloat16, recycled memory: normkit ")
    assert len(csv.read_text().splitlines()) == 7
    assert "<svg" in plot.read_text()
    assert "# How fast" in written.read_text()


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        pytest.param("jax", [QUICK[1], QUICK[5]], id="jax"),
        *(pytest.param(name, QUICK, id=f"{name}-all", marks=pytest.mark.long)
          for name in ("jax", "keras-tensorflow", "torch-compile", "torch-thp")),
    ],
)  # fmt: skip
def test_other_peers_compute_the_same(name, cases):
    (peer,) = chosen_peers(PEERS, name)
    if peer.missing():
        pytest.skip(peer.missing())
    result = run(cases, [peer], rounds=1, timeout=300.0)
    assert result.faults == ()
    assert len(result.rows) == len(cases)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "nothing"], "every part of `--cases` must name cases"),
        (["--peers", "tensorflow"], "every peer must be a known one; got 'tensorflow'"),
        (["--memory", "used"], "`--memory` must name known states; got 'used'"),
        (["--rounds", "0"], "`--rounds` must be at least 1; got 0"),
        (["--threads", "0"], "`--threads` must be at least 1; got 0"),
        (["--plot", "x.jpg"], "`--plot` must end in .svg"),
        (["--from", "missing.csv"], "the CSV file must be one that can be read"),
    ],
)
def test_bad_input_is_said_in_one_line(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err


def test_a_worker_ends_with_its_parent(tmp_path):
    code = (
        "import sys; sys.path[:] = {path!r}; import os; os.environ['BENCH_PID'] = {pid!r}; import test_bench as t; "
        "t.run([t.SMALL], [t.twin('hangs')])"
    ).format(path=[str(Path(__file__).parent), *sys.path], pid=str(tmp_path / "pid"))
    parent = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
