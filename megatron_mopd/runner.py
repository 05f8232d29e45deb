"""Run a recipe of stages: ``torchrun --nproc_per_node=N -m megatron_mopd.runner RECIPE.yaml [key=value ...]``.

A recipe names stages over one common configuration. A stage that is finished and unchanged (its settings, the
checkpoints it starts from and its teachers) is kept; the report at the end reads what the stages left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from megatron_mopd import checkpoint, display, exchange, origins, parallel, presets, recipe_report
from megatron_mopd.config import Config, ConfigurationError, Section, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.pattern import without_borders
from megatron_mopd.quantization import recipes
from megatron_mopd.settings import explain, merge, overlay, read_yaml
from megatron_mopd.train import leave, reported, run_stage
from megatron_mopd.update import LogprobLoss


class Stage(Section):
    """One training stage: common settings plus its own, from another stage's weights, with other stages as teachers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    initial: str | None = None
    """Stage whose final weights this one starts from; random weights when left out."""
    teachers: dict[str, list[str]] = {}
    """Stage name -> domains it teaches."""
    settings: dict[str, Any] = {}


class Recipe(Section):
    """Stages over common settings; the last one may have earlier ones as teachers and is then reported on."""

    dir: Path
    common: dict[str, Any] = {}
    stages: list[Stage] = Field(min_length=1)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe; overrides apply to the common settings, to one stage as ``STAGE:key=value``, or ``dir=PATH``."""
    try:
        recipe = Recipe.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigurationError("\n".join(explain(e, str(path), Recipe) for e in error.errors())) from None
    names = [stage.name for stage in recipe.stages]
    for override in overrides:
        if override.startswith("dir="):
            recipe = recipe.model_copy(update={"dir": Path(override.removeprefix("dir="))})
            continue
        stage, colon, rest = override.partition(":")
        if not (colon and stage in names):
            recipe = recipe.model_copy(update={"common": merge(recipe.common, [override])})
            continue
        stages = [
            s.model_copy(update={"settings": merge(s.settings, [rest])}) if s.name == stage else s
            for s in recipe.stages
        ]
        recipe = recipe.model_copy(update={"stages": stages})
    _check_order(recipe, path)
    return recipe


def stage_config(recipe: Recipe, stage: Stage) -> Config:
    """The full configuration of one stage."""
    ours: dict[str, Any] = {"run": {"dir": str(recipe.dir / stage.name)}}
    if stage.initial is not None:
        ours["model"] = {"initial": str(recipe.dir / stage.initial / "checkpoints")}
    if stage.teachers:
        ours["teachers"] = {
            name: {"checkpoint": str(recipe.dir / name / "checkpoints"), "domains": domains}
            for name, domains in stage.teachers.items()
        }
    return build_config(overlay(overlay(recipe.common, stage.settings), ours), origin=f"stage {stage.name!r}")


def run(recipe: Recipe, groups: Groups) -> None:
    """Run every stage that is not finished, in order; all are checked before the first is trained."""
    configs: dict[str, Config] = {}
    for stage in recipe.stages:
        written = {config.run.dir / "checkpoints": config.model for config in configs.values()}
        configs[stage.name] = origins.resolved(stage_config(recipe, stage), written)
    for name, config in configs.items():
        presets.check(config)
        if config.parallel != configs[recipe.stages[0].name].parallel:
            raise ConfigurationError(f"stage {name!r}: all stages run on one layout; set parallel under common")
    for name, config in configs.items():
        run_unless_finished(config, groups, title=name)


def run_unless_finished(config: Config, groups: Groups, title: str, objective: LogprobLoss | None = None) -> None:
    """Run a stage, go on with it if it was stopped, or keep it if it is finished; refuse a directory of other settings.

    The directory's ``stage.json`` says what it was started with, from its first moment.
    """
    config = exchange.prepare(config, groups)
    marker, fingerprint = config.run.dir / "stage.json", _fingerprint(config)
    known = json.loads(marker.read_text()) if marker.exists() else None
    if known is not None and known["fingerprint"] != fingerprint:
        raise ConfigurationError(
            f"stage {title!r}: {config.run.dir} holds a run with other settings, start or teachers"
            f" ({known['fingerprint'][:12]} there, {fingerprint[:12]} now); move it away or choose another dir"
        )
    torch.distributed.barrier(groups.world)  # nobody starts while a peer still reads
    if known is not None and known["finished"]:
        display.note(groups.rank, f"stage {title}: finished and unchanged, kept")
        exchange.export(config, groups)
        return
    leave(marker, {"fingerprint": fingerprint, "finished": False}, groups)
    run_stage(config, replace(groups, seed=config.run.seed), objective, title)
    leave(marker, {"fingerprint": fingerprint, "finished": True}, groups)
    torch.distributed.barrier(groups.world)


def _fingerprint(config: Config) -> str:
    """sha256 of everything a stage's result depends on; the layout counts only where students are compared to teachers.

    So specialists serve runs on any layout, and a student's report speaks of the layout that made it.
    """
    beside = {"run": {"dir"}, "checkpoint": {"cache", "export"}, "teachers": True, "kernels": True}
    tree = config.model_dump(mode="json", exclude=beside)
    if config.objective.type == "mopd" and config.kernels.update == "logits":
        tree["kernels"] = "logits"  # of rounded logits; all other forms give the same result
    tree["batching"].pop("micro_batch_size")
    tree["rollout"].pop("prefill_tokens")
    tree["model"]["pattern"] = without_borders(config.model.pattern)
    if config.quantization.train is None:
        tree.pop("quantization")
    else:
        rules = recipes.load(config.quantization.train).rules
        tree["quantization"]["train"] = [[rule.match, rule.format, rule.last_layers] for rule in rules]
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
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check_order(recipe: Recipe, path: Path) -> None:
    seen: set[str] = set()
    for stage in recipe.stages:
        for needed in [*([stage.initial] if stage.initial else []), *stage.teachers]:
            if needed not in seen:
                raise ConfigurationError(
                    f"{path}: stage {stage.name!r} needs {needed!r}, which is no earlier stage; earlier: {sorted(seen)}"
                )
        if stage.name in seen:
            raise ConfigurationError(f"{path}: two stages are named {stage.name!r}; rename one")
        seen.add(stage.name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.runner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    arguments = parser.parse_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        first, last = (stage_config(recipe, recipe.stages[i]) for i in (0, -1))
        groups = parallel.initialize(first.parallel, first.run.seed)
        run(recipe, groups)
        names = [stage.name for stage in recipe.stages]
        if outside := sorted(last.teachers.keys() - set(names)):
            display.note(
                groups.rank,
                f"no report on recovery: {', '.join(outside)} came as checkpoints and no stage measured their accuracy",
            )
        elif groups.rank == 0 and last.teachers and last.data.held_out:
            recipe_report.publish(recipe.dir, names, last)


if __name__ == "__main__":
    main()
