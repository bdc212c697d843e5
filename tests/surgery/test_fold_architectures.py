"""Over many architectures every batch norm that can be folded is folded, and each that stays has to.

The quick run takes one of each kind of flow; `make test-all` takes them all.
"""

import re
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, built

import normkit
from normkit.surgery.folding import relative
from normkit.torch.folding import _array, _Narrow, _outputs
from normkit.torch.sites import sites

QUICK = {"resnet", "levit", "convnext", "llama", "gpt2", "hubert"}
# Batch norms that stay, and why.
NEVER_CALLED = "it is not called as a layer on this example"
STAYS = {
    # The branch of a re-parametrizable block that is a batch norm alone: it has no map to go into.
    "textnet": (11, "relu at .* is before it; add at .* is behind it"),
    # A map that pads is behind it, and a residual reads its input.
    "hubert": (1, "dropout at .* is read 2 times; kernels of conv1d at .* reach beyond the input"),
    # Mixing patches: the map behind it works along another axis.
    "patchtsmixer": (2, "values between the norm and linear .* change their channel"),
    "dpt": (2, NEVER_CALLED),
}
NOT_IN_FLOAT64 = {"mixtral"}  # its product of grouped matrices is for float32 and narrower
found: dict[str, tuple[int, int, int, int]] = {}


@pytest.mark.filterwarnings("ignore")  # of the models about themselves
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in ARCHITECTURES]
)
def test_every_batch_norm_that_can_be_folded_is(name):
    model, x = built(name)
    constant = {site.path for site in sites(model) if site.constant}
    others = {site.path for site in sites(model)} - constant
    folded, report = normkit.fold(model, x, return_report=True)
    assert report.how == "dynamo"
    stays = [edit for edit in report.kept if edit.path in constant]
    count, reason = STAYS.get(name, (0, ""))
    assert len(stays) == count, report
    assert all(re.search(reason, edit.reason) for edit in stays), report
    assert not any(re.search("folded, ", edit.reason) for edit in report.kept), report  # nothing was taken back
    remaining = {site.path for site in sites(folded) if site.constant}
    assert remaining == {edit.path for edit in stays}
    other = {key: value.flip(0) for key, value in x.items()} if isinstance(x, dict) else 2 * x.flip(0) + 0.1
    for inputs in (x, other):
        assert _change(model, folded, inputs) <= 1e-5
    bare = {edit.path for edit in report.done} & others
    found[name] = (len(constant) - len(stays), len(constant), len(bare), len(others))
    if name in NOT_IN_FLOAT64:
        return
    model.double()
    with _Narrow() as narrow:
        _outputs(model, x)
    again = normkit.fold(model, x)
    # 6e-8 is a spacing of float32, in which some models compute parts whatever their type.
    assert _change(model, again, x) <= (1e-6 if narrow.seen else 1e-12)


def _change(model, folded, inputs):
    """Largest change of an output over the largest value of it."""
    pairs = zip(_outputs(model, inputs), _outputs(folded, inputs), strict=True)
    return max(relative(_array(before), _array(after)) for before, after in pairs)


@pytest.mark.long
def test_the_docs_tell_the_fraction():
    if len(found) < len(ARCHITECTURES):
        pytest.skip("not all architectures were run")
    folded, batch, bare, others = (sum(column) for column in zip(*found.values(), strict=True))
    holding = sum(1 for _, count, _, _ in found.values() if count)
    said = (
        f"{len(found)} architectures of `transformers` ({holding} with batch norms): {folded} of {batch} batch norms "
        f"are folded, and gamma and beta of {bare} of {others} other norms"
    )
    docs = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    assert said in " ".join(docs.split()), said
