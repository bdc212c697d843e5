"""NK6xx: every rule finds its planted fault, and is silent on the healthy twin."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import normkit  # noqa: E402
import normkit.torch as nt  # noqa: E402
from normkit.checks.evidence import Call  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402

images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def found(code, model, data=images, **arguments):
    """The findings of one rule."""
    torch.manual_seed(0)
    return normkit.check(model, data, select=[code], steps=2, **arguments).findings


def paths(code, model, data=images, **arguments):
    return [finding.path for finding in found(code, model, data, **arguments)]


class Calls(nn.Module):
    """A model of parts and a function that calls them."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


# -- NK601 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nt.GhostBatchNorm2d(4, virtual_batch_size=4), nn.InstanceNorm2d(4), nn.GroupNorm(4, 4)]
)
def test_a_redundant_bias(norm):
    (finding,) = found("NK601", nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()))
    assert finding.path == "0"
    assert finding.severity == "info"
    assert finding.fix.line == "bias=False"
    assert not found("NK601", nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU()))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nt.LayerNorm2d(4), nt.RMSNorm2d(4)])
def test_a_bias_that_other_norms_do_not_subtract(norm):
    assert not found("NK601", nn.Sequential(nn.Conv2d(3, 4, 3), norm))


def test_a_bias_that_something_else_reads_or_changes_is_needed():
    def parts(**more):
        return {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), **more}

    assert not found("NK601", Calls(lambda m, x: (h := m.conv(x)) + m.norm(h), **parts()))
    assert not found("NK601", nn.Sequential(*parts(act=nn.ReLU()).values())[::2])
    assert not found("NK601", Calls(lambda m, x: m.norm(m.conv(x).relu()), **parts()))
    assert not found("NK601", Calls(lambda m, x: m.norm(m.drop(m.conv(x))), **parts(drop=nn.Dropout(0.5))))
    assert paths("NK601", Calls(lambda m, x: m.norm(m.drop(m.conv(x))), **parts(drop=nn.Dropout(0.0)))) == ["conv"]
    tied = Calls(lambda m, x: m.norm(m.conv(x)) + m.conv(x[..., :1, :1].expand_as(x)), **parts())
    assert not found("NK601", tied)
    frozen = normkit.freeze(nn.Sequential(*parts().values()))
    assert not found("NK601", frozen)


def test_channels_are_followed_through_changes_of_shape():
    rows = torch.randn(8, 6, 5)
    model = Calls(lambda m, x: m.norm(m.map(x).transpose(1, 2)), map=nn.Linear(5, 4), norm=nn.BatchNorm1d(4))
    assert paths("NK601", model, rows) == ["map"]
    model = Calls(lambda m, x: m.norm(m.map(x).permute(0, 2, 1)), map=nn.Linear(5, 4), norm=nn.BatchNorm1d(4))
    assert paths("NK601", model, rows) == ["map"]
    model = Calls(lambda m, x: m.norm(m.map(x).flatten(0, 1)), map=nn.Linear(5, 4), norm=nn.BatchNorm1d(4))
    assert paths("NK601", model, rows) == ["map"]
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.BatchNorm1d(4))
    assert paths("NK601", model) == ["0"]
    # Statistics of a position are over the channels: their mean is not the bias of each.
    positions = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(6))
    assert not found("NK601", positions, rows)
    mixed = nn.Sequential(nn.Conv2d(3, 4, 7), nn.Flatten(), nn.BatchNorm1d(16))
    assert not found("NK601", mixed)


# -- NK602 ------------------------------------------------------------------------------------------------------------


def test_a_doubled_norm():
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4))
    (finding,) = found("NK602", first)
    assert (finding.path, finding.severity) == ("3", "warning")
    assert finding.fix.line == 'model = normkit.remove(model, "3")'
    repaired = normkit.remove(first, "3")
    assert not found("NK602", repaired)
    (note,) = found("NK602", nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)))
    assert note.severity == "info"


