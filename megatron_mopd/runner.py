"""Run a recipe of stages: ``torchrun --nproc_per_node=N -m megatron_mopd.runner RECIPE.yaml [key=value ...]``.

A recipe names stages over one common configuration. A stage that is finished and unchanged (its settings, the
checkpoints it starts from and its teachers) is kept; the report at the end reads what the stages left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_mopd import (
    checkpoint,
    checkpoint_directory,
    display,
    exchange,
    origins,
    parallel,
    presets,
    recipe_report,
    run_record,
)
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.parallel import Groups
from megatron_mopd.pattern import without_borders
from megatron_mopd.preflight import stage as preflight
from megatron_mopd.quantization import recipes
from megatron_mopd.recipe import anew, graph, graph_plot, quantize, report
from megatron_mopd.recipe.schema import (
    PREFLIGHT,
    SKIPPED,
    Recipe,
    Stage,
    decisions,
    in_need,
    load_recipe,
    quantize_settings,
    stage_config,
)
from megatron_mopd.train import leave, reported, run_stage
from megatron_mopd.update import LogprobLoss

__all__ = ["Recipe", "Stage", "load_recipe", "run", "run_unless_finished", "stage_config"]


def run(recipe: Recipe, groups: Groups, until: str | None = None) -> dict[str, Config]:
    """Run every stage that is not finished, in order up to ``until``; all are checked before the first is trained.

    Returns the stages' configurations by name, with what earlier stages decided. Raises :class:`ConfigurationError`
    where a preflight stage refuses a teacher of a later stage, before anything is trained on it.
    """
    configs: dict[str, Config] = {}
    for stage in recipe.stages:
        configs[stage.name] = _resolved(recipe, stage, configs)
    for name, config in configs.items():
        presets.check(config)
        if config.parallel != configs[recipe.stages[0].name].parallel:
            raise ConfigurationError(f"stage {name!r}: all stages run on one layout; set parallel under common")
    _say_unmeasured(recipe, groups)
    for stage in recipe.stages:
        if not _skipped(recipe, stage, groups):
            configs[stage.name] = _resolved(recipe, stage, configs)
            _run_typed(recipe, stage, configs[stage.name], groups)
        if groups.rank == 0:
            graph.write(recipe)
        if stage.name == until:
            break
    return configs


def run_unless_finished(config: Config, groups: Groups, title: str, objective: LogprobLoss | None = None) -> None:
    """Run a stage, go on with it if it was stopped, or keep it if it is finished; refuse a directory of other settings.

    The directory's ``stage.json`` says what it was started with, from its first moment.
    """
    config = exchange.prepare(config, groups)

    def train() -> None:
        run_stage(config, replace(groups, seed=config.run.seed), objective, title)

    if not _once(config, _fingerprint(config), groups, title, train):
        exchange.export(config, groups)


def _run_typed(recipe: Recipe, stage: Stage, config: Config, groups: Groups) -> None:
    """:func:`run_unless_finished` for a stage of any type."""
    if stage.type == "train":
        run_unless_finished(config, groups, title=stage.name)
        return
    config = exchange.prepare(config, groups)
    seeded = replace(groups, seed=config.run.seed)
    if stage.type == "preflight":
        fingerprint = _fingerprint(config, stage.type)
        work = partial(preflight.run_stage, config, seeded, stage.name)
    else:
        settings = quantize_settings(stage)
        fingerprint = _fingerprint(config, stage.type, settings.model_dump(mode="json") | _rules(settings.recipe))
        work = partial(quantize.run_stage, config, settings, seeded, stage.name)
    _once(config, fingerprint, groups, stage.name, work)
    if stage.type == "preflight":
        _heed(recipe, stage, groups)


def _once(config: Config, fingerprint: str, groups: Groups, title: str, work: Callable[[], Any]) -> bool:
    """Do ``work`` unless ``config.run.dir`` says it is done; whether it was done now."""
    marker = config.run.dir / "stage.json"
    run_record.check_start(config, f"stage {title!r}: ")
    way_out = "move the directory away (the recipe's command does so with --from STAGE) to run the stage anew"
    known = checkpoint_directory.read_json(marker, way_out) if marker.exists() else None
    if known is not None and known["fingerprint"] != fingerprint:
        raise ConfigurationError(
            f"stage {title!r}: {config.run.dir} holds a run with other settings, start or teachers"
            f" ({known['fingerprint'][:12]} there, {fingerprint[:12]} now){run_record.explained(config)};"
            " put them back, move the directory away (the recipe's command does so to a stage and all that depend on it"
            " with --from STAGE), or choose another dir"
        )
    torch.distributed.barrier(groups.world)  # nobody starts while a peer still reads
    if known is not None and known["finished"]:
        display.note(groups.rank, f"stage {title}: finished and unchanged, kept")
        return False
    leave(marker, {"fingerprint": fingerprint, "finished": False}, groups)
    work()
    leave(marker, {"fingerprint": fingerprint, "finished": True}, groups)
    torch.distributed.barrier(groups.world)
    return True


def _resolved(recipe: Recipe, stage: Stage, configs: Mapping[str, Config]) -> Config:
    """A stage's configuration with its architectures spelled out, those of stages still to run included."""
    earlier = recipe.names[: recipe.names.index(stage.name)]
    written = {configs[name].run.dir / "checkpoints": configs[name].model for name in earlier}
    return origins.resolved(stage_config(recipe, stage), written)


