"""The same twenty steps as PyTorch, on the backend that is active."""

import pytest
from trajectories import KINDS, assert_like_torch, known

import normkit.keras as nk
from normkit.testing.keras import layer_subject, tracking

BUILD = {
    "batch": lambda c: nk.BatchNormalization(**tracking(c)),
    "ghost": lambda c: nk.GhostBatchNormalization(virtual_batch_size=4, **tracking(c)),
    "renorm": lambda c: nk.BatchRenormalization(renorm_schedule=c.schedule, renorm_momentum=1 - c.rate, **tracking(c)),
    "instance": lambda c: nk.InstanceNormalization(epsilon=c.eps),
    "group": lambda c: nk.GroupNormalization(groups=3, epsilon=c.eps),
    "layer": lambda c: nk.LayerNormalization(epsilon=c.eps),
    "rms": lambda c: nk.RMSNormalization(epsilon=c.eps),
}


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_pytorch(kind):
    last = kind not in ("layer", "rms")  # which are over the last axis anyway
    assert_like_torch(kind, layer_subject(kind, lambda c, s, d: BUILD[kind](c), last=last, **known(kind)))
