"""State dicts in files: read without running code from them, made into bytes, loaded whole or not at all."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import MissingExtraError, NormValueError, message
from normkit.torch.folding import drop_affine
from normkit.torch.sites import sites
from normkit.torch.surgery import check_plain, transaction

__all__ = ["check_suffix", "content", "from_bytes", "load", "load_folded", "load_state", "read", "to_bytes"]

_SUFFIXES = (".pt", ".pth", ".safetensors")
_NAMED = 5  # entries that an error names
_HINT = "save model.state_dict() alone"


def load_folded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the state dict of a model that `normkit.fold` gave into the model as it was before, in place.

    Folding changes which entries there are, and by these the model is changed: a norm with kept statistics without any
    becomes an identity, other norms lose the gamma and beta that are gone; biases are made or go. All values then come
    from `state`. No example and no second search is needed.

    Args:
        model: of the class and configuration that was folded, with any values.
        state: the folded model's `state_dict()`, with nothing missing and nothing else.

    Returns:
        The model.

    Raises:
        NormTypeError: for a compiled, scripted or wrapped model.
        NormValueError: for entries that do not fit; the structure is then as before, values may have been loaded.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.1), nn.ReLU())
        >>> x = torch.randn(2, 3, 8, 8)
        >>> folded = normkit.fold(build().eval(), x)
        >>> again = normkit.torch.load_folded(build().eval(), folded.state_dict())
        >>> torch.equal(again(x), folded(x))
        True
    """
    check_plain(model)
    with transaction(model) as changes:
        for site in list(sites(model)):
            entries = model.get_submodule(site.path).state_dict(prefix=f"{site.path}.")
            if site.record.kept and entries and not entries.keys() & state.keys():
                changes.replace(site.path, nn.Identity())
            elif site.how == "class" and not site.record.kept:
                drop_affine(changes, model, site, [n for n in site.names.values() if f"{site.path}.{n}" not in state])
        for path, module in list(model.named_modules()):
            weight, bias = (f"{path}.{name}" if path else name for name in ("weight", "bias"))
            if weight not in state or "bias" not in module._parameters:
                continue
            if module.bias is None and bias in state:
                changes.set(bias, state[bias].clone(), like=module.weight)
            elif module.bias is not None and bias not in state:
                changes.set(bias, None)
        load_state(model, state)
    return model


def load(model: nn.Module, path: Path) -> None:
    """Load a file into a model. Raises NormValueError for files that cannot be read, or that do not fit."""
    load_state(model, read(path), path.name)


def content(model: nn.Module, path: Path) -> bytes:
    """What a file with this name holds for the weights of a model."""
    return to_bytes(model.state_dict(), path)


def load_state(model: nn.Module, state: Mapping[str, Any], name: str = "`state`") -> None:
    """Load a state dict in which nothing is missing and nothing is left over. Raises NormValueError, naming both.

    An entry may be missing where another one is the same parameter: safetensors files hold tied weights once.
    """
    own = model.state_dict(keep_vars=True)
    tied = {id(own[key]): state[key] for key in own.keys() & state.keys()}
    whole = {**{key: tied[id(value)] for key, value in own.items() if id(value) in tied}, **state}
    try:
        missing, unexpected = model.load_state_dict(whole, strict=False)
        found = (("without", missing), ("with unknown", unexpected))
        wrong = [f"{how} {_listed(names)}" for how, names in found if names]
    except RuntimeError as error:  # shapes; the first line only says that there are some
        wrong = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
    if wrong:
        must = f"{name} must hold the state dict of {type(model).__name__}, with nothing missing and nothing else"
        raise NormValueError(message(must, "; ".join(wrong[:_NAMED])))


def read(path: Path) -> dict[str, Any]:
    """The state dict in a .pt, .pth or .safetensors file. Raises NormValueError for anything else."""
    check_suffix(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        must = "a checkpoint must be a file that can be read"
        raise NormValueError(message(must, f"{path} ({error.strerror})")) from error
    return from_bytes(content, path)


def from_bytes(content: bytes, path: Path) -> dict[str, Any]:
    """The state dict in the content of a file with this name. Code in it is never run."""
    try:
        if path.suffix == ".safetensors":
            found = _safetensors().load(content)
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MissingExtraError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            must = f"{path.name} must hold tensors and plain values alone: anything else could run code"
            raise NormValueError(message(must, hint="torch.save(model.state_dict(), path)")) from error
        must = f"{path.name} must be a {path.suffix} file that is whole"
        got = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]  # further advice of torch's is unsafe
        raise NormValueError(message(must, got)) from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise NormValueError(message(f"{path.name} must hold a state dict", type(found).__name__, _HINT))
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if nested:
        must = f"{path.name} must hold a state dict and nothing around it"
        raise NormValueError(message(must, f"one with {_listed(nested)}", _HINT))
    return dict(found)


def to_bytes(state: Mapping[str, Any], path: Path) -> bytes:
    """What a file with this name holds for a state dict."""
    check_suffix(path)
    if path.suffix != ".safetensors":
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        return buffer.getvalue()
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        must = "a .safetensors file holds tensors alone"
        raise NormValueError(message(must, f"{_listed(odd)}, which are none", "choose a .pt file"))
    # It takes no tensors that share memory: tied weights are written twice.
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    return bytes(_safetensors().save(tensors, metadata={"format": "pt"}))


def check_suffix(path: Path) -> None:
    """Raise NormValueError for another kind of file, MissingExtraError where safetensors is needed and missing."""
    if path.suffix not in _SUFFIXES:
        must = f"a file of weights must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        raise NormValueError(message(must, repr(str(path))))
    if path.suffix == ".safetensors":
        _safetensors()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        must = ".safetensors files need safetensors, which is not installed"
        raise MissingExtraError(message(must, hint="pip install safetensors, or use a .pt file")) from error
    return safetensors.torch


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
