"""The records that pass between the stages of one step; frozen, so that no stage changes its input.

Axis letters used in comments: ``b`` rows of a micro-batch, ``s`` padded sequence length, ``n`` tokens of one
completion, ``T`` completion tokens of a micro-batch (flat, row after row), ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mopd_kernels.nvfp4 import NVFP4Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One rendered chat prompt.

    Example: ``Prompt(id="3f0c...", domain="spell", messages=({"role": "user", "content": "spell cat"},),
    tokens=(1, 7, 9), verifier={"kind": "exact", "answer": "tac"})``
    """

    id: str  # sha256 hex of the domain and the messages; equal prompts have equal ids
    domain: str
    messages: tuple[Mapping[str, str], ...]
    tokens: tuple[int, ...]  # chat template applied, generation prompt included
    verifier: Mapping[str, Any] = field(default_factory=dict)  # what prompts.verify needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are drawn. ``temperature`` 0 means greedy (evaluation only)."""

    temperature: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A point of a training run: the weights after ``step`` optimizer-updating batches of run ``run_id``."""

    run_id: str
    step: int
    initial_id: str | None = None  # checkpoint_id the run started from; None for weights drawn from run.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Who sampled a rollout, who scored it, and under which tokenizer, template and sampling."""

    policy: Policy
    teacher_id: str | None  # checkpoint_id of the scoring teacher; None before scoring
    tokenizer_sha: str
    template_sha: str
    sampling: Sampling
    domain: str
    seed: int
    draw: int = 0  # index of the collected batch in its run; with seed, prompt, sample and position it fixes the noise
    teacher_nvfp4: tuple[str, ...] = ()  # what the scoring teacher kept in NVFP4, sorted; the rest as its checkpoint
    routing_sha: str | None = None  # of the table that sent the domain to its teacher; None before scoring
    scored_sha: str | None = None  # of the tokens that the teacher read; None before scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt and one completion, sampled by the student or taken from a dataset."""

    prompt: Prompt
    sample: int  # index among the completions of this prompt
    completion: Tensor  # int64 [n], the stop token included when one was drawn
    finish: Literal["stop", "length"]
    behav_logprobs: Tensor | None = None  # fp32 [n] at the sampling temperature; None for dataset rows
    provenance: Provenance | None = None  # None for dataset rows
    reward: float | None = None  # the verifier's, when asked for
    dropped: str | None = None  # the guard that keeps it out of the update it was collected for
    policy_steps: Tensor | None = None
    """int64 [n], never falling: the step of the policy that drew each token. None: provenance.policy drew them all;
    with it provenance.policy is that of the first token."""

    @property
    def tokens(self) -> Tensor:
        """int64 [prompt + n]: the whole sequence."""
        return torch.cat([torch.tensor(self.prompt.tokens, dtype=torch.int64), self.completion])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """A rollout with the log-probabilities its domain's teacher gives to the sampled tokens."""

    rollout: Rollout  # provenance.teacher_id is set
    teacher: str  # the teacher's name in the configuration
    teacher_logprobs: Tensor  # fp32 [n]
    teacher_hidden: NVFP4Tensor | None = None
    """[n, H] on the host: the teacher's final hidden states that predict the completion, for a teacher that keeps
    them; with its output weight they are its distribution over the whole vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdatedRollout:
    """A rollout that met its update, with what the objective made of each of its tokens."""

    item: ScoredRollout | Rollout
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """Of :class:`ObjectiveOutput`, fp32 [n] each; empty for a rollout that a guard kept from the update."""
    dropped: str | None = None
    """Why the whole rollout did not count: the guard that kept it out of the update, ``sequence_error`` for
    objective.sequence_error_threshold, or ``stopped`` where a guard ended the run before the update. Single tokens that
    did not count are in ``per_token["mask"]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Flat completion tokens beside the right-padded sequences that mcore reads.

    Hidden states are ``[s, b, H]``; flattened to ``[s*b, H]``, row ``rows[t]`` predicts ``targets[t]``.
    An empty micro-batch (``T == 0``) has one row of padding, so that every rank runs the same collectives.
    """

    tokens: Tensor  # int64 [b, s], right-padded
    lengths: Tensor  # int64 [b]
    rows: Tensor  # int64 [T]
    targets: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int64 [b + 1], completion tokens of row i are cu_seqlens[i]:cu_seqlens[i+1]
    domains: tuple[str, ...]  # [b]
    domain_weight: Tensor  # fp32 [T], lambda of the token's domain
    behav_logprobs: Tensor | None = None  # fp32 [T]
    teacher_logprobs: Tensor | None = None  # fp32 [T]
    prox_logprobs: Tensor | None = None  # fp32 [T]
    outcome_advantage: Tensor | None = None  # fp32 [T]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Global denominators of one optimizer step: over all data-parallel ranks and micro-batches."""

    tokens: int
    sequences: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentOutput:
    """What the student's forward gives; never logits."""

    hidden: Tensor  # [s, b, H] (or [s/tp, b, H] under sequence parallelism) after the final norm
    output_weight: Tensor  # [V/tp, H]
    mtp_hidden: tuple[Tensor, ...] = ()  # one per MTP depth, shaped as hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveOutput:
    """A local share of the loss and what to log per token.

    Summing ``loss`` over micro-batches and data-parallel ranks gives the global loss; its gradient needs no further
    scaling.
    """

    loss: Tensor  # scalar fp32
    per_token: Mapping[str, Tensor] = field(default_factory=dict)  # detached, fp32 [T] each
