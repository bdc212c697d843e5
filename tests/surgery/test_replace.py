"""What both norms have goes over; what is claimed to be the same is; nothing else changes."""

import copy

import numpy as np
import pytest
import torch
from architectures import built, randomized
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normkit
from normkit import torch as ours
from normkit.core.catalog import CATALOG, STANDARD
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError
from normkit.surgery import replacement
from normkit.torch import replacement as torch_replacement
from normkit.torch.factory import norm_layer
from normkit.torch.porting import read

SHAPES = {0: (6, 8), 1: (6, 8, 5), 2: (6, 8, 4, 4)}


def close(before, after, limit):
    assert (before - after).abs().max() <= limit * before.abs().max()


def values(shape):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1


def holder(norm):
    return randomized(nn.Sequential(nn.Identity(), norm))


def small():
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Conv2d(8, 2, 1)))


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("new", STANDARD)
@pytest.mark.parametrize("old", STANDARD)
def test_every_norm_becomes_every_other(old, new, spatial):
    """The numbers are those of a layer of the new kind that is given the old one's values."""
    if "instance" in (old, new) and spatial == 0:
        return
    x = values(SHAPES[spatial])
    model = holder(norm_layer(old, 8, spatial))
    result = normkit.replace(model, {old: new}, example=x)
    before, after = read(model[1]), read(result[1])
    assert after.kind == new
    assert after.eps == before.eps
    np.testing.assert_array_equal(after.gamma, before.gamma)
    if new != "rms":
        np.testing.assert_array_equal(after.beta, np.zeros(8) if before.beta is None else before.beta)
    expected = norm_layer(new, 8, spatial).eval()
    expected.load_state_dict(result[1].state_dict())
    expected.eps = before.eps
    with torch.no_grad():
        torch.testing.assert_close(result(x), expected(x), atol=1e-6, rtol=1e-5)
        same = {old, new} <= {"batch", "ghost", "renorm"} or old == new
        if same:  # the limit
            close(model(x), result(x), 1e-6)


@pytest.mark.parametrize("new", [name for name in CATALOG if name not in STANDARD])
def test_norms_with_a_formula_of_their_own_are_made_by_functions(new):
    model = randomized(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)))
    with pytest.raises(NormError, match=f"{new}, which has a formula of its own, must be made by a function"):
        normkit.replace(model, {"layer": new})
    result = normkit.replace(model, {"layer": lambda record: norm_layer(new, *record.shape, axis=record.axis)})
    assert [
        edit.reason
        for edit in normkit.replace(model, {"layer": lambda r: norm_layer(new, *r.shape)}, dry_run=True).edits
    ] == ["made by a function, with its own values"]
    assert not isinstance(result[1], nn.LayerNorm)
    with pytest.raises(NormError, match="every entry of `which` must mean a layer"):  # no record has them
        normkit.remove(result, new)


@pytest.mark.parametrize("new", ["renorm", "ghost"])
def test_batch_norm_as_renorm_and_ghost_is_the_same_in_training(new):
    """With r = 1 and d = 0, the first steps of the schedule, and with one group of the whole batch."""
    x = values((6, 8, 4, 4))
    model = nn.Sequential(nn.BatchNorm2d(8))
    make = new if new == "renorm" else lambda record: ours.GhostBatchNorm2d(record.shape[0], virtual_batch_size=6)
    result = normkit.replace(model, {"batch": make})
    for training in (False, True):  # first evaluation: trained, renorm averages deviations and batch norm variances
        close(model.train(training)(x), result.train(training)(x), 1e-6)


def test_group_norm_groups_divide_the_channels_and_samples_are_alone():
    model = randomized(nn.Sequential(nn.Conv2d(3, 72, 1), nn.BatchNorm2d(72)))
    result = normkit.replace(model, {"batch": "group"})
    assert 72 % result[1].num_groups == 0
    assert torch.equal(result[1].weight, model[1].weight)
    alone = torch.cat([result(image[None]) for image in IMAGES])
    torch.testing.assert_close(result(IMAGES), alone, atol=1e-6, rtol=1e-5)
    assert normkit.replace(model, {"batch": "group"}, groups=6)[1].num_groups == 6
    with pytest.raises(NormError, match="`groups` must divide the channels; got 5 and 72"):
        normkit.replace(model, {"batch": "group"}, groups=5)


