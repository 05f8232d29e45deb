"""Whether a student can learn from its teachers, asked before training, of any checkpoints on any layout.

    python tools/preflight.py --student DIR --teacher NAME=DIR:DOMAIN,... --prompts FILE.jsonl --output DIR [key=value]
    torchrun --nproc_per_node=N tools/preflight.py ... --config CONFIG.yaml parallel.tensor=2 preflight.samples=256

The student completes prompts of each domain; every teacher is measured on its domains, which several may share. Left in
the output directory: preflight.json (numbers and a decision per teacher: go, warm_up or refuse), preflight.png and
result.json (time and memory); see megatron_mopd.preflight. Directories are Hugging Face's or Megatron's. Prompts are
JSON lines with messages and domain, or those of a configuration, whose other settings count too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_mopd import display, origins, parallel, presets
from megatron_mopd.config import Config, ConfigurationError, build_config
from megatron_mopd.preflight import stage
from megatron_mopd.preflight.decide import FILE
from megatron_mopd.settings import merge, overlay, read_yaml
from megatron_mopd.train import reported


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    top = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[5:]))
    add = top.add_argument
    add("--student", type=Path, required=True, metavar="DIR", help="what training would start from")
    add(
        "--teacher",
        action="append",
        required=True,
        metavar="NAME=DIR:DOMAIN,...",
        help="a teacher and the domains it is measured on; once for each teacher",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="directory of the results")
    where = top.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines {"messages", "domain"}')
    where.add_argument("--config", type=Path, metavar="FILE", help="YAML of a training run")
    add("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer; default the configuration's")
    add("overrides", nargs="*", metavar="key=value", help="settings: preflight.top_k=32 rollout.max_new_tokens=512")
    return top


def configuration(arguments: argparse.Namespace) -> Config:
    """The settings of the pre-flight; raises :class:`ConfigurationError`, also for an output that is there already."""
    teachers, candidates = teachers_of(arguments.teacher)
    # Nothing is trained: a supervised stage asks for no teacher for every domain of the data.
    ours: dict[str, Any] = {
        "run": {"dir": str(arguments.output), "steps": 1},
        "model": {"initial": str(arguments.student)},
        "batching": {"sequences_per_step": 1},
        "preflight": {"candidates": candidates},
    }
    tree = {} if arguments.config is None else read_yaml(arguments.config)
    tree = {name: value for name, value in tree.items() if name not in ("objective", "source", "teachers")}
    if arguments.prompts is not None:
        ours["data"] = {"train": [{"type": "jsonl", "path": str(arguments.prompts)}]}
        ours["preflight"]["prompts"] = "train"
    if arguments.tokenizer is not None:
        ours["tokenizer"] = {"type": "huggingface", "path": str(arguments.tokenizer)}
    supervised = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "teachers": teachers}
    tree = merge(overlay(tree, ours) | supervised, arguments.overrides)
    config = build_config(tree, origin=str(arguments.config or "command line"))
    if (config.run.dir / FILE).exists():
        raise ConfigurationError(f"{config.run.dir / FILE}: is there already and is not overwritten; name another DIR")
    return config


def teachers_of(given: list[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The sections ``teachers`` and ``preflight.candidates``; of those that share a domain the first serves it."""
    teachers: dict[str, Any] = {}
    candidates: dict[str, list[str]] = {}
    served: set[str] = set()
    for text in given:
        name, _, rest = text.partition("=")
        directory, _, named = rest.rpartition(":")
        domains = [domain for domain in named.split(",") if domain]
        if not (name and directory and domains):
            raise ConfigurationError(f"--teacher {text}: expected NAME=DIR:DOMAIN,..., such as math=runs/math:algebra")
        if name in teachers:
            raise ConfigurationError(f"--teacher {text}: two teachers are called {name!r}; rename one")
        own = [domain for domain in dict.fromkeys(domains) if domain not in served]
        teachers[name] = {"checkpoint": directory, "domains": own}
        candidates[name] = list(dict.fromkeys(domains))
        served |= set(own)
    return teachers, candidates


def main() -> None:
    arguments = parser().parse_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        config = origins.resolved(configuration(arguments))
        presets.check(config)
        groups = parallel.initialize(config.parallel, config.run.seed)
        stage.run_stage(config, groups, "pre-flight")
        display.note(groups.rank, f"{config.run.dir}: {FILE}, {stage.PICTURE}")


if __name__ == "__main__":
    main()
