"""The layers of normkit.torch pass the suite in every type and layout; what torch.nn does otherwise is on record."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch_subjects import our_layers, torch_layers

from normkit.core import catalog
from normkit.testing import CHECKS, LAYOUTS, Call, Subject, conform, ids, pairs
from normkit.testing.torch import layer_subject

OURS = pairs(our_layers())
TORCH = pairs(torch_layers())


@pytest.mark.parametrize(("check", "subject"), OURS, ids=ids(OURS))
def test_normkit(check, subject: Subject) -> None:
    conform(check, subject)


@pytest.mark.parametrize(("check", "subject"), TORCH, ids=ids(TORCH))
def test_torch_nn(check, subject: Subject) -> None:
    conform(check, subject)


# What only an adapter of modules can see: each module below breaks one thing.


class Aliasing(nn.BatchNorm2d):
    """Keeps a view of its input as running mean."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.clone())
        if self.training:
            memory = x.detach().reshape(-1)[: self.num_features]
            memory.copy_(self.running_mean)
            self.running_mean = memory
        return y


class WritesItsInput(nn.BatchNorm2d):
    """Stores the output in the input, as an in-place layer does."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.clone())
        x.detach().copy_(y.detach())
        return y


class IgnoresStrides(nn.BatchNorm2d):
    """Reads the memory of its input as if it were contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        strides = torch.empty(x.shape).stride()
        return super().forward(x if x.is_contiguous() else x.as_strided(x.shape, strides))


class WideOutput(nn.BatchNorm2d):
    """Returns float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class HalfBuffers(nn.BatchNorm2d):
    """torch.nn's own layer after `.bfloat16()`: running statistics are rounded to 8 bits."""


def broken(kind: type[nn.Module], dtype: str) -> Subject:
    def build(call: Call, shape: tuple[int, ...]) -> nn.Module:
        return kind(shape[1], call.eps, call.rate)

    return layer_subject(
        kind.__name__,
        build,
        spec=catalog.BATCH,
        shapes=((5, 6, 3, 2),),
        sizes=lambda shape: (("c", shape[1]),),
        layouts=LAYOUTS,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "check"),
    [
        (Aliasing, "float32", "check_kept"),
        (WritesItsInput, "float32", "check_inputs_intact"),
        (IgnoresStrides, "float32", "check_layouts"),
        (WideOutput, "bfloat16", "check_output_type"),
        (HalfBuffers, "bfloat16", "check_statistics"),
        (HalfBuffers, "bfloat16", "check_kept"),
    ],
)
def test_the_adapter_sees(kind: type[nn.Module], dtype: str, check: str) -> None:
    function: Callable[[Subject], None] = CHECKS[check][0]
    with pytest.raises(AssertionError):
        function(broken(kind, dtype))
