"""Converts nemotron_h checkpoints between Hugging Face and Megatron directories, looks into them and compares them.

    python tools/convert_checkpoint.py hf-to-megatron HF_DIR MEGATRON_DIR [--shards N]
    python tools/convert_checkpoint.py megatron-to-hf MEGATRON_DIR HF_DIR [--like HF_DIR]
    python tools/convert_checkpoint.py inspect DIR
    python tools/convert_checkpoint.py verify A B

Needs no GPU, no torchrun and no memory to speak of. A conversion that was interrupted goes on when the same command is
started again. Ends with status 1 when directories differ or cannot be converted.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_mopd import conversion
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import inspection
from megatron_mopd.conversion.jobs import Conversion
from megatron_mopd.conversion.partial_directory import DiskFullError
from megatron_mopd.conversion.plans import HUGGING_FACE_SHARD

LISTED = 50
"""Differences that verify prints."""
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    top = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[-3:]))
    commands = top.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="write a Hugging Face directory as a Megatron directory")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIR")
    to_megatron.add_argument("target", type=Path, metavar="MEGATRON_DIR")
    default = "when left out one per 4 GB or, where that makes fewer than 8, one per 256 MB up to 8"
    to_megatron.add_argument("--shards", type=_positive, metavar="N", help=f".distcp files; {default}")
    to_hf = commands.add_parser("megatron-to-hf", help="write a Megatron directory as a Hugging Face directory")
    to_hf.add_argument("source", type=Path, metavar="MEGATRON_DIR")
    to_hf.add_argument("target", type=Path, metavar="HF_DIR")
    to_hf.add_argument(
        "--like", type=Path, metavar="HF_DIR", help="directory with config.json and tokenizer of the model"
    )
    to_hf.add_argument(
        "--shard-bytes", type=_positive, default=HUGGING_FACE_SHARD, metavar="N", help="largest .safetensors file"
    )
    for command in (to_megatron, to_hf):
        command.add_argument("--allow-nan", action="store_true", help="convert tensors with NaN, with a warning")
        command.add_argument("--without-mtp", action="store_true", help="leave MTP tensors out, present or not")
    inspected = commands.add_parser("inspect", help="print what a directory of either kind holds")
    inspected.add_argument("directory", type=Path, metavar="DIR")
    inspected.add_argument("--quick", action="store_true", help="read headers only, compute no checkpoint_id")
    verified = commands.add_parser("verify", help="compare two directories of either kind, tensor by tensor")
    verified.add_argument("a", type=Path, metavar="A")
    verified.add_argument("b", type=Path, metavar="B")
    return top


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, on standard error, that is seen from the first report on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with ExitStack() as shown:
        progress = Progress(*columns, console=Console(stderr=True))
        task = progress.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            if not progress.live.is_started:
                shown.enter_context(progress)
            progress.update(task, completed=done, total=total)

        yield report


def convert(arguments: argparse.Namespace) -> int:
    """Run one of the two conversions and say what came of it."""
    begin = time.perf_counter()
    options = {"allow_nan": arguments.allow_nan, "without_mtp": arguments.without_mtp}
    with bar(arguments.command) as report:
        if arguments.command == "hf-to-megatron":
            done = conversion.hugging_face_to_megatron(
                arguments.source, arguments.target, shards=arguments.shards, report=report, **options
            )
        else:
            done = conversion.megatron_to_hugging_face(
                arguments.source,
                arguments.target,
                like=arguments.like,
                largest_shard=arguments.shard_bytes,
                report=report,
                **options,
            )
    _say(done, time.perf_counter() - begin)
    return 0


def _say(done: Conversion, seconds: float) -> None:
    fresh = done.size - done.resumed
    console.print(f"{done.path}: {done.tensors:,} tensors, {done.size:,} bytes, checkpoint_id {done.checkpoint_id}")
    console.print(f"{fresh:,} bytes written in {seconds:.1f} s ({fresh / seconds / 1e9:.2f} GB/s)")
    if done.resumed:
        console.print(f"{done.resumed:,} bytes were there from an earlier start")
    if passed := {what: count for what, count in done.skipped.items() if count}:
        console.print("passed over: " + ", ".join(f"{count:,} {what}" for what, count in passed.items()))


def inspect(directory: Path, quick: bool) -> int:
    """Print what ``directory`` holds; status 1 when something is wrong with it."""
    with bar("inspect") as report:
        found = inspection.inspect(directory, identify=not quick, report=report)
    facts = {
        "directory": f"{found.path} ({found.kind})",
        "family": "nemotron_h",
        "pattern": found.pattern,
        "sizes": f"hidden {found.hidden_size}, vocabulary {found.vocab_size}",
        "query groups": str(found.query_groups or "unknown"),
        "head": "tied to the embedding" if found.tied else "its own",
        "tensors": f"{found.tensors:,} in {found.size:,} bytes",
        "dtypes": ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(found.dtypes.items())),
        "checkpoint_id": found.checkpoint_id
        or (f"{found.promised_id} (of the manifest)" if found.promised_id else "-"),
        "passed over": ", ".join(f"{count:,} {what}" for what, count in found.skipped.items() if count) or "nothing",
    }
    for name, value in facts.items():
        console.print(f"{name:<20}{value}")
    console.print("parameters")
    for group, count in {**found.groups, "all": sum(found.groups.values())}.items():
        console.print(f"  {group:<18}{count:>19,}")
    problems = [f"{kind}: {item}" for kind, items in found.problems.items() for item in items]
    if found.checkpoint_id and found.promised_id not in (None, found.checkpoint_id):
        problems.append(f"the manifest says checkpoint_id {found.promised_id}: one of the two was exchanged or damaged")
    for problem in problems[:LISTED]:
        console.print(f"problem: {problem}")
    return 1 if problems else 0


def verify(a: Path, b: Path) -> int:
    """Print where two directories differ; status 1 when they do."""
    with bar("verify") as report:
        found = inspection.differences(a, b, report)
    for difference in found[:LISTED]:
        console.print(difference)
    if len(found) > LISTED:
        console.print(f"and {len(found) - LISTED:,} more")
    console.print(f"differences: {len(found):,}" if found else f"{a} and {b} hold the same weights")
    return 1 if found else 0


def main() -> int:
    arguments = parser().parse_args()
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_time=False)])
    try:
        if arguments.command == "inspect":
            return inspect(arguments.directory, arguments.quick)
        if arguments.command == "verify":
            return verify(arguments.a, arguments.b)
        return convert(arguments)
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        converting = arguments.command in ("hf-to-megatron", "megatron-to-hf")
        goes_on = "; the same command goes on behind the last finished file" if converting else ""
        raise SystemExit(f"interrupted{goes_on}") from None
    except DiskFullError as error:
        raise SystemExit(f"error: {error.strerror}") from None
    except OSError as error:
        raise SystemExit(f"error: {error}; see to that and start the same command again") from None


if __name__ == "__main__":
    sys.exit(main())
