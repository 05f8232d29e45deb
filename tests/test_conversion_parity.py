"""Converted weights at work: transformers' log-probabilities and greedy tokens, of any configuration and layout."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_nemotron_h import VOCAB, saved
from torch import Tensor

from megatron_mopd import conversion
from megatron_mopd.config import Model, Parallel
from megatron_mopd.conversion import hugging_face_config

# More heads than the others have, so that they can be cut in four.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "n_groups": 4}


# --------------------------------------------------------------------------- helpers, also called on the ranks


def student_of(checkpoint: Path, directory: Path, parallel: Parallel, precision: Any = "fp32") -> tuple[Any, Any, Any]:
    """Our model with the weights of a Megatron directory, its groups and the checkpoint's manifest."""
    from megatron_mopd import checkpoint as checkpoints
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd import student

    groups = mopd_parallel.initialize(parallel, seed=3)
    preset = hugging_face_config.architecture(hugging_face_config.read(directory), "test").preset
    kept = {f.name for f in fields(preset)} - {"pattern", "vocab_size", "mamba_conv", "mamba_chunk"}
    config = Model(pattern=preset.pattern, override={name: getattr(preset, name) for name in kept})
    model = student.build_model(config, parallel, groups, preset.vocab_size, precision, mtp=False).eval()
    return model, groups, checkpoints.load_weights(checkpoint, model, groups)


