"""How close the gradient from old rollouts is to the on-policy gradient, in three forms of what is made of their age.

``corrected`` is Eq. 3 of the Nemotron 3 Ultra report (section 3.3.1) as it stands. ``recomputed`` keeps the advantage
of Eq. 2, against pi_prox, and drops c_t and m_t. ``uncorrected`` has nothing but what was recorded when the rollouts
were drawn, as if they were new: the advantage is against pi_behav, and no ratio weighs or masks a token.

All are taken at the same weights, those of the newer policy, from rollouts of the older one. The on-policy gradient
they are held against is drawn by the newer policy under other noise, so that no form gains from having drawn the very
same tokens; at the same weights, the cosine of two such on-policy gradients is the most that any can be expected to
reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megatron_mopd import batch, checkpoint, provenance
from megatron_mopd.config import Mopd
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput, Prompt, ScoredRollout
from megatron_mopd.sources import RolloutSource
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import LogprobLoss, of_logprobs

DRAW = 1_000_003
"""Number of the old rollouts' batch, which with seed and prompt decides their noise; no run draws as many. The next is
that of the on-policy rollouts."""


def corrected(settings: Mopd) -> LogprobLoss:
    """Eq. 3."""
    return lambda logprobs, micro_batch, counts: mopd_loss(logprobs, micro_batch, settings, counts)


def recomputed(settings: Mopd) -> LogprobLoss:
    """Eq. 3 with c_t = 1 and m_t = 1: only the advantage knows of the newer policy. For one step per rollout batch."""

    def objective(logprobs: Tensor, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        behaviour = logprobs.detach().cpu()
        return mopd_loss(logprobs, dataclasses.replace(micro_batch, behav_logprobs=behaviour), settings, counts)

    return objective


def uncorrected(settings: Mopd) -> LogprobLoss:
    """pi_behav taken for pi_prox, r_t = 1: every rollout is learned from as if it were new."""
    as_new = settings.model_copy(update={"force_on_policy_ratio": True})

    def objective(logprobs: Tensor, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        prox = micro_batch.behav_logprobs
        return mopd_loss(logprobs, dataclasses.replace(micro_batch, prox_logprobs=prox), as_new, counts)

    return objective


FORMS = {"corrected": corrected, "recomputed": recomputed, "uncorrected": uncorrected}


def cosines(trainer: Trainer, old: Path, new: Path, size: int) -> Mapping[str, float]:
    """Of each form's gradient from ``size`` rollouts of the policy in checkpoint ``old`` to the on-policy gradient from
    as many of that in ``new``, of the same prompts, all at the weights of ``new``. The trainer's weights are lost."""
    settings, source = trainer.config.objective, trainer.source
    assert isinstance(settings, Mopd) and isinstance(source, RolloutSource)
    source.seek(0)
    prompts = source.stream.take(size)
    stale = scored(trainer, old, prompts, DRAW)
    truth = gradient(trainer, new, scored(trainer, new, prompts, DRAW + 1), corrected(settings))
    return {
        form: float(cosine_similarity(gradient(trainer, new, stale, loss(settings)), truth, dim=0))
        for form, loss in FORMS.items()
    }


def scored(trainer: Trainer, policy: Path, prompts: Sequence[Prompt], draw: int) -> list[ScoredRollout]:
    """One scored rollout of each prompt by the policy in a checkpoint."""
    source, teachers, config = trainer.source, trainer.teachers, trainer.config
    assert isinstance(source, RolloutSource) and teachers is not None
    _load(trainer, policy)
    requests, seed = [(prompt, 0) for prompt in prompts], config.run.seed
    rollouts = trainer.sampler.generate(requests, source.sampling, seed, draw, config.rollout.batch_size)
    return teachers.score(
        [provenance.sign(r, trainer.policy, trainer.tokenizer, source.sampling, seed, draw) for r in rollouts]
    )


def gradient(trainer: Trainer, policy: Path, rollouts: Sequence[ScoredRollout], loss: LogprobLoss) -> Tensor:
    """fp64, flat: the trunk's gradient at a policy's weights. The optimizer's step behind it goes nowhere."""
    learner, config = trainer.learner, trainer.config
    _load(trainer, policy)
    packed = batch.pack(
        rollouts,
        config.batching.micro_batch_size,
        trainer.tokenizer.pad_token,
        domain_weights=config.objective.domain_weights,
    )
    learner.step(packed, of_logprobs(loss))
    named = learner.module.named_parameters()
    parts = [p.main_grad.double().flatten() for name, p in named if p.requires_grad and not name.startswith("mtp.")]
    return torch.cat(parts)


def _load(trainer: Trainer, policy: Path) -> None:
    with trainer.learner.originals():
        checkpoint.load_weights(policy, trainer.learner.model, trainer.groups)
