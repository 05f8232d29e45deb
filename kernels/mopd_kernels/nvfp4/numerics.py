"""Five ways to compute NVFP4: each operation of an ecosystem in its own order, so that its bytes come out.

All agree on the format and on rounding; they differ in what they store as global scale, in the order of the fp32
operations that give a block its scale, in blocks without a scale, and in how an element is divided by it. Bytes that
differ by one code follow. A mode is the arithmetic of the ecosystem's plain form under IEEE rules: what it does with
fp32 on a CPU. On CUDA torch divides by a Python number through its rounded reciprocal, so torchao and ModelOpt
themselves differ there from what they do on a CPU.

================== ============ ==================== ============== ========================= =================
mode               global scale block scale, to E4M3 block of zeros element, to E2M1          dequantized
================== ============ ==================== ============== ========================= =================
te                 A            a * (S * (1/6))      0              x * min(1 / (s * 1/S), M) c * ((s * A) * r)
torchao            A / 2688     (a / 6) / g          2^-6           x * ((1 / g) / s)         c * (g * s)
modelopt           A / 2688     a / (6 * g)          1              x / (s * g)               c * (s * g)
vllm               2688 / A     g * (a * (1/6))      0              x * (1 / (s * (1 / g)))   c * (s / g)
compressed_tensors 2688 / A *   g * (a / 6) *        0.125          x / (s / g)               c * (s / g)
================== ============ ==================== ============== ========================= =================

A, a: largest magnitude of the tensor and of the block; g: the global scale; s: the block's scale; c: the value of a
code; r = 1/2688; S = min(2688 / A, M), or 1 where A is 0 or infinite; M: the largest fp32. 2688 = 6 * 448 is 1536 = 6 *
256 with four-over-six. * in x's dtype, and torch forms 2688 / A as 2688 * (1 / A): a bf16 weight gets a bf16 scale.

Numbers without a finite value: ``te`` counts NaN in no amax and encodes it as +6, and an infinite amax makes S 1.
``torchao`` and ``modelopt`` let them spread: NaN, or a tensor of zeros, makes every scale NaN; inf makes the scale of
its block NaN and every other block zero. ``vllm`` and ``compressed_tensors`` raise ValueError: the one returns NaN
where a code should be, the other casts NaN to an integer. vllm raises too for an amax below 8e-36, zero included, whose
2688 / A is infinite. A NaN scale is byte 0x7F or 0xFF and a NaN element code 7 (in torchao's arithmetic 3, 4, 11 or
12): the sign and the payload of a NaN are the processor's, here as there.

``te`` is Transformer Engine's kernels, whose hardware conversion keeps the sign of zero; its Python reference drops it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopd_kernels.nvfp4.grids import E2M1_MAX, E4M3_TINY, FLOAT_MAX, constant, to_e4m3

FOUR_OVER_SIX_BOUND = 256.0
"""E4M3 value of the largest block under four-over-six, so that 1.5 times it, 384, is still below 448."""
Name = Literal["te", "modelopt", "torchao", "vllm", "compressed_tensors"]


@dataclass(frozen=True)
class Numerics:
    """One ecosystem's arithmetic. Scales are float8_e4m3fn where stored and fp32 where computed with.

    ``global_scale(amax, bound, dtype)``: fp32 [] as stored, from the tensor's amax, fp32 [], of an x in ``dtype``.
    ``block_scale(block_amax, global_scale, bound)``: E4M3, of amaxes in x's dtype, any shape.
    ``scaled(x, scale, global_scale, bound)``: fp32 x over its scale, to be rounded to E2M1; ``scale`` broadcasts to x.
    ``decode(scale, global_scale, bound)``: fp32, what a code's value is multiplied by.
    ``multiplier(global_scale, bound)``: fp32 [], about ``decode`` of a scale of 1.
    ``pair(block_amax, amax)``: the E4M3 scales of four-over-six, mapping to 6 and to 4, given the tensor's amax.
    ``restore(values, scale, global_scale)``: code values in x's domain, as four-over-six compares them with x.
    ``negative(scaled)``: which get bit 3; they differ on -0, not on a negative number that rounds to zero.
    ``nan_codes(scaled)``: magnitude codes for the NaN among scaled elements; None is 7.
    ``refuses_nonfinite``: the mode has no bytes for inf and NaN.
    """

    name: str
    global_scale: Callable[[Tensor, float, torch.dtype], Tensor]
    block_scale: Callable[[Tensor, Tensor, float], Tensor]
    scaled: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    decode: Callable[[Tensor, Tensor, float], Tensor]
    multiplier: Callable[[Tensor, float], Tensor]
    negative: Callable[[Tensor], Tensor]
    nan_codes: Callable[[Tensor], Tensor] | None = None
    refuses_nonfinite: bool = False
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    restore: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def te_encode_scale(amax: Tensor, bound: float) -> Tensor:
    """S of Transformer Engine, fp32 []: min(6 * bound / amax, M); 1 where amax is 0 or infinite (core_nvfp4.cuh)."""
    scale = torch.fmin(constant(E2M1_MAX * bound, amax) / amax, constant(FLOAT_MAX, amax))
    return torch.where((amax == 0) | (scale == 0), constant(1.0, amax), scale)


def _te_block_scale(block_amax: Tensor, amax: Tensor, bound: float) -> Tensor:
    return to_e4m3(block_amax.float() * (te_encode_scale(amax, bound) * constant(1 / 6, amax)))


def _te_scaled(x: Tensor, scale: Tensor, amax: Tensor, bound: float) -> Tensor:
    decode = constant(1.0, amax) / te_encode_scale(amax, bound)
    return x * torch.fmin(constant(1.0, amax) / (scale * decode), constant(FLOAT_MAX, amax))


def _te_decode(scale: Tensor, amax: Tensor, bound: float) -> Tensor:
    return (scale * amax) * constant(1 / (E2M1_MAX * bound), amax)


def _te_pair(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """compute_scale_pair of quantize_4over6_nvfp4.cuh, which divides by 6 where the plain scale multiplies."""
    base = block_amax.float() / constant(E2M1_MAX, amax) * te_encode_scale(amax, FOUR_OVER_SIX_BOUND)
    return to_e4m3(base), to_e4m3(base * 1.5)


def _te_restore(values: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    return ((values * scale) * amax) / constant(E2M1_MAX * FOUR_OVER_SIX_BOUND, amax)


def _over_bound(amax: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    return amax / constant(E2M1_MAX * bound, amax)


def _torchao_block_scale(block_amax: Tensor, scale: Tensor, bound: float) -> Tensor:
    return to_e4m3((block_amax.float() / constant(E2M1_MAX, scale)) / scale, low=2.0**-6)


def _torchao_scaled(x: Tensor, scale: Tensor, global_scale: Tensor, bound: float) -> Tensor:
    return x * ((constant(1.0, global_scale) / global_scale) / scale)


def _modelopt_block_scale(block_amax: Tensor, scale: Tensor, bound: float) -> Tensor:
    blocks = block_amax.float() / (constant(E2M1_MAX, scale) * scale)
    return to_e4m3(torch.where(blocks == 0, constant(1.0, scale), blocks), low=E4M3_TINY)


def _modelopt_pair(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The export of a static quantizer whose block amaxes are times 1 or 1.5 (_cast_per_block_scale_to_fp8)."""
    six, bound = constant(E2M1_MAX, amax), constant(FOUR_OVER_SIX_BOUND, amax)

    def scale(block_amax: Tensor) -> Tensor:
        blocks = block_amax / six
        blocks = torch.where(blocks == 0, constant(1.0, amax), blocks) * bound / (amax / six)
        return to_e4m3(blocks, low=E4M3_TINY)

    return scale(block_amax.float()), scale(block_amax.float() * 1.5)


