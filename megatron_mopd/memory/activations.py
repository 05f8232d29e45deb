"""Estimates of what one rank needs beside its weights: activations of an update, of scoring and of sampling.

Bytes, from dimensions alone. The method is that of Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models" (arXiv 2205.05198): what autograd keeps for backward, layer kind by layer kind. What mcore's modules
and this package's stand-ins keep was counted with ``saved_tensors_hooks``; what mamba-ssm's fused scan keeps
(``zxbcdt`` and the scan's output) is read from its source; what a backward pass holds beside that was fitted to the
allocator's peak on a CPU, over widths of every layer kind. Left out: tensors of less than 4 bytes a token (rstd,
lengths), workspaces of cuBLAS and of communication, and the allocator's rounding, which belong to the plan's reserve.

Letters: T tokens of a micro-batch, t its tokens on one rank under sequence parallelism, H hidden size, R routed tokens
that reach one rank's experts, e bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mopd.config import Parallel
from megatron_mopd.pattern import parse_pattern
from megatron_mopd.presets import Preset

Stack = Literal["fused", "local"]
LOGPROB_WORKSPACE = 300 * 10**6
"""Bytes that mopd_kernels may take for log-probabilities and their gradient, whatever T and V: its own bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's share of a model and how it computes.

    ``preset`` is staged (``presets.staged``), ``stage`` counts its pipeline stages from 0. ``stack``: fused,
    transformer-engine and mamba-ssm; local, the stand-ins of megatron_mopd.local_spec. ``balance``: tokens of the
    busiest rank's experts over the mean.
    """

    preset: Preset
    parallel: Parallel
    bytes_each: int
    stack: Stack
    balance: float
    stage: int = 0

    @property
    def layers(self) -> str:
        """Those of the trunk on this stage."""
        return parse_pattern(self.preset.pattern).stages[self.stage]

    @property
    def waiting(self) -> int:
        """Micro-batches that await their backward pass while another is in it: as many as stages follow this one, under
        mcore's schedule of one forward and one backward in turn (1F1B, Narayanan et al. 2021, arXiv 2104.04473)."""
        return len(parse_pattern(self.preset.pattern).stages) - 1 - self.stage

    @property
    def sequence_ways(self) -> int:
        return self.parallel.tensor

    @property
    def hidden(self) -> int:
        """H e: bytes of one token's hidden state."""
        return self.preset.hidden_size * self.bytes_each


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """Layers of the trunk that run again in backward: in segments of ``layers``, all or the first ``count``."""

    layers: int = 0  # 0: none
    count: int | None = None


def kept(s: Shard, symbol: str, tokens: float) -> float:
    """Bytes that one layer keeps for its backward pass; ``tokens`` is T."""
    p, e, tensor = s.preset, s.bytes_each, s.parallel.tensor
    t = tokens / s.sequence_ways
    total = _norm(s, t)
    if symbol == "*":
        heads = p.num_attention_heads / tensor
        # With more ranks than groups mcore gathers all of QKV and keeps views of it.
        whole = tensor if tensor > p.num_query_groups else 1
        qkv = whole * (p.num_attention_heads + 2 * p.num_query_groups) / tensor
        # Queries of several groups do not lie together, so making them one tensor copies them.
        context = heads * (2 if p.num_query_groups / tensor > 1 else 1)
        return total + tokens * ((qkv + context) * p.kv_channels * e + 4 * heads)
    if symbol == "-":
        return total + tokens * 2 * p.ffn_hidden_size / tensor * e
    if symbol == "M":
        return total + tokens * _mamba_kept(s)
    width = p.moe_latent_size or p.hidden_size
    routed = _routed(s, t) * (width + 3 * p.moe_ffn_hidden_size / s.parallel.expert_tensor) * e
    latent = t * p.moe_latent_size * e if p.moe_latent_size else 0
    shared = tokens * 2 * p.moe_shared_expert_intermediate_size / tensor * e
    return total + t * _router(p) + routed + latent + shared


