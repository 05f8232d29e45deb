"""Each mode of NVFP4 gives its ecosystem's bytes: torchao, ModelOpt and compressed-tensors are asked; those of
Transformer Engine and vLLM are worked out by hand and recomputed element by element in numpy."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd_kernels.nvfp4 import Format, dequantize, global_amax, quantize
from mopd_kernels.nvfp4.numerics import MODES, named
from mopd_kernels.nvfp4.testing import samples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ASKED = ("torchao", "modelopt", "compressed_tensors")
Bytes = tuple[Tensor, Tensor, Tensor, Tensor]


def _torchao(x: Tensor) -> Bytes:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = x.float() if x.dtype == torch.float16 else x  # it takes fp32 and bf16, and the first thing it does is float()
    scale = per_tensor_amax_to_scale(x.abs().max())
    tensor = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    return tensor.qdata, tensor.scale, scale, tensor.dequantize(torch.float32)


def _modelopt(x: Tensor) -> Bytes:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensor, scales, scale = NVFP4QTensor.quantize(x.clone(), 16)
    values = tensor.dequantize(torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16})
    return tensor._quantized_data, scales, scale, values


def _compressed_tensors(x: Tensor) -> Bytes:
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], weights=NVFP4["weights"])
    scale, blocks = generate_gparam(x.min(), x.max()), x.unflatten(-1, (-1, 16))
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), NVFP4["weights"], global_scale=scale)
    state = {"weight": x, "weight_scale": scales, "weight_global_scale": scale}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    values = NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
    return packed["weight_packed"], packed["weight_scale"], scale[0], values


ORACLES: dict[str, Callable[[Tensor], Bytes]] = {
    "torchao": _torchao,
    "modelopt": _modelopt,
    "compressed_tensors": _compressed_tensors,
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ASKED)
def test_bytes_are_those_of_the_ecosystem(name: str, dtype: torch.dtype) -> None:
    for label, x in (samples(dtype) | {"zeros only": torch.zeros(4, 32, dtype=dtype)}).items():
        codes, scales, scale, values = ORACLES[name](x)
        ours = quantize(x, Format(numerics=name))
        found = [("codes", codes, ours.codes), ("scales", scales, ours.scales), ("global", scale, ours.global_scale)]
        for what, theirs, mine in found:
            assert torch.equal(bits(theirs), bits(mine)), f"{label}: {int((bits(theirs) != bits(mine)).sum())} {what}"
        # By value: ModelOpt reads code 8 as +0, the others as -0.
        torch.testing.assert_close(dequantize(ours, values.dtype), values, rtol=0, atol=0, equal_nan=True, msg=label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["torchao", "modelopt"])
def test_infinity_spreads_as_in_the_ecosystem(name: str, dtype: torch.dtype) -> None:
    x = samples(dtype)["normal * 2^0"].clone()
    x[4, 5], x[9, 17] = torch.inf, -torch.inf
    codes, scales, scale, values = ORACLES[name](x)
    ours = quantize(x, Format(numerics=name))
    assert torch.equal(codes, ours.codes) and torch.equal(bits(scales), bits(ours.scales))
    assert torch.equal(scale, ours.global_scale) and int(ours.scales.float().isnan().sum()) == 2
    torch.testing.assert_close(dequantize(ours), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["torchao", "modelopt"])
def test_nan_makes_the_whole_tensor_nan_as_in_the_ecosystem(name: str, dtype: torch.dtype) -> None:
    x = samples(dtype)["normal * 2^0"].clone()
    x[4, 5], x[9, 17] = torch.nan, -torch.nan
    codes, scales, scale, values = ORACLES[name](x)
    ours = quantize(x, Format(numerics=name))
    for nan in (scale, ours.global_scale, scales.float(), ours.scales.float(), values, dequantize(ours)):
        assert nan.isnan().all()  # what sign and payload a reduction gives NaN is the processor's
    if name == "modelopt":
        assert torch.equal(codes, ours.codes)


@pytest.mark.parametrize("name", ["vllm", "compressed_tensors"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_modes_without_bytes_for_them_refuse_infinity_and_nan(name: str, value: float) -> None:
    x = torch.ones(3, 32)
    x[1, 20] = value
    with pytest.raises(ValueError, match=rf"non-finite.*numerics = '{name}'|numerics = '{name}'.*no finite"):
        quantize(x, Format(numerics=name))
    with pytest.raises(ValueError, match=rf"non-finite element.*numerics = '{name}'"):
        quantize(x, Format(numerics=name), amax=torch.tensor(1.0))


def test_vllm_refuses_an_amax_that_has_no_reciprocal() -> None:
    for x in (torch.zeros(2, 16), torch.full((2, 16), 1e-40)):
        with pytest.raises(ValueError, match=r"amax = .*numerics = 'vllm' has no finite global scale"):
            quantize(x, Format(numerics="vllm"))
    assert quantize(torch.zeros(0, 16), Format(numerics="vllm")).shape == (0, 16)


def test_transformer_engine_counts_nan_in_no_amax_and_saturates_infinity() -> None:
    x = torch.zeros(1, 48)
    x[0, :3] = torch.tensor([12.0, torch.nan, -torch.nan])
    x[0, 16:19] = torch.tensor([9.0, 0.0, torch.nan])
    x[0, 32] = -torch.nan
    ours = quantize(x)
    # Block 3 holds no number: amax 0, scale 0. NaN of either sign is +6, code 7.
    assert ours.scales.float().tolist() == [[448.0, 352.0, 0.0]] and ours.global_scale.item() == 12.0
    assert ours.codes[0, [0, 1, 8, 9, 16]].tolist() == [0x77, 0x07, 0x07, 0x07, 0x07]
    x = torch.tensor([[torch.inf, -torch.inf, 896.0, 224.0] + [0.0] * 12 + [3.0, -1.5] + [0.0] * 14])
    ours = quantize(x)
    # amax = inf makes S = 1: block 1 saturates at 448, and 896 / 448 = 2, 224 / 448 = 0.5; block 2 has scale 3/6.
    assert ours.scales.float().tolist() == [[448.0, 0.5]] and ours.global_scale.item() == torch.inf
    assert ours.codes[0, [0, 1, 8]].tolist() == [0xF7, 0x14, 0xD7]
    assert quantize(torch.full((1, 16), torch.nan)).codes.tolist() == [[0x77] * 8]


def test_transformer_engine_by_hand() -> None:
    """amax = 12: S = 2688 / 12 = 224. 1/6 is 0.16666667163 in fp32; 224 times that rounds to 37.333335877.

    Block 1: 12 * 37.333335877 rounds to 448.00003, saturates at 448. Block 2: 9 * 37.333335877 = 336.0000229 rounds to
    336.00003, past the midpoint of 320 and 352: scale 352, where exact arithmetic ties to 320. 1 / S = 0.00446428591;
    352 times that rounds to 1.57142865658; its inverse, by which elements are multiplied, is 0.636363625526.

    element   9        -9        2.75   -1.96875   0.39     1.1785714   5.5    3.9285714  7.857142857  1e-3   -1e-3  -0
    scaled    5.72727  -5.72727  1.75*  -1.25284   0.24818  0.74999994  3.5*   2.5*       5*           6e-4   -6e-4  -0
    value     6        -6        2      -1.5       0        0.5         4      2          4            0      -0     -0
    code      7        15        4      11         0        1           6      4          6            0      8      8

    * ties, to the even code. Dequantized: 352 * 12 = 4224 times 1 / 2688 (0.00037202381 in fp32) = 1.57142857.
    """
    x = torch.zeros(1, 32)
    x[0, 0] = 12
    x[0, 16:28] = torch.tensor([9, -9, 2.75, -1.96875, 0.39, 1.1785714, 5.5, 3.9285714, 7.857142857, 1e-3, -1e-3, -0.0])
    ours = quantize(x)
    assert ours.scales.float().tolist() == [[448.0, 352.0]] and ours.global_scale.item() == 12.0
    assert ours.codes[0, 8:14].tolist() == [0xF7, 0xB4, 0x10, 0x46, 0x06, 0x88] and ours.codes[0, 0] == 7
    step = float(np.float32(4224) * np.float32(1 / 2688))
    assert dequantize(ours)[0, 16:20].tolist() == [float(np.float32(c * step)) for c in (6, -6, 2, -1.5)]
    # Plain arithmetic ties to even: 336 is 320 for the modes that do not round up on the way.
    assert quantize(x, Format(numerics="modelopt")).scales.float().tolist() == [[448.0, 320.0]]


def test_vllm_by_hand() -> None:
    """amax = 7: torch forms 2688 / 7 as 2688 * 0.142857149243 = 384.000030518. Block 2, amax 4.25: 4.25 times the fp32
    1/6 rounds to 0.70833337307, times the global scale to 272.000030518, past the midpoint of 256 and 288: scale 288.

    1 / 384.000030518 = 0.00260416651145; 288 times that rounds to 0.749999940395, whose inverse is 1.33333349228:

    element   4.25     -4.25     0.1875      0.5625     -0.9375     1.3125     2.625      -3.75       1e-9  -1e-9  -0
    scaled    5.66667  -5.66667  0.25000003  0.7500001  -1.2500001  1.7500002  3.5000005  -5.0000005  ~0    ~-0    -0
    value     6        -6        0.5         1          -1.5        2          4          -6          0     -0     0
    code      7        15        1           2          11          4          6          15          0     8      0

    A scale of exactly 0.75 would tie from the third on. Dequantized by 288 / 384.000030518 = 0.74999994.
    """
    x = torch.zeros(1, 32)
    x[0, 0] = 7
    x[0, 16:27] = torch.tensor([4.25, -4.25, 0.1875, 0.5625, -0.9375, 1.3125, 2.625, -3.75, 1e-9, -1e-9, -0.0])
    ours = quantize(x, Format(numerics="vllm"))
    assert ours.scales.float().tolist() == [[448.0, 288.0]]
    assert ours.global_scale.item() == float(np.float32(384.000030518))
    assert ours.codes[0, 8:14].tolist() == [0xF7, 0x21, 0x4B, 0xF6, 0x80, 0x00]
    assert dequantize(ours)[0, 16:19].tolist() == [float(np.float32(c * 0.74999994)) for c in (6, -6, 0.5)]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([m / 512 if e == 0 else (8 + m) / 8 * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1])


def nearest(value: float, grid: np.ndarray) -> int:
    """Index of the nearest of ascending non-negative numbers; of two at one distance the even index."""
    distance = np.abs(grid - min(value, float(grid[-1])))
    best = np.flatnonzero(distance == distance.min())
    return int(best[best % 2 == 0][0] if len(best) > 1 else best[0])


def _te_in_numpy(amax: np.float32, block: np.ndarray) -> tuple[int, list[int]]:
    one, largest = np.float32(1), np.finfo(np.float32).max
    encode = min(np.float32(2688) / amax, largest)
    scale = nearest(float(np.abs(block).max() * (encode * (one / np.float32(6)))), E4M3)
    inverse = min(one / (np.float32(E4M3[scale]) * (one / encode)), largest)
    return scale, [nearest(float(abs(v * inverse)), E2M1) | 8 * int(np.signbit(v)) for v in block]


def _vllm_in_numpy(amax: np.float32, block: np.ndarray) -> tuple[int, list[int]]:
    one = np.float32(1)
    encode = (one / amax) * np.float32(2688)
    scale = nearest(float(encode * (np.abs(block).max() * np.float32(1 / 6))), E4M3)
    decode = np.float32(E4M3[scale]) * (one / encode)
    inverse = one / (decode if decode else np.float32(1e8))
    return scale, [nearest(float(abs(v * inverse)), E2M1) | 8 * int(v * inverse < 0) for v in block]


@pytest.mark.parametrize(("name", "rule"), [("te", _te_in_numpy), ("vllm", _vllm_in_numpy)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_te_and_vllm_are_their_formulas_element_by_element(
    name: str, rule: Callable[..., Any], dtype: torch.dtype
) -> None:
    with np.errstate(all="ignore"):
        for label, whole in (samples(dtype) | {"zeros only": torch.zeros(4, 32, dtype=dtype)}).items():
            x = whole[:10, :32].contiguous()
            amax = global_amax(x)
            if name == "vllm" and not (2688 * amax.reciprocal()).isfinite():
                continue
            ours = quantize(x, Format(numerics=name))
            expected = [rule(amax.numpy(), block.numpy()) for block in x.float().view(-1, 16)]
            assert bits(ours.scales).flatten().tolist() == [scale for scale, _ in expected], label
            codes = torch.stack((ours.codes & 15, ours.codes >> 4), -1).view(-1, 16)
            assert codes.tolist() == [codes for _, codes in expected], label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_transformer_engine_sees_nonfinite_half_precision_as_fp32(dtype: torch.dtype, block: Any) -> None:
    for numbers in ((torch.nan, -torch.nan), (torch.inf, torch.nan)):
        x = samples(dtype)["normal * 2^0"].clone()
        x[4, 5], x[9, 17], x[20, 16:32] = *numbers, torch.nan
        ours, wide = quantize(x, Format(block=block)), quantize(x.float(), Format(block=block))
        assert torch.equal(ours.codes, wide.codes) and torch.equal(bits(ours.scales), bits(wide.scales))
        assert torch.equal(ours.global_scale, wide.global_scale) and not ours.scales.float().isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_over_six_of_modelopt_is_its_export_of_the_chosen_scales(dtype: torch.dtype) -> None:
    """ModelOpt keeps the choice as block amaxes times 1 or 1.5 in a static quantizer and exports those."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor as oracle

    for label, x in samples(dtype).items():
        ours = quantize(x, Format(numerics="modelopt", four_over_six="mse"))
        amax, blocks = global_amax(x), x.float().unflatten(-1, (-1, 16)).abs().amax(-1)
        quantizer = types.SimpleNamespace(global_amax=amax, block_sizes={-1: 16, "four_over_six": True})
        exported = []
        for factor in (1.0, 1.5):
            quantizer._amax = blocks * factor
            exported.append(oracle.get_weights_scaling_factor_from_quantizer(quantizer, x)[0])
        second = oracle.get_weights_scaling_factor_2_from_quantizer(quantizer)
        assert torch.equal(second, ours.global_scale), label
        took = [bits(scales) == bits(ours.scales) for scales in exported]
        assert (took[0] | took[1]).all(), label
        if label == "normal * 2^0":
            assert (took[0] & ~took[1]).any() and (took[1] & ~took[0]).any()
        packed, _, _ = oracle.quantize(x.clone(), 16, ours.scales, second)
        assert torch.equal(packed._quantized_data, ours.codes), label
        values = packed.dequantize(torch.float32, scale=ours.scales, double_scale=second, block_sizes={-1: 16})
        torch.testing.assert_close(dequantize(ours), values, rtol=0, atol=0, equal_nan=True, msg=label)


@pytest.mark.parametrize("name", MODES)
def test_an_amax_that_is_given_makes_the_global_scale(name: str) -> None:
    x = samples(torch.bfloat16)["elements far apart"]
    for amax in (global_amax(x), global_amax(x) * 2, global_amax(x) / 64):
        ours = quantize(x, Format(numerics=name), amax=amax)
        wider = torch.cat((x, amax.bfloat16().expand(1, x.shape[1])))
        if amax >= global_amax(x):
            expected = quantize(wider, Format(numerics=name))
            assert torch.equal(bits(ours.scales), bits(expected.scales[:-1]))
            assert torch.equal(ours.codes, expected.codes[:-1]) and torch.equal(
                ours.global_scale, expected.global_scale
            )
        else:
            assert bits(ours.scales).max() == bits(torch.tensor(448.0).to(torch.float8_e4m3fn))  # saturates
        torch.testing.assert_close(2688 * ours.multiplier, amax, rtol=4e-3, atol=0)


def test_an_unknown_mode_is_named_with_all_modes_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"numerics = 'model_opt'.*te, torchao, .*did you mean 'modelopt'"):
        Format(numerics="model_opt")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"numerics = 'zzz': expected one of te, .*compressed_tensors$"):
        named("zzz")
