"""Figures as numbers, and that their drawings are whole, repeatable and valid."""

import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from made import ACCURACY, grid, make_comparison, make_trial, regression
from PIL import Image

from normkit.experiments.results import Probe, SiteStats, Snapshot
from normkit.report import draw, figures
from normkit.report.figures import Cost, Curve, Final, Line, Pen, Rate


def group(*trials):
    (found,) = make_comparison(trials).groups
    return found


def sites(*stds):
    return tuple(SiteStats(f"layer{n}", "relu", 0.5, std, 0.25, None, 1, 0, 0, 0) for n, std in enumerate(stds))


def test_learning_curves_are_mean_and_range_at_the_best_rate():
    figure = figures.learning_curves(
        group(
            make_trial("none", values=(0.1, 0.5)),
            make_trial("batch:after", lr=0.1, seed=0, values=(0.2, 0.8)),
            make_trial("batch:after", lr=0.1, seed=1, values=(0.4, 1.0)),
            make_trial("batch:after", lr=0.3, seed=0, values=(0.1, 0.1)),
            make_trial("batch:after", lr=0.3, seed=1, values=(0.1, 0.1)),
            make_trial("layer", diverged=True, values=(0.1,)),
        ),
        ACCURACY,
        "validation accuracy",
    )
    assert [line.norm for line in figure.lines] == ["none", "batch:after"]
    assert figure.lines[1] == Curve(
        "batch:after",
        Pen(1, True),
        0.1,
        (0, 10),
        pytest.approx((0.3, 0.9)),
        (0.2, 0.8),
        (0.4, 1.0),
    )


def test_seeds_that_reported_at_other_steps_share_a_curve():
    late = make_trial(seed=1, values=(0.0, 0.0, 0.8))
    late = late.__class__(**{**late.__dict__, "curve": (late.curve[0]._replace(step=5), late.curve[2])})
    (line,) = figures.learning_curves(group(make_trial(values=(0.0, 0.4, 0.8)), late), ACCURACY, "x").lines
    assert line.steps == (5, 10, 20)
    assert line.low == pytest.approx((0.0, 0.8 / 3, 0.8))
    assert line.high == pytest.approx((0.2, 0.4, 0.8))


def test_long_curves_are_thinned_and_keep_their_ends():
    (line,) = figures.learning_curves(group(make_trial(values=[0.001 * n for n in range(1000)])), ACCURACY, "x").lines
    assert len(line.steps) <= 60
    assert (line.steps[0], line.steps[-1]) == (0, 9990)
    assert line.mean == pytest.approx([0.0001 * step for step in line.steps])


def test_rate_range_marks_divergence():
    figure = figures.rate_range(
        group(
            make_trial("none", lr=0.1, seed=0, values=(0.1, 0.5)),
            make_trial("none", lr=0.1, seed=1, values=(0.1, 0.7)),
            make_trial("none", lr=0.3, seed=0, values=(0.1, 0.5), train_loss=9.0),
            make_trial("none", lr=0.3, seed=1, values=(0.1, 0.5)),
            make_trial("none", lr=1.0, seed=0, values=(0.1, 0.9)),
            make_trial("none", lr=1.0, seed=1, diverged=True, values=(0.1,)),
        ),
        ACCURACY,
        "validation accuracy",
    )
    assert figure.lines == (
        Rate(
            "none",
            Pen(0),
            (0.1, 0.3, 1.0),
            (pytest.approx(0.6), 0.5, None),
            (0.5, 0.5, None),
            (0.7, 0.5, None),
            (0, 0, 1),
            (True, False, False),
        ),
    )


def test_positions_of_a_norm_share_a_colour():
    found = figures.pens(group(*map(make_trial, ("none", "batch", "batch:after", "layer"))))
    assert found == {"none": Pen(0), "batch": Pen(1), "batch:after": Pen(1, True), "layer": Pen(2)}


