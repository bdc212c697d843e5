import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import normkit
import normkit.torch as nkt
from normkit.errors import NormError

CLASSES = 4


def source(samples=400, seed=0):
    """Samples around a centre for every class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=samples)
    centres = 2 * np.random.default_rng(7).normal(size=(CLASSES, 6))
    return torch.tensor(centres[y] + rng.normal(size=(samples, 6)), dtype=torch.float32), torch.tensor(y)


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = network(), source()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return normkit.recalibrate(model, x).eval().state_dict()


@pytest.fixture
def model(trained):
    model = network().eval()
    model.load_state_dict(trained)
    return model


def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).float().mean())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, kept):
    return all(value.equal(kept[name]) for name, value in model.state_dict().items())


def test_a_shift_of_scale_and_offset_is_undone_exactly(model):
    """BN(W (a x + b)) = BN(W x) up to eps."""
    x, y = source(seed=1)
    elsewhere = 0.3 * x + torch.linspace(-3, 3, 6)
    there = normkit.recalibrate(copy.deepcopy(model), x)
    before = accuracy(model, elsewhere, y)
    assert normkit.adapt(model, elsewhere) is model
    assert accuracy(model, elsewhere, y) > before + 0.3
    assert torch.equal(model(elsewhere).argmax(1), there(x).argmax(1))
    # eps = 1e-5 weighs more where variances are 0.09 of what they were.
    torch.testing.assert_close(model(elsewhere), there(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("prior", [1, 100, 1e9])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nkt.BatchRenorm1d])
def test_the_old_statistics_count_for_so_many_samples(norm, prior):
    """Samples, not values: 5 positions each. The moments of both together, against arrays put one after the other."""
    rng = np.random.default_rng(0)
    old, new = (rng.normal(at, 1 + at, size=(n, 3, 5)).astype(np.float32) for at, n in ((0, 100), (2, 40)))
    model = nn.Sequential(norm(3)).eval()
    normkit.recalibrate(model, old)
    kept = state(model)
    _, report = normkit.adapt(model, [new[:7], new[7:]], prior=prior, return_report=True)
    rows = [part.astype(np.float64).transpose(0, 2, 1).reshape(-1, 3) for part in (old, new)]
    share = prior / (prior + 40)
    mean = share * rows[0].mean(0) + (1 - share) * rows[1].mean(0)
    second = [share * np.square(r - mean).mean(0) for r in rows[:1]] + [(1 - share) * np.square(rows[1] - mean).mean(0)]
    found = model[0].running_var if norm is nn.BatchNorm1d else model[0].running_std.square() - 1e-5
    np.testing.assert_allclose(model[0].running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, sum(second), rtol=6e-3)  # Bessel's factor of the 200 new values
    report.undo()
    assert unchanged(model, kept)


def test_entropy_is_lowered_by_gamma_and_beta_alone(model):
    x, _ = source(seed=1)
    noisy = x + 1.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].weight.requires_grad_(False)
    kept, rng = state(model), torch.get_rng_state()
    _, plain = normkit.adapt(model, list(noisy.split(50)), return_report=True)
    plain.undo()
    assert unchanged(model, kept)
    _, report = normkit.adapt(model, list(noisy.split(50)), method="entropy", lr=0.02, return_report=True)
    assert (report.measure, report.before) == ("entropy", pytest.approx(plain.before, abs=1e-12))
    assert report.after < plain.after
    changed = {name for name, value in model.state_dict().items() if not value.equal(kept[name])}
    assert changed == {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert torch.get_rng_state().equal(rng)
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert not any(m.training for m in model.modules())
    report.undo()
    assert unchanged(model, kept)


def test_the_first_step_is_the_gradient_of_the_entropy(model):
    """By finite differences: Adam's first step has the sign of the gradient and the size of the rate."""
    x = source(50, seed=2)[0] + 0.5
    model = model.double()
    gamma = model[1].weight.detach().clone()

    @torch.no_grad()
    def entropy(at, by):
        moved = gamma.clone()
        moved[at] += by
        h = model[0](x.double())
        h = (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5) * moved + model[1].bias
        p = model[4](h.relu()).softmax(1)
        return float(-(p * p.log()).sum(1).mean())

    slopes = [(entropy(at, 1e-5) - entropy(at, -1e-5)) / 2e-5 for at in range(16)]
    normkit.adapt(model, [x], method="entropy", lr=0.01)
    moved = (model[1].weight - gamma).detach().numpy()
    clear = np.abs(slopes) > 1e-6  # Adam's own eps is 1e-8, that of the differences about 1e-10
    assert clear.sum() > 8
    np.testing.assert_allclose(moved[clear], -0.01 * np.sign(slopes)[clear], rtol=0.02)


def test_probabilities_are_no_scores():
    """A model that ends in a softmax: the softmax of that would be another entropy."""
    torch.manual_seed(0)
    scores = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    x = 5 * torch.randn(40, 6)
    reports = [
        normkit.adapt(normkit.recalibrate(model, x), x + 1, return_report=True)[1]
        for model in (scores, nn.Sequential(*scores, nn.Softmax(1)))
    ]
    p = nn.functional.softmax(scores.eval()(x + 1), 1)
    expected = -(p * p.log()).sum(1).mean().item()
    assert [report.after for report in reports] == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("method", ["statistics", "entropy"])
def test_what_makes_it_worse_is_taken_back(model, method):
    """Samples of one class: its statistics are not those of the domain."""
    x, y = source(seed=1)
    kept = state(model)
    arguments = {"method": method, "held_out": (x, y), "loss": nn.functional.cross_entropy, "return_report": True}
    _, report = normkit.adapt(model, x[y == 0], keep="best", **arguments)
    assert (report.kept, unchanged(model, kept)) == ("old", True)
    assert report.before < report.after
    _, report = normkit.adapt(model, x[y == 0], prior=1e6, keep="new", **arguments)
    if method == "statistics":
        assert report.after == pytest.approx(report.before, rel=1e-2)


@pytest.mark.parametrize("reading", [2, 3, 4, 5], ids=["measuring", "tuning", "collecting", "measuring again"])
def test_an_interruption_takes_everything_back(model, reading):
    class Broken(list):
        readings = 0

        def __iter__(self):
            Broken.readings += 1
            yield self[0]
            if Broken.readings == reading:
                raise KeyboardInterrupt

    kept = state(model)
    with pytest.raises(KeyboardInterrupt):
        normkit.adapt(model, Broken(source(seed=1)[0].split(100)), method="entropy")
    assert unchanged(model, kept)
    assert not any(m.training for m in model.modules())


BATCH = nn.Sequential(nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3)))  # gives no scores
PLAIN = network(lambda n: nn.BatchNorm1d(n, affine=False))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "tent"}, "`method` must be one of 'statistics', 'entropy'; got 'tent'"),
        ({"prior": -1}, "`prior` must be a finite number of at least 0"),
        ({"data": itertools.repeat(torch.ones(4, 6))}, "`data` must be data that can be read several times"),
        ({"model": nn.Linear(6, 4)}, "must hold batch norms with running statistics"),
        (
            {"model": PLAIN, "method": "entropy"},
            "gamma and beta; got none",
        ),
        (
            {"model": BATCH, "method": "entropy"},
            "scores of at least",
        ),
        ({"model": BATCH, "keep": "best"}, "no scores of classes"),
    ],
)
def test_what_cannot_be_adapted(arguments, said):
    given = {"model": network(), "data": source(20)[0], **arguments}
    with pytest.raises(NormError, match=said):
        normkit.adapt(given.pop("model"), given.pop("data"), **given)
