"""A planned question as plain values for the storage, from which another machine makes a job of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from normkit.errors import NormRuntimeError, NormValueError, message
from normkit.experiments.code import Code, content_hash
from normkit.experiments.config import Config, is_reference
from normkit.experiments.data import DEFAULT_DATA, load
from normkit.experiments.session import Job, Plan

__all__ = ["Question"]

_FUNCTIONS = "model", "run", "data", "loss", "optimizer", "metric"  # fields of a Config that may name code


@dataclass(frozen=True)
class Question:
    """What a machine must know to take trials of a comparison.

    Attributes:
        config: with nothing left open.
        files: of the user, by their names without folders, each with a hash of its content.
        code, data: the fingerprints that all its trials carry.
        trials: the keys of all of them.
    """

    config: Config
    files: tuple[tuple[str, str], ...]
    code: str
    data: str
    trials: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan) -> Question:
        """What was planned."""
        files = sorted((Path(file).name, digest) for file, digest in plan.job.files.items())
        first, keys = plan.trials[0], tuple(trial.key() for trial in plan.trials)
        return cls(plan.job.config, tuple(files), first.code, first.data, keys)

    @property
    def name(self) -> str:
        """The same for the same trials."""
        return hashlib.sha256(" ".join([*self.trials, self.config.pruner or ""]).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        config = asdict(replace(self.config, conditions=self.config.conditions[:1]))
        return {
            "config": {**config, "conditions": [one.changes() for one in self.config.conditions]},
            "files": list(map(list, self.files)),
            **{name: getattr(self, name) for name in ("code", "data")},
            "trials": list(self.trials),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Question:
        """The inverse of :meth:`to_dict`. Raises NormRuntimeError for what another version of normkit wrote."""
        try:
            files = tuple((name, digest) for name, digest in plain["files"])
            return cls(Config(**plain["config"]), files, plain["code"], plain["data"], tuple(plain["trials"]))
        except (KeyError, TypeError, ValueError) as error:
            must = "a question in the storage must come from a normkit like this one"
            raise NormRuntimeError(message(must, str(error), "use one version on all machines")) from error

    def job(self) -> Job:
        """The question as it travels to a worker of this machine.

        A file of the user's is looked for under the name that was typed, then in the present folder. Raises
        NormValueError where one is missing or has another content, before it is run, and for what was handed over in
        Python, which only the process that has it can use.
        """
        config = self.config
        labels = [label for name in _FUNCTIONS if (label := getattr(config, name)) and is_reference(label)]
        code = {label: self._found(label) for label in labels}
        data = None
        if not config.run and config.data not in code:
            data = load(config.data or DEFAULT_DATA, config.loss)
        return Job(config, data, code)

    def check(self, plan: Plan) -> None:
        """Raise NormRuntimeError where planning it here gave other trials than where it was asked."""
        if tuple(trial.key() for trial in plan.trials) == self.trials:
            return
        here = Question.of(plan)
        hint = None
        if here.code != self.code:
            what, hint = "the code", "copy the files that it imports, too"
            names = sorted({name for name, _ in set(here.files) ^ set(self.files)})
            got = ", ".join(names) if names else "other code"
        elif here.data != self.data:
            what, got = "the data", f"{here.data} instead of {self.data}"
        else:
            what, got, hint = "every trial", "another protocol", "use one version of normkit on all machines"
        must = f"{what} of {self.config.subject} must be the same here as where the comparison was asked"
        raise NormRuntimeError(message(must, got, hint))

    def _found(self, label: str) -> Code:
        if label.startswith("python:"):
            must = f"{label.partition(':')[2]} must be in a file for other machines to use it"
            raise NormValueError(message(must, "an object of a process", "name it as file.py:name"))
        typed = Path(label.rpartition(":")[0])
        path = next((path for path in (typed, Path(typed.name)) if path.is_file()), None)
        if path is None:
            hint = f"copy it to {Path.cwd()}, or start the worker in its folder"
            raise NormValueError(message(f"{typed.name} must be on this machine too", "no such file", hint))
        if (typed.name, content_hash(path)) not in self.files:
            must = f"{typed.name} must be the same here as where the comparison was asked"
            raise NormValueError(message(must, "another content", "copy it anew"))
        return Code(label, str(path.absolute()))
