"""mopd_kernels.divergence against fp64 autograd, alone and vocabulary-parallel; by-products, bounds and refusals."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mopd_kernels import divergence_chunks, divergence_reference, divergence_triton
from mopd_kernels.divergence import Head, TopK, divergence
from mopd_kernels.divergence_reference import KINDS
from mopd_kernels.testing import LargestTensor, assert_no_worse, exact_log_softmax, shard

IMPLS = ("reference", "triton")
TEACHERS = ("head", "top_k")


@pytest.fixture
def small_blocks(monkeypatch):
    """Kernels whose rows take several programs of several blocks, the last of each ragged."""
    for name, value in {"SPAN": 512, "WARPS": 1, "UNROLL": 2, "VECTOR": 2, "SUPPORT_BLOCK": 2}.items():
        monkeypatch.setattr(divergence_triton, name, value)


def problem(tokens, vocab, dtype=torch.float32, seed=0, spread=2.0):
    """Heads of a student (H = 24) and a teacher (H = 8), and an upstream gradient; logits deviate by ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for width in (24, 8):
        hidden = torch.randn(tokens, width, generator=generator)
        weight = spread * torch.randn(vocab, width, generator=generator) / math.sqrt(width)
        heads.append(Head(hidden.to(dtype), weight.to(dtype)))
    return *heads, torch.randn(tokens, generator=generator)


def top_k_of(teacher, k, temperature=1.0):
    values, ids = exact_log_softmax(*teacher, temperature).topk(k)
    return TopK(ids, values.float())


def exact(kind, hidden, weight, teacher, temperature=1.0):
    """fp64 ``[T]`` by the definition, for autograd."""
    log_p = exact_log_softmax(hidden, weight, temperature)
    if isinstance(teacher, TopK):
        log_p, log_q = log_p.gather(1, teacher.ids), teacher.logprobs.double()
    else:
        log_q = exact_log_softmax(*teacher, temperature)
    p, q = log_p.exp(), log_q.exp()
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    return (p * (log_p - log_q) if kind == "reverse_kl" else q * (log_q - log_p)).sum(-1)


def exact_by_products(student, support, temperature=1.0):
    """overlap, teacher_mass, student_mass both masses of what overlaps, student_top_mass, on a :class:`TopK`, fp64."""
    log_p = exact_log_softmax(*student, temperature)
    at = log_p.gather(1, support.ids)
    beaten_by = (log_p[:, None, :] > at[:, :, None]).sum(-1)
    shared = (beaten_by < support.ids.shape[1]).double()
    q, p = support.logprobs.double().exp(), at.exp()
    top = log_p.topk(support.ids.shape[1], dim=1).values.exp().sum(1)
    return shared.mean(1), q.sum(1), p.sum(1), (q * shared).sum(1), (p * shared).sum(1), top


