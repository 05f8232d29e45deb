"""Who the NVFP4 kernels are timed against.

Peers get the tensor's scale, as ours get its amax, and compressed-tensors' packing, which forms none, the block scales
too. Each returns a matrix or a function that decodes one, for the comparison with the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench.nvfp4_problem import EPS, MatrixProblem, NormProblem, PackProblem
from bench.peer import Peer
from torch import Tensor
from torch.nn.functional import rms_norm

from mopd_kernels.nvfp4 import Format, NVFP4Tensor, quantize
from mopd_kernels.nvfp4.tensor import scale_shape

Values = Callable[[], Tensor]


def _torchao(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales, these in the 128x4 layout."""
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.prototype.mx_formats.utils import to_blocked

    scales, codes = nvfp4_quantize(x, 16, scale)
    return codes, to_blocked(scales.view(torch.uint8))  # Inductor pads no float8


def _torchao_round_trip(x: Tensor, scale: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor as Packed

    return Packed.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def _torchao_norm(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _torchao(rms_norm(x, weight.shape, weight, EPS), scale)


def _values(problem: MatrixProblem, found: tuple[Tensor, Tensor]) -> Values:
    """Of torchao's codes and swizzled scales."""
    shape = (problem.shape.R, problem.shape.K)
    codes, scales = found
    scales = scales.view(torch.float8_e4m3fn).view(scale_shape(shape, True))
    return NVFP4Tensor(codes, scales, problem.scale, shape, "torchao", swizzled=True).dequantize


def _on_torchao(pack: Callable[..., Any]) -> Callable[[MatrixProblem], Values]:
    return lambda problem: _values(problem, pack(problem.x, problem.scale))


def _norm_on_torchao(pack: Callable[..., Any]) -> Callable[[NormProblem], Values]:
    return lambda problem: _values(problem, pack(problem.x, problem.weight, problem.scale))


def _modelopt(problem: MatrixProblem) -> Values:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scales, scale = NVFP4QTensor.quantize(problem.x, 16, weights_scaling_factor_2=problem.scale)
    return lambda: packed.dequantize(torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16})


def _modelopt_round_trip(problem: MatrixProblem) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scales, scale = NVFP4QTensor.quantize(problem.x, 16, weights_scaling_factor_2=problem.scale)
    return packed.dequantize(problem.x.dtype, scale=scales, double_scale=scale, block_sizes={-1: 16})


def _modelopt_triton(problem: MatrixProblem) -> Tensor:
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block

    return fp4_fake_quant_block(problem.x, problem.amax)


def _compressed_tensors(problem: PackProblem) -> Values:
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4

    known = problem.packed
    codes = quantize_and_pack_fp4(problem.x, problem.block_scales, known.global_scale.reshape(1))
    return NVFP4Tensor(codes, known.scales, known.global_scale, known.shape, known.numerics).dequantize


def _fouroversix(problem: MatrixProblem) -> None:
    import fouroversix  # pyright: ignore[reportMissingImports]

    fouroversix.quantize(problem.x)  # chooses scales by the squared error unless told otherwise


def _ours_plain(problem: MatrixProblem) -> NVFP4Tensor:
    return quantize(problem.x, Format(swizzled=True), amax=problem.amax, impl=problem.impl)


def _norm_then_ours(problem: NormProblem) -> NVFP4Tensor:
    normed = rms_norm(problem.x, problem.weight.shape, problem.weight, EPS)
    return quantize(normed, Format(swizzled=True), amax=problem.amax, impl=problem.impl)


_AO = ("torchao.prototype.mx_formats.nvfp4_tensor",)
_MODELOPT = ("modelopt.torch.quantization.qtensor.nvfp4_tensor",)
_AO_SOURCE = "torchao.prototype.mx_formats.nvfp4_tensor"
_INDUCTOR = "torch.compile"

TORCHAO = Peer("torchao", _on_torchao(_torchao), _AO_SOURCE, _AO)
TORCHAO_COMPILED = Peer(
    "torchao, torch.compile", _on_torchao(torch.compile(_torchao)), f"{_AO_SOURCE}, {_INDUCTOR}", _AO
)
MODELOPT = Peer("ModelOpt", _modelopt, "NVFP4QTensor.quantize", _MODELOPT)
COMPRESSED = Peer(
    "compressed-tensors pack, block scales given",
    _compressed_tensors,
    "compressed_tensors.compressors.nvfp4.helpers.quantize_and_pack_fp4 (Triton on CUDA)",
    ("compressed_tensors.compressors.nvfp4.helpers",),
)
TORCHAO_ROUND_TRIP = Peer(
    "torchao, torch.compile",
    lambda problem: _compiled_round_trip(problem.x, problem.scale),
    f"{_AO_SOURCE}, {_INDUCTOR}",
    _AO,
)
MODELOPT_ROUND_TRIP = Peer("ModelOpt", _modelopt_round_trip, "NVFP4QTensor.quantize, dequantize", _MODELOPT)
MODELOPT_TRITON = Peer(
    "ModelOpt Triton",
    _modelopt_triton,
    "modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper",
    ("modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper",),
    devices=("cuda",),
)
FOUR_OVER_SIX = Peer("fouroversix", _fouroversix, "fouroversix.quantize", ("fouroversix",))
PLAIN = Peer("ours, to 6 alone", _ours_plain, "mopd_kernels")
NORM_THEN_OURS = Peer("torch norm, then ours", _norm_then_ours, "torch.nn.functional.rms_norm, mopd_kernels")
NORM_ON_TORCHAO = Peer(
    "torch norm and torchao, torch.compile",
    _norm_on_torchao(torch.compile(_torchao_norm)),
    f"{_AO_SOURCE}, {_INDUCTOR}",
    _AO,
)
_compiled_round_trip = torch.compile(_torchao_round_trip)
