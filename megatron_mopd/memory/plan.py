"""What a configuration needs on every GPU, before one is rented: parameters, gradients, optimizer, activations, caches
and teachers.

Weights, gradients and optimizer state are exact (weights); what depends on the data is an estimate
(activations). A run holds the items of ``always`` throughout and those of one phase at a time, so its peak is
the first plus the largest phase. Imports neither torch nor megatron.core; layouts checks and searches layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megatron_mopd import presets
from megatron_mopd.config import Config, ConfigurationError, Model
from megatron_mopd.memory import activations
from megatron_mopd.memory.activations import LOGPROB_WORKSPACE, Recompute, Shard, Stack
from megatron_mopd.memory.quantized import original_bytes, stored_sizes
from megatron_mopd.memory.weights import (
    OUTPUT_WEIGHT,
    Buffer,
    buffers,
    padded_vocab,
    router_buffer_bytes,
    weights,
    while_filling,
)

GIB = 2**30
Phase = Literal["always", "building", "rollout", "scoring", "update", "step"]
PHASES: tuple[Phase, ...] = ("building", "rollout", "scoring", "update", "step")
FIELDS = ("tensor", "expert", "expert_tensor", "pipeline")


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
    """Memory of one rank of the pipeline stage that needs most; all ranks of a stage are alike.

    Example: ``plan(config, Machine(world=512)).peak / GIB``.
    """

    config: Config
    machine: Machine
    stage: int  # from 0
    layers: str  # of the trunk on this stage
    stage_peaks: tuple[int, ...]  # bytes, of every stage
    items: tuple[Item, ...]
    parameters: int  # elements of the student on this rank, padding apart
    teachers: int  # copies in host memory
    host: int  # bytes of all teachers on one node, whichever stage it holds
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
    p = presets.staged(presets.resolve(config.model), config.parallel)
    stages = [_stage_plan(config, machine, p, stage) for stage in range(config.parallel.pipeline)]
    most = max(stages, key=lambda plan: plan.peak)
    return replace(
        most,
        stage_peaks=tuple(plan.peak for plan in stages),
        host=max(plan.host for plan in stages),
        host_pinned=max(plan.host_pinned for plan in stages),
    )


def _stage_plan(config: Config, machine: Machine, p: presets.Preset, stage: int) -> Plan:
    shard = _shard(config, machine, p, stage)
    e, train = shard.bytes_each, {"train_router": config.model.train_router, "train_mtp": config.mtp.train}
    found = weights(p, config.parallel, e, mtp=True, stage=stage, **train)
    held = buffers(found, machine.world, config.parallel, config.optimizer.distributed)
    in_buffers = sum(b.numel * b.bytes_each for b in held)
    frozen = sum(w.nbytes for w in found if not w.trainable) + router_buffer_bytes(p, mtp=True, stage=stage)
    widest = max((w.nbytes for w in found if w.trainable), default=0)
    padding = sum((b.numel - b.unpadded) * b.bytes_each for b in held)
    residents, hosted, pinned = _teachers(config, stage)
    shares, on_node = sorted({b.shards for b in held}) or [1], min(machine.gpus_per_node, machine.world)
    always = [
        Item("parameters", in_buffers + frozen, "always", True, f"{_type(e)}, {padding / 2**10:.1f} KiB of it padding"),
        Item("gradients", sum(4 * b.numel for b in held), "always", True, "fp32 main_grad buffers"),
        Item("optimizer", sum(b.optimizer_bytes for b in held), "always", True, _optimizer(config, e, shares)),
        Item("resident teacher", residents, "always", True, f"{_type(e)} parameters, one model an architecture"),
    ]
    if recipe := config.quantization.train:
        copies = original_bytes(found, recipe, p, stage)
        always.append(Item("originals", copies, "always", True, f"of the parameters that {recipe} quantizes"))
    return Plan(
        config=config,
        machine=machine,
        stage=stage,
        layers=shard.layers,
        stage_peaks=(),
        items=(*always, *_building(held, config.optimizer.distributed), *_phases(config, machine, shard, widest, held)),
        parameters=sum(w.numel for w in found),
        teachers=len(config.teachers),
        host=hosted * on_node,
        host_pinned=pinned * on_node,
    )


def settings(plan: Plan) -> str:
    """The layout as it stands in a configuration; pipeline stages where there are several."""
    named = {name: size for name, size in plan.layout.items() if size > 1 or name != "pipeline"}
    return ", ".join(f"parallel.{name} = {size}" for name, size in named.items())


def gib(nbytes: float) -> str:
    """``12.3 GiB``; small amounts with two digits."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / GIB:.2g} GiB"


def rollout_rows(config: Config, machine: Machine) -> int:
    """Sequences that one data-parallel rank decodes together, in training or in evaluation; 0 where none is."""
    ranks, rows = machine.world // (config.parallel.tensor * config.parallel.pipeline), 0
    if config.source.type == "rollout":
        mine = math.ceil(config.rollout.prompts_per_step / ranks) * config.rollout.samples_per_prompt
        rows = min(config.rollout.batch_size, mine)
    elif config.source.type == "traces":  # teachers write, before the first step
        rows = min(config.rollout.batch_size, math.ceil(config.source.per_domain / ranks))
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


