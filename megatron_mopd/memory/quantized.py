"""What NVFP4 changes in memory: packed parts of teachers, and the originals beside a student that is trained for it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_mopd.memory.weights import OUTPUT_WEIGHT, Weight
from megatron_mopd.pattern import parse_pattern
from megatron_mopd.presets import Preset
from megatron_mopd.quantization import recipes

_LINEARS = {
    "mixer.in_proj": "mixer.in_proj",
    "mixer.out_proj": "mixer.out_proj",
    "self_attention.linear_proj": "mixer.o_proj",
    "mlp.linear_fc1": "mixer.up_proj",
    "mlp.linear_fc2": "mixer.down_proj",
    "mlp.router": "mixer.gate",
    "mlp.fc1_latent_proj": "mixer.fc1_latent_proj",
    "mlp.fc2_latent_proj": "mixer.fc2_latent_proj",
    "mlp.shared_experts.linear_fc1": "mixer.shared_experts.up_proj",
    "mlp.shared_experts.linear_fc2": "mixer.shared_experts.down_proj",
    "mlp.experts.linear_fc1": "mixer.experts.0.up_proj",
    "mlp.experts.linear_fc2": "mixer.experts.0.down_proj",
}
"""Linears of a layer by mcore's name and by Hugging Face's, as recipes name them; a layer's experts are alike."""
_TOP = {"embedding.word_embeddings": "backbone.embeddings", "output_layer": "lm_head"}


def stored_sizes(weight: Weight, nvfp4: Iterable[str], experts: int) -> list[int]:
    """Bytes of each tensor that host memory holds of a teacher's parameter: itself, or, for what ``nvfp4`` names,
    codes, block scales and a global scale of each matrix; of a layer's experts this rank has ``experts``."""
    routed = ".mlp.experts." in weight.name
    if not (("experts" in nvfp4 and routed) or ("output_weight" in nvfp4 and weight.name == OUTPUT_WEIGHT)):
        return [weight.nbytes]
    matrices = experts if routed else 1
    elements = weight.numel // matrices
    return [elements // 2, elements // 16, 4] * matrices


def original_bytes(found: Iterable[Weight], recipe: str, p: Preset, stage: int) -> int:
    """Of the high-precision copies that a rank of a pipeline stage keeps beside the parameters ``found``."""
    stages = parse_pattern(p.pattern).stages
    first, layers = sum(map(len, stages[:stage])), sum(map(len, stages))
    named = {name: w for w in found if (name := _hugging_face_name(w.name, first)) is not None}
    # A table may count layers from the end, which another stage may have.
    rules = recipes.load(recipe).assign([*named, f"backbone.layers.{layers - 1}.norm.weight"])
    return sum(weight.nbytes for name, weight in named.items() if rules[name].format in recipes.QUANTIZED)


def _hugging_face_name(name: str, first_layer: int) -> str | None:
    """Of a linear, the embedding or the output layer; None for what no recipe quantizes."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    match = re.fullmatch(r"(decoder|mtp\.layers\.\d+\.mtp_model_layer)\.layers\.(\d+)\.(.+)", stem)
    if match is None or match[3] not in _LINEARS:
        return None
    trunk = match[1] == "decoder"
    prefix = f"backbone.layers.{first_layer + int(match[2])}" if trunk else f"mtp.layers.{match[2]}"
    return f"{prefix}.{_LINEARS[match[3]]}.weight"