def test_norms_in_a_row_that_do_different_things():
    assert not found("NK602", nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    assert not found("NK602", nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3)))
    assert not found("NK602", nn.Sequential(nn.LayerNorm(8), nn.BatchNorm2d(3)))
    both = Calls(lambda m, x: (h := m.a(x)) + m.b(h), a=nn.LayerNorm(8), b=nn.LayerNorm(8))
    assert not found("NK602", both)
    turned = Calls(lambda m, x: m.b(m.a(x).transpose(2, 3)), a=nn.LayerNorm(8), b=nn.LayerNorm(8))
    assert not found("NK602", turned)


# -- NK603 ------------------------------------------------------------------------------------------------------------


def stack(without=()):
    layers = []
    for number in range(5):
        layers += [nn.Conv2d(3 if number == 0 else 4, 4, 3, padding=1)]
        layers += [] if number in without else [nn.BatchNorm2d(4)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(4, 2, 3))


def test_a_norm_is_missing_among_siblings():
    model = stack(without=[2])
    (finding,) = found("NK603", model)
    assert finding.severity == "info"
    assert isinstance(model.get_submodule(finding.path), nn.Conv2d)
    assert finding.words == "no norm behind this conv2d; 4 of 5 have one"
    scope = {"normkit": normkit, "model": model, "x": images}
    exec(finding.fix.line, scope)
    assert not found("NK603", scope["model"])


@pytest.mark.parametrize("without", [(), (1, 2, 3), (4,)], ids=["none", "most", "head"])
def test_no_norm_is_missing(without):
    assert not found("NK603", stack(without))


def test_gates_and_branches_need_no_norm():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = stack()[:6]
            self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
            self.branch, self.back = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            x = self.body(x)
            x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x)).relu()
            return x + self.back(self.branch(x).relu())

    assert not found("NK603", Block())


# -- NK604 ------------------------------------------------------------------------------------------------------------


def dropped(p, between=None, kind=nn.Dropout):
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), kind(p), between or nn.Identity(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_in_front_of_batch_norm(kind):
    (finding,) = found("NK604", dropped(0.5, kind=kind))
    assert (finding.path, finding.severity) == ("5", "info")
    assert finding.evidence["dropout"] == "2"
    assert finding.evidence["p"] == 0.5
    assert finding.evidence["ratio"] > 1.1


def test_dropout_that_does_not_matter():
    assert not found("NK604", dropped(0.0))
    assert not found("NK604", dropped(0.001))  # measured: the variance stays
    assert not found("NK604", dropped(0.5, between=nn.GroupNorm(2, 4)))
    assert not found("NK604", nn.Sequential(*list(dropped(0.5))[:-1], nt.GroupNorm(2, 4)))
    behind = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3))
    assert not found("NK604", behind)


# -- NK605 ------------------------------------------------------------------------------------------------------------


def test_layer_norm_along_the_width_of_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.LayerNorm(8), nn.Conv2d(4, 2, 3))
    (finding,) = found("NK605", model)
    assert (finding.path, finding.severity) == ("2", "warning")
    assert finding.words == "normalizes axis 3 of 8 x 4 x 8 x 8 as channels; those of conv2d are on axis 1"
    assert finding.fix.line == "normkit.torch.LayerNorm2d(4)"
    model[2] = nt.LayerNorm2d(4)
    assert not found("NK605", model)


def test_layer_norm_in_front_of_a_convolution():
    assert paths("NK605", nn.Sequential(nn.LayerNorm(8), nn.Conv2d(3, 2, 3))) == ["0"]


def test_batch_norm_over_positions():
    rows = torch.randn(8, 4, 5)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU())
    (finding,) = found("NK605", model, rows)
    assert (finding.path, finding.severity) == ("1", "warning")
    moved = Calls(lambda m, x: m.norm(m.map(x).transpose(1, 2)), map=nn.Linear(5, 4), norm=nn.BatchNorm1d(4))
    assert not found("NK605", moved, rows)
    # Six positions and four features: who writes 6 means positions.
    assert not found("NK605", nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(6)), torch.randn(8, 6, 5))


