"""`CheckOnce` in a plain loop, in Lightning and in Keras; `assert_healthy` in a test."""

from __future__ import annotations

import logging
import sys
import types

import pytest

torch = pytest.importorskip("torch")
from test_engine import ONLY, arrays, network, stale  # noqa: E402

from normkit.checks.callback import CheckOnce  # noqa: E402
from normkit.errors import NormError, NormRuntimeError  # noqa: E402
from normkit.testing import assert_healthy  # noqa: E402


def test_once_after_so_many_steps_and_the_training_goes_on_as_it_would():
    def trained(callback):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(1, 5):
            optimizer.zero_grad()
            (model(torch.randn(32, 3)) ** 2).mean().backward()
            optimizer.step()
            callback(model, step)
        return model.state_dict()

    seen = []
    callback = CheckOnce(arrays(), after=2, select=["NK203"])
    states = [
        trained(lambda model, step: None),
        trained(lambda m, s: (callback(m, s), seen.append(callback.diagnosis))),
    ]
    assert [found is not None for found in seen] == [False, True, True, True]
    assert seen[1] is seen[3]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_what_is_found_is_a_warning_or_ends_the_training(caplog):
    with pytest.warns(UserWarning, match="step 20: "):
        CheckOnce(arrays(), select=ONLY)(stale(), 20)
    with pytest.raises(NormRuntimeError, match=r"step 1: .*stale statistics|step 1: "):
        CheckOnce(arrays(), after=1, on_error="raise", select=ONLY)(stale(), 1)
    with caplog.at_level(logging.INFO, "normkit"):
        CheckOnce(arrays(), after=1, select=["NK203"])(network(), 3)
    assert caplog.messages == ["step 3: no normalization problem found in 1 layer, 1 rule"]


@pytest.mark.parametrize("options", [{"after": 0}, {"on_error": "exit"}])
def test_wrong_arguments(options):
    with pytest.raises(NormError):
        CheckOnce(arrays(), **options)


def test_as_a_callback_of_lightning(monkeypatch):
    class Callback:
        """Hooks that do nothing, as Lightning's class has them."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise AssertionError("not replaced")

    monkeypatch.setitem(sys.modules, "lightning.pytorch", types.SimpleNamespace(Callback=Callback))
    callback = CheckOnce(arrays(), after=3, select=["NK203"])
    hook = callback.as_lightning()
    assert isinstance(hook, Callback)
    for step in (1, 2, 3):
        assert callback.diagnosis is None
        hook.on_train_batch_end(types.SimpleNamespace(global_step=step), network(), None, None, step)
    assert callback.diagnosis is not None
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(NormError, match="needs lightning, which is not installed"):
        callback.as_lightning()


def test_a_model_without_mistakes_is_healthy_and_another_fails_the_test():
    assert_healthy(network(), arrays(), select=["NK203"])
    with pytest.raises(AssertionError, match="kept statistics are not those of the data"):
        assert_healthy(stale(), arrays(), select=ONLY)
