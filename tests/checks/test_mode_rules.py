"""NK3xx: planted faults are found, their healthy twins are not, end to end and on evidence made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import normkit  # noqa: E402
from normkit.checks.evidence import Call, Dependence, Evidence, Layer, Step  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402


class Network(nn.Module):
    """A backbone with two norms, and a head with one."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, **options),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8, **options),
        )
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, **options), nn.Linear(8, 2))

    def forward(self, x):
        return self.head(self.backbone(x).relu().mean((2, 3)))


class Kept(Network):
    """The advice of the forums: the backbone stays in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self


def images(batches=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(batches)]


def call(model, x):
    """A forward pass of the user's: the flow of data, which takes longest to read, is not looked at."""
    return model(x)


def found(model, code, **options):
    """Severity and path of what one rule finds."""
    findings = normkit.check(model, images(), select=[code], **options).findings
    return [(finding.severity, finding.path) for finding in findings]


def frozen(model, *parts):
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_backbone_that_moves(training):
    model = frozen(Network(), "backbone").train(training)
    diagnosis = normkit.check(model, images(), select=["NK301"])
    assert [(f.severity, f.path) for f in diagnosis.findings] == [("error", "backbone.1"), ("error", "backbone.4")]
    fix = diagnosis.findings[0].fix
    assert fix.line == "normkit.freeze(model.backbone)"
    assert fix.safe
    exec(fix.line, {"normkit": normkit, "model": model})
    assert not found(model, "NK301", forward=call)


HEALTHY = {
    "trained": Network(),
    "first map": frozen(Network(), "backbone.0"),
    "maps": frozen(Network(), "backbone.0", "backbone.3"),
    "one norm": frozen(Network(), "backbone.4"),
    "train": frozen(Kept().train(), "backbone"),
    "eval": frozen(Kept().eval(), "backbone"),
    "no affine": frozen(Network(affine=False), "backbone.0"),
    "keeps nothing": frozen(Network(track_running_stats=False), "backbone"),
    "used": frozen(Network().eval(), ""),
    "freeze": normkit.freeze(Network()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_frozen_part_moves(name):
    assert not found(HEALTHY[name], "NK301", forward=call)
    if name in ("first map", "one norm", "no affine"):  # where the flow of data decides
        assert not found(HEALTHY[name], "NK301")


def test_a_network_that_only_evaluates_but_was_left_in_training_mode():
    assert found(frozen(Network(), ""), "NK301", forward=call) == [
        ("warning", "backbone.1"),
        ("warning", "backbone.4"),
        ("warning", "head.1"),
    ]


def test_parts_that_are_frozen_are_named_without_what_is_trained():
    model = frozen(Network(), "backbone.0", "backbone.1")
    finding = normkit.check(model, images(), select=["NK301"], forward=call).findings[0]
    assert finding.fix.line == "normkit.freeze(model.backbone[1])"
    parts = frozen(Network(), "backbone", "head.0", "head.1")
    parts.head.append(nn.BatchNorm1d(2))
    finding = normkit.check(parts, images(), select=["NK301"], forward=call).findings[0]
    assert finding.fix.line == "for part in (model.backbone, model.head[1]): normkit.freeze(part)"


def test_the_flow_of_data_counts_not_the_order_of_registration():
    class Prompted(Network):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x):
            return super().forward(x + self.prompt)

    assert not found(frozen(Prompted(), "backbone"), "NK301")
    # A forward of the user's hides the flow: the order is taken, and only a warning given.
    unseen = found(frozen(Network(), "backbone"), "NK301", forward=call)
    assert unseen == [("warning", "backbone.1"), ("warning", "backbone.4")]


def test_drift_explains_a_gap():
    model = frozen(Network(), "backbone")
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked += 1000  # no layer may look never trained, which would be the cause
            module.running_mean += 30 if path.startswith("backbone") else 1
    sentence = normkit.check(model, images(), forward=call).sentence
    assert "Cause: the statistics of the frozen part drift, first at backbone.1" in sentence
    assert sentence.endswith("Do: normkit.freeze(model.backbone)")


def test_evaluation_mode_while_gamma_and_beta_train():
    model = Network()
    model.backbone.eval()
    assert found(model, "NK302", forward=call) == [("info", "backbone.1"), ("info", "backbone.4")]
    assert not found(Network(), "NK302", forward=call)
    assert not found(Network().eval(), "NK302", forward=call)
    assert not found(frozen(Kept().train(), "backbone"), "NK302", forward=call)
    assert not found(normkit.freeze(Network()), "NK302", forward=call)


def test_evaluation_by_the_statistics_of_the_batch():
    norms = ["backbone.1", "backbone.4", "head.1"]
    model = Network(track_running_stats=False)
    diagnosis = normkit.check(model, images(), select=["NK303", "NK304"], forward=call)
    assert [(f.code, f.severity, f.path) for f in diagnosis.findings] == [
        ("NK304", "error", "backbone.1"),
        *(("NK303", "warning", path) for path in norms),
    ]
    # one output alone and in its batch, seen another way: the head has a single value per channel for one sample
    x = images()[0]
    with torch.no_grad():
        alone, together = model.eval()(x[:2]), model(x)
    change = float((alone - together[:2]).abs().max() / together.abs().max())
    assert diagnosis.findings[0].evidence["change"] == pytest.approx(change, rel=1e-4)
    assert diagnosis.findings[1].fix.line == "BatchNorm2d(8, track_running_stats=True)"
    assert not found(Network(), "NK303", forward=call)
    assert not found(Network(), "NK304", forward=call)


def test_a_layer_that_no_mode_reaches():
    class Stubborn(Network):
        def train(self, mode=True):
            super().train(mode)
            self.backbone.train()
            return self

    diagnosis = normkit.check(Stubborn(), images(), select=["NK303", "NK304"], forward=call)
    assert [(f.code, f.severity, f.path) for f in diagnosis.findings] == [
        ("NK303", "error", "backbone.1"),
        ("NK303", "error", "backbone.4"),
        ("NK304", "error", "backbone.1"),
    ]
    assert diagnosis.findings[0].fix.line == "model.backbone[1].eval()"


def test_a_layer_left_in_training_mode():
    model = Network().eval()
    model.backbone.train()
    assert found(model, "NK303", forward=call) == [("warning", "backbone.1"), ("warning", "backbone.4")]
    assert not found(model.eval(), "NK303", forward=call)


def test_other_reasons_for_evaluation_to_change():
    class Centred(Network):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Random(Network):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), training=True)

    class Pairs(Network):
        def forward(self, x):
            features = super().forward(x)
            return features @ features.T

    assert found(Centred(), "NK304", forward=call) == [("info", "")]
    for model, why in [(Random(), "evaluation is random"), (Pairs(), "the model does not give one output per sample")]:
        diagnosis = normkit.check(model, images(), select=["NK304"], forward=call)
        assert not diagnosis.findings
        assert diagnosis.skipped["dependence"] == why


