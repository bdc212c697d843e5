"""LSTM and GRU with norms inside: against loops in float64, and against torch's own where the norms vanish."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import normkit
import normkit.torch as nk
from normkit.errors import NormTypeError, NormValueError
from normkit.torch import _lstm

LAYERS = {"BatchNormLSTM": nk.BatchNormLSTM, "BatchNormGRU": nk.BatchNormGRU,
          "LayerNormLSTM": nk.LayerNormLSTM, "LayerNormGRU": nk.LayerNormGRU}  # fmt: skip
KINDS = list(LAYERS)
BATCH_NORMED, LSTMS = KINDS[:2], ("BatchNormLSTM", "LayerNormLSTM")
T, N, F, H = 5, 4, 3, 2
KEPT = 3  # steps with statistics of their own
LENGTHS = [3, 5, 2, 5]  # unsorted; at no step is one sequence left
EPS = 1e-3
DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
}  # some hundred roundings, amplified by small variances over 5 steps


def tensor(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(kind, dtype=torch.float64, **options):
    """A layer with weights, gains and biases unlike their first values."""
    options = {"eps": EPS, **({"max_steps": KEPT} if kind in BATCH_NORMED else {}), **options}
    layer = LAYERS[kind](F, H, dtype=dtype, **options)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = tensor(*parameter.shape, seed=seed + 10, dtype=dtype, scale=0.7)
    return layer


def array(t):
    return t.detach().double().numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Oracle:
    """One layer and direction, a sample's vector at a time; statistics are gathered before a step is gone on with."""

    def __init__(self, layer, suffix, kept=None):
        self.at = {name[: -len(suffix)]: array(p) for name, p in layer.named_parameters() if name.endswith(suffix)}
        self.batch, self.lstm = isinstance(layer, nk.BatchNormLSTM | nk.BatchNormGRU), layer.mode == "LSTM"
        self.kept = kept  # of evaluation, by kind: (means, variances)
        self.seen = {}  # (kind, step) -> (mean, biased variance, samples)

    def norm(self, kind, t, vectors):
        if not self.batch:
            cuts = [0, 2 * H, 3 * H] if kind != "c" and not self.lstm else [0, len(vectors[0])]
            rows = []
            for v in vectors:
                parts = [v[a:b] for a, b in itertools.pairwise(cuts)]
                rows.append(
                    np.concatenate([(p - p.mean()) / math.sqrt(((p - p.mean()) ** 2).mean() + EPS) for p in parts])
                )
        else:
            if self.kept is not None:
                mean, var = (values[min(t, len(values) - 1)] for values in self.kept[kind])
            else:
                mean = sum(vectors) / len(vectors)
                var = sum((v - mean) ** 2 for v in vectors) / len(vectors)
                self.seen[kind, t] = mean, var, len(vectors)
            rows = [(v - mean) / np.sqrt(var + EPS) for v in vectors]
        bias = self.at["beta_c" if kind == "c" else f"bias_{kind}"]
        return [row * self.at[f"gamma_{kind}"] + bias for row in rows]

    def run(self, sequences, h, c):
        """Return (outputs of each sequence, last h, last c)."""
        h, c, out = list(h), list(c), [[] for _ in sequences]
        for t in range(max(map(len, sequences))):
            here = [k for k, s in enumerate(sequences) if len(s) > t]
            of_x = self.norm("ih", t, [self.at["weight_ih"] @ sequences[k][t] for k in here])
            of_h = self.norm("hh", t, [self.at["weight_hh"] @ h[k] for k in here])
            if self.lstm:
                gates = [np.split(a + b, 4) for a, b in zip(of_x, of_h, strict=True)]
                for k, (i, f, g, _) in zip(here, gates, strict=True):
                    c[k] = sigmoid(f) * c[k] + sigmoid(i) * np.tanh(g)
                shown = self.norm("c", t, [c[k] for k in here])
                for k, (*_, o), s in zip(here, gates, shown, strict=True):
                    h[k] = sigmoid(o) * np.tanh(s)
            else:
                for k, a, b in zip(here, of_x, of_h, strict=True):
                    (r, z, n), (r_h, z_h, n_h) = np.split(a, 3), np.split(b, 3)
                    new = np.tanh(n + sigmoid(r + r_h) * n_h)
                    h[k] = (1 - sigmoid(z + z_h)) * new + sigmoid(z + z_h) * h[k]
            for k in here:
                out[k].append(h[k])
        return [np.stack(o) for o in out], h, c


