"""Stochastic rounding and the Hadamard transform of NVFP4: Philox's published vectors, every random byte, bias over a
million draws, a stream that knows only an element's place, and the transform against its matrix."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd_kernels.nvfp4 import TE_SIGNS, Format, dequantize, quantize, quantize_columns, quantize_dequantize, tensor
from mopd_kernels.nvfp4.grids import e2m1_values, unpack
from mopd_kernels.nvfp4.hadamard import inverse, transform
from mopd_kernels.nvfp4.rounding import philox, random_bytes, stochastic_e2m1

SEEDED = Format(rounding="stochastic", seed=20)


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_vectors_published_with_it(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """philox4x32-10 of the known answers (kat_vectors) of Random123."""
    c0, c1, c2, c3 = words(*counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == expected


def test_bytes_are_philox_of_the_run_under_the_seed() -> None:
    first = random_bytes(0, 1, 0, torch.device("cpu"))[0].tolist()
    assert bytes(first) == bytes.fromhex("d5e82766 8dc569e1 4cac57bc d8db009b")
    seed, run = (7 << 32) + 5, (3 << 32) + 9
    expected = philox((torch.tensor(9), torch.tensor(3), torch.tensor(0), torch.tensor(0)), (5, 7))
    drawn = random_bytes(run - 1, 2, seed, torch.device("cpu"))
    assert drawn[1].tolist() == [int(word) >> 8 * byte & 255 for word in expected for byte in range(4)]


def test_every_random_byte_rounds_up_as_often_as_its_place_says() -> None:
    """Between two grid values ``f`` of the way up, floor(256 f) of the 256 bytes round up: never too often, and too
    seldom by less than 1/256."""
    grid = [Fraction(value) for value in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
    x = torch.cat((torch.linspace(0, 6, 1537), torch.tensor([0.3, 1.9999999, 2.0000002, 3.9999998, 5.9999995, 1e-30])))
    codes = stochastic_e2m1(x[:, None].expand(-1, 256), torch.arange(256, dtype=torch.int32).expand(len(x), -1))
    for value, row in zip(x.tolist(), codes, strict=True):
        below = max(code for code in range(8) if grid[code] <= Fraction(value))
        counts = torch.bincount(row, minlength=9).tolist()
        if below == 7:
            assert counts[7] == 256
            continue
        place = (Fraction(value) - grid[below]) / (grid[below + 1] - grid[below])
        # fp32 rounds value + jitter, so that a number 2^-24 short of a grid value may count as on it.
        assert counts[below] + counts[below + 1] == 256, value
        assert 256 * place - 1 < counts[below + 1] <= 256 * (place + Fraction(1, 2**20)), value
    assert stochastic_e2m1(torch.tensor([6.5, 1e9, torch.inf, torch.nan]), torch.full((4,), 255)).tolist() == [7] * 4


def test_it_is_unbiased_over_a_million_draws() -> None:
    """Errors in steps of the grid. Signed they cancel; in magnitude 8 bits lose between 0 and 1/256, 1/512 on average.
    Both within five standard errors."""
    torch.manual_seed(0)
    x = torch.randn(1000, 1024)
    ours = quantize(x, SEEDED)
    steps = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0])
    scaled = x / (ours.scales.float() * ours.multiplier).repeat_interleave(16, dim=1)
    inside = scaled.abs() < 5.99  # the largest of a block may saturate
    error = (e2m1_values(x)[unpack(ours.codes).int()] - scaled)[inside]
    low = torch.bucketize(scaled[inside].abs(), torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6]), right=True)
    error = error / steps[low]
    bound = 5 * float(error.std()) / error.numel() ** 0.5
    assert error.numel() > 900_000 and bound < 0.003
    assert abs(float(error.mean())) < bound
    assert abs(float((error * scaled[inside].sign()).mean()) + 1 / 512) < bound + 1 / 1024
    nearest = dequantize(quantize(torch.full((64, 1024), 0.3).index_fill_(1, torch.arange(0, 1024, 16), 6.0)))[:, 1]
    assert nearest.unique().tolist() == [0.5]  # what always rounds one way is what this is for


def test_the_stream_knows_only_the_place_of_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.rand(100, 96) * 2
    x[:, ::16] = 6.0  # so that every block has one scale, whatever its shape
    first = quantize(x, SEEDED)
    assert torch.equal(quantize(x, SEEDED).codes, first.codes)
    square = quantize(x, Format(rounding="stochastic", seed=20, block="16x16", swizzled=True))
    assert torch.equal(square.codes, first.codes)
    for chunk in (1, 16 * 96, 48 * 96):
        monkeypatch.setattr(tensor, "CHUNK", chunk)
        assert torch.equal(quantize(x, SEEDED).codes, first.codes)
    whole = torch.cat((x, x.flip(0)))
    assert torch.equal(quantize(whole, SEEDED).codes[:100], first.codes)
    assert torch.equal(quantize_columns(x.T, SEEDED).codes, first.codes)
    assert not torch.equal(quantize(x, Format(rounding="stochastic", seed=21)).codes, first.codes)
    assert not torch.equal(quantize(x[16:], SEEDED).codes, first.codes[16:])
    wide = quantize(torch.cat((x, torch.zeros(100, 4)), dim=1), Format(rounding="stochastic", seed=20, pad=True))
    narrow = quantize(torch.cat((x, torch.zeros(100, 16)), dim=1), SEEDED)
    assert torch.equal(wide.codes, narrow.codes)


@pytest.mark.parametrize("name", ["torchao", "modelopt", "vllm", "compressed_tensors"])
def test_it_works_in_every_mode(name: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(64, 256).bfloat16()
    drawn = torch.stack(
        [quantize_dequantize(x.float(), Format(name, rounding="stochastic", seed=s)) for s in range(64)]
    )
    nearest = quantize_dequantize(x.float(), Format(name))
    error = (drawn.mean(0) - x).abs().mean()
    assert error < 0.25 * (nearest - x).abs().mean()  # 64 draws average out what rounding to nearest keeps


def hadamard() -> Tensor:
    """fp64 ``[16, 16]``: Sylvester's matrix from its definition."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def test_the_transform_is_its_matrix_rounded_to_bf16() -> None:
    torch.manual_seed(3)
    signs = tuple(int(s) for s in torch.randint(0, 2, (16,)) * 2 - 1)
    for chosen in (TE_SIGNS, signs):
        matrix = torch.tensor(chosen, dtype=torch.float64).diag() @ hadamard() / 4
        x = torch.randint(-128, 129, (37, 80)).bfloat16()  # sums of which fp32 holds exactly
        expected = (x.double().unflatten(1, (-1, 16)) @ matrix).flatten(1).float().bfloat16()
        assert torch.equal(transform(x, chosen), expected)
        noise = torch.randn(37, 80)
        close = (noise.double().unflatten(1, (-1, 16)) @ matrix).flatten(1)
        torch.testing.assert_close(transform(noise, chosen).double(), close, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(inverse(transform(x, chosen), chosen), x.float(), rtol=0, atol=2.0)
    assert len(TE_SIGNS) == 16 and sum(TE_SIGNS) == -4


def test_sums_of_the_transform_are_taken_as_a_butterfly() -> None:
    """Numbers 2^30 apart, so that the order of fp32 sums shows."""
    torch.manual_seed(4)
    x = (torch.randn(50, 16) * torch.exp2(torch.randint(-15, 15, (50, 16)).float())).bfloat16()
    rows = x.float().numpy() * np.array(TE_SIGNS, dtype=np.float32)
    for distance in (1, 2, 4, 8):
        for i in range(16):
            if not i & distance:
                low, high = rows[:, i].copy(), rows[:, i | distance].copy()
                rows[:, i], rows[:, i | distance] = low + high, low - high
    expected = torch.from_numpy(rows * np.float32(0.25)).bfloat16()
    assert torch.equal(transform(x, TE_SIGNS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_transformed_is_transforming_then_quantizing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    monkeypatch.setattr(tensor, "CHUNK", 16 * 64)
    x = (torch.randn(70, 64) * 3).to(dtype)
    x[3, 5] = 40.0  # its transform is 10: the global scale must come after
    for name in ("te", "modelopt", "compressed_tensors"):
        ours = quantize(x, Format(name, signs=TE_SIGNS, swizzled=True))
        plain = quantize(transform(x, TE_SIGNS), Format(name, swizzled=True))
        assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.global_scale, plain.global_scale)
        assert torch.equal(ours.scales.view(torch.uint8), plain.scales.view(torch.uint8))
        assert ours.transformed == TE_SIGNS and plain.transformed is None
    columns = quantize_columns(x[:64], Format(signs=TE_SIGNS))
    assert torch.equal(columns.codes, quantize(transform(x[:64].T, TE_SIGNS)).codes)


def test_a_transform_of_both_operands_cancels_in_their_product() -> None:
    """x.T @ g along rows, as the gradient of a weight. Dequantizing keeps the transform: of one operand alone it
    leaves nothing of the product."""
    torch.manual_seed(6)
    x, g = torch.randn(256, 48), torch.randn(256, 32)
    exact = x.double().T @ g.double()

    def error(of_x: tuple[int, ...] | None, of_g: tuple[int, ...] | None) -> float:
        a, b = (dequantize(quantize_columns(t, Format(signs=signs))) for t, signs in ((x, of_x), (g, of_g)))
        return float(((a @ b.T).double() - exact).norm() / exact.norm())

    assert error(TE_SIGNS, TE_SIGNS) < 1.1 * error(None, None) < 0.2
    assert error(TE_SIGNS, None) > 1.0
