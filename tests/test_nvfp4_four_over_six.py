"""Four-over-six: Transformer Engine's choice recomputed in numpy, never the worse of two scales, and what it gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd_kernels.nvfp4 import TE_SIGNS, Format, dequantize, global_amax, quantize
from mopd_kernels.nvfp4.four_over_six import square_error
from mopd_kernels.nvfp4.grids import e2m1_values, to_e2m1, unpack
from mopd_kernels.nvfp4.numerics import MODES
from mopd_kernels.nvfp4.testing import samples

HAVING = ("te", "modelopt")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the nearest of an ascending grid, the even one of two equally near."""
    distance = np.abs(np.minimum(values.astype(np.float64), grid[-1])[..., None] - grid.astype(np.float64))
    is_nearest = distance == distance.min(-1, keepdims=True)
    return (is_nearest * (2 - np.arange(len(grid)) % 2)).argmax(-1)


def candidate(block: np.ndarray, amax: np.float32, factor: np.float32, error: str) -> tuple[int, list[int], list]:
    """Scale byte, codes and the errors in element order of fp32 rows ``block`` under one of the two scales."""
    six, encode, one = np.float32(6), np.float32(1536) / amax, np.float32(1)
    scale = int(nearest(np.abs(block).max() / six * encode * factor, E4M3))
    inverse = min(one / (E4M3[scale] * (one / encode)), np.finfo(np.float32).max)
    codes = nearest(np.abs(block * inverse), E2M1)
    values = np.copysign(E2M1[codes], block)
    difference = ((values * E4M3[scale]) * amax) / np.float32(1536) - block
    terms = difference * difference if error == "mse" else np.abs(difference)
    rows = []
    for row in terms:
        total = np.float32(0)
        for term in row:
            total = max(total, term) if error == "max" else total + term
        rows.append(total)
    return scale, (codes | 8 * np.signbit(block)).flatten().tolist(), rows


def tree(rows: list) -> np.float32:
    while len(rows) > 1:
        half = len(rows) // 2
        rows = [rows[i] + rows[i + half] for i in range(half)]
    return rows[0]


