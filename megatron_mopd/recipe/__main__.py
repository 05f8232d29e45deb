"""Run a recipe: ``python -m megatron_mopd.recipe CONFIG.yaml [--from STAGE] [--until STAGE] [[STAGE:]key=value ...]``.

Starts torchrun with the recipe's processes, runs every stage that is not finished and unchanged, and publishes the
graph and the report. The same command goes on where a stopped one was. --from runs a stage and all that depend on it
anew, once, and moves what they held to DIR/set_aside.

Worlds that draw and score for its stages (section worlds) are started beside the training and end with it.

@FILE in place of a word stands for the words in a file, one a line; lines that begin with # are comments.

On several machines start it on each, with the variables of examples/launch.sh: NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT (29500) and MAX_RESTARTS (0: times torchrun starts all processes again after a failure). Under a torchrun of
one's own it is one of its processes. DRY_RUN=1 prints the torchrun lines and starts nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_mopd import checkpoint_directory, display
from megatron_mopd.config import ConfigurationError
from megatron_mopd.files import WriteError
from megatron_mopd.recipe import anew, beside, processes
from megatron_mopd.recipe.schema import Recipe, is_skipped, load_recipe, stage_config
from megatron_mopd.recipe.words import Command, Parser

PORT = "29500"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    first, *rest = (__doc__ or "").split("\n\n")
    made = Parser(prog="python -m megatron_mopd.recipe", description=first, epilog=" ".join(rest))
    made.add_argument("recipe", type=Path, metavar="CONFIG.yaml")
    made.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    made.add_argument("--from", dest="anew", metavar="STAGE", help="run it and all that depend on it anew, once")
    made.add_argument("--until", metavar="STAGE", help="stop after this stage")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a recipe that cannot run, or that of torchrun."""
    words = sys.argv[1:] if words is None else words
    arguments = parser().parse_intermixed_args(words)
    inside = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    display.setup_logging(int(os.environ.get("RANK", "0")))
    if inside:
        return _one_of_many(arguments)
    try:
        recipe = _checked(arguments)
        line = torchrun_line(recipe, arguments, os.environ)
        worlds = _worlds(recipe, arguments, os.environ)
        if os.environ.get("DRY_RUN") == "1":
            for command in (Command(words=line), *worlds.values()):
                display.note(0, command.line)
            return 0
        if arguments.anew is not None and os.environ.get("NODE_RANK", "0") == "0":
            anew.begin_at(recipe, arguments.anew)
        if worlds:
            with anew.alone(recipe.dir):  # worlds take no lock, and would mix with those of a run that is still there
                pass
    except (ConfigurationError, WriteError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    status = processes.run(Command(words=line), worlds)
    if status:
        sys.stderr.write(f"{what_is_safe(recipe, status, _again(words))}\n")
    return status if status >= 0 else 128 - status


def torchrun_line(recipe: Recipe, arguments: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """The words that start this machine's processes; raises :class:`ConfigurationError` where a variable is missing."""
    processes = recipe.processes or max(1, torch.cuda.device_count())
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    line.append(f"--max_restarts={environment.get('MAX_RESTARTS', '0')}")
    nodes = environment.get("NNODES", "1")
    if nodes == "1":
        line.append("--standalone")
    else:
        for name, meaning in (("NODE_RANK", "the index of this machine, from 0"), ("MASTER_ADDR", "machine 0's name")):
            if name not in environment:
                raise ConfigurationError(f"NNODES = {nodes} needs {name}: set it to {meaning}")
        # Of torchrun's meeting points only c10d restarts the processes of all machines when those of one fail.
        line += [
            f"--nnodes={nodes}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', PORT)}",
            "--rdzv_id=megatron-mopd",
            f"--rdzv_conf=is_host={int(environment['NODE_RANK'] == '0')}",
        ]
    line += ["-m", "megatron_mopd.runner", str(arguments.recipe), *arguments.overrides]
    return line + (["--until", arguments.until] if arguments.until is not None else [])


def _worlds(recipe: Recipe, arguments: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Command]:
    """World -> the command that starts it beside the training; of several machines the user says which has them."""
    given = (recipe, arguments.recipe, arguments.overrides, arguments.until)
    if environment.get("NNODES", "1") != "1":
        if environment.get("NODE_RANK", "0") == "0":
            _tell_of_worlds(*given)
        return {}
    beside.require_section(*given)
    restarts = f"--max_restarts={environment.get('MAX_RESTARTS', '0')}"
    return beside.commands(*given, torchrun=[sys.executable, "-m", "torch.distributed.run", restarts])


def _tell_of_worlds(recipe: Recipe, file: Path, overrides: Sequence[str], until: str | None) -> None:
    """Name the commands that nobody but the user can start."""
    for line in beside.by_hand(recipe, file, overrides, until):
        display.note(
            0,
            "to be started beside this, where its devices are, once this has begun (with --from: once it has moved its"
            f" stages away, which a world would take for finished): {line}",
        )


def what_is_safe(recipe: Recipe, status: int, again: str) -> str:
    """After a failure: what is finished, where the stage goes on, and the command that does it."""
    finished = []
    unfinished = "the first stage starts from its beginning"
    for stage in recipe.stages:
        marker = recipe.dir / stage.name / "stage.json"
        if is_skipped(recipe, stage.name):
            continue
        if not marker.is_file():
            if finished:
                unfinished = f"{stage.name} starts from its beginning"
            break
        if not checkpoint_directory.read_json(marker)["finished"]:
            unfinished = f"{stage.name} {_where(recipe, stage.name)}"
            break
        finished.append(stage.name)
    else:
        unfinished = "only the report is missing"
    kept = f"finished and safe: {', '.join(finished)}; " if finished else ""
    ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    # torchrun has one status for a setting that cannot work, which the same command meets again, and for a killed rank.
    go_on = "Go on with" if status < 0 else "Once the reason is removed, go on with"
    return (
        f"stopped with {ended}; the reason is above, of the first process that failed.\n"
        f"{recipe.dir}: {kept}{unfinished}; nothing else is lost.\n"
        f"{go_on}: {again}"
    )


def _where(recipe: Recipe, name: str) -> str:
    root = recipe.dir / name / "checkpoints"
    newest = checkpoint_directory.latest(root)
    if newest is None:
        return "starts from its beginning"
    steps = stage_config(recipe, recipe.stage(name, str(root))).run.steps
    return f"goes on after step {int(newest.name.rpartition('_')[2])} of {steps}, its newest checkpoint"


def _checked(arguments: argparse.Namespace) -> Recipe:
    """The recipe, once it and the stages named on the command line are known to exist."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for option, name in (("--from", arguments.anew), ("--until", arguments.until)):
        if name is not None:
            recipe.stage(name, option)
    if arguments.anew is not None and arguments.until is not None:
        order = recipe.names
        if order.index(arguments.until) < order.index(arguments.anew):
            raise ConfigurationError(
                f"--until {arguments.until} comes before --from {arguments.anew}, so nothing would be run anew; swap"
                " them, or leave one out"
            )
    for stage in recipe.stages:
        stage_config(recipe, stage)
    beside.check(recipe)
    return recipe


def _one_of_many(arguments: argparse.Namespace) -> int:
    """What a process of somebody else's torchrun does."""
    from megatron_mopd import runner
    from megatron_mopd.train import reported

    with reported():
        recipe = _checked(arguments)
        if os.environ["RANK"] == "0":
            _tell_of_worlds(recipe, arguments.recipe, arguments.overrides, arguments.until)
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        runner.carry_out(recipe, arguments.until, begin_at=arguments.anew if first_start else None)
    return 0


def _again(words: Sequence[str]) -> str:
    """The command that goes on: as it was, without --from, which would begin anew."""
    kept = []
    for word in words:
        if word.startswith("--from=") or (kept and kept[-1] == "--from"):
            kept = [w for w in kept if w != "--from"]
        else:
            kept.append(word)
    return shlex.join(["python", "-m", "megatron_mopd.recipe", *kept])


if __name__ == "__main__":
    sys.exit(main())
