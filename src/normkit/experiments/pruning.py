"""Optuna's pruners, asked about the rates of one norm: a trial that falls behind its norm's other rates is ended."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

__all__ = ["PRUNERS", "family", "is_behind", "may_lose"]

PRUNERS = ("median", "hyperband")


@functools.lru_cache(maxsize=4096)  # asked of every trial at every report
def family(canonical: str) -> str:
    """What the trials share that compete: all of a configuration but the rate and the seed.

    Between norms nothing may be pruned, since each is judged at its own best rate.
    """
    plain = json.loads(canonical)
    return json.dumps({name: value for name, value in plain.items() if name not in ("lr", "seed")}, sort_keys=True)


def is_behind(
    optuna: Any, pruner: str, direction: str, trials: Sequence[Any], index: int
) -> tuple[bool, dict[str, Any]]:
    """Whether Optuna's pruner would stop a trial of a family, and what it wants to remember of that trial.

    Args:
        optuna: the module.
        pruner: one of `PRUNERS`, with Optuna's own settings.
        direction: `maximize` or `minimize`.
        trials: the family, in the order of their numbers.
        index: which of them it is about.

    Pruners look at all trials of a study, and ours holds other norms and other questions too: they are shown another
    one, in memory, with this family alone.
    """
    kinds = {"median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner}
    shown = optuna.create_study(study_name="family", direction=direction, pruner=kinds[pruner]())
    states = optuna.trial.TrialState
    for trial in trials:
        shown.add_trial(
            optuna.trial.create_trial(
                state=trial.state,
                values=trial.values if trial.state == states.COMPLETE else None,
                intermediate_values=trial.intermediate_values,
                system_attrs=trial.system_attrs,
            )
        )
    mine = shown.get_trials(deepcopy=False)[index]
    behind = bool(shown.pruner.prune(shown, mine))
    return behind, shown._storage.get_trial_system_attrs(mine._trial_id)


def may_lose(trials: Sequence[Any], index: int) -> bool:
    """Whether another rate of the family is still whole: some trial complete, and none pruned or diverged.

    The last whole rate is left alone, or a norm would have none to be judged at.
    """
    own, lost, complete = trials[index].params["lr"], set(), set()
    for trial in trials:
        attributes = trial.user_attrs
        if attributes.get("pruned") or attributes.get("diverged"):
            lost.add(trial.params["lr"])
        elif "result" in attributes:
            complete.add(trial.params["lr"])
    return bool(complete - lost - {own})
