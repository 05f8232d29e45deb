"""The recovery report of a recipe: reads what its stages left, writes ``report.json``, ``report.md`` and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mopd import evaluation, metrics, report_files, screen
from megatron_mopd.config import Config
from megatron_mopd.report import Divergence, Example, Report, merged


def build(directory: Path, stages: Sequence[str], config: Config) -> Report:
    """The report on the last of ``stages`` in ``directory``, whose teachers are stages of the same recipe or came as
    checkpoints.

    ``wall_s`` is the time of all stages together, whenever each of them ran.
    """
    name = stages[-1]
    before, after = _read(directory / name / "before.json"), _read(directory / name / "result.json")
    teacher_of = {domain: teacher for teacher, t in config.teachers.items() for domain in t.domains}
    rows = metrics.read(directory / name)
    return Report(
        title=f"{directory.name}: {merged(len(config.teachers))}",
        teacher_of=teacher_of,
        before=evaluation.from_json(before["accuracy"]),
        after=evaluation.from_json(after["accuracy"]),
        teachers={t: evaluation.from_json(_teacher(directory, stages, t, before)["accuracy"]) for t in config.teachers},
        reverse_kl={
            teacher: {d: Divergence(before=kl, after=after["reverse_kl"][teacher][d]) for d, kl in row.items()}
            for teacher, row in before["reverse_kl"].items()
        },
        parallel=after["parallel"],
        versions=after["versions"],
        wall_s=sum(_read(directory / stage / "result.json")["wall_s"] for stage in stages),
        steps=config.run.steps,
        accuracy_history={
            d: [(point["step"], evaluation.from_json(point["accuracy"])[d]) for point in after["history"]]
            for d in teacher_of
        },
        kl_history={d: metrics.series(rows, f"reverse_kl_k1/{d}") for d in teacher_of},
        teacher_nvfp4=after.get("teacher_nvfp4", {}),
        advantages=before["advantages"],
        examples=[
            Example(
                domain=e["domain"],
                prompt=e["prompt"],
                tokens=tuple(e["tokens"]),
                advantages=tuple(e["advantages"]),
                note=when,
            )
            for when, tree in (("before", before), ("after", after))
            for e in tree["examples"]
        ],
    )


def publish(directory: Path, stages: Sequence[str], config: Config) -> Report:
    """Write the report beside the stages and show it."""
    made = build(directory, stages, config)
    report_files.write(made, directory)
    screen.show(made)
    return made


def _teacher(directory: Path, stages: Sequence[str], name: str, before: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stage's result has the accuracy in all domains; of a checkpoint that in the domains it teaches is known."""
    if name in stages:
        return _read(directory / name / "result.json")
    return before.get("teachers", {}).get(name, {"accuracy": {}})


def _read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text())
