"""Quantizes a checkpoint into a Hugging Face directory in ModelOpt's or compressed-tensors' NVFP4 layout, and back.

    python tools/quantize_checkpoint.py SRC OUT --recipe ultra-ptq [--four-over-six mse] [--layout compressed-tensors]
    python tools/quantize_checkpoint.py SRC --recipe ultra-ptq --dry-run
    python tools/quantize_checkpoint.py QUANTIZED OUT --dequantize

SRC is a Hugging Face or a Megatron directory. Needs no GPU and no memory to speak of. A command that was interrupted
goes on when it is started again. Ends with status 1 when a checkpoint cannot be quantized; nothing is overwritten.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion.jobs import Conversion
from megatron_mopd.conversion.partial_directory import DiskFullError
from megatron_mopd.conversion.plans import HUGGING_FACE_SHARD
from megatron_mopd.quantization import checkpoint, display, recipes
from megatron_mopd.quantization.checkpoint import MANIFEST, PICTURE
from megatron_mopd.quantization.planning import Options
from megatron_mopd.quantization.report import Summary
from megatron_mopd.quantization.stored import FourOverSix, Layout

console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    made = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[-2:]))
    made.add_argument("source", type=Path, metavar="SRC")
    made.add_argument("target", type=Path, metavar="OUT", nargs="?")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(recipes.RECIPES)}, or the path of a .yaml file with a table"
    )
    what.add_argument("--dequantize", action="store_true", help="write the values of a quantized SRC in bfloat16")
    made.add_argument("--layout", choices=get_args(Layout), default="modelopt")
    made.add_argument(
        "--four-over-six",
        choices=get_args(FourOverSix),
        help="let each NVFP4 block choose between two scales by this error",
    )
    made.add_argument("--dry-run", action="store_true", help="print sizes from headers and write nothing")
    made.add_argument("--like", type=Path, metavar="HF_DIR", help="config.json and tokenizer for a Megatron SRC")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    made.add_argument("--device", choices=devices, default=devices[0], help="where to encode; the bytes are the same")
    made.add_argument("--shard-bytes", type=_positive, default=HUGGING_FACE_SHARD, metavar="N", help="largest file")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes of the source, on standard error, that is seen from the first report on."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with ExitStack() as shown:
        progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        task = progress.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            if not progress.live.is_started:
                shown.enter_context(progress)
            progress.update(task, completed=done, total=total)

        yield report


def quantize(arguments: argparse.Namespace) -> None:
    """Quantize, or with ``--dry-run`` count what that would store."""
    options = Options(
        recipe=recipes.load(arguments.recipe), layout=arguments.layout, four_over_six=arguments.four_over_six
    )
    if arguments.dry_run:
        summary = checkpoint.preview(arguments.source, options, like=arguments.like)
        _show(summary, options.title)
        console.print("nothing was written")
        return
    begin = time.perf_counter()
    with bar("quantize") as report:
        made = checkpoint.quantize(
            arguments.source,
            arguments.target,
            options,
            like=arguments.like,
            largest_shard=arguments.shard_bytes,
            device=torch.device(arguments.device),
            report=report,
        )
    _show(made.summary, options.title)
    console.print(f"source checkpoint_id {made.conversion.checkpoint_id}")
    console.print(f"{MANIFEST} and {PICTURE} are in {arguments.target}")
    _say(made.conversion, time.perf_counter() - begin)


def _show(summary: Summary, title: str) -> None:
    console.print(display.table(summary, title), soft_wrap=False)
    console.print()
    for line in display.reasons(summary):
        console.print(line)
    sizes = f"{summary.source_bytes:,} bytes become {summary.stored_bytes:,}"
    console.print(f"\n{summary.bits:.4f} bits per element; {sizes}")


def dequantize(arguments: argparse.Namespace) -> None:
    """Write the values of a quantized directory in bfloat16."""
    begin = time.perf_counter()
    with bar("dequantize") as report:
        done = checkpoint.dequantize(
            arguments.source, arguments.target, largest_shard=arguments.shard_bytes, report=report
        )
    console.print(f"{done.path}: {done.tensors:,} tensors, {done.size:,} bytes, checkpoint_id {done.checkpoint_id}")
    _say(done, time.perf_counter() - begin)


def _say(done: Conversion, seconds: float) -> None:
    fresh = done.size - done.resumed
    console.print(f"{fresh:,} bytes of tensors passed in {seconds:.1f} s ({fresh / seconds / 1e9:.2f} GB/s)")
    if done.resumed:
        console.print(f"{done.resumed:,} were there from an earlier start")


def main() -> None:
    found = parser()
    arguments = found.parse_args()
    if arguments.target is None and not arguments.dry_run:
        found.error("OUT is missing; only --dry-run does without")
    of_recipe = ("layout", "four_over_six", "dry_run", "like", "device")
    given = [name for name in of_recipe if getattr(arguments, name) != found.get_default(name)]
    if arguments.dequantize and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        found.error(f"--dequantize does not take {options}; leave out what only --recipe uses")
    torch.set_num_threads(1)  # files are encoded side by side, each in a thread of its own
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_time=False)])
    try:
        (dequantize if arguments.dequantize else quantize)(arguments)
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on behind the last finished file") from None
    except DiskFullError as error:
        raise SystemExit(f"error: {error.strerror}") from None
    except OSError as error:
        raise SystemExit(f"error: {error}; see to that and start the same command again") from None


if __name__ == "__main__":
    sys.exit(main())
