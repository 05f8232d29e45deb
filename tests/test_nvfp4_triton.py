"""The NVFP4 kernels, interpreted: their conversions against tables, and every format against the plain torch form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mopd_kernels import dispatch
from mopd_kernels.nvfp4 import (
    TE_SIGNS,
    Format,
    NVFP4Tensor,
    dequantize,
    global_amax,
    quantize,
    quantize_both,
    quantize_columns,
    quantize_dequantize,
    rms_norm_quantize,
    squared_relu_quantize,
    triton_ops,
)
from mopd_kernels.nvfp4.numerics import MODES
from mopd_kernels.nvfp4.testing import assert_same_bytes, samples
from mopd_kernels.nvfp4.triton_blocks import magnitude_e2m1, nearest8
from mopd_kernels.nvfp4.triton_codes import e4m3_bits, e4m3_value, unpack8
from mopd_kernels.nvfp4.triton_ops import Operand

# The interpreter divides by numpy, which warns of what IEEE rules define.
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

STOCHASTIC: dict[str, Any] = {"rounding": "stochastic", "seed": 2**40 + 7}
FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swizzled squares": {"block": "16x16", "swizzled": True},
    "stochastic": STOCHASTIC,
    "Hadamard": {"signs": TE_SIGNS, "swizzled": True},
    "Hadamard, stochastic": {"signs": TE_SIGNS, **STOCHASTIC},
    "mae": {"four_over_six": "mae"},
    "mse": {"four_over_six": "mse", "swizzled": True},
    "max": {"four_over_six": "max"},
    "mae of squares": {"four_over_six": "mae", "block": "16x16"},
    "max of squares": {"four_over_six": "max", "block": "16x16"},
}
FOUR_OVER_SIX = [name for name, mode in MODES.items() if mode.pair is not None]
ALL = [
    pytest.param(numerics, format, id=f"{numerics}, {format}")
    for numerics in MODES
    for format, settings in FORMATS.items()
    if "four_over_six" not in settings or numerics in FOUR_OVER_SIX
]


@triton.jit
def convert(x, codes, values, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 8 + tl.arange(0, 8)[None, :]
    y = tl.load(x + at)
    tl.store(codes + at, unpack8(nearest8(y, KIND)).to(tl.uint8))
    tl.store(values + at, magnitude_e2m1(y))


@triton.jit
def convert_scales(x, bits, values, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    found = e4m3_bits(tl.load(x + at))
    tl.store(bits + at, found)
    tl.store(values + at, e4m3_value(found))


def near(middles: np.ndarray) -> Tensor:
    """fp32 of the 4096 numbers on either side of each, and it."""
    bits = torch.from_numpy(middles.astype(np.float32)).view(torch.int32)
    return (bits[:, None] + torch.arange(-4096, 4097, dtype=torch.int32)).flatten().view(torch.float32)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Indices into ascending ``grid`` of the nearest, the even one of two; the last beyond the end."""
    middles = (grid[1:] + grid[:-1]) / 2
    low, high = np.searchsorted(middles, x, "left"), np.searchsorted(middles, x, "right")
    return np.where(low % 2 == 0, low, high)


def every_bf16() -> Tensor:
    return (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16).view(torch.float32)


def filled(x: Tensor) -> Tensor:
    """With zeros to a power of two of elements."""
    return torch.nn.functional.pad(x, (0, triton.next_power_of_2(len(x)) - len(x)))


