"""The Hugging Face side of bench_step.py, and by itself its yardstick: ``python tools/bench_hugging_face.py``.

The yardstick was taken once with plain transformers 5.23 on two cores: pattern MEM*EME, 0.82 M parameters, a supervised
step of 32 x 64 tokens and sampling 32 x 24 new ones. It has a shape of its own because it was taken without MOPD.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import rich
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from megatron_mopd import presets
from megatron_mopd.config import Config
from megatron_mopd.prompts import PromptStream, load_prompts
from megatron_mopd.tokenizer import build_tokenizer

YARDSTICK = {"train": 10_000.0, "sample": 3_500.0}  # tokens/s
YARDSTICK_PARAMETERS = 0.82e6
LAYERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


class HuggingFaceStep:
    """The same step the way a transformers user would write it well."""

    def __init__(self, config: Config):
        self.config = config
        self.prompts, self.new_tokens = config.rollout.prompts_per_step, config.rollout.max_new_tokens
        self.micro_batch = config.batching.micro_batch_size
        tokenizer = build_tokenizer(config.tokenizer)
        self.pad = tokenizer.pad_token
        prompts = load_prompts(config.data.train, tokenizer, config.model.max_sequence_length)
        self.stream = PromptStream(prompts, config.data.weights, config.data.shuffle_seed)
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        preset = presets.resolve(config.model)
        torch.manual_seed(config.run.seed)
        self.model = nemotron_h(preset, tokenizer.vocab_size, self.pad)
        self.teacher = nemotron_h(preset, tokenizer.vocab_size, self.pad).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("gate.weight" not in name)  # the router is frozen on our side too
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            trained, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0.0, fused=True
        )
        self.trained: Any = torch.nn.parallel.DistributedDataParallel(self.model) if self.world > 1 else self.model

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        tokens, mask, behaviour = self.rollout()
        sampled = time.perf_counter()
        with torch.inference_mode():
            parts = zip(tokens.split(self.micro_batch), mask.split(self.micro_batch), strict=True)
            teacher = torch.cat([self.logprobs(self.teacher, *part) for part in parts]).clone()
        scored = time.perf_counter()
        self.update(tokens, mask, behaviour, teacher)
        return {"rollout": sampled - start, "score": scored - sampled, "update": time.perf_counter() - scored}

    def rollout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences and mask [b, s] (left-padded, as generate wants them), behaviour log-probabilities [b, n]."""
        n = self.new_tokens
        prompts = [p.tokens for p in self.stream.take(self.prompts)[self.rank :: self.world]]
        width = max(map(len, prompts))
        inputs = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        self.model.eval()
        out = self.model.generate(
            inputs,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=n,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(out.logits, dim=1)
        behaviour = logits.log_softmax(-1).gather(-1, out.sequences[:, -n:, None]).squeeze(-1)
        return out.sequences, torch.cat([mask, mask.new_ones(len(prompts), n)], dim=1), behaviour

    def logprobs(self, model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """[b, n] of the completion tokens; logits are computed for those positions alone."""
        n = self.new_tokens
        logits = model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=n + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, -n:, None]).squeeze(-1)

    def update(self, tokens: Tensor, mask: Tensor, behaviour: Tensor, teacher: Tensor) -> None:
        """Eq. 3 with its default fields, one optimizer step; prox is the training forward itself."""
        objective: Any = self.config.objective
        total = self.prompts * self.new_tokens
        self.model.train()
        pieces = [t.split(self.micro_batch) for t in (tokens, mask, behaviour, teacher)]
        for index, (piece, kept, behav, target) in enumerate(zip(*pieces, strict=True)):
            last = index == len(pieces[0]) - 1
            with nullcontext() if self.world == 1 or last else self.trained.no_sync():
                theta = self.logprobs(self.trained, piece, kept)
                prox = theta.detach()
                advantage, importance, ratio = target - prox, (prox - behav).exp(), (theta - prox).exp()
                inside = (importance >= objective.importance_low) & (importance <= objective.importance_high)
                clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
                gain = inside * importance * torch.minimum(ratio * advantage, clipped * advantage)
                # DistributedDataParallel averages over ranks; the denominator is global.
                (-gain.sum() * self.world / total).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()


def nemotron_h(preset: presets.Preset, vocab_size: int, pad: int) -> Any:
    """Hugging Face's model of a preset without MTP, fp32, its fastest implementation of experts on a CPU."""
    config = NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=preset.hidden_size,
        layers_block_type=[LAYERS[symbol] for symbol in preset.pattern.split("/")[0]],
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_query_groups,
        head_dim=preset.kv_channels,
        intermediate_size=preset.ffn_hidden_size,
        ssm_state_size=preset.mamba_state_dim,
        mamba_num_heads=preset.mamba_num_heads,
        mamba_head_dim=preset.mamba_head_dim,
        n_groups=preset.mamba_num_groups,
        conv_kernel=preset.mamba_conv,
        chunk_size=preset.mamba_chunk,
        n_routed_experts=preset.num_moe_experts,
        num_experts_per_tok=preset.moe_router_topk,
        moe_intermediate_size=preset.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=preset.moe_shared_expert_intermediate_size,
        moe_latent_size=preset.moe_latent_size,
        routed_scaling_factor=preset.moe_router_topk_scaling_factor,
        initializer_range=preset.init_method_std,
        eos_token_id=None,  # completions of one length
        bos_token_id=None,
        pad_token_id=pad,
    )
    model = NemotronHForCausalLM(config)
    # Seconds of a training step of 32 x 64 tokens on two cores: eager 0.14, grouped_mm 0.16, batched_mm 5.
    model.set_experts_implementation("eager")
    return model


def yardstick() -> dict[str, dict[str, float]]:
    """Tokens per second of training and sampling at the yardstick's own size, measured now and as given."""
    preset = dataclasses.replace(
        presets.PRESETS["tiny"], pattern="MEM*EME", moe_latent_size=None, moe_ffn_hidden_size=64,
        moe_shared_expert_intermediate_size=64, mamba_state_dim=16, mamba_num_groups=1,
    )  # fmt: skip
    model: Any = nemotron_h(preset, 128, 0)
    size = sum(p.numel() for p in model.parameters())
    assert abs(size / YARDSTICK_PARAMETERS - 1) < 0.05, f"the yardstick's model has {size} parameters"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sequences, prompts = torch.randint(1, 100, (32, 64)), torch.randint(1, 100, (32, 12))

    def train() -> None:
        model.train()
        model(sequences, labels=sequences, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        model.eval()
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=24)

    measured = {"train": 32 * 64 / _median_time(train), "sample": 32 * 24 / _median_time(sample)}
    return {name: {"measured": measured[name], "given": given} for name, given in YARDSTICK.items()}


def _median_time(function: Callable[[], None], repetitions: int = 5) -> float:
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one line for bench_step.py")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speeds = yardstick()
    if arguments.json:
        sys.stdout.write(json.dumps(speeds) + "\n")
        return
    for name, speed in speeds.items():
        rich.print(f"{name}: {speed['measured']:,.0f} tokens/s, yardstick {speed['given']:,.0f}")


if __name__ == "__main__":
    main()
