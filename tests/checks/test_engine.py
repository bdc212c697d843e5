"""The options of `normkit.check`: what may be given, what is left out, and what a newcomer gives instead."""

from __future__ import annotations

import pickle

import pytest

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks.engine import chosen  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402

ONLY = ["NK101", "NK102", "NK103"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def arrays(count=64, shift=0.0):
    rng = np.random.default_rng(0)
    return rng.normal(shift, 1, (count, 3)).astype("float32"), rng.integers(0, 2, count)


def stale():
    """Statistics of other data, of which no first value is left."""
    model = network()
    for _ in range(60):  # 0.9^60 is below 1 %
        model(torch.from_numpy(arrays(shift=9.0)[0]))
    return model


def check(model, data=None, **options):
    return normkit.check(model, data, **{"select": ONLY, **options})


def codes(found):
    return [finding.code for finding in found.findings]


def test_rules_are_chosen_by_codes_and_their_beginnings():
    assert [rule.code for rule in chosen(["NK102"])] == ["NK102"]
    family = {rule.code for rule in chosen(["NK1"])}
    assert family == {code for code in RULES if code.startswith("NK1")}
    assert {rule.code for rule in chosen(["NK1"], ["NK102"])} == family - {"NK102"}
    assert len(chosen()) == len(RULES)


def test_a_limit_of_the_user_decides():
    model = stale()
    assert "NK102" in codes(check(model, arrays()))
    assert "NK102" not in codes(check(model, arrays(), limits={"NK102": {"share": 1.0}}))


@pytest.mark.parametrize(("patterns", "left_out"), [(["1"], True), (["*"], True), (["0", "backbone.*"], False)])
def test_what_is_allowed_at_a_path_is_counted_and_left_out(patterns, left_out):
    found = check(stale(), arrays(), allow={"NK102": patterns})
    assert ("NK102" in codes(found)) != left_out
    assert [finding.code for finding in found.allowed] == ["NK102"] * left_out
    assert ("allowed: NK102" in str(found)) == left_out


def test_a_loss_by_name_is_that_loss():
    x, y = arrays()
    named = check(stale(), (x, y), loss="cross_entropy")
    given = check(stale(), (x, y), loss=lambda outputs, y: nn.functional.cross_entropy(outputs, y.long()))
    assert named.gap == given.gap
    assert named.gap.measure == "loss"
    assert check(stale(), (x, y)).gap.measure == "outputs"


def test_arrays_are_cut_as_asked():
    whole = check(stale(), arrays(70))
    cut = check(stale(), arrays(70), batch_size=32)
    assert (whole.gap.batches, cut.gap.batches) == (1, 3)
    assert check(stale(), arrays(70), batch_size=32, steps=2).gap.batches == 2


def test_a_model_without_norms():
    found = check(nn.Linear(3, 2), arrays())
    assert found.sentence == "no normalization layer found in Linear"
    assert found.healthy


def test_a_model_on_another_device_is_given_the_data_there():
    found = check(network().double(), arrays())  # no accelerator is at hand: another type stands for another place
    assert found.gap is not None


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((nn.Linear,), {}, "got the class Linear"),
        ((3,), {}, "a model must be a torch.nn.Module"),
        ((network(), "data.npz"), {}, "`data` must be an array, a tensor, or an iterable of batches; got str"),
        ((network(), iter([arrays()])), {}, "must be data that can be read several times"),
        ((network(), arrays()), {"loss": "cross entropy"}, "did you mean cross_entropy?"),
        ((network(), arrays()), {"loss": nn.CrossEntropyLoss}, "an instance, CrossEntropyLoss()"),
        ((network(), arrays()), {"loss": 3}, "`loss` must be a function, or one of cross_entropy, mse, mae; got 3"),
        ((network(), arrays()[0]), {"loss": "cross_entropy"}, "`data` must hold targets for the loss cross_entropy"),
        ((network(), arrays()), {"steps": 0}, "`steps` must be a whole number of at least 1; got 0"),
        ((network(), [arrays()]), {"batch_size": 8}, "`batch_size` is for data that is an array"),
        ((network(), arrays()), {"forward": "model"}, "`forward` must be a function"),
        ((network(), arrays()), {"optimizer": torch.optim.SGD}, "`optimizer` must be a torch.optim.Optimizer"),
        ((network(), arrays()), {"select": "NK102"}, "`select` must hold codes of rules; got 'NK102'"),
        ((network(), arrays()), {"select": ["NK012"]}, "did you mean NK"),
        ((network(), arrays()), {"ignore": ["X"]}, "`ignore` must hold codes of rules, or their beginnings; got 'X'"),
        ((network(), arrays()), {"limits": ["NK102"]}, "`limits` must be a mapping"),
        ((network(), arrays()), {"limits": {"NK109": {}}}, "rules that there are; got 'NK109'"),
        ((network(), arrays()), {"limits": {"NK102": {"shar": 1}}}, "did you mean share"),
        ((network(), arrays()), {"limits": {"NK102": {"share": "much"}}}, "share must be a finite number; got 'much'"),
        ((network(), arrays()), {"allow": {"NK102": "conv1"}}, "`allow` of NK102 must be a list of patterns"),
        ((network(), arrays()), {"allow": {"NK999": ["*"]}}, "`allow` must hold codes of rules"),
    ],
)
def test_what_a_newcomer_gives_instead(arguments, options, said):
    with pytest.raises(normkit.NormError) as raised:
        check(*arguments, **options)
    assert said in str(raised.value)


def test_a_loss_that_fails_leaves_everything_as_it_was():
    model, before = network(), network().state_dict()
    failing = iter([True, False, True])

    def loss(outputs, y):
        if next(failing):
            return outputs.sum()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:  # while it is held, so are the frames of what failed
        check(model, arrays(), loss=loss, batch_size=16)
    assert raised
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    del raised
    assert torch.is_grad_enabled()


def test_a_diagnosis_can_be_kept_without_its_model():
    found = check(stale(), arrays())
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    with pytest.raises(normkit.NormError, match="a diagnosis must be of this process"):
        again.fix()
