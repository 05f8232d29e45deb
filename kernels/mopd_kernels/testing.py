"""What tests of the operators share: inputs, the fp64 truth, shards with poisoned padding, a comparison of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mopd_kernels.objective import Tokens


def exact_log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float = 1.0, valid_vocab: int | None = None
) -> Tensor:
    """fp64 ``[T, V]`` log-probabilities from the whole weight ``[V, H]``; differentiable, small shapes only."""
    return (hidden.double() @ weight[:valid_vocab].double().T / temperature).log_softmax(-1)


def exact_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, valid_vocab: int | None = None
) -> Tensor:
    """fp64 ``[T]``: what :func:`mopd_kernels.linear_logprob` approximates."""
    return exact_log_softmax(hidden, weight, temperature, valid_vocab).gather(1, targets[:, None])[:, 0]


def exact_reverse_kl(student_log_p: Tensor, teacher_log_p: Tensor) -> Tensor:
    """fp64 ``[T]``: KL(student || teacher) of two ``[T, V]`` log-probabilities."""
    return (student_log_p.exp() * (student_log_p - teacher_log_p)).sum(-1)


def shard(weight: Tensor, rank: int, size: int) -> Tensor:
    """Rows of ``weight [V, H]`` that vocabulary-parallel ``rank`` holds, with NaN in the rows that pad V to a
    multiple."""
    rows = -(-len(weight) // size)
    padded = weight.new_full((rows * size, weight.shape[1]), float("nan"))
    padded[: len(weight)] = weight.detach()
    return padded[rank * rows : (rank + 1) * rows].clone()


def tokens_around(logprob: Tensor, targets: Tensor, teachers: int = 1, seed: int = 0, **changes: Any) -> Tokens:
    """What is known of rows whose true log-probabilities are ``logprob [T]``: c_t beyond its bounds, both signs of A.

    ``changes`` replace fields of :class:`Tokens`.
    """
    generator = torch.Generator().manual_seed(seed)
    base, rows = logprob.float().detach(), len(targets)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fields = {
        "targets": targets,
        "behaviour": base + 0.9 * draw(rows),
        "teachers": base + draw(teachers, rows),
        "weight": draw(rows).abs() / max(1, rows),
        "teacher_weights": draw(teachers, rows).softmax(0) if teachers > 1 else None,
        "prox": base + 0.2 * draw(rows),
    }
    return Tokens(**(fields | changes))


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor, slack: float, name: str = "value") -> None:
    """Our largest error against the fp64 truth is at most that of plain low-precision torch, plus ``slack``."""
    error = (ours.double() - truth).abs()
    allowed = float((plain.double() - truth).abs().max()) + slack
    worst = int(error.flatten().argmax())
    assert float(error.max()) <= allowed, (
        f"{name}: error {float(error.max()):.3e} at flat index {worst} exceeds {allowed:.3e};"
        f" ours {ours.flatten()[worst]}, plain {plain.flatten()[worst]}, truth {truth.flatten()[worst]}"
    )


class LargestTensor(TorchDispatchMode):
    """Context that records the most elements any operator returned (of ``dtype``, if given): proof that something is
    never materialised."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.elements = 0
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and self.dtype in (None, value.dtype):
                self.elements = max(self.elements, value.numel())
        return result
