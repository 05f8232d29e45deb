"""The world that draws: it follows the published policies and leaves each batch as a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_mopd import checkpoint, fake_quantization, in_flight, presets, student
from megatron_mopd.asynchrony import contract
from megatron_mopd.asynchrony.directory import DRAWN, Session
from megatron_mopd.asynchrony.waiting import on_first
from megatron_mopd.asynchrony.world import Job, World
from megatron_mopd.asynchrony.worlds_feed import ROLLOUT
from megatron_mopd.exchange import prepare
from megatron_mopd.records import Policy
from megatron_mopd.rollout import Sampler
from megatron_mopd.sources import RolloutSource
from megatron_mopd.tokenizer import build_tokenizer


class RolloutWorld(World):
    """Draws batch n under the policy that the configuration asks for; no optimizer, no MTP heads, no teachers.

    With ``asynchrony.deterministic`` that is the policy of step n - rollout.lag. Otherwise it is the newest one; a
    batch waits to be drawn until one of step n - rollout.lag or later is there, so none that is too old is ever drawn.
    """

    name = ROLLOUT

    def build(self) -> None:
        groups = self.groups
        config = self.config = prepare(self.config, groups)
        self.tokenizer = build_tokenizer(config.tokenizer)
        vocab_size, context = self.tokenizer.vocab_size, config.model.max_sequence_length
        self.precision = presets.resolve_precision(config.run.precision, groups.device)
        self.model = student.build_model(config.model, config.parallel, groups, vocab_size, self.precision, mtp=False)
        self.quantization = fake_quantization.of(config, self.model, groups)
        self.sampler = Sampler(self.model, groups, context, vocab_size, config.rollout.prefill_tokens)
        self.source = RolloutSource(config, groups, self.tokenizer, self.sampler)
        self._loaded: tuple[str, int] | None = None  # session and step of the policy whose weights are in the model

    @property
    def contract(self) -> Mapping[str, Any]:
        common = contract.common(self.config, self.tokenizer, self.precision)
        return common | contract.of_rollouts(self.config, self.source)

    def find(self, session: Session) -> Job | None:
        draw = max(self.exchange.draws(session, DRAWN), default=session.draw - 1) + 1
        oldest = max(session.step, draw - self.config.rollout.lag)
        if self.config.asynchrony.deterministic:
            there = self.exchange.published(session, oldest)
            return Job(session=session, draw=draw, step=oldest) if there else None
        newest = self.exchange.newest(session)
        return None if newest is None or newest < oldest else Job(session=session, draw=draw, step=newest)

    def work(self, job: Job) -> None:
        self.beacon.doing(f"drawing batch {job.draw} by the policy of step {job.step}")
        self.load(job.session, job.step)
        self.source.seek(job.draw)
        refresh = _Newer(self, job) if self.config.asynchrony.in_flight_updates else None
        rollouts = self.source.draw(Policy(**job.session.policy, step=job.step), refresh)
        batches = in_flight.gather([rollouts], self.groups)
        on_first(self.groups, lambda: self.exchange.write(job.session, DRAWN, job.draw, batches[0]))

    def load(self, session: Session, step: int) -> None:
        """Bring a published policy's weights into the model; all ranks call it."""
        if self._loaded == (session.id, step):
            return
        path = self.exchange.published(session, step) or self.exchange.policies(session) / str(step)
        self._loaded = None
        if self.quantization is None:
            checkpoint.load_weights(path, self.model, self.groups)
        else:
            with self.quantization.originals():
                checkpoint.load_weights(path, self.model, self.groups)
        self._loaded = (session.id, step)


class _Newer:
    """The newest published policy, taken over between two tokens: a :class:`megatron_mopd.rollout.Refresh`."""

    def __init__(self, world: RolloutWorld, job: Job) -> None:
        self.world, self.job, self.step = world, job, job.step

    def __call__(self) -> bool:
        world, session = self.world, self.job.session
        told = torch.tensor([self.step], device=world.groups.device)
        if world.groups.rank == 0:
            told[0] = world.exchange.newest(session) or self.step
        dist.broadcast(told, src=0, group=world.groups.world)
        newest = int(told)
        if newest <= self.step:
            return False
        world.load(session, newest)
        self.step = newest
        return True
