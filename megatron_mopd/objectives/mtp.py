"""Cross-entropy of the multi-token-prediction heads on completion tokens.

The backbone's hidden state at position i predicts token i + 1; that of MTP depth k (0-based) predicts token i + 2 +
k, as in mcore's ``process_mtp_loss``, which rolls the labels once more per depth. Here each completion token keeps
its place in the flat order and the row that predicts it moves back by 1 + k positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from mopd_kernels import linear_logprob
from mopd_kernels.dispatch import Impl


def mtp_cross_entropy(
    mtp_hidden: Sequence[Tensor],
    output_weight: Tensor,
    batch: MicroBatch,
    counts: Counts,
    *,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> ObjectiveOutput:
    """This micro-batch's share of the mean cross-entropy over depths, before the scale ``mtp.weight``.

    ``mtp_hidden``: one ``[s*b, H]`` per depth, gathered over sequence parallelism; ``output_weight [V/tp, H]`` gets
    no gradient. Only predicted tokens that are completion tokens of the same row count. The denominator is the global
    number of completion tokens for every depth: depth k misses a completion token only where fewer than 2 + k tokens
    precede it, which a rendered chat prompt never allows, so this equals the count per depth without a collective of
    its own. ``per_token``: ``mtp_nll_{k}`` in nats, 0 at such missed tokens.
    """
    if not mtp_hidden:
        raise ValueError("mtp_hidden is empty: this model has no MTP heads")
    device, width = mtp_hidden[0].device, batch.tokens.shape[0]
    rows, targets = batch.rows.to(device), batch.targets.to(device)
    loss, per_token = mtp_hidden[0].new_zeros((), dtype=torch.float32), {}
    for depth, hidden in enumerate(mtp_hidden):
        source = rows - (1 + depth) * width  # hidden states are laid out position by position, `width` rows each
        logprob = linear_logprob(
            hidden[source.clamp(min=0)],
            output_weight.detach(),
            targets,
            group=group,
            valid_vocab=valid_vocab,
            impl=impl,
        )
        nll = -logprob.where(source >= 0, 0.0)
        loss = loss + nll.sum() / max(1, counts.tokens)
        per_token[f"mtp_nll_{depth}"] = nll.detach().float()
    return ObjectiveOutput(loss=loss / len(mtp_hidden), per_token=per_token)
