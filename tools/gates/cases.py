"""What is compiled: calls of the public operators, as a training step and the benchmark make them.

What a kernel is specialised on agrees with the benchmark: dtypes, which tensors are there, widths of rows where host
code picks a launch by them, divisibility by 16 and alignment. Where torch itself computes with them shapes are small.
Values do not matter, since nothing runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from gates.nvfp4_cases import NVFP4_CASES

from mopd_kernels import (
    Surrogate,
    Tokens,
    linear_logprob,
    linear_objective,
    linear_statistics,
    linear_statistics_with_payload,
)
from mopd_kernels.divergence import Head, TopK, divergence
from mopd_kernels.divergence_reference import Kind
from mopd_kernels.logits import logit_objective, logit_statistics
from mopd_kernels.nvfp4 import TE_SIGNS, Format
from mopd_kernels.nvfp4.tensor import NVFP4Tensor, scale_shape

V = 131072  # the benchmark's vocabulary
ROWS = 16
SMALL = (256, 2048, 256)  # T, V, H of cases in which torch multiplies


@contextlib.contextmanager
def group_of(size: int) -> Iterator[dist.ProcessGroup | None]:
    """A tensor-parallel group of which only this rank exists; None for a size of 1."""
    if size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def lean_tokens(rows: int) -> Tokens:
    """One teacher, on policy, no mask: the benchmark's headline case."""
    zero = torch.zeros(rows)
    return Tokens(targets=zero.long(), behaviour=zero, teachers=zero, weight=zero)


def full_tokens(rows: int) -> Tokens:
    """Everything that may be known, of two teachers."""
    zero, two, mask = torch.zeros(rows), torch.zeros(2, rows), torch.ones(rows, dtype=torch.bool)
    return Tokens(
        targets=zero.long(),
        behaviour=zero,
        teachers=two,
        weight=zero,
        teacher_weights=two,
        prox=zero,
        outcome=zero,
        gate=mask,
        keep=mask,
    )


def statistics_of_logits(dtype: torch.dtype, width: int = V, ranks: int = 1, keep: bool = False) -> None:
    logits, targets = torch.empty(ROWS, width, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64)
    mask = torch.ones(ROWS, dtype=torch.bool) if keep else None
    with group_of(ranks) as group:
        logit_statistics(logits, targets, keep=mask, group=group, impl="triton")


def objective_of_logits(
    dtype: torch.dtype, width: int = V, ranks: int = 1, full: bool = False, gradient: bool = True
) -> None:
    """Forward in place, as on the output of a layer, and backward."""
    logits = torch.empty(ROWS, width, dtype=dtype, requires_grad=gradient) * 1
    tokens = full_tokens(ROWS) if full else lean_tokens(ROWS)
    settings = Surrogate(importance="clamp", advantage_clip=1.0) if full else Surrogate()
    with group_of(ranks) as group:
        found = logit_objective(logits, tokens, settings, inplace=True, group=group, impl="triton")
    if gradient:
        found.loss.backward()