def working(s: Shard, symbol: str, tokens: float) -> float:
    """Bytes beside ``kept`` at the peak of one layer's backward pass: gradients on their way and what is made again."""
    p, e, tensor = s.preset, s.bytes_each, s.parallel.tensor
    t = tokens / s.sequence_ways
    # Under sequence parallelism a linear's input is gathered again and its gradient is whole before it is scattered.
    total = 12 * t * p.hidden_size + (2 * tokens * s.hidden if tensor > 1 else 0)
    if symbol == "*":
        heads, groups = p.num_attention_heads / tensor, max(p.num_query_groups / tensor, 1)
        return total + tokens * 2 * (heads + groups) * p.kv_channels * e
    if symbol == "-":
        return total + tokens * 3 * p.ffn_hidden_size / tensor * e
    if symbol == "M":
        return total + tokens * _mamba_working(s)
    width, r = p.moe_latent_size or p.hidden_size, _routed(s, t)
    # The product with the routing weights is fp32 and so are its two gradients; in fp32 one of them is no copy.
    routed = r * p.moe_ffn_hidden_size / s.parallel.expert_tensor * (12 if e == 2 else 8)
    shared = tokens * 3 * p.moe_shared_expert_intermediate_size / tensor * e
    return total + max(routed, shared) + (2 * r * width + t * (p.moe_latent_size or 0)) * e + _gathered(s, t)


def update(s: Shard, tokens: float, recompute: Recompute, mtp: bool) -> float:
    """Peak bytes of forward and backward over one micro-batch, log-probabilities apart.

    Walks backward from the output: what is kept of the layers still to come, plus the layers at work. A recomputed
    expert layer, once done, still holds its input and the input's gradient: mcore's token dispatcher keeps the
    routing weights, and with them their graph, until the layer's next forward. Micro-batches that wait on an earlier
    pipeline stage keep their input and what its layers keep; the output, once sent, is freed.
    """
    p, t = s.preset, tokens / s.sequence_ways
    parsed, segments = parse_pattern(p.pattern), _segments(s.layers, recompute)
    stages = [
        _Stage(kept=t * s.hidden, at_work=sum(kept(s, x, tokens) for x in segment), held=segment.count("E"))
        if again
        else _Stage(kept=sum(kept(s, x, tokens) for x in segment), at_work=0.0, held=0)
        for segment, again in segments
    ]
    temporary = [max(working(s, x, tokens) for x in segment) for segment, _ in segments]
    waiting = s.waiting * (t * s.hidden + sum(stage.kept for stage in stages))
    heads = 1
    if s.waiting:  # the gradient comes from the next stage
        stages.append(_Stage(kept=0.0, at_work=0.0, held=0))
        temporary.append(2 * t * s.hidden)
    elif mtp and parsed.mtp:
        heads += parsed.depths
        stages += [_mtp_stage(s, parsed.mtp, tokens, recompute)] * parsed.depths
        temporary += [max(working(s, x, tokens) for x in parsed.mtp)] * parsed.depths
    if not s.waiting:
        stages.append(_Stage(kept=heads * (_norm(s, t) + tokens * s.hidden), at_work=0.0, held=0))
        temporary.append((2 + (s.parallel.tensor > 1)) * tokens * s.hidden)
    before = sum(stage.kept for stage in stages)
    peak = held = 0.0
    for stage, extra in zip(reversed(stages), reversed(temporary), strict=True):
        peak = max(peak, before + stage.at_work + extra + held)
        before -= stage.kept
        held += stage.held * (2 * t * s.hidden + t * _dispatcher(p))
    return t * s.hidden + peak + waiting  # with the embedding's output, or what the stage before sent


def scoring(s: Shard, tokens: float) -> float:
    """Peak bytes of a forward pass without gradients: two hidden states, the widest layer and the gathered rows."""
    t = tokens / s.sequence_ways
    layers = [kept(s, symbol, tokens) for symbol in set(s.layers)]
    if "E" in s.layers:
        layers.append(_experts(s, t, tokens))
    gathered = tokens * s.hidden if s.parallel.tensor > 1 else 0
    return 2 * t * s.hidden + max(max(layers) + gathered, 2 * tokens * s.hidden)


