"""The commands that change a model: what they write, that it loads as they say, and that nothing else happens."""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import normkit
from normkit.cli import main
from normkit.torch import load_folded

MODEL = textwrap.dedent("""
    import numpy as np
    import torch
    from torch import nn

    print("imported")


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.behind = nn.BatchNorm2d(4)
            self.padded = nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.LayerNorm(4)
            self.head = nn.Linear(4, 5)
            self.head.other = self.head.weight  # tied: one parameter, two names

        def forward(self, x):
            x = self.padded(self.behind(torch.relu(self.norm(self.conv(x)))))
            return self.head(self.last(x.mean((2, 3))))


    def build():
        print("built")
        return Net()


    def data():
        return [(torch.from_numpy(images), torch.zeros(len(images)))]


    def failing():
        yielded = 0
        class Data:
            def __iter__(self):
                yield images
                raise OSError("the disk is gone")
        return Data()


    def takes_norm(norm):
        return Net()


    def keras_or_nothing():
        return 3


    def forgetful():
        net = Net()
        net.register_buffer("scale", torch.rand(()), persistent=False)
        net.register_forward_hook(lambda module, x, y: y * net.scale)
        return net


    images = np.random.default_rng(0).normal(1, 2, size=(24, 3, 6, 6)).astype("float32")
    number = 3
""")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, a checkpoint of it with random values, and inputs; it is the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("net.py").write_text(MODEL)
    network = made(None)
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.rand(v.shape, generator=generator) + 0.5 if v.is_floating_point() else v
        for k, v in network.state_dict().items()
    }
    network.load_state_dict(state)
    torch.save(network.state_dict(), "w.pt")
    np.save("x.npy", names()["images"])
    return tmp_path


def names():
    found = {}
    exec(MODEL, found)
    return found


def made(state):
    network = names()["build"]()
    if state is not None:
        network.load_state_dict(state)
    return network.eval()


def given(verb, *more, checkpoint="w.pt", data="x.npy", out="y.pt"):
    return [verb, "net.py:build", "--checkpoint", checkpoint, "--data", data, "--out", out, *more]


def loaded(lines):
    """What the printed lines make, in the words of the user's file."""
    known = names()
    exec("\n".join(lines), known)
    return known["model"].eval()


def recipe(shown):
    return [line.strip() for line in shown.split("load it with\n")[1].splitlines()]


@pytest.mark.parametrize("out", ["y.pt", "y.safetensors"])
@pytest.mark.parametrize("verb", ["fold", "recalibrate"])
def test_what_is_written_loads_as_the_output_says(folder, capsys, verb, out):
    assert main(given(verb, out=out)) == 0
    shown = capsys.readouterr()
    assert f"written: {out}" in shown.out
    assert "imported" not in shown.out
    assert "built" in shown.err
    x = torch.from_numpy(np.load("x.npy"))
    expected = made(torch.load("w.pt"))
    if verb == "recalibrate":
        normkit.recalibrate(expected.train(), x).eval()
    model = loaded(recipe(shown.out))
    with torch.no_grad():
        y, z = expected(x), model(x)
    # Folding rounds the weights once more: some spacings of float32. Recalibration is the same computation.
    assert (y - z).abs().max() <= (1e-5 * y.abs().max() if verb == "fold" else 0)
    kinds = [type(module) for module in model.modules()]
    # `behind` stays: its shift would meet the padding of the convolution behind it.
    assert kinds.count(nn.BatchNorm2d) == (1 if verb == "fold" else 2)


def test_a_checkpoint_of_safetensors_without_the_second_name_of_a_tied_weight(folder, capsys):
    state = {key: value for key, value in torch.load("w.pt").items() if key != "head.other"}
    safetensors.torch.save_file(state, "w.safetensors")
    assert main(given("fold", checkpoint="w.safetensors")) == 0
    tied = torch.load("y.pt")
    assert torch.equal(tied["head.other"], tied["head.weight"])


