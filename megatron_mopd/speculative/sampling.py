"""Completions by speculative decoding: the MTP block drafts, the backbone reads the draft at once and keeps a part.

Each round reads ``draft + 1`` tokens of every row in one forward: the last token that stands and the drafted ones. The
backbone and the drafter remember them tentatively and are cut back, row by row, to what is accepted. Greedy completions
are those of plain greedy decoding, and sampled ones have the backbone's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.decoding import Decoder
from megatron_mopd.drawing import Head
from megatron_mopd.records import Prompt, Sampling
from megatron_mopd.rollout import COMPACT_BELOW, Batch, Request, Sampler, sampling_mode
from megatron_mopd.speculative.drafter import Drafter
from megatron_mopd.speculative.verification import Greedy, Sampled


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What speculative decoding made of one request."""

    prompt: Prompt
    tokens: Tensor  # int64 [n], the stop token included when one was drawn
    finish: Literal["stop", "length"]
    verifications: int  # forwards of the backbone over a draft

    @property
    def accepted(self) -> float | None:
        """Tokens per verification, the one behind the draft included. The completion's first token comes with the
        prompt's forward; what a verification gives beyond the completion's end does not count. None without any."""
        return (len(self.tokens) - 1) / self.verifications if self.verifications else None


class SpeculativeSampler:
    """Drafts of a fixed length over the model of a :class:`Sampler`; its weights are read at each call."""

    def __init__(self, sampler: Sampler, draft: int) -> None:
        """Raises :class:`ConfigurationError` for a draft without tokens."""
        if draft < 1:
            raise ConfigurationError(f"draft = {draft}: a draft has at least 1 token")
        self.sampler, self.draft = sampler, draft

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, seed: int, step: int, batch_size: int
    ) -> list[Completion]:
        """One completion per request of this data-parallel rank; arguments, errors and who calls it together are those
        of :meth:`Sampler.generate`, and so is what noise depends on."""
        sampler = self.sampler
        sampler.check(requests, sampling, batch_size)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0].tokens))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        done: dict[int, Completion] = {}
        with sampling_mode(sampler.model):
            (count,) = sampler.peers.most(len(batches))
            for chosen in batches + [[]] * (count - len(batches)):
                own = [requests[i] for i in chosen]
                batch = Batch.of(own, sampling, sampler.max_sequence_length, seed, step, sampler.peers)
                done |= zip(chosen, _Rows(batch, sampler, sampling, self.draft).run(), strict=True)
        return [done[i] for i in range(len(requests))]


