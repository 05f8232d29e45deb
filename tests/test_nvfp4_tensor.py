"""What an NVFP4 matrix is made of: layouts of scales, padding, columns, bytes, chunks, and errors that say what."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    swizzle,
    tensor,
    unswizzle,
)
from mopd_kernels.nvfp4.numerics import MODES
from mopd_kernels.testing import LargestTensor


def bits(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def equal(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(bits(a.scales), bits(b.scales))
        and torch.equal(a.global_scale, b.global_scale)
        and (a.shape, a.swizzled, a.bound, a.transformed, a.numerics)
        == (b.shape, b.swizzled, b.bound, b.transformed, b.numerics)
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 14), seed=st.integers(0, 99))
def test_swizzled_scales_lie_where_cublas_reads_them(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randint(1, 127, (rows, columns), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    laid = swizzle(linear)
    tall, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    assert laid.shape == (tall, wide) and laid.dtype == torch.float8_e4m3fn
    flat = bits(laid).flatten()
    for _ in range(20):
        r, c = (int(torch.randint(0, n, (), generator=generator)) for n in (tall, wide))
        offset = ((r // 128 * (wide // 4) + c // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4
        assert flat[offset] == (bits(linear)[r, c] if r < rows and c < columns else 0)
    assert torch.equal(bits(unswizzle(laid, rows, columns)), bits(linear))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 9)])
def test_the_swizzle_is_that_of_torchao(shape: tuple[int, int]) -> None:
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

    linear = torch.randint(0, 127, shape, dtype=torch.uint8)
    ours = bits(swizzle(linear.view(torch.float8_e4m3fn)))
    assert torch.equal(ours.flatten(), to_blocked(linear))
    assert torch.equal(from_blocked(ours.flatten(), *shape), linear)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 15), (130, 17), (33, 100)])
def test_padding_is_zero_and_changes_nothing_else(name: Any, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    wide = -(-columns // 16) * 16
    filled = torch.zeros(rows, wide).index_copy_(1, torch.arange(columns), x)
    for block, swizzled in itertools.product(("1x16", "16x16"), (False, True)):
        format = Format(name, block=block, swizzled=swizzled, pad=True)
        ours, whole = quantize(x, format), quantize(filled, format)
        assert torch.equal(ours.codes, whole.codes) and torch.equal(bits(ours.scales), bits(whole.scales))
        assert ours.shape == (rows, columns) and ours.codes.shape == (rows, wide // 2)
        assert dequantize(ours).shape == (rows, columns) == quantize_dequantize(x, format).shape
        assert torch.equal(dequantize(ours), dequantize(whole)[:, :columns])
        codes = torch.stack((ours.codes & 15, ours.codes >> 4), -1).flatten(1)
        assert not codes[:, columns:].any()
        if swizzled:
            linear = bits(unswizzle(ours.scales, 128 * -(-rows // 128), 4 * -(-wide // 64)))
            assert not linear[rows:].any() and not linear[:, wide // 16 :].any()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("shape", [(0, 16), (0, 0), (3, 0), (0, 20)])
def test_an_empty_matrix_gives_an_empty_one(name: Any, shape: tuple[int, int]) -> None:
    ways: list[dict[str, Any]] = [{}, {"block": "16x16", "swizzled": True}, {"rounding": "stochastic", "seed": 1}]
    ways += [{"four_over_six": "mse"}] if MODES[name].pair else []
    for way in ways:
        ours = quantize(torch.zeros(shape), Format(name, pad=True, **way))
        assert ours.shape == shape == dequantize(ours).shape and ours.codes.numel() == 0


def test_codes_of_padding_are_zero_even_where_zeros_become_nan() -> None:
    ours = quantize(torch.zeros(2, 20), Format("torchao", pad=True))
    assert ours.codes[:, 10:].tolist() == [[0] * 6] * 2 and ours.codes[:, :10].all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_the_last_square_of_a_ragged_matrix_is_shorter(rows: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(rows, 48) * torch.exp2(torch.randint(-3, 4, (rows, 1)).float())
    ours = quantize(x, Format(block="16x16"))
    for top in range(0, rows, 16):
        square = x[top : top + 16]
        one_row = quantize(square.abs().amax(0, keepdim=True), amax=global_amax(x))
        assert torch.equal(bits(ours.scales)[top : top + 16], bits(one_row.scales).expand(len(square), -1))
        alone = quantize(square, Format(block="16x16"), amax=global_amax(x))
        assert torch.equal(alone.codes, ours.codes[top : top + 16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_rows_of_the_transpose(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(70, 96).to(dtype)
    rows = Format("modelopt", swizzled=True)
    columns = Format(signs=None, rounding="stochastic", seed=3, pad=True, block="16x16")
    transposed = quantize(x.T.contiguous(), columns)
    assert equal(quantize_columns(x, columns), transposed) and transposed.shape == (96, 70)
    first, second = quantize_both(x, rows, columns, amax=torch.tensor(9.0), columns_amax=torch.tensor(5.0))
    assert equal(first, quantize(x, rows, amax=torch.tensor(9.0)))
    assert equal(second, quantize(x.T.contiguous(), columns, amax=torch.tensor(5.0)))
    assert equal(quantize(x.T, Format(pad=True)), quantize(x.T.contiguous(), Format(pad=True)))


@pytest.mark.parametrize(
    "format",
    [
        Format(),
        Format("vllm", pad=True),
        Format(block="16x16", swizzled=True),
        Format("modelopt", block="16x16", four_over_six="mse"),
        Format(signs=TE_SIGNS),
    ],
    ids=str,
)
def test_chunks_change_no_byte_and_bound_the_workspace(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x = torch.randn(200, 512).bfloat16()
    whole = quantize(x, format)
    monkeypatch.setattr(tensor, "CHUNK", 1 << 13)
    with LargestTensor(torch.float32) as largest:
        assert equal(quantize(x, format), whole)
        dequantize(whole, torch.bfloat16)
    assert largest.elements <= 1 << 13 and x.numel() > 10 * largest.elements


def test_quantized_bytes_are_four_and_a_half_bits_an_element() -> None:
    ours = quantize(torch.randn(256, 1024))
    assert ours.nbytes == 256 * 512 + 256 * 64 + 4 and ours.bits_per_element == pytest.approx(4.5, abs=1e-3)
    ragged = quantize(torch.randn(130, 40), Format(swizzled=True, pad=True))
    assert ragged.nbytes == 130 * 24 + 256 * 4 + 4


def test_global_amax_takes_any_shape_and_keeps_nan() -> None:
    x = torch.tensor([[[1.0, -7.5], [3.0, 2.0]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        amax = global_amax(x.to(dtype))
        assert amax.dtype == torch.float32 and amax.shape == () and amax.item() == 7.5
    assert global_amax(torch.zeros(0, 4)).item() == 0.0 and not torch.signbit(global_amax(torch.zeros(3)))
    assert global_amax(torch.tensor([1.0, torch.nan])).isnan() and global_amax(-x * torch.inf).item() == torch.inf


def test_no_operator_has_a_gradient() -> None:
    x = torch.nn.Parameter(torch.randn(4, 32))
    ours = quantize(x, Format("modelopt"))
    for result in (ours.global_scale, ours.scales, dequantize(ours), quantize_dequantize(x), global_amax(x)):
        assert not result.requires_grad


@pytest.mark.parametrize("name", MODES)
def test_a_decoded_block_is_codes_times_scale_times_multiplier(name: Any) -> None:
    torch.manual_seed(4)
    ours = quantize(torch.randn(32, 64) * 3, Format(name, swizzled=True))
    codes = torch.stack((ours.codes & 15, ours.codes >> 4), -1).flatten(1)
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).int()]
    value = torch.where(codes > 7, -magnitude, magnitude) * ours.linear_scales().float().repeat_interleave(16, 1)
    assert torch.equal(value.bfloat16().float(), value)  # 2 bits times 4 bits of significand: exact in bf16
    torch.testing.assert_close(value * ours.multiplier, dequantize(ours), rtol=3e-7, atol=0)
    assert torch.equal(dequantize(ours, torch.bfloat16), dequantize(ours).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scales": torch.zeros(3, 4).to(torch.float8_e4m3fn)},
            r"scales is .*\[3, 4\]; a matrix \[4, 64\] with linear",
        ),
        ({"scales": torch.zeros(4, 4)}, r"scales is torch.float32 \[4, 4\].* takes torch.float8_e4m3fn \[4, 4\]"),
        ({"swizzled": True}, r"scales is .*\[4, 4\].* with swizzled 128x4 scales takes .* \[128, 4\]"),
        ({"codes": torch.zeros(4, 64, dtype=torch.uint8)}, r"codes is torch.uint8 \[4, 64\].* takes .*\[4, 32\]"),
        ({"global_scale": torch.ones(1)}, r"global_scale is torch.float32 \[1\].* takes torch.float32 \[\]"),
        ({"numerics": "torch_ao"}, r"numerics = 'torch_ao'.*did you mean 'torchao'"),
    ],
)
def test_a_tensor_that_does_not_fit_says_what_would(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(quantize(torch.randn(4, 64)), **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "stochastic"}, r"seed = None: rounding = 'stochastic' needs an integer"),
        ({"rounding": "stochastic", "seed": -1}, r"seed = -1"),
        ({"seed": 1}, r"seed = 1: rounding = 'nearest' draws nothing; set rounding = 'stochastic'"),
        ({"rounding": "even"}, r"rounding = 'even': expected one of nearest, stochastic"),
        ({"block": "16"}, r"block = '16': expected one of 1x16, 16x16"),
        ({"signs": (1,) * 15}, r"signs = .*takes 16 of 1 and -1"),
        ({"signs": (2,) * 16}, r"signs = .*takes 16 of 1 and -1"),
    ],
)
def test_a_format_without_meaning_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format(**arguments)


@pytest.mark.parametrize(
    ("x", "format", "amax", "message"),
    [
        (torch.ones(2, 40), Format(), None, r"\[2, 40\] has 40 elements along the blocks.*multiple of 16.*Format.pad"),
        (torch.ones(2, 40), Format(signs=TE_SIGNS, pad=True), None, r"40 elements.*signs.*pad x before"),
        (torch.ones(32), Format(), None, r"x is torch.float32 \[32\]: NVFP4 takes a matrix"),
        (torch.ones(2, 32).double(), Format(), None, r"x is torch.float64"),
        (torch.ones(2, 32), Format(), torch.ones(1), r"amax is torch.float32 \[1\].*expected torch.float32 \[\]"),
        (torch.ones(2, 32), Format(), torch.tensor(1.0).bfloat16(), r"amax is torch.bfloat16"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_every_operator(
    x: Tensor, format: Format, amax: Tensor | None, message: str
) -> None:
    for operator in (quantize, quantize_dequantize):
        with pytest.raises(ValueError, match=message):
            operator(x, format, amax=amax)
    if x.ndim == 2 and x.shape[1] == 40:
        with pytest.raises(ValueError, match=r"shape \[40, 2\] has 40 elements"):
            quantize_columns(x.T, format)
        with pytest.raises(ValueError, match=r"shape \[40, 2\] has 40 elements"):
            quantize_both(x.T, Format(pad=True), format)


def test_unswizzling_linear_scales_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scales of shape \[130, 5\].* are \[256, 8\]; linear scales are not"):
        unswizzle(torch.zeros(130, 5), 130, 5)


def test_an_impl_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"impl = 'cuda': expected auto, triton or reference"):
        quantize(torch.ones(2, 16), impl="cuda")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"nvfp4.quantize: impl = 'triton' cannot run: tensors on cpu; the kernels"):
        quantize(torch.ones(2, 16), impl="triton")
