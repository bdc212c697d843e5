"""The peer in C++: oneDNN's batch norm with ReLU fused, by the program `benchmarks/onednn.cpp` of a checkout.

It is compiled where the peer starts, in a second or two, and called through ctypes, so that its outputs are checked and
its steps timed as those of all others.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from normkit.benchmarking.cases import Case
from normkit.benchmarking.peers import Runner
from normkit.benchmarking.values import Given
from normkit.errors import NormRuntimeError

__all__ = ["fused", "missing", "version"]

SOURCE = Path(__file__).parents[4] / "benchmarks" / "onednn.cpp"  # an installed package has none
HEADER = "oneapi/dnnl/dnnl_version.h"
_MAJOR = "2"  # the interface that the program is written for; the next one made descriptors differently
_ASK = """#if __has_include(<{header}>)
#include <{header}>
DNNL_VERSION_MAJOR DNNL_VERSION_MINOR DNNL_VERSION_PATCH
#endif
"""


def missing() -> str | None:
    """Why it cannot run here, None if it can."""
    if not SOURCE.exists():
        return "benchmarks/onednn.cpp is not there: it comes with a checkout, not with the installed package"
    if shutil.which(_compiler()) is None:
        return f"the C++ compiler {_compiler()} is not there: apt-get install g++, or name another by CXX"
    found = version()
    if found is None:
        return f"oneDNN's {HEADER} is not there: apt-get install libdnnl-dev"
    if found.partition(".")[0] != _MAJOR:
        return f"benchmarks/onednn.cpp is written for oneDNN {_MAJOR}, and {found} is there"
    return None


def version() -> str | None:
    """Of the library, as its header has it; None without one."""
    command = [_compiler(), "-x", "c++", "-std=c++17", "-E", "-P", "-"]
    done = subprocess.run(command, input=_ASK.format(header=HEADER), capture_output=True, text=True, check=False)
    lines = done.stdout.split("\n")
    words = next((line.split() for line in reversed(lines) if line.strip()), [])
    return ".".join(words) if done.returncode == 0 and words else None


def fused(case: Case, given: Given) -> Runner:
    """Batch norm, with ReLU in one primitive where the case has one."""
    return _Fused(case, given)


class _Fused:
    def __init__(self, case: Case, given: Given) -> None:
        self.case, self.half, self.last = case, case.dtype == "bfloat16", case.layout == "channels_last"
        self.library = _library()
        shape = (ctypes.c_int64 * len(case.shape))(*case.shape)
        flags = (self.last, self.half, case.activation == "relu", case.training)
        self.step_ = self.library.onednn_begin(shape, len(case.shape), *flags, case.spec.eps)
        if not self.step_:
            raise self._error("has no such batch norm")
        for name, values in given.arrays().items():
            if name != "dy" or case.training:
                self.tensor(name)[...] = self._narrow(name, values)
        names = ("y", "dx", "dgamma", "dbeta") if case.training else ("y",)
        self.results = {name: self.tensor(name) for name in names}

    def __del__(self) -> None:
        if getattr(self, "step_", None):
            self.library.onednn_end(self.step_)

    def step(self) -> Any:
        if not self.library.onednn_run(self.step_):
            raise self._error("failed")
        return self.results

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        return {name: self._wide(name, values) for name, values in result.items()}

    def kernel(self) -> str:
        """What it calls the implementations that it chose."""
        return str(self.library.onednn_kernel(self.step_).decode())

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the program, as it lies in memory."""
        row = name not in ("x", "y", "dx", "dy")
        n, c, *space = self.case.shape
        shape = (c,) if row else (n, *space, c) if self.last else (n, c, *space)
        number = ctypes.c_uint16 if self.half and not row else ctypes.c_float
        address = self.library.onednn_tensor(self.step_, name.encode())
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(number)), shape)

    def _narrow(self, name: str, values: np.ndarray) -> np.ndarray:
        """In the layout and type of the case: of numbers that bfloat16 has, the upper half is all."""
        if name not in ("x", "dy"):
            return values
        placed = np.ascontiguousarray(np.moveaxis(values, 1, -1) if self.last else values)
        return (placed.view(np.uint32) >> 16).astype(np.uint16) if self.half else placed

    def _wide(self, name: str, values: np.ndarray) -> np.ndarray:
        single = (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.copy()
        return np.moveaxis(single, -1, 1) if self.last and name in ("y", "dx") else single

    def _error(self, what: str) -> NormRuntimeError:
        said = self.library.onednn_error().decode()
        return NormRuntimeError(f"oneDNN {what} for {self.case} on this processor: {said}")


@functools.cache
def _library() -> Any:
    """The program, compiled; its file goes once it is loaded."""
    with tempfile.TemporaryDirectory(prefix="normkit-onednn-") as folder:
        built = Path(folder) / "onednn.so"
        command = [_compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(built), "-ldnnl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NormRuntimeError(f"benchmarks/onednn.cpp did not compile: {done.stderr.strip()[-500:]}")
        library = ctypes.CDLL(str(built))
    step, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("onednn_error", text, ()),
        ("onednn_begin", step, (ctypes.POINTER(ctypes.c_int64), *[number] * 5, ctypes.c_float)),
        ("onednn_tensor", ctypes.c_void_p, (step, text)),
        ("onednn_kernel", text, (step,)),
        ("onednn_run", number, (step,)),
        ("onednn_end", None, (step,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
