import itertools
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import normkit
import normkit.torch as nkt
from normkit.errors import NormError
from normkit.torch import BatchNorm1d, BatchRenorm1d


def data(samples=1000, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, 3, 4)
    # Batches differ: the mean drifts, so the variance between batches is most of it.
    return (scale * rng.normal(size=(samples, 4)) + np.linspace(-5, 5, samples)[:, None]).astype(np.float32)


def deep(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3), norm(3))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d])
def test_the_first_layer_gets_the_moments_of_all_data_at_once(norm):
    model, x = nn.Sequential(norm(4)), data()
    normkit.recalibrate(model, x)
    np.testing.assert_allclose(model[0].running_mean, x.astype(np.float64).mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model[0].running_var, x.astype(np.float64).var(0, ddof=1), rtol=1e-6)


def test_evonorm_gets_the_variance_of_all_data_and_has_no_mean():
    layer, x = nkt.EvoNormB0(4), data(600).reshape(50, 3, 4, 4).swapaxes(1, 3)
    _, result = normkit.recalibrate(nn.Sequential(layer), np.split(x, (10, 30)), return_report=True)
    flat = x.astype(np.float64).swapaxes(0, 1).reshape(4, -1)
    np.testing.assert_allclose(layer.running_var, flat.var(1, ddof=1), rtol=1e-6)
    assert result.layers[0].shift == 0
    result.undo()
    assert layer.running_var.equal(torch.ones(4))


@pytest.mark.parametrize("sizes", [(2,) * 500, (100, 300, 600), (1000,)])
def test_how_the_data_is_cut_changes_nothing(sizes):
    x = data()
    whole, cut = (nn.Sequential(BatchNorm1d(4)) for _ in range(2))
    normkit.recalibrate(whole, x)
    normkit.recalibrate(cut, np.split(x, np.cumsum(sizes)[:-1]))
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(cut[0], name), getattr(whole[0], name), rtol=1e-6, atol=1e-6)


def test_a_batch_of_one_is_refused_and_nothing_changes():
    model, x = nn.Sequential(BatchNorm1d(4)), data()
    kept = state(model)
    with pytest.raises(NormError, match="at least 2 values"):
        normkit.recalibrate(model, [x[:10], x[:1]])
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


def test_order_does_not_matter_and_biased_layers_keep_the_biased_variance():
    x = data()
    layer = BatchNorm1d(4, bessel=False)
    normkit.recalibrate(nn.Sequential(layer), [x[500:], x[:500]])
    np.testing.assert_allclose(layer.running_var, x.astype(np.float64).var(0), rtol=1e-6)


def test_renorm_keeps_a_standard_deviation():
    x, layer = data(), BatchRenorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), x)
    np.testing.assert_allclose(layer.running_std, np.sqrt(x.astype(np.float64).var(0) + layer.eps), rtol=1e-6)


def test_evaluation_then_gives_what_training_gave():
    """Where evaluation was far off: one giant batch, no dropout. The kept variance is the unbiased one: n = 1000."""
    model, x = deep(), torch.from_numpy(data())
    before = model.eval()(x)
    normkit.recalibrate(model.train(), [x])
    assert model.training
    after = model.eval()(x)
    np.testing.assert_allclose(after.mean(0).detach(), 0, atol=1e-3)
    np.testing.assert_allclose(after.std(0).detach(), 1, atol=1e-2)
    assert before.std(0).max() > 1.5 or before.mean(0).abs().max() > 0.5


def test_nothing_else_changes():
    model, x = deep(), data()
    model[1].momentum = 0.3
    kept, rng = state(model), torch.get_rng_state()
    assert normkit.recalibrate(model, x) is model
    changed = {name for name, value in model.state_dict().items() if not value.equal(kept[name])}
    assert changed == {f"{n}.{s}" for n in (1, 5) for s in ("running_mean", "running_var")}
    assert torch.get_rng_state().equal(rng)
    assert (model[1].momentum, model.training, all(m.training for m in model)) == (0.3, True, True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_layers_are_left_out():
    model = deep()
    model[1].eval()
    kept = state(model)
    normkit.recalibrate(model, data())
    assert model[1].running_mean.equal(kept["1.running_mean"])
    assert not model[5].running_mean.equal(kept["5.running_mean"])
    assert not model[1].training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_changes_nothing(error):
    def broken():
        yield data(50)
        raise error

    model = deep()
    kept = state(model)
    with pytest.raises(error):
        normkit.recalibrate(model, broken())
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("pair", [tuple, list], ids=["pair", "two batches"])
def test_a_pair_of_arrays_is_inputs_and_targets_and_a_list_two_batches(pair):
    x, layer = data(300), nn.BatchNorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), pair((x, 100 + x)))
    expected = x if pair is tuple else np.concatenate([x, 100 + x])
    np.testing.assert_allclose(layer.running_mean, expected.astype(np.float64).mean(0), rtol=1e-5, atol=1e-5)


