"""Prompts for training and evaluation: JSONL chat files and reasoning-gym tasks behind one interface."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_mopd import jsonl, reasoning_tasks, verifiers
from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import JsonlPrompts, PromptSource
from megatron_mopd.prompt_items import Item, prompt_id, text_key
from megatron_mopd.prompt_stream import PromptStream
from megatron_mopd.records import Prompt, Rollout
from megatron_mopd.tokenizer import ChatTokenizer

__all__ = ["PromptStream", "check_disjoint", "load_examples", "load_prompts", "verify"]

logger = logging.getLogger(__name__)


def load_prompts(
    sources: Sequence[PromptSource], tokenizer: ChatTokenizer, max_length: int, *, need_verifier: bool = False
) -> list[Prompt]:
    """The distinct prompts of ``sources`` in their order; the same list in every process.

    Raises :class:`ConfigurationError` naming the row for malformed data, for a prompt that leaves no room for a token
    within ``max_length`` tokens and, with ``need_verifier`` (evaluation), for a prompt that nothing can judge.
    """
    prompts: dict[str, Prompt] = {}
    rows = 0
    for item in _items(sources):
        rows += 1
        prompt = _prompt(item, tokenizer, max_length)
        if need_verifier and not prompt.verifier:
            raise ConfigurationError(
                f"{item.origin}: no verifier, so no completion of it can be judged; give the row one"
            )
        prompts.setdefault(prompt.id, prompt)
    _log("prompts", [p.domain for p in prompts.values()], rows)
    return list(prompts.values())


def load_examples(sources: Sequence[PromptSource], tokenizer: ChatTokenizer, max_length: int) -> list[Rollout]:
    """Prompts with their given completions, stop token included; several completions of one prompt are its samples.

    Errors as in :func:`load_prompts`, and for a row without a completion or of more than ``max_length`` tokens in all.
    """
    examples: list[Rollout] = []
    seen: set[tuple[str, str]] = set()
    samples: Counter[str] = Counter()
    rows = 0
    for item in _items(sources):
        rows += 1
        if item.completion is None:
            raise ConfigurationError(
                f"{item.origin}: no completion; a dataset stage (source.type dataset) trains on it"
            )
        prompt = _prompt(item, tokenizer, max_length)
        if (prompt.id, item.completion) in seen:
            continue
        seen.add((prompt.id, item.completion))
        completion = _tokens(tokenizer.encode_completion, item.completion, item.origin)
        if (length := len(prompt.tokens) + len(completion)) > max_length:
            raise ConfigurationError(
                f"{item.origin} (prompt {prompt.id[:12]}): prompt and completion have {length} tokens, the context"
                f" {max_length}; shorten the row or raise model.max_sequence_length"
            )
        examples.append(
            Rollout(prompt=prompt, sample=samples[prompt.id], completion=torch.tensor(completion), finish="stop")
        )
        samples[prompt.id] += 1
    _log("examples", [e.prompt.domain for e in examples], rows)
    return examples


def verify(prompt: Prompt, text: str) -> float:
    """The prompt's verifier's score of a completion's text, in [0, 1]; 1 is right."""
    if not prompt.verifier:
        raise ConfigurationError(
            f"prompt {prompt.id[:12]} of domain {prompt.domain!r} has no verifier to judge a completion with"
        )
    return verifiers.verify(prompt.verifier, text)


def check_disjoint(train: Sequence[Prompt | Rollout], held_out: Sequence[Prompt]) -> None:
    """Raise :class:`ConfigurationError` if a held-out prompt's text, case and white space aside, is also trained on."""
    trained = {text_key((row.prompt if isinstance(row, Rollout) else row).messages) for row in train}
    for prompt in held_out:
        if text_key(prompt.messages) in trained:
            raise ConfigurationError(
                f"data.held_out: prompt {prompt.id[:12]} of domain {prompt.domain!r}"
                f" ({prompt.messages[-1]['content'][:40]!r}) is also in data.train; give both sources the same"
                " held_out_fraction and split train and held_out"
            )


def _items(sources: Sequence[PromptSource]) -> Iterator[Item]:
    for source in sources:
        yield from jsonl.read(source) if isinstance(source, JsonlPrompts) else reasoning_tasks.generate(source)


def _prompt(item: Item, tokenizer: ChatTokenizer, max_length: int) -> Prompt:
    tokens = _tokens(tokenizer.render_prompt, item.messages, item.origin)
    identity = prompt_id(item.domain, item.messages)
    if len(tokens) >= max_length:
        raise ConfigurationError(
            f"{item.origin} (prompt {identity[:12]}): the prompt has {len(tokens)} tokens, the context {max_length},"
            " which leaves nothing for a completion; shorten the prompt or raise model.max_sequence_length"
        )
    return Prompt(id=identity, domain=item.domain, messages=item.messages, tokens=tuple(tokens), verifier=item.verifier)


def _tokens[V](encode: Callable[[V], list[int]], value: V, origin: str) -> list[int]:
    try:
        return encode(value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{origin}: {error}") from None


def _log(kind: str, domains: list[str], rows: int) -> None:
    counts = ", ".join(f"{domain} {count}" for domain, count in sorted(Counter(domains).items()))
    logger.info("%d %s (%d duplicates dropped): %s", len(domains), kind, rows - len(domains), counts or "none")
