"""Formulas of NeMo RL, verl and plain torch for what the kernels do, written anew from their descriptions.

On one rank, without the collectives that theirs run. All are differentiable and are held to fp64 by
``tests/test_bench_kernels.py``, so that they may serve as opponents and as oracles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def eager_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``(logprob, entropy)``, fp32 ``[n]``, through an fp32 log-softmax of everything; differentiable."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def verl_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """verl's path for given logits without flash-attn: a log-softmax for each sequence (here of 2048 tokens), and the
    entropy in a pass of its own."""
    parts = zip(logits.split(2048), targets.split(2048), strict=True)
    logprob = torch.cat([part.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for part, ids in parts])
    wide = logits.float()
    return logprob, wide.logsumexp(-1) - (wide.softmax(-1) * wide).sum(-1)


class NemoLogprob(torch.autograd.Function):
    """NeMo RL's chunked log-probability of given logits: an fp32 log-softmax for each chunk of rows, made again in
    backward, whose gradient is a one-hot matrix of int64 less the probabilities."""

    CHUNK = 1024

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return torch.cat(
            [
                part.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
                for part, ids in zip(logits.split(NemoLogprob.CHUNK), targets.split(NemoLogprob.CHUNK), strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        parts = [
            _one_hot_gradient(part.float().log_softmax(-1), ids, g).to(logits.dtype)
            for part, ids, g in zip(*(x.split(NemoLogprob.CHUNK) for x in (logits, targets, grad)), strict=True)
        ]
        return torch.cat(parts), None


class NemoHead(torch.autograd.Function):
    """NeMo RL's log-probabilities from hidden states: fp32 logits for each chunk of rows, made again in backward, with
    both products of the gradient in fp32."""

    CHUNK = 256

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(hidden), NemoHead.CHUNK):
            log_p = (hidden[rows] @ weight.T).float().log_softmax(-1)
            logprob[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
        return logprob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        wide = weight.float()
        for rows in _chunks(len(hidden), NemoHead.CHUNK):
            log_p = (hidden[rows] @ weight.T).float().log_softmax(-1)
            d_logits = _one_hot_gradient(log_p, targets[rows], grad[rows])
            d_hidden[rows] = (d_logits @ wide).to(hidden.dtype)
            d_weight += d_logits.T @ hidden[rows].float()
        return d_hidden, d_weight.to(weight.dtype), None


class VerlHead(torch.autograd.Function):
    """verl's fused linear for PPO in torch: log-probability and entropy from chunks of 512 rows, fp32 softmax of the
    logits in the model's dtype, nothing kept, both products of the gradient in the model's dtype."""

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.set_materialize_grads(False)
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob)
        for rows in _chunks(len(hidden), VerlHead.CHUNK):
            logits = (hidden[rows] @ weight.T).float()
            lse = logits.logsumexp(-1)
            logprob[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse
            entropy[rows] = lse - (logits.softmax(-1) * logits).sum(-1)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _chunks(len(hidden), VerlHead.CHUNK):
            log_p = (hidden[rows] @ weight.T).float().log_softmax(-1)
            p = log_p.exp()
            d_logits = torch.zeros_like(p)
            if d_logprob is not None:
                d_logits -= p * d_logprob[rows, None]
                d_logits.scatter_add_(-1, targets[rows, None], d_logprob[rows, None])
            if d_entropy is not None:
                entropy = -(p * log_p).sum(-1, keepdim=True)
                d_logits -= d_entropy[rows, None] * p * (log_p + entropy)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            d_weight += d_logits.T @ hidden[rows]
        return d_hidden, d_weight, None


def chunked_reverse_kl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """NeMo RL's full-vocabulary reverse KL from a teacher's hidden states, fp32 ``[T]``: eager torch on chunks of 1024
    rows that keep nothing for backward; differentiable in the student."""

    def rows_of(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = (student @ weight.T).float().log_softmax(-1)
        log_q = (teacher @ teacher_weight.T).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    parts = zip(hidden.split(1024), teacher_hidden.split(1024), strict=True)
    return torch.cat([checkpoint(rows_of, student, teacher, use_reentrant=False) for student, teacher in parts])


def _one_hot_gradient(log_p: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    hot = torch.nn.functional.one_hot(targets, log_p.shape[-1])
    return (hot - log_p.exp()) * grad[:, None]


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]
