"""What the README says of comparing one's own model and loop, done."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import normkit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "diabetes.py"
SMALL = {"norms": ("none", "batch"), "lrs": (0.01,), "seeds": 1, "epochs": 1, "workers": 1, "show_progress": False}


def test_the_model_of_the_readme():
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def build(norm)" in b)
    names = {"nn": nn}
    exec(block, names)
    # Digits are 8 x 8 and have one channel, as the first convolution asks for.
    result = normkit.compare(names["build"], **{**SMALL, "norms": ("none", "batch", "batch:after")})
    assert [trial.diverged for trial in result.trials] == [False] * 3


def lines():
    return EXAMPLE.read_text().splitlines()


def original():
    """The script before it went through compare, which calls its function now."""
    return "\n".join([*(re.sub(r"\S.*  # was: (.*)", r"\1", line) for line in lines()), "", "", "train()", ""])


def test_three_lines_of_a_script_change_and_the_readme_shows_them():
    changed = [line for line in lines() if "# was: " in line]
    assert len(changed) == 3
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    shown = [line[1:].strip() for line in diff if line.startswith("+")]
    assert shown == [line.split("  # was: ")[0].strip() for line in changed]
    assert [line[1:].strip() for line in diff if line.startswith("-")] == [c.split("# was: ")[1] for c in changed]
    assert len([line for line in lines() if line.strip()]) <= 35


def test_the_script_ran_before(tmp_path):
    seeded = f"import torch\n\ntorch.manual_seed(0)\n{original()}"  # not seeded, it ends above 1 now and then
    (tmp_path / "script.py").write_text(seeded)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    epochs = [line.split() for line in done.stdout.splitlines()]
    assert len(epochs) == 20
    assert float(epochs[-1][1]) < 1.0  # better than guessing the mean


def test_the_script_goes_through_compare():
    result = normkit.compare(f"{EXAMPLE}:train", **{**SMALL, "seeds": 3})
    assert (result.task.metric, result.task.goal) == ("loss", "min")
    assert [len(trial.curve) for trial in result.trials] == [20] * 6
    none, batch = result.groups[0].variants
    assert none.mean_final == pytest.approx(0.5, abs=0.15)
    assert batch.mean_final != none.mean_final
