"""Make one update of a run again and say whether it is identical, bit for bit, to what the run did.

    python tools/replay.py CONFIG.yaml|RECIPE.yaml|RUN_DIR --step N [--stage NAME] [key=value ...]

A run on several ranks needs as many: torchrun --nproc_per_node=2 tools/replay.py ... The step needs its shard
(rollout.shards) and the checkpoint before it, but for the first step (checkpoint.every and checkpoint.keep). Ends with
status 1 where anything differs; nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd import display, origins, parallel, run_record
from megatron_mopd.config import Config, ConfigurationError, build_config, load_config
from megatron_mopd.recipe.schema import load_recipe
from megatron_mopd.replay import Replay, replay
from megatron_mopd.settings import merge, read_yaml
from megatron_mopd.train import reported

LISTED = 10  # differences shown


def configuration(source: Path, stage: str | None, overrides: Sequence[str]) -> Config:
    """That of the run: from its directory, from a configuration, or from a recipe and the name of a stage of it."""
    if source.is_dir():
        return recorded(source, overrides)
    if "stages" not in read_yaml(source):
        if stage is not None:
            raise ConfigurationError(f"--stage {stage}: {source} is no recipe; leave it out")
        return origins.resolved(load_config(source, overrides))
    recipe = load_recipe(source, [o for o in overrides if o.startswith("dir=")])
    names = [s.name for s in recipe.stages]
    if stage not in names:
        raise ConfigurationError(f"--stage {stage}: {source} has the stages {', '.join(names)}; name one")
    return recorded(recipe.dir / stage, [o for o in overrides if not o.startswith("dir=")])


def recorded(directory: Path, overrides: Sequence[str]) -> Config:
    """The settings that a run left in its directory, wherever that lies now."""
    settings = run_record.read(directory)["settings"]
    run = settings["run"] | {"dir": str(directory), "id": settings["run"]["id"] or Path(settings["run"]["dir"]).name}
    return build_config(merge(settings | {"run": run}, overrides), origin=str(directory / run_record.FILE))


def show(found: Replay, rank: int) -> None:
    """The verdict in a few lines."""
    numbers = ", ".join(f"{name} {found.metrics[name]!r}" for name in ("loss", "grad_norm") if name in found.metrics)
    display.note(rank, f"step {found.step}: {found.tokens:,} tokens, {numbers}")
    for text in found.differences[:LISTED]:
        display.note(rank, f"  {text}")
    if (more := len(found.differences) - LISTED) > 0:
        display.note(rank, f"  and {more:,} more")
    what = ", ".join(found.compared)
    whose = f"; the weights are those of checkpoint {found.weights}" if found.weights else ""
    display.note(rank, f"different: {what} were compared" if found.differences else f"identical: {what}{whose}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    made = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[4:]))
    made.add_argument("source", type=Path, metavar="CONFIG", help="configuration, recipe, or the run's directory")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--step", type=int, required=True, help="of the update")
    made.add_argument("--stage", help="of a recipe")
    return made


def main() -> int:
    arguments = parser().parse_intermixed_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    different = False
    with reported():
        config = configuration(arguments.source, arguments.stage, arguments.overrides)
        groups = parallel.initialize(config.parallel, config.run.seed)
        found = replay(config, groups, arguments.step)
        show(found, groups.rank)
        different = bool(found.differences)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
