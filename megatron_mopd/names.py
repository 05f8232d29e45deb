"""Megatron's parameter names and the Hugging Face names of ``nemotron_h`` that they stand for.

Megatron's are those of a checkpoint of the transformer-engine specs: norms fused into the linear that follows, Mamba
projections split into ``z, x, B, C, dt``, experts stacked, QKV interleaved by query group. Imports neither
megatron.core nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
}
_CONCATENATED = {
    "mixer.in_proj.weight": ("z", "x", "B", "C", "dt"),
    "mixer.conv1d.weight": ("x", "B", "C"),
    "mixer.conv1d.bias": ("x", "B", "C"),
}
_EXPERTS = {"mlp.experts.experts.linear_fc1.weight": "up_proj", "mlp.experts.experts.linear_fc2.weight": "down_proj"}
_TOP = {
    "embedding.word_embeddings.weight": ("backbone.embeddings.weight", "vocabulary"),
    "output_layer.weight": ("lm_head.weight", "vocabulary"),
    "decoder.final_norm.weight": ("backbone.norm_f.weight", "all"),
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.(.+)")
_MTP_DEPTH = re.compile(r"mtp\.layers\.(\d+)\.(enorm|hnorm|eh_proj|final_layernorm)\.weight")


def hugging_face_pieces(shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Every Hugging Face tensor that the Megatron tensors with these global shapes make up, sorted by name.

    Raises :class:`ConfigurationError` for a name that belongs to no layer of this family.
    """
    inner = [int(m[2]) for name in shapes if (m := _MTP_LAYER.fullmatch(name))]
    block = 1 + max(inner, default=0)  # layers of one MTP depth; Hugging Face numbers them through
    pieces = [piece for name, shape in shapes.items() for piece in _pieces(name, shape, block)]
    unique = {piece.name: piece for piece in pieces}
    missing = sorted({source for piece in unique.values() for source in piece.sources} - shapes.keys())
    if missing:
        raise ConfigurationError(f"checkpoint tensor {missing[0]!r} is missing beside its other parts")
    return [unique[name] for name in sorted(unique)]


def assemble(
    piece: Piece, sources: Sequence[Tensor], query_groups: int | None = None, vocab_size: int | None = None
) -> Tensor:
    """The Hugging Face tensor of ``piece`` from the whole Megatron tensors it names.

    ``query_groups`` undoes the interleaving of ``linear_qkv`` (rows ``[groups, heads per group + 2, head dim]``);
    ``vocab_size`` cuts the padding rows of embedding and output weight. Raises :class:`ConfigurationError` for QKV
    without the first.
    """
    if piece.part == "expert":
        return sources[0][piece.expert]
    if piece.part == "vocabulary":
        return sources[0][:vocab_size]
    if piece.part == "all":
        return torch.cat(list(sources)) if len(sources) > 1 else sources[0]
    qkv, projection = sources
    if query_groups is None:
        raise ConfigurationError(
            f"{piece.sources[0]}: splitting it needs the number of query groups, which no manifest gives; pass it"
        )
    head_dim = (qkv.shape[0] - projection.shape[1]) // (2 * query_groups)
    grouped = qkv.view(query_groups, -1, head_dim, qkv.shape[1])
    part = {"q": grouped[:, :-2], "k": grouped[:, -2:-1], "v": grouped[:, -1:]}[piece.part]
    return part.reshape(-1, qkv.shape[1])


def _pieces(name: str, shape: Sequence[int], mtp_block: int) -> Iterable[Piece]:
    if name in _TOP:
        hf, part = _TOP[name]
        return [Piece(name=hf, sources=(name,), part=part)]  # type: ignore[arg-type]
    if match := _LAYER.fullmatch(name):
        found = _layer(name.removesuffix(match[2]), match[2], f"backbone.layers.{match[1]}.", shape)
    elif match := _MTP_LAYER.fullmatch(name):
        number = int(match[1]) * mtp_block + int(match[2])
        found = _layer(name.removesuffix(match[3]), match[3], f"mtp.layers.{number}.", shape)
    elif match := _MTP_DEPTH.fullmatch(name):
        first = int(match[1]) * mtp_block
        number = first + mtp_block - 1 if match[2] == "final_layernorm" else first
        found = [Piece(name=f"mtp.layers.{number}.{match[2]}.weight", sources=(name,))]
    else:
        found = []
    if not found:
        raise ConfigurationError(
            f"checkpoint tensor {name!r}: no layer of the hybrid family (M, *, E, -) has it; name another checkpoint"
        )
    return found


def _layer(prefix: str, tail: str, target: str, shape: Sequence[int]) -> list[Piece]:
    if tail in _WHOLE:
        return [Piece(name=target + _WHOLE[tail], sources=(prefix + tail,))]
    if tail in _EXPERTS:
        names = [f"{target}mixer.experts.{e}.{_EXPERTS[tail]}.weight" for e in range(shape[0])]
        return [Piece(name=n, sources=(prefix + tail,), part="expert", expert=e) for e, n in enumerate(names)]
    if tail == "self_attention.linear_qkv.weight":
        # The output projection's width tells the query rows from the key and value rows.
        sources = (prefix + tail, f"{prefix}self_attention.linear_proj.weight")
        return [Piece(name=f"{target}mixer.{p}_proj.weight", sources=sources, part=p) for p in ("q", "k", "v")]
    stem = tail.rpartition(".")[0]
    if tail.rpartition(".")[2] in _CONCATENATED.get(stem, ()):
        return [Piece(name=target + stem, sources=tuple(f"{prefix}{stem}.{part}" for part in _CONCATENATED[stem]))]
    return []
