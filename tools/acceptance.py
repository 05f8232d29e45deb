"""How many tokens speculative decoding accepts: drafts of 2 and 7 from the MTP heads, greedy and at temperature 1.

    torchrun --nproc_per_node=2 tools/acceptance.py RECIPE.yaml CHECKPOINT [--before CHECKPOINT] [--samples 100]

CHECKPOINT is a Hugging Face or Megatron directory with MTP heads. The held-out prompts are those of the recipe's last
stage; completions of at least 32 tokens count, the others are left out. With ``--before`` the same is measured on
another checkpoint, such as the one that MTP boosting began with, and the gain is told with its paired 95% interval
over prompts; ends with status 1 where one does not lie above 0. ``--json`` keeps the numbers.
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

from megatron_mopd import answering, display, evaluation, intervals, parallel
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.files import atomically
from megatron_mopd.parallel import Groups
from megatron_mopd.prompts import load_prompts
from megatron_mopd.records import Sampling
from megatron_mopd.runner import load_recipe, stage_config
from megatron_mopd.speculative import acceptance
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.train import reported


def of_checkpoint(path: Path, config: Config, samples: int, groups: Groups) -> dict[str, Any]:
    """:func:`acceptance.measure` of the weights in ``path`` on ``samples`` held-out prompts per domain."""
    tokenizer = build_tokenizer(config.tokenizer)
    loaded = load_prompts(config.data.held_out, tokenizer, config.model.max_sequence_length)
    sampler, one = answering.sampler_of(path, config, tokenizer, groups, mtp=True)
    limit, stops = one.rollout.max_new_tokens, tuple(tokenizer.stop_tokens)
    sampling = Sampling(temperature=1.0, max_new_tokens=limit, stop_tokens=stops)
    prompts = evaluation.held_out(loaded, samples)
    return acceptance.measure(sampler, prompts, sampling, groups, one.evaluation.batch_size)


def show(tree: Mapping[str, Any], gains: Mapping[str, Any] | None) -> None:
    """The lengths, and what was gained, as a table on the screen."""
    table = Table(title="Tokens accepted per verification", title_justify="left")
    headings = ("draft", "decoding", "completions", "length, 95% interval", "by domain", "gain, 95% interval")
    for heading in headings[: None if gains else -1]:
        table.add_column(heading, justify="left" if heading in ("draft", "decoding", "by domain") else "right")
    for draft, modes in tree.items():
        for mode, entry in modes.items():
            known = [length for length in entry["by_prompt"] if length is not None]
            domains = {d: own["length"] for d, own in entry["domains"].items() if own["length"] is not None}
            row = [draft.replace("_", " "), mode.replace("_", " "), str(len(known))]
            row += [_bounded(entry["length"], intervals.mean_interval(known), ".3f")]
            row += [", ".join(f"{domain} {length:.3f}" for domain, length in domains.items())]
            if gains:
                row += [_bounded(gains[draft][mode]["gain"], gains[draft][mode]["interval"], "+.3f")]
            table.add_row(*row)
    display.console().print(table)


def _bounded(value: float | None, bounds: tuple[float, float] | None, form: str) -> str:
    if value is None:
        return "none long enough"
    return f"{value:{form}}" + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="whose last stage names tokenizer and held-out data")
    made.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    made.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    made.add_argument("--before", type=Path, metavar="CHECKPOINT", help="to compare with, on the same prompts")
    made.add_argument("--samples", type=int, default=100, help="held-out prompts per domain; default %(default)s")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return made


def main() -> int:
    arguments = parser().parse_intermixed_args()
    lost: list[str] = []
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        config = stage_config(recipe, recipe.stages[-1])
        if not config.data.held_out:
            raise ConfigurationError("data.held_out is empty: there are no prompts to complete; name some")
        groups = parallel.initialize(config.parallel, config.run.seed)
        tree: dict[str, Any] = {"checkpoint": str(arguments.checkpoint)}
        tree["acceptance"] = of_checkpoint(arguments.checkpoint, config, arguments.samples, groups)
        if arguments.before is not None:
            tree["before"] = {"checkpoint": str(arguments.before)}
            tree["before"]["acceptance"] = of_checkpoint(arguments.before, config, arguments.samples, groups)
            tree["gains"] = acceptance.gains(tree["before"]["acceptance"], tree["acceptance"])
            rows = [(draft, mode, row) for draft, modes in tree["gains"].items() for mode, row in modes.items()]
            lost = [f"{d} {mode}" for d, mode, row in rows if row["interval"] is None or row["interval"][0] <= 0]
        if groups.rank == 0:
            show(tree["acceptance"], tree.get("gains"))
            if arguments.json is not None:
                atomically(arguments.json, lambda path: path.write_text(json.dumps(tree) + "\n"))
            if lost:
                display.note(groups.rank, f"no gain above 0: {', '.join(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
