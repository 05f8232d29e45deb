"""Quantizing to NVFP4 and back: what to make as a value, and which form makes it.

A format says everything that decides the bytes; ``impl`` only who computes them. Both forms give the same bytes. No
operator has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mopd_kernels.dispatch import DTYPES, Impl, choose, interpreting
from mopd_kernels.nvfp4 import numerics as modes
from mopd_kernels.nvfp4 import reference
from mopd_kernels.nvfp4.four_over_six import ERRORS
from mopd_kernels.nvfp4.grids import BLOCK, E4M3_MAX
from mopd_kernels.nvfp4.numerics import Name
from mopd_kernels.nvfp4.tensor import NVFP4Tensor


@dataclass(frozen=True)
class Format:
    """What a quantized matrix is to be; blocks lie along its rows.

    ``numerics``: whose bytes. ``block``: "1x16", or "16x16", one scale for a square (repeated in each of its rows; the
    last square of a matrix whose rows are no multiple of 16 is shorter). ``swizzled``: scales in cuBLAS's 128x4 layout.
    ``rounding``: "nearest" (ties to even) or "stochastic", which alone takes, and needs, a ``seed`` of 0..2^63 - 1.
    ``signs``: 16 of 1 and -1 for the random Hadamard transform, or None. ``four_over_six``: the error that chooses
    between a block's two scales, or None. ``pad``: fill K with zeros to a multiple of 16 instead of refusing.

    Raises ValueError for a value or a combination that has no meaning.
    """

    numerics: Name = "te"
    block: Literal["1x16", "16x16"] = "1x16"
    swizzled: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int | None = None
    signs: tuple[int, ...] | None = None
    four_over_six: Literal["mae", "mse", "max"] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        mode = modes.named(self.numerics)
        for field, allowed in (
            ("block", ("1x16", "16x16")),
            ("rounding", ("nearest", "stochastic")),
            ("four_over_six", (None, *ERRORS)),
        ):
            if (value := self.__dict__[field]) not in allowed:
                raise ValueError(f"{field} = {value!r}: expected one of {', '.join(map(str, allowed))}")
        if self.rounding == "stochastic" and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed = {self.seed!r}: rounding = 'stochastic' needs an integer of 0..2^63 - 1")
        if self.rounding == "nearest" and self.seed is not None:
            raise ValueError(f"seed = {self.seed!r}: rounding = 'nearest' draws nothing; set rounding = 'stochastic'")
        if self.signs is not None and (len(self.signs) != BLOCK or set(self.signs) - {1, -1}):
            raise ValueError(f"signs = {self.signs!r}: the Hadamard transform takes {BLOCK} of 1 and -1")
        if self.four_over_six is None:
            return
        if not mode.pair:
            having = ", ".join(name for name, other in modes.MODES.items() if other.pair)
            raise ValueError(f"four_over_six = {self.four_over_six!r}: numerics = {self.numerics!r} has none; {having}")
        for other, value in (
            ("signs", self.signs),
            ("rounding", None if self.rounding == "nearest" else self.rounding),
        ):
            if value is not None:
                raise ValueError(
                    f"four_over_six = {self.four_over_six!r} with {other} = {value!r}: Transformer Engine has no such"
                    f" combination; leave one of them out"
                )

    @property
    def bound(self) -> float:
        """The E4M3 value that the block of the tensor's largest element is to get: 448, or 256 with four-over-six."""
        return E4M3_MAX if self.four_over_six is None else modes.FOUR_OVER_SIX_BOUND


DEFAULT = Format()


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
