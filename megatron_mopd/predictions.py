"""The distributions that predict completion tokens, as hidden states and output weight: what every loss starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_mopd.settings import ConfigurationError
from mopd_kernels import (
    Statistics,
    linear_logprob,
    linear_statistics,
    linear_statistics_with_payload,
)
from mopd_kernels.dispatch import Impl
from mopd_kernels.linear_operands import unsupported_reason
from mopd_kernels.nvfp4 import Format, NVFP4Tensor, quantize
from mopd_kernels.weight_gradient import WeightGradient

OutputWeight = Tensor | NVFP4Tensor
"""Dense, or packed and decoded inside the kernels; a packed one has no gradient."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """``softmax(hidden @ weight.T / temperature)`` of each row; the ``[T, V]`` logits exist only where asked for.

    Under tensor parallelism the gradient of ``hidden`` is this rank's share; whoever gathered it sums the shares. The
    methods and mopd_kernels add the gradient of ``weight`` to mcore's ``main_grad`` themselves and say so to its hook,
    which then drops what autograd brings: beside them no other use of ``weight`` gets a gradient.
    """

    hidden: Tensor  # [T, H], one row per completion token
    weight: Any  # OutputWeight [V/tp, H], this rank's rows
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None  # the ranks the vocabulary is split over
    valid_vocab: int | None = None  # columns from here on are padding
    impl: Impl = "auto"
    grad_scale: float = 1.0
    """What backward brings as the gradient of the loss: mcore's loss scale, or a loop's 1 / number of micro-batches."""

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that all operators of mopd_kernels share."""
        names = ("temperature", "group", "valid_vocab", "impl")
        return {name: getattr(self, name) for name in names}

    def logprobs(self, targets: Tensor) -> Tensor:
        """fp32 ``[T]``, natural logarithms, of ``targets`` (int64 ``[T]``); differentiable in hidden and weight."""
        return linear_logprob(self.hidden, self.weight, targets.to(self.hidden.device), **self.options)

    def logprobs_and_hidden(self, targets: Tensor, format: Format, amax: Tensor) -> tuple[Tensor, NVFP4Tensor]:
        """:meth:`logprobs`, and from the same pass the hidden states in NVFP4 for elements of up to ``amax`` (fp32 []);
        no gradient."""
        targets = targets.to(self.hidden.device)
        found, hidden = linear_statistics_with_payload(
            self.hidden, self.weight, targets, format, amax=amax, **self.options
        )
        return found.logprob, hidden

    def statistics(self, targets: Tensor) -> Statistics:
        """Log-probability, entropy and log-sum-exp, fp32 ``[T]`` each; no gradient."""
        return linear_statistics(self.hidden, self.weight, targets.to(self.hidden.device), **self.options)

    def logits(self) -> Tensor:
        """``[T, V/tp]`` in the dtype of the hidden states, before the temperature; differentiable."""
        return _Logits.apply(self.hidden, self.weight)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(hidden, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        sink = WeightGradient(weight, len(weight), ctx.needs_input_grad[1])
        sink.add(grad, hidden)
        return grad @ weight if ctx.needs_input_grad[0] else None, sink.hand_over()


def check_impl(impl: Impl, weight: Tensor, where: str, *, packed: bool = False) -> None:
    """Refuse ``kernels.impl = triton`` at start where the kernels cannot take this output weight; ``where`` names whose
    it is. ``packed``: hidden states of its dtype are to meet NVFP4 operands."""
    if impl != "triton":
        return
    row = torch.empty_like(weight[:1])
    beside = quantize(torch.zeros_like(row), Format(pad=True), impl="reference") if packed else weight
    if (reason := unsupported_reason(row, beside)) is not None:
        raise ConfigurationError(f"kernels.impl = triton for {where}: {reason}; set it to auto or reference")
