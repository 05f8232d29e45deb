"""Recipes are tables: the published ones decide every tensor of every model of the family, and count as published."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from megatron_mopd import names
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.conversion.hugging_face_config import Architecture
from megatron_mopd.conversion.weights import Entry
from megatron_mopd.presets import PRESETS, parameter_count
from megatron_mopd.quantization import recipes, report
from megatron_mopd.quantization.recipes import RECIPES, Recipe, Rule

LAYER = "backbone.layers.7.mixer."
TABLE_12 = {  # report, Table 12
    "backbone.embeddings.weight": "bf16",
    "lm_head.weight": "bf16",
    "mtp.layers.0.mixer.q_proj.weight": "bf16",
    "mtp.layers.0.eh_proj.weight": "bf16",
    "mtp.layers.1.mixer.experts.3.up_proj.weight": "bf16",
    **{f"{LAYER}{part}_proj.weight": "bf16" for part in "qkvo"},
    f"{LAYER}fc1_latent_proj.weight": "bf16",
    f"{LAYER}fc2_latent_proj.weight": "bf16",
    f"{LAYER}conv1d.weight": "bf16",
    f"{LAYER}gate.weight": "bf16",
    f"{LAYER}experts.511.up_proj.weight": "nvfp4",
    f"{LAYER}experts.0.down_proj.weight": "nvfp4",
    f"{LAYER}shared_experts.up_proj.weight": "fp8",
    f"{LAYER}shared_experts.down_proj.weight": "fp8",
    f"{LAYER}in_proj.weight": "fp8",
    f"{LAYER}out_proj.weight": "fp8",
    # Not in the table: what is no matrix, and dense layers, which Ultra has none of.
    "backbone.norm_f.weight": "keep",
    "backbone.layers.7.norm.weight": "keep",
    "mtp.layers.1.final_layernorm.weight": "keep",
    f"{LAYER}norm.weight": "keep",
    f"{LAYER}conv1d.bias": "keep",
    f"{LAYER}A_log": "keep",
    f"{LAYER}D": "keep",
    f"{LAYER}dt_bias": "keep",
    f"{LAYER}gate.e_score_correction_bias": "keep",
    f"{LAYER}up_proj.weight": "fp8",
}


@cache
def stored(preset: str) -> dict[str, Entry]:
    """The tensors of a published model with one MTP block, without weights."""
    p = PRESETS[preset]
    shapes = hugging_face_config.megatron_shapes(Architecture(preset=p, blocks="/" in p.pattern, tied=False))
    pieces = names.hugging_face_pieces(shapes)
    found = {x.name: names.layout(x, shapes, p.num_query_groups, p.vocab_size).shape for x in pieces}
    return {name: Entry(shape, torch.bfloat16) for name, shape in found.items()}


@cache
def assigned(recipe: str, preset: str) -> dict[str, Rule]:
    return RECIPES[recipe].assign(stored(preset))


@pytest.mark.parametrize(
    ("recipe", "bits"), [("ultra-ptq", 5.03), ("ultra-ptq-nvfp4", 4.85), ("ultra-ptq-experts", 5.43)]
)
def test_bits_per_element_of_ultra_are_those_of_table_13(recipe: str, bits: float) -> None:
    summary = report.summarize(assigned(recipe, "ultra-550b-a55b"), stored("ultra-550b-a55b"), "modelopt")
    count = parameter_count(PRESETS["ultra-550b-a55b"])
    assert summary.parameters == count.main + count.mtp
    assert abs(summary.bits - bits) < 0.01
    if recipe == "ultra-ptq":  # 352.3 GB are published; here weights and scales, not the few files beside them
        assert abs(summary.stored_bytes / 352.3e9 - 1) < 0.002


def test_ultra_ptq_is_table_12() -> None:
    assert {name: rule.format for name, rule in RECIPES["ultra-ptq"].assign(TABLE_12).items()} == TABLE_12


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_decides_every_tensor_of_every_model(preset: str, recipe: str) -> None:
    rules = assigned(recipe, preset)
    assert rules.keys() == stored(preset).keys()
    assert all(rule.reason and rule.format in recipes.FORMATS for rule in rules.values())
    assert all(len(stored(preset)[name].shape) == 2 for name, rule in rules.items() if rule.format in ("nvfp4", "fp8"))
    assert {rule.format for name, rule in rules.items() if name.startswith("mtp.")} <= {"bf16", "keep"}


def test_variants_differ_where_table_13_says() -> None:
    entries = stored("ultra-550b-a55b")
    base = assigned("ultra-ptq", "ultra-550b-a55b")
    for recipe, format in (("ultra-ptq-nvfp4", "nvfp4"), ("ultra-ptq-experts", "bf16")):
        other = assigned(recipe, "ultra-550b-a55b")
        changed = {n for n in entries if other[n].format != base[n].format}
        assert {base[n].what for n in changed} == {"shared experts", "Mamba projections"}
        assert {other[n].format for n in changed} == {format}


def test_pretraining_keeps_the_last_16_of_ultras_108_layers() -> None:
    rules = assigned("ultra-pretrain", "ultra-550b-a55b")
    by_layer: dict[int, set[str]] = {}
    for name, rule in rules.items():
        if name.startswith("backbone.layers.") and rule.format in ("nvfp4", "fp8"):
            by_layer.setdefault(int(name.split(".")[2]), set()).add(rule.format)
    assert max(by_layer) == 108 - 16 - 1
    assert rules["backbone.layers.0.mixer.in_proj.weight"].format == "nvfp4"
    assert rules["backbone.layers.0.mixer.out_proj.weight"].format == "fp8"
    assert rules["backbone.layers.1.mixer.shared_experts.up_proj.weight"].format == "nvfp4"
    assert rules["backbone.layers.107.mixer.experts.0.up_proj.weight"].what == "last layers"
    assert rules["mtp.layers.1.mixer.experts.0.up_proj.weight"].what == "MTP"
    kept = {n for n in stored("ultra-550b-a55b") if n.endswith(("q_proj.weight", "latent_proj.weight"))}
    assert {rules[n].format for n in kept} == {"bf16"}


def test_every_format_says_what_it_stores() -> None:
    assert recipes.FORMATS.keys() == set(get_args(recipes.Format))


def test_first_rule_that_fits_decides() -> None:
    recipe = Recipe(
        name="x",
        source="test",
        rules=(
            Rule(what="one", match=("backbone.layers.3.*",), format="bf16", reason="first"),
            Rule(what="rest", match=("*",), format="nvfp4", reason="second"),
        ),
    )
    rules = recipe.assign(["backbone.layers.3.mixer.up_proj.weight", "backbone.layers.33.mixer.up_proj.weight"])
    assert [rule.what for rule in rules.values()] == ["one", "rest"]


def test_tensor_that_no_rule_names_is_an_error_with_what_would_be() -> None:
    lost = [f"backbone.layers.{n}.mixer.adapter.weight" for n in range(30)]
    message = (
        r"recipe ultra-ptq: no rule names backbone.layers.0.mixer.adapter.weight, .* and 10 more\. Its rules are about"
        r" .*router: backbone.layers.\*.mixer.gate.weight.*formats nvfp4, fp8, bf16, keep$"
    )
    with pytest.raises(ConfigurationError, match=message):
        RECIPES["ultra-ptq"].assign([*TABLE_12, *lost])


ROW = {"what": "all", "match": ["*"], "format": "bf16", "reason": "none"}


def written(path: Path, **tree: object) -> str:
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "own", "source": "test", "rules": [ROW], **tree}))
    return str(file)


def test_recipe_of_a_file_is_a_table_like_the_others(tmp_path: Path) -> None:
    rows = [ROW | {"what": "end", "match": ["backbone.*"], "last_layers": 0.5, "format": "fp8"}, ROW]
    recipe = recipes.load(written(tmp_path, rules=rows))
    assert (recipe.name, recipe.source, len(recipe.rules)) == ("own", "test", 2)
    weights = [f"backbone.layers.{n}.mixer.up_proj.weight" for n in range(5)] + ["backbone.embeddings.weight"]
    assert [r.format for r in recipe.assign(weights).values()] == ["bf16", "bf16", "bf16", "fp8", "fp8", "bf16"]
    assert recipes.load("ultra-ptq") is RECIPES["ultra-ptq"]


REFUSED = {
    "format": ({"rules": [ROW | {"format": "int4"}]}, r"recipe.yaml: rules.0.format: 'int4': .*'nvfp4'"),
    "key": ({"rules": [ROW | {"formats": "fp8"}]}, r"rules.0.formats: unknown key; did you mean 'format'\?"),
    "missing": ({"rules": [{k: v for k, v in ROW.items() if k != "reason"}]}, r"rules.0.reason: missing"),
    "empty": ({"rules": []}, r"rules: "),
    "share": ({"rules": [ROW | {"last_layers": 16}]}, r"rules.0.last_layers: 16"),
    "text": ({"rules": [ROW | {"match": "*"}]}, r"rules.0.match: '\*'"),
    "kinds": (
        {"rules": [ROW, ROW | {"format": "fp8"}]},
        r"rules: 'all' is bf16 in one rule and fp8 in another; give the two kinds names of their own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path, case: str) -> None:
    tree, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        recipes.load(written(tmp_path, **tree))


def test_unknown_recipe_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"recipe 'ultra-pqt': unknown; did you mean 'ultra-ptq'\?; or name a"):
        recipes.load("ultra-pqt")
    with pytest.raises(ConfigurationError, match=r"none.yaml: cannot be read"):
        recipes.load(str(tmp_path / "none.yaml"))