def _skipped(recipe: Recipe, stage: Stage, groups: Groups) -> bool:
    """Whether a warm-up is left out because its preflight found no teacher in need; says so on disk."""
    needed = in_need(recipe, stage)
    directory = recipe.dir / stage.name
    torch.distributed.barrier(groups.world)  # nobody writes while a peer still reads
    if needed is None or needed:
        if groups.rank == 0:
            (directory / SKIPPED).unlink(missing_ok=True)
        torch.distributed.barrier(groups.world)
        return False
    if (directory / "stage.json").exists():
        raise ConfigurationError(
            f"stage {stage.name!r}: {directory} holds a warm-up and {stage.after!r} says no teacher needs one; start"
            f" the same command with --from {stage.name}, which moves it away with all that depend on it and trains"
            " these without it, or choose another dir"
        )
    why = {"after": stage.after, "initial": stage.initial, "decisions": decisions(recipe, stage.after or "")}
    leave(directory / SKIPPED, why, groups)
    torch.distributed.barrier(groups.world)
    display.note(groups.rank, f"stage {stage.name}: skipped, {stage.after} finds no teacher that needs a warm-up")
    return True


def _heed(recipe: Recipe, stage: Stage, groups: Groups) -> None:
    """Stop at a teacher that a preflight refuses and a later stage would learn from; say which warm-up is missing."""
    found = decisions(recipe, stage.name) or {}
    later = [s for s in recipe.stages[recipe.names.index(stage.name) + 1 :] if s.type == "train"]
    measured = _checkpoints(recipe, stage)
    taught = {s.name: _checkpoints(recipe, s) for s in later}
    entries = json.loads((recipe.dir / stage.name / PREFLIGHT).read_text())["teachers"]
    for name, decision in found.items():
        learners = [s for s in later if name in measured and taught[s.name].get(name) == measured[name]]
        why = "; ".join(entries[name]["reasons"])
        if decision == "refuse" and learners:
            raise ConfigurationError(
                f"stage {stage.name!r} refuses the teacher {name!r} ({why}); {learners[0].name!r} would learn from it,"
                " and no stage after this one has: name another teacher, or change the thresholds under preflight and"
                f" measure again (--from {stage.name})"
            )
        if decision == "warm_up" and learners and not any(s.after == stage.name for s in learners):
            display.note(groups.rank, f"stage {stage.name}: {name} needs a warm-up ({why}) and no stage gives one")


def _checkpoints(recipe: Recipe, stage: Stage) -> dict[str, Path]:
    """Teacher -> its checkpoint: a name alone may stand for two in two stages."""
    return {name: teacher.checkpoint for name, teacher in stage_config(recipe, stage).teachers.items()}


def _say_unmeasured(recipe: Recipe, groups: Groups) -> None:
    """Of a recipe with preflight stages: name the teachers that none of them measures before they teach."""
    if not any(stage.type == "preflight" for stage in recipe.stages):
        return
    measured: set[tuple[str, Path]] = set()
    for stage in recipe.stages:
        teachers = _checkpoints(recipe, stage)
        if stage.type == "preflight":
            measured |= teachers.items()
        elif unknown := [name for name, path in teachers.items() if (name, path) not in measured]:
            display.note(
                groups.rank,
                f"stage {stage.name}: no preflight stage before it measures {', '.join(unknown)}, so nothing stops a"
                " teacher that it cannot learn from",
            )


