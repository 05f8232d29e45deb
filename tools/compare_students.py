"""Whether one checkpoint answers as well as another: greedily, on the same held-out prompts, domain by domain.

    torchrun --nproc_per_node=2 tools/compare_students.py examples/demo.yaml BEFORE AFTER [--samples 1000] [--margin 2]

BEFORE and AFTER are Hugging Face or Megatron directories of any model that reads the recipe's text, such as a student
and what came of it when it was quantized. Ends with status 1 where the 95% interval of a domain's change reaches
below minus the margin. ``--json`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mopd import (
    answering,
    display,
    evaluation,
    intervals,
    parallel,
    report,
)
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.data_config import ReasoningGymPrompts
from megatron_mopd.files import atomically
from megatron_mopd.prompts import load_prompts
from megatron_mopd.runner import load_recipe, stage_config
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.train import reported


def with_samples(config: Config, samples: int) -> Config:
    """``config`` whose drawn held-out tasks are at least ``samples`` in each source; files hold what they hold."""
    sources = [
        s.model_copy(update={"size": max(s.size, samples)}) if isinstance(s, ReasoningGymPrompts) else s
        for s in config.data.held_out
    ]
    if not sources:
        raise ConfigurationError("data.held_out is empty: there is nothing to compare on; name prompts with a verifier")
    return config.model_copy(update={"data": config.data.model_copy(update={"held_out": sources})})


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """By domain: right answers of both, those gained and lost, and the change with its 95% interval."""
    tree: dict[str, Any] = {}
    for domain, marks in before.items():
        change = intervals.Change.of(marks, after[domain])
        low, high = change.interval
        tree[domain] = {
            "total": change.total,
            "before": marks.count("1"),
            "after": after[domain].count("1"),
            "gained": change.gained,
            "lost": change.lost,
            "change": change.rate,
            "low": low,
            "high": high,
        }
    return tree


def show(tree: Mapping[str, Any]) -> None:
    """The comparison as a table on the screen."""
    table = Table(title="Greedy answers on the same held-out prompts", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for heading in ("prompts", "before", "after", "gained", "lost", "change, 95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain, row in tree.items():
        rates = (report.percent(row[key] / row["total"]) for key in ("before", "after"))
        change = f"{100 * row['change']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        table.add_row(domain, str(row["total"]), *rates, str(row["gained"]), str(row["lost"]), change)
    display.console().print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    made = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[4:]))
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="whose last stage names tokenizer and held-out data")
    made.add_argument("before", type=Path, metavar="BEFORE")
    made.add_argument("after", type=Path, metavar="AFTER")
    made.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    made.add_argument("--samples", type=int, default=1000, help="held-out prompts per domain; default %(default)s")
    made.add_argument("--margin", type=float, default=2.0, help="points that may be lost; default %(default)s")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return made


def main() -> int:
    arguments = parser().parse_intermixed_args()
    worse: list[str] = []
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        config = with_samples(stage_config(recipe, recipe.stages[-1]), arguments.samples)
        groups = parallel.initialize(config.parallel, config.run.seed)
        tokenizer = build_tokenizer(config.tokenizer)
        loaded = load_prompts(config.data.held_out, tokenizer, config.model.max_sequence_length, need_verifier=True)
        prompts = evaluation.held_out(loaded, arguments.samples)
        before, after = (
            answering.of_checkpoint(path, config, prompts, tokenizer, groups)
            for path in (arguments.before, arguments.after)
        )
        tree = compare(before, after)
        worse = [domain for domain, row in tree.items() if 100 * row["low"] < -arguments.margin]
        if groups.rank == 0:
            show(tree)
            if arguments.json is not None:
                text = json.dumps({"before": str(arguments.before), "after": str(arguments.after), "domains": tree})
                atomically(arguments.json, lambda path: path.write_text(text + "\n"))
        verdict = f"may be worse by more than {arguments.margin:g} points in {', '.join(worse)}" if worse else "kept"
        display.note(groups.rank, f"accuracy: {verdict}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
