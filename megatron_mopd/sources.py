"""Where trajectories come from: given completions (a dataset's, or traces of teachers) or the student's own samples.

Both give this data-parallel rank's share of a global batch whose content and order depend on the seed alone, and both
resume from a small JSON state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mopd import provenance, traces
from megatron_mopd.config import Config, Mopd
from megatron_mopd.parallel import Groups
from megatron_mopd.prompts import PromptStream, load_examples, load_prompts, verify
from megatron_mopd.records import Policy, Rollout, Sampling
from megatron_mopd.rollout import Refresh, Sampler
from megatron_mopd.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from megatron_mopd.teachers import TeacherPool


def of_stage(
    config: Config, groups: Groups, tokenizer: ChatTokenizer, sampler: Sampler, teachers: TeacherPool | None
) -> DatasetSource | RolloutSource:
    """The source that ``config.source`` names; ``sampler`` is the student's."""
    if config.source.type == "rollout":
        return RolloutSource(config, groups, tokenizer, sampler)
    if config.source.type == "dataset":
        items = load_examples(config.data.train, tokenizer, config.model.max_sequence_length)
        return DatasetSource(config, groups, items, config.data.weights)
    assert teachers is not None  # config.Config sees to it
    items = traces.of_stage(config, groups, tokenizer, teachers)
    if config.source.others == "replay":
        given = load_examples(config.data.train, tokenizer, config.model.max_sequence_length)
        items += [example for example in given if not teachers.serves(example.prompt.domain)]
        return DatasetSource(config, groups, items, config.data.weights)
    weights = {domain: w for domain, w in config.data.weights.items() if teachers.serves(domain)}
    return DatasetSource(config, groups, items, weights)


class DatasetSource:
    """Prompts with completions that nobody samples while training, for supervised stages: the data's or traces."""

    def __init__(self, config: Config, groups: Groups, items: Sequence[Rollout], weights: Mapping[str, float]) -> None:
        assert config.batching.sequences_per_step is not None  # config.Config sees to it
        self.items = list(items)
        self.stream = PromptStream(self.items, weights, config.data.shuffle_seed)
        self.size, self.groups = config.batching.sequences_per_step, groups

    def draw(self, policy: Policy) -> list[Rollout]:
        """The next global batch's share of this rank."""
        return self.stream.take(self.size)[self.groups.dp_rank :: self.groups.dp_size]

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])


class RolloutSource:
    """The student's own completions of the training prompts, with their provenance."""

    def __init__(self, config: Config, groups: Groups, tokenizer: ChatTokenizer, sampler: Sampler) -> None:
        self.items = load_prompts(
            config.data.train,
            tokenizer,
            config.model.max_sequence_length,
            need_verifier=isinstance(config.objective, Mopd) and config.objective.outcome_weight > 0,
        )
        self.stream = PromptStream(self.items, config.data.weights, config.data.shuffle_seed)
        self.config, self.groups, self.tokenizer, self.sampler = config, groups, tokenizer, sampler
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            stop_tokens=tuple(tokenizer.stop_tokens),
            top_p=config.rollout.top_p,
        )
        self.draws = 0
        self._start = self.stream.state_dict()

    def seek(self, draw: int) -> None:
        """Stand before batch ``draw``, as if all earlier ones had been drawn and no later one."""
        if draw < self.draws:
            self.stream.load_state_dict(self._start)
            self.draws = 0
        while self.draws < draw:
            self.stream.take(self.config.rollout.prompts_per_step)
            self.draws += 1

    def draw(self, policy: Policy, refresh: Refresh | None = None) -> list[Rollout]:
        """Sample the next global batch's share of this rank under the current weights, which are ``policy``, and under
        those that ``refresh`` brings meanwhile."""
        settings, seed = self.config.rollout, self.config.run.seed
        prompts = self.stream.take(settings.prompts_per_step)[self.groups.dp_rank :: self.groups.dp_size]
        requests = [(prompt, k) for prompt in prompts for k in range(settings.samples_per_prompt)]
        rollouts = self.sampler.generate(requests, self.sampling, seed, self.draws, settings.batch_size, refresh)
        signed = [
            provenance.sign(r, _first(r, policy), self.tokenizer, self.sampling, seed, self.draws, self._reward(r))
            for r in rollouts
        ]
        self.draws += 1
        return signed

    def _reward(self, rollout: Rollout) -> float | None:
        if not isinstance(self.config.objective, Mopd) or not self.config.objective.outcome_weight:
            return None
        if rollout.finish != "stop":  # as in evaluation: an answer cut short is no answer
            return 0.0
        return verify(rollout.prompt, self.tokenizer.decode(rollout.completion.tolist()))

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.draws = state["draws"]


def _first(rollout: Rollout, policy: Policy) -> Policy:
    """Who drew the first token: ``policy``, or what had taken its place by then."""
    return policy if rollout.policy_steps is None else replace(policy, step=int(rollout.policy_steps[0]))
