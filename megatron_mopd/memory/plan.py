"""What a configuration needs on every GPU, before one is rented: parameters, gradients, optimizer, activations, caches
and teachers.

Weights, gradients and optimizer state are exact (weights); what depends on the data is an estimate
(activations). A run holds the items of ``always`` throughout and those of one phase at a time, so its peak is
the first plus the largest phase. Imports neither torch nor megatron.core; layouts checks and searches layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_mopd import presets
from megatron_mopd.config import Config, ConfigurationError, Model
from megatron_mopd.memory import activations
from megatron_mopd.memory.activations import LOGPROB_WORKSPACE, Recompute, Shard, Stack
from megatron_mopd.memory.weights import Buffer, buffers, padded_vocab, router_buffer_bytes, weights, while_filling
from megatron_mopd.pattern import parse_pattern

GIB = 2**30
Phase = Literal["always", "building", "rollout", "scoring", "update", "step"]
PHASES: tuple[Phase, ...] = ("building", "rollout", "scoring", "update", "step")
FIELDS = ("tensor", "expert", "expert_tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The GPUs of a run; memory in bytes.

    ``reserve`` is what no item may use: CUDA context and kernels, buffers of NCCL's groups, cuBLAS workspaces and the
    allocator's fragmentation; 6 GiB by convention, not by measurement. ``balance``: tokens that reach the experts of
    the busiest rank over the mean; 1.5 by assumption. ``stack``: fused where transformer-engine and mamba-ssm are
    installed, local where this package's stand-ins serve. ``prompt``: tokens of the longest prompts, of which a batch
    may consist; what rollout.max_new_tokens leaves of the context when None.
    """

    world: int
    gpus_per_node: int = 8
    gpu: int = 80 * GIB
    reserve: int = 6 * GIB
    balance: float = 1.5
    stack: Stack = "fused"
    prompt: int | None = None

    @property
    def usable(self) -> int:
        return self.gpu - self.reserve


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a plan: bytes on each GPU, when they are held, whether counted or estimated, and what they are."""

    name: str
    nbytes: int
    phase: Phase
    exact: bool
    what: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of one rank; all ranks are alike.

    Example: ``plan(config, Machine(world=512)).peak / GIB``.
    """

    config: Config
    machine: Machine
    items: tuple[Item, ...]
    parameters: int  # elements of the student on this rank, padding apart
    teachers: int  # copies in host memory
    host: int  # bytes of all teachers on one node
    host_pinned: int  # the same as torch allocates pinned memory: each tensor up to the next power of two

    @cached_property
    def phase(self) -> Phase:
        """The phase of the peak."""
        return max(PHASES, key=lambda phase: sum(i.nbytes for i in self.items if i.phase == phase))

    @cached_property
    def peak(self) -> int:
        """Bytes: what is always held and the largest phase."""
        return sum(i.nbytes for i in self.at_peak)

    @property
    def at_peak(self) -> tuple[Item, ...]:
        return tuple(i for i in self.items if i.phase in ("always", self.phase))

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.usable

    @property
    def layout(self) -> dict[str, int]:
        return {name: getattr(self.config.parallel, name) for name in FIELDS}

    def largest(self, count: int = 3) -> list[Item]:
        """Items of the peak by size."""
        return sorted(self.at_peak, key=lambda item: -item.nbytes)[:count]


def plan(config: Config, machine: Machine) -> Plan:
    """Count and estimate; the layout must have passed ``layouts.check``."""
    p, e = presets.resolve(config.model), element_bytes(config)
    mtp = bool(parse_pattern(p.pattern).mtp)
    found = weights(p, config.parallel, e, mtp=True, train_router=config.model.train_router, train_mtp=config.mtp.train)
    held = buffers(found, machine.world, config.parallel, config.optimizer.distributed)
    in_buffers = sum(b.numel * b.bytes_each for b in held)
    frozen = sum(w.nbytes for w in found if not w.trainable) + router_buffer_bytes(p, mtp)
    widest = max((w.nbytes for w in found if w.trainable), default=0)
    padding = sum((b.numel - b.unpadded) * b.bytes_each for b in held)
    residents, hosted, pinned = _teachers(config)
    shares, on_node = sorted({b.shards for b in held}) or [1], min(machine.gpus_per_node, machine.world)
    always = [
        Item("parameters", in_buffers + frozen, "always", True, f"{_type(e)}, {padding / 2**10:.1f} KiB of it padding"),
        Item("gradients", sum(4 * b.numel for b in held), "always", True, "fp32 main_grad buffers"),
        Item("optimizer", sum(b.optimizer_bytes for b in held), "always", True, _optimizer(config, e, shares)),
        Item("resident teacher", residents, "always", True, f"{_type(e)} parameters, one model an architecture"),
    ]
    return Plan(
        config=config,
        machine=machine,
        items=(*always, *_building(held, config.optimizer.distributed), *_phases(config, machine, p, e, widest, held)),
        parameters=sum(w.numel for w in found),
        teachers=len(config.teachers),
        host=hosted * on_node,
        host_pinned=pinned * on_node,
    )


def settings(plan: Plan) -> str:
    """The layout as it stands in a configuration."""
    return ", ".join(f"parallel.{name} = {size}" for name, size in plan.layout.items())


