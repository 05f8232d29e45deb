"""Look at the rollouts that a step learned from, every token on the colour of its advantage.

    python tools/show_rollout.py RUN_DIR [--step N] [--domain D] [--prompt ID] [--worst K] [--html FILE]

RUN_DIR is the directory of a run with rollout.shards; the newest step is shown unless another is named. --worst
chooses the rollouts whose mean advantage is lowest. --html writes a page that shows all numbers of a token that is
pointed at. Tokens struck through did not count in the update.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mopd import display, rollout_html, rollout_view, run_record, screen, shards
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.files import WriteError, atomically
from megatron_mopd.rollout_view import View
from megatron_mopd.shards import Shard
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer

LISTED = 12  # rollouts on the terminal


def load(directory: Path, step: int | None) -> tuple[Shard, ChatTokenizer]:
    """The shard of ``step`` (the newest when None) and the tokenizer of its run, which must be the shard's."""
    folder = directory / shards.FOLDER
    known = shards.steps(folder)
    if step is None and not known:
        raise ConfigurationError(f"{folder}: no shards; set rollout.shards to keep the rollouts of some steps")
    shard = shards.read(folder, known[-1] if step is None else step)
    settings = build_config(run_record.read(directory)["settings"], origin=str(directory / run_record.FILE)).tokenizer
    tokenizer = build_tokenizer(settings)
    if tokenizer.tokenizer_sha != shard.header["tokenizer_sha"]:
        raise ConfigurationError(
            f"{shard.path}: written with tokenizer {shard.header['tokenizer_sha'][:12]}, but"
            f" {settings.path or settings.type} is {tokenizer.tokenizer_sha[:12]} now; put the run's one back"
        )
    return shard, tokenizer


def chosen(
    shard: Shard, tokenizer: ChatTokenizer, domain: str | None, prompt: str | None, worst: int | None
) -> list[View]:
    """The rollouts asked for; refuses a choice that leaves none."""
    views = [rollout_view.of(kept, tokenizer.decode) for kept in shard.rollouts]
    found = rollout_view.select(views, domain, prompt, worst)
    if not found:
        domains = sorted({shards.rollout(kept).prompt.domain for kept in shard.rollouts})
        raise ConfigurationError(
            f"{shard.path}: none of its {len(views)} rollouts is of domain {domain or 'any'} and prompt"
            f" {prompt or 'any'}; its domains are {', '.join(domains)}"
        )
    return found


def show(shard: Shard, views: list[View]) -> None:
    """The step, the scale of colours and the rollouts on the terminal."""
    header, console = shard.header, display.console()
    teachers = ", ".join(f"{name} {t['checkpoint_id'][:12]}" for name, t in (header["teachers"] or {}).items())
    policy = header["policy"]
    display.note(0, f"{shard.path}: student {policy['run_id']} at step {policy['step']}, teachers {teachers or 'none'}")
    if "stopped" in header:
        display.note(0, f"stopped before the update: {header['stopped']}")
    scale = rollout_view.scale(views)
    console.print(screen.legend(scale))
    for view in views[:LISTED]:
        console.print(rollout_view.text(view, scale))
    if (more := len(views) - LISTED) > 0:
        display.note(0, f"{more:,} more; choose with --domain, --prompt or --worst, or look at all with --html")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    made = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[4:]))
    made.add_argument("directory", type=Path, metavar="RUN_DIR")
    made.add_argument("--step", type=int, help="default: the newest")
    made.add_argument("--domain")
    made.add_argument("--prompt", metavar="ID", help="a prompt's id or the beginning of it")
    made.add_argument("--worst", type=int, metavar="K", help="those with the lowest mean advantage, lowest first")
    made.add_argument("--html", type=Path, metavar="FILE", help="also write them as a page")
    return made


def main() -> int:
    arguments = parser().parse_args()
    try:
        shard, tokenizer = load(arguments.directory, arguments.step)
        views = chosen(shard, tokenizer, arguments.domain, arguments.prompt, arguments.worst)
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None
    show(shard, views)
    if arguments.html is not None:
        text = rollout_html.page(shard.header, views, rollout_view.scale(views))
        try:
            atomically(arguments.html, lambda file: file.write_text(text, encoding="utf-8"), "the page")
        except WriteError as error:
            raise SystemExit(f"error: {error}") from None
        display.note(0, f"{len(views):,} rollouts in {arguments.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
