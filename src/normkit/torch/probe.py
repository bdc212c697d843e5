"""What goes into the activations of a model: one forward pass, looked at from outside, that changes nothing."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from normkit.errors import NormTypeError, NormValueError, message
from normkit.torch._buffers import watched
from normkit.torch.factory import Anywhere

if TYPE_CHECKING:
    from normkit.experiments.protocol import SiteValues

__all__ = ["as_tensors", "check_sized", "forward", "probe", "untouched"]

# fmt: off
_ACTIVATIONS = frozenset((
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu",
    "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink",
    "threshold",
))
# fmt: on
# Attributes that tell how many features a layer gives, and on which axis.
_FEATURES = {
    "out_features": -1,
    "out_channels": 1,
    "num_features": 1,
    "num_channels": 1,
    "normalized_shape": -1,
    "embedding_dim": -1,
    "embed_dim": -1,
}


def probe(model: nn.Module, x: Any, *, train: bool = True) -> Sequence[SiteValues]:
    """Every call of an activation in one forward pass, in the order of the calls; softmax is none.

    A call is seen whatever its form: layer, function, method, in place (the input is then what it was before). It is
    named by the module that makes it, with a number where that makes several.

    Channels are on axis 1, unless the layer that ran last before the call says otherwise: on the last axis where only
    that has as many entries as the layer has features, or where the sizes do not decide and the layer works on the
    last axis (linear, layer norm, embedding). Without any such layer before, inputs (N, L, C) have them last.

    gamma and beta are those of the norm that gave the very tensor that goes in, or that takes the one that comes out:
    after a residual sum there is none.

    Args:
        model: any torch.nn.Module. Modes, buffers, hooks and random numbers are afterwards as before.
        x: input of the model; a mapping gives named arguments, a tuple or list several.
        train: in training mode, else in evaluation mode.

    Raises NormTypeError where the model does not take such inputs, and whatever the model raises.
    """
    check_sized(model)
    given = as_tensors(x, model)
    watch = _Watch(model)
    with untouched(model), watch.hooked(), watch:
        model.train(train)
        forward(model, given)
    return watch.sites()


def forward(model: nn.Module, x: Any) -> Any:
    """Call a model on tensors: a mapping gives named arguments, a tuple or list several.

    Raises NormTypeError where it takes other arguments, and whatever the model raises.
    """
    positional = tuple(x) if isinstance(x, tuple | list) else () if isinstance(x, Mapping) else (x,)
    named = dict(x) if isinstance(x, Mapping) else {}
    try:
        return model(*positional, **named)
    except TypeError:
        try:
            inspect.signature(model.forward).bind(*positional, **named)
        except TypeError as error:
            must = f"{type(model).__name__} must take the inputs it is given ({error})"
            got = f"the names {', '.join(named)}" if named else f"{len(positional)} without a name"
            hint = "give inputs alone, without targets" if len(positional) > 1 else None
            raise NormTypeError(message(must, got, hint)) from None
        raise


def as_tensors(x: Any, model: nn.Module) -> Any:
    """Copies of arrays and tensors where the model is, also those inside mappings, tuples and lists.

    Floating point values take the type of the model's parameters, or buffers; whole numbers keep theirs.
    """
    held = itertools.chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in held if tensor.is_floating_point()), torch.empty(0))

    def converted(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: converted(part) for key, part in value.items()}
        if isinstance(value, tuple | list):
            return tuple(converted(part) for part in value)
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "biuf":
                raise NormTypeError(message("arrays must hold numbers", f"dtype {value.dtype}"))
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        if not isinstance(value, Tensor):
            return value
        dtype = like.dtype if value.is_floating_point() else value.dtype
        return value.detach().to(like.device, dtype, copy=True)

    return converted(x)


def check_sized(model: nn.Module) -> None:
    """Raise NormValueError for lazy layers, whose weights are drawn in the first forward pass."""
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            must = "layers must know the size of their input, so that all weights are there from the start"
            got = f"{type(module).__name__} at {path}" if path else type(module).__name__
            raise NormValueError(message(must, got, "nn.Linear(in_features, ...) instead of nn.LazyLinear(...)"))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave modes, buffers and random numbers as they were. Inside, no gradients are kept."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a user's forward may draw from them
    with torch.random.fork_rng(sorted(gpus)), torch.no_grad():
        try:
            yield
        finally:
            for module, training, own in modules:
                module.training = training
                module._buffers.clear()
                module._buffers.update(own)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # an expanded one cannot be written to
                    buffer.copy_(value)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


class _Watch(TorchFunctionMode):
    """Sees every call of torch's functions, and by hooks which module makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths = {module: path for path, module in model.named_modules()}
        self._paths[model] = type(model).__name__
        self._running = [model]
        self._features: tuple[int, int] | None = None  # of the layer that ran last: how many, and on which axis
        self._gave, self._took = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._seen: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """With hooks on all modules; they also make :class:`normkit.torch.NormAct` call its parts one by one."""
        with contextlib.ExitStack() as stack:
            for module in self._paths:
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks and shows nothing
                    stack.enter_context(module.register_forward_pre_hook(self._begins))
                    stack.enter_context(module.register_forward_hook(self._ends, always_call=True))
            if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def sites(self) -> list[SiteValues]:
        """What was seen."""
        from normkit.experiments.protocol import SiteValues

        calls, numbers = Counter(site["name"] for site in self._seen), Counter[str]()
        found = []
        for site in self._seen:
            norm, name = site.pop("norm"), site["name"]
            numbers[name] += 1
            if calls[name] > 1:
                site["name"] = f"{name} {numbers[name]}"
            gamma, beta = (None, None) if norm is None else _affine(norm)
            found.append(SiteValues(**site, gamma=gamma, beta=beta))
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        x = args[0] if args else kwargs.get("input")
        if name not in _ACTIVATIONS or not _is_batch(x):
            return func(*args, **kwargs)
        if isinstance(self._running[-1], nn.ReLU6):
            name = "relu6"  # which calls hardtanh
        site = {
            "name": self._paths[self._running[-1]],
            "activation": name,
            "input": _array(x),
            "axis": self._axis(x),
            "norm": self._known(self._gave, x),
        }
        y = func(*args, **kwargs)
        site["output"] = _array(y)
        self._seen.append(site)
        self._took[y] = site, _version(y)
        return y

    def _begins(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        site = self._known(self._took, args[0]) if args else None
        if site is not None and site["norm"] is None and _is_norm(module):
            site["norm"] = module

    def _ends(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._running[-1:] == [module]:  # not begun where a hook before ours raised
            self._running.pop()
        if isinstance(output, Tensor) and _is_norm(module):
            self._gave[output] = module, _version(output)
        for attribute, axis in _FEATURES.items():
            count = getattr(module, attribute, None)
            if isinstance(count, tuple) and count:
                count = count[-1]
            if isinstance(count, int):
                if isinstance(module, Anywhere):
                    axis = module.axis
                elif type(module).__name__.endswith("2d"):  # LayerNorm2d, a layer norm over axis 1
                    axis = 1
                self._features = count, axis
                break

    def _axis(self, x: Tensor) -> int:
        if x.dim() == 2:
            return 1
        if self._features is None:
            return -1 if x.dim() == 3 else 1
        count, axis = self._features
        fitting = [place for place in (1, -1) if x.shape[place] == count]
        return fitting[0] if len(fitting) == 1 else axis

    @staticmethod
    def _known(tensors: WeakTensorKeyDictionary, x: Any) -> Any:
        """What was kept with a tensor, unless it has been written to since: `out += shortcut` is another tensor."""
        kept = tensors.get(x) if isinstance(x, Tensor) else None
        return kept[0] if kept is not None and kept[1] == _version(x) else None


def _is_batch(x: Any) -> bool:
    """Whether this is a tensor of channels over a batch: a gate made of a parameter alone is none.

    Inside torch.func transforms values cannot be read.
    """
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or watched():
        return False
    return x.dim() > 1 and x.is_floating_point() and x.layout == torch.strided and not x.is_nested


def _is_norm(module: nn.Module) -> bool:
    named = any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and (weight.dim() == 1 or isinstance(module, nn.LayerNorm | nn.RMSNorm))


def _affine(norm: nn.Module) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    gamma, beta = _array(norm.weight).ravel(), getattr(norm, "bias", None)
    gamma = gamma + 1 if getattr(norm, "gain", "w") == "1+w" else gamma
    return gamma, _array(beta).ravel() if isinstance(beta, Tensor) else None


def _array(x: Any) -> NDArray[Any]:
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32), copy=True).numpy()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
