"""How far a student's next-token distribution is from a teacher's, straight from hidden states and output weights.

With p the student's distribution, q the teacher's, m = (p + q) / 2, both softmax(hidden @ weight.T / temperature), the
divergence of a token is a sum over the vocabulary, in nats:

    reverse_kl   KL(p || q)                          sum_v p (log p - log q)
    forward_kl   KL(q || p)                          sum_v q (log q - log p)
    jsd          1/2 KL(p || m) + 1/2 KL(q || m)     sum_v p/2 (log p - log m) + q/2 (log q - log m)

A teacher known by its k likeliest tokens only (:class:`TopK`) gives the same sum over those tokens, p and q both
normalised over the *full* vocabulary. This is the convention of forward KL over cached logits: ``topk_kl_div`` without
its ghost token in Megatron-LM's ``training/distillation/cached_logits_loss.py``, ``kullback_leibler_divergence`` in
verl's ``trainer/distillation`` without its clamp. Such a sum leaves out the rest of the mass, so it may be negative;
``teacher_mass`` and ``student_mass`` say how much that is.

With s_v the derivative of the summand with respect to log p_v, the gradient of every form is that of log softmax:

    d / d logit_v = (s_v [v in support] - p_v sum_support s) / temperature        (divergence_reference.terms has s)

Each rank of ``group`` holds the same rows of both vocabulary-parallel weights, ``[V / tp, H]`` from ``rank * V / tp``
onwards, and equal hidden states. Gradients of the student's hidden states are *partial*: the caller sums them over the
group. Columns from ``valid_vocab`` on are padding: never read, gradient zero. ``impl``: see dispatch.py.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_kernels import divergence_reference
from mopd_kernels.autograd_phase import Phase, current_phase
from mopd_kernels.dispatch import Impl, choose, untraced
from mopd_kernels.divergence_chunks import Head, Problem, TopK, chunks, logit_gradient, measure
from mopd_kernels.divergence_reference import KINDS, Kind
from mopd_kernels.divergence_rows import Rows
from mopd_kernels.linear_operands import Operand, check_numbers, linear, shapes_fit, unsupported_reason
from mopd_kernels.nvfp4.tensor import NVFP4Tensor
from mopd_kernels.products import product
from mopd_kernels.vocabulary import VocabularyShard
from mopd_kernels.weight_gradient import WeightGradient

MASS_SLACK = 0.01
"""By how much rounding may carry the probabilities of a teacher's tokens above 1 together."""


class Divergence(NamedTuple):
    """Of each row; fp32 ``[T]`` each (fp64 for fp64 hidden states). All but ``value`` are detached, and None for a
    teacher head without ``top_k``. The support is the teacher's k likeliest tokens."""

    value: Tensor  # nats
    overlap: (
        Tensor | None
    )  # share of the support that is among the student's k likeliest; ties at the k-th place are in
    teacher_mass: Tensor | None  # probability of the support under the teacher
    student_mass: Tensor | None  # and under the student
    shared_teacher_mass: Tensor | None  # the same two of those tokens of the support that overlap
    shared_student_mass: Tensor | None
    student_top_mass: Tensor | None  # probability of the student's own k likeliest under the student


