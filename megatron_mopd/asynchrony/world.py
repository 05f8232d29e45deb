"""What worlds beside the training have in common: they follow its session, job by job, until it ends."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mopd.asynchrony import contract
from megatron_mopd.asynchrony.directory import Exchange, Session
from megatron_mopd.asynchrony.signs import Beacon, Watch, WorldError
from megatron_mopd.asynchrony.waiting import alive, awaited
from megatron_mopd.asynchrony.worlds_feed import TRAINING
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.parallel import Groups

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One batch to work on."""

    session: Session
    draw: int
    step: int = -1  # of the policy that draws it, where that is still to be done


class World(ABC):
    """A world beside the training; every rank has one and calls :meth:`run`.

    It keeps nothing: what to do next follows from what lies in the shared directory, so a world that was killed and
    started again goes on where the others are, and a training that goes back to its last checkpoint is followed there.
    """

    name: str

    def __init__(self, config: Config, groups: Groups, training: Watch | None = None) -> None:
        """``training`` is the watch of who has waited for it already; a new one when left out."""
        if config.asynchrony.mode != "worlds":
            raise ConfigurationError(
                f"asynchrony.mode = {config.asynchrony.mode}: the training draws and scores by itself and waits for no"
                " other world; set mode to worlds in the file that all of them read"
            )
        self.config, self.groups = config, groups
        self.exchange = Exchange(config)
        self.beacon = Beacon(self.exchange.root, self.name, enabled=groups.rank == 0)
        self.training = training or Watch(self.exchange.root, TRAINING, config.asynchrony)
        self.session: Session | None = None

    @abstractmethod
    def build(self) -> None:
        """Load what the work needs; every rank calls it. That may take long, so the world gives signs meanwhile."""

    @property
    @abstractmethod
    def contract(self) -> Mapping[str, Any]:
        """What must be as in the training world."""

    @property
    def watches(self) -> list[Watch]:
        """The worlds whose work this one needs."""
        return [self.training]

    @abstractmethod
    def find(self, session: Session) -> Job | None:
        """On the first rank: what can be done now."""

    @abstractmethod
    def work(self, job: Job) -> None:
        """Do it and leave the shard; every rank calls it."""

    def run(self) -> None:
        """Work until the training has finished; raises :class:`WorldError` when a partner is gone."""
        with alive(self.groups, self.beacon):
            self.build()
            while self._go_on():
                pass
        log.info("the training has finished; so has the %s world", self.name)

    def _go_on(self) -> bool:
        """One job; False when there will be none."""
        self.beacon.doing("waiting for work")
        try:
            job: Job | str = awaited(self.groups, self._look, self.watches)
            if isinstance(job, str):
                return False
            if self.session is None or self.session.id != job.session.id:
                contract.compare(self.exchange, job.session, self.contract)
                self.session = job.session
            self.work(job)
        except (WorldError, ConfigurationError) as error:
            if awaited(self.groups, self._left, []) == "stays":
                raise
            log.info("the training has left this session, so what was lost is of no use any more: %s", error)
        return True

    def _look(self) -> Job | str | None:
        if self.training.finished:
            return "finished"
        session = self.exchange.session()
        # The session of a training that has ended, or of one that is starting again, is of the past.
        return self.find(session) if session is not None and session.life == self.training.life else None

    def _left(self) -> str:
        """Whether the training has left the session behind, by its end or by another start, or ``stays``."""
        if self.training.finished:
            return "finished"
        life, session = self.training.life, self.exchange.session()
        if self.session is None or session is None or life is None:
            return "stays"
        return "began anew" if life != self.session.life or session.id != self.session.id else "stays"