def record(**options):
    return NormRecord("batch", (4,), 1, 1e-5, rate=0.1, **options)


def test_by_hand_what_a_step_did_not_move_is_silent():
    kept = {"mean": torch.zeros(4).numpy(), "var": torch.ones(4).numpy()}
    layer = Layer("norm", "BatchNorm2d", record(kept=kept), training=True, trained=False)
    parameters = {"conv.weight": False, "norm.weight": False, "norm.bias": False, "head.weight": True}
    seen = Evidence("torch", "Net", (layer,), parameters=parameters, training=True)
    assert [finding.severity for finding in RULES["NK301"](seen)] == ["warning"]  # no flow of data is known
    assert not RULES["NK301"](replace(seen, step=Step({}, {}, frozenset())))
    assert RULES["NK301"](replace(seen, step=Step({}, {}, frozenset(["norm"]))))


@pytest.mark.parametrize(("change", "severities"), [(2e-4, ["error"]), (5e-5, []), (float("nan"), [])])
def test_by_hand_the_limit_of_dependence(change, severities):
    layer = Layer("norm", "BatchNorm2d", record())
    seen = Evidence("torch", "Net", (layer,), dependence=Dependence(change, ("norm",)))
    assert [finding.severity for finding in RULES["NK304"](seen)] == severities
    call = Call(0, (8, 4), "bfloat16", 8, None, None, 0.0, 1.0, True)
    assert not RULES["NK304"](replace(seen, calls={"norm": [call]})), "rounding of half precision is no dependence"


@pytest.mark.parametrize(
    ("framework", "path", "code"),
    [
        ("torch", "", "model"),
        ("torch", "backbone.0.norm1", "model.backbone[0].norm1"),
        ("torch", "blocks.a-b", 'model.get_submodule("blocks.a-b")'),
        ("keras", "base/conv1_bn", 'model.get_layer("base").get_layer("conv1_bn")'),
    ],
)
def test_parts_of_a_model_in_code(framework, path, code):
    assert Evidence(framework, "Net", ()).at(path) == code
