import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
import normkit.torch as nkt
from normkit.errors import NormError


class Theirs(nn.BatchNorm2d):
    """Somebody's subclass, with a mode and an activation of its own."""

    def train(self, mode=True):
        self.told = mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x).relu()


NORMS = {
    "torch": nn.BatchNorm2d,
    "ours": nkt.BatchNorm2d,
    "theirs": Theirs,
    "sync": nn.SyncBatchNorm,
    "our sync": nkt.SyncBatchNorm,
    "renorm": nkt.BatchRenorm2d,
    "ghost": lambda n: nkt.GhostBatchNorm2d(n, virtual_batch_size=2),
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
    "evonorm_b0": nkt.EvoNormB0,
    "our_instance": lambda n: nkt.InstanceNorm2d(n, affine=True, track_running_stats=True),
}


def network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3), norm(3), nn.Flatten())
    for module in (model[1], model[4]):
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
        next(b for name, b in module.named_buffers() if name in ("running_var", "running_std")).uniform_(0.5, 2)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    return model


def images(seed=1):
    return 3 + torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def same(model, kept):
    return all(value.equal(kept[name]) for name, value in model.named_buffers())


def train(model, parameters, steps=10):
    """As a loop that keeps zeros for gradients, which is where weight decay moves what is frozen."""
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for seed in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=False)
        model(images(seed)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_ten_steps_of_training_move_nothing(norm):
    model = network(norm)
    everything = list(model.parameters())
    train(model.eval(), everything, 1)  # gradients are there before the layers are frozen
    norms = [model[1], model[4]]
    kept, weights = buffers(model), [[p.clone() for p in layer.parameters()] for layer in norms]
    x = images()
    wanted = copy.deepcopy(model).eval()
    assert normkit.freeze(model) is model
    assert torch.equal(model.train()(x), wanted(x)), "evaluation to the last bit"
    train(model, everything)
    assert same(model, kept)
    for layer, before in zip(norms, weights, strict=True):
        assert all(p.equal(q) for p, q in zip(layer.parameters(), before, strict=True))
    assert not model[0].weight.equal(wanted[0].weight), "what is not frozen learns, through the frozen layers"


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_gamma_and_beta_train_where_asked(norm):
    model = normkit.freeze(network(norm), affine=False)
    kept, gamma = buffers(model), model[1].weight.clone()
    x = images().requires_grad_()
    model.train()(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    train(model, model.parameters(), 2)
    assert same(model, kept)
    assert not model[1].weight.equal(gamma)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nkt.BatchNorm2d, Theirs], ids=["torch", "ours", "theirs"])
def test_nothing_else_changes_and_unfreezing_restores(norm):
    model = network(norm)
    model[4].bias.requires_grad_(False)
    model.train()[4].eval()
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    text, keys = repr(model), list(model.state_dict())
    needed = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    members = {id(m): set(vars(m)) for m in model.modules()}
    normkit.freeze(normkit.freeze(model), affine=True)
    assert (repr(model), list(model.state_dict()), type(model[1])) == (text, keys, norm)
    model(images())
    assert called == [1]
    assert normkit.unfreeze(model) is model
    assert [p.requires_grad for p in model.parameters()] == needed
    assert [m.training for m in model.modules()] == modes
    assert all(set(vars(m)) == members[id(m)] for m in model.modules())
    kept = buffers(model)
    model.train()(images())
    assert not same(model, kept), "it counts batches again"


def test_unfrozen_layers_are_in_the_mode_that_was_asked_for_last():
    model = normkit.freeze(network(nn.BatchNorm2d)).eval()
    assert not normkit.unfreeze(model)[1].training
    assert normkit.unfreeze(normkit.freeze(model).train())[1].training


def test_what_a_frozen_layer_holds_is_in_the_mode_of_the_model():
    class Noisy(nn.BatchNorm1d):
        def __init__(self, n):
            super().__init__(n)
            self.noise = nn.Dropout()

    model = normkit.freeze(nn.Sequential(Noisy(3)))
    assert [(model.train(mode)[0].training, model[0].noise.training) for mode in (True, False)] == [
        (False, True),
        (False, False),
    ]


