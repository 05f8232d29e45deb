"""The teachers: any number of them in host memory, one resident model per architecture on the device.

A teacher's turn copies its weights into the resident model; rollouts are sorted by teacher, so each is loaded once a
pass. Teachers have no optimizer, no gradient buffers, no MTP and no gradient, and stay in eval mode outside every
list of models that mcore trains, so that nothing moves their routers' expert bias.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mopd import batch as batches_of
from megatron_mopd import checkpoint, masks, presets, provenance, student
from megatron_mopd.config import Config, ConfigurationError, Model
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import Predictions, check_impl
from megatron_mopd.records import MicroBatch, Rollout, ScoredRollout
from mopd_kernels.dispatch import Impl
from mopd_kernels.divergence import Head, divergence

if TYPE_CHECKING:
    from megatron_mopd.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)

CERTAIN = 1e-4
"""A log-probability above this is no rounding of 0 but a fault."""
_HOW_NOT_WHAT = ("recompute_", "distribute_saved_activations")
"""Overrides that change how a model is computed, not what it is."""


class ScoringError(ValueError):
    """A teacher gave a value that is no log-probability."""


class TeacherPool:
    """Teachers of a configuration, loaded and checked; every rank builds one and calls it alike.

    Raises :class:`ConfigurationError`, before any weight is loaded, for a checkpoint that is missing or was made with
    another tokenizer, chat template, vocabulary or architecture; while loading, for one that is truncated or has
    other shapes.
    """

    def __init__(self, config: Config, groups: Groups, tokenizer: ChatTokenizer) -> None:
        self.groups, self.pad_token = groups, tokenizer.pad_token
        self.vocab_size = config.model.vocab_size or tokenizer.vocab_size
        self.temperature = config.rollout.temperature
        self._impl: Impl = config.kernels.impl
        self._micro_batch_size = config.batching.micro_batch_size
        self._dispatcher = config.parallel.dispatcher
        self._teacher_of = {domain: name for name, teacher in config.teachers.items() for domain in teacher.domains}
        self._models = {name: teacher.model or config.model for name, teacher in config.teachers.items()}
        for name in config.teachers:
            _check_manifest(name, config, self._models[name], tokenizer, self.vocab_size)
        self.ids: dict[str, str] = {}  # teacher name -> checkpoint_id
        self._weights: dict[str, dict[str, Tensor]] = {}  # checkpoint_id -> host copy of parameters and buffers
        self._residents: dict[str, Any] = {}  # architecture -> the model on the device
        self._present: dict[str, str] = {}  # architecture -> checkpoint_id of the weights in it
        for name in config.teachers:
            self._load(name, config)

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

    def require(self, domains: Iterable[str]) -> None:
        """Check at start that every domain has a teacher; raises as :meth:`route`."""
        for domain in sorted(set(domains)):
            self.route(domain)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Log-probabilities that each rollout's teacher gives to its tokens, at the sampling temperature, in fp32.

        This data-parallel rank's rollouts; their order is kept. Raises :class:`ConfigurationError` for an unknown
        domain, :class:`provenance.ProvenanceError` for an unsigned rollout and :class:`ScoringError` for NaN, an
        infinity or a log-probability above 1e-4, naming teacher, prompt and position.
        """
        turns: dict[str, list[int]] = {name: [] for name in self.names}
        for index, rollout in enumerate(rollouts):
            turns[self.route(rollout.prompt.domain)].append(index)
        scored: dict[int, ScoredRollout] = {}
        for name, model, micro_batches in self._visits(rollouts, turns):
            flat = torch.cat([self._logprobs(model, mb) for mb in micro_batches]).cpu()
            own = [rollouts[i] for i in turns[name]]
            parts = flat.split([len(rollout.completion) for rollout in own])
            for index, rollout, logprobs in zip(turns[name], own, parts, strict=True):
                _check_logprobs(logprobs, name, rollout)
                signed = provenance.scored_by(rollout, self.ids[name])
                scored[index] = ScoredRollout(rollout=signed, teacher=name, teacher_logprobs=logprobs.clone())
        return [scored[index] for index in range(len(rollouts))]

    @torch.no_grad()
    def reverse_kl(
        self, model: torch.nn.Module, rollouts: Sequence[Rollout], all_pairs: bool = False
    ) -> dict[str, dict[str, float]]:
        """``{teacher: {domain: nats}}``: exact KL(student || teacher), mean over completion tokens of all ranks'
        rollouts.

        ``model`` is the (wrapped) student. Each domain is held against its own teacher, or with ``all_pairs`` against
        every one. Domains without tokens are left out. Equal on all ranks.
        """
        turns: dict[str, list[int]] = {name: [] for name in self.names}
        for index, rollout in enumerate(rollouts):
            for name in self.names if all_pairs else (self.route(rollout.prompt.domain),):
                turns[name].append(index)
        domains = list(self._teacher_of)
        sums = torch.zeros(len(turns), len(domains), 2, dtype=torch.float64, device=self.groups.device)
        was_training = model.training
        model.eval()
        for name, teacher, micro_batches in self._visits(rollouts, turns):
            for mb in micro_batches:
                ours, theirs = self._predictions(model, mb), self._predictions(teacher, mb)
                heads = (Head(p.hidden, p.weight) for p in (ours, theirs))
                kl = divergence("reverse_kl", *heads, **ours.options).value.double()
                of_row = torch.tensor([domains.index(d) if d else 0 for d in mb.domains])
                column = of_row[masks.segments(mb.cu_seqlens, len(mb.targets))].to(kl.device)
                sums[self.names.index(name)].index_add_(0, column, torch.stack([kl, torch.ones_like(kl)], dim=1))
        model.train(was_training)
        dist.all_reduce(sums, group=self.groups.dp)
        return {
            name: {d: total / tokens for d, (total, tokens) in zip(domains, row, strict=True) if tokens}
            for name, row in zip(self.names, sums.tolist(), strict=True)
        }

    def _visits(
        self, rollouts: Sequence[Rollout], turns: Mapping[str, list[int]]
    ) -> Iterator[tuple[str, Any, list[MicroBatch]]]:
        """Each teacher that any data-parallel rank needs, loaded, with this rank's micro-batches for it.

        All ranks get as many micro-batches, if empty ones, and so run the same collectives in the same order.
        """
        width = self.groups.tp_size
        packed = {
            name: batches_of.pack(
                [rollouts[i] for i in turn], self._micro_batch_size, self.pad_token, length_multiple=width
            )
            for name, turn in turns.items()
        }
        for name in self.names:
            if micro_batches := batches_of.even(packed[name], self.pad_token, self.groups, self._dispatcher):
                yield name, self._swap_in(name), micro_batches

    def _logprobs(self, model: Any, micro_batch: MicroBatch) -> Tensor:
        return self._predictions(model, micro_batch).logprobs(micro_batch.targets)

    def _predictions(self, model: Any, micro_batch: MicroBatch) -> Predictions:
        out = student.forward(model, micro_batch.tokens.to(self.groups.device))
        plain: Any = unwrap_model(model)
        hidden = student.gather_hidden(out.hidden, self.groups, plain.config)
        return Predictions(
            hidden[micro_batch.rows.to(hidden.device)],
            out.output_weight,
            temperature=self.temperature,
            group=self.groups.tp,
            valid_vocab=self.vocab_size,
            impl=self._impl,
        )

    def _swap_in(self, name: str) -> Any:
        """The resident model of the teacher's architecture, holding its weights."""
        key, wanted = _architecture(self._models[name]), self.ids[name]
        if self._present[key] != wanted:
            for tensor_name, tensor in _tensors(self._residents[key]):
                tensor.copy_(self._weights[wanted][tensor_name], non_blocking=True)
            self._present[key] = wanted
        return self._residents[key]

    def _load(self, name: str, config: Config) -> None:
        path, key = config.teachers[name].checkpoint, _architecture(self._models[name])
        if key not in self._residents:
            precision = presets.resolve_precision(config.run.precision, self.groups.device)
            model = student.build_model(
                self._models[name], config.parallel, self.groups, self.vocab_size, precision, mtp=False
            )
            check_impl(self._impl, model.get_parameter("output_layer.weight"), f"teachers.{name}")
            self._residents[key], self._present[key] = model.eval().requires_grad_(False), ""
        try:
            self.ids[name] = checkpoint.load_weights(path, self._residents[key], self.groups)["checkpoint_id"]
        except ConfigurationError as error:
            raise ConfigurationError(f"teachers.{name}.checkpoint = {path}: {error}") from None
        self._present[key] = self.ids[name]
        if self.ids[name] not in self._weights:  # equal checkpoints share one host copy
            self._weights[self.ids[name]] = {n: _host_copy(t) for n, t in _tensors(self._residents[key])}
        log.info("teacher %s: %s from %s", name, self.ids[name][:12], path)


