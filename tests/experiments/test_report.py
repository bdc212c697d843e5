import re
import subprocess
import sys

import pytest

from normkit.experiments.analysis import summarize
from normkit.experiments.config import Config
from normkit.experiments.verb import Comparison
from normkit.report import draw, render, words
from normkit.report.figures import Curve, Rate, learning_curves, rate_range

ENVIRONMENT = {
    "versions": {"normkit": "0"},
    "system": "x",
    "instruction_sets": [],
    "cores": 2,
    "workers": 2,
    "seconds": 1.0,
    "command": None,
}


def comparison(trials, **config):
    norms = tuple(dict.fromkeys(trial.config.norm for trial in trials))
    seeds = 1 + max(trial.config.seed for trial in trials)
    asked = Config(model="mlp", norms=norms, lrs=(0.1,), seeds=seeds, **config)
    return Comparison(asked, "data: some", 10, tuple(trials), ENVIRONMENT)


def said(trials, **config):
    return words.sentences(comparison(trials, **config))


def test_learning_curves_are_mean_and_range_at_the_best_rate(trial):
    (group,) = summarize(
        [
            trial("none", accuracies=(0.1, 0.5)),
            trial("batch:after", lr=0.1, seed=0, accuracies=(0.2, 0.8)),
            trial("batch:after", lr=0.1, seed=1, accuracies=(0.4, 1.0)),
            trial("batch:after", lr=0.3, seed=0, accuracies=(0.1, 0.1)),
            trial("batch:after", lr=0.3, seed=1, accuracies=(0.1, 0.1)),
            trial("layer", diverged=True, accuracies=(0.1,)),
        ],
        0.95,
        10,
    )
    figure = learning_curves(group, 0.95)
    assert figure.target == 0.95
    assert [curve.norm for curve in figure.curves] == ["none", "batch:after"]
    assert figure.curves[1] == Curve(
        "batch:after", 1, True, 0.1, (0, 10), (pytest.approx(0.3), pytest.approx(0.9)), (0.2, 0.8), (0.4, 1.0)
    )


def test_rate_range_marks_divergence(trial):
    (group,) = summarize(
        [
            trial("none", lr=0.1, seed=0, accuracies=(0.1, 0.5)),
            trial("none", lr=0.1, seed=1, accuracies=(0.1, 0.7)),
            trial("none", lr=1.0, seed=0, accuracies=(0.1, 0.9)),
            trial("none", lr=1.0, seed=1, diverged=True, accuracies=(0.1,)),
        ],
        0.95,
        10,
    )
    figure = rate_range(group, 10)
    assert figure.chance == 0.1
    assert figure.rates == (
        Rate("none", 0, False, (0.1, 1.0), (pytest.approx(0.6), None), (0.5, None), (0.7, None), (0, 1), 0.1, 0.1),
    )


def test_positions_of_a_norm_share_a_colour(trial):
    (group,) = summarize([trial(norm) for norm in ("none", "batch", "batch:after", "layer")], 0.95, 10)
    assert [(rate.slot, rate.dashed) for rate in rate_range(group, 10).rates] == [
        (0, False), (1, False), (1, True), (2, False)
    ]  # fmt: skip


def test_drawings_are_the_same_twice_and_take_their_colours_from_the_page(trial):
    (group,) = summarize([trial(norm, lr=lr) for norm in ("none", "batch:after") for lr in (0.003, 0.1)], 0.95, 10)
    for draws, figure in [
        (draw.draw_learning_curves, learning_curves(group, 0.95)),
        (draw.draw_rate_range, rate_range(group, 10)),
    ]:
        svg = draws(figure, "a")
        assert svg == draws(figure, "a")
        assert svg.startswith("<svg ")
        assert {"var(--v0)", "var(--v1)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", svg))
        assert set(re.findall(r"#0[1-4]0[0-9a-f]0[0-9a-f]", svg)) == set()
        # No two figures of a page share an id.
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', draws(figure, "b")))
        assert {use[1:] for use in re.findall(r'href="(#[^"]+)"', svg)} <= set(ids)
    assert ">0.003<" in svg


def test_sentence_when_a_norm_is_faster(trial):
    sentence, screening = said(
        [
            trial("none", accuracies=(0.1, 0.5, 0.96), test=0.9),
            trial("batch", accuracies=(0.1, 0.97, 0.98), test=0.95),
        ]
    )
    assert sentence == (
        "batch norm: 95 % after 10 steps (none: 20); 1.00 s instead of 2.00 s; rates up to 0.1 work (none: ≥ 0.1); "
        "test accuracy 95.0 against 90.0."
    )
    assert screening.startswith("1 seed is a screening")


def test_sentence_tells_what_a_step_costs(trial):
    slow = trial("batch", accuracies=(0.1, 0.97))
    for seconds, cost in [(1.3, "30 % more"), (3.0, "3.0 times as much"), (0.5, "50 % less")]:
        object.__setattr__(slow, "seconds", seconds)
        sentence = said([trial("none", accuracies=(0.1, 0.5, 0.96)), slow])[0]
        assert f"although a step costs {cost};" in sentence or f", as a step costs {cost};" in sentence


