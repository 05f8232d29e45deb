"""Launches the NVFP4 kernels: the forms of reference.py's functions on CUDA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopd_kernels.device import device_properties
from mopd_kernels.nvfp4 import numerics as modes
from mopd_kernels.nvfp4 import triton_kernels as kernels
from mopd_kernels.nvfp4 import triton_norm as norm
from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.grids import BLOCK
from mopd_kernels.nvfp4.tensor import NVFP4Tensor, padded, scale_shape
from mopd_kernels.nvfp4.triton_numerics import Kind

A, B, WARPS = 128, 4, 4
"""A tile is one of swizzled scales; its 64 elements a thread are 128 bytes in flight in bf16."""
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
TILE: dict[str, Any] = EXACT | {"A": A, "B": B, "num_warps": WARPS}
FLAT = 8192  # elements of a block of flat_amax_kernel
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
E2M1_ON = 10
"""Major compute capability from which on the device converts to E2M1."""


@dataclass(frozen=True)
class Operand:
    """What is quantized: a matrix, or its transpose, as the kernels see it."""

    x: Tensor
    format: Format
    columns: bool = False
    producer: str | None = None
    norm: tuple[Tensor, Tensor] | None = None  # rstd and weight of "rms_norm"

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.x.shape
        return (width, rows) if self.columns else (rows, width)

    @property
    def blocks(self) -> int:
        return padded(self.shape[1], BLOCK) // BLOCK

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements that blocks are made of."""
        return self.x.dtype if self.format.signs is None else torch.bfloat16

    @property
    def kind(self) -> Kind:
        signs, numerics = self.format.signs, self.format.numerics
        return Kind(
            numerics=numerics,
            bound=self.format.bound,
            square=self.format.block == "16x16",
            stochastic=self.format.rounding == "stochastic",
            signs=None if signs is None else sum(1 << place for place, sign in enumerate(signs) if sign < 0),
            error=self.format.four_over_six,
            dtype=TYPES[self.dtype],
            # torchao's codes of NaN are its own.
            hardware=device_properties(self.x.device)[0] >= E2M1_ON and numerics != "torchao",
            ragged=self.shape[1] % BLOCK != 0,
            producer=self.producer,
        )

    @property
    def light(self) -> bool:
        """Whether registers suffice for 64 elements a thread with others beside them on the multiprocessor."""
        return self.format.rounding == "nearest" and self.format.four_over_six is None

    @property
    def arguments(self) -> dict[str, Any]:
        rstd, weight = self.norm or (None, None)
        return {
            "x": self.x,
            "rstd": rstd,
            "weight": weight,
            "rows": self.shape[0],
            "width": self.shape[1],
            "stride": self.x.stride(0),
            "blocks": self.blocks,
            "COLUMNS": self.columns,
            "KIND": self.kind,
        }

    def grid(self, rows: int, blocks: int) -> tuple[int]:
        return (-(-self.shape[0] // rows) * -(-self.blocks // blocks),)

    def amax(self) -> Tensor:
        """fp32 []: the amax that the format makes the global scale for, computed."""
        numbers = self.format.numerics == "te"
        if self.format.signs is None and self.producer is None and self.x.is_contiguous():
            return flat_amax(self.x, numbers)
        amax = torch.zeros((), dtype=torch.int32, device=self.x.device)
        if self.x.numel():
            arguments = self.arguments | {"KIND": replace(self.kind, square=False)}
            kernels.tile_amax_kernel[self.grid(A, B)](amax=amax, **arguments, **TILE)
        return amax.view(torch.float32)


class Target:
    """Memory for what an operand is quantized to, and the numbers that go into it."""

    def __init__(self, operand: Operand, amax: Tensor | None, *, packed: bool = True, zeroed: bool = False) -> None:
        self.operand, format = operand, operand.format
        mode, device = modes.named(format.numerics), operand.x.device
        self.amax = operand.amax() if amax is None else amax
        self.global_scale = mode.global_scale(self.amax, format.bound, operand.dtype)
        self.flag = torch.zeros((), dtype=torch.int32, device=device) if mode.refuses_nonfinite else None
        rows, blocks = operand.shape[0], operand.blocks
        if packed:
            self.codes = torch.empty(rows, 8 * blocks, dtype=torch.uint8, device=device)
            shape = scale_shape(operand.shape, format.swizzled)
            allocate = torch.zeros if zeroed and shape != scale_shape(operand.shape, False) else torch.empty
            self.scales = allocate(shape, dtype=torch.uint8, device=device)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "amax": self.amax,
            "global_scale": self.global_scale,
            "codes": self.codes.view(torch.int32),
            "scales": self.scales,
            "flag": self.flag,
            "seed": self.operand.format.seed or 0,
        }

    def check(self) -> None:
        """Raises ValueError where the numerics have no bytes for what was met."""
        if self.flag is None or not self.operand.x.numel():
            return
        name = self.operand.format.numerics
        if not torch.isfinite(self.global_scale):
            raise ValueError(
                f"x of shape {list(self.operand.shape)} has amax = {self.amax.item()}: numerics = {name!r} has no"
                f" finite global scale for it; te takes it"
            )
        if self.flag:
            raise ValueError(
                f"x has a non-finite element: numerics = {name!r} has no code for it; te, torchao and modelopt have"
            )

    def tensor(self) -> NVFP4Tensor:
        self.check()
        format = self.operand.format
        return NVFP4Tensor(
            codes=self.codes,
            scales=self.scales.view(torch.float8_e4m3fn),
            global_scale=self.global_scale,
            shape=self.operand.shape,
            numerics=format.numerics,
            swizzled=format.swizzled,
            bound=format.bound,
            transformed=format.signs,
        )


def quantize(x: Tensor, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize`."""
    return quantize_operand(Operand(x, format), amax)


def quantize_columns(x: Tensor, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize_columns`."""
    return quantize_operand(Operand(x, format, columns=True), amax)


def quantize_operand(operand: Operand, amax: Tensor | None) -> NVFP4Tensor:
    target = Target(operand, amax)
    if operand.x.numel():
        arguments = operand.arguments | target.arguments | {"SWIZZLED": operand.format.swizzled}
        kernels.quantize_kernel[operand.grid(A, B)](**arguments, **TILE)
    return target.tensor()


def squared_relu_quantize(x: Tensor, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.squared_relu_quantize`."""
    return quantize_operand(Operand(x, format, producer="squared_relu"), amax)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.rms_norm_quantize`. A row is quantized as soon as it is normed where its global
    scale is known and no square of 16 rows is waited for; else statistics come first and tiles after."""
    row = _row(x, weight, eps, format)
    if amax is not None and format.block == "1x16":
        row["SWIZZLED"] = format.swizzled
        target = Target(Operand(x, format), amax, zeroed=format.swizzled)
        if x.numel():
            norm.norm_quantize_kernel[(len(x),)](**row, **target.arguments)
        return target.tensor()
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    found = torch.zeros((), dtype=torch.int32, device=x.device) if amax is None else None
    if x.numel():
        norm.norm_statistics_kernel[(len(x),)](rstd=rstd, amax=found, **row)
    made = Operand(x, format, producer="rms_norm", norm=(rstd, weight.contiguous()))
    return quantize_operand(made, found.view(torch.float32) if found is not None else amax)


def _row(x: Tensor, weight: Tensor, eps: float, format: Format) -> dict[str, Any]:
    """Arguments of the kernels that hold a row."""
    plain = Operand(x, format)
    blocks = triton.next_power_of_2(plain.blocks)
    return {
        "x": x,
        "weight": weight.contiguous(),
        "eps": eps,
        "width": x.shape[1],
        "stride": x.stride(0),
        "blocks": plain.blocks,
        "B": blocks,
        "KIND": replace(plain.kind, square=False),
        "num_warps": max(1, min(16, blocks // 128)),
        **EXACT,
    }


def quantize_both(
    x: Tensor, rows: Format, columns: Format, amax: Tensor | None = None, columns_amax: Tensor | None = None
) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """See :func:`mopd_kernels.nvfp4.quantize_both`."""
    across, down = Operand(x, rows), Operand(x, columns, columns=True)
    first, second = Target(across, amax), Target(down, columns_amax)
    order = ("amax", "global_scale", "codes", "scales", "flag", "seed")
    if x.numel():
        arguments: dict[str, Any] = {
            "x": x,
            "of_rows": tuple(first.arguments[name] for name in order),
            "of_columns": tuple(second.arguments[name] for name in order),
            "R": x.shape[0],
            "K": x.shape[1],
            "stride": x.stride(0),
            "row_blocks": across.blocks,
            "column_blocks": down.blocks,
            "A": A,
            "ROWS_SWIZZLED": rows.swizzled,
            "COLUMNS_SWIZZLED": columns.swizzled,
            "ROWS": across.kind,
            "COLUMNS": down.kind,
            "num_warps": 2 * WARPS if across.light and down.light else 4 * WARPS,
        }
        kernels.quantize_both_kernel[(-(-x.shape[0] // A) * -(-x.shape[1] // A),)](**arguments, **EXACT)
    return first.tensor(), second.tensor()


def quantize_dequantize(x: Tensor, format: Format, amax: Tensor | None = None) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize_dequantize`."""
    operand = Operand(x, format)
    target, out = Target(operand, amax, packed=False), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        arguments: dict[str, Any] = {
            "x": x,
            "amax": target.amax,
            "global_scale": target.global_scale,
            "out": out,
            "flag": target.flag,
            "rows": x.shape[0],
            "width": x.shape[1],
            "stride": x.stride(0),
            "out_stride": out.stride(0),
            "blocks": operand.blocks,
            "seed": format.seed or 0,
            "KIND": operand.kind,
        }
        kernels.round_trip_kernel[operand.grid(A, B)](**arguments, **TILE)
    target.check()
    return out


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.dequantize`."""
    rows, width = t.shape
    out = torch.empty(rows, width, dtype=dtype, device=t.device)
    blocks = padded(width, BLOCK) // BLOCK
    if out.numel():
        arguments: dict[str, Any] = {
            "codes": t.codes.contiguous().view(torch.int32),
            "scales": t.scales.contiguous().view(torch.uint8),
            "global_scale": t.global_scale,
            "out": out,
            "rows": rows,
            "width": width,
            "blocks": blocks,
            "SWIZZLED": t.swizzled,
            "RAGGED": width % BLOCK != 0,
            "NUMERICS": t.numerics,
            "BOUND": t.bound,
        }
        kernels.dequantize_kernel[(-(-rows // A) * -(-blocks // B),)](**arguments, **TILE)
    return out


def global_amax(x: Tensor) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.global_amax`."""
    return flat_amax(x.contiguous(), numbers=False)


def flat_amax(x: Tensor, numbers: bool) -> Tensor:
    """fp32 [] of dense ``x``; without its NaNs if of ``numbers`` alone."""
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        programs = min(-(-x.numel() // FLAT), 8 * device_properties(x.device)[1])
        options: dict[str, Any] = {"BLOCK": FLAT, "NUMBERS": numbers, "num_warps": 8}
        kernels.flat_amax_kernel[(programs,)](x, amax, x.numel(), **options)
    return amax.view(torch.float32)
