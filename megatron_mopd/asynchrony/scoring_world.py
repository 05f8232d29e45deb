"""The world that scores: it holds the teachers and turns each drawn shard into a scored one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mopd import in_flight, presets, together
from megatron_mopd.asynchrony import contract
from megatron_mopd.asynchrony.directory import DRAWN, SCORED, Session
from megatron_mopd.asynchrony.signs import Watch
from megatron_mopd.asynchrony.waiting import on_first
from megatron_mopd.asynchrony.world import Job, World
from megatron_mopd.asynchrony.worlds_feed import ROLLOUT, SCORING
from megatron_mopd.config import Config, ConfigurationError, Mopd
from megatron_mopd.exchange import prepare
from megatron_mopd.parallel import Groups
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import build_tokenizer


class ScoringWorld(World):
    """Scores batches in their order, whichever policy drew them; no student, no optimizer."""

    name = SCORING

    def __init__(self, config: Config, groups: Groups, training: Watch | None = None) -> None:
        super().__init__(config, groups, training)
        if not isinstance(config.objective, Mopd):
            raise ConfigurationError(
                f"objective.type = {config.objective.type}: nothing is scored by teachers, so training waits for no"
                " scoring world; start the rollout world alone"
            )
        self._watches = [self.training, Watch(self.exchange.root, ROLLOUT, config.asynchrony)]

    def build(self) -> None:
        self.config = prepare(self.config, self.groups)
        self.tokenizer = build_tokenizer(self.config.tokenizer)
        self.precision = presets.resolve_precision(self.config.run.precision, self.groups.device)
        self.teachers = TeacherPool(self.config, self.groups, self.tokenizer)

    @property
    def contract(self) -> Mapping[str, Any]:
        common = contract.common(self.config, self.tokenizer, self.precision)
        return common | contract.of_teachers(self.config, self.teachers)

    @property
    def watches(self) -> list[Watch]:
        return self._watches

    def find(self, session: Session) -> Job | None:
        scored = set(self.exchange.draws(session, SCORED))  # looked at first: clearing removes what was drawn first
        for draw in self.exchange.draws(session, DRAWN):
            if draw not in scored:
                return Job(session=session, draw=draw)
        return None

    def work(self, job: Job) -> None:
        self.beacon.doing(f"scoring batch {job.draw}")
        batch: list[in_flight.Item] = []
        together.work(self.groups, True, lambda report: batch.extend(self.exchange.read(job.session, DRAWN, job.draw)))
        share: list[Any] = in_flight.share(batch, self.groups.dp_rank, self.groups.dp_size)
        scored = self.teachers.score(share)
        whole = in_flight.gather([scored], self.groups)
        on_first(self.groups, lambda: self.exchange.write(job.session, SCORED, job.draw, whole[0]))
