"""The compiled module as a file: its instructions, what loading it does to the process, and life without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_calls import SETS, needs_kernels

import normkit.torch as nk

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which this system has not")
# Instructions with a vector prefix, and those of the masks of AVX-512. (verr and verw are older, and never compiled.)
AVX = re.compile(
    r"^\s*[0-9a-f]+:\s+(v(?!err|erw)[a-z0-9]+|k(mov|or|and|not|xor|xnor|test|ortest|unpck|shift|add)[a-z]*)\s"
)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def compiled_object(name: str) -> Path:
    """What CMake compiled for an instruction set; it stays in the build folder of an editable installation."""
    for tool in ("objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    found = sorted(
        ROOT.glob(f"build/*/CMakeFiles/kernels_{name}.dir/**/kernels.cpp.o"), key=lambda p: p.stat().st_mtime
    )
    if not found:
        pytest.skip(f"no object of {name} in the build folder")
    return found[-1]


def avx_instructions(path: Path) -> int:
    """How many instructions need AVX; all are looked at."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="ascii") as listing:
        assert listing.stdout is not None
        count = sum(AVX.match(line) is not None for line in listing.stdout)
    assert listing.returncode == 0
    return count


@needs_kernels
def test_the_baseline_holds_no_instruction_that_an_old_processor_lacks():
    assert avx_instructions(compiled_object("baseline")) == 0


@needs_kernels
def test_the_others_do_hold_some():
    """That the test above can fail."""
    if "avx2" not in SETS:
        pytest.skip("a processor without AVX2")
    assert avx_instructions(compiled_object("avx2")) > 10_000


@needs_kernels
@pytest.mark.parametrize("name", SETS)
def test_objects_share_nothing_but_their_tables(name):
    """A symbol that two objects define (a template of the standard library) is merged by the linker: either's code."""
    path = compiled_object(name)
    listed = subprocess.run(["nm", "--defined-only", "-g", str(path)], capture_output=True, text=True, check=True)
    found = [line.split()[-2:] for line in listed.stdout.splitlines()]
    assert [symbol for kind, symbol in found if kind in "TWi"] == []  # code; the table is data
    assert any(f"table_{name}" in symbol for _, symbol in found)


# In a process of its own, since what is loaded here stays: all questions at once.
PROBE = """
import json, re, threading, time
import numpy as np
tiny, half = np.float32(1e-40), np.float32(0.5)
before = tiny * half
import torch, normkit.torch as nk
torch.set_num_threads(1)
x = torch.randn(32, 16, 40, 40, requires_grad=True)
layers = [nk.BatchNorm2d(16), nk.GroupNorm(4, 16), nk.LayerNorm(40)]

def step():
    for layer in layers:
        layer(x).sum().backward()

step()
cpu, wall = time.process_time(), time.perf_counter()
for _ in range(6):
    step()
ratio = (time.process_time() - cpu) / (time.perf_counter() - wall)
torch.set_num_threads(2)
step()
kept = [before > 0, tiny * half == before, torch.tensor(1e-40).mul(0.5).item() > 0]
thread = threading.Thread(target=lambda: kept.append(tiny * half == before))
thread.start(), thread.join()
maps = open("/proc/self/maps").read()
runtimes = sorted(set(re.findall(r"/[^ \\n]*/lib(?:gomp|iomp5|omp)[^/\\n]*\\.so[^/\\n]*", maps)))
print(json.dumps({"ratio": ratio, "subnormal": [bool(k) for k in kept], "runtimes": runtimes}))
"""


@pytest.fixture(scope="module")
def probe():
    return json.loads(python(PROBE))


@linux
@needs_kernels
def test_one_openmp_runtime(probe):
    """Two would start twice the threads. That of PyTorch serves the kernels too."""
    assert len({Path(path).resolve() for path in probe["runtimes"]}) == 1, probe["runtimes"]


@linux
@needs_kernels
def test_one_thread_is_one_thread(probe):
    """CPU time is wall time: less where others take the core; a second one that works, or spins, gives up to 2."""
    assert probe["ratio"] < 1.3


@linux
@needs_kernels
def test_loading_leaves_subnormal_numbers_on(probe):
    assert probe["subnormal"] == [True] * 4


STEPS = """
torch.manual_seed(0)
x = torch.randn(4, 6, 5, 5, requires_grad=True)
layer = nk.NormAct(nk.BatchNorm2d(6), "silu")
for _ in range(3):
    y = layer(x)
y.pow(2).sum().backward()
"""
WITHOUT = f"""
import sys, warnings
sys.modules["normkit.kernels._native"] = None  # as if it had not been built
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import normkit, normkit.torch as nk, torch
    from normkit.kernels import instruction_sets
    assert not seen, [str(w.message) for w in seen]
{STEPS.replace(chr(10), chr(10) + "    ").rstrip()}
print(instruction_sets(), [str(w.message).split(":")[0] for w in seen])
print(*x.grad.flatten().tolist())
"""
SAID = "() ['normkit runs without its compiled kernels']"


@needs_kernels
def test_without_the_compiled_module_all_is_the_same_and_said_once():
    said, gradient = python(WITHOUT).splitlines()
    assert said == SAID
    here = {"torch": torch, "nk": nk}
    exec(STEPS, here)
    found = torch.tensor([float(value) for value in gradient.split()])
    torch.testing.assert_close(found, here["x"].grad.flatten(), rtol=0, atol=1e-5)


@pytest.mark.long
def test_it_installs_without_a_compiler(tmp_path):
    """A compiler that is not there: pure Python is installed, and works as above."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    environment = {**os.environ, "CXX": "/nonexistent"}
    # From a copy: what CMake remembers of the compiler it found is in the build folder. A library that was built into
    # the source folder would be packed as it is.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.so", "build", "tests", "benchmarks"))
    done = subprocess.run([*command, str(source)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert (site / "normkit" / "__init__.py").exists()
    assert not list(site.glob("normkit/**/*.so"))
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + WITHOUT.replace(
        'sys.modules["normkit.kernels._native"] = None', ""
    )
    # -S and a path by hand: the editable installation would be found before.
    libraries = os.pathsep.join(p for p in sys.path if p.endswith("-packages"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": libraries},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == SAID
