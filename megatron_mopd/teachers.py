"""The teachers: any number of them in host memory, one resident model per architecture on the device.

A teacher's turn copies its weights into the resident model; rollouts are sorted by teacher, so each is loaded once a
pass. Teachers have no optimizer, no gradient buffers, no MTP and no gradient, and stay in eval mode outside every
list of models that mcore trains, so that nothing moves their routers' expert bias.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import batched
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd import (
    checkpoint,
    exchange,
    masks,
    pipeline,
    provenance,
    quantized_teachers,
    run_record,
    student,
    teacher_answers,
    watchdog,
)
from megatron_mopd.config import Config, ConfigurationError, Model
from megatron_mopd.conversion.model_settings import facts
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import OutputWeight, Predictions, check_impl
from megatron_mopd.records import MicroBatch, Rollout, ScoredRollout
from megatron_mopd.scoring import Scorer, check_logprobs
from mopd_kernels.divergence import Head, divergence
from mopd_kernels.nvfp4 import NVFP4Tensor

if TYPE_CHECKING:
    from megatron_mopd.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)


class TeacherPool:
    """Teachers of a configuration, loaded and checked; every rank builds one and calls it alike.

    Raises :class:`ConfigurationError`, before any weight is loaded, for a checkpoint that is missing or was made with
    another tokenizer, chat template, vocabulary or architecture; while loading, for one that is truncated or has
    other shapes. Without ``load`` no weight is read before :meth:`load`, and their identities are those of their
    manifests: enough to check what a world of their own has scored.
    """

    def __init__(self, config: Config, groups: Groups, tokenizer: ChatTokenizer, load: bool = True) -> None:
        config = exchange.prepare(config, groups)
        self.groups = groups
        self.vocab_size = config.model.vocab_size or tokenizer.vocab_size
        self.temperature, self.timeout = config.rollout.temperature, config.guards.teacher_timeout
        self.scorer = Scorer(
            groups=groups,
            parallel=config.parallel,
            vocab_size=self.vocab_size,
            pad_token=tokenizer.pad_token,
            micro_batch_size=config.batching.micro_batch_size,
            temperature=self.temperature,
            impl=config.kernels.impl,
        )
        self._teacher_of = {domain: name for name, teacher in config.teachers.items() for domain in teacher.domains}
        self._models = {name: teacher.model or config.model for name, teacher in config.teachers.items()}
        manifests = {name: _checked_manifest(name, config, tokenizer, self.vocab_size) for name in config.teachers}
        self._checkpoints = {name: teacher.checkpoint for name, teacher in config.teachers.items()}
        self._named = {n for n, m in manifests.items() if "checkpoint_id" in m}  # the ids of others are said in full
        self.ids: dict[str, str] = {}  # teacher name -> checkpoint_id
        self.nvfp4 = {name: tuple(sorted(teacher.nvfp4)) for name, teacher in config.teachers.items()}
        self._weights: dict[str, dict[str, quantized_teachers.Stored]] = {}  # _key of a teacher -> host copies
        self._residents: dict[str, Any] = {}  # architecture -> the model on the device
        self._present: dict[str, str] = {}  # architecture -> _key of the teacher whose weights are in it
        self._config = config
        if load:
            self.load()
        else:
            self.ids = {name: _identity(name, config, manifest) for name, manifest in manifests.items()}

    def load(self) -> None:
        """Bring the weights into host memory, where they are not there yet; every rank calls it."""
        if self._weights:
            return
        for name in self._config.teachers:
            self._load(name, self._config)
        for architecture, resident in self._residents.items():
            served = [n for n, model in self._models.items() if _architecture(model) == architecture]
            if all("output_weight" in self.nvfp4[n] for n in served):
                quantized_teachers.give_output_weight(resident, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Teachers in the order of the configuration, which is the order of their turns."""
        return tuple(self._models)

    def route(self, domain: str) -> str:
        """The teacher of a domain; raises :class:`ConfigurationError` for a domain without one."""
        if domain not in self._teacher_of:
            raise ConfigurationError(
                f"domain {domain!r} has no teacher; known are {sorted(self._teacher_of)}. Add it to the domains of one"
                f" of {list(self.names)} under teachers, or take its prompts out of data.train"
            )
        return self._teacher_of[domain]

    @property
    def routing(self) -> Mapping[str, str]:
        """The table that :meth:`route` reads, ``{domain: teacher}``."""
        return self._teacher_of

    def serves(self, domain: str) -> bool:
        """Whether a teacher scores this domain; held-out domains may have none."""
        return domain in self._teacher_of

    def require(self, domains: Iterable[str]) -> None:
        """Check at start that every domain has a teacher; raises as :meth:`route`."""
        for domain in sorted(set(domains)):
            self.route(domain)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Log-probabilities that each rollout's teacher gives to its tokens, at the sampling temperature, in fp32.

        This data-parallel rank's rollouts; their order is kept. Raises :class:`ConfigurationError` for an unknown
        domain, :class:`provenance.ProvenanceError` for an unsigned rollout and :class:`ScoringError` for NaN, an
        infinity or a log-probability above 1e-4, naming teacher, prompt and position, and for scores of
        another sequence than was asked for. A teacher that does not return within guards.teacher_timeout ends the
        process.
        """
        turns: dict[str, list[int]] = {name: [] for name in self.names}
        for index, rollout in enumerate(rollouts):
            turns[self.route(rollout.prompt.domain)].append(index)
        scored: dict[int, ScoredRollout] = {}
        for name, model, micro_batches in self.visits(rollouts, turns):
            answer = self._answer(name, model, micro_batches)
            own = [rollouts[i] for i in turns[name]]
            shas = teacher_answers.check(name, own, answer)
            parts = answer.logprobs.split([len(rollout.completion) for rollout in own])
            stop = 0
            for index, rollout, logprobs, sha in zip(turns[name], own, parts, shas, strict=True):
                check_logprobs(logprobs, f"teacher {name!r}", f"prompt {rollout.prompt.id} ({rollout.prompt.domain})")
                start, stop = stop, stop + len(logprobs)
                hidden = answer.hidden
                scored[index] = ScoredRollout(
                    rollout=provenance.scored_by(rollout, self.ids[name], self.nvfp4[name], self.routing, sha),
                    teacher=name,
                    teacher_logprobs=logprobs.clone(),
                    teacher_hidden=None if hidden is None else quantized_teachers.rows(hidden, start, stop),
                )
        return [scored[index] for index in range(len(rollouts))]

    def _answer(self, name: str, model: Any, micro_batches: Sequence[MicroBatch]) -> teacher_answers.Answer:
        weight = self.packed_output_weight(name)
        with self._watched(name):
            flat, hidden = (
                quantized_teachers.score(self.scorer, model, micro_batches, weight)
                if "hidden" in self.nvfp4[name]
                else (self.scorer.logprobs(model, micro_batches, weight), None)
            )
        return teacher_answers.Answer(logprobs=flat, hidden=hidden, shas=teacher_answers.read_of(micro_batches))

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """The block in which a teacher runs, within guards.teacher_timeout."""
        message = (
            f"teacher {name!r} ({self.ids[name][:12]}) has not answered rank {self.groups.rank} for"
            f" {self.timeout:g} s (guards.teacher_timeout), so the run ends; where it stands is above. Start the same"
            " command again: it goes on from the last checkpoint. Raise the setting if the teacher is only slow, or"
            " lower rollout.prompts_per_step or batching.micro_batch_size"
        )
        with watchdog.watched(self.timeout, message):
            yield

    @torch.no_grad()
    def reverse_kl(
        self, model: torch.nn.Module, rollouts: Sequence[Rollout | ScoredRollout], all_pairs: bool = False
    ) -> dict[str, dict[str, float]]:
        """``{teacher: {domain: nats}}``: exact KL(student || teacher), mean over completion tokens of all ranks'
        rollouts.

        ``model`` is the (wrapped) student. Each domain is held against its own teacher, or with ``all_pairs`` against
        every one. A teacher does not run again for rollouts that carry the hidden states it scored them with; its
        distribution is then that of these states, in NVFP4. Domains without tokens are left out. Equal on all ranks.
        """
        turns: dict[str, list[int]] = {name: [] for name in self.names}
        for index, rollout in enumerate(map(_plain, rollouts)):
            for name in self.names if all_pairs else (self.route(rollout.prompt.domain),):
                turns[name].append(index)
        domains = list(self._teacher_of)
        sums = torch.zeros(len(turns), len(domains), 2, dtype=torch.float64, device=self.groups.device)
        was_training = model.training
        model.eval()
        for name, mb, ours, theirs in self.pairs(model, rollouts, turns):
            kl = divergence("reverse_kl", Head(ours.hidden, ours.weight), theirs, **ours.options).value.double()
            of_row = torch.tensor([domains.index(d) if d else 0 for d in mb.domains])
            column = of_row[masks.segments(mb.cu_seqlens, len(mb.targets))].to(kl.device)
            sums[self.names.index(name)].index_add_(0, column, torch.stack([kl, torch.ones_like(kl)], dim=1))
        model.train(was_training)
        dist.all_reduce(sums, group=self.groups.pp)  # stages before the last one added nothing
        dist.all_reduce(sums, group=self.groups.dp)
        return {
            name: {d: total / tokens for d, (total, tokens) in zip(domains, row, strict=True) if tokens}
            for name, row in zip(self.names, sums.tolist(), strict=True)
        }

    def pairs(
        self, model: Any, rollouts: Sequence[Rollout | ScoredRollout], turns: Mapping[str, list[int]]
    ) -> Iterator[tuple[str, MicroBatch, Predictions, Head]]:
        """Teacher by teacher, what the student and it predict, on the last pipeline stage; hidden states of as many
        micro-batches as there are stages are in memory at once."""
        plain = [_plain(item) for item in rollouts]
        kept, rest = (
            {n: [i for i in turn if self._kept_hidden(n, rollouts[i]) is wanted] for n, turn in turns.items()}
            for wanted in (True, False)
        )
        for name, teacher, micro_batches in self.visits(plain, rest):
            weight = self.packed_output_weight(name)
            for part in batched(micro_batches, self.groups.pp_size):
                ours = self.predict(model, part)
                with self._watched(name):
                    theirs = self.predict(teacher, part, weight)
                for mb, p, q in zip(part, ours, theirs, strict=self.groups.last_stage):
                    yield name, mb, p, Head(q.hidden, q.weight)
        for name, turn in kept.items():
            micro_batches = self.scorer.even(self.scorer.pack([plain[i] for i in turn]))
            hidden = [item.teacher_hidden for i in turn if isinstance(item := rollouts[i], ScoredRollout)]
            heads = self._heads(name, hidden, micro_batches) if self.groups.last_stage else iter(())
            for part in batched(micro_batches, self.groups.pp_size):
                for mb, p in zip(part, self.predict(model, part), strict=self.groups.last_stage):
                    yield name, mb, p, next(heads)

    def predict(
        self, model: Any, micro_batches: Sequence[MicroBatch], weight: OutputWeight | None = None
    ) -> list[Predictions]:
        """What ``model`` predicts in each micro-batch, on the last pipeline stage; empty on others."""
        return pipeline.read(model, micro_batches, lambda mb: self.scorer.predictions(model, mb, weight), self.groups)

    def _heads(
        self, name: str, kept: Sequence[NVFP4Tensor | None], micro_batches: Sequence[MicroBatch]
    ) -> Iterator[Head]:
        """A teacher's distributions at the tokens of the micro-batches, from hidden states that rollouts carry."""
        weight: Any = self.output_weight(name)
        hidden = quantized_teachers.joined([h for h in kept if h is not None], weight.shape[1])
        stop = 0
        for mb in micro_batches:
            start, stop = stop, stop + len(mb.targets)
            own: Any = quantized_teachers.rows(hidden, start, stop)
            yield Head(quantized_teachers.moved(own, self.groups.device), weight)

    def _kept_hidden(self, name: str, item: Rollout | ScoredRollout) -> bool:
        """Whether the item carries the hidden states of this teacher; the same on all pipeline stages, of which the
        last one has them."""
        return isinstance(item, ScoredRollout) and item.teacher == name and "hidden" in self.nvfp4[name]

    def output_weight(self, name: str) -> Tensor | NVFP4Tensor:
        """A copy on the device, whichever teacher's weights the resident model holds; on the last pipeline stage."""
        stored = self.stored(name)[quantized_teachers.OUTPUT_WEIGHT]
        assert not isinstance(stored, tuple)
        return quantized_teachers.moved(stored, self.groups.device)

    def packed_output_weight(self, name: str) -> NVFP4Tensor | None:
        """On the device, for a teacher that keeps it packed: the resident model has no place for it."""
        if "output_weight" not in self.nvfp4[name] or not self.groups.last_stage:
            return None
        weight = self.output_weight(name)
        assert isinstance(weight, NVFP4Tensor)
        return weight

    def stored(self, name: str) -> Mapping[str, quantized_teachers.Stored]:
        """What host memory holds of a teacher's parameters and buffers, by name."""
        return self._weights[self._key(name)]

    def resident(self, name: str) -> Any:
        """The model on the device that a teacher shares with others of its architecture; it may hold their weights."""
        return self._residents[_architecture(self._models[name])]

    @contextmanager
    def unquantized(self, name: str) -> Iterator[Any]:
        """Within the block the teacher's resident model, read again from its checkpoint; all ranks enter together."""
        resident = self.resident(name)
        bare = self.groups.last_stage and not len(resident.output_layer.weight)
        if bare:
            rows = student.padded_vocab_size(self.vocab_size, self.groups.tp_size) // self.groups.tp_size
            quantized_teachers.give_output_weight(resident, rows)
        self._read_checkpoint(name)
        yield resident
        if bare:
            quantized_teachers.give_output_weight(resident, 0)

    def _key(self, name: str) -> str:
        """Of what is stored of a teacher: equal checkpoints, equally packed, share one host copy."""
        return " ".join([self.ids[name], *(part for part in self.nvfp4[name] if part != "hidden")])

    def visits(
        self, rollouts: Sequence[Rollout], turns: Mapping[str, list[int]]
    ) -> Iterator[tuple[str, Any, list[MicroBatch]]]:
        """Each teacher that any data-parallel rank needs, loaded, with this rank's micro-batches for it.

        All ranks get as many micro-batches, if empty ones, and so run the same collectives in the same order.
        """
        assert self._weights, "load() comes first"
        packed = {name: self.scorer.pack([rollouts[i] for i in turn]) for name, turn in turns.items()}
        for name in self.names:
            if micro_batches := self.scorer.even(packed[name]):
                yield name, self.swap_in(name), micro_batches

    def swap_in(self, name: str) -> Any:
        """The resident model of the teacher's architecture, holding its weights."""
        key, wanted = _architecture(self._models[name]), self._key(name)
        if self._present[key] != wanted:
            quantized_teachers.fill(self._residents[key], self._weights[wanted], self.scorer.impl)
            self._present[key] = wanted
        return self._residents[key]

    def _load(self, name: str, config: Config) -> None:
        path, key = config.teachers[name].checkpoint, _architecture(self._models[name])
        if key not in self._residents:
            built = self.scorer.build(self._models[name], config.run.precision, f"teachers.{name}")
            self._residents[key], self._present[key] = built, ""
        if self.groups.last_stage and {"output_weight", "hidden"} & set(self.nvfp4[name]):
            weight = self._residents[key].get_parameter("output_layer.weight")
            check_impl(self.scorer.impl, weight, f"teachers.{name}.nvfp4", packed=True)
        self.ids[name] = self._read_checkpoint(name)
        if (stored := self._key(name)) not in self._weights:
            try:
                self._weights[stored] = quantized_teachers.store(
                    self._residents[key], self.nvfp4[name], self.groups, self.vocab_size, self.scorer.impl
                )
            except ConfigurationError as error:
                raise ConfigurationError(f"teachers.{name}.{error}") from None
        log.info("teacher %s: %s from %s", name, self.ids[name][: 12 if name in self._named else None], path)

    def _read_checkpoint(self, name: str) -> str:
        """The checkpoint_id; its resident model then holds the weights as they are in the checkpoint."""
        path, key = self._checkpoints[name], _architecture(self._models[name])
        try:
            found = checkpoint.load_weights(path, self._residents[key], self.groups)["checkpoint_id"]
        except ConfigurationError as error:
            raise ConfigurationError(f"teachers.{name}.checkpoint = {path}: {error}") from None
        self._present[key] = found  # the key of a teacher that packs nothing
        return found


