"""The demo's controls: runs in which distillation must fail, and a check that it does.

    torchrun --nproc_per_node=2 tools/demo_controls.py examples/demo.yaml

Run it after the demo, whose stages it starts from. Three runs beside the demo's own: (1) teachers rotated among the
domains, (2) learning rate 0, (3) advantages shuffled among the tokens of a micro-batch. Writes ``controls.json`` beside
the stages, prints a table, and ends with status 1 when a control does not come out as it must.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from megatron_mopd import display, evaluation, intervals, parallel, presets, report
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.files import atomically
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from megatron_mopd.runner import Recipe, Stage, load_recipe, run_unless_finished, stage_config
from megatron_mopd.settings import overlay
from megatron_mopd.train import reported
from megatron_mopd.update import LogprobLoss

TRUE_FALL = 0.10
"""Reverse KL to a domain's true specialist may fall, when another teaches, by at most this share of the demo's fall."""
RECOVERY = 0.10
"""Highest recovery of a run that cannot learn."""


def shuffled(config: Config) -> LogprobLoss:
    """Eq. 3 with each token's advantage taken from another token of its micro-batch; ratios and masks stay its own."""
    generator = torch.Generator().manual_seed(config.run.seed)

    def objective(logprobs: Tensor, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        assert micro_batch.teacher_logprobs is not None
        own = logprobs.detach().cpu() if micro_batch.prox_logprobs is None else micro_batch.prox_logprobs.cpu()
        advantage = micro_batch.teacher_logprobs.cpu() - own
        order = torch.randperm(len(advantage), generator=generator)
        moved = dataclasses.replace(micro_batch, teacher_logprobs=own + advantage[order])
        return mopd_loss(logprobs, moved, config.objective, counts)  # type: ignore[arg-type]

    return objective


def variants(recipe: Recipe) -> dict[str, Stage]:
    """The recipe's last stage, changed so that it must fail."""
    stage = recipe.stages[-1]
    names, domains = list(stage.teachers), list(stage.teachers.values())
    rotated = dict(zip(names, domains[1:] + domains[:1], strict=True))
    return {
        "rotated": stage.model_copy(update={"teachers": rotated}),
        "no_learning": stage.model_copy(update={"settings": overlay(stage.settings, {"optimizer": {"lr": 0.0}})}),
        "shuffled": stage,
    }


def run(recipe: Recipe, groups: parallel.Groups) -> dict[str, Config]:
    """Run the controls that have no result yet; returns their configurations."""
    configs = {}
    for name, stage in variants(recipe).items():
        config = stage_config(recipe, stage)
        directory = recipe.dir / "controls" / name
        configs[name] = config.model_copy(update={"run": config.run.model_copy(update={"dir": directory})})
        presets.check(configs[name])
        objective = shuffled(config) if name == "shuffled" else None
        run_unless_finished(configs[name], groups, f"control {name}", objective)
    return configs


def judge(recipe: Recipe, configs: Mapping[str, Config]) -> tuple[dict[str, Any], list[str]]:
    """``(controls.json, what failed)`` from the results of the demo and of its controls."""
    stage = recipe.stages[-1]
    true_teacher = {d: t for t, domains in stage.teachers.items() for d in domains}
    straight = _results(recipe.dir / stage.name)
    tree: dict[str, Any] = {}
    failures: list[str] = []
    for name, config in configs.items():
        before, after = _results(config.run.dir)
        given = {d: t for t, teacher in config.teachers.items() for d in teacher.domains}
        tree[name] = {}
        for domain, teacher in true_teacher.items():
            accuracy = [evaluation.from_json(r["accuracy"])[domain] for r in (before, after)]
            goal = evaluation.from_json(_read(recipe.dir / teacher / "result.json")["accuracy"])[domain]
            fall = _fall(before, after, teacher, domain)
            row = {
                "before": accuracy[0].rate,
                "after": accuracy[1].rate,
                "gain_interval": intervals.gain_interval(*accuracy),
                "recovery": intervals.recovery(accuracy[0].rate, accuracy[1].rate, goal.rate),
                "given_teacher": given[domain],
                "kl_fall_given": _fall(before, after, given[domain], domain),
                "kl_fall_true": fall,
                "kl_fall_true_of_demo": fall / _fall(*straight, teacher, domain),
            }
            tree[name][domain] = row
            failures += [f"{name}, {domain}: {problem}" for problem in _problems(name, row)]
    return tree, failures


def _problems(name: str, row: Mapping[str, Any]) -> list[str]:
    if name != "rotated":
        recovered = row["recovery"]
        return (
            [] if recovered is not None and recovered < RECOVERY else [f"recovery {recovered} is not below {RECOVERY}"]
        )
    problems = []
    if row["kl_fall_given"] <= 0:
        problems.append(f"reverse KL to the given teacher fell by {row['kl_fall_given']:.4f}, expected a fall")
    if row["kl_fall_true_of_demo"] >= TRUE_FALL:
        problems.append(
            f"reverse KL to the true specialist fell by {row['kl_fall_true_of_demo']:.1%} of the demo's fall"
        )
    if row["gain_interval"][0] > 0:
        problems.append(f"accuracy rose: interval {row['gain_interval']} lies above 0")
    return problems


def show(tree: Mapping[str, Any]) -> None:
    table = Table(title="Controls: distillation that must fail", title_justify="left")
    for heading in (
        "control",
        "domain",
        "taught by",
        "before",
        "after",
        "gain, 95%",
        "recovery",
        "KL fall, given",
        "KL fall, true / demo's",
    ):
        table.add_column(
            heading, justify="left" if heading in ("control", "domain", "taught by") else "right", no_wrap=True
        )
    for name, rows in tree.items():
        for domain, row in rows.items():
            low, high = row["gain_interval"]
            table.add_row(
                name,
                domain,
                row["given_teacher"],
                report.percent(row["before"]),
                report.percent(row["after"]),
                f"[{100 * low:+.1f}, {100 * high:+.1f}]",
                report.percent(row["recovery"]),
                f"{row['kl_fall_given']:+.4f}",
                f"{row['kl_fall_true_of_demo']:+.1%}",
            )
    display.console().print(table)


def _fall(before: Mapping[str, Any], after: Mapping[str, Any], teacher: str, domain: str) -> float:
    return before["reverse_kl"][teacher][domain] - after["reverse_kl"][teacher][domain]


def _results(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return _read(directory / "before.json"), _read(directory / "result.json")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: missing; run the demo first (make demo)")
    return json.loads(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    arguments = parser.parse_args()
    failures: list[str] = []
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        config = stage_config(recipe, recipe.stages[-1])
        _results(recipe.dir / recipe.stages[-1].name)
        groups = parallel.initialize(config.parallel, config.run.seed)
        configs = run(recipe, groups)
        if groups.rank == 0:
            tree, failures = judge(recipe, configs)
            text = json.dumps(tree, indent=2) + "\n"
            atomically(recipe.dir / "controls.json", lambda file: file.write_text(text))
            show(tree)
            for failure in failures:
                display.note(0, f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
