import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.errors import MissingExtraError, NormRuntimeError, NormTypeError, NormValueError
from normkit.experiments.activations import Activations
from normkit.experiments.results import SiteStats

WIDTH = 100
X = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0))


def deep(*norm):
    """Ten layers as torch draws them, biases too."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(10) for layer in (nn.Linear(WIDTH, WIDTH), *(make() for make in norm), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def test_the_signal_of_a_deep_plain_network_dies_and_batch_norm_keeps_it():
    plain = normkit.activations(deep(), X).sites
    assert len(plain) == 10
    # var(w) is 1/3 of 1/width in torch: half of a third of the variance goes through each layer behind a relu.
    assert plain[0].std == pytest.approx((1 / 3) ** 0.5, rel=0.05)
    assert plain[1].std < 0.41
    assert plain[-1].std < 1e-3
    assert all(after.std < 0.6 * before.std for before, after in itertools.pairwise(plain))
    assert plain[-1].dead > 0.2
    normed = normkit.activations(deep(lambda: nn.BatchNorm1d(WIDTH)), X).sites
    assert [site.std for site in normed] == pytest.approx([1.0] * 10, abs=1e-3)
    assert [site.mean for site in normed] == pytest.approx([0.0] * 10, abs=1e-6)
    assert all((site.gamma_mean, site.gamma_std, site.beta_mean, site.beta_std) == (1, 0, 0, 0) for site in normed)


def test_numbers_against_numpy():
    model = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh())
    seen = normkit.activations(model, X.numpy())
    weight, bias = (p.detach().numpy().astype(np.float64) for p in model[0].parameters())
    values = X.double().numpy() @ weight.T + bias
    assert seen.model == "Sequential"
    assert seen.sites[0][:5] == (
        "1",
        "tanh",
        pytest.approx(values.mean(), abs=1e-6),
        pytest.approx(np.sqrt(values.var(0).mean()), rel=1e-5),
        0.0,
    )


def test_evaluation_mode_on_request():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU())
    assert normkit.activations(model, 5 * X).sites[0].std == pytest.approx(1, abs=1e-3)
    assert normkit.activations(model, 5 * X, train=False).sites[0].std == pytest.approx(5, rel=0.05)
    assert model[0].num_batches_tracked == 0
    assert model.training


SEEN = Activations(
    "Net",
    (
        SiteStats("layers.0", "relu", 0.123456, 1.0, 0.25, None, 1.0, 0.125, -0.5, 0.0),
        SiteStats("a<b", "gelu", float("nan"), 2e-5, 0.0, None, None, None, None, None),
    ),
)


def test_table():
    assert str(SEEN) == "\n".join(
        [
            "site      activation   mean    std  dead %     gamma      beta",
            "layers.0  relu        0.123      1      25  1 ± 0.12  -0.5 ± 0",
            "a<b       gelu          nan  2e-05       0         -         -",
        ]
    )


def test_plain_values_are_strict_json(tmp_path):
    path = SEEN.save(tmp_path / "seen.json")
    stored = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert stored == json.loads(json.dumps(SEEN.to_dict(), allow_nan=False))
    assert stored["model"] == "Net"
    assert stored["sites"][0]["gamma_std"] == 0.125
    assert stored["sites"][1]["mean"] is None


def test_pictures(tmp_path):
    seen = normkit.activations(deep(), X)
    svg = seen.save(tmp_path / "seen.SVG").read_text()
    assert svg.lstrip().startswith(("<?xml", "<svg"))
    assert "var(--" not in svg
    assert seen.save(str(tmp_path / "seen.png")).read_bytes().startswith(b"\x89PNG")
    page = seen._repr_html_()
    assert page.count("<tr>") == 11
    assert "<svg" in page
    assert "var(--" not in page, "a notebook has no such variables"


def test_notebooks_show_the_table_where_nothing_can_be_drawn(monkeypatch):
    from normkit.report import render

    def missing():
        raise MissingExtraError("matplotlib")

    monkeypatch.setattr(render, "require", missing)
    page = SEEN._repr_html_()
    assert "a&lt;b" in page
    assert "<svg" not in page
    assert re.findall(r"<td>([^<]*)</td>", page)[:4] == ["layers.0", "relu", "0.123", "1"]
    with pytest.raises(MissingExtraError):
        SEEN.save("seen.png")


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(NormValueError, match=r"`path` must end in .svg, .png, .txt, .json or .html; got 'seen.pdf'"):
        SEEN.save("seen.pdf")
    with pytest.raises(NormRuntimeError, match=r"`path` must be one that can be written; got .*No such file"):
        SEEN.save(tmp_path / "no" / "seen.json")


REFUSED = {
    "class": (nn.ReLU, X, NormTypeError, "a model must be a torch.nn.Module, .*; got the class ReLU"),
    "other": ("net.py", X, NormTypeError, "a model must be a torch.nn.Module, .*; got str"),
    "no samples": (nn.ReLU(), X[:0], NormValueError, "`batch` must hold at least one value in every part"),
    "loader": (nn.ReLU(), iter([X]), NormTypeError, "`batch` must be a tensor or an array, .*hint: next"),
    "nothing": (nn.ReLU(), (), NormTypeError, "got tuple"),
    "pair": (nn.ReLU(), (X, X), NormTypeError, "ReLU must take the inputs .*give inputs alone, without targets"),
    "none called": (nn.Softmax(-1), X, NormValueError, "must call an activation, .*got Softmax, which calls none"),
    "lazy": (nn.LazyLinear(3), X, NormValueError, "LazyLinear"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    model, batch, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        normkit.activations(model, batch)


def test_without_a_framework_nothing_is_imported():
    code = """
import sys, normkit
try:
    normkit.activations(object(), __import__("numpy").zeros(3))
except TypeError as error:
    print(error, {"torch", "keras", "flax", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("got object set()")
