"""Norms of a model of NNX become other norms, or go, with everything carried over that both have."""

from __future__ import annotations

import numpy as np
import pytest
from nnx_required import jax, nnx

import normkit
import normkit.nnx as nk
from normkit.errors import NormError
from normkit.nnx import replacement
from normkit.nnx.factory import GroupNorm, Identity
from normkit.nnx.states import FrozenParam, is_frozen

C = 4
X = np.random.default_rng(0).normal(size=(2, 6, C)).astype(np.float32)
RNGS = nnx.Rngs(0)


class Network(nnx.Module):
    """A norm in an attribute, one in a list, and one that is held twice."""

    def __init__(self, kind=nnx.BatchNorm, **options):
        self.first, self.norm = nnx.Linear(C, C, rngs=RNGS), kind(C, rngs=RNGS, **options)
        self.inner = nnx.List([nnx.LayerNorm(C, rngs=RNGS), nnx.Dict(again=nnx.RMSNorm(C, rngs=RNGS))])
        self.held = nnx.data([self.inner[0]])
        rng = np.random.default_rng(1)
        for _path, variable in nnx.iter_graph(self):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                drawn = rng.uniform(0.5, 1.5, size=variable.shape)
                variable.set_value(jax.numpy.asarray(drawn, variable.dtype))

    def __call__(self, x):
        return self.inner[1]["again"](self.held[0](self.norm(self.first(x))))


def output(model):
    twin = nnx.merge(*nnx.split(model), copy=True)
    twin.eval()
    return np.asarray(twin(X))


def close(one, other):
    # Both compute in float32; some operations round otherwise.
    return np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_statistics_go_over_and_evaluation_stays():
    model = Network()
    before = output(model)
    other, report = normkit.replace(model, {"batch": "ghost"}, example=X, return_report=True)
    assert type(other.norm) is nk.GhostBatchNorm
    assert report.difference < 1e-6
    assert close(before, output(other))
    back = normkit.replace(normkit.replace(other, {"norm": "renorm"}), {"renorm": "batch"})
    assert type(back.norm) is nk.BatchNorm
    assert close(before, output(back))
    assert type(model.norm) is nnx.BatchNorm
    np.testing.assert_array_equal(output(model), before)


def test_any_norm_takes_gamma_and_beta():
    model = Network()
    other, report = normkit.replace(
        model, {"batch": "group", nnx.LayerNorm: "rms", "rms": "instance"}, groups=2, example=X, return_report=True
    )
    assert [type(layer).__name__ for layer in (other.norm, other.inner[0], other.inner[1]["again"])] == [
        "GroupNorm", "RMSNorm", "InstanceNorm",
    ]  # fmt: skip
    assert other.norm.num_groups == 2
    for old, new in ((model.norm, other.norm), (model.inner[0], other.inner[0])):
        np.testing.assert_array_equal(old.scale.get_value(), new.scale.get_value())
    np.testing.assert_array_equal(model.norm.bias.get_value(), other.norm.bias.get_value())
    assert other.held[0] is other.inner[0]
    assert report.difference == pytest.approx(
        np.abs(output(model) - output(other)).max() / np.abs(output(model)).max(), rel=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"axis": 1, "epsilon": 0.1, "use_bias": False, "momentum": 0.5}])
def test_accelerated_gives_ours_with_the_same_numbers(options):
    model = Network() if not options else network_of(nnx.BatchNorm(6, rngs=RNGS, **options))
    before = output(model)
    other = normkit.replace(model, accelerated=True)
    assert close(before, output(other))
    kinds = [type(layer) for _, layer in nnx.iter_modules(other) if "Norm" in type(layer).__name__]
    assert kinds
    assert all(kind.__module__ == "normkit.nnx.layers" for kind in kinds)
    mine, its = (jax.tree.leaves(nnx.state(one)) for one in (model, other))
    assert all(np.array_equal(a, b) for a, b in zip(mine, its, strict=True))
    for name in ("momentum", "epsilon", "axis", "use_bias"):
        old, new = (one.norm for one in (model, other))
        assert getattr(old, name) == getattr(new, name)
    with pytest.raises(NormError, match="it is ours already"):
        normkit.replace(other, accelerated=True)


