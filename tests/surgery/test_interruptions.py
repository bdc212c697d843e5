"""Every verb that changes a model in place, interrupted at every call of a layer: the model is as it was."""

import itertools

import pytest
import torch
from architectures import randomized
from torch import nn

import normkit
from normkit import torch as ours
from normkit.errors import NormError

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5)
        self.middle, self.flat, self.head = nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2)

    def forward(self, x):
        return self.head(self.flat(self.middle(self.drop(self.norm(self.conv(x)))).relu()))


def batch():
    return randomized(Net(nn.BatchNorm2d(4)))


def none():
    return randomized(Net(nn.Identity()))


VERBS = {
    "insert": (none, lambda m, o: normkit.insert(m, "batch", X, init="identity", inplace=True, optimizer=o)),
    "replace": (batch, lambda m, o: normkit.replace(m, {"batch": "group"}, example=X, inplace=True, optimizer=o)),
    "remove": (batch, lambda m, o: normkit.remove(m, "batch", example=X, inplace=True, optimizer=o)),
    "fold": (batch, lambda m, o: normkit.fold(m, X, inplace=True, optimizer=o)),
    "unsync": (
        lambda: randomized(Net(ours.SyncBatchNorm(4))),
        lambda m, o: normkit.unsync(m, example=X, inplace=True, optimizer=o),
    ),
    "recalibrate": (batch, lambda m, o: normkit.recalibrate(m, [X, 2 * X], held_out=X)),
    "recalibrate, exact": (batch, lambda m, o: normkit.recalibrate(m, [X, 2 * X], exact=True, held_out=X)),
    "adapt": (batch, lambda m, o: normkit.adapt(m, [X, 2 * X], held_out=X)),
}


def seen(model, optimizer):
    """All that could be left behind, objects by their identity."""
    tensors = [*model.state_dict(keep_vars=True).items()]
    return (
        [(path, type(m), id(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
         for path, m in model.named_modules()],
        [(name, id(t), t.requires_grad, t.detach().clone().tolist()) for name, t in tensors],
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        {id(p) for p in optimizer.state},
        torch.get_rng_state().tolist(),
    )  # fmt: skip


CASES = [(verb, KeyboardInterrupt) for verb in VERBS] + [("replace", RuntimeError), ("recalibrate", RuntimeError)]


@pytest.mark.parametrize(("verb", "error"), CASES)
def test_interrupted_at_any_call_of_a_layer_a_model_is_as_it_was(verb, error):
    build, change = VERBS[verb]
    left = itertools.count()
    fails_at = -1

    def told(*_):
        if next(left) == fails_at:
            raise error("in the middle")

    interrupted = 0
    for fails_at in itertools.count():  # `told` reads it
        model, left = build(), itertools.count()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(X).sum().backward()
        optimizer.step()
        model.zero_grad()
        model.flat.register_forward_hook(told)
        before = seen(model, optimizer)
        try:
            change(model, optimizer)
        except (error, NormError, UserWarning):  # where reading the model fails, it says what it could not see
            interrupted += 1
            assert seen(model, optimizer) == before
        if next(left) <= fails_at:
            break
    assert interrupted >= 2
    assert seen(model, optimizer) != before, "in the end it is done"
