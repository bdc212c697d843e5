"""The studies, as data: what is claimed, how it is tried, and what decides.

A study is a handful of comparisons of the engine behind `normkit compare`; nothing here trains. A new one is an entry
in `STUDIES` and a criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from normkit.errors import NormValueError, message, nearest
from normkit.experiments.conditions import AS_USUAL, Conditions
from normkit.studies import criteria as names
from normkit.studies.formulas import Formulas, dropout_variance, residual_growth
from normkit.studies.measurements import USUAL, Against, Measurements
from normkit.studies.verdict import Check

__all__ = ["STUDIES", "Arm", "Effort", "Part", "Study", "find"]

_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_THREE = (0.01, 0.03, 0.1)
_DECAYS: dict[str, dict[str, Any]] = {
    USUAL: {},
    names.DECAY: {"weight_decay": 0.02},
    names.RATE: {"weight_decay": 0.02, "decay_as": "rate"},
}


class Arm(NamedTuple):
    """A circumstance and its name, which is empty where nothing is changed."""

    name: str = USUAL
    conditions: Conditions = AS_USUAL


class Effort(NamedTuple):
    """How much is run: the rates, the seeds, the passes over the training data, the networks."""

    lrs: tuple[float, ...]
    seeds: int
    epochs: int
    models: tuple[str, ...] = ("mlp", "cnn")


# Quick seeds are as many as it takes to come to the same verdict with others, where time allows: 5, and 8 to 16 where
# steps or spreads vary so much that 5 often left it open.
FULL, QUICK = Effort(_RATES, 5, 6), Effort(_THREE, 10, 6, ("mlp",))


@dataclass(frozen=True)
class Part:
    """One comparison of a study: every norm in every circumstance.

    `lrs` and `epochs` are its own where they are given, else the study's. It is left out for a network that is not
    among `models`.
    """

    norms: tuple[str, ...]
    arms: tuple[Arm, ...] = (Arm(),)
    inputs: tuple[str, ...] = ("standard",)
    batch_size: int = 32
    lrs: tuple[float, ...] | None = None
    epochs: int | None = None
    models: tuple[str, ...] = ("mlp", "cnn")

    def names(self) -> dict[str, str]:
        """The names of the circumstances, by their conditions in words."""
        return {str(arm.conditions): arm.name for arm in self.arms}


@dataclass(frozen=True)
class Study:
    """A claim about normalization, and how it is tried.

    Attributes:
        name: what it is called by.
        claim: what is said, in everyday words.
        method: what is done, in words.
        reading: how to read the outcome, and what it cannot tell.
        parts: the comparisons.
        judge: the pass criterion, a pure function from the measurements on one network and data set to checks.
        full, quick: how much is run.
        figures: the kinds of figures that show it best, as the report of a comparison calls them.
        data: the data sets it is tried on by default.
        repeated: what came out with other seeds, as `benchmarks/studies.csv` has it; empty where that was not tried.
        formulas: what is measured, beside the comparisons, against formulas.
    """

    name: str
    claim: str
    method: str
    reading: str
    parts: tuple[Part, ...]
    judge: Callable[[Measurements], Iterable[Check]]
    full: Effort = FULL
    quick: Effort = QUICK
    figures: tuple[str, ...] = ("final",)
    data: tuple[str, ...] = ("digits",)
    repeated: str = ""
    formulas: Formulas | None = None

    def parts_for(self, model: str) -> tuple[Part, ...]:
        """The parts that a network takes part in."""
        return tuple(part for part in self.parts if model in part.models)

    def against(self, seeds: range) -> tuple[Against, ...]:
        """What is measured against formulas, with these seeds."""
        return self.formulas(seeds) if self.formulas else ()

    def checks(self, found: Measurements) -> tuple[Check, ...]:
        """The criterion, applied."""
        return tuple(self.judge(found))

    def effort(self, *, quick: bool, seeds: int | None = None, models: tuple[str, ...] | None = None) -> Effort:
        """How much is run, with what was asked for otherwise."""
        usual = self.quick if quick else self.full
        return usual._replace(
            seeds=usual.seeds if seeds is None else seeds, models=usual.models if models is None else models
        )


_PROBED = Part(("none", "batch"), (Arm(USUAL, Conditions(landscape=8)),))  # the same runs for two studies


def _spoiled(*further: Arm) -> tuple[Arm, ...]:
    """Clean labels, wrong labels, outliers."""
    return (
        Arm(USUAL, Conditions(depth=4)),
        Arm(names.LABELS, Conditions(depth=4, label_noise=0.3)),
        Arm(names.OUTLIERS, Conditions(depth=4, outliers=0.05)),
        *further,
    )


def _dropped(arms: Iterable[Arm]) -> Iterator[Arm]:
    for arm in arms:
        name = f"{arm.name}, {names.DROPOUT}" if arm.name else names.DROPOUT
        yield Arm(name, replace(arm.conditions, dropout=0.5))


_ALL = (
    Study(
        "inputs",
        "Networks want inputs of one scale; batch norm inside a network makes up for it, and as the first layer it "
        "does the scaling itself.",
        "The inputs as they are, divided by their maximum, brought to 0..1, or standardized, without norm and with "
        "batch norm in every hidden layer; and batch norm as the first layer on the inputs as they are. Rates from "
        "1e-4 to 0.1.",
        "Wine has columns from 0.1 to 1 680, where scaling matters most, and few rows: its test accuracy moves in "
        "steps of 2 points. The pixels of digits share one scale, so there little is to be gained but the size of it.",
        (
            Part(("none", "batch"), inputs=("none", "max", "minmax", "standard")),
            Part(("none", "batch"), (Arm(names.FIRST, Conditions(input_norm=True)),), inputs=("none",)),
        ),
        names.inputs,
        full=Effort((0.0001, 0.001, 0.01, 0.1), 5, 20),
        quick=Effort((0.001, 0.01, 0.1), 8, 8, ("mlp",)),
        figures=("rates",),
        data=("digits", "wine"),
        repeated="mlp on digits, quick version, 8 seeds each: 2 x holds partly, 1 x not enough evidence; "
        "mlp on wine, quick version, 8 seeds each: 3 x holds partly",
    ),
    Study(
        "convergence",
        "With batch norm a network learns in fewer steps.",
        "Training steps until 95 % of a validation part are right, each variant at its own best rate.",
        "A step with batch norm takes longer: whether time is saved, the study `overhead` tells.",
        (Part(("none", "batch")),),
        names.convergence,
        figures=("curves",),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x holds",
    ),
    Study(
        "overhead",
        "A step with batch norm costs more time, but the target is reached sooner all the same.",
        "Time of a training step, and seconds of training until 95 % of a validation part are right, each variant at "
        "its own best rate. The same runs as in `convergence`.",
        "Seconds are those of this machine, and of networks so small that fixed costs weigh.",
        (Part(("none", "batch")),),
        names.overhead,
        figures=("costs",),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x not enough evidence",
    ),
    Study(
        "learning-rate",
        "With batch norm much larger learning rates work.",
        "The largest rate at which every seed learns (its training loss ends below half of what guessing gives), with "
        "batch norm against without.",
        "Rates lie half a power of ten apart (in the quick version a whole one), so a ratio is known to that. 'Much' "
        "is 8 times here.",
        (Part(("none", "batch")),),
        names.learning_rate,
        full=Effort((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 5, 6),
        quick=Effort((0.003, 0.03, 0.3, 3.0), 5, 4, ("mlp",)),
        figures=("rates",),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x holds",
    ),
    Study(
        "initialization",
        "With batch norm it matters little how large the first weights are.",
        "All first weights (He's) times 0.1, 0.3, 1, 3 and 10, the classifier's included, at several rates.",
        "What counts as learning is the training loss; the end is compared on the test part.",
        (
            Part(
                ("none", "batch"),
                tuple(
                    Arm(USUAL if factor == 1 else names.weights(factor), Conditions(weights=factor))
                    for factor in (0.1, 0.3, 1.0, 3.0, 10.0)
                ),
            ),
        ),
        names.initialization,
        full=Effort((0.003, 0.03, 0.3), 5, 6),
        quick=Effort((0.01, 0.1), 8, 6, ("mlp",)),
        figures=("rates",),
        repeated="mlp on digits, quick version, 8 seeds each: 3 x holds partly",
    ),
    Study(
        "depth",
        "Without normalization the signal changes its size from layer to layer; with batch norm it keeps it, and deep "
        "networks train. In residual networks it grows: twofold per block without norm, and ever less with it.",
        "The spread within the channels of what enters each activation, at initialization, in networks of 4, 10 and 20 "
        "hidden layers; and the rates at which they learn. The mean square of x in 10 random blocks x + W relu(x) and "
        "x + W relu(batch norm(x)), 512 wide, against 2^k and 1 + k.",
        "The residual networks are measured at initialization on normal inputs, and not trained.",
        (Part(("none", "batch"), tuple(Arm(names.layers(count), Conditions(depth=count)) for count in (4, 10, 20))),),
        names.depth,
        full=Effort((0.003, 0.03, 0.3), 5, 6),
        quick=Effort((0.003, 0.03, 0.3), 16, 4, ("mlp",)),
        figures=("depth-before",),
        formulas=residual_growth,
        repeated="mlp on digits, quick version, 16 seeds each: 3 x holds",
    ),
    Study(
        "train-eval-gap",
        "After a short training batch norm can be good in training mode and bad in evaluation, because its running "
        "averages have not converged; statistics of all the data close the gap, and so does a longer training.",
        "Raw inputs, one pass over the data with momentum 0.1 (PyTorch's) and 0.01 (Keras' 0.99, written PyTorch's "
        "way), the latter with running averages and with the statistics of the training data put in their place "
        "(normkit.recalibrate), and a long training. The same training batches are scored in both modes.",
        "One rate, since the question is not which is best. Momentum is tried in PyTorch's layers; Keras' and Flax' in "
        "normkit's own training keep averages without their first values, and do not have this gap.",
        (
            Part(
                ("batch",),
                (
                    Arm(names.TORCH, Conditions(momentum=0.1)),
                    Arm(names.KERAS, Conditions(momentum=0.01)),
                    Arm(names.POPULATION, Conditions(momentum=0.01, population="training")),
                ),
                inputs=("none",),
                lrs=(0.03,),
                epochs=1,
            ),
            Part(("batch",), (Arm(names.LONG, Conditions(momentum=0.01)),), inputs=("none",), lrs=(0.03,), epochs=30),
        ),
        names.train_eval_gap,
        figures=("curves",),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x holds",
    ),
    Study(
        "batch-size",
        "Batch norm needs batches: the fewer samples are normalized together, the worse it gets. Group norm does not "
        "depend on them, and batch renormalization loses less.",
        "The batch of a step stays 32, only the number of samples that share statistics falls from 32 to 2, so that "
        "nothing else changes.",
        "With a convolution a few samples still bring many positions, so the effect is smaller there than in a "
        "perceptron.",
        (
            Part(
                ("batch",),
                tuple(Arm(names.groups_of(size), Conditions(norm_batch=size)) for size in (32, 16, 8, 4, 2)),
            ),
            Part(("renorm",), tuple(Arm(names.groups_of(size), Conditions(norm_batch=size)) for size in (32, 4))),
            Part(("layer", "group")),
        ),
        names.batch_size,
        full=Effort((0.003, 0.01, 0.03, 0.1), 5, 10),
        quick=Effort((0.01, 0.03), 5, 8, ("mlp",)),
        figures=("final",),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x not enough evidence",
    ),
    Study(
        "placement",
        "It makes little difference whether batch norm stands before or after the activation.",
        "Both positions in every hidden layer, each at its own best rate. Before a layer is after the activation of "
        "the one before, plus one norm on the inputs, and not tried apart.",
        "Little is: within 3 points of accuracy, and within 1.5 times the steps.",
        (Part(("none", "batch", "batch:after")),),
        names.placement,
        figures=("curves", "final"),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x not enough evidence",
    ),
    Study(
        "regularization",
        "Batch norm regularizes: a network with it overfits no more than one without.",
        "A long training of a network with 4 hidden layers on clean labels, on labels of which 30 % are drawn at "
        "random, and with 5 % of the inputs multiplied by 10. What chooses the rate and what is reported are clean.",
        "With random labels every network that can learn them by heart loses; what learns faster loses sooner.",
        (Part(("none", "batch"), _spoiled()),),
        names.regularization,
        full=Effort((0.003, 0.01, 0.03, 0.1), 5, 30),
        quick=Effort((0.01, 0.03), 5, 15, ("mlp",)),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x not enough evidence",
    ),
    Study(
        "dropout",
        "With batch norm dropout can be left out; in front of batch norm it makes the variance in evaluation another "
        "than in training.",
        "Without norm and with batch norm, each with and without dropout of one half behind every hidden activation, "
        "on the data of `regularization`. And dropout, a linear layer of 512 and batch norm on random inputs: the "
        "variance in evaluation over the one that batch norm keeps, against v / ((c^2 + v) / p - c^2) with p kept and "
        "inputs of mean c and variance v.",
        "Batch norm alone has to end within 3 points of the better of dropout alone and both together. The formula "
        "is for inputs independent of each other, as the random ones are and those inside a network are not.",
        (Part(("none", "batch"), _spoiled()), Part(("none", "batch"), tuple(_dropped(_spoiled())))),
        names.dropout,
        full=Effort((0.003, 0.01, 0.03, 0.1), 5, 30),
        quick=Effort((0.01, 0.03), 5, 15, ("mlp",)),
        formulas=dropout_variance,
        repeated="mlp on digits, quick version, 5 seeds each: 3 x holds partly",
    ),
    Study(
        "appearance",
        "Batch norm frees a network of brightness and contrast: fur of another colour does not matter.",
        "Contrast and brightness of the images are drawn for each, tied to the class, tied and swapped in the test "
        "part, or changed in the test part alone; there also with the statistics of the test part put in place (its "
        "inputs, no labels: normkit.recalibrate, as normkit.adapt does).",
        "Instance norm takes every image's own contrast away and can be tried on images only.",
        (
            Part(
                ("none", "batch", "layer"),
                tuple(
                    Arm(name, Conditions(appearance=kind))
                    for name, kind in (
                        (names.RANDOM, "random"),
                        (names.TIED, "tied"),
                        (names.SWAPPED, "swapped"),
                        (names.SHIFTED, "shifted"),
                    )
                ),
            ),
            Part(
                ("instance",),
                tuple(
                    Arm(name, Conditions(appearance=kind))
                    for name, kind in ((names.RANDOM, "random"), (names.SWAPPED, "swapped"), (names.SHIFTED, "shifted"))
                ),
                models=("cnn",),
            ),
            Part(("batch",), (Arm(names.TESTED, Conditions(appearance="shifted", population="test")),)),
        ),
        names.appearance,
        full=Effort((0.01, 0.03, 0.1), 5, 10),
        quick=Effort(_THREE[:2], 5, 6, ("mlp",)),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x holds partly",
    ),
    Study(
        "non-iid",
        "Where samples that are normalized together come from few classes, batch norm learns to rely on that and fails "
        "in evaluation; group norm does not, and batch renormalization less.",
        "Batches of 160, drawn as always, normalized in groups of 16 that hold about 8 samples of each of two classes. "
        "All classes are in every step, only the normalization is not fed alike.",
        "Scored in training mode on such groups the network is told part of the answer: that number is a "
        "diagnosis and no result.",
        (
            Part(
                ("batch", "renorm", "group"),
                (Arm(names.BLOCKED, Conditions(norm_batch=16, by_class=True)),),
                batch_size=160,
            ),
        ),
        names.non_iid,
        full=Effort(_THREE, 5, 30),
        quick=Effort((0.03,), 5, 20, ("mlp",)),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x holds partly",
    ),
    Study(
        "recurrent",
        "In a recurrent network batch norm needs statistics of each time step, without padding, which get noisier "
        "the fewer sequences are left, and gains that begin at 0.1; layer norm needs none of that.",
        "Images are read row by row by an LSTM of 32 units, in PyTorch alone; every image is cut to its first rows, 3 "
        "to all, and padded. Batch norm with one statistic over time, of W x (arXiv:1510.01378), padding counted or "
        "not; of each step of W x alone; of each step of W x, U h and c (arXiv:1603.09025) with gains of 0.1 and 1; "
        "layer norm (arXiv:1607.06450), and no norm. After training the batches of one more epoch go through the "
        "network: how many sequences are left at each step, and how far the statistics of the batches lie apart.",
        "The LSTM takes the place of the perceptron, and is called mlp. One statistic over time cannot be had of U h: "
        "statistics of each step of W x alone differ from it in nothing else, those of the paper in what they "
        "normalize as well. Sequences are short, and rows that were cut are missing from the test part too. That "
        "means of fewer values are noisier is arithmetic; how much so here is measured.",
        (
            Part(
                ("batch",),
                (
                    Arm(names.COUNTED, Conditions(sequences="counted", batch_spread=True)),
                    Arm(names.MASKED, Conditions(sequences="masked", batch_spread=True)),
                    Arm(names.EACH, Conditions(sequences="inputs", batch_spread=True)),
                    Arm(names.STEPS, Conditions(sequences="steps", gamma=0.1, batch_spread=True)),
                    Arm(names.LARGE, Conditions(sequences="steps", gamma=1.0, batch_spread=True)),
                ),
                models=("mlp",),
            ),
            Part(("none", "layer"), (Arm(names.ALONE, Conditions(sequences="masked")),), models=("mlp",)),
        ),
        names.recurrent,
        full=Effort((0.01, 0.03, 0.1, 0.3), 5, 20, ("mlp",)),
        quick=Effort((0.03, 0.1), 8, 10, ("mlp",)),
        figures=("final", "curves"),
        repeated="mlp on digits, quick version, 8 seeds each: 3 x holds partly",
    ),
    Study(
        "covariate-shift",
        "Each update assumes that the other layers stay as they are; batch norm helps because a layer's gradient "
        "changes less once the layers before it have moved.",
        "The gradient of every layer, on the batch of a step, before and after all layers in front of it took that "
        "step (arXiv:1805.11604): the length of the difference, and the cosine of the two. Medians over the layers and "
        "over 8 steps from first to last, at the largest rate that works without norm, and each at its own best rate.",
        "The paper finds that batch norm does not reduce this shift and that it helps all the same; what it changes "
        "instead, the study `smoothness` tells. Percentiles of what enters an activation are shown and not judged: a "
        "network that learns nothing has the steadiest ones.",
        (_PROBED,),
        names.covariate_shift,
        figures=("percentiles",),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x not enough evidence",
    ),
    Study(
        "smoothness",
        "With batch norm the loss is smoother: along the gradient it and its slope change less.",
        "Steps of 0.5 to 4 times the rate along the gradient of a batch (arXiv:1805.11604): the largest change of the "
        "gradient over the length of the step (effective beta-smoothness), that change itself, and between which "
        "values the loss varies, as a share of it. Medians over 8 steps. The same runs as in `covariate-shift`.",
        "Steps are longer at a larger rate, so at different rates only beta compares like with like. The paper shows "
        "between which values the loss varies; a share of it does not get smaller only because the loss does. Smoother "
        "is 2 times less here.",
        (_PROBED,),
        names.smoothness,
        figures=("curves",),
        repeated="mlp on digits, quick version, 10 seeds each: 3 x holds partly",
    ),
    Study(
        "weight-decay",
        "In front of batch norm weight decay does not make the function simpler: it only keeps the weights small and "
        "with them the steps large, and a growing rate does the same.",
        "Labels of which 30 % are random, so that gradients stay alive, 4 hidden layers, one rate. Hidden weights "
        "without decay, with a decay of 0.02, and without it at a rate that grows so that weights whose size does not "
        "matter turn alike (arXiv:1910.07454). Over the last quarter the norm of the weights is compared with the one "
        "at which decay and gradients balance, |w|⁴ = rate |g|²|w|² / (2 decay (1 - momentum)), and the turn of a step "
        "with sqrt(2 rate decay / (1 + momentum)).",
        "Without norm the growing rate has to end elsewhere, or it would say nothing. That the function is the same "
        "step by step, tests of the package show in float64.",
        (
            Part(
                ("none", "batch"),
                tuple(
                    Arm(name, Conditions(depth=4, label_noise=0.3, landscape=24, **decay))
                    for name, decay in _DECAYS.items()
                ),
                lrs=(0.03,),
            ),
        ),
        names.weight_decay,
        full=Effort((0.03,), 5, 40),
        quick=Effort((0.03,), 5, 30, ("mlp",)),
        repeated="mlp on digits, quick version, 5 seeds each: 3 x not enough evidence",
    ),
)
STUDIES: Mapping[str, Study] = MappingProxyType({study.name: study for study in _ALL})


def find(name: str) -> Study:
    """The study of this name. Raises NormValueError with the nearest names for an unknown one."""
    if name not in STUDIES:
        raise NormValueError(message("a study must be a known one", repr(name), nearest(name, (*STUDIES, "all"))))
    return STUDIES[name]
