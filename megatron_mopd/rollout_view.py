"""A shard's rollouts as people read them: tokens as text, what each got, and why one did not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.text import Text

from megatron_mopd import palette, screen, shards
from megatron_mopd.records import ScoredRollout, UpdatedRollout
from megatron_mopd.report import Example

MASKED = "importance c_t out of bounds"
_ORDER = ("advantage", "teacher", "student", "behaviour", "importance", "ratio", "mask", "clipped", "entropy")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One rollout of a shard."""

    kept: UpdatedRollout
    tokens: tuple[str, ...]  # text of each
    advantages: tuple[float, ...]  # nats; against behaviour where no update saw the rollout, 0 where nothing is known
    uncounted: tuple[str | None, ...]  # why a token did not count; None where it did

    @property
    def teacher(self) -> str | None:
        """The name of the one that scored it."""
        return self.kept.item.teacher if isinstance(self.kept.item, ScoredRollout) else None

    @property
    def prompt(self) -> str:
        """The conversation's text, roles left out."""
        return "\n".join(message["content"] for message in shards.rollout(self.kept).prompt.messages)

    @property
    def mean(self) -> float:
        """Mean advantage of its tokens, in nats: minus a single-sample estimate of the reverse KL to the teacher."""
        return math.fsum(self.advantages) / max(1, len(self.advantages))

    @property
    def verdict(self) -> str:
        """How much of it counted, and why not all of it."""
        counted = self.uncounted.count(None)
        text = f"{counted} of {len(self.tokens)} tokens counted"
        reasons = sorted({reason for reason in self.uncounted if reason is not None})
        return f"{text} ({'; '.join(reasons)})" if reasons else text


def of(kept: UpdatedRollout, decode: Callable[[Sequence[int]], str]) -> View:
    """``decode`` is the tokenizer's; a token without text, such as the one that ends a completion, is shown as ⏎."""
    completion = shards.rollout(kept).completion.tolist()
    known = shards.values(kept)
    given = known.get("advantage")
    if given is None and {"teacher_logprobs", "behav_logprobs"} <= known.keys():
        given = known["teacher_logprobs"] - known["behav_logprobs"]
    counts = kept.per_token.get("mask", torch.ones(len(completion))).tolist()
    if kept.dropped == shards.SEQUENCE_ERROR:
        reasons: list[str | None] = ["whole rollout dropped by objective.sequence_error_threshold"] * len(completion)
    elif kept.dropped == shards.STOPPED:
        reasons = ["a guard stopped the run before the update"] * len(completion)
    elif kept.dropped is not None:
        reasons = [f"whole rollout dropped by guard {kept.dropped}"] * len(completion)
    else:
        reasons = [None if counted else MASKED for counted in counts]
    return View(
        kept=kept,
        tokens=tuple(decode([token]) or "⏎" for token in completion),
        advantages=(0.0,) * len(completion) if given is None else tuple(given.tolist()),
        uncounted=tuple(reasons),
    )


def numbers(view: View) -> list[dict[str, float]]:
    """What is known of each token, by name, in the order shown; log-probabilities in nats.

    ``teacher``, ``student`` (at the update) and ``behaviour`` (when it was drawn) are log-probabilities.
    """
    known = shards.values(view.kept)
    found = {name: known[name] for name in known if name in _ORDER}
    if "teacher_logprobs" in known:
        found["teacher"] = known["teacher_logprobs"]
        if "log_ratio" in known:
            found["student"] = known["teacher_logprobs"] - known["log_ratio"]
    if "behav_logprobs" in known:
        found["behaviour"] = known["behav_logprobs"]
    if "policy_steps" in known:
        found["policy step"] = known["policy_steps"]
    names = sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    rows = zip(*(found[name].tolist() for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def heading(view: View) -> str:
    """Where the rollout comes from and what became of it, in a line."""
    plain = shards.rollout(view.kept)
    parts = [f"prompt {plain.prompt.id[:12]} sample {plain.sample}"]
    if view.teacher is not None:
        parts.append(f"teacher {view.teacher}")
    if plain.provenance is not None:
        parts.append(f"policy of step {plain.provenance.policy.step}")
    if plain.reward is not None:
        parts.append(f"reward {plain.reward:g}")
    parts += [f"mean advantage {view.mean:+.3f}", f"ended by {plain.finish}", view.verdict]
    return ", ".join(parts)


def text(view: View, scale: float) -> Text:
    """For the terminal: the heading, and a line of tokens on the colour of their advantage, those that did not count
    struck through."""
    example = Example(
        domain=shards.rollout(view.kept).prompt.domain,
        prompt=view.prompt,
        tokens=view.tokens,
        advantages=view.advantages,
    )
    line = screen.rollout_text(example, scale)
    stop = len(line)
    for token, reason in zip(reversed(view.tokens), reversed(view.uncounted), strict=True):
        start = stop - len(palette.visible(token))
        if reason is not None:
            line.stylize("strike", start, stop)
        stop = start
    return Text(f"{heading(view)}\n", style="dim") + line


def select(
    views: Sequence[View], domain: str | None = None, prompt: str | None = None, worst: int | None = None
) -> list[View]:
    """Those of a domain and of a prompt (its id or the beginning of it); ``worst`` many of the lowest mean advantage,
    lowest first."""
    chosen = [
        view
        for view in views
        if domain in (None, shards.rollout(view.kept).prompt.domain)
        and shards.rollout(view.kept).prompt.id.startswith(prompt or "")
    ]
    return chosen if worst is None else sorted(chosen, key=lambda view: view.mean)[:worst]


def scale(views: Sequence[View]) -> float:
    """The advantage that gets the full colour."""
    return palette.advantage_scale([advantage for view in views for advantage in view.advantages])
