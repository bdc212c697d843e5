"""Cores and GPUs for trials; the GPUs are found without CUDA, which would hold memory on each."""

from __future__ import annotations

import os
import shutil
import subprocess

from normkit.experiments.config import Config

__all__ = ["cores", "crew_size", "environment", "gpus", "may_use"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_PATIENCE = 30  # seconds for a driver that wakes up


def gpus() -> tuple[str, ...]:
    """The GPUs of NVIDIA that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get(_VISIBLE)
    if allowed is not None:
        return tuple(name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1"))
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    asked = [command, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver without a device, or none at all
    return tuple(line.strip() for line in told.splitlines() if line.strip())


def may_use(config: Config) -> bool:
    """Whether its trials can run on a GPU: loops go where they like, Keras and JAX go there by themselves.

    Our own training with PyTorch stays on the CPU.
    """
    return config.run is not None or config.framework != "torch"


def crew_size(asked: int | None, config: Config, devices: tuple[str, ...]) -> int:
    """How many processes: as many as asked for, else one for each of several GPUs that may be used, or for each core.

    Two trials on one GPU would wait for each other, and may not fit into its memory together.
    """
    return asked or (len(devices) if len(devices) > 1 and may_use(config) else cores())


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(devices: tuple[str, ...], number: int) -> dict[str, str]:
    """What tells a worker of this number which GPU is its own."""
    return {_VISIBLE: devices[number % len(devices)]} if devices else {}
