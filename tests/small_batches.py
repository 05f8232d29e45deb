"""A learner on a small student, and a global batch for it."""

from __future__ import annotations

import torch

from megatron_mopd import batch, parallel, presets, student
from megatron_mopd.config import Config
from megatron_mopd.parallel import Groups
from megatron_mopd.records import MicroBatch, Prompt, Rollout, ScoredRollout
from megatron_mopd.update import Learner

VOCAB = 101  # odd: padded under tensor parallelism
SEQUENCES = 13


def learner_of(config: Config, vocab: int = VOCAB) -> Learner:
    groups = parallel.initialize(config.parallel, 7)
    precision = presets.resolve_precision(config.run.precision, groups.device)
    model = student.build_model(config.model, config.parallel, groups, vocab, precision, mtp=True)
    return Learner(model, config, groups, vocab, pad_token=0)


def micro_batches(groups: Groups, size: int, domain: str = "d", count: int = SEQUENCES) -> list[MicroBatch]:
    """This rank's share of a global batch with ragged prompts and completions, as a lagging engine leaves it."""
    g = torch.Generator().manual_seed(3)
    scored = []
    for i in range(count):
        prompt = tuple(torch.randint(0, VOCAB, (3 + i % 3,), generator=g).tolist())
        behav = -4.6 + 0.7 * torch.randn(1 + (3 * i) % 7, generator=g)
        rollout = Rollout(
            prompt=Prompt(id=str(i), domain=domain, messages=(), tokens=prompt),
            sample=0,
            completion=torch.randint(0, VOCAB, behav.shape, generator=g),
            finish="length",
            behav_logprobs=behav,
        )
        gap = torch.randn(behav.shape, generator=g)
        scored.append(ScoredRollout(rollout=rollout, teacher="t", teacher_logprobs=behav + gap))
    return batch.pack(scored[groups.dp_rank :: groups.dp_size], size, 0, length_multiple=groups.tp_size)
