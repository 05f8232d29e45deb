"""How many tokens a verification accepts, measured by speculative decoding of held-out prompts.

The acceptance length of a completion is its tokens per verification, the token behind the draft included; that of a
model is the mean over completions of at least ``MIN_TOKENS`` tokens. Shorter ones are left out: most of their drafts
reach beyond their end. Stop tokens end a completion as they do everywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_mopd import intervals
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.speculative.sampling import SpeculativeSampler

MIN_TOKENS = 32
DRAFTS = (2, 7)
MODES = {"greedy": 0.0, "temperature_1": 1.0}


def measure(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    groups: Groups,
    batch_size: int,
    *,
    drafts: Sequence[int] = DRAFTS,
    min_tokens: int = MIN_TOKENS,
) -> dict[str, Any]:
    """``{"draft_2": {"greedy": ..., "temperature_1": ...}, ...}``, JSON values equal on all ranks.

    Each entry has ``length`` (None where no completion was long enough), ``by_prompt`` (in the order of ``prompts``,
    None for a completion that was not) and ``domains``: {domain: {length, completions}}. Data-parallel ranks share the
    prompts. Of ``sampling`` the limit and the stop tokens are used.
    """
    share = prompts[groups.dp_rank :: groups.dp_size]
    tree: dict[str, Any] = {}
    for draft in drafts:
        speculative = SpeculativeSampler(sampler, draft)
        for mode, temperature in MODES.items():
            # Draw -1, as in evaluation: never the noise of a training draw.
            own = speculative.generate(
                [(prompt, 0) for prompt in share], replace(sampling, temperature=temperature), 0, -1, batch_size
            )
            lengths = [c.accepted if len(c.tokens) >= min_tokens else None for c in own]
            shares: list[Any] = [None] * groups.dp_size
            torch.distributed.all_gather_object(shares, lengths, group=groups.dp)
            ordered = [shares[i % groups.dp_size][i // groups.dp_size] for i in range(len(prompts))]
            tree.setdefault(f"draft_{draft}", {})[mode] = _entry(prompts, ordered)
    return tree


def _entry(prompts: Sequence[Prompt], by_prompt: list[float | None]) -> dict[str, Any]:
    domains: dict[str, list[float]] = {prompt.domain: [] for prompt in prompts}
    for prompt, length in zip(prompts, by_prompt, strict=True):
        if length is not None:
            domains[prompt.domain].append(length)
    return {
        "length": _mean([length for length in by_prompt if length is not None]),
        "by_prompt": by_prompt,
        "domains": {d: {"length": _mean(own), "completions": len(own)} for d, own in domains.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def gains(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """``{draft: {mode: {"gain", "interval", "prompts"}}}`` between two results of :func:`measure`.

    Both are to be of the same prompts in the same order, which they do not say; ValueError is raised where they are of
    different numbers of prompts. The gain is the mean over the prompts whose completions were long enough in both, its
    95% interval that of a paired mean (None below two prompts).
    """
    tree: dict[str, Any] = {}
    for draft, modes in before.items():
        for mode, entry in modes.items():
            changes = _changes(entry["by_prompt"], after[draft][mode]["by_prompt"])
            found = {"gain": _mean(changes), "interval": intervals.mean_interval(changes), "prompts": len(changes)}
            tree.setdefault(draft, {})[mode] = found
    return tree


def _changes(before: Sequence[float | None], after: Sequence[float | None]) -> list[float]:
    if len(before) != len(after):
        raise ValueError(f"{len(before)} prompts before and {len(after)} after: measure both on the same ones")
    return [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