def test_keys_are_paths_before_classes_before_short_names():
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    result, report = normkit.replace(
        model,
        {
            "batch": "layer",
            "1": "instance",
            nn.GroupNorm: "batch",
            (lambda path, _: path == "2"): lambda r: nn.Identity(),
        },
        return_report=True,
    )
    kinds = [ours.LayerNorm2d, ours.InstanceNorm2d, nn.Identity, type(result[3]), nn.LayerNorm]
    assert [type(layer) for layer in result] == kinds
    assert read(result[3]).kind == "batch"
    assert [edit.path for edit in report.edits] == ["0", "1", "2", "3"]
    assert "recalibrate" in report.edits[3].reason
    assert "computes something else" in report.edits[0].reason
    assert report.how is None
    assert report.difference is None


def test_what_is_lost_is_said():
    model = randomized(nn.Sequential(nn.LayerNorm(8)))
    report = normkit.replace(model, {"layer": "rms"}, dry_run=True)
    assert "beta is lost" in report.edits[0].reason
    report = normkit.replace(nn.Sequential(nn.LayerNorm((4, 8)), nn.LayerNorm(8)), {"layer": "batch"}, dry_run=True)
    assert "one axis of channels" in report.kept[0].reason


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.norm = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.block(x))


def test_what_others_read_stays():
    """In evaluation nn.TransformerEncoderLayer takes the weights of its norms and calls none of them."""
    parametrized = weight_norm(nn.GroupNorm(2, 4), dim=None)
    for model in (Encoder(), nn.ModuleDict({"block": parametrized, "norm": nn.GroupNorm(2, 4)})):
        report = normkit.replace(model, {"layer" if isinstance(model, Encoder) else "group": "rms"}, dry_run=True)
        assert [edit.path for edit in report.done] == ["norm"]


