"""Which sequences of a rollout count, and which sequence a token belongs to, as pure functions.

Masks are bool ``[T]``, true where a token stays. The m_t of single tokens is :func:`mopd_kernels.surrogate`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def agreeing_sequences(log_importance: Tensor, cu_seqlens: Tensor, threshold: float) -> Tensor:
    """Tokens of sequences whose mean ``exp|log c_t|`` over their own tokens is at most ``threshold`` (1 = engines
    agree).

    ``log_importance`` is log c_t ``[T]``, ``cu_seqlens`` int64 ``[b + 1]``. The measure and its use are those of
    NeMo-RL's ``seq_logprob_error_threshold``.
    """
    lengths = cu_seqlens.diff()
    sequence = segments(cu_seqlens, len(log_importance))
    error = log_importance.new_zeros(len(lengths)).index_add_(0, sequence, log_importance.abs().exp())
    return (error <= threshold * lengths)[sequence]


def segments(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 ``[tokens]``: the row of the micro-batch each completion token belongs to."""
    rows = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return rows.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
