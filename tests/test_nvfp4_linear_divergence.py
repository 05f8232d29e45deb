"""Divergence to a teacher whose hidden states, head or both are in NVFP4: value and gradient of the numbers they stand
for."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from mopd_kernels import Head, divergence, divergence_chunks, linear_operands
from mopd_kernels.divergence_reference import KINDS
from mopd_kernels.nvfp4 import Format, NVFP4Tensor, quantize
from mopd_kernels.testing import LargestTensor, shard

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what a GPU does in silence

IMPLS = ("reference", "triton")
OPERANDS = {"weight": (False, True), "hidden": (True, False), "both": (True, True)}


def problem(tokens=7, vocab=150, seed=0):
    """Heads of a student (H = 24, fp32) and a teacher (H = 80, bf16)."""
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for width, dtype in ((24, torch.float32), (80, torch.bfloat16)):
        hidden = torch.randn(tokens, width, generator=generator)
        weight = 2 * torch.randn(vocab, width, generator=generator) / math.sqrt(width)
        heads.append(Head(hidden.to(dtype), weight.to(dtype)))
    return heads


def packed(teacher, which, form=None):
    return Head(*(quantize(x, form or Format()) if w else x for x, w in zip(teacher, OPERANDS[which], strict=True)))


def exact(teacher):
    """fp64: what its operands stand for."""
    return Head(*(x.dequantize().double() if isinstance(x, NVFP4Tensor) else x.double() for x in teacher))


def run(kind, student, teacher, **options):
    """Values, by-products, and gradients of the student's operands (None where there is none)."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in student)
    found = divergence(kind, Head(hidden, weight), teacher, top_k=3, **options)
    found.value.sum().backward()
    return [*(x.detach() for x in found), hidden.grad, weight.grad]


def assert_all_close(ours, expected):
    for value, truth in zip(ours, expected, strict=True):
        assert (value is None) == (truth is None)
        if value is not None:
            torch.testing.assert_close(value.double(), truth.double(), rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", OPERANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_that_of_the_dequantized_teacher(kind, which, impl):
    student, teacher = problem()
    teacher = packed(teacher, which, Format(numerics="modelopt", swizzled=kind == "jsd"))
    truth = Head(*(x.double() for x in student))
    for weight_grad in (False, True):
        options = {"temperature": 1.5, "weight_grad": weight_grad}
        expected = run(kind, truth, exact(teacher), **options)
        assert_all_close(run(kind, student, teacher, impl=impl, **options), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_padding_and_checkpointing_change_nothing(impl, monkeypatch):
    student, teacher = problem()
    teacher = packed(teacher, "both", Format(swizzled=True))
    whole = run("reverse_kl", student, teacher, weight_grad=True, valid_vocab=140, impl=impl)
    teacher.weight.codes[140:] = 0xFF
    teacher.weight.scales.view(torch.uint8).view(-1)[-1:] = 0x7F  # of the padding of 128 x 4 tiles
    monkeypatch.setitem(divergence_chunks.LOGITS_BYTES, "cpu", 4 * 2 * 150 * 3)  # three rows
    hidden, weight = (x.detach().clone().requires_grad_() for x in student)

    def inner(hidden):
        options = {"weight_grad": True, "valid_vocab": 140, "top_k": 3, "impl": impl}
        return divergence("reverse_kl", Head(hidden, weight), teacher, **options).value

    value = checkpoint(inner, hidden, use_reentrant=False)
    value.sum().backward()
    for ours, expected in ((value, whole[0]), (hidden.grad, whole[-2]), (weight.grad, whole[-1])):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_weight_never_exists_decoded(impl, monkeypatch):
    student, teacher = problem(tokens=2, vocab=512)
    monkeypatch.setattr(linear_operands, "DECODED_ELEMENTS", 32 * 80)
    teacher = packed(teacher, "weight")
    with LargestTensor() as largest, torch.no_grad():
        divergence("reverse_kl", Head(*student), teacher, impl=impl)
    assert largest.elements <= 512 * 40 < teacher.weight.shape[0] * teacher.weight.shape[1]  # its packed bytes


def test_what_cannot_be_packed_is_refused():
    student, teacher = problem()
    with pytest.raises(ValueError, match="student has an NVFP4 operand: it is trained"):
        divergence("reverse_kl", packed(teacher, "weight"), teacher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher has hidden under the Hadamard transform with signs None"):
        signs = Format(signs=tuple([1] * 16))
        divergence("reverse_kl", student, packed(teacher, "weight", signs))
    with pytest.raises(ValueError, match=r"teacher has hidden \[7, 24\] and weight \[150, 80\]"):
        divergence("reverse_kl", student, Head(student.hidden, quantize(teacher.weight)))


def _on_a_rank(kind):
    student, teacher = problem(vocab=131)
    rank, size = dist.get_rank(), dist.get_world_size()
    ours = Head(student.hidden, shard(student.weight, rank, size))
    theirs = Head(quantize(teacher.hidden), quantize(shard(teacher.weight, rank, size).nan_to_num(0.0)))
    options = {"weight_grad": True, "group": dist.group.WORLD, "valid_vocab": 131}
    return [run(kind, ours, theirs, impl=impl, **options)[0] for impl in IMPLS], exact(theirs).weight


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel_with_a_multiplier_of_each_rank(ranks, world):
    student, teacher = problem(vocab=131)
    answers = ranks(world, _on_a_rank, "forward_kl")
    whole = Head(exact(packed(teacher, "hidden")).hidden, torch.cat([answer[1] for answer in answers])[:131])
    truth = run("forward_kl", Head(*(x.double() for x in student)), whole)[0]
    for found, _ in answers:
        for ours in found:
            torch.testing.assert_close(ours.double(), truth, rtol=3e-5, atol=1e-5)
