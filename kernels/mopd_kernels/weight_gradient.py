"""Where the gradient of the output weight goes: Megatron's fp32 ``main_grad`` where there is one, else to autograd.

mcore's DistributedDataParallel gives each parameter a ``main_grad`` (a view of its reduction buffer) and a flag
``grad_added_to_main_grad``, and hooks the parameter's gradient accumulation: on the hook it adds ``param.grad`` unless
the flag says that this has been done, drops ``param.grad`` and marks the bucket ready for reduction
(``megatron/core/distributed/distributed_data_parallel.py``; the same protocol as its fused linear layer in
``megatron/core/tensor_parallel/layers.py``). So a gradient that went to ``main_grad`` directly must still hand autograd
a tensor, for the hook to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd_kernels.products import accumulate, wide


class WeightGradient:
    """Sums ``d_logits.T @ hidden`` over chunks of rows, in fp32, into its one place; nothing when not ``wanted``.

    ``columns``: valid columns of the shard; the rows of padding get zeros. Made by the pass that adds the gradient;
    :meth:`hand_over` is called once, in backward.
    """

    def __init__(self, weight: Tensor, columns: int, wanted: bool) -> None:
        self.weight, self.columns, self.wanted = weight, columns, wanted
        main_grad = getattr(weight, "main_grad", None)
        self.direct = wanted and main_grad is not None
        self.total: Tensor | None = None
        if wanted and main_grad is not None:
            if main_grad.shape != weight.shape or main_grad.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"weight.main_grad is {main_grad.dtype} {list(main_grad.shape)}: expected fp32"
                    f" {list(weight.shape)}; set grad_reduce_in_fp32 in mcore's DistributedDataParallelConfig"
                )
            self.total = main_grad
        elif wanted:
            self.total = torch.zeros_like(weight, dtype=wide(weight))

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Of one chunk: ``d_logits [n, columns]`` and ``hidden [n, H]``, both in the dtype of the product."""
        if self.total is not None:
            accumulate(self.total[: self.columns], d_logits.T, hidden)

    def hand_over(self, scale: Tensor | float = 1.0) -> Tensor | None:
        """What backward returns for the weight; ``scale`` multiplies a gradient that autograd gets (fp32 scalar)."""
        if self.total is None:
            return None
        if not self.direct:
            return (self.total * scale).to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None  # a main_grad without mcore's hook behind it
        self.weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
        if getattr(self.weight, "zero_out_wgrad", False):  # tied to the embedding: the hook adds whatever arrives
            return self.weight.new_zeros(()).expand_as(self.weight)
        return self._placeholder()

    def _placeholder(self) -> Tensor:
        """A tensor of the weight's shape that costs no memory: autograd keeps it without a copy and mcore's hook drops
        it unread, so it may lie in ``main_grad``'s own storage, whose elements are no smaller than the weight's."""
        assert self.total is not None
        flat = self.total.view(-1).view(self.weight.dtype)
        return flat[: self.weight.numel()].view(self.weight.shape)
