"""What the age of rollouts costs, with and without the correction of Eq. 3: short MOPD runs for several lags and seeds.

    python tools/staleness.py examples/recipe.yaml [--stage mopd1] [--steps 80] [--processes 2] [[STAGE:]key=value ...]

Run it after the recipe, whose student and teachers it takes; the recipe's own stages are only read. Lag 0 is on-policy;
at lag n the rollouts of a step are n steps old. Runs are trained in two forms: *corrected* is Eq. 3 as the stage has
it, *uncorrected* learns from every rollout as if it were new. Beside recovery it measures, in the middle of each
corrected run, the cosine of each form's gradient to the on-policy gradient, of ``--probe`` sequences each, and that of
*recomputed*, which takes from Eq. 3 the advantage alone; megatron_mopd.gradient_probe says how. At lag 0 the cosine is
that of two on-policy gradients: how much of it is noise.

What age costs is decided by how far the policy moves meanwhile, so by ``--lr``. At its default eight steps leave nearly
every token within IcePop's bounds; where they do not, the mask takes away just the tokens that move the most, and
with them the direction of the gradient.

Writes ``ablations/staleness.json`` and ``.png`` in the recipe's directory and prints a table. Runs that are finished
are kept, so a stopped program goes on. Ends with status 1 when a corrected lag recovers less than lag 0 by more than
the seeds' spread, or when the corrected gradient is not closer than the uncorrected one at the largest lag.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from megatron_mopd import (
    checkpoint,
    checkpoint_directory,
    display,
    evaluation,
    gradient_probe,
    intervals,
    parallel,
    plots,
    presets,
)
from megatron_mopd.config import Config, ConfigurationError, Mopd
from megatron_mopd.files import atomically
from megatron_mopd.guard_config import Guards
from megatron_mopd.palette import domain_colours
from megatron_mopd.plot_parts import FAINT, INK, tidy
from megatron_mopd.recipe import ablations, anew
from megatron_mopd.recipe.schema import Recipe, load_recipe, stage_config, starts_from, teachers_of
from megatron_mopd.recipe.words import Parser
from megatron_mopd.settings import overlay
from megatron_mopd.train import reported
from megatron_mopd.trainer import Trainer

LAGS, SEEDS = (0, 1, 4, 8), 3
NAME = "staleness"
TRAINED = ("corrected", "uncorrected")
"""Forms that runs are trained in; those of :data:`megatron_mopd.gradient_probe.FORMS` are probed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One run."""

    lag: int
    form: str
    seed: int

    @property
    def name(self) -> str:
        return f"lag{self.lag}_{self.form}_seed{self.seed}"


def variants(lags: Sequence[int], seeds: int, of: Iterable[str] = TRAINED) -> list[Variant]:
    """Every lag in all forms but 0, where they are one: nothing is old. The longest come first."""
    return [
        Variant(lag=lag, form=form, seed=seed)
        for lag in sorted(lags, reverse=True)
        for form in forms(lag, of)
        for seed in range(seeds)
    ]


def forms(lag: int, of: Iterable[str]) -> tuple[str, ...]:
    """At lag 0 all are one."""
    return tuple(of) if lag else ("corrected",)


# --------------------------------------------------------------------------- one run


def configuration(recipe: Recipe, variant: Variant, options: argparse.Namespace) -> Config:
    """The stage, shortened, with rollouts of the variant's age, at a constant learning rate."""
    stage = recipe.stage(options.stage, "--stage")
    directory = recipe.dir / ablations.FOLDER / NAME / variant.name
    short = {
        "run": {"steps": options.steps, "seed": variant.seed, "id": variant.name},
        "rollout": {"lag": variant.lag, "prompts_per_step": options.prompts, "shards": 0},
        "asynchrony": {"mode": "inline", "deterministic": True, "in_flight_updates": False},
        "optimizer": {"lr": options.lr, "warmup_steps": options.steps // 10, "decay": "constant"},
        "evaluation": {"every": 0, "final_samples": options.samples},
        "checkpoint": {"every": 0, "export": "none"},
        "data": {"shuffle_seed": variant.seed},
    }
    config = stage_config(recipe, stage.model_copy(update={"settings": overlay(stage.settings, short)}))
    config = config.model_copy(update={"guards": Guards()})  # none may take old rollouts out of what is compared
    if not isinstance(config.objective, Mopd):
        raise ConfigurationError(f"--stage {stage.name}: its objective is {config.objective.type}; name a MOPD stage")
    if config.objective.minibatches > 1:
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"minibatches": 1})})
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": directory})})


