"""PyTorch's side of `normkit.check`: what norms are given in every mode, and what a training step does to them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from normkit.checks.evidence import Group, Input, Layer, Step
from normkit.errors import NormTypeError, message
from normkit.surgery.graph import Graph
from normkit.torch._buffers import recomputing
from normkit.torch.graph import capture
from normkit.torch.probe import as_tensors, check_sized, untouched
from normkit.torch.probe import forward as call
from normkit.torch.recording import bare
from normkit.torch.sites import sites
from normkit.torch.states import is_frozen
from normkit.torch.surgery import tensors_in

if TYPE_CHECKING:
    from normkit.checks.examination import Batch, Mode, See

__all__ = [
    "backend",
    "graph",
    "groups",
    "layers",
    "loader",
    "loss",
    "optimizer",
    "parameters",
    "running",
    "step",
    "structure",
    "stuck",
    "unread",
    "untouched",
]

_COUNT = "num_batches_tracked"


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """See `normkit.checks.examination.Examination`."""
    check_sized(model)
    with untouched(model):
        stuck = {module for module in model.eval().modules() if module.training}
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    found = []
    for site in sites(model):
        module = model.get_submodule(site.path)
        own = {role: getattr(module, name, None) for role, name in site.names.items()}
        trained = [value.requires_grad for value in own.values() if isinstance(value, nn.Parameter)]
        frozen = bool(site.record.kept) and ((site.constant and model.training) or is_frozen(module))
        found.append(
            Layer(
                path=site.path,
                kind=site.kind,
                record=site.record,
                how=site.how,
                training=module.training,
                frozen=frozen or site.record.kind == "frozen" or (site.how == "probe" and site.constant),
                momentum=getattr(module, "momentum", None),
                dtypes={role: _type(tensor) for role, tensor in own.items() if isinstance(tensor, Tensor)},
                trained=any(trained) if trained else None,
                stuck=module in stuck,
                parameters={role: paths[id(value)] for role, value in own.items() if isinstance(value, nn.Parameter)},
            )
        )
    return tuple(found)


def parameters(model: nn.Module) -> Mapping[str, bool]:
    """See `normkit.checks.examination.Examination`."""
    return {path: parameter.requires_grad for path, parameter in model.named_parameters()}


def graph(model: nn.Module, x: Any) -> Graph:
    """See `normkit.checks.examination.Examination`."""
    norms = {id(model.get_submodule(site.path)) for site in sites(model)}
    with untouched(model):
        return capture(model.eval(), as_tensors(x, model), lambda module: id(module) in norms).graph


@contextlib.contextmanager
def running(
    model: nn.Module, mode: Mode, see: See | None, forward: Callable[[Any, Any], Any] | None
) -> Iterator[Callable[[Batch], Any]]:
    """See `normkit.checks.examination.Examination`."""

    def hook(path: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, mask = _given(layer, args, kwargs)
            if see is not None and isinstance(x, Tensor):
                see(path, _array(x), _type(x), None if mask is None else mask.detach().cpu().numpy())

        return watch

    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if see is not None:
            for site in sites(model):
                module = model.get_submodule(site.path)
                stack.callback(module.register_forward_pre_hook(hook(site.path), with_kwargs=True).remove)
        _set(model, mode)
        yield lambda batch: _run(model, batch, forward)


def step(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Any, Any], Any] | None,
    forward: Callable[[Any, Any], Any] | None,
) -> Step:
    """See `normkit.checks.examination.Examination`."""
    kept = {site.path: site.record for site in sites(model) if site.record.kept}
    tracked = {path: model.get_submodule(path) for path in kept}
    seen: dict[str, list[Input]] = {path: [] for path in tracked}
    repeated = Counter[str]()

    def hook(path: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _given(layer, args, kwargs)[0]
            if layer.training and isinstance(x, Tensor):
                if recomputing():
                    repeated[path] += 1
                else:
                    seen[path].append(Input.of(_array(x), kept[path].axis))

        return watch

    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(model))
            stack.enter_context(torch.enable_grad())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for path, module in tracked.items():
                stack.callback(module.register_forward_pre_hook(hook(path), with_kwargs=True).remove)
            for parameter, _ in gradients:
                parameter.grad = None
            _set(model, "train")
            before = {path: _kept(module) for path, module in tracked.items()}
            outputs = _run(model, batch, forward)
            value = _loss(model, outputs, batch, loss)
            if value.requires_grad:
                value.backward()
            after = {path: _kept(module) for path, module in tracked.items()}
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    moved = frozenset(
        path for path in tracked if any(not torch.equal(before[path][name], after[path][name]) for name in before[path])
    )
    updates = {
        path: int(after[path][_COUNT] - before[path][_COUNT]) if _COUNT in before[path] else len(seen[path])
        for path in tracked
    }
    eps = {path: record.eps for path, record in kept.items()}
    return Step.of(seen, eps, updates, moved, dict(repeated))


def structure(model: nn.Module) -> Callable[[], None]:
    """What gives every module of a model the attributes, parameters, layers and hooks that it has now. Values stay."""
    kept = [
        (
            vars(module),
            {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()},
        )
        for module in model.modules()
    ]
    held = [(own, {name: value for name, value in own.items() if isinstance(value, dict)}) for own, _ in kept]

    def back() -> None:
        for (own, values), (_, dicts) in zip(kept, held, strict=True):
            own.clear()
            own.update(values)
            for name, value in dicts.items():  # others may hold these dictionaries: handles of hooks do
                value.clear()
                value.update(values[name])
                own[name] = value

    return back


def groups(model: nn.Module, optimizer: Any) -> tuple[Group, ...]:
    """See `normkit.checks.examination.Examination`."""
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        must = "`optimizer` must be a torch.optim.Optimizer"
        raise NormTypeError(message(must, type(optimizer).__name__))
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        paths = [names.get(id(parameter)) for parameter in group["params"]]
        known = frozenset(path for path in paths if path is not None)
        decay, lr = group.get("weight_decay", 0.0), group.get("lr", float("nan"))
        found.append(Group(float(decay), float(lr), known, paths.count(None)))
    return tuple(found)


def optimizer(model: nn.Module) -> None:
    """See `normkit.checks.examination.Examination`. A PyTorch model holds none."""


def loss(_: nn.Module, given: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any] | None:
    """See `normkit.checks.examination.Examination`. A PyTorch model holds none."""
    return given


def backend() -> str:
    """See `normkit.checks.examination.Examination`."""
    return "torch"


def unread(_: nn.Module) -> Mapping[str, str]:
    """See `normkit.checks.examination.Examination`. What is no norm by its numbers is none."""
    return {}


def stuck(*_: Any) -> frozenset[str]:
    """See `normkit.checks.examination.Examination`. Modes show it, see `layers`."""
    return frozenset()


def loader(data: Any) -> Mapping[str, Any]:
    """See `normkit.checks.examination.Examination`."""
    if not isinstance(data, DataLoader):
        return {}
    known: dict[str, Any] = {"source": "DataLoader", "drop_last": data.drop_last, "batch_size": data.batch_size}
    if data.batch_size is None:
        return {}
    with contextlib.suppress(TypeError):  # an iterable data set has no length
        known["samples"] = len(data.sampler)  # type: ignore[arg-type]
        if isinstance(data.sampler, RandomSampler | SequentialSampler):  # of another one nothing is known
            known["shuffled"] = isinstance(data.sampler, RandomSampler)
    return known


def _set(model: nn.Module, mode: Mode) -> None:
    """A model in training mode keeps the modes of its parts: what is in evaluation there is meant to be."""
    if not model.training:
        model.train()
    if mode == "train":
        return
    tracked = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    taking = [module for module in tracked if module.training]
    model.eval()
    if mode == "batch":
        for module in taking:
            module.training = True


def _run(model: nn.Module, batch: Batch, forward: Callable[[Any, Any], Any] | None) -> Any:
    # Processes may have batches of unequal number: without what DistributedDataParallel adds, none waits for another.
    model = bare(model)
    if forward is not None:
        return forward(model, batch.raw)
    return call(model, as_tensors(batch.x, model))


def _loss(model: nn.Module, outputs: Any, batch: Batch, loss: Callable[[Any, Any], Any] | None) -> Tensor:
    """The loss; without one, the mean square of the outputs, which has a gradient everywhere."""
    if loss is not None:
        value = loss(outputs, None if batch.y is None else as_tensors(batch.y, model))
    else:
        value = getattr(outputs, "loss", None)
    if isinstance(value, Tensor):
        return value.mean()
    floating = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not floating:
        raise NormTypeError(message("the outputs must hold floating point tensors", type(outputs).__name__))
    return torch.stack([tensor.float().square().mean() for tensor in floating]).sum()


def _given(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a layer is called on, and its mask."""
    named = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    return next(iter(named.values()), None), named.get("mask")


def _kept(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer._buffers.items() if value is not None}


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32)).numpy()


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
