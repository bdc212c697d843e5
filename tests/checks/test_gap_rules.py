"""NK1xx: each finds what was planted, and says nothing of a healthy twin."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from digits import HELD_OUT, LEARN, dense, fit, images, loader, loss, mixture  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402


def checked(model, data=None, **options):
    return normkit.check(model, loader() if data is None else data, show_progress=False, **{"loss": loss, **options})


def codes(found, severity=None):
    return {finding.code for finding in found.findings if severity in (None, finding.severity)}


@pytest.fixture(scope="module")
def healthy():
    """Trained as one should, the rate decayed."""
    return {"dense": fit(dense(), loader(), 9, settle=True), "images": fit(images(), loader(), 6, settle=True)}


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("given", [True, False], ids=["loss", "outputs"])
@pytest.mark.parametrize("kind", ["dense", "images"])
def test_healthy_models_have_no_gap(healthy, kind, given, size):
    for data in (loader(size=size), loader(HELD_OUT, size)):
        found = checked(healthy[kind], data, loss=loss if given else None, select=["NK1"])
        assert found.healthy, found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_batches_alone_are_no_error(size):
    model = fit(dense(), loader(size=size), 1, rate=0.01)
    assert not codes(checked(model, loader(size=size), select=["NK1"]), "error")
    assert not codes(checked(model, loader(size=size), loss=None, select=["NK1"]), "error")


@pytest.mark.parametrize("given", [True, False], ids=["loss", "outputs"])
def test_a_gap_is_an_error_and_layers_are_named(healthy, given):
    model = copy.deepcopy(healthy["images"])
    with torch.no_grad():
        model[4].running_var.mul_(9)  # as if its weights had been scaled afterwards
    found = checked(model, loss=loss if given else None, select=["NK1"])
    assert {"NK101", "NK102"} <= codes(found, "error"), found
    assert {finding.path for finding in found.errors} == {"4"}
    assert "Cause: stale statistics, first at 4." in found.sentence
    assert found.sentence.endswith("Do: normkit.recalibrate(model, data)")
    normkit.recalibrate(model, loader())
    assert checked(model, loss=loss if given else None, select=["NK1"]).healthy


def test_a_single_batch_shows_a_gap(healthy):
    model = copy.deepcopy(healthy["images"])
    with torch.no_grad():
        model[4].running_var.mul_(9)
    found = checked(model, (LEARN[0][:200], LEARN[1][:200]), select=["NK1"])
    assert "NK101" in codes(found, "error")
    assert checked(healthy["images"], (LEARN[0][:200], LEARN[1][:200]), select=["NK1"]).healthy


def test_few_samples_cannot_show_that_statistics_are_stale(healthy):
    """Eight batches of two: means are known to a quarter of a deviation at best.

    What later layers are given is another matter: the norms before them took the statistics of two samples.
    """
    found = checked(healthy["dense"], loader(size=2), select=["NK102"])
    assert "2" not in {finding.path for finding in found.findings}, found


def test_frozen_statistics_are_a_note(healthy):
    model = normkit.freeze(copy.deepcopy(healthy["images"]))
    found = checked(model, loader((1 - LEARN[0], LEARN[1])), select=["NK102"])
    assert codes(found, "info") == {"NK102"}
    assert found.healthy


def test_not_converged():
    model = fit(images(momentum=0.001), loader(), 1)
    assert "NK103" in codes(checked(model, select=["NK103"]))
    normkit.recalibrate(model, loader())
    assert not checked(model, select=["NK103"]).findings


def test_a_new_model_gets_a_note():
    found = checked(images(), select=["NK1"])
    assert [(finding.code, finding.severity) for finding in found.findings] == [("NK104", "info")]
    assert found.healthy


def test_never_trained_statistics(healthy):
    model = copy.deepcopy(healthy["images"])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()  # weights loaded, the buffers not
    found = checked(model, select=["NK1"])
    assert {finding.path for finding in found.findings if finding.code == "NK104"} == {"1", "4", "8"}
    assert "NK104" in codes(found, "error")
    assert "Cause: statistics never trained, first at 1." in found.sentence
    without_data = normkit.check(model, select=["NK104"])
    assert codes(without_data, "error") == {"NK104"}
    assert not normkit.check(healthy["images"], select=["NK104"]).findings


def test_a_momentum_of_0_never_trains():
    model = fit(images(momentum=0.0), loader(), 1)
    found = checked(model, select=["NK104"])
    assert len(found.errors) == 3
    assert "after 38 batches" in found.errors[0].words


def test_a_new_layer_among_trained_ones_is_a_warning(healthy):
    model = copy.deepcopy(healthy["images"])
    model[4] = nn.BatchNorm2d(8)
    found = checked(model, select=["NK104"])
    assert [(finding.path, finding.severity) for finding in found.findings] == [("4", "warning")]


def test_a_model_that_reads_its_batch():
    """Random labels, learned by heart in batches that never change: what is learned is where a sample sits."""
    labels = torch.randint(0, 10, (200,), generator=torch.Generator().manual_seed(0))
    data = loader((LEARN[0][:200], labels), 4, shuffle=False)
    model = fit(dense(), data, 15, rate=0.02)
    found = checked(model, data, select=["NK1"])
    assert {"NK101", "NK105"} <= codes(found, "warning"), found
    assert not found.errors
    assert "Cause: statistics of small batches, which the model leans on, first at 2." in found.sentence
    assert 'normkit.replace(model, {"batch": "renorm"})' in found.sentence
    large = loader((LEARN[0][:200], labels), 50, shuffle=False)
    assert "NK105" not in codes(checked(fit(dense(), large, 15, rate=0.02), large, select=["NK1"]))


def test_dropout_before_batch_norm(healthy):
    model = fit(dense(dropout=0.5), loader(), 3)
    found = checked(model, select=["NK106"])
    first = found.findings[0]
    assert (first.code, first.severity, first.path) == ("NK106", "warning", "4")
    # The first norm is fed by ReLU and dropout: (var + mean^2) / (1 - p) - mean^2 with the moments of the activations.
    with torch.no_grad():
        batches = torch.cat([x for x, _ in list(loader())[:8]])
        active = model[2](model[1](batches.flatten(1))).double()
    var, mean = active.var(0, unbiased=False), active.mean(0)
    living = ((var + mean**2) / 0.5 - mean**2)[var > 1e-5] / var[var > 1e-5]
    expected = living.median().item()
    # 256 draws of dropout per channel: a variance is known to about sqrt(2 / 256) = 9 %, a median over channels better.
    assert first.evidence["ratio"] == pytest.approx(expected, rel=0.1)
    normkit.recalibrate(model, loader())
    assert not checked(model, select=["NK106"]).findings
    behind = nn.Sequential(*healthy["dense"][:-1], nn.Dropout(0.5), healthy["dense"][-1])
    assert not checked(behind, select=["NK106"]).findings


@pytest.mark.parametrize(("size", "said"), [(2, 2.0), (4, 4 / 3), (64, None)])
def test_bessels_factor(healthy, size, said):
    found = checked(healthy["dense"], loader(size=size), select=["NK107"])
    assert {finding.severity for finding in found.findings} <= {"info"}
    assert [finding.evidence["factor"] for finding in found.findings] == ([said] * 3 if said else [])


def test_bessels_factor_is_nothing_to_layers_without_it():
    from normkit.torch import BatchNorm1d

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), BatchNorm1d(8, bessel=False), nn.Linear(8, 10))
    assert not checked(model, loader(size=4), select=["NK107"]).findings


@pytest.mark.parametrize("labelled", [True, False])
def test_batches_of_one_class_each(healthy, labelled):
    sorted_data = mixture(1)
    data = sorted_data if labelled else [(x, torch.zeros(len(x))) for x, _ in sorted_data]
    found = checked(healthy["images"], data, loss=None, select=["NK108"])
    assert codes(found, "info") == {"NK108"}, found
    assert ("classes" if labelled else "inputs") in found.findings[0].words
    assert found.healthy  # data to evaluate on may be sorted
    assert "NK102" not in codes(checked(healthy["dense"], data, loss=None), "error")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [4, 16, 64])
def test_shuffled_batches_are_random_samples(healthy, size, seed):
    order = torch.randperm(len(LEARN[0]), generator=torch.Generator().manual_seed(seed))
    data = loader((LEARN[0][order], LEARN[1][order]), size, shuffle=False)
    for model in healthy.values():
        for given in (data, [(x, None) for x, _ in data]):
            found = checked(model, given, loss=None, select=["NK108"])
            assert not found.findings, found


class Interrupted(nn.Module):
    """Raises in the pass after so many."""

    def __init__(self, model, calls, error):
        super().__init__()
        self.model, self.left, self.error = model, calls, error

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.model(x)


@pytest.mark.parametrize("calls", [2, 10, 18, 26])
@pytest.mark.parametrize("training", [True, False])
def test_control_c_leaves_nothing_changed(calls, training):
    model = Interrupted(fit(dense(momentum=0.5), loader(), 1), calls, KeyboardInterrupt)
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        checked(model, select=["NK1"])
    assert model.left == -1  # it came to the pass that is interrupted
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {module.training for module in model.modules()} == {training}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


class OnlyEvaluates(nn.Module):
    """Fails when it is run in training mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if self.training:
            raise RuntimeError("no training here")
        return self.model(x)


