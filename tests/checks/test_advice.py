"""`normkit.advise`: every line it proposes runs, and every command it ends with is one."""

from __future__ import annotations

import inspect
import shlex

import pytest
import typer.main
from frameworks import importable

import normkit
from normkit.checks.cases import CASES, DATA, FEW, LINES, REMARKS
from normkit.cli.app import app
from normkit.core.algebra import remaining
from normkit.errors import NormError
from normkit.experiments.config import Variant

SIZES = (1, 4, FEW - 1, FEW, 256)
SHAPES = {"images": (4, 3, 8, 8), "sequence": (4, 5, 64), "table": (4, 16)}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("size", SIZES)
def test_there_is_a_case_for_everything(data, size):
    for framework in ("torch", "keras", "nnx"):
        advice = normkit.advise(batch_size=size, data=data, framework=framework)
        assert advice.line == LINES[data, advice.norm, framework]
        assert advice.evidence
        assert advice.sentence in str(advice)
        assert advice.compare in str(advice)
        if advice.norm == "batch":
            assert size >= FEW


def test_small_batches_never_get_batch_norm_and_sequences_always_layer_norm():
    assert {normkit.advise(batch_size=size, data="sequence").norm for size in SIZES} == {"layer"}
    assert normkit.advise(batch_size=4, data="images").norm == "group"
    assert normkit.advise(batch_size=4, data="table").norm == "layer"


def test_the_table_has_no_dead_entries():
    assert {name for case in CASES for name in case.remarks} == set(REMARKS)
    assert {(case.data, case.norm) for case in CASES} == {key[:2] for key in LINES}


def parsed(command):
    """The arguments of a command as the command line reads them."""
    program, verb, *arguments = shlex.split(command)
    assert program == "normkit"
    found = typer.main.get_command(app).commands[verb]
    return found.make_context(verb, arguments).params


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.data}-{case.norm}")
def test_the_command_is_one(case):
    advice = normkit.advise(batch_size=case.at_least, data=case.data, framework="keras", name="my net.py:build")
    given = parsed(advice.compare)
    assert given["model"] == "my net.py:build"
    assert given["batch_sizes"] == str(case.at_least)
    assert given["framework"] == "keras"
    assert [Variant.parse(norm).label for norm in given["norms"].split(",")] == [case.norm, *case.others]


@pytest.mark.parametrize("key", [key for key in LINES if key[2] == "torch"], ids="-".join)
def test_lines_of_pytorch_run(key):
    torch = pytest.importorskip("torch")
    names = {"nn": torch.nn, "normkit": normkit, "torch": torch}
    exec(LINES[key], names)
    x = torch.randn(SHAPES[key[0]])
    assert names["block"](x).shape[0] == len(x)
    normkit_name = key[1]
    kinds = {"batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm"}
    assert any(kinds[normkit_name] in type(module).__name__ for module in names["block"].modules())


@pytest.mark.parametrize("key", [key for key in LINES if key[2] == "nnx"], ids="-".join)
def test_lines_of_nnx_run(key):
    if not importable("normkit.nnx"):
        pytest.skip("flax is not installed")
    import jax.numpy as jnp
    from flax import nnx

    names = {"nnx": nnx, "normkit": normkit, "rngs": nnx.Rngs(0)}
    exec(LINES[key], names)
    shape = SHAPES[key[0]]
    x = jnp.ones(shape if key[0] != "images" else (4, 8, 8, 3))
    assert names["block"](x).shape[0] == len(x)


def test_lines_of_keras_run():
    keras = pytest.importorskip("keras")
    for (data, _, framework), line in LINES.items():
        if framework == "keras":
            names = {"keras": keras, "normkit": normkit}
            exec(line, names)
            shape = SHAPES[data][1:] if data != "images" else (8, 8, 3)
            assert keras.Sequential([keras.Input(shape), *names["block"]]).output_shape[0] is None
    for remark in REMARKS.values():
        if "keras" in remark.lines and "=" in remark.lines["keras"]:
            exec(remark.lines["keras"], {"keras": keras})


@pytest.mark.parametrize("name", [name for name, remark in REMARKS.items() if {"torch", "any"} & set(remark.lines)])
def test_further_lines_of_pytorch_run(name):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    dataset = torch.utils.data.TensorDataset(torch.zeros(9, 3))
    names = {"nn": torch.nn, "normkit": normkit, "torch": torch, "model": model, "dataset": dataset, "batch_size": 4}
    lines = REMARKS[name].lines
    exec(lines.get("torch", lines.get("any")), names)


def conv(norm=None):
    from torch import nn

    return nn.Sequential(*[m for m in (nn.Conv2d(3, 72, 3), norm, nn.ReLU(), nn.Conv2d(72, 4, 3)) if m is not None])


@pytest.mark.parametrize(
    ("norm", "size", "line"),
    [
        ("BatchNorm2d", 4, 'model = normkit.replace(model, {"batch": "group"})'),
        ("BatchNorm2d", 64, None),
        (None, 4, 'model = normkit.insert(model, "group", x)  # x: a batch of inputs'),
        (None, 64, 'model = normkit.insert(model, "batch", x)  # x: a batch of inputs'),
    ],
)
def test_a_model_of_pytorch_gets_the_line_that_changes_it(norm, size, line):
    torch = pytest.importorskip("torch")
    model = conv(None if norm is None else getattr(torch.nn, norm)(72))
    advice = normkit.advise(model, batch_size=size, data="images")
    assert advice.line == line
    if line is None:
        assert "keep batch norm" in advice.sentence
        return
    names = {"normkit": normkit, "model": model, "x": torch.randn(4, 3, 8, 8)}
    exec(line, names)
    again = normkit.advise(names["model"], batch_size=size, data="images")
    assert again.line is None  # it has been followed
    if norm:
        groups = next(module.num_groups for module in names["model"] if isinstance(module, torch.nn.GroupNorm))
        assert advice.model == f"1 batch; groups: 72 channels in {groups}"


def test_the_numbers_of_the_momentum_are_right():
    words = REMARKS["momentum"].words
    for rate, steps in ((0.01, 458), (0.1, 44)):
        assert str(steps) in words
        # The nearest whole number of steps: half a step before or after would not be nearer to 1 %.
        assert remaining(rate, steps + 1) < 0.01 < remaining(rate, steps - 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0, "data": "images"}, "`batch_size` must be a whole number of at least 1"),
        ({"batch_size": 4, "data": "image"}, "`data` must be one of 'images'"),
        ({"batch_size": 4, "data": "images", "framework": "jax"}, "`framework` must be one of"),
        ({"batch_size": 4, "data": "images", "model": 3}, "a model must be a torch.nn.Module"),
    ],
)
def test_wrong_questions(options, said):
    with pytest.raises(NormError) as raised:
        normkit.advise(**options)
    assert said in str(raised.value)


def test_batch_size_and_data_are_asked_for_by_name():
    parameters = inspect.signature(normkit.advise).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("batch_size", "data"))
