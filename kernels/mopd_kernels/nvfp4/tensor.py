"""A matrix in NVFP4: packed E2M1 codes, E4M3 block scales and one fp32 global scale; and the two layouts of scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_kernels.nvfp4 import numerics as modes
from mopd_kernels.nvfp4.grids import BLOCK, E4M3_MAX, e2m1_values, unpack

ROWS_OF_TILE, COLUMNS_OF_TILE = 128, 4
"""Scales that cuBLAS and CUTLASS keep in one swizzled tile of 512 bytes."""
CHUNK = 1 << 18
"""Elements that plain torch works on at once, or 16 rows where those are more."""


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of the parts of a matrix of ``width`` columns; whole squares of 16 rows each."""
    step = max(BLOCK, CHUNK // max(1, width) // BLOCK * BLOCK)
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def padded(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that holds ``size``."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix ``[R, K]`` quantized along K in blocks of 16; element ~ code * block scale * :attr:`multiplier`.

    ``codes``: uint8 ``[R, Kp / 2]``, Kp being K padded to a multiple of 16; two codes a byte, even index low.
    ``scales``: float8_e4m3fn, linear ``[R, Kp / 16]`` or, with ``swizzled``, ``[R to 128, Kp / 16 to 4]`` holding the
    128x4 tiles one after the other. Codes and scales of padding are zero.
    ``global_scale``: fp32 [] as the ecosystem of ``numerics`` stores it. ``shape``: (R, K) before padding.
    ``bound``: the E4M3 value that the block of the largest element gets, 448, or 256 with four-over-six.
    ``transformed``: the 16 signs of the Hadamard transform the elements went through, or None. Dequantizing does not
    undo it: both operands of a product along K carry the same transform, and it cancels there.

    Raises ValueError for tensors whose dtype, shape or layout does not fit.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    shape: tuple[int, int]
    numerics: str = "te"
    swizzled: bool = False
    bound: float = E4M3_MAX
    transformed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows, width = self.shape[0], padded(self.shape[1], BLOCK)
        layout = scale_shape(self.shape, self.swizzled)
        name = "swizzled 128x4" if self.swizzled else "linear"
        wanted = {
            "codes": (self.codes, torch.uint8, (rows, width // 2)),
            "scales": (self.scales, torch.float8_e4m3fn, layout),
            "global_scale": (self.global_scale, torch.float32, ()),
        }
        for field, (tensor, dtype, shape) in wanted.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"NVFP4Tensor.{field} is {tensor.dtype} {list(tensor.shape)}; a matrix {list(self.shape)} with"
                    f" {name} scales takes {dtype} {list(shape)}"
                )
        modes.named(self.numerics)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the global scale, padding included."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.global_scale))

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    @property
    def multiplier(self) -> Tensor:
        """fp32 []: element ~ code * block scale * multiplier, from the global scale alone."""
        return modes.named(self.numerics).multiplier(self.global_scale, self.bound)

    def linear_scales(self) -> Tensor:
        """The block scales, float8_e4m3fn ``[R, Kp / 16]``, whatever the layout they are kept in."""
        return unswizzle(self.scales, *scale_shape(self.shape, False)) if self.swizzled else self.scales

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[R, K]`` in ``dtype``, the values that the ecosystem of ``numerics`` dequantizes to; plain torch."""
        rows, columns = self.shape
        mode, linear = modes.named(self.numerics), self.linear_scales()
        values, result = e2m1_values(self.codes), torch.empty(rows, columns, dtype=dtype, device=self.device)
        for start, stop in chunks(rows, 2 * self.codes.shape[1]):
            codes = unpack(self.codes[start:stop]).int().unflatten(-1, (-1, BLOCK))
            scales = mode.decode(linear[start:stop].float(), self.global_scale, self.bound)
            part = values[codes] * scales.unsqueeze(-1)
            result[start:stop] = part.flatten(-2)[:, :columns]
        return result


def scale_shape(shape: tuple[int, int], swizzled: bool) -> tuple[int, int]:
    """Shape of the block scales of a matrix ``(R, K)`` in either layout."""
    rows, blocks = shape[0], padded(shape[1], BLOCK) // BLOCK
    return (padded(rows, ROWS_OF_TILE), padded(blocks, COLUMNS_OF_TILE)) if swizzled else (rows, blocks)


def swizzle(scales: Tensor) -> Tensor:
    """Linear scales ``[R, C]`` in cuBLAS's 128x4 layout, ``[R to 128, C to 4]``; padding is zero.

    The scale of row r, column c lies at byte ``((r // 128 * (C to 4) / 4 + c // 4) * 32 + r % 32) * 16 + r % 128 // 32
    * 4 + c % 4``: "1D block scaling factors layout" in the cuBLAS documentation.
    """
    rows, columns = scales.shape
    whole = (padded(rows, ROWS_OF_TILE), padded(columns, COLUMNS_OF_TILE))
    linear = torch.zeros(whole, dtype=torch.uint8, device=scales.device)
    linear[:rows, :columns] = scales.view(torch.uint8)
    tiles = linear.view(whole[0] // ROWS_OF_TILE, 4, 32, whole[1] // COLUMNS_OF_TILE, COLUMNS_OF_TILE)
    return tiles.permute(0, 3, 2, 1, 4).reshape(whole).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`swizzle`: linear scales ``[rows, columns]``. Raises ValueError for another shape."""
    whole = (padded(rows, ROWS_OF_TILE), padded(columns, COLUMNS_OF_TILE))
    if tuple(scales.shape) != whole:
        raise ValueError(
            f"scales of shape {list(scales.shape)}: swizzled scales of {rows} rows and {columns} blocks a row are"
            f" {list(whole)}; linear scales are not unswizzled"
        )
    tiles = scales.view(torch.uint8).reshape(whole[0] // ROWS_OF_TILE, whole[1] // COLUMNS_OF_TILE, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(whole)
    return linear[:rows, :columns].contiguous().view(scales.dtype)
