"""Numbers that pass between processes: what all peers are given, and what they return.

Arrays are float32, in memory and in the files; where a case is of bfloat16 they hold values of that type, all of which
float32 has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Given", "load", "remove", "save"]

Array = np.ndarray


@dataclass(frozen=True)
class Given:
    """Input, gradient of the output, parameters, and kept statistics for evaluation. Without centring beta is None."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array | None
    mean: Array
    var: Array

    def arrays(self) -> dict[str, Array]:
        """By name, without what there is none of."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Given:
        """From what :meth:`arrays` gave."""
        x, dy, gamma, mean, var = (arrays[name] for name in ("x", "dy", "gamma", "mean", "var"))
        return cls(x, dy, gamma, arrays.get("beta"), mean, var)


def save(folder: Path, name: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays as `name.key.npy`, from which :func:`load` reads them."""
    for key, array in arrays.items():
        np.save(folder / f"{name}.{key}.npy", np.asarray(array, dtype=np.float32))


def load(folder: Path, name: str) -> dict[str, Array]:
    """The arrays of that name, read from their files where they are used."""
    return {key: np.load(path, mmap_mode="r") for key, path in _files(folder, name)}


def remove(folder: Path, name: str) -> None:
    """Remove the files of that name."""
    for _, path in _files(folder, name):
        path.unlink()


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob(f"{name}.*.npy")):
        yield path.name.removesuffix(".npy").rpartition(".")[2], path
