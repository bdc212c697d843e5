"""Within PyTorch; between the frameworks see tests/keras/cases and tests/nnx."""

import numpy as np
import pytest
import torch
from torch import nn
from trained_layers import LAYERS, named, trained

import normkit
from normkit import torch as ours
from normkit.core.record import NormRecord
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError
from normkit.torch.porting import read

MORE = [
    (nn.BatchNorm2d(6, track_running_stats=False), (8, 6, 3, 3)),
    (nn.InstanceNorm1d(6, track_running_stats=True), (8, 6, 5)),
    (ours.InstanceNorm1d(6, track_running_stats=True, momentum=None), (8, 6, 5)),
    (nn.LayerNorm((3, 6), bias=False), (8, 3, 6)),
    (ours.LayerNorm2d(6), (8, 6, 3, 3)),
    (ours.RMSNorm(6, gain="1+w"), (8, 6)),
    (ours.RMSNorm2d(6), (8, 6, 3, 3)),
    (ours.RMSNorm2d(6, gain="1+w", cast="none"), (8, 6, 3, 3)),
    (ours.RMSNorm(6, cast="llama"), (8, 6)),
    (ours.LayerNorm2d(6, bias=False), (8, 6, 3, 3)),
    (ours.GroupNorm(2, 6, bias=False), (8, 6, 3)),
    (ours.BatchNorm1d(6, bias=False, nonfinite="update"), (8, 6)),
    (ours.BatchRenorm1d(6, schedule=RenormSchedule.for_steps(100), nonfinite="update"), (8, 6)),
]
# What a layer takes over, beside the arrays.
FACTS = ("kind", "shape", "eps", "groups", "virtual_batch_size", "gain", "cast")
AVERAGING = ("rate", "bessel", "debiased", "nonfinite", "clips", "count")


@pytest.mark.parametrize(("layer", "shape"), [*LAYERS, *MORE], ids=named)
def test_a_layer_and_its_port_evaluate_alike(layer, shape):
    layer = trained(layer, shape)
    again = normkit.port(layer, to="torch")
    x = 2 + 3 * torch.randn(shape)
    torch.testing.assert_close(again.eval()(x), layer(x), rtol=1e-6, atol=1e-6)
    assert type(again).__module__.startswith("normkit.") or isinstance(again, type(layer))
    mine, theirs = read(layer), read(again)
    for name in (*FACTS, *AVERAGING):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert (mine.gamma is None, mine.beta is None) == (theirs.gamma is None, theirs.beta is None)


def test_a_model_gives_a_layer_for_each_path_and_receives_values():
    source = nn.Sequential(nn.Conv2d(3, 6, 3), trained(nn.BatchNorm2d(6), (8, 6, 3, 3)), nn.GroupNorm(2, 6))
    ported = normkit.port(source, to="torch")
    assert list(ported) == ["1", "2"]
    receiver = nn.Sequential(ours.BatchNorm2d(6), nn.ReLU(), ours.GroupNorm(2, 6))
    assert normkit.port(source, to=receiver) is receiver
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(receiver[0], name), getattr(source[1], name))


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        (nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6)), "same number of norm layers, at least one; got 1 and 2"),
        (nn.Sequential(nn.BatchNorm2d(5)), r"must match in kind.*got batch norm of 6 \(0\) and batch norm of 5 \(0\)"),
        (nn.Sequential(nn.GroupNorm(2, 6)), "batch norm of 6 .* and group norm of 6"),
        (nn.Sequential(nn.BatchNorm2d(6, affine=False)), "must match in kind"),
        (nn.Sequential(nn.BatchNorm2d(6, eps=1e-3)), r"same eps.*got 1e-05 .* and 0\.001"),
        (nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False)), "in what they keep"),
        (
            nn.Sequential(nn.BatchNorm2d(6, momentum=0.3)),
            r"weight 0\.1 .*weight 0\.3 .*make 0 with momentum 0\.1 in",
        ),
        (nn.Sequential(nn.BatchNorm2d(6, momentum=None)), "average batches alike.* and all batches equally"),
    ],
)
def test_models_that_do_not_match_are_refused_and_left_alone(receiver, said):
    source = nn.Sequential(trained(nn.BatchNorm2d(6), (8, 6, 3, 3)))
    kept = {name: value.clone() for name, value in receiver.state_dict().items()}
    with pytest.raises(NormError, match=said):
        normkit.port(source, to=receiver)
    assert all(value.equal(kept[name]) for name, value in receiver.state_dict().items())


