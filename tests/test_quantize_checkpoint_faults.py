"""What quantizing refuses and what it survives: odd tensors, NaN, other sources, kills, options changed, low memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mopd import conversion, names
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config, inspection, plans
from megatron_mopd.quantization import checkpoint
from megatron_mopd.quantization.checkpoint import MANIFEST
from megatron_mopd.quantization.planning import Options
from megatron_mopd.quantization.recipes import RECIPES, Recipe, Rule
from megatron_mopd.quantization.view import QuantizedWeights

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "vocab_size": 50, "hidden_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 24, "routed_scaling_factor": 2.5, "dtype": "float32",
}  # fmt: skip
UP = "backbone.layers.2.mixer.experts.1.up_proj.weight"
NORM = "backbone.layers.3.norm.weight"
PTQ = Options(recipe=RECIPES["ultra-ptq"])


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as the rest."""
    monkeypatch.setattr(checkpoint.display, "figure", lambda summary, title: title)
    monkeypatch.setattr(checkpoint.display, "save", lambda figure, path: path.write_text(figure))


def source(path: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A Hugging Face directory of random tensors."""
    path.mkdir(parents=True)
    config = CONFIG | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (path / "tokenizer.json").write_text("{}")
    model = hugging_face_config.architecture(config, "test")
    shapes = hugging_face_config.megatron_shapes(model)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for piece in names.hugging_face_pieces(shapes):
        shape = names.layout(piece, shapes, model.preset.num_query_groups, model.preset.vocab_size).shape
        tensors[piece.name] = torch.randn(shape, generator=generator).to(dtype)
    save_file(tensors, path / "model.safetensors")
    return path


def get(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = get(path)
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1).__setitem__(7, value)


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------- refused before anything is written


def own(format: Any, *match: str) -> Options:
    first = Rule(what="odd", match=match, format=format, reason="test")
    return Options(recipe=replace(RECIPES["ultra-ptq"], rules=(first, *RECIPES["ultra-ptq"].rules)))


REFUSED: dict[str, tuple[Options, str]] = {
    "blocks": (
        own("nvfp4", "*.3.mixer.down_proj.weight"),
        r"3.mixer.down_proj.weight: rows of 40 elements do not divide into NVFP4's blocks of 16; give it fp8 or bf16",
    ),
    "matrix": (own("fp8", "*.conv1d.weight"), r"conv1d.weight: \[64, 1, 4\] is no matrix, so it cannot be fp8"),
    "vector": (
        own("nvfp4", "*.A_log"),
        r"A_log: only the weight of a linear layer is quantized; give it the format keep",
    ),
    "bias": (own("fp8", "*.norm.weight"), r"norm.weight: \[32\] is no matrix"),
    "nothing": (own("bf16", "*"), r"the recipe quantizes no tensor of this model"),
    "no rule": (
        Options(recipe=Recipe(name="short", source="test", rules=RECIPES["ultra-ptq"].rules[:3])),
        r"recipe short: no rule names backbone.embeddings.weight, .*lm_head.weight\. Its rules are about",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipe_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    path = source(tmp_path / "hf")
    with pytest.raises(ConfigurationError, match=message):
        checkpoint.quantize(path, tmp_path / "out", options)
    with pytest.raises(ConfigurationError, match=message):
        checkpoint.preview(path, options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_targets_that_are_in_the_way_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigurationError, match="out: exists already and is not overwritten"):
        checkpoint.quantize(path, tmp_path / "out", PTQ)
    with pytest.raises(ConfigurationError, match=r"lies inside .*name a directory outside"):
        checkpoint.quantize(path, path / "out", PTQ)
    assert contents(tmp_path / "out") == {"mine": b""}


def test_source_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    checkpoint.quantize(source(tmp_path / "hf"), tmp_path / "out", PTQ)
    with pytest.raises(ConfigurationError, match=r"out: is quantized already, its config.json has a quantization_conf"):
        checkpoint.quantize(tmp_path / "out", tmp_path / "twice", PTQ)
    with pytest.raises(ConfigurationError, match=r"out: is quantized.*quantize_checkpoint.py .*out OUT --dequantize"):
        conversion.hugging_face_to_megatron(tmp_path / "out", tmp_path / "megatron")


def test_incomplete_source_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    path = source(tmp_path / "hf")
    change(path, lambda t: t.pop(UP))
    with pytest.raises(ConfigurationError, match=rf"1 problem, nothing was written\n  missing \(1\): {UP}"):
        checkpoint.quantize(path, tmp_path / "out", PTQ)


def test_megatron_source_without_its_configuration_needs_one(tmp_path: Path) -> None:
    path = source(tmp_path / "hf")
    conversion.hugging_face_to_megatron(path, tmp_path / "megatron")
    manifest = tmp_path / "megatron" / "release" / "mopd_manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["hugging_face"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(ConfigurationError, match=r"says nothing of a Hugging Face configuration; .* --like"):
        checkpoint.quantize(tmp_path / "megatron", tmp_path / "out", PTQ)
    tree["checkpoint_id"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    with pytest.raises(ConfigurationError, match="says checkpoint_id 000000000000, the tensors give"):
        checkpoint.quantize(tmp_path / "megatron", tmp_path / "out", PTQ, like=path)
    del tree["checkpoint_id"]
    manifest.write_text(json.dumps(tree))
    checkpoint.quantize(tmp_path / "megatron", tmp_path / "out", PTQ, like=path)
    with pytest.raises(ConfigurationError, match=r"--like .*hf: .*hf is a Hugging Face directory itself"):
        checkpoint.quantize(path, tmp_path / "straight", PTQ, like=path)
    checkpoint.quantize(path, tmp_path / "straight", PTQ)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


# --------------------------------------------------------------------------- what tensors hold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [UP, "backbone.layers.3.mixer.up_proj.weight", "lm_head.weight", NORM])
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_nan_and_infinity_are_refused_by_name(
    tmp_path: Path, dtype: torch.dtype, name: str, value: float, what: str
) -> None:
    path = source(tmp_path / "hf", dtype)
    change(path, put(name, value))
    with pytest.raises(ConfigurationError, match=rf"{what} in {name}; no format holds it"):
        checkpoint.quantize(path, tmp_path / "out", PTQ)
    assert not (tmp_path / "out").exists()


def test_zeros_stay_zero_and_the_very_small_is_refused(tmp_path: Path) -> None:
    path, dense = source(tmp_path / "hf", torch.float32), "backbone.layers.3.mixer.up_proj.weight"
    change(path, lambda t: (t[UP].zero_(), t[dense].zero_(), t["lm_head.weight"].zero_()))
    for layout in ("modelopt", "compressed-tensors"):
        checkpoint.quantize(path, tmp_path / layout, replace(PTQ, layout=layout, four_over_six="max"))
        checkpoint.dequantize(tmp_path / layout, tmp_path / f"{layout}-back")
        back = get(tmp_path / f"{layout}-back")
        assert not back[UP].count_nonzero() and not back[dense].count_nonzero()
        assert all(t.isfinite().all() for t in back.values())
    change(path, lambda t: t[UP].fill_(1e-35))
    with pytest.raises(ConfigurationError, match=rf"{UP}: its largest magnitude is 1e-35, below 7.89e-31"):
        checkpoint.quantize(path, tmp_path / "out", PTQ)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_floats_are_rounded_to_bf16_but_for_what_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    path = source(tmp_path / "hf", dtype)
    checkpoint.quantize(path, tmp_path / "out", PTQ)
    before, after = get(path), get(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].bfloat16())
    assert torch.equal(
        after["backbone.layers.0.mixer.conv1d.weight"], before["backbone.layers.0.mixer.conv1d.weight"].bfloat16()
    )
    assert torch.equal(after[NORM], before[NORM]) and after[NORM].dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    groups = {g["what"]: g["error"] for g in json.loads((tmp_path / "out" / MANIFEST).read_text())["groups"]}
    lost = after["lm_head.weight"].double() - before["lm_head.weight"].double()
    assert groups["output weight"] == pytest.approx(float(lost.norm() / before["lm_head.weight"].double().norm()))
    assert groups["norms, biases, Mamba scalars"] == 0 and 0.05 < groups["routed experts"] < 0.12


@pytest.mark.parametrize("format", ["keep", "bf16"])
def test_matrices_that_are_not_quantized_are_excluded_by_name(tmp_path: Path, format: Any) -> None:
    """With one format the configuration is about every linear layer that it does not exclude."""
    rules = (
        Rule(what="experts", match=("*.experts.*",), format="nvfp4", reason="test"),
        Rule(what="rest", match=("*",), format=format, reason="test"),
    )
    path = source(tmp_path / "hf")
    checkpoint.quantize(path, tmp_path / "out", Options(recipe=Recipe(name="own", source="test", rules=rules)))
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    matrices = {name.removesuffix(".weight") for name, tensor in get(path).items() if tensor.ndim > 1}
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert set(entry["ignore"]) == {name for name in matrices if ".experts." not in name} > {"lm_head"}


@pytest.mark.parametrize("files", [1, 4])
def test_tied_fused_and_mtp_are_stored_as_servers_expect(tmp_path: Path, files: int) -> None:
    """Experts one by one, no second embedding, MTP in bf16; the index names every tensor."""
    path = source(
        tmp_path / "hf", tie_word_embeddings=True, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E"
    )
    stem = "backbone.layers.2.mixer.experts"

    def fuse(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        for part in ("up_proj", "down_proj"):
            tensors[f"{stem}.{part}"] = torch.stack([tensors.pop(f"{stem}.{e}.{part}.weight") for e in range(4)])

    change(path, fuse)
    largest = plans.HUGGING_FACE_SHARD if files == 1 else sum(t.nbytes for t in get(path).values()) // 5
    done = checkpoint.quantize(path, tmp_path / "out", PTQ, largest_shard=largest)
    found = get(tmp_path / "out")
    assert "lm_head.weight" not in found and f"{stem}.3.up_proj.weight_scale_2" in found
    assert found["mtp.layers.1.mixer.experts.0.up_proj.weight"].dtype == torch.bfloat16
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (files > 1)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files > 1:
        placed = json.loads(index.read_text())
        assert placed["weight_map"].keys() == found.keys()
        assert placed["metadata"]["total_size"] == sum(t.nbytes for t in found.values()) == done.summary.stored_bytes
    # A server makes the tied head's module before it ties it, and must not make it a quantized one.
    assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    checkpoint.dequantize(tmp_path / "out", tmp_path / "back")
    assert inspection.inspect(tmp_path / "back").problems == {} and inspection.inspect(tmp_path / "back").tied


# --------------------------------------------------------------------------- turning back


def test_view_reads_any_run_of_elements(tmp_path: Path) -> None:
    """Runs that begin and end inside a block, as conversions cut them."""
    for layout in ("modelopt", "compressed-tensors"):
        checkpoint.quantize(source(tmp_path / f"{layout}-hf"), tmp_path / layout, replace(PTQ, layout=layout))
        for dtype in (torch.bfloat16, torch.float32):
            view = QuantizedWeights(tmp_path / layout, dtype)
            for name in (UP, "backbone.layers.3.mixer.up_proj.weight"):
                size = view.entries[name].elements
                whole = bytearray(size * dtype.itemsize)
                view.read(name, 0, memoryview(whole))
                for start, count in ((0, 1), (5, 3), (15, 2), (17, 100), (size - 1, 1), (31, size - 31)):
                    part = bytearray(count * dtype.itemsize)
                    view.read(name, start, memoryview(part))
                    assert part == whole[start * dtype.itemsize : (start + count) * dtype.itemsize]
            view.close()


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(f"{UP}_scale_2"), rf"scales missing \(1\): {UP}_scale_2"),
    "shape": (
        lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"][:, :0].contiguous()}),
        rf"scales of another kind \(1\): {UP}_scale \(torch.float8_e4m3fn \[48, 0\]\)",
    ),
    "dtype": (
        lambda t: t.update({f"{UP}_scale_2": t[f"{UP}_scale_2"].half()}),
        rf"scales of another kind \(1\): {UP}_scale_2 \(torch.float16 \[\]\)",
    ),
    "codes": (lambda t: t.pop(UP), rf"missing \(1\): {UP}"),
    "nan": (lambda t: t[f"{UP}_scale_2"].fill_(float("nan")), rf"NaN in {UP}; "),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_quantized_directory_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = DAMAGED[case]
    checkpoint.quantize(source(tmp_path / "hf"), tmp_path / "out", PTQ)
    change(tmp_path / "out", edit)
    with pytest.raises(ConfigurationError, match=message):
        checkpoint.dequantize(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_only_quantized_directories_are_turned_back(tmp_path: Path) -> None:
    path = source(tmp_path / "hf")
    with pytest.raises(
        ConfigurationError, match=r"config.json: is not quantized; name a directory with one of modelop"
    ):
        checkpoint.dequantize(path, tmp_path / "back")
    tree = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigurationError, match=r"has quant_method 'fp8'; name a directory with one of modelopt, com"):
        checkpoint.dequantize(path, tmp_path / "back")


# --------------------------------------------------------------------------- kills, options, memory

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_mopd.conversion import jobs
from megatron_mopd.quantization import checkpoint
from megatron_mopd.quantization.planning import Options
from megatron_mopd.quantization.recipes import RECIPES
jobs.WORKERS = 1
def report(done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
options = Options(recipe=RECIPES["ultra-ptq"], four_over_six="mae")
checkpoint.quantize(Path(sys.argv[1]), Path(sys.argv[2]), options, largest_shard=8000, report=report)
"""


def test_killed_quantization_goes_on_behind_its_last_file(tmp_path: Path) -> None:
    path, options = source(tmp_path / "hf"), replace(PTQ, four_over_six="mae")
    checkpoint.quantize(path, tmp_path / "straight", options, largest_shard=8000)
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "out.partial"
    assert partial.is_dir() and not (tmp_path / "out").exists()
    for other in (
        PTQ,
        replace(options, layout="compressed-tensors"),
        replace(options, recipe=RECIPES["ultra-ptq-experts"]),
    ):
        with pytest.raises(ConfigurationError, match=r"holds an unfinished conversion of something else or with other"):
            checkpoint.quantize(path, tmp_path / "out", other, largest_shard=8000)
    done = checkpoint.quantize(path, tmp_path / "out", options, largest_shard=8000)
    assert 0 < done.conversion.resumed < done.conversion.size and not partial.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


MEASURED = """
import re, sys
from pathlib import Path
from megatron_mopd.quantization import checkpoint
from megatron_mopd.quantization.planning import Options
from megatron_mopd.quantization.recipes import RECIPES
def peak():  # of this program: getrusage counts what its parent had when it was started
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
root = Path(sys.argv[1])
options = Options(recipe=RECIPES["ultra-ptq-nvfp4"], four_over_six="mse")
checkpoint.quantize(root / "small", root / "small-out", options)  # what imports and drawing take
before = peak()
checkpoint.quantize(root / "hf", root / "out", options)
middle = peak()
checkpoint.dequantize(root / "out", root / "back")
print(middle - before, peak() - before)
"""


def test_memory_stays_below_one_tensor(tmp_path: Path) -> None:
    """64 MiB in one tensor that is passed on and 48 MiB in each of two that are quantized."""
    wide: dict[str, Any] = {"hybrid_override_pattern": "-", "hidden_size": 1024}
    source(tmp_path / "small", **wide, intermediate_size=64)
    source(tmp_path / "hf", **wide, intermediate_size=24_576, vocab_size=32_768, tie_word_embeddings=True)
    change(tmp_path / "hf", lambda tensors: tensors.pop("lm_head.weight"))
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    quantizing, both = map(int, done.stdout.split())
    assert 0 < quantizing <= both < 36 * 2**20, (quantizing, both)
