"""What of NVFP4 is compiled: the benchmark's calls, every numerics mode, and what the modes do not share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopd_kernels import nvfp4
from mopd_kernels.nvfp4 import TE_SIGNS, Format

SHAPE = (256, 1024)
NORMED = (2, 8192)  # the hidden size decides how many threads hold a row
STOCHASTIC: dict[str, Any] = {"rounding": "stochastic", "seed": 2**40}
GRADIENT = Format(swizzled=True, signs=TE_SIGNS, **STOCHASTIC)


def matrix(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def rows(dtype: torch.dtype = torch.bfloat16, **format: Any) -> None:
    nvfp4.quantize(matrix(dtype), Format(**format), amax=torch.ones(()), impl="triton")


def columns(format: Format, amax: Tensor | None = None) -> None:
    nvfp4.quantize_columns(matrix(), format, amax=amax, impl="triton")


def both(rows: Format, columns: Format) -> None:
    one = torch.ones(())
    nvfp4.quantize_both(matrix(), rows, columns, amax=one, columns_amax=one, impl="triton")


def round_trip(**format: Any) -> None:
    nvfp4.quantize_dequantize(matrix(), Format(**format), amax=torch.ones(()), impl="triton")


def there_and_back(dtype: torch.dtype) -> None:
    packed = nvfp4.quantize(matrix(), Format(swizzled=True), amax=torch.ones(()), impl="triton")
    nvfp4.dequantize(packed, dtype, impl="triton")


def amax(dtype: torch.dtype) -> None:
    nvfp4.global_amax(matrix(dtype), impl="triton")


def rms_norm(known: bool, **format: Any) -> None:
    x = matrix(shape=NORMED)
    one = torch.ones(()) if known else None
    nvfp4.rms_norm_quantize(x, x[0], 1e-5, Format(swizzled=True, **format), amax=one, impl="triton")


def squared_relu(known: bool) -> None:
    nvfp4.squared_relu_quantize(matrix(), Format(swizzled=True), amax=torch.ones(()) if known else None, impl="triton")


NVFP4_CASES: dict[str, Callable[[], None]] = {
    "NVFP4 rows, bf16": partial(rows, swizzled=True),
    "NVFP4 rows, bf16, linear scales": rows,
    "NVFP4 rows, fp32": partial(rows, torch.float32, swizzled=True),
    "NVFP4 rows, fp16": partial(rows, torch.float16, swizzled=True),
    "NVFP4 rows, torchao": partial(rows, numerics="torchao", swizzled=True),
    "NVFP4 rows, modelopt": partial(rows, numerics="modelopt"),
    "NVFP4 rows, vllm": partial(rows, numerics="vllm", swizzled=True),
    "NVFP4 rows, compressed_tensors": partial(rows, numerics="compressed_tensors"),
    "NVFP4 rows, 16x16": partial(rows, block="16x16", swizzled=True),
    "NVFP4 rows, stochastic": partial(rows, swizzled=True, **STOCHASTIC),
    "NVFP4 rows, four over six, mse": partial(rows, four_over_six="mse", swizzled=True),
    "NVFP4 rows, four over six, mae": partial(rows, four_over_six="mae", swizzled=True),
    "NVFP4 rows, four over six, 16x16": partial(rows, four_over_six="mae", block="16x16"),
    "NVFP4 rows, four over six, modelopt": partial(rows, four_over_six="mse", numerics="modelopt"),
    "NVFP4 columns, bf16": partial(columns, Format(swizzled=True), torch.ones(())),
    "NVFP4 columns, gradient": partial(columns, GRADIENT),
    "NVFP4 both, bf16": partial(both, Format(swizzled=True), Format(swizzled=True)),
    "NVFP4 both, gradient": partial(both, Format(swizzled=True, **STOCHASTIC), GRADIENT),
    "NVFP4 round trip, bf16": round_trip,
    "NVFP4 round trip, modelopt": partial(round_trip, numerics="modelopt"),
    "NVFP4 round trip, four over six": partial(round_trip, four_over_six="mse"),
    "NVFP4 dequantize, bf16": partial(there_and_back, torch.bfloat16),
    "NVFP4 dequantize, fp32": partial(there_and_back, torch.float32),
    "NVFP4 amax, bf16": partial(amax, torch.bfloat16),
    "NVFP4 amax, fp32": partial(amax, torch.float32),
    "NVFP4 RMS norm, amax known": partial(rms_norm, True),
    "NVFP4 RMS norm, two passes": partial(rms_norm, False),
    "NVFP4 RMS norm, 16x16": partial(rms_norm, True, block="16x16"),
    "NVFP4 squared ReLU, amax known": partial(squared_relu, True),
    "NVFP4 squared ReLU, two passes": partial(squared_relu, False),
}
