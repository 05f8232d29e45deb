"""Rollout and scoring in worlds of their own, beside a training with ``asynchrony.mode: worlds``.

    torchrun --nproc_per_node=N -m megatron_mopd.worlds rollout CONFIG.yaml [key=value ...]
    torchrun --nproc_per_node=N -m megatron_mopd.worlds scoring RECIPE.yaml [--until STAGE] [[STAGE:]key=value ...]

Each has a layout of its own (``parallel.tensor=2``) and otherwise the configuration of ``megatron_mopd.train``, or of a
recipe's stages: of all with that mode, in their order, or of the one that ``--stage`` names. It ends when that training
has finished, and may be killed and started again at any time before. A stage of a recipe is waited for without limit.
"""

from __future__ import annotations

import os
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
from megatron_mopd.config import Config, ConfigurationError, load_config
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe import beside
from megatron_mopd.recipe.schema import Recipe, load_recipe
from megatron_mopd.recipe.words import Parser
from megatron_mopd.settings import read_yaml
from megatron_mopd.train import reported

WORLDS: dict[str, type[World]] = {RolloutWorld.name: RolloutWorld, ScoringWorld.name: ScoringWorld}
LOOK = 0.2
"""Seconds between two looks for a stage to begin."""


def serve(recipe: Recipe, world: str, until: str | None = None) -> None:
    """Be a world for every stage up to ``until`` that wants it, in their order; what is finished is passed by.

    Raises :class:`ConfigurationError` where none does.
    """
    if not (stages := beside.served(recipe, world, until)):
        raise ConfigurationError(
            f"no stage{'' if until is None else f' up to {until}'} waits for a {world} world: set asynchrony.mode ="
            " worlds in the settings of one that learns from rollouts"
            + (" and teachers" if world == ScoringWorld.name else "")
        )
    first = beside.config_of(recipe, stages[0], world)
    groups = parallel.initialize(first.parallel, first.run.seed)
    for stage in stages:
        training = _begun(beside.config_of(recipe, stage, world), groups, stage.name)
        if training is None:
            continue
        config = origins.resolved(beside.config_of(recipe, stage, world))  # earlier stages have left what it reads
        presets.check(config)
        WORLDS[world](config, replace(groups, seed=config.run.seed), training).run()


def _begun(config: Config, groups: Groups, name: str) -> Watch | None:
    """Wait until a stage's training gives signs of life; None for one that is over."""
    watch = Watch(Exchange(config).root, TRAINING, config.asynchrony)
    marker = config.run.dir / "stage.json"

    def look() -> str | None:
        if marker.is_file() and checkpoint_directory.read_json(marker)["finished"]:
            return "over"
        return "begun" if watch.stirs else None

    display.note(groups.rank, f"stage {name}: waiting for its training")
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
        if "stages" not in read_yaml(arguments.config):
            if named := arguments.stage or arguments.until:
                raise ConfigurationError(
                    f"{arguments.config}: is no recipe, so it has no stage {named!r}; leave it out"
                )
            config = load_config(arguments.config, arguments.overrides)
        else:
            recipe = load_recipe(arguments.config, arguments.overrides)
            if arguments.until is not None:
                recipe.stage(arguments.until, "--until")
            if arguments.stage is None:
                serve(recipe, arguments.world, arguments.until)
                return
            config = beside.config_of(recipe, recipe.stage(arguments.stage, "--stage"), arguments.world)
        config = origins.resolved(config)
        presets.check(config)
        WORLDS[arguments.world](config, parallel.initialize(config.parallel, config.run.seed)).run()


if __name__ == "__main__":
    main()