def test_a_part_can_be_unfrozen_and_what_is_asked_last_holds():
    model = normkit.freeze(network(nn.BatchNorm2d))
    normkit.unfreeze(model[1])
    assert [model.train()[at].training for at in (1, 4)] == [True, False]
    normkit.freeze(model, affine=False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_part_alone_is_frozen():
    """The backbone; the head goes on, through what is frozen, whatever the whole is set to."""
    model = nn.Sequential(network(nn.BatchNorm2d), nn.BatchNorm1d(48), nn.Linear(48, 2))
    assert normkit.freeze(model[0]) is model[0]
    kept, weights = buffers(model[0]), [p.clone() for p in model.parameters()]
    train(model, model.parameters(), 3)
    assert same(model[0], kept)
    assert [layer.training for layer in (model[0][1], model[0][4], model[1])] == [False, False, True]
    assert model[1].running_mean.any()
    moved = {name for (name, p), q in zip(model.named_parameters(), weights, strict=True) if not p.equal(q)}
    maps = {"0.0.weight", "0.0.bias", "0.3.weight", "0.3.bias"}
    assert moved == maps | {"1.weight", "1.bias", "2.weight", "2.bias"}


def saved(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "average": lambda model, _: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_frozen(copied, tmp_path):
    model = normkit.freeze(network(nn.BatchNorm2d))
    other = copied(model, tmp_path).train()
    kept = buffers(other)
    assert torch.equal(other(images()), model(images()))
    assert same(other, kept)
    assert normkit.unfreeze(other).train()[1].training
    assert not model.train()[1].training, "each copy is its own"


def test_averaging_leaves_frozen_statistics_alone():
    model = normkit.freeze(network(nn.BatchNorm2d))
    kept = buffers(model)
    torch.optim.swa_utils.update_bn([images()], model)
    assert same(model, kept)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_layers_are_not_recalibrated(training):
    model = network(nn.BatchNorm2d)
    normkit.freeze(model[1])
    kept = buffers(model)
    normkit.recalibrate(model.train(training), images())
    assert model[1].running_mean.equal(kept["1.running_mean"])
    assert not model[4].running_mean.equal(kept["4.running_mean"])


def test_compiled_models_stay_frozen():
    model = normkit.freeze(network(nkt.BatchNorm2d))
    kept = buffers(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    compiled.train()(images())
    assert same(model, kept)


def test_norms_without_statistics_keep_their_parameters_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    normkit.freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    with pytest.raises(NormError, match="must hold norm layers with running statistics to be frozen; got Sequential"):
        normkit.freeze(model, affine=False)
    with pytest.raises(NormError, match="must hold norm layers to be frozen; got Linear"):
        normkit.freeze(model[0])
    with pytest.raises(NormError, match="`affine` must be True or False; got 1"):
        normkit.freeze(model, affine=1)


class ForeignRMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))
        self.inner = nn.Linear(n, n)

    def forward(self, x):
        return self.inner(F.normalize(x) * self.scale)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.TransformerEncoderLayer(4, 2, 8, norm_first=True, batch_first=True)
        self.again = self.body.norm1
        self.foreign = ForeignRMSNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.fixed = nn.Parameter(torch.ones(3, 3), requires_grad=False)


@pytest.mark.parametrize("biases", [False, True])
def test_every_trainable_parameter_is_in_one_group_once(biases):
    model = Tied()
    decayed, kept = normkit.param_groups(model, 0.05, biases=biases)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [sorted(names[id(p)] for p in group["params"]) for group in (decayed, kept)]
    assert sorted(found[0] + found[1]) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    norms = {"body.norm1.weight", "body.norm1.bias", "body.norm2.weight", "body.norm2.bias", "foreign.scale"}
    bias = {name for name in names.values() if name.endswith("bias")} - norms
    assert bias >= {"body.self_attn.in_proj_bias", "foreign.inner.bias", "head.bias"}
    assert set(found[1]) == (norms if biases else norms | bias)
    torch.optim.AdamW([decayed, kept], lr=1e-3)


def test_a_step_without_gradient_decays_what_is_meant_to_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.ones_(model[0].bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(normkit.param_groups(model, 0.5), lr=1.0).step()
    assert {name: (p / before[name]).nanmean().item() for name, p in model.named_parameters()} == pytest.approx(
        {"0.weight": 0.5, "0.bias": 1.0, "1.weight": 1.0, "1.bias": float("nan")}, nan_ok=True
    )


def test_groups_of_frozen_and_lazy_models():
    model = normkit.freeze(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    (only,) = normkit.param_groups(model, 0.05)
    assert only["weight_decay"] == 0.05
    with pytest.raises(NormError, match="layers must know the size of their input"):
        normkit.param_groups(nn.Sequential(nn.LazyLinear(3)), 0.05)
    with pytest.raises(NormError, match="`weight_decay` must be a finite number of at least 0; got -1"):
        normkit.param_groups(model, -1)
