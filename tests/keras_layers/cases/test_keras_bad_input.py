"""What cannot work says what must hold, what came and, where there is something, what to do."""

from __future__ import annotations

from functools import partial

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError, NormRuntimeError, NormTypeError, NormValueError
from normkit.keras._layer import ARGUMENTS as CONSTRAINTS
from normkit.testing.keras import call_layer

BATCH = (nk.BatchNormalization, nk.BatchRenormalization, nk.GhostBatchNormalization)
EVERY = (
    *BATCH,
    nk.LayerNormalization,
    nk.GroupNormalization,
    nk.InstanceNormalization,
    nk.RMSNormalization,
    nk.FilterResponseNormalization,
    nk.EvoNormB0,
    nk.EvoNormS0,
    nk.DynamicTanh,
    nk.GlobalResponseNormalization,
)
X = np.ones((4, 5, 6))
ARGUMENTS = {
    nk.BatchNormalization: ("momentum", "epsilon", "center", "scale", "renorm", "renorm_momentum", "synchronized",
                            "virtual_batch_size", "debiased", "bessel", "nonfinite"),
    nk.LayerNormalization: ("epsilon", "center", "scale"),
    nk.GroupNormalization: ("epsilon", "center", "scale"),
    nk.InstanceNormalization: ("epsilon", "center", "scale"),
    nk.RMSNormalization: ("epsilon",),
    nk.FilterResponseNormalization: ("epsilon", "learn_epsilon"),
    nk.EvoNormB0: ("momentum", "epsilon", "debiased", "bessel", "nonfinite"),
    nk.EvoNormS0: ("groups", "epsilon"),
    nk.DynamicTanh: ("alpha",),
    nk.GlobalResponseNormalization: ("epsilon",),
    partial(nk.LayerNormLSTMCell, units=4): ("units", "epsilon"),
    partial(nk.BatchNormLSTMCell, units=4, max_steps=3): ("units", "max_steps", "momentum", "epsilon", "debiased",
                                                          "nonfinite"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in ARGUMENTS.items() for name in names])
def test_arguments_out_of_range(make, name):
    for bad in CONSTRAINTS[name].bad():
        with pytest.raises(NormError, match=f"`{name}` must be"):
            make(**{name: bad})


@pytest.mark.parametrize("make", EVERY)
def test_an_axis_that_the_input_has_not(make):
    for axis in (3, -4):
        with pytest.raises(NormValueError, match="`axis` must be a whole number from -3 to 2 for an input of shape"):
            make(axis=axis)(keras.ops.ones(X.shape))


@pytest.mark.parametrize("make", EVERY)
def test_an_axis_of_unknown_length(make):
    with pytest.raises(NormValueError, match="axis -1 of the input must have a known length"):
        make()(keras.Input((5, None)))


@pytest.mark.parametrize("make", BATCH)
def test_axes_that_are_no_number(make):
    for axis in ([1], 1.5, None, "1", True):
        with pytest.raises(NormTypeError, match="`axis` must be one whole number"):
            make(axis=axis)


def test_axes_given_twice():
    for make in (nk.LayerNormalization, nk.RMSNormalization):
        for axis in ([1, 1], [-1, 2], []):
            with pytest.raises(NormValueError, match="`axis` must name one axis or several, each once"):
                make(axis=axis)(keras.ops.ones(X.shape))


@pytest.mark.parametrize("make", EVERY)
def test_another_number_of_channels(make):
    layer = make(**({"groups": 3} if make in (nk.GroupNormalization, nk.EvoNormS0) else {}))
    layer(keras.ops.ones(X.shape))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        layer(keras.ops.ones((4, 5, 1)))


@pytest.mark.parametrize("make", [*BATCH, nk.GroupNormalization])
def test_another_number_of_axes(make):
    layer = make(**({"groups": 3} if make in (nk.GroupNormalization, nk.EvoNormS0) else {}))
    with pytest.raises(
        NormValueError, match="the input must have two axes or more, of samples and of channels; got shape"
    ):
        layer(keras.ops.ones((6,)))
    layer(keras.ops.ones(X.shape))
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        layer(keras.ops.ones((4, 6)))


@pytest.mark.parametrize("shape", [(5, 4), (4, 6), (4, 5, 6), (4, 5, 1), (), (5,)])
def test_masks_of_another_shape(shape):
    for layer in (nk.BatchNormalization(), nk.GroupNormalization(3), nk.InstanceNormalization()):
        with pytest.raises(
            NormValueError, match=r"`mask` must have the shape \(4, 5\), the input's \(4, 5, 6\) without"
        ):
            call_layer(layer, X, mask=np.ones(shape, dtype=bool))
    with pytest.raises(NormValueError, match="`sample_weight` must have the shape"):
        call_layer(nk.BatchNormalization(), X, training=True, sample_weight=np.ones(shape))


