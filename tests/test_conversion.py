"""Hugging Face <-> Megatron: the same bytes both ways, the peer's own log-probabilities in between."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_nemotron_h import SIZES, VOCAB, layers, saved
from torch import Tensor

from megatron_mopd import conversion, identity, names, presets, torch_dist
from megatron_mopd.config import ConfigurationError, Model, Parallel
from megatron_mopd.conversion import hugging_face_config, inspection, jobs, plans, torch_dist_raw
from megatron_mopd.data_config import Tokenizer

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"


# --------------------------------------------------------------------------- helpers, also called on the ranks


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory, read by safetensors' own library."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found
            found[name] = tensor
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def synthetic(
    path: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    prefix: str = "backbone.",
    fused: bool = False,
    tied: bool = False,
    blocks: int | None = None,
    files: int = 1,
) -> dict[str, Tensor]:
    """A Hugging Face directory of random tensors that no model computed; returns them under their names on disk."""
    path.mkdir(parents=True)
    tree = {"model_type": "nemotron_h", "tie_word_embeddings": tied, **SIZES, **config}
    (path / "config.json").write_text(json.dumps(tree))
    model = hugging_face_config.architecture(tree, "test")
    shapes = hugging_face_config.megatron_shapes(model if blocks is None else model.stored(blocks))
    generator = torch.Generator().manual_seed(len(shapes))
    tensors: dict[str, Tensor] = {}
    for piece in names.hugging_face_pieces(shapes):
        shape = names.layout(piece, shapes, model.preset.num_query_groups, model.preset.vocab_size).shape
        wide = piece.name.endswith("e_score_correction_bias")
        tensors[piece.name] = torch.randn(shape, generator=generator).to(torch.float32 if wide else dtype)
    if tied:
        del tensors["lm_head.weight"]
    if fused:
        for stem in sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n}):
            for projection in ("up_proj", "down_proj"):
                experts = range(model.preset.num_moe_experts)
                stack = [tensors.pop(f"{stem}.experts.{e}.{projection}.weight") for e in experts]
                tensors[f"{stem}.experts.{projection}"] = torch.stack(stack)
    tensors = {prefix + n.removeprefix("backbone.") if n.startswith("backbone.") else n: t for n, t in tensors.items()}
    if files == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return tensors
    shards = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    placed = {name: shards[i % files] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if placed[n] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tensors


def round_trip(source: Path, root: Path, **options: Any) -> Path:
    """hf -> megatron -> hf; the identity must be one and the same throughout."""
    there = conversion.hugging_face_to_megatron(source, root / "megatron", shards=options.pop("shards", 2), **options)
    assert there.checkpoint_id == identity.checkpoint_id(root / "megatron")
    back = conversion.megatron_to_hugging_face(root / "megatron", root / "back", **options)
    assert there.checkpoint_id == back.checkpoint_id == inspection.inspect(root / "back").checkpoint_id
    assert inspection.differences(source, root / "megatron") == inspection.differences(source, root / "back") == []
    return root / "back"


def model_of(directory: Path) -> Model:
    """The student's configuration of a Hugging Face directory."""
    preset = hugging_face_config.architecture(hugging_face_config.read(directory), "test").preset
    names_ = {f.name for f in fields(preset)} - {"pattern", "vocab_size", "mamba_conv", "mamba_chunk"}
    return Model(pattern=preset.pattern, override={name: getattr(preset, name) for name in names_})


def logprobs_of(
    checkpoint: Path, directory: Path, parallel: Parallel, tokens: Tensor, precision: Any = "fp32"
) -> tuple[Tensor, dict[str, Any]]:
    """Log-probabilities [b, s-1] of the next tokens by our student on this layout, and the manifest."""
    import torch.distributed as dist

    from megatron_mopd import checkpoint as checkpoints
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd import student

    groups = mopd_parallel.initialize(parallel, seed=3)
    model = student.build_model(model_of(directory), parallel, groups, VOCAB, precision, mtp=False).eval()
    manifest = checkpoints.load_weights(checkpoint, model, groups)
    with torch.no_grad():
        out = student.forward(model, tokens)
        hidden = student.gather_hidden(out.hidden, groups, model.config)  # [s * b, H]
        local = (hidden @ out.output_weight.T).float()
        parts = [torch.empty_like(local) for _ in range(groups.tp_size)]
        dist.all_gather(parts, local, group=groups.tp)
        logits = torch.cat(parts, -1)[:, :VOCAB].view(tokens.shape[1], tokens.shape[0], VOCAB).transpose(0, 1)
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1), manifest


