"""Norms go where the flow of data says, nothing else changes, and the report says why."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from architectures import built, randomized
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normkit
from normkit import torch as ours
from normkit.errors import NormError
from normkit.torch import insertion as torch_insertion

# Of the largest output. gamma and beta are rounded once, 6e-8 or 1e-16, and depth adds up; the limits are the issue's.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def close(before, after, limit):
    assert (before - after).abs().max() <= limit * before.abs().max()


def places(report):
    return [edit.path for edit in report.done]


def images(n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """Functions instead of layers, a skip connection, layers in a list, two heads, a softmax."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 1)})
                                    for _ in range(2))  # fmt: skip
        self.hidden, self.logits, self.box = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(7, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu_(x + block["b"](block["a"](x).relu()))
        x = F.gelu(self.hidden(x.mean((2, 3))))
        return self.logits(x).softmax(-1), self.box(x)


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5), nn.SiLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def test_the_flow_of_data_says_where():
    model, report = normkit.insert(Functional(), "batch", images(), return_report=True)
    maps = ["stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "hidden"]
    assert places(report) == maps
    assert [edit.path for edit in report.kept] == ["logits", "box"]
    for path in maps:
        assert type(model.get_submodule(path).norm) is (ours.BatchNorm1d if path == "hidden" else ours.BatchNorm2d)
    assert report.how == "dynamo"
    assert report.difference > 0


@pytest.mark.parametrize(
    "norm", ["batch", "ghost", "renorm", "instance", "group", "layer", "rms", lambda channels: nn.BatchNorm2d(channels)]
)
def test_what_comes_out_is_the_norm_of_what_the_map_gave(norm):
    """In training, against the parts called one by one."""
    conv, x = nn.Conv2d(3, 4, 3), images()
    model = normkit.insert(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 4, 1)), norm, x)
    twin = copy.deepcopy(model[0].norm)
    # The bias is gone where the norm subtracts it. Sums of some hundred values: a hundred roundings.
    torch.testing.assert_close(model[0](x), twin(conv(x)), atol=1e-5, rtol=1e-5)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(norm, str) or type(model[0].norm) is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("norm", ["batch", "ghost", "renorm"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_identity_changes_nothing_in_evaluation(placement, norm, dtype):
    model, x = plain().to(dtype), images().to(dtype)
    result = normkit.insert(model, norm, x, placement=placement, init="identity")
    other = 3 * images(7).to(dtype) + 1
    with torch.no_grad():
        for inputs in (x, other):
            close(model.eval()(inputs), result.eval()(inputs), CLOSE[dtype])
        outputs = result.train()(x)
        # Trained on the example, its own statistics are nearly those that are kept: the variance lacks n/(n-1), with
        # 4 samples 4/3 at the last layer.
        assert (outputs - model(x)).abs().max() < 0.5 * model(x).abs().max()


CUTS = {
    "array": lambda x: x.numpy(),
    "array and targets": lambda x: (x, torch.zeros(len(x))),
    "ragged batches": lambda x: [x[:1], x[1:7], x[7:]],
    "batches in another order": lambda x: iter([x[20:], x[:20]]),
    "loader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), 9),
}


@pytest.mark.parametrize("cut", CUTS)
def test_identity_by_the_statistics_of_all_data(cut):
    """However it is cut and ordered; the outputs stay all the same."""
    model, x = plain().double(), 3 * images(40).double() + torch.linspace(-2, 2, 40).double()[:, None, None, None]
    result, report = normkit.insert(model, "batch", x[:2], init="identity", data=CUTS[cut](x), return_report=True)
    assert report.difference <= CLOSE[torch.float64]
    close(model.eval()(x), result.eval()(x), CLOSE[torch.float64])
    values = model[:3](x).movedim(1, -1).flatten(0, -2).detach()  # what the second norm is given, bias included
    norm = result[2].norm
    torch.testing.assert_close(norm.bias, values.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_var, values.var(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.weight.detach(), (norm.running_var + norm.eps).sqrt(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_identity_that_changes_the_outputs_is_taken_back(inplace):
    def shifted(channels):
        norm = nn.BatchNorm2d(channels)
        norm.register_forward_hook(lambda _, given, y: y + 0.1)
        return norm

    model = plain()[:3]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held, kinds = optimizer.param_groups[0]["params"], [type(layer) for layer in model]
    for norm, data, said in (
        (shifted, None, r"must stay within 1e-05 of the largest; got a change of .*; nothing was inserted"),
        ("batch", images() * torch.nan, "a change of inf; nothing was inserted"),
    ):
        with pytest.raises(NormError, match=said):
            normkit.insert(model, norm, images(), init="identity", data=data, inplace=inplace, optimizer=optimizer)
        assert [type(layer) for layer in model] == kinds
        assert not hasattr(model[0], "norm")
        assert optimizer.param_groups[0]["params"] == held == list(model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_while_data_is_read_takes_everything_back(error):
    def broken():
        yield images()
        raise error

    model = plain()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        normkit.insert(model, "batch", images(), init="identity", data=broken(), inplace=True)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "segformer", "gpt2", "llama", "bert", "wav2vec2", "efficientnet"])
def test_identity_in_architectures(name):
    model, x = built(name)
    result, report = normkit.insert(model, "batch", x, init="identity", return_report=True)
    assert report.done
    assert report.difference <= CLOSE[torch.float32]
    kept = {edit.path: edit.reason for edit in report.kept}
    assert all("attention" in kept[path] or "normalizes" in kept[path] for path in kept if "q_proj" in path)
    before, after = model.state_dict(), result.state_dict()
    inserted = {key for key in after if ".norm." in key and key not in before}
    assert inserted
    biases = {f"{path}.bias" for path in places(report)}
    assert before.keys() - after.keys() <= biases
    assert after.keys() - before.keys() == inserted


def test_the_state_dict_only_gains_entries():
    model = plain()
    result = normkit.insert(model, "layer", images())
    before, after = model.state_dict(), result.state_dict()
    assert before.keys() < after.keys()
    assert {key.rpartition(".")[0] for key in after.keys() - before.keys()} == {"0.norm", "2.norm", "5.norm"}
    result.load_state_dict(before, strict=False)


@pytest.mark.parametrize(("norm", "init"), [("batch", "fresh"), ("renorm", "identity"), ("instance", "fresh")])
def test_a_bias_that_is_subtracted_again_goes(norm, init):
    model, x = plain()[:3], images()
    with torch.no_grad():
        model[0].bias.uniform_(3, 5)
    result, report = normkit.insert(model, norm, x, init=init, return_report=True)
    assert result[0].bias is None
    assert "bias goes" in report.done[0].reason
    reference = copy.deepcopy(result)
    reference[0].bias = nn.Parameter(model[0].bias.detach().clone())
    if norm != "instance":
        reference[0].norm.running_mean += model[0].bias.detach()
    for mode in (True, False):  # the limits of the issue
        close(reference.train(mode)(x), result.train(mode)(x), 1e-5 if mode else 1e-6)


def test_a_bias_that_something_else_reads_stays():
    model = plain()[:3]
    model.register_parameter("shared", model[0].bias)
    result, report = normkit.insert(model, "batch", images(), return_report=True)
    assert result[0].bias is result.shared
    assert "bias" not in report.done[0].reason


def test_after_the_activation():
    model, report = normkit.insert(Functional(), "batch", images(), placement="after", return_report=True)
    reasons = {edit.path: edit.reason for edit in report.kept}
    # relu is a function: its one reader takes the norm. Where a skip connection reads it too there is no place.
    assert places(report) == ["blocks.0.b", "blocks.1.b"]
    assert "read" in reasons["stem"]
    assert "read" in reasons["hidden"]
    x = torch.randn(2, 6, 4, 4)
    block = model.blocks[0]["b"].eval()
    torch.testing.assert_close(block(x), F.conv2d(block.norm(x), block.weight, block.bias))
    layers = normkit.insert(plain(), "batch", images(), placement="after")
    assert [name for name, _ in layers.named_modules() if name.endswith("norm")] == ["1.norm", "3.norm", "6.norm"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.end = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.end(self.act(self.conv(self.act(self.conv(x)))))


class Attention(nn.Module):
    """Projections by hand, a gate, a swish by hand."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.gate, self.up, self.down = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        y = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        u = self.up(y)
        return self.down(u * u.sigmoid() * torch.sigmoid(self.gate(x)))


def changed():
    model = plain()
    model[0] = weight_norm(model[0])
    model[2].forward = model[2].forward
    return model


REFUSED = {
    "called twice": (Twice(), images(), {"conv": "called 2 times", "end": "no linear map follows"}),
    "attention, gates": (
        Attention(), torch.randn(2, 5, 6),
        {"q": "attention", "k": "attention", "v": "attention", "gate": "gate", "down": "no linear map follows"},
    ),
    "normalized": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        images(), {"0": "normalizes its output already", "3": "no linear map follows"},
    ),
    "two in a row": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        images(), {"0": "no activation stands between", "3": "no linear map follows"},
    ),
    "parametrized, replaced": (
        changed(), images(), {"0": "parametrized", "2": "forward was replaced", "7": "no linear map follows"},
    ),
    "encoder": (
        nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        torch.randn(2, 3, 6), {"0": "", "1.linear1": "TransformerEncoderLayer", "1.linear2": "normalizes"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gets_no_norm_and_why(case):
    model, x, wanted = copy.deepcopy(REFUSED[case])
    report = normkit.insert(model, "layer", x, dry_run=True)
    reasons = {edit.path: edit.reason for edit in report.kept}
    assert reasons.keys() == wanted.keys(), report
    assert all(said in reasons[path] for path, said in wanted.items()), report


def test_a_layer_that_pads_and_reshapes_is_still_one():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (1, 1, 1, 1), mode="circular"))

    model = nn.Sequential(Same(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    result = normkit.insert(model, "batch", images())
    assert isinstance(result[0], Same)
    assert result[0].bias is not None  # what its forward does with it is its own


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (nn.Conv2d, ["0", "2"]),
        ([nn.Linear], ["5"]),
        (["7"], ["7"]),  # a path gets a norm whatever follows
        (lambda path, layer: path > "0" and isinstance(layer, nn.Conv2d), ["2"]),
        ([nn.Conv2d, "7"], ["0", "2", "7"]),
    ],
)
def test_after_names_layers(after, found):
    report = normkit.insert(plain(), "batch", images(), after=after, dry_run=True)
    assert places(report) == found


def test_the_last_ones_too():
    report = normkit.insert(plain().append(nn.ReLU()), "batch", images(), except_last=False, dry_run=True)
    assert places(report) == ["0", "2", "5", "7"]
    report = normkit.insert(plain().append(nn.Softmax(-1)), "batch", images(), except_last=False, dry_run=True)
    assert [edit.reason for edit in report.kept] == ["no activation follows"]  # a head is no attention


def test_where_batches_are_counted_the_example_is_one():
    """Else the first batch of the training would take its place in an average of all."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = images()
    made = normkit.insert(model, lambda n: nn.BatchNorm2d(n, momentum=None), x, after="0", init="identity")
    made.train()(x + 1)
    means = [model[0](one).mean((0, 2, 3)) for one in (x, x + 1)]
    torch.testing.assert_close(made[0].norm.running_mean, (means[0] + means[1]) / 2)


def test_a_layer_under_two_names_stays_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.others = nn.Linear(4, 4), nn.Linear(4, 2), []
            self.again = self.a
            self.others.append(self.a)

        def forward(self, x):
            return self.b(F.relu(self.again(x)))

    result = normkit.insert(Tied(), "batch", torch.randn(3, 4))
    assert result.a is result.again is result.others[0]
    assert "again.norm.weight" in result.state_dict()


def test_channels_of_linear_maps_over_sequences_are_last():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(3, 7, 5) + 2
    result = normkit.insert(model, "batch", x).train()
    outputs = result[0](x)
    assert outputs.mean((0, 1)).abs().max() < 1e-5  # of values around 1, 21 of them summed in float32
    with pytest.raises(NormError, match="instance_norm needs spatial axes"):
        normkit.insert(model, "instance", torch.randn(3, 5))


def test_the_original_stays_and_what_belongs_to_it_goes_along():
    model = plain()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[2].requires_grad_(False)
    model[5].eval()
    model.tag = "mine"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(layer) for layer in model]
    random = torch.get_rng_state()
    report = normkit.insert(model, "batch", images(), dry_run=True)
    assert len(report.done) == 3
    result = normkit.insert(model, "batch", images())
    assert torch.equal(torch.get_rng_state(), random)
    assert [type(layer) for layer in model] == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    calls.clear()
    result(images())
    assert calls == [1]
    assert result.tag == "mine"
    assert not any(p.requires_grad for p in result[2].parameters())
    assert all(p.requires_grad for p in result[0].parameters())
    assert [result[at].norm.training for at in (0, 2, 5)] == [True, True, False]
    half = normkit.insert(plain().bfloat16(), "batch", images())
    assert half[0].norm.weight.dtype == torch.bfloat16
    assert half[0].norm.running_var.dtype == torch.float32


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_model_with_norms_can_be_copied_pickled_exported_and_compiled(placement, tmp_path):
    model = randomized(normkit.insert(plain(), "batch", images(), placement=placement))
    x = images()
    torch.save(model, tmp_path / "model.pt")
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in (*twins, exported, compiled, torch.fx.symbolic_trace(model)):
        close(model(x), twin(x), CLOSE[torch.float32])
    assert all([type(layer) for layer in twin] == [type(layer) for layer in model] for twin in twins)
    again = normkit.insert(plain(), "batch", images(), placement=placement)
    again.load_state_dict(model.state_dict())
    close(model(x), again.eval()(x), CLOSE[torch.float32])


def test_inserted_norms_can_be_folded_and_removed_again():
    model = randomized(normkit.insert(Functional(), "batch", images()))
    folded, report = normkit.fold(model, images(), return_report=True)
    assert len(report.done) == 6
    close(model(images())[1], folded(images())[1], CLOSE[torch.float32])
    original = Functional()
    again = normkit.remove(normkit.insert(original, "layer", images()), "layer")
    assert [type(layer) for layer in again.modules()] == [type(layer) for layer in original.modules()]
    assert torch.equal(again(images())[1], original(images())[1])
    inserted = places(normkit.insert(again, "group", images(), dry_run=True))
    assert [f"{path}.norm" for path in inserted] == places(report)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_made_before_trains_the_result(inplace):
    model, x = plain(), images()
    optimizer = torch.optim.SGD(
        [{"params": model[:3].parameters(), "lr": 0.1}, {"params": model[3:].parameters(), "lr": 0.2}],
        lr=0.3,
        momentum=0.9,
    )
    model(x).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    report = normkit.insert(model, "batch", x, dry_run=True)
    assert any("optimizer" in note for note in report.notes)
    result = normkit.insert(model, "batch", x, inplace=inplace, optimizer=optimizer)
    assert (result is model) == inplace
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held == [{id(p) for p in result[:3].parameters()}, {id(p) for p in result[3:].parameters()}]
    assert torch.equal(optimizer.state[result[0].weight]["momentum_buffer"], momentum)
    before = {name: p.detach().clone() for name, p in result.named_parameters()}
    optimizer.zero_grad()
    result(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in result.named_parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["_put", "_calibrate", "_move_bias", "evaluated"])
def test_in_place_is_all_or_nothing(monkeypatch, error, moment):
    model = plain()
    real, calls = getattr(torch_insertion, moment), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2 or moment == "_calibrate":
            raise error("in the middle")
        return real(*args)

    monkeypatch.setattr(torch_insertion, moment, failing)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    kinds = [type(layer) for layer in model.modules()]
    with pytest.raises(error, match="in the middle"):
        normkit.insert(model, "batch", images(), init="identity", inplace=True)
    assert dict(model.named_parameters()) == parameters
    assert [type(layer) for layer in model.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"norm": "bach"}, "did you mean batch"),
        ({"norm": nn.BatchNorm2d}, "a function from the number of channels"),
        ({"norm": nn.BatchNorm2d(4)}, "a function from the number of channels"),
        ({"norm": 3}, "a function from the number of channels"),
        ({"norm": lambda n: n}, "must give a torch.nn.Module"),
        ({"placement": "behind"}, "one of 'before', 'after'"),
        ({"init": "zero"}, "one of 'fresh', 'identity'"),
        ({"inplace": 1}, "True or False"),
        ({"after": "conv"}, "must mean a layer"),
        ({"after": nn.Conv3d}, "must mean a layer"),
        ({"after": [3]}, "paths, classes"),
        ({"after": ["4"]}, "neither a convolution nor a linear map"),
        ({"norm": "layer", "init": "identity"}, "kept statistics"),
        ({"data": images()}, "`data` must be left out unless statistics are taken; got data, and init='fresh'"),
        ({"init": "identity", "data": []}, "`data` must hold at least one batch"),
        ({"norm": "frozen"}, "a normalizer must be in the catalog; got 'frozen'"),
        ({"model": nn.Linear(3, 3), "example": torch.randn(2, 3)}, "linear map that a norm can follow"),
        ({"model": torch.jit.script(nn.Linear(3, 3)), "example": torch.randn(2, 3)}, "plain torch.nn.Module"),
        ({"model": 3}, "a model must be"),
        ({"example": {"y": images()}}, "must take the inputs"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_bad_arguments(arguments, said):
    with pytest.raises(NormError, match=said):
        normkit.insert(**{"model": plain(), "norm": "batch", "example": images()} | arguments)


def test_where_tracing_fails_sequences_are_read(monkeypatch):
    monkeypatch.setattr("normkit.torch.graph._dynamo", lambda *_: None)
    monkeypatch.setattr("normkit.torch.graph._export", lambda *_: None)
    report = normkit.insert(plain()[:6], "batch", images(), dry_run=True)
    assert report.how == "modules"
    assert places(report) == ["0", "2"]
    assert "could not be seen" in report.kept[0].reason
