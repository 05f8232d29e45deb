"""Quantized checkpoints: the bytes of ModelOpt's own export, read back to the same numbers by both ecosystems."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import small_nemotron_h
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mopd import conversion
from megatron_mopd.config import Parallel
from megatron_mopd.conversion import hugging_face_config, inspection
from megatron_mopd.conversion.model_settings import model_settings
from megatron_mopd.quantization import checkpoint, display
from megatron_mopd.quantization.checkpoint import MANIFEST, PICTURE
from megatron_mopd.quantization.config import patterns
from megatron_mopd.quantization.planning import Options
from megatron_mopd.quantization.recipes import RECIPES
from megatron_mopd.quantization.stored import Encoder, decode_nvfp4

TOOL = Path(__file__).resolve().parent.parent / "tools" / "quantize_checkpoint.py"
SIZES = {"moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 80}
EXPERT = "backbone.layers.1.mixer.experts.2.up_proj"
SHARED = "backbone.layers.1.mixer.shared_experts.up_proj"
PTQ = RECIPES["ultra-ptq"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 NemotronH model as transformers saves it."""
    made = small_nemotron_h.model("MEM*E-", **SIZES)
    for name, buffer in made.named_buffers():
        buffer.normal_() if name.endswith("correction_bias") else None
    path = tmp_path_factory.mktemp("quantize") / "source"
    made.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(source: Path) -> dict[str, Path]:
    """The source in both layouts, with and without four-over-six, each also turned back."""
    made = {}
    for layout in ("modelopt", "compressed-tensors"):
        for error in (None, "mse"):
            path = source.parent / f"{layout}-{error}"
            checkpoint.quantize(source, path, Options(recipe=PTQ, layout=layout, four_over_six=error))
            checkpoint.dequantize(path, source.parent / f"{path.name}-back")
            made[path.name] = path
    return made


@pytest.fixture(scope="module")
def modelopt() -> ModuleType:
    """ModelOpt's package, which takes seconds to import."""
    return importlib.import_module("modelopt.torch.export")


def tensors(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def back(path: Path) -> dict[str, Tensor]:
    return tensors(path.with_name(f"{path.name}-back"))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


# --------------------------------------------------------------------------- what is written


def test_layout_is_modelopts(quantized: dict[str, Path], source: Path) -> None:
    original, found = tensors(source), tensors(quantized["modelopt-None"])
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items() if n.startswith(EXPERT)} == {
        f"{EXPERT}.weight": (torch.uint8, (48, 16)),
        f"{EXPERT}.weight_scale": (torch.float8_e4m3fn, (48, 2)),
        f"{EXPERT}.weight_scale_2": (torch.float32, ()),
    }
    amax = original[f"{EXPERT}.weight"].abs().max().float()
    assert found[f"{EXPERT}.weight_scale_2"] == amax / 2688
    assert tensors(quantized["modelopt-mse"])[f"{EXPERT}.weight_scale_2"] == amax / 1536
    assert found[f"{SHARED}.weight"].dtype == torch.float8_e4m3fn
    assert found[f"{SHARED}.weight_scale"] == original[f"{SHARED}.weight"].abs().max().float() / 448
    kept = [n for n, t in original.items() if n in found and found[n].dtype == t.dtype]
    assert len(kept) == 33 and all(same(found[n], original[n]) for n in kept)
    assert not [n for n in found if n.endswith("input_scale")]


def test_layout_is_compressed_tensors(quantized: dict[str, Path], source: Path) -> None:
    original, found = tensors(source), tensors(quantized["compressed-tensors-None"])
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items() if n.startswith(EXPERT)} == {
        f"{EXPERT}.weight_packed": (torch.uint8, (48, 16)),
        f"{EXPERT}.weight_scale": (torch.float8_e4m3fn, (48, 2)),
        f"{EXPERT}.weight_global_scale": (torch.float32, (1,)),
    }
    amax = original[f"{EXPERT}.weight"].abs().max().float()
    torch.testing.assert_close(found[f"{EXPERT}.weight_global_scale"][0], 2688 / amax, rtol=3e-7, atol=0)
    assert found[f"{SHARED}.weight_scale"].shape == (1,)


