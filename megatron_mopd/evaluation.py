"""Greedy accuracy on held-out prompts; exact reverse KL to teachers, advantages and examples on held-out rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_mopd import provenance
from megatron_mopd.intervals import Accuracy
from megatron_mopd.parallel import Groups
from megatron_mopd.prompts import verify
from megatron_mopd.records import Policy, Prompt, Rollout, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from megatron_mopd.teachers import TeacherPool

EXAMPLES = 2
"""Rollouts of each domain kept whole, for the report's pictures."""
KEPT_ADVANTAGES = 20_000
"""Tokens of each domain and rank whose advantage is kept, for the report's histogram."""


def held_out(prompts: Sequence[Prompt], per_domain: int) -> list[Prompt]:
    """The first ``per_domain`` prompts of each domain, in the order of the data."""
    taken: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        if taken.get(prompt.domain, 0) < per_domain:
            taken[prompt.domain] = taken.get(prompt.domain, 0) + 1
            chosen.append(prompt)
    return chosen


def sample(
    sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, groups: Groups, batch_size: int
) -> list[Rollout]:
    """One completion of each prompt of this data-parallel rank's share."""
    share = prompts[groups.dp_rank :: groups.dp_size]
    # Draw -1: evaluation never shares its noise with a training draw.
    return sampler.generate([(prompt, 0) for prompt in share], sampling, 0, -1, batch_size)


def answers(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    tokenizer: ChatTokenizer,
    groups: Groups,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, str]:
    """Whether each greedy completion is right, judged by its prompt's verifier (a score of 1 counts).

    ``{domain: "0110..."}``, domains sorted: one character a prompt, in the order of ``prompts``. Equal on all ranks.
    """
    greedy = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, stop_tokens=tuple(tokenizer.stop_tokens))
    rollouts = sample(sampler, prompts, greedy, groups, batch_size)
    verdicts = torch.zeros(len(prompts), dtype=torch.int64, device=groups.device)
    own = torch.tensor([int(right(rollout, tokenizer)) for rollout in rollouts], dtype=torch.int64)
    verdicts[groups.dp_rank :: groups.dp_size] = own.to(groups.device)
    torch.distributed.all_reduce(verdicts, group=groups.dp)
    marks = verdicts.tolist()
    return {
        domain: "".join(str(mark) for mark, prompt in zip(marks, prompts, strict=True) if prompt.domain == domain)
        for domain in sorted({p.domain for p in prompts})
    }


def counted(answered: Mapping[str, str]) -> dict[str, Accuracy]:
    """Accuracy per domain of what :func:`answers` gives."""
    return {d: Accuracy(correct=marks.count("1"), total=len(marks)) for d, marks in answered.items()}


def result(answered: Mapping[str, str], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a stage leaves of its answers, as JSON values: ``accuracy``, ``answers`` and ``prompts``.

    ``prompts`` is what was :func:`asked`: answers of two stages are paired where it is equal.
    """
    return {"accuracy": to_json(counted(answered)), "answers": dict(answered), "prompts": asked(prompts)}


def asked(prompts: Sequence[Prompt]) -> dict[str, str]:
    """``{domain: sha256 of the prompt ids in order}``, domains sorted."""
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(prompt.domain, []).append(prompt.id)
    return {domain: hashlib.sha256("\n".join(ids[domain]).encode()).hexdigest() for domain in sorted(ids)}


def right(rollout: Rollout, tokenizer: ChatTokenizer) -> bool:
    """Whether a completion ended by itself and its prompt's verifier gives it a score of 1."""
    text = tokenizer.decode(rollout.completion.tolist())
    return rollout.finish == "stop" and verify(rollout.prompt, text) >= 1.0


def diagnose(
    sampler: Sampler,
    teachers: TeacherPool,
    prompts: Sequence[Prompt],
    tokenizer: ChatTokenizer,
    groups: Groups,
    sampling: Sampling,
    policy: Policy,
    batch_size: int,
) -> dict[str, Any]:
    """What the teachers make of the student's own held-out rollouts, as JSON values equal on all ranks.

    ``reverse_kl``: {teacher: {domain: nats}}, exact, all pairs; ``advantages``: {domain: [log-ratio of each token]};
    ``examples``: a few rollouts of each domain with their tokens' texts and advantages.
    """
    rollouts = sample(sampler, prompts, sampling, groups, batch_size)
    signed = [provenance.sign(r, policy, tokenizer, sampling, seed=0, draw=-1) for r in rollouts]
    scored = teachers.score(signed)
    kl = teachers.reverse_kl(sampler.model, scored, all_pairs=True)
    advantages: dict[str, list[float]] = {}
    examples: dict[str, list[dict[str, Any]]] = {}
    for item in scored:
        rollout, domain = item.rollout, item.rollout.prompt.domain
        assert rollout.behav_logprobs is not None
        values = [round(v, 4) for v in (item.teacher_logprobs - rollout.behav_logprobs).tolist()]
        kept = advantages.setdefault(domain, [])
        kept.extend(values[: KEPT_ADVANTAGES - len(kept)])
        example = {
            "domain": domain,
            "prompt": rollout.prompt.messages[-1]["content"],
            "tokens": [tokenizer.decode([token]) or "⏎" for token in rollout.completion.tolist()],
            "advantages": values,
        }
        examples.setdefault(domain, []).append(example)
    # The examples that the teacher likes least are the ones worth a picture.
    worst = {d: sorted(e, key=lambda x: min(x["advantages"]))[:EXAMPLES] for d, e in examples.items()}
    shares: list[Any] = [None] * groups.dp_size
    torch.distributed.all_gather_object(shares, (advantages, worst), group=groups.dp)
    domains = sorted({d for share, _ in shares for d in share})
    return {
        "reverse_kl": kl,
        "advantages": {d: [v for share, _ in shares for v in share.get(d, [])] for d in domains},
        "examples": [e for d in domains for e in [x for _, share in shares for x in share.get(d, [])][:EXAMPLES]],
    }


def to_json(result: Mapping[str, Accuracy]) -> dict[str, dict[str, int]]:
    return {d: {"correct": a.correct, "total": a.total} for d, a in result.items()}


def from_json(tree: Mapping[str, Mapping[str, int]]) -> dict[str, Accuracy]:
    return {d: Accuracy(correct=a["correct"], total=a["total"]) for d, a in tree.items()}
