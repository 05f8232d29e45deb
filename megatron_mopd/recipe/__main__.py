"""Run a recipe: ``python -m megatron_mopd.recipe CONFIG.yaml [--from STAGE] [--until STAGE] [[STAGE:]key=value ...]``.

Starts torchrun with the recipe's processes, runs every stage that is not finished and unchanged, and publishes the
graph and the report. The same command goes on where a stopped one was. --from runs a stage and all that depend on it
anew, once, and moves what they held to DIR/set_aside.

@FILE in place of a word stands for the words in a file, one a line; lines that begin with # are comments.

On several machines start it on each, with the variables of examples/launch.sh: NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT (29500) and MAX_RESTARTS (0: times torchrun starts all processes again after a failure). Under a torchrun of
one's own it is one of its processes. DRY_RUN=1 prints the torchrun line and starts nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megatron_mopd import checkpoint_directory, display
from megatron_mopd.config import ConfigurationError
from megatron_mopd.recipe import anew
from megatron_mopd.recipe.schema import Recipe, is_skipped, load_recipe, stage_config

PORT = "29500"


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The word on a line of an @FILE."""
        return [] if arg_line.lstrip().startswith("#") or not arg_line.strip() else [arg_line.strip()]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    first, *rest = (__doc__ or "").split("\n\n")
    name = "python -m megatron_mopd.recipe"
    made = _Parser(prog=name, description=first, epilog=" ".join(rest), fromfile_prefix_chars="@", allow_abbrev=False)
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
        if os.environ.get("DRY_RUN") == "1":
            display.note(0, shlex.join(line))
            return 0
        if arguments.anew is not None and os.environ.get("NODE_RANK", "0") == "0":
            _set_aside(recipe, arguments.anew)
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    status = _run(line)
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
    return (
        f"stopped with {ended}; the reason is above, of the first process that failed.\n"
        f"{recipe.dir}: {kept}{unfinished}; nothing else is lost.\n"
        f"Go on with: {again}"
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
    return recipe


def _set_aside(recipe: Recipe, name: str) -> None:
    for source, target in anew.set_aside(recipe, name):
        display.note(0, f"--from {name}: {source} is kept as {target}")


def _one_of_many(arguments: argparse.Namespace) -> int:
    """What a process of somebody else's torchrun does."""
    from megatron_mopd import runner
    from megatron_mopd.train import reported

    with reported():
        recipe = _checked(arguments)
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if arguments.anew is not None and os.environ["RANK"] == "0" and first_start:
            _set_aside(recipe, arguments.anew)  # the others wait for this process before they read anything
        runner.carry_out(recipe, arguments.until)
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


def _run(line: Sequence[str]) -> int:
    """Run torchrun in the foreground; signals that end this process end it first, as torchrun sees fit."""
    environment = dict(os.environ)
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore's order of communication before computation
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", "1")
    child = subprocess.Popen(line, env=environment)
    with _passed_on(child):
        return child.wait()


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and SIGHUP reach ``child`` too; a terminal sends it Ctrl-C by itself."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    def stay(number: int, frame: FrameType | None) -> None:
        """Wait for torchrun, which has the signal already."""

    handlers = {signal.SIGTERM: pass_on, signal.SIGHUP: pass_on, signal.SIGINT: stay}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
