"""`normkit.check`: what it says first, what it leaves untouched, what it refuses."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import normkit  # noqa: E402

loss = nn.functional.cross_entropy


def data(batches=6, size=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 3, 8, 8, generator=generator) * 0.2 + 0.7
    y = (x.mean((1, 2, 3)) > 0.7).long()
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 2),
    )


def trained(model, batches, epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model, optimizer


def test_a_healthy_model_is_told_so():
    model, optimizer = trained(network(), data())
    normkit.recalibrate(model, data())
    found = normkit.check(model, data(), optimizer=optimizer, loss=loss)
    assert found.sentence.startswith("no normalization problem found in 1 layer, "), found


def test_the_sentence_names_cause_layer_and_remedy():
    model, _ = trained(network(momentum=0.001), data())
    found = normkit.check(model, data(), loss=loss)
    assert found.sentence.startswith("eval is worse than train on the same 6 batches (loss ")
    assert "Cause: statistics not converged: 98 % of the initial value left, first at 1." in found.sentence
    assert found.sentence.endswith("Do: normkit.recalibrate(model, data)")
    assert not found.healthy
    normkit.recalibrate(model, data())
    assert normkit.check(model, data(), loss=loss).healthy


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model, optimizer = trained(network(), data())
    model.train(training)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*data(), strict=True))), 16, shuffle=True
    )
    loss(model(data()[0][0]), data()[0][1]).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    normkit.check(model, loader, optimizer=optimizer, loss=loss)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.long
def test_a_resnet_50_takes_under_20_seconds_of_cpu():
    """Four batches of 16 images of 112 x 112: 10 s on one core of an AVX-512 machine."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10))
    batches = [(torch.randn(16, 3, 112, 112), torch.randint(10, (16,))) for _ in range(4)]
    begun = time.process_time()
    found = normkit.check(model, batches, loss=lambda outputs, targets: loss(outputs.logits, targets))
    assert time.process_time() - begun < 20
    assert found.layers == 53
    assert not found.errors