def _phases(config: Config, machine: Machine, shard: Shard, widest: int, held: Sequence[Buffer]) -> Iterator[Item]:
    """What comes and goes; estimates, from the longest sequences that the configuration allows."""
    p, length, ends = shard.preset, config.model.max_sequence_length, shard.waiting == 0  # with the output layer
    tokens = config.batching.micro_batch_size * length
    peak = activations.update(shard, tokens, _recompute(config), mtp=config.mtp.train)
    what = f"{config.batching.micro_batch_size} x {length:,} tokens"
    flight = f", {shard.waiting} more in flight" if shard.waiting else ""
    workspace, said = LOGPROB_WORKSPACE, "mopd_kernels' bound; no [T, V] logits"
    if config.kernels.update == "logits" and config.objective.type == "mopd":
        # Their gradient, in their place, waits for backward while the MTP heads take the workspace.
        vocab = padded_vocab(p.vocab_size, config.parallel.tensor) // config.parallel.tensor
        workspace += tokens * vocab * shard.bytes_each
        said = "logits of a micro-batch and mopd_kernels' bound"
    yield Item("activations", round(peak), "update", False, what + flight)
    yield Item("weight gradient", widest, "update", False, "the largest, on its way into main_grad")
    if ends:
        yield Item("log-probabilities", workspace, "update", False, said)
    if machine.stack == "local":
        roots = sum(4 * (b.numel // b.shards) for b in held)
        yield Item("Adam's roots", roots, "step", False, "torch's Adam, where no fused one is installed")
    if config.teachers:
        models = {preset for _, preset in _teacher_models(config)}
        peak = max(activations.scoring(_shard(config, machine, m, shard.stage), tokens) for m in models)
        yield Item("teacher's activations", round(peak), "scoring", False, f"forward only, {what}")
        if ends:
            bound = "mopd_kernels' bound; no [T, V] logits"
            yield Item("log-probabilities", LOGPROB_WORKSPACE, "scoring", False, bound)
    if rows := rollout_rows(config, machine):
        prompt = machine.prompt or length - config.rollout.max_new_tokens
        capacity = min(prompt + config.rollout.max_new_tokens, length)
        keys, states = activations.cache(shard, rows, capacity)
        together, width = _read_at_once(config, rows, prompt)
        read, draw = activations.prefill(shard, together, width), activations.drawing(shard, rows) if ends else 0
        reading = max(read, draw, activations.step(shard, rows, capacity))
        said = f"{together} of {rows} prompts of {width:,} tokens read at once"
        yield Item("keys and values", keys, "rollout", False, f"{rows} rows of {capacity:,} tokens")
        yield Item("Mamba states", states, "rollout", False, f"{rows} rows, fp32")
        twice = activations.replaced(shard, rows, capacity)
        yield Item("layer's caches twice", twice, "rollout", False, "as one batch follows another or drops rows")
        yield Item("prefill", round(reading), "rollout", False, said)


def _read_at_once(config: Config, rows: int, prompt: int) -> tuple[int, int]:
    """Prompts that decoding.Decoder.prefill reads together, and their length: of prompts of up to ``prompt`` tokens
    those that make the most tokens. A length that does not divide rollout.prefill_tokens leaves some of them unused,
    a shorter one does not."""
    tokens = config.rollout.prefill_tokens
    together = min(rows, math.ceil(tokens / prompt))
    return together, prompt if together == 1 else min(prompt, tokens // together)


def _shard(config: Config, machine: Machine, p: presets.Preset, stage: int) -> Shard:
    return Shard(
        preset=p,
        parallel=config.parallel,
        bytes_each=element_bytes(config),
        stack=machine.stack,
        balance=machine.balance,
        stage=stage,
    )


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


def _teacher_models(config: Config) -> list[tuple[Model, presets.Preset]]:
    """Architectures of the teachers, whose MTP heads are never built, in the student's vocabulary, cut into stages."""
    vocab, found = presets.resolve(config.model).vocab_size, []
    for model in (teacher.model or config.model for teacher in config.teachers.values()):
        model = model.model_copy(update={"vocab_size": vocab})
        staged = presets.staged(presets.resolve(model), config.parallel)
        found.append((model, replace(staged, pattern=staged.pattern.split("/")[0])))
    return found


def _teachers(config: Config, stage: int) -> tuple[int, int, int]:
    """Bytes of one rank: resident models, host copies of all teachers, and the same as pinned memory."""
    heads_of: dict[tuple[object, ...], dict[bool, int]] = {}  # whether packed -> bytes of an output weight
    residents: dict[tuple[object, ...], int] = {}
    hosted = pinned = 0
    for teacher, (model, p) in zip(config.teachers.values(), _teacher_models(config), strict=True):
        found = weights(p, config.parallel, element_bytes(config), mtp=False, stage=stage)
        bias = 4 * p.num_moe_experts
        biases = [bias] * (router_buffer_bytes(p, mtp=False, stage=stage) // bias)
        experts = p.num_moe_experts // config.parallel.expert
        sizes = biases + [size for w in found for size in stored_sizes(w, teacher.nvfp4, experts)]
        hosted += sum(sizes)
        pinned += sum(1 << (size - 1).bit_length() for size in sizes)
        # One that packs its output weight has it on the device in its turn; another of its architecture needs both.
        head = [size for w in found if w.name == OUTPUT_WEIGHT for size in stored_sizes(w, teacher.nvfp4, experts)]
        other = {k: v for k, v in sorted(model.override.items()) if not k.startswith("recompute_")}
        key = (p, repr(other))
        trunk = sum(biases) + sum(w.nbytes for w in found if w.name != OUTPUT_WEIGHT)
        heads = heads_of.setdefault(key, {})
        heads["output_weight" in teacher.nvfp4] = sum(head)
        residents[key] = trunk + sum(heads.values())
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
