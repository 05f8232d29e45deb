"""What the settings leave out is read from the checkpoints, and what contradicts them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd import origins, presets
from megatron_mopd.config import Config, ConfigurationError, Model, build_config
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.conversion.model_settings import config_of, facts, model_settings, stored_blocks

TINY = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "vocab_size": 77, "hidden_size": 48,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 40, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 2, "chunk_size": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_latent_size": None, "routed_scaling_factor": 1.5,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip


def directory(path: Path, *, tensor: str = "lm_head.weight", **changes: Any) -> Path:
    """A Hugging Face directory with one tensor, which is enough to say what the model would be."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY | changes))
    save_file({tensor: torch.zeros(1)}, path / "model.safetensors")
    return path


def resolved(initial: Path | None, model: dict[str, Any], **teachers: dict[str, Any]) -> Config:
    tree = {"run": {"dir": "runs/x", "steps": 1}, "model": model | ({"initial": str(initial)} if initial else {})}
    tree |= {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "teachers": teachers}
    return origins.resolved(build_config(tree | {"batching": {"sequences_per_step": 1}}))


def test_dimensions_come_from_the_directory(tmp_path: Path) -> None:
    found = resolved(directory(tmp_path / "hf"), {"max_sequence_length": 99})
    p = presets.resolve(found.model)
    assert found.model.max_sequence_length == 99 and found.model.preset is not None
    expected = hugging_face_config.architecture(TINY, "test").preset
    assert p == presets.replace(expected, init_method_std=p.init_method_std)
    assert origins.resolved(found) == found
    settings = {"override": {"recompute_granularity": "full"}, "train_router": True}
    again = resolved(tmp_path / "hf", settings).model
    assert again.train_router and again.override == found.model.override | settings["override"]
    assert facts(again) == facts(found.model)


def test_a_directory_of_neither_kind_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, what in (("empty", "holds neither a complete Megatron"), ("gone", "no such directory")):
        message = rf"model\.initial = .*/{name}: {what}.*or a Hugging Face one \(config\.json and safetensors\)"
        with pytest.raises(ConfigurationError, match=message):
            resolved(tmp_path / name, {})
    with pytest.raises(ConfigurationError, match=r"teachers\.t\.checkpoint = .*/empty: holds neither"):
        resolved(None, {}, t={"checkpoint": str(tmp_path / "empty"), "domains": ["a"]})


@pytest.mark.parametrize("change", [{"num_nextn_predict_layers": "two"}, {"moe_latent_size": 0.5}])
def test_a_count_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ConfigurationError, match=rf"config\.json: {name} = {value!r}: must be a whole number"):
        resolved(directory(tmp_path / "hf", **change), {})


def test_without_a_directory_the_preset_is_tiny() -> None:
    assert resolved(None, {}).model == Model(preset="tiny")
    assert resolved(None, {"preset": "nano-30b-a3b"}).model == Model(preset="nano-30b-a3b")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_says_in_config_json_what_it_is(name: str) -> None:
    model = Model.model_validate({"preset": name})
    config = config_of(model, {})
    assert config is not None
    found = model_settings(json.loads(json.dumps(config)), "test")
    assert found == Model.model_validate({"preset": name, "vocab_size": presets.PRESETS[name].vocab_size})
    assert stored_blocks(found) == int("/" in presets.PRESETS[name].pattern)
    own = model_settings(config, "test", blocks=2)
    assert own.override == {"mtp_use_repeated_layer": False} and facts(own) == facts(model)
    bare = presets.resolve(model_settings(config, "test", blocks=0))
    assert bare.pattern == presets.PRESETS[name].pattern.partition("/")[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "tiny"}, r'pattern = "MEM\*E-" in the settings, "M\*E-" there; hidden_size = 128 .* 48 there'),
        ({"pattern": "M*"}, r'pattern = "M\*" in the settings, "M\*E-" there'),
        ({"pattern": "M*E-/*E"}, r"MTP layers \*E x 1 in the settings, none there"),
        ({"override": {"moe_router_topk": 3}}, "moe_router_topk = 3 in the settings, 2 there"),
        ({"override": {"layernorm_epsilon": 1e-6}}, "layernorm_epsilon = 1e-06 in the settings, not set there"),
        ({"mamba_conv": 3}, "mamba_conv = 3 in the settings, 2 there"),
        ({"vocab_size": 78}, "vocab_size = 78 in the settings, 77 there"),
    ],
)
def test_settings_that_say_otherwise_are_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"model: .*/hf holds another model: .*{message}.*Leave preset"):
        resolved(directory(tmp_path / "hf"), model)


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_hidden_act": "silu"},
        {"n_group": 4},
        {"norm_topk_prob": False},
        {"use_bias": True},
        {"n_shared_experts": 2},
    ],
)
def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ConfigurationError, match=rf"config\.json: {name} = {value!r}: models are built with"):
        resolved(directory(tmp_path / "hf", **change), {})


def test_a_teacher_has_the_model_of_its_directory(tmp_path: Path) -> None:
    own, same = directory(tmp_path / "own", hidden_size=64), directory(tmp_path / "same")
    found = resolved(
        directory(tmp_path / "hf"),
        {},
        own={"checkpoint": str(own), "domains": ["a"]},
        same={"checkpoint": str(same), "domains": ["b"]},
        gone={"checkpoint": str(tmp_path / "gone"), "domains": ["c"]},
    )
    teacher = found.teachers["own"].model
    assert teacher is not None and presets.resolve(teacher).hidden_size == 64
    assert found.teachers["same"].model is None is found.teachers["gone"].model
    with pytest.raises(ConfigurationError, match=r"teachers\.own\.model: .*hidden_size = 128 in the settings, 64"):
        resolved(None, {}, own={"checkpoint": str(own), "domains": ["a"], "model": {"preset": "tiny"}})


def test_one_expert_a_token_is_refused_for_its_weight(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json: num_experts_per_tok = 1: transformers gives"):
        resolved(directory(tmp_path / "hf", num_experts_per_tok=1), {})
    dense = directory(tmp_path / "dense", num_experts_per_tok=1, hybrid_override_pattern="M*-")
    assert resolved(dense, {}).model.preset is not None


def test_a_shared_mtp_block_may_be_used_at_any_depth(tmp_path: Path) -> None:
    """The released Ultra configuration says 1 depth, and its report trains 2 with the same block."""
    depth = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}
    hf = directory(tmp_path / "hf", tensor="mtp.layers.0.enorm.weight", **depth)
    assert presets.resolve(resolved(hf, {}).model).pattern == "M*E-/*E"
    assert presets.resolve(resolved(hf, {"pattern": "M*E-/*E/*E"}).model).pattern == "M*E-/*E/*E"
    with pytest.raises(ConfigurationError, match=r"MTP layers \*- x 1 in the settings, \*E x 1 there"):
        resolved(hf, {"pattern": "M*E-/*-"})
    apart = {"pattern": "M*E-/*E/*E", "override": {"mtp_use_repeated_layer": False}}
    with pytest.raises(ConfigurationError, match=r"MTP layers \*E x 2 in the settings, \*E x 1 there"):
        resolved(hf, apart)