def stack(layer, sequences, states, kept=None):
    """Return (outputs by sequence, last states, the oracles), for all layers and directions."""
    oracles, ends = [], []
    for level in range(layer.num_layers):
        found = []
        for back, end in enumerate(("", "_reverse")[: 1 + layer.bidirectional]):
            suffix = f"_l{level}{end}"
            oracle = Oracle(layer, suffix, None if kept is None else kept[suffix])
            place = level * (1 + layer.bidirectional) + back
            out, *last = oracle.run([s[::-1] if back else s for s in sequences], *(s[place] for s in states))
            found.append([o[::-1] if back else o for o in out])
            oracles.append((suffix, oracle))
            ends.append(last)
        sequences = [np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]
    return sequences, ends, dict(oracles)


def states(layer, seed=3, dtype=torch.float64):
    """(h_0, c_0) of every layer and direction; the GRU has the first only."""
    places = layer.num_layers * (1 + layer.bidirectional)
    return tuple(tensor(places, N, H, seed=seed + k, dtype=dtype) for k in range(2))


def given(layer, both):
    return both if layer.mode == "LSTM" else both[0]


def as_tuple(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def packed(x, lengths=LENGTHS, **options):
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False, **options)


def assert_close(actual, wanted, dtype=torch.float64):
    bound = DTYPES[dtype] * max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(array(actual), wanted, rtol=0, atol=bound)


def check_ends(layer, hx, ends, dtype=torch.float64):
    for k, state in enumerate(as_tuple(hx)):
        for place, last in enumerate(ends):
            assert_close(state[place], np.stack(last[k]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[T] * N, LENGTHS], ids=["tensor", "packed"])
def test_training_is_the_formula(kind, dtype, lengths):
    """Two layers, both directions, first states given; and what the batch norms then keep, step by step."""
    layer = made(kind, dtype, num_layers=2, bidirectional=True)
    x, hx = tensor(T, N, F, dtype=dtype), states(layer, dtype=dtype)
    sequences = [array(x)[:length, k] for k, length in enumerate(lengths)]
    want, ends, oracles = stack(layer, sequences, [array(s) for s in hx])
    if lengths == LENGTHS:
        y, last = layer(packed(x), given(layer, hx))
        assert isinstance(y, PackedSequence)
        y = pad_packed_sequence(y)[0]
    else:
        y, last = layer(x, given(layer, hx))
    for k, w in enumerate(want):
        assert_close(y[: len(w), k], w, dtype)
    check_ends(layer, last, ends, dtype)
    if kind in BATCH_NORMED:
        for suffix, oracle in oracles.items():
            for (which, t), (mean, var, n) in oracle.seen.items():
                if t < KEPT:
                    assert_close(getattr(layer, f"running_mean_{which}{suffix}")[t], 0.1 * mean, dtype)
                    unbiased = var * n / (n - 1)
                    assert_close(getattr(layer, f"running_var_{which}{suffix}")[t], 0.9 + 0.1 * unbiased, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BATCH_NORMED)
