"""The peers that the kernels are timed against, and their published times where they cannot be.

A peer computes log-probabilities of the targets and the gradient of a loss on them. Those that give log-probabilities
with a gradient get our whole surrogate on top; those that only know cross-entropy get a weighted or plain sum of it,
which is less work than ours. Each returns what it computed for each token, for the comparison with fp64, or None where
it only gives a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from bench.formulas import NemoHead, NemoLogprob, VerlHead, chunked_reverse_kl, eager_rows, verl_rows
from bench.peer import Peer
from bench.problem import DivergenceProblem, HeadProblem, LogitProblem, TokenProblem
from torch import Tensor

from mopd_kernels import surrogate

IGNORED = -100


def finish(problem: TokenProblem, logprob: Tensor) -> Tensor:
    """Our surrogate on a peer's log-probabilities, and its gradient."""
    losses, _, _ = surrogate(logprob, problem.tokens, problem.settings)
    losses.sum().backward()
    return logprob.detach()


def finish_cross_entropy(problem: TokenProblem, nll: Tensor) -> Tensor:
    """A weighted sum of a peer's negative log-probabilities ``[T]``, and its gradient."""
    nll = nll.flatten()
    (nll * problem.tokens.weight).sum().backward()
    return -nll.detach()


def labels(problem: TokenProblem) -> Tensor:
    """Targets, with rows that are not kept marked in the peers' way."""
    tokens = problem.tokens
    return tokens.targets if tokens.keep is None else tokens.targets.masked_fill(~tokens.keep, IGNORED)


def _eager_statistics(problem: LogitProblem) -> Tensor:
    return eager_rows(problem.logits.detach(), problem.tokens.targets)[0]


def _eager_objective(problem: LogitProblem) -> Tensor:
    return finish(problem, eager_rows(problem.logits, problem.tokens.targets)[0])


def _eager_head_statistics(problem: HeadProblem) -> Tensor:
    with torch.no_grad():
        return eager_rows(problem.hidden @ problem.weight.T, problem.tokens.targets)[0]


def _eager_head(problem: HeadProblem) -> Tensor:
    return finish(problem, eager_rows(problem.hidden @ problem.weight.T, problem.tokens.targets)[0])


def _eager_reverse_kl(problem: DivergenceProblem) -> Tensor:
    log_p = (problem.hidden @ problem.weight.T).float().log_softmax(-1)
    log_q = (problem.teacher_hidden @ problem.teacher_weight.T).float().log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    (value * problem.tokens.weight).sum().backward()
    return value.detach()


_compiled_rows = torch.compile(eager_rows)


def _compiled_statistics(problem: LogitProblem) -> Tensor:
    return _compiled_rows(problem.logits.detach(), problem.tokens.targets)[0]


def _compiled_objective(problem: LogitProblem) -> Tensor:
    return finish(problem, _compiled_rows(problem.logits, problem.tokens.targets)[0])


def _compiled_head(problem: HeadProblem) -> Tensor:
    return finish(problem, _compiled_rows(problem.hidden @ problem.weight.T, problem.tokens.targets)[0])


def _verl_statistics(problem: LogitProblem) -> Tensor:
    return verl_rows(problem.logits.detach(), problem.tokens.targets)[0]


def _verl_objective(problem: LogitProblem) -> Tensor:
    return finish(problem, verl_rows(problem.logits, problem.tokens.targets)[0])


def _verl_head_statistics(problem: HeadProblem) -> Tensor:
    with torch.no_grad():
        return VerlHead.apply(problem.hidden, problem.weight, problem.tokens.targets)[0]


def _verl_head(problem: HeadProblem) -> Tensor:
    return finish(problem, VerlHead.apply(problem.hidden, problem.weight, problem.tokens.targets)[0])


def _nemo_statistics(problem: LogitProblem) -> Tensor:
    return NemoLogprob.apply(problem.logits.detach(), problem.tokens.targets)


def _nemo_objective(problem: LogitProblem) -> Tensor:
    return finish(problem, NemoLogprob.apply(problem.logits, problem.tokens.targets))


def _nemo_head(problem: HeadProblem) -> Tensor:
    return finish(problem, NemoHead.apply(problem.hidden, problem.weight, problem.tokens.targets))


