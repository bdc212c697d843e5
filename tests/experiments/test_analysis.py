import math

import pytest

from normkit.experiments.analysis import Setting, score, summarize


def only(results, target=0.95, classes=10):
    (group,) = summarize(results, target, classes)
    (variant,) = group.variants
    return variant


def test_the_best_rate_has_the_highest_mean_validation_accuracy(trial):
    variant = only(
        [
            trial(lr=0.1, seed=0, accuracies=(0.1, 0.97), test=0.1),
            trial(lr=0.1, seed=1, accuracies=(0.1, 0.97), test=0.3),
            trial(lr=0.3, seed=0, accuracies=(0.1, 0.99), test=0.9),
            trial(lr=0.3, seed=1, accuracies=(0.1, 0.91), test=0.9),
        ]
    )
    assert variant.best_lr == 0.1
    assert variant.test == (0.1, 0.3)  # the other rate tests better, and is not looked at
    assert variant.mean_test == pytest.approx(0.2)
    assert variant.test_deviation == pytest.approx(math.sqrt(0.02))


def test_validation_loss_decides_between_equal_accuracies(trial):
    wide = trial(lr=0.1, accuracies=(0.1, 0.9))
    narrow = trial(lr=0.3, accuracies=(0.1, 0.9))
    object.__setattr__(narrow, "curve", (*narrow.curve[:-1], narrow.curve[-1]._replace(loss=0.01)))
    assert only([wide, narrow]).best_lr == 0.3
    assert only([narrow, wide]).best_lr == 0.3


def test_a_rate_at_which_a_seed_diverged_is_never_best(trial):
    variant = only(
        [
            trial(lr=0.1, seed=0, accuracies=(0.1, 0.5)),
            trial(lr=0.1, seed=1, accuracies=(0.1, 0.5)),
            trial(lr=0.3, seed=0, accuracies=(0.1, 0.99)),
            trial(lr=0.3, seed=1, diverged=True),
        ]
    )
    assert variant.best_lr == 0.1
    assert variant.rates[1].diverged == 1
    assert variant.rates[1].mean is None


def test_a_variant_that_always_diverges_has_no_rate(trial):
    variant = only([trial(lr=lr, diverged=True, accuracies=(0.1,)) for lr in (0.1, 0.3)])
    assert (variant.best_lr, variant.largest_lr, variant.mean_steps, variant.mean_test) == (None, None, None, None)


def test_steps_to_the_target(trial):
    variant = only([trial(seed=0, accuracies=(0.1, 0.5, 0.95, 0.2)), trial(seed=1, accuracies=(0.1, 0.96, 0.9, 0.97))])
    assert variant.steps_to_target == (20, 10)
    assert variant.mean_steps == 15
    assert variant.mean_seconds == pytest.approx(1.5)


def test_a_seed_that_does_not_reach_the_target_is_not_averaged_away(trial):
    variant = only([trial(seed=0, accuracies=(0.1, 0.99)), trial(seed=1, accuracies=(0.1, 0.94))])
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
            trial(lr=1.0, seed=0, accuracies=(0.1, 0.2)),
            trial(lr=1.0, seed=1, accuracies=(0.1, 0.2), train_loss=loss),
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
    groups = summarize(results, 0.95, 10)
    assert [group.setting for group in groups] == [
        Setting(8, "max"), Setting(8, "none"), Setting(32, "max"), Setting(32, "none")
    ]  # fmt: skip
    assert [variant.norm for variant in groups[0].variants] == ["batch", "none"]
    assert groups[0].baseline.norm == "none"


def test_a_trial_is_judged_by_the_mean_over_its_last_epoch(trial):
    assert score(trial(accuracies=(0.1, 0.4, 0.9, 0.7, 0.8), epochs=2)) == pytest.approx(0.75)
    assert score(trial(accuracies=(0.1, 0.4, 0.9), diverged=True)) is None
