"""Does training towards a quantized student pay: MOPD with and without it, then both students quantized and compared.

    torchrun --nproc_per_node=2 tools/nvfp4_training.py examples/nvfp4_training.yaml [--seeds 3] [--out DIR]

All stages of the recipe but the last are run as they are. The last is run twice for each seed, with one setting between
the two, ``quantization.train``; the high-precision weights that each leaves are then quantized. Reverse KL to the
teachers and log-probabilities of both forms of a student are taken on the same rollouts, which its high-precision form
sampled from held-out prompts. Writes ``OUT/TABLE.json`` and a picture, and ends with status 1 unless the students
that were trained for it lose less when they are quantized: the 95% interval over prompts of the difference is above 0.
What was interrupted goes on, and another table (``--recipe``) shares the runs without quantization.

The default is the table of the Ultra report that has shared experts and Mamba projections in NVFP4 too. What the one
with these in FP8 (``--recipe ultra-ptq``) takes from models this small is close to what can be measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from megatron_mopd import (
    checkpoint,
    display,
    evaluation,
    fake_quantization,
    intervals,
    origins,
    parallel,
    plots,
    presets,
    report,
    runner,
    student,
)
from megatron_mopd.config import Config, ConfigurationError, Quantization
from megatron_mopd.files import atomically
from megatron_mopd.palette import domain_colours
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import Predictions
from megatron_mopd.prompts import load_prompts, verify
from megatron_mopd.records import MicroBatch, Prompt, Rollout, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.runner import Recipe, load_recipe, run_unless_finished, stage_config
from megatron_mopd.settings import overlay
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer
from megatron_mopd.train import reported
from mopd_kernels.divergence import Head, divergence

KINDS = {"plain": "trained as usual", "aware": "trained for NVFP4"}
FORMS = ("original", "quantized")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over prompts with its 95% interval (normal)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
        half = intervals.Z95 * math.sqrt(variance / len(values))
        return cls(mean=mean, low=mean - half, high=mean + half)

    def to_json(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


# ------------------------------------------------------------------ runs


def run_config(recipe: Recipe, arguments: argparse.Namespace, seed: int, kind: str) -> Config:
    """The recipe's last stage with another seed, with or without quantization."""
    train = arguments.recipe if kind == "aware" else None
    changes = {
        "run": {"seed": seed},
        "data": {"shuffle_seed": seed},
        "quantization": {"train": train, "four_over_six": arguments.four_over_six if train else None},
    }
    stage = recipe.stages[-1]
    changed = stage.model_copy(update={"settings": overlay(stage.settings, changes)})
    config = origins.resolved(stage_config(recipe, changed))
    directory = recipe.dir / f"{stage.name}_{_name(arguments) if train else kind}_seed{seed}"
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": directory})})


def _name(arguments: argparse.Namespace) -> str:
    """Of what is trained and quantized for, in names of files."""
    return "_".join(filter(None, [Path(arguments.recipe).stem, arguments.four_over_six]))


# ------------------------------------------------------------------ measurements


