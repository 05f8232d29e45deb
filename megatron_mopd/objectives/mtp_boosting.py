"""MTP boosting: the frozen backbone teaches the shared MTP block its own distributions, depth by depth.

Eq. 4 of the Nemotron 3 Ultra report (section 3.4), with T = 2 and N = 7:

    L = T^2 / (N |A|) sum_{k=1..N} sum_{t in A} KL( softmax(z_{t+k} / T) || softmax(z^{mtp_k}_{t+k} / T) )

Positions: z_t are the backbone's logits at position t, which predict token t + 1. Depth k starts from the backbone's
state at t, reads the embeddings of tokens t + 1 .. t + k, and predicts token t + k + 1 as z_{t+k} does. A holds the
positions whose backbone logits predict a token of a completion, the prompt's last token included: there every draft of
speculative decoding begins.

At a completion's end z_{t+k} would lie outside A; such a term has no target on the policy's own text and does not
count. |A| stays the global number of completion tokens and N the number of depths, so that a term weighs the same
whatever its depth and the length of its completion, as the printed formula has it.

Hidden-state mixing: "the input hidden state of step k is sampled from the states of steps 1 .. k-1". Read here as: for
each position and step on its own, uniformly among the outputs of the earlier steps; the backbone's state enters step 1
alone. What is mixed are states that predict the same token: step k at position i continues the token that step j
predicts at i + k - 1 - j, so that is where step j's state is taken from, as in Megatron-LM's later ``mtp_hsm`` (which
has the backbone among the choices). Behind the end of a sequence the newest state serves; no term depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from mopd_kernels import Head, divergence
from mopd_kernels.dispatch import Impl

if TYPE_CHECKING:
    from megatron_mopd.config import MtpBoosting


def mixing_index(noise: Tensor, step: int) -> Tensor:
    """Which states step ``step`` (2 or later) takes as input: rows of ``[(step - 1) * s * b, H]``, int64 ``[s*b]``.

    Those rows are the outputs of steps 1 .. step - 1, one after the other and each ``[s*b, H]``. ``noise``: ``[s, b]``
    in [0, 1), one draw for each position of each row.
    """
    s, b = noise.shape
    here = torch.arange(s, device=noise.device).unsqueeze(1)
    drawn = 1 + (noise * (step - 1)).long()
    aligned = here + (step - 1 - drawn)
    inside = aligned < s
    drawn, aligned = torch.where(inside, drawn, step - 1), torch.where(inside, aligned, here)
    return (((drawn - 1) * s + aligned) * b + torch.arange(b, device=noise.device)).flatten()


def mtp_boosting_loss(
    mtp_hidden: Sequence[Tensor],
    hidden: Tensor,
    output_weight: Tensor,
    batch: MicroBatch,
    settings: MtpBoosting,
    counts: Counts,
    *,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> ObjectiveOutput:
    """This micro-batch's share of Eq. 4; terms of a domain are multiplied by its lambda (``domain_weight``).

    ``mtp_hidden``: ``[s*b, H]`` of steps 1 .. N, gathered over sequence parallelism, whose gradients are partial under
    tensor parallelism; ``hidden [s*b, H]`` the backbone's and ``output_weight [V/tp, H]``, both without gradient.
    ``per_token``: ``mtp_kl_{k}``, the divergence in nats at temperature T of depth k at each position of A, 0 where it
    does not count.
    """
    device, width = hidden.device, batch.tokens.shape[0]
    rows, weight = batch.rows.to(device), batch.domain_weight.to(device)
    ends = batch.cu_seqlens[1:].repeat_interleave(batch.cu_seqlens.diff()).to(device)
    left = ends - 1 - torch.arange(len(rows), device=device)  # positions of A behind each, in its own completion
    counted = [(left >= k).nonzero().squeeze(1) for k in range(1, len(mtp_hidden) + 1)]
    student = torch.cat([states[rows[which]] for states, which in zip(mtp_hidden, counted, strict=True)])
    teacher = torch.cat([hidden[rows[which] + k * width] for k, which in enumerate(counted, start=1)])
    if not len(student):  # backward still reaches every depth, whose collectives other ranks wait for
        found = student.sum(1)
    else:
        frozen = output_weight.detach()
        found = divergence(
            "forward_kl",
            Head(student, frozen),
            Head(teacher.detach(), frozen),
            temperature=settings.temperature,
            group=group,
            valid_vocab=valid_vocab,
            impl=impl,
        ).value
    scale = settings.temperature**2 / (len(mtp_hidden) * max(1, counts.tokens))
    loss = scale * (found * torch.cat([weight[which] for which in counted])).sum()
    per_token = {}
    for k, (which, values) in enumerate(zip(counted, found.detach().split([len(w) for w in counted]), strict=True), 1):
        per_token[f"mtp_kl_{k}"] = torch.zeros(len(rows), device=device).index_copy(0, which, values.float())
    return ObjectiveOutput(loss=loss, per_token=per_token)
