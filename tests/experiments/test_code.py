import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normkit
from normkit.errors import NormError, NormValueError
from normkit.experiments.code import Code, call, takes
from normkit.experiments.protocol import training

STEP = """
import torch
w = torch.nn.Parameter(torch.zeros(1))
o = torch.optim.SGD([w], 0.1)
w.grad = torch.ones(1)
o.step()
def build(norm): pass
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a file and return a reference into it; the search path is as before afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(content: str, name: str = "build", stem: str = "mine") -> str:
        (tmp_path / f"{stem}.py").write_text(content)
        return f"{tmp_path / stem}.py:{name}"

    return write


def test_a_function_of_a_file(file):
    reference = file("import helper\ndef build(): return helper.NUMBER\n")
    file("NUMBER = 7\n", stem="helper")
    assert Code.named(reference).load()() == 7


def test_the_files_of_the_user_are_known_and_libraries_are_not(tmp_path):
    def loaded():
        code = f"from normkit.experiments.code import *; Code.named({str(tmp_path / 'm.py')!r} + ':f').load()"
        code += "; print(sorted((f.split('/')[-1], h) for f, h in files_of_the_user().items()))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    (tmp_path / "m.py").write_text(
        "import sys; sys.path.append(__file__[:-4] + 'lib')\nimport far_helper, numpy\nf = 1\n"
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "far_helper.py").write_text("a = 1\n")
    first = loaded()
    assert [name for name, _ in eval(first)] == ["far_helper.py", "m.py"]
    assert loaded() == first
    (tmp_path / "lib" / "far_helper.py").write_text("a = 2\n")
    assert loaded() != first


def test_a_file_is_run_once_and_again_when_it_changed(file):
    reference = file("import random\nbuild = random.random()\n")
    first = Code.named(reference).load()
    assert Code.named(reference).load() == first
    file("build = 'new'\n")
    assert Code.named(reference).load() == "new"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def bild(norm): pass\nimport math\n", r"mine\.py must define build; got bild"),
        ("x = 1 / 0\n", r"raised ZeroDivisionError: division by zero \(line 1 of mine\.py\)"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def build(:\n", "SyntaxError"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n", "SystemExit.*__main__"),
        ("import normkit\nnormkit.compare('mlp')\n", "must not call normkit.compare when it is imported.*__main__"),
        (STEP, r"mine\.py.*train.*__main__"),
    ],
)
def test_a_file_that_cannot_be_used(file, content, said):
    with pytest.raises(NormValueError, match=f"(?s){said}"):
        Code.named(file(content)).load(training("torch").no_training)
    # Nothing stays behind that would stop a good file.
    assert Code.named(file("def build(norm): return 3\n")).load(training("torch").no_training)(None) == 3


def test_a_missing_file(tmp_path):
    with pytest.raises(NormValueError, match=r"a file that exists; got 'nowhere.py'"):
        Code.named("nowhere.py:build").load()


def test_the_line_of_the_users_code_is_named(file):
    function = Code.named(file("def build():\n    x = 1\n    return [][x]\n")).load()
    with pytest.raises(NormValueError, match=r"f raised IndexError: list index out of range \(line 3 of mine.py\)"):
        call("f", function)


def test_what_normkit_words_is_not_worded_again():
    def refuse():
        raise NormValueError("as it is")

    with pytest.raises(NormError, match=r"^as it is$"):
        call("f", refuse)


def test_takes():
    assert takes(lambda norm: 0, "norm")
    assert takes(lambda **k: 0, "norm")
    assert not takes(lambda x: 0, "norm")
    assert not takes(3, "norm")


SCALE = 2


def helper():
    return SCALE


def handed_over():
    return helper()


def test_an_object_is_carried_and_its_fingerprint_is_that_of_what_it_uses(monkeypatch):
    code = Code.of(handed_over)
    assert code.label == "python:handed_over"
    assert code.load()() == 2
    assert Code.of(handed_over).fingerprint == code.fingerprint
    assert Code.of(helper).fingerprint != code.fingerprint
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3)
    assert Code.of(handed_over).fingerprint != code.fingerprint


def made(width):
    return lambda norm: width


class Maker:
    def __init__(self, width):
        self.width = width

    def __call__(self, norm):
        return self.width

    def build(self, norm):
        return self.width


WIDTHS = [4]


def listed(norm):
    return WIDTHS[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(4), made(64)),
        (functools.partial(helper, 4), functools.partial(helper, 64)),
        (Maker(4), Maker(64)),
        (Maker(4).build, Maker(64).build),
        (lambda norm: 4, lambda norm: 64),
    ],
)
def test_what_decides_beside_the_source_tells_objects_apart(one, other):
    assert Code.of(one).fingerprint != Code.of(other).fingerprint
    assert Code.of(one).fingerprint == Code.of(one).fingerprint


def test_a_global_that_is_no_plain_value_counts(monkeypatch):
    # As in a notebook, whose functions are carried by value.
    monkeypatch.setattr(listed, "__module__", "__main__")
    before = Code.of(listed).fingerprint
    WIDTHS[0] = 64
    try:
        assert Code.of(listed).fingerprint != before
    finally:
        WIDTHS[0] = 4


def test_what_cannot_be_carried_is_refused():
    with pytest.raises(NormValueError, match=r"can be pickled.*file\.py:name"):
        Code.of(sys.stdout.buffer)


def test_a_main_script_hands_its_own_functions_over(tmp_path):
    """Without a main guard, and with a helper and a global of the script."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(60, 3)) + 3 * (np.arange(60) % 2)[:, None], y=np.arange(60) % 2)
    script = tmp_path / "script.py"
    script.write_text(
        "import normkit, numpy as np, torch\n"
        "from torch import nn\n"
        "WIDTH = 8\n"
        "def block(norm): return [nn.Linear(3, WIDTH), norm(WIDTH, nn.ReLU())]\n"
        "def build(norm): return nn.Sequential(*block(norm), nn.Linear(WIDTH, 2))\n"
        "d = np.load('d.npz')\n"
        "small = dict(norms=('none', 'batch:after'), lrs=(0.03,), seeds=1, epochs=1, batch_sizes=(8,), workers=1)\n"
        "data = (d['x'][:40], d['y'][:40]), (d['x'][40:], d['y'][40:])\n"
        "r = normkit.compare(build, data, show_progress=False, **small)\n"
        "print(len(r.trials), r.config.model, r.trials[1].diverged)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 python:build False\n"


def test_compare_may_run_again_after_a_file_was_refused(file):
    with pytest.raises(NormValueError):
        Code.named(file("import normkit\nnormkit.compare('mlp')\n")).load()
    with pytest.raises(NormValueError, match="did you mean batch"):
        normkit.compare(norms=("bach",))


def test_paths_are_no_names():
    with pytest.raises(NormError, match=r"must be named as file.py:name; got m.py"):
        normkit.compare(Path("m.py"))
