"""Run one stage: ``torchrun --nproc_per_node=N -m megatron_mopd.train CONFIG.yaml [key=value ...]``.

The same command resumes a stage that was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mopd import display, exchange, origins, parallel, presets
from megatron_mopd.checkpoint import CheckpointError
from megatron_mopd.config import Config, ConfigurationError, load_config
from megatron_mopd.files import atomically
from megatron_mopd.metrics import MetricsWriter
from megatron_mopd.parallel import Groups
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.scoring import ScoringError
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import LogprobLoss

PACKAGES = ("megatron-mopd", "megatron-core", "torch", "triton", "transformers", "reasoning-gym", "numpy")
"""Packages whose versions a result names."""


def run_stage(config: Config, groups: Groups, objective: LogprobLoss | None = None, title: str | None = None) -> None:
    """Train to the last step (from a checkpoint where there is one) and leave what reports read in the run's directory.

    ``before.json`` and ``result.json`` hold :meth:`Trainer.measure` before the first and after the last step, the
    second also the evaluations on the way, the wall time, the layout and the packages' versions.
    """
    trainer = Trainer(config, groups, objective)
    resumed = trainer.resume()
    if trainer.step_index < config.run.steps:
        exchange.check_export(config, trainer.companions)
    if trainer.teachers is not None and trainer.held_out and not resumed:
        leave(config.run.dir / "before.json", trainer.measure(config.evaluation.final_samples), groups)
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
    result = trainer.measure(config.evaluation.final_samples) if trainer.held_out else {}
    result |= trainer.measure_teachers(config.evaluation.samples) if trainer.held_out else {}
    result |= {"history": trainer.history, "wall_s": trainer.wall_s, "parallel": config.parallel.model_dump()}
    result |= {"versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}}
    leave(config.run.dir / "result.json", result, groups)
    exchange.export(config, groups)


def leave(path: Path, tree: Mapping[str, Any], groups: Groups) -> None:
    """Written whole or not at all, by the first rank."""
    if groups.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda file: file.write_text(json.dumps(tree) + "\n"))


@contextmanager
def reported() -> Iterator[None]:
    """Errors that a user can act on end the program in a line instead of a traceback.

    Process groups are taken down only after success: peers of a failed rank may be in a collective, and torchrun ends
    them.
    """
    try:
        yield
    except (ConfigurationError, ProvenanceError, ScoringError, CheckpointError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    parallel.destroy()


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
