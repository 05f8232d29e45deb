"""Hidden states and output weights as operators take them: dense, or packed in NVFP4 (4.5 bits a number).

A packed matrix stands for ``code * block scale * multiplier``, exactly; the product of two matrices is then that of the
codes times their scales, which bf16 holds exactly, times the multipliers. Nobody makes the matrix itself: kernels
decode tiles of it, the reference a few rows at a time. Gradients end at a packed operand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mopd_kernels import dispatch
from mopd_kernels.nvfp4.grids import BLOCK, e2m1_values, unpack
from mopd_kernels.nvfp4.tensor import NVFP4Tensor
from mopd_kernels.products import product

Operand = Tensor | NVFP4Tensor

DECODED_ELEMENTS = 1 << 20
"""Numbers of either operand that the reference decodes, or raises to fp32, at a time: 4 MiB, more on the way there."""
LOGITS_ELEMENTS = 1 << 20
"""And the most logits that it makes of them."""


def shapes_fit(hidden: Operand, weight: Operand) -> bool:
    """Whether they are ``[T, H]`` and ``[V/tp, H]``."""
    return len(hidden.shape) == len(weight.shape) == 2 and hidden.shape[1] == weight.shape[1]


def check_numbers(owner: str, hidden: Operand, weight: Operand) -> None:
    """Refuse, with a ValueError, dense operands of two dtypes and packed ones in two bases; ``owner`` has them."""
    dtypes = [x.dtype for x in (hidden, weight) if isinstance(x, Tensor)]
    if len(set(dtypes)) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{owner} hidden {dtypes[0]} and weight {dtypes[-1]}: they must be one floating-point dtype")
    signs = [None if isinstance(x, Tensor) else x.transformed for x in (hidden, weight)]
    if signs[0] != signs[1]:
        raise ValueError(
            f"{owner} hidden under the Hadamard transform with signs {signs[0]} and weight with {signs[1]}: it cancels"
            " in their product only where both have the same; quantize both with it or neither"
        )


def refuse_gradient(operator: str, hidden: Operand, weight: Operand) -> None:
    """ValueError where autograd would ask for a gradient that a packed operand has none to give."""
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        return
    for name, x in (("hidden", hidden), ("weight", weight)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{operator}: {name} requires a gradient, and none passes through an NVFP4 operand; call it under"
                " torch.no_grad(), detach it, or pass both operands dense"
            )


def unsupported_reason(*operands: Operand, tiled: bool = True) -> str | None:
    """Why the Triton kernels do not take these, or None where they do; as of dispatch.py.

    fp32 beside codes would reach sm_100's tensor cores as tf32, whatever precision ``tl.dot`` is told (Triton 3.7).
    """
    dtypes = [x.dtype for x in operands if isinstance(x, Tensor)]
    if torch.float32 in dtypes and len(dtypes) < len(operands):
        return "torch.float32 beside NVFP4; the kernels multiply packed operands with torch.bfloat16 or torch.float16"
    return dispatch.unsupported_reason(*map(_stand_in, operands), tiled=tiled)


def _stand_in(x: Operand) -> Tensor:
    """A dense tensor that dispatch.py judges like ``x``: codes are read without bulk loads, so any width is taken."""
    return x if isinstance(x, Tensor) else torch.empty(0, BLOCK, dtype=torch.bfloat16, device=x.device)


def product_dtype(hidden: Operand, weight: Operand) -> torch.dtype:
    """What tiles are multiplied in: the dtype of a dense operand, bf16 for two packed ones; all are exact."""
    return next((x.dtype for x in (hidden, weight) if isinstance(x, Tensor)), torch.bfloat16)


def multiplier_of(hidden: Operand, weight: Operand, power: int = 0) -> Tensor | None:
    """fp32 [1], the packed operands' multipliers times 2^power for each of them; None where both are dense."""
    found = [x.multiplier * 2.0**power for x in (hidden, weight) if isinstance(x, NVFP4Tensor)]
    return torch.stack(found).prod(0, keepdim=True) if found else None


def linear(x: Operand) -> Operand:
    """The same with linear scales: rows can be taken of those."""
    return x if isinstance(x, Tensor) or not x.swizzled else replace(x, scales=x.linear_scales(), swizzled=False)


def rows_of(x: Operand, rows: slice) -> Operand:
    """Some rows of a dense matrix or of a :func:`linear` one, without a copy."""
    if isinstance(x, Tensor):
        return x[rows]
    codes = x.codes[rows]
    return replace(x, codes=codes, scales=x.scales[rows], shape=(len(codes), x.shape[1]))


def decoded(x: Operand, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of a dense matrix, or of a :func:`linear` one without its multiplier; fp32 or fp64."""
    if isinstance(x, Tensor):
        return x[rows].to(dtype)
    codes, scales = x.codes[rows], x.scales[rows].to(dtype)
    values = e2m1_values(codes).to(dtype)[unpack(codes).int()].unflatten(-1, (-1, BLOCK))
    return values.mul_(scales.unsqueeze(-1)).flatten(-2)[:, : x.shape[1]]


def pieces(x: Operand, rows: int, most: int = LOGITS_ELEMENTS) -> Iterator[slice]:
    """Slices over the first ``rows`` of a matrix, of ``most`` rows and so many that the reference may decode them."""
    step = max(1, min(most, DECODED_ELEMENTS // max(1, x.shape[1])))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def blocks(hidden: Operand, weight: Operand, columns: int) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """For pieces of the weight's first ``columns`` rows: their slice, and for pieces of the hidden states the slice and
    their product ``[n, piece]`` without multipliers, in fp32 (fp64 beside a dense fp64 operand).

    Each number of the weight is decoded once. Nothing larger than :data:`DECODED_ELEMENTS` and
    :data:`LOGITS_ELEMENTS` is made.
    """
    hidden, weight = linear(hidden), linear(weight)
    dtype = torch.promote_types(product_dtype(hidden, weight), torch.float32)

    def products(right: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for rows in pieces(hidden, hidden.shape[0], LOGITS_ELEMENTS // max(1, len(right))):
            yield rows, product(decoded(hidden, rows, dtype), right.T)

    for piece in pieces(weight, columns):
        yield piece, products(decoded(weight, piece, dtype))


def packed_product(hidden: Operand, weight: Operand) -> Tensor:
    """``hidden @ weight.T``, ``[n, columns]`` as :func:`blocks` makes it, with the multipliers."""
    dtype = torch.promote_types(product_dtype(hidden, weight), torch.float32)
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    for piece, products in blocks(hidden, weight, weight.shape[0]):
        for rows, logits in products:
            out[rows, piece] = logits
    multiplier = multiplier_of(hidden, weight)
    return out if multiplier is None else out.mul_(multiplier)
