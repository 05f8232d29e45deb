"""Between a Hugging Face ``config.json`` of ``nemotron_h`` and the ``model`` section of a configuration, both ways.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from megatron_mopd import presets
from megatron_mopd.config import ConfigurationError, Model
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.pattern import parse_pattern
from megatron_mopd.presets import FAMILY, PRESETS, Preset

HOW_NOT_WHAT = ("recompute_", "distribute_saved_activations", "perform_initialization", "fine_grained_activation")
"""Overrides (by their beginning) that change how a model is computed or first drawn, not what it computes."""
_SHARED = "mtp_use_repeated_layer"  # all MTP depths are one block
# What this family's layers compute; a configuration that says otherwise describes another function.
_FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "n_group": (1,),
    "topk_group": (1,),
    "norm_topk_prob": (True,),
    "n_shared_experts": (1,),
    "sliding_window": (None,),
    "use_conv_bias": (True,),
    "use_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "mamba_proj_bias": (False,),
    "layer_norm_epsilon": (FAMILY["layernorm_epsilon"],),  # mcore's Mamba layers know this one only
    "norm_eps": (FAMILY["layernorm_epsilon"],),
}
_NO_MATTER = {"init_method_std": 0.0, "mamba_chunk": 1}
"""Fields of a preset that leave a trained model's function as it is."""
_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def model_settings(config: Mapping[str, Any], origin: str, *, blocks: int | None = None) -> Model:
    """The model that ``config`` describes; a published preset where its dimensions are one's, else all of them in
    ``override``.

    ``blocks`` counts the MTP blocks that are stored: without any the pattern has no MTP part; None is as ``config``
    says, with one block for all depths. Raises :class:`ConfigurationError`, naming ``origin``, for a
    configuration that cannot be read and for one whose layers compute something else than this family's.
    """
    for name, known in _FIXED.items():
        if name in config and config[name] not in known:
            raise ConfigurationError(
                f"{origin}: {name} = {config[name]!r}: models are built with {known[0]!r} here, so this one would"
                " compute something else; name another checkpoint"
            )
    found = hugging_face_config.architecture(config, origin).preset
    if "E" in found.pattern and found.moe_router_topk == 1:
        raise ConfigurationError(
            f"{origin}: num_experts_per_tok = 1: transformers gives a token's only expert the weight 1,"
            " Megatron-Core its score, so this model would compute something else; name another checkpoint"
        )
    if blocks == 0:
        found = replace(found, pattern=parse_pattern(found.pattern).main)
    changed: dict[str, Any] = {} if blocks is None or blocks < 2 else {_SHARED: False}
    same = [name for name, preset in PRESETS.items() if _dimensions(preset) == _dimensions(found)]
    if same:
        pattern = None if PRESETS[same[0]].pattern == found.pattern else found.pattern
        return _model(preset=same[0], pattern=pattern, override=changed, vocab_size=found.vocab_size)
    names = _dimensions(found).keys() - {"mamba_conv"}
    return _model(
        preset="tiny",
        pattern=found.pattern,
        override={name: getattr(found, name) for name in sorted(names)} | changed,
        vocab_size=found.vocab_size,
        mamba_conv=found.mamba_conv,
        mamba_chunk=found.mamba_chunk,
    )


def facts(model: Model) -> dict[str, Any]:
    """What decides a trained model's function without its MTP heads and its vocabulary, by name."""
    preset = presets.resolve(model)
    known = {f.name for f in fields(Preset)}
    others = {k: v for k, v in model.override.items() if k not in known and not k.startswith(HOW_NOT_WHAT)}
    others = {k: v for k, v in others.items() if k != _SHARED and FAMILY.get(k) != v}
    return {"pattern": parse_pattern(preset.pattern).main} | _dimensions(preset) | dict(sorted(others.items()))


def config_of(model: Model, tokens: Mapping[str, Any]) -> dict[str, Any] | None:
    """``config.json`` of a model that came from no Hugging Face directory; None for one that the format cannot hold.

    ``tokens`` adds token ids and what else is not the model's own.
    """
    p, parsed = presets.resolve(model), parse_pattern(presets.resolve(model).pattern)
    if facts(model).keys() - _dimensions(p).keys() - {"pattern"}:
        return None
    read = {name: keys[0] for name, (keys, _) in hugging_face_config.FIELDS.items()}
    depths = {"num_nextn_predict_layers": parsed.depths, "mtp_layers_block_type": _kinds(parsed.mtp)}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": hugging_face_config.MODEL_TYPE,
        **{key: getattr(p, name) for name, key in read.items()},
        "moe_latent_size": p.moe_latent_size,
        "layers_block_type": _kinds(parsed.main),
        "num_hidden_layers": len(parsed.main),
        **(depths if parsed.depths else {"num_nextn_predict_layers": 0}),
        **{name: known[0] for name, known in _FIXED.items() if name != "norm_eps"},
        "initializer_range": p.init_method_std,
        # transformers bounds Mamba's time step from below, by 0.001 where nothing is said; Megatron does not.
        "time_step_min": 1e-9,
        "tie_word_embeddings": False,
        "max_position_embeddings": model.max_sequence_length,
        **tokens,
    }


def stored_blocks(model: Model) -> int:
    """MTP blocks that checkpoints of ``model`` hold: 0, 1 for all depths, or one a depth."""
    depths = parse_pattern(presets.resolve(model).pattern).depths
    return min(depths, 1) if model.override.get(_SHARED, FAMILY[_SHARED]) else depths


def _dimensions(preset: Preset) -> dict[str, Any]:
    """The fields that decide a trained trunk's function."""
    skipped = {"pattern", "vocab_size", *_NO_MATTER}
    return {f.name: getattr(preset, f.name) for f in fields(Preset) if f.name not in skipped}


def _model(**settings: Any) -> Model:
    return Model.model_validate(settings)


def _kinds(symbols: Sequence[str]) -> list[str]:
    return [_KINDS[symbol] for symbol in symbols]