def test_layouts_that_are_meant():
    spectrogram = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm(6))
    assert [f.severity for f in found("NK605", spectrogram, torch.randn(4, 3, 9, 6))] == ["info"]
    square = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))  # 8 of 8 x 8
    assert not found("NK605", square)
    last = Calls(
        lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1)), conv=nn.Conv2d(3, 8, 3, padding=1), norm=nn.LayerNorm(8)
    )
    assert not found("NK605", last)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm([4, 8, 8]))
    assert not found("NK605", whole)
    tokens = nn.Sequential(nn.LayerNorm(5), nn.Conv1d(6, 6, 1))  # mixes the positions, as a gated MLP does
    assert not found("NK605", tokens, torch.randn(4, 6, 5))


# -- NK606 ------------------------------------------------------------------------------------------------------------

lengths = (16, 12, 8, 5, 16, 7, 9, 3)


def sequences(fill=0.0, left=False):
    x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(1))
    for row, length in zip(x, lengths, strict=True):
        row[:, length:] = fill
    return x.flip(2) if left else x


def network(*norms):
    layers = []
    for number, norm in enumerate(norms):
        layers += [nn.Conv1d(3 if number == 0 else 4, 4, 3, padding=1), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(4, 2, 1))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_in_the_statistics(left):
    findings = found(
        "NK606", network(nn.BatchNorm1d(4), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4)), sequences(left=left)
    )
    # Behind a convolution with a bias padding is constant, but for the border.
    assert [finding.path for finding in findings] == ["1", "4", "7"]
    assert all(finding.severity == "warning" for finding in findings)
    share = 1 - sum(lengths) / (8 * 16)
    assert share - 0.15 < findings[0].evidence["share"] < share  # a kernel of 3 reaches one position further


def test_no_padding():
    model = network(nn.BatchNorm1d(4), nn.InstanceNorm1d(4))
    assert not found("NK606", model, torch.randn(8, 3, 16))
    assert not found("NK606", network(nt.LayerNorm2d(4), nt.LayerNorm2d(4)), sequences())
    masked = Calls(
        lambda m, x: m.norm(m.conv(x), mask=(x != 0).any(1)), conv=nn.Conv1d(3, 4, 3, padding=1), norm=nt.BatchNorm1d(4)
    )
    assert not found("NK606", masked, sequences())


def test_padded_tokens():
    torch.manual_seed(0)
    tokens = torch.randint(1, 20, (8, 16))
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    model = Calls(lambda m, x: m.norm(m.embed(x).transpose(1, 2)), embed=nn.Embedding(20, 4), norm=nn.BatchNorm1d(4))
    assert paths("NK606", model, tokens) == ["norm"]
    assert not found("NK606", model, torch.randint(1, 4, (8, 16)))  # neighbours that are alike by chance


RECORD = NormRecord("batch", (2,), 1, 1e-5)


def measured(x, **arguments):
    return Call.of(np.asarray(x, dtype=np.float32), RECORD, 0, "float32", **arguments)


def test_what_counts_as_padding():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2, 10))
    x[0, :, 4:], x[1, :, 6:] = 1.0, 1.0
    assert measured(x).padded == pytest.approx(10 / 40)
    assert measured(x[:, :, ::-1]).padded == pytest.approx(10 / 40)
    x[0, 1, 9] = 5.0  # the border of a convolution that pads with zeros
    assert measured(x).padded == pytest.approx(9 / 40)
    x[:] = 1.0  # the same everywhere: a dead layer
    assert measured(x).padded == 0.0
    x = rng.normal(size=(4, 2, 10))
    x[0, 0, 4:] = 1.0  # one channel alone
    assert measured(x).padded == 0.0
    assert measured(x[:1]).padded == 0.0
    assert measured(x[:, :, :1]).padded == 0.0
    assert measured(x[:, :, 0]).padded == 0.0
