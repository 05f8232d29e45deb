"""NVFP4: matrices in packed E2M1 with E4M3 block scales, byte for byte as each ecosystem makes them.

``Format`` says what to make, the operators make it; plain torch and Triton give the same bytes. ``numerics.py`` has the
five ecosystems side by side.
"""

from mopd_kernels.nvfp4.format import Format
from mopd_kernels.nvfp4.hadamard import TE_SIGNS
from mopd_kernels.nvfp4.operators import (
    dequantize,
    global_amax,
    quantize,
    quantize_both,
    quantize_columns,
    quantize_dequantize,
)
from mopd_kernels.nvfp4.producers import rms_norm_quantize, squared_relu_quantize
from mopd_kernels.nvfp4.tensor import NVFP4Tensor, swizzle, unswizzle

__all__ = [
    "Format",
    "NVFP4Tensor",
    "TE_SIGNS",
    "quantize",
    "quantize_columns",
    "quantize_both",
    "dequantize",
    "quantize_dequantize",
    "global_amax",
    "rms_norm_quantize",
    "squared_relu_quantize",
    "swizzle",
    "unswizzle",
]
