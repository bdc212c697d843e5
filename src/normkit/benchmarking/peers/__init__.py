"""Who is measured: peers as data, and the protocol between a peer and the process that times it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from normkit.benchmarking.cases import Case
from normkit.errors import NormValueError, message, nearest

__all__ = ["PEERS", "UNITS", "Peer", "Runner", "Units", "chosen", "found"]

_HERE = "normkit.benchmarking.peers"


class Runner(Protocol):
    """A case made ready by a peer."""

    def step(self) -> Any:
        """Make one step and wait for it. What is returned is dropped before the clock is read."""

    def outputs(self, result: Any) -> Mapping[str, Any]:
        """What a step returned as float32 arrays: y in the shape of the case, in training also dx, dgamma, dbeta."""


@dataclass(frozen=True)
class Peer:
    """A way to compute a case.

    Attributes:
        name: as it is called on the command line.
        make: `module:function`, called in the peer's own process with a Case and its numbers; returns a Runner.
        needs: modules that must be there.
        environment: variables of the process, for libraries that read them when they are loaded.
        about: what it is, in a sentence.
        activated: whether it says something only where there is an activation.
        norms: the only ones that it has, by their short names; empty for all.
        program: a module for a peer that is no Python package: its `missing()` says in words why it cannot run here, or
            None, and its `version()` is that of the library.
        room: how far its outputs may be from the exact ones, in our own tolerances. Of others we ask that they compute
            the same thing, not that they do it as carefully: PyTorch's batch norm in channels_last and Keras' on
            TensorFlow need up to 4, mistakes hundreds.
    """

    name: str
    make: str
    needs: tuple[str, ...]
    about: str
    environment: Mapping[str, str] = field(default_factory=dict)
    activated: bool = False
    norms: tuple[str, ...] = ()
    program: str = ""
    room: float = 16.0

    def missing(self) -> str | None:
        """Why it cannot run here, None if it can."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return str(why) if self.program and (why := importlib.import_module(self.program).missing()) else None

    def version(self) -> dict[str, str]:
        """Of its program, by its name, where it is one."""
        return {self.name: importlib.import_module(self.program).version()} if self.program else {}

    def applies(self, case: Case) -> bool:
        """Whether the case says anything about it."""
        return (not self.activated or case.activation is not None) and case.norm in (self.norms or (case.norm,))


_TORCH = ("torch",)
PEERS = (
    Peer(
        "normkit", f"{_HERE}.torch:normkit", _TORCH, "normkit.torch layers, the activation fused by NormAct", room=1.0
    ),
    Peer("torch", f"{_HERE}.torch:eager", _TORCH, "PyTorch eager, ReLU out of place"),
    Peer("torch-inplace", f"{_HERE}.torch:in_place", _TORCH, "PyTorch eager, activation in place", activated=True),
    Peer(
        "torch-thp",
        f"{_HERE}.torch:eager",
        _TORCH,
        "PyTorch eager with THP_MEM_ALLOC_ENABLE=1: huge pages",
        {"THP_MEM_ALLOC_ENABLE": "1"},
    ),
    Peer("torch-compile", f"{_HERE}.torch:compiled", _TORCH, "torch.compile of the PyTorch layers"),
    Peer("jax", f"{_HERE}.jax:jitted", ("jax",), "JAX: forward and vjp in one jax.jit", {"JAX_PLATFORMS": "cpu"}),
    Peer(
        "keras-tensorflow",
        f"{_HERE}.keras:in_graph",
        ("keras", "tensorflow"),
        "Keras layers on TensorFlow in one tf.function",
        {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"},
    ),
    Peer(
        "onednn",
        f"{_HERE}.onednn:fused",
        (),
        "oneDNN in C++, ReLU fused; its results lie in memory that it uses again, as the copy's does",
        norms=("batch",),
        program=f"{_HERE}.onednn",
    ),
)


class Units(NamedTuple):
    """What times are multiples of, each in a process of its own.

    It is the same code for every peer, and neither what a peer did to its allocator nor whose threads still spin
    reaches it.
    """

    copy: Peer  # of a tensor of the case into another
    least: Peer  # the least memory traffic of a step, in the same state of memory


UNITS = Units(
    Peer("copy", f"{_HERE}.torch:copy", _TORCH, "PyTorch's copy_ into a tensor that is there"),
    Peer("least", f"{_HERE}.torch:least", _TORCH, "y = empty_like(x).copy_(x), dx = add(x, dy)"),
)


def chosen(peers: Sequence[Peer], wanted: str | None) -> tuple[Peer, ...]:
    """The peers named by `wanted`, separated by commas, in that order; all by default. Raises NormValueError."""
    if wanted is None:
        return tuple(peers)
    known = {peer.name: peer for peer in peers}
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise NormValueError(message("every peer must be a known one", repr(name), nearest(name, known)))
    if not names:
        raise NormValueError(message("`--peers` must name at least one peer", repr(wanted), nearest("", known)))
    return tuple(known[name] for name in names)


def found(peers: Sequence[Peer]) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """The peers that can run here, and why the others cannot, by name."""
    missing = {peer.name: why for peer in peers if (why := peer.missing())}
    return tuple(peer for peer in peers if peer.name not in missing), missing
