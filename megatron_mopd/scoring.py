"""Log-probabilities of given tokens under a model on any layout: what teachers and ``tools/score_tokens.py`` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mopd import batch, pipeline, presets, student
from megatron_mopd.config import Model, Parallel
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import OutputWeight, Predictions, check_impl
from megatron_mopd.records import MicroBatch, Rollout
from mopd_kernels.dispatch import Impl

CERTAIN = 1e-4
"""A log-probability above this is no rounding of 0 but a fault."""


class ScoringError(ValueError):
    """A model gave a value that is no log-probability."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How sequences are cut into micro-batches, run through a model and scored; the models are the caller's.

    Every rank holds one and calls it alike. ``micro_batch_size`` sequences go through the model together, fewer where
    they would hold more than ``max_tokens`` tokens, padding included.
    """

    groups: Groups
    parallel: Parallel
    vocab_size: int  # rows of the output weight before padding
    pad_token: int
    micro_batch_size: int
    max_tokens: int | None = None
    temperature: float = 1.0
    impl: Impl = "auto"

    def build(self, model: Model, precision: str, where: str) -> Any:
        """A resident model on its device: no MTP, no gradient, in eval mode; its weights are still to be loaded.

        Raises :class:`ConfigurationError`, naming ``where``, when ``kernels.impl`` cannot take its output weight.
        """
        resolved = presets.resolve_precision(precision, self.groups.device)  # type: ignore[arg-type]
        built = student.build_model(model, self.parallel, self.groups, self.vocab_size, resolved, mtp=False)
        if self.groups.last_stage:
            check_impl(self.impl, built.get_parameter("output_layer.weight"), where)
        return built.eval().requires_grad_(False)

    def pack(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """This rank's sequences, in order, as micro-batches."""
        return [
            micro_batch
            for part in self._cut(rollouts)
            for micro_batch in batch.pack(part, len(part), self.pad_token, length_multiple=self.groups.tp_size)
        ]

    def even(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches on all data-parallel ranks, if empty ones, so that all run the same collectives."""
        return batch.even(micro_batches, self.pad_token, self.groups, self.parallel.dispatcher)

    def predictions(self, model: Any, micro_batch: MicroBatch, weight: OutputWeight | None = None) -> Predictions:
        """What ``model`` predicts at the completion tokens of ``micro_batch``, on the last pipeline stage.

        ``weight`` takes the place of the model's own output weight.
        """
        out = student.forward(model, micro_batch.tokens.to(self.groups.device))
        plain: Any = unwrap_model(model)
        hidden = student.gather_hidden(out.hidden, self.groups, plain.config)
        return Predictions(
            hidden[micro_batch.rows.to(hidden.device)],
            out.output_weight if weight is None else weight,
            temperature=self.temperature,
            group=self.groups.tp,
            valid_vocab=self.vocab_size,
            impl=self.impl,
        )

    @torch.no_grad()
    def logprobs(self, model: Any, micro_batches: Sequence[MicroBatch], weight: OutputWeight | None = None) -> Tensor:
        """fp32 ``[T]`` on the host: the completion tokens of all micro-batches, one after the other; none for none.

        Micro-batches follow one another through the pipeline stages, all of which get the values.
        """
        parts = pipeline.read_tokens(
            model, micro_batches, lambda mb: self.predictions(model, mb, weight).logprobs(mb.targets), self.groups
        )
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    def _cut(self, rollouts: Sequence[Rollout]) -> Iterator[Sequence[Rollout]]:
        start, longest = 0, 0
        for end, rollout in enumerate(rollouts):
            length = self.padded(len(rollout.prompt.tokens) + len(rollout.completion))
            size = end - start + 1
            full = self.max_tokens is not None and size * max(longest, length) > self.max_tokens
            if end > start and (full or size > self.micro_batch_size):
                yield rollouts[start:end]
                start, longest = end, 0
            longest = max(longest, length)
        if start < len(rollouts):
            yield rollouts[start:]

    def padded(self, length: int) -> int:
        """Positions that a sequence of ``length`` tokens takes, alone."""
        return -(-length // self.groups.tp_size) * self.groups.tp_size


def check_logprobs(logprobs: Tensor, who: str, what: str) -> None:
    """Raise :class:`ScoringError` for NaN, an infinity or a value above 1e-4, naming ``who`` gave it to which token of
    ``what``."""
    bad = ~(logprobs.isfinite() & (logprobs <= CERTAIN))
    if bad.any():
        position = int(bad.nonzero()[0, 0])
        raise ScoringError(
            f"{who} gives log-probability {float(logprobs[position])} to token {position} of {what};"
            " its weights are damaged or its precision too low"
        )