def head_of(dtype: torch.dtype, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[T, H]`` and an output weight ``[V, H]``."""
    rows, width, size = SMALL
    return (
        torch.zeros(rows, size, dtype=dtype, requires_grad=gradient),
        torch.zeros(width, size, dtype=dtype, requires_grad=gradient),
    )


def logprob_of_head(dtype: torch.dtype) -> None:
    """Forward and backward."""
    hidden, weight = head_of(dtype, True)
    linear_logprob(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), impl="triton").sum().backward()


def statistics_of_head(dtype: torch.dtype) -> None:
    hidden, weight = head_of(dtype, False)
    linear_statistics(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), impl="triton")


def packed(x: torch.Tensor, swizzled: bool = False) -> NVFP4Tensor:
    """Zeros in NVFP4, of the shape of ``x``."""
    rows, width = x.shape
    scales = torch.zeros(scale_shape((rows, width), swizzled), dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.zeros(rows, width // 2, dtype=torch.uint8)
    return NVFP4Tensor(codes, scales, torch.ones(()), (rows, width), swizzled=swizzled)


def operands_of(
    hidden: bool, weight: bool, swizzled: bool = False, width: int | None = None
) -> Head[torch.Tensor | NVFP4Tensor]:
    """A head of which one or both operands are in NVFP4, the other in bf16."""
    states, rows = (x[:, :width] for x in head_of(BF16, False))
    return Head(packed(states, swizzled) if hidden else states, packed(rows, swizzled) if weight else rows)


def statistics_of_packed(hidden: bool, weight: bool, swizzled: bool = False, width: int | None = None) -> None:
    head = operands_of(hidden, weight, swizzled, width)
    linear_statistics(*head, torch.zeros(head.hidden.shape[0], dtype=torch.int64), impl="triton")


def payload_of_head(payload: Format, weight: bool = False) -> None:
    """Statistics and payload of bf16 hidden states; the weight in bf16 or NVFP4."""
    hidden, weights = operands_of(False, weight)
    assert isinstance(hidden, torch.Tensor)
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    linear_statistics_with_payload(hidden, weights, targets, payload, amax=torch.ones(()), impl="triton")


def objective_of_head(dtype: torch.dtype, ranks: int = 1, full: bool = False, gradient: bool = True) -> None:
    """Forward and backward, the weight's gradient in Megatron's ``main_grad``."""
    hidden, weight = head_of(dtype, gradient)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    tokens = full_tokens(len(hidden)) if full else lean_tokens(len(hidden))
    settings = Surrogate(importance="clamp", advantage_clip=1.0) if full else Surrogate()
    with group_of(ranks) as group:
        found = linear_objective(hidden, weight, tokens, settings, group=group, impl="triton")
    if gradient:
        found.loss.backward()


def divergence_of_packed(hidden: bool, weight: bool) -> None:
    """To a teacher of which one or both operands are in NVFP4."""
    divergence("reverse_kl", Head(*head_of(BF16, True)), operands_of(hidden, weight), impl="triton")


def divergence_of_heads(kind: Kind, dtype: torch.dtype, top_k: bool = False) -> None:
    hidden, weight = head_of(dtype, False)
    student = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    teacher = Head(hidden, weight)
    if top_k:
        teacher = TopK(torch.arange(64).repeat(len(hidden), 1), torch.full((len(hidden), 64), -5.0))
    divergence(kind, student, teacher, weight_grad=True, impl="triton").value.sum().backward()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES: dict[str, Callable[[], None]] = {
    "logits statistics, bf16": partial(statistics_of_logits, BF16),
    "logits statistics, fp32": partial(statistics_of_logits, FP32),
    "logits statistics, tp=4, masked": partial(statistics_of_logits, BF16, V // 4, 4, True),
    "logits objective, bf16": partial(objective_of_logits, BF16),
    "logits objective, bf16, everything": partial(objective_of_logits, BF16, full=True),
    "logits objective, bf16, no gradient": partial(objective_of_logits, BF16, gradient=False),
    "logits objective, bf16, V=65536": partial(objective_of_logits, BF16, V // 2),
    "logits objective, tp=4": partial(objective_of_logits, BF16, V // 4, 4),
    "logits objective, tp=4, everything": partial(objective_of_logits, BF16, V // 4, 4, True),
    "logits objective, fp32": partial(objective_of_logits, FP32),
    "linear statistics, bf16": partial(statistics_of_head, BF16),
    "linear logprob, bf16": partial(logprob_of_head, BF16),
    "linear statistics, fp16": partial(statistics_of_head, FP16),
    "linear logprob, fp32": partial(logprob_of_head, FP32),
    "linear statistics, NVFP4 weight": partial(statistics_of_packed, False, True),
    "linear statistics, NVFP4 hidden": partial(statistics_of_packed, True, False),
    "linear statistics, NVFP4 both": partial(statistics_of_packed, True, True),
    "linear statistics, NVFP4 both, swizzled": partial(statistics_of_packed, True, True, True),
    "linear statistics, NVFP4 both, H=240": partial(statistics_of_packed, True, True, width=240),
    "linear payload, bf16": partial(payload_of_head, Format(swizzled=True)),
    "linear payload, NVFP4 weight": partial(payload_of_head, Format(), True),
    "linear payload, bf16, stochastic": partial(payload_of_head, Format(rounding="stochastic", seed=1, signs=TE_SIGNS)),
    "linear payload, bf16, four over six": partial(payload_of_head, Format(four_over_six="mse")),
    "linear payload, NVFP4 weight, four over six": partial(payload_of_head, Format(four_over_six="mse"), True),
    "linear objective, bf16": partial(objective_of_head, BF16),
    "linear objective, bf16, everything": partial(objective_of_head, BF16, full=True),
    "linear objective, bf16, no gradient": partial(objective_of_head, BF16, gradient=False),
    "linear objective, bf16, tp=4": partial(objective_of_head, BF16, 4),
    "divergence reverse_kl, bf16": partial(divergence_of_heads, "reverse_kl", BF16),
    "divergence forward_kl, bf16": partial(divergence_of_heads, "forward_kl", BF16),
    "divergence jsd, bf16": partial(divergence_of_heads, "jsd", BF16),
    "divergence forward_kl, bf16, top-k": partial(divergence_of_heads, "forward_kl", BF16, top_k=True),
    "divergence reverse_kl, fp32": partial(divergence_of_heads, "reverse_kl", FP32),
    "divergence reverse_kl, NVFP4 weight": partial(divergence_of_packed, False, True),
    "divergence reverse_kl, NVFP4 hidden": partial(divergence_of_packed, True, False),
    "divergence reverse_kl, NVFP4 both": partial(divergence_of_packed, True, True),
    **NVFP4_CASES,
}
