"""Log-probabilities from NVFP4 hidden states and weights: those of the numbers that the codes stand for, in every form,
numerics and layout, alone and vocabulary-parallel, without a matrix of those numbers."""

import math

import pytest
import torch
import torch.distributed as dist

from mopd_kernels import (
    Surrogate,
    Tokens,
    device,
    linear_logprob,
    linear_objective,
    linear_operands,
    linear_statistics,
    linear_tiles,
)
from mopd_kernels.nvfp4 import TE_SIGNS, Format, NVFP4Tensor, quantize
from mopd_kernels.nvfp4.grids import E2M1
from mopd_kernels.nvfp4.numerics import MODES
from mopd_kernels.testing import LargestTensor, exact_log_softmax, shard

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what a GPU does in silence

IMPLS = ("reference", "triton")
OPERANDS = {"weight": (False, True), "hidden": (True, False), "both": (True, True)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"rtol": 2e-6, "atol": 6e-6}  # nats: sums of products in fp32, of logits up to 8


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Every program then walks several tiles."""
    monkeypatch.setattr(device, "NO_DEVICE", (9, 2))


def problem(tokens, width, vocab, dtype=torch.bfloat16, seed=0):
    """hidden [T, H], weight [V, H], targets [T]; logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (2 * torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def packed(x, form=None):
    return quantize(x, form or Format(), impl="reference")


def operands(hidden, weight, which, form=None):
    """Of a head, those packed that ``which`` says."""
    return [packed(x, form) if wanted else x for x, wanted in zip((hidden, weight), OPERANDS[which], strict=True)]


def numbers(x):
    """fp64: what an operand stands for, by the rule of its numerics."""
    return x.dequantize(torch.float32).double() if isinstance(x, NVFP4Tensor) else x.double()


def assert_statistics(ours, hidden, weight, targets, temperature=1.0):
    log_p = exact_log_softmax(numbers(hidden), numbers(weight), temperature)
    truth = log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours.logprob.double(), truth, **TOLERANCE)
    torch.testing.assert_close(ours.entropy.double(), -(log_p.exp() * log_p).sum(-1), **TOLERANCE)
    lse = (numbers(hidden) @ numbers(weight).T / temperature).logsumexp(-1)
    torch.testing.assert_close(ours.lse.double(), lse, **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", OPERANDS)
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 48, 33), (7, 144, 300), (130, 64, 131)])
def test_equals_dequantize_then_score(impl, which, tokens, width, vocab):
    hidden, weight, targets = problem(tokens, width, vocab)
    head = operands(hidden, weight, which)
    ours = linear_statistics(*head, targets, temperature=0.7, impl=impl)
    assert_statistics(ours, *head, targets, temperature=0.7)
    dense = (numbers(x).float() for x in head)
    expected = linear_logprob(*dense, targets, temperature=0.7, impl="reference")
    torch.testing.assert_close(ours.logprob, expected, **TOLERANCE)
    assert torch.equal(ours.logprob, linear_logprob(*head, targets, temperature=0.7, impl=impl))


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize("width", [64, 80], ids=["by_fours", "ragged"])
@pytest.mark.parametrize("numerics", MODES)
def test_every_numerics_and_layout(numerics, width, swizzled):
    hidden, weight, targets = problem(5, width, 150)
    form = Format(numerics=numerics, swizzled=swizzled, block="16x16" if width == 64 else "1x16")
    head = operands(hidden, weight, "both", form)
    for impl in IMPLS:
        assert_statistics(linear_statistics(*head, targets, impl=impl), *head, targets)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_code_under_every_scale_is_decoded_exactly(dtype):
    """The product with the unit matrix is the operand itself."""
    codes = torch.arange(16, dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = NVFP4Tensor(
        codes=(codes[0::2] | codes[1::2] << 4).repeat(256, 1),
        scales=scales[:, None],
        global_scale=torch.tensor(0.25),
        shape=(256, 16),
        numerics="modelopt",
    )
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    expected = (values[:, None] * scales.float() * 0.25).nan_to_num(nan=777.0)
    unit, out = torch.eye(16, dtype=dtype), torch.full((16, 256), torch.nan)
    for found, rtol in (
        (linear_tiles.packed_logits(unit, weight, out.clone()), 0.0),
        (linear_operands.packed_product(unit, weight), 0.0),
        (linear_tiles.packed_logits(packed(unit), weight, out.clone()), 2e-7),  # its multiplier is 1 / 2688, rounded
    ):
        decoded, nan = found.nan_to_num(nan=777.0), expected == 777.0
        assert (decoded[nan] == 777.0).all() and int(nan.sum()) == 2 * 16  # a scale that is no number
        torch.testing.assert_close(decoded[~nan], expected[~nan], rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("impl", "dtype"), [("reference", torch.float16), ("reference", torch.float32), ("triton", torch.float16)]
)
@pytest.mark.parametrize("which", ["weight", "hidden"])
def test_beside_dense_operands_of_other_dtypes(impl, dtype, which):
    hidden, weight, targets = problem(6, 80, 70, dtype)
    head = operands(hidden, weight, which)
    assert_statistics(linear_statistics(*head, targets, impl=impl), *head, targets)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", OPERANDS)
def test_padding_of_rows_and_of_the_vocabulary_is_never_read(impl, which):
    """H = 40 is packed as 48; columns beyond ``valid_vocab`` are NaN."""
    hidden, weight, targets = problem(6, 40, 70)
    head = operands(hidden, torch.cat([weight, torch.zeros(26, 40).bfloat16()]), which, Format(pad=True))
    if isinstance(head[1], NVFP4Tensor):
        head[1].scales.view(torch.uint8)[70:] = 0x7F
        head[1].codes[70:] = 0xFF
    else:
        head[1][70:] = math.nan
    ours = linear_statistics(*head, targets, valid_vocab=70, impl=impl)
    valid = numbers(head[1])[:70]
    assert_statistics(ours, head[0], valid, targets)


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
def test_row_chunks_and_fresh_memory_change_nothing(swizzled, monkeypatch):
    hidden, weight, targets = problem(300, 48, 131)
    head = operands(hidden, weight, "both", Format(swizzled=swizzled))
    whole = linear_statistics(*head, targets, impl="triton")
    monkeypatch.setattr(linear_tiles, "WORKSPACE_BYTES", 1)  # two chunks of rows, of 256 and 44
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            result = _original(*args, **kwargs)
            return result.fill_(math.nan) if result.is_floating_point() else result

        monkeypatch.setattr(owner, name, poisoned)
    for ours, expected in zip(linear_statistics(*head, targets, impl="triton"), whole, strict=True):
        assert torch.equal(ours, expected)
    monkeypatch.setattr(linear_operands, "DECODED_ELEMENTS", 48 * 50)
    monkeypatch.setattr(linear_operands, "LOGITS_ELEMENTS", 50 * 40)
    for ours, expected in zip(linear_statistics(*head, targets, impl="reference"), whole, strict=True):
        torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_weight_never_exists_decoded(impl, monkeypatch):
    hidden, weight, targets = problem(4, 64, 512)
    monkeypatch.setattr(linear_operands, "DECODED_ELEMENTS", 32 * 64)
    head = operands(hidden, weight, "weight")
    for dtype, most in ((torch.float32, 32 * 64), (torch.bfloat16, hidden.numel()), (torch.uint8, 512 * 64 // 2)):
        with LargestTensor(dtype) as largest:  # not the bytes that the interpreter moves
            linear_statistics(*head, targets, impl=impl)
        assert 0 < largest.elements <= most < weight.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hadamard_transform_cancels_where_both_have_it(impl):
    hidden, weight, targets = problem(5, 64, 70)
    head = operands(hidden, weight, "both", Format(signs=TE_SIGNS))
    ours = linear_statistics(*head, targets, impl=impl)
    assert_statistics(ours, *head, targets)
    plain = linear_statistics(hidden, weight, targets)
    assert float((ours.logprob - plain.logprob).abs().max()) < 1.0  # the same head, in another basis
    for mixed in ((head[0], weight), (hidden, head[1]), (head[0], packed(weight))):
        with pytest.raises(ValueError, match="cancels in their product only where both have the same"):
            linear_statistics(*mixed, targets, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scale_that_is_no_number_shows(impl):
    hidden, weight, targets = problem(5, 48, 70)
    head = operands(hidden, weight, "weight")
    head[1].scales.view(torch.uint8)[33, 1] = 0x7F
    assert linear_logprob(*head, targets, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    head = operands(*problem(0, 48, 33)[:2], "both")
    assert linear_statistics(*head, torch.zeros(0, dtype=torch.int64), impl=impl).entropy.shape == (0,)


def test_no_gradient_passes():
    hidden, weight, targets = problem(3, 48, 33)
    head = operands(hidden, weight, "weight")
    with pytest.raises(ValueError, match=r"linear_logprob: hidden requires a gradient.*under torch.no_grad"):
        linear_logprob(hidden.requires_grad_(), head[1], targets)
    with torch.no_grad():
        expected = linear_logprob(hidden, head[1], targets)
    assert torch.equal(linear_logprob(hidden.detach(), head[1], targets), expected)
    zero = torch.zeros(3)
    tokens = Tokens(targets=targets, behaviour=zero, teachers=zero, weight=zero)
    with pytest.raises(ValueError, match="linear_objective: hidden and weight must be dense"):
        linear_objective(hidden, head[1], tokens, Surrogate())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 64)}, r"expected hidden \[T, H\] and weight \[V/tp, H\], got \[3, 64\], \[6, 48\]"),
        ({"hidden": torch.ones(3, 48).long()}, "got hidden torch.int64"),
        ({"targets": torch.tensor([0, 6, 1])}, r"targets\[1\] = 6"),
        ({"hidden": torch.ones(3, 48, device="meta")}, "hidden is on meta, weight on cpu"),
        ({"hidden": torch.ones(3, 48).double(), "impl": "triton"}, "cannot run: dtype torch.float64"),
        ({"hidden": torch.ones(3, 48), "impl": "triton"}, "cannot run: torch.float32 beside NVFP4"),
    ],
    ids=["width", "dtype", "target", "device", "fp64", "fp32"],
)
def test_misfits_are_refused(change, message):
    good = {"hidden": torch.ones(3, 48), "weight": packed(torch.ones(6, 48)), "targets": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))


