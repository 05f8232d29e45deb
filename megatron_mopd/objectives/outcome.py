"""Outcome-reward advantage: how a completion did against the other completions of its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_mopd.records import Rollout


def group_advantages(rollouts: Sequence[Rollout]) -> list[float]:
    """GRPO's group-relative advantage per rollout: (reward - mean) / standard deviation within the group.

    A group is a run of neighbours with one prompt id and rising ``sample``, as the sampler returns them; so a prompt
    drawn twice in one step makes two groups, whichever ranks they are on. The standard deviation is the sample's (n -
    1 below), and a group of equal rewards gets 0. Raises ValueError for a rollout without reward or alone in its
    group.
    """
    result: list[float] = []
    for group in _groups(rollouts):
        if len(group) < 2:
            raise ValueError(
                f"prompt {group[0].prompt.id}: one rollout cannot be compared;"
                " set rollout.samples_per_prompt to 2 or more"
            )
        rewards = [_reward(rollout) for rollout in group]
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        result += [(r - mean) / deviation if deviation > 1e-8 else 0.0 for r in rewards]
    return result


def _groups(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    for rollout in rollouts:
        last = groups[-1][-1] if groups else None
        if last is not None and last.prompt.id == rollout.prompt.id and last.sample < rollout.sample:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return groups


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None:
        raise ValueError(
            f"prompt {rollout.prompt.id} ({rollout.prompt.domain}): no reward; its domain needs a verifier"
        )
    return rollout.reward
