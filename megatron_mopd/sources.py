"""Where trajectories come from: a dataset's completions or the student's own samples.

Both give this data-parallel rank's share of a global batch whose content and order depend on the seed alone, and both
resume from a small JSON state.
"""

from __future__ import annotations

from typing import Any

from megatron_mopd import provenance
from megatron_mopd.config import Config, Mopd
from megatron_mopd.parallel import Groups
from megatron_mopd.prompts import PromptStream, load_examples, load_prompts, verify
from megatron_mopd.records import Policy, Rollout, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.tokenizer import ChatTokenizer


class DatasetSource:
    """Prompts with their given completions, for supervised stages."""

    def __init__(self, config: Config, groups: Groups, tokenizer: ChatTokenizer) -> None:
        assert config.batching.sequences_per_step is not None  # config.Config sees to it
        self.items = load_examples(config.data.train, tokenizer, config.model.max_sequence_length)
        self.stream = PromptStream(self.items, config.data.weights, config.data.shuffle_seed)
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

    def draw(self, policy: Policy) -> list[Rollout]:
        """Sample the next global batch's share of this rank under the current weights, which are ``policy``."""
        settings, seed = self.config.rollout, self.config.run.seed
        prompts = self.stream.take(settings.prompts_per_step)[self.groups.dp_rank :: self.groups.dp_size]
        requests = [(prompt, k) for prompt in prompts for k in range(settings.samples_per_prompt)]
        rollouts = self.sampler.generate(requests, self.sampling, seed, self.draws, settings.batch_size)
        signed = [
            provenance.sign(r, policy, self.tokenizer, self.sampling, seed, self.draws, self._reward(r))
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
