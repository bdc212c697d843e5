"""Folding a model of NNX gives the same outputs, or says why not; the original stays as it was."""

from __future__ import annotations

import re

import numpy as np
import pytest
from nnx_required import jax, nnx, optax

import normkit
import normkit.nnx as nk
from normkit.errors import NormError
from normkit.nnx import folding, surgery

jnp = jax.numpy
# Of the largest output, the limit for float32: a fold rounds each weight once, 6e-8.
CLOSE = 1e-5
RNG = np.random.default_rng(0)
RNGS = nnx.Rngs(0)
# Few shapes: JAX compiles every operation for each.
C = 4
ROWS, SIGNAL, IMAGE = (2, C), (2, 6, C), (2, 6, 6, C)


def drawn(shape):
    return RNG.normal(size=shape).astype(np.float32)


def randomized(model):
    """Random weights and statistics; gammas of both signs, and one that is 0. In evaluation mode."""
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            value = drawn(variable.shape)
            if path[-1] in ("var", "std"):
                value = np.abs(value) + 0.5
            if path[-1] == "scale":
                value.flat[0] = 0
            variable.set_value(jnp.asarray(value, variable.dtype))
    model.eval()
    return model


def values(model):
    found = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param | nnx.BatchStat))
    return [np.asarray(variable.get_value()) for variable in found]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def check(model, shape=ROWS, changed=None, **options):
    """Fold, compare on the example and elsewhere, and see that the original is bit for bit what it was."""
    randomized(model)
    state, x = values(model), drawn(shape)
    folded, report = normkit.fold(model, x, return_report=True, **options)
    assert report.how == "jaxpr"
    assert same(values(model), state)
    twin = nnx.merge(*nnx.split(folded))
    for inputs in (x, 3 * drawn(shape) + 1):
        before, after = (np.asarray(one(inputs)) for one in (model, twin))
        assert before.shape == after.shape
        assert np.abs(before - after).max() <= CLOSE * np.abs(before).max(), report
    if changed is not None:
        assert len(report.done) == changed, report
    return folded, report


def stays(model, words, shape=ROWS):
    """Nothing is folded, and the report has these words."""
    _, report = check(model, shape, changed=0)
    reasons = "; ".join(edit.reason for edit in report.kept)
    assert words in reasons, reasons


def norms(model):
    return [m for _, m in nnx.iter_modules(model) if "Norm" in type(m).__name__]


def conv(size=(3, 3), outputs=C, **options):
    return nnx.Conv(C, outputs, size, rngs=RNGS, **options)


def transposed(**options):
    return nnx.ConvTranspose(C, C, (2, 2), rngs=RNGS, **options)


def linear(outputs=C, **options):
    return nnx.Linear(C, outputs, rngs=RNGS, **options)


def batch(**options):
    return nnx.BatchNorm(C, rngs=RNGS, **options)


def layer(**options):
    return nnx.LayerNorm(C, rngs=RNGS, **options)


def einsum(text, *shapes):
    return nnx.Einsum(text, *shapes, rngs=RNGS)


def general(inputs, outputs, **options):
    return nnx.LinearGeneral(inputs, outputs, rngs=RNGS, **options)


BEFORE = {
    "conv1d, causal, dilated": (lambda: [conv((2,), padding="CAUSAL", kernel_dilation=2), batch()], SIGNAL),
    "conv2d, no bias, same": (lambda: [conv(use_bias=False), batch()], IMAGE),
    "conv3d, strided": (lambda: [conv((1, 2, 2), strides=2), batch()], (2, 2, 3, 3, C)),
    "grouped": (lambda: [conv(feature_group_count=2), batch()], IMAGE),
    "depthwise, circular": (lambda: [conv(feature_group_count=C, padding="CIRCULAR"), batch()], IMAGE),
    "transposed": (lambda: [conv(strides=2), transposed(strides=(2, 2), use_bias=False), batch(epsilon=0.1)], IMAGE),
    "transposed, kernel likewise": (lambda: [transposed(transpose_kernel=True), batch()], IMAGE),
    "linear, dropout": (lambda: [linear(use_bias=False), nnx.Dropout(0.5, rngs=RNGS), batch()], ROWS),
    "without gamma and beta": (lambda: [linear(), batch(use_bias=False, use_scale=False)], ROWS),
    "general": (lambda: [general(C, (2, 2), use_bias=False), lambda x: x.reshape(-1, C), batch()], ROWS),
    "einsum": (lambda: [einsum("ba,ca->bc", (C, C), (C,)), batch()], ROWS),
    "through a permutation": (lambda: [linear(), lambda x: jnp.moveaxis(x, -1, 1), batch(axis=1)], SIGNAL),
    "ours": (lambda: [linear(), nk.BatchNorm(C, rngs=RNGS)], ROWS),
    "ghost": (lambda: [linear(), nk.GhostBatchNorm(C, virtual_batch_size=2, rngs=RNGS)], ROWS),
    "renorm": (lambda: [linear(), nk.BatchRenorm(C, rngs=RNGS)], ROWS),
    "two in a row": (lambda: [linear(), batch(), batch()], ROWS),
    "frozen": (lambda: [linear(), normkit.freeze(nnx.Sequential(batch())).layers[0]], ROWS),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE)
