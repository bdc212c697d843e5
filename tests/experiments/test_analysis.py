import dataclasses
import math

import numpy as np
import pytest

from normkit.experiments.analysis import Setting, score, summarize
from normkit.experiments.config import Task
from normkit.experiments.results import Evaluation, Gap, packed

ACCURACY = Task("accuracy", "max", 0.95, guess=math.log(10), chance=0.1)
LOSS = Task("loss", "min", None)


def only(results, task=ACCURACY):
    (group,) = summarize(results, task)
    (variant,) = group.variants
    return variant


def test_the_best_rate_has_the_highest_mean_validation_accuracy(trial):
    variant = only(
        [
            trial(lr=0.1, seed=0, values=(0.1, 0.97), final=0.1),
            trial(lr=0.1, seed=1, values=(0.1, 0.97), final=0.3),
            trial(lr=0.3, seed=0, values=(0.1, 0.99), final=0.9),
            trial(lr=0.3, seed=1, values=(0.1, 0.91), final=0.9),
        ]
    )
    assert variant.best_lr == 0.1
    assert variant.final == (0.1, 0.3)  # the other rate tests better, and is not looked at
    assert variant.mean_final == pytest.approx(0.2)
    assert variant.final_deviation == pytest.approx(math.sqrt(0.02))


def test_validation_loss_decides_between_equal_accuracies(trial):
    wide = trial(lr=0.1, values=(0.1, 0.9))
    narrow = trial(lr=0.3, values=(0.1, 0.9))
    object.__setattr__(narrow, "curve", (*narrow.curve[:-1], narrow.curve[-1]._replace(loss=0.01)))
    assert only([wide, narrow]).best_lr == 0.3
    assert only([narrow, wide]).best_lr == 0.3


def test_a_rate_at_which_a_seed_diverged_is_never_best(trial):
    variant = only(
        [
            trial(lr=0.1, seed=0, values=(0.1, 0.5)),
            trial(lr=0.1, seed=1, values=(0.1, 0.5)),
            trial(lr=0.3, seed=0, values=(0.1, 0.99)),
            trial(lr=0.3, seed=1, diverged=True),
        ]
    )
    assert variant.best_lr == 0.1
    assert variant.rates[1].diverged == 1
    assert variant.rates[1].mean is None


def test_a_variant_that_always_diverges_has_no_rate(trial):
    variant = only([trial(lr=lr, diverged=True, values=(0.1,)) for lr in (0.1, 0.3)])
    assert (variant.best_lr, variant.largest_lr, variant.mean_steps, variant.mean_final) == (None, None, None, None)


def test_steps_to_the_target(trial):
    variant = only([trial(seed=0, values=(0.1, 0.5, 0.95, 0.2)), trial(seed=1, values=(0.1, 0.96, 0.9, 0.97))])
    assert variant.steps_to_target == (20, 10)
    assert variant.mean_steps == 15
    assert variant.mean_seconds == pytest.approx(1.5)


def test_a_seed_that_does_not_reach_the_target_is_not_averaged_away(trial):
    variant = only([trial(seed=0, values=(0.1, 0.99)), trial(seed=1, values=(0.1, 0.94))])
    assert variant.steps_to_target == (10, None)
    assert variant.mean_steps is None
    assert variant.budget == 10


@pytest.mark.parametrize(("loss", "expected"), [(1.15, 1.0), (1.16, 0.1)])
def test_the_largest_usable_rate_needs_every_seed_below_half_the_loss_of_guessing(trial, loss, expected):
    assert math.log(10) / 2 == pytest.approx(1.151, abs=1e-3)
    variant = only(
        [
            trial(lr=0.1, seed=0),
            trial(lr=0.1, seed=1),
            trial(lr=1.0, seed=0, values=(0.1, 0.2)),
            trial(lr=1.0, seed=1, values=(0.1, 0.2), train_loss=loss),
        ]
    )
    assert variant.largest_lr == expected


def test_groups_are_batch_sizes_and_inputs(trial):
    results = [
        trial(norm, batch_size=size, inputs=inputs)
        for size in (8, 32)
        for inputs in ("max", "none")
        for norm in ("batch", "none")
    ]
    groups = summarize(results, ACCURACY)
    assert [group.setting for group in groups] == [
        Setting(8, "max"), Setting(8, "none"), Setting(32, "max"), Setting(32, "none")
    ]  # fmt: skip
    assert [variant.norm for variant in groups[0].variants] == ["batch", "none"]
    assert groups[0].baseline.norm == "none"