@pytest.mark.parametrize(("error", "block"), itertools.product(("mae", "mse", "max"), ("1x16", "16x16")))
def test_choice_of_transformer_engine_recomputed(error: str, block: str) -> None:
    height = 1 if block == "1x16" else 16
    taken = {4: 0, 6: 0}
    torch.manual_seed(1)
    cases = samples(torch.bfloat16) | {"squares": torch.rand(48, 160).bfloat16()}
    for label in ("normal * 2^0", "normal * 2^-40", "elements far apart", "midpoints", "steps of the scale", "squares"):
        x = cases[label]
        x = x[: len(x) // 16 * 16][:48]
        ours = quantize(x, Format(four_over_six=error, block=block))
        amax, rows = global_amax(x).numpy(), x.float().numpy()
        scales = ours.scales.view(torch.uint8)
        codes = unpack(ours.codes)
        for top, run in itertools.product(range(0, len(x), height), range(x.shape[1] // 16)):
            part = rows[top : top + height, 16 * run : 16 * run + 16]
            six, four = (candidate(part, amax, np.float32(factor), error) for factor in (1, 1.5))
            sums = [max(c[2]) if error == "max" else tree(c[2]) for c in (six, four)]
            chosen = four if sums[1] < sums[0] else six
            taken[4 if chosen is four else 6] += 1
            assert scales[top : top + height, run].unique().tolist() == [chosen[0]], (label, top, run)
            found = codes[top : top + height, 16 * run : 16 * run + 16].flatten().tolist()
            assert found == chosen[1], (label, top, run)
    assert min(taken.values()) > 2


def test_a_tie_takes_six() -> None:
    """Zeros, and a block that both scales hold exactly: 4 under scale 1.5 s is 6 under s."""
    x = torch.zeros(2, 16)
    x[0, 0] = 1536.0  # S = 1
    ours = quantize(x, Format(four_over_six="mae"))
    assert ours.scales.float().tolist() == [[256.0], [0.0]] and ours.codes[0, 0] == 7
    assert ours.bound == 256.0 and ours.multiplier.item() == 1.0


def test_squares_sum_their_rows_as_a_tree_and_pad_with_zeros() -> None:
    runs = torch.zeros(19, 1)
    runs[0], runs[1], runs[9] = 1.0, 2.0**-24, 2.0**-24
    # In turn 1 + 2^-24 + 2^-24 stays 1, and so by neighbours; over distance 8 rows 1 and 9 meet first and give 2^-23.
    assert square_error(runs, "mae")[:, 0].tolist() == [1 + 2.0**-23] * 16 + [0.0] * 3
    runs[18] = 5.0
    assert square_error(runs, "max")[:, 0].tolist() == [1.0] * 16 + [5.0] * 3


def _errors(x: Tensor, amax: Tensor, scales: Tensor, format: Format) -> Tensor:
    """fp64 ``[R, C]``, or of 16 x 16 squares ``[R / 16, C]``: the error of each block under given scales."""
    mode = MODES[format.numerics]
    stored = mode.global_scale(amax, 256.0, x.dtype)
    runs, wide = x.float().unflatten(1, (-1, 16)), scales.float().unsqueeze(-1)
    scaled = mode.scaled(runs, wide, stored, 256.0)
    values = e2m1_values(x)[to_e2m1(scaled).int()].copysign(scaled)
    difference = (values * mode.decode(wide, stored, 256.0)).double() - runs.double()
    blocks = difference if format.block == "1x16" else difference.unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)
    if format.four_over_six == "max":
        return blocks.abs().amax(-1)
    return blocks.square().sum(-1) if format.four_over_six == "mse" else blocks.abs().sum(-1)


@pytest.mark.parametrize(
    ("name", "error", "block"), itertools.product(HAVING, ("mae", "mse", "max"), ("1x16", "16x16"))
)
def test_it_never_takes_the_worse_of_its_two_scales(name: str, error: str, block: str) -> None:
    torch.manual_seed(0)
    format = Format(name, four_over_six=error, block=block)
    for x in (
        torch.randn(64, 512) * 0.02,
        torch.distributions.StudentT(3.0).sample((64, 512)),
        samples(torch.float32)["zeros"],
    ):
        amax = global_amax(x)
        pair = MODES[name].pair
        assert pair is not None
        block_amax = x.unflatten(1, (-1, 16)).abs().amax(-1)
        if block == "16x16":
            block_amax = block_amax.unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, dim=0)
        six, four = (_errors(x, amax, scales, format) for scales in pair(block_amax, amax))
        ours = _errors(x, amax, quantize(x, format).scales, format)
        best = torch.minimum(six, four)
        assert (ours <= best * (1 + 1e-5) + 1e-30).all()  # of equals, which rounding of the fp32 error may swap
        assert (ours < torch.maximum(six, four) * 0.99).any()


@pytest.mark.parametrize("name", HAVING)
def test_it_lowers_the_squared_error_of_gaussian_weights_by_16_percent(name: str) -> None:
    """Median over matrices of the relative mean squared error against the plain scale of the same mode, weights
    N(0, 0.02^2) in bf16 of 256 x 2048, chosen by squared error; the Nemotron 3 Ultra report has -16.4% over the
    projections of its experts."""
    torch.manual_seed(0)

    def error(x: Tensor, chosen: str | None) -> Tensor:
        return (dequantize(quantize(x, Format(name, four_over_six=chosen))).double() - x.double()).square().mean()

    change = []
    for _ in range(7):
        x = (torch.randn(256, 2048) * 0.02).bfloat16()
        plain, mse, mae, largest = (float(error(x, chosen)) for chosen in (None, "mse", "mae", "max"))
        change.append(100 * (mse / plain - 1))
        assert mse < mae < largest < plain
    assert -17 <= sorted(change)[3] <= -15


def test_combinations_that_no_ecosystem_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"four_over_six = 'mse': numerics = 'torchao' has none; .*te, modelopt"):
        Format("torchao", four_over_six="mse")
    with pytest.raises(ValueError, match=r"four_over_six = 'mae' with signs = \(1, 1"):
        Format(four_over_six="mae", signs=TE_SIGNS)
    with pytest.raises(ValueError, match=r"four_over_six = 'mae' with rounding = 'stochastic'"):
        Format(four_over_six="mae", rounding="stochastic", seed=1)
    with pytest.raises(ValueError, match=r"four_over_six = 'abs': expected one of None, mae, mse, max"):
        Format(four_over_six="abs")  # pyright: ignore[reportArgumentType]
