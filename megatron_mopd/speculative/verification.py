"""How much of a draft stands: exact for greedy decoding, and by rejection for sampling.

Sampling follows Leviathan et al. 2023 ("Fast inference from transformers via speculative decoding", arXiv 2211.17192,
algorithm 1) and Chen et al. 2023 (arXiv 2302.01318): a drafted token d stands with probability min(1, p(d) / q(d)), p
the backbone's distribution and q the drafter's; in the place of the first that falls comes a draw from the normalised
max(p - q, 0). Then every token is distributed as the backbone's own draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mopd.drawing import Head, uniforms

STREAMS = 3  # of noise for each position: of the draft, of its acceptance, of what takes its place


class Greedy:
    """Drafted tokens stand as long as each is the backbone's most likely one."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def first(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """The first token of each row, int64 ``[b]``, from the backbone's ``hidden [b, H]``."""
        return self._likeliest(hidden)

    def pick(self, hidden: Tensor, place: int, keys: Tensor, counts: Tensor) -> Tensor:
        """The drafted token at ``place`` (int64 ``[b]``) from the block's ``hidden [b, H]``; rows have ``counts [b]``
        tokens already, and noise of ``keys [b]``."""
        return self.head.draw(hidden, 0.0, None)[0]

    def verify(self, hidden: Tensor, drafted: Tensor, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens of ``drafted [b, k]`` stand, int64 ``[b]``, and the token that follows them, from the
        backbone's states ``[k + 1, b, H]`` before each drafted token and behind the last."""
        wanted = self._likeliest(hidden.flatten(0, 1)).view(hidden.shape[:2]).t()  # [b, k + 1]
        accepted = (wanted[:, :-1] == drafted).long().cumprod(1).sum(1)
        return accepted, wanted.gather(1, accepted.unsqueeze(1)).squeeze(1)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        tokens, logprobs = self.head.draw(hidden, 0.0, None)
        return _finite(tokens, logprobs)


class Sampled:
    """Drafted tokens are drawn from the drafter's distribution and stand by the rejection rule; methods as those of
    :class:`Greedy`."""

    def __init__(self, head: Head, temperature: float) -> None:
        self.head, self.temperature = head, temperature
        self.proposed: list[Tensor] = []  # the drafter's distribution at each place, [b, V]

    def first(self, hidden: Tensor, keys: Tensor) -> Tensor:
        p = self.head.probabilities(hidden, self.temperature)
        return _finite(_drawn(p, uniforms(keys, 2)), p)

    def pick(self, hidden: Tensor, place: int, keys: Tensor, counts: Tensor) -> Tensor:
        q = self.head.probabilities(hidden, self.temperature)
        self.proposed = [*self.proposed[:place], q]
        return _drawn(q, uniforms(keys, STREAMS * (counts + place)))

    def verify(self, hidden: Tensor, drafted: Tensor, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        places, rows = hidden.shape[:2]
        p = self.head.probabilities(hidden.flatten(0, 1), self.temperature).unflatten(0, (places, rows)).transpose(0, 1)
        q = torch.stack([*self.proposed, torch.zeros_like(self.proposed[0])], dim=1)  # behind the draft nothing falls
        at = counts.unsqueeze(1) + torch.arange(places, device=counts.device)
        noise = uniforms(keys.unsqueeze(1), STREAMS * at + 1)[:, :-1]
        mine, theirs = (x[:, :-1].gather(2, drafted.unsqueeze(2)).squeeze(2) for x in (p, q))
        accepted = (noise * theirs < mine).long().cumprod(1).sum(1)
        which = torch.arange(rows, device=counts.device)
        rest = (p[which, accepted] - q[which, accepted]).clamp(min=0)
        # Without a difference nothing could have fallen but by rounding; the backbone's own draw is right then.
        rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p[which, accepted])
        following = _drawn(rest, uniforms(keys, STREAMS * (counts + accepted) + 2))
        return accepted, _finite(following, p)


def _drawn(weights: Tensor, noise: Tensor) -> Tensor:
    """One column of each row of ``weights [b, V]`` (not negative) in proportion to it, int64 ``[b]``; fp64 noise."""
    edges = weights.cumsum(1)
    total = edges[:, -1]
    point = torch.minimum(noise * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(edges, point.unsqueeze(1), right=True).squeeze(1)
    return found.clamp(max=weights.shape[1] - 1)  # NaN finds no place; the caller refuses it


def _finite(tokens: Tensor, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise FloatingPointError("the model's log-probabilities are not finite; its weights have diverged")
    return tokens
