"""What a Hugging Face ``config.json`` of ``nemotron_h`` says about the tensors: dimensions, layers, MTP, tying.

Both spellings are read: ``hybrid_override_pattern`` (a string) and ``layers_block_type`` (a list, with the names of
either generation of transformers), with their ``mtp_`` counterparts. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.pattern import LAYERS, parse_pattern
from megatron_mopd.presets import PRESETS, Preset

FILE = "config.json"
MODEL_TYPE = "nemotron_h"

_SYMBOLS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
FIELDS: dict[str, tuple[tuple[str, ...], str]] = {
    "vocab_size": (("vocab_size",), ""),
    "hidden_size": (("hidden_size",), ""),
    "num_attention_heads": (("num_attention_heads",), "*"),
    "num_query_groups": (("num_key_value_heads",), "*"),
    "kv_channels": (("head_dim", "attention_head_dim"), "*"),
    "mamba_num_heads": (("mamba_num_heads",), "M"),
    "mamba_head_dim": (("mamba_head_dim",), "M"),
    "mamba_state_dim": (("ssm_state_size",), "M"),
    "mamba_num_groups": (("n_groups", "mamba_n_groups"), "M"),
    "mamba_conv": (("conv_kernel", "mamba_d_conv"), "M"),
    "mamba_chunk": (("chunk_size", "mamba_chunk_size"), "M"),
    "num_moe_experts": (("n_routed_experts", "num_local_experts"), "E"),
    "moe_router_topk": (("num_experts_per_tok",), "E"),
    "moe_ffn_hidden_size": (("moe_intermediate_size",), "E"),
    "moe_shared_expert_intermediate_size": (("moe_shared_expert_intermediate_size",), "E"),
    "moe_router_topk_scaling_factor": (("routed_scaling_factor",), "E"),
    "ffn_hidden_size": (("intermediate_size",), "-"),
}
"""Preset field: the names that configurations give it, and the layer that cannot do without it ("": every model)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Dimensions of a checkpoint and how many MTP blocks it stores.

    ``preset.pattern`` repeats the MTP layers once a depth; ``blocks`` is 0, 1 (all depths share one) or the number of
    depths (each has its own).
    """

    preset: Preset
    blocks: int
    tied: bool  # tie_word_embeddings: the output weight is the embedding

    @property
    def main(self) -> str:
        return parse_pattern(self.preset.pattern).main

    @property
    def mtp(self) -> str:
        """Layers of one MTP block; empty without MTP."""
        return parse_pattern(self.preset.pattern).mtp

    def stored(self, blocks: int) -> Architecture:
        """The same model with another number of stored MTP blocks."""
        return replace(self, blocks=blocks)


def read(path: Path) -> dict[str, Any]:
    """``config.json`` of the directory ``path``, or the file ``path`` itself.

    Raises :class:`ConfigurationError` when it is missing or no JSON object.
    """
    file = path / FILE if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: cannot be read: {error}; name a Hugging Face model directory") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file}: holds no JSON object; take the directory from its source again")
    return config


def architecture(config: Mapping[str, Any], origin: str) -> Architecture:
    """The architecture that ``config`` describes, each MTP depth with a block of its own.

    Raises :class:`ConfigurationError` for another model type, an unknown layer and a dimension that is missing although
    the pattern has such layers. ``origin`` names the file in messages.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigurationError(
            f"{origin}: model_type = {config.get('model_type')!r}; only {MODEL_TYPE!r} is converted, name another model"
        )
    main = _pattern(config, "", origin)
    depths = config.get("num_nextn_predict_layers") or 0
    for key, value in (("num_nextn_predict_layers", depths), ("moe_latent_size", config.get("moe_latent_size") or 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigurationError(
                f"{origin}: {key} = {value!r}: must be a whole number; take the file from its source again"
            )
    mtp = _pattern(config, "mtp_", origin) if depths else ""
    dimensions = {name: _dimension(config, name, main + mtp, origin) for name in FIELDS}
    preset = Preset(
        pattern=main + f"/{mtp}" * depths,
        moe_latent_size=config.get("moe_latent_size"),
        init_method_std=float(config.get("initializer_range") or PRESETS["tiny"].init_method_std),
        **dimensions,
    )
    for larger, smaller in (("num_attention_heads", "num_query_groups"), ("mamba_num_heads", "mamba_num_groups")):
        if getattr(preset, larger) % getattr(preset, smaller):
            names = [FIELDS[name][0][0] for name in (smaller, larger)]
            raise ConfigurationError(
                f"{origin}: {names[0]} = {getattr(preset, smaller)} does not divide {names[1]} ="
                f" {getattr(preset, larger)}; take the configuration from its source again"
            )
    return Architecture(preset=preset, blocks=depths, tied=bool(config.get("tie_word_embeddings")))


def _pattern(config: Mapping[str, Any], prefix: str, origin: str) -> str:
    """One symbol a layer from whichever spelling the configuration has; both must agree where it has both."""
    found: dict[str, str] = {}
    for key in (f"{prefix}layers_block_type", f"{prefix}layer_types"):
        if isinstance(layers := config.get(key), list):
            unknown = sorted({str(kind) for kind in layers} - _SYMBOLS.keys())
            if unknown:
                raise ConfigurationError(
                    f"{origin}: {key} has {unknown[0]!r}; layers known here are {', '.join(_SYMBOLS)}"
                )
            found[key] = "".join(_SYMBOLS[kind] for kind in layers)
    if isinstance(text := config.get(f"{prefix}hybrid_override_pattern"), str):
        wrong = [symbol for symbol in text if symbol not in LAYERS]
        if wrong:
            raise ConfigurationError(
                f"{origin}: {prefix}hybrid_override_pattern = {text!r}: {wrong[0]!r} is no layer;"
                f" use {' '.join(LAYERS)}"
            )
        found[f"{prefix}hybrid_override_pattern"] = text
    if not found and prefix:
        return "*E"  # transformers' default for MTP layers
    if not any(found.values()):
        raise ConfigurationError(
            f"{origin}: has neither {prefix}layers_block_type nor {prefix}hybrid_override_pattern, so nothing says"
            " which layers the model has; take the configuration from its source again"
        )
    if len(set(found.values())) > 1:
        raise ConfigurationError(f"{origin}: two spellings of the layers differ: {found}; keep one")
    return next(iter(found.values()))


def _dimension(config: Mapping[str, Any], name: str, pattern: str, origin: str) -> Any:
    keys, symbol = FIELDS[name]
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigurationError(f"{origin}: {key} = {value!r}: must be a positive number")
        return value
    if not symbol or symbol in pattern:
        what = f"the pattern has {symbol} ({LAYERS[symbol]}) layers" if symbol else "every model has it"
        raise ConfigurationError(f"{origin}: {keys[0]} is missing, and {what}; take the file from its source again")
    return getattr(PRESETS["tiny"], name)  # of a layer that this model does not have


def megatron_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every tensor of a Megatron checkpoint of this model, without vocabulary padding."""
    p = model.preset
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (p.vocab_size, p.hidden_size)}
    for number, symbol in enumerate(model.main):
        shapes |= {f"decoder.layers.{number}.{n}": s for n, s in _LAYER_SHAPES[symbol](p).items()}
    shapes["decoder.final_norm.weight"] = (p.hidden_size,)
    shapes["output_layer.weight"] = (p.vocab_size, p.hidden_size)
    for block in range(model.blocks):
        prefix = f"mtp.layers.{block}."
        shapes |= {f"{prefix}{name}.weight": (p.hidden_size,) for name in ("enorm", "hnorm", "final_layernorm")}
        shapes[f"{prefix}eh_proj.weight"] = (p.hidden_size, 2 * p.hidden_size)
        for number, symbol in enumerate(model.mtp):
            layer = f"{prefix}mtp_model_layer.layers.{number}."
            shapes |= {layer + n: s for n, s in _LAYER_SHAPES[symbol](p).items()}
    return shapes


def _mamba(p: Preset) -> dict[str, tuple[int, ...]]:
    inner, state = p.mamba_num_heads * p.mamba_head_dim, p.mamba_num_groups * p.mamba_state_dim
    rows = {"z": inner, "x": inner, "B": state, "C": state, "dt": p.mamba_num_heads}
    convolution = {part: rows[part] for part in ("x", "B", "C")}
    return {
        "mixer.in_proj.layer_norm_weight": (p.hidden_size,),
        **{f"mixer.in_proj.weight.{part}": (n, p.hidden_size) for part, n in rows.items()},
        **{f"mixer.conv1d.weight.{part}": (n, 1, p.mamba_conv) for part, n in convolution.items()},
        **{f"mixer.conv1d.bias.{part}": (n,) for part, n in convolution.items()},
        **{f"mixer.{name}": (p.mamba_num_heads,) for name in ("A_log", "D", "dt_bias")},
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (p.hidden_size, inner),
    }


def _attention(p: Preset) -> dict[str, tuple[int, ...]]:
    queries = p.num_attention_heads * p.kv_channels
    return {
        "self_attention.linear_qkv.layer_norm_weight": (p.hidden_size,),
        "self_attention.linear_qkv.weight": (queries + 2 * p.num_query_groups * p.kv_channels, p.hidden_size),
        "self_attention.linear_proj.weight": (p.hidden_size, queries),
    }


def _mlp(p: Preset) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.linear_fc1.layer_norm_weight": (p.hidden_size,),
        "mlp.linear_fc1.weight": (p.ffn_hidden_size, p.hidden_size),
        "mlp.linear_fc2.weight": (p.hidden_size, p.ffn_hidden_size),
    }


def _experts(p: Preset) -> dict[str, tuple[int, ...]]:
    width, shared = p.moe_latent_size or p.hidden_size, p.moe_shared_expert_intermediate_size
    latent = {
        "mlp.fc1_latent_proj.weight": (width, p.hidden_size),
        "mlp.fc2_latent_proj.weight": (p.hidden_size, width),
    }
    return {
        "pre_mlp_layernorm.weight": (p.hidden_size,),
        "mlp.router.weight": (p.num_moe_experts, p.hidden_size),
        "mlp.router.expert_bias": (p.num_moe_experts,),
        **(latent if p.moe_latent_size else {}),
        "mlp.shared_experts.linear_fc1.weight": (shared, p.hidden_size),
        "mlp.shared_experts.linear_fc2.weight": (p.hidden_size, shared),
        "mlp.experts.experts.linear_fc1.weight": (p.num_moe_experts, p.moe_ffn_hidden_size, width),
        "mlp.experts.experts.linear_fc2.weight": (p.num_moe_experts, width, p.moe_ffn_hidden_size),
    }


_LAYER_SHAPES = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
