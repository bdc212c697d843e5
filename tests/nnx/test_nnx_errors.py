"""Bad arguments and inputs: what must hold, what came, what to do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from nnx_required import jnp, nnx

import normkit.nnx as nk
from normkit.core.constraints import Flag, Integer, OneOf, Optional, Real
from normkit.errors import MissingExtraError, NormTypeError, NormValueError

X = np.ones((4, 5, 6), np.float32)
ALL = {
    nk.BatchNorm: {},
    nk.GhostBatchNorm: {},
    nk.BatchRenorm: {},
    nk.LayerNorm: {},
    nk.RMSNorm: {},
    nk.InstanceNorm: {},
    nk.GroupNorm: {"num_groups": 3},
}
TRACKING = (nk.BatchNorm, nk.GhostBatchNorm, nk.BatchRenorm)
ARGUMENTS = {
    "num_features": (Integer(1), tuple(ALL)),
    "epsilon": (Real(0.0), tuple(ALL)),
    "momentum": (Optional(Real(0.0, 1.0)), TRACKING),
    "nonfinite": (OneOf(("skip", "update")), TRACKING),
    "bessel": (Flag(), TRACKING[:2]),
    "debiased": (Flag(), TRACKING[:2]),
    "use_bias": (Flag(), tuple(kind for kind in ALL if kind is not nk.RMSNorm)),
    "use_scale": (Flag(), tuple(ALL)),
    "use_running_average": (Optional(Flag()), TRACKING),
    "virtual_batch_size": (Integer(2), (nk.GhostBatchNorm,)),
    "num_groups": (Integer(1), (nk.GroupNorm,)),
}
BAD = [
    (kind, name, value, constraint.words())
    for name, (constraint, kinds) in ARGUMENTS.items()
    for kind in kinds
    for value in constraint.bad()
    if not (name == "num_groups" and value is None)
]


@pytest.mark.parametrize(("kind", "name", "value", "words"), BAD, ids=lambda v: getattr(v, "__name__", str(v)))
def test_bad_arguments(kind, name, value, words):
    options = {"num_features": 6, **ALL[kind], name: value}
    with pytest.raises((NormValueError, NormTypeError)) as caught:
        kind(**options, rngs=nnx.Rngs(0))
    assert str(caught.value).startswith(f"{kind.__name__}: `{name}` must be ")
    assert words in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_groups": 4}, r"`num_features` must be divisible by `num_groups`; got 6 and 4\. hint: num_groups=6"),
        ({}, r"`num_features` must be divisible by `num_groups`; got 6 and 32"),
        ({"num_groups": None, "group_size": 4}, r"divisible by `group_size`; got 6 and 4"),
        ({"num_groups": None}, r"one of `num_groups` and `group_size` must be given"),
        ({"num_groups": 3, "group_size": 2}, r"one of .* must be given; got num_groups=3, group_size=2\. hint"),
    ],
)
def test_groups(options, words):
    with pytest.raises(NormValueError, match=words):
        nk.GroupNorm(6, **options, rngs=nnx.Rngs(0))


def test_schedule():
    with pytest.raises(NormTypeError, match="`schedule` must be a normkit RenormSchedule; got 3"):
        nk.BatchRenorm(6, schedule=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ALL)
def test_unknown_arguments(kind):
    with pytest.raises(TypeError, match="'epsilom'"):
        kind(6, **ALL[kind], epsilom=1.0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="'rngs'"):
        kind(6, **ALL[kind])


@pytest.mark.parametrize("kind", ALL)
def test_bad_inputs(kind):
    layer = kind(6, **ALL[kind], rngs=nnx.Rngs(0))
    name = kind.__name__
    with pytest.raises(
        NormValueError, match=rf"{name}: the input must have 6 features on axis 2; got shape \(4, 5, 3\)"
    ):
        layer(X[..., :3])
    with pytest.raises(NormTypeError, match=f"{name}: the input must be real; got complex64"):
        layer(X.astype(np.complex64))
    with pytest.raises(NormTypeError, match=f"{name}: `mask` must be boolean; got int32. hint: True marks real data"):
        layer(X, mask=jnp.ones((4, 5, 6), jnp.int32))
    with pytest.raises(NormValueError, match=rf"{name}: `mask` must broadcast to the input's shape \(4, 5, 6\)"):
        layer(X, mask=np.ones((4, 7, 6), dtype=bool))
    if kind not in (nk.LayerNorm, nk.RMSNorm):
        with pytest.raises(NormValueError, match=rf"{name}: `sample_weight` must be finite and >= 0; got"):
            layer(X, sample_weight=np.array([1.0, -1.0, 1.0, 1.0]))
        with pytest.raises(NormValueError, match=r"or to \(4, 5\) without its features; got shape \(3,\)"):
            layer(X, sample_weight=np.ones(3))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (nk.BatchNorm, {"axis": 3}, r"`axis` must be axes of the input; got 3 of 3 axes"),
        (nk.BatchNorm, {"axis": "a"}, r"`axis` must be axes of the input; got 'a' of 3 axes"),
        (nk.LayerNorm, {"reduction_axes": None}, r"`reduction_axes` must be axes of the input; got None of 3 axes"),
        (nk.LayerNorm, {"reduction_axes": (True, -1)}, r"`reduction_axes` must be axes of the input; got \(True, -1\)"),
        (nk.LayerNorm, {"reduction_axes": (1, -4)}, r"`reduction_axes` must be axes of the input; got \(1, -4\)"),
        (nk.RMSNorm, {"feature_axes": 5}, r"`feature_axes` must be axes of the input; got 5 of 3 axes"),
        (nk.InstanceNorm, {"feature_axes": 0}, r"the samples must be on axis 0; got features on axes \(0,\)"),
        (nk.GhostBatchNorm, {"axis": 0}, r"the samples must be on axis 0; got the features, axis=0"),
        (nk.GroupNorm, {"num_groups": 3, "reduction_axes": (1,)}, r"`reduction_axes` must include the last axis"),
    ],
)
def test_bad_axes(kind, options, words):
    features = 4 if options in ({"axis": 0}, {"feature_axes": 0}) else 6
    with pytest.raises(NormValueError, match=rf"{kind.__name__}: {words}"):
        kind(features, **options, rngs=nnx.Rngs(0))(X)


@pytest.mark.parametrize("package", ["flax", "jax"])
def test_missing_framework(package):
    code = f"""
import sys
sys.modules[{package!r}] = None
try:
    import normkit.nnx
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.strip()
    assert said == f"{MissingExtraError.__name__} normkit.nnx needs JAX and Flax. hint: pip install 'normkit[nnx]'"


@pytest.mark.parametrize(("wanted", "code", "said"), [("", 0, "skipped"), ("keras,nnx", 2, "error")])
def test_tests_without_the_framework(tmp_path, wanted, code, said):
    """Without Flax these tests are skipped by name, or fail where NORMKIT_REQUIRE asks for them."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['flax'] = None\n")
    here = __file__.rsplit("test_nnx_errors", 1)[0]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{here}test_nnx_right.py"],
        capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(tmp_path), "NORMKIT_REQUIRE": wanted},
    )  # fmt: skip
    assert said in done.stdout
    assert done.returncode == (5 if code == 0 else code), done.stdout
    if not wanted:
        assert "normkit.nnx is not tested: import of flax halted" in done.stdout