def test_a_trial_is_judged_by_the_mean_over_its_last_epoch(trial):
    assert score(trial(values=(0.1, 0.4, 0.9, 0.7, 0.8), epochs=2)) == pytest.approx(0.75)
    assert score(trial(values=(0.1, 0.4, 0.9), diverged=True)) is None


def test_of_a_loss_the_smallest_is_best_and_there_is_no_target(trial):
    variant = only([trial(lr=0.1, values=(9, 3)), trial(lr=0.3, values=(9, 2)), trial(lr=1.0, values=(9, 9.5))], LOSS)
    assert variant.best_lr == 0.3
    assert variant.steps_to_target == ()
    assert not variant.all_reached
    # Without the loss of a guess to compare with, a rate works where the metric came half way, here to 5.5.
    assert variant.largest_lr == 0.3


def test_half_way_is_from_the_worst_start_to_the_best_end_of_any_variant(trial):
    def largest(value):
        results = [trial("none", lr=0.1, values=(0.2, 0.4)), trial("none", lr=1.0, values=(0.9, value))]
        results += [trial("batch", lr=0.1, values=(0.1, 0.9)), trial("batch", lr=1.0, values=(0.0, 0.0))]
        (group,) = summarize(results, Task("accuracy", "max", None))
        return group.variants[0].largest_lr

    assert largest(0.5) == 1.0  # half way from 0.1 to 0.9, although worse than at first
    assert largest(0.49) is None


def test_gap_memory_and_step_time_are_summed_up(trial):
    variant = only(
        [
            trial(seed=0, gap=Gap(0.1, 0.4, 0.99, 0.9), peak_memory=10, step_seconds=0.1),
            trial(seed=1, gap=Gap(0.1, 0.2, 0.99, 0.96), peak_memory=30, step_seconds=0.2),
            trial(seed=2, lr=0.3, values=(0.1, 0.2), peak_memory=20, step_seconds=0.3),
            trial(seed=3, lr=0.3, diverged=True, peak_memory=999, step_seconds=9.0),
        ]
    )
    assert variant.gap_loss == pytest.approx(0.2)
    assert variant.gap_metric == pytest.approx(-0.06)
    assert variant.peak_memory == 20
    assert variant.seconds_per_step == 0.2


def compared(trial, finals, task=ACCURACY, **changes):
    """One group; `finals` gives the values of each variant, seed by seed."""
    results = [
        trial(norm, seed=seed, final=value, **changes)
        for norm, values in finals.items()
        for seed, value in enumerate(values)
    ]
    (group,) = summarize(results, task)
    return group


def test_differences_are_paired_by_seed(trial):
    # Seeds differ by much, variants by little: only the pairing can see it.
    group = compared(trial, {"none": (0.1, 0.5, 0.9, 0.3, 0.7), "batch": (0.121, 0.52, 0.921, 0.32, 0.72)})
    found = group.difference("batch", "final")
    assert found.value == pytest.approx(0.0204)
    from scipy import stats

    expected = stats.ttest_rel((0.121, 0.52, 0.921, 0.32, 0.72), (0.1, 0.5, 0.9, 0.3, 0.7))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.claimed
    assert stats.ttest_ind((0.121, 0.52, 0.921, 0.32, 0.72), (0.1, 0.5, 0.9, 0.3, 0.7)).pvalue > 0.9


def test_steps_are_compared_as_a_ratio_and_the_budget_stands_for_what_was_not_reached(trial):
    results = [trial("none", seed=s, values=(0.1, *[0.5] * 8), epochs=8) for s in range(5)]
    results += [trial("batch", seed=s, values=(0.1, 0.5, 0.5, 0.5, *[0.96] * 5), epochs=8) for s in range(5)]
    (group,) = summarize(results, ACCURACY)
    found = group.difference("batch", "steps")
    assert found.value == pytest.approx(0.5)  # 40 against the budget of 80
    assert group.variants[0].mean_steps is None


