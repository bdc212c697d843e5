"""Compiled code: what this installation has of it and what this machine can run."""

from __future__ import annotations

__all__ = ["instruction_sets"]


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets compiled kernels may use here, widest first; empty without the compiled module.

    The compiled module is missing where the package was installed without a C++ compiler.
    """
    try:
        from normkit.kernels import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return ()
    return tuple(_native.instruction_sets())
