"""Weight decay in front of batch norm acts through the rate alone: exact statements, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from normkit.errors import NormError
from normkit.experiments.conditions import Conditions
from normkit.experiments.protocol import Setup
from normkit.torch import training
from normkit.torch.decay import decayed, shrinking
from normkit.torch.models import build, weighted_layers

LR, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 0.03, 50
# Rounding of 1e-16 grows in 50 steps of such a network; 1e-8 is far below any other reason to differ.
SAME = {"rtol": 0, "atol": 1e-8}


def network(norm="batch"):
    """In float64, with an epsilon that is nothing beside any variance, so that the scale of weights does not matter."""
    made = build(
        "mlp", shape=(6,), classes=3, norm=norm, position="before", steps=STEPS, seed=0, conditions=Conditions(depth=3)
    ).double()
    for module in made.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-30
    return made


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield (
            torch.randn(16, 6, dtype=torch.float64, generator=generator),
            torch.randint(3, (16,), generator=generator),
        )


def outputs(made, optimizer):
    """What the network says of every batch, in training mode, before the step on it."""
    said = []
    for x, y in batches():
        out = made(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
        said.append(out.detach())
    return torch.stack(said).numpy()


def scaled(norm, factor):
    """Hidden weights times `factor`, their rate times its square."""
    made = network(norm)
    weights = [layer.weight for layer in weighted_layers(made)[:-1]]
    with torch.no_grad():
        for weight in weights:
            weight *= factor
    others = [p for p in made.parameters() if all(p is not w for w in weights)]
    groups = [{"params": others}, {"params": weights, "lr": LR * factor**2}]
    return made, torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)


@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0])
def test_weights_and_rate_scaled_together_give_the_same_function(factor):
    """arXiv:1706.05350: only rate / |w|² counts."""
    first, second = (scaled("batch", value) for value in (1.0, factor))
    np.testing.assert_allclose(outputs(*second), outputs(*first), **SAME)
    for a, b in zip(weighted_layers(first[0])[:-1], weighted_layers(second[0])[:-1], strict=True):
        np.testing.assert_allclose(b.weight.detach() / factor, a.weight.detach(), **SAME)


def test_without_norm_they_do_not():
    first, second = (outputs(*scaled("none", value)) for value in (1.0, 0.5))
    assert np.abs(first - second).max() > 0.1


def trained(norm, decay, as_rate=False):
    made = network(norm)
    return made, outputs(made, decayed(made, LR, MOMENTUM, decay, as_rate=as_rate))


def test_a_growing_rate_does_what_decay_does():
    """And the weights are those of the decay, divided by a^t."""
    (one, with_decay), (other, with_rate) = (trained("batch", DECAY, as_rate) for as_rate in (False, True))
    np.testing.assert_allclose(with_rate, with_decay, **SAME)
    grown = shrinking(LR, MOMENTUM, DECAY) ** -STEPS
    assert grown > 2
    for a, b in zip(weighted_layers(one)[:-1], weighted_layers(other)[:-1], strict=True):
        np.testing.assert_allclose(b.weight.detach(), grown * a.weight.detach(), rtol=1e-6, atol=1e-9)
    assert np.abs(trained("batch", 0.0)[1] - with_decay).max() > 0.1  # decay does something all the same


def test_without_norm_it_does_not():
    first, second = (trained("none", DECAY, as_rate)[1] for as_rate in (False, True))
    assert np.abs(first - second).max() > 0.1


def test_decay_is_that_of_sgd_on_hidden_weights_alone():
    made = network()
    before = copy.deepcopy(made.state_dict())
    optimizer = decayed(made, LR, 0.0, DECAY)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    hidden = {id(layer.weight) for layer in weighted_layers(made)[:-1]}
    assert len(hidden) == 3
    for name, parameter in made.named_parameters():
        factor = 1 - LR * DECAY if id(parameter) in hidden else 1
        torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_shrinking_is_what_weights_without_gradients_do(momentum):
    """The recurrence itself, run: the ratio of two steps tends to it."""
    before = now = 1.0
    for _ in range(4000):
        before, now = now, (1 + momentum - LR * DECAY) * now - momentum * before
    assert now / before == pytest.approx(shrinking(LR, momentum, DECAY), rel=1e-12)


def setup(**changes):
    values = {
        "model": "mlp", "shape": (6,), "classes": 3, "norm": "batch", "position": "before", "lr": LR,
        "momentum": MOMENTUM, "loss": "cross_entropy", "optimizer": "sgd", "metric": "accuracy", "seed": 0, "steps": 10,
    }  # fmt: skip
    return Setup(**{**values, **changes})


def test_a_trainer_decays_as_its_conditions_say():
    plain = training.trainer(setup(conditions=Conditions(weight_decay=DECAY)))
    assert [group["weight_decay"] for group in plain.optimizer.param_groups] == [0, DECAY]
    growing = training.trainer(setup(conditions=Conditions(weight_decay=DECAY, decay_as="rate")))
    assert [group["weight_decay"] for group in growing.optimizer.param_groups] == [0, 0]
    assert growing.optimizer.param_groups[1]["lr"] > LR


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "adam", "conditions": Conditions(weight_decay=DECAY)}, "must be asked of the optimizer sgd"),
        ({"conditions": Conditions(weight_decay=0.06, decay_as="rate")}, "must be at most 0.0527 at rate 0.05"),
    ],
)
def test_decay_that_cannot_be_had_is_refused(changes, said):
    with pytest.raises(NormError, match=said):
        training.trainer(setup(**changes))


def test_a_growing_rate_needs_a_decay_to_stand_for():
    with pytest.raises(NormError, match="must come with a `weight_decay` above 0"):
        Conditions(decay_as="rate")
