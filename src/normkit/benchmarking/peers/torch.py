"""Peers in PyTorch: its own layers, ours, and the units of all.

All make the same step: `y = layer(x)` and `torch.autograd.grad` of x, gamma and beta for a given dy; or without
gradients, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.benchmarking.cases import Case
from normkit.benchmarking.peers import Runner
from normkit.benchmarking.values import Given
from normkit.errors import NormValueError
from normkit.kernels.registry import use_kernel

__all__ = [
    "LayerRunner", "by_native", "by_torch", "compiled", "copy", "covered_by_both", "eager", "in_place", "least",
    "normkit",
]  # fmt: skip

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class LayerRunner:
    """A layer and its tensors; `call` is what a step calls, the layer itself by default."""

    def __init__(self, case: Case, given: Given, layer: nn.Module, norm: Any, call: Any = None) -> None:
        self.layer = layer.train(case.training)
        self.call = layer if call is None else call
        self.names = ("dx", "dgamma", "dbeta") if given.beta is not None else ("dx", "dgamma")
        with torch.no_grad():
            for parameter, values in ((norm.weight, given.gamma), (norm.bias, given.beta)) if given.beta is not None \
                    else ((norm.weight, given.gamma),):  # fmt: skip
                parameter.copy_(_tensor(values))
            if case.spec.tracked:
                norm.running_mean.copy_(_tensor(given.mean))
                norm.running_var.copy_(_tensor(given.var))
        self.x, self.dy = placed(case, given.x), placed(case, given.dy)
        self.training = case.training
        if self.training:
            self.inputs = [self.x.requires_grad_(), *norm.parameters()]

    def step(self) -> Any:
        """Forward and backward, or evaluation."""
        if not self.training:
            with torch.no_grad():
                return (self.call(self.x),)
        y = self.call(self.x)
        return (y, *torch.autograd.grad(y, self.inputs, self.dy))

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        """The tensors of a step as arrays."""
        names = ("y", *self.names) if self.training else ("y",)
        return {name: t.detach().float().numpy() for name, t in zip(names, result, strict=True)}


def normkit(case: Case, given: Given) -> Runner:
    """Our layers; an activation is fused by NormAct."""
    import normkit.torch as ours

    norm = norm_layer(ours, case)
    layer = norm if case.activation is None else ours.NormAct(norm, case.activation)
    return LayerRunner(case, given, layer, norm)


def eager(case: Case, given: Given) -> Runner:
    """PyTorch's layers."""
    return LayerRunner(case, given, *_stock(case))


def in_place(case: Case, given: Given) -> Runner:
    """PyTorch's layers, the activation in place."""
    return LayerRunner(case, given, *_stock(case, inplace=True))


def compiled(case: Case, given: Given) -> Runner:
    """PyTorch's layers through torch.compile, for exactly this shape."""
    torch._dynamo.reset()  # else the shapes before this one count as recompilations, and after eight it gives up
    layer, norm = _stock(case)
    return LayerRunner(case, given, layer, norm, torch.compile(layer, dynamic=False, fullgraph=True))


class _Chosen(LayerRunner):
    """Our layer by one kernel."""

    def __init__(self, kernel: str, case: Case, given: Given) -> None:
        import normkit.torch as ours

        norm = norm_layer(ours, case)
        super().__init__(case, given, norm, norm)
        self.kernel = kernel

    def step(self) -> Any:
        with use_kernel(self.kernel):
            return super().step()


def by_native(case: Case, given: Given) -> Runner:
    """Our layers by the compiled kernels. Raises NormValueError, at the first step, where they do not cover a case."""
    return _Chosen("native", case, given)


def by_torch(case: Case, given: Given) -> Runner:
    """Our layers by PyTorch's kernels, the same way."""
    return _Chosen("torch", case, given)


def covered_by_both(case: Case) -> bool:
    """Whether :func:`by_native` and :func:`by_torch` can run a case."""
    ones, row = np.ones(case.shape, dtype=np.float32), np.ones(case.channels, dtype=np.float32)
    given = Given(ones, ones, row, row if case.spec.center else None, row, row)
    try:
        for make in (by_native, by_torch):
            make(case, given).step()
    except NormValueError as error:
        if "must cover the input" not in str(error):
            raise
        return False
    return True


class _Copy:
    def __init__(self, case: Case, given: Given) -> None:
        self.x = placed(case, given.x)
        self.y = torch.empty_like(self.x)

    def step(self) -> Any:
        return self.y.copy_(self.x)

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        return {"y": result.float().numpy()}


def copy(case: Case, given: Given) -> Runner:
    """A copy of the input into memory that is there."""
    return _Copy(case, given)


class _Least:
    def __init__(self, case: Case, given: Given) -> None:
        self.x, self.dy = placed(case, given.x), placed(case, given.dy)
        self.training = case.training

    def step(self) -> Any:
        y = torch.empty_like(self.x).copy_(self.x)
        return (y, torch.add(self.x, self.dy)) if self.training else (y,)

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        return {name: t.float().numpy() for name, t in zip(("y", "dx"), result, strict=False)}


def least(case: Case, given: Given) -> Runner:
    """The least memory traffic of a step: reads x and writes y; in training reads x and dy and writes dx as well."""
    return _Least(case, given)


def placed(case: Case, values: np.ndarray) -> Tensor:
    """A tensor in the type and layout of the case."""
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return _tensor(values).to(getattr(torch, case.dtype)).contiguous(memory_format=form)


def norm_layer(library: Any, case: Case) -> Any:
    """The norm from `torch.nn` or from `normkit.torch`: their arguments are the same. gamma and beta are float32.

    RMS norm's gamma has the type of the input: with a float32 gamma PyTorch returns float32.
    """
    c, axes = case.channels, len(case.shape) - 2
    if case.norm == "batch":
        return getattr(library, f"BatchNorm{axes or 1}d")(c, eps=case.spec.eps)
    if case.norm == "instance":
        return getattr(library, f"InstanceNorm{axes or 1}d")(c, eps=case.spec.eps, affine=True)
    if case.norm == "group":
        return library.GroupNorm(case.groups, c, eps=case.spec.eps)
    if case.norm == "layer":
        return library.LayerNorm(c, eps=case.spec.eps)
    return library.RMSNorm(c, eps=case.spec.eps).to(getattr(torch, case.dtype))


def _stock(case: Case, **options: bool) -> tuple[nn.Module, nn.Module]:
    norm = norm_layer(nn, case)
    if case.activation is None:
        return norm, norm
    return nn.Sequential(norm, _ACTIVATIONS[case.activation](**options)), norm


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