def test_a_model_that_cannot_train_is_looked_at():
    """Also one in which a norm is given a single value, which training refuses."""
    model = OnlyEvaluates(fit(images(momentum=0.001), loader(), 1))
    found = checked(model)
    assert "statistics not converged" in found.sentence
    assert found.skipped["trained calls"] == "RuntimeError: no training here"
    single = loader(size=1)
    found = checked(fit(dense(momentum=0.001), loader(), 1), single)
    assert "NK103" in codes(found)
    assert found.skipped["gap"].startswith("ValueError: Expected more than 1 value per channel")


def test_losses_near_0_do_not_count(healthy):
    """A loss that doubles from nothing, while outputs hardly move, is no gap."""
    found = checked(healthy["images"], loss=lambda y, t: loss(40 * y, t), select=["NK101"])
    assert not found.findings, found


def test_a_loss_that_alone_can_read_the_outputs(healthy):
    class Named(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return Outputs(self.model(x))

    class Outputs:
        def __init__(self, scores):
            self.scores = scores

    model = Named(copy.deepcopy(healthy["images"]))
    with torch.no_grad():
        model.model[4].running_var.mul_(9)
    found = checked(model, loss=lambda y, t: loss(y.scores, t), select=["NK101"])
    assert codes(found, "error") == {"NK101"}
