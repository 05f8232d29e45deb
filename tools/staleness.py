"""What the age of rollouts costs, with and without the correction of Eq. 3: short MOPD runs for several lags and seeds.

    python tools/staleness.py examples/recipe.yaml [--stage mopd1] [--steps 80] [--processes 2] [[STAGE:]key=value ...]

Run it after the recipe, whose student and teachers it takes; the recipe's own stages are only read. Lag 0 is on-policy;
at lag n the rollouts of a step are n steps old. *Corrected* is Eq. 3 as the stage has it: a token counts c_t =
pi_prox / pi_behav times, and not at all outside IcePop's bounds. *Uncorrected* takes pi_behav for pi_prox, so that c_t
is 1 and nothing is masked: old rollouts are learned from as if they were new. Beside recovery it measures, in the
middle of each corrected run and at the same weights for both forms, the cosine between the gradient from rollouts of
the policy that is ``lag`` steps old and the on-policy gradient: ``--probe`` sequences each, of the same prompts under
the same noise (the numbers that choose the tokens), so that they differ by what the policies do and not by luck.

Writes ``ablations/staleness.json`` and ``.png`` in the recipe's directory and prints a table. Runs that are finished
are kept, so a stopped program goes on. Ends with status 1 when a corrected lag recovers less than lag 0 by more than
the seeds' spread, or when the corrected gradient is not the closer one at the largest lag.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table
from torch import Tensor

from megatron_mopd import batch, checkpoint, display, evaluation, intervals, parallel, plots, presets, provenance
from megatron_mopd.config import Config, ConfigurationError, Mopd
from megatron_mopd.files import atomically
from megatron_mopd.guard_config import Guards
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.palette import domain_colours
from megatron_mopd.plot_parts import FAINT, INK, tidy
from megatron_mopd.recipe.schema import Recipe, load_recipe, stage_config
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput, Prompt, ScoredRollout
from megatron_mopd.settings import overlay
from megatron_mopd.sources import RolloutSource
from megatron_mopd.train import reported
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import LogprobLoss, of_logprobs

LAGS, SEEDS = (0, 1, 4, 8), 3
NAME = "staleness"
PROBE_DRAW = 1_000_003
"""Number of the probe's batch, which with seed and prompt decides its noise; no run draws as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One run."""

    lag: int
    corrected: bool
    seed: int

    @property
    def name(self) -> str:
        return f"lag{self.lag}_{'corrected' if self.corrected else 'uncorrected'}_seed{self.seed}"


def variants(lags: Sequence[int], seeds: int) -> list[Variant]:
    """Every lag in both forms but 0, where they are one: nothing is old. The longest come first."""
    return [
        Variant(lag=lag, corrected=corrected, seed=seed)
        for lag in sorted(lags, reverse=True)
        for corrected in ((True, False) if lag else (True,))
        for seed in range(seeds)
    ]