def logprobs_of(
    checkpoint: Path, directory: Path, parallel: Parallel, tokens: Tensor, precision: Any = "fp32"
) -> Tensor:
    """Log-probabilities ``[b, s-1]`` of the next tokens by our student on this layout."""
    import torch.distributed as dist

    from megatron_mopd import student

    model, groups, manifest = student_of(checkpoint, directory, parallel, precision)
    rows, length = tokens.shape
    with torch.no_grad():
        out = student.forward(model, tokens)
        local = (student.gather_hidden(out.hidden, groups, model.config) @ out.output_weight.T).float()
        parts = [torch.empty_like(local) for _ in range(groups.tp_size)]
        dist.all_gather(parts, local, group=groups.tp)
    logits = torch.cat(parts, -1)[:, : manifest["vocab_size"]].view(length, rows, -1).transpose(0, 1)
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def theirs(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def sample(rows: int = 2, length: int = 24, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- greedy generation


def greedy_of(
    checkpoint: Path, directory: Path, parallel: Parallel, prompts: list[list[int]], new: int, stop: tuple[int, ...]
) -> list[list[int]]:
    """Completions of the prompts by our sampler at temperature 0, of as many rows at once as there are prompts."""
    from megatron_mopd.records import Prompt, Sampling
    from megatron_mopd.rollout import Sampler

    model, groups, manifest = student_of(checkpoint, directory, parallel)
    sampler = Sampler(model, groups, 64, manifest["vocab_size"])
    given = [(Prompt(id=f"{i}", domain="d", messages=(), tokens=tuple(p)), 0) for i, p in enumerate(prompts)]
    sampling = Sampling(temperature=0.0, max_new_tokens=new, stop_tokens=stop)
    return [r.completion.tolist() for r in sampler.generate(given, sampling, 0, 0, len(prompts))]


GENERATING = {
    "latent": ("M*E-", {}, [(2, Parallel(tensor=2)), (2, Parallel(expert=2))]),
    "experts-of-full-width": ("MEM*E", {"moe_latent_size": None, "num_experts_per_tok": 3}, [(2, Parallel(expert=2))]),
    "attention-and-tied-head": ("*-*-", {"tie_word_embeddings": True, "num_key_value_heads": 2}, []),
    "one-mamba-group": ("MM*M", {"n_groups": 1}, []),
}


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens_are_those_of_transformers(ranks: Any, groups: Any, tmp_path: Path, name: str) -> None:
    pattern, changes, layouts = GENERATING[name]
    model = saved(tmp_path / "source", pattern, **HEADS | changes)
    conversion.hugging_face_to_megatron(tmp_path / "source", tmp_path / "megatron")
    prompts = [sample(1, length)[0].tolist() for length in (3, 11, 17, 20)]  # ragged, across the scan's chunks
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    expected = [
        model.generate(torch.tensor([p]), eos_token_id=None, **options)[0, len(p) :].tolist()  # cached, one by one
        for p in prompts
    ]
    assert len({token for row in expected for token in row}) > 8 and len({tuple(row) for row in expected}) == 4
    for world, parallel in [(1, Parallel()), *layouts]:
        given = (tmp_path / "megatron", tmp_path / "source", parallel, prompts, 24)
        for found in ranks(world, greedy_of, *given, ()):
            assert found == expected
    stop = expected[1][7]
    ended = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert greedy_of(tmp_path / "megatron", tmp_path / "source", Parallel(), prompts, 24, (stop,)) == ended


# --------------------------------------------------------------------------- changes of layout


def save_again(source: Path, directory: Path, target: Path, parallel: Parallel) -> None:
    """Load on this layout and write what the trainer writes."""
    from megatron_mopd import checkpoint

    model, groups, manifest = student_of(source, directory, parallel)
    checkpoint.save(target, 3, model, None, groups, state={}, manifest=manifest)


def test_saved_at_one_layout_it_computes_the_same_at_every_other(ranks: Any, tmp_path: Path) -> None:
    source, tokens = tmp_path / "source", sample()
    expected = theirs(saved(source, "M*E-E", **HEADS, n_routed_experts=8), tokens)
    conversion.hugging_face_to_megatron(source, tmp_path / "converted")
    ranks(4, save_again, tmp_path / "converted", source, tmp_path / "run", Parallel(tensor=2, expert=2))
    scored = {}
    for name, world, parallel in (
        ("tp1", 1, Parallel()),
        ("tp2", 2, Parallel(tensor=2)),
        ("tp4", 4, Parallel(tensor=4)),
        ("ep4", 4, Parallel(expert=4)),
        ("tp2-ep2", 4, Parallel(tensor=2, expert=2)),
    ):
        for found in ranks(world, logprobs_of, tmp_path / "run", source, parallel, tokens):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            scored[name] = found
    back = conversion.megatron_to_hugging_face(tmp_path / "run", tmp_path / "back", like=source)
    assert back.path == tmp_path / "back"
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


# --------------------------------------------------------------------------- any configuration


def spell(path: Path, pattern: str, *, string: bool, prefix: str, fused: bool, files: int) -> None:
    """Store what transformers saved as another program would."""
    tree = json.loads((path / "config.json").read_text())
    if string:
        del tree["layers_block_type"]
        tree |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    (path / "config.json").write_text(json.dumps(tree | {"a_key_of_its_own": [1, None]}))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    stems = sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}) if fused else []
    for stem in stems:
        for projection in ("up_proj", "down_proj"):
            experts = [tensors.pop(f"{stem}.experts.{e}.{projection}.weight") for e in range(tree["n_routed_experts"])]
            tensors[f"{stem}.experts.{projection}"] = torch.stack(experts)
    tensors = {prefix + n.removeprefix("backbone.") if n.startswith("backbone.") else n: t for n, t in tensors.items()}
    shards = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    placed = {name: shards[i % files] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if placed[n] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def drawn(draw: Any) -> dict[str, Any]:
    """Dimensions that transformers and Megatron-Core both build; with one expert a token only the first normalises."""
    groups, mamba_groups, experts = draw(1, 2, 4), draw(1, 2, 3), draw(2, 3, 6)
    return {
        "vocab_size": draw(7, 50), "hidden_size": draw(16, 48), "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(1, 2, 3), "head_dim": draw(8, 12), "intermediate_size": draw(20, 64),
        "ssm_state_size": draw(4, 16), "n_groups": mamba_groups, "mamba_num_heads": mamba_groups * draw(1, 2),
        "mamba_head_dim": draw(4, 8), "conv_kernel": 4, "chunk_size": draw(8, 32), "n_routed_experts": experts,
        "num_experts_per_tok": min(experts, draw(2, 3)), "moe_intermediate_size": draw(8, 24),
        "moe_latent_size": draw(None, 16), "moe_shared_expert_intermediate_size": draw(8, 20),
        "routed_scaling_factor": draw(1.0, 2.5), "tie_word_embeddings": draw(False, True),
    }  # fmt: skip


def check_any(root: Path, data: st.DataObject) -> tuple[float, float] | None:
    """Draw a configuration, convert it there and back, and score the same tokens with both models.

    fp32: each log-probability is within 1e-5 of transformers'. bf16: the median over tokens of the distance to
    transformers' fp32 forward over the same weights is at most 1.5 times that of transformers' own bf16 forward (such
    medians of 188 tokens scatter by a tenth); returned are the means of both distances, to be summed over many draws.
    """
    from transformers import AutoConfig

    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    pattern, sizes = data.draw(st.text("M*E-", min_size=1, max_size=5)), drawn(draw)
    dtype = draw(torch.float32, torch.bfloat16)
    source, tokens = root / "source", sample(4, 48, sizes["vocab_size"])
    model = saved(source, pattern, dtype, **HEADS | sizes)
    spell(
        source, pattern,
        string=draw(True, False), prefix=draw("backbone.", "model."), fused=draw(True, False), files=draw(1, 3),
    )  # fmt: skip
    conversion.hugging_face_to_megatron(source, root / "megatron", shards=draw(1, 2, 5))
    conversion.megatron_to_hugging_face(root / "megatron", root / "back", largest_shard=draw(2_000, 10**9))
    assert_same(tensors_of(root / "back"), tensors_of(source))
    assert json.loads((root / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert AutoConfig.from_pretrained(root / "back").to_diff_dict() == AutoConfig.from_pretrained(source).to_diff_dict()
    expected, low = theirs(model, tokens), dtype == torch.bfloat16
    found = logprobs_of(root / "megatron", source, Parallel(), tokens, "bf16" if low else "fp32")
    if not low:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return None
    exact = theirs(model.float(), tokens)
    mine, limit = (found - exact).abs(), (expected - exact).abs()
    assert mine.median() <= 1.5 * limit.median() + 1e-5
    return float(mine.mean()), float(limit.mean())


def draw_many(count: int, folders: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """:func:`check_any` of so many configurations; the distances of those in bf16."""
    distances = []

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        distances.append(check_any(folders.mktemp("drawn"), data))

    one()
    return [pair for pair in distances if pair is not None]


def test_any_configuration_keeps_its_bytes_and_its_log_probabilities(
    groups: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw_many(25, tmp_path_factory)


@pytest.mark.slow
def test_over_many_configurations_bf16_is_no_worse_than_transformers_in_bf16(
    groups: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over 195 random draws in bf16 the ratio of the summed distances was 0.997."""
    distances = draw_many(300, tmp_path_factory)
    mine, limit = (sum(column) for column in zip(*distances, strict=True))
    assert len(distances) > 50 and mine <= 1.05 * limit