def theirs(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


# --------------------------------------------------------------------------- parity with the peer's own model

CASES = {
    "latent": ("M*E-", {}),
    "full-width-experts": ("MEM*E", {"moe_latent_size": None, "n_routed_experts": 8, "num_experts_per_tok": 3}),
    "heads-and-groups": ("*M*-E", {"num_attention_heads": 8, "num_key_value_heads": 4, "n_groups": 4}),
    "dense-and-tied": ("M-*-", {"tie_word_embeddings": True}),
}
LAYOUTS = [(2, Parallel(tensor=2)), (2, Parallel(expert=2)), (4, Parallel(tensor=2, expert=2))]
MORE_LAYOUTS = {"M*E-": LAYOUTS, "*M*-E": [(4, Parallel(tensor=4)), (4, Parallel(expert=4))]}


@pytest.mark.parametrize(("pattern", "changes"), CASES.values(), ids=CASES.keys())
def test_converted_model_computes_what_transformers_computes(
    ranks: Any, groups: Any, tmp_path: Path, pattern: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoConfig, NemotronHForCausalLM

    source = tmp_path / "source"
    expected = theirs(saved(source, pattern, **changes), tokens := sample())
    back = round_trip(source, tmp_path)
    assert_same(tensors_of(back), tensors_of(source))
    assert AutoConfig.from_pretrained(back).to_diff_dict() == AutoConfig.from_pretrained(source).to_diff_dict()
    ours, manifest = logprobs_of(tmp_path / "megatron", source, Parallel(), tokens)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert manifest["vocab_size"] == VOCAB
    loaded, report = NemotronHForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(theirs(loaded.eval(), tokens), expected)
    for world, parallel in MORE_LAYOUTS.get(pattern, LAYOUTS[:1]):
        for found, _ in ranks(world, logprobs_of, tmp_path / "megatron", source, parallel, tokens):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def sample() -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def test_bf16_keeps_its_dtypes_and_is_no_worse_than_transformers_in_bf16(groups: Any, tmp_path: Path) -> None:
    from transformers import NemotronHForCausalLM

    source, tokens = tmp_path / "source", sample()
    saved(source, "M*E-", torch.bfloat16)
    tensors = tensors_of(source)
    bias = "backbone.layers.2.mixer.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].float()  # as in the published checkpoints
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_same(tensors_of(round_trip(source, tmp_path)), tensors)
    stored = torch_dist.open_index(tmp_path / "megatron" / "release").tensors
    assert stored["decoder.layers.0.mixer.A_log"].dtype == torch.bfloat16
    assert stored["decoder.layers.2.mlp.router.expert_bias"].dtype == torch.float32
    low: Any = NemotronHForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    exact = theirs(NemotronHForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), tokens)
    ours, _ = logprobs_of(tmp_path / "megatron", source, Parallel(), tokens, "bf16")
    error = (theirs(low.eval(), tokens) - exact).abs()
    assert (ours - exact).abs().mean() <= 1.1 * error.mean() and error.mean() > 1e-3


# --------------------------------------------------------------------------- what round trips keep


@pytest.mark.parametrize("name", presets.PRESETS)
def test_shapes_of_the_published_models_add_up_to_their_parameters(name: str) -> None:
    preset = presets.PRESETS[name]
    model = hugging_face_config.Architecture(preset=preset, blocks=int("/" in preset.pattern), tied=False)
    count = presets.parameter_count(preset)
    shapes = hugging_face_config.megatron_shapes(model)
    assert sum(math.prod(shape) for shape in shapes.values()) == count.main + count.mtp
    layouts = {p.name: names.layout(p, shapes, preset.num_query_groups) for p in names.hugging_face_pieces(shapes)}
    assert sum(math.prod(layout.shape) for layout in layouts.values()) == count.main + count.mtp
    assert names.invert(layouts).keys() == shapes.keys()


STRING = {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4}
LIST = {"layers_block_type": ["mamba", "attention", "moe", "mlp"]}  # the first generation's names
MTP = {"num_nextn_predict_layers": 2, "mtp_layers_block_type": ["attention", "moe"]}
SPELLINGS = {
    "string-pattern": (STRING, {}),
    "list": (LIST, {"dtype": torch.bfloat16}),
    "one-mtp-block": (LIST | MTP | {"num_nextn_predict_layers": 1}, {}),
    "depths-share-a-block": (STRING | MTP, {"blocks": 1}),
    "depths-with-own-blocks": (STRING | {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}, {}),
    "model-prefix": (STRING, {"prefix": "model."}),
    "stacked-experts": (STRING | MTP, {"fused": True, "blocks": 1, "dtype": torch.bfloat16}),
    "tied": (STRING, {"tied": True}),
    "sharded": (LIST | MTP, {"files": 5}),
    "no-latent": (STRING | {"moe_latent_size": None}, {}),
}


@pytest.mark.parametrize(("config", "options"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_comes_back_as_it_was(tmp_path: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    tree = {**config, "an_unknown_key": [1, {"deep": None}], "rope_theta": 10000.5}
    tensors = synthetic(tmp_path / "source", tree, **options)
    back = round_trip(tmp_path / "source", tmp_path)
    assert_same(tensors_of(back), tensors)
    assert json.loads((back / "config.json").read_text()) == json.loads((tmp_path / "source/config.json").read_text())


@pytest.mark.parametrize("name", ["nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b"])
@pytest.mark.parametrize("spelling", ["string", "list"])
def test_published_configurations_give_the_presets(name: str, spelling: str) -> None:
    preset = presets.PRESETS[name]
    main, *depths = preset.pattern.split("/")
    first = {"M": "mamba", "*": "attention", "E": "moe"}
    tree = {
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": preset.hidden_size, "expand": 2,
        "num_attention_heads": preset.num_attention_heads, "num_key_value_heads": 2, "head_dim": 128,
        "mamba_num_heads": preset.mamba_num_heads, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
        "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": preset.num_moe_experts, "n_shared_experts": 1,
        "num_experts_per_tok": preset.moe_router_topk, "moe_intermediate_size": preset.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": preset.moe_shared_expert_intermediate_size,
        "moe_latent_size": preset.moe_latent_size, "intermediate_size": preset.ffn_hidden_size,
        "routed_scaling_factor": preset.moe_router_topk_scaling_factor, "initializer_range": preset.init_method_std,
        "num_nextn_predict_layers": len(depths), "num_hidden_layers": len(main),
    }  # fmt: skip
    if spelling == "string":
        tree |= {"hybrid_override_pattern": main, "mtp_hybrid_override_pattern": "*E"}
    else:
        tree |= {"layers_block_type": [first[s] for s in main], "mtp_layers_block_type": ["attention", "moe"]}
    found = hugging_face_config.architecture(tree, name)
    assert found.preset == preset and found.blocks == len(depths) and not found.tied


def test_companion_files_go_along(tmp_path: Path) -> None:
    from megatron_mopd.tokenizer import build_tokenizer

    source = tmp_path / "source"
    synthetic(source, STRING)
    tokenizer = build_tokenizer(Tokenizer())
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    (source / "figures").mkdir()
    (source / "figures/accuracy.svg").write_text("<svg/>")
    (source / "modeling_nemotron_h.py").write_text("raise SystemExit\n")  # carried, never run
    (source / ".cache").mkdir()
    (source / ".cache/lock").write_text("")
    back = round_trip(source, tmp_path)
    kept = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file() and ".cache" not in p.parts}
    found = {p.relative_to(back): p.read_bytes() for p in back.rglob("*") if p.is_file()}
    assert found.keys() == kept.keys() and len(kept) > 5
    weights = {Path("model.safetensors"), Path("config.json")}
    assert {n: b for n, b in found.items() if n not in weights} == {n: b for n, b in kept.items() if n not in weights}
    manifest = json.loads((tmp_path / "megatron/release/mopd_manifest.json").read_text())
    assert manifest["tokenizer_sha"] == tokenizer.tokenizer_sha and manifest["template_sha"] == tokenizer.template_sha


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    groups, mamba_groups, depths = draw(1, 2, 4), draw(1, 2, 3), draw(0, 1, 3)
    pattern = data.draw(st.text("M*E-", min_size=1, max_size=5))
    config = {
        "vocab_size": draw(7, 32), "hidden_size": draw(8, 24), "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(1, 2, 5), "head_dim": draw(2, 6), "intermediate_size": draw(5, 16),
        "ssm_state_size": draw(3, 8), "n_groups": mamba_groups, "mamba_num_heads": mamba_groups * draw(1, 2),
        "mamba_head_dim": draw(2, 5), "conv_kernel": draw(2, 4), "n_routed_experts": draw(1, 3),
        "moe_intermediate_size": draw(3, 8), "moe_latent_size": draw(None, 5), "num_nextn_predict_layers": depths,
        "moe_shared_expert_intermediate_size": draw(4, 7), "mtp_hybrid_override_pattern": draw("*E", "E", "M-"),
        **draw({"hybrid_override_pattern": pattern}, {"layers_block_type": layers(pattern)}),
    }  # fmt: skip
    root = tmp_path_factory.mktemp("drawn")
    options = {
        "dtype": draw(torch.float32, torch.bfloat16, torch.float16), "prefix": draw("backbone.", "model."),
        "fused": draw(True, False), "tied": draw(True, False), "files": draw(1, 3),
        "blocks": draw(1, depths) if depths else None,
    }  # fmt: skip
    tensors = synthetic(root / "source", config, **options)
    back = round_trip(root / "source", root, shards=draw(1, 2, 7))
    assert_same(tensors_of(back), tensors)
    for name, stored in torch_dist.open_index(root / "megatron/release").tensors.items():
        assert torch_dist.read(torch_dist.open_index(root / "megatron/release"), name).shape == stored.shape


def test_output_shards_stay_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist_raw.Files, "KEPT", 1)  # more files than may stay open
    monkeypatch.setattr(plans, "LARGEST_CHUNK", 3000)
    tensors = synthetic(tmp_path / "source", STRING | MTP, blocks=1)
    done = conversion.hugging_face_to_megatron(tmp_path / "source", tmp_path / "megatron", shards=3)
    stored = torch_dist.open_index(tmp_path / "megatron/release").tensors
    assert len(stored["decoder.layers.1.self_attention.linear_qkv.weight"].chunks) > 5  # cut between groups' rows
    assert done.checkpoint_id == identity.checkpoint_id(tmp_path / "megatron")
    conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back", largest_shard=60_000)
    assert_same(tensors_of(tmp_path / "back"), tensors)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {f.name for f in files} and index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(files) > 3 and all(f.stat().st_size < 65_000 for f in files)
    assert len(list((tmp_path / "megatron/release").glob("*.distcp"))) == 4  # and one for the common state


def test_as_many_files_are_written_as_keep_several_workers_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(t.nbytes for t in synthetic(tmp_path / "source", STRING).values())
    assert plans.MEGATRON_SHARD == 4 * 10**9 and plans.SMALL_SHARD * plans.SMALL_SHARDS < plans.MEGATRON_SHARD
    # Of a checkpoint's size, the larger and the smaller file, the files.
    for large, small, files in [(2, 2, 1), (2, 1, 1), (1.5, 0.4, 3), (1.5, 0.02, 8), (0.1, 0.02, 10)]:
        monkeypatch.setattr(plans, "MEGATRON_SHARD", int(large * size) + 1)
        monkeypatch.setattr(plans, "SMALL_SHARD", int(small * size) + 1)
        target = tmp_path / f"{large}-{small}"
        conversion.hugging_face_to_megatron(tmp_path / "source", target)
        assert len(list((target / "release").glob("*.distcp"))) == files + 1  # and one for the common state


# --------------------------------------------------------------------------- Megatron's own reader and writer


def read_by_mcore(path: Path, directory: Path, parallel: Parallel, tokens: Tensor) -> bool:
    """Load through mcore's dist_checkpointing; whether the model equals the one that our reader fills."""
    from megatron.core import dist_checkpointing

    from megatron_mopd import checkpoint, student
    from megatron_mopd import parallel as mopd_parallel

    groups = mopd_parallel.initialize(parallel, seed=3)
    ours, other = (student.build_model(model_of(directory), parallel, groups, VOCAB) for _ in range(2))
    checkpoint.load_weights(path, ours, groups)
    for parameter in other.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    state = dist_checkpointing.load({"model": other.sharded_state_dict()}, str(path))
    assert state["iteration"] == 0
    other.load_state_dict(state["model"], strict=False)
    weights = {n: t for n, t in ours.state_dict().items() if isinstance(t, Tensor)}
    real = min(-(-VOCAB // parallel.tensor), VOCAB - groups.tp_rank * -(-VOCAB // parallel.tensor))  # no padding rows
    cut = {n: real if "word_embeddings" in n or "output_layer" in n else None for n in weights}
    return all(torch.equal(t[: cut[n]], other.state_dict()[n][: cut[n]]) for n, t in weights.items())


@pytest.mark.parametrize("common", [True, False], ids=["common.pt", "common-state-object"])
def test_mcores_own_reader_loads_what_is_written(ranks: Any, tmp_path: Path, common: bool) -> None:
    synthetic(tmp_path / "source", STRING | MTP, blocks=1)
    conversion.hugging_face_to_megatron(tmp_path / "source", tmp_path / "megatron", shards=2)
    release = tmp_path / "megatron/release"
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release"
    assert torch.load(release / "common.pt", weights_only=True) == {"iteration": 0, "checkpoint_version": 3.0}
    if not common:
        (release / "common.pt").unlink()
    for world, parallel in [(1, Parallel()), (2, Parallel(tensor=2)), (2, Parallel(expert=2))]:
        assert all(ranks(world, read_by_mcore, release, tmp_path / "source", parallel, sample()))


def write_by_mcore(source: Path, directory: Path, target: Path, parallel: Parallel) -> None:
    """Load on this layout and save weights and optimizer state as Megatron does, with no file of ours beside them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_mopd import checkpoint, student
    from megatron_mopd import parallel as mopd_parallel

    groups = mopd_parallel.initialize(parallel, seed=3)
    plain = student.build_model(model_of(directory), parallel, groups, VOCAB)
    manifest = checkpoint.load_weights(source, plain, groups)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(plain.config, ddp, plain, pg_collection=groups.pg)
    options = OptimizerConfig(lr=1e-3, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(options, [model], use_gloo_process_groups=False, pg_collection=groups.pg)
    path = checkpoint.save(target, 7, model, optimizer, groups, state={}, manifest=manifest)
    for file in path.glob("mopd_*") if groups.rank == 0 else ():
        file.unlink()


@pytest.mark.parametrize(("world", "parallel"), [(1, Parallel()), LAYOUTS[-1]], ids=["one-rank", "tp2-ep2"])
def test_directories_that_megatron_writes_are_read(ranks: Any, tmp_path: Path, world: int, parallel: Parallel) -> None:
    source, root = tmp_path / "source", tmp_path / "run"
    tensors = synthetic(source, STRING | MTP, blocks=1)
    conversion.hugging_face_to_megatron(source, tmp_path / "megatron")
    ranks(world, write_by_mcore, tmp_path / "megatron", source, root, parallel)
    rows = torch_dist.open_index(root / "iter_0000007").tensors["embedding.word_embeddings.weight"].shape[0]
    assert rows == VOCAB + (parallel.tensor == 2)  # padded
    with pytest.raises(ConfigurationError, match="--like"):
        conversion.megatron_to_hugging_face(root, tmp_path / "back")
    done = conversion.megatron_to_hugging_face(root, tmp_path / "back", like=source)
    assert_same(tensors_of(tmp_path / "back"), tensors)
    assert done.skipped["optimizer tensors"] > 100 and done.skipped["objects"] >= 1
    assert inspection.differences(root, source) == inspection.differences(tmp_path / "megatron", root) == []
    found = inspection.inspect(root)
    assert found.checkpoint_id is None and found.pattern == "M*E-/*E" and not found.problems


@pytest.mark.parametrize("block", [40, 2**24], ids=["smaller-than-a-row", "whole-tensors"])
def test_other_spellings_of_megatron_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """One tensor per expert, norms that are not fused, one chunk cut in columns and one that is stored transposed."""
    from megatron_mopd.conversion import torch_dist_writer
    from megatron_mopd.torch_dist import Chunk, Stored

    tensors = synthetic(tmp_path / "source", STRING)
    conversion.hugging_face_to_megatron(tmp_path / "source", tmp_path / "megatron")
    index = torch_dist.open_index(tmp_path / "megatron/release")
    other = {name: torch_dist.read(index, name) for name in index.tensors}
    other["decoder.layers.0.norm.weight"] = other.pop("decoder.layers.0.mixer.in_proj.layer_norm_weight")
    other["decoder.layers.1.input_layernorm.weight"] = other.pop(
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    )
    other["decoder.final_layernorm.weight"] = other.pop("decoder.final_norm.weight")
    for fc, spelling in ((1, "experts.{}.linear_fc1.weight"), (2, "linear_fc2.weight{}")):
        for expert, weight in enumerate(other.pop(f"decoder.layers.2.mlp.experts.experts.linear_fc{fc}.weight")):
            other["decoder.layers.2.mlp.experts." + spelling.format(expert)] = weight
    path, stored = tmp_path / "other/iter_0000003", {}
    path.mkdir(parents=True)
    with open(path / "__0_0.distcp", "wb") as file:
        for name, tensor in other.items():
            cut = tensor.shape[-1] // 3 if name.endswith("linear_proj.weight") else 0
            parts = tensor.split([cut, tensor.shape[-1] - cut], -1) if cut else [tensor]
            chunks, column = [], 0
            for part in parts:
                start = file.tell()
                if name == "decoder.layers.3.mlp.linear_fc1.weight":
                    torch.save(part.T.contiguous().T, file)
                else:
                    with torch_dist_writer.chunk(file, part.shape, part.dtype) as write:
                        write(memoryview(part.contiguous().numpy()).cast("B"))
                offset = (*[0] * (part.dim() - 1), column)
                chunks.append(Chunk(offset, tuple(part.shape), "__0_0.distcp", start, file.tell() - start))
                column += part.shape[-1]
            stored[name] = Stored(tuple(tensor.shape), tensor.dtype, tuple(chunks))
    torch_dist_writer.write_rest(path, stored, {"iteration": 3}, "__1_0.distcp")
    monkeypatch.setattr(jobs, "BLOCK", block)
    conversion.megatron_to_hugging_face(tmp_path / "other", tmp_path / "back", like=tmp_path / "source")
    assert_same(tensors_of(tmp_path / "back"), tensors)


def test_tied_head_costs_nothing_and_may_be_trained_apart(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint, student

    source = tmp_path / "source"
    tensors = synthetic(source, STRING, tied=True)
    conversion.hugging_face_to_megatron(source, tmp_path / "megatron")
    stored = torch_dist.open_index(tmp_path / "megatron/release").tensors
    assert stored["output_layer.weight"] == stored["embedding.word_embeddings.weight"]
    shutil.copytree(tmp_path / "megatron", tmp_path / "by-megatron")  # which stores no tied head
    metadata = pickle.loads((tmp_path / "by-megatron/release/.metadata").read_bytes())
    del metadata.state_dict_metadata["output_layer.weight"]
    (tmp_path / "by-megatron/release/.metadata").write_bytes(pickle.dumps(metadata))
    assert identity.checkpoint_id(tmp_path / "by-megatron") == identity.checkpoint_id(tmp_path / "megatron")
    conversion.megatron_to_hugging_face(tmp_path / "by-megatron", tmp_path / "back-0")
    assert_same(tensors_of(tmp_path / "back-0"), tensors)
    model = student.build_model(model_of(source), Parallel(), groups, VOCAB, mtp=False)
    manifest = checkpoint.load_weights(tmp_path / "megatron", model, groups)
    assert torch.equal(model.output_layer.weight, model.embedding.word_embeddings.weight)
    for step, changed in ((1, 0.0), (2, 1.0)):
        with torch.no_grad():
            model.output_layer.weight.add_(changed)
        checkpoint.save(tmp_path / "run", step, model, None, groups, state={}, manifest=manifest)
        back = tmp_path / f"back-{step}"
        conversion.megatron_to_hugging_face(tmp_path / "run", back)
        assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] == (not changed)
        expected = tensors | ({"lm_head.weight": tensors["backbone.embeddings.weight"] + 1} if changed else {})
        assert_same(tensors_of(back), expected)


PROGRAM = """
import runpy, sys
tool, *rest = sys.argv[1:]
for command in " ".join(rest).split(" ; "):
    sys.argv = [tool, *command.split()]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
print("imported", [name for name in ("megatron.core", "transformers") if name in sys.modules])
"""


def test_command_line_converts_inspects_and_compares_without_megatron_or_transformers(tmp_path: Path) -> None:
    tensors = synthetic(tmp_path / "a", STRING | MTP, blocks=1)
    other = tensors["backbone.layers.3.mixer.up_proj.weight"]
    synthetic(tmp_path / "b", STRING | MTP, blocks=1)
    other[0, 0] += 1
    save_file(tensors, tmp_path / "b/model.safetensors")
    line = (
        "hf-to-megatron a m --shards 2 ; inspect m ; verify a m ; verify m b ; megatron-to-hf m c ; hf-to-megatron a m"
    )
    command = [sys.executable, "-c", PROGRAM, str(TOOL), *line.split(" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.findall(r"status (.*)", out)[:5] == ["0", "0", "0", "1", "0"] and "imported []" in out
    assert "backbone.layers.3.mixer.up_proj.weight: other values" in out and "differences: 1\n" in out
    assert "status error: m: exists already" in out
    assert re.search(r"pattern +M\*E-/\*E\n", out) and re.search(r" embedding +6,464\n", out)
    counts = dict(re.findall(r"^  (Mamba|attention|mixture of experts|dense MLP|MTP|all) +([\d,]+)$", out, flags=re.M))
    elements = sum(t.numel() for t in tensors.values())
    assert int(counts["all"].replace(",", "")) == elements and len(counts) == 6
    assert out.count(identity.checkpoint_id(tmp_path / "m")) == 3


def test_command_line_prints_names_as_they_are_and_errors_alone(tmp_path: Path) -> None:
    synthetic(tmp_path / "a", STRING)
    (tmp_path / "a.bin").write_text("")
    line = "hf-to-megatron a [v2]/:star:[/m] ; verify a [v2]/:star:[/m] ; inspect --quick [v2]/:star:[/m]"
    line += " ; hf-to-megatron a a.bin/m ; hf-to-megatron a b --shards many"
    command = [sys.executable, "-c", PROGRAM, str(TOOL), *line.split(" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[v2]/:star:[/m]: " in done.stdout and "a and [v2]/:star:[/m] hold the same weights" in done.stdout
    assert "directory           [v2]/:star:[/m]/release (Megatron" in done.stdout
    assert "status error: [Errno 20] Not a directory: 'a.bin/m.partial'; see to that" in done.stdout
    assert "argument --shards: 'many': must be a whole number of at least 1" in done.stderr
    assert done.stderr.count("━") and "0/? bytes" not in done.stderr and "inspect ━" not in done.stderr
