"""Under what circumstances something was measured: machine, threads, versions, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from normkit.kernels import instruction_sets

__all__ = ["circumstances", "processor"]


def processor() -> str:
    """The processor by name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def circumstances(modules: Iterable[str], threads: int, others: Mapping[str, str] | None = None) -> dict[str, str]:
    """What belongs to every row.

    `modules` are the names of those whose versions matter, of which none is imported; `others` are more versions.
    """
    from normkit import __version__

    sets = instruction_sets()
    versions = {"normkit": __version__, "python": platform.python_version()}
    versions |= {module: version for module in sorted(set(modules)) if (version := _version(module))}
    versions |= others or {}
    return {
        "processor": processor(),
        "instructions": sets[0] if sets else "none compiled",
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(module: str) -> str | None:
    """Of the distribution that a module comes from, which may have another name."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, *importlib.metadata.packages_distributions().get(module, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
