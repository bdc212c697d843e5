"""NK5xx: planted faults are found, their healthy twins are not, end to end and on evidence made by hand."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import normkit  # noqa: E402
import normkit.torch as nk  # noqa: E402
from normkit.checks.evidence import Evidence, Layer, Step, apart  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402


def call(model, x):
    """A forward pass of the user's: the flow of data, which takes longest to read, is not looked at."""
    return model(x)


def batches(size=32):
    return list(torch.randn(3, size, 4, generator=torch.Generator().manual_seed(0)).unbind())


def findings(model, code, data=None):
    return normkit.check(model, data or batches(), select=[code], forward=call).findings


class Block(nn.Module):
    """One norm, called `times` on the same input, or once under checkpointing."""

    def __init__(self, norm, times=1, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.times, self.reentrant = nn.Linear(4, 4), norm, times, reentrant

    def forward(self, x):
        h = self.linear(x)
        if self.reentrant is not None and torch.is_grad_enabled():
            return checkpoint(self.norm, h, use_reentrant=self.reentrant)
        return sum(self.norm(h) for _ in range(self.times))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_twice(reentrant):
    model = Block(nn.BatchNorm1d(4), reentrant=reentrant)
    (finding,) = findings(model, "NK501")
    assert (finding.severity, finding.path) == ("warning", "norm")
    assert finding.evidence["updates"] == 2
    assert finding.evidence["calls in the backward pass"] == 1
    # What a step really does: a rate of 0.1, twice.
    assert finding.evidence["acts as"] == pytest.approx(0.19)
    x = batches()[0]
    model(x).sum().backward()
    torch.testing.assert_close(model.norm.running_mean, 0.19 * model.linear(x).mean(0))
    # The remedy, and our layers from the start, count once; so does an average over all batches.
    assert finding.fix.line == "normkit.replace(model, accelerated=True)"
    assert not findings(eval(finding.fix.line, {"normkit": normkit, "model": model}), "NK501")
    for norm in (nk.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)):
        assert not findings(Block(norm, reentrant=reentrant), "NK501")


def test_the_other_remedy_is_exact():
    model = Block(nn.BatchNorm1d(4), reentrant=False)
    (finding,) = findings(model, "NK501")
    exec(finding.fix.others[0], {"model": model})
    x = batches()[0]
    model(x).sum().backward()
    # The line is written with four digits.
    torch.testing.assert_close(model.norm.running_mean, 0.1 * model.linear(x).mean(0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nk.BatchNorm1d(4)], ids=["torch", "ours"])
def test_a_second_call_on_the_same_input(norm):
    (finding,) = findings(Block(norm, times=3), "NK501")
    assert finding.evidence["updates"] == 3
    assert "it is called again on the same input" in finding.words
    assert finding.fix.arguments == {"path": "norm", "value": pytest.approx(1 - 0.9 ** (1 / 3))}
    assert not findings(Block(norm), "NK501")
    assert not findings(normkit.freeze(Block(norm, times=3)), "NK501")
    assert not findings(Block(nn.LayerNorm(4), times=3), "NK501")


class Twins(nn.Module):
    """One norm, or two, for two inputs that are `shift` deviations apart."""

    def __init__(self, shift, own=False):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)] if own else [nn.BatchNorm1d(4)] * 2)
        self.shift = shift

    def forward(self, x):
        first, second = x.chunk(2)
        return torch.cat([self.norms[0](first), self.norms[1](second + self.shift)])


def test_one_norm_for_two_distributions():
    (finding,) = findings(Twins(2.0), "NK502", [torch.cat([x, -x]) for x in batches(400)])
    assert (finding.severity, finding.path) == ("warning", "norms.0")
    # Means of 400 normal values are off by 1 / 20, their difference (here of x and -x) by 2 / 20, over 4 channels.
    assert finding.evidence["spread"] == pytest.approx(2.0, abs=0.2)
    assert finding.fix.line == "torch.nn.ModuleList(copy.deepcopy(model.norms[0]) for _ in range(2))"
    assert not findings(Twins(2.0, own=True), "NK502")
    assert not findings(normkit.freeze(Twins(2.0)), "NK502")


@pytest.mark.parametrize("size", [4, 8, 16, 20, 64])
def test_two_views_of_one_distribution_are_healthy(size):
    assert not findings(Twins(0.0), "NK502", batches(size))


def test_shared_norms_explain_a_gap():
    model = Twins(6.0)
    for x in batches() * 20:
        model(x)
    sentence = normkit.check(model, batches(), forward=call).sentence
    assert "Cause: one norm for several distributions, first at norms.0" in sentence


def test_the_distance_of_means_is_that_of_two_in_deviations():
    rng = np.random.default_rng(0)
    mean, std, shift = rng.normal(size=64), rng.uniform(1, 3, 64), 1.5
    means = np.stack([mean, mean + shift * std])
    assert apart(means, np.stack([std**2] * 2), 0.0, 0.0) == pytest.approx(shift)
    # What samples would do by chance is taken out: here all of it.
    assert apart(means, np.stack([std**2] * 2), (shift * std) ** 2 / 2, 0.0) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("updates", "distinct", "rate", "expected"), [(4, 2, 0.1, 1), (2, 2, 0.1, 0), (0, 0, 0.1, 0), (2, 1, 0.0, 0)]
)
def test_by_hand_updates_against_inputs(updates, distinct, rate, expected):
    record = NormRecord("batch", (4,), 1, 1e-5, rate=rate, kept={"mean": np.zeros(4), "var": np.ones(4)})
    step = Step({"norm": updates}, {"norm": distinct}, frozenset(["norm"]))
    seen = Evidence("torch", "Net", (Layer("norm", "BatchNorm1d", record),), step=step)
    assert len(RULES["NK501"](seen)) == expected
