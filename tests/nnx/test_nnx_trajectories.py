"""The same twenty steps as PyTorch."""

import pytest
from nnx_required import nnx
from trajectories import KINDS, assert_like_torch, known

import normkit.nnx as nk
from normkit.testing.nnx import layer_subject

RNGS = nnx.Rngs(0)
BUILD = {
    "batch": lambda c: nk.BatchNorm(6, momentum=1 - c.rate, epsilon=c.eps, bessel=c.bessel, rngs=RNGS),
    "ghost": lambda c: nk.GhostBatchNorm(
        6, momentum=1 - c.rate, epsilon=c.eps, bessel=c.bessel, virtual_batch_size=4, rngs=RNGS
    ),
    "renorm": lambda c: nk.BatchRenorm(6, momentum=1 - c.rate, epsilon=c.eps, schedule=c.schedule, rngs=RNGS),
    "instance": lambda c: nk.InstanceNorm(6, epsilon=c.eps, rngs=RNGS),
    "group": lambda c: nk.GroupNorm(6, num_groups=3, epsilon=c.eps, rngs=RNGS),
    "layer": lambda c: nk.LayerNorm(5, epsilon=c.eps, rngs=RNGS),
    "rms": lambda c: nk.RMSNorm(5, epsilon=c.eps, rngs=RNGS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_pytorch(kind):
    last = kind not in ("layer", "rms")  # which are over the last axis anyway
    assert_like_torch(kind, layer_subject(kind, lambda c, s: BUILD[kind](c), channels_last=last, **known(kind)))
