"""What one rank holds of a model: every parameter with mcore's name and local size, and the buffers over them.

Counted from dimensions alone, without a model, a process group or torch. A test builds the same ranks with mcore on the
meta device and compares name by name. Sizes are in elements unless a name says bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_mopd.config import Parallel
from megatron_mopd.pattern import parse_pattern
from megatron_mopd.presets import Preset

PARAM_ALIGNMENT = 64
"""Elements to which mcore's distributed optimizer aligns the start of a parameter in its buffer (param_layout.py)."""
BUCKET_ALIGNMENT = 128
"""The end of a buffer is a multiple of this and of the data-parallel size, so that every rank owns an equal share."""
OUTPUT_WEIGHT = "output_layer.weight"
MAIN_AND_MOMENTS = 12
"""Bytes of optimizer state an element: fp32 main parameter and two Adam moments."""
MOMENTS = 8
"""The same for a parameter that is fp32 itself and so is its own main parameter."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter on one rank."""

    name: str
    numel: int
    bytes_each: int
    expert: bool = False  # gradients are reduced over the ranks that hold the same experts
    trainable: bool = True
    apart: bool = False  # in a bucket of its own

    @property
    def nbytes(self) -> int:
        return self.numel * self.bytes_each


@dataclass(frozen=True, slots=True)
class Buffer:
    """One of mcore's contiguous buffers: parameters of one dtype whose gradients are reduced over the same ranks."""

    numel: int  # padding included
    unpadded: int
    bytes_each: int  # of its parameters; its gradients are fp32
    shards: int  # data-parallel ranks that share the optimizer state
    expert: bool

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state of the rank whose share holds no padding."""
        return self.numel // self.shards * (MOMENTS if self.bytes_each == 4 else MAIN_AND_MOMENTS)


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of embedding and output weight, padding included; the rule of ``student.padded_vocab_size``."""
    return -(-vocab_size // tensor) * tensor


def weights(
    p: Preset,
    parallel: Parallel,
    bytes_each: int,
    *,
    mtp: bool,
    train_router: bool = False,
    train_mtp: bool = True,
    stage: int = 0,
) -> list[Weight]:
    """Parameters of one rank in mcore's order; ``bytes_each`` is 2 (bf16) or 4 (fp32). All ranks of a stage are alike.

    ``p`` is staged (``presets.staged``); ``stage`` counts its pipeline stages from 0. ``A_log`` and ``D`` of Mamba
    layers stay fp32. Without ``mtp`` the trunk alone, as teachers are built. MTP behind another stage brings a copy of
    the embedding, which mcore keeps equal to the first stage's; both have a bucket of their own.
    """
    parsed, rows = parse_pattern(p.pattern), padded_vocab(p.vocab_size, parallel.tensor) // parallel.tensor
    first, last = stage == 0, stage == len(parsed.stages) - 1
    heads, found = parsed.mtp if mtp else "", []
    if first or (last and heads):
        twice = bool(heads) and not (first and last)
        found.append(Weight("embedding.word_embeddings.weight", rows * p.hidden_size, bytes_each, apart=twice))
    for index, symbol in enumerate(parsed.stages[stage]):
        found += _layer(p, parallel, symbol, f"decoder.layers.{index}.", bytes_each, train_router)
    if not last:
        return found
    found.append(Weight("decoder.final_norm.weight", p.hidden_size, bytes_each))
    if heads:
        block = list(_mtp(p, parallel, heads, bytes_each, train_router))
        found += block if train_mtp else [replace(weight, trainable=False) for weight in block]
    found.append(Weight(OUTPUT_WEIGHT, rows * p.hidden_size, bytes_each))
    return found


def router_buffer_bytes(p: Preset, mtp: bool, stage: int = 0) -> int:
    """fp32 buffers that mcore registers per router: expert bias and tokens per expert; equal on a stage's ranks."""
    parsed = parse_pattern(p.pattern)
    heads = parsed.mtp if mtp and stage == len(parsed.stages) - 1 else ""
    return (parsed.stages[stage] + heads).count("E") * 2 * 4 * p.num_moe_experts


def buffers(found: Iterable[Weight], world: int, parallel: Parallel, distributed: bool) -> list[Buffer]:
    """mcore's gradient buffers over the trainable parameters, one bucket each but for an embedding that is there twice
    (no overlap of reduction and backward).

    With the distributed optimizer parameters live in such a buffer too, and mcore pads: see PARAM_ALIGNMENT and
    BUCKET_ALIGNMENT. Without it there is no padding and every rank holds the whole optimizer state.
    """
    own_experts = parallel.expert > 1 or parallel.expert_tensor != parallel.tensor
    groups: dict[tuple[int, bool], list[Weight]] = {}
    for weight in found:
        if weight.trainable:
            groups.setdefault((weight.bytes_each, weight.expert and own_experts), []).append(weight)
    result = []
    for (bytes_each, expert), members in groups.items():
        ways = parallel.pipeline * (parallel.expert * parallel.expert_tensor if expert else parallel.tensor)
        shards, unpadded = world // ways if distributed else 1, sum(weight.numel for weight in members)
        numel = _padded(members, shards) if distributed else unpadded
        result.append(Buffer(numel, unpadded, bytes_each, shards, expert))
    return result


def while_filling(held: Sequence[Buffer]) -> int:
    """Bytes beyond parameters and gradients while mcore moves parameters that exist already into its buffers.

    Each buffer is made whole, then takes its parameters over one by one; the gradients of later ones are not there yet.
    """
    later, most = 4 * sum(buffer.numel for buffer in held), 0
    for buffer in held:
        later -= 4 * buffer.numel
        most = max(most, buffer.numel * buffer.bytes_each - later)
    return most


def _padded(members: Sequence[Weight], shards: int) -> int:
    """mcore lays parameters out last to first."""
    end, bucket = 0, math.lcm(shards, BUCKET_ALIGNMENT)
    for weight in reversed(members):
        end = _up(end, bucket if weight.apart else PARAM_ALIGNMENT) + weight.numel
        end = _up(end, bucket) if weight.apart else end
    return _up(end, bucket)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _layer(
    p: Preset, parallel: Parallel, symbol: str, prefix: str, bytes_each: int, train_router: bool
) -> Iterator[Weight]:
    h, tensor = p.hidden_size, parallel.tensor
    if symbol == "M":
        yield from _mamba(p, tensor, prefix + "mixer.", bytes_each)
    elif symbol == "*":
        heads, both = p.num_attention_heads * p.kv_channels, 2 * p.num_query_groups * p.kv_channels
        at = prefix + "self_attention."
        yield Weight(at + "linear_proj.weight", h * heads // tensor, bytes_each)
        yield Weight(at + "linear_qkv.weight", h * (heads + both) // tensor, bytes_each)
        yield Weight(at + "linear_qkv.layer_norm_weight", h, bytes_each)
    elif symbol == "-":
        yield Weight(prefix + "mlp.linear_fc1.weight", h * p.ffn_hidden_size // tensor, bytes_each)
        yield Weight(prefix + "mlp.linear_fc1.layer_norm_weight", h, bytes_each)
        yield Weight(prefix + "mlp.linear_fc2.weight", h * p.ffn_hidden_size // tensor, bytes_each)
    else:
        yield Weight(prefix + "pre_mlp_layernorm.weight", h, bytes_each)
        yield from _experts(p, parallel, prefix + "mlp.", bytes_each, train_router)


def _mamba(p: Preset, tensor: int, at: str, bytes_each: int) -> Iterator[Weight]:
    h, heads = p.hidden_size, p.mamba_num_heads // tensor
    inner, groups = heads * p.mamba_head_dim, p.mamba_num_groups // tensor
    channels = inner + 2 * groups * p.mamba_state_dim
    yield Weight(at + "conv1d_weight", channels * p.mamba_conv, bytes_each)
    yield Weight(at + "conv1d_bias", channels, bytes_each)
    yield Weight(at + "dt_bias", heads, bytes_each)
    yield Weight(at + "A_log", heads, 4)
    yield Weight(at + "D", heads, 4)
    yield Weight(at + "in_proj.weight", h * (inner + channels + heads), bytes_each)
    yield Weight(at + "in_proj.layer_norm_weight", h, bytes_each)
    yield Weight(at + "norm.weight", inner, bytes_each)
    yield Weight(at + "out_proj.weight", h * inner, bytes_each)


def _experts(p: Preset, parallel: Parallel, at: str, bytes_each: int, train_router: bool) -> Iterator[Weight]:
    """Router and latent projections are whole on every rank; shared experts are cut by tensor parallelism."""
    h, width = p.hidden_size, p.moe_latent_size or p.hidden_size
    yield Weight(at + "router.weight", p.num_moe_experts * h, bytes_each, trainable=train_router)
    if p.moe_latent_size:
        yield Weight(at + "fc1_latent_proj.weight", h * p.moe_latent_size, bytes_each)
        yield Weight(at + "fc2_latent_proj.weight", h * p.moe_latent_size, bytes_each)
    local = p.num_moe_experts // parallel.expert * width * p.moe_ffn_hidden_size // parallel.expert_tensor
    yield Weight(at + "experts.linear_fc1.weight", local, bytes_each, expert=True)
    yield Weight(at + "experts.linear_fc2.weight", local, bytes_each, expert=True)
    shared = h * p.moe_shared_expert_intermediate_size // parallel.tensor
    yield Weight(at + "shared_experts.linear_fc1.weight", shared, bytes_each)
    yield Weight(at + "shared_experts.linear_fc2.weight", shared, bytes_each)


def _mtp(p: Preset, parallel: Parallel, block: str, bytes_each: int, train_router: bool) -> Iterator[Weight]:
    """The one block that all MTP depths share."""
    h, at = p.hidden_size, "mtp.layers.0."
    yield Weight(at + "enorm.weight", h, bytes_each)
    yield Weight(at + "hnorm.weight", h, bytes_each)
    yield Weight(at + "eh_proj.weight", 2 * h * h // parallel.tensor, bytes_each)
    for index, symbol in enumerate(block):
        yield from _layer(p, parallel, symbol, f"{at}mtp_model_layer.layers.{index}.", bytes_each, train_router)
    yield Weight(at + "final_layernorm.weight", h, bytes_each)
