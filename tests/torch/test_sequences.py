"""The LSTM that reads images row by row: what padding may touch, and what a study may ask of it."""

import numpy as np
import pytest
import torch

from normkit.errors import NormValueError
from normkit.experiments.conditions import Conditions, cut
from normkit.torch.models import build


def built(norm, model="mlp", **asked):
    conditions = Conditions(**asked)
    return build(
        model, shape=(1, 8, 8), classes=10, norm=norm, position="before", steps=10, seed=3, conditions=conditions
    )


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(cut(np.random.default_rng(0).normal(size=(16, 1, 8, 8)), 0))


def padded_otherwise(images):
    real = images[:, -1:] > 0
    return torch.cat([torch.where(real, images[:, :-1], 7.0), images[:, -1:]], 1)


def test_images_are_cut_to_their_first_rows():
    x = np.random.default_rng(1).normal(size=(400, 2, 8, 8))
    found = cut(x, 0)
    lengths = found[:, -1, :, 0].sum(1).astype(int)
    assert set(lengths) == set(range(3, 9))
    for image, shown, length in zip(x, found, lengths, strict=True):
        assert np.array_equal(shown[:2, :length], image[:, :length].astype(np.float32))
        assert not shown[:, length:].any()
    assert not np.array_equal(cut(x, 1)[:, -1], found[:, -1])


@pytest.mark.parametrize(
    ("norm", "sequences", "touched"),
    [("batch", "counted", True), ("batch", "masked", False), ("batch", "steps", False), ("layer", "masked", False),
     ("none", "masked", False)],
)  # fmt: skip
def test_only_counted_padding_touches_what_is_real(images, norm, sequences, touched):
    network = built(norm, sequences=sequences)
    found = [network(x) for x in (images, padded_otherwise(images))]
    assert torch.allclose(*found, atol=1e-6) is not touched  # some units of float32's rounding at outputs of about 1


@pytest.mark.parametrize("sequences", ["masked", "steps"])
def test_gains_begin_where_asked(sequences):
    gains = [p for n, p in built("batch", sequences=sequences, gamma=0.25).named_parameters()
             if "gamma" in n or n == "norm.weight"]  # fmt: skip
    assert gains
    assert all(bool((gain == 0.25).all()) for gain in gains)


def test_weights_start_alike():
    starts = [
        (n.front.weight if n.front is not None else n.lstm.weight_ih_l0, n.lstm.weight_hh_l0, n.classifier.weight)
        for n in (
            built(norm, sequences=how) for norm, how in (("none", "masked"), ("batch", "steps"), ("batch", "masked"))
        )
    ]
    for start in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], start, strict=True))


def test_an_identity_in_front_of_the_gates_stays_it(images):
    network = built("batch", sequences="masked")
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(images).square().sum().backward()
    optimizer.step()
    assert torch.equal(network.lstm.weight_ih_l0, torch.eye(128))


@pytest.mark.parametrize(
    ("norm", "model", "asked"),
    [("group", "mlp", {}), ("batch", "cnn", {}), ("batch", "mlp", {"depth": 3})],
)
def test_what_makes_no_sense_is_refused(norm, model, asked):
    with pytest.raises(NormValueError, match="`sequences` must"):
        built(norm, model, sequences="masked", **asked)


def test_gains_need_sequences():
    with pytest.raises(NormValueError, match="`gamma` must come with"):
        Conditions(gamma=0.1)