def test_batches_of_a_loader():
    x = torch.from_numpy(data())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(1000)), 100)
    layer = nn.BatchNorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), loader)
    np.testing.assert_allclose(layer.running_mean, x.double().mean(0), rtol=1e-5, atol=1e-5)


class Uncalled(nn.Sequential):
    """A model whose layers take no part in it."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (nn.Sequential(nn.Linear(4, 4)), data(), "must hold batch norms with running statistics"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), data(), "must hold batch norms"),
        (nn.Sequential(nn.LazyBatchNorm1d()), data(), "layers must know the size of their input"),
        (nn.Sequential(nn.BatchNorm1d(4)), [], "at least one batch; got none"),
        (nn.Sequential(nn.BatchNorm1d(4)), "digits", "must be an array, a tensor, or an iterable"),
        (nn.Sequential(nn.BatchNorm1d(4)), np.float32(3), "must be an array, a tensor, or an iterable"),
        (nn.Sequential(nn.BatchNorm1d(4)), {"x": data()}, r"got dict. hint: a list of it: \[data\] is one batch"),
        (Uncalled(nn.BatchNorm1d(4)), data(), "`model` must call its norm layers when it is run on a batch"),
        ("model", data(), "a model must be a torch.nn.Module, a Keras layer or model, or an nnx.Module; got str"),
    ],
)
def test_what_cannot_be_recalibrated(model, given, said):
    with pytest.raises(NormError, match=said):
        normkit.recalibrate(model, given)


class Shared(nn.Module):
    """One norm called twice, and one behind a branch."""

    def __init__(self, norm):
        super().__init__()
        self.one, self.two, self.norm, self.last = nn.Linear(4, 5), nn.Linear(5, 5), norm(5), norm(5)

    def forward(self, x):
        h = self.norm(self.one(x)).relu()
        return self.last(h + self.norm(self.two(h)))


def giant(model, x):
    """What every norm is given, all its calls together, where the whole data is one batch in training mode."""
    given = {}
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    handles = [m.register_forward_pre_hook(lambda m, args: given.setdefault(m, []).append(args[0])) for m in norms]
    training = {m: m.training for m in model.modules()}
    kept = state(model)
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        model(x)
    model.load_state_dict(kept)
    for module, mode in training.items():
        module.training = mode
    for handle in handles:
        handle.remove()
    rows = [torch.cat(given[norm]).movedim(1, -1).flatten(0, -2).numpy() for norm in norms]
    return [(r.mean(0), r.var(0, ddof=1)) for r in rows]


EXACT = {"sequence": deep, "shared": Shared}
CUTS = {"even": [250, 500, 750], "ragged": [1, 4, 700], "whole": []}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", EXACT)
def test_exact_is_one_giant_batch_however_it_is_cut_and_in_any_order(kind, cut):
    torch.manual_seed(0)
    model, x = EXACT[kind](nn.BatchNorm1d).double(), torch.from_numpy(data()).double()
    expected = giant(model, x)
    parts = list(torch.tensor_split(x[torch.randperm(1000)], CUTS[cut]))
    normkit.recalibrate(model, parts, exact=True)
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    for norm, (mean, var) in zip(norms, expected, strict=True):
        # float64 all the way: sums of a thousand values in another order.
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(norm.running_var, var, rtol=1e-10)


def test_without_exact_deep_layers_depend_on_the_cut():
    """The reason for `exact`: if this fails, the mode is of no use."""
    model, x = deep().double(), torch.from_numpy(data()).double()
    (_, (mean, _)) = giant(model, x)
    normkit.recalibrate(model, list(x.split(100)))
    assert (model[5].running_mean - torch.from_numpy(mean)).abs().max() > 1e-3


def test_exact_refuses_what_it_cannot_read_twice():
    with pytest.raises(NormError, match="`data` must be data that can be read several times; got a generator"):
        normkit.recalibrate(deep(), (x for x in [data()]), exact=True)


class Fickle(nn.Module):
    """Goes another way, or less far, with another batch."""

    def __init__(self, less):
        super().__init__()
        self.a, self.b, self.less = nn.BatchNorm1d(4), nn.BatchNorm1d(4), less

    def forward(self, x):
        if x[0, 0] < 0:
            return self.b(self.a(x))
        return self.a(x) if self.less else self.a(self.b(x))


@pytest.mark.parametrize("less", [True, False])
def test_exact_refuses_models_that_change_their_way(less):
    model, x = Fickle(less), np.ones((4, 4), "float32")
    kept = state(model)
    with pytest.raises(
        NormError, match="calls its norm layers in the same order for every batch; got another one at b"
    ):
        normkit.recalibrate(model, [-x, x], exact=True)
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("exact", [False, True])
def test_norms_that_run_together_with_their_activation(exact):
    plain, joined = (
        nn.Sequential(*parts)
        for parts in (
            (BatchNorm1d(4), nn.ReLU(), BatchNorm1d(4)),
            (nkt.NormAct(BatchNorm1d(4), "relu"), BatchNorm1d(4)),
        )
    )
    for model in (plain, joined):
        normkit.recalibrate(model, data(), exact=exact)
    for one, other in zip(plain.state_dict().values(), joined.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nkt.InstanceNorm2d])
def test_instance_norm_keeps_the_average_over_samples(norm):
    images = np.random.default_rng(0).normal(size=(20, 3, 4, 5)) * np.arange(1, 21)[:, None, None, None]
    images = images.astype(np.float32)
    layer = norm(3, track_running_stats=True)
    normkit.recalibrate(nn.Sequential(layer), [images[:3], images[3:]])
    rows = images.reshape(20, 3, -1).astype(np.float64)
    np.testing.assert_allclose(layer.running_mean, rows.mean(-1).mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.running_var, rows.var(-1, ddof=1).mean(0), rtol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_ghost_batches_do_not_matter(exact):
    plain, ghost = deep().eval(), deep(lambda n: nkt.GhostBatchNorm1d(n, virtual_batch_size=4)).eval()
    ghost.load_state_dict(plain.state_dict())
    for model in (plain, ghost):
        normkit.recalibrate(model, data(), exact=exact)
    # Another kernel evaluates them: the second layer's inputs differ by rounding.
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_masked_positions_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(4)

        def forward(self, x, mask):
            return self.norm(x, mask)

    x = data(60).reshape(20, 3, 4).transpose(0, 2, 1).copy()
    mask = np.arange(3) < np.random.default_rng(1).integers(1, 4, size=(20, 1))
    model = Masked()
    batches = [{"x": x[part], "mask": mask[part]} for part in (slice(0, 5), slice(5, 20))]
    normkit.recalibrate(model, batches)
    rows = x.transpose(0, 2, 1)[mask].astype(np.float64)
    np.testing.assert_allclose(model.norm.running_mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.norm.running_var, rows.var(0, ddof=1), rtol=1e-5)


def test_only_so_many_steps_of_an_endless_stream():
    x = data()
    layer = nn.BatchNorm1d(4)
    normkit.recalibrate(nn.Sequential(layer), itertools.cycle([x[:10], x[10:30]]), steps=2)
    np.testing.assert_allclose(layer.running_mean, x[:30].astype(np.float64).mean(0), rtol=1e-5)


def test_a_layer_that_is_never_called_keeps_what_it_has():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model.unused = nn.BatchNorm1d(7)
    model.forward = lambda x: model[0](x)
    _, report = normkit.recalibrate(model, data(), return_report=True)
    assert [(layer.path, layer.values) for layer in report.layers] == [("0", 1000), ("unused", 0)]
    assert model.unused.running_var.eq(1).all()


def test_values_that_are_not_finite_are_refused():
    model, x = deep(), data()
    x[7, 2] = np.nan
    kept = state(model)
    with pytest.raises(NormError, match="finite values at every norm layer; got NaN or infinity at 1"):
        normkit.recalibrate(model, x)
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


def test_an_error_while_statistics_are_written_or_measured_takes_them_back():
    model, x = deep(), data()
    kept = state(model)
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        normkit.recalibrate(model, x, held_out=[(x, x)], loss=loss)
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


def labelled(samples=200):
    x = data(samples)
    return x, (x[:, 0] > 0).astype(np.int64)


def test_the_report_says_what_moved_and_can_take_it_back():
    model, (x, y) = deep(), labelled()
    kept = state(model)
    loss = nn.functional.cross_entropy
    _, report = normkit.recalibrate(model, x, held_out=(x, y), loss=loss, return_report=True)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        assert report.after == pytest.approx(float(loss(model.eval()(tensors[0]), tensors[1])), rel=1e-6)
    first = report.layers[0]
    found = kept["1.running_mean"] - model[1].running_mean
    shift = (found / torch.sqrt(model[1].running_var + 1e-5)).abs().max()
    assert (first.path, first.values, first.shift) == ("1", 200, pytest.approx(float(shift), rel=1e-5))
    assert str(report).startswith(
        f"loss {report.before:.3g} -> {report.after:.3g}; the new statistics are kept\nlayer "
    )
    assert report.to_dict()["layers"][0] == vars(first)
    assert "<td>1</td>" in report._repr_html_()
    report.undo()
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())


def test_the_best_statistics_are_kept():
    """What is better is decided by the data held out, which here comes from where the old statistics came from."""
    model, (x, y) = deep(), labelled()
    arguments = {"held_out": [(x, y)], "loss": nn.functional.cross_entropy, "keep": "best", "return_report": True}
    normkit.recalibrate(model, x)
    fit(model, x, y)
    kept = state(model)
    _, report = normkit.recalibrate(model, 100 * x - 40, **arguments)
    assert report.kept == "old"
    assert report.before < report.after
    assert all(value.equal(kept[name]) for name, value in model.state_dict().items())
    model[1].running_mean += 10
    _, report = normkit.recalibrate(model, x, **arguments)
    assert (report.kept, report.after < report.before) == ("new", True)


def test_any_statistics_are_better_than_nan():
    model, (x, y) = deep(), labelled()
    model[1].running_mean += torch.nan
    arguments = {"held_out": (x, y), "loss": nn.functional.cross_entropy, "keep": "best", "return_report": True}
    _, report = normkit.recalibrate(model, x, **arguments)
    assert (report.kept, report.to_dict()["before"]) == ("new", None)
    assert model[1].running_mean.isfinite().all()
    _, report = normkit.recalibrate(model, x, **{**arguments, "loss": lambda outputs, y: outputs.sum() * torch.nan})
    assert report.kept == "old"


def fit(model, x, y):
    """Train the last linear layer in evaluation mode."""
    model.eval()
    optimizer = torch.optim.Adam([*model[4].parameters(), *model[5].parameters()], lr=0.2)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()


def test_without_a_loss_the_change_of_the_outputs_is_measured():
    model, x = deep(), data()
    before = model.eval()(torch.from_numpy(x)).detach()
    _, report = normkit.recalibrate(model, x, held_out=[x[:300], x[300:]], return_report=True)
    change = (model(torch.from_numpy(x)).detach() - before).square().mean() / before.square().mean()
    assert (report.measure, report.after) == ("outputs", pytest.approx(float(change.sqrt()), rel=1e-5))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": "best"}, '`keep="best"` needs `loss` and `held_out`'),
        ({"keep": "best", "held_out": data()}, '`keep="best"` needs `loss` and `held_out`'),
        ({"loss": nn.functional.mse_loss}, "`loss` needs data to be measured on"),
        ({"loss": "mse", "held_out": []}, "`loss` must be a function of outputs and targets; got 'mse'"),
        ({"held_out": iter([])}, "`held_out` must be data that can be read several times"),
        ({"held_out": []}, "data to measure on must hold at least one batch"),
        ({"steps": 0}, "`steps` must be None or a whole number of at least 1"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said):
    with pytest.raises(NormError, match=said):
        normkit.recalibrate(deep(), data(), **arguments)


def _parts(rank):
    x = torch.from_numpy(data(120)).double()
    return list(x[:50].split(8)) if rank == 0 else list(x[50:].split(30))


def _work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for exact in (False, True):
        model = nn.parallel.DistributedDataParallel(deep().double())
        normkit.recalibrate(model, _parts(rank), exact=exact)
        torch.save(model.module.state_dict(), f"{folder}/{rank}{exact}.pt")
    try:  # an error of one is an error of all, and no one waits
        normkit.recalibrate(deep().double(), _parts(rank) if rank == 0 else "nothing")
    except NormError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    dist.barrier()  # neither leaves while the other still listens
    dist.destroy_process_group()
    os._exit(0)  # all is written; gloo's threads abort the end of an interpreter once in a while


def test_two_processes_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, (port, str(tmp_path)), nprocs=2)
    for exact in (False, True):
        alone = normkit.recalibrate(deep().double(), _parts(0) + _parts(1), exact=exact).state_dict()
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}{exact}.pt"), alone, rtol=1e-12, atol=1e-12)
    said = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert said[0].startswith("all processes must succeed")
    assert said[1].startswith("`data` must be an array")
