"""Run a recipe of stages: ``torchrun --nproc_per_node=N -m megatron_mopd.runner RECIPE.yaml [key=value ...]``.

A recipe names stages over one common configuration. A stage that is finished and unchanged (its settings, the
checkpoints it starts from and its teachers) is kept; the report at the end reads what the stages left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from megatron_mopd import checkpoint, display, parallel, presets, recipe_report
from megatron_mopd.config import Config, ConfigurationError, Section, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.settings import explain, merge, overlay, read_yaml
from megatron_mopd.train import run_stage


class Stage(Section):
    """One training stage: common settings plus its own, from another stage's weights, with other stages as teachers."""

    name: str
    initial: str | None = None
    """Stage whose final weights this one starts from; random weights when left out."""
    teachers: dict[str, list[str]] = {}
    """Stage name -> domains it teaches."""
    settings: dict[str, Any] = {}


class Recipe(Section):
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
    tree = overlay(recipe.common, stage.settings)
    tree.setdefault("run", {})["dir"] = str(recipe.dir / stage.name)
    if stage.initial is not None:
        tree.setdefault("model", {})["initial"] = str(recipe.dir / stage.initial / "checkpoints")
    if stage.teachers:
        tree["teachers"] = {
            name: {"checkpoint": str(recipe.dir / name / "checkpoints"), "domains": domains}
            for name, domains in stage.teachers.items()
        }
    return build_config(tree, origin=f"stage {stage.name!r}")


def run(recipe: Recipe, groups: Groups) -> None:
    """Run every stage that is not finished, in order."""
    configs = {stage.name: stage_config(recipe, stage) for stage in recipe.stages}
    for config in configs.values():
        presets.check(config)  # all stages before the first is trained
    for stage in recipe.stages:
        config = configs[stage.name]
        fingerprint = _fingerprint(config, recipe, stage)
        marker = recipe.dir / stage.name / "stage.json"
        if marker.exists():
            known = json.loads(marker.read_text())["fingerprint"]
            if known == fingerprint:
                display.note(groups.rank, f"stage {stage.name}: finished and unchanged, kept")
                continue
            raise ConfigurationError(
                f"stage {stage.name!r}: {marker.parent} holds a run with other settings, start or teachers"
                f" ({known[:12]} there, {fingerprint[:12]} now); move it away or choose another dir"
            )
        run_stage(config, groups, title=stage.name)
        if groups.rank == 0:
            marker.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        torch.distributed.barrier(groups.world)


def _fingerprint(config: Config, recipe: Recipe, stage: Stage) -> str:
    """sha256 of everything a stage's result depends on but the layout, which may differ between runs."""
    tree = config.model_dump(mode="json", exclude={"parallel": True, "run": {"dir"}, "teachers": True})
    tree["model"].pop("initial")
    tree["batching"].pop("micro_batch_size")
    inputs = [stage.initial] if stage.initial else []
    ids = {
        n: checkpoint.read_manifest(recipe.dir / n / "checkpoints")["checkpoint_id"] for n in [*inputs, *stage.teachers]
    }
    text = json.dumps([tree, stage.initial, stage.teachers, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    start = time.perf_counter()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        first, last = (stage_config(recipe, recipe.stages[i]) for i in (0, -1))
        groups = parallel.initialize(first.parallel, first.run.seed)
        display.setup_logging(groups.rank)
        run(recipe, groups)
        if groups.rank == 0 and last.teachers:
            recipe_report.publish(recipe.dir, recipe.stages[-1].name, last, wall_s=time.perf_counter() - start)
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        parallel.destroy()


if __name__ == "__main__":
    main()
