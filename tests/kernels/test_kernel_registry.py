"""Which kernel runs, who may choose, and what the choice is told to whom."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from kernel_calls import SETS, needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode

import normkit.torch as nk
from normkit.cli import main
from normkit.errors import NormRuntimeError, NormValueError
from normkit.kernels import native, registry
from normkit.kernels.registry import Rule, begins, read_rules
from normkit.torch import _compiled as compiled
from normkit.torch import coverage as module
from normkit.torch import use_kernel

X = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def ran(monkeypatch, run) -> str:
    """The kernel that a call runs, seen from below."""
    seen = []
    if compiled._native is not None:

        class Native:
            def __getattr__(self, name):
                seen.append(name)
                return getattr(original, name)

        original = compiled._native
        monkeypatch.setattr(compiled, "_native", Native())
    with Operations() as operations:
        run()
    monkeypatch.undo()
    theirs = {"native_batch_norm", "native_layer_norm", "native_group_norm"}
    return "native" if seen else "torch" if operations.names & theirs else "formula"


CHOICES = ["formula", "torch", pytest.param("native", marks=needs_kernels)]


@pytest.mark.parametrize("kernel", CHOICES)
@pytest.mark.parametrize("make", [lambda: nk.BatchNorm2d(6), lambda: nk.LayerNorm(5), lambda: nk.BatchNorm2d(6).eval()])
def test_the_chosen_kernel_runs(monkeypatch, make, kernel):
    with use_kernel(kernel):
        assert ran(monkeypatch, lambda: make()(X)) == kernel


@needs_kernels
def test_the_compiled_one_runs_by_itself_and_after_a_choice(monkeypatch):
    with use_kernel("formula"), use_kernel("torch"):
        assert registry.chosen() == "torch"
    assert registry.chosen() is None
    assert ran(monkeypatch, lambda: nk.BatchNorm2d(6)(X)) == "native"
    with pytest.raises(ZeroDivisionError), use_kernel("formula"):
        raise ZeroDivisionError
    assert registry.chosen() is None


def test_a_name_that_is_none_is_an_error():
    with pytest.raises(NormValueError, match="did you mean native"), use_kernel("nativ"):
        pass


REFUSALS = [
    ("native", lambda: nk.BatchNorm2d(6).double()(X.double()), "float64"),
    ("native", lambda: nk.BatchNorm2d(6)(X[:, :, ::2]), "neither contiguous nor channels_last"),
    ("native", lambda: nk.BatchNorm2d(6)(X, mask=torch.ones(4, 5, 5, dtype=torch.bool)), "mask"),
    ("native", lambda: nk.BatchRenorm2d(6)(X), "renorm"),
    ("native", lambda: nk.LayerNorm2d(6)(X), "not next to each other"),
    ("native", lambda: nk.GhostBatchNorm2d(6, virtual_batch_size=3)(torch.cat([X, X[:1]])), "short last group"),
    ("native", lambda: nk.BatchNorm2d(6).double().eval()(X), "float32"),
    ("torch", lambda: nk.BatchNorm2d(6)(X, mask=torch.ones(4, 5, 5, dtype=torch.bool)), "mask"),
    ("torch", lambda: nk.GhostBatchNorm2d(6, virtual_batch_size=2)(X), "no kernel"),
    ("torch", lambda: nk.BatchNorm2d(6).bfloat16()(X.bfloat16()), "float32 or float64"),
    ("reference", lambda: nk.BatchRenorm2d(6).requires_grad_(False)(X), "renorm"),
]


@pytest.mark.parametrize(("kernel", "run", "reason"), REFUSALS)
def test_what_a_chosen_kernel_does_not_cover_is_an_error_with_the_reason(kernel, run, reason):
    if kernel == "native" and not SETS:
        reason = ""
    with use_kernel(kernel), pytest.raises(NormValueError, match="must cover the input") as error:
        run()
    assert re.search(reason, str(error.value))
    run()  # and none without the choice


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nk.BatchNorm2d(6),
        lambda: nk.GhostBatchNorm2d(6, virtual_batch_size=3),
        lambda: nk.InstanceNorm2d(6, affine=True, track_running_stats=True),
        lambda: nk.GroupNorm(2, 6),
        lambda: nk.LayerNorm([6, 5, 5]),
        lambda: nk.RMSNorm2d(6, gain="1+w"),
    ],
)
def test_the_reference_is_the_same_and_has_no_gradients(make, training):
    a, b = make().train(training), make().train(training)
    with torch.no_grad():
        right = a(X)
        with use_kernel("reference"):
            torch.testing.assert_close(b(X), right, rtol=0, atol=2e-5)
    for mine, other in zip(b.buffers(), a.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    with use_kernel("reference"), pytest.raises(NormRuntimeError, match="outputs only"):
        b(X.clone().requires_grad_())


def test_rules_say_where_the_search_begins():
    rules = (Rule("torch", "batch_norm", below=100), Rule("formula", dtype="bfloat16", layout="channels_last"))
    ask = lambda *what: begins(rules, *what)  # noqa: E731
    assert ask("batch_norm", torch.float32, "contiguous", (1000, 3, 33)) == "torch"
    assert ask("batch_norm", torch.float32, "contiguous", (1, 3, 34)) == "native"
    assert ask("group_norm", torch.bfloat16, "channels_last", (2, 3)) == "formula"
    assert ask("group_norm", "bfloat16", "contiguous", (2, 3)) == "native"


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """Write a file of rules and let it count."""

    def write(text) -> None:
        path = tmp_path / "rules.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        monkeypatch.setenv("NORMKIT_KERNELS", str(path))
        registry._rules.cache_clear()

    yield write
    monkeypatch.undo()
    registry._rules.cache_clear()


def test_a_users_rules(rules, monkeypatch):
    rules({"rules": [{"normalizer": "batch_norm", "below": 151, "use": "formula"}]})
    found = [layer(X).isfinite().all() for layer in (nk.BatchNorm2d(6), nk.LayerNorm(5))]
    assert all(found)
    rows = {(row.normalizer, row.layout, row.dtype): row for row in module.coverage().rows}
    assert rows["batch_norm", "contiguous", "float32"].kernel == "formula"
    if SETS:
        assert rows["layer_norm", "contiguous", "float32"].kernel == "native"
        assert "further down" in rows["batch_norm", "contiguous", "float32"].why_not_native


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON file of rules"),
        ("[]", 'list `"rules"`'),
        ({"rules": [3]}, "rule 1 must be an object"),
        ({"rules": [{"use": "native"}, {"use": "nativ"}]}, "rule 2: `use` must be a kernel; got 'nativ'.*did you mean"),
        ({"rules": [{"use": "torch", "belo": 3}]}, "rule 1: the name must be known; got 'belo'.*did you mean below"),
        ({"rules": [{"use": "torch", "below": "3"}]}, "`below` must be a number of values >= 1; got '3'"),
        ({"rules": [{"use": "torch", "layout": "NHWC"}]}, "`layout` must be contiguous or channels_last"),
        ({"rules": [{"use": "torch", "dtype": 32}]}, "`dtype` must be a name; got 32"),
    ],
)
def test_bad_rules_are_errors_that_say_where(rules, tmp_path, text, words):
    rules(text)
    with pytest.raises(NormValueError, match=words):
        nk.BatchNorm2d(6)(X)
    with pytest.raises(NormValueError, match="absent"):
        read_rules(tmp_path / "absent.json")


def test_the_table_is_what_happens(monkeypatch):
    """Every row against the kernel that is seen to run."""
    makers = {
        "batch_norm": lambda: nk.BatchNorm2d(8),
        "ghost_batch_norm": lambda: nk.GhostBatchNorm2d(8, virtual_batch_size=2),
        "instance_norm": lambda: nk.InstanceNorm2d(8, affine=True),
        "layer_norm": lambda: nk.LayerNorm([8, 4, 4]),
    }
    found = module.coverage()
    assert found.instruction_sets == SETS
    for row in found.rows:
        assert (row.kernel == "native") == (not row.why_not_native), row
        if row.normalizer in makers and row.dtype in ("float32", "bfloat16"):
            form = getattr(torch, row.layout if row.layout == "channels_last" else "contiguous_format")
            x = torch.ones(4, 8, 4, 4, dtype=getattr(torch, row.dtype)).contiguous(memory_format=form)
            layer = makers[row.normalizer]()
            with use_kernel(row.kernel):
                layer(x)
            if row.kernel != "torch":  # of its kernels, some have no name of their own
                assert ran(monkeypatch, lambda layer=layer, x=x: layer(x)) == row.kernel, row


def test_on_the_command_line(capsys):
    assert main(["kernels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["instruction_sets"] == list(SETS)
    assert {row["kernel"] for row in found["rows"]} <= set(registry.ORDER)
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm_2d" in out
    assert ("in use: " + SETS[0] if SETS else "no compiled kernels") in out


@needs_kernels
def test_an_instruction_set_by_name(monkeypatch):
    for place, name in enumerate(SETS):
        monkeypatch.setenv("NORMKIT_INSTRUCTION_SET", name)
        assert native.instruction_set() == place
    monkeypatch.setenv("NORMKIT_INSTRUCTION_SET", "sse9")
    with pytest.raises(NormValueError, match=r"one of this machine's: .*baseline; got 'sse9'"):
        native.instruction_set()
    monkeypatch.delenv("NORMKIT_INSTRUCTION_SET")
    assert native.instruction_set() == 0


def test_missing_kernels_are_said_once(monkeypatch):
    monkeypatch.setattr(compiled, "_native", None)
    native.missing.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        nk.BatchNorm2d(6).double()(X.double())  # no kernel would have been used
        assert not seen
        y = nk.BatchNorm2d(6)(X)
        nk.BatchNorm2d(6).eval()(X)
    assert [str(w.message)[:45] for w in seen] == ["normkit runs without its compiled kernels: it"]
    monkeypatch.undo()
    torch.testing.assert_close(y, nk.BatchNorm2d(6)(X), rtol=0, atol=1e-5)
    native.missing.cache_clear()
