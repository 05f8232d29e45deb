"""How good teachers are themselves on held-out prompts of their domains: what a student's recovery is a share of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd import checkpoint_directory, evaluation, run_record, together
from megatron_mopd.config import Config
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt
from megatron_mopd.rollout import Sampler
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)


def measure(
    pool: TeacherPool, prompts: Sequence[Prompt], config: Config, tokenizer: ChatTokenizer
) -> dict[str, dict[str, Any]]:
    """``{teacher: result}``, :func:`evaluation.result` of each teacher's greedy answers to its share of ``prompts``.

    A teacher whose own run left its answers to the same prompts is not asked again. Any other answers with the weights
    of its checkpoint, whatever is kept of it in NVFP4. Teachers without a prompt are left out. JSON values equal on all
    ranks, which call it together. Raises :class:`ConfigurationError` for a run whose ``result.json`` is damaged.
    """
    found = {}
    for name, teacher in config.teachers.items():
        own = [prompt for prompt in prompts if pool.routing.get(prompt.domain) == name]
        if not own:
            continue
        known = _left(teacher.checkpoint, pool.ids[name], evaluation.asked(own), pool.groups)
        found[name] = known or evaluation.result(_answers(pool, name, own, config, tokenizer), own)
    return found


def _left(checkpoint: Path, checkpoint_id: str, asked: dict[str, str], groups: Groups) -> dict[str, Any] | None:
    """What the run that ``checkpoint`` is of answered; None where there is none, or of other weights or prompts."""
    found: list[dict[str, Any] | None] = [None]

    def look(report: together.Report) -> None:
        file = checkpoint.parent / run_record.RESULT
        if checkpoint.name != "checkpoints" or not file.is_file():
            return
        tree = checkpoint_directory.read_json(file, "copy the run's directory again")
        prompts, ended = tree.get("prompts", {}), tree.get("ended") or {}
        if ended.get("checkpoint_id") == checkpoint_id and asked.items() <= prompts.items():
            found[0] = {key: {d: tree[key][d] for d in asked} for key in ("accuracy", "answers", "prompts")}

    together.work(groups, groups.rank == 0, look)
    dist.broadcast_object_list(found, src=0, group=groups.world)
    return found[0]


def _answers(
    pool: TeacherPool, name: str, prompts: Sequence[Prompt], config: Config, tokenizer: ChatTokenizer
) -> dict[str, str]:
    logger.info("teacher %s: answers %d held-out prompts, as no run of its own did", name, len(prompts))
    pool.load()
    with pool.unquantized(name) as model:
        context, portion = config.model.max_sequence_length, config.rollout.prefill_tokens
        sampler = Sampler(model, pool.groups, context, pool.vocab_size, portion)
        length, size = config.rollout.max_new_tokens, config.evaluation.batch_size
        return evaluation.answers(sampler, prompts, tokenizer, pool.groups, length, size)
