"""A model without normalization mistakes, as an assertion for tests."""

from __future__ import annotations

from typing import Any

from normkit.checks.engine import check

__all__ = ["assert_healthy"]


def assert_healthy(model: Any, data: Any = None, **options: Any) -> None:
    """Raise AssertionError, with what was found, where `normkit.check` finds an error or a warning.

    Args:
        model: as `normkit.check`.
        data: as `normkit.check`.
        options: further arguments of `normkit.check`: `loss`, `optimizer`, `limits`, `allow`.

    Example:
        >>> import torch
        >>> from normkit.testing import assert_healthy
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.ReLU())
        >>> assert_healthy(model, torch.randn(64, 3))
    """
    found = check(model, data, **{"show_progress": False, **options})
    if not found.healthy:
        raise AssertionError(str(found))