ACCELERATED = {
    "batch": (nn.BatchNorm2d(8, momentum=None, eps=1e-3), (6, 8, 4, 4)),
    "batch 1d": (nn.BatchNorm1d(8, affine=False), (6, 8)),
    "batch, no statistics": (nn.BatchNorm3d(8, track_running_stats=False), (6, 8, 2, 2, 2)),
    "instance": (nn.InstanceNorm1d(8, affine=True), (6, 8, 5)),
    "group": (nn.GroupNorm(4, 8, eps=1e-6), (6, 8, 3, 3)),
    "layer": (nn.LayerNorm((3, 8), bias=False), (6, 3, 8)),
    "rms": (nn.RMSNorm(8), (6, 3, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ACCELERATED)
def test_accelerated_is_the_same_layer_of_ours(case, dtype):
    norm, shape = ACCELERATED[case]
    model, x = holder(copy.deepcopy(norm)).to(dtype), values(shape).to(dtype)
    result = normkit.replace(model, accelerated=True)
    assert type(result[1]) is getattr(ours, type(norm).__name__)
    assert result.state_dict().keys() == model.state_dict().keys()
    for name in ("eps", "momentum", "num_groups", "normalized_shape", "affine", "track_running_stats"):
        assert getattr(result[1], name, None) == getattr(norm, name, None)
    for training in (False, True):
        # The sums of a batch, and some roundings of the output.
        close(model.train(training)(x), result.train(training)(x), 16 * torch.finfo(dtype).eps)
    assert normkit.replace(result, accelerated=True, dry_run=True).kept[0].reason == "it is ours already"


class Mine(nn.LayerNorm):
    pass


def test_a_class_of_the_users_stays():
    report = normkit.replace(nn.Sequential(Mine(4), nn.LayerNorm(4)), accelerated=True, dry_run=True)
    assert [edit.path for edit in report.done] == ["1"]
    assert "a class of its own" in report.kept[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "convnext", "resnet"])
def test_accelerated_architectures(name, dtype):
    """In bfloat16 each RMS norm rounds where its model does."""
    model, x = built(name)
    if name == "t5":
        x = {**x, "decoder_input_ids": x["input_ids"]}
    model = model.to(dtype)
    result, report = normkit.replace(model, accelerated=True, example=x, return_report=True)
    assert report.done
    assert not report.kept, report
    # Roundings of 6e-8 or 4e-3, some tens of them.
    assert report.difference <= (1e-5 if dtype == torch.float32 else 0.05)
    assert result.state_dict().keys() == model.state_dict().keys()


def test_the_original_stays_and_what_belongs_to_it_goes_along():
    model, calls = small(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].weight.requires_grad_(False)
    model[1].weight.decay = 0.5
    model[2].twin = model[1]
    state = copy.deepcopy(model.state_dict())
    result, report = normkit.replace(model, {"batch": "group"}, example=IMAGES, return_report=True)
    assert report.difference > 0
    assert type(model[1]) is nn.BatchNorm2d
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert result[2].twin is result[1]
    assert not result[1].training
    assert not result[1].weight.requires_grad
    assert result[1].bias.requires_grad
    assert result[1].weight.decay == 0.5
    assert result[1].weight is not model[1].weight
    calls.clear()
    result(IMAGES)
    assert calls == [1]


def test_a_hook_of_a_model_changed_in_place_can_still_be_taken_off():
    model, calls = small(), []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    normkit.replace(model, {"batch": "group"}, inplace=True)
    model(IMAGES)
    handle.remove()
    model(IMAGES)
    assert calls == [1]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_made_before_trains_the_result(inplace):
    model = small()
    optimizer = torch.optim.SGD(
        [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}], 0.1, momentum=0.9
    )
    model(IMAGES).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[1].weight]["momentum_buffer"]
    result = normkit.replace(model, {"batch": "rms"}, optimizer=optimizer, inplace=inplace)
    assert [{id(p) for p in group["params"]} for group in optimizer.param_groups] == [
        {id(p) for p in part.parameters()} for part in (result[:2], result[2:])
    ]
    assert optimizer.state[result[1].weight]["momentum_buffer"] is momentum
    assert isinstance(result[1], ours.RMSNorm2d)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_in_place_is_all_or_nothing(monkeypatch, error):
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))
    layers, state = list(model), copy.deepcopy(model.state_dict())
    real, calls = torch_replacement._take_over, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error("in the middle")
        return real(*args)

    monkeypatch.setattr(torch_replacement, "_take_over", failing)
    with pytest.raises(error, match="in the middle"):
        normkit.replace(model, {"batch": "group"}, inplace=True)
    assert all(mine is layer for mine, layer in zip(model, layers, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_schedule_of_renorm_goes_on_where_batch_norm_was():
    model = small()
    model[1].num_batches_tracked.fill_(10_000_000)
    result = normkit.replace(model, {"batch": "renorm"})
    assert int(result[1].num_batches_tracked) == 10_000_000
    assert result[1].schedule == RenormSchedule()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either `norms` or `accelerated=True` must be given; got neither"),
        ({"norms": {"batch": "group"}, "accelerated": True}, "got both"),
        ({"norms": "group"}, "`norms` must be a mapping"),
        ({"norms": {"batch": "grop"}}, "did you mean group"),
        ({"norms": {"batch": nn.GroupNorm}}, "functions from a record to a layer"),
        ({"norms": {"batch": nn.GroupNorm(2, 4)}}, "functions from a record to a layer"),
        ({"norms": {"layer": "group"}}, "must mean a layer of the model; got 'layer'. hint: known: batch"),
        ({"norms": {"btch": "group"}}, "did you mean batch"),
        ({"norms": {3: "group"}}, "must hold paths, classes, short names and functions"),
        ({"norms": {"batch": lambda record: record}}, "must give a torch.nn.Module"),
        ({"norms": {"batch": "group"}, "groups": 0}, "`groups` must be None or a whole number of at least 1"),
        ({"norms": {"batch": "group"}, "example": {"y": IMAGES}}, "must take the inputs"),
        ({"model": nn.Linear(3, 3), "norms": {"batch": "group"}}, "must mean a layer"),
        ({"model": nn.Linear(3, 3), "accelerated": True}, "a norm that can be replaced"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(NormError, match=said):
        normkit.replace(**{"model": small()} | arguments)


def test_turned_keeps_values_of_records():
    """Gemma's gamma starts at 0, and is 1 more elsewhere."""
    norm = ours.RMSNorm(4, gain="1+w")
    nn.init.constant_(norm.weight, 0.25)
    record = read(norm)
    assert replacement.turned(record, "rms").gamma[0] == 0.25
    assert replacement.turned(record, "layer").gamma[0] == 1.25
    result = normkit.replace(nn.Sequential(norm), {"rms": "layer"})
    assert torch.equal(result[0].weight, torch.full((4,), 1.25))


class Theirs(nn.Module):
    """As torchvision writes it: x * scale + shift, everything a buffer."""

    def __init__(self, n, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        w, b, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


TheirsFrozenBatchNorm2d = type("FrozenBatchNorm2d", (Theirs,), {})


@pytest.mark.parametrize("old", ["batch", "ghost", "renorm", "sync", "no affine"])
def test_what_keeps_statistics_becomes_constants_and_comes_back(old):
    norms = {"sync": ours.SyncBatchNorm(8), "no affine": nn.BatchNorm2d(8, affine=False)}
    model, x = holder(norms.get(old) or norm_layer(old, 8, 2)), values(SHAPES[2])
    kind, example = (old if old in CATALOG else "batch"), (x if old == "sync" else None)
    result, report = normkit.replace(model, {kind: "frozen"}, example=example, return_report=True)
    assert type(result[1]) is ours.FrozenBatchNorm2d
    assert "statistics too, all as constants" in report.done[0].reason
    assert not list(result[1].parameters())
    assert list(result[1].state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    for mode in (True, False):
        close(model(x), result.train(mode)(x), 1e-6)
    state = copy.deepcopy(result.state_dict())
    result.train()(x)
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
    back = normkit.replace(result.eval(), {"frozen": "batch"})
    assert type(back[1]) is ours.BatchNorm2d
    assert back[1].momentum == 0.1
    assert all(p.requires_grad for p in back[1].parameters())
    close(model(x), back(x), 1e-6)
    assert not torch.equal(back.train()[1](x), result[1](x)), "it is trained again"


def test_frozen_batch_norm_of_others_is_a_source_and_loads():
    x = values(SHAPES[2])
    for norm in (Theirs(8, 1e-3), TheirsFrozenBatchNorm2d(8)):
        model = nn.Sequential(nn.Identity(), norm)
        result = normkit.replace(model, {"frozen": "batch"}, example=x)
        assert type(result[1]) is ours.BatchNorm2d
        close(model(x), result.eval()(x), 1e-6)
        again = normkit.replace(model, {"frozen": "frozen"}, example=x)
        close(model(x), again(x), 1e-6)
        mine = ours.FrozenBatchNorm2d(8, norm.eps)
        mine.load_state_dict(norm.state_dict())
        mine.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(3)})
        close(norm(x), mine(x), 1e-6)
    mine = normkit.replace(nn.Sequential(TheirsFrozenBatchNorm2d(8)), accelerated=True)
    assert type(mine[0]) is ours.FrozenBatchNorm2d


def test_constants_are_folded_and_neither_recalibrated_nor_moved_elsewhere():
    model = normkit.replace(small(), {"batch": "frozen"})
    before = model(IMAGES)
    folded, report = normkit.fold(model.train(), IMAGES, return_report=True)
    assert [edit.new for edit in report.edits] == ["identity"]
    close(before, folded(IMAGES), 1e-6)
    with pytest.raises(NormError, match="that are not frozen"):
        normkit.recalibrate(model, IMAGES)
    with pytest.raises(NormError, match="one that can be trained, to be ported; got frozen batch norm of 8"):
        normkit.port(model, to="torch")
    half = copy.deepcopy(model).bfloat16()
    assert half[1].running_var.dtype == torch.float32
    assert half(IMAGES.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("norm", "shape", "said"),
    [
        (nn.BatchNorm3d(8), None, "must be given images"),
        (nn.BatchNorm1d(8), (4, 8), "must be given images"),
        (norm_layer("batch", 8), None, "takes any number of axes. hint: normkit.freeze; or an example"),
        (norm_layer("batch", 8), SHAPES[1], "got another number of axes"),
        (nn.GroupNorm(2, 8), None, "must have been one with kept statistics; got group norm of 8"),
        (nn.LayerNorm((3, 8)), None, "frozen norm needs one axis of channels"),
    ],
)
def test_what_cannot_be_constants(norm, shape, said):
    model = nn.Sequential(copy.deepcopy(norm), nn.BatchNorm2d(8))
    example = None if shape is None else values(shape)
    if example is not None:
        model = nn.Sequential(model[0])
    report = normkit.replace(model, {type(norm): "frozen"}, example=example, dry_run=True)
    assert said in report.kept[0].reason


def test_frozen_is_no_normalizer_of_the_catalog():
    with pytest.raises(NormError, match="must mean a layer of the model; got 'frozen'"):
        normkit.replace(small(), {"frozen": "batch"})
    with pytest.raises(NormError, match="a normalizer must be in the catalog; got 'frozen'"):
        normkit.insert(small(), "frozen", IMAGES)
    with pytest.raises(NormError, match="'frozen'"):
        normkit.compare("cnn", norms=["frozen"])
