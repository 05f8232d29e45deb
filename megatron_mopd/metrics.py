"""What a step measured, and where it is written.

Names follow the families that users of other post-training systems know (``on_policy_distillation/adv_mean``,
``rollout/len``, ``token_mult_prob_error``), with the domain's name as the last part: ``reverse_kl_k1/algebra``.
Whatever depends on the clock is under ``time/``, so that two runs can be compared by everything else.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from megatron_mopd.files import WriteError, atomically, writing
from megatron_mopd.records import Rollout, ScoredRollout
from megatron_mopd.token_sums import SEQUENCE_SOURCES, TokenSums

if TYPE_CHECKING:
    from megatron_mopd.config import Config
    from megatron_mopd.update import StepOutput

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
TIME_PREFIX = "time/"


class MetricsWriter:
    """Writes rows to ``DIR/metrics.jsonl``, TensorBoard events to ``DIR/tensorboard`` and, where asked for, to W&B.

    A row is ``{"step": k, "time/unix": seconds, name: value, ...}``; a value that is not finite is ``null``. With
    ``resume_step = k`` rows beyond step k are dropped first, so the file of a resumed run equals the uninterrupted
    one's but for ``time/``; 0 starts afresh. W&B is used when it is installed and WANDB_API_KEY or WANDB_MODE is set.
    Only the rank with ``enabled`` writes. Raises :class:`files.WriteError` where the files cannot be opened.
    """

    def __init__(
        self, directory: Path | str, *, enabled: bool = True, resume_step: int = 0, run_id: str | None = None
    ) -> None:
        self.path = Path(directory) / FILE_NAME
        self._file = self._events = self._wandb = None
        if not enabled:
            return
        _drop_beyond(self.path, resume_step)
        with writing(self.path, "the rows of this run"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._events = _tensorboard(self.path.parent / "tensorboard", resume_step)
        self._wandb = _wandb(run_id or self.path.parent.resolve().name, self.path.parent)
        sinks = ["TensorBoard" if self._events else "", "W&B" if self._wandb else ""]
        log.info("metrics go to %s", ", ".join([str(self.path), *filter(None, sinks)]))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; on disk when the call returns, so a checkpoint saved afterwards never outruns its metrics.

        Raises :class:`files.WriteError` on a full disk or the like; half a row is dropped when the run goes on.
        """
        if self._file is None:
            return
        now = time()
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        row = {"step": step, f"{TIME_PREFIX}unix": now} | values
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._events is not None:
                for name, value in metrics.items():
                    self._events.add_scalar(name, float(value), step, walltime=now)
        except OSError as error:
            with suppress(OSError):  # what could not be written is tried once more when files are closed
                self.close()
            self._file = self._events = None
            raise WriteError(self.path, f"the row of step {step}", error) from None
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush and close every sink; may be called twice."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(directory: Path | str) -> list[dict[str, Any]]:
    """The rows of ``DIR/metrics.jsonl``; a last line cut short by a crash is left out.

    Raises FileNotFoundError, and ValueError (file and line) for a malformed line elsewhere.
    """
    path = Path(directory) / FILE_NAME
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never completed
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a row of metrics: {error}") from None
    return rows


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """``(step, value)`` of one metric wherever it was measured and finite."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what depends on the clock."""
    return {name: value for name, value in row.items() if not name.startswith(TIME_PREFIX)}


def _drop_beyond(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = read(path.parent)
    kept = [row for row in rows if step > 0 and row["step"] <= step]  # at 0 step 0 itself is measured again
    content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    atomically(path, lambda file: file.write_text(content, encoding="utf-8"), f"the rows up to step {step}")
    if len(kept) < len(rows):
        log.info("%s: dropped %d rows beyond step %d", path, len(rows) - len(kept), step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensorboard(directory: Path, resume_step: int) -> Any:
    if find_spec("tensorboard") is None:
        log.warning("tensorboard is not installed (pip install tensorboard): metrics go to %s alone", FILE_NAME)
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first rank needs it

    # purge_step hides the events of steps that a killed run had written and this one repeats.
    return SummaryWriter(str(directory), purge_step=resume_step + 1)


def _wandb(run_id: str, directory: Path) -> Any:
    wanted = [name for name in ("WANDB_API_KEY", "WANDB_MODE") if os.environ.get(name)]
    if not wanted or os.environ.get("WANDB_MODE") == "disabled":
        return None
    if find_spec("wandb") is None:
        log.warning("%s is set but wandb is not installed (pip install wandb): nothing goes to W&B", wanted[0])
        return None
    import wandb  # pyright: ignore[reportMissingImports]

    project = os.environ.get("WANDB_PROJECT", "megatron-mopd")
    return wandb.init(project=project, id=run_id, name=run_id, dir=str(directory), resume="allow")


def of_step(
    rollouts: Sequence[Rollout | ScoredRollout],
    outputs: Sequence[StepOutput],
    config: Config,
    group: dist.ProcessGroup | None,
) -> dict[str, float]:
    """The metrics of one step from this data-parallel rank's rollouts and update outputs.

    A collective of ``group``; equal on all its ranks. The names in ``per_token`` are those of the objective, so every
    rank has the same ones: each has at least one micro-batch, if an empty one.
    """
    micro_batches = [pair for output in outputs for pair in output.per_token]
    names = {name for _, per_token in micro_batches for name in per_token}
    device = next((t.device for _, per_token in micro_batches for t in per_token.values()), torch.device("cpu"))
    sums = TokenSums.zeros(
        _domains(config, rollouts, group),
        names | set(SEQUENCE_SOURCES),
        teachers={name: teacher.domains for name, teacher in config.teachers.items()},
        device=device,
    ).add_rollouts(rollouts)
    for micro_batch, per_token in micro_batches:
        sums = sums.add(per_token, micro_batch.cu_seqlens, micro_batch.domains)
    return sums.reduce(group)


def _domains(
    config: Config, rollouts: Sequence[Rollout | ScoredRollout], group: dist.ProcessGroup | None
) -> tuple[str, ...]:
    """All domains a stage can meet; asked of the other ranks only where the configuration cannot tell (JSONL data)."""
    replays = config.source.type == "traces" and config.source.others == "replay"  # domains that no teacher serves
    if config.teachers and not replays:
        return tuple(domain for teacher in config.teachers.values() for domain in teacher.domains)
    if all(source.type == "reasoning_gym" for source in config.data.train):
        return tuple(sorted({source.domain for source in config.data.train if source.type == "reasoning_gym"}))
    plain = [r.rollout if isinstance(r, ScoredRollout) else r for r in rollouts]
    found = [sorted({r.prompt.domain for r in plain})]
    if group is not None:
        found = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, sorted({r.prompt.domain for r in plain}), group=group)
    return tuple(sorted({domain for some in found for domain in some}))
