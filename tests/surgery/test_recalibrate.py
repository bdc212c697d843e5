import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.errors import NormError
from normkit.torch import BatchNorm1d, BatchRenorm1d


def data(samples=1000, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, 3, 4)
    # Batches differ: the mean drifts, so the variance between batches is most of it.
    return (scale * rng.normal(size=(samples, 4)) + np.linspace(-5, 5, samples)[:, None]).astype(np.float32)


def deep(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3), norm(3))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d])
def test_the_first_layer_gets_the_moments_of_all_data_at_once(norm):
    model, x = nn.Sequential(norm(4)), data()
    normkit.recalibrate(model, x)
    np.testing.assert_allclose(model[0].running_mean, x.astype(np.float64).mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model[0].running_var, x.astype(np.float64).var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(2,) * 500, (100, 300, 600), (1000,)])
def test_how_the_data_is_cut_changes_nothing(sizes):
    x = data()
    whole, cut = (nn.Sequential(BatchNorm1d(4)) for _ in range(2))
    normkit.recalibrate(whole, x)
    normkit.recalibrate(cut, np.split(x, np.cumsum(sizes)[:-1]))
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(cut[0], name), getattr(whole[0], name), rtol=1e-6, atol=1e-6)


def test_a_batch_of_one_is_refused_and_nothing_changes():
    model, x = nn.Sequential(BatchNorm1d(4)), data()
    kept = state(model)
    with pytest.raises(NormError, match="at least 2 values"):
        normkit.recalibrate(model, [x[:10], x[:1]])
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


def test_order_does_not_matter_and_biased_layers_keep_the_biased_variance():
    x = data()
    layer = BatchNorm1d(4, bessel=False)
    normkit.recalibrate(nn.Sequential(layer), [x[500:], x[:500]])
    np.testing.assert_allclose(layer.running_var, x.astype(np.float64).var(0), rtol=1e-6)


def test_renorm_keeps_a_standard_deviation():
    x, layer = data(), BatchRenorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), x)
    np.testing.assert_allclose(layer.running_std, np.sqrt(x.astype(np.float64).var(0) + layer.eps), rtol=1e-6)


def test_evaluation_then_gives_what_training_gave():
    """Where evaluation was far off: one giant batch, no dropout. The kept variance is the unbiased one: n = 1000."""
    model, x = deep(), torch.from_numpy(data())
    before = model.eval()(x)
    normkit.recalibrate(model.train(), [x])
    assert model.training
    after = model.eval()(x)
    np.testing.assert_allclose(after.mean(0).detach(), 0, atol=1e-3)
    np.testing.assert_allclose(after.std(0).detach(), 1, atol=1e-2)
    assert before.std(0).max() > 1.5 or before.mean(0).abs().max() > 0.5


def test_nothing_else_changes():
    model, x = deep(), data()
    model[1].momentum = 0.3
    kept, rng = state(model), torch.get_rng_state()
    assert normkit.recalibrate(model, x) is model
    changed = {name for name, value in model.state_dict().items() if not value.equal(kept[name])}
    assert changed == {f"{n}.{s}" for n in (1, 5) for s in ("running_mean", "running_var")}
    assert torch.get_rng_state().equal(rng)
    assert (model[1].momentum, model.training, all(m.training for m in model)) == (0.3, True, True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_layers_are_left_out():
    model = deep()
    model[1].eval()
    kept = state(model)
    normkit.recalibrate(model, data())
    assert model[1].running_mean.equal(kept["1.running_mean"])
    assert not model[5].running_mean.equal(kept["5.running_mean"])
    assert not model[1].training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_changes_nothing(error):
    def broken():
        yield data(50)
        raise error

    model = deep()
    kept = state(model)
    with pytest.raises(error):
        normkit.recalibrate(model, broken())
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_of_a_loader():
    x = torch.from_numpy(data())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(1000)), 100)
    layer = nn.BatchNorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), loader)
    np.testing.assert_allclose(layer.running_mean, x.double().mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (nn.Sequential(nn.Linear(4, 4)), data(), "must hold batch norms with running statistics"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), data(), "must hold batch norms"),
        (nn.Sequential(nn.BatchNorm1d(4)), [], "at least one batch; got none"),
        (nn.Sequential(nn.BatchNorm1d(4)), "digits", "must be an array, a tensor, or an iterable"),
        ("model", data(), "a model must be a torch.nn.Module, a Keras layer or model, or an nnx.Module; got str"),
    ],
)
def test_what_cannot_be_recalibrated(model, given, said):
    with pytest.raises(NormError, match=said):
        normkit.recalibrate(model, given)