def test_finals_and_costs():
    found = group(
        *(make_trial("none", seed=seed, final=0.5 + 0.1 * seed, peak_memory=None) for seed in range(3)),
        *(make_trial("batch", seed=seed, final=0.7, step_seconds=0.15) for seed in range(3)),
        *(make_trial("layer", seed=seed, diverged=True, values=(0.1,)) for seed in range(3)),
    )
    none, batch, layer = figures.finals(found, ACCURACY, "test accuracy").lines
    assert none == Final("none", Pen(0), (0.5, 0.6, 0.7), pytest.approx(0.6), none.low, none.high)
    assert (none.low, none.high) == found.variants[0].interval
    assert batch[3:] == (pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.7))
    assert layer == Final("layer", Pen(2), (), None, None, None)
    assert figures.costs(found).lines == (
        Cost("none", Pen(0), 100.0, None, 1.0, None),
        Cost("batch", Pen(1), 150.0, 50.0, pytest.approx(1.5), None),
        Cost("layer", Pen(2), None, None, None, None),
    )
    wide = group(*(make_trial(seed=seed, final=final) for seed, final in enumerate((0.9, 1.0, 1.0))))
    assert figures.finals(wide, ACCURACY, "x").lines[0].high == 1.0
    nothing = group(make_trial(diverged=True, values=(0.1,)))
    assert figures.finals(nothing, ACCURACY, "x").lines == figures.costs(nothing).lines == ()


def test_depth_in_the_order_of_the_calls():
    figure = figures.depth({"plain": sites(1.0, 0.1), "other": sites(2.0), "nothing": ()})
    assert figure.lines == (
        Line("plain", Pen(0), ("layer0", "layer1"), (0.5, 0.5), (1.0, 0.1), (0.25, 0.25)),
        Line("other", Pen(1), ("layer0",), (0.5,), (2.0,), (0.25,)),
    )


def test_depth_of_the_baseline_and_another():
    shots = (Snapshot(0, sites(1.0)), Snapshot(10, sites(2.0)), Snapshot(20, sites(3.0)))
    found = group(*(make_trial(norm, snapshots=shots) for norm in ("none", "layer", "batch:after")))
    before, after = (figures.variant_depth(found, "batch:after", last=last).lines for last in (False, True))
    assert [(line.label, line.pen, line.std) for line in before] == [
        ("none", Pen(0), (1.0,)), ("batch:after", Pen(2, True), (1.0,))
    ]  # fmt: skip
    assert [line.std for line in after] == [(3.0,), (3.0,)]
    single = group(make_trial(snapshots=shots[:1]))
    assert [len(figures.variant_depth(single, None, last=last).lines) for last in (False, True)] == [1, 0]


def some_of_each():
    found = grid(norms=("none", "batch:after"), seeds=2)
    (judged,) = found.groups
    return {
        "curves": figures.learning_curves(judged, found.task, "validation accuracy"),
        "rates": figures.rate_range(judged, found.task, "validation accuracy"),
        "finals": figures.finals(judged, found.task, "test accuracy"),
        "costs": figures.costs(judged),
        "depth": figures.variant_depth(judged, "batch:after", last=False),
        "percentiles": figures.percentiles(judged, probed(found)),
    }


def probed(found):
    """The trials with probes of two activations, whose percentiles tell the step, the place and the seed."""

    def probe(step, seed):
        return Probe(
            step, 1.0, 1.0, (), (1, 1), (1, 1), 1.0, tuple((step + n, step + n + 1, seed + 99) for n in (0, 10))
        )

    return [
        dataclasses.replace(trial, probes=tuple(probe(step, trial.config.seed) for step in (0, 5, 9)))
        for trial in found.trials
    ]


def test_percentiles_are_those_of_the_first_and_last_activation_of_the_first_seed_at_the_best_rate():
    found = grid(norms=("none", "batch"), seeds=2)
    (judged,) = found.groups
    figure = figures.percentiles(judged, probed(found))
    for bands, begins in ((figure.lines, 0), (figure.last, 10)):
        assert [band.norm for band in bands] == ["none", "batch"]
        for band in bands:
            assert band.steps == (0, 5, 9)
            assert band.low == (begins, begins + 5, begins + 9)
            assert band.middle == (begins + 1, begins + 6, begins + 10)
            assert band.high == (99, 99, 99)
    assert figures.percentiles(judged, found.trials) == ((), ())