def gib(nbytes: float) -> str:
    """``12.3 GiB``; small amounts with two digits."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / GIB:.2g} GiB"


def rollout_rows(config: Config, machine: Machine) -> int:
    """Sequences that one data-parallel rank decodes together, in training or in evaluation; 0 where none is."""
    ranks, rows = machine.world // config.parallel.tensor, 0
    if config.source.type == "rollout":
        mine = math.ceil(config.rollout.prompts_per_step / ranks) * config.rollout.samples_per_prompt
        rows = min(config.rollout.batch_size, mine)
    if config.data.held_out:
        domains = len({d for teacher in config.teachers.values() for d in teacher.domains}) or 1
        mine = math.ceil(max(config.evaluation.samples, config.evaluation.final_samples) * domains / ranks)
        rows = max(rows, min(config.evaluation.batch_size, mine))
    return rows


def _building(held: Sequence[Buffer], distributed: bool) -> Iterator[Item]:
    """The start, when optimizer state is not there yet: only what goes beyond it counts."""
    if distributed:
        beyond = max(0, while_filling(held) - sum(b.optimizer_bytes for b in held))
        yield Item(
            "parameters twice", beyond, "building", True, "moving into buffers, less the optimizer still to come"
        )


def _phases(
    config: Config, machine: Machine, p: presets.Preset, e: int, widest: int, held: Sequence[Buffer]
) -> Iterator[Item]:
    """What comes and goes; estimates, from the longest sequences that the configuration allows."""
    shard = _shard(config, machine, p, e)
    length = config.model.max_sequence_length
    tokens = config.batching.micro_batch_size * length
    peak = activations.update(shard, tokens, _recompute(config), mtp=config.mtp.train)
    what = f"{config.batching.micro_batch_size} x {length:,} tokens"
    workspace, said = LOGPROB_WORKSPACE, "mopd_kernels' bound; no [T, V] logits"
    if config.kernels.update == "logits" and config.objective.type == "mopd":
        # Their gradient, in their place, waits for backward while the MTP heads take the workspace.
        workspace += tokens * padded_vocab(p.vocab_size, config.parallel.tensor) // config.parallel.tensor * e
        said = "logits of a micro-batch and mopd_kernels' bound"
    yield Item("activations", round(peak), "update", False, what)
    yield Item("weight gradient", widest, "update", False, "the largest, on its way into main_grad")
    yield Item("log-probabilities", workspace, "update", False, said)
    if machine.stack == "local":
        roots = sum(4 * (b.numel // b.shards) for b in held)
        yield Item("Adam's roots", roots, "step", False, "torch's Adam, where no fused one is installed")
    if config.teachers:
        models = {presets.resolve(model) for model in _teacher_models(config)}
        peak = max(activations.scoring(_shard(config, machine, m, e), tokens) for m in models)
        yield Item("teacher's activations", round(peak), "scoring", False, f"forward only, {what}")
        yield Item("log-probabilities", LOGPROB_WORKSPACE, "scoring", False, "mopd_kernels' bound; no [T, V] logits")
    if rows := rollout_rows(config, machine):
        prompt = machine.prompt or length - config.rollout.max_new_tokens
        capacity = min(prompt + config.rollout.max_new_tokens, length)
        keys, states = activations.cache(shard, rows, capacity)
        reading = max(activations.prefill(shard, rows, prompt), activations.drawing(shard, rows))
        yield Item("keys and values", keys, "rollout", False, f"{rows} rows of {capacity:,} tokens")
        yield Item("Mamba states", states, "rollout", False, f"{rows} rows, fp32")
        yield Item("prefill", round(reading), "rollout", False, f"{rows} prompts of {prompt:,} tokens read at once")


def _shard(config: Config, machine: Machine, p: presets.Preset, e: int) -> Shard:
    return Shard(preset=p, parallel=config.parallel, bytes_each=e, stack=machine.stack, balance=machine.balance)


def _recompute(config: Config) -> Recompute:
    given = config.model.override
    if given.get("recompute_granularity") is None:
        return Recompute()
    if given["recompute_granularity"] != "full":
        raise ConfigurationError(
            f"model.override.recompute_granularity = {given['recompute_granularity']!r}: the plan knows full"
            " recomputation and none; set it to full or leave it out"
        )
    number = given.get("recompute_num_layers") or 1
    if given.get("recompute_method") == "block":
        return Recompute(layers=1, count=number)
    return Recompute(layers=number)


def _teacher_models(config: Config) -> list[Model]:
    """Architectures of the teachers, whose MTP heads are never built, in the student's vocabulary."""
    vocab = presets.resolve(config.model).vocab_size
    models = [teacher.model or config.model for teacher in config.teachers.values()]
    return [
        m.model_copy(update={"pattern": presets.resolve(m).pattern.split("/")[0], "vocab_size": vocab}) for m in models
    ]


def _teachers(config: Config) -> tuple[int, int, int]:
    """Bytes of one rank: resident models, host copies of all teachers, and the same as pinned memory."""
    residents: dict[tuple[object, ...], int] = {}
    hosted = pinned = 0
    for model in _teacher_models(config):
        p = presets.resolve(model)
        sizes = [w.nbytes for w in weights(p, config.parallel, element_bytes(config), mtp=False)]
        bias = 4 * p.num_moe_experts
        sizes += [bias] * (router_buffer_bytes(p, mtp=False) // bias)
        hosted += sum(sizes)
        pinned += sum(1 << (size - 1).bit_length() for size in sizes)
        other = {k: v for k, v in sorted(model.override.items()) if not k.startswith("recompute_")}
        residents[p, repr(other)] = sum(sizes)
    return sum(residents.values()), hosted, pinned


def _optimizer(config: Config, e: int, shares: Sequence[int]) -> str:
    states = "fp32 master and two moments" if e == 2 else "two fp32 moments"
    if not config.optimizer.distributed:
        return f"{states}, whole on every rank"
    return f"{states}, over {' and '.join(map(str, shares))} ranks"


def element_bytes(config: Config) -> int:
    """Bytes a parameter; auto means GPUs here, and so bf16."""
    return 4 if config.run.precision == "fp32" else 2


def _type(e: int) -> str:
    return "bf16" if e == 2 else "fp32"
