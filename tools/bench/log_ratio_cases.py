"""The cases of the log-ratio suite: what is timed, at which shapes, against whom, and what the limit is made of."""

from __future__ import annotations

from dataclasses import replace

import torch
from bench import peers
from bench.peer import Peer
from bench.problem import DivergenceProblem, HeadProblem, LogitProblem, Shape
from bench.suite import Case
from torch import Tensor

from mopd_kernels import (
    Head,
    divergence,
    linear_objective,
    linear_statistics,
    logit_objective,
    logit_statistics,
)
from mopd_kernels.vocabulary import VocabularyShard


class TwoShards(VocabularyShard):
    """Rank 0 of two, of which the other holds nothing that counts: both launches of the tensor-parallel form on one
    GPU, around a copy in place of the collective."""

    def __init__(self, width: int) -> None:
        super().__init__(width, None, None)
        self.size = 2

    def gather(self, part: Tensor) -> Tensor:
        parts = part.new_zeros(2, *part.shape)
        parts[0] = part
        return parts


def _statistics(problem: LogitProblem) -> Tensor:
    return logit_statistics(problem.logits.detach(), problem.tokens.targets, impl=problem.impl).logprob


def _objective(problem: LogitProblem) -> Tensor:
    result = logit_objective(problem.logits, problem.tokens, problem.settings, inplace=True, impl=problem.impl)
    result.loss.backward()
    return result.per_token["logprob"]


def _parallel_objective(problem: LogitProblem) -> Tensor:
    from mopd_kernels import logits_triton

    logits = problem.logits.detach()
    shard = TwoShards(logits.shape[1])
    return logits_triton.objective(logits, problem.tokens, problem.settings, shard, 1.0, logits)[0][0]


def _head_statistics(problem: HeadProblem) -> Tensor:
    return linear_statistics(problem.hidden, problem.head, problem.tokens.targets, impl=problem.impl).logprob


def _head_objective(problem: HeadProblem) -> Tensor:
    result = linear_objective(problem.hidden, problem.head, problem.tokens, problem.settings, impl=problem.impl)
    result.loss.backward()
    return result.per_token["logprob"]


def _unmasked(problem: HeadProblem) -> None:
    tokens = replace(problem.tokens, keep=None)
    result = linear_objective(problem.hidden, problem.head, tokens, problem.settings, impl=problem.impl)
    result.loss.backward()


def _reverse_kl(problem: DivergenceProblem) -> Tensor:
    student, teacher = Head(problem.hidden, problem.head), Head(problem.teacher_hidden, problem.teacher_weight)
    result = divergence("reverse_kl", student, teacher, weight_grad=True, impl=problem.impl)
    (result.value * problem.tokens.weight).sum().backward()
    return result.value.detach()


def _copy(problem: LogitProblem) -> None:
    problem.buffer.clone()


@torch.no_grad()
def _logits_product(problem: HeadProblem) -> None:
    _ = problem.hidden @ problem.weight.T


@torch.no_grad()
def _three_products(problem: HeadProblem) -> None:
    """Logits, then dX and dW as if the logits were their own gradient."""
    logits = problem.hidden @ problem.weight.T
    _ = logits @ problem.weight
    _ = logits.T @ problem.hidden


@torch.no_grad()
def _four_products(problem: DivergenceProblem) -> None:
    _ = problem.teacher_hidden @ problem.teacher_weight.T
    _three_products(problem)


COPY = Peer("copy of the logits", _copy, "torch.clone", devices=("cuda",))
LOGITS = Peer("cuBLAS: logits", _logits_product, "torch.mm", devices=("cuda",))
THREE = Peer("cuBLAS: logits, dX, dW", _three_products, "torch.mm", devices=("cuda",))
FOUR = Peer("cuBLAS: two logits, dX, dW", _four_products, "torch.mm", devices=("cuda",))
UNMASKED = Peer("ours, no row masked", _unmasked, "mopd_kernels")

OF_LOGITS = (
    peers.MCORE,
    peers.MCORE_FUSED,
    peers.LIGER_VOCAB_PARALLEL,
    peers.LIGER_GRPO,
    peers.QUACK,
    peers.FLASH_ATTN,
    peers.EAGER,
    peers.COMPILED,
    peers.NEMO,
    peers.VERL,
)
OF_HEADS = (
    peers.LIGER_SCALED,
    peers.LIGER_LINEAR,
    peers.LIGER_CHUNKED_GRPO,
    peers.QUACK_CHUNKED,
    peers.QUACK_SCALED_EXP,
    peers.CCE,
    peers.EAGER_HEAD,
    peers.COMPILED_HEAD,
    peers.NEMO_HEAD,
    peers.VERL_HEAD,
)

