"""Twenty training steps of one layer on the same data, by any framework, compared with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import normkit.torch as nk
from normkit.core import catalog
from normkit.core.schedule import RenormSchedule
from normkit.testing import Call, Subject
from normkit.testing.torch import layer_subject

__all__ = ["KINDS", "SHAPE", "assert_like_torch", "known"]

SHAPE = (9, 6, 3, 5)  # nine samples: ghost batches of four leave one over
_SCHEDULE = RenormSchedule(r_max=1.5, d_max=0.5, start=0, r_end=0, d_end=0)

# Each kind: a layer of PyTorch for a call, and its spec with the static sizes.
_TORCH: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "batch": (
        lambda c: nk.BatchNorm2d(6, c.eps, c.rate, bessel=c.bessel), catalog.BATCH, (("c", 6),)),
    "ghost": (
        lambda c: nk.GhostBatchNorm2d(6, c.eps, c.rate, virtual_batch_size=4, bessel=c.bessel),
        catalog.GHOST, (("c", 6), ("n", 4))),
    "renorm": (lambda c: nk.BatchRenorm2d(6, c.eps, c.rate, schedule=c.schedule), catalog.RENORM, (("c", 6),)),
    "instance": (lambda c: nk.InstanceNorm2d(6, c.eps, affine=True), catalog.INSTANCE, (("c", 6),)),
    "group": (lambda c: nk.GroupNorm(3, 6, c.eps), catalog.GROUP, (("g", 3),)),
    "layer": (lambda c: nk.LayerNorm(5, c.eps), catalog.LAYER, (("*c", (5,)),)),
    "rms": (lambda c: nk.RMSNorm(5, c.eps), catalog.RMS, (("*c", (5,)),)),
}  # fmt: skip
KINDS = tuple(_TORCH)


def known(kind: str) -> dict[str, Any]:
    """The attributes of a Subject of this kind."""
    _, spec, sizes = _TORCH[kind]
    return {"spec": spec, "shapes": (SHAPE,), "sizes": lambda _: sizes, "beta": kind != "rms"}


def trained(subject: Subject, steps: int = 20) -> list[dict[str, np.ndarray]]:
    """Outputs, gradients, parameters and statistics of every step: plain gradient descent at rate 0.1."""
    rng = np.random.default_rng(0)
    shape = subject.parameter_shape(SHAPE)
    gamma, beta = np.ones(shape), np.zeros(shape) if subject.beta else None
    kept = {t.name: np.full(shape, t.init) for t in subject.spec.tracked}
    seen = []
    for step in range(steps):
        call = Call(
            x=2 + 3 * rng.normal(size=SHAPE), gamma=gamma, beta=beta, dy=rng.normal(size=SHAPE), kept=kept, count=step,
            eps=1e-3, bessel=True if "var" in kept else None, schedule=_SCHEDULE if subject.spec.renorm else None,
        )  # fmt: skip
        found = subject.run(subject.rounded(call))
        gamma = gamma - 0.1 * found.dgamma
        beta = None if beta is None else beta - 0.1 * found.dbeta
        kept = {name: found.kept[name] for name in kept}
        seen.append({"y": found.y, "dx": found.dx, "gamma": gamma, **kept, **({} if beta is None else {"beta": beta})})
    return seen


def assert_like_torch(kind: str, subject: Subject) -> None:
    """To 1e-5 of the largest value, in every step."""
    build = _TORCH[kind][0]
    expected = trained(layer_subject(f"torch {kind}", lambda call, shape: build(call), **known(kind)))
    for step, (mine, theirs) in enumerate(zip(trained(subject), expected, strict=True)):
        for name, value in theirs.items():
            worst = np.abs(mine[name] - value).max()
            assert worst <= 1e-5 * max(1.0, np.abs(value).max()), f"{kind}: {name} of step {step} is off by {worst:.2g}"