@untraced
def divergence(
    kind: Kind,
    student: Head[Tensor],
    teacher: Head[Operand] | TopK,
    *,
    temperature: float = 1.0,
    weight_grad: bool = False,
    top_k: int | None = None,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Divergence:
    """The divergence ``kind`` of each row, and how the student stands on the teacher's likeliest tokens.

    ``student`` and a teacher ``Head`` may differ in hidden size and dtype, not in rows or vocabulary shards. The
    teacher's hidden states and weight may each be an NVFP4Tensor, decoded as they are multiplied. ``top_k`` asks for
    the by-products with a teacher ``Head``; a ``TopK`` brings its own k. Collectives: one all_gather of a few numbers
    per row for each chunk of rows; two for ``jsd`` with a teacher ``Head``, whose summand needs both log-sum-exps.

    Differentiable in ``student.hidden``, with ``weight_grad`` also in ``student.weight``; never in the teacher. Without
    ``weight_grad`` the gradient of each row is formed in forward and only scaled in backward, from one computation of
    the logits; with it they are made again in backward, when the upstream gradient of each row is known. Raises
    ValueError for what does not fit; on CUDA, what depends on values is an assertion on the device.
    """
    shard = _checked(kind, student, teacher, temperature, top_k, group, valid_vocab)
    problem = Problem(kind, shard, temperature, top_k, _implementation(impl, student, teacher))
    if isinstance(teacher, Head):
        teacher = Head(*(t.detach() if isinstance(t, Tensor) else linear(t) for t in teacher))
    else:
        teacher = TopK(*(t.detach() for t in teacher))
    weight = student.weight if weight_grad else student.weight.detach()
    return Divergence(*_Divergence.apply(student.hidden, weight, teacher, problem, current_phase()))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Head[Operand] | TopK, problem: Problem, phase: Phase
    ) -> tuple[Tensor | None, ...]:
        wants_hidden, again = (phase.gradient and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.zeros_like(hidden) if wants_hidden and not again else None
        form_now = None if phase is Phase.BEFORE_RECOMPUTATION else d_hidden
        student = Head(hidden, weight)
        found = [_forward(student, teacher, problem, rows, form_now) for rows in chunks(student, teacher)]
        whole = Rows.cat(found)
        ctx.problem, ctx.again = problem, again
        if again:
            ctx.packed = [None if isinstance(t, Tensor) else t for t in teacher]
            dense = (t if isinstance(t, Tensor) else None for t in teacher)
            ctx.save_for_backward(hidden, *dense, *whole)
            ctx.teacher, ctx.weight, ctx.version = type(teacher), weight, weight._version
        else:
            ctx.save_for_backward(d_hidden)
        by_products = whole[4:]  # the fields of Divergence after its value
        ctx.mark_non_differentiable(*(t for t in by_products if t is not None))
        return whole.value, *by_products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.again:
            (d_hidden,) = ctx.saved_tensors
            if d_hidden is not None:
                d_hidden = torch.mul(d_hidden, grad[:, None], out=torch.empty_like(d_hidden))
            return d_hidden, *[None] * 4
        if ctx.weight._version != ctx.version:
            raise RuntimeError("the student's weight was changed in place between divergence and its backward")
        hidden, first, second, *rest = ctx.saved_tensors
        known = (a if b is None else b for a, b in zip((first, second), ctx.packed, strict=True))
        student, teacher, whole = Head(hidden, ctx.weight), ctx.teacher(*known), Rows(*rest)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        sink = WeightGradient(ctx.weight, ctx.problem.shard.columns, True)
        for rows in chunks(student, teacher):
            _backward(student, teacher, ctx.problem, rows, whole, grad, d_hidden, sink)
        return d_hidden, sink.hand_over(), *[None] * 3


def _forward(
    student: Head[Tensor], teacher: Head[Operand] | TopK, problem: Problem, rows: slice, d_hidden: Tensor | None
) -> Rows:
    """Of one chunk; a function, so that its logits are gone before the next chunk's are made."""
    logits = problem.logits(student, rows)
    known = problem.known(teacher, rows, logits.dtype)
    found = measure(logits, known, problem)
    if d_hidden is not None:
        unit = torch.full_like(found.value, 1 / problem.temperature)
        d_logits = logit_gradient(logits, known, problem, found, unit, d_hidden.dtype)
        d_hidden[rows] = product(d_logits, student.weight[: problem.shard.columns])
    return found


def _backward(
    student: Head[Tensor],
    teacher: Head[Operand] | TopK,
    problem: Problem,
    rows: slice,
    whole: Rows,
    grad: Tensor,
    d_hidden: Tensor | None,
    sink: WeightGradient,
) -> None:
    logits = problem.logits(student, rows)
    known = problem.known(teacher, rows, logits.dtype)
    scale = grad[rows] / problem.temperature
    d_logits = logit_gradient(logits, known, problem, whole.select(rows), scale, student.hidden.dtype)
    if d_hidden is not None:
        d_hidden[rows] = product(d_logits, student.weight[: problem.shard.columns])
    sink.add(d_logits, student.hidden[rows])


def _implementation(impl: Impl, student: Head[Tensor], teacher: Head[Operand] | TopK) -> ModuleType:
    theirs = [*teacher] if isinstance(teacher, Head) else []
    tiled = any(isinstance(x, NVFP4Tensor) for x in teacher)  # whose product is not left to cuBLAS

    def unsupported() -> str | None:
        ours = unsupported_reason(student.hidden, student.weight, tiled=False)
        return ours or unsupported_reason(*theirs, tiled=tiled)

    if choose("divergence", impl, student.hidden.is_cuda, unsupported) == "reference":
        return divergence_reference
    from mopd_kernels import divergence_triton

    return divergence_triton


# ------------------------------------------------------------------ checks


def _checked(
    kind: str,
    student: Head[Tensor],
    teacher: Head[Operand] | TopK,
    temperature: float,
    top_k: int | None,
    group: dist.ProcessGroup | None,
    valid_vocab: int | None,
) -> VocabularyShard:
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature} must be finite and above 0")
    if not isinstance(student, Head) or not isinstance(teacher, Head | TopK):
        got = f"{type(student).__name__} and {type(teacher).__name__}"
        raise ValueError(f"student and teacher are {got}: expected a Head, and a Head or a TopK")
    if not all(isinstance(x, Tensor) for x in student):
        raise ValueError("student has an NVFP4 operand: it is trained, so pass it dense; a teacher's may be packed")
    _check_head("student", student)
    shard = VocabularyShard(len(student.weight), group, valid_vocab)
    if isinstance(teacher, Head):
        _check_head("teacher", teacher)
        ours, theirs = ([head.hidden.shape[0], head.weight.shape[0]] for head in (student, teacher))
        if ours != theirs:
            raise ValueError(f"[T, V/tp] is {ours} for student and {theirs} for teacher: they must agree in both")
        k = 1 if top_k is None else top_k
    else:
        _check_top_k(student, teacher)
        k = teacher.ids.shape[1]
        if top_k not in (None, k):
            raise ValueError(f"top_k = {top_k}, but teacher brings k = {k} tokens per row; leave top_k out")
    devices = {t.device for t in (*student, *teacher)}
    if len(devices) > 1:
        raise ValueError(f"student and teacher are on {', '.join(sorted(map(str, devices)))}: move them to one device")
    if not 1 <= k <= shard.valid:
        raise ValueError(f"k = {k} must be between 1 and {shard.valid}, the valid vocabulary")
    if isinstance(teacher, TopK):
        _check_values(teacher, shard)
    return shard