def cache(s: Shard, rows: int, capacity: int) -> tuple[int, int]:
    """Bytes that sampling remembers of ``rows`` sequences: (keys and values of ``capacity`` tokens, Mamba states)."""
    p, tensor = s.preset, s.parallel.tensor
    groups = max(p.num_query_groups // tensor, 1)
    attention = rows * capacity * (2 * groups * p.kv_channels + 1) * s.bytes_each
    heads, shared = p.mamba_num_heads // tensor, p.mamba_num_groups // tensor * p.mamba_state_dim
    inner = heads * p.mamba_head_dim
    mamba = inner * p.mamba_state_dim * 4 + (p.mamba_conv - 1) * (inner + 2 * shared) * s.bytes_each
    return s.layers.count("*") * attention, s.layers.count("M") * rows * mamba


def replaced(s: Shard, rows: int, capacity: int) -> int:
    """Bytes that the largest of one layer's caches takes: megatron_mopd.decoding makes those of all ``rows`` with the
    first of their prompts, layer by layer in place of the batch before, and copies them so when rows end."""
    keys, states = cache(s, rows, capacity)
    return max(keys // max(s.layers.count("*"), 1), states // max(s.layers.count("M"), 1))


def prefill(s: Shard, rows: int, prompt: int) -> float:
    """Peak bytes of reading ``rows`` prompts at once, caches apart: megatron_mopd.decoding walks whole sequences.

    Without sequence parallelism every tensor parallel rank holds all tokens and sends all of them to the experts. The
    scan is that of megatron_mopd.ssd on any stack.
    """
    p, e, tensor = s.preset, s.bytes_each, s.parallel.tensor
    tokens = rows * prompt
    heads, groups = p.num_attention_heads / tensor, max(p.num_query_groups / tensor, 1)
    layer = {
        "*": tokens * (3 * s.hidden + (3 * heads + 2 * groups) * p.kv_channels * e),
        "-": tokens * (3 * s.hidden + 2 * p.ffn_hidden_size / tensor * e),
        "M": tokens * ((8 + e) * p.hidden_size + _scan(s, min(p.mamba_chunk, prompt))),
        "E": tokens * 3 * s.hidden + _experts(s, tokens, tokens),
    }
    return max(layer[symbol] for symbol in set(s.layers))


def drawing(s: Shard, rows: int) -> int:
    """Bytes of drawing one token a row: this rank's fp32 logits ``[rows, V/tp]`` and their fp64 cumulative sum."""
    return rows * (-(-s.preset.vocab_size // s.parallel.tensor)) * (4 + 4 + 8 + 8)


def step(s: Shard, rows: int, capacity: int) -> float:
    """Peak bytes of one token a row where the caches are full: attention's scores, twice, and its fp32 weights."""
    heads = s.preset.num_attention_heads / s.parallel.tensor
    return rows * capacity * heads * (2 * s.bytes_each + 4) if "*" in s.layers else 0


@dataclass(frozen=True, slots=True)
class _Stage:
    kept: float  # from forward to its turn in backward
    at_work: float  # made again in its turn
    held: int  # expert layers that go on holding their input after it


def _segments(main: str, recompute: Recompute) -> list[tuple[str, bool]]:
    """Layers that are computed together, and whether they are made again in backward."""
    if not recompute.layers:
        return [(symbol, False) for symbol in main]
    limit = len(main) if recompute.count is None else recompute.count
    again = [(main[i : i + recompute.layers], True) for i in range(0, min(limit, len(main)), recompute.layers)]
    return again + [(symbol, False) for symbol in main[limit:]]


def _mtp_stage(s: Shard, block: str, tokens: float, recompute: Recompute) -> _Stage:
    """One MTP depth: norms of hidden state and embedding, their joint projection, the block."""
    t = tokens / s.sequence_ways
    whole = 2 * _norm(s, t) + 2 * t * s.hidden + sum(kept(s, symbol, tokens) for symbol in block)
    # mcore recomputes MTP by the uniform method only
    if recompute.layers and recompute.count is None:
        return _Stage(kept=2 * t * s.hidden, at_work=whole, held=block.count("E"))
    return _Stage(kept=whole, at_work=0.0, held=0)


def _norm(s: Shard, t: float) -> float:
    """A norm and the linear behind it: fused, its input and output; torch's, fp32 input and quotient, and output."""
    return t * s.preset.hidden_size * (2 * s.bytes_each if s.stack == "fused" else 8 + s.bytes_each)


def _routed(s: Shard, t: float) -> float:
    """R: each token goes to its top-k experts, and all ranks of an expert tensor parallel group see it."""
    return t * s.preset.moe_router_topk * s.parallel.expert_tensor * s.balance


def _gathered(s: Shard, t: float) -> float:
    """The allgather dispatcher brings the tokens of all ranks together before it picks those of the own experts."""
    if s.parallel.dispatcher != "allgather":
        return 0
    width = s.preset.moe_latent_size or s.preset.hidden_size
    return t * s.parallel.expert * s.parallel.expert_tensor * width * s.bytes_each


def _experts(s: Shard, t: float, tokens: float) -> float:
    """Peak bytes of an expert layer's forward pass: tokens in and out, their inner widths, the fp32 product."""
    p, e = s.preset, s.bytes_each
    width, inner = p.moe_latent_size or p.hidden_size, p.moe_ffn_hidden_size / s.parallel.expert_tensor
    shared = 2 * p.moe_shared_expert_intermediate_size / s.parallel.tensor * e
    return _routed(s, t) * (2 * width * e + 12 * inner) + tokens * shared + _gathered(s, t)


def _router(p: Preset) -> float:
    """Scores (fp32) and sorted map (int64) of all experts; indices, weights and order of the chosen."""
    return 12 * p.num_moe_experts + 24 * p.moe_router_topk


def _dispatcher(p: Preset) -> float:
    """Weights (fp32), map (bool) and order (int64) that the token dispatcher keeps as attributes."""
    return 5 * p.num_moe_experts + 8 * p.moe_router_topk


def _mamba_sizes(s: Shard) -> tuple[float, float, float, float]:
    """Local inner width, width of B or C, heads and groups."""
    p, tensor = s.preset, s.parallel.tensor
    heads, groups = p.mamba_num_heads / tensor, p.mamba_num_groups / tensor
    return heads * p.mamba_head_dim, groups * p.mamba_state_dim, heads, groups


def _scan(s: Shard, chunk: int) -> float:
    """Peak bytes a token of megatron_mopd.ssd's scan without gradients: within chunks, or on their states."""
    inner, shared, heads, groups = _mamba_sizes(s)
    e, n = s.bytes_each, s.preset.mamba_state_dim
    within = (20 + e) * inner + 14 * shared + 12 * heads * chunk + 4 * groups * chunk
    states = (22 + e) * inner + 8 * inner * n / chunk + 8 * heads * n
    return max(within, states)


def _mamba_kept(s: Shard) -> float:
    """Bytes a token of a Mamba layer without its norm."""
    (inner, shared, heads, groups), chunk = _mamba_sizes(s), s.preset.mamba_chunk
    e, n = s.bytes_each, s.preset.mamba_state_dim
    if s.stack == "fused":  # zxbcdt and the scan's output; input of the gated norm and of the output projection
        return (2 * inner + 2 * shared + heads + 3 * inner) * e
    matrices = 12 * heads * chunk + 4 * groups * chunk + 8 * heads * n + 8 * inner * n / chunk
    return (36 + 5 * e) * inner + (12 * e - 8) * shared + matrices


def _mamba_working(s: Shard) -> float:
    (inner, shared, heads, groups), chunk = _mamba_sizes(s), s.preset.mamba_chunk
    e, n = s.bytes_each, s.preset.mamba_state_dim
    if s.stack == "local":
        return 14 * inner + heads * n
    # Gradients of zxbcdt and xBC, xBC made again, two of the output; states and their gradients, C B^T and its own.
    gradients = (2 * inner + 2 * shared + heads) + 2 * (inner + 2 * shared) + 2 * inner
    return gradients * e + 4 * (2 * inner * n / chunk + 2 * groups * chunk + 3 * heads)
