"""The norm layers of a PyTorch model: known classes, and others that a probe shows to compute the same."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.core import formula
from normkit.core.catalog import CATALOG, LAYER_2D, RMS_2D
from normkit.core.plan import plan
from normkit.core.record import NormRecord
from normkit.core.spec import NormSpec
from normkit.errors import message
from normkit.surgery.sites import Site
from normkit.torch.graph import computes_as_named
from normkit.torch.porting import NAMES, read

__all__ = ["recognize", "sites", "warn_of_unreached"]

# What authors call the values of a norm.
_ROLES = {
    "gamma": ("weight", "gamma", "scale", "g", "gain"),
    "beta": ("bias", "beta", "b", "shift", "offset"),
    "mean": ("running_mean", "mean", "moving_mean"),
    "var": ("running_var", "var", "moving_var", "moving_variance", "variance"),
}
_EPS = (1e-5, 1e-6, 1e-3, 1e-12, 1e-8)  # where no attribute holds it
# Agreement of a layer that computes in float32 whatever its type: some tens of its spacings. Inputs are so small that
# another eps of the list changes the numbers by more than 1 %, save 1e-8 against 1e-12.
_CLOSE = 1e-5
_SIZE = 0.01


def sites(model: nn.Module) -> Iterator[Site]:
    """Every norm layer, once, by its first path."""
    for path, module in model.named_modules():
        site = recognize(path, module)
        if site is not None:
            yield site


_RUNNING = ("running_mean", "running_var")


def warn_of_unreached(who: str, model: nn.Module, reached: Callable[[nn.Module], bool]) -> None:
    """Warn of running statistics that nobody looks after: of functions, such as `F.batch_norm`, and of other layers.

    Known by their names. Frozen batch norms, which have no parameters, are meant to stay.
    """
    found = [
        (path or type(module).__name__, names)
        for path, module in model.named_modules()
        if (names := [n for n, b in module._buffers.items() if b is not None and n.startswith(_RUNNING)])
        and not reached(module)
        and "frozen" not in type(module).__name__.lower()
    ]
    if found:
        must = f"{who} running statistics in batch norms alone, not those of other layers or of functions in a forward"
        got = "; ".join(f"{' and '.join(names[:2])} of {path}" for path, names in found)
        hint = "make functions layers: nn.BatchNorm2d(channels) in place of F.batch_norm"
        warnings.warn(message(must, got, hint), stacklevel=3)


def recognize(path: str, module: nn.Module) -> Site | None:
    """The site of a layer, None where it is no norm that we know."""
    if computes_as_named(module):
        record = read(module)
        if record is None:
            return None
        names = {role: NAMES[role] for role in _present(record)}
        constant = bool(record.kept) and (record.frozen or not module.training)
        return Site(path, type(module).__name__, record, "class", names, constant)
    return _probed(path, module)


def _probed(path: str, module: nn.Module) -> Site | None:
    values = {**module._parameters, **module._buffers}
    tensors = {name: value for name, value in values.items() if value is not None and value.dim() > 0}
    names = {role: next((n for n in known if n in tensors), "") for role, known in _ROLES.items()}
    names = {role: name for role, name in names.items() if name}
    shape = next((tuple(tensor.shape) for tensor in tensors.values()), ())
    alike = all(t.is_floating_point() and tuple(t.shape) == shape for t in tensors.values())
    tracked = len({"mean", "var"} & names.keys())
    leaf = not any(True for _ in module.children())
    if not leaf or not alike or len(shape) != 1 or len(names) != len(tensors) or tracked == 1:
        return None
    try:
        twin = copy.deepcopy(module).double().cpu().requires_grad_(False)
    except Exception:  # a layer that cannot be copied cannot be tried
        return None
    found = _formula(twin, names, shape[0], bool(tracked))
    if found is None:
        return None
    kind, axis, gain, eps = found
    arrays: dict[str, Any] = {
        role: tensors[name].detach().double().cpu().numpy().copy() for role, name in names.items()
    }
    kept = {role: arrays.pop(role) for role in ("mean", "var") if tracked}
    frozen = tracked and not any(True for _ in module.parameters())
    spatial = 2 if frozen and type(module).__name__.endswith("2d") else None
    record = NormRecord(kind, shape, axis, eps, gain=gain, kept=kept, spatial=spatial, frozen=bool(frozen), **arrays)
    return Site(path, type(module).__name__, record, "probe", names, bool(tracked))


def _formula(
    twin: nn.Module, names: Mapping[str, str], features: int, tracked: bool
) -> tuple[str, int, str, float] | None:
    """Which formula gives the numbers of the layer: (kind, axis, gain, eps)."""
    rng = np.random.default_rng(0)
    trials = []
    for spatial in ((2,), (2, 3), ()):
        for axis in (1, -1):
            shape = (3, features, *spatial) if axis == 1 else (3, *spatial, features)
            values = {role: rng.uniform(0.5, 1.5, features) * (_SIZE**2 if role == "var" else 1) for role in names}
            if tracked:
                values["mean"] *= _SIZE
            for role, value in values.items():
                getattr(twin, names[role]).data.copy_(torch.from_numpy(value))
            x = _SIZE * rng.normal(0.3, 1.0, shape)
            y = _output(twin, x)
            if y is not None:
                trials.append((axis, x, values, y))
    own = [v for v in vars(twin).values() if isinstance(v, float) and 0 <= v < 0.1]
    deep = [trial for trial in trials if trial[1].ndim > 2] or trials  # with two axes both places are one
    kinds = ["batch"] if tracked else ["rms", "layer"]
    for kind, axis, gain, eps in itertools.product(kinds, (1, -1), ("w", "1+w"), dict.fromkeys([*own, *_EPS])):
        mine = [trial for trial in deep if trial[0] == axis]
        fits = all(_agree(_expected(kind, axis, gain, eps, x, values), y) for _, x, values, y in mine)
        if mine and fits and (gain == "w" or "gamma" in names):
            return kind, axis, gain, eps
    return None


def _output(twin: nn.Module, x: np.ndarray) -> np.ndarray | None:
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            y = twin(torch.from_numpy(x))
        except Exception:  # the layer does not take such inputs
            return None
    return y.double().numpy() if isinstance(y, Tensor) and tuple(y.shape) == x.shape else None


def _expected(
    kind: str, axis: int, gain: str, eps: float, x: np.ndarray, values: Mapping[str, np.ndarray]
) -> np.ndarray:
    gamma, beta = values.get("gamma"), values.get("beta")
    if gamma is not None and gain == "1+w":
        gamma = 1 + gamma
    if kind == "batch":
        moved = np.moveaxis(x, axis, -1)
        spec = CATALOG["batch"]
        y = formula.evaluate(np, spec, plan(spec, 2), moved.reshape(-1, moved.shape[-1]), values, gamma, beta, eps=eps)
        return np.moveaxis(y.reshape(moved.shape), -1, axis)
    spec = _over_channels(kind, axis)
    sizes = (("*c", (x.shape[-1],)),) if axis == -1 else ()
    return formula.normalize(np, spec, plan(spec, x.ndim, sizes), x, gamma, beta, eps=eps)[0]


def _over_channels(kind: str, axis: int) -> NormSpec:
    if axis == -1:
        return CATALOG[kind]
    return LAYER_2D if kind == "layer" else RMS_2D


def _agree(expected: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.abs(expected - found).max() <= _CLOSE * np.abs(expected).max())


def _present(record: NormRecord) -> list[str]:
    own: dict[str, Any] = {"gamma": record.gamma, "beta": record.beta, **record.kept}
    return [role for role, value in own.items() if value is not None]
