"""`normkit.show`: the numbers against NumPy written by hand, against layers, and the text against snapshots."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normkit
import normkit.torch as nk
from normkit.core.catalog import CATALOG
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError, NormTypeError, NormValueError
from normkit.teaching.examples import CAMPAIGNS, HOUSEHOLDS, IMAGES

SNAPSHOTS = Path(__file__).parent / "snapshots"
EPS = 1e-5
# Sums of a few values in float64, against the same in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WRITTEN = 0.005 + 1e-9  # two decimals
RNG = np.random.default_rng(0)


def by_hand(name):
    """(x, mean, variance, normalized) of an example, each in the shape of x, without anything of the package."""
    x, over = {
        "batch": (CAMPAIGNS.x, (0,)),
        "layer": (HOUSEHOLDS.x, (1,)),
        "instance": (IMAGES.x, (2, 3)),
        "group": (IMAGES.x.reshape(2, 2, 2, 2, 2), (2, 3, 4)),
    }[name]
    mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    normalized = (x - mean) / np.sqrt(var + EPS)
    full = normkit.show(name).walk.x.shape
    return tuple(np.broadcast_to(a, x.shape).reshape(full) for a in (x, mean, var, normalized))


@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group"])
def test_the_text_is_that_of_the_snapshot(name):
    path = SNAPSHOTS / f"{name}.txt"
    assert f"{normkit.show(name)}\n" == path.read_text(), f"look at it, then: normkit explain {name} --numbers > {path}"


@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group"])
def test_the_numbers_of_the_snapshot_are_right(name):
    """Read back from the file: a wrong snapshot fails, whatever the code says."""
    text = (SNAPSHOTS / f"{name}.txt").read_text()
    x, mean, var, normalized = by_hand(name)
    _, shared, moments, steps, *_ = re.split(r"\n\n(?=\d\. )", text)
    letters = np.array(re.findall(r"\b[A-H]\b", shared.split("\n\n")[1])).reshape(x.shape)
    rows = {row[0]: row for row in (line.split() for line in moments.split("\n\n")[1].splitlines()[1:])}
    for index in np.ndindex(x.shape):
        count, average, variance, std = map(float, rows[letters[index]][-4:])
        same = x[letters == letters[index]]
        assert count == same.size
        np.testing.assert_allclose([same.mean(), same.var()], [mean[index], var[index]], **CLOSE)
        np.testing.assert_allclose([average, variance], [mean[index], var[index]], atol=WRITTEN)
        np.testing.assert_allclose(std, np.sqrt(var[index] + EPS), atol=WRITTEN)
    table = steps.split("\n\n")[1].splitlines()[2:]
    width = x[0].size if x.ndim == 2 else x[0, 0].size
    values = np.array([line.split()[-3 * width :] for line in table]).astype(float)
    np.testing.assert_allclose(
        values, np.hstack([a.reshape(-1, width) for a in (x, normalized, normalized)]), atol=WRITTEN
    )


def test_the_example_of_four_campaigns():
    own = normkit.show("batch").walk
    assert [(s.mean, s.var) for s in own.statistics] == [(3, 3.5), (200, 200)]
    np.testing.assert_allclose(own.steps[1].values, [[-1.07, 0], [-0.53, 1.41], [0, -1.41], [1.60, 0]], atol=0.005)
    mean, var = own.kept
    np.testing.assert_allclose(mean.after, [0.3, 20], **CLOSE)
    np.testing.assert_allclose(var.after, 0.9 + 0.1 * np.array([3.5, 200]) * 4 / 3, **CLOSE)
    np.testing.assert_allclose(own.evaluation, [[0.60, 34.3]], atol=0.05)
    np.testing.assert_allclose(own.undo.gamma, np.sqrt([3.5 + EPS, 200 + EPS]), **CLOSE)
    np.testing.assert_allclose(own.undo.beta, [3, 200], **CLOSE)


def test_layer_norm_reads_every_row_by_itself():
    seen = normkit.show("layer")
    np.testing.assert_allclose(seen.y[0], seen.y[1], atol=1e-5)  # the same habits; eps counts a little more for half
    alone = normkit.show("layer", HOUSEHOLDS.x[1:2])
    np.testing.assert_array_equal(alone.y[0], seen.y[1])


@pytest.mark.parametrize("name", CATALOG)
def test_every_normalizer_can_be_shown(name, tmp_path):
    seen = normkit.show(name)
    assert seen.walk.steps[0].name == "x"
    assert seen.walk.steps[-1].name == "y"
    assert all(np.isfinite(step.values).all() for step in seen.walk.steps)
    text = str(seen)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert bool(seen.walk.kept) == bool(CATALOG[name].tracked) == ("Running values" in text)
    plain = json.loads(seen.save(tmp_path / "a.json").read_text())
    np.testing.assert_array_equal(plain["steps"][-1]["values"], seen.y)
    page = seen.save(tmp_path / "a.html").read_text()
    assert seen.walk.statistics == () or "<svg" in page
    assert seen._repr_html_() in page
    assert seen.save(tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", [name for name in CATALOG if normkit.show(name).walk.undo is not None])
@pytest.mark.parametrize("x", [None, RNG.normal(3, 2, (4, 4, 3, 2))], ids=["example", "random"])
def test_undoing_gives_x_back(name, x):
    undo, own = normkit.show(name, x).walk.undo, normkit.show(name, x).walk
    assert undo.reached.any()
    # eps is inside of gamma; what is left is rounding, of values up to 220.
    np.testing.assert_allclose(undo.y[undo.reached], own.x[undo.reached], rtol=1e-10, atol=1e-10)
    # Given to a new layer of the same kind, gamma and beta do the same.
    beta = undo.beta if CATALOG[name].center else None
    again = normkit.show(name, own.x, gamma=undo.gamma, beta=beta)
    np.testing.assert_allclose(again.y, undo.y, rtol=1e-10, atol=1e-10)


def test_what_gamma_and_beta_cannot_undo():
    batch, layer, ghost, group = (normkit.show(name).walk.undo.reached for name in ("batch", "layer", "ghost", "group"))
    assert batch.all()
    assert layer.tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert ghost.tolist() == [[True, True], [True, True], [False, False], [False, False]]
    assert group[0].all()
    assert not group[1].any()


ROWS, IMAGE, SEQUENCE = (5, 4), (3, 4, 2, 3), (2, 3, 4)
LAYERS = [
    (lambda: nn.BatchNorm1d(4), ROWS),
    (lambda: nn.BatchNorm1d(4, momentum=None), ROWS),
    (lambda: nn.BatchNorm2d(4, affine=False), IMAGE),
    (lambda: nk.BatchNorm2d(4, bessel=False, momentum=0.3), IMAGE),
    (lambda: nk.GhostBatchNorm1d(4, virtual_batch_size=2), ROWS),
    (lambda: nk.BatchRenorm1d(4, schedule=RenormSchedule(2, 1, start=0, r_end=4, d_end=4)), ROWS),
    (lambda: nn.InstanceNorm2d(4), IMAGE),
    (lambda: nk.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    (lambda: nn.GroupNorm(2, 4), IMAGE),
    (lambda: nn.LayerNorm(4), SEQUENCE),
    (lambda: nn.LayerNorm((3, 4)), SEQUENCE),
    (lambda: nk.LayerNorm2d(4), IMAGE),
    (lambda: nk.RMSNorm(4, eps=1e-6, gain="1+w"), SEQUENCE),
    (lambda: nk.RMSNorm2d(4), IMAGE),
    (lambda: nk.FilterResponseNorm(4), IMAGE),
    (lambda: nk.FilterResponseNorm(4, learn_eps=True), IMAGE),
    (lambda: nk.EvoNormB0(4, momentum=0.3), IMAGE),
    (lambda: nk.EvoNormB0(4, momentum=None, bessel=False), IMAGE),
    (lambda: nk.EvoNormS0(4, groups=2), IMAGE),
    (lambda: nk.DynamicTanh(4), SEQUENCE),
    (lambda: nk.DynamicTanh((3, 4)), SEQUENCE),
    (lambda: nk.DynamicTanh(4, channels_last=False), IMAGE),
    (lambda: nk.GlobalResponseNorm(4, channels_last=False), IMAGE),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS, ids=lambda v: str(v()) if callable(v) else "x".join(map(str, v)))
def test_a_layer_computes_what_is_shown(make, shape):
    torch.manual_seed(0)
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    x, earlier = torch.randn(2, *shape, dtype=torch.float64) + 1
    layer(earlier)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()  # the mode does not matter
    seen = normkit.show(layer, x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    # The kernels' float64 rounding, over values up to some tens.
    np.testing.assert_allclose(seen.y, layer.train()(x).detach(), rtol=1e-9, atol=1e-9)
    for one in seen.walk.kept:
        np.testing.assert_allclose(one.after, getattr(layer, f"running_{one.name}"), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(seen.walk.evaluation, layer.eval()(x[:1]).detach(), rtol=1e-9, atol=1e-9)


def test_channels_on_the_last_axis():
    layer = nk.GlobalResponseNorm(4).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    np.testing.assert_allclose(normkit.show(layer, x).y, layer(x).movedim(-1, 1).detach(), rtol=1e-9)


def test_parameters_of_its_own_are_said():
    layer = nk.DynamicTanh(2)
    nn.init.constant_(layer.alpha, 0.25)
    assert "gamma = 1, beta = 0, alpha = 0.25" in str(normkit.show(layer, CAMPAIGNS.x)).replace("\n   ", " ")


def test_a_layer_that_is_known_by_its_numbers():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    x = torch.tensor([[3.0, 4.0, 5.0]])
    seen = normkit.show(Norm(), x)
    assert seen.walk.subject.title == "Norm: rms norm of 3"
    np.testing.assert_allclose(seen.y, Norm()(x).detach(), rtol=1e-6)  # the layer computes in float32


def test_batch_norm_that_keeps_nothing():
    seen = normkit.show(nn.BatchNorm1d(2, track_running_stats=False), CAMPAIGNS.x)
    assert "a sample depends on the others" in " ".join(str(seen).split())
    np.testing.assert_array_equal(seen.walk.evaluation, seen.y[:1])


def test_evaluation_long_after_the_start():
    layer = nn.BatchNorm1d(2)
    layer.num_batches_tracked.fill_(1000)
    text = str(normkit.show(layer, CAMPAIGNS.x))
    assert "averages over many batches" in text
    assert "wrong" not in text


def test_m_is_said_for_tables_and_images():
    assert "for images (N, C, H, W) it is N*H*W" in str(normkit.show("batch"))
    assert "the samples times the positions, 2 * 2 * 2: for images N*H*W, not N." in str(
        normkit.show("batch", IMAGES.x)
    )


def test_large_batches_are_cut_to_what_can_be_read():
    text = str(normkit.show("batch", RNG.normal(size=(32, 20, 5, 5))))
    assert "Shown are the first 8 x 8 x 8 of 32 x 20 x 25 values." in text
    assert "The first 16 of 20." in text
    assert len(text.splitlines()) < 200


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("bach",), {}, "did you mean batch"),
        ((3,), {}, "a model must be a torch.nn.Module"),
        ((nn.Linear(2, 2), [[1, 2]]), {}, "`layer` must be a norm layer, or a name of the catalog; got Linear"),
        ((nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), [[1, 2]]), {}, "the norms of this model are 1"),
        ((nk.EvoNormS0(4, groups=2, apply_act=False), IMAGES.x), {}, "must have its v"),
        ((nk.FilterResponseNorm(3), IMAGES.x), {}, "axis 1 of the input must have length 3"),
        ((nn.BatchNorm1d(2),), {}, "`x` must be a batch for the layer"),
        ((nk.FrozenBatchNorm2d(2), IMAGES.x), {}, "must take statistics of its input in training"),
        ((nn.BatchNorm1d(3), CAMPAIGNS.x), {}, "axis 1 of the input must have length 3"),
        ((nn.BatchNorm1d(2), CAMPAIGNS.x), {"gamma": 2}, "a layer has its own values"),
        (("batch", [[1, 2], [3]]), {}, "`x` must be numbers, every row as many"),
        (("batch", [["a", "b"]]), {}, "`x` must be numbers"),
        (("batch", []), {}, "`x` must hold a batch of values"),
        (("batch", [[1.0, np.nan], [1.0, 2.0]]), {}, "`x` must be finite; got 1 values that are not"),
        (("batch", [[1.0, 2.0]]), {}, "a statistic must have at least 2 values; got 1"),
        (("instance", CAMPAIGNS.x), {}, "a statistic must have at least 2 values; got no axes `*s`"),
        (("batch", [1.0, 2.0]), {}, "the input must have axes `n c *s`"),
        (("group", IMAGES.x), {"groups": 3}, "must be divisible by 3"),
        (("batch", IMAGES.x), {"groups": 2}, "`groups` must be left out"),
        (("group", IMAGES.x), {"groups": "2"}, "`groups` must be None or a whole number"),
        (("ghost", IMAGES.x), {"virtual_batch_size": 1}, "at least 2"),
        (("batch", IMAGES.x), {"gamma": [1, 2]}, "`gamma` must be one number, or one for each of 4; got 2"),
        (("batch", IMAGES.x), {"beta": "b"}, "`beta` must be numbers"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, said):
    with pytest.raises((NormTypeError, NormValueError)) as caught:
        normkit.show(*arguments, **options)
    assert isinstance(caught.value, NormError)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_endings_that_cannot_be_written():
    with pytest.raises(NormValueError, match=r"must end in .txt, .json, .html or .svg; got 'a.pdf'"):
        normkit.show("batch").save("a.pdf")
