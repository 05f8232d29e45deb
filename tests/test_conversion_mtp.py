"""Converted MTP weights against a forward pass in plain torch, for transformers builds no MTP modules.

The definition is DeepSeek-V3's (arXiv 2412.19437, section 2.2) as the Nemotron 3 Ultra report uses it: depth k joins
the hidden state of position i with the embedding of token i + 1 + k, each normed, in one projection; a block of layers
and a norm follow; the output weight is the trunk's. Names are those of the published checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import small_nemotron_h
import torch
from safetensors.torch import load_file, save_file
from small_nemotron_h import SIZES, VOCAB
from torch import Tensor

from megatron_mopd import conversion
from megatron_mopd.config import Model, Parallel
from megatron_mopd.conversion import hugging_face_config

# --------------------------------------------------------------------------- the forward pass, tensor by tensor


class Reference:
    """MTP from the tensors of a Hugging Face directory, in fp64."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.read: set[str] = set()
        self._tensors: dict[str, Tensor] = {}
        for file in directory.glob("*.safetensors"):
            self._tensors |= load_file(file)

    def weight(self, name: str) -> Tensor:
        self.read.add(name)
        return self._tensors[name].double()

    def depths(self, tokens: Tensor, hidden: Tensor, depths: int) -> list[Tensor]:
        """``[b, s - 1 - k, H]`` of depth k = 0, 1, ..., from the trunk's normed hidden states ``[b, s, H]``.

        The block is stored once and serves all depths; the last positions have no token to look at and fall away.
        """
        pattern, embedding = self.config["mtp_hybrid_override_pattern"], self.weight("backbone.embeddings.weight")
        last, found = f"mtp.layers.{len(pattern) - 1}", []
        for depth in range(depths):
            hidden = hidden[:, :-1]
            following = embedding[tokens[:, 1 + depth :]]
            joined = [self.norm("mtp.layers.0.enorm", following), self.norm("mtp.layers.0.hnorm", hidden)]
            hidden = torch.cat(joined, -1) @ self.weight("mtp.layers.0.eh_proj.weight").T
            for index, symbol in enumerate(pattern):
                at = f"mtp.layers.{index}"
                mixer = {"*": self.attention, "E": self.experts, "-": self.dense, "M": self.mamba}[symbol]
                hidden = hidden + mixer(f"{at}.mixer", self.norm(f"{at}.norm", hidden))
            hidden = self.norm(f"{last}.final_layernorm", hidden)
            found.append(hidden)
        return found

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ self.weight("lm_head.weight").T
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight(f"{name}.weight")

    def dense(self, at: str, x: Tensor) -> Tensor:
        return (x @ self.weight(f"{at}.up_proj.weight").T).relu().square() @ self.weight(f"{at}.down_proj.weight").T

    def attention(self, at: str, x: Tensor) -> Tensor:
        heads, groups, width = (self.config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q = (x @ self.weight(f"{at}.q_proj.weight").T).unflatten(-1, (heads, width))
        k = (x @ self.weight(f"{at}.k_proj.weight").T).unflatten(-1, (groups, width))
        v = (x @ self.weight(f"{at}.v_proj.weight").T).unflatten(-1, (groups, width))
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        out = []
        for head in range(heads):
            group = head // (heads // groups)  # neighbouring query heads share one key and value head
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / width**0.5
            out.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, :, group])
        return torch.cat(out, -1) @ self.weight(f"{at}.o_proj.weight").T

    def experts(self, at: str, x: Tensor) -> Tensor:
        """Sigmoid scores choose with the correction bias and weigh without it; latent experts work between two maps."""
        scores = (x @ self.weight(f"{at}.gate.weight").T).sigmoid()
        chosen = (scores + self.weight(f"{at}.gate.e_score_correction_bias")).topk(self.config["num_experts_per_tok"])
        weights = torch.zeros_like(scores).scatter(-1, chosen.indices, scores.gather(-1, chosen.indices))
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config["routed_scaling_factor"]
        latent = self.config["moe_latent_size"] is not None
        inner = x @ self.weight(f"{at}.fc1_latent_proj.weight").T if latent else x
        routed = sum(
            weights[..., e, None] * self.dense(f"{at}.experts.{e}", inner)
            for e in range(self.config["n_routed_experts"])
        )
        routed = routed @ self.weight(f"{at}.fc2_latent_proj.weight").T if latent else routed
        return routed + self.dense(f"{at}.shared_experts", x)

    def mamba(self, at: str, x: Tensor) -> Tensor:
        """Mamba-2, one token after the other: h = exp(dt A) h + dt B x, y = C h + D x, gated and normed by group."""
        heads, width, groups, states = (
            self.config[n] for n in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        )
        inner, shared = heads * width, groups * states
        z, xbc, dt = (x @ self.weight(f"{at}.in_proj.weight").T).split([inner, inner + 2 * shared, heads], -1)
        taps, bias = self.weight(f"{at}.conv1d.weight"), self.weight(f"{at}.conv1d.bias")
        padded = torch.nn.functional.pad(xbc.transpose(1, 2), (taps.shape[-1] - 1, 0))
        xbc = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, taps, bias, groups=len(taps)))
        u, B, C = xbc.transpose(1, 2).split([inner, shared, shared], -1)
        u = u.unflatten(-1, (heads, width))
        B, C = (t.unflatten(-1, (groups, states)).repeat_interleave(heads // groups, 2) for t in (B, C))
        dt = torch.nn.functional.softplus(dt + self.weight(f"{at}.dt_bias"))
        decay = (dt * -self.weight(f"{at}.A_log").exp()).exp()
        state, ys = u.new_zeros(len(x), heads, width, states), []
        for t in range(x.shape[1]):
            step = (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
            state = decay[:, t, :, None, None] * state + step
            ys.append((state * C[:, t, :, None]).sum(-1) + self.weight(f"{at}.D")[:, None] * u[:, t])
        y = torch.stack(ys, 1).flatten(2) * torch.nn.functional.silu(z)
        y = y.unflatten(-1, (groups, inner // groups))
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(2) * self.weight(f"{at}.norm.weight")
        return y @ self.weight(f"{at}.out_proj.weight").T


# --------------------------------------------------------------------------- a checkpoint, its conversion, our model


def mtp_shapes(pattern: str, sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of one stored block by the published checkpoints' names."""
    h, width = sizes["hidden_size"], sizes["moe_latent_size"] or sizes["hidden_size"]
    heads, groups = sizes["num_attention_heads"] * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    inner, shared = sizes["mamba_num_heads"] * sizes["mamba_head_dim"], sizes["n_groups"] * sizes["ssm_state_size"]
    channels, middle = inner + 2 * shared, sizes["moe_shared_expert_intermediate_size"]
    dense = {"up_proj.weight": (sizes["intermediate_size"], h), "down_proj.weight": (h, sizes["intermediate_size"])}
    attention = {"q_proj.weight": (heads, h), "k_proj.weight": (groups, h), "v_proj.weight": (groups, h)}
    experts = {
        "gate.weight": (sizes["n_routed_experts"], h),
        "gate.e_score_correction_bias": (sizes["n_routed_experts"],),
        "shared_experts.up_proj.weight": (middle, h),
        "shared_experts.down_proj.weight": (h, middle),
    }
    if sizes["moe_latent_size"]:
        experts |= {"fc1_latent_proj.weight": (width, h), "fc2_latent_proj.weight": (h, width)}
    for e in range(sizes["n_routed_experts"]):
        experts[f"experts.{e}.up_proj.weight"] = (sizes["moe_intermediate_size"], width)
        experts[f"experts.{e}.down_proj.weight"] = (width, sizes["moe_intermediate_size"])
    mamba = {
        "in_proj.weight": (inner + channels + sizes["mamba_num_heads"], h), "conv1d.bias": (channels,),
        "conv1d.weight": (channels, 1, sizes["conv_kernel"]), "out_proj.weight": (h, inner), "norm.weight": (inner,),
        "A_log": (sizes["mamba_num_heads"],), "D": (sizes["mamba_num_heads"],), "dt_bias": (sizes["mamba_num_heads"],),
    }  # fmt: skip
    mixers = {"*": attention | {"o_proj.weight": (h, heads)}, "E": experts, "-": dense, "M": mamba}
    found: dict[str, tuple[int, ...]] = {f"mtp.layers.0.{n}.weight": (h,) for n in ("enorm", "hnorm")}
    found["mtp.layers.0.eh_proj.weight"] = (h, 2 * h)
    found[f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"] = (h,)
    for index, symbol in enumerate(pattern):
        found[f"mtp.layers.{index}.norm.weight"] = (h,)
        found |= {f"mtp.layers.{index}.mixer.{name}": shape for name, shape in mixers[symbol].items()}
    return found


def saved(path: Path, trunk: str, pattern: str, depths: int, changes: dict[str, Any]) -> Any:
    """A NemotronH model of transformers saved with random MTP tensors beside its own; returns the model."""
    model = small_nemotron_h.model(trunk, seed=11, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.rand_like(parameter))
    model.eval().save_pretrained(path)
    tree = json.loads((path / "config.json").read_text())
    tree |= {"num_nextn_predict_layers": depths, "mtp_hybrid_override_pattern": pattern}
    tree.pop("mtp_layers_block_type", None)
    (path / "config.json").write_text(json.dumps(tree))
    tensors = load_file(path / "model.safetensors")
    for name, shape in mtp_shapes(pattern, {**SIZES, **changes}).items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        tensors[name] = scale * torch.randn(shape) + (1.0 if "norm" in name else 0.0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model


def ours(
    checkpoint: Path, directory: Path, parallel: Parallel, tokens: Tensor, depths: int
) -> list[tuple[Tensor, Tensor]]:
    """Hidden states ``[b, s, H]`` and log-probabilities of the token 2 + k on ``[b, s - 2 - k]``, for each depth k."""
    import torch.distributed as dist

    from megatron_mopd import checkpoint as checkpoints
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd import student

    groups = mopd_parallel.initialize(parallel, seed=3)
    preset = hugging_face_config.architecture(hugging_face_config.read(directory), "test").preset
    kept = {f.name for f in fields(preset)} - {"pattern", "vocab_size", "mamba_conv", "mamba_chunk"}
    override = {name: getattr(preset, name) for name in kept}
    model = student.build_model(Model(pattern=preset.pattern, override=override), parallel, groups, VOCAB).eval()
    checkpoints.load_weights(checkpoint, model, groups)
    found = []
    with torch.no_grad():
        out = student.forward(model, tokens, mtp=True)
        assert len(out.mtp_hidden) == depths
        for depth, part in enumerate(out.mtp_hidden):
            hidden = student.gather_hidden(part, groups, model.config)
            local = (hidden @ out.output_weight.T).float()
            parts = [torch.empty_like(local) for _ in range(groups.tp_size)]
            dist.all_gather(parts, local, group=groups.tp)
            rows, length = tokens.shape
            logits = torch.cat(parts, -1)[:, :VOCAB].view(length, rows, VOCAB).transpose(0, 1)
            targets = tokens[:, 2 + depth :, None]
            logprobs = logits[:, : length - 2 - depth].log_softmax(-1).gather(-1, targets).squeeze(-1)
            found.append((hidden.view(length, rows, -1).transpose(0, 1), logprobs))
    return found


CASES = {
    "one-depth": ("M*E-", "*E", 1, {}),
    "two-depths-share-a-block": ("M*E-", "*E", 2, {}),
    "experts-of-full-width": ("ME", "*E", 2, {"moe_latent_size": None, "num_attention_heads": 8}),
    "heads-each-of-their-own": ("*-", "*E", 1, {"num_key_value_heads": 4, "n_routed_experts": 8}),
    "one-group-and-every-kind-of-layer": ("M", "M-*E", 2, {"num_key_value_heads": 1}),
}
LAYOUTS = {
    "two-depths-share-a-block": [
        (2, Parallel(tensor=2)),
        (2, Parallel(expert=2)),
        (4, Parallel(tensor=2, expert=2)),
    ],
    "experts-of-full-width": [(2, Parallel(tensor=2)), (2, Parallel(expert=2))],
    "one-group-and-every-kind-of-layer": [(2, Parallel(tensor=2))],
}


@pytest.mark.parametrize("name", CASES)
def test_converted_mtp_computes_what_its_definition_says(ranks: Any, groups: Any, tmp_path: Path, name: str) -> None:
    trunk, pattern, depths, changes = CASES[name]
    model = saved(tmp_path / "source", trunk, pattern, depths, changes)
    conversion.hugging_face_to_megatron(tmp_path / "source", tmp_path / "megatron", shards=2)
    conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    tokens = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state.double()  # after the final norm
    reference = Reference(tmp_path / "back")
    expected = reference.depths(tokens, hidden, depths)
    logprobs = [reference.logprobs(h[:, :-1], tokens[:, 2 + k :]) for k, h in enumerate(expected)]
    assert {n for n in reference.read if n.startswith("mtp.")} == mtp_shapes(pattern, {**SIZES, **changes}).keys()
    for world, parallel in [(1, Parallel()), *LAYOUTS.get(name, [])]:
        for found in ranks(world, ours, tmp_path / "megatron", tmp_path / "source", parallel, tokens, depths):
            for (mine, scored), theirs, score in zip(found, expected, logprobs, strict=True):
                whole = theirs.shape[1]
                torch.testing.assert_close(mine[:, :whole].double(), theirs, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(scored.double(), score, rtol=0, atol=1e-5)
    if depths == 2:  # the second depth is no repetition of the first
        assert (logprobs[0][:, :-1] - logprobs[1]).abs().mean() > 0.1
