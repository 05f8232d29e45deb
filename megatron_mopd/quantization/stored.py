"""How a matrix is stored in NVFP4 and FP8: which tensors, under which names, and from which arithmetic.

========================= ============================= ===================================
format, layout            ModelOpt                      compressed-tensors
========================= ============================= ===================================
nvfp4: e2m1 codes         ``weight`` uint8 [R, K/2]     ``weight_packed`` uint8 [R, K/2]
nvfp4: block scales       ``weight_scale`` e4m3         ``weight_scale`` e4m3 [R, K/16]
nvfp4: scale of tensor    ``weight_scale_2`` fp32 []    ``weight_global_scale`` fp32 [1]
fp8: codes                ``weight`` e4m3 [R, K]        ``weight`` e4m3 [R, K]
fp8: scale of tensor      ``weight_scale`` fp32 []      ``weight_scale`` fp32 [1]
========================= ============================= ===================================

Codes, block scales and FP8 tensors are ModelOpt's in both layouts (``weight_scale_2`` = amax / 2688, with four-over-six
amax / 1536; FP8 scale = amax / 448); ``weight_global_scale`` is 1 / ``weight_scale_2``, as compressed-tensors' own
converter of ModelOpt checkpoints has it. A tensor of zeros gets the scales of one whose maximum is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion.weights import Entry
from megatron_mopd.quantization.recipes import QUANTIZED, Format
from mopd_kernels import nvfp4
from mopd_kernels.nvfp4 import NVFP4Tensor

Layout = Literal["modelopt", "compressed-tensors"]
FourOverSix = Literal["mse", "mae", "max"]
BLOCK = 16
"""Elements of a row that share a block scale."""
FP8_MAX = 448.0
SMALLEST = 2.0**-100
"""Below this the scales of a tensor leave fp32's normal range."""


@dataclass(frozen=True, slots=True)
class Names:
    """Last parts of the names of a quantized matrix's tensors; ``block_scales`` is empty for FP8."""

    codes: str
    block_scales: str
    scale: str


NAMES: dict[tuple[Format, Layout], Names] = {
    ("nvfp4", "modelopt"): Names("weight", "weight_scale", "weight_scale_2"),
    ("nvfp4", "compressed-tensors"): Names("weight_packed", "weight_scale", "weight_global_scale"),
    ("fp8", "modelopt"): Names("weight", "", "weight_scale"),
    ("fp8", "compressed-tensors"): Names("weight", "", "weight_scale"),
}


def module_of(name: str) -> str:
    """The module whose ``weight`` the tensor ``name`` is; raises :class:`ConfigurationError` for another parameter."""
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        raise ConfigurationError(f"{name}: only the weight of a linear layer is quantized; give it the format keep")
    return module


def outputs(name: str, entry: Entry, format: Format, layout: Layout) -> list[tuple[str, Entry]]:
    """The tensors that hold ``name``, of which the source has ``entry``: codes, block scales, scale of the tensor.

    Raises :class:`ConfigurationError` for a shape that the format cannot hold.
    """
    if format not in QUANTIZED:
        return [(name, entry if format == "keep" else Entry(entry.shape, torch.bfloat16))]
    if len(entry.shape) != 2:
        raise ConfigurationError(f"{name}: {list(entry.shape)} is no matrix, so it cannot be {format}; keep it in bf16")
    rows, columns = entry.shape
    module, own = module_of(name), NAMES[format, layout]
    scale = (f"{module}.{own.scale}", Entry(() if layout == "modelopt" else (1,), torch.float32))
    if format == "fp8":
        return [(f"{module}.{own.codes}", Entry(entry.shape, torch.float8_e4m3fn)), scale]
    if columns % BLOCK:
        raise ConfigurationError(
            f"{name}: rows of {columns} elements do not divide into NVFP4's blocks of {BLOCK}; give it fp8 or bf16"
        )
    return [
        (f"{module}.{own.codes}", Entry((rows, columns // 2), torch.uint8)),
        (f"{module}.{own.block_scales}", Entry((rows, columns // BLOCK), torch.float8_e4m3fn)),
        scale,
    ]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some rows of a tensor as they are stored, and what reading them gives."""

    rows: tuple[Tensor, ...]  # codes and block scales
    scale: Tensor | None  # of the tensor, fp32 []
    values: Tensor  # fp32 [rows, K]


class Encoder:
    """Encodes one tensor, some rows at a time. ``amax``: fp32 [], its largest magnitude, finite.

    Raises :class:`ConfigurationError` for a maximum that is neither 0 nor large enough to have scales.
    """

    def __init__(self, name: str, format: Format, layout: Layout, four_over_six: FourOverSix | None, amax: Tensor):
        if format in QUANTIZED and 0 < float(amax) < SMALLEST:
            raise ConfigurationError(
                f"{name}: its largest magnitude is {float(amax):.3g}, below {SMALLEST:.3g}, where scales lose their"
                " digits; look at the tensor, or keep it in bf16 by another recipe"
            )
        self._format: Format = format
        self._layout: Layout = layout
        self._amax = torch.where(amax == 0, torch.ones_like(amax), amax)
        self._nvfp4 = nvfp4.Format(numerics="modelopt", four_over_six=four_over_six)

    def __call__(self, rows: Tensor) -> Encoded:
        """``rows``: [r, K] in the source's dtype, on the device of ``amax``."""
        if self._format == "nvfp4":
            return self._blocks(nvfp4.quantize(rows, self._nvfp4, amax=self._amax))
        if self._format == "fp8":
            scale = self._amax / torch.full_like(self._amax, FP8_MAX)
            # In the source's dtype, as ModelOpt divides: a scale without dimensions does not promote a bf16 tensor.
            codes = (rows / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            return Encoded((codes,), scale, decode_fp8(codes, scale))
        stored = rows.bfloat16() if self._format == "bf16" else rows
        return Encoded((stored,), None, stored.float())

    def _blocks(self, found: NVFP4Tensor) -> Encoded:
        scale = found.global_scale
        if self._layout == "compressed-tensors":
            scale = torch.ones_like(scale) / scale
        values = decode_nvfp4(found.codes, found.scales, scale, self._layout)
        return Encoded((found.codes, found.scales), scale, values)


def decode_nvfp4(
    codes: Tensor, block_scales: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The matrix ``[R, K]`` of codes ``[R, K/2]`` and block scales ``[R, K/16]``, as the owner of the layout reads it.

    ``scale``: fp32, ``weight_scale_2`` or ``weight_global_scale``. Computed in fp32, rounded once to ``dtype``.
    """
    numerics = "modelopt" if layout == "modelopt" else "compressed_tensors"
    shape = (codes.shape[0], codes.shape[1] * 2)
    return nvfp4.dequantize(NVFP4Tensor(codes, block_scales, scale.reshape(()), shape, numerics=numerics), dtype)


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes`` e4m3 of any shape times ``scale`` fp32 of one element, computed in fp32."""
    return (codes.float() * scale.reshape(())).to(dtype)