def gradients(function, hidden, weight, upstream):
    """Value, and gradients of hidden states and weight (None where there is none)."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    value = function(hidden, weight)
    value.backward(upstream.to(value.dtype))
    return value.detach(), hidden.grad, weight.grad


def ours_of(kind, student, teacher, upstream, **options):
    return gradients(lambda h, w: divergence(kind, Head(h, w), teacher, **options).value, *student, upstream)


def truth_of(kind, student, teacher, upstream, temperature=1.0):
    student = (t.double() for t in student)
    return gradients(lambda h, w: exact(kind, h, w, teacher, temperature), *student, upstream)


def assert_all_close(ours, expected, rtol=3e-5, atol=1e-5):
    for value, exactly in zip(ours, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value.double(), exactly.double(), rtol=rtol, atol=atol)


# One token; a vocabulary below one block; several spans of several blocks, the last one ragged.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 3), (7, 50), (4, 707)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_match_fp64(impl, kind, teacher_kind, tokens, vocab, temperature, small_blocks):
    student, teacher, upstream = problem(tokens, vocab)
    if teacher_kind == "top_k":
        teacher = top_k_of(teacher, 3, temperature)
    expected = truth_of(kind, student, teacher, upstream, temperature)
    for weight_grad in (False, True):
        options = {"temperature": temperature, "weight_grad": weight_grad, "impl": impl}
        ours = ours_of(kind, student, teacher, upstream, **options)
        assert ours[0].dtype == torch.float32 and (ours[2] is not None) == weight_grad
        assert_all_close(ours, expected)


@pytest.mark.parametrize("temperature", [0.7, 1.5, 2.0, 3.0])
def test_lanes_without_a_column_stay_empty_with_the_devices_fma(temperature, monkeypatch):
    """A device rounds ``x * scale - top`` once, the interpreter twice, which would hide what is left of the two."""

    def fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    student, teacher, upstream = problem(3, 50)
    ours = ours_of("reverse_kl", student, teacher, upstream, temperature=temperature, weight_grad=True, impl="triton")
    assert_all_close(ours, truth_of("reverse_kl", student, teacher, upstream, temperature))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks_of_the_shipped_size(impl, teacher_kind, kind):
    """One whole block and a ragged one, as on a device."""
    student, teacher, upstream = problem(2, 2500)
    teacher = teacher if teacher_kind == "head" else top_k_of(teacher, 150)
    strided = type(teacher)(*(t.T.contiguous().T for t in teacher))
    ours = ours_of(kind, student, strided, upstream, weight_grad=True, impl=impl)
    assert_all_close(ours, truth_of(kind, student, teacher, upstream))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_fp64_autograd_agrees_with_finite_differences_and_with_the_whole_support(impl, kind):
    student, teacher, upstream = problem(4, 11)
    leaves = tuple(t.double().requires_grad_() for t in student)
    for known in (teacher, top_k_of(teacher, 4)):
        assert torch.autograd.gradcheck(
            lambda h, w, t=known: divergence(kind, Head(h, w), t, weight_grad=True, temperature=1.3).value, leaves
        )
    everything = top_k_of(teacher, 11)
    ours = ours_of(kind, student, everything, upstream, weight_grad=True, impl=impl)
    assert_all_close(ours, ours_of(kind, student, teacher, upstream, weight_grad=True, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_by_products_match_fp64(impl, k, temperature, small_blocks):
    student, teacher, _ = problem(17, 50)
    teacher = Head(torch.cat([student.hidden[:, :4], teacher.hidden[:, 4:]], 1), teacher.weight)
    support = top_k_of(teacher, k, temperature)
    expected = exact_by_products(student, support, temperature)
    if k == 5:
        assert len(expected[0].unique()) > 2
    for found in (
        divergence("reverse_kl", student, support, temperature=temperature, impl=impl),
        divergence("forward_kl", student, teacher, temperature=temperature, top_k=k, impl=impl),
        divergence("jsd", student, teacher, temperature=temperature, top_k=k, impl=impl),
    ):
        assert_all_close(found[1:], expected)
        assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_products_are_only_made_when_asked(impl):
    student, teacher, _ = problem(5, 20)
    assert divergence("jsd", student, teacher, impl=impl)[1:] == (None,) * 6


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_tied_at_the_kth_place_are_in_the_students_top_k(impl):
    """Whole numbers, so that equal logits are equal in any order of summation."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Head(torch.ones(6, 8), torch.randint(-1, 2, (40, 8), generator=generator).float()) for _ in "st"
    )
    support = top_k_of(teacher, 7)
    expected = exact_by_products(student, support)
    found = divergence("reverse_kl", student, support, impl=impl)
    assert_all_close(found[1:], expected)
    torch.testing.assert_close(found.value.double(), exact("reverse_kl", *student, support), rtol=1e-5, atol=1e-5)
    dense = divergence("reverse_kl", student, teacher, top_k=7, impl=impl)
    torch.testing.assert_close(dense.teacher_mass.double(), expected[1], rtol=1e-5, atol=0)  # whichever it takes
    assert torch.equal(divergence("reverse_kl", student, student, top_k=7, impl=impl).overlap, torch.ones(6))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_peaked_distributions(impl, kind, teacher_kind):
    """Logits of +-40 and beyond: probabilities underflow, the divergences reach some 100 nats."""
    student, teacher, upstream = problem(13, 60, spread=25.0)
    assert float((student.hidden @ student.weight.T).abs().amax(1).min()) > 40
    teacher = teacher if teacher_kind == "head" else top_k_of(teacher, 5)
    ours = ours_of(kind, student, teacher, upstream, weight_grad=True, impl=impl)
    assert_all_close(ours, truth_of(kind, student, teacher, upstream), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours[0].double(), exact(kind, *student, teacher), rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_no_worse_than_plain_torch(impl, kind, dtype):
    student, teacher, upstream = problem(9, 50, dtype)

    def plain(h, w, log_q, ids):
        log_p = (h @ w.T).float().log_softmax(-1)
        known = TopK(torch.arange(50).expand(9, 50) if ids is None else ids, log_q)
        return exact(kind, log_p, torch.eye(50), known)  # log_softmax leaves log-probabilities as they are

    for known in (teacher, top_k_of(teacher, 5)):
        low_q, ids = (teacher.hidden @ teacher.weight.T).float().log_softmax(-1), None
        if isinstance(known, TopK):
            low_q, ids = known.logprobs, known.ids
        expected = truth_of(kind, student, known, upstream)
        low = gradients(lambda h, w, q=low_q, i=ids: plain(h, w, q, i), *student, upstream)
        for weight_grad in (False, True):
            ours = ours_of(kind, student, known, upstream, weight_grad=weight_grad, impl=impl)
            assert ours[1].dtype == dtype
            for name, value, lowp, exactly in zip(("value", "hidden", "weight"), ours, low, expected, strict=True):
                # Gradients are rounded to the dtype at the end, here as there: which comes out nearer is chance.
                slack = 1e-5 if name == "value" else 0.5 * torch.finfo(dtype).eps * float(exactly.abs().max())
                if value is not None:
                    assert_no_worse(value, lowp, exactly, slack, name)
            torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_hidden_size_is_taken(impl):
    student, teacher = Head(torch.ones(3, 5), torch.ones(6, 5)), Head(torch.ones(3, 3), torch.ones(6, 3))
    value = divergence("reverse_kl", student, teacher, impl=impl).value  # both are uniform
    torch.testing.assert_close(value, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_may_differ_in_dtype(impl):
    student, teacher, upstream = problem(7, 50)
    teacher = Head(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    expected = truth_of("reverse_kl", student, teacher, upstream)
    assert_all_close(ours_of("reverse_kl", student, teacher, upstream, weight_grad=True, impl=impl), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_properties(impl, kind):
    """Never negative, 0 with no gradient between equals, blind to a shift of all logits; jsd symmetric and bounded."""
    student, teacher, upstream = problem(5, 60)
    value = divergence(kind, student, teacher, impl=impl).value
    assert (value > 0.1).all()
    same = ours_of(kind, student, student, upstream, weight_grad=True, impl=impl)
    assert not any(t.any() for t in same)
    near = Head(student.hidden, student.weight * (1 + 1e-3))
    assert (divergence(kind, student, near, impl=impl).value >= -1e-6).all()

    def shifted(head, by):
        return Head(torch.cat([head.hidden, head.hidden.new_full((5, 8), by / 8)], 1), widened(head.weight))

    def widened(weight):
        return torch.cat([weight, weight.new_ones(60, 8)], 1)

    torch.testing.assert_close(
        divergence(kind, shifted(student, 30.0), shifted(teacher, -20.0), impl=impl).value, value, rtol=1e-5, atol=2e-5
    )
    if kind == "jsd":
        torch.testing.assert_close(divergence(kind, teacher, student, impl=impl).value, value, rtol=1e-5, atol=1e-6)
        far = [Head(torch.ones(1, 8), torch.zeros(60, 8).index_fill(0, torch.tensor(i), 20.0)) for i in (3, 5)]
        torch.testing.assert_close(divergence(kind, *far, impl=impl).value, torch.tensor([math.log(2)]))
        assert (value <= math.log(2)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_padded_columns_are_never_read(impl, teacher_kind):
    student, teacher, upstream = problem(7, 21)
    pad = lambda head: Head(head.hidden, torch.cat([head.weight, torch.full((4, head.weight.shape[1]), math.nan)]))  # noqa: E731
    ours, theirs = pad(student), pad(teacher)
    if teacher_kind == "top_k":
        teacher = theirs = top_k_of(teacher, 5)
    plain = ours_of("jsd", student, teacher, upstream, weight_grad=True, impl=impl)
    padded = ours_of("jsd", ours, theirs, upstream, weight_grad=True, valid_vocab=21, impl=impl)
    assert torch.equal(padded[0], plain[0]) and torch.equal(padded[1], plain[1])
    assert torch.equal(padded[2][:21], plain[2]) and not padded[2][21:].any()


@pytest.mark.parametrize("teacher_kind", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_nothing_that_was_not_written(kind, teacher_kind, monkeypatch, small_blocks):
    student, teacher, upstream = problem(5, 531, torch.bfloat16)
    teacher = teacher if teacher_kind == "head" else top_k_of(teacher, 5)
    expected = ours_of(kind, student, teacher, upstream, impl="triton")
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    poisoned = lambda t: t.fill_(math.nan) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    ours = ours_of(kind, student, teacher, upstream, impl="triton")
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_logits_never_exist_whole(impl, teacher_kind, monkeypatch):
    student, teacher, upstream = problem(40, 256)
    rows = 4
    monkeypatch.setitem(divergence_chunks.LOGITS_BYTES, "cpu", 4 * 2 * 256 * rows)
    if teacher_kind == "top_k":  # no logits of the teacher: the bound holds twice the rows
        teacher, rows = top_k_of(teacher, 5), 2 * rows
    with LargestTensor() as largest:
        for weight_grad in (False, True):
            ours_of("jsd", student, teacher, upstream, weight_grad=weight_grad, impl=impl)
    if impl == "reference":
        assert largest.elements == max(rows * 256, student.weight.numel())
    else:  # the interpreter moves what the kernels take as bytes
        assert largest.elements <= max(4 * rows * 256, student.weight.numel())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_chunks_change_nothing(impl, teacher_kind, monkeypatch):
    student, teacher, upstream = problem(11, 50)
    teacher = teacher if teacher_kind == "head" else top_k_of(teacher, 5)
    whole = ours_of("jsd", student, teacher, upstream, weight_grad=True, impl=impl)
    monkeypatch.setitem(divergence_chunks.LOGITS_BYTES, "cpu", 4 * 2 * 50 * 3)
    for weight_grad in (False, True):
        ours = ours_of("jsd", student, teacher, upstream, weight_grad=weight_grad, impl=impl)
        assert_all_close(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_no_tokens_still_reach_the_leaves(impl, teacher_kind):
    student, teacher, upstream = problem(0, 12)
    teacher = teacher if teacher_kind == "head" else top_k_of(teacher, 5)
    found = divergence("jsd", student, teacher, top_k=5, impl=impl)
    assert [t.shape for t in found] == [(0,)] * len(found._fields)
    _, d_hidden, d_weight = ours_of("jsd", student, teacher, upstream, weight_grad=True, impl=impl)
    assert d_hidden.shape == (0, 24) and not d_weight.any()
    assert ours_of("jsd", student, teacher, upstream, impl=impl)[1].shape == (0, 24)


# ------------------------------------------------------------------ where and when gradients are made


def count_gradients(monkeypatch):
    """List that grows by one with each gradient of a chunk's logits."""
    made, plain = [], divergence_reference.dense_gradient
    monkeypatch.setattr(divergence_reference, "dense_gradient", lambda *a: made.append(1) or plain(*a))
    return made


def test_gradients_are_formed_only_when_asked(monkeypatch):
    made = count_gradients(monkeypatch)
    student, teacher, upstream = problem(5, 20)
    leaves = Head(*(t.clone().requires_grad_() for t in student))
    watched = Head(*(t.clone().requires_grad_() for t in teacher))
    with torch.no_grad():
        divergence("jsd", leaves, watched, weight_grad=True)
    divergence("jsd", student, watched)
    assert not made and not divergence("jsd", student, watched).value.requires_grad
    value = divergence("jsd", leaves, watched).value  # in forward, once
    assert len(made) == 1
    value.backward(upstream, retain_graph=True)
    value.backward(upstream)
    assert len(made) == 1 and leaves.weight.grad is None
    once = ours_of("jsd", student, teacher, upstream)[1]
    torch.testing.assert_close(leaves.hidden.grad, 2 * once)
    only_weight = Head(student.hidden, leaves.weight)
    made.clear()
    frozen = Head(leaves.hidden, leaves.weight.detach())
    divergence("jsd", frozen, watched, weight_grad=True).value.backward(upstream)  # in forward, as without
    assert len(made) == 1
    made.clear()
    divergence("jsd", only_weight, watched, weight_grad=True).value.backward(upstream)  # in backward, once
    assert len(made) == 1 and leaves.weight.grad is not None
    assert watched.hidden.grad is None and watched.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True], ids=["recompute", "reentrant_recompute"])
@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "weight"])
def test_recomputation_forms_the_gradient_once(reentrant, weight_grad, monkeypatch):
    student, teacher, upstream = problem(5, 20)
    plain = ours_of("forward_kl", student, teacher, upstream, weight_grad=weight_grad)
    made = count_gradients(monkeypatch)
    run = lambda h, w: divergence("forward_kl", Head(h, w), teacher, weight_grad=weight_grad).value  # noqa: E731
    again = gradients(lambda h, w: checkpoint(run, h, w, use_reentrant=reentrant), *student, upstream)
    assert len(made) == 1
    for ours, expected in zip(again, plain, strict=True):
        assert (ours is None and expected is None) or torch.equal(ours, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_main_grad_gets_the_gradient_once_per_micro_batch(impl, teacher_kind):
    """Forward twice, then backward twice, against autograd's sum; the flag keeps mcore's hook from adding it again."""
    parts = [problem(9, 20, seed=seed) for seed in (0, 1)]
    weight = parts[0][0].weight
    fused, plain = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    fused.main_grad, fused.grad_added_to_main_grad = torch.full_like(weight, 0.5), False
    calls = []

    def hook(p):
        calls.append(p.grad_added_to_main_grad)
        p.grad, p.grad_added_to_main_grad = None, False

    fused.register_post_accumulate_grad_hook(hook)
    for leaf in (fused, plain):
        values = [
            divergence(
                "reverse_kl",
                Head(student.hidden, leaf),
                teacher if teacher_kind == "head" else top_k_of(teacher, 5),
                weight_grad=True,
                impl=impl,
            ).value
            for student, teacher, _ in parts
        ]
        for value, (_, _, upstream) in zip(values, parts, strict=True):
            value.backward(upstream)
    assert calls == [True, True] and fused.grad is None
    torch.testing.assert_close(fused.main_grad - 0.5, plain.grad, rtol=1e-6, atol=1e-6)


def test_a_weight_changed_before_backward_is_noticed():
    student, teacher, upstream = problem(5, 20)
    weight = student.weight.requires_grad_()
    value = divergence("jsd", student, teacher, weight_grad=True).value
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        value.backward(upstream)


# ------------------------------------------------------------------ refusals


GOOD = {
    "kind": "jsd",
    "student": Head(torch.ones(3, 8), torch.ones(6, 8)),
    "teacher": Head(torch.ones(3, 4), torch.ones(6, 4)),
}
IDS, LOGPROBS = torch.tensor([[0, 1], [5, 2], [3, 4]]), torch.full((3, 2), -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind = 'kl': expected one of reverse_kl, forward_kl, jsd"),
        ({"temperature": 0.0}, "temperature = 0.0 must be finite and above 0"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"student": TopK(IDS, LOGPROBS)}, "student and teacher are TopK and Head"),
        ({"teacher": (IDS, LOGPROBS)}, "student and teacher are Head and tuple"),
        ({"student": Head(torch.ones(3, 8), torch.ones(6, 7))}, r"student has hidden \[3, 8\] and weight \[6, 7\]"),
        ({"teacher": Head(torch.ones(3, 4), torch.ones(6, 4).half())}, "teacher has hidden torch.float32 and weight"),
        ({"teacher": Head(torch.ones(4, 4), torch.ones(6, 4))}, r"is \[3, 6\] for student and \[4, 6\] for teacher"),
        ({"teacher": Head(torch.ones(3, 4), torch.ones(5, 4))}, r"is \[3, 6\] for student and \[3, 5\] for teacher"),
        ({"teacher": TopK(IDS[:2], LOGPROBS[:2])}, r"ids \[2, 2\] and logprobs \[2, 2\]: expected \[T, k\] .* T = 3"),
        ({"teacher": TopK(IDS, LOGPROBS[:, :1])}, r"ids \[3, 2\] and logprobs \[3, 1\]"),
        ({"teacher": TopK(IDS.int(), LOGPROBS)}, "ids torch.int32 and logprobs torch.float32: expected int64"),
        ({"teacher": TopK(IDS, LOGPROBS.bfloat16())}, "logprobs torch.bfloat16"),
        ({"teacher": TopK(IDS, LOGPROBS), "top_k": 3}, "top_k = 3, but teacher brings k = 2"),
        ({"teacher": TopK(IDS[:, :0], LOGPROBS[:, :0])}, "k = 0 must be between 1 and 6"),
        ({"teacher": TopK(IDS, LOGPROBS), "valid_vocab": 1}, "k = 2 must be between 1 and 1, the valid vocabulary"),
        ({"top_k": 7}, "k = 7 must be between 1 and 6"),
        ({"teacher": TopK(IDS, LOGPROBS), "valid_vocab": 5}, r"teacher.ids has 5 in row 1: .* in \[0, 5\)"),
        ({"teacher": TopK(IDS - 1, LOGPROBS)}, "teacher.ids has -1 in row 0"),
        ({"teacher": TopK(IDS * 0 + 4, LOGPROBS)}, "teacher.ids has 4 in row 0: a token may stand in a row only once"),
        ({"teacher": TopK(IDS, LOGPROBS * math.nan)}, "teacher.logprobs has nan in row 0: .* finite"),
        ({"teacher": TopK(IDS, LOGPROBS * 0)}, r"exp\(teacher.logprobs\).sum\(\) has 2.0 in row 0: .* not exceed 1"),
        ({"valid_vocab": 7}, "valid_vocab = 7 must be between 1 and 6"),
        ({"impl": "cuda"}, "impl = 'cuda'"),
        (
            {"impl": "triton", "student": Head(torch.ones(3, 5).double(), torch.ones(6, 5).double())},
            "dtype torch.float64",
        ),
        ({"teacher": Head(torch.ones(3, 4, device="meta"), torch.ones(6, 4, device="meta"))}, "are on cpu, meta"),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)
def test_misfits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        divergence(**(GOOD | change))


# ------------------------------------------------------------------ vocabulary-parallel


def _on_a_rank(vocab, impl):
    """Values, by-products and gradients of this rank's shard; the hidden states' summed over ranks, as callers do."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    student, teacher, upstream = problem(7, vocab)
    support = top_k_of(teacher, 4, 0.7)
    local = [Head(head.hidden, shard(head.weight, rank, size)) for head in (student, teacher)]
    bound = divergence_chunks.LOGITS_BYTES["cpu"]
    divergence_chunks.LOGITS_BYTES["cpu"] = 3 * 4 * 2 * len(local[0].weight)  # three chunks, or two, on every rank
    results = []
    for kind in KINDS:
        for known in (local[1], support):
            for weight_grad in (False, True) if kind == "reverse_kl" else (True,):
                options = {"group": group, "valid_vocab": vocab, "temperature": 0.7, "impl": impl, "top_k": 4}
                found = []

                def run(h, w, options=options, found=found, kind=kind, known=known, weight_grad=weight_grad):
                    found.append(divergence(kind, Head(h, w), known, weight_grad=weight_grad, **options))
                    return found[0].value

                value, d_hidden, d_weight = gradients(run, *local[0], upstream)
                dist.all_reduce(d_hidden, group=group)
                results.append((value, *(t.detach() for t in found[0][1:]), d_hidden, d_weight))
    divergence_chunks.LOGITS_BYTES["cpu"] = bound
    return results


@pytest.fixture(scope="module")
def alone(ranks):
    return functools.cache(lambda vocab, impl: ranks(1, _on_a_rank, vocab, impl)[0])


# 12 columns fill 2 and 4 ranks; 9 leave padding on 2 ranks and a rank without any valid column on 4.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("vocab", [12, 9])
def test_shards_agree_with_one_rank(ranks, alone, impl, world, vocab):
    together = ranks(world, _on_a_rank, vocab, impl)
    for case, whole in enumerate(alone(vocab, impl)):
        parts = [results[case] for results in together]
        for index, expected in enumerate(whole[:-1]):  # value, six by-products, gradient of the hidden states
            for part in parts:
                assert torch.equal(part[index], parts[0][index])
                torch.testing.assert_close(part[index], expected, rtol=1e-5, atol=1e-5)
        if whole[-1] is not None:
            d_weight = torch.cat([part[-1] for part in parts])
            torch.testing.assert_close(d_weight[:vocab], whole[-1], rtol=1e-5, atol=1e-5)
            assert not d_weight[vocab:].any()
