"""Measurements made by hand: every number a criterion may look at, in a network on which the claim holds."""

import math

from normkit.experiments.results import StepNoise
from normkit.studies import STUDIES
from normkit.studies import criteria as names
from normkit.studies.measurements import USUAL, Against, Measured, Measurements
from normkit.studies.probed import Probed

RATES = (0.001, 0.01, 0.1, 1.0)
WIGGLE = (0.001, -0.001, 0.002, -0.002, 0.0)  # between seeds


def one(norm, arm=USUAL, mean=0.95, steps=50, usable=RATES[:3], gap=0.0, depths=(1.0, 1.0), seeds=5, **values):
    """A mean of None is a norm that diverged at every rate, steps of None a target that no seed reached."""
    around = WIGGLE[:seeds]
    known = mean is not None
    reached = tuple(None if steps is None else steps + place % 2 for place in range(seeds)) if known else ()
    return Measured(
        arm,
        norm,
        rates=RATES,
        usable=usable if known else (),
        best_lr=0.01 if known else None,
        seeds=seeds,
        runs=4 * seeds,
        epochs=6,
        budget=200,
        steps=reached,
        seconds=tuple(None if step is None else 0.01 * step for step in reached),
        step_seconds=0.01,
        final=tuple(mean + w for w in around) if known else (),
        gaps=tuple(gap + w for w in around) if known else (),
        depths=(depths,) * seeds,
        examples=450,
        trained=2.0,
        **values,
    )


def probes(seeds=5, **means):
    """The same at every rate."""
    around = WIGGLE[:seeds]
    return tuple(Probed(lr, **{name: tuple(mean + w for w in around) for name, mean in means.items()}) for lr in RATES)


def stepwise(*means, seeds=5, unknown=False):
    """Noise of W x, U h and c alike at every step; of U h there is none at the first."""
    return tuple(
        tuple(
            StepNoise(32.0 / (t + 1), mean, (mean + w, math.nan if unknown or t == 0 else mean + w, mean), (mean,) * 3)
            for t, mean in enumerate(means)
        )
        for w in WIGGLE[:seeds]
    )


SMOOTH = {"smoothness": 10.0, "change": 1.0, "variation": 0.2}
ROUGH = {"smoothness": 50.0, "change": 9.0, "variation": 0.6}


def holds(seeds=5):
    """For every study the measurements on which its claim holds, by what may be changed in them."""
    few = {"seeds": seeds}
    plain = one("none", mean=0.94, steps=120, usable=RATES[:1], **few)
    made = {
        "inputs": [
            *(one("batch", inputs=mode, **few) for mode in ("none", "max", "minmax", "standard")),
            one("none", inputs="none", mean=0.8, usable=RATES[:1], **few),
            one("none", inputs="standard", usable=RATES[:2], **few),
            one("none", names.FIRST, inputs="none", **few),
        ],
        "convergence": [one("batch", **few), plain],
        "overhead": [one("batch", **few), plain],
        "learning-rate": [one("batch", **few), plain],
        "initialization": [
            *(one("batch", arm, **few) for arm in (USUAL, names.weights(0.1), names.weights(10))),
            one("none", **few),
            one("none", names.weights(0.1), usable=(), **few),
            one("none", names.weights(10), mean=None, **few),
        ],
        "depth": [
            one("batch", names.layers(4), **few),
            one("none", names.layers(4), **few),
            one("batch", names.layers(20), depths=(1.0, 0.98), **few),
            one("none", names.layers(20), depths=(1.4, 0.01), usable=RATES[:1], **few),
        ],
        "train-eval-gap": [
            one("batch", names.TORCH, gap=0.01, **few),
            one("batch", names.KERAS, gap=0.5, **few),
            one("batch", names.POPULATION, gap=0.02, **few),
            one("batch", names.LONG, gap=0.0, **few),
        ],
        "batch-size": [
            *(
                one("batch", names.groups_of(size), mean, **few)
                for size, mean in ((32, 0.96), (16, 0.96), (8, 0.95), (4, 0.9), (2, 0.7))
            ),
            one("renorm", names.groups_of(32), **few),
            one("renorm", names.groups_of(4), 0.95, **few),
            one("group", mean=0.95, **few),
            one("layer", **few),
        ],
        "placement": [one("batch", **few), one("batch:after", steps=52, **few), plain],
        "regularization": [one(norm, arm, **few) for norm in ("batch", "none") for arm in SPOILED],
        "dropout": [
            one(norm, arm + drop, **few)
            for norm in ("batch", "none")
            for arm in SPOILED
            for drop in ("", f", {names.DROPOUT}" if arm else names.DROPOUT)
        ],
        "appearance": [
            one("batch", names.RANDOM, 0.97, **few),
            one("none", names.RANDOM, 0.93, **few),
            one("batch", names.SWAPPED, 0.9, **few),
            one("batch", names.SHIFTED, 0.8, **few),
            one("batch", names.TESTED, 0.95, **few),
        ],
        "recurrent": [
            one("batch", names.COUNTED, 0.8, **few),
            one("batch", names.MASKED, 0.9, **few),
            one("batch", names.EACH, 0.9, **few),
            one("batch", names.STEPS, 0.92, noise=stepwise(0.2, 0.2, 0.5, **few), **few),
            one("batch", names.LARGE, 0.85, **few),
            one("layer", names.ALONE, 0.92, **few),
            one("none", names.ALONE, 0.9, **few),
        ],
        "non-iid": [
            one("batch", names.BLOCKED, 0.3, gap=0.6, **few),
            one("group", names.BLOCKED, 0.95, **few),
            one("renorm", names.BLOCKED, 0.8, **few),
        ],
        "covariate-shift": [
            one("batch", probed=probes(difference=0.1, cosine=0.9, **few), **few),
            one("none", usable=RATES[:1], probed=probes(difference=0.3, cosine=0.5, **few), **few),
        ],
        "smoothness": [
            one("batch", probed=probes(**SMOOTH, **few), **few),
            one("none", usable=RATES[:1], probed=probes(**ROUGH, **few), **few),
        ],
        "weight-decay": [
            one("batch", probed=probes(growth=1.2, **few), **few),
            one("batch", names.DECAY, probed=probes(resting=1.0, turned=1.05, drift=0.02, **few), **few),
            one("batch", names.RATE, 0.955, **few),
            one("none", **few),
            one("none", names.DECAY, **few),
            one("none", names.RATE, mean=None, **few),
        ],
    }
    formulas = [Against("a ratio", 0.5, tuple(0.5 * (1 + w) for w in WIGGLE[:seeds]))]
    return {name: Measurements(found, formulas if STUDIES[name].formulas else ()) for name, found in made.items()}


def off(found, factor):
    """The same where formulas give something else than is measured, by a factor."""
    return Measurements(
        found, [a._replace(measured=tuple(factor * value for value in a.measured)) for a in found.against]
    )


SPOILED = (USUAL, names.LABELS, names.OUTLIERS)


def changed(found, norm, arm=None, inputs=None, **values):
    """The same with what belongs to a norm (in a circumstance, with a scaling of inputs) measured anew."""
    again = (
        one(m.norm, m.arm, inputs=m.inputs, **values)
        if m.norm == norm and arm in (None, m.arm) and inputs in (None, m.inputs)
        else m
        for m in found
    )
    return Measurements(again, found.against)