def test_e2m1_of_every_bf16_and_around_every_midpoint_is_the_nearest() -> None:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = near((grid[1:] + grid[:-1]) / 2)
    x = filled(torch.cat((every_bf16(), middles, -middles)))
    codes, values = torch.full(x.shape, 255, dtype=torch.uint8), torch.full_like(x, torch.nan)
    convert[(1,)](x, codes, values, KIND=Operand(x[None], Format()).kind, N=len(x) // 8)
    exact = nearest(np.abs(x.double().numpy()), grid)
    exact[x.isnan().numpy()] = 7
    negative = torch.signbit(x) & ~x.isnan()
    assert torch.equal(codes, torch.from_numpy(exact).to(torch.uint8) | negative.to(torch.uint8) << 3)
    assert torch.equal(values, torch.from_numpy(grid[exact]).float())


def test_e4m3_of_every_bf16_and_around_every_midpoint_is_the_nearest() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    grid = codes.float().double().numpy()
    x = filled(torch.cat((every_bf16()[2**15 :], near((grid[1:] + grid[:-1]) / 2))))
    bits, values = torch.full(x.shape, 255, dtype=torch.uint8), torch.empty_like(x)
    convert_scales[(len(x) // 2**18,)](x, bits, values, N=2**18)
    exact = nearest(x.double().numpy(), grid)
    number = ~x.isnan()
    assert torch.equal(bits[number], torch.from_numpy(exact).to(torch.uint8)[number])
    assert torch.equal(values[number], torch.from_numpy(grid[exact]).float()[number])
    assert (bits[~number] == 127).all() and values[~number].isnan().all()


def test_the_quotient_by_1536_is_rounded_once() -> None:
    """The fast path of ``_over_1536`` in integers, over every significand: a power of two changes nothing, so by 3."""
    x = np.arange(2**23, 2**24, dtype=np.int64)
    reciprocal = 0xAAAAAB  # of 3, times 2^25, rounded
    quotient = to_fp32(x * reciprocal, 2**23)  # times 4, as the exact one
    remainder = 4 * x - 3 * quotient
    assert np.array_equal(to_fp32(quotient * 2**25 + remainder * reciprocal, 2**25), to_fp32(4 * x, 3))


def to_fp32(numerator: np.ndarray, denominator: int) -> np.ndarray:
    """Quotients between 2^23 and 2^25 to 24 bits, nearest even."""
    near = to_nearest(numerator, denominator)
    return np.where(near < 2**24, near, 2 * to_nearest(numerator, 2 * denominator))


def to_nearest(a: np.ndarray, b: int) -> np.ndarray:
    whole, rest = np.divmod(a, b)
    return whole + ((2 * rest > b) | ((2 * rest == b) & (whole % 2 == 1)))


def of(operator: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What the kernels give and what the plain form does; or the message of both, if they refuse."""
    found = []
    for impl in ("triton", "reference"):
        try:
            found.append(operator(*arguments, **options, impl=impl))
        except ValueError as refusal:
            found.append(str(refusal))
    return found[0], found[1]


def assert_agree(operator: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    ours, plain = of(operator, *arguments, **options)
    for mine, theirs in zip(ours, plain, strict=True) if isinstance(ours, tuple) else ((ours, plain),):
        if isinstance(mine, NVFP4Tensor) and isinstance(theirs, NVFP4Tensor):
            assert_same_bytes(mine, theirs)
        elif isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(bits(mine), bits(theirs))
        else:
            assert mine == theirs


def bits(x: Tensor) -> Tensor:
    """Bytes of floating point numbers, those of NaN made one."""
    return torch.where(x.isnan(), torch.nan, x).reshape(-1).view(torch.uint8)


def with_nonfinite(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(33, 48, generator=torch.Generator().manual_seed(0))
    x[5, 16:32] = torch.nan
    nan, infinite = x.clone(), x.nan_to_num(2.0)
    nan[2, 3], nan[7, 40] = torch.nan, torch.nan
    infinite[2, 3], infinite[20, 40] = torch.inf, -torch.inf
    both = torch.where(nan.isnan(), nan, infinite)
    return {name: x.to(dtype) for name, x in (("NaN", nan), ("inf", infinite), ("NaN and inf", both))}


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    return samples(dtype) | with_nonfinite(dtype)


@pytest.mark.parametrize("numerics", MODES)
def test_every_input_gives_the_bytes_of_the_plain_form(numerics: str) -> None:
    for x in inputs(torch.bfloat16).values():
        assert_agree(quantize, x, Format(numerics=numerics))


@pytest.mark.parametrize(("numerics", "format"), ALL)
def test_every_format_gives_the_bytes_of_the_plain_form(numerics: str, format: str) -> None:
    settings = Format(numerics=numerics, **FORMATS[format])
    for name in ("blocks far apart", "zeros"):
        assert_agree(quantize, samples(torch.bfloat16)[name], settings)
    assert_agree(quantize, with_nonfinite(torch.float32)["NaN and inf"], settings, amax=torch.tensor(3.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("numerics", "format"), ALL)
def test_every_format_of_every_input_gives_the_bytes_of_the_plain_form(
    numerics: str, format: str, dtype: torch.dtype
) -> None:
    settings = Format(numerics=numerics, **FORMATS[format])
    for name, x in inputs(dtype).items():
        if numerics == "torchao" and dtype == torch.float16 and "NaN" in name:
            continue  # whose codes follow from the bits of NaN, and torch's maximum of fp16 gives its own
        for amax in (None, torch.tensor(3.0)):
            assert_agree(quantize, x, settings, amax=amax)
            assert_agree(quantize_columns, x.T.contiguous(), settings, amax=amax)
        assert_agree(quantize_dequantize, x, settings)


SIZES = ((1, 16), (130, 80), (5, 40), (16, 23))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the host code leaves to the kernels is full of ones."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(made: Tensor) -> Tensor:
        made.untyped_storage().fill_(0xFF)
        return made

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("format", ["plain", "swizzled squares", "stochastic", "mse"])
def test_odd_sizes_leave_nothing_unwritten(size: tuple[int, int], format: str, poisoned: None) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    settings = Format(**FORMATS[format], pad=True)
    assert_agree(quantize, x, settings)
    assert_agree(quantize_columns, x, settings)
    assert_agree(quantize_both, x, settings, Format(pad=True, swizzled=True))
    assert_agree(quantize_dequantize, x, settings)
    packed = quantize(x, settings, impl="reference")
    for dtype in (torch.float32, torch.bfloat16):
        assert_agree(dequantize, packed, dtype)


@pytest.mark.parametrize("format", ["swizzled squares", "stochastic"])
def test_a_row_of_many_tiles(format: str, poisoned: None) -> None:
    x = torch.randn(19, 1040, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_agree(quantize, x, Format(**FORMATS[format]))
    assert_agree(quantize_columns, x.T.contiguous(), Format(**FORMATS[format]))


@pytest.mark.parametrize("width", [16, 48, 272])
def test_the_transform_of_columns_has_its_own_amax(width: int, poisoned: None) -> None:
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(2))
    assert_agree(quantize_both, x, Format(swizzled=True), Format(signs=TE_SIGNS, swizzled=True, **STOCHASTIC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_amax_of_every_input(dtype: torch.dtype) -> None:
    for x in inputs(dtype).values():
        assert_agree(global_amax, x)
    assert_agree(global_amax, torch.empty(0, 16, dtype=dtype))
    assert_agree(global_amax, torch.arange(7.0).to(dtype))


@pytest.mark.parametrize("numerics", MODES)
def test_values_come_back_as_the_plain_form_gives_them(numerics: str) -> None:
    for name in ("normal * 2^-126", "normal * 2^0", "blocks far apart", "midpoints", "zeros"):
        for settings in (Format(numerics=numerics), Format(numerics=numerics, **STOCHASTIC)):
            assert_agree(quantize_dequantize, samples(torch.bfloat16)[name], settings)


def test_random_numbers_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples(torch.bfloat16)["elements far apart"]
    first = quantize(x, Format(**STOCHASTIC), impl="triton")
    monkeypatch.setattr(triton_ops, "A", 16)
    monkeypatch.setattr(triton_ops, "B", 8)
    monkeypatch.setattr(triton_ops, "TILE", triton_ops.TILE | {"A": 16, "B": 8})
    assert_same_bytes(quantize(x, Format(**STOCHASTIC), impl="triton"), first)
    other = quantize(x, Format(rounding="stochastic", seed=8), impl="triton")
    assert not torch.equal(other.codes, first.codes)


def test_nothing_of_nothing() -> None:
    x = torch.empty(0, 32)
    for operator in (quantize, quantize_dequantize, squared_relu_quantize):
        assert_agree(operator, x)
    assert_agree(quantize_both, x)
    assert_agree(rms_norm_quantize, x, torch.ones(32), 1e-5)


def test_what_the_kernels_do_not_take_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(32, 64)
    for operator, options in ((quantize, {}), (quantize_columns, {}), (quantize_dequantize, {})):
        with pytest.raises(ValueError, match=r"impl = 'triton' cannot run: strides \(1, 64\).*contiguous"):
            operator(x.T, **options, impl="triton")
    long = torch.empty(1, 32784)
    with pytest.raises(ValueError, match="rows of 32784; the kernel holds up to 32768"):
        rms_norm_quantize(long, long[0], 1e-5, impl="triton")
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO, "mopd_kernels"):
        for _ in range(2):
            assert_same_bytes(quantize(x), quantize(x, impl="reference"))
    assert caplog.messages == ["nvfp4.quantize: reference (the tensors are not on CUDA)"]
    monkeypatch.setattr("mopd_kernels.nvfp4.operators.interpreting", lambda: False)
    with pytest.raises(ValueError, match="the kernels need CUDA"):
        quantize(x, impl="triton")
