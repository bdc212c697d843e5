"""`normkit check`, `explain` and `advise` on the command line: what is printed where, written, and returned."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import normkit
from normkit.checks.rule import RULES
from normkit.cli import main

MODEL = textwrap.dedent("""
    import numpy as np
    import torch
    from torch import nn

    print("imported")


    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), weight_decay=0.1)


    def loss(outputs, y):
        return nn.functional.cross_entropy(outputs, y) / 2


    def loader():
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)


    images = np.random.default_rng(0).normal(0, 1, (64, 3)).astype("float32")
    labels = (images.sum(1) > 0).astype(int)
    number = 3
""")
GIVEN = ["check", "net.py:build", "--checkpoint", "stale.pt", "--data", "d.npz", "--select", "NK101,NK102,NK103"]


@pytest.fixture(scope="module")
def made():
    """A state dict whose kept statistics are those of other data, and data."""
    names = {}
    exec(MODEL, names)
    model, x, y = names["build"](), torch.from_numpy(names["images"]), torch.from_numpy(names["labels"])
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(60):  # 0.9^60 is below 1 %: nothing is left of the first values
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model[1].running_mean.fill_(9)
    return model.state_dict(), {"x": names["images"], "y": names["labels"]}


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A model, its checkpoint and data; the folder is the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(MODEL)
    torch.save(made[0], "stale.pt")
    np.savez("d.npz", **made[1])
    return tmp_path


def test_findings_go_to_stdout_and_the_exit_code_says_errors(folder, capsys):
    assert main([*GIVEN, "--loss", "cross_entropy", "--batch-size", "16"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("eval is worse than train on the same 4 batches (loss ")
    assert "Cause: stale statistics, first at 1." in shown.out.splitlines()[0]
    assert "imported" not in shown.out
    assert "check net.py:build" in shown.err
    assert main([*GIVEN, "--ignore", "NK1"]) == 0


def test_json_and_annotations(folder, capsys):
    assert main([*GIVEN, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert {finding["code"] for finding in printed["findings"]} <= {"NK101", "NK102"}
    assert printed["findings"][0]["url"].startswith("docs/rules.md#nk1")
    assert printed["load"] == []
    assert main([*GIVEN, "--github"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("::notice title=normkit check,file=net.py::")
    assert any(line.startswith("::error title=NK10") for line in lines)
    assert all(line.startswith("::") for line in lines)


@pytest.mark.parametrize("name", ["r.html", "r.json", "r.txt"])
def test_the_diagnosis_in_a_file(folder, capsys, name):
    assert main([*GIVEN, "--out", name]) == 1
    assert "kept statistics are not those of the data" in Path(name).read_text()
    assert capsys.readouterr().out.endswith(f"report: {name}\n")


def test_data_losses_and_an_optimizer_of_the_user(folder, capsys):
    def said(*arguments):
        main(["check", "net.py:build", *arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    named = said("--data", "d.npz", "--loss", "cross_entropy", "--batch-size", "16")
    own = said("--data", "net.py:loader", "--loss", "net.py:loss")
    assert own["gap"]["train"] == pytest.approx(named["gap"]["train"] / 2)  # rounded by another order of operations
    assert "optimizer" in named["skipped"]
    assert "optimizer" not in said("--optimizer", "net.py:optimizer")["skipped"]
    assert "data" in said()["skipped"]


@pytest.mark.parametrize("name", ["fixed.pt", "fixed.safetensors"])
def test_what_is_repaired_is_written_and_loads_as_the_output_says(folder, capsys, name):
    assert main([*GIVEN, "--fix", "--fixed-out", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "no normalization problem found in 1 layer, 3 rules\ndone: normkit.recalibrate(model, data)"
    )
    names = {}
    exec(MODEL, names)
    exec("\n".join(line.strip() for line in shown.split("load it with\n")[1].splitlines()), names)
    stale = safetensors.torch.load_file(name) if name.endswith("tensors") else torch.load(name)
    assert not torch.equal(stale["1.running_mean"], torch.load("stale.pt")["1.running_mean"])
    found = normkit.check(names["model"], names["images"], select=["NK102"])
    assert found.healthy


def test_where_nothing_is_repaired_nothing_is_written(folder, capsys):
    assert main([*GIVEN, "--ignore", "NK1", "--fix", "--fixed-out", "f.pt"]) == 0
    assert "nothing was repaired" in capsys.readouterr().out
    assert not Path("f.pt").exists()


def test_settings_from_pyproject_and_comments_and_the_command_line_over_them(folder, capsys):
    Path("pyproject.toml").write_text('[tool.normkit.check]\nselect = ["NK102"]\nsteps = 3\n')
    given = ["check", "net.py:build", "--checkpoint", "stale.pt", "--data", "d.npz", "--batch-size", "16", "--json"]
    main(given)
    printed = json.loads(capsys.readouterr().out)
    assert printed["rules"] == ["NK102"]
    assert printed["gap"]["batches"] == 3
    assert [finding["code"] for finding in printed["findings"]] == ["NK102"]
    assert main([*given, "--select", "NK103", "--steps", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rules"], printed["gap"]["batches"]) == (["NK103"], 2)
    Path("net.py").write_text(MODEL + "# normkit: ignore[NK102] 1\n")
    assert main(given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["findings"], [finding["path"] for finding in printed["allowed"]]) == ([], ["1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "--github"], "one of --json and --github must be chosen"),
        (["--fix"], "`--fixed-out` must name the file for the repaired weights"),
        (["--fixed-out", "f.pt"], "`--fixed-out` needs --fix, or --fix-unsafe"),
        (["--fix", "--fixed-out", "f.onnx"], "must end in .pt, .pth or .safetensors"),
        (["--out", "r.pdf"], "`--out` must end in .txt, .json, .html; got 'r.pdf'. hint: weights go to --fixed-out"),
        (["--out", "none/r.html"], "`--out` must be a file in a folder that exists"),
        (["--loss", "crossentropy"], "did you mean cross_entropy?"),
        (["--optimizer", "adam"], "`--optimizer` must be a function of the model in a file"),
        (["--optimizer", "net.py:number"], "net.py:number must be a function of the model; got int"),
        (["--steps", "0"], "`steps` must be a whole number of at least 1; got 0"),
        (["--select", "NK9999"], "`select` must hold codes of rules"),
        (["--data", "missing.npz"], "must be a .npz file of arrays that can be read"),
        (["--batch-size", "8", "--data", "net.py:loader"], "`batch_size` is for data that is an array"),
    ],
)
def test_bad_usage_is_one_line(folder, capsys, arguments, said):
    before = sorted(folder.iterdir())
    assert main([*GIVEN, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err.splitlines()[-1]
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_rule_is_explained(capsys):
    assert main(["explain", "nk102"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("NK102  kept statistics are not those of the data\n")
    assert RULES["NK102"].story in shown
    assert "limits: shift = 0.25" in shown
    assert main(["explain", "NK102", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"] == dict(RULES["NK102"].limits)
    assert main(["explain", "NK12"]) == 2
    assert "did you mean NK102" in capsys.readouterr().err


def test_advice(folder, capsys):
    assert main(["advise", "net.py:build", "--batch-size", "64", "--data", "table"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("table, 64 samples per forward pass")
    assert "normkit compare net.py:build --data my.npz --norms batch," in shown.out
    assert "imported" not in shown.out
    assert main(["advise", "--batch-size", "4", "--data", "images", "--framework", "keras", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["norm"] == "group"
    assert main(["advise", "--data", "images"]) == 2
    assert main(["advise", "--batch-size", "4", "--data", "pictures"]) == 2


KERAS = """
import keras

def build():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    layers[2].moving_mean.assign([90.0] * 4)  # of other data
    return model
"""
COMMANDS = """
import sys
from normkit.cli import main

given = ["check", "k.py:build", "--data", "d.npz", "--select", "NK102"]
print(main(given), flush=True)
print(main([*given, "--fix", "--fixed-out", "f.weights.h5"]), flush=True)
print(main([*given, "--checkpoint", "f.weights.h5", "--loss", "cross_entropy"]), flush=True)
print(main([*given, "--checkpoint", "stale.pt"]), flush=True)
"""


def test_a_model_of_keras(folder):
    """In a process of its own: a process has one backend."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    Path("k.py").write_text(KERAS)
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert [line for line in done.stdout.splitlines() if line in ("0", "1", "2")] == ["1", "0", "0", "2"], (
        done.stdout + done.stderr
    )
    assert "done: normkit.recalibrate(model, data)" in done.stdout
    assert "model.load_weights('f.weights.h5')" in done.stdout
    assert "must be in a file that ends in .weights.h5" in done.stderr
