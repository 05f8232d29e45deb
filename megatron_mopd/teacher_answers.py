"""What a teacher said of some rollouts, tied to the tokens that it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_mopd import batch, provenance
from megatron_mopd.records import MicroBatch, Rollout
from megatron_mopd.scoring import ScoringError
from mopd_kernels.nvfp4 import NVFP4Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Of the completion tokens of some micro-batches, one sequence after the other."""

    logprobs: Tensor  # fp32 [T] on the host
    hidden: NVFP4Tensor | None  # [T, H]
    shas: Sequence[str]
    """:func:`provenance.tokens_sha` of each sequence that was read; whoever makes the log-probabilities gives them."""


def read_of(micro_batches: Sequence[MicroBatch]) -> list[str]:
    """``Answer.shas`` of a teacher that read these micro-batches."""
    return [provenance.tokens_sha(tokens, completion) for tokens, completion in batch.sequences(micro_batches)]


def check(name: str, rollouts: Sequence[Rollout], answer: Answer) -> list[str]:
    """What teacher ``name`` read of each of the ``rollouts`` it was asked for, in their order.

    Raises :class:`ScoringError` when it answered for others, which need not show in the number of tokens.
    """
    asked = [provenance.tokens_sha(rollout.tokens, len(rollout.completion)) for rollout in rollouts]
    wanted = [(sha, rollout) for sha, rollout in zip(asked, rollouts, strict=True) if len(rollout.completion)]
    for index, (sha, rollout) in enumerate(wanted):
        given = answer.shas[index] if index < len(answer.shas) else None
        if given != sha:
            mixed = rollouts[asked.index(given)].prompt.id if given in asked else None
            what = "nothing" if given is None else f"prompt {mixed}" if mixed else "a sequence that nobody asked for"
            raise ScoringError(
                f"teacher {name!r} was asked to score sample {rollout.sample} of prompt {rollout.prompt.id}"
                f" ({rollout.prompt.domain}) and answered for {what}; nothing was learned from it. Start the same"
                " command again; if it comes back, what runs this teacher mixes up its requests"
            )
    tokens = sum(len(rollout.completion) for rollout in rollouts)
    if len(answer.shas) != len(wanted) or len(answer.logprobs) != tokens:
        raise ScoringError(
            f"teacher {name!r} was asked for {len(wanted)} sequences with {tokens} tokens and answered for"
            f" {len(answer.shas)} with {len(answer.logprobs)}; nothing was learned from it. Start the same command"
            " again; if it comes back, what runs this teacher loses requests or answers some twice"
        )
    return asked