class Bench:
    """What both students are measured with: teachers, held-out prompts and a place for weights."""

    def __init__(self, config: Config, arguments: argparse.Namespace, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.quantization = Quantization(train=arguments.recipe, four_over_six=arguments.four_over_six)
        self.tokenizer: ChatTokenizer = build_tokenizer(config.tokenizer)
        self.teachers = TeacherPool(config, groups, self.tokenizer)
        length = config.model.max_sequence_length
        prompts = load_prompts(config.data.held_out, self.tokenizer, length, need_verifier=True)
        self.prompts = evaluation.held_out(prompts, arguments.samples)
        self.rollouts: int = arguments.rollouts

    def measure(self, directory: Path) -> dict[str, dict[str, Any]]:
        """``{prompt id: numbers}`` of the student under ``directory`` and of its quantized form, on all ranks.

        ``domain``; ``kl`` and ``correct``: of each form, reverse KL to the domain's teacher in nats per token, the mean
        over rollouts, and whether the greedy answer is right; ``logprob_error``: mean |change of a log-probability|.
        """
        config, groups = self.config, self.groups
        precision = presets.resolve_precision(config.run.precision, groups.device)
        vocabulary = self.tokenizer.vocab_size
        model = student.build_model(config.model, config.parallel, groups, vocabulary, precision, mtp=True)
        checkpoint.load_weights(directory / "checkpoints", model, groups)
        sampler = Sampler(model, groups, config.model.max_sequence_length, valid_vocab=vocabulary)
        found: dict[str, dict[str, Any]] = {
            p.id: {"domain": p.domain, "kl": {}, "correct": {}} for p in self.prompts[groups.dp_rank :: groups.dp_size]
        }
        rollouts = self._sample(sampler, config.rollout.temperature, self.rollouts)
        quantization = None
        for form in FORMS:
            if form == "quantized":
                quantization = fake_quantization.FakeQuantization(model, self.quantization, groups, config.kernels.impl)
            for answer in self._sample(sampler, 0.0, 1):
                found[answer.prompt.id]["correct"][form] = self._right(answer)
        assert quantization is not None
        for prompt, numbers in self._against_teachers(model, quantization, rollouts).items():
            original, quantized, error = torch.stack(numbers).mean(0).tolist()
            found[prompt] |= {"kl": {"original": original, "quantized": quantized}, "logprob_error": error}
        shares: list[Any] = [None] * groups.dp_size
        torch.distributed.all_gather_object(shares, found, group=groups.dp)
        return {name: row for share in shares for name, row in share.items()}

    def _sample(self, sampler: Sampler, temperature: float, each: int) -> list[Rollout]:
        """``each`` completions of every prompt of this data-parallel rank's share."""
        limit, stops = self.config.rollout.max_new_tokens, tuple(self.tokenizer.stop_tokens)
        sampling = Sampling(temperature=temperature, max_new_tokens=limit, stop_tokens=stops)
        share = self.prompts[self.groups.dp_rank :: self.groups.dp_size]
        requests = [(prompt, sample) for prompt in share for sample in range(each)]
        return sampler.generate(requests, sampling, 0, -1, self.config.evaluation.batch_size)

    def _right(self, rollout: Rollout) -> bool:
        text = self.tokenizer.decode(rollout.completion.tolist())
        return rollout.finish == "stop" and verify(rollout.prompt, text) >= 1.0

    @torch.no_grad()
    def _against_teachers(
        self, model: Any, quantization: fake_quantization.FakeQuantization, rollouts: Sequence[Rollout]
    ) -> dict[str, list[torch.Tensor]]:
        """``{prompt id: [numbers of a rollout]}``, ``[3]`` each: means over its tokens of the original's and of the
        quantized form's KL to the teacher, and of |change of the token's log-probability|."""
        turns: dict[str, list[int]] = {name: [] for name in self.teachers.names}
        for index, rollout in enumerate(rollouts):
            turns[self.teachers.route(rollout.prompt.domain)].append(index)
        found: dict[str, list[torch.Tensor]] = {}
        model.eval()
        for name, teacher, micro_batches in self.teachers.visits(rollouts, turns):
            theirs = self.teachers.predict(teacher, micro_batches)
            quantized = self._look(model, micro_batches, theirs)
            with quantization.originals():
                original = self._look(model, micro_batches, theirs)
            columns = torch.stack([original[0], quantized[0], (quantized[1] - original[1]).abs()])
            own = [rollouts[i] for i in turns[name]]
            for rollout, part in zip(own, columns.split([len(r.completion) for r in own], dim=1), strict=True):
                found.setdefault(rollout.prompt.id, []).append(part.mean(1))
        return found

    def _look(
        self, model: Any, micro_batches: Sequence[MicroBatch], theirs: Sequence[Predictions]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(student || teacher) and the student's log-probability of every token, fp32 ``[T]`` on the host."""
        kl, logprobs = [], []
        ours = self.teachers.predict(model, micro_batches)
        for micro_batch, p, q in zip(micro_batches, ours, theirs, strict=True):
            heads = (Head(x.hidden, x.weight) for x in (p, q))
            kl.append(divergence("reverse_kl", *heads, **p.options).value.cpu())
            logprobs.append(p.logprobs(micro_batch.targets).cpu())
        return torch.cat(kl), torch.cat(logprobs)


# ------------------------------------------------------------------ comparison


def compare(runs: Mapping[int, Mapping[str, Mapping[str, Any]]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The tree of ``OUT/TABLE.json`` from ``{seed: {kind: {prompt id: numbers}}}``.

    A prompt's loss is what quantizing adds to its reverse KL; ``saved`` is the plain student's loss less the other's,
    prompt by prompt. Over seeds a prompt counts once, with its mean.
    """
    names = [prompt.id for prompt in prompts]
    seeds = {str(seed): _of_seed(kinds, names) for seed, kinds in runs.items()}
    mean, lower = (
        {name: sum(of(kinds, name) for kinds in runs.values()) / len(runs) for name in names} for of in (_saved, _lower)
    )
    domains = sorted({prompt.domain for prompt in prompts})
    by_domain = {d: Interval.of([mean[p.id] for p in prompts if p.domain == d]).to_json() for d in domains}
    return {
        "seeds": seeds,
        "saved": Interval.of(list(mean.values())).to_json(),
        "saved_by_domain": by_domain,
        "quantized_kl_lower_by": Interval.of(list(lower.values())).to_json(),
        "unit": "nats per token of reverse KL to the teachers, and for accuracies shares of prompts",
    }


def _of_seed(kinds: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {"saved": Interval.of([_saved(kinds, name) for name in names]).to_json()}
    for kind, rows in kinds.items():
        chosen = [rows[name] for name in names]
        correct = {form: [float(row["correct"][form]) for row in chosen] for form in FORMS}
        changes = [q - o for q, o in zip(correct["quantized"], correct["original"], strict=True)]
        tree[kind] = {
            "reverse_kl": {form: Interval.of([row["kl"][form] for row in chosen]).to_json() for form in FORMS},
            "loss": Interval.of([_loss(row) for row in chosen]).to_json(),
            "logprob_error": Interval.of([row["logprob_error"] for row in chosen]).to_json(),
            "accuracy": {form: sum(correct[form]) / len(names) for form in FORMS},
            "accuracy_change": Interval.of(changes).to_json(),
        }
    tree["quantized_kl_lower_by"] = Interval.of([_lower(kinds, name) for name in names]).to_json()
    return tree


def _loss(row: Mapping[str, Any]) -> float:
    return row["kl"]["quantized"] - row["kl"]["original"]


def _saved(kinds: Mapping[str, Mapping[str, Any]], name: str) -> float:
    return _loss(kinds["plain"][name]) - _loss(kinds["aware"][name])


def _lower(kinds: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """By how much the quantized student that was trained for it is nearer to the teachers than the other one."""
    plain, aware = (kinds[kind][name]["kl"]["quantized"] for kind in ("plain", "aware"))
    return plain - aware


def verdict(tree: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the claim holds, and the sentence that says so."""
    saved, every = tree["saved"], [seed["saved"]["mean"] for seed in tree["seeds"].values()]
    numbers = f"{1e3 * saved['mean']:.2f} [{1e3 * saved['low']:.2f}, {1e3 * saved['high']:.2f}] millinats per token"
    if saved["low"] > 0 and min(every) > 0:
        return (
            True,
            f"trained for NVFP4, a student loses less when quantized: by {numbers}, in all {len(every)} seeds",
        )
    return False, f"no claim: the difference of the losses is {numbers}, by seed {[round(1e3 * v, 2) for v in every]}"


def show(tree: Mapping[str, Any]) -> None:
    table = Table(title="Students before and after they are quantized", title_justify="left")
    for heading in ("seed", "student"):
        table.add_column(heading, no_wrap=True)
    for heading in ("KL", "KL quantized", "loss, 1e-3 nats", "log-prob error", "accuracy", "accuracy quantized"):
        table.add_column(heading, justify="right", no_wrap=True)
    for seed, row in tree["seeds"].items():
        for kind, words in KINDS.items():
            one = row[kind]
            low, mean, high = (1e3 * one["loss"][key] for key in ("low", "mean", "high"))
            table.add_row(
                seed,
                words,
                *(f"{one['reverse_kl'][form]['mean']:.4f}" for form in FORMS),
                f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{one['logprob_error']['mean']:.4f}",
                *(report.percent(one["accuracy"][form]) for form in FORMS),
            )
    display.console().print(table)


def picture(tree: Mapping[str, Any]) -> Figure:
    """What quantizing adds to each student's reverse KL, and what is left of it in the quantized ones."""
    colours = dict(zip(KINDS, domain_colours(list(KINDS)).values(), strict=True))
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("added by quantizing, 1e-3 nats per token", "of the quantized student, nats per token")
    for axes, title, scale, read in zip(
        panels, titles, (1e3, 1.0), (lambda x: x["loss"], lambda x: x["reverse_kl"]["quantized"]), strict=True
    ):
        for place, kind in enumerate(KINDS):
            points = [read(row[kind]) for row in tree["seeds"].values()]
            at = [i + 0.3 * (place - 0.5) for i in range(len(points))]
            middle = [scale * p["mean"] for p in points]
            ends = [[scale * (p["mean"] - p["low"]) for p in points], [scale * (p["high"] - p["mean"]) for p in points]]
            axes.errorbar(at, middle, yerr=ends, fmt="o", color=colours[kind], capsize=3, label=KINDS[kind])
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xticks(range(len(tree["seeds"])), [f"seed {seed}" for seed in tree["seeds"]])
        axes.set_xlim(-0.6, len(tree["seeds"]) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(0, color="#8a8a8a", linewidth=0.8)
    panels[0].set_ylabel("reverse KL to the teachers")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def run(recipe: Recipe, arguments: argparse.Namespace, groups: Groups) -> tuple[dict[str, Any], bool, str]:
    """Train what is not trained yet, measure every student, and judge."""
    runner.run(recipe.model_copy(update={"stages": recipe.stages[:-1]}), groups)
    configs = {
        seed: {kind: run_config(recipe, arguments, seed, kind) for kind in KINDS}
        for seed in range(1, arguments.seeds + 1)
    }
    first = configs[1]["plain"]
    if first.parallel.pipeline > 1:
        raise ConfigurationError(f"parallel.pipeline = {first.parallel.pipeline}: both students are measured unsplit")
    for seed, kinds in configs.items():
        for kind, config in kinds.items():
            presets.check(config)
            run_unless_finished(config, groups, f"seed {seed}, {KINDS[kind]}")
    bench = Bench(first, arguments, groups)
    runs = {
        seed: {kind: bench.measure(config.run.dir) for kind, config in kinds.items()} for seed, kinds in configs.items()
    }
    tree = compare(runs, bench.prompts)
    holds, sentence = verdict(tree)
    given = {key: getattr(arguments, key) for key in ("recipe", "four_over_six", "samples", "rollouts")}
    return {"settings": given | {"steps": first.run.steps}, "claim": sentence, "holds": holds, **tree}, holds, sentence


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("stages", type=Path, metavar="RECIPE")
    made.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--recipe", default="ultra-ptq-nvfp4", help="of the quantization")
    made.add_argument("--four-over-six", choices=["mae", "mse", "max"])
    made.add_argument("--samples", type=int, default=1000, help="held-out prompts per domain")
    made.add_argument("--rollouts", type=int, default=1, help="of each prompt")
    made.add_argument("--out", type=Path, default=Path("examples/results/nvfp4_training"))
    return made


def main() -> int:
    arguments = parser().parse_args()
    holds = True
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        recipe = load_recipe(arguments.stages, arguments.overrides)
        config = stage_config(recipe, recipe.stages[-1])
        groups = parallel.initialize(config.parallel, config.run.seed)
        tree, holds, sentence = run(recipe, arguments, groups)
        if groups.rank == 0:
            text = json.dumps(tree, indent=1) + "\n"
            atomically(arguments.out / f"{_name(arguments)}.png", lambda path: plots.save(picture(tree), path))
            atomically(arguments.out / f"{_name(arguments)}.json", lambda path: path.write_text(text))
            show(tree)
            display.note(0, sentence)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
