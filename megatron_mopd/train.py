"""Run one stage: ``torchrun --nproc_per_node=N -m megatron_mopd.train CONFIG.yaml [key=value ...]``.

The same command resumes a stage that was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mopd import display, parallel, presets
from megatron_mopd.config import Config, ConfigurationError, load_config
from megatron_mopd.files import atomically
from megatron_mopd.metrics import MetricsWriter
from megatron_mopd.parallel import Groups
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import Objective


def run_stage(config: Config, groups: Groups, objective: Objective | None = None, title: str | None = None) -> None:
    """Train to the last step (from a checkpoint where there is one) and leave what reports read in the run's directory.

    ``before.json`` and ``result.json`` hold :meth:`Trainer.measure` before the first and after the last step, the
    second also the evaluations on the way and the wall time.
    """
    start = time.perf_counter()
    trainer = Trainer(config, groups, objective)
    resumed = trainer.resume()
    if trainer.teachers is not None and trainer.held_out and not resumed:
        _leave(config.run.dir / "before.json", trainer.measure(config.evaluation.final_samples), groups)
    with (
        MetricsWriter(config.run.dir, enabled=groups.rank == 0, resume_step=trainer.step_index) as writer,
        display.StageProgress(title or config.run_id, config.run.steps, enabled=groups.rank == 0) as progress,
    ):

        def report(step: int, row: Mapping[str, float]) -> None:
            writer.write(step, row)
            progress.update(step, row)

        trainer.run(report)
    result = trainer.measure(config.evaluation.final_samples) if trainer.held_out else {}
    result |= {"history": trainer.history, "wall_s": time.perf_counter() - start}
    _leave(config.run.dir / "result.json", result, groups)


def _leave(path: Path, tree: Mapping[str, Any], groups: Groups) -> None:
    """Written whole or not at all, by the first rank."""
    if groups.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda file: file.write_text(json.dumps(tree) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as optimizer.lr=1e-4"
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        presets.check(config)
        groups = parallel.initialize(config.parallel, config.run.seed)
        display.setup_logging(groups.rank)
        run_stage(config, groups)
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        parallel.destroy()


if __name__ == "__main__":
    main()
