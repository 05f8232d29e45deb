"""Rollout and scoring in worlds of their own, beside a training with ``asynchrony.mode: worlds``.

    torchrun --nproc_per_node=N -m megatron_mopd.worlds rollout CONFIG.yaml [key=value ...]
    torchrun --nproc_per_node=N -m megatron_mopd.worlds scoring RECIPE.yaml --stage mopd1 [[STAGE:]key=value ...]

Each has a layout of its own (``parallel.tensor=2``) and otherwise the configuration of ``megatron_mopd.train``, or of a
recipe's stage; each ends when that training has finished, and may be killed and started again at any time before.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_mopd import display, origins, parallel, presets
from megatron_mopd.asynchrony.rollout_world import RolloutWorld
from megatron_mopd.asynchrony.scoring_world import ScoringWorld
from megatron_mopd.asynchrony.world import World
from megatron_mopd.config import load_config
from megatron_mopd.recipe.schema import load_recipe, stage_config
from megatron_mopd.train import reported

WORLDS: dict[str, type[World]] = {RolloutWorld.name: RolloutWorld, ScoringWorld.name: ScoringWorld}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.worlds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("world", choices=sorted(WORLDS))
    parser.add_argument("config", type=Path, help="YAML configuration of the training, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: parallel.tensor=2")
    parser.add_argument("--stage", help="stage of the recipe")
    arguments = parser.parse_intermixed_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        if arguments.stage is None:
            config = load_config(arguments.config, arguments.overrides)
        else:
            recipe = load_recipe(arguments.config, arguments.overrides)
            config = stage_config(recipe, recipe.stage(arguments.stage, "--stage"))
        config = origins.resolved(config)
        presets.check(config)
        WORLDS[arguments.world](config, parallel.initialize(config.parallel, config.run.seed)).run()


if __name__ == "__main__":
    main()