def _checked_manifest(name: str, config: Config, tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, Any]:
    """A teacher's manifest; one whose checkpoint says that it reads text otherwise is refused."""
    where = f"teachers.{name}.checkpoint = {config.teachers[name].checkpoint}"
    try:
        manifest = checkpoint.read_manifest(config.teachers[name].checkpoint)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    run_record.check_place(config.teachers[name].checkpoint, manifest, where)
    reads = {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha, "vocab_size": vocab_size}
    for key, ours in reads.items():
        if key not in manifest:
            raise ConfigurationError(
                f"{where}: its mopd_manifest.json lacks {key}, so nothing says that it reads text as the student does;"
                f" {_way_out(manifest)} (the student has {reads})"
            )
        if manifest[key] != ours:
            raise ConfigurationError(
                f"{where}: its {key} is {manifest[key]!r}, the student's {ours!r}; a teacher must share tokenizer, chat"
                " template and vocabulary with the student: name another checkpoint or the tokenizer it was made with"
            )
    return manifest


def _identity(name: str, config: Config, manifest: Mapping[str, Any]) -> str:
    """What the manifest says, where nobody reads the weights that it is of."""
    if "checkpoint_id" not in manifest:
        raise ConfigurationError(
            f"teachers.{name}.checkpoint = {config.teachers[name].checkpoint}: its mopd_manifest.json lacks"
            " checkpoint_id, by which training knows what the scoring world's scores are of: write there the one that"
            " a start with asynchrony.mode = inline, or a scoring world by itself, says when it loads the teacher"
        )
    return manifest["checkpoint_id"]


def _architecture(model: Model) -> str:
    """What decides a model's function without its MTP heads, as text to compare."""
    return json.dumps(facts(model), sort_keys=True)


def _way_out(manifest: Mapping[str, Any]) -> str:
    if checkpoint.COMPANIONS in manifest and "run_id" not in manifest:  # of a conversion
        return (
            "put the tokenizer's files, chat template included, beside config.json of the Hugging Face directory it was"
            " converted from"
        )
    return "write tokenizer_sha, template_sha and vocab_size into it"


def _plain(item: Rollout | ScoredRollout) -> Rollout:
    return item.rollout if isinstance(item, ScoredRollout) else item
