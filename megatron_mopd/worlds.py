"""Rollout and scoring in worlds of their own, beside a training with ``asynchrony.mode: worlds``.

    torchrun --nproc_per_node=N -m megatron_mopd.worlds rollout CONFIG.yaml [key=value ...]
    torchrun --nproc_per_node=N -m megatron_mopd.worlds scoring RECIPE.yaml [--until STAGE] [[STAGE:]key=value ...]

Each has a layout of its own (``parallel.tensor=2``) and otherwise the configuration of ``megatron_mopd.train``, or of a
recipe's stages: of all with that mode, in their order, or of the one that ``--stage`` names. It ends when that training
has finished, and may be killed and started again at any time before. A stage of a recipe is waited for without limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from megatron_mopd import checkpoint_directory, display, origins, parallel, presets
from megatron_mopd.asynchrony.directory import Exchange
from megatron_mopd.asynchrony.rollout_world import RolloutWorld
from megatron_mopd.asynchrony.scoring_world import ScoringWorld
from megatron_mopd.asynchrony.signs import Watch
from megatron_mopd.asynchrony.waiting import awaited
from megatron_mopd.asynchrony.world import World
from megatron_mopd.asynchrony.worlds_feed import TRAINING
from megatron_mopd.config import ConfigurationError, load_config
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe import beside
from megatron_mopd.recipe.schema import Recipe, Stage, is_skipped, load_recipe
from megatron_mopd.recipe.words import Parser
from megatron_mopd.settings import read_yaml
from megatron_mopd.train import reported

WORLDS: dict[str, type[World]] = {RolloutWorld.name: RolloutWorld, ScoringWorld.name: ScoringWorld}
LOOK = 0.2
"""Seconds between two looks for a stage to begin."""


def serve(recipe: Recipe, world: str, stages: Sequence[Stage]) -> None:
    """Be a world for these stages, one after the other; what is finished or skipped is passed by."""
    first = beside.config_of(recipe, stages[0], world)
    groups = parallel.initialize(first.parallel, first.run.seed)
    for stage in stages:
        training = _begun(recipe, stage, world, groups)
        if training is None:
            continue
        config = origins.resolved(beside.config_of(recipe, stage, world))  # earlier stages have left what it reads
        presets.check(config)
        WORLDS[world](config, replace(groups, seed=config.run.seed), training).run()


def _wanted(recipe: Recipe, world: str, only: str | None, until: str | None) -> list[Stage]:
    """The stages that the command line names; raises :class:`ConfigurationError` where none wants the world."""
    for option, name in (("--stage", only), ("--until", until)):
        if name is not None:
            recipe.stage(name, option)
    found = [stage for stage in beside.served(recipe, world, until) if only in (None, stage.name)]
    if not found:
        which = f"stage {only} does not wait" if only else f"no stage{f' up to {until}' if until else ''} waits"
        raise ConfigurationError(
            f"{which} for a {world} world: set asynchrony.mode = worlds in the settings of one that learns from"
            f" rollouts{' and teachers' if world == ScoringWorld.name else ''}"
        )
    return found


def _begun(recipe: Recipe, stage: Stage, world: str, groups: Groups) -> Watch | None:
    """Wait until a stage's training gives signs of life; None for one that is over, or skipped."""
    config = beside.config_of(recipe, stage, world)
    watch = Watch(Exchange(config).root, TRAINING, config.asynchrony)
    marker = config.run.dir / "stage.json"
    way_out = "remove it and start the training again, which writes it anew"

    def look() -> str | None:
        if marker.is_file() and checkpoint_directory.read_json(marker, way_out)["finished"]:
            return "over"
        if is_skipped(recipe, stage.name):
            return "over"
        return "begun" if watch.stirs else None

    display.note(groups.rank, f"stage {stage.name}: waiting for its training")
    return watch if awaited(groups, look, [], pause=LOOK) == "begun" else None


@record
def main() -> None:
    first, *rest = (__doc__ or "").split("\n\n")
    parser = Parser(prog="python -m megatron_mopd.worlds", description=first, epilog=rest[-1])
    parser.add_argument("world", choices=sorted(WORLDS))
    parser.add_argument("config", type=Path, help="YAML configuration of the training, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: parallel.tensor=2")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", help="of the recipe, the only one to serve")
    which.add_argument("--until", metavar="STAGE", help="of the recipe, the last one to serve")
    arguments = parser.parse_intermixed_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        if "stages" in read_yaml(arguments.config):
            recipe = load_recipe(arguments.config, arguments.overrides)
            serve(recipe, arguments.world, _wanted(recipe, arguments.world, arguments.stage, arguments.until))
            return
        if named := arguments.stage or arguments.until:
            raise ConfigurationError(f"{arguments.config}: is no recipe, so it has no stage {named!r}; leave it out")
        config = origins.resolved(load_config(arguments.config, arguments.overrides))
        presets.check(config)
        WORLDS[arguments.world](config, parallel.initialize(config.parallel, config.run.seed)).run()


if __name__ == "__main__":
    main()