def _check_head(name: str, head: Head[Operand]) -> None:
    hidden, weight = head
    if not shapes_fit(hidden, weight):
        raise ValueError(
            f"{name} has hidden {list(hidden.shape)} and weight {list(weight.shape)}: expected [T, H] and [V/tp, H]"
        )
    check_numbers(f"{name} has", hidden, weight)


def _check_top_k(student: Head[Tensor], teacher: TopK) -> None:
    ids, logprobs = teacher
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(student.hidden):
        raise ValueError(
            f"teacher has ids {list(ids.shape)} and logprobs {list(logprobs.shape)}: expected [T, k] twice with"
            f" T = {len(student.hidden)}, the rows of student.hidden"
        )
    if ids.dtype != torch.int64 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"teacher has ids {ids.dtype} and logprobs {logprobs.dtype}: expected int64 and fp32, since rounding"
            " log-probabilities further costs up to 0.03 nats"
        )


def _check_values(teacher: TopK, shard: VocabularyShard) -> None:
    ids, logprobs = teacher
    outside = (ids < 0) | (ids >= shard.valid)
    _refuse(outside, ids, "teacher.ids", f"token numbers must lie in [0, {shard.valid}), the valid vocabulary")
    ordered = ids.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    _refuse(twice, ordered[:, 1:], "teacher.ids", "a token may stand in a row only once; leave padded rows out")
    _refuse(~logprobs.isfinite(), logprobs, "teacher.logprobs", "log-probabilities must be finite")
    mass = logprobs.exp().sum(1, keepdim=True)
    rule = "the probabilities of a row must not exceed 1; normalise over the full vocabulary at this temperature"
    _refuse(mass > 1 + MASS_SLACK, mass, "exp(teacher.logprobs).sum()", rule)


def _refuse(bad: Tensor, shown: Tensor, name: str, rule: str) -> None:
    """ValueError that names the first bad value; on CUDA an assertion on the device, which costs no synchronisation."""
    if not bad.numel():
        return
    if bad.is_cuda:
        torch._assert_async(~bad.any(), f"{name}: {rule}")  # pyright: ignore[reportPrivateImportUsage]
    elif bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} has {shown[row, column].item()} in row {row}: {rule}")
