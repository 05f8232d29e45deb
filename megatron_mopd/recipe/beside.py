"""Worlds beside a recipe's training: which stages want them, under which settings, and the commands that start them.

Imports neither torch nor megatron.core.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.recipe.schema import Recipe, Stage, World, stage_config
from megatron_mopd.recipe.words import Command

ROLLOUT, SCORING = "rollout", "scoring"
_SECTION = "worlds: {rollout: {processes: 1}, scoring: {processes: 1}}"


def served(recipe: Recipe, world: str, until: str | None = None) -> list[Stage]:
    """The stages up to ``until`` that a world, ``rollout`` or ``scoring``, works for, in their order."""
    last = len(recipe.stages) if until is None else recipe.names.index(until) + 1
    found = []
    for stage in (stage for stage in recipe.stages[:last] if stage.type == "train"):
        config = stage_config(recipe, stage)
        if config.asynchrony.mode == "worlds" and (world == ROLLOUT or config.objective.type == "mopd"):
            found.append(stage)
    return found


def config_of(recipe: Recipe, stage: Stage, world: str) -> Config:
    """The configuration of a stage as a world beside it has it: the section's settings over the stage's."""
    found = section(recipe, world)
    return stage_config(recipe, stage, found.settings if found is not None else {})


def check(recipe: Recipe) -> None:
    """Raise :class:`ConfigurationError` where the section ``worlds`` names one that no stage wants, or lacks one."""
    if recipe.worlds is None:
        return
    if not served(recipe, ROLLOUT):
        raise ConfigurationError(
            "worlds: no stage has asynchrony.mode = worlds, so nothing would be drawn there; set it in the settings of"
            " a stage that learns from rollouts, or take the section out (worlds=null)"
        )
    scored = [stage.name for stage in served(recipe, SCORING)]
    if scored and recipe.worlds.scoring is None:
        raise ConfigurationError(
            f"worlds.scoring: missing, and the stage {scored[0]!r} with asynchrony.mode = worlds learns from teachers;"
            " add scoring: {processes: 1}"
        )
    if not scored and recipe.worlds.scoring is not None:
        raise ConfigurationError(
            "worlds.scoring: no stage with asynchrony.mode = worlds has objective.type = mopd, so nothing would be"
            " scored there; take it out"
        )


def commands(
    recipe: Recipe,
    file: Path,
    overrides: Sequence[str],
    until: str | None,
    torchrun: Sequence[str] = ("torchrun",),
) -> dict[str, Command]:
    """World -> what starts it on one machine, for each that a stage up to ``until`` wants; of N processes where the
    recipe does not say of how many. Its first words are those of ``torchrun``."""
    given = [str(file), *overrides, *(["--until", until] if until is not None else [])]
    made = {}
    for world in (world for world in (ROLLOUT, SCORING) if served(recipe, world, until)):
        found = section(recipe, world)
        options = [f"--nproc_per_node={'N' if found is None else found.processes}", "--standalone"]
        devices = None if found is None else found.devices
        made[world] = Command(
            words=[*torchrun, *options, "-m", "megatron_mopd.worlds", world, *given],
            environment={} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))},
        )
    return made


def by_hand(recipe: Recipe, file: Path, overrides: Sequence[str], until: str | None) -> list[str]:
    """The command lines that start the worlds where the recipe's command does not."""
    return [command.line for command in commands(recipe, file, overrides, until).values()]


def require_section(recipe: Recipe, file: Path, overrides: Sequence[str], until: str | None) -> None:
    """Raise :class:`ConfigurationError` where stages want worlds and nothing says that they are to be started."""
    lines = by_hand(recipe, file, overrides, until)
    if recipe.worlds is not None or not lines:
        return
    names = ", ".join(stage.name for stage in served(recipe, ROLLOUT, until))
    raise ConfigurationError(
        f"asynchrony.mode = worlds in {names}, and the recipe has no section worlds, so nobody would draw for it. Add"
        f" '{_SECTION}' beside stages (scoring only where teachers score): this command then starts them. Or set the"
        " mode to inline. Or start the stages under a torchrun of your own (torchrun --nproc_per_node=N -m"
        f" megatron_mopd.recipe {shlex.join([str(file), *overrides])}) and, beside it: {'; '.join(lines)}"
    )


def section(recipe: Recipe, world: str) -> World | None:
    """What the recipe says of a world; None where it has none of that name."""
    if recipe.worlds is None:
        return None
    return recipe.worlds.rollout if world == ROLLOUT else recipe.worlds.scoring
