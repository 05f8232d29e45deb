"""The training world's side: it publishes its policy before each step and takes the batches that come scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from megatron_mopd import checkpoint, in_flight, presets, provenance, together
from megatron_mopd.asynchrony import contract
from megatron_mopd.asynchrony.directory import DRAWN, SCORED, Exchange, Session
from megatron_mopd.asynchrony.signs import Beacon, Watch
from megatron_mopd.asynchrony.waiting import alive, awaited, on_first
from megatron_mopd.config import Config
from megatron_mopd.in_flight import Item
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Policy, ScoredRollout
from megatron_mopd.sources import RolloutSource
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer
from megatron_mopd.update import Learner

TRAINING, ROLLOUT, SCORING = "training", "rollout", "scoring"


def of_training(config: Config, groups: Groups) -> Beacon:
    """The signs of a training's life; none where no other world waits for them."""
    enabled = groups.rank == 0 and config.asynchrony.mode == "worlds"
    return Beacon(Exchange(config).root, TRAINING, enabled)


class WorldsFeed:
    """A :class:`megatron_mopd.asynchrony.feed.Feed` of batches that other worlds draw and score.

    The policy of every step is published as a checkpoint of the weights alone, which any layout can read, and kept for
    as long as a batch that is still to be drawn may need it: ``rollout.lag`` steps and the newest.
    """

    def __init__(
        self,
        config: Config,
        groups: Groups,
        tokenizer: ChatTokenizer,
        teachers: TeacherPool | None,
        source: RolloutSource,
        learner: Learner,
        manifest: Callable[[], dict[str, Any]],
        beacon: Beacon | None,
    ) -> None:
        self.config, self.groups, self.source = config, groups, source
        self.learner, self.manifest = learner, manifest
        self.in_flight: deque[list[Item]] = deque()
        self.exchange = Exchange(config)
        self.kind = DRAWN if teachers is None else SCORED
        precision = presets.resolve_precision(config.run.precision, groups.device)
        self.contract = contract.common(config, tokenizer, precision) | contract.of_rollouts(config, source)
        partners = [ROLLOUT]
        if teachers is not None:
            self.contract |= contract.of_teachers(config, teachers)
            partners.append(SCORING)
        self.beacon = beacon or of_training(config, groups)
        self.watches = [Watch(self.exchange.root, name, config.asynchrony) for name in partners]
        self.session: Session | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(alive(self.groups, self.beacon))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None and self.session is not None and self.groups.rank == 0:
            self.exchange.end(self.session)

    def take(self, policy: Policy) -> list[Item]:
        self._publish(policy)
        if not self.in_flight:
            self.in_flight.append(self._receive(policy.step))
        self.beacon.doing(f"updating at step {policy.step}")
        return self.in_flight.popleft()

    def settle(self, policy: Policy) -> None:
        """With ``deterministic`` a checkpoint holds what an inline run's would: the batches of the next ``rollout.lag``
        steps, which are waited for. Otherwise what is here already."""
        if self.session is None:
            return
        if self.config.asynchrony.deterministic:
            while len(self.in_flight) < self.config.rollout.lag:
                self.in_flight.append(self._receive(policy.step + len(self.in_flight)))
        self.source.seek(policy.step + len(self.in_flight))

    def _publish(self, policy: Policy) -> None:
        if self.session is None:
            self.session = self._begin(policy)
        self.beacon.doing(f"publishing the policy of step {policy.step}")
        with self.learner.originals():
            checkpoint.save(
                self.exchange.policies(self.session),
                policy.step,
                self.learner.model,
                None,
                self.groups,
                state={},
                manifest=self.manifest(),
                keep=self.config.rollout.lag + 1,
                room=f"set asynchrony.directory to another place for all worlds, or lower rollout.lag"
                f" ({self.config.rollout.lag}), of which one more policies are kept",
            )

    def _begin(self, policy: Policy) -> Session:
        draw = policy.step + len(self.in_flight)
        whose = {name: value for name, value in asdict(policy).items() if name != "step"}
        return on_first(
            self.groups, lambda: self.exchange.begin(self.beacon.life, policy.step, draw, whose, self.contract)
        )

    def _receive(self, draw: int) -> list[Item]:
        """This rank's share of a batch, once it is there and whole; what was before it is cleared away."""
        assert self.session is not None
        session = self.session
        self.beacon.doing(f"waiting for batch {draw}")
        awaited(self.groups, lambda: self.exchange.there(session, self.kind, draw), self.watches)
        batch: list[Item] = []
        together.work(self.groups, True, lambda report: batch.extend(self.exchange.read(session, self.kind, draw)))
        if self.groups.rank == 0:
            self.exchange.clear(session, below=draw)
        if self.config.asynchrony.deterministic:
            self._check_exact(batch, draw, max(session.step, draw - self.config.rollout.lag))
        return in_flight.share(batch, self.groups.dp_rank, self.groups.dp_size)

    def _check_exact(self, batch: list[Item], draw: int, step: int) -> None:
        """That no newer policy has drawn it is no promise of :func:`provenance.check`, whose bound is the oldest."""
        for item in batch:
            record = (item.rollout if isinstance(item, ScoredRollout) else item).provenance
            if record is None or record.policy.step != step:
                raise provenance.ProvenanceError(
                    f"batch {draw}: drawn by {record and record.policy}, but asynchrony.deterministic = true promises"
                    f" the policy of step {step} (rollout.lag = {self.config.rollout.lag}); start the rollout world"
                    " with the training's configuration"
                )