def test_manifest_says_what_was_made_of_what(quantized: dict[str, Path], source: Path) -> None:
    manifest = json.loads((quantized["modelopt-mse"] / MANIFEST).read_text())
    assert manifest["source_checkpoint_id"] == inspection.inspect(source).checkpoint_id
    assert manifest["recipe"]["name"] == "ultra-ptq" and manifest["four_over_six"] == "mse"
    assert manifest["layout"] == "modelopt" and "no input scales" in manifest["activations"]
    files = sum(t.numel() * t.element_size() for t in tensors(quantized["modelopt-mse"]).values())
    assert manifest["stored_bytes"] == files == sum(group["stored_bytes"] for group in manifest["groups"])
    assert manifest["bits_per_element"] == 8 * files / manifest["parameters"]
    assert {rule["format"] for rule in manifest["rules"]} == {"nvfp4", "fp8", "bf16", "keep"}
    assert (quantized["modelopt-mse"] / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["modelopt-None", "modelopt-mse", "compressed-tensors-mse"])
def test_errors_of_the_report_are_those_of_the_files(quantized: dict[str, Path], source: Path, name: str) -> None:
    original, found = tensors(source), tensors(quantized[name])
    groups = {g["what"]: g for g in json.loads((quantized[name] / MANIFEST).read_text())["groups"]}
    matrices = [n for n in original if ".mixer.experts." in n]
    lost, whole, worst = {}, {}, 0.0
    for n in matrices:
        module = n.removesuffix(".weight")
        if name.startswith("modelopt"):
            parts, layout = ("weight", "weight_scale", "weight_scale_2"), "modelopt"
        else:
            parts, layout = ("weight_packed", "weight_scale", "weight_global_scale"), "compressed-tensors"
        values = decode_nvfp4(*(found[f"{module}.{part}"] for part in parts), layout)  # type: ignore[call-arg]
        lost[n] = float((values.double() - original[n].double()).square().sum())
        whole[n] = float(original[n].double().square().sum())
        worst = max(worst, math.sqrt(lost[n] / whole[n]))
    error = math.sqrt(sum(lost.values()) / sum(whole.values()))
    assert groups["routed experts"]["error"] == pytest.approx(error, rel=1e-6)
    assert groups["routed experts"]["worst_error"] == pytest.approx(worst, rel=1e-6)
    assert 0.05 < error < 0.12 and set(groups["routed experts"]["layers"]) == {"1", "4"}
    assert 0.02 < groups["shared experts"]["error"] < 0.03 and groups["router"]["error"] == 0


def test_four_over_six_loses_less(quantized: dict[str, Path]) -> None:
    errors = [
        next(g["error"] for g in json.loads((quantized[n] / MANIFEST).read_text())["groups"] if g["format"] == "nvfp4")
        for n in ("modelopt-mse", "modelopt-None")
    ]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(("format", "error"), [("nvfp4", None), ("nvfp4", "mse"), ("fp8", None)])
