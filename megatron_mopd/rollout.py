"""Samples completions from the model that is being trained, with the log-probability of every sampled token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mopd import student
from megatron_mopd.config import ConfigurationError
from megatron_mopd.decoding import Decoder
from megatron_mopd.drawing import Head, row_keys, uniforms
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt, Rollout, Sampling

COMPACT_BELOW = 0.75  # finished rows are dropped once fewer than this share go on, since dropping copies the caches

Request = tuple[Prompt, int]  # a prompt and the number of the sample wanted


class Refresh(Protocol):
    """Newer weights for the model while it samples."""

    step: int
    """Of the policy whose weights the model holds."""

    def __call__(self) -> bool:
        """Take over the newest weights there are, and tell whether they are others; all ranks call it together."""
        ...


class Sampler:
    """Cached decoding over a (wrapped) model; its weights are read at each call, never copied."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        max_sequence_length: int,
        valid_vocab: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        """``max_sequence_length`` bounds prompt plus completion; ``valid_vocab`` is the vocabulary without padding;
        ``prefill_tokens`` of prompts, padding included, are read at once (None: the whole batch)."""
        self.model = cast(HybridModel, unwrap_model(model))
        self.groups = groups
        self.max_sequence_length, self.prefill_tokens = max_sequence_length, prefill_tokens
        self.valid_vocab = valid_vocab or self.model.vocab_size
        self.peers = Peers(groups)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        step: int,
        batch_size: int,
        refresh: Refresh | None = None,
    ) -> list[Rollout]:
        """One rollout per request of this data-parallel rank, in the order of the requests; tensors on the host.

        The noise of a token is a function of (seed, step, prompt id, sample, position) only. All ranks call this
        together: those that share experts run the same number of forwards, with rows of padding where they have fewer
        requests. Tensor and pipeline parallel ranks pass the same requests; ``batch_size`` sequences are decoded
        together. The last pipeline stage draws and tells the others.

        ``refresh`` is asked for newer weights after each token. The caches are kept as the former ones made them (as in
        the released configuration), and ``policy_steps`` of each rollout says which policy drew which token. All ranks
        then run as many forwards as the one that needs most.

        Raises :class:`ConfigurationError` for a prompt that leaves no room in the context and for top-p below 1, and
        FloatingPointError when the model's logits are not finite.
        """
        self.check(requests, sampling, batch_size)
        # Neighbours of equal length waste no padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0].tokens))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rollouts: dict[int, Rollout] = {}
        peers = self.peers if refresh is None else Peers(self.groups, everyone=True)
        with sampling_mode(self.model):
            draw = _Draw(self.model, self.groups, self.valid_vocab, sampling.temperature)
            decoder = Decoder(self.model, self.prefill_tokens)
            (count,) = peers.most(len(batches))
            for chosen in batches + [[]] * (count - len(batches)):
                batch = Batch.of([requests[i] for i in chosen], sampling, self.max_sequence_length, seed, step, peers)
                rollouts |= zip(chosen, batch.run(decoder, draw, sampling, refresh), strict=True)
        return [rollouts[i] for i in range(len(requests))]

    def check(self, requests: Sequence[Request], sampling: Sampling, batch_size: int) -> None:
        if sampling.top_p < 1:
            raise ConfigurationError(
                f"top_p = {sampling.top_p}: rollouts are drawn from the whole distribution, or their log-probabilities"
                " would not be the model's; set it to 1"
            )
        for name, value in (("max_new_tokens", sampling.max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"{name} = {value}: must be at least 1")
        if sampling.temperature < 0:
            raise ConfigurationError(f"temperature = {sampling.temperature}: must be 0 (greedy) or above")
        for prompt, _ in requests:
            if not 0 < len(prompt.tokens) < self.max_sequence_length:
                raise ConfigurationError(
                    f"prompt {prompt.id} ({prompt.domain}) has {len(prompt.tokens)} tokens, but"
                    f" model.max_sequence_length = {self.max_sequence_length} must hold it and at least one new token;"
                    " raise the limit or drop the prompt"
                )


class Peers:
    """The ranks that must run the same forwards because an expert layer's collectives join them."""

    def __init__(self, groups: Groups, everyone: bool = False) -> None:
        self.device = groups.device
        joined = groups.pg.tp_ep.size()  # ranks that hold the experts of one replica
        self.group: dist.ProcessGroup | None
        if everyone:
            self.group = groups.world
        elif groups.tp_size % joined == 0:
            self.group = None  # within one tensor parallel group, whose ranks have the same requests
        else:
            self.group = groups.pg.tp_ep if joined % groups.tp_size == 0 else groups.world

    def most(self, *values: int) -> list[int]:
        """The largest of each value among the peers."""
        if self.group is None:
            return list(values)
        shared = torch.tensor(values, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return shared.tolist()


class _Draw:
    """Draws on the last pipeline stage; all stages get the same."""

    def __init__(self, model: HybridModel, groups: Groups, valid_vocab: int, temperature: float) -> None:
        self.groups, self.temperature, self.head = groups, temperature, None
        self.model, self.valid_vocab = model, valid_vocab
        self.reread()

    def reread(self) -> None:
        """Draw under the weights that the model holds now."""
        if self.groups.last_stage:
            weight = self.model.output_layer.weight
            assert weight is not None
            self.head = Head(weight, self.groups.tp, self.valid_vocab)

    def __call__(self, hidden: Tensor | None, keys: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Tokens, int64 ``[b]``, and their fp32 log-probabilities, from ``hidden [b, H]`` of the last stage."""
        if self.head is None:
            told = torch.empty(2, len(keys), dtype=torch.float64, device=keys.device)
        else:
            assert hidden is not None
            noise = uniforms(keys, position) if self.temperature else None
            drawn, logprobs = self.head.draw(hidden, self.temperature, noise)
            if self.groups.pp_size == 1:
                return drawn, logprobs
            told = torch.stack([drawn.double(), logprobs.double()])  # fp64 holds token numbers exactly
        dist.broadcast(told, group=self.groups.pp, group_src=self.groups.pp_size - 1)
        return told[0].long(), told[1].float()


@dataclass(kw_only=True)
class Batch:
    """Rows decoded together; a slot is a row that still takes part in the forward."""

    requests: Sequence[Request]
    prompts: Tensor  # int64 [b, s], right-padded; rows beyond the requests are padding
    lengths: Tensor  # int64 [b]
    limits: Tensor  # int64 [b], most new tokens of each row; 0 for padding rows
    keys: Tensor  # int64 [b]
    tokens: Tensor  # int64 [new, b]
    logprobs: Tensor  # fp32 [new, b]
    counts: Tensor  # int64 [b], tokens of each row's completion
    stopped: Tensor  # bool [b], a stop token was drawn
    steps: Tensor  # int64 [new], of the policy that drew a position's tokens
    peers: Peers

    @classmethod
    def of(
        cls, requests: Sequence[Request], sampling: Sampling, context: int, seed: int, step: int, peers: Peers
    ) -> Batch:
        """Pad to the shape that the peers agree on: mcore's allgather dispatcher gathers equal shapes."""
        device = peers.device
        sizes = [len(prompt.tokens) for prompt, _ in requests]
        room = [min(sampling.max_new_tokens, context - size) for size in sizes]
        rows, width, new = peers.most(max(len(requests), 1), max(sizes, default=1), max(room, default=1))
        empty = rows - len(requests)
        prompts = [[*prompt.tokens, *[0] * (width - len(prompt.tokens))] for prompt, _ in requests]
        keys = row_keys(seed, step, requests, device)
        return cls(
            requests=requests,
            prompts=torch.tensor(prompts + [[0] * width] * empty, device=device),
            lengths=torch.tensor(sizes + [1] * empty, device=device),
            limits=torch.tensor(room + [0] * empty, device=device),
            keys=torch.cat([keys, keys.new_zeros(empty)]),
            tokens=torch.zeros(new, rows, dtype=torch.int64, device=device),
            logprobs=torch.zeros(new, rows, device=device),
            counts=torch.zeros(rows, dtype=torch.int64, device=device),
            stopped=torch.zeros(rows, dtype=torch.bool, device=device),
            steps=torch.zeros(new, dtype=torch.int64),
            peers=peers,
        )

    def run(self, decoder: Decoder, draw: _Draw, sampling: Sampling, refresh: Refresh | None) -> list[Rollout]:
        """Decode until every row of every peer has stopped or reached its limit."""
        new, rows = self.tokens.shape
        stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=self.tokens.device)
        slots = torch.arange(rows, device=self.tokens.device)
        alive = self.limits > 0
        hidden = decoder.prefill(self.prompts, self.lengths, new)
        for position in range(new):
            drawn, logprobs = draw(hidden, self.keys[slots], position)
            if refresh is not None:
                self.steps[position] = refresh.step
            # Finished rows write too: what lies beyond their count is never read.
            self.tokens[position, slots], self.logprobs[position, slots] = drawn, logprobs
            self.counts[slots] += alive
            stop = alive & torch.isin(drawn, stops)
            self.stopped[slots] |= stop
            alive = alive & ~stop & (self.limits[slots] > position + 1)
            (left,) = self.peers.most(int(alive.sum()))
            if left == 0:
                break
            if left < COMPACT_BELOW * len(slots):
                kept = alive.long().argsort(descending=True, stable=True)[:left]
                decoder.keep(kept)
                slots, alive, drawn = slots[kept], alive[kept], drawn[kept]
            if refresh is not None and refresh():
                decoder.reread()
                draw.reread()
            hidden = decoder.step(drawn)
        return self._rollouts(recorded=refresh is not None)

    def _rollouts(self, recorded: bool) -> list[Rollout]:
        tokens, logprobs = self.tokens.t().cpu(), self.logprobs.t().cpu()
        ends = zip(self.counts.tolist(), self.stopped.tolist(), strict=True)
        rollouts = []
        for row, ((prompt, sample), (count, stopped)) in enumerate(zip(self.requests, ends, strict=False)):
            behav = logprobs[row, :count].clone()
            if not behav.isfinite().all():
                raise FloatingPointError(
                    f"prompt {prompt.id}: the model's log-probabilities are not finite; its weights have diverged"
                )
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample=sample,
                    completion=tokens[row, :count].clone(),
                    finish="stop" if stopped else "length",
                    behav_logprobs=behav,
                    policy_steps=self.steps[:count].clone() if recorded else None,
                )
            )
        return rollouts


@contextmanager
def sampling_mode(model: HybridModel) -> Iterator[None]:
    """Eval mode without gradients and without sequence parallelism; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), student.sequence_parallel_off(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
