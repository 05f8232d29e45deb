"""What the stages of a recipe left on disk, for its report; answers are paired, so all must be to the same prompts.

Imports torch and what it needs, not megatron.core.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.intervals import Accuracy
from megatron_mopd.recipe import ablations
from megatron_mopd.recipe.schema import PREFLIGHT, Recipe, Roles, is_skipped

_FILES = ("result.json", PREFLIGHT, "before.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A finished stage."""

    stage: str
    result: Mapping[str, Any]  # of result.json, with that of a pre-flight's preflight.json
    before: Mapping[str, Any] = field(default_factory=dict)  # of before.json, which stages with teachers have

    @property
    def answers(self) -> Mapping[str, str]:
        """``{domain: "0110..."}``; empty for a stage without held-out prompts."""
        return self.result.get("answers", {})

    def accuracy(self, domain: str) -> Accuracy | None:
        """None for a domain that this stage was not measured on."""
        marks = self.answers.get(domain)
        return None if marks is None else Accuracy(correct=marks.count("1"), total=len(marks))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """The finished stages of a recipe by name, and what was measured beside them."""

    recipe: Recipe
    roles: Roles
    configs: Mapping[str, Config]
    finished: Mapping[str, Outcome]
    ablations: Mapping[str, Mapping[str, Any]]
    foreign: Mapping[str, str] = field(default_factory=dict)  # ablations of another run -> why they are

    def of(self, name: str | None) -> Outcome | None:
        """The stage of that name if it is finished."""
        return None if name is None else self.finished.get(name)

    def of_teacher(self, name: str) -> Outcome | None:
        """A teacher's answers in the domains that it serves: those of its stage, or, of one that came as a checkpoint,
        those that the last iteration with it left."""
        if not self.is_external(name):
            return self.of(name)
        for iteration in reversed(self.roles.iterations):
            if (stage := self.of(iteration)) and (answered := stage.before.get("teachers", {}).get(name)):
                return Outcome(stage=iteration, result=answered)
        return None

    @property
    def students(self) -> dict[str, tuple[str, str]]:
        """``{key: (title, stage)}`` of the measured students in the order of the recipe, finished or not.

        Keys are ``sft``, ``before``, ``mopd_1`` and so on, ``boosted`` and ``quantized``, and ``warm_up_1`` and so on
        of a warm-up, not a skipped one, that the iteration starts from.
        """
        named: dict[str, tuple[str, str | None]] = {"sft": ("SFT", self.roles.sft)}
        named["before"] = ("before", self.roles.before)
        for i, name in enumerate(self.roles.iterations, start=1):
            named[f"warm_up_{i}"] = ("warm-up" if i == 1 else f"warm-up {i}", self._warm_up(name))
            named[f"mopd_{i}"] = (f"MOPD {i}", name)
        named |= {"boosted": ("boosted", self.roles.boosted), "quantized": ("NVFP4", self.roles.quantized)}
        return {key: (title, name) for key, (title, name) in named.items() if name is not None}

    def _warm_up(self, iteration: str) -> str | None:
        start = self.recipe.stage(iteration, "report.iterations").initial
        if start is None or self.recipe.stage(start, iteration).after is None or is_skipped(self.recipe, start):
            return None
        return start

    @property
    def teacher_of(self) -> dict[str, str]:
        """``{domain: teacher}`` of each distilled domain in the last iteration that distils it."""
        return {d: t for name in self.roles.iterations for d, t in self.served(name).items()}

    @property
    def first_teacher_of(self) -> dict[str, str]:
        """``{domain: teacher}`` of each distilled domain in the first iteration that distils it."""
        return {d: t for name in reversed(self.roles.iterations) for d, t in self.served(name).items()}

    def served(self, stage: str) -> dict[str, str]:
        """``{domain: teacher}`` of a stage."""
        teachers = self.configs[stage].teachers
        return {domain: name for name, teacher in teachers.items() for domain in teacher.domains}

    def is_external(self, teacher: str) -> bool:
        """Whether a teacher came as a checkpoint."""
        return teacher not in self.recipe.names

    @property
    def undistilled(self) -> list[str]:
        """Measured domains that no iteration distils."""
        measured = [d for _, stage in self.students.values() if (o := self.of(stage)) for d in o.answers]
        return [domain for domain in dict.fromkeys(measured) if domain not in self.teacher_of]


def load(recipe: Recipe, configs: Mapping[str, Config]) -> Outcomes:
    """Everything in ``recipe.dir`` that the report needs.

    Raises :class:`ConfigurationError` for a recipe without roles, for stages whose answers are to different prompts and
    for results of a version that kept no answers.
    """
    if recipe.report is None:
        raise ConfigurationError(
            f"{recipe.dir}: the recipe has no report section; name its stages there (before, iterations)"
        )
    finished = {}
    for stage in recipe.stages:
        if (outcome := _finished(recipe.dir / stage.name)) is not None:
            finished[stage.name] = outcome
    folder = recipe.dir / ablations.FOLDER
    there = {name: _read(path) for name in ablations.NAMES if (path := folder / f"{name}.json").is_file()}
    foreign = {name: why for name, tree in there.items() if (why := ablations.foreign(recipe, tree))}
    made = Outcomes(
        recipe=recipe,
        roles=recipe.report,
        configs=configs,
        finished=finished,
        ablations={name: tree for name, tree in there.items() if name not in foreign},
        foreign=foreign,
    )
    _check_pairs(made)
    return made


def _finished(directory: Path) -> Outcome | None:
    """What a stage left; None before its end."""
    marker = directory / "stage.json"
    if not marker.is_file() or not _read(marker)["finished"]:
        return None
    trees = {name: _read(file) for name in _FILES if (file := directory / name).is_file()}
    result = trees.get("result.json", {}) | trees.get(PREFLIGHT, {})
    return Outcome(stage=directory.name, result=result, before=trees.get("before.json", {}))


def _check_pairs(outcomes: Outcomes) -> None:
    """All students and teachers that the report compares answered the same prompts in the same order."""
    first: dict[str, tuple[str, str]] = {}  # domain -> prompts, stage
    for outcome in _compared(outcomes):
        if outcome.result.get("accuracy") and not outcome.answers:
            raise ConfigurationError(
                f"{outcomes.recipe.dir / outcome.stage}/result.json has accuracies and no answers, so nothing can be"
                " paired with them; run the stage anew"
            )
        for domain, prompts in outcome.result.get("prompts", {}).items():
            known, stage = first.setdefault(domain, (prompts, outcome.stage))
            if known != prompts:
                raise ConfigurationError(
                    f"{outcomes.recipe.dir}: stages {stage!r} and {outcome.stage!r} answered different held-out prompts"
                    f" of domain {domain!r} ({known[:12]} and {prompts[:12]}), so their answers cannot be paired; give"
                    " all stages the same data.held_out and evaluation.final_samples and run the changed one anew"
                )


def _compared(outcomes: Outcomes) -> Iterator[Outcome]:
    students = [outcomes.of(stage) for _, stage in outcomes.students.values()]
    names = dict.fromkeys([*outcomes.first_teacher_of.values(), *outcomes.teacher_of.values()])
    for outcome in [*students, *map(outcomes.of_teacher, names)]:
        if outcome is not None:
            yield outcome


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