def test_unreached_targets_show_the_budget(trial):
    trials = [trial("none", accuracies=(0.1, 0.5, 0.9)), trial("batch", accuracies=(0.1, 0.97, 0.98))]
    assert "(none: > 20)" in said(trials)[0]
    rows = words.table(comparison(trials).groups[0])
    assert rows[0].steps == "> 20 (0 of 1 did)"
    assert rows[0].seconds == "-"
    assert rows[1].steps == "10"


def test_sentence_when_nothing_helps(trial):
    sentence = said([trial("none", accuracies=(0.1, 0.96)), trial("batch", accuracies=(0.1, 0.5, 0.96))])[0]
    assert sentence.startswith("nothing reached 95 % sooner than none (10 steps; next batch norm: 20)")
    assert sentence.endswith("use none.")


def test_a_slower_norm_that_ends_higher_is_not_talked_down(trial):
    sentence = said(
        [trial("none", accuracies=(0.1, 0.96, 0.95), test=0.9), trial("batch", accuracies=(0.1, 0.5, 0.97), test=0.92)]
    )[0]
    assert sentence == (
        "nothing reached 95 % sooner than none (10 steps; next batch norm: 20); highest validation accuracy: "
        "batch norm with 97.0 (none: 95.0); rates up to 0.1 work (none: ≥ 0.1); test accuracy 92.0 against 90.0."
    )


def test_a_tie_is_no_help(trial):
    assert "use none" in said([trial("none", accuracies=(0.1, 0.96)), trial("batch", accuracies=(0.1, 0.96))])[0]


def test_sentence_when_nobody_reaches_the_target(trial):
    sentence = said([trial("none", accuracies=(0.1, 0.5)), trial("batch", accuracies=(0.1, 0.7))])[0]
    assert sentence.startswith(
        "no variant reached 95 % with every seed in 10 steps; "
        "highest validation accuracy: batch norm with 70.0 (none: 50.0)"
    )
    sentence = said([trial("none", accuracies=(0.1, 0.7)), trial("batch", accuracies=(0.1, 0.5))])[0]
    assert sentence.startswith("no variant reached 95 % with every seed")
    assert sentence.endswith("use none.")


def test_sentence_when_the_baseline_always_diverges(trial):
    sentence = said([trial("none", diverged=True, accuracies=(0.1,)), trial("batch", accuracies=(0.1, 0.97))])[0]
    assert sentence.startswith("batch norm: 95 % after 10 steps")
    assert sentence.endswith("none diverged at every rate for at least one seed.")


def test_sentence_when_everything_diverges(trial):
    trials = [trial(norm, diverged=True, accuracies=(0.1,)) for norm in ("none", "batch")]
    assert "every rate diverged" in said(trials)[0]
    assert words.table(comparison(trials).groups[0])[0].best_lr == "diverged"
    assert render.page(comparison(trials)).count("<svg ") == 2


def test_without_none_the_first_variant_is_the_baseline(trial):
    sentence = said([trial("layer", accuracies=(0.1, 0.5, 0.96)), trial("rms", accuracies=(0.1, 0.97))])[0]
    assert sentence.startswith("RMS norm: 95 % after 10 steps (layer norm: 20)")


def test_one_sentence_per_setting(trial):
    trials = [trial(norm, batch_size=size) for size in (8, 32) for norm in ("none", "batch")]
    sentences = said(trials, batch_sizes=(8, 32))
    assert [sentence.split(":")[0] for sentence in sentences[:2]] == ["batch size 8", "batch size 32"]
    assert len(sentences) == 3


def test_the_target_is_written_as_it_is(trial):
    assert words.headings(comparison([trial()], target=0.955)).steps == "steps to 95.5 %"


def test_many_settings_stay_under_500_kilobytes(trial):
    sizes = tuple(range(2, 42))
    norms = ("none", "batch", "batch:after", "layer", "group", "renorm", "rms")
    accuracies = [0.1 + 0.02 * n for n in range(35)]
    trials = [trial(norm, batch_size=size, accuracies=accuracies) for size in sizes for norm in norms]
    page = render.page(comparison(trials, batch_sizes=sizes))
    assert len(page.encode()) < 500_000
    drawn = page.count("<svg ") // 2
    assert 2 <= drawn < 40
    assert f"{40 - drawn} further settings are not drawn" in page


def test_what_the_user_typed_is_escaped(trial):
    made = comparison([trial()])
    made.environment["command"] = "normkit compare --data '<script>alert(1)</script>'"
    try:
        assert "<script>" not in render.page(made)
        assert "&lt;script&gt;" in render.page(made)
    finally:
        made.environment["command"] = None


def test_drawing_does_not_touch_pyplot():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from normkit.report.draw import draw_rate_range; from normkit.report.figures import RateRange\n"
        "draw_rate_range(RateRange(0.1, ()), 'a')\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.rcParams.copy() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
