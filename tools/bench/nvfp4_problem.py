"""Inputs of the NVFP4 benchmark, drawn anew each round; nothing here is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from bench.problem import Problem
from torch import Tensor

from mopd_kernels.nvfp4 import Format, global_amax, quantize
from mopd_kernels.nvfp4.producers import rms_norm

SAMPLE = 64
"""Rows whose values are compared with the truth."""
EPS = 1e-5


@dataclass(frozen=True)
class Matrix:
    """Rows and columns."""

    R: int
    K: int

    def shorter(self, times: int) -> Matrix:
        return replace(self, R=self.R // times)

    def __str__(self) -> str:
        return f"R={self.R} K={self.K}"


class MatrixProblem(Problem):
    """A normal matrix ``x``, and the scales that a caller would have from a calibration."""

    def __init__(self, shape: Matrix, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        self.x = torch.empty(shape.R, shape.K, dtype=dtype, device=device)

    def redraw(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        self.x.normal_(generator=self.generator)
        self.amax = global_amax(self.elements(self.x), impl="reference")
        self.scale = self.amax / 2688  # torchao's and ModelOpt's

    def restore(self) -> None:
        pass

    def elements(self, x: Tensor) -> Tensor:
        """What is quantized, of rows of ``x``."""
        return x

    def error(self, value: Any) -> float:
        """Of a matrix, or of whatever is able to ``dequantize`` or is a function that does."""
        rows = torch.linspace(0, self.shape.R - 1, min(SAMPLE, self.shape.R), device=self.device).long()
        if type(value) is not Tensor:
            value = value() if callable(value) and not isinstance(value, Tensor) else value.dequantize(torch.float32)
        return float((value[rows].double() - self.elements(self.x[rows]).double()).abs().max())


class PackProblem(MatrixProblem):
    """With the block scales that compressed-tensors' packing wants to be given."""

    def redraw(self, seed: int) -> None:
        super().redraw(seed)
        self.packed = quantize(self.x, Format("compressed_tensors"), impl="reference")
        self.block_scales = self.packed.scales.float()


class NormProblem(MatrixProblem):
    """The RMS norm of ``x``."""

    def __init__(self, shape: Matrix, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        self.weight = torch.linspace(0.5, 1.5, shape.K, dtype=dtype, device=device)

    def elements(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, EPS)
