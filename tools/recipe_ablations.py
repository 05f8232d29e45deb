"""What a finished recipe's warm-up and MTP boosting are worth: `make recipe-ablations`, outside the recipe's own time.

    torchrun --nproc_per_node=2 tools/recipe_ablations.py examples/recipe.yaml [--only NAME] [[STAGE:]key=value ...]

warm_up: the first MOPD iteration once more with the same settings, from the student that was not warmed up; compared on
the domains whose teachers the pre-flight sent to the warm-up, as in Table 4 of the Nemotron 3 Ultra report.
mtp_boosting: the boosting stage with further seeds; its own seed in the recipe is the first run.

Runs and results go to DIR/ablations, where the recipe's report reads them; megatron_mopd.recipe.measurements says how.
The same command goes on where a stopped one was and keeps what is finished and unchanged. tools/staleness.py writes the
third file, on asynchrony. @FILE stands for the words in a file, as on the recipe's own command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mopd import display, intervals, origins, parallel, presets, report
from megatron_mopd.asynchrony_config import Asynchrony
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.recipe import ablations, anew
from megatron_mopd.recipe.ablations import FOLDER
from megatron_mopd.recipe.schema import Recipe, Roles, Stage, in_need, load_recipe, stage_config, starts_from
from megatron_mopd.recipe.words import Parser
from megatron_mopd.runner import run_unless_finished
from megatron_mopd.train import leave, reported

ARMS = ("before", "without", "with", "teacher")
"""Students, and the teacher, whose answers the warm-up is judged by."""


def roles_of(recipe: Recipe) -> Roles:
    """Raises :class:`ConfigurationError` for a recipe that does not say which stages are what."""
    if recipe.report is None:
        raise ConfigurationError("report: the recipe names no roles, so nothing says what to vary; add the section")
    return recipe.report


def result(recipe: Recipe, stage: str, file: str = "result.json") -> dict[str, Any]:
    """What a finished stage left. Raises :class:`ConfigurationError` where the recipe did not come so far."""
    return _read(recipe.dir / stage / file)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: missing; run the recipe first (make recipe)")
    return json.loads(path.read_text())


def varied(recipe: Recipe, stage: Stage, folder: str, seed: int | None = None) -> Config:
    """A stage's configuration in a directory of its own under ``DIR/ablations``; with ``seed``, drawn anew by it.

    Rollouts are drawn inline whatever the recipe's stage does: no worlds run beside an ablation.
    """
    config = origins.resolved(stage_config(recipe, stage)).model_copy(update={"asynchrony": Asynchrony()})
    changes = {"dir": recipe.dir / FOLDER / folder} | ({} if seed is None else {"seed": seed})
    config = config.model_copy(update={"run": config.run.model_copy(update=changes)})
    if seed is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"shuffle_seed": seed})})
    return config


# ------------------------------------------------------------------ warm-up


def warm_up(recipe: Recipe, groups: parallel.Groups, arguments: argparse.Namespace) -> None:
    """Run MOPD 1 without the warm-up before it and write ``warm_up.json``."""
    roles = roles_of(recipe)
    warm, iteration = warmed(recipe)
    needed = in_need(recipe, warm) or []
    if not needed:
        display.note(groups.rank, f"warm-up: {warm.name} was for no teacher, so there is none to weigh")
        return
    results = {"before": result(recipe, roles.before), "with": result(recipe, iteration.name)}
    goals = {name: result(recipe, name) for name in needed if name in recipe.names}
    if len(goals) < len(needed):  # the others came as checkpoints
        goals = result(recipe, iteration.name, "before.json")["teachers"] | goals
    assert warm.initial is not None, "a warm-up has an initial"
    weights = ablations.weights_of(
        recipe, [roles.before, starts_from(recipe, warm.initial), iteration.name, *served_by(recipe, iteration)]
    )
    config = varied(recipe, iteration.model_copy(update={"initial": warm.initial}), "warm_up/without")
    presets.check(config)
    run_unless_finished(config, groups, "without warm-up")
    results["without"] = _read(config.run.dir / "result.json")
    tree = compared(results, goals, {name: config.teachers[name].domains for name in needed})
    leave(recipe.dir / FOLDER / "warm_up.json", {"weights": weights, "domains": tree}, groups)
    if groups.rank == 0:
        show_warm_up(tree)


def warmed(recipe: Recipe) -> tuple[Stage, Stage]:
    """The warm-up and the MOPD iteration that starts from it."""
    if (found := ablations.warmed(recipe)) is None:
        raise ConfigurationError(
            "stages: no MOPD iteration starts from a warm-up (a stage with `after`), so there is none to leave out; add"
            " one, or name the other ablation by --only"
        )
    return found


def served_by(recipe: Recipe, stage: Stage) -> list[str]:
    """The stages of the recipe that teach one of them."""
    return [starts_from(recipe, name) for name in stage.teachers]


def compared(
    results: Mapping[str, Mapping[str, Any]],
    goals: Mapping[str, Mapping[str, Any]],
    domains_of: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """``{domain: {"teacher": name, "answers": {arm: "0110..."}}}``; the prompts of all must be the same."""
    tree: dict[str, Any] = {}
    for teacher, domains in domains_of.items():
        arms = {**results, "teacher": goals[teacher]}
        for domain in domains:
            read = {arm: arms[arm]["prompts"][domain] for arm in ARMS}
            if odd := [arm for arm in ARMS if read[arm] != read["before"]]:
                raise ConfigurationError(
                    f"domain {domain!r}: '{odd[0]}' answered other prompts than 'before'; run the recipe anew with one"
                    " data.held_out and one evaluation.final_samples for all stages"
                )
            tree[domain] = {"teacher": teacher, "answers": {arm: arms[arm]["answers"][domain] for arm in ARMS}}
    return tree


def show_warm_up(tree: Mapping[str, Any]) -> None:
    table = Table(title="MOPD 1 with and without warm-up", title_justify="left")
    for heading in ("domain", *ARMS, "recovery without", "with", "gain in points, 95%"):
        table.add_column(heading, justify="left" if heading == "domain" else "right", no_wrap=True)
    for domain, row in tree.items():
        marks = row["answers"]
        rate = {arm: marks[arm].count("1") / len(marks[arm]) for arm in ARMS}
        share = {arm: intervals.recovery(rate["before"], rate[arm], rate["teacher"]) for arm in ("without", "with")}
        bounds = intervals.recovery_gain(*(marks[arm] for arm in ARMS))
        gain = "" if bounds is None else f"[{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]"
        table.add_row(
            domain,
            *(report.percent(rate[arm]) for arm in ARMS),
            *(report.percent(share[arm]) for arm in ("without", "with")),
            gain,
        )
    display.console().print(table)


# ------------------------------------------------------------------ MTP boosting


def mtp_boosting(recipe: Recipe, groups: parallel.Groups, arguments: argparse.Namespace) -> None:
    """Boost again with further seeds and write ``mtp_boosting.json``; the recipe's own stage is its first run."""
    name = roles_of(recipe).boosted
    if name is None:
        raise ConfigurationError("report.boosted: the recipe names no boosting stage; name it there")
    stage = recipe.stage(name, "report.boosted")
    first = stage_config(recipe, stage).run.seed
    start = name if stage.initial is None else starts_from(recipe, stage.initial)
    runs = [acceptance(first, recipe.dir / name) | {"weights": ablations.weights_of(recipe, [start, name])}]
    for seed in range(first + 1, first + arguments.seeds):
        config = varied(recipe, stage, f"mtp_boosting/seed_{seed}", seed)
        presets.check(config)
        run_unless_finished(config, groups, f"boosting, seed {seed}")
        runs.append(acceptance(seed, config.run.dir) | {"weights": ablations.weights_of(recipe, [start])})
    leave(recipe.dir / FOLDER / "mtp_boosting.json", {"runs": runs}, groups)
    if groups.rank == 0:
        show_boosting(runs)


