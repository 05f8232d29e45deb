"""Checkpoint identity and the Hugging Face names under it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mopd import identity, names, torch_dist
from megatron_mopd.config import ConfigurationError, Model, Parallel

VOCAB = 101
MODEL = Model(pattern="ME*-/*E/*E")


def _student(groups: Any, precision: str = "fp32", vocab: int = VOCAB) -> Any:
    from megatron_mopd import student

    model = student.build_model(MODEL, Parallel(), groups, vocab, precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases, A_log and D start equal; here each element must find its place
                parameter.add_(0.1 * torch.rand_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.rand_like(buffer))
    return model


def _save(root: Path, model: Any, groups: Any) -> str:
    from megatron_mopd import checkpoint

    checkpoint.save(root, 1, model, None, groups, state={}, manifest={"vocab_size": VOCAB})
    return checkpoint.read_manifest(root)["checkpoint_id"]


def _hugging_face(path: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    index = torch_dist.open_index(path / "iter_0000001")
    shapes = {n: s.shape for n, s in index.tensors.items()}
    pieces = names.hugging_face_pieces(shapes)
    return {p.name: names.assemble(p, [torch_dist.read(index, s) for s in p.sources], 2, VOCAB).clone() for p in pieces}


def test_names_and_layouts_are_those_that_transformers_loads(groups: Any, tmp_path: Path) -> None:
    """transformers, given our tensors under these names, finds each where it looks and computes the same logits."""
    from safetensors.torch import save_file
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from megatron_mopd import presets, student

    model = _student(groups)
    _save(tmp_path / "run", model, groups)
    weights = {n: t for n, t in _hugging_face(tmp_path / "run").items() if not n.startswith("mtp.")}
    p = presets.resolve(MODEL)
    config = NemotronHConfig(
        vocab_size=VOCAB, hidden_size=p.hidden_size, layers_block_type=["mamba", "moe", "attention", "mlp"],
        num_attention_heads=p.num_attention_heads, num_key_value_heads=p.num_query_groups, head_dim=p.kv_channels,
        intermediate_size=p.ffn_hidden_size, ssm_state_size=p.mamba_state_dim, mamba_num_heads=p.mamba_num_heads,
        mamba_head_dim=p.mamba_head_dim, n_groups=p.mamba_num_groups, conv_kernel=p.mamba_conv,
        chunk_size=p.mamba_chunk, n_routed_experts=p.num_moe_experts, num_experts_per_tok=p.moe_router_topk,
        moe_intermediate_size=p.moe_ffn_hidden_size, moe_latent_size=p.moe_latent_size,
        moe_shared_expert_intermediate_size=p.moe_shared_expert_intermediate_size,
        routed_scaling_factor=p.moe_router_topk_scaling_factor, time_step_min=0.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    theirs, report = NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = student.forward(model, tokens)
        ours = (out.hidden @ out.output_weight.T).transpose(0, 1)
        torch.testing.assert_close(ours, theirs(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_every_element_has_one_place_and_mtp_is_numbered_through(groups: Any, tmp_path: Path) -> None:
    model = _student(groups)
    _save(tmp_path, model, groups)
    found = _hugging_face(tmp_path)
    elements = sum(t.numel() for t in found.values())
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("expert_bias"))
    assert elements == sum(p.numel() for p in model.parameters()) + buffers
    mtp = {n for n in found if n.startswith("mtp.")}
    assert {f"mtp.layers.0.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "norm", "mixer.q_proj")} <= mtp
    assert {"mtp.layers.1.final_layernorm.weight", "mtp.layers.1.mixer.experts.7.up_proj.weight"} <= mtp
    assert not [n for n in mtp if n.startswith("mtp.layers.2")]
    # The interleave of query groups, by hand: group 1's first head is row 4 of [2 groups, 2 queries + k + v, 32].
    qkv = model.decoder.layers[2].self_attention.linear_qkv.weight
    assert torch.equal(found["backbone.layers.2.mixer.q_proj.weight"][64:96], qkv[128:160])
    assert torch.equal(found["backbone.layers.2.mixer.k_proj.weight"][32:], qkv[192:224])
    assert torch.equal(found["backbone.layers.2.mixer.v_proj.weight"][32:], qkv[224:256])


def test_identity_is_the_documented_hash_of_the_tensors(groups: Any, tmp_path: Path) -> None:
    import hashlib

    saved = _save(tmp_path, _student(groups), groups)
    text = ""
    for name, tensor in sorted(_hugging_face(tmp_path).items()):
        shape = "x".join(str(n) for n in tensor.shape)
        text += f"{name} float32 {shape} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}\n"
    assert saved == hashlib.sha256(text.encode()).hexdigest() == identity.checkpoint_id(tmp_path)


def test_identity_follows_each_weight_and_the_dtype_and_nothing_else(groups: Any, tmp_path: Path) -> None:
    model = _student(groups)
    base = _save(tmp_path / "base", model, groups)
    assert _save(tmp_path / "again", model, groups) == base
    changed = {"base": base}
    for name in (
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mixer.A_log",
        "decoder.layers.1.mlp.router.expert_bias",
        "mtp.layers.0.mtp_model_layer.layers.1.mlp.experts.linear_fc2.weight",
    ):
        value = model.state_dict()[name].reshape(-1)[-1]
        value += 1e-6
        changed[name] = _save(tmp_path / name, model, groups)
    assert len(set(changed.values())) == len(changed)
    assert _save(tmp_path / "bf16", model.bfloat16(), groups) not in changed.values()


def test_padding_rows_of_the_vocabulary_do_not_count(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    model, padded = _student(groups), _student(groups, vocab=VOCAB + 3)
    base = _save(tmp_path / "base", model, groups)
    with torch.no_grad():
        padded.embedding.word_embeddings.weight[VOCAB:] = math.pi
    checkpoint.load_weights(tmp_path / "base", padded, groups)
    assert _save(tmp_path / "padded", padded, groups) == base
    manifest = json.loads((tmp_path / "padded/iter_0000001/mopd_manifest.json").read_text())
    assert manifest["query_groups"] == 2 and manifest["source_dtypes"]["decoder.layers.0.mixer.A_log"] == "float32"


def test_checkpoint_without_manifest_needs_the_query_groups(groups: Any, tmp_path: Path) -> None:
    base = _save(tmp_path, _student(groups), groups)
    (tmp_path / "iter_0000001/mopd_manifest.json").unlink()
    with pytest.raises(ConfigurationError, match="query groups"):
        identity.checkpoint_id(tmp_path)
    assert identity.checkpoint_id(tmp_path, query_groups=2) == base


@pytest.mark.parametrize("kind", ["decoder.layers.0.mlp.gate_up.weight", "decoder.final_layernorm.bias", "mtp.proj"])
def test_tensor_of_another_family_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=kind):
        names.hugging_face_pieces({kind: (4, 4)})


def test_half_a_projection_is_refused() -> None:
    parts = {f"decoder.layers.0.mixer.in_proj.weight.{p}": (4, 4) for p in ("z", "x", "B", "C")}
    with pytest.raises(ConfigurationError, match=r"in_proj\.weight\.dt' is missing"):
        names.hugging_face_pieces(parts)
