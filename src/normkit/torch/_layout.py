"""The order in which a tensor lies in memory, as kernels ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.native import Layout

__all__ = ["CHANNELS_LAST", "layout_of"]

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> Layout | None:
    """Return `contiguous` or `channels_last`, None for any other order."""
    if x.is_contiguous():
        return "contiguous"
    last = CHANNELS_LAST.get(x.dim())
    return "channels_last" if last is not None and x.is_contiguous(memory_format=last) else None
