import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normkit
from normkit.cli import main

TINY = [
    "--norms",
    "none,batch",
    "--lrs",
    "0.03",
    "--batch-sizes",
    "8",
    "--seeds",
    "1",
    "--epochs",
    "1",
    "--workers",
    "1",
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 3)) + 3 * y[:, None]
    np.savez(tmp_path / "data.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    return str(tmp_path / "data.npz")


def test_a_comparison_from_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "mlp", "--data", data, "--out", str(out), *TINY]) == 0
    shown = capsys.readouterr()
    assert shown.out.split()[0] in ("norm", "best")
    assert shown.out.strip().endswith(f"report: {out / 'report.html'}")
    assert "1 seed is a screening" in shown.out
    assert "2 trials in" in shown.err
    assert (out / "report.html").is_file()
    command = json.loads((out / "results.json").read_text())["environment"]["command"]
    assert command.startswith("normkit compare mlp --data")
    assert "--target" not in command


def test_json_prints_json_and_nothing_else(data, tmp_path, capfd):
    assert main(["compare", "--data", data, "--out", str(tmp_path / "out"), "--json", *TINY]) == 0
    shown = capfd.readouterr()
    printed = json.loads(shown.out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert printed["config"]["model"] == "mlp"
    assert "2 trials in" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--norms", "bach"], 2, "got 'bach'. hint: did you mean batch?"),
        (["--norms", ","], 2, "`norms` must name at least one"),
        (["--seeds", "0"], 2, "`seeds` must be at least 1; got 0"),
        (["--seeds", "two"], 2, "'--seeds'"),
        (["--epochs", "0"], 2, "`epochs` must be at least 1"),
        (["--lrs", "0.1,fast"], 2, "`--lrs` must be numbers separated by commas; got '0.1,fast'"),
        (["--lrs", "-0.1"], 2, "positive and finite; got -0.1"),
        (["--batch-sizes", "8.5"], 2, "`--batch-sizes` must be whole numbers"),
        (["--batch-sizes", "1"], 2, "`batch` must see at least 2 samples"),
        (["--batch-sizes", "1000"], 2, "number of samples left for training; got 1000 and 32"),
        (["--inputs", "raw"], 2, "every input scaling in `inputs` must be a known one"),
        (["--workers", "0"], 2, "`workers` must be at least 1"),
        (["--target", "95"], 2, "95 % is written 0.95"),
        (["--framework", "kears"], 2, "`framework` must be a known one; got 'kears'. hint: did you mean keras?"),
        (["--data", "missing.npz"], 2, "must be a file that exists; got 'missing.npz'"),
        (["mine.py:build"], 2, "must name a file that exists; got 'mine.py'"),
        (["mine.py"], 2, "write file.py:build"),
        (["--data", "mine.py:data"], 2, "must name a file that exists"),
        (["--loss", "huber"], 2, "`loss` must be a known one or file.py:name; got 'huber'"),
        (["--optimizer", "agd"], 2, "`optimizer` must be a known one"),
        (["--metric", "auc", "--goal", "max"], 2, "`metric` must be a known one"),
        (["--goal", "up"], 2, "`goal` must be min or max"),
        (["--storage", "nosuchdb://x"], 1, "must be opened in nosuchdb://x"),
        (["--nomrs", "batch"], 2, "No such option"),
        (["cnn", "mlp"], 2, "unexpected extra argument"),
        (["--out", "/dev/null/out"], 1, "the output folder must be one that can be written"),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(data, tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = ["compare", "--data", data, *TINY, *arguments]
    assert main(given) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert sorted(tmp_path.iterdir()) == before


def test_nan_in_the_data_is_one_line(tmp_path, capsys):
    x = np.zeros((20, 3))
    x[4, 1] = np.nan
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x, y_test=np.arange(20) % 2)
    assert main(["compare", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), *TINY]) == 2
    assert "1 values that are not, the first at (4, 1) is NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_process_of_its_own_shows_no_traceback(tmp_path):
    command = [sys.executable, "-m", "normkit.cli", "compare", "--norms", "bach"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_documents_the_exit_codes(capsys):
    assert main(["compare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done, 2 bad input or usage, 130 interrupted (finished trials are kept), 1 anything" in shown
    for option in (
        "--norms",
        "--lrs",
        "--batch-sizes",
        "--seeds",
        "--epochs",
        "--inputs",
        "--loss",
        "--optimizer",
        "--metric",
        "--goal",
        "--storage",
        "--workers",
        "--out",
        "--json",
    ):
        assert option in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normkit {normkit.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "compare" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    assert main(["comp"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_typer_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "normkit.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["compare"]) == 2
    assert (
        capsys.readouterr().err
        == "error: the command line needs typer, which is not installed. hint: pip install 'normkit[lab]'\n"
    )


def test_the_password_of_a_storage_is_nowhere(data, tmp_path, capsys):
    url = "postgresql://ann:hunter2@localhost:1/nowhere"
    assert main(["compare", "mlp", "--data", data, "--out", str(tmp_path / "out"), "--storage", url, *TINY]) == 1
    assert "hunter2" not in capsys.readouterr().err
