"""Megatron's parameter names and the Hugging Face names of ``nemotron_h`` that they stand for, both ways.

Megatron's are those of a checkpoint of the transformer-engine specs: norms fused into the linear that follows, Mamba
projections split into ``z, x, B, C, dt``, experts stacked, QKV interleaved by query group. Other spellings that
Megatron-LM writes (a norm of its own, one tensor per expert) are read as well. Every tensor of one side is a
concatenation of runs of elements of the other's, so a conversion moves bytes and computes nothing. Imports neither
megatron.core nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError

PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")
"""What every model tensor in a checkpoint starts with; all others are optimizer state or bookkeeping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One Hugging Face tensor and the Megatron tensors it is made of."""

    name: str
    sources: tuple[str, ...]
    part: Literal["all", "vocabulary", "q", "k", "v", "expert"] = "all"
    expert: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements of one tensor, counted row-major."""

    source: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's shape and the runs of elements that it is the concatenation of."""

    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


_WHOLE = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "norm.weight",
    "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "norm.weight",
    "mlp.linear_fc1.weight": "mixer.up_proj.weight",
    "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    "pre_mlp_layernorm.weight": "norm.weight",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
    "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
    # Norms of specs that do not fuse them.
    "norm.weight": "norm.weight",
    "input_layernorm.weight": "norm.weight",
}
_CONCATENATED = {
    "mixer.in_proj.weight": ("z", "x", "B", "C", "dt"),
    "mixer.conv1d.weight": ("x", "B", "C"),
    "mixer.conv1d.bias": ("x", "B", "C"),
}
_EXPERTS = {"mlp.experts.experts.linear_fc1.weight": "up_proj", "mlp.experts.experts.linear_fc2.weight": "down_proj"}
# One tensor per expert: mcore's singleton_local_shards, its sequential experts, transformer-engine's grouped linear.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:(?:local_)?experts\.(?P<a>\d+)\.linear_fc(?P<b>[12])\.weight|linear_fc(?P<c>[12])\.weight(?P<d>\d+))"
)
_PROJECTION = {"1": "up_proj", "2": "down_proj"}
_TOP = {
    "embedding.word_embeddings.weight": ("backbone.embeddings.weight", "vocabulary"),
    "output_layer.weight": ("lm_head.weight", "vocabulary"),
    "decoder.final_norm.weight": ("backbone.norm_f.weight", "all"),
    "decoder.final_layernorm.weight": ("backbone.norm_f.weight", "all"),
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.(.+)")
_MTP_DEPTH = re.compile(r"mtp\.layers\.(\d+)\.(enorm|hnorm|eh_proj|final_layernorm)\.weight")


def hugging_face_pieces(shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Every Hugging Face tensor that the Megatron tensors with these global shapes make up, sorted by name.

    Raises :class:`ConfigurationError` for a name that belongs to no layer of this family, for a tensor without its
    other parts and for two tensors that stand for the same one.
    """
    pieces, problems = find_pieces(shapes)
    for kind, found in problems.items():
        more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        raise ConfigurationError(f"checkpoint tensor {found[0]} {kind}{more}; name another checkpoint")
    return pieces


UNMAPPED = "belongs to no layer of the hybrid family (M, *, E, -)"
INCOMPLETE = "is missing beside its other parts"
DOUBLE = "is there twice"


def find_pieces(shapes: Mapping[str, Sequence[int]]) -> tuple[list[Piece], dict[str, list[str]]]:
    """The pieces of :func:`hugging_face_pieces` and, by kind of problem, the names that make none."""
    inner = [int(m[2]) for name in shapes if (m := _MTP_LAYER.fullmatch(name))]
    block = 1 + max(inner, default=0)  # layers of one MTP depth; Hugging Face numbers them through
    problems: dict[str, list[str]] = {}
    unique: dict[str, Piece] = {}
    for name, shape in shapes.items():
        found = _pieces(name, shape, block)
        if not found:
            problems.setdefault(UNMAPPED, []).append(repr(name))
        for piece in found:
            other = unique.setdefault(piece.name, piece)
            if other != piece:
                problems.setdefault(DOUBLE, []).append(f"{piece.name!r} ({other.sources[0]} and {piece.sources[0]})")
    missing = {source for piece in unique.values() for source in piece.sources} - shapes.keys()
    if missing:
        problems[INCOMPLETE] = [repr(name) for name in sorted(missing)]
    return [unique[name] for name in sorted(unique)], problems


def layout(
    piece: Piece,
    shapes: Mapping[str, Sequence[int]],
    query_groups: int | None = None,
    vocab_size: int | None = None,
) -> Layout:
    """Where the elements of ``piece`` lie in Megatron tensors of these shapes.

    ``query_groups`` undoes the interleaving of ``linear_qkv`` (rows ``[groups, heads per group + 2, head dim]``);
    ``vocab_size`` cuts the padding rows of embedding and output weight. Raises :class:`ConfigurationError` for QKV
    without the first, or with one that does not divide its rows.
    """
    sources = [(name, tuple(shapes[name])) for name in piece.sources]
    name, shape = sources[0]
    if piece.part == "expert":
        size = math.prod(shape[1:])
        return Layout(shape[1:], (Segment(name, piece.expert * size, size),))
    if piece.part in ("q", "k", "v"):
        return _query_key_value(piece, name, shape, sources[1][1], query_groups)
    if piece.part == "vocabulary":
        shape = (min(shape[0], vocab_size or shape[0]), *shape[1:])
        return Layout(shape, (Segment(name, 0, math.prod(shape)),))
    rows = sum(s[0] for _, s in sources)
    return Layout((rows, *shape[1:]), tuple(Segment(n, 0, math.prod(s)) for n, s in sources))


def _query_key_value(
    piece: Piece, name: str, shape: tuple[int, ...], projection: tuple[int, ...], query_groups: int | None
) -> Layout:
    if query_groups is None:
        raise ConfigurationError(
            f"{name}: splitting it needs the number of query groups, which no manifest gives; pass it"
        )
    key_rows = (shape[0] - projection[1]) // 2  # the output projection is as wide as the queries
    if key_rows <= 0 or key_rows % query_groups or projection[1] % key_rows:
        raise ConfigurationError(
            f"{name}: {shape[0]} rows beside an output projection {projection[1]} wide do not divide into"
            f" {query_groups} query groups; the number of groups or the checkpoint is another"
        )
    head, queries = key_rows // query_groups, projection[1] // query_groups  # rows of one group
    first, rows = {"q": (0, queries), "k": (queries, head), "v": (queries + head, head)}[piece.part]
    group, columns = queries + 2 * head, math.prod(shape[1:])
    runs = (Segment(name, (g * group + first) * columns, rows * columns) for g in range(query_groups))
    return Layout((rows * query_groups, *shape[1:]), tuple(runs))


def assemble(
    piece: Piece, sources: Sequence[Tensor], query_groups: int | None = None, vocab_size: int | None = None
) -> Tensor:
    """The Hugging Face tensor of ``piece`` from the whole Megatron tensors it names; arguments as in :func:`layout`."""
    tensors = dict(zip(piece.sources, sources, strict=True))
    where = layout(piece, {name: tensor.shape for name, tensor in tensors.items()}, query_groups, vocab_size)
    runs = [tensors[s.source].reshape(-1)[s.start : s.start + s.count] for s in where.segments]
    return (torch.cat(runs) if len(runs) > 1 else runs[0]).view(where.shape)


def invert(layouts: Mapping[str, Layout]) -> dict[str, tuple[Segment, ...]]:
    """The other direction: for each tensor that ``layouts`` take elements from, the runs that give it back in order."""
    runs: dict[str, list[tuple[int, Segment]]] = {}
    for name, where in layouts.items():
        position = 0
        for segment in where.segments:
            runs.setdefault(segment.source, []).append((segment.start, Segment(name, position, segment.count)))
            position += segment.count
    inverted = {}
    for name, found in runs.items():
        found.sort(key=lambda run: run[0])
        end = 0
        for start, segment in found:
            assert start == end, f"{name}: element {end} is given {'twice' if start < end else 'by nothing'}"
            end += segment.count
        inverted[name] = tuple(segment for _, segment in found)
    return inverted


_STATELESS = (".conv1d", ".mixer.norm", ".router", ".word_embeddings")


def extra_states(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the ``_extra_state`` objects that transformer-engine's modules look for beside these tensors.

    mcore refuses a checkpoint that lacks one which the model asks for, and passes over one that it does not.
    """
    found: dict[str, None] = {}
    for name, shape in shapes.items():
        module = re.sub(r"\.(layer_norm_)?weight(\.\w+)?$", "", name)
        if module == name or module.endswith(_STATELESS):
            continue
        experts = range(shape[0]) if module.endswith((".experts.linear_fc1", ".experts.linear_fc2")) else None
        shards = ["0_1"] if experts is None else [f"{expert}_{shape[0]}" for expert in experts]
        found |= {f"{module}._extra_state/shard_{shard}": None for shard in shards}
        if module.endswith(".linear_qkv"):
            found[f"{module.removesuffix('linear_qkv')}core_attention._extra_state/shard_0_1"] = None
    return list(found)


def _pieces(name: str, shape: Sequence[int], mtp_block: int) -> list[Piece]:
    if name in _TOP:
        hf, part = _TOP[name]
        return [Piece(name=hf, sources=(name,), part=part)]  # type: ignore[arg-type]
    if match := _LAYER.fullmatch(name):
        return _layer(name.removesuffix(match[2]), match[2], f"backbone.layers.{match[1]}.", shape)
    if match := _MTP_LAYER.fullmatch(name):
        number = int(match[1]) * mtp_block + int(match[2])
        return _layer(name.removesuffix(match[3]), match[3], f"mtp.layers.{number}.", shape)
    if match := _MTP_DEPTH.fullmatch(name):
        first = int(match[1]) * mtp_block
        number = first + mtp_block - 1 if match[2] == "final_layernorm" else first
        return [Piece(name=f"mtp.layers.{number}.{match[2]}.weight", sources=(name,))]
    return []


def _layer(prefix: str, tail: str, target: str, shape: Sequence[int]) -> list[Piece]:
    if tail in _WHOLE:
        return [Piece(name=target + _WHOLE[tail], sources=(prefix + tail,))]
    if tail in _EXPERTS:
        names = [f"{target}mixer.experts.{e}.{_EXPERTS[tail]}.weight" for e in range(shape[0])]
        return [Piece(name=n, sources=(prefix + tail,), part="expert", expert=e) for e, n in enumerate(names)]
    if match := _EXPERT.fullmatch(tail):
        number, projection = match["a"] or match["d"], _PROJECTION[match["b"] or match["c"]]
        return [Piece(name=f"{target}mixer.experts.{int(number)}.{projection}.weight", sources=(prefix + tail,))]
    if tail == "self_attention.linear_qkv.weight":
        # The output projection's width tells the query rows from the key and value rows.
        sources = (prefix + tail, f"{prefix}self_attention.linear_proj.weight")
        return [Piece(name=f"{target}mixer.{p}_proj.weight", sources=sources, part=p) for p in ("q", "k", "v")]
    stem = tail.rpartition(".")[0]
    if tail.rpartition(".")[2] in _CONCATENATED.get(stem, ()):
        return [Piece(name=target + stem, sources=tuple(f"{prefix}{stem}.{part}" for part in _CONCATENATED[stem]))]
    return []
