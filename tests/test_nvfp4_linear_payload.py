"""Scoring that packs the hidden states in the same pass: statistics of the dense form, bytes of the quantizer."""

import math

import pytest
import torch
import torch.distributed as dist

from mopd_kernels import linear_statistics, linear_statistics_with_payload
from mopd_kernels.nvfp4 import TE_SIGNS, Format, NVFP4Tensor, quantize
from mopd_kernels.nvfp4.numerics import MODES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what a GPU does in silence

IMPLS = ("reference", "triton")
FORMATS = {
    **{name: Format(numerics=name) for name in MODES},
    "swizzled": Format(swizzled=True),
    "stochastic": Format(rounding="stochastic", seed=7),
    "hadamard": Format(signs=TE_SIGNS, rounding="stochastic", seed=1),
    "four_over_six": Format(four_over_six="mse"),
}


def problem(tokens, width, vocab, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator) * torch.exp(torch.randn(width, generator=generator))
    weight = torch.randn(vocab, width, generator=generator) / math.sqrt(width)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab, (tokens,), generator=generator)


def assert_same_bytes(ours, expected):
    assert (ours.shape, ours.numerics, ours.swizzled) == (expected.shape, expected.numerics, expected.swizzled)
    assert (ours.bound, ours.transformed) == (expected.bound, expected.transformed)
    for name in ("codes", "scales", "global_scale"):
        a, b = (getattr(x, name).reshape(-1).view(torch.uint8) for x in (ours, expected))
        assert torch.equal(a, b), name


def assert_payload(hidden, weight, targets, form, impl, **options):
    statistics, payload = linear_statistics_with_payload(hidden, weight, targets, form, impl=impl, **options)
    assert_same_bytes(payload, quantize(hidden, form, amax=options.get("amax"), impl="reference"))
    for ours, expected in zip(statistics, linear_statistics(hidden, weight, targets, impl="reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_every_format(name, impl):
    assert_payload(*problem(7, 80, 70), FORMATS[name], impl)


# Fewer columns than the tile that quantizes; a ragged last row tile; a packed head.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 48, 33), (130, 144, 64), (5, 64, 65)])
def test_sizes(tokens, width, vocab, weight_packed, impl):
    hidden, weight, targets = problem(tokens, width, vocab)
    assert_payload(hidden, quantize(weight) if weight_packed else weight, targets, Format(swizzled=True), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_other_dtypes_and_a_given_amax(dtype, impl):
    hidden, weight, targets = problem(6, 64, 70, dtype)
    largest = hidden.abs().max().float()
    for amax in (4 * largest, largest / 4):  # room to spare, and blocks that saturate
        assert_payload(hidden, weight, targets, Format(), impl, amax=amax)
    if dtype != torch.float32 or impl == "reference":
        assert_payload(hidden, quantize(weight), targets, Format(), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_rows_are_padded_where_the_format_says_so(impl):
    hidden, weight, targets = problem(6, 40, 70)
    assert_payload(hidden, weight, targets, Format(pad=True), impl)
    assert_payload(hidden, quantize(weight, Format(pad=True)), targets, Format(pad=True), impl)
    with pytest.raises(ValueError, match=r"no multiple of 16; set Format.pad"):
        linear_statistics_with_payload(hidden, weight, targets, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_fresh_memory_change_nothing(impl, monkeypatch):
    hidden, weight, targets = problem(9, 64, 130)
    strided = hidden.T.contiguous().T
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            result = _original(*args, **kwargs)
            return result.fill_(math.nan if result.is_floating_point() else 77)

        monkeypatch.setattr(owner, name, poisoned)
    assert_payload(strided, weight, targets, Format(swizzled=True), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_what_has_no_bytes(impl):
    hidden, weight, targets = problem(4, 48, 70)
    statistics, payload = linear_statistics_with_payload(hidden[:0], weight, targets[:0], impl=impl)
    assert payload.shape == (0, 48) and statistics.entropy.shape == (0,)
    hidden[2, 3] = math.inf
    with pytest.raises(ValueError, match="numerics = 'vllm' has"):
        linear_statistics_with_payload(hidden, weight, targets, Format(numerics="vllm"), impl=impl)
    with pytest.raises(ValueError, match=r"payload.block = '16x16': hidden states are packed in blocks of 1x16"):
        linear_statistics_with_payload(hidden, weight, targets, Format(block="16x16"), impl=impl)
    with pytest.raises(ValueError, match="it is a payload already"):
        linear_statistics_with_payload(payload, weight, targets, impl=impl)  # type: ignore[arg-type]


def test_a_payload_scores_like_its_numbers():
    """Pack, send, score: the round that a teacher on another machine makes."""
    hidden, weight, targets = problem(33, 144, 90)
    statistics, payload = linear_statistics_with_payload(hidden, weight, targets, impl="triton")
    assert isinstance(payload, NVFP4Tensor) and payload.bits_per_element < 4.51
    again = linear_statistics(payload, quantize(weight), targets, impl="triton")
    difference = (again.logprob - statistics.logprob).abs()
    assert 0 < float(difference.mean()) < 0.5


def _on_a_rank(vocab):
    hidden, weight, targets = problem(9, 80, vocab)
    rows = -(-132 // dist.get_world_size())
    padded = torch.cat([weight, weight.new_full((132 - vocab, 80), math.nan)])
    local = padded[dist.get_rank() * rows :][:rows]
    found = []
    for impl in IMPLS:
        options = {"group": dist.group.WORLD, "valid_vocab": vocab, "impl": impl}
        statistics, payload = linear_statistics_with_payload(hidden, local, targets, **options)
        assert_same_bytes(payload, quantize(hidden))
        found.append(statistics)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_has_the_whole_payload(ranks, world):
    """With 50 of 132 columns some ranks have none to score."""
    hidden, weight, targets = problem(9, 80, 50)
    expected = linear_statistics(hidden, weight, targets)
    for answer in ranks(world, _on_a_rank, 50):
        for statistics in answer:
            for ours, alone in zip(statistics, expected, strict=True):
                torch.testing.assert_close(ours, alone, rtol=2e-6, atol=6e-6)