class _Rows:
    """One batch on its way; slots are the rows that still take part in the forward."""

    def __init__(self, batch: Batch, sampler: Sampler, sampling: Sampling, draft: int) -> None:
        self.batch, self.groups, self.draft = batch, sampler.groups, draft
        device = batch.tokens.device
        self.stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=device)
        self.decoder, self.rule, self.drafter = Decoder(sampler.model, sampler.prefill_tokens), None, None
        if self.groups.last_stage:
            weight = sampler.model.output_layer.weight
            assert weight is not None
            head = Head(weight, self.groups.tp, sampler.valid_vocab)
            self.rule = Sampled(head, sampling.temperature) if sampling.temperature else Greedy(head)
            self.drafter = Drafter(sampler.model, sampler.prefill_tokens)
        self.slots = torch.arange(batch.tokens.shape[1], device=device)
        self.alive = batch.limits > 0
        self.verifications = torch.zeros_like(batch.counts)

    def run(self) -> list[Completion]:
        """Draft and verify until every row of every peer has stopped or reached its limit."""
        batch, room = self.batch, self.batch.tokens.shape[0] + self.draft + 1
        hidden = self.decoder.prefill_whole(batch.prompts, batch.lengths, room)
        if hidden is not None:
            assert self.drafter is not None
            self.drafter.prefill(batch.prompts, hidden, batch.lengths, room)
            hidden = hidden[batch.lengths - 1, self.slots].unsqueeze(0)
        last = self._first(hidden)
        self._write(last.unsqueeze(1), torch.ones_like(last))
        counts, following = self.alive.long(), last.unsqueeze(1)
        while left := batch.peers.most(int(self.alive.sum()))[0]:
            if left < COMPACT_BELOW * len(self.slots):
                kept = self.alive.long().argsort(descending=True, stable=True)[:left]
                self._keep(kept)
                counts, following, last = counts[kept], following[kept], last[kept]
                hidden = None if hidden is None else hidden[:, kept]
            drafted = self._drafted(hidden, following, counts)
            hidden = self.decoder.extend(torch.cat([last.unsqueeze(1), drafted], dim=1))
            accepted, last = self._verified(hidden, drafted)
            following = torch.cat([drafted, last.unsqueeze(1)], dim=1)
            following.scatter_(1, accepted.unsqueeze(1), last.unsqueeze(1))
            self.verifications[self.slots] += self.alive
            self._write(following, accepted + 1)
            counts = (accepted + 1) * self.alive  # a row that is done stays as it was, within the room made for it
            self.decoder.settle(counts)
        return self._completions()

    def _first(self, hidden: Tensor | None) -> Tensor:
        keys, first = self.batch.keys, torch.empty_like(self.slots)
        if hidden is not None:
            assert self.rule is not None
            first = self.rule.first(hidden[0], keys)
        return self._told(first)

    def _drafted(self, hidden: Tensor | None, following: Tensor, counts: Tensor) -> Tensor:
        """``[b, draft]``, on all stages; ``hidden [n, b, H]`` and ``following [b, n]`` as :meth:`Drafter.draft`."""
        keys, done = self.batch.keys[self.slots], self.batch.counts[self.slots]
        drafted = torch.empty(len(keys), self.draft, dtype=torch.int64, device=keys.device)
        if hidden is not None:
            assert self.drafter is not None
            rule = self.rule
            assert rule is not None
            drafted = self.drafter.draft(
                hidden, following, counts, self.draft, lambda state, place: rule.pick(state, place, keys, done)
            )
        return self._told(drafted)

    def _verified(self, hidden: Tensor | None, drafted: Tensor) -> tuple[Tensor, Tensor]:
        keys, done = self.batch.keys[self.slots], self.batch.counts[self.slots]
        found = torch.empty(2, len(keys), dtype=torch.int64, device=keys.device)
        if hidden is not None:
            assert self.rule is not None
            found = torch.stack(self.rule.verify(hidden, drafted, keys, done))
        accepted, last = self._told(found)
        return accepted, last

    def _told(self, values: Tensor) -> Tensor:
        """The last stage's ``values`` on all stages."""
        if self.groups.pp_size > 1:
            dist.broadcast(values, group=self.groups.pp, group_src=self.groups.pp_size - 1)
        return values

    def _write(self, tokens: Tensor, counts: Tensor) -> None:
        """Append each living row's first ``counts [b]`` of ``tokens [b, n]``, up to a stop token or its limit."""
        batch, places = self.batch, torch.arange(tokens.shape[1], device=tokens.device)
        stop = torch.isin(tokens, self.stops) & (places < counts.unsqueeze(1))
        length = torch.where(stop.any(1), stop.long().argmax(1) + 1, counts)
        done, limits = batch.counts[self.slots], batch.limits[self.slots]
        length = torch.minimum(length, limits - done) * self.alive
        row, place = (places < length.unsqueeze(1)).nonzero(as_tuple=True)
        batch.tokens[done[row] + place, self.slots[row]] = tokens[row, place]
        batch.counts[self.slots] += length
        stopped = self.alive & (stop & (places < length.unsqueeze(1))).any(1)
        batch.stopped[self.slots] |= stopped
        self.alive = self.alive & ~stopped & (batch.counts[self.slots] < limits)

    def _keep(self, kept: Tensor) -> None:
        self.decoder.keep(kept)
        if self.drafter is not None:
            self.drafter.keep(kept)
        self.slots, self.alive = self.slots[kept], self.alive[kept]

    def _completions(self) -> list[Completion]:
        tokens, rounds = self.batch.tokens.t().cpu(), self.verifications.tolist()
        ends = zip(self.batch.counts.tolist(), self.batch.stopped.tolist(), strict=True)
        return [
            Completion(
                prompt=prompt,
                tokens=tokens[row, :count].clone(),
                finish="stop" if stopped else "length",
                verifications=rounds[row],
            )
            for row, ((prompt, _), (count, stopped)) in enumerate(zip(self.batch.requests, ends, strict=False))
        ]
