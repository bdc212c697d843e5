"""False alarms are worse than silence: small architectures of `transformers`, trained as they are meant to be."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from surgery.architectures import ARCHITECTURES  # noqa: E402
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks.evidence import Call, Evidence, Gap, Layer  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402

HEALTHY = (
    "resnet", "resnet basic", "regnet", "mobilenet v2", "efficientnet", "convnext", "convnext v2", "vit", "dinov2",
    "swin", "segformer", "poolformer", "cvt", "pvt v2", "hgnet v2", "textnet", "patchtst", "patchtsmixer", "hubert",
    "wav2vec2 conformer", "bert", "distilbert", "gpt2", "llama", "gemma",
)  # fmt: skip
SOME = ("resnet", "convnext", "patchtst", "llama")  # batch norm of images and of sequences, layer norm, RMS norm
CLASSES, BATCH, BATCHES = 4, 16, 16


class Classifier(nn.Module):
    """An architecture, the mean of its features over positions, and a head."""

    def __init__(self, name):
        super().__init__()
        import transformers

        kind, options, size = ARCHITECTURES[name]
        model_class = getattr(transformers, kind)
        self.body = model_class(model_class.config_class(**options))
        self.text = isinstance(size, int)
        for layer in self.body.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.momentum > 0.5:
                layer.momentum = 0.1  # it is that of TensorFlow, taken over as it is: see the last test
        self.head = nn.Linear(self.features(data(name)[0][0]).shape[1], CLASSES)

    def features(self, x):
        outputs = self.body(input_ids=x) if self.text else self.body(x)
        first = next(value for value in outputs.values() if isinstance(value, torch.Tensor))
        if first.dim() == 4 and not self.text:
            # patchtst and its mixer: sample, channel of the series, patch, feature
            return first.mean((1, 2)) if first.shape[1:3] == (3, 8) else first.mean((2, 3))
        return first.mean(1) if first.dim() == 3 else first

    def forward(self, x):
        return self.head(self.features(x))


def data(name):
    """Batches of classes that can be told apart: by a pattern in noise, or by their words."""
    size = ARCHITECTURES[name][2]
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (BATCH * BATCHES,), generator=generator)
    if isinstance(size, int):
        x = torch.randint(2, 40, (len(y), size), generator=generator)
        x[:, ::2] = 2 + (x[:, ::2] - 2) % 9 + 9 * y[:, None]
    else:
        patterns = torch.randn(CLASSES, *size[1:], generator=generator)
        x = torch.randn(len(y), *size[1:], generator=generator) + patterns[y]
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def checked(name, steps):
    """What is found after so many steps."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, batches = Classifier(name).train(), data(name)
        optimizer = torch.optim.AdamW(normkit.param_groups(model, weight_decay=0.05), lr=1e-3)
        for step in range(steps):
            x, y = batches[step % BATCHES]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return normkit.check(model, batches, optimizer=optimizer, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize("name", SOME)
def test_some_healthy_architectures(name):
    found = checked(name, 50)  # .9^50: half a percent of the first statistics is left
    assert not found.errors, found


@pytest.mark.long
def test_healthy_architectures():
    counts, errors = Counter[str](), []
    for name in HEALTHY:
        found = checked(name, 100)
        assert found.layers, name
        counts.update(f"{finding.code} {finding.severity}" for finding in found.findings)
        errors += [(name, finding) for finding in found.errors]
    assert not errors, (errors, counts)


@pytest.mark.parametrize("name", ["efficientnet", "mobilenet v2"])
def test_a_momentum_that_ports_took_over_from_tensorflow(name):
    import transformers

    kind, options, _ = ARCHITECTURES[name]
    model_class = getattr(transformers, kind)
    found = normkit.check(model_class(model_class.config_class(**options)), select=["NK801"])
    assert found.findings
    assert not found.errors  # nothing is wrong before training


def test_dropout_in_training_makes_no_statistics_stale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.BatchNorm1d(8))
    x = torch.randn(512, 8)
    with torch.no_grad():
        for _ in range(100):
            model(x)
    assert not normkit.check(model, x, select=["NK102"]).findings
    model[0].weight.data *= 3  # after the last update
    assert len(normkit.check(model, x, select=["NK102"]).findings) == 1


def test_statistics_that_are_off_without_harm_are_no_error():
    population = Call(0, (64, 2), "float32", 64, np.zeros(2), np.full(2, 1e-3), 0.0, 1.0, True)
    kept = {"mean": np.zeros(2), "var": np.full(2, 5e-3)}  # some of the first value of 1 is left
    layer = Layer("bn", "BatchNorm1d", NormRecord("batch", (2,), 1, 1e-5, rate=0.1, count=50, kept=kept))
    for gap, severity in (
        (Gap("loss", 1, 1.0, 1.01, 1.0, 0.01), "warning"),
        (Gap("loss", 1, 1.0, 2.0, 1.0, 0.01), "error"),
        (None, "error"),
    ):
        seen = Evidence("torch", "Model", (layer,), calls={"bn": [population]}, gap=gap)
        assert [finding.severity for finding in RULES["NK102"](seen)] == [severity]