def test_masks_that_fit():
    for shape in ((4, 5), (4, 1), (1, 5), (1, 1), (4,), (1,)):
        call_layer(nk.BatchNormalization(), X, training=True, mask=np.ones(shape, dtype=bool))
        call_layer(nk.BatchNormalization(), X, training=True, sample_weight=np.ones(shape))


def test_clips_of_renorm():
    with pytest.raises(NormValueError, match=r"known keys; got 'rmxa'\. hint: did you mean rmax"):
        nk.BatchNormalization(renorm=True, renorm_clipping={"rmxa": 1.0})
    for bad in ({"dmax": -1.0}, {"rmax": "2"}, {"rmin": np.nan}):
        with pytest.raises(NormValueError, match=r"must be None or a number of at least 0"):
            nk.BatchNormalization(renorm=True, renorm_clipping=bad)
    with pytest.raises(NormValueError, match=r"`rmin` must not be above `rmax`; got 2\.0 and 1\.0"):
        nk.BatchNormalization(renorm=True, renorm_clipping={"rmin": 2.0, "rmax": 1.0})


def test_arguments_that_contradict_each_other():
    schedule = RenormSchedule.for_steps(100)
    for options, words in (
        ({"renorm_schedule": schedule}, "must go with `renorm=True`"),
        ({"renorm_clipping": {"rmax": 2.0}}, "must go with `renorm=True`"),
        ({"renorm": True, "renorm_schedule": schedule, "renorm_clipping": {"rmax": 2.0}}, "must not both be given"),
        ({"renorm": True, "virtual_batch_size": 4}, "must not both be given"),
        ({"momentum": None, "debiased": True}, "`debiased` must go with a momentum below 1"),
        ({"momentum": 1.0, "debiased": True}, "`debiased` must go with a momentum below 1"),
        ({"virtual_batch_size": 4, "synchronized": True}, "cannot be `synchronized`"),
    ):
        with pytest.raises(NormValueError, match=words):
            nk.BatchNormalization(**options)
    with pytest.raises(NormValueError, match="ghost batches need the samples on axis 0"):
        nk.BatchNormalization(axis=0, virtual_batch_size=4)(keras.ops.ones((4, 6)))


def test_schedules():
    with pytest.raises(NormTypeError, match=r"a RenormSchedule or a dictionary of its fields; got \{'rmax': 2\}"):
        nk.BatchNormalization(renorm=True, renorm_schedule={"rmax": 2})
    with pytest.raises(NormTypeError, match="a RenormSchedule or a dictionary"):
        nk.BatchRenormalization(renorm_schedule=5)
    with pytest.raises(NormValueError, match="`r_max` must be"):
        nk.BatchNormalization(renorm=True, renorm_schedule={"r_max": 0.5})


def test_groups():
    with pytest.raises(
        NormValueError, match=r"divisible by `groups`; got 6 and 4. hint: use 3 or normkit.groups_for\(6\)"
    ):
        nk.GroupNormalization(4)(keras.ops.ones(X.shape))
    with pytest.raises(NormValueError, match=r"got 6 and 32\. hint: use 6"):
        nk.GroupNormalization()(keras.ops.ones(X.shape))
    for bad in (0, -2, 1.5, "3", True):
        with pytest.raises(NormValueError, match="`groups` must be a whole number of at least 1, or -1"):
            nk.GroupNormalization(bad)
    with pytest.raises(NormValueError, match="`axis` must not be 0, that of the samples"):
        nk.GroupNormalization(2, axis=0)(keras.ops.ones(X.shape))


def test_instances_without_positions():
    with pytest.raises(NormValueError, match="the input must have positions to take statistics over"):
        nk.InstanceNormalization()(keras.ops.ones((4, 6)))
    with pytest.raises(NormValueError, match="`groups` must not be given, each channel is one; got 3"):
        nk.InstanceNormalization(groups=3)


def test_unknown_arguments_are_refused_by_keras():
    with pytest.raises(ValueError, match="momentun"):
        nk.BatchNormalization(momentun=0.9)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the others can")
def test_jax_cannot_synchronize():
    with pytest.raises(
        NormRuntimeError, match=r"must run on TensorFlow or PyTorch; got the backend jax\. hint: with keras"
    ):
        nk.BatchNormalization(synchronized=True)
