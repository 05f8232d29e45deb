"""NVFP4 in plain torch on any device: every operator, in parts of ``tensor.CHUNK`` elements or 16 rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopd_kernels.nvfp4 import hadamard
from mopd_kernels.nvfp4 import numerics as modes
from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.four_over_six import block_error, square_error
from mopd_kernels.nvfp4.grids import BLOCK, e2m1_values, pack, to_e2m1
from mopd_kernels.nvfp4.numerics import Numerics
from mopd_kernels.nvfp4.rounding import random_bytes, stochastic_e2m1
from mopd_kernels.nvfp4.tensor import NVFP4Tensor, chunks, padded, swizzle


def quantize(x: Tensor, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize`."""
    mode = modes.named(format.numerics)
    rows, columns = x.shape
    width = padded(columns, BLOCK)
    amax = tensor_amax(x, format) if amax is None else amax
    dtype = torch.bfloat16 if format.signs is not None else x.dtype
    encoder = _Encoder(format, mode, amax, mode.global_scale(amax, format.bound, dtype), columns)
    if mode.refuses_nonfinite and x.numel() and not torch.isfinite(encoder.global_scale):
        raise ValueError(
            f"x of shape {list(x.shape)} has amax = {amax.item()}: numerics = {mode.name!r} has no finite global scale"
            f" for it; te takes it"
        )
    codes = torch.empty(rows, width // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, width // BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    for start, stop in chunks(rows, width):
        runs = _runs(x[start:stop], format)
        codes[start:stop], scales[start:stop] = encoder.encode(runs, start * width // BLOCK)
    return NVFP4Tensor(
        codes=codes,
        scales=swizzle(scales) if format.swizzled else scales,
        global_scale=encoder.global_scale,
        shape=(rows, columns),
        numerics=mode.name,
        swizzled=format.swizzled,
        bound=format.bound,
        transformed=format.signs,
    )


def quantize_columns(x: Tensor, format: Format, amax: Tensor | None = None) -> NVFP4Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize_columns`."""
    return quantize(x.T, format, amax)


def quantize_both(
    x: Tensor, rows: Format, columns: Format, amax: Tensor | None = None, columns_amax: Tensor | None = None
) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """See :func:`mopd_kernels.nvfp4.quantize_both`; this form reads ``x`` once for each."""
    return quantize(x, rows, amax), quantize_columns(x, columns, columns_amax)


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.dequantize`."""
    return t.dequantize(dtype)


def quantize_dequantize(x: Tensor, format: Format, amax: Tensor | None = None) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.quantize_dequantize`."""
    return quantize(x, format, amax).dequantize(x.dtype)


def global_amax(x: Tensor) -> Tensor:
    """See :func:`mopd_kernels.nvfp4.global_amax`."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs()).float()


def tensor_amax(x: Tensor, format: Format) -> Tensor:
    """fp32 []: the amax that ``format`` makes the global scale for, of ``x`` after the Hadamard transform if it has
    one; NaN counts where the numerics let it."""
    if format.signs is None:
        amax = global_amax(x)
        return _numbers_amax(x) if format.numerics == "te" and amax.isnan() else amax
    largest = _numbers_amax if format.numerics == "te" else global_amax
    amaxes = [largest(_runs(x[start:stop], format)) for start, stop in chunks(*x.shape)]
    return torch.stack(amaxes).amax() if amaxes else global_amax(x)


def _numbers_amax(x: Tensor) -> Tensor:
    """fp32 []: the largest magnitude of those that are numbers."""
    return global_amax(torch.where(x.isnan(), torch.zeros_like(x), x))


def _runs(part: Tensor, format: Format) -> Tensor:
    """Rows as runs of 16, ``[r, K to 16 / 16, 16]``, filled with zeros and transformed as the format says."""
    short = -part.shape[1] % BLOCK
    part = pad(part, (0, short)) if short else part.contiguous()
    if format.signs is not None:
        part = hadamard.transform(part, format.signs)
    return part.unflatten(-1, (-1, BLOCK))


@dataclass(frozen=True)
class _Encoder:
    """What turns runs ``[r, C, 16]`` of rows of ``columns`` elements before padding into codes and scales."""

    format: Format
    mode: Numerics
    amax: Tensor
    global_scale: Tensor
    columns: int

    def encode(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Packed codes ``[r, C * 8]`` and scales ``[r, C]``; ``x[0, 0]`` is run ``first`` of its matrix."""
        block_amax, values = self._block_amax(x), x.float()
        if self.format.four_over_six is not None:
            codes, scales = self._better_of_two(values, block_amax)
        else:
            scales = self.mode.block_scale(block_amax, self.global_scale, self.format.bound)
            codes = self._codes(values, scales, first)
        codes = codes.flatten(-2)
        codes[:, self.columns :] = 0
        return pack(codes), scales

    def _codes(self, x: Tensor, scales: Tensor, first: int = 0) -> Tensor:
        scaled = self.mode.scaled(x, scales.float().unsqueeze(-1), self.global_scale, self.format.bound)
        if self.format.seed is not None and self.format.rounding == "stochastic":
            random = random_bytes(first, scales.numel(), self.format.seed, x.device).view(x.shape)
            codes = stochastic_e2m1(scaled, random)
        else:
            codes = to_e2m1(scaled)
        if self.mode.nan_codes is not None:
            codes = torch.where(scaled.isnan(), self.mode.nan_codes(scaled), codes)
        return codes | (self.mode.negative(scaled).to(torch.uint8) << 3)

    def _better_of_two(self, x: Tensor, block_amax: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of four-over-six; equal errors take the scale that maps to 6."""
        assert self.mode.pair is not None
        six, four = self.mode.pair(block_amax, self.amax)
        codes_six, codes_four = self._codes(x, six), self._codes(x, four)
        takes_four = self._error(codes_four, four, x) < self._error(codes_six, six, x)
        codes = torch.where(takes_four.unsqueeze(-1), codes_four, codes_six)
        scales = torch.where(takes_four, four.view(torch.uint8), six.view(torch.uint8))
        return codes, scales.view(torch.float8_e4m3fn)

    def _error(self, codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        assert self.mode.restore is not None and self.format.four_over_six is not None
        values = e2m1_values(x)[codes.int()]
        restored = self.mode.restore(values, scales.float().unsqueeze(-1), self.global_scale)
        error = block_error(restored, x, self.format.four_over_six)
        return square_error(error, self.format.four_over_six) if self.format.block == "16x16" else error

    def _block_amax(self, x: Tensor) -> Tensor:
        """``[r, C]`` in x's dtype: the largest magnitude of each run or of the 16 x 16 square it lies in."""
        magnitude = x.abs()
        amax = magnitude.amax(-1)
        if self.mode.name == "te" and amax.isnan().any():
            amax = magnitude.nan_to_num_(nan=0.0, posinf=torch.inf).amax(-1)
        if self.mode.refuses_nonfinite and not amax.isfinite().all():
            raise ValueError(
                f"x has a non-finite element: numerics = {self.mode.name!r} has no code for it; te, torchao and"
                f" modelopt have"
            )
        if self.format.block == "16x16":
            squares = pad(amax, (0, 0, 0, -len(amax) % BLOCK)).unflatten(0, (-1, BLOCK)).amax(1)
            amax = squares.repeat_interleave(BLOCK, dim=0)[: len(amax)]
        return amax