def uncorrected(settings: Mopd) -> LogprobLoss:
    """Eq. 3 with pi_behav taken for pi_prox: every token's c_t is 1, and no mask falls."""

    def objective(logprobs: Tensor, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        prox = logprobs.detach().cpu() if micro_batch.prox_logprobs is None else micro_batch.prox_logprobs
        return mopd_loss(logprobs, dataclasses.replace(micro_batch, behav_logprobs=prox), settings, counts)

    return objective


def corrected(settings: Mopd) -> LogprobLoss:
    """Eq. 3 as it is."""
    return lambda logprobs, micro_batch, counts: mopd_loss(logprobs, micro_batch, settings, counts)


# --------------------------------------------------------------------------- one run


def configuration(recipe: Recipe, variant: Variant, options: argparse.Namespace) -> Config:
    """The stage, shortened, with rollouts of the variant's age; its learning rate is brisk, so that age matters."""
    stage = recipe.stage(options.stage, "--stage")
    directory = recipe.dir / "ablations" / NAME / variant.name
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
    trainer = Trainer(config, groups, None if variant.corrected else uncorrected(settings))
    before = accuracy(trainer, options.samples)
    policies, middle = config.run.dir / "policies", options.steps // 2
    if groups.rank == 0:
        shutil.rmtree(policies, ignore_errors=True)  # of a run that was stopped
    wanted = {middle - variant.lag, middle} if variant.corrected and variant.lag else set()
    while trainer.step_index < options.steps:
        if trainer.step_index in wanted:
            model, manifest = trainer.learner.model, trainer.manifest()
            checkpoint.save(policies, trainer.step_index, model, None, groups, state={}, manifest=manifest, keep=2)
        trainer.step()
    after = accuracy(trainer, options.samples)
    found: dict[str, Any] = {"before": before, "after": after, "wall_s": trainer.wall_s}
    if variant.corrected:
        both = {True: 1.0, False: 1.0} if not wanted else cosines(trainer, policies, variant, middle, options.probe)
        found["cosine"] = {"corrected": both[True], "uncorrected": both[False]}
    return found


def accuracy(trainer: Trainer, samples: int) -> dict[str, float]:
    """Greedy, on the first ``samples`` held-out prompts of each domain that a teacher serves."""
    domains = {domain for teacher in trainer.config.teachers.values() for domain in teacher.domains}
    prompts = [p for p in evaluation.held_out(trainer.held_out, samples) if p.domain in domains]
    return {domain: _share(marks) for domain, marks in trainer.answers(prompts).items()}


def cosines(trainer: Trainer, policies: Path, variant: Variant, step: int, size: int) -> dict[bool, float]:
    """Of the corrected and the uncorrected gradient from rollouts of step - lag to that from rollouts of step, all at
    the weights of step. The trainer's weights are lost."""
    settings, source = trainer.config.objective, trainer.source
    assert isinstance(settings, Mopd) and isinstance(source, RolloutSource)
    source.seek(0)
    prompts = source.stream.take(size)
    now, then = (checkpoint.latest(policies / f"iter_{s:07d}") for s in (step, step - variant.lag))
    assert now is not None and then is not None
    fresh, old = (probe(trainer, path, prompts) for path in (now, then))
    truth = gradient(trainer, now, fresh, corrected(settings))
    return {
        form: float(torch.nn.functional.cosine_similarity(gradient(trainer, now, old, loss), truth, dim=0))
        for form, loss in ((True, corrected(settings)), (False, uncorrected(settings)))
    }


def probe(trainer: Trainer, policy: Path, prompts: Sequence[Prompt]) -> list[ScoredRollout]:
    """One scored rollout of each prompt by a policy, under the same noise for every policy."""
    source, teachers, config = trainer.source, trainer.teachers, trainer.config
    assert isinstance(source, RolloutSource) and teachers is not None
    checkpoint.load_weights(policy, trainer.learner.model, trainer.groups)
    requests = [(prompt, 0) for prompt in prompts]
    rollouts = trainer.sampler.generate(
        requests, source.sampling, config.run.seed, PROBE_DRAW, config.rollout.batch_size
    )
    return teachers.score(
        [
            provenance.sign(r, trainer.policy, trainer.tokenizer, source.sampling, config.run.seed, PROBE_DRAW)
            for r in rollouts
        ]
    )


def gradient(trainer: Trainer, policy: Path, rollouts: Sequence[ScoredRollout], loss: LogprobLoss) -> Tensor:
    """fp64, flat: the trunk's gradient at a policy's weights. The optimizer's step behind it goes nowhere."""
    learner, config = trainer.learner, trainer.config
    checkpoint.load_weights(policy, learner.model, trainer.groups)
    packed = batch.pack(
        rollouts,
        config.batching.micro_batch_size,
        trainer.tokenizer.pad_token,
        domain_weights=config.objective.domain_weights,
    )
    learner.step(packed, of_logprobs(loss))
    named = learner.module.named_parameters()
    parts = [p.main_grad.double().flatten() for name, p in named if p.requires_grad and not name.startswith("mtp.")]
    return torch.cat(parts)


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


def gather(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """``staleness.json`` from what the runs left."""
    stage = recipe.stage(options.stage, "--stage")
    goals = {
        domain: _share(_read(recipe.dir / name / "result.json")["answers"][domain][: options.samples])
        for name, domains in stage.teachers.items()
        for domain in domains
    }
    rows = []
    for variant in variants(options.lags, options.seeds):
        found = _read(recipe.dir / "ablations" / NAME / variant.name / f"{NAME}.json")
        pair = dataclasses.replace(variant, corrected=True).name
        probed = _read(recipe.dir / "ablations" / NAME / pair / f"{NAME}.json")["cosine"]
        by_domain = {d: intervals.recovery(found["before"][d], found["after"][d], goals[d]) for d in goals}
        known = [value for value in by_domain.values() if value is not None]
        if not known:
            raise ConfigurationError(
                f"{variant.name}: no teacher of stage {stage.name!r} ({goals}) is better than the student that it"
                f" starts from ({found['before']}), so there is nothing to recover; name another --stage"
            )
        rows.append(
            dataclasses.asdict(variant)
            | {"recovery": fmean(known), "recovery_by_domain": by_domain, "accuracy": found["after"]}
            | {"cosine": probed["corrected" if variant.corrected else "uncorrected"], "wall_s": found["wall_s"]}
        )
    named = ("stage", "steps", "prompts", "lr", "samples", "probe")
    return {"settings": {name: getattr(options, name) for name in named}, "teachers": goals, "runs": rows}


def _share(marks: str) -> float:
    """Of the same held-out prompts that :func:`accuracy` asks."""
    return marks.count("1") / len(marks)


def over_seeds(tree: Mapping[str, Any], lag: int, form: bool, what: str) -> list[float]:
    """One number for each seed. Lag 0 is both forms at once."""
    return [r[what] for r in tree["runs"] if r["lag"] == lag and r["corrected"] == (form or lag == 0)]


def judge(tree: Mapping[str, Any]) -> list[str]:
    """What was promised and did not come."""
    lags = sorted({row["lag"] for row in tree["runs"]})
    fresh = over_seeds(tree, 0, True, "recovery")
    spread = max(fresh) - min(fresh)
    failures = []
    for lag in lags[1:]:
        fall = fmean(fresh) - fmean(over_seeds(tree, lag, True, "recovery"))
        if fall > spread:
            failures.append(
                f"lag {lag}, corrected, recovers {100 * fall:.1f} points less than lag 0, whose seeds lie within"
                f" {100 * spread:.1f}"
            )
    ours, plain = (fmean(over_seeds(tree, lags[-1], form, "cosine")) for form in (True, False))
    if ours <= plain:
        failures.append(f"lag {lags[-1]}: cosine {ours:.4f} corrected, {plain:.4f} not; the first must be higher")
    return failures


def show(tree: Mapping[str, Any]) -> None:
    table = Table(title="Age of rollouts, means over seeds", title_justify="left")
    domains = list(tree["teachers"])
    headings = ["lag", "form", "recovery", "of the seeds", *domains, "cosine"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    for lag in sorted({row["lag"] for row in tree["runs"]}):
        for form in (True, False) if lag else (True,):
            rows = [r for r in tree["runs"] if (r["lag"], r["corrected"]) == (lag, form)]
            seeds = [r["recovery"] for r in rows]
            each = [[v for r in rows if (v := r["recovery_by_domain"][d]) is not None] for d in domains]
            table.add_row(
                str(lag),
                ("corrected" if form else "uncorrected") if lag else "on-policy",
                f"{fmean(seeds):.1%}",
                " ".join(f"{100 * s:.1f}" for s in seeds),
                *(f"{fmean(values):.1%}" if values else "" for values in each),
                f"{fmean(r['cosine'] for r in rows):.4f}",
            )
    display.console().print(table)


def picture(tree: Mapping[str, Any]) -> Figure:
    """Recovery and cosine over the lag, a line for each form and a point for each seed."""
    lags = sorted({row["lag"] for row in tree["runs"]})
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    colours = domain_colours(["corrected", "uncorrected"])
    panels = zip(figure.subplots(1, 2), ("recovery", "cosine"), strict=True)
    titles = {"recovery": "Recovery, mean of the domains", "cosine": "Cosine to the on-policy gradient"}
    for axes, what in panels:
        for form, name in ((False, "uncorrected"), (True, "corrected")):
            shift = 0.06 if form else -0.06
            seeds = [over_seeds(tree, lag, form, what) for lag in lags]
            places = [place + shift for place in range(len(lags))]
            axes.plot(places, [fmean(s) for s in seeds], color=colours[name], linewidth=2, label=name)
            for place, values in zip(places, seeds, strict=True):
                axes.plot([place] * len(values), values, "o", color=colours[name], markersize=4, alpha=0.7)
        axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
        axes.set_xlabel("age of the rollouts, steps", color=INK)
        axes.set_title(titles[what], color=INK, loc="left", fontsize=11)
        axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
        tidy(axes)
        if what == "recovery":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(frameon=False, fontsize=9)
    return figure


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"{path}: missing; run the recipe first, whose stages this program starts from")
    return json.loads(path.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    parser.add_argument("--stage", help="MOPD stage to shorten; the recipe's first iteration, or its last stage")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=96, help="a step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--samples", type=int, default=300, help="held-out prompts a domain")
    parser.add_argument("--probe", type=int, default=1536, help="sequences of each gradient of the cosine")
    parser.add_argument("--lags", type=int, nargs="+", default=list(LAGS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # of a process started by this program
    return parser.parse_intermixed_args()


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
        command = [sys.executable, *sys.argv]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([*command, "--share", str(i), str(options.processes)], env=environment)
            for i in range(options.processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise ConfigurationError("a run has failed; its message is above, and the same command goes on behind it")
        tree = gather(recipe, options)
        folder = recipe.dir / "ablations"
        failures = judge(tree)
        tree |= {"failures": failures}
        atomically(folder / f"{NAME}.json", lambda path: path.write_text(json.dumps(tree, indent=1) + "\n"))
        atomically(folder / f"{NAME}.png", lambda path: plots.save(picture(tree), path))
        show(tree)
        for failure in failures:
            display.note(0, f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
