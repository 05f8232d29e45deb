"""Supervised training on completion tokens: SFT, specialists, warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput

if TYPE_CHECKING:
    from megatron_mopd.config import CrossEntropy


def cross_entropy_loss(
    theta_logprobs: Tensor, batch: MicroBatch, settings: CrossEntropy, counts: Counts
) -> ObjectiveOutput:
    """This micro-batch's share of ``- sum_t lambda_t log pi_theta(y_t) / N``, N the global number of completion tokens.

    ``theta_logprobs`` is fp32 ``[T]``. lambda comes with the batch (``domain_weight``), so ``settings`` decides nothing
    here; it is an argument so that all objectives are called alike. ``per_token``: ``nll`` in nats.
    """
    weight = batch.domain_weight.to(theta_logprobs.device)
    loss = -(weight * theta_logprobs).sum() / max(1, counts.tokens)
    return ObjectiveOutput(loss=loss, per_token={"nll": -theta_logprobs.detach().float()})
