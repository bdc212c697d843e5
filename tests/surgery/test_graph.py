"""Who feeds whom, read from models written in every usual way, without a trace left in them."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.torch import graph as read

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Mixed(nn.Module):
    """Layers, functions and methods; a layer called twice, one registered twice, a weight used by a function."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(), nn.Dropout(0.5))
        self.alias = self.conv
        self.weight = nn.Parameter(torch.ones(3, 3, 1, 1))
        self.rows = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        y = self.again(self.again(self.alias(y))).relu_()
        y = F.conv2d(y, self.weight) + x
        y = F.batch_norm(y, self.mean, self.var)
        left, _ = y.chunk(2, dim=-1)
        y = y.mean((2, 3))
        for row in self.rows:
            y = row(y)
        return {"y": y, "left": left}


class Untraced(Mixed):
    """Dynamo cannot follow a value that leaves torch; torch.export cannot either, as the branch depends on it."""

    def forward(self, x):
        if float(x.numpy().sum()) > 1e9:
            return x
        return super().forward(x)


def numpy_state():
    return str(np.random.get_state())  # noqa: NPY002  # which user code may draw from


def capture(model, x, whole=lambda module: isinstance(module, nn.BatchNorm2d)):
    return read.capture(model, x, whole)


@torch._dynamo.disable
def doubled(x):
    return x * 2


class Broken(nn.Module):
    """A graph break for Dynamo only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.body(doubled(x))


def test_every_call_is_a_node_with_its_inputs():
    graph = capture(Mixed().eval(), X).graph
    assert graph.how == "dynamo"
    calls = [(node.op, node.path, node.inputs) for node in graph.nodes]
    assert calls == [
        ("input", "", ()),
        ("conv2d", "conv", (0,)),
        ("batch_norm", "norm", (1,)),
        ("relu", "", (2,)),
        ("conv2d", "conv", (3,)),  # by its other name: the first path names it
        ("conv2d", "again.0", (4,)),
        ("relu", "again.2", (5,)),
        ("dropout", "again.3", (6,)),
        ("conv2d", "again.0", (7,)),
        ("relu", "again.2", (8,)),
        ("dropout", "again.3", (9,)),
        ("relu", "", (10,)),
        ("conv2d", "", (11,)),
        ("add", "", (12, 0)),
        ("batch_norm", "", (13,)),
        ("chunk", "", (14,)),
        ("getitem", "", (15,)),
        ("mean", "", (14,)),
        ("linear", "rows.0", (17,)),
        ("linear", "rows.1", (18,)),
        ("output", "", (19, 16)),
    ]
    conv = graph[1]
    assert conv.shape == (2, 3, 8, 8)
    assert conv.state == {"weight": "conv.weight", "bias": "conv.bias"}
    assert (conv.options["padding"], conv.options["groups"]) == ((1, 1), 1)
    assert [len(graph.calls(path)) for path in ("conv", "again.0", "norm", "again.1")] == [2, 2, 1, 0]
    assert [node.id for node in graph.readers("conv.weight")] == [1, 4]
    assert [node.id for node in graph.readers("weight")] == [12]
    assert [node.op for node in graph.consumers(graph[14])] == ["chunk", "mean"]
    assert [node.op for node in graph.producers(graph[13])] == ["conv2d", "input"]
    assert not graph[12].layer
    assert graph[1].layer


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_of_several_functions_is_one_node_where_asked(training):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")).train(training)
    graph = capture(model, X).graph  # in training it counts its batches too
    assert [node.op for node in graph.nodes][-3:] == ["pad", "conv2d", "output"]
    assert (len(graph.calls("0")), graph.calls("0")[0].inputs) == (1, (0,))
    assert not graph.calls("1")
    assert len(capture(model, X, lambda module: module is model[1]).graph.calls("1")) == 1


def test_a_graph_break_is_detected_and_export_takes_over(capfd):
    graph = capture(Broken().eval(), X).graph
    assert graph.how == "export"
    assert [(n.op, n.path) for n in graph.nodes[-4:-1]] == [
        ("conv2d", "body.0"), ("batch_norm", "body.1"), ("relu", "body.2"),
    ]  # fmt: skip
    assert graph.calls("body.0")[0].state == {"weight": "body.0.weight", "bias": "body.0.bias"}
    assert capfd.readouterr() == ("", "")


def test_where_nothing_can_be_traced_sequences_are_known(capfd):
    graph = capture(Untraced().eval(), X).graph
    assert graph.how == "modules"
    first = graph.calls("again.0")[0]
    assert [n.op for n in graph.consumers(first)] == ["identity"]
    assert [n.op for n in graph.producers(first)] == ["unknown"]
    last = graph.calls("again.3")[-1]
    assert [n.op for n in graph.consumers(last)] == ["unknown"]
    # What forward does with these two is not known, though they are called one after the other.
    assert [n.op for n in graph.producers(graph.calls("norm")[0])] == ["unknown"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [Mixed, Broken, Untraced])
@pytest.mark.parametrize("training", [False, True])
def test_a_capture_leaves_no_trace(kind, training):
    torch.manual_seed(3)
    model = kind().train(training)
    hooked = []
    model.register_forward_hook(lambda *_: hooked.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, before = X.clone(), (torch.get_rng_state(), random.getstate(), numpy_state())
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    capture(model, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy_state()) == before[1:]
    assert torch.equal(x, X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_compiled_stays_compiled():
    counter = torch._dynamo.testing.CompileCounter()
    model = Mixed().eval()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(X)
        for _ in range(2 * torch._dynamo.config.recompile_limit):  # each would fill a place of the cache
            capture(model, X)
        compiled(X)
    assert counter.frame_count == 1


def test_a_graph_is_printed_as_a_table():
    graph = capture(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(4, 3)).graph
    assert str(graph).splitlines() == [
        "id  function  called in  inputs  shape",
        "0   input                        4 x 3",
        "1   linear    0          0       4 x 2",
        "2   relu      1          1       4 x 2",
        "3   output               2",
    ]
    assert graph._repr_html_().count("<tr>") == 5


@pytest.mark.parametrize(
    ("kind", "axes"), [(nn.Dropout, 2), (nn.Dropout1d, 3), (nn.Dropout2d, 4), (nn.AlphaDropout, 2)]
)
def test_every_dropout_says_how_much_it_drops(kind, axes):
    graph = read.capture(nn.Sequential(kind(0.25)).eval(), torch.zeros([2] * axes), lambda _: False).graph
    (node,) = (node for node in graph.nodes if "dropout" in node.op)
    assert (node.options["p"], node.options["training"]) == (0.25, False)
