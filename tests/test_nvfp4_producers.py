"""RMS norm and squared ReLU straight to NVFP4: the kernels against norm and quantizer, and the norm against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_kernels.nvfp4 import (
    TE_SIGNS,
    Format,
    quantize,
    rms_norm_quantize,
    squared_relu_quantize,
    triton_ops,
)
from mopd_kernels.nvfp4.producers import rms_norm, squared_relu
from mopd_kernels.nvfp4.testing import assert_same_bytes

# The interpreter divides by numpy, which warns of what IEEE rules define.
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swizzled": {"swizzled": True},
    "squares": {"block": "16x16", "swizzled": True},
    "stochastic": {"rounding": "stochastic", "seed": 5},
    "Hadamard": {"signs": TE_SIGNS},
    "mse, modelopt": {"four_over_six": "mse", "numerics": "modelopt"},
    "vllm": {"numerics": "vllm"},
}


def normal(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Rows of different sizes, and a weight."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    return x.to(dtype), torch.randn(width, generator=generator).to(dtype)


@pytest.mark.parametrize("known", [True, False], ids=["amax known", "two passes"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_norm_gives_the_bytes_of_norm_then_quantize(
    format: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = normal(21, 144)
    empty = torch.empty
    monkeypatch.setattr(triton_ops.torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    y = rms_norm(x, weight, 1e-5)
    amax = 0.75 * y.abs().amax().float() if known else None
    ours = rms_norm_quantize(x, weight, 1e-5, Format(**FORMATS[format]), amax=amax, impl="triton")
    assert_same_bytes(ours, quantize(y, Format(**FORMATS[format]), amax=amax, impl="reference"))


def poisoned(made: Tensor) -> Tensor:
    made.untyped_storage().fill_(0xFF)
    return made


@pytest.mark.parametrize("known", [True, False], ids=["amax known", "two passes"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_square_gives_the_bytes_of_square_then_quantize(format: str, known: bool) -> None:
    x, _ = normal(21, 144)
    x[3, 5], x[4, :16] = -0.0, -1.0
    y = torch.relu(x) ** 2
    amax = 0.75 * y.abs().amax().float() if known else None
    ours = squared_relu_quantize(x, Format(**FORMATS[format]), amax=amax, impl="triton")
    assert_same_bytes(ours, quantize(y, Format(**FORMATS[format]), amax=amax, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 16), (3, 48), (5, 40), (2, 272)], ids=str)
def test_sizes_and_dtypes(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*size, dtype)
    for settings in (Format(pad=True), Format(pad=True, swizzled=True)):
        for amax in (None, torch.tensor(2.0)):
            for impl in ("triton", "reference"):
                y = quantize(rms_norm(x, weight, 1e-6), settings, amax=amax, impl="reference")
                assert_same_bytes(rms_norm_quantize(x, weight, 1e-6, settings, amax=amax, impl=impl), y)
                y = quantize(squared_relu(x), settings, amax=amax, impl="reference")
                assert_same_bytes(squared_relu_quantize(x, settings, amax=amax, impl=impl), y)


def test_the_norm_is_that_of_fp64() -> None:
    x, weight = normal(64, 1000, torch.float32)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), exact, rtol=4e-7, atol=0)
    low = rms_norm(x.bfloat16(), weight, 1e-5)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.double(), exact, rtol=2**-7, atol=0)


def test_a_row_with_nan_stays_within_its_row() -> None:
    x, weight = normal(4, 64)
    x[1, 7] = torch.nan
    for amax in (None, torch.tensor(3.0)):
        ours = rms_norm_quantize(x, weight, 1e-5, amax=amax, impl="triton")
        assert_same_bytes(ours, quantize(rms_norm(x, weight, 1e-5), amax=amax, impl="reference"))
        assert (ours.codes[1] == 0x77).all() and not (ours.codes[[0, 2, 3]] == 0x77).all()


def test_a_weight_that_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[16\] on cpu; the norm of x \[4, 32\]"):
        rms_norm_quantize(x, torch.ones(16), 1e-5)
    with pytest.raises(ValueError, match="no multiple of 16"):
        squared_relu_quantize(torch.randn(4, 20))