HEAD_FORWARDS = tuple(peer.forward() for peer in OF_HEADS if peer.forward_run)

LONG = Shape(8192, 131072)
CPU_LOGITS = Shape(1024, 32768)
CPU_HEAD = Shape(1024, 32768, 128)

CASES = (
    Case(
        name="L1",
        what="statistics of given logits",
        problem=LogitProblem,
        ours=_statistics,
        shapes=(LONG, Shape(16384, 131072)),
        cpu_shape=CPU_LOGITS,
        yardstick=COPY,
        share=2 / 4,  # reads 2 bytes an element, of the 4 that a copy moves
        peers=tuple(peer.forward() for peer in OF_LOGITS if peer.forward_run),
    ),
    Case(
        name="L2",
        what="objective of given logits, gradient in their place",
        problem=LogitProblem,
        ours=_objective,
        shapes=(LONG,),
        cpu_shape=CPU_LOGITS,
        yardstick=COPY,
        share=4 / 4,  # one read, one write
        peers=OF_LOGITS,
    ),
    Case(
        name="L3",
        what="the same, tensor-parallel form",
        problem=LogitProblem,
        ours=_parallel_objective,
        same_as=_objective,
        shapes=(LONG,),
        yardstick=COPY,
        share=6 / 4,  # the collective stands between two reads
        peers=OF_LOGITS[:3],
    ),
    Case(
        name="L3_tp4",
        what="the same, a quarter of the vocabulary",
        problem=LogitProblem,
        ours=_parallel_objective,
        same_as=_objective,
        shapes=(Shape(8192, 32768),),
        yardstick=COPY,
        share=6 / 4,
        peers=OF_LOGITS[:3],
    ),
    Case(
        name="L4",
        what="log-probability and entropy from hidden states",
        problem=HeadProblem,
        ours=_head_statistics,
        shapes=(Shape(8192, 131072, 4096),),
        cpu_shape=CPU_HEAD,
        yardstick=LOGITS,
        share=1.0,
        peers=HEAD_FORWARDS,
    ),
    Case(
        name="L5",
        what="objective from hidden states with dX and dW",
        problem=HeadProblem,
        ours=_head_objective,
        shapes=(Shape(8192, 131072, 4096),),
        cpu_shape=CPU_HEAD,
        yardstick=THREE,
        share=1.0,
        peers=OF_HEADS,
    ),
    Case(
        name="L6",
        what="the same, longer and wider",
        problem=HeadProblem,
        ours=_head_objective,
        shapes=(Shape(16384, 131072, 4096), Shape(8192, 131072, 8192)),
        yardstick=THREE,
        share=1.0,
        peers=tuple(peer for peer in OF_HEADS if peer not in (peers.EAGER_HEAD, peers.COMPILED_HEAD)),
    ),
    Case(
        name="L8",
        what="the same, half the rows masked",
        problem=HeadProblem,
        ours=_head_objective,
        shapes=(Shape(8192, 131072, 4096),),
        cpu_shape=CPU_HEAD,
        yardstick=THREE,
        share=0.5,
        peers=(UNMASKED, peers.LIGER_SCALED, peers.CCE, peers.VERL_HEAD),
        kept=0.5,
    ),
    Case(
        name="L10",
        what="error of the log-probability, bf16 inputs",
        problem=HeadProblem,
        ours=_head_statistics,
        shapes=(Shape(1024, 131072, 4096),),
        cpu_shape=Shape(256, 32768, 1024),
        cpu_dtype=torch.bfloat16,
        yardstick=LOGITS,
        share=1.0,
        peers=HEAD_FORWARDS,
    ),
    Case(
        name="L11",
        what="full-vocabulary reverse KL with dX and dW",
        problem=DivergenceProblem,
        ours=_reverse_kl,
        shapes=(Shape(8192, 131072, 4096),),
        cpu_shape=CPU_HEAD,
        yardstick=FOUR,
        share=1.0,
        peers=(peers.NEMO_KL, peers.LIGER_KL, peers.LIGER_CHUNKED_KL, peers.EAGER_KL),
    ),
)
WORKSPACE_OF = "L5"
"""The case whose workspace is what L7 says."""