def test_bytes_do_not_depend_on_the_rows_encoded_at_a_time(layout: Any, format: Any, error: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
        encode = Encoder("x.weight", format, layout, error, weight.abs().max().float())
        whole, parts = encode(weight), [encode(rows) for rows in weight.split((1, 20, 16))]
        for number, tensor in enumerate(whole.rows):
            assert same(tensor, torch.cat([part.rows[number].view(torch.uint8) for part in parts]).view(tensor.dtype))
        assert torch.equal(whole.values, torch.cat([part.values for part in parts]))
        assert all(torch.equal(part.scale, whole.scale) for part in parts)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- ModelOpt


@pytest.mark.parametrize("name", ["modelopt-None", "modelopt-mse"])
def test_modelopt_reads_back_the_same_numbers(quantized: dict[str, Path], name: str, modelopt: ModuleType) -> None:
    """But for the sign of zero: ModelOpt's table has 0 for code 8, where hardware and all others have -0."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    found, ours, matrices = tensors(quantized[name]), back(quantized[name]), 0
    for weight, codes in found.items():
        module = weight.removesuffix(".weight")
        if codes.dtype == torch.uint8:
            shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
            scale: Any = {"scale": found[f"{module}.weight_scale"], "double_scale": found[f"{module}.weight_scale_2"]}
            values = NVFP4QTensor(shape, torch.bfloat16, codes).dequantize(torch.float32, block_sizes={-1: 16}, **scale)
        elif weight.endswith(".weight") and codes.dtype == torch.float8_e4m3fn:
            scale = {"scale": found[f"{module}.weight_scale"]}
            values = FP8QTensor(codes.shape, torch.bfloat16, codes).dequantize(torch.float32, **scale)
        else:
            continue
        assert ours[weight].dtype == torch.bfloat16 and torch.equal(ours[weight], values.bfloat16()), weight
        matrices += 1
    assert matrices == 26


@pytest.mark.parametrize("recipe", ["ultra-ptq", "ultra-ptq-experts"])
def test_configuration_is_modelopts(source: Path, tmp_path: Path, recipe: str, modelopt: ModuleType) -> None:
    """Its exporter, told each layer's format, writes the same two files; it names excluded modules more briefly."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import process_layer_quant_config

    checkpoint.quantize(source, tmp_path / "out", Options(recipe=RECIPES[recipe]))
    file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    rules = RECIPES[recipe].assign(tensors(source))
    told: dict[str, Any] = {}
    for name, rule in rules.items():
        if rule.format in ("nvfp4", "fp8"):
            module = name.removesuffix(".weight")
            told |= {f"{module}.quantization": {"nvfp4": "w4a16_nvfp4", "fp8": "fp8"}[rule.format]}
            told |= {f"{module}.awq_block_size": 16 if rule.format == "nvfp4" else 0}
    expected = process_layer_quant_config(told)
    excluded = file["quantization"].pop("exclude_modules")
    assert excluded == sorted(n.removesuffix(".weight") for n, rule in rules.items() if rule.format == "bf16")
    expected.pop("exclude_modules", None)
    assert file["quantization"] == {k: v for k, v in expected.items() if v or k == "kv_cache_quant_algo"}
    whole = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry == convert_hf_quant_config_format(whole)


def test_whole_checkpoint_is_modelopts_own_export(
    quantized: dict[str, Path], source: Path, tmp_path: Path, modelopt: ModuleType
) -> None:
    """Every tensor, byte for byte: ModelOpt quantizes the loaded model's weights and writes it."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    fp8: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
    nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}, "axis": None}
    chosen = {
        **{f"*{part}*weight_quantizer": fp8 for part in ("in_proj", "out_proj", "shared_experts", "layers.5.mixer.")},
        "*mixer.experts*weight_quantizer*": nvfp4,
    }
    rows = [{"quantizer_name": name, "cfg": cfg, "enable": True} for name, cfg in chosen.items()]
    config: Any = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *rows], "algorithm": "max"}
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    mtq.quantize(model, config, lambda m: m(torch.arange(32)[None]))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=tmp_path)
    ours, theirs = tensors(quantized["modelopt-None"]), tensors(tmp_path)
    assert ours.keys() == theirs.keys()
    wide = [n for n in ours if n.endswith("correction_bias")]  # which transformers computes with in fp32
    assert not [n for n in ours if not same(ours[n], theirs[n].bfloat16() if n in wide else theirs[n])]


# --------------------------------------------------------------------------- compressed-tensors and transformers


@pytest.mark.parametrize("error", ["None", "mse"])
def test_compressed_tensors_reads_back_the_same_numbers(quantized: dict[str, Path], error: str) -> None:
    from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer

    path = quantized[f"compressed-tensors-{error}"]
    theirs = CompressedTensorsDequantizer(str(path)).validate(tensors(path))
    ours = back(path)
    assert theirs.keys() == ours.keys() and not [n for n in ours if not same(ours[n], theirs[n])]


@pytest.mark.parametrize("error", ["None", "mse"])
def test_layouts_are_each_others_conversion(quantized: dict[str, Path], error: str) -> None:
    """As compressed-tensors converts ModelOpt's, but for the dimension that its own global scales have."""
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    converted = ModelOptNvfp4Converter(targets=[r"re:.*\.experts\.\d+\..*"]).process(
        tensors(quantized[f"modelopt-{error}"])
    )
    ours = tensors(quantized[f"compressed-tensors-{error}"])
    assert converted.keys() == ours.keys()
    assert not [n for n in ours if not same(ours[n], converted[n].reshape(ours[n].shape))]


def test_compressed_tensors_takes_the_configuration_and_its_targets(quantized: dict[str, Path], source: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    tree = json.loads((quantized["compressed-tensors-mse"] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(tree)
    assert config.format == "mixed-precision"
    rules = PTQ.assign(tensors(source))
    formats = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
    for name, rule in rules.items():
        module = name.removesuffix(".weight")
        for spelled in (module, module.replace("backbone.", "model.", 1)):  # as servers name the trunk
            hits = [
                scheme.format
                for scheme in config.config_groups.values()
                if not isinstance(scheme, list) and any(match_name(spelled, target) for target in scheme.targets)
            ]
            assert hits == ([formats[rule.format]] if rule.format in formats else []), spelled
            ignored = any(match_name(spelled, target) for target in config.ignore or [])
            assert ignored == (rule.format == "bf16"), spelled


def test_patterns_match_these_and_no_others() -> None:
    from compressed_tensors.utils.match import match_name

    everything = [f"{stem}.layers.{n}.mixer.experts.{e}.{p}_proj" for stem in ("backbone", "mtp") for n in range(12)
                  for e in range(12) for p in ("up", "down")] + ["lm_head", "backbone.embeddings"]  # fmt: skip
    chosen = {n for i, n in enumerate(everything) if i % 7 in (0, 3)} | {"lm_head"}
    targets = patterns(chosen)
    assert {n for n in everything if any(match_name(n, target) for target in targets)} == chosen


def test_transformers_reads_the_configuration_and_runs_what_was_turned_back(
    quantized: dict[str, Path], source: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, path in quantized.items():
        method = AutoConfig.from_pretrained(path).quantization_config["quant_method"]
        assert name.startswith(method)
    tokens = torch.arange(1, 25)[None]

    def logits(path: Path) -> Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval()(tokens).logits.detach()

    whole, turned = logits(source), logits(source.parent / "modelopt-mse-back")
    assert 0 < float((turned - whole).norm() / whole.norm()) < 0.3
    tree = json.loads((source.parent / "modelopt-mse-back" / "config.json").read_text())
    assert "quantization_config" not in tree and tree == json.loads((source / "config.json").read_text())


def test_student_computes_with_what_was_turned_back(quantized: dict[str, Path], tmp_path: Path, groups: Any) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_mopd import student
    from megatron_mopd.checkpoint import load_weights

    back = quantized["modelopt-mse"].with_name("modelopt-mse-back")
    conversion.hugging_face_to_megatron(back, tmp_path / "megatron")
    settings = model_settings(hugging_face_config.read(back), str(back))
    model = student.build_model(settings, Parallel(), groups, small_nemotron_h.VOCAB, mtp=False)
    load_weights(tmp_path / "megatron", model, groups)
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        output = student.forward(model.eval(), tokens)
        logits = (output.hidden @ output.output_weight.T).transpose(0, 1)
        peer: Any = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
        torch.testing.assert_close(logits, peer.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- sources and the tool


def test_megatron_source_gives_the_same_files(quantized: dict[str, Path], source: Path, tmp_path: Path) -> None:
    conversion.hugging_face_to_megatron(source, tmp_path / "megatron", shards=2)
    checkpoint.quantize(tmp_path / "megatron", tmp_path / "out", Options(recipe=PTQ, four_over_six="mse"))
    there = {p.name: p.read_bytes() for p in quantized["modelopt-mse"].iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == there


def test_tool_prints_table_reasons_and_bits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str | Path) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
            patch.setattr(torch, "set_num_threads", lambda count: None)  # not for the tests that follow
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out if ended.value.code in (0, None) else str(ended.value.code)

    dry = run(source, "--recipe", "ultra-ptq", "--dry-run")
    assert "nothing was written" in dry and re.search(r"bits +MB *\n", dry)
    done = run(source, tmp_path / "out", "--recipe", "ultra-ptq", "--four-over-six", "mae")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert f"{manifest['bits_per_element']:.4f} bits per element" in done and re.search(r"bits +MB +error *\n", done)
    for group in manifest["groups"]:
        assert f"{group['what']}, {group['format']}: {group['reason']}" in done
        assert re.search(rf"^{group['what']} +{group['format']} +{group['tensors']} .*[\d%]$", done, re.MULTILINE)
    assert f"source checkpoint_id {manifest['source_checkpoint_id']}" in done
    assert "exists already and is not overwritten" in run(source, tmp_path / "out", "--recipe", "ultra-ptq")
    turned = run(tmp_path / "out", tmp_path / "back", "--dequantize")
    assert f"checkpoint_id {inspection.inspect(tmp_path / 'back').checkpoint_id}" in turned
    assert run(tmp_path / "out", "--dequantize") == "2"  # argparse: OUT is missing
    for words in (("--layout", "compressed-tensors"), ("--like", source), ("--four-over-six", "mse"), ("--dry-run",)):
        assert run(tmp_path / "out", tmp_path / "again", "--dequantize", *words) == "2"
    assert run(source, tmp_path / "again", "--recipe", "ultra-ptq", "--four-over-six", "rms") == "2"
    assert not (tmp_path / "again").exists()


def test_picture_needs_no_quantized_group_over_layers(source: Path) -> None:
    summary = checkpoint.preview(source, Options(recipe=PTQ))
    figure = display.figure(summary, "preview")
    assert len(figure.axes) == 2 and not figure.axes[1].lines
