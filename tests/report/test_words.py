"""Sentences and tables for every way a comparison can end, from trials whose numbers are known."""

import json

import pytest
from made import LOSS, grid, make_comparison, make_trial, regression, settings

from normkit.experiments.config import Task
from normkit.experiments.results import Gap
from normkit.report import words

CHANCE = "5 seeds; differences are paired by seed, t interval, corrected after Holm over the whole comparison."
NEXT = "Next: normkit compare mymodel.py:build --data my.npz"


def rising(hit, end=0.97, evaluations=20):
    """A validation curve that meets 95 % at evaluation number `hit`, ten steps apart, or never."""
    return [end if n >= (hit or 99) else 0.1 + 0.01 * n for n in range(evaluations + 1)]


def runs(norm, hit=None, final=0.5, seeds=5, jitter=0.0, **changes):
    """Five seeds of one variant; the final metric goes up and down by `jitter`, in a way of its own for the norm."""
    hits = hit if isinstance(hit, tuple) else (hit,) * seeds
    ups = (0, 1, -1, 1, -1, 0, 1, -1, 1, -1)
    curves = [changes.get("values") or rising(one) for one in hits]
    finals = [final + jitter * ups[(seed + len(norm)) % 5 + 5 * (seed // 5)] for seed in range(seeds)]
    return [
        make_trial(norm, seed=seed, **{"step_seconds": 0.01, **changes, "values": curve, "final": end})
        for seed, (curve, end) in enumerate(zip(curves, finals, strict=True))
    ]


def lost(norm, **changes):
    return runs(norm, diverged=True, values=(0.1,), **changes)


def said(*trials, **asked):
    return words.sentences(make_comparison([trial for found in trials for trial in found], **asked))


def test_a_norm_that_is_faster_and_better():
    sentences = said(
        runs("none", hit=12, final=0.976, lr=0.03),
        runs("none", lr=0.3, final=0.2, train_loss=9.0),
        runs("batch", hit=3, final=0.992, step_seconds=0.0122, lr=0.3),
    )
    assert sentences == [
        "batch norm: 95 % after 30 steps (none: 120); 3.00 s instead of 12 s although a step costs 22 % more; "
        "rates up to 0.3 work (none: 0.03); final accuracy 99.2 against 97.6.",
        CHANCE,
        NEXT,
    ]


@pytest.mark.parametrize(
    ("seconds", "cost"),
    [
        (0.0122, "s although a step costs 22 % more"),
        (0.03, "s although a step costs 3.0 times as much"),
        (0.005, "s, as a step costs 50 % less"),
        (0.01, "s; rates"),
    ],
)
def test_what_a_step_costs(seconds, cost):
    assert cost in said(runs("none", hit=12), runs("batch", hit=3, step_seconds=seconds))[0]


def test_what_is_not_beyond_chance_is_not_claimed():
    sentence = said(
        runs("none", hit=12, final=0.970),
        runs("batch", hit=3, final=0.980, jitter=0.02),  # faster; in the end within the noise
    )[0]
    assert sentence.endswith("final accuracy 98.0 against 97.0, not distinguishable.")
    sentence = said(
        runs("none", hit=12, final=0.970),
        runs("batch", hit=(3, 3, 20, 20, 20), final=0.980),  # better; steps in the noise
    )[0]
    assert sentence.startswith("batch norm: 95 % after 132 steps (none: 120, not distinguishable); rates")
    assert " s instead of " not in sentence


def test_recommended_variants_that_cannot_be_told_apart():
    sentence = said(
        runs("none", hit=12, final=0.90),
        runs("batch", hit=3, final=0.98),
        runs("layer", hit=4, final=0.981, jitter=0.01),
        runs("group", hit=12, final=0.99),
        runs("renorm", hit=5, final=0.95),
        runs("rms", hit=12, final=0.90, jitter=0.01),  # not recommended, so not in the list
    )[0]
    assert sentence.startswith("batch norm: 95 % after 30 steps")
    assert "; batch, layer not distinguishable in final accuracy; " in sentence
    assert "; group better than none too, with a better final accuracy than batch; " in sentence
    assert sentence.endswith("; renorm better than none too, with a worse final accuracy than batch.")


def test_nothing_beyond_chance_says_use_none():
    sentence = said(
        runs("none", hit=10, final=0.97),
        runs("batch", hit=(9, 11, 8, 12, 9), final=0.975, jitter=0.01),
        runs("layer", hit=(8, 12, None, 9, 5), final=0.972, jitter=0.01),
    )[0]
    assert sentence.startswith(
        "use none: nothing beats none beyond chance; 95 % after 100 steps (the others: 98 to > 200)"
    )
    assert "final accuracy 97.0 (the others: 97.2 to 97.5)" in sentence


def test_what_is_surely_worse_is_named():
    sentence = said(runs("none", hit=3, final=0.97), runs("batch", hit=15, final=0.90), lost("layer"))[0]
    assert sentence == (
        "use none: nothing beats none beyond chance; 95 % after 30 steps (the others: 150); final accuracy 97.0 (the "
        "others: 90.0); worse beyond chance than none: batch (final accuracy, steps); layer diverged at every rate in "
        "at least one seed."
    )


def test_better_in_one_thing_and_worse_in_another_is_no_recommendation():
    made = make_comparison([*runs("none", hit=12, final=0.97), *runs("batch", hit=3, final=0.90)])
    sentence = words.sentences(made)[0]
    assert sentence.startswith(
        "no clear choice: batch better than none in one thing and worse in another; 95 % after 120"
    )
    assert sentence.endswith("worse beyond chance than none: batch (final accuracy).")
    assert words.recommended(made.groups[0], made.task) == []


def test_equal_variants_are_no_help():
    assert said(runs("none", hit=5), runs("batch", hit=5))[0].startswith("use none: nothing beats none beyond chance")


def test_the_others_are_never_compared_with_the_best_of_them():
    # Batch has the highest mean, by noise; no sentence may set it against the rest.
    sentences = said(
        *(runs(n, hit=5, final=f, jitter=0.02) for n, f in [("none", 0.9), ("batch", 0.91), ("rms", 0.89)])
    )
    assert sentences[0] == (
        "use none: nothing beats none beyond chance; 95 % after 50 steps (the others: 50); final accuracy 90.0 (the "
        "others: 89.0 to 91.0)."
    )


def test_unreached_targets_show_the_budget():
    some = runs("batch", hit=(3, None, 3, None, 3))
    made = make_comparison([*runs("none"), *some, *runs("layer", hit=3, final=0.6)])
    sentence = words.sentences(made)[0]
    assert sentence.startswith("layer norm: 95 % after 30 steps (none: > 200, 0 of 5 seeds got there); ")
    shown = words.table(made, made.groups[0])
    cells = {row[0]: dict(zip(shown.keys, row, strict=True)) for row in shown.rows}
    assert cells["none"]["steps"] == "> 200 (0 of 5 did)"
    assert cells["batch"]["steps"] == "> 200 (3 of 5 did)"
    assert cells["batch"]["seconds"] == "-"
    assert cells["layer"]["steps"] == "30"


def test_below_three_seeds_nothing_is_recommended():
    sentences = said(runs("none", hit=12, final=0.9, seeds=2), runs("batch", hit=3, final=0.98, seeds=2))
    assert sentences[0] == (
        "as measured, 95 % after 30 steps with batch norm, the fewest (none: 120); rates up to 0.1 work, as with "
        "none; final accuracy 98.0 (none: 90.0)."
    )
    assert sentences[1] == (
        "2 seeds are a screening: below 3 seeds no difference can be told from chance, so nothing is recommended."
    )
    sentences = said(runs("none", seeds=1), runs("batch", seeds=1))
    assert sentences[0].startswith("as measured, best validation accuracy")
    assert sentences[1].startswith("1 seed is a screening")


def test_below_five_seeds_is_a_screening():
    sentences = said(runs("none", hit=12, final=0.9, seeds=4), runs("batch", hit=3, final=0.98, seeds=4))
    assert sentences[0].startswith("batch norm: ")
    assert sentences[1].startswith("4 seeds are a screening, not proof: named are the differences that survive")
    sentences = said(runs("none", final=0.7, jitter=0.1, seeds=4), runs("batch", final=0.8, jitter=0.1, seeds=4))
    assert sentences[0].startswith("no recommendation: nothing beats none beyond chance with 4 seeds; 95 % after > 200")


def test_counted_examples_are_told():
    many = {"seeds": 10, "examples": "b2:wA=="}
    assert ", with the choice of test examples counted in." in said(runs("none", **many), runs("batch", **many))[1]
    assert "examples" not in said(runs("none", seeds=10), runs("batch", seeds=10))[1]


def test_the_baseline_diverged():
    sentence = said(lost("none"), runs("batch", hit=5, final=0.98), runs("layer", hit=3, final=0.9))[0]
    assert sentence == (
        "none diverged at every rate in at least one seed; layer, batch did not; fewest steps with layer norm: 95 % "
        "after 30 steps, final accuracy 90.0, rates up to 0.1 work."
    )
    sentence = said(lost("none"), runs("batch", hit=5, final=0.98), lost("rms"))[0]
    assert sentence.startswith("none diverged at every rate in at least one seed; batch norm: 95 % after 50 steps, ")


def test_all_but_the_baseline_diverged():
    sentence = said(runs("none", hit=5, final=0.98), lost("batch"))[0]
    assert sentence == (
        "use none: every other variant diverged at every rate in at least one seed; none: 95 % after 50 steps, final "
        "accuracy 98.0, rates up to 0.1 work."
    )


def test_everything_diverged():
    made = make_comparison([*lost("none"), *lost("batch")])
    assert words.sentences(made) == [
        "every variant diverged at every rate in at least one seed: try smaller rates.",
        NEXT,
    ]
    assert words.table(made, made.groups[0]).rows == (("none", "diverged", "no rate"), ("batch", "diverged", "no rate"))


def test_a_single_variant():
    assert said(runs("rms", hit=5, final=0.98)) == [
        "RMS norm: 95 % after 50 steps, final accuracy 98.0, rates up to 0.1 work; nothing to compare it with.",
        NEXT,
    ]
    assert said(lost("rms"))[0].startswith("RMS norm: diverged at every rate in at least one seed; nothing")


def test_without_none_the_first_variant_is_the_baseline():
    assert said(runs("layer", hit=12), runs("rms", hit=3))[0].startswith(
        "RMS norm: 95 % after 30 steps (layer norm: 120)"
    )
    assert said(runs("layer", hit=5), runs("rms", hit=5))[0].startswith("use layer: nothing beats layer norm beyond")


def test_a_metric_to_be_small_without_a_target():
    made = regression()
    group = made.groups[0]
    assert words.finding(made, group).startswith(
        "batch norm: final rmse 0.03426 against 0.09363; a step costs 25 % more; "
    )
    assert words.validation_name(made) == "reported rmse"
    assert words.final_name(made) == "last reported rmse"
    assert "the rmse that chose the rate is also the one reported" in words.caveats(made)[1]
    assert words.table(made, group, whole=True).keys == (
        "norm", "rate", "step", "rates", "validation", "final", "memory"
    )  # fmt: skip
    worse = make_comparison([*runs("none", final=0.1), *runs("batch", final=0.2)], LOSS)
    assert "worse beyond chance than none: batch (final loss)" in words.finding(worse, worse.groups[0])


def test_columns_of_which_nothing_is_known_vanish():
    bare = {"step_seconds": None, "peak_memory": None}
    made = make_comparison([*runs("none", **bare), *runs("batch", **bare)])
    assert words.table(made, made.groups[0], whole=True).keys == (
        "norm", "rate", "steps", "rates", "validation", "final"
    )  # fmt: skip
    one = make_comparison([*runs("none", **bare), *runs("batch", gap=Gap(0.1, 0.2, 0.9, 0.88))])
    shown = words.table(one, one.groups[0], whole=True)
    assert shown.keys[-2:] == ("memory", "gap")
    assert shown.headings[-2:] == ("memory, MB", "evaluation - training %")
    assert [row[-2:] for row in shown.rows] == [("-", "-"), ("50.0", "-2.0")]


@pytest.mark.parametrize(
    ("seeds", "cell"), [(1, "97.0"), (2, "97.5 ± 0.7"), (5, "98.0 [96.8, 99.2]"), (3, "98.0 [95.5, 100.0]")]
)
def test_the_final_metric_with_its_interval(seeds, cell):
    made = make_comparison(runs("none", final=0.98, jitter=0.01, seeds=seeds))
    shown = words.table(made, made.groups[0])
    assert shown.rows[0][-1] == cell
    assert shown.headings[-1] == "test %"


def test_numbers():
    accuracy, loss = Task("accuracy", "max", 0.955), Task("loss", "min", 0.01)
    assert [words.value(accuracy, 0.9512), words.target(accuracy)] == ["95.1 %", "95.5 %"]
    assert [words.value(loss, 0.0123456), words.target(loss)] == ["0.01235", "loss 0.01"]
    assert [words.significant(n) for n in (0.5, 12.345, 1234.5, -0.00012345)] == ["0.500", "12.3", "1234", "-0.000123"]
    assert [words.significant(n) for n in (0.0, 120.0, 999.6)] == ["0.00", "120", "1000"]


def test_several_settings():
    made = settings()
    starts = ["batch size 8, inputs none", "batch size 32, inputs none", "batch size 8, inputs max"]
    assert [sentence.split(":")[0] for sentence in words.sentences(made)[:3]] == starts
    final, steps, *_ = words.by_batch_size(made)
    assert final.title == "test accuracy, %, by batch size (inputs none)"
    assert final.headings == ("norm", "8", "32")
    assert final.rows[:2] == (("none", "diverged", "90.2"), ("batch", "diverged", "92.2"))
    assert steps.title == "steps to 95 %, by batch size (inputs none)"
    assert steps.rows[:2] == (("none", "diverged", "> 20"), ("batch", "diverged", "20"))
    one = make_comparison([trial for size in (8, 32) for trial in runs("none", batch_size=size)], LOSS)
    assert [table.title for table in words.by_batch_size(one)] == ["test loss, by batch size"]
    assert words.by_batch_size(grid(norms=("none",), seeds=1)) == []


def test_what_to_run_next():
    def after(command=None, seeds=5, **asked):
        made = make_comparison(runs("none", seeds=seeds), environment={"command": command}, **asked)
        return words.following(made)

    embedded = "normkit compare mymodel.py:build --data my.npz"
    assert after(model="cnn", data="mine") == embedded
    assert after(model="mine.py:build") == embedded
    mine = {"model": "mine.py:build"}
    config = {**mine, "data": "my.npz"}
    made = make_comparison(runs("none", seeds=3), environment={"command": "normkit compare m.py:b --seeds 3 --json"})
    object.__setattr__(made.config, "model", config["model"])
    object.__setattr__(made.config, "data", config["data"])
    assert words.following(made) == "normkit compare m.py:b --json --seeds 10"
    made.environment["command"] = None
    assert words.following(made) is None
    assert words.following(regression()) == "normkit compare train.py:train --goal min --seeds 10"


@pytest.mark.parametrize("make", [grid, regression, settings])
def test_the_terminal(make):
    made = make()
    lines = words.text(made).splitlines()
    assert max(len(line) for line in lines if not line.startswith("Next: ")) <= 120
    assert [line for line in lines if line.endswith(" ")] == []
    assert " ".join(lines).count("Next: ") == 1
    assert lines[len(lines) - len(made.notes) :] == list(made.notes)


def test_tables_wider_than_a_terminal_come_in_parts():
    sizes = range(100, 150)
    made = make_comparison([make_trial(norm, batch_size=size) for size in sizes for norm in ("none", "batch")])
    text = words.text(made)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    _, by_size = text.split("test accuracy, %, by batch size")
    headings = [line.split()[1:] for line in by_size.split("steps to")[0].splitlines() if line.startswith("norm ")]
    assert len(headings) > 1
    assert sum(headings, []) == [str(size) for size in sizes]  # noqa: RUF017
    long = make_comparison([make_trial(metric="m" * 70)], Task("m" * 70, "min", None))
    assert max(len(line) for line in words.text(long).splitlines()[:5]) <= 120


def test_json_is_strict_and_says_the_same():
    made = grid(norms=("none", "batch"), seeds=3)
    read = json.loads(words.to_json(made), parse_constant=pytest.fail)
    assert read["sentences"] == words.sentences(made)


def test_below_three_seeds_the_best_may_be_the_baseline():
    """No other variant is called the fastest because it comes after the baseline."""
    sentence = said(runs("none", hit=2, seeds=1), runs("batch", hit=5, seeds=1))[0]
    assert "with none, the fewest (next batch norm:" in sentence