def test_evaluation_uses_the_statistics_of_its_step(kind, dtype):
    """And beyond the last row those of the last; a sample is the same alone, and one step longer than a twin."""
    layer = made(kind, dtype, bidirectional=True).eval()
    kept = {}
    for name, buffer in layer.named_buffers():
        buffer.copy_(tensor(*buffer.shape, seed=len(name)).abs() + 0.5)
    for suffix in ("_l0", "_l0_reverse"):
        layer.get_buffer(f"num_batches_tracked{suffix}").fill_(1)
        of = ("ih", "hh", "c") if kind in LSTMS else ("ih", "hh")
        kept[suffix] = {k: [array(getattr(layer, f"running_{m}_{k}{suffix}")) for m in ("mean", "var")] for k in of}
    x, hx = tensor(T, N, F, dtype=dtype), states(layer, dtype=dtype)
    sequences = [array(x)[:length, k] for k, length in enumerate(LENGTHS)]
    want, ends, _ = stack(layer, sequences, [array(s) for s in hx], kept)
    y, last = layer(packed(x), given(layer, hx))
    y = pad_packed_sequence(y)[0]
    for k, w in enumerate(want):
        assert_close(y[: len(w), k], w, dtype)
        alone = layer(x[: len(w), k], given(layer, tuple(s[:, k] for s in hx)))[0]  # without a batch axis
        assert_close(alone, w, dtype)
    check_ends(layer, last, ends, dtype)


