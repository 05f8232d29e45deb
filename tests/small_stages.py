"""Stages of seconds: two domains of words to spell backward, a student of three layers, and teachers trained for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from megatron_mopd import parallel
from megatron_mopd.config import Parallel, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.settings import overlay
from megatron_mopd.train import run_stage

SFT = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}


def task(domain: str = "plain", split: str = "train", size: int = 40) -> dict[str, Any]:
    """Prompts of a domain; those of any but ``plain`` have a mark in front of the word."""
    return {
        "type": "reasoning_gym",
        "domain": domain,
        "family": "spell_backward",
        "template": "{word}" if domain == "plain" else "! {word}",
        "size": size,
        "split": split,
        "options": {"min_word_len": 3, "max_word_len": 5},
    }


def stage(directory: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage of two steps, with these changes over them, the last on top."""
    common = {
        "run": {"dir": str(directory), "steps": 2, "seed": 7},
        "model": {"pattern": "M*E", "max_sequence_length": 24},
        "data": {"train": [task("plain"), task("loud")]},
        "rollout": {"prompts_per_step": 6, "max_new_tokens": 5, "batch_size": 8},
        "batching": {"micro_batch_size": 4, "sequences_per_step": 8},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    }
    return reduce(overlay, changes, common)


def teach(root: Path, tree: Callable[..., dict[str, Any]], **steps: int) -> Groups:
    """SFT runs ``root/name`` of so many steps each on one rank, from seeds of their own; ``tree`` gives settings."""
    groups = parallel.initialize(Parallel(), 0)
    for seed, (name, count) in enumerate(steps.items(), start=7):
        run = {"dir": str(root / name), "steps": count, "seed": seed, "id": name}
        run_stage(build_config(tree(root / name, **SFT, run=run)), groups)
    return groups


def taught(root: Path, initial: str, **domains: list[str]) -> dict[str, Any]:
    """The settings of a stage that starts from one of these runs and learns the domains from others."""
    teachers = {name: {"checkpoint": str(root / name / "checkpoints"), "domains": of} for name, of in domains.items()}
    return {"model": {"initial": str(root / initial / "checkpoints")}, "teachers": teachers}
