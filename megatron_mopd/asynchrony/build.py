"""Which feed a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_mopd.asynchrony.feed import Feed, InlineFeed
from megatron_mopd.asynchrony.signs import Beacon
from megatron_mopd.asynchrony.worlds_feed import WorldsFeed
from megatron_mopd.config import Config
from megatron_mopd.in_flight import Item
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Rollout
from megatron_mopd.sources import DatasetSource, RolloutSource
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import ChatTokenizer
from megatron_mopd.update import Learner


def feed_of(
    config: Config,
    groups: Groups,
    tokenizer: ChatTokenizer,
    teachers: TeacherPool | None,
    source: DatasetSource | RolloutSource,
    learner: Learner,
    score: Callable[[list[Rollout]], Sequence[Item]],
    manifest: Callable[[], dict[str, Any]],
    beacon: Beacon | None = None,
) -> Feed:
    """The feed of ``config.asynchrony``. ``score`` is the inline one, timed; ``manifest`` says whose the learner's
    weights are; ``beacon`` are signs of life that began before, its own when left out."""
    if not isinstance(source, RolloutSource):
        return InlineFeed(source, score, lag=0)
    if config.asynchrony.mode == "worlds":
        return WorldsFeed(config, groups, tokenizer, teachers, source, learner, manifest, beacon)
    return InlineFeed(source, score, config.rollout.lag)
