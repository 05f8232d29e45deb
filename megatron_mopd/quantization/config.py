"""The quantization entry of ``config.json`` and ``hf_quant_config.json`` as ModelOpt and compressed-tensors write it.

Only weights are described: nothing was calibrated, so no scale of activations is stored. NVFP4 layers are weight-only
(ModelOpt's ``W4A16_NVFP4``; no ``input_activations`` in compressed-tensors). FP8 layers are ModelOpt's ``FP8`` without
``input_scale``; compressed-tensors can say that activations get a scale per token when they come, and does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.quantization.recipes import Format
from megatron_mopd.quantization.stored import BLOCK, Layout

MODELOPT_FILE = "hf_quant_config.json"
ENTRY = "quantization_config"
"""Key of ``config.json``."""
MODELOPT_VERSION = "0.47.0"
"""Whose format is written; servers know the format by its producer's name."""
_ALGORITHMS: dict[Format, dict[str, Any]] = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": BLOCK},
    "fp8": {"quant_algo": "FP8"},
}
_STATIC = {"dynamic": False, "type": "float"}
_GROUPS: dict[Format, dict[str, Any]] = {
    "nvfp4": {"weights": _STATIC | {"num_bits": 4, "group_size": BLOCK}},
    "fp8": {"input_activations": _STATIC | {"num_bits": 8}, "weights": _STATIC | {"num_bits": 8}},
}
_E4M3 = "torch.float8_e4m3fn"
_SCHEMES: dict[Format, dict[str, Any]] = {
    "nvfp4": {
        "format": "nvfp4-pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": BLOCK,
            "dynamic": False,
            "scale_dtype": _E4M3,
            "zp_dtype": _E4M3,
        },
        "input_activations": None,
        "output_activations": None,
    },
    "fp8": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        "output_activations": None,
    },
}


def quantization_files(
    quantized: Mapping[str, Format], kept: Sequence[str], layout: Layout
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry ``quantization_config`` of ``config.json``, and the further JSON files by name.

    ``quantized``: format of each quantized module by its name on disk; ``kept``: modules with a weight that is not.
    """
    if not quantized:
        raise ConfigurationError("the recipe quantizes no tensor of this model; choose another, or copy the checkpoint")
    if layout == "compressed-tensors":
        return _compressed_tensors(quantized, kept), {}
    file = _modelopt(quantized, kept)
    return _in_config(file), {MODELOPT_FILE: file}


def _by_format(quantized: Mapping[str, Format]) -> dict[Format, list[str]]:
    found: dict[Format, list[str]] = {}
    for module, format in quantized.items():
        found.setdefault(format, []).append(module)
    return found


def _modelopt(quantized: Mapping[str, Format], kept: Sequence[str]) -> dict[str, Any]:
    algorithms = {module: _ALGORITHMS[format] for module, format in quantized.items()}
    formats = _by_format(quantized)
    tree: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    if len(formats) > 1:
        tree["quantized_layers"] = algorithms
    else:
        tree |= _ALGORITHMS[next(iter(formats))]
    tree["exclude_modules"] = sorted(kept)
    return {"producer": {"name": "modelopt", "version": MODELOPT_VERSION}, "quantization": tree}


def _in_config(file: Mapping[str, Any]) -> dict[str, Any]:
    """What ModelOpt writes into ``config.json`` for a ``hf_quant_config.json`` (convert_hf_config.py)."""
    tree = file["quantization"]
    entry: dict[str, Any] = {}
    if layers := tree.get("quantized_layers"):
        targets: dict[str, list[str]] = {}
        for module, algorithm in layers.items():
            targets.setdefault(algorithm["quant_algo"], []).append(module)
        groups = [_group(algorithm) | {"targets": sorted(modules)} for algorithm, modules in targets.items()]
        entry["config_groups"] = {f"group_{number}": group for number, group in enumerate(groups)}
        entry["quantized_layers"] = layers
    else:
        entry["config_groups"] = {"group_0": _group(tree["quant_algo"]) | {"targets": ["Linear"]}}
    return entry | {
        "ignore": tree["exclude_modules"],
        "quant_algo": tree["quant_algo"],
        "producer": file["producer"],
        "quant_method": "modelopt",
    }


def _group(algorithm: str) -> dict[str, Any]:
    return next(_GROUPS[format] for format in _GROUPS if _ALGORITHMS[format]["quant_algo"] == algorithm)


def _compressed_tensors(quantized: Mapping[str, Format], kept: Sequence[str]) -> dict[str, Any]:
    groups = [_SCHEMES[format] | {"targets": patterns(modules)} for format, modules in _by_format(quantized).items()]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": patterns(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_TRUNK = "(?:backbone|model)"
_LAYER = re.compile(r"(?P<stem>\w+)\.layers\.(?P<layer>\d+)\.(?P<tail>.+)")
_EXPERT = re.compile(r"(?P<head>.+\.experts)\.(?P<expert>\d+)\.(?P<tail>.+)")


def patterns(modules: Iterable[str]) -> list[str]:
    """Targets that match ``modules`` and nothing else: a regular expression for the layers and experts of each kind.

    The trunk is called ``backbone`` on disk and ``model`` in servers, and matches under both names.
    """
    plain: list[str] = []
    kinds: dict[tuple[str, str, str], dict[int, list[str]]] = {}  # layers of a kind, and the experts in each
    for module in modules:
        layer = _LAYER.fullmatch(module)
        if not layer:
            plain.append(module)
            continue
        expert = _EXPERT.fullmatch(layer["tail"])
        kind = (layer["stem"], expert["head"], expert["tail"]) if expert else (layer["stem"], layer["tail"], "")
        kinds.setdefault(kind, {}).setdefault(int(layer["layer"]), []).append(expert["expert"] if expert else "")
    found = [name if "." not in name else f"re:{_stem(name)}$" for name in plain]
    for (stem, head, tail), layers in kinds.items():
        alike: dict[tuple[str, ...], list[int]] = {}
        for number, members in layers.items():
            alike.setdefault(tuple(members), []).append(number)
        for members, numbers in alike.items():
            rest = rf"\.{_any(members)}\.{re.escape(tail)}" if tail else ""
            found.append(rf"re:{_stem(stem)}\.layers\.{_any(map(str, numbers))}\.{re.escape(head)}{rest}$")
    return found


def _stem(name: str) -> str:
    stem, dot, rest = name.partition(".")
    return (_TRUNK if stem in ("backbone", "model") else re.escape(stem)) + re.escape(dot + rest)


def _any(choices: Iterable[str]) -> str:
    return f"(?:{'|'.join(choices)})"
