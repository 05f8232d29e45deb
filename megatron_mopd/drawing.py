"""Which token comes next: counter-based noise, and inverse-CDF sampling over a vocabulary split among ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.records import Prompt


def row_keys(seed: int, step: int, requests: Iterable[tuple[Prompt, int]], device: torch.device) -> Tensor:
    """One 64-bit key per (prompt, sample), int64 ``[b]``; it depends on nothing else but ``seed`` and ``step``."""
    digests = (hashlib.sha256(f"{seed}/{step}/{prompt.id}/{sample}".encode()).digest() for prompt, sample in requests)
    keys = [int.from_bytes(digest[:8], "little", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """Noise of one position: fp64 ``[b]`` in [0, 1) with 53 random bits, a function of key and position alone.

    A tensor of positions (int64) that broadcasts against ``keys`` gives the same numbers in the shape of both. The
    mixing function is SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    step = 0x9E3779B97F4A7C15
    ahead = (position + 1) * _signed(step) if isinstance(position, Tensor) else _signed((position + 1) * step)
    x = keys + ahead  # int64 arithmetic wraps
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


class Head:
    """The output layer as a distribution; columns from ``valid_vocab`` on are padding and never drawn.

    ``weight [V/tp, H]`` is this rank's share. The ranks of ``group`` call :meth:`draw` with the same arguments and get
    the same tokens: all know from the same gathered masses whose share a token lies in; that rank alone names it.
    """

    def __init__(self, weight: Tensor, group: dist.ProcessGroup, valid_vocab: int) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.start = self.rank * len(weight)
        # CPU's matrix product has no wider output type; logits rounded to bf16 would cost up to 0.06 nats.
        self.weight = weight if weight.is_cuda else weight.float()
        columns = torch.arange(self.start, self.start + len(weight), device=weight.device)
        self.padding = columns >= valid_vocab if self.start + len(weight) > valid_vocab else None

    def draw(self, hidden: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """From ``hidden [b, H]`` and ``noise [b]``: next tokens, int64 ``[b]``, and their fp32 log-probabilities.

        Log-softmax of logits / temperature over the valid vocabulary. Temperature 0 takes the most likely token (one of
        several equals) and gives its log-probability at temperature 1.
        """
        logits = self._logits(hidden, temperature or 1.0)
        peak, best = logits.max(dim=-1)
        cdf = (logits - peak.unsqueeze(-1)).double().exp().cumsum(-1)
        peaks, masses = self._gather(torch.stack([peak.double(), cdf[:, -1]])).unbind(1)  # [tp, b] each
        top = peaks.amax(0)
        masses = masses * (peaks - top).exp()
        ends = masses.cumsum(0)
        total = ends[-1]
        if temperature == 0:
            owner = (peaks < top).long().cumprod(0).sum(0)  # the first rank that holds the maximum
            column = best
        else:
            assert noise is not None
            point = torch.minimum(noise * total, total.nextafter(torch.zeros_like(total)))
            owner = (ends <= point).sum(0)
            offset = (point - (ends - masses)[self.rank]) * (top - peaks[self.rank]).exp()
            offset = torch.minimum(offset, cdf[:, -1].nextafter(torch.zeros_like(total)))
            column = torch.searchsorted(cdf, offset.unsqueeze(-1), right=True).squeeze(-1)
            column.clamp_(max=logits.shape[1] - 1)  # NaN finds no place; the caller refuses it by its log-probability
        chosen = logits.gather(1, column.unsqueeze(-1)).squeeze(-1).double() - top - total.log()
        drawn = self._from_owner(torch.stack([(column + self.start).double(), chosen]), owner)
        return drawn[0].long(), drawn[1].float()

    def probabilities(self, hidden: Tensor, temperature: float) -> Tensor:
        """The whole distribution of each row, fp64 ``[b, V]`` with the padding's zeros, the same on all ranks."""
        logits = self._gather(self._logits(hidden, temperature).double())
        return logits.transpose(0, 1).flatten(1).softmax(-1)

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """This rank's logits / temperature, fp32 ``[b, V/tp]``; padding gets the lowest number, a mass of 0."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.weight.t()
        logits = logits.div_(temperature)
        return logits if self.padding is None else logits.masked_fill_(self.padding, torch.finfo(logits.dtype).min)

    def _gather(self, part: Tensor) -> Tensor:
        if self.size == 1:
            return part.unsqueeze(0)
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind()), part, group=self.group)
        return parts

    def _from_owner(self, part: Tensor, owner: Tensor) -> Tensor:
        """``part [k, b]`` of the rank that owns each row, on all ranks; fp64 carries token numbers exactly."""
        if self.size > 1:
            part = part.where(owner == self.rank, 0.0)
            dist.all_reduce(part, group=self.group)
        return part