def _rules(recipe: str) -> dict[str, Any]:
    """What a table of formats says, whatever it is called."""
    return {"recipe": [[rule.match, rule.format, rule.last_layers] for rule in recipes.load(recipe).rules]}


def _fingerprint(config: Config, kind: str = "train", further: Mapping[str, Any] | None = None) -> str:
    """sha256 of everything a stage's result depends on; the layout counts only where students are compared to teachers.

    So specialists serve runs on any layout, and a student's report speaks of the layout that made it. ``further`` is
    what a stage of another ``kind`` depends on beside its configuration.
    """
    beside: dict[str, Any] = {"run": {"dir"}, "checkpoint": {"cache", "export"}, "teachers": True, "kernels": True}
    beside |= {"guards": {"teacher_timeout"}, "asynchrony": {"directory", "silence_s", "standstill_s"}}
    if kind != "preflight":
        beside["preflight"] = True
    tree = config.model_dump(mode="json", exclude=beside)
    if config.objective.type == "mopd" and config.kernels.update == "logits":
        tree["kernels"] = "logits"  # of rounded logits; all other forms give the same result
    tree["batching"].pop("micro_batch_size")
    for beside_the_result in ("prefill_tokens", "shards"):
        tree["rollout"].pop(beside_the_result)
    if not config.guards.drops:  # else they decide what is learned from
        tree.pop("guards")
    if config.asynchrony.deterministic:  # all modes give the same bits
        tree.pop("asynchrony")
    tree["model"]["pattern"] = without_borders(config.model.pattern)
    if config.quantization.train is None:
        tree.pop("quantization")
    else:
        tree["quantization"]["train"] = _rules(config.quantization.train)["recipe"]
    if not config.teachers:
        tree.pop("parallel")
    if start := tree["model"].pop("initial"):
        tree["model"]["initial"] = checkpoint.read_manifest(Path(start)).get("checkpoint_id")
    tree["teachers"] = {
        name: [
            checkpoint.read_manifest(t.checkpoint).get("checkpoint_id"),
            t.model_dump(mode="json", exclude={"checkpoint"} | ({"nvfp4"} if not t.nvfp4 else set())),
        ]
        for name, t in config.teachers.items()
    }
    if kind != "train":
        tree[kind] = {**tree.get(kind, {}), **(further or {})}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def carry_out(recipe: Recipe, until: str | None = None, begin_at: str | None = None) -> None:
    """Run a recipe in the process group that torchrun announces, draw its graph and publish its report.

    With ``begin_at`` that stage and all that depend on it are moved away first, while no process reads what they left.
    """
    if until is not None:
        recipe.stage(until, "--until")
    first = stage_config(recipe, recipe.stages[0])
    groups = parallel.initialize(first.parallel, first.run.seed)
    if begin_at is not None:
        torch.distributed.barrier(groups.world)  # the others have checked the recipe, which reads what is there
        if groups.rank == 0:
            anew.begin_at(recipe, begin_at)
        torch.distributed.barrier(groups.world)
    with anew.alone(recipe.dir) if groups.rank == 0 else nullcontext():
        configs = run(recipe, groups, until)
        last = configs[recipe.names[-1]]
        if groups.rank == 0:
            graph_plot.save(graph.write(recipe), recipe.dir / graph.PICTURE)
            whole = until is None or until == recipe.names[-1]
            if not whole:
                display.note(0, f"stopped after {until}, as asked")
            if whole or recipe.report is not None:  # a report by roles says what is missing
                _publish(recipe, configs, last)


def _publish(recipe: Recipe, configs: Mapping[str, Config], last: Config) -> None:
    """The report by roles, or on the last stage where the recipe names no roles."""
    if recipe.report is not None:
        report.publish(recipe, configs)
    elif last.teachers and last.data.held_out:
        recipe_report.publish(recipe.dir, recipe.names, last)


@record
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.runner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    arguments = parser.parse_intermixed_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        carry_out(load_recipe(arguments.recipe, arguments.overrides), arguments.until)


if __name__ == "__main__":
    main()