def run(config: Config, variant: Variant, groups: parallel.Groups, options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and probe; what the run's ``staleness.json`` holds."""
    settings = config.objective
    assert isinstance(settings, Mopd)
    corrected = variant.form == "corrected"
    trainer = Trainer(config, groups, None if corrected else gradient_probe.FORMS[variant.form](settings))
    before = accuracy(trainer, options.samples)
    policies, middle = config.run.dir / "policies", options.steps // 2
    old, new = (checkpoint_directory.place(policies, step) for step in (middle - variant.lag, middle))
    if groups.rank == 0:
        shutil.rmtree(policies, ignore_errors=True)  # of a run that was stopped
    while trainer.step_index < options.steps:
        if corrected and trainer.step_index in {middle - variant.lag, middle}:
            model, manifest = trainer.learner.model, trainer.manifest()
            with trainer.learner.originals():
                checkpoint.save(policies, trainer.step_index, model, None, groups, state={}, manifest=manifest, keep=2)
        trainer.step()
    after = accuracy(trainer, options.samples)
    found: dict[str, Any] = {"before": before, "after": after, "wall_s": trainer.wall_s}
    if corrected:
        found["cosine"] = dict(gradient_probe.cosines(trainer, old, new, options.probe))
        shutil.rmtree(policies)
    return found


def accuracy(trainer: Trainer, samples: int) -> dict[str, float]:
    """Greedy, on the first ``samples`` held-out prompts of each domain that a teacher serves."""
    domains = {domain for teacher in trainer.config.teachers.values() for domain in teacher.domains}
    prompts = [p for p in evaluation.held_out(trainer.held_out, samples) if p.domain in domains]
    return {domain: _share(marks) for domain, marks in trainer.answers(prompts).items()}


# --------------------------------------------------------------------------- all of them


def work(recipe: Recipe, options: argparse.Namespace) -> None:
    """This process's share of the runs, those that are finished left out."""
    number, count = options.share
    for variant in variants(options.lags, options.seeds)[number::count]:
        config = configuration(recipe, variant, options)
        file, key = config.run.dir / f"{NAME}.json", fingerprint(config, options)
        if file.is_file() and json.loads(file.read_text())["fingerprint"] == key:
            continue
        presets.check(config)
        groups = parallel.initialize(config.parallel, variant.seed)
        found = run(config, variant, groups, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = {"fingerprint": key, **dataclasses.asdict(variant), **found}
        atomically(file, lambda path, tree=tree: path.write_text(json.dumps(tree) + "\n"))
        display.note(0, f"{variant.name}: {found['wall_s']:.0f} s")


def fingerprint(config: Config, options: argparse.Namespace) -> str:
    """sha256 of what a run's numbers depend on."""
    starts = [config.model.initial, *(teacher.checkpoint for teacher in config.teachers.values())]
    ids = [checkpoint.read_manifest(path).get("checkpoint_id") for path in starts if path is not None]
    settings = config.model_dump(mode="json", exclude={"run": {"dir"}})
    return hashlib.sha256(json.dumps([settings, ids, options.probe, options.samples]).encode()).hexdigest()


def weights_of(recipe: Recipe, options: argparse.Namespace) -> dict[str, str]:
    """Checkpoints that all runs start and learn from, by stage; raises :class:`ConfigurationError` where one lacks."""
    stage = recipe.stage(options.stage, "--stage")
    if outside := sorted(set(teachers_of(recipe, stage)) - stage.teachers.keys()):
        raise ConfigurationError(
            f"--stage {stage.name}: {', '.join(outside)} came as checkpoints (settings.teachers), and recovery is"
            " measured here against the results of stages; name a stage whose teachers are all stages of the recipe"
        )
    start = [] if stage.initial is None else [starts_from(recipe, stage.initial)]
    return ablations.weights_of(recipe, [*start, *stage.teachers])


def gather(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """``staleness.json`` from what the runs left."""
    stage, weights = recipe.stage(options.stage, "--stage"), weights_of(recipe, options)
    goals = {
        domain: _share(_read(recipe.dir / name / "result.json")["answers"][domain][: options.samples])
        for name, domains in stage.teachers.items()
        for domain in domains
    }
    folder, rows = recipe.dir / ablations.FOLDER / NAME, []
    for variant in variants(options.lags, options.seeds, gradient_probe.FORMS):
        probed = dataclasses.replace(variant, form="corrected").name
        cosine = _read(folder / probed / f"{NAME}.json")["cosine"][variant.form]
        rows.append(dataclasses.asdict(variant) | {"weights": weights, "recovery": None, "cosine": cosine})
        if variant.form not in TRAINED:
            continue
        found = _read(folder / variant.name / f"{NAME}.json")
        by_domain = {d: intervals.recovery(found["before"][d], found["after"][d], goals[d]) for d in goals}
        known = [value for value in by_domain.values() if value is not None]
        if not known:
            raise ConfigurationError(
                f"{variant.name}: no teacher of stage {stage.name!r} ({goals}) is better than the student that it"
                f" starts from ({found['before']}), so there is nothing to recover; name another --stage"
            )
        rows[-1] |= {"recovery": fmean(known), "recovery_by_domain": by_domain, "accuracy": found["after"]}
        rows[-1] |= {"wall_s": found["wall_s"]}
    named = ("stage", "steps", "prompts", "lr", "samples", "probe")
    return {
        "settings": {name: getattr(options, name) for name in named},
        "teachers": goals,
        "runs": rows,
    }


def _share(marks: str) -> float:
    """Of the same held-out prompts that :func:`accuracy` asks."""
    return marks.count("1") / len(marks)


def over_seeds(tree: Mapping[str, Any], lag: int, form: str, what: str) -> list[float]:
    """One number for each seed. Lag 0 is all forms at once."""
    return [r[what] for r in tree["runs"] if r["lag"] == lag and (not lag or r["form"] == form)]


def judge(tree: Mapping[str, Any]) -> list[str]:
    """What was promised and did not come."""
    lags = sorted({row["lag"] for row in tree["runs"]})
    fresh = over_seeds(tree, 0, "corrected", "recovery")
    spread = max(fresh) - min(fresh)
    failures = []
    for lag in lags[1:]:
        fall = fmean(fresh) - fmean(over_seeds(tree, lag, "corrected", "recovery"))
        if fall > spread:
            failures.append(
                f"lag {lag}, corrected, recovers {100 * fall:.1f} points less than lag 0, whose seeds lie within"
                f" {100 * spread:.1f}"
            )
    ours, plain = (fmean(over_seeds(tree, lags[-1], form, "cosine")) for form in TRAINED)
    if ours <= plain:
        failures.append(f"lag {lags[-1]}: cosine {ours:.4f} corrected, {plain:.4f} not; the first must be higher")
    return failures


def show(tree: Mapping[str, Any]) -> None:
    table = Table(title="Age of rollouts, means over seeds", title_justify="left")
    domains = list(tree["teachers"])
    headings = ["lag", "form", "recovery", "of the seeds", *domains, "cosine", "of the seeds"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    for lag in sorted({row["lag"] for row in tree["runs"]}):
        for form in forms(lag, gradient_probe.FORMS):
            rows = [r for r in tree["runs"] if (r["lag"], r["form"]) == (lag, form) and r["recovery"] is not None]
            seeds = [r["recovery"] for r in rows]
            each = [[v for r in rows if (v := r["recovery_by_domain"][d]) is not None] for d in domains]
            cosine = over_seeds(tree, lag, form, "cosine")
            table.add_row(
                str(lag),
                form if lag else "on-policy",
                f"{fmean(seeds):.1%}" if seeds else "",
                " ".join(f"{100 * s:.1f}" for s in seeds),
                *(f"{fmean(values):.1%}" if values else "" for values in each),
                f"{fmean(cosine):.3f}",
                " ".join(f"{c:.3f}" for c in cosine),
            )
    display.console().print(table)


def picture(tree: Mapping[str, Any]) -> Figure:
    """Recovery and cosine over the lag, a line for each form and a point for each seed."""
    lags = sorted({row["lag"] for row in tree["runs"]})
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    colours = domain_colours(list(gradient_probe.FORMS))
    titles = {"recovery": "Recovery, mean of the domains", "cosine": "Cosine to the on-policy gradient"}
    shown = (("recovery", TRAINED), ("cosine", tuple(gradient_probe.FORMS)))
    for axes, (what, drawn) in zip(figure.subplots(1, 2), shown, strict=True):
        for number, form in enumerate(reversed(drawn)):
            places = [place + 0.06 * (number - (len(drawn) - 1) / 2) for place in range(len(lags))]
            seeds = [over_seeds(tree, lag, form, what) for lag in lags]
            axes.plot(places, [fmean(s) for s in seeds], color=colours[form], linewidth=2, label=form)
            for place, values in zip(places, seeds, strict=True):
                axes.plot([place] * len(values), values, "o", color=colours[form], markersize=4, alpha=0.7)
        axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
        axes.set_xlabel("age of the rollouts, steps", color=INK)
        axes.set_title(titles[what], color=INK, loc="left", fontsize=11)
        axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
        tidy(axes)
        if what == "recovery":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: missing; run the recipe first, whose stages this program starts from")
    return json.loads(path.read_text())


def _arguments() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    parser.add_argument("--stage", help="MOPD stage to shorten; the recipe's first iteration, or its last stage")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=96, help="a step")
    parser.add_argument("--lr", type=float, default=5e-5, help="constant; the policy must not run away within a lag")
    parser.add_argument("--samples", type=int, default=300, help="held-out prompts a domain")
    parser.add_argument("--probe", type=int, default=1536, help="sequences of each gradient of the cosine")
    parser.add_argument("--lags", type=int, nargs="+", default=list(LAGS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # of a process started by this program
    return parser.parse_intermixed_args()


def _side_by_side(processes: int, lock: int) -> None:
    """Start this command again, each time with its share of the runs and the recipe's lock, and wait for all."""
    command = [sys.executable, *sys.argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, "--share", str(i), str(processes)], env=environment, pass_fds=[lock])
        for i in range(processes)
    ]
    codes = [process.wait() for process in started]  # of all, before the first failure is told
    if any(codes):
        raise ConfigurationError("a run has failed; its message is above, and the same command goes on behind it")


def main() -> int:
    options = _arguments()
    display.setup_logging(0 if options.share is None else 1)
    failures: list[str] = []
    with reported():
        recipe = load_recipe(options.recipe, options.overrides)
        if options.stage is None:
            options.stage = recipe.report.iterations[0] if recipe.report else recipe.names[-1]
        if 0 not in options.lags or options.steps < 2 * max(options.lags):
            raise ConfigurationError(
                f"--lags {options.lags} --steps {options.steps}: all ages are held against age 0, half-way through a"
                " run; name 0 and take at least twice as many steps as the largest age"
            )
        if options.share is not None:
            work(recipe, options)
            return 0
        weights_of(recipe, options)  # what is missing is told before the runs
        with anew.alone(recipe.dir) as lock:
            _side_by_side(options.processes, lock)
            tree = gather(recipe, options)
            failures = judge(tree)
            tree |= {"failures": failures}
            folder = recipe.dir / ablations.FOLDER
            atomically(folder / f"{NAME}.json", lambda path: path.write_text(json.dumps(tree, indent=1) + "\n"))
            atomically(folder / f"{NAME}.png", lambda path: plots.save(picture(tree), path))
        show(tree)
        for failure in failures:
            display.note(0, f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