def acceptance(seed: int, directory: Path) -> dict[str, Any]:
    """Acceptance lengths before and after one boosting run."""
    files = {"before": directory / "before.json", "after": directory / "result.json"}
    return {"seed": seed} | {when: _read(path)["acceptance"] for when, path in files.items()}


def show_boosting(runs: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Tokens accepted per verification, before and after boosting", title_justify="left")
    for heading in ("draft", "sampling", *(f"seed {run['seed']}" for run in runs), "gain, 95% over seeds"):
        table.add_column(heading, justify="left" if heading in ("draft", "sampling") else "right", no_wrap=True)
    for draft, modes in runs[0]["before"].items():
        for mode in modes:
            pairs = [tuple(run[when][draft][mode]["length"] for when in ("before", "after")) for run in runs]
            # A run of which no completion was long enough has no length.
            bounds = intervals.mean_interval([after - before for before, after in pairs if None not in (before, after)])
            gain = "" if bounds is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
            cells = (" → ".join("n/a" if length is None else f"{length:.3f}" for length in pair) for pair in pairs)
            table.add_row(draft.replace("_", " "), mode.replace("_", " "), *cells, gain)
    display.console().print(table)


ABLATIONS: dict[str, Callable[[Recipe, parallel.Groups, argparse.Namespace], None]] = {
    "warm_up": warm_up,
    "mtp_boosting": mtp_boosting,
}


def parser() -> argparse.ArgumentParser:
    made = Parser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("recipe", type=Path)
    made.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value", help="those the recipe was run with")
    made.add_argument("--only", choices=sorted(ABLATIONS), help="leave the other one out")
    made.add_argument("--seeds", type=int, default=3, help="of MTP boosting, the recipe's own included")
    return made


def main() -> int:
    arguments = parser().parse_intermixed_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        config = stage_config(recipe, recipe.stages[0])
        groups = parallel.initialize(config.parallel, config.run.seed)
        with anew.alone(recipe.dir) if groups.rank == 0 else nullcontext():
            for name, work in ABLATIONS.items():
                if arguments.only in (None, name):
                    work(recipe, groups, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
