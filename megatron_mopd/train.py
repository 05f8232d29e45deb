"""Run one stage: ``torchrun --nproc_per_node=N -m megatron_mopd.train CONFIG.yaml [key=value ...]``.

The same command resumes a stage that was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from megatron_mopd import (
    checkpoint_directory,
    display,
    exchange,
    failures,
    origins,
    parallel,
    peak_memory,
    presets,
    run_record,
)
from megatron_mopd.asynchrony.signs import WorldError
from megatron_mopd.asynchrony.waiting import alive
from megatron_mopd.asynchrony.worlds_feed import of_training
from megatron_mopd.checkpoint import CheckpointError
from megatron_mopd.config import Config, ConfigurationError, load_config
from megatron_mopd.files import WriteError, atomically
from megatron_mopd.guards import GuardError
from megatron_mopd.metrics import MetricsWriter
from megatron_mopd.parallel import Groups
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.scoring import ScoringError
from megatron_mopd.shards import ShardError
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import LogprobLoss

PACKAGES = ("megatron-mopd", "megatron-core", "torch", "triton", "transformers", "reasoning-gym", "numpy")
"""Packages whose versions a result names."""

RUN_ERRORS = (
    ConfigurationError,
    ProvenanceError,
    ScoringError,
    GuardError,
    CheckpointError,
    WriteError,
    ShardError,
    FloatingPointError,
    WorldError,
)
"""What ends a run in a line that says what to do."""


def run_stage(config: Config, groups: Groups, objective: LogprobLoss | None = None, title: str | None = None) -> None:
    """Train to the last step (from a checkpoint where there is one) and leave what reports read in the run's directory.

    ``before.json`` and ``result.json`` hold :meth:`Trainer.measure` before the first and after the last step and the
    seconds it took (of a stage that boosts MTP heads, :meth:`Trainer.measure_acceptance`, and both after it), the
    first also :meth:`Trainer.measure_goals`, the second the evaluations on the way, the wall time, the peak of memory
    (of the last process of a stage that was stopped), the layout, the seed and the packages' versions.
    """
    peak_memory.restart(groups.device)
    trainer = _trained(config, groups, objective, title)
    result = _measured(trainer) if trainer.held_out else {}
    result |= {"history": trainer.history, "wall_s": trainer.wall_s, "parallel": config.parallel.model_dump()}
    result |= {"seed": config.run.seed, "versions": versions()} | peak_memory.peak(groups)
    result |= {"ended": _ended(config)}
    leave(config.run.dir / "result.json", result, groups)
    exchange.export(config, groups)


def _trained(config: Config, groups: Groups, objective: LogprobLoss | None, title: str | None) -> Trainer:
    """The trainer behind its last step."""
    beacon = of_training(config, groups)
    with alive(groups, beacon):  # from the start: models take longer to build than other worlds wait in silence
        trainer = Trainer(config, groups, objective, beacon)
        resumed = trainer.resume()
        if trainer.step_index < config.run.steps:
            exchange.check_export(config, trainer.companions)
        leave(config.run.dir / run_record.FILE, run_record.of(config, trainer.manifest()), groups)
        with trainer.feed:
            if trainer.held_out and not resumed and (before := _measured(trainer, before=True)):
                leave(config.run.dir / "before.json", before, groups)
            with (
                MetricsWriter(
                    config.run.dir, enabled=groups.rank == 0, resume_step=trainer.step_index, run_id=config.run_id
                ) as writer,
                display.StageProgress(title or config.run_id, config.run.steps, enabled=groups.rank == 0) as progress,
            ):

                def report(step: int, row: Mapping[str, float]) -> None:
                    writer.write(step, row)
                    progress.update(step, row)

                trainer.run(report)
    return trainer


def _ended(config: Config) -> dict[str, Any]:
    """Whose weights the run left; :func:`run_record.check_place` holds its checkpoints to it."""
    manifest = checkpoint_directory.read_manifest(config.run.dir / "checkpoints")
    return {name: manifest[name] for name in ("run_id", "step", "checkpoint_id")}


def _measured(trainer: Trainer, before: bool = False) -> dict[str, Any]:
    """What the weights are worth now, and ``measure_s``, the seconds it took to find out.

    Before the first step nothing is measured that the stage does not change or that another stage has measured.
    """
    start, measured = time.perf_counter(), {}
    if not before or trainer.teachers is not None:
        measured |= trainer.measure(trainer.config.evaluation.final_samples)
    measured |= trainer.measure_acceptance()  # of a stage that boosts MTP heads, which has no teachers
    if before:
        measured |= trainer.measure_goals(trainer.config.evaluation.final_samples)
    else:
        measured |= trainer.measure_teachers(trainer.config.evaluation.samples)
    return measured | {"measure_s": time.perf_counter() - start} if measured else {}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def leave(path: Path, tree: Mapping[str, Any], groups: Groups) -> None:
    """Written whole or not at all, by the first rank; raises :class:`files.WriteError`."""
    if groups.rank == 0:
        atomically(path, lambda file: file.write_text(json.dumps(tree) + "\n"))


@contextmanager
def reported() -> Iterator[None]:
    """Errors that a user can act on end the program in a line instead of a traceback, that of the first rank to fail.

    Process groups are taken down only after success: peers of a failed rank may be in a collective, and torchrun ends
    them.
    """
    try:
        yield
    except RUN_ERRORS as error:
        failures.end(error)
    except RuntimeError as error:
        failures.wait_if_peers_are_lost(error)
        raise
    parallel.destroy()


@record
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: optimizer.lr=1e-4")
    arguments = parser.parse_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        config = origins.resolved(load_config(arguments.config, arguments.overrides))
        presets.check(config)
        run_stage(config, parallel.initialize(config.parallel, config.run.seed))


if __name__ == "__main__":
    main()