def test_batch_norm_goes_into_the_map_before_it(case):
    stack, shape = BEFORE[case]
    folded, report = check(nnx.Sequential(*stack()), shape)
    assert not report.kept, report
    assert not norms(folded)


BEHIND = {
    "conv2d, valid": (lambda: [batch(), conv(padding="VALID", use_bias=False)], IMAGE),
    "circular": (lambda: [batch(), conv(padding="CIRCULAR", feature_group_count=2)], IMAGE),
    "padded before it, with values": (
        lambda: [batch(), lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="wrap"), conv((3,), padding=0)], SIGNAL,
    ),
    "1 x 1, same": (lambda: [batch(), conv((1, 1))], IMAGE),
    "linear": (lambda: [batch(), linear(use_bias=False)], ROWS),
    "flattened maps": (
        lambda: [batch(), lambda x: x[:, ::-1].reshape(len(x), -1), nnx.Linear(6 * C, 3, rngs=RNGS)], SIGNAL,
    ),
    "layer norm": (lambda: [layer(), linear(use_bias=False)], ROWS),
    "layer norm, einsum": (lambda: [layer(), einsum("bc,dch->bhd", (3, C, 2))], ROWS),
    "RMS norm, padding": (lambda: [nnx.RMSNorm(C, rngs=RNGS), conv()], IMAGE),
    "RMS norm, transposed": (lambda: [nnx.RMSNorm(C, rngs=RNGS), transposed(transpose_kernel=True)], IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_norms_go_into_the_maps_behind_them(case):
    stack, shape = BEHIND[case]
    folded, report = check(nnx.Sequential(*stack()), shape, changed=1)
    assert not report.kept
    for norm in norms(folded):  # layer, RMS and group norm stay, without gamma and beta
        assert norm.scale is None
        assert norm.use_scale is False
        assert getattr(norm, "bias", None) is None


def test_a_bias_that_is_subtracted_again_goes():
    folded, _ = check(nnx.Sequential(conv((2,)), nnx.InstanceNorm(C, rngs=RNGS), jax.nn.relu), SIGNAL, changed=1)
    assert folded.layers[0].bias is None


def network(call, **parts):
    """A model of these parts, run by a function of it and its input."""
    kind = type("Network", (nnx.Module,), {"__call__": call})
    model = kind()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def residual(model, x):
    h = nnx.relu(model.norm(model.first(x)))
    return h + model.inner[0]["norm"](model.inner[1](h))


def test_residuals_lists_mappings_and_functions_are_followed():
    inner = nnx.List([nnx.Dict(norm=batch()), linear()])
    folded, _ = check(network(residual, first=linear(), norm=batch(), inner=inner), changed=2)
    assert not norms(folded)
    pair = nnx.data([batch(), {"map": linear()}])
    folded, _ = check(network(lambda m, x: m.pair[0](m.pair[1]["map"](x)), pair=pair), changed=1)
    assert not norms(folded)


def test_a_norm_held_twice_goes_everywhere():
    norm = batch()
    folded, _ = check(network(lambda m, x: m.norm(m.map(x)), norm=norm, also=nnx.List([norm]), map=linear()), changed=1)
    assert not norms(folded)
    assert folded.also[0] is folded.norm


@nnx.jit
def compiled(model, x):
    return model.norm(model.first(x))


@nnx.remat
def checkpointed(model, x):
    return model.other(model.last(x))


def test_compiled_and_checkpointed_parts_are_looked_into():
    model = network(
        lambda m, x: checkpointed(m, compiled(m, x)), first=linear(), norm=batch(), last=linear(), other=batch()
    )
    model(drawn(ROWS))  # what JAX keeps of this call knows nothing of the layers
    check(model, changed=2)


def heads(model, x):
    x = model.norm(x)
    q, k, v = (model.maps[name](x) for name in ("query", "key", "value"))
    return model.out(q * k + v)


def test_several_maps_behind_one_norm_and_several_axes():
    maps = nnx.Dict({name: general(C, (2, 2)) for name in ("query", "key", "value")})
    model = network(heads, norm=layer(), maps=maps, out=general((2, 2), C, axis=(-2, -1)))
    _folded, report = check(model, changed=1)
    assert report.done[0].into == tuple(f"maps.{name}.kernel" for name in ("query", "key", "value"))
    behind = network(lambda m, x: m.out(m.norm(x).reshape(2, 2, 2)), norm=batch(), out=general((2, 2), C, axis=(1, 2)))
    check(behind, changed=1)


def branches(model, x):
    return model.norm(jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, model.map(x)))