def _nemo_reverse_kl(problem: DivergenceProblem) -> Tensor:
    value = chunked_reverse_kl(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight)
    (value * problem.tokens.weight).sum().backward()
    return value.detach()


def _group() -> dist.ProcessGroup:
    """A world of one, which Megatron's operators want even there."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def _mcore(problem: LogitProblem, logits: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits[:, None], problem.tokens.targets[:, None], tp_group=_group())


def _mcore_fused(problem: LogitProblem, logits: Tensor) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return fused_vocab_parallel_cross_entropy(logits[:, None], problem.tokens.targets[:, None], _group())


def _liger_vocab_parallel(problem: LogitProblem, logits: Tensor) -> Tensor:
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    return LigerVocabParallelCrossEntropy()(logits[:, None], problem.tokens.targets[:, None])


def _quack(problem: LogitProblem, logits: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, problem.tokens.targets, reduction="none", inplace_backward=True)


def _flash_attn(problem: LogitProblem, logits: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits, problem.tokens.targets, inplace_backward=True)[0]


def _forward(loss: Callable[[LogitProblem, Tensor], Tensor]) -> Callable[[LogitProblem], Tensor]:
    """Log-probabilities alone from a peer's cross-entropy."""

    @torch.no_grad()
    def run(problem: LogitProblem) -> Tensor:
        return -loss(problem, problem.logits.detach()).flatten()

    return run


def _both(loss: Callable[[LogitProblem, Tensor], Tensor]) -> Callable[[LogitProblem], Tensor]:
    """A peer's cross-entropy and its gradient."""
    return lambda problem: finish_cross_entropy(problem, loss(problem, problem.logits))


def _liger_grpo(problem: LogitProblem) -> None:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    tokens = problem.tokens
    assert tokens.prox is not None
    logits = problem.output(len(problem.buffer))[None]
    advantage = tokens.weight.new_ones(1)  # one of a sequence is all it takes
    loss, _ = triton_grpo_loss(
        logits, tokens.prox[None], None, tokens.targets[None], advantage, temperature=1.0, beta=0.0, reduce=True
    )
    loss.backward()


def _liger_chunked_grpo(problem: HeadProblem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    tokens = problem.tokens
    assert tokens.prox is not None
    ones = torch.ones_like(tokens.targets)[None]
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=problem.hidden.is_cuda, use_ref_model=False)(
        problem.hidden[None],
        problem.weight,
        tokens.targets[None],
        ones,
        tokens.weight.new_ones(1),
        old_per_token_logps=tokens.prox[None],
    )[0]
    loss.backward()


def _liger_scaled(problem: HeadProblem) -> Tensor:
    """Negative log-probabilities; it forms the entropy beside them, as ours does."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    arguments = (problem.hidden, problem.weight, labels(problem), 1.0, IGNORED, 1, True)
    return LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)[0]


@torch.no_grad()
def _liger_scaled_statistics(problem: HeadProblem) -> Tensor:
    return -_liger_scaled(problem)


def _liger_scaled_objective(problem: HeadProblem) -> Tensor:
    return finish(problem, -_liger_scaled(problem))


def _liger_linear(problem: HeadProblem) -> None:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    loss(problem.weight, problem.hidden, problem.tokens.targets).backward()


def _liger_reverse_kl(problem: DivergenceProblem) -> None:
    """Its Triton form; it divides by the number of rows."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    tensors = (problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight)
    LigerFusedLinearJSD(jsd_beta=1.0)(*tensors, problem.tokens.targets).backward()


def _liger_chunked_reverse_kl(problem: DivergenceProblem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=problem.hidden.is_cuda
    )
    tensors = (problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight)
    loss(*tensors, problem.tokens.targets).backward()


