"""Launches the kernels of divergence_kernels.py: the divergences' work on a chunk of logits (divergence_chunks.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopd_kernels import divergence_kernels as kernels
from mopd_kernels.divergence_reference import KINDS, Kind, merge
from mopd_kernels.divergence_rows import Rows
from mopd_kernels.linear_operands import Operand
from mopd_kernels.linear_tiles import packed_logits
from mopd_kernels.products import product

SPAN = 1 << 15
"""Columns of a row that one program takes: a full chunk then makes about 1000 programs, 8 for each SM of an H100."""
WARPS = 4
UNROLL = 4  # 16-byte loads of each tensor that a thread has in flight
VECTOR = 4  # fp32 logits in 16 bytes
JSD_REGISTERS = 64  # per thread at most, so that 1024 threads share an SM; left alone, ptxas takes 70 for sm_100
ALIGNMENT = 16  # logits; rows start at its multiples, for wide loads and for cuBLAS's fast kernels at any vocabulary
SUPPORT_BLOCK = 128


def logits(hidden: Operand, weight: Operand) -> Tensor:
    out = _block_of(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        return product(hidden, weight.T, out=out)
    return packed_logits(hidden, weight, out)


def statistics(first: Tensor, second: Tensor | None, temperature: float) -> Tensor:
    parts = first.new_empty(_splits(first), 1 if second is None else 3, len(first))
    _launch(kernels.statistics_kernel, first, temperature, first=first, second=second, parts=parts, **_lanes())
    if len(parts) == 1:
        return parts[0]
    return merge(parts) if second is not None else parts.logsumexp(0)


def jsd_sums(student: Tensor, teacher: Tensor, student_lse: Tensor, teacher_lse: Tensor, temperature: float) -> Tensor:
    sums = student.new_empty(_splits(student), 2, len(student))
    _launch(
        kernels.jsd_sums_kernel,
        student,
        temperature,
        student=student,
        teacher=teacher,
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        sums=sums,
        **_lanes(),
        maxnreg=JSD_REGISTERS,
    )
    return sums.sum(0)


def dense_gradient(
    kind: Kind, student: Tensor, teacher: Tensor, rows: Rows, scale: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    return _gradient(student, teacher, KINDS.index(kind), rows, scale, temperature, dtype)


def sparse_gradient(
    student: Tensor,
    rows: Rows,
    values: Tensor,
    columns: Tensor,
    here: Tensor,
    scale: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    gradient = _gradient(student, None, 0, rows, scale, temperature, dtype)
    n, k = values.shape
    if n:
        launch: Any = kernels.support_kernel[(n, _ceil(k, SUPPORT_BLOCK))]
        local, held = columns.contiguous(), here.contiguous()
        launch(local, held, values.contiguous(), gradient, k=k, stride=gradient.stride(0), BLOCK=SUPPORT_BLOCK)
    return gradient


def _gradient(
    student: Tensor,
    teacher: Tensor | None,
    kind: int,
    rows: Rows,
    scale: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    gradient = student if dtype == student.dtype else _block_of(*student.shape, dtype=dtype, device=student.device)
    _launch(
        kernels.gradient_kernel,
        student,
        temperature,
        student=student,
        teacher=teacher,
        student_lse=rows.student_lse,
        teacher_lse=rows.teacher_lse,
        slope_sum=rows.slope,
        scale=scale,
        gradient=gradient,
        KIND=kind,
        BLOCK=32 * WARPS * UNROLL * VECTOR,
    )
    return gradient


def _launch(kernel: Any, logits: Tensor, temperature: float, **arguments: Any) -> None:
    """``kernel`` over all spans of ``logits``, whose layout its other blocks share."""
    n, columns = logits.shape
    if n:
        sizes = {"columns": columns, "stride": logits.stride(0), "inverse_temperature": 1 / temperature, "SPAN": SPAN}
        kernel[(n, _splits(logits))](**arguments, **sizes, num_warps=WARPS)


def _block_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, columns]`` whose rows are aligned, whatever the number of columns."""
    width = _ceil(columns, ALIGNMENT) * ALIGNMENT
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :columns]


def _splits(logits: Tensor) -> int:
    return max(1, _ceil(logits.shape[1], SPAN))


def _lanes() -> dict[str, int]:
    return {"UNROLL": UNROLL, "LANES": 32 * WARPS, "VECTOR": VECTOR}


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
