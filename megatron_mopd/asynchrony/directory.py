"""The directory that worlds share: who trains, the policies it publishes, and the shards of rollouts on their way.

``session.json`` names the training's current start, a folder of that name holds what belongs to it: ``policies/``
(checkpoints of weights alone), ``drawn/0000007/`` and ``scored/0000007/`` (one shard a batch: safetensors, JSON with
the sha256 of both). Everything is written once, under a hidden name, and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory, files, in_flight
from megatron_mopd.asynchrony.signs import WorldError, unwritable
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.in_flight import Item
from megatron_mopd.records import ScoredRollout

DRAWN, SCORED = "drawn", "scored"
_FOLDER = "session_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One start of the training world."""

    id: str
    life: str  # of the training world's signs
    step: int  # of the policy it started with
    draw: int  # the first batch it does not have yet
    policy: dict[str, Any]  # records.Policy but for its step
    contract: dict[str, Any]  # what all worlds must agree on


class Exchange:
    """The shared directory of a configuration."""

    def __init__(self, config: Config) -> None:
        self.root = config.asynchrony.directory or config.run.dir / "exchange"

    # ------------------------------------------------------------------ sessions

    def begin(self, life: str, step: int, draw: int, policy: dict[str, Any], contract: dict[str, Any]) -> Session:
        """A new session; those before it are cleared away. Raises :class:`WorldError` where it cannot be written."""
        session = Session(id=uuid.uuid4().hex, life=life, step=step, draw=draw, policy=policy, contract=contract)
        temporary = self.root / ".session.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            checkpoint_directory.write(temporary, json.dumps(asdict(session)).encode())
            temporary.replace(self.root / "session.json")
        except OSError as error:
            raise unwritable(self.root / "session.json", error) from None
        for old in self.root.glob(f"{_FOLDER}*"):
            if old != self.folder(session):  # a world that still writes there makes it again, for the next start
                shutil.rmtree(old, ignore_errors=True)
        return session

    def end(self, session: Session) -> None:
        """The training has finished, and nobody needs what is left."""
        shutil.rmtree(self.folder(session), ignore_errors=True)

    def folder(self, session: Session) -> Path:
        """What belongs to a session."""
        return self.root / f"{_FOLDER}{session.id}"

    def session(self) -> Session | None:
        """The current one; None before the first."""
        file = self.root / "session.json"
        if not file.is_file():
            return None
        return Session(**checkpoint_directory.read_json(file, "start the training again, which writes it anew"))

    # ------------------------------------------------------------------ policies

    def policies(self, session: Session) -> Path:
        """The root of the published policies, laid out as checkpoints are."""
        return self.folder(session) / "policies"

    def published(self, session: Session, step: int) -> Path | None:
        """The policy of a step, if it is there."""
        path = checkpoint_directory.place(self.policies(session), step)
        return path if checkpoint_directory.is_complete(path) else None

    def newest(self, session: Session) -> int | None:
        """Step of the newest published policy."""
        found = checkpoint_directory.latest(self.policies(session))
        return None if found is None else int(found.name.removeprefix("iter_"))

    # ------------------------------------------------------------------ shards

    def place(self, session: Session, kind: str, draw: int) -> Path:
        """Where a batch lies, in ``drawn`` or in ``scored``."""
        return self.folder(session) / kind / f"{draw:07d}"

    def draws(self, session: Session, kind: str) -> list[int]:
        """The batches that lie there, in order."""
        folder = self.folder(session) / kind
        try:
            return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        except FileNotFoundError:  # not begun yet, or just ended
            return []

    def write(self, session: Session, kind: str, draw: int, batch: Sequence[Item]) -> Path:
        """Publish a whole batch, in the order of the global batch; raises :class:`WorldError` on a full disk."""
        target = self.place(session, kind, draw)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        tensors, records = in_flight.pack([batch])
        contents = {in_flight.TENSORS: tensors, in_flight.RECORDS: in_flight.seal(tensors, records)}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in contents.items():
                checkpoint_directory.write(partial / name, content)
            partial.rename(target)
            checkpoint_directory.sync(target.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if target.is_dir():
                raise WorldError(
                    f"{target}: another process has written this batch: two worlds do the same work. End the processes"
                    " of one of them; a torchrun that was killed leaves its own behind"
                ) from None
            raise WorldError(
                f"{target}: the shard could not be written: {error}; {files.free(self.root)}. Nothing of it is left;"
                " make room or set asynchrony.directory to another place for all worlds, and start the same command"
                " again"
            ) from None
        return target

    def there(self, session: Session, kind: str, draw: int) -> bool | None:
        """True where the shard of a batch lies, None where it does not."""
        return self.place(session, kind, draw).is_dir() or None

    def read(self, session: Session, kind: str, draw: int) -> list[Item]:
        """The whole batch of a shard; raises :class:`ConfigurationError` for one that is damaged or in another's
        place."""
        path = self.place(session, kind, draw)
        way_out = (
            "Start the same command again (where worlds are started by hand: theirs too): training goes on behind its"
            " last checkpoint, what lies here is cleared and made anew"
        )
        try:
            (batch,) = in_flight.unpack(path, way_out)
            for item in batch:
                record = (item.rollout if isinstance(item, ScoredRollout) else item).provenance
                if record is None or record.draw != draw:
                    raise ConfigurationError(f"it holds rollouts of batch {record and record.draw}. {way_out}")
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: this shard is refused, nothing is learned from it: {error}") from None
        except ValueError as error:
            raise ConfigurationError(f"{path}: this shard is refused: it holds no batch ({error}). {way_out}") from None
        return batch

    def clear(self, session: Session, below: int) -> None:
        """Remove the shards of batches before ``below``, which have met their update."""
        for kind in (DRAWN, SCORED):  # in this order a batch that is drawn and not scored is one that is wanted
            for draw in self.draws(session, kind):
                if draw < below:
                    shutil.rmtree(self.place(session, kind, draw), ignore_errors=True)