def _cce(problem: HeadProblem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(problem.hidden, problem.weight, labels(problem), reduction="none")


@torch.no_grad()
def _cce_statistics(problem: HeadProblem) -> Tensor:
    return -_cce(problem)


def _cce_objective(problem: HeadProblem) -> Tensor:
    return finish(problem, -_cce(problem))


def _quack_chunked(scaled_exp: bool) -> Callable[[HeadProblem], None]:
    def run(problem: HeadProblem) -> None:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        loss = chunked_linear_cross_entropy(
            problem.hidden, problem.weight, problem.tokens.targets, reduction="sum", use_scaled_exp=scaled_exp
        )
        loss.backward()

    return run


CUDA = ("cuda",)
ANYWHERE = ("cuda", "cpu")
WRITTEN_ANEW = "formula written anew"
_VPCE = "liger_kernel.transformers.vocab_parallel_cross_entropy"
_LIGER_CHUNKED = ("liger_kernel.chunked_loss",)
_MCORE_FUSED = "megatron.core.fusions.fused_cross_entropy"
_MCORE = "megatron.core.tensor_parallel.cross_entropy"
_QUACK = ("quack.linear_cross_entropy",)


def _of_logits(name: str, loss: Callable[[LogitProblem, Tensor], Tensor], module: str, source: str) -> Peer:
    return Peer(name, _both(loss), source, (module,), CUDA, _forward(loss))


MCORE = replace(_of_logits("mcore vocab-parallel", _mcore, _MCORE, "megatron-core"), devices=ANYWHERE)
MCORE_FUSED = replace(_of_logits("mcore fused", _mcore_fused, _MCORE_FUSED, "megatron-core"), devices=ANYWHERE)
LIGER_VOCAB_PARALLEL = _of_logits("Liger vocab-parallel", _liger_vocab_parallel, _VPCE, "liger-kernel")
LIGER_GRPO = Peer("Liger GRPO", _liger_grpo, "liger-kernel", ("liger_kernel.transformers.grpo_loss",), CUDA)
QUACK = _of_logits("quack", _quack, "quack.cross_entropy", "quack-kernels")
FLASH_ATTN = _of_logits("flash-attn Triton", _flash_attn, "flash_attn.ops.triton.cross_entropy", "flash-attn")
EAGER = Peer("eager torch", _eager_objective, "torch", forward_run=_eager_statistics)
COMPILED = Peer("torch.compile", _compiled_objective, "torch", forward_run=_compiled_statistics)
NEMO = Peer("NeMo RL chunked", _nemo_objective, WRITTEN_ANEW, forward_run=_nemo_statistics)
VERL = Peer("verl logits path", _verl_objective, WRITTEN_ANEW, forward_run=_verl_statistics)

LIGER_SCALED = Peer(
    "Liger FSLCE",
    _liger_scaled_objective,
    "liger-kernel",
    ("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
    forward_run=_liger_scaled_statistics,
    needs_on_cuda=("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",),
)
LIGER_LINEAR = Peer(
    "Liger fused linear CE",
    _liger_linear,
    "liger-kernel",
    ("liger_kernel.transformers.fused_linear_cross_entropy",),
    CUDA,
)
LIGER_CHUNKED_GRPO = Peer("Liger chunked GRPO", _liger_chunked_grpo, "liger-kernel", _LIGER_CHUNKED)
QUACK_CHUNKED = Peer("quack chunked", _quack_chunked(False), "quack-kernels", _QUACK, CUDA)
QUACK_SCALED_EXP = Peer("quack scaled-exp", _quack_chunked(True), "quack-kernels", _QUACK, CUDA)
CCE = Peer("cut-cross-entropy", _cce_objective, "cut-cross-entropy", ("cut_cross_entropy",), CUDA, _cce_statistics)
EAGER_HEAD = Peer("eager torch", _eager_head, "torch", forward_run=_eager_head_statistics)
COMPILED_HEAD = Peer("torch.compile", _compiled_head, "torch")
NEMO_HEAD = Peer("NeMo RL fused", _nemo_head, WRITTEN_ANEW)
VERL_HEAD = Peer("verl fused linear", _verl_head, WRITTEN_ANEW, forward_run=_verl_head_statistics)

EAGER_KL = Peer("eager torch", _eager_reverse_kl, "torch")
NEMO_KL = Peer("NeMo RL chunked", _nemo_reverse_kl, WRITTEN_ANEW)
LIGER_KL = Peer(
    "Liger fused linear JSD", _liger_reverse_kl, "liger-kernel", ("liger_kernel.transformers.fused_linear_jsd",), CUDA
)
LIGER_CHUNKED_KL = Peer("Liger chunked JSD", _liger_chunked_reverse_kl, "liger-kernel", _LIGER_CHUNKED)
