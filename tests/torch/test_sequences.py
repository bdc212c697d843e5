"""The LSTM that reads images row by row: what padding may touch, and what a study may ask of it."""

import numpy as np
import pytest
import torch

from normkit.errors import NormValueError
from normkit.experiments.conditions import Conditions, cut
from normkit.torch.models import build
from normkit.torch.sequences import batch_statistics


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
    [("batch", "counted", True), ("batch", "masked", False), ("batch", "inputs", False), ("batch", "steps", False),
     ("layer", "masked", False), ("none", "masked", False)],
)  # fmt: skip
def test_only_counted_padding_touches_what_is_real(images, norm, sequences, touched):
    network = built(norm, sequences=sequences)
    found = [network(x) for x in (images, padded_otherwise(images))]
    assert torch.allclose(*found, atol=1e-6) is not touched  # some units of float32's rounding at outputs of about 1


@pytest.mark.parametrize("sequences", ["masked", "inputs", "steps"])
def test_gains_begin_where_asked(sequences):
    gains = [p for n, p in built("batch", sequences=sequences, gamma=0.25).named_parameters()
             if "gamma" in n or n == "norms.0.weight"]  # fmt: skip
    assert gains
    assert all(bool((gain == 0.25).all()) for gain in gains)


def test_weights_start_alike():
    starts = [
        (n.front.weight if n.front is not None else n.lstm.weight_ih_l0, n.lstm.weight_hh_l0, n.classifier.weight)
        for n in (
            built(norm, sequences=how)
            for norm, how in (("none", "masked"), ("batch", "steps"), ("batch", "masked"), ("batch", "inputs"))
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


@pytest.mark.parametrize("asked", [{"gamma": 0.1}, {"batch_spread": True}])
def test_what_is_asked_of_an_lstm_needs_sequences(asked):
    with pytest.raises(NormValueError, match=f"`{next(iter(asked))}` must come with"):
        Conditions(**asked)


# ---- statistics of each batch, against NumPy

LENGTHS = ((8, 3, 5, 4, 3, 8), (4, 4, 5, 6, 3, 3))  # one sequence alone at steps 6 and later of the second batch
EPS = 1e-5


def with_lengths(lengths, seed):
    x = np.random.default_rng(seed).normal(size=(len(lengths), 1, 8, 8))
    real = np.broadcast_to((np.arange(8) < np.array(lengths)[:, None])[:, None, :, None], (len(x), 1, 8, 8))
    return np.concatenate([x * real, real], 1).astype(np.float32)


def trained(sequences):
    """Weights, gains and running statistics of their own, so that nothing is 0 or 1 by chance."""
    network = built("batch", sequences=sequences)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gamma" in name or "beta" in name or "bias" in name:
                parameter.add_(torch.from_numpy(rng.uniform(0.1, 0.4, parameter.shape)))
    network(torch.from_numpy(with_lengths((8,) * 6, 9)))
    return network


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(network, x):
    """Per step what batch norm saw of W x, U h and c of the sequences that are alive, in float64."""
    own = {name: value.detach().double().numpy() for name, value in network.lstm.named_parameters()}
    lengths = x[:, 1, :, 0].sum(1)
    h = c = np.zeros((len(x), 32))
    seen = []
    for t in range(8):
        alive = lengths > t
        if alive.sum() < 2:
            break
        h, c = h[alive[lengths >= t] if t else alive], c[alive[lengths >= t] if t else alive]
        products = x[alive, 0, t].astype(np.float64) @ own["weight_ih_l0"].T, h @ own["weight_hh_l0"].T
        i, f, g, o = np.split(
            sum(
                own[f"gamma_{kind}_l0"] * (z - z.mean(0)) / np.sqrt(z.var(0) + EPS) + own[f"bias_{kind}_l0"]
                for kind, z in zip(("ih", "hh"), products, strict=True)
            ), 4, axis=1
        )  # fmt: skip
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        seen.append((*products, c))
        h = sigmoid(o) * np.tanh(own["gamma_c_l0"] * (c - c.mean(0)) / np.sqrt(c.var(0) + EPS) + own["beta_c_l0"])
    return seen


def test_statistics_of_each_step_are_those_of_an_lstm_in_numpy():
    network, batches = trained("steps"), [with_lengths(lengths, n) for n, lengths in enumerate(LENGTHS)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = list(batch_statistics(network, map(torch.from_numpy, batches)))
    assert [one.counts.tolist() for one in found] == [[6, 6, 6, 4, 3, 2, 2, 2], [6, 6, 6, 4, 2, 1, 0, 0]]
    for one, x in zip(found, batches, strict=True):
        for t, kinds in enumerate(by_hand(network, x)):
            for place, values in enumerate(kinds):
                # float64, a loop of 8 steps
                np.testing.assert_allclose(one.means[place][t], values.mean(0), rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(one.variances[place][t], values.var(0), rtol=1e-9, atol=1e-9)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("sequences", ["counted", "masked", "inputs"])
def test_statistics_of_the_input_alone(sequences):
    network, x = trained(sequences), with_lengths(LENGTHS[1], 1)
    (found,) = batch_statistics(network, [torch.from_numpy(x)])
    products = x[:, 0].astype(np.float64) @ network.front.weight.detach().double().numpy().T
    real = np.ones((6, 8), bool) if sequences == "counted" else x[:, 1, :, 0] > 0
    parts = [products[real]] if sequences != "inputs" else [products[real[:, t], t] for t in range(8)]
    assert found.counts.tolist() == list(map(len, parts))
    for t, values in enumerate(parts):
        if len(values) > 1:
            np.testing.assert_allclose(found.means[0][t], values.mean(0), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.variances[0][t], values.var(0), rtol=1e-9, atol=1e-9)


def test_without_batch_norm_there_are_no_statistics(images):
    assert list(batch_statistics(built("layer", sequences="masked"), [images])) == []


def test_each_step_of_w_x_is_normalized_by_its_own_statistics():
    """A single sequence by the running ones; gamma and beta are one for all steps."""
    network, x = trained("inputs").double(), with_lengths(LENGTHS[1], 1)
    real, norms = x[:, 1, :, 0] > 0, network.norms
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in trained("masked").parameters())
    z = np.random.default_rng(2).normal(size=(6, 128, 8))
    kept = norms[5].running_mean.numpy().copy(), norms[5].running_var.numpy().copy()
    y = network._normalized(torch.from_numpy(z), torch.from_numpy(real)).detach().numpy()
    gamma, beta = (p.detach().numpy() for p in (norms[7].weight, norms[7].bias))
    for t in range(6):
        values = z[real[:, t], :, t]
        mean, var = (values.mean(0), values.var(0)) if t < 5 else kept
        expected = gamma * (values - mean) / np.sqrt(var + EPS) + beta
        np.testing.assert_allclose(y[real[:, t], :, t], expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(norms[5].running_mean.numpy(), kept[0])