@pytest.mark.parametrize("kind", ["curves", "rates", "finals", "costs", "depth", "percentiles"])
def test_drawings(kind):
    figure = some_of_each()[kind]
    svg = draw.svg(figure, "a")
    assert svg == draw.svg(figure, "a")
    ElementTree.fromstring(svg)
    assert re.match(r'<svg role="img" aria-label="[A-Z][^"]+" data-points=\'\[\[', svg)
    assert {"var(--v0)", "var(--v1)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert re.findall(r"#0\w0203", svg) == []  # placeholders
    assert "mathdefault" not in svg
    # No two figures of a page share an id.
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', draw.svg(figure, "b")))
    assert {use[1:] for use in re.findall(r'href="(#[^"]+)"', svg)} <= set(ids)
    # Every point lies in the picture.
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    points = json.loads(ElementTree.fromstring(svg).get("data-points"))
    assert points
    assert all(0 <= x <= width and 0 <= y <= height for x, y, _ in points)

    alone = draw.standalone(svg)
    assert alone.startswith("<?xml ")
    root = ElementTree.fromstring(alone.encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width").endswith("pt")
    assert "var(" not in alone
    assert "data-points" not in alone

    picture = Image.open(io.BytesIO(draw.png(figure)))
    picture.load()
    assert picture.width == 1120
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_points_stand_where_their_values_are():
    values = (0.0, 0.25, 0.5, 0.75, 1.0)
    figure = figures.learning_curves(group(make_trial(values=values)), ACCURACY, "validation accuracy")
    points = json.loads(ElementTree.fromstring(draw.svg(figure, "a")).get("data-points"))
    assert [label for *_, label in points] == [
        "none, step 0: 0.0 %", "none, step 10: 25.0 %", "none, step 20: 50.0 %", "none, step 30: 75.0 %",
        "none, step 40: 100.0 %",
    ]  # fmt: skip
    xs, ys, _ = zip(*points, strict=True)
    assert [b - a for a, b in itertools.pairwise(xs)] == pytest.approx([xs[1] - xs[0]] * 4, abs=0.2)
    assert [b - a for a, b in itertools.pairwise(ys)] == pytest.approx([ys[1] - ys[0]] * 4, abs=0.2)
    assert ys[0] > ys[-1]


def test_depth_as_other_parts_draw_it():
    figure = figures.depth({"Net": sites(0.41, float("nan"), 0.0, 1e-4, float("inf"))})
    svg = draw.draw_depth(figure, "depth")
    assert svg == draw.svg(figure, "depth")
    assert draw.depth_png(figure)[:4] == b"\x89PNG"
    labels = [label for *_, label in json.loads(ElementTree.fromstring(svg).get("data-points"))]
    assert labels[0] == "Net, layer0: std 0.410, mean 0.500, 25 % dead"
    assert len(labels) == 2 + 1 + 1 + 2 + 1  # of a std that is not drawn only the share dead
    draw.draw_depth(figures.depth({"One": sites(1.0)}), "depth")
    draw.draw_depth(figures.depth({f"net{n}": sites(1.0, 1.0) for n in range(20)}), "depth")


def test_names_are_text():
    name = "<b> & 'it' $x_1$ \"q\""
    figure = figures.depth({name: sites(1.0)})
    svg = draw.draw_depth(figure, "a")
    root = ElementTree.fromstring(svg)
    assert name in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert json.loads(root.get("data-points"))[0][2].startswith(f"{name}, layer0")
    assert name in root.get("aria-label")
    ElementTree.fromstring(draw.standalone(svg).encode())
    assert "data-points" not in draw.standalone(svg)


def test_labels_keep_apart():
    assert draw._apart([5.0, 5.0, 30.0], 10, 0, 100) == [5.0, 15.0, 30.0]
    assert draw._apart([99.0, 98.0], 10, 0, 100) == [100.0, 90.0]
    assert draw._apart([50.0], 10, 0, 100) == [50.0]


def test_a_metric_over_decades_is_drawn_logarithmically():
    made = regression()
    svg = draw.svg(figures.learning_curves(made.groups[0], made.task, "reported rmse"), "a")
    assert re.findall(r">(0\.1|1|10)<", svg)
    assert ">reported rmse<" in svg


def test_drawing_does_not_touch_pyplot():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from normkit.report.draw import draw_depth; from normkit.report.figures import depth\n"
        "draw_depth(depth({}), 'a')\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.rcParams.copy() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