# ------------------------------------------------------------------ vocabulary-parallel


def _on_a_rank(vocab, padded_to):
    """Statistics of one rank, which quantized its shard by itself, in both forms; and what its shard stands for."""
    hidden, weight, targets = problem(9, 80, vocab)
    whole = torch.cat([weight, weight.new_zeros(padded_to - vocab, 80)])
    local = packed(shard(whole, dist.get_rank(), dist.get_world_size()).nan_to_num(0.0))
    given = [packed(hidden), local, targets]
    found = [linear_statistics(*given, group=dist.group.WORLD, valid_vocab=vocab, impl=impl) for impl in IMPLS]
    return found, numbers(local), float(local.multiplier)


# 131 columns leave padding on the last rank; 50 of 132 leave ranks with a part of a tile, or without a column.
@pytest.mark.parametrize(("vocab", "padded_to"), [(131, 131), (50, 132)], ids=["full", "half"])
@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel_with_a_multiplier_of_each_rank(ranks, vocab, padded_to, world):
    hidden, _, targets = problem(9, 80, vocab)
    answers = ranks(world, _on_a_rank, vocab, padded_to)
    weight = torch.cat([answer[1] for answer in answers])[:vocab]
    assert (
        len({answer[2] for answer in answers}) == min(world, 2 if vocab == 50 and world == 2 else world) or vocab == 50
    )
    for found, _, _ in answers:
        for ours, first in zip(found, answers[0][0], strict=True):
            assert_statistics(ours, packed(hidden), weight, targets)
            assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))