REFUSED = {
    "the output of linear at map before it is read 2 times": (lambda m, x: m.norm(y := m.map(x)) + y),
    "linear at map has a weight that is used 2 times": (lambda m, x: m.norm(m.map(m.map(x)))),
    "it is called 2 times": (lambda m, x: m.norm(m.norm(m.map(x)))),
    "it is not called as a layer on this example": (lambda m, x: m.map(x)),
    "relu is before it": (lambda m, x: m.norm(nnx.relu(m.map(x)))),
    "dot_general is before it": (lambda m, x: m.norm(x @ m.map.kernel[...])),
    "linear at map has a weight that is used": (lambda m, x: m.norm(m.map(x)) @ m.map.kernel[...].T),
    "norm is called with mask": (lambda m, x: m.norm(m.map(x), mask=np.ones((2, 1), bool))),
    "norm is called with use_running_average=False": (lambda m, x: m.norm(m.map(x), use_running_average=False)),
    "pad before it adds zeros": (lambda m, x: m.norm(jnp.pad(m.map(x), ((1, 1), (0, 0))))),
    "cond is before it": branches,
    "it is not called as a layer": (lambda m, x: jax.vmap(lambda x: m.norm(m.map(x)))(x[None])[0]),
    "norm is also called in a loop, or under jax.vmap": (
        lambda m, x: m.norm(m.map(x)) + jax.vmap(lambda x: m.norm(x))(x[None])[0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_exact_stays(words):
    stays(network(REFUSED[words], map=linear(), norm=batch()), words)


def keeping(model, x):
    y = model.map(x)
    model.seen.set_value(y)
    return model.norm(y)


def test_what_the_model_keeps_for_later_stays():
    stays(network(keeping, map=linear(), norm=batch(), seen=nnx.Intermediate(jnp.zeros(ROWS))), "is read 2 times")


def test_padding_wants_no_shift():
    words = "reach beyond the input"
    stays(nnx.Sequential(batch(), conv()), words, IMAGE)
    stays(nnx.Sequential(batch(), conv((3,), padding=((1, 0),))), words, SIGNAL)
    stays(nnx.Sequential(batch(), conv((2,), padding=0, input_dilation=2)), words, SIGNAL)
    stays(nnx.Sequential(batch(), transposed()), words, IMAGE)


def test_layers_that_compute_otherwise_stay():
    class Mine(nnx.BatchNorm):
        def __call__(self, x, **options):
            return 2 * super().__call__(x, **options)

    stays(nnx.Sequential(conv((3,), mask=np.ones((3, C, C))), batch()), "add at layers.0", SIGNAL)
    stays(nnx.Sequential(nnx.LoRALinear(C, C, lora_rank=2, rngs=RNGS), batch()), "add", ROWS)
    _, report = check(nnx.Sequential(linear(), Mine(C, rngs=RNGS)))
    assert not report.edits


def test_a_weight_that_is_computed_stays():
    normed = nnx.WeightNorm(linear(), rngs=RNGS)
    model = network(lambda m, x: m.norm(m.normed(x)), normed=normed, norm=batch())
    randomized(model)
    _, report = normkit.fold(model, drawn(ROWS), return_report=True)
    assert "inputs" in report.kept[0].reason or "is computed" in report.kept[0].reason


def test_modes():
    model = randomized(nnx.Sequential(linear(), batch(), nnx.Dropout(0.5, rngs=RNGS)))
    model.train()
    with pytest.warns(UserWarning, match=r"nothing was folded; layers.1: it is in training mode: call model.eval\(\)"):
        normkit.fold(model, drawn(ROWS))
    model.layers[1].use_running_average = True
    folded = normkit.fold(model, drawn(ROWS))
    assert not norms(folded)
    assert folded.layers[2].deterministic is model.layers[2].deterministic is False
    asked = network(lambda m, x: m.norm(m.map(x), use_running_average=True), map=linear(), norm=batch())
    randomized(asked).train()
    assert not norms(normkit.fold(asked, drawn(ROWS)))


def test_half_precision_is_tried_in_float32():
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model, x = randomized(nnx.Sequential(linear(**half), batch(**half))), drawn(ROWS)
    folded = normkit.fold(model, x)
    assert not norms(folded)
    assert folded.layers[0].kernel.dtype == jnp.bfloat16
    before, after = (np.asarray(one(x)).astype(np.float64) for one in (model, folded))
    assert np.abs(before - after).max() <= 4 * 2.0**-8 * np.abs(before).max()  # four roundings to 8 bits


def test_in_place_and_named_inputs():
    model = randomized(network(lambda m, x, flag: m.norm(m.map(x)) if flag else x, map=linear(), norm=batch()))
    x, kernel = drawn(ROWS), model.map.kernel
    before = np.asarray(model(x, True))
    assert normkit.fold(model, {"x": x, "flag": True}, inplace=True) is model
    assert model.map.kernel is kernel
    np.testing.assert_allclose(model(x, True), before, rtol=0, atol=CLOSE * np.abs(before).max())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_middle_changes_nothing(monkeypatch, error):
    def broken(*_):
        raise error

    pair = nnx.data([linear(use_bias=False), batch()])
    model = randomized(network(lambda m, x: m.pair[1](m.pair[0](x)), pair=pair))
    state, x = values(model), drawn(ROWS)
    before, held = np.asarray(model(x)), list(model.pair)
    subject = folding.opened(model, x)
    folds = list(normkit.surgery.folding.planned(subject))
    after = surgery.evaluated
    monkeypatch.setattr(surgery, "evaluated", broken)
    with pytest.raises(error):
        subject.finish(folds, inplace=True, optimizer=None)
    monkeypatch.setattr(surgery, "evaluated", after)
    assert same(values(model), state)
    assert all(one is other for one, other in zip(model.pair, held, strict=True))
    assert model.pair[0].bias is None
    assert model.pair[0].use_bias is False
    np.testing.assert_array_equal(model(x), before)


def test_what_a_trial_shows_to_differ_stays(monkeypatch):
    right = folding._Opened.apply

    def wrong(self, model, folds):
        right(self, model, folds)
        if any(fold.site.path == "layers.1" for fold in folds):
            kernel = model.layers[0].kernel
            kernel.set_value(kernel.get_value() * 1.001)

    monkeypatch.setattr(folding._Opened, "apply", wrong)
    folded, report = check(nnx.Sequential(linear(), batch(), linear(), batch()), changed=1)
    assert report.kept[0].path == "layers.1"
    assert "folded, the outputs change by" in report.kept[0].reason
    assert len(norms(folded)) == 1


def test_classes_are_left_as_they_were():
    calls = [kind.__call__ for kind in (nnx.Linear, nnx.BatchNorm, nnx.Sequential)]
    check(nnx.Sequential(linear(), batch()), changed=1)
    assert calls == [kind.__call__ for kind in (nnx.Linear, nnx.BatchNorm, nnx.Sequential)]


def test_errors():
    model, x = randomized(nnx.Sequential(linear(), batch())), drawn(ROWS)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(NormError, match=re.escape("`optimizer` must be None for NNX") + ".*make a new nnx.Optimizer"):
        normkit.fold(model, x, optimizer=optimizer)
    with pytest.raises(NormError, match="JAX can trace"):
        normkit.fold(network(lambda m, x: m.map(x) if float(x.sum()) < 9e9 else x, map=linear()), x)
    with pytest.raises(NormError, match="must take the inputs it is given"):
        normkit.fold(network(lambda m, x: m.map(x), map=linear()), (x, x))
    assert "fold Sequential: 1 edits" in str(normkit.fold(model, x, dry_run=True))