class OverChannels(nn.LayerNorm):
    """As in ConvNeXt of torchvision: a layer norm by its class, over another axis."""

    def forward(self, input):
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("model", "to", "options", "said"),
    [
        (nn.BatchNorm2d(6), "tensorflow", {}, "`framework` must be a known one; got 'tensorflow'"),
        (nn.Linear(3, 3), "torch", {}, "must hold norm layers to be ported; got Linear"),
        (3, "torch", {}, "a model must be a torch.nn.Module"),
        (nn.BatchNorm2d(6), "torch", {"axis": 2}, "`axis` must be 1 or -1; got 2"),
        (nn.BatchNorm2d(6), "torch", {"axis": True}, "`axis` must be 1 or -1; got True"),
        (nn.BatchNorm2d(6), "torch", {"axis": 1.0}, r"`axis` must be 1 or -1; got 1\.0"),
        (nn.Sequential(OverChannels(6)), "torch", {}, "OverChannels must compute as .* got a forward of its own"),
        (nn.LazyBatchNorm1d(), "torch", {}, "LazyBatchNorm1d must be built"),
        (nn.Sequential(nn.LazyInstanceNorm2d(affine=True)), "torch", {}, "LazyInstanceNorm2d must be built"),
        (nn.LayerNorm((3, 4)), "torch", {"axis": 1}, "must have them last"),
        (nn.GroupNorm(2, 6), "torch", {"axis": -1}, "channels on axis 1"),
        (nn.BatchNorm2d(6), nn.BatchNorm2d(6), {"axis": 1}, "must be left out"),
    ],
)
def test_what_cannot_be_ported(model, to, options, said):
    with pytest.raises(NormError, match=said):
        normkit.port(model, to=to, **options)


@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, ours.InstanceNorm1d, nn.BatchNorm1d, ours.BatchNorm1d])
def test_tracking_that_was_switched_off_later(kind):
    layer = trained(kind(6, track_running_stats=True), (8, 6, 5))
    layer.track_running_stats = False
    x = torch.randn(8, 6, 5)
    torch.testing.assert_close(normkit.port(layer, to="torch").eval()(x), layer(x))


def test_a_receiver_may_have_another_gain():
    source, receiver = ours.RMSNorm(6, eps=1e-6), ours.RMSNorm(6, eps=1e-6, gain="1+w")
    nn.init.uniform_(source.weight, 0.5, 1.5)
    x = torch.randn(8, 6)
    torch.testing.assert_close(normkit.port(source, to=receiver)(x), source(x))


def test_channels_may_move():
    layer = trained(nn.BatchNorm2d(6), (8, 6, 3, 3))
    x = torch.randn(8, 6, 3, 3)
    last = normkit.port(layer, to="torch", axis=-1).eval()
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), layer(x))


def test_a_kept_standard_deviation_and_a_variance_are_one_thing():
    record = NormRecord("renorm", (2,), 1, 1e-3, kept={"mean": np.zeros(2), "std": np.array([1.0, 2.0])})
    np.testing.assert_allclose(record.variance(), [0.999, 3.999])
    again = NormRecord("batch", (2,), 1, 1e-3, kept={"mean": np.zeros(2), "var": record.variance()})
    np.testing.assert_allclose(again.deviation(), [1.0, 2.0])


def test_a_deviation_below_the_root_of_eps_has_no_negative_variance():
    record = NormRecord("renorm", (1,), 1, 1e-3, kept={"mean": np.zeros(1), "std": np.array([0.01])})
    np.testing.assert_array_equal(record.variance(), [0.0])


def test_fixed_clips_are_a_schedule_where_they_clip_alike_in_both_directions():
    record = NormRecord("renorm", (1,), 1, 1e-3, clips={"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0})
    assert record.schedule().at(np, 0) == (3.0, 5.0) == record.schedule().at(np, 7)
    for clips in ({}, {"rmin": 0.5, "rmax": 3.0, "dmax": 5.0}, {"rmin": 1 / 3, "rmax": 3.0}):
        with pytest.raises(NormError, match="must be a schedule, or have"):
            NormRecord("renorm", (1,), 1, 1e-3, clips=clips).schedule()
