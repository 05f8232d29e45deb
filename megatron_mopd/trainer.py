"""One loop for every stage: a source of trajectories, a signal on them, an objective over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from megatron_mopd import (
    batch,
    checkpoint,
    checkpoint_directory,
    companions,
    evaluation,
    exchange,
    guards,
    metrics,
    origins,
    presets,
    provenance,
    run_record,
    shards,
    sources,
    student,
    teacher_accuracy,
    teacher_precision,
)
from megatron_mopd.asynchrony.build import feed_of
from megatron_mopd.asynchrony.signs import Beacon
from megatron_mopd.config import Config, ConfigurationError, Mopd, MtpBoosting
from megatron_mopd.objectives.cross_entropy import cross_entropy_loss
from megatron_mopd.objectives.mopd import mopd_loss, mopd_objective, mopd_of_logits
from megatron_mopd.objectives.outcome import group_advantages
from megatron_mopd.parallel import Groups
from megatron_mopd.pattern import without_borders
from megatron_mopd.prompts import check_disjoint, load_prompts
from megatron_mopd.records import MicroBatch, Policy, Prompt, Rollout, ScoredRollout
from megatron_mopd.rollout import Sampler
from megatron_mopd.sources import DatasetSource, RolloutSource
from megatron_mopd.speculative import acceptance
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.update import Learner, LogprobLoss, Objective, StepOutput, of_logprobs

log = logging.getLogger(__name__)


class Trainer:
    """Builds a stage from its configuration and runs it; every rank makes one and calls it alike.

    ``objective`` replaces the configured one (a function of log-probabilities, micro-batch and counts); the default
    follows ``config.objective`` and ``config.kernels.update``. ``beacon`` are signs of life for other worlds that began
    before.
    """

    def __init__(
        self, config: Config, groups: Groups, objective: LogprobLoss | None = None, beacon: Beacon | None = None
    ) -> None:
        self._elapsed, self._started = 0.0, time.perf_counter()
        config = exchange.resolved(config, groups)
        self.tokenizer = build_tokenizer(config.tokenizer)
        self.vocab_size = origins.vocab_size(config.model, self.tokenizer.vocab_size)  # before hours of conversion
        config = exchange.prepare(config, groups)
        self.config, self.groups = config, groups
        precision = presets.resolve_precision(config.run.precision, groups.device)
        self.held_out = load_prompts(
            config.data.held_out, self.tokenizer, config.model.max_sequence_length, need_verifier=True
        )
        here = config.asynchrony.mode == "inline"  # else a world has them, and here they serve measurements alone
        self.teachers = TeacherPool(config, groups, self.tokenizer, load=here) if config.teachers else None
        model = student.build_model(config.model, config.parallel, groups, self.vocab_size, precision, mtp=True)
        self.initial_id: str | None = None
        manifest: dict[str, Any] = {}
        if config.model.initial is not None:
            manifest = checkpoint.load_weights(config.model.initial, model, groups)
            self.initial_id = manifest["checkpoint_id"]
            reads = {"tokenizer_sha": self.tokenizer.tokenizer_sha, "template_sha": self.tokenizer.template_sha}
            known = {key: value for key, value in reads.items() if key in manifest}  # other programs write none
            provenance.check_manifest(manifest, known, where=f"model.initial = {config.model.initial}")
            run_record.check_place(config.model.initial, manifest, where=f"model.initial = {config.model.initial}")
        self.companions = companions.of_run(config.model, manifest, self.tokenizer, precision, groups)
        self.learner = Learner(model, config, groups, self.vocab_size, self.tokenizer.pad_token)
        self.sampler = Sampler(
            model, groups, config.model.max_sequence_length, self.vocab_size, config.rollout.prefill_tokens
        )
        self.source = sources.of_stage(config, groups, self.tokenizer, self.sampler, self.teachers)
        check_disjoint(self.source.items, self.held_out)
        self._check_weights()
        if self.teachers is not None:
            self.teachers.require(item.domain for item in self.source.items if isinstance(item, Prompt))
        self.objective = self._objective() if objective is None else of_logprobs(objective)
        self.feed = feed_of(
            config, groups, self.tokenizer, self.teachers, self.source, self.learner, self._score, self.manifest, beacon
        )
        self.guards = self._guards()
        self.shards = shards.Shards(config, groups)
        self.step_index = 0
        self.history: list[dict[str, Any]] = []  # greedy evaluations while training
        self.times: dict[str, float] = {}

    @property
    def wall_s(self) -> float:
        """Seconds spent on this stage, by earlier processes of it too."""
        return self._elapsed + time.perf_counter() - self._started

    def _guards(self) -> guards.Guards:
        config, weights = self.config, self.config.data.weights
        watched: set[str] = set()
        if config.source.type == "rollout":
            watched = {item.domain for item in self.source.items if isinstance(item, Prompt)}
        return guards.Guards(
            config.guards,
            sorted(domain for domain in watched if weights.get(domain, 1.0) > 0),
            scored=isinstance(config.objective, Mopd),
            lag=config.rollout.lag,
            group=self.groups.dp,
            device=self.groups.device,
            checkpoints=config.run.dir / "checkpoints",
            speaks=self.groups.rank == 0,
        )

    def _check_weights(self) -> None:
        present = sorted({(i if isinstance(i, Prompt) else i.prompt).domain for i in self.source.items})
        weights, watched = self.config.objective.domain_weights, self.config.guards.domains
        for setting in [f"objective.domain_weights.{n}" for n in weights] + [f"guards.domains.{n}" for n in watched]:
            if setting.split(".", 2)[2] not in present:
                raise ConfigurationError(f"{setting}: no such domain in data.train ({present}); correct the name")

    # ------------------------------------------------------------------ one step

    def step(self) -> dict[str, float]:
        """One collected batch, one update; returns the step's metrics, equal on all ranks."""
        self.times, step = {}, self.step_index + 1
        with self._timed("collect"):
            rollouts = self.feed.take(self.policy)
        provenance.check(rollouts, self.policy, self.config.rollout.lag, self.tokenizer, self.teachers)
        try:
            rollouts = self.guards.admit(rollouts, step)
            row, outputs = self.learn(rollouts)
            self.shards.write(lambda: self.header(step), rollouts, outputs, row, self.learner.weights_sha)
            return row | self.guards.review(row)
        except guards.GuardError as stop:
            look = self.shards.of_stop(lambda: self.header(step), rollouts, str(stop))
            raise guards.GuardError(f"{stop}. {look}") from None

    def learn(self, rollouts: Sequence[ScoredRollout | Rollout]) -> tuple[dict[str, float], list[StepOutput]]:
        """The update of one step on this rank's checked rollouts; the step's metrics and what each optimizer step
        left."""
        minibatches = self._minibatches(rollouts)
        with self._timed("update"):
            outputs = [self.learner.step(minibatch, self.objective) for minibatch in minibatches]
        self.step_index += 1
        return self._measure(rollouts, outputs), outputs

    @property
    def policy(self) -> Policy:
        """Who the current weights are."""
        return Policy(run_id=self.config.run_id, step=self.step_index, initial_id=self.initial_id)

    def header(self, step: int) -> dict[str, Any]:
        """What the shard of ``step`` says of it beside its rollouts: whose weights met the update, who taught."""
        before = Policy(run_id=self.config.run_id, step=step - 1, initial_id=self.initial_id)
        routing = dict(self.teachers.routing) if self.teachers is not None else {}
        return {"step": step, "policy": asdict(before), "routing": routing} | self.manifest()

    def _score(self, rollouts: list[Rollout]) -> list[ScoredRollout | Rollout]:
        if not isinstance(self.config.objective, Mopd):
            return list(rollouts)
        assert self.teachers is not None  # config.Config sees to it
        with self._timed("score"):
            return list(self.teachers.score(rollouts))

    def _minibatches(self, rollouts: Sequence[ScoredRollout | Rollout]) -> list[list[MicroBatch]]:
        """One list of micro-batches per optimizer step; the global split is the same for any number of ranks."""
        settings, parts = self.config.objective, self.config.objective.minibatches
        outcome = None
        if isinstance(settings, Mopd) and settings.outcome_weight:
            outcome = group_advantages([r.rollout if isinstance(r, ScoredRollout) else r for r in rollouts])
        packed = []
        rolled = self.config.source.type == "rollout"
        samples = self.config.rollout.samples_per_prompt if rolled else 1
        total = self.config.rollout.prompts_per_step if rolled else self.config.batching.sequences_per_step or 0
        for part in range(parts):
            # Rank r holds the global prompts r, r + dp_size, ...; a part is a block of them, so every rank has some.
            chosen = [
                i
                for i in range(len(rollouts))
                if (i // samples * self.groups.dp_size + self.groups.dp_rank) * parts // total == part
                and guards.dropped(rollouts[i]) is None
            ]
            own = batch.pack(
                [rollouts[i] for i in chosen],
                self.config.batching.micro_batch_size,
                self.tokenizer.pad_token,
                domain_weights=settings.domain_weights,
                outcome_advantages=None if outcome is None else [outcome[i] for i in chosen],
                length_multiple=self.groups.tp_size,
            )
            packed.append(own or [batch.empty(self.tokenizer.pad_token, self.groups.tp_size)])  # all may be dropped
        if isinstance(settings, Mopd) and parts > 1:
            # With one optimizer step per batch prox is the training forward itself and no extra forward runs.
            packed = [self.learner.with_prox(minibatch) for minibatch in packed]
        return packed

    def _objective(self) -> Objective | None:
        settings = self.config.objective
        if isinstance(settings, MtpBoosting):
            return None
        if not isinstance(settings, Mopd):
            return of_logprobs(lambda logprobs, mb, counts: cross_entropy_loss(logprobs, mb, settings, counts))
        return {
            "objective": lambda predictions, mb, counts: mopd_objective(predictions, mb, settings, counts),
            "logits": lambda predictions, mb, counts: mopd_of_logits(predictions, mb, settings, counts),
            "logprob": of_logprobs(lambda logprobs, mb, counts: mopd_loss(logprobs, mb, settings, counts)),
        }[self.config.kernels.update]

    def _measure(self, rollouts: Sequence[ScoredRollout | Rollout], outputs: Sequence[StepOutput]) -> dict[str, float]:
        return {
            "loss": sum(o.loss for o in outputs) / len(outputs),
            "mtp_loss": sum(o.mtp_loss for o in outputs) / len(outputs),
            "grad_norm": sum(o.grad_norm for o in outputs) / len(outputs),
            "mtp_grad_norm": sum(o.mtp_grad_norm for o in outputs) / len(outputs),
            "lr": outputs[-1].lr,
            **metrics.of_step(rollouts, outputs, self.config, self.groups.dp),
            **{f"time/{name}": seconds for name, seconds in self.times.items()},
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

    # ------------------------------------------------------------------ a whole stage

    def run(self, report: Callable[[int, Mapping[str, float]], None] = lambda step, row: None) -> None:
        """Train to ``run.steps`` from where :meth:`resume` left off, keep checkpoints, and leave the last one."""
        settings = self.config
        while self.step_index < settings.run.steps:
            row = self.step()
            if settings.evaluation.every and self.step_index % settings.evaluation.every == 0:
                row |= self._evaluate_on_the_way()
            report(self.step_index, row)
            last = self.step_index == settings.run.steps
            if last or (settings.checkpoint.every and self.step_index % settings.checkpoint.every == 0):
                self.save()

    def answers(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """What the current weights answer greedily; see :func:`evaluation.answers`."""
        return evaluation.answers(
            self.sampler,
            prompts,
            self.tokenizer,
            self.groups,
            self.config.rollout.max_new_tokens,
            self.config.evaluation.batch_size,
        )

    def measure(self, samples: int) -> dict[str, Any]:
        """Greedy answers of the current weights on ``samples`` held-out prompts per domain and, with teachers, what
        they make of rollouts in the domains they serve; JSON values."""
        prompts = evaluation.held_out(self.held_out, samples)
        result = evaluation.result(self.answers(prompts), prompts)
        if self.teachers is None or not isinstance(self.source, RolloutSource):
            return result
        if not (served := [prompt for prompt in prompts if self.teachers.serves(prompt.domain)]):
            return result
        self.teachers.load()
        return result | evaluation.diagnose(
            self.sampler,
            self.teachers,
            served,
            self.tokenizer,
            self.groups,
            self.source.sampling,
            self.policy,
            self.config.evaluation.batch_size,
        )

    def measure_goals(self, samples: int) -> dict[str, Any]:
        """``teachers``: what those that score this stage's rollouts answer themselves to ``samples`` held-out prompts
        per domain, see :func:`teacher_accuracy.measure`; JSON values, empty for a stage without such."""
        if self.teachers is None or not isinstance(self.source, RolloutSource):
            return {}
        prompts = evaluation.held_out(self.held_out, samples)
        return {"teachers": teacher_accuracy.measure(self.teachers, prompts, self.config, self.tokenizer)}

    def measure_acceptance(self) -> dict[str, Any]:
        """What speculative decoding accepts, where the stage boosts the MTP heads; see :func:`acceptance.measure`."""
        if not isinstance(self.config.objective, MtpBoosting) or not isinstance(self.source, RolloutSource):
            return {}
        prompts = evaluation.held_out(self.held_out, self.config.evaluation.samples)
        size = self.config.evaluation.batch_size
        return {"acceptance": acceptance.measure(self.sampler, prompts, self.source.sampling, self.groups, size)}

    def measure_teachers(self, samples: int) -> dict[str, Any]:
        """What teachers in NVFP4 cost and save on ``samples`` rollouts per domain of held-out prompts; JSON values,
        empty where none is. See :func:`teacher_precision.measure`."""
        if self.teachers is None or not any(self.teachers.nvfp4.values()) or isinstance(self.source, DatasetSource):
            return {}
        self.teachers.load()
        rollouts = evaluation.sample(
            self.sampler,
            [p for p in evaluation.held_out(self.held_out, samples) if self.teachers.serves(p.domain)],
            self.source.sampling,
            self.groups,
            self.config.evaluation.batch_size,
        )
        return {"teacher_nvfp4": teacher_precision.measure(self.teachers, rollouts)}

    def _evaluate_on_the_way(self) -> dict[str, float]:
        with self._timed("evaluate"):
            prompts = evaluation.held_out(self.held_out, self.config.evaluation.samples)
            result = evaluation.counted(self.answers(prompts))
        self.history.append({"step": self.step_index, "accuracy": evaluation.to_json(result)})
        return {f"accuracy/{domain}": a.rate for domain, a in result.items()}

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint from which :meth:`resume` goes on bit for bit, rollouts in flight included."""
        self.feed.settle(self.policy)
        state = {
            "step": self.step_index,
            "source": self.source.state_dict(),
            "history": self.history,
            "schedule": self.learner.schedule.state_dict(),
            "guards": self.guards.state_dict(),
            "wall_s": self.wall_s,
        }
        with self.learner.originals():
            checkpoint.save(
                self.config.run.dir / "checkpoints",
                self.step_index,
                self.learner.model,
                self.learner.optimizer,
                self.groups,
                state=state,
                rollouts=self.feed.in_flight,
                manifest=self.manifest() | self.companions.manifest,
                companions=self.companions.files,
                keep=self.config.checkpoint.keep,
            )

    def resume(self, step: int | None = None) -> bool:
        """Load the newest complete checkpoint of this run (that of ``step`` where given), if there is one."""
        root = self.config.run.dir / "checkpoints"
        root = root if step is None else checkpoint_directory.place(root, step)
        if checkpoint.latest(root) is None:
            return False
        with self.learner.originals():
            found = checkpoint.load(root, self.learner.model, self.learner.optimizer, self.groups)
        provenance.check_manifest(found.manifest, self.manifest(), where=str(root))
        self.step_index = found.state["step"]
        self.source.load_state_dict(found.state["source"])
        self.history = found.state["history"]
        self.learner.schedule.load_state_dict(found.state["schedule"])
        self.guards.load_state_dict(found.state["guards"])
        self._elapsed = found.state["wall_s"]
        self.feed.in_flight.extend(found.rollouts)
        log.info("resumed %s at step %d", root, self.step_index)
        return True

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint says of this run, and what one that it resumes must say."""
        return {
            "run_id": self.config.run_id,
            "initial_id": self.initial_id,
            "tokenizer_sha": self.tokenizer.tokenizer_sha,
            "template_sha": self.tokenizer.template_sha,
            "vocab_size": self.vocab_size,
            "model": self.config.model.model_dump(mode="json", exclude={"initial"})
            | {"pattern": without_borders(self.config.model.pattern)},
            "teachers": {
                name: {"checkpoint_id": self.teachers.ids[name], "domains": sorted(teacher.domains)}
                | ({"nvfp4": sorted(teacher.nvfp4)} if teacher.nvfp4 else {})
                for name, teacher in self.config.teachers.items()
            }
            if self.teachers is not None
            else None,
        }
