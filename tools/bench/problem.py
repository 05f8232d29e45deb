"""Inputs of the log-ratio benchmarks, drawn anew each round; nothing here is timed.

Logits have a standard deviation of 4.5, so that the largest of a row lies near 20 and all within 30. What a rollout
would bring lies around the policy's true log-probabilities, so that no token is gated or clipped away and every row
costs its full gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mopd_kernels import Surrogate, Tokens

LOGIT_STD = 4.5
SAMPLE = 64
"""Rows whose results are compared with fp64."""
CHUNK_ELEMENTS = 1 << 27
"""Logits alive at a time while the truth is computed (512 MiB in fp32)."""


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary (of one rank where tensor-parallel), hidden size (0: logits are given)."""

    T: int
    V: int
    H: int = 0

    def shorter(self, times: int) -> Shape:
        return replace(self, T=self.T // times)

    def __str__(self) -> str:
        return f"T={self.T} V={self.V}" + (f" H={self.H}" if self.H else "")


class Problem(ABC):
    """Drawn tensors, and how far a contender's result is from the truth."""

    def __init__(self, shape: Any, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        self.shape, self.dtype, self.device, self.kept = shape, dtype, device, kept
        self.impl = "triton" if device.type == "cuda" else "reference"
        self.generator = torch.Generator(device)

    @abstractmethod
    def redraw(self, seed: int) -> None:
        """New inputs for a round."""

    @abstractmethod
    def restore(self) -> None:
        """The inputs of this round as they were, and no gradient from whoever ran before."""

    @abstractmethod
    def error(self, value: Any) -> float:
        """Largest difference of what a contender returned from the truth, over a sample."""

    def gradient_bytes(self) -> int:
        """Size of the gradients that any implementation has to leave behind."""
        return 0


class TokenProblem(Problem):
    """Tokens and what is known of them; the subclasses say where the logits come from."""

    tokens: Tokens

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        self.settings = Surrogate()

    def redraw(self, seed: int) -> None:
        """New inputs for a round."""
        self.generator.manual_seed(seed)
        self._fill()
        T = self.shape.T
        targets = torch.empty(T, dtype=torch.int64, device=self.device)
        targets.random_(0, self.shape.V, generator=self.generator)
        theta = self._logprob(targets)
        keep = None if self.kept == 1.0 else self._uniform() < self.kept
        self.tokens = Tokens(
            targets=targets,
            behaviour=theta + 0.1 * self._normal(),
            teachers=(theta + 0.5 * self._normal())[None],
            weight=torch.full_like(theta, 1.0 / T),
            prox=theta + 0.02 * self._normal(),
            keep=keep,
        )

    def error(self, value: Tensor) -> float:
        rows, truth = self.truth()
        return float((value.detach()[rows].double() - truth).abs().max())

    def truth(self) -> tuple[Tensor, Tensor]:
        """Numbers of the sampled rows and their fp64 results."""
        rows = torch.linspace(0, self.shape.T - 1, min(SAMPLE, self.shape.T), device=self.device).long()
        if self.tokens.keep is not None:
            rows = rows[self.tokens.keep[rows]]
        return rows, self._exact(rows)

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Those that our forms left behind, wherever they did."""

    @abstractmethod
    def _fill(self) -> None:
        """Draws the tensors."""

    def _logprob(self, targets: Tensor) -> Tensor:
        """fp32 ``[T]``."""
        step = max(1, CHUNK_ELEMENTS // self.shape.V)
        parts = []
        for start in range(0, self.shape.T, step):
            rows = slice(start, start + step)
            logits = self._logits(rows)
            parts.append(logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(parts)

    @abstractmethod
    def _logits(self, rows: slice) -> Tensor:
        """fp32 ``[n, V]``."""

    @abstractmethod
    def _exact(self, rows: Tensor) -> Tensor:
        """fp64 ``[n]``."""

    def _normal(self) -> Tensor:
        return torch.randn(self.shape.T, device=self.device, generator=self.generator)

    def _uniform(self) -> Tensor:
        return torch.rand(self.shape.T, device=self.device, generator=self.generator)


class _OutputLayer(torch.autograd.Function):
    """Gives the first rows of a problem's logits as if they had just been computed, and keeps the gradient that comes
    back as it is: a leaf would add it to another one, and may not be written over."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, problem: LogitProblem, rows: int) -> Tensor:
        ctx.problem = problem
        # no view of the buffer: autograd would follow what is written there
        return torch.empty(0, dtype=problem.dtype, device=problem.device).set_(problem.buffer[:rows])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.problem.gradient = grad
        return None, None, None


class LogitProblem(TokenProblem):
    """Logits ``[T, V]`` that exist already."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        # One row more than T: Liger's GRPO loss takes the logits of the prompt's last position along.
        self.drawn = torch.empty(shape.T + 1, shape.V, dtype=dtype, device=device)
        self.buffer = torch.empty_like(self.drawn)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.logits = self.output(shape.T)
        self.gradient: Tensor | None = None

    def output(self, rows: int) -> Tensor:
        """The first rows as an output layer's result, part of a graph of its own."""
        return _OutputLayer.apply(self.anchor, self, rows)

    def restore(self) -> None:
        self.buffer.copy_(self.drawn)
        self.logits, self.gradient = self.output(self.shape.T), None

    def gradients(self) -> list[Tensor]:
        return [self.logits.detach() if self.gradient is None else self.gradient]

    def _fill(self) -> None:
        self.drawn.normal_(0.0, LOGIT_STD, generator=self.generator)

    def _logits(self, rows: slice) -> Tensor:
        return self.drawn[:-1][rows].float()

    def _exact(self, rows: Tensor) -> Tensor:
        exact = self.drawn[rows].double().log_softmax(-1)
        return exact.gather(1, self.tokens.targets[rows, None])[:, 0]


class HeadProblem(TokenProblem):
    """Hidden states ``[T, H]`` and an output weight ``[V, H]``.

    ``head`` shares the storage of ``weight`` and has Megatron's fp32 ``main_grad``; peers get ``weight``.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        self.hidden = torch.empty(shape.T, shape.H, dtype=dtype, device=device, requires_grad=True)
        self.weight = torch.empty(shape.V, shape.H, dtype=dtype, device=device, requires_grad=True)
        self.head = self.weight.detach().requires_grad_()
        self.main_grad = torch.zeros(shape.V, shape.H, dtype=torch.float32, device=device)
        self.head.main_grad = self.main_grad  # pyright: ignore[reportAttributeAccessIssue]

    def restore(self) -> None:
        self.hidden.grad = self.weight.grad = self.head.grad = None
        self.main_grad.zero_()

    def gradients(self) -> list[Tensor]:
        return [] if self.hidden.grad is None else [self.hidden.grad, self.main_grad]

    def gradient_bytes(self) -> int:
        grads = (self.hidden.grad, self.weight.grad)
        return sum(grad.numel() * grad.element_size() for grad in grads if grad is not None)

    def _fill(self) -> None:
        self.hidden.detach().normal_(generator=self.generator)
        self.weight.detach().normal_(0.0, LOGIT_STD / math.sqrt(self.shape.H), generator=self.generator)

    def _logits(self, rows: slice) -> Tensor:
        hidden, weight = self.hidden.detach()[rows], self.weight.detach()
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    def _exact(self, rows: Tensor) -> Tensor:
        exact = exact_log_softmax(self.hidden.detach()[rows], self.weight.detach())
        return exact.gather(1, self.tokens.targets[rows, None])[:, 0]


class DivergenceProblem(HeadProblem):
    """A student's and a teacher's hidden states and heads; the teacher's head is nearby, as after some distillation."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kept: float = 1.0) -> None:
        super().__init__(shape, dtype, device, kept)
        self.teacher_hidden = torch.empty(shape.T, shape.H, dtype=dtype, device=device)
        self.teacher_weight = torch.empty(shape.V, shape.H, dtype=dtype, device=device)

    def _fill(self) -> None:
        super()._fill()
        for teacher, student in ((self.teacher_hidden, self.hidden), (self.teacher_weight, self.weight)):
            teacher.normal_(0.0, 0.1 * float(student.detach().float().std()), generator=self.generator)
            teacher.add_(student.detach())

    def _exact(self, rows: Tensor) -> Tensor:
        student = exact_log_softmax(self.hidden.detach()[rows], self.weight.detach())
        teacher = exact_log_softmax(self.teacher_hidden[rows], self.teacher_weight)
        return (student.exp() * (student - teacher)).sum(-1)


def exact_log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp64 ``[n, V]``; the weight is widened in pieces."""
    hidden = hidden.double()
    return torch.cat([hidden @ piece.double().T for piece in weight.split(1 << 14)], dim=-1).log_softmax(-1)
