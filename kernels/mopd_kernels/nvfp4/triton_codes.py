# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Conversions inside the NVFP4 kernels: E2M1 and E4M3, packing, random bits, the Hadamard transform.

A block of 16 elements is two fp32 tensors ``[.., 8]``, its halves, and one thread owns both: then nothing of a block
crosses threads, its eight bytes are one store, and its scale is computed once. The conversions are integer code that
is exact on the device and in Triton's interpreter; where the device has an instruction of the same meaning (E4M3 on
sm_90, E2M1 from sm_100 on) it takes its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mopd_kernels.triton_common import ALL, INTERPRET

EXPONENT = tl.constexpr(0x7F800000)
MAGIC = tl.constexpr(22 << 23)  # from a power of two to the one whose ulp is half of it, a step of E2M1
QUIET = tl.constexpr(0x7F)  # NaN in E4M3, less its sign

# Eight fp32 to eight codes: the second operand of the instruction is the low nibble.
E2M1X8 = tl.constexpr(
    "{ .reg .b8 a, b, c, d;"
    " cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;"
    " cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;"
    " cvt.rn.satfinite.e2m1x2.f32 c, $6, $5;"
    " cvt.rn.satfinite.e2m1x2.f32 d, $8, $7;"
    " mov.b32 $0, {a, b, c, d}; }"
)


@triton.jit
def maximum(a, b):
    """The greater, or NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def maximum_number(a, b):
    """The greater; the other where one is NaN. The interpreter's own maximum gives NaN there."""
    if INTERPRET:
        a, b = tl.where(a == a, a, b), tl.where(b == b, b, a)
    return tl.maximum(a, b)


@triton.jit
def _split_off(x, PAIRS: tl.constexpr):
    """``x [.., 2 PAIRS]`` as ``[.., PAIRS, 2]``."""
    return tl.reshape(x, x.shape[:-1] + (PAIRS, 2))  # noqa: RUF005 Triton compiles no starred expression


@triton.jit
def _merge(x, like):
    """``x`` as ``[.., 8]``, the leading dimensions being those of ``like``."""
    return tl.reshape(x, like.shape + (8,))  # noqa: RUF005


@triton.jit
def split8(x):
    """The eight ``[..]`` elements of ``x [.., 8]``, in order."""
    even, odd = tl.split(_split_off(x, 4))
    e0, e1 = tl.split(_split_off(even, 2))
    o0, o1 = tl.split(_split_off(odd, 2))
    x0, x4 = tl.split(e0)
    x2, x6 = tl.split(e1)
    x1, x5 = tl.split(o0)
    x3, x7 = tl.split(o1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """``[.., 8]`` of eight ``[..]``."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return _merge(tl.join(even, odd), x0)


@triton.jit
def pack8(code):
    """The eight codes (int32, 0..15) of the last dimension in one uint32, the first in the lowest nibble."""
    x0, x1, x2, x3, x4, x5, x6, x7 = split8(code.to(tl.uint32))
    low = x0 + (x1 << 4) + (x2 << 8) + (x3 << 12)
    return low + (x4 << 16) + (x5 << 20) + (x6 << 24) + (x7 << 28)


@triton.jit
def unpack8(word):
    """The codes (uint32 ``[.., 8]``) of a uint32."""
    return (tl.expand_dims(word, -1) >> (4 * tl.arange(0, 8)).to(tl.uint32)) & 0xF


@triton.jit
def e4m3_bits(x):
    """uint8 bits of fp32 ``x >= 0`` in E4M3: nearest, ties to even, saturating at 448; NaN is NaN."""
    if not INTERPRET:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:  # whose own cast loses carries and subnormals
        bits = tl.minimum(x, 448.0).to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (x + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)  # 2^14, whose ulp is 2^-9
        quiet = QUIET | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)  # the device's has no sign
        return tl.where(x == x, tl.where(x < 0.015625, small, normal), quiet).to(tl.uint8)


@triton.jit
def e4m3_value(bits):
    """fp32 of E4M3 bits (uint8)."""
    if not INTERPRET:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        magnitude, sign = (bits & 0x7F).to(tl.int32), (bits & 0x80).to(tl.int32) << 24
        value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120, exact
        value = tl.where(magnitude == QUIET, 0x7FF00000, value.to(tl.int32, bitcast=True)) | sign
        return value.to(tl.float32, bitcast=True)


@triton.jit
def e2m1_value(code):
    """fp32 of E2M1 codes (uint32, 0..15): half the code up to 4, exponent and mantissa above; exact."""
    exponent = (code >> 1) & 3
    bits = tl.where(exponent == 0, (code & 1) * 0x3F000000, ((exponent + 126) << 23) | ((code & 1) << 22))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def random_bytes(seed, index):
    """int32 ``[.., 8]`` twice, 0..255: random bytes of the halves of the runs of 16 elements numbered ``index``.

    One Philox4x32-10 call per run; its words serve four elements each, lowest byte first.
    """
    w0, w1, w2, w3 = tl.randint4x(seed, index)
    shifts = 8 * tl.arange(0, 4)
    first = (tl.expand_dims(tl.join(w0, w1), -1) >> shifts) & 0xFF
    second = (tl.expand_dims(tl.join(w2, w3), -1) >> shifts) & 0xFF
    return _merge(first, w0).to(tl.int32), _merge(second, w0).to(tl.int32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 ``x`` as ``dtype`` holds it, in fp32."""
    if INTERPRET and dtype == tl.bfloat16:  # whose bf16 has no subnormals
        return (bf16_bits(x).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def bf16_bits(x):
    """int16 bits of fp32 ``x`` in bf16, nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    near = (bits.to(tl.int64) + 0x7FFF + ((bits >> 16) & 1)).to(tl.int32)
    return (tl.where(x == x, near, bits) >> 16).to(tl.int16)


@triton.jit
def hadamard(x0, x1, SIGNS: tl.constexpr):
    """The transform of hadamard.py of the blocks with halves ``x0``, ``x1``; bit j of SIGNS is set where sign j is -1.

    Sums in fp32 as a butterfly over distances 1, 2, 4, 8; the result is rounded to bf16.
    """
    place = tl.arange(0, 8)  # a product, for Triton's -x is 0 - x, which has no -0
    x0 = _butterfly8(x0 * tl.where(((SIGNS >> place) & 1) != 0, -1.0, 1.0))
    x1 = _butterfly8(x1 * tl.where(((SIGNS >> (place + 8)) & 1) != 0, -1.0, 1.0))
    return rounded((x0 + x1) * 0.25, tl.bfloat16), rounded((x0 - x1) * 0.25, tl.bfloat16)


@triton.jit
def _butterfly8(x):
    x0, x1, x2, x3, x4, x5, x6, x7 = split8(x)
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + x1, x0 - x1, x2 + x3, x2 - x3, x4 + x5, x4 - x5, x6 + x7, x6 - x7
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + x2, x1 + x3, x0 - x2, x1 - x3, x4 + x6, x5 + x7, x4 - x6, x5 - x7
    return join8(x0 + x4, x1 + x5, x2 + x6, x3 + x7, x0 - x4, x1 - x5, x2 - x6, x3 - x7)
