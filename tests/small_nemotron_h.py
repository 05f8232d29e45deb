"""NemotronH models of transformers that are made in milliseconds, random in every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_mopd.data_config import Tokenizer
from megatron_mopd.tokenizer import build_tokenizer

VOCAB = 101  # odd: padded under tensor parallelism
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "conv_kernel": 4, "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5,
}  # fmt: skip
_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def layers(pattern: str) -> list[str]:
    """Megatron-Core's pattern of layers in the words of transformers."""
    return [_KINDS[symbol] for symbol in pattern]


def model(pattern: str, seed: int = 5, **changes: Any) -> Any:
    """A model of these sizes, with these changes, in fp32."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(seed)
    # transformers raises Mamba's step sizes to time_step_min; Megatron-Core's mixer, like Mamba-2 itself, does not.
    given: dict[str, Any] = {**SIZES, "initializer_range": 0.1, "time_step_min": 1e-6, **changes}
    return NemotronHForCausalLM(NemotronHConfig(**given, layers_block_type=layers(pattern)))


def saved(path: Path, pattern: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """:func:`model` as transformers saves it, its vectors, all ones or zeros at first, stirred; returns the model."""
    made = model(pattern, **changes)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():  # each element must find its place
                tensor.add_(0.1 * torch.rand_like(tensor), alpha=1.0 if "A_log" in name else 0.5)
    made.to(dtype).eval().save_pretrained(path)
    return made


def saved_with_tokenizer(path: Path, pattern: str, seed: int = 5, **changes: Any) -> Any:
    """:func:`model` for the tokenizer that the demo makes, as transformers saves both; returns the model."""
    tokenizer = build_tokenizer(Tokenizer())
    ends = {"pad_token_id": tokenizer.pad_token, "bos_token_id": None, "eos_token_id": tokenizer.stop_tokens[0]}
    made = model(pattern, seed, **{"vocab_size": tokenizer.vocab_size} | ends | changes).eval()
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return made