def _check_manifest(name: str, config: Config, model: Model, tokenizer: ChatTokenizer, vocab_size: int) -> None:
    """Refuse a teacher whose checkpoint says that it reads text otherwise or is built otherwise."""
    where = f"teachers.{name}.checkpoint = {config.teachers[name].checkpoint}"
    try:
        manifest = checkpoint.read_manifest(config.teachers[name].checkpoint)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    facts = {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha, "vocab_size": vocab_size}
    for key, ours in facts.items():
        if key not in manifest:
            raise ConfigurationError(
                f"{where}: its mopd_manifest.json lacks {key}, so nothing says that it reads text as the student does;"
                f" write tokenizer_sha, template_sha and vocab_size into it (the student has {facts})"
            )
        if manifest[key] != ours:
            raise ConfigurationError(
                f"{where}: its {key} is {manifest[key]!r}, the student's {ours!r}; a teacher must share tokenizer, chat"
                " template and vocabulary with the student: name another checkpoint or the tokenizer it was made with"
            )
    if "model" in manifest and _architecture(manifest["model"]) != _architecture(model):
        raise ConfigurationError(
            f"{where}: was written by the model {_architecture(manifest['model'])}, expected {_architecture(model)};"
            f" give it as teachers.{name}.model or name another checkpoint"
        )


def _architecture(model: Model | Mapping[str, Any]) -> str:
    """What decides a model's function without its MTP heads, as text to compare."""
    fields = model.model_dump(mode="json") if isinstance(model, Model) else model
    pattern = fields.get("pattern") or presets.PRESETS[fields["preset"]].pattern
    override = {k: v for k, v in sorted(fields.get("override", {}).items()) if not k.startswith(_HOW_NOT_WHAT)}
    return f"{fields['preset']} {pattern.split('/')[0]} {override}"


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; the routers' expert bias is a buffer."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy


def _check_logprobs(logprobs: Tensor, teacher: str, rollout: Rollout) -> None:
    bad = ~(logprobs.isfinite() & (logprobs <= CERTAIN))
    if bad.any():
        position = int(bad.nonzero()[0, 0])
        raise ScoringError(
            f"teacher {teacher!r} gives log-probability {float(logprobs[position])} to completion token {position} of"
            f" prompt {rollout.prompt.id} ({rollout.prompt.domain}); its weights are damaged or its precision too low"
        )
