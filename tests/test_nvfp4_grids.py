"""The grids of NVFP4 against tables built from their definition: every bf16 value, every fp32 value of [0, 6.5]."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from mopd_kernels.nvfp4.grids import e2m1_values, pack, to_e2m1, to_e4m3, unpack

E2M1 = [Fraction(value) for value in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def e4m3() -> list[Fraction]:
    """Values of codes 0..126: sign, 4 exponent bits of bias 7, 3 mantissa bits; 127 is NaN."""
    subnormal = [Fraction(mantissa, 512) for mantissa in range(8)]
    normal = [Fraction(8 + mantissa, 8) * Fraction(2) ** (e - 7) for e in range(1, 16) for mantissa in range(8)]
    return (subnormal + normal)[:-1]


def nearest_even(value: Fraction, grid: list[Fraction]) -> int:
    """Index of the nearest of the ascending grid, the even one of two equally near, the last for larger values."""
    above = bisect_left(grid, value)
    if above == len(grid):
        return above - 1
    if above == 0 or grid[above] == value:
        return above
    to_below, to_above = value - grid[above - 1], grid[above] - value
    if to_below != to_above:
        return above if to_above < to_below else above - 1
    return above if above % 2 == 0 else above - 1


def every_bf16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def test_every_bf16_value_to_e2m1() -> None:
    x = every_bf16().float()
    expected = [7 if v != v or abs(v) == torch.inf else nearest_even(abs(Fraction(v)), E2M1) for v in x.tolist()]
    assert to_e2m1(x).tolist() == expected


def test_every_bf16_value_to_e4m3() -> None:
    grid, x = e4m3(), every_bf16().float()
    codes = to_e4m3(x.abs()).view(torch.uint8)
    assert (codes[x.isnan()] & 0x7F == 0x7F).all()  # the sign of NaN is the processor's
    numbers = x[~x.isnan()]
    expected = [126 if abs(v) == torch.inf else nearest_even(abs(Fraction(v)), grid) for v in numbers.tolist()]
    assert codes[~x.isnan()].tolist() == expected
    assert to_e4m3(-x[x > 0]).view(torch.uint8).unique().tolist() == [0]  # no scale is negative
    raised = to_e4m3(torch.linspace(0, 0.1, 99), low=0.0625).float()
    assert set(raised.tolist()) == {step / 128 for step in range(8, 14)}


def test_values_of_every_code() -> None:
    assert torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist() == [
        float(g) for g in e4m3()
    ]
    values = e2m1_values(torch.zeros(()))
    assert values.tolist() == [*map(float, E2M1), *(-float(v) for v in E2M1)] and torch.signbit(values)[8]
    assert to_e2m1(values).tolist() == [*range(8), *range(8)]


def test_e2m1_rounds_the_neighbours_of_each_midpoint_apart() -> None:
    for code in range(7):
        midpoint = torch.tensor(float((E2M1[code] + E2M1[code + 1]) / 2))
        below, above = (midpoint.view(torch.int32) + step for step in (-1, 1))
        assert to_e2m1(below.view(torch.float32)) == code and to_e2m1(above.view(torch.float32)) == code + 1
        assert to_e2m1(midpoint) == to_e2m1(-midpoint) == code + code % 2


@pytest.mark.slow
def test_every_fp32_value_up_to_6_5_to_e2m1() -> None:
    """1,087,373,313 numbers, by counting the midpoints below: from an even code a midpoint itself still counts as below
    it, from an odd one as above."""
    last = int(torch.tensor(6.5).view(torch.int32))
    midpoints = torch.tensor([float((low + high) / 2) for low, high in pairwise(E2M1)])
    bounds = midpoints.view(torch.int32) + torch.tensor([1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)  # first of code + 1
    for start in range(0, last + 1, 1 << 24):
        bits = torch.arange(start, min(start + (1 << 24), last + 1), dtype=torch.int32)
        expected = torch.zeros_like(bits, dtype=torch.uint8)
        for bound in bounds:
            expected += bits >= bound
        assert torch.equal(to_e2m1(bits.view(torch.float32)), expected), hex(start)


def test_packing_puts_the_even_element_into_the_low_nibble() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    packed = pack(codes)
    assert packed[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack(packed), codes)