def test_few_seeds_that_agree_are_no_certainty(trial):
    """Steps lie on the grid of the evaluations: three seeds of the same count differ by less than the grid tells."""
    (group,) = summarize(
        [trial("none", seed=s, values=(0.1, 0.5, 0.96, 0.97), epochs=3) for s in range(3)]
        + [trial("batch", seed=s, values=(0.1, 0.96, 0.96, 0.97), epochs=3) for s in range(3)],
        ACCURACY,
    )
    found = group.difference("batch", "steps")
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert 0.05 < found.p < 0.5


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_nothing_is_tested(trial, seeds):
    group = compared(trial, {"none": (0.1, 0.2)[:seeds], "batch": (0.9, 0.95)[:seeds]})
    found = group.difference("batch", "final")
    assert (found.low, found.high, found.p, found.adjusted) == (None, None, None, None)
    assert not found.claimed
    assert group.variants[0].interval is None


def test_all_differences_of_the_comparison_are_corrected_together(trial):
    finals = {"none": (0.10, 0.11, 0.12, 0.1, 0.11), "batch": (0.14, 0.13, 0.15, 0.15, 0.14)}
    alone = compared(trial, finals, LOSS).difference("batch", "final")
    assert alone.adjusted == pytest.approx(alone.p)
    results = [
        trial(norm, seed=seed, final=value, batch_size=size)
        for size in (8, 32)
        for norm, values in {**finals, "layer": (0.1, 0.2, 0.0, 0.1, 0.2), "rms": (0.2, 0.1, 0.1, 0.3, 0.0)}.items()
        for seed, value in enumerate(values)
    ]
    first, second = summarize(results, LOSS)
    assert [(d.first, d.second) for d in first.against_baseline] == [(n, "none") for n in ("batch", "layer", "rms")]
    assert [(d.first, d.second) for d in first.pairs] == [("batch", "layer"), ("batch", "rms"), ("layer", "rms")]
    both = [group.difference("batch", "final") for group in (first, second)]
    # Twelve differences: six against the baseline with weight 1, six others with 0.1.
    assert both[0].p == pytest.approx(alone.p)
    assert min(d.adjusted for d in both) == pytest.approx(alone.p * 6.6)


def test_the_baseline_is_none_or_what_came_first(trial):
    assert compared(trial, {"batch": (0.5,) * 3, "none": (0.4,) * 3}).against_baseline[0].second == "none"
    assert compared(trial, {"batch": (0.5,) * 3, "layer": (0.4,) * 3}).against_baseline[0].second == "batch"


def test_a_variant_without_a_rate_takes_no_part_in_differences(trial):
    results = [trial("none", seed=s) for s in range(3)] + [trial("batch", seed=s, diverged=True) for s in range(3)]
    (group,) = summarize(results, ACCURACY)
    assert group.against_baseline == group.pairs == ()


def test_test_examples_count(trial):
    """Each variant misses examples of its own with every seed: another test set might have had fewer of them."""

    def difference(seeds, known):
        results = []
        for norm, missed in (("none", range(20)), ("batch", range(20, 30))):
            for seed in range(seeds):
                right = np.ones(200)
                right[[*missed, 100 + seed]] = 0  # and one by chance
                results.append(trial(norm, seed=seed, final=right.mean(), examples=packed(right) if known else None))
        (group,) = summarize(results, ACCURACY)
        return group.difference("batch", "final")

    for seeds in (5, 10):
        assert difference(seeds, known=False).claimed
        assert not difference(seeds, known=True).claimed
    # McNemar: 20 against 10 of 30 examples that differ, sqrt(30 - 10^2 / 200) / 200 standard error.
    many = difference(10, known=True)
    assert many.value == pytest.approx(0.05)
    assert many.high - many.value == pytest.approx(1.96 * math.sqrt(29.5) / 200, rel=0.05)
    # With fewer seeds the quantile is that of the seeds.
    few = difference(5, known=True)
    assert few.high - few.value == pytest.approx(2.776 * math.sqrt(29.5) / 200, rel=0.05)


def test_a_loop_that_reports_once_is_judged_by_that(trial):
    once = dataclasses.replace(trial(epochs=6), curve=(Evaluation(7, 1.0, None, 0.8),), steps=7, train_losses=())
    assert score(once) == 0.8
    assert only([once], Task("accuracy", "max", 0.95)).largest_lr == 0.1