def _bound_over(amax: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    return amax.reciprocal() * (E2M1_MAX * bound)


def _vllm_block_scale(block_amax: Tensor, scale: Tensor, bound: float) -> Tensor:
    return to_e4m3(scale * (block_amax.float() * constant(1 / 6, scale)))


def _vllm_reciprocal(x: Tensor) -> Tensor:
    """1 / x, and about 1e-8 of zero, whose products round to zero (get_reciprocal of nvfp4_emulation_utils.py)."""
    return constant(1.0, x) / torch.where(x == 0, constant(1e8, x), x)


def _vllm_scaled(x: Tensor, scale: Tensor, global_scale: Tensor, bound: float) -> Tensor:
    return x * _vllm_reciprocal(scale * _vllm_reciprocal(global_scale))


def _compressed_global_scale(amax: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """generate_gparam, in x's dtype: 2688 / amax rounds to bf16 for a bf16 weight; 1 where that overflows."""
    return (amax.to(dtype).reciprocal() * (E2M1_MAX * bound)).nan_to_num(nan=1.0, posinf=1.0).float()


def _compressed_block_scale(block_amax: Tensor, scale: Tensor, bound: float) -> Tensor:
    blocks = to_e4m3(scale * (block_amax / constant(E2M1_MAX, scale, block_amax.dtype)).float())
    return torch.where(blocks.float() == 0, constant(0.125, scale), blocks.float()).to(torch.float8_e4m3fn)


def _torchao_nan_codes(scaled: Tensor) -> Tensor:
    """What the integer arithmetic of f32_to_f4_unpacked makes of the bits of NaN; any for other numbers."""
    bits = scaled.view(torch.int32) & 0x7FFFFFFF
    return ((bits + ((1 - 127) << 23) + 0x1FFFFF + ((bits >> 22) & 1)) >> 22 & 7).to(torch.uint8)


def _below_zero(scaled: Tensor) -> Tensor:
    return scaled < 0


MODES = {
    "te": Numerics(
        name="te",
        global_scale=lambda amax, bound, dtype: amax.clone(),
        block_scale=_te_block_scale,
        scaled=_te_scaled,
        decode=_te_decode,
        multiplier=lambda amax, bound: amax * constant(1 / (E2M1_MAX * bound), amax),
        negative=lambda scaled: torch.signbit(scaled) & ~scaled.isnan(),
        pair=_te_pair,
        restore=_te_restore,
    ),
    "torchao": Numerics(
        name="torchao",
        global_scale=_over_bound,
        block_scale=_torchao_block_scale,
        scaled=_torchao_scaled,
        decode=lambda scale, global_scale, bound: global_scale * scale,
        multiplier=lambda global_scale, bound: global_scale,
        negative=torch.signbit,
        nan_codes=_torchao_nan_codes,
    ),
    "modelopt": Numerics(
        name="modelopt",
        global_scale=_over_bound,
        block_scale=_modelopt_block_scale,
        scaled=lambda x, scale, global_scale, bound: x / (scale * global_scale),
        decode=lambda scale, global_scale, bound: scale * global_scale,
        multiplier=lambda global_scale, bound: global_scale,
        negative=_below_zero,
        pair=_modelopt_pair,
        restore=lambda values, scale, global_scale: values * (scale * global_scale),
    ),
    "vllm": Numerics(
        name="vllm",
        global_scale=_bound_over,
        block_scale=_vllm_block_scale,
        scaled=_vllm_scaled,
        decode=lambda scale, global_scale, bound: scale / global_scale,
        multiplier=lambda global_scale, bound: constant(1.0, global_scale) / global_scale,
        negative=_below_zero,
        refuses_nonfinite=True,
    ),
    "compressed_tensors": Numerics(
        name="compressed_tensors",
        global_scale=_compressed_global_scale,
        block_scale=_compressed_block_scale,
        scaled=lambda x, scale, global_scale, bound: x / (scale / global_scale),
        decode=lambda scale, global_scale, bound: scale / global_scale,
        multiplier=lambda global_scale, bound: constant(1.0, global_scale) / global_scale,
        negative=_below_zero,
        refuses_nonfinite=True,
    ),
}


def named(name: str) -> Numerics:
    """The mode of that name. Raises ValueError, naming all and the nearest, for another."""
    if name in MODES:
        return MODES[name]
    near = difflib.get_close_matches(name, MODES, n=1, cutoff=0.4)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"numerics = {name!r}: expected one of {', '.join(MODES)}{meant}")