def test_steps_that_no_batch_has_reached_use_the_last_that_one_has():
    layer = made("BatchNormLSTM", max_steps=10)
    layer(tensor(3, N, F))
    shorter = copy.deepcopy(layer)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            assert bool((buffer[3:] == (1 if "var" in name else 0)).all())
            buffer[3:] = 9.0
    x = tensor(6, N, F, seed=1)
    torch.testing.assert_close(layer.eval()(x)[0], shorter.eval()(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", BATCH_NORMED)
def test_statistics_of_each_step_are_not_those_of_all(kind):
    """The input grows with time: by statistics of all steps together, early steps would come out small."""
    layer = made(kind, max_steps=T)
    x = tensor(T, N, F) * torch.arange(1, T + 1)[:, None, None]
    layer(x)
    kept = layer.running_var_ih_l0
    alone = (x @ layer.weight_ih_l0.T).detach().var(1)
    torch.testing.assert_close(kept, 0.9 + 0.1 * alone)
    assert kept[-1].mean() > 2 * kept[0].mean()
    shared = copy.deepcopy(layer).eval()
    for name, buffer in shared.named_buffers():
        if name.startswith("running"):
            buffer[:] = buffer.mean(0)
    assert (shared(x)[0] - layer.eval()(x)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_padded_packed_and_alone_are_the_same(kind):
    """Outputs, states, gradients and statistics, whatever stands in the padding."""
    x = tensor(T, N, F)
    mask = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    dirty = torch.where(mask[..., None], x, torch.nan)
    layers = [made(kind, num_layers=2, bidirectional=True, batch_first=first) for first in (False, False, True)]
    results = []
    for layer, give in zip(
        layers,
        [lambda m: m(packed(dirty)), lambda m: m(dirty, mask=mask), lambda m: m(dirty.transpose(0, 1), mask=mask.T)],
        strict=True,
    ):
        y, hx = give(layer)
        y = pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y
        y = y.transpose(0, 1) if layer.batch_first else y
        assert bool((y[~mask] == 0).all())
        (y**2).sum().backward()
        results.append([y, *as_tuple(hx), *(p.grad for p in layer.parameters()), *layer.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # With sequences of one length a mask changes nothing.
    layer, twin = made(kind), made(kind)
    torch.testing.assert_close(layer(x)[0], twin(x, mask=torch.ones(T, N, dtype=torch.bool))[0], rtol=0, atol=1e-12)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_that_is_left_alone_uses_what_was_kept(dtype):
    """It has no variance. Its step is not counted; in the compiled loop too."""
    layer = made("BatchNormLSTM", dtype)
    x = tensor(T, N, F, dtype=dtype)
    layer(x)
    before = copy.deepcopy(layer)
    lengths = [1, 2, 5, 2]
    y = pad_packed_sequence(layer(packed(x, lengths))[0])[0]
    np.testing.assert_array_equal(layer.num_batches_tracked_l0, [2, 2, 1])
    oracle = Oracle(before, "_l0")
    both = Oracle(before, "_l0", {k: [array(getattr(before, f"running_{m}_{k}_l0")) for m in ("mean", "var")]
                                  for k in ("ih", "hh", "c")})  # fmt: skip
    by_batch, by_kept = oracle.norm, both.norm
    oracle.norm = lambda kind, t, v: by_kept(kind, t, v) if len(v) == 1 else by_batch(kind, t, v)
    zeros = [np.zeros(H)] * N
    want, _, _ = oracle.run([array(x)[:length, k] for k, length in enumerate(lengths)], zeros, zeros)
    for k, w in enumerate(want):
        assert_close(y[: len(w), k], w, dtype)


# -- Where the norms vanish --------------------------------------------------------------------------------------------


def without_norms(theirs, ours):
    """Give a batch norm layer the weights of torch's own, and statistics and gains by which it normalizes nothing."""
    found = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not found.unexpected_keys
    for name, buffer in ours.named_buffers():
        buffer.fill_(1.0 - ours.eps if "var" in name else 1 if "tracked" in name else 0)
    for name, parameter in ours.named_parameters():
        if name.startswith("gamma"):
            nn.init.ones_(parameter)
    return ours.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_with_mean_0_and_variance_1_it_is_the_one_of_torch(mode, bias, batch_first, dtype):
    """Outputs, last states and gradients, of a tensor and packed, with and without `hx`."""
    how = {"num_layers": 2, "bidirectional": True, "bias": bias, "batch_first": batch_first, "dtype": dtype}
    theirs = getattr(nn, mode)(F, H, **how)
    ours = without_norms(theirs, LAYERS[f"BatchNorm{mode}"](F, H, max_steps=KEPT, **how))
    x = tensor(N, T, F, dtype=dtype) if batch_first else tensor(T, N, F, dtype=dtype)
    hx = given(theirs, states(theirs, dtype=dtype))
    for of in (x, packed(x, batch_first=batch_first)):
        for first in (None, hx):
            found = []
            for layer in (theirs, ours):
                layer.zero_grad()
                y, last = layer(of, first)
                assert isinstance(y, PackedSequence) == isinstance(of, PackedSequence)
                y = y.data if isinstance(y, PackedSequence) else y
                (y.sum() + sum((k + 2) * (s**2).sum() for k, s in enumerate(as_tuple(last)))).backward()
                found.append([y, *as_tuple(last), *(layer.get_parameter(n).grad for n in theirs.state_dict())])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=DTYPES[dtype])


def test_layer_norm_gru_with_centred_weights_and_a_huge_eps_is_the_one_of_torch():
    """y = (x - mean) sqrt(eps) / sqrt(var + eps): x up to var / (2 eps) where the weights take the mean out."""
    theirs = nn.GRU(F, H, 2, bidirectional=True, dtype=torch.float64)
    for name, p in theirs.named_parameters():
        if name.startswith("weight"):
            p.data = torch.cat([part - part.mean(0) for part in p.data.split((2 * H, H))])
    ours = nk.LayerNormGRU(F, H, 2, bidirectional=True, dtype=torch.float64, eps=1e12)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for name, p in ours.named_parameters():
        if name.startswith("gamma"):
            nn.init.constant_(p, 1e6)
    for of in (tensor(T, N, F), packed(tensor(T, N, F))):
        for a, b in zip(theirs(of, states(theirs)[0]), ours(of, states(theirs)[0]), strict=True):
            a, b = (t.data if isinstance(t, PackedSequence) else t for t in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_layer_norm_lstm_without_its_norms_is_the_one_of_torch(monkeypatch):
    """Batch first, packed, both directions: where what goes is the paper's norms alone."""
    monkeypatch.setattr("normkit.torch.recurrent._normalized", lambda spec, sizes, x, gamma, beta, eps:
                        (x if beta is None else x + beta, []))  # fmt: skip
    how = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": torch.float64}
    theirs, ours = nn.LSTM(F, H, **how), nk.LayerNormLSTM(F, H, **how)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = tensor(N, T, F)
    for of in (x, packed(x, batch_first=True)):
        (a, ends), (b, last) = theirs(of, states(theirs)), ours(of, states(theirs))
        a, b = (t.data if isinstance(t, PackedSequence) else t for t in (a, b))
        for one, other in zip((a, *ends), (b, *last), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind, training):
    layer = made(kind).train(training)
    names, start = [n for n, _ in layer.named_parameters()], tuple(s.requires_grad_() for s in states(layer))
    x = tensor(3, N, F).requires_grad_()

    def run(x, h, c, *values):
        state = {**dict(zip(names, values, strict=True)), **{n: b.clone() for n, b in layer.named_buffers()}}
        y, last = torch.func.functional_call(layer, state, (packed(x, [2, 3, 3, 1]), given(layer, (h, c))))
        return y.data, *as_tuple(last)

    assert torch.autograd.gradcheck(run, (x, *start, *(p.detach().requires_grad_() for p in layer.parameters())))


@pytest.mark.skipif(not _lstm.COMPILED, reason="no compiled kernels")
@pytest.mark.parametrize("kind", LSTMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [[T] * N, LENGTHS, [1, 2, 5, 2]], ids=str)
def test_the_compiled_loop_is_the_plain_one(kind, training, lengths):
    """Outputs, gradients and second derivatives; float32 against the plain loop in float64."""
    if training and kind == "BatchNormLSTM" and lengths[1] == 2:
        lengths = [2, 3, 5, 3]  # of two samples batch norm gives +-1: no gradient but by eps
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = made(kind, dtype, eps=0.1, max_steps=T) if kind == "BatchNormLSTM" else made(kind, dtype, eps=0.1)
        layer.train(training)
        x, hx = tensor(T, N, F, dtype=dtype).requires_grad_(), states(layer, dtype=dtype)
        y, last = layer(packed(x, lengths), hx)
        ran = {type(node).__name__ for node in walk(y.data.grad_fn)}
        assert ("_LoopBackward" in ran) == (dtype == torch.float32)
        loss = (y.data**2).sum() + sum((s**3).sum() for s in last)
        first = torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=True)
        plain = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [x, *layer.parameters()])
        found.append([y.data, *last, *first, *plain, *second, *layer.buffers()])
    for a, b in zip(*found, strict=True):
        atol = 1e-4 * max(1.0, float(b.detach().abs().max()))  # float32, over five steps and two derivatives
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


def walk(node, seen=None):
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for other, _ in node.next_functions:
            walk(other, seen)
    return seen


@pytest.mark.parametrize("kind", LSTMS)
def test_the_loop_in_plain_operations_is_chosen_by_hand(kind):
    layer, twin = made(kind, torch.float32), made(kind, torch.float32)
    x = tensor(T, N, F, dtype=torch.float32)
    want = layer(x)[0]
    with nk.use_kernel("formula"):
        found = twin(x)[0]
    assert "_LoopBackward" not in {type(node).__name__ for node in walk(found.grad_fn)}
    torch.testing.assert_close(found, want, rtol=0, atol=DTYPES[torch.float32])


def test_products_of_both_libraries(monkeypatch):
    x, w = (tensor(*shape, dtype=torch.float32).requires_grad_() for shape in ((6, 4), (5, 4)))
    want = [x @ w.T, *torch.autograd.grad(((x @ w.T) ** 2).sum(), (x, w))]
    for one in (_lstm._onednn, None):
        monkeypatch.setattr(_lstm, "_onednn", one)
        y = _lstm.product(x, w)
        for a, b in zip([y, *torch.autograd.grad((y**2).sum(), (x, w))], want, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(_lstm._times(w.detach())(x.detach()), want[0])


# -- What is kept ------------------------------------------------------------------------------------------------------


def test_a_batch_with_nan_enters_no_statistic_from_there_on():
    layer, other = made("BatchNormLSTM"), made("BatchNormLSTM", nonfinite="update", momentum=None, bessel=False)
    x = tensor(T, N, F)
    x[1, 0, 0] = torch.nan
    layer(x), other(x)
    np.testing.assert_array_equal(layer.num_batches_tracked_l0, [1, 0, 0])
    assert all(bool(b.isfinite().all()) for b in layer.buffers())
    np.testing.assert_array_equal(other.num_batches_tracked_l0, [1, 1, 1])
    assert not bool(other.running_mean_ih_l0[1].isfinite().all())
    product = (x[0] @ other.weight_ih_l0.T).detach()  # the average of one, with the biased variance
    torch.testing.assert_close(other.running_var_ih_l0[0], product.var(0, correction=0))


def test_averages_of_all_batches():
    layer = made("BatchNormGRU", momentum=None)
    xs = [tensor(T, N, F, seed=k) for k in range(3)]
    for x in xs:
        layer(x)
    means = torch.stack([(x[0] @ layer.weight_ih_l0.T).mean(0) for x in xs])
    torch.testing.assert_close(layer.running_mean_ih_l0[0], means.mean(0).detach())
    layer.reset_running_stats()
    assert layer.num_batches_tracked_l0.sum() == 0
    assert bool((layer.running_var_hh_l0 == 1).all())


def test_checkpointing_counts_once():
    layer, x = made("BatchNormLSTM"), tensor(T, N, F).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).sum().backward()
    np.testing.assert_array_equal(layer.num_batches_tracked_l0, [1, 1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, tmp_path):
    layer = made(kind, num_layers=2, bidirectional=True)
    layer(tensor(T, N, F))
    torch.save(layer.state_dict(), tmp_path / "w.pt")
    other = LAYERS[kind](F, H, 2, True, False, 0.0, True, 0, None, torch.float64,
                         **({"max_steps": KEPT} if kind in BATCH_NORMED else {}), eps=EPS)  # fmt: skip
    other.load_state_dict(torch.load(tmp_path / "w.pt"))
    x = tensor(T, N, F, seed=1)
    want = layer.eval()(x)[0]
    for same in (other.eval(), copy.deepcopy(layer)):
        torch.testing.assert_close(same(x)[0], want, rtol=0, atol=0)
    halves = copy.deepcopy(layer).bfloat16()
    assert all(b.dtype in (torch.float64, torch.long) for b in halves.buffers())
    assert halves(x.bfloat16())[0].dtype == torch.bfloat16
    # Rounded to 8 bits, through states that saturate: a few units of the last place.
    torch.testing.assert_close(halves(x.bfloat16())[0].double(), want, rtol=0, atol=0.1)


def test_first_values():
    for kind, make in LAYERS.items():
        layer = make(F, H, bidirectional=True)
        layer.reset_parameters()
        for name, p in layer.named_parameters():
            if name.startswith("gamma"):
                torch.testing.assert_close(p.data, torch.full_like(p, 0.1 if kind in BATCH_NORMED else 1.0))
            elif name.startswith("beta"):
                assert not p.any()
            else:
                assert p.abs().max() <= H**-0.5
                assert p.any()
    text = repr(nk.BatchNormLSTM(F, H, 2, max_steps=7))
    assert text == "BatchNormLSTM(3, 2, num_layers=2, max_steps=7, momentum=0.1, eps=1e-05)"


def test_no_decay_of_gains():
    layer = nk.BatchNormLSTM(F, H)
    groups = normkit.param_groups(layer, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in layer.named_parameters() if id(p) in decayed} == {"weight_ih_l0", "weight_hh_l0"}


def test_dropout_between_layers():
    layer = nk.LayerNormLSTM(F, 50, 2, dropout=0.5)
    x = tensor(T, N, F, dtype=torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_compiled_and_under_vmap():
    """A compiler and torch.func see plain operations."""
    layer = made("LayerNormLSTM", torch.float32)
    x = tensor(3, T, N, F, dtype=torch.float32)
    each = torch.stack([layer(one)[0] for one in x])
    torch.testing.assert_close(torch.func.vmap(lambda one: layer(one)[0])(x), each, rtol=0, atol=2e-5)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x[0])[0], each[0], rtol=0, atol=2e-5)
    batch = made("BatchNormLSTM", torch.float32)
    twin = copy.deepcopy(batch)
    torch.testing.assert_close(torch.compile(batch, backend="eager")(x[0])[0], twin(x[0])[0], rtol=0, atol=2e-5)
    for a, b in zip(batch.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"input_size": 0}, NormValueError, "`input_size` must be a whole number of at least 1; got 0"),
        ({"hidden_size": 2.5}, NormValueError, "`hidden_size` must be a whole number"),
        ({"num_layers": "two"}, NormTypeError, "`num_layers` must be a whole number"),
        ({"bias": 1}, NormValueError, "`bias` must be True or False"),
        ({"batch_first": None}, NormTypeError, "`batch_first` must be True or False"),
        ({"dropout": 1.5}, NormValueError, "`dropout` must be a finite number"),
        ({"bidirectional": "yes"}, NormTypeError, "`bidirectional` must be"),
        ({"proj_size": 1}, NormValueError, "`proj_size` must be 0.*got 1. hint: a linear layer behind"),
        ({"max_steps": 0}, NormValueError, "`max_steps` must be a whole number of at least 1"),
        ({"momentum": 2}, NormValueError, "`momentum` must be None or a finite number"),
        ({"eps": -1}, NormValueError, "`eps` must be"),
        ({"nonfinite": "keep"}, NormValueError, "`nonfinite` must be one of"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=f"BatchNormLSTM: {text}"):
        nk.BatchNormLSTM(**{"input_size": F, "hidden_size": H, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m(np.ones((T, N, F))), NormTypeError, "the input must be a floating point tensor .*; got ndarray"),
        (lambda m: m(torch.ones(T, N, F, dtype=torch.long)), NormTypeError, "got torch.int64"),
        (lambda m: m(tensor(T, N, F + 1)), NormValueError, r"must have shape \(T, N, 3\) or \(T, 3\).*got \(5, 4, 4\)"),
        (lambda m: m(tensor(0, N, F)), NormValueError, r"T > 0; got \(0, 4, 3\)"),
        (lambda m: m(tensor(T, N, F), tensor(1, N, H)), NormValueError, r"`hx` must be \(h_0, c_0\), each of shape"),
        (lambda m: m(tensor(T, N, F), (tensor(1, N, H), tensor(1, N, 9))), NormValueError, r"got .*\(1, 4, 9\)"),
        (lambda m: m(tensor(T, 1, F)), NormValueError, "training needs at least 2 sequences; got 1. hint: a larger"),
        (lambda m: m(tensor(T, N, F), mask=torch.ones(N, T) > 0), NormValueError, r"of shape \(5, 4\), True for real"),
        (lambda m: m(tensor(T, N, F), mask=torch.ones(T, N)), NormValueError, "boolean tensor .*got torch.float32"),
        (lambda m: m(packed(tensor(T, N, F)), mask=torch.ones(T, N) > 0), NormValueError, "knows its lengths"),
        (lambda m: m(tensor(T, N, F), mask=torch.arange(T)[:, None].expand(T, N) > 1), NormValueError, "come first"),
        (lambda m: m(tensor(T, N, F), mask=torch.zeros(T, N) > 0), NormValueError, "there must be one at least"),
    ],
)
def test_wrong_inputs(call, error, text):
    layer = made("BatchNormLSTM")
    with pytest.raises(error, match=f"BatchNormLSTM: .*{text}"):
        call(layer)
    assert layer.num_batches_tracked_l0.sum() == 0


def test_a_dropout_without_a_layer_to_follow_warns_as_torch_does():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nk.LayerNormGRU(F, H, dropout=0.5)
    assert ["dropout option adds dropout after all but last" in str(w.message) for w in caught] == [True]
