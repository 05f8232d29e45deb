"""Matrix products that accumulate in fp32 whatever their operands are; cuBLAS on CUDA, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` accumulated and returned in fp32 (fp64 for fp64), under torch.autocast too; in ``out`` where given."""
    with torch.autocast(a.device.type, enabled=False):  # which would round the logits of fp32 operands to bf16
        if a.dtype == wide(a):
            return torch.mm(a, b, out=out)
        if not a.is_cuda:  # CPU's mm has no out_dtype, and rounding logits to bf16 would cost up to 0.06 nats
            return torch.mm(a.to(wide(a)), b.to(wide(a)), out=out)
        if out is None:
            return torch.mm(a, b, out_dtype=wide(a))
        return torch.ops.aten.mm.dtype_out(a, b, wide(a), out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place; ``total`` is fp32 (fp64 for fp64), the product is never rounded on its way."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
