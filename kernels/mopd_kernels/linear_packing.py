"""How the kernels of the products on hidden states are given operands of which one or both may be packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mopd_kernels.linear_operand_kernels import SHRINK
from mopd_kernels.linear_operands import Operand, linear, multiplier_of, product_dtype
from mopd_kernels.nvfp4.tensor import NVFP4Tensor

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Pair:
    """Both operands of ``hidden @ weight.T``; of a packed one the codes, and its scales beside them."""

    hidden: Tensor  # [T, H], or uint8 [T, H / 2]
    weight: Tensor  # [columns, H], or uint8 [columns, H / 2]
    hidden_scales: Tensor | None  # E4M3 bits, linear
    weight_scales: Tensor | None
    multiplier: Tensor | None  # fp32 [1]; None: both are dense
    dtype: torch.dtype  # of the product
    width: int  # H, padded to blocks where one is packed
    swizzled: bool  # the weight's scales

    @classmethod
    def of(cls, hidden: Operand, weight: Operand, columns: int) -> Pair:
        """The first ``columns`` rows of the weight."""
        hidden = linear(hidden)  # whose rows go through in chunks
        codes = [x.codes for x in (hidden, weight) if isinstance(x, NVFP4Tensor)]
        return cls(
            hidden=_numbers(hidden).contiguous(),
            weight=_numbers(weight)[:columns].contiguous(),
            hidden_scales=_scales(hidden),
            weight_scales=_scales(weight),
            multiplier=multiplier_of(hidden, weight, power=SHRINK),
            dtype=product_dtype(hidden, weight),
            width=2 * codes[0].shape[1] if codes else hidden.shape[1],
            swizzled=isinstance(weight, NVFP4Tensor) and weight.swizzled,
        )

    def arguments(self, rows: slice, tile_rows: int, tile_columns: int, depth: int) -> dict[str, Any]:
        """Of a kernel that reads such operands tile by tile (linear_operand_kernels.operand_tile)."""
        packed = self.multiplier is not None
        unit = 64 if packed and self.width % 64 == 0 else 16
        hidden, hidden_scales = _argument(self.hidden[rows], self.hidden_scales, rows, [tile_rows, depth], unit)
        weight, weight_scales = _argument(self.weight, self.weight_scales, slice(None), [tile_columns, depth], unit)
        return {
            "hidden": hidden,
            "hidden_scales": hidden_scales,
            "weight": weight,
            "weight_scales": weight_scales,
            "multiplier": self.multiplier,
            "H": self.width,
            "DTYPE": _DTYPES[self.dtype] if packed else None,
            "UNIT": unit,
            "SWIZZLED": self.swizzled,
        }


def _argument(x: Tensor, scales: Tensor | None, rows: slice, block: list[int], unit: int) -> tuple[Any, Tensor | None]:
    """The matrix as the kernel takes it, and its scales, by fours for a ``unit`` of 64."""
    if scales is None:
        return TensorDescriptor.from_tensor(x, block), None
    return x, scales[rows].view(torch.uint32) if unit == 64 else scales[rows]


def _numbers(x: Operand) -> Tensor:
    return x if isinstance(x, Tensor) else x.codes


def _scales(x: Operand) -> Tensor | None:
    if isinstance(x, Tensor):
        return None
    bits = x.scales.contiguous().view(torch.uint8)
    return bits.clone() if bits.storage_offset() % 4 else bits  # whoever cut it from a larger tensor
