"""An endless stream over prompts or dataset rows: domains mixed by weight, each reshuffled every epoch of its own.

What comes next is a function of (items, weights, seed, how many of each domain were taken), so the state is a few
integers and resuming in the middle of an epoch is exact.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.records import Prompt, Rollout
from megatron_mopd.settings import nearest


class PromptStream[T: (Prompt, Rollout)]:
    """Deterministic batches of ``items``.

    ``weights`` are relative; a domain left out has weight 1, one of weight 0 never comes. After any number of batches
    each domain's count is within one per domain of its exact share. Raises :class:`ConfigurationError` for no items, a
    weight of a domain without items, and weights that are all 0.
    """

    def __init__(self, items: Sequence[T], weights: Mapping[str, float], seed: int):
        self._items: dict[str, list[T]] = {}
        for item in items:
            self._items.setdefault(_prompt(item).domain, []).append(item)
        self._weights = _shares(self._items, weights)
        self._seed = seed
        self._digest = _digest(items)
        self._taken = dict.fromkeys(self._weights, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def take(self, n: int) -> list[T]:
        """The next ``n`` items. Their order is shuffled, so that any stride over a batch sees every domain."""
        start = sum(self._taken.values())
        batch = [self._next(self._most_behind(start + i + 1)) for i in range(n)]
        random.Random(f"{self._seed}/batch/{start}").shuffle(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: how many items of each domain were taken, and a digest of the data they were taken from."""
        return {"taken": dict(self._taken), "digest": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream that gave ``state`` stood; :class:`ConfigurationError` if its data were others."""
        if state["digest"] != self._digest or state["taken"].keys() != self._taken.keys():
            raise ConfigurationError(
                f"data.train: the training data are not those of the checkpoint (digest {self._digest[:12]}, checkpoint"
                f" {state['digest'][:12]}); restore data and weights, or start a new run with model.initial"
            )
        self._taken = {domain: int(count) for domain, count in state["taken"].items()}

    def _most_behind(self, total: int) -> str:
        return max(self._weights, key=lambda domain: self._weights[domain] * total - self._taken[domain])

    def _next(self, domain: str) -> T:
        items = self._items[domain]
        epoch, position = divmod(self._taken[domain], len(items))
        if self._orders.get(domain, (-1, []))[0] != epoch:
            order = list(range(len(items)))
            random.Random(f"{self._seed}/{domain}/{epoch}").shuffle(order)
            self._orders[domain] = (epoch, order)
        self._taken[domain] += 1
        return items[self._orders[domain][1][position]]


def _prompt(item: Prompt | Rollout) -> Prompt:
    return item.prompt if isinstance(item, Rollout) else item


def _shares(items: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, float]:
    if not items:
        raise ConfigurationError("data.train: no prompts; name at least one source")
    for domain in weights:
        if domain not in items:
            hint = nearest(domain, sorted(items))
            raise ConfigurationError(f"data.weights.{domain}: no prompt of data.train has this domain{hint}")
    relative = {domain: float(weights.get(domain, 1.0)) for domain in sorted(items)}
    total = sum(relative.values())
    if total <= 0:
        raise ConfigurationError(
            f"data.weights = {dict(weights)}: all weights are 0; give at least one domain a positive one"
        )
    return {domain: weight / total for domain, weight in relative.items() if weight > 0}


def _digest(items: Sequence[Prompt | Rollout]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(_prompt(item).id.encode())
        if isinstance(item, Rollout):
            digest.update(item.completion.numpy().tobytes())
    return digest.hexdigest()
