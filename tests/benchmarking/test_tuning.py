"""Rules follow from measurements; here the measurements are made up, but for one short run of everything."""

import itertools
import json
from dataclasses import replace

import pytest
from test_bench import made_up

from normkit.benchmarking import tuning
from normkit.benchmarking.cases import DTYPES, LAYOUTS, Case
from normkit.benchmarking.results import Measurements
from normkit.benchmarking.tuning import CASES, MARGIN, covered, tuned
from normkit.cli import bench, main
from normkit.errors import NormRuntimeError
from normkit.kernels import instruction_sets
from normkit.kernels.registry import Rule, begins, read_rules

ROWS = tuple(Case("layer", (n, size)) for size in (16, 64, 256) for n in (8, 256))


def timed(cases, native, torch=lambda case: 1.0):
    """Measurements by a clock that says what the two functions of the case say; None is a kernel that failed."""
    times = [(case, peer, of(case)) for case in cases for peer, of in (("native", native), ("torch", torch))]
    rows = [made_up(case, peer, ms) for case, peer, ms in times if ms is not None]
    return Measurements(tuple(rows), ("native", "torch"))


def rules(cases, native, **more):
    return tuned(cases, timed(cases, native, **more)).rules


def upto(*sizes, n=(8, 256), slow=1.5, otherwise=0.5):
    return lambda case: slow if case.shape[1] in sizes and case.shape[0] in n else otherwise


def test_a_rule_ends_behind_the_largest_size_to_which_all_are_lost():
    assert rules(ROWS, upto()) == ()
    assert rules(ROWS, upto(16)) == (Rule("torch", "layer_norm", "float32", "contiguous", 17),)
    assert rules(ROWS, upto(16, 64)) == (Rule("torch", "layer_norm", "float32", "contiguous", 65),)
    assert rules(ROWS, upto(16, 256))[0].below == 17  # between them it wins
    assert rules(ROWS, upto(64, 256)) == ()  # and before them
    assert rules(ROWS[::-1], upto(16, 64))[0].below == 65  # in whatever order


def test_a_rule_needs_both_batches_and_a_clear_loss():
    assert rules(ROWS, upto(16, n=(8,))) == ()
    assert rules(ROWS, upto(16, slow=MARGIN)) == ()
    assert rules(ROWS, upto(16, slow=MARGIN + 0.01)) != ()
    assert MARGIN >= 1.1


def test_every_shape_of_a_size_has_to_be_lost():
    flat, image = Case("batch", (8, 16)), Case("batch", (8, 4, 2, 2))
    assert rules([flat, image], lambda case: 2.0) == (Rule("torch", "batch_norm", "float32", "contiguous", 17),)
    assert rules([flat, image], lambda case: 2.0 if case == flat else 1.0) == ()


def test_what_was_not_measured_is_no_reason_for_a_rule():
    assert rules(ROWS, lambda case: None) == ()
    assert rules(ROWS, lambda case: 2.0, torch=lambda case: None) == ()
    missing = lambda case: None if case == ROWS[3] else 2.0  # noqa: E731
    assert rules(ROWS, missing)[0].below == 17


def test_types_and_layouts_have_rules_of_their_own():
    image = Case("group", (8, 16, 2, 2))
    kinds = itertools.product(LAYOUTS, DTYPES)
    cases = [replace(image, layout=layout, dtype=dtype) for layout, dtype in kinds]
    found = rules(cases, lambda case: 2.0 if case in cases[1:3] else 1.0)
    assert {(rule.layout, rule.dtype) for rule in found} == {("contiguous", "bfloat16"), ("channels_last", "float32")}


def test_the_file_is_what_the_registry_reads(tmp_path):
    result = tuned(ROWS, timed(ROWS, upto(16, 64)))
    path = tmp_path / "rules.json"
    path.write_text(result.file())
    assert read_rules(path) == result.rules
    assert json.loads(result.file())["measured"] == {**result.found.rows[0].circumstances, "margin": MARGIN}
    ask = lambda shape: begins(read_rules(path), "layer_norm", "float32", "contiguous", shape)  # noqa: E731
    # The batch is no part of it.
    assert {ask((n, 64)) for n in (1, 8, 10**6)} == {"torch"}
    assert ask((8, 65)) == "native"
    path.write_text(tuned((), Measurements((), ())).file())
    assert read_rules(path) == ()


def test_the_table_says_the_rules():
    text = str(tuned(ROWS, timed(ROWS, upto(16))))
    assert text.startswith("layer_norm float32 contiguous, fewer than 17 values a sample: torch\n")
    assert "torch / native" in text
    assert "no rule: the compiled kernels lose nowhere clearly" in str(tuned(ROWS, timed(ROWS, upto())))


def test_the_cases_are_small_and_of_several_batches():
    sizes = {case.values // case.shape[0] for case in CASES}
    assert (min(sizes), max(sizes)) == (16, 4096)
    for case in CASES:
        twins = [other.shape[0] for other in CASES if replace(other, shape=case.shape) == case
                 and other.shape[1:] == case.shape[1:]]  # fmt: skip
        assert len(twins) == len(tuning.BATCHES) > 1
    assert len(set(CASES)) == len(CASES)


needs_kernels = pytest.mark.skipif(not instruction_sets(), reason="nothing is compiled")


@needs_kernels
def test_only_what_both_cover_is_measured():
    found = covered(CASES)
    assert {case.dtype for case in found} == {"float32"}  # PyTorch's kernels with float32 parameters
    assert {case.norm for case in found} == {"batch", "instance", "group", "layer", "rms"}
    assert not any(case.norm == "batch" and case.layout == "channels_last" for case in found)


def test_without_compiled_kernels_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(tuning, "instruction_sets", tuple)
    with pytest.raises(NormRuntimeError, match="must have PyTorch and the compiled kernels to choose from"):
        covered(CASES)


@needs_kernels
def test_tune_from_the_command_line(tmp_path, capfd, monkeypatch):
    out = tmp_path / "rules.json"
    cases = ["--quick", "--cases", "layer 8x16 float32, layer 8x16 bfloat16", "--rounds", "1"]
    assert main(["bench", "--tune", *cases, "--json", "--out", str(out)]) == 0
    shown = capfd.readouterr()
    told = json.loads(shown.out)
    assert [(row["peer"], row["shape"], row["dtype"]) for row in told["rows"]] == [
        ("native", "8x16", "float32"), ("torch", "8x16", "float32")
    ]  # fmt: skip
    assert [vars(rule) for rule in read_rules(out)] == told["rules"]
    assert f"NORMKIT_KERNELS={out} lets them count" in shown.err
    # Ctrl-C: what is finished is shown, and the file is left alone.
    before = out.read_text()
    stopped = replace(timed(ROWS, upto(16)), interrupted=True)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: stopped)
    assert main(["bench", "--tune", *cases, "--out", str(out)]) == 130
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.json"], "`--out` must come with `--tune`; got 'x.json'"),
        (["--tune", "--out", "absent/x.json"], "`--out` must be in a folder that can be written; got 'absent/x.json'"),
        (["--tune", "--peers", "jax"], "`--tune` must go without `--peers`; got 'jax'"),
        (["--tune", "--from", "x.csv"], "`--tune` must go without `--from`; got 'x.csv'"),
        (["--tune", "--cases", "relu"], "every part of `--cases` must name cases"),
        (["--tune", "--rounds", "0"], "`--rounds` must be at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err