def network_of(norm):
    kind = type("Small", (nnx.Module,), {"__call__": lambda model, x: model.norm(x)})
    model = kind()
    model.norm = norm
    return model


def test_modes_and_freezing_stay():
    model = normkit.freeze(Network(), affine=True)
    model.norm.use_running_average = False
    for other in (normkit.replace(model, {"batch": "renorm"}), normkit.replace(model, accelerated=True)):
        assert is_frozen(other.norm)
        assert isinstance(other.norm.scale, FrozenParam)
        assert close(output(model), output(other))
        normkit.unfreeze(other)
        assert other.norm.use_running_average is False
    model = Network()
    model.eval()
    assert normkit.replace(model, {"batch": "ghost"}).norm.use_running_average is True


def test_types_stay():
    half = jax.numpy.bfloat16
    model = network_of(nnx.BatchNorm(C, dtype=half, param_dtype=half, rngs=RNGS))
    norm = normkit.replace(model, {"batch": "layer"}).norm
    assert (norm.dtype, norm.param_dtype, norm.scale.dtype) == (half, half, half)
    assert normkit.replace(model, {"batch": "renorm"}).norm.std.dtype == np.float32


def test_a_function_may_make_the_layer():
    made = Identity()
    model = normkit.replace(Network(), {"norm": lambda record: made})
    assert model.norm is made
    with pytest.raises(NormError, match=r"must give an nnx\.Module"):
        normkit.replace(Network(), {"norm": lambda record: 1})


def test_remove():
    model = Network()
    other, report = normkit.remove(model, ["batch", "held.0"], example=X, return_report=True)
    assert type(other.norm) is type(other.inner[0]) is type(other.held[0]) is Identity
    expected = np.asarray(model.inner[1]["again"](model.first(X)))
    assert close(output(other), expected)
    assert report.difference > 0.01
    assert normkit.remove(model, "rms", inplace=True) is model
    assert type(model.inner[1]["again"]) is Identity


def test_rows_and_channels_first():
    def small(*given, **options):
        model = network_of(nnx.BatchNorm(C, rngs=RNGS))
        return normkit.replace(model, *given, **options, example=X[0])

    assert small({"batch": "group"}, groups=2).norm.num_groups == 2
    with pytest.raises(NormError, match="instance norm needs axes"):
        small({"batch": "instance"})
    first = network_of(nnx.BatchNorm(6, axis=1, rngs=RNGS))
    layer = normkit.replace(first, {"batch": "layer"}).norm
    assert (layer.reduction_axes, layer.feature_axes) == (1, 1)
    with pytest.raises(NormError, match="channels last"):
        normkit.replace(first, {"batch": "group"}, groups=2)
    with pytest.raises(NormError, match="channels last"):  # the axis of a group norm of ours counts
        normkit.replace(network_of(GroupNorm(C, axis=1, rngs=RNGS)), {"group": "group"})


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_middle_changes_nothing(monkeypatch, error):
    model = Network()
    before = output(model), list(nnx.iter_modules(model))
    calls, place = [], replacement.place

    def broken(*given):
        calls.append(given)
        if len(calls) == 2:
            raise error
        place(*given)

    monkeypatch.setattr(replacement, "place", broken)
    with pytest.raises(error):
        normkit.remove(model, ["batch", "layer"], inplace=True)
    after = list(nnx.iter_modules(model))
    assert all(one is other for (_, one), (_, other) in zip(before[1], after, strict=True))
    np.testing.assert_array_equal(output(model), before[0])


def test_errors():
    model = Network()
    with pytest.raises(NormError, match="`optimizer` must be None for NNX"):
        normkit.replace(model, {"batch": "group"}, optimizer=object())
    with pytest.raises(NormError, match="every entry of `which` must mean a layer"):
        normkit.remove(model, "instance")
    for verb in (normkit.sync, normkit.unsync):
        with pytest.raises(
            NormError, match=r"a torch\.nn\.Module; got a model of nnx\. hint: make the layers with `axis_name=`"
        ):
            verb(model)
    with pytest.raises(NormError, match="a norm that can be replaced"):
        normkit.replace(network_of(nk.BatchNorm(C, rngs=RNGS)), accelerated=True)
    report = normkit.replace(model, {"batch": "group"}, dry_run=True)
    assert [edit.path for edit in report.done] == ["norm"]
    assert "make a new one" in str(report)