def test_json_is_the_report_and_nothing_else(folder, capsys):
    assert main(given("fold", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    reference, report = normkit.fold(made(torch.load("w.pt")), np.load("x.npy")[:8], return_report=True)
    edits = {edit.path: edit.new for edit in report.edits}
    assert {edit["path"]: edit["new"] for edit in printed["edits"]} == edits
    assert printed["out"] == "y.pt"
    with torch.no_grad():
        x = torch.from_numpy(np.load("x.npy"))
        assert torch.equal(loaded(printed["load"])(x), reference(x))


@pytest.mark.parametrize("verb", ["fold", "recalibrate"])
def test_a_dry_run_reports_and_writes_nothing(folder, capsys, verb):
    before = sorted(folder.iterdir())
    arguments = given(verb, "--dry-run")
    del arguments[-3:-1]  # --out is not needed
    assert main(arguments) == 0
    assert "norm" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before
    assert main(given(verb, "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["out"] is None
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("archive", [{"x": 0}, {"y": 1, "x_train": 0}, {"images": 0}])
def test_data_from_archives(folder, archive):
    images = np.load("x.npy")
    np.savez("d.npz", **{name: images if which == 0 else np.arange(24) for name, which in archive.items()})
    assert main(given("recalibrate", data="d.npz")) == 0
    assert main(given("recalibrate", data="x.npy", out="z.pt")) == 0
    assert main(given("recalibrate", data="net.py:data", out="u.pt")) == 0  # a loader: one batch of the same
    states = [torch.load(name) for name in ("y.pt", "z.pt", "u.pt")]
    for key in states[0]:
        assert all(torch.equal(states[0][key], other[key]) for other in states[1:])


@pytest.mark.parametrize(
    ("arguments", "kind", "count"),
    [
        (["insert", "--norm", "batch", "--data", "x.npy", "--init", "identity"], nn.BatchNorm1d, 1),
        (["insert", "--norm", "layer", "--data", "x.npy", "--placement", "after"], nn.LayerNorm, 1),
        (["replace", "--norms", "layer:rms", "--data", "x.npy"], nn.RMSNorm, 1),
        (["replace", "--norms", "batch:group,layer:rms", "--groups", "2"], nn.GroupNorm, 2),
    ],
)
def test_other_structures_load_as_the_output_says(folder, capsys, arguments, kind, count):
    Path("net.py").write_text(MODEL + PLAIN)
    builder = "plain" if arguments[0] == "insert" else "build"
    assert main([arguments[0], f"net.py:{builder}", *arguments[1:], "--out", "y.safetensors"]) == 0
    lines = recipe(capsys.readouterr().out)
    x = torch.from_numpy(np.load("x.npy"))
    known = {**names(), "x": x}
    exec(PLAIN, known)
    exec("\n".join(lines), known)
    model = known["model"].eval()
    assert [isinstance(module, kind) for module in model.modules()].count(True) == count
    if "identity" in arguments:
        assert torch.allclose(model(x), known["plain"]()(x), rtol=0, atol=1e-5)  # rounded by one norm: some spacings


PLAIN = textwrap.dedent("""
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 2))
""")


def changed(state, **changes):
    kept = {key: value for key, value in state.items() if key not in changes}
    return {**kept, **{key: value for key, value in changes.items() if value is not None}}


class Evil:
    def __reduce__(self):
        return (open, ("touched", "w"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "missing.npy"], 2, "must be a .npy file of arrays that can be read; got missing.npy"),
        (["--data", "x.csv"], 2, "`--data` must be an .npy or .npz file, or file.py:name; got 'x.csv'"),
        (["--data", "net.py:number"], 2, "`data` must be an array, a tensor, or an iterable of batches; got int"),
        (["--data", "net.py:nothing"], 2, "net.py must define nothing"),
        (["--data", "broken.npz"], 2, "must be a .npz file of arrays"),
        (["--data", "narrow.npy"], 2, "net.py:build raised RuntimeError"),
        (["--checkpoint", "missing.pt"], 2, "a checkpoint must be a file that can be read; got missing.pt"),
        (["--checkpoint", "x.npy"], 2, "must end in .pt, .pth or .safetensors; got 'x.npy'"),
        (["--checkpoint", "broken.pt"], 2, "broken.pt must be a .pt file that is whole"),
        (["--checkpoint", "broken.safetensors"], 2, "must be a .safetensors file that is whole"),
        (["--checkpoint", "evil.pt"], 2, "must hold tensors and plain values alone: anything else could run code"),
        (["--checkpoint", "nested.pt"], 2, "and nothing around it; got one with model. hint: save model.state_dict()"),
        (["--checkpoint", "list.pt"], 2, "must hold a state dict; got list"),
        (["--checkpoint", "other.pt"], 2, "nothing else; got without norm.bias; with unknown norm.gamma"),
        (["--checkpoint", "shape.pt"], 2, "size mismatch for norm.bias"),
        (["--out", "y.onnx"], 2, "must end in .pt, .pth or .safetensors; got 'y.onnx'"),
        (["--out", "missing/y.pt"], 2, "`--out` must be a file in a folder that exists and can be written"),
        (["--steps", "0"], 2, "`steps` must be None or a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_everything_as_it_was(folder, capsys, arguments, code, said):
    state = torch.load("w.pt")
    torch.save(changed(state, **{"norm.bias": None, "norm.gamma": torch.zeros(4)}), "other.pt")
    torch.save(changed(state, **{"norm.bias": torch.zeros(5)}), "shape.pt")
    torch.save({"model": state}, "nested.pt")
    torch.save([state], "list.pt")
    torch.save({"x": Evil()}, "evil.pt")
    for name in ("broken.pt", "broken.safetensors", "broken.npz", "y.pt"):
        Path(name).write_bytes(b"old")
    np.save("narrow.npy", np.zeros((4, 2, 6, 6), "float32"))
    before = contents(folder)
    verb = "recalibrate" if "--steps" in arguments else "fold"
    assert main([*given(verb), *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err.splitlines()[-1]
    assert shown.err.splitlines()[-1].startswith("error: ")
    assert contents(folder) == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("net.py", "write file.py:build"),
        ("cnn", "write file.py:build"),
        ("net.py:number", "net.py:number must be a function; got int"),
        ("net.py:takes_norm", "must be a function that needs no arguments; got missing a required argument: 'norm'"),
        ("net.py:keras_or_nothing", "a model must be a torch.nn.Module"),
        ("net.py:forgetful", "outputs must depend on nothing but weights in the state dict"),
        ("trains.py:build", "trains.py must not train when it is imported; got a step of SGD"),
        ("missing.py:build", "must name a file that exists"),
    ],
)
def test_models_that_cannot_be_used(folder, capsys, model, said):
    Path("trains.py").write_text(
        "import torch\np = torch.nn.Parameter(torch.zeros(1))\np.grad = torch.ones(1)\ntorch.optim.SGD([p]).step()\n"
        "def build():\n    return torch.nn.Linear(3, 3)\n"
    )
    before = contents(folder)
    assert main(["recalibrate", model, "--data", "x.npy", "--out", "y.pt"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert contents(folder) == before


def test_without_out_nothing_is_done(folder, capsys):
    assert main(["fold", "net.py:build", "--data", "x.npy"]) == 2
    shown = capsys.readouterr().err
    assert shown == "error: `--out` must name the file to write. hint: or ask with --dry-run\n"


def test_a_missing_safetensors_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(given("fold", out="y.safetensors")) == 2
    assert "need safetensors, which is not installed. hint: pip install safetensors" in capsys.readouterr().err


def no_space(*_):
    raise OSError(28, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "what", "code", "said"),
    [
        ("os.fsync", no_space, 1, "`--out` must be one that can be written; got y.pt (No space left on device)"),
        ("os.fsync", interrupt, 130, "interrupted: nothing was written"),
        ("pathlib.Path.replace", no_space, 1, "No space left on device"),
        ("torch.save", interrupt, 130, "interrupted: nothing was written"),
        ("torch.nn.functional.linear", interrupt, 130, "interrupted: nothing was written"),
        (None, None, 2, "net.py:build raised OSError: the disk is gone (line"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_in_the_middle_leaves_the_file_as_it_was(folder, monkeypatch, capsys, where, what, code, said, there):
    if there:
        Path("y.pt").write_bytes(b"old")
    before = contents(folder)
    if where is not None:
        monkeypatch.setattr(where, what)
    assert main(given("recalibrate", data="x.npy" if where else "net.py:failing")) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err.splitlines()[-1]
    assert contents(folder) == before


def test_help_documents_the_exit_codes(capsys):
    assert main(["fold", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done, 2 bad input or usage, 130 interrupted, 1 anything else" in shown
    assert "the file under --out stays as it was" in shown


@pytest.mark.parametrize("gone", ["conv.weight", "behind.weight", "padded.weight"])
def test_folded_weights_with_a_hole_are_refused_and_the_structure_stays(folder, gone):
    folded = normkit.fold(made(torch.load("w.pt")), np.load("x.npy")[:2]).state_dict()
    network = made(None)
    before = repr(network)
    with pytest.raises(normkit.NormError, match=f"without {gone}"):
        load_folded(network, {key: value for key, value in folded.items() if key != gone})
    assert repr(network) == before


def test_folding_further_kinds_of_norms_loads_again():
    """A bias that goes, a norm without kept statistics, tracked instance norm, gamma alone, values not in eval mode."""

    def build():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 1), nn.ReLU(),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Conv2d(6, 4, 1), nn.ReLU(),
            nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.LayerNorm(48, bias=False), nn.Linear(48, 2),
        )  # fmt: skip

    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(3, 3, 6, 6)
    for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        value.data.uniform_(0.5, 1.5)
    folded, report = normkit.fold(model, x, return_report=True)
    assert {edit.new for edit in report.done} >= {"identity", "no bias"}
    again = load_folded(build(), folded.state_dict()).eval()
    assert repr(again) == repr(folded)
    with torch.no_grad():
        assert torch.equal(again(x), folded(x))
