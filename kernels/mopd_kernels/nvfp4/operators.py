"""Quantizing to NVFP4 and back, by the form that is chosen.

A format says everything that decides the bytes; ``impl`` only who computes them. Both forms give the same bytes. No
operator has a gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mopd_kernels.dispatch import DTYPES, Impl, choose, interpreting
from mopd_kernels.nvfp4 import reference
from mopd_kernels.nvfp4.format import DEFAULT, Format
from mopd_kernels.nvfp4.grids import BLOCK
from mopd_kernels.nvfp4.tensor import NVFP4Tensor


@torch.no_grad()
def quantize(x: Tensor, format: Format = DEFAULT, *, amax: Tensor | None = None, impl: Impl = "auto") -> NVFP4Tensor:
    """``x`` ``[R, K]`` (fp32, bf16 or fp16) in NVFP4, blocks along K.

    ``amax``: fp32 [], the largest magnitude to make the global scale for (after the Hadamard transform, if there is
    one); None computes it. Values above it saturate. Raises ValueError for a K that is no multiple of 16 without
    ``format.pad``, and for non-finite numbers where the numerics have no bytes for them.
    """
    check_matrix(x, x.shape, format, amax)
    return form("quantize", impl, x).quantize(x, format, amax)


@torch.no_grad()
def quantize_columns(
    x: Tensor, format: Format = DEFAULT, *, amax: Tensor | None = None, impl: Impl = "auto"
) -> NVFP4Tensor:
    """``x.T`` ``[K, R]`` in NVFP4, blocks along R: what :func:`quantize` makes of a transposed copy, without one."""
    check_matrix(x, x.shape[::-1], format, amax)
    return form("quantize_columns", impl, x).quantize_columns(x, format, amax)


@torch.no_grad()
def quantize_both(
    x: Tensor,
    rows: Format = DEFAULT,
    columns: Format = DEFAULT,
    *,
    amax: Tensor | None = None,
    columns_amax: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """:func:`quantize` in the format ``rows`` and :func:`quantize_columns` in ``columns``, from one read of ``x``."""
    check_matrix(x, x.shape, rows, amax)
    check_matrix(x, x.shape[::-1], columns, columns_amax)
    return form("quantize_both", impl, x).quantize_both(x, rows, columns, amax, columns_amax)


@torch.no_grad()
def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32, *, impl: Impl = "auto") -> Tensor:
    """``[R, K]`` in ``dtype``, as the ecosystem of ``t.numerics`` dequantizes; a Hadamard transform stays."""
    return form("dequantize", impl, t.codes, floats=False).dequantize(t, dtype)


@torch.no_grad()
def quantize_dequantize(
    x: Tensor, format: Format = DEFAULT, *, amax: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """What :func:`dequantize` makes of :func:`quantize`, in ``x``'s shape and dtype; a Hadamard transform stays."""
    check_matrix(x, x.shape, format, amax)
    return form("quantize_dequantize", impl, x).quantize_dequantize(x, format, amax)


@torch.no_grad()
def global_amax(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """fp32 []: the largest magnitude of ``x`` of any shape, 0 if it is empty; NaN if one is NaN."""
    return form("global_amax", impl, x).global_amax(x)


def check_matrix(x: Tensor, shape: tuple[int, ...], format: Format, amax: Tensor | None) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: NVFP4 takes a matrix of {', '.join(map(str, DTYPES))}")
    if shape[1] % BLOCK and not format.pad:
        raise ValueError(
            f"x of shape {list(x.shape)} has {shape[1]} elements along the blocks, which is no multiple of {BLOCK};"
            f" set Format.pad to fill with zeros"
        )
    if shape[1] % BLOCK and format.signs is not None:
        raise ValueError(
            f"x of shape {list(x.shape)} has {shape[1]} elements along the blocks and signs are given: the Hadamard"
            f" transform mixes {BLOCK} of them, so padding would not stay zero; pad x before quantizing"
        )
    if amax is not None and (amax.dtype != torch.float32 or amax.ndim or amax.device != x.device):
        raise ValueError(
            f"amax is {amax.dtype} {list(amax.shape)} on {amax.device}; expected torch.float32 [] on {x.device}"
        )


def form(operator: str, impl: Impl, *tensors: Tensor, floats: bool = True, limit: str | None = None) -> ModuleType:
    """The module, of functions of one signature, that runs ``operator`` on matrices ``tensors``; ``limit``: why the
    kernels do not take their shape, if so."""

    def unsupported() -> str | None:
        for tensor in tensors:
            if floats and tensor.dtype not in DTYPES:
                return f"dtype {tensor.dtype}; the kernels take {', '.join(str(d) for d in DTYPES)}"
            if tensor.ndim == 2 and tensor.stride(1) != 1:
                return f"strides {tensor.stride()} of {list(tensor.shape)}; rows must be dense: call contiguous()"
            if not tensor.is_cuda and not interpreting():
                return f"tensors on {tensor.device}; the kernels need CUDA, or TRITON_INTERPRET=1 for tests on CPU"
        return limit

    if choose(f"nvfp4.{operator}", impl, tensors[0].is_cuda, unsupported) == "reference":
        return reference
    from mopd_kernels.nvfp4 import triton_ops

    return triton_ops
