"""mopd_kernels.reference against fp64, alone and vocabulary-parallel."""

import pytest
import torch
import torch.distributed as dist

from mopd_kernels import linear_logprob, linear_statistics, reference, reverse_kl
from mopd_kernels.testing import (
    LargestTensor,
    assert_no_worse,
    exact_log_softmax,
    exact_logprob,
    exact_reverse_kl,
    shard,
)

# 1: a single token; 7 and 13: no power of two, several ragged chunks; V below and above H.
SHAPES = [(1, 3, 2), (7, 5, 12), (13, 12, 9)]


def problem(tokens, width, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    return hidden, weight, targets, upstream


def gradients(function, *tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 30, 1 << 24])
def test_logprob_and_gradients_match_fp64(shape, temperature, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    hidden, weight, targets, upstream = problem(*shape)
    ours = gradients(
        lambda h, w: linear_logprob(h, w, targets, temperature=temperature), hidden, weight, upstream=upstream
    )
    truth = gradients(
        lambda h, w: exact_logprob(h, w, targets, temperature), hidden.double(), weight.double(), upstream=upstream
    )
    assert ours[0].dtype == torch.float32
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets, _ = problem(5, 4, 9, torch.float64)
    other_hidden, other_weight, _, _ = problem(5, 3, 9, torch.float64, seed=1)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, temperature=0.7, valid_vocab=9), leaves)
    assert torch.autograd.gradcheck(lambda h, w: reverse_kl(h, w, other_hidden, other_weight, temperature=0.7), leaves)


def test_padded_columns_are_never_read():
    hidden, weight, targets, upstream = problem(7, 5, 12)
    padded = torch.cat([weight, torch.full((4, 5), float("nan"))])
    plain = gradients(lambda h, w: linear_logprob(h, w, targets), hidden, weight, upstream=upstream)
    ours = gradients(lambda h, w: linear_logprob(h, w, targets, valid_vocab=12), hidden, padded, upstream=upstream)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert torch.equal(ours[2][:12], plain[2]) and not ours[2][12:].any()


def test_only_the_asked_gradients_are_made():
    hidden, weight, targets, upstream = problem(7, 5, 12)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, targets).backward(upstream)
    assert hidden.grad is not None and weight.grad is None


def test_logits_never_exist_whole(monkeypatch):
    hidden, weight, targets, upstream = problem(64, 3, 256)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8 * 256)
    with LargestTensor() as largest:
        gradients(lambda h, w: linear_logprob(h, w, targets), hidden, weight, upstream=upstream)
        gradients(lambda h, w: reverse_kl(h, w, hidden, weight), hidden, weight, upstream=upstream)
        linear_statistics(hidden, weight, targets)
    assert largest.elements == 8 * 256


def test_bf16_is_no_worse_than_plain_bf16():
    hidden, weight, targets, upstream = problem(33, 24, 50, torch.bfloat16)

    def plain(h, w):
        return (h @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    truth = gradients(lambda h, w: exact_logprob(h, w, targets), hidden.double(), weight.double(), upstream=upstream)
    lowp = gradients(plain, hidden, weight, upstream=upstream)
    ours = gradients(lambda h, w: linear_logprob(h, w, targets), hidden, weight, upstream=upstream)
    assert ours[1].dtype == ours[2].dtype == torch.bfloat16
    for value, low, expected, name in zip(ours, lowp, truth, ("logprob", "hidden", "weight"), strict=True):
        assert_no_worse(value, low, expected, 1e-6, name)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)


def test_statistics_match_fp64_and_agree_with_logprob():
    hidden, weight, targets, _ = problem(13, 12, 9)
    logprob, entropy = linear_statistics(hidden, weight, targets, temperature=0.7, valid_vocab=9)
    log_p = exact_log_softmax(hidden, weight, 0.7)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(logprob, linear_logprob(hidden, weight, targets, temperature=0.7))


def test_reverse_kl_matches_fp64():
    hidden, weight, _, upstream = problem(13, 12, 9)
    other_hidden, other_weight, _, _ = problem(13, 6, 9, seed=1)
    ours = gradients(
        lambda h, w: reverse_kl(h, w, other_hidden, other_weight, temperature=1.3), hidden, weight, upstream=upstream
    )
    log_q = exact_log_softmax(other_hidden, other_weight, 1.3)
    truth = gradients(
        lambda h, w: exact_reverse_kl(exact_log_softmax(h, w, 1.3), log_q),
        hidden.double(),
        weight.double(),
        upstream=upstream,
    )
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)


def test_reverse_kl_of_equals_is_zero():
    hidden, weight, _, _ = problem(13, 12, 9)
    assert not reverse_kl(hidden, weight, hidden, weight).any()


def test_no_tokens_still_reach_the_leaves():
    hidden, weight, targets, _ = problem(0, 5, 12)
    hidden.requires_grad_(), weight.requires_grad_()
    assert (
        reverse_kl(hidden, weight, hidden, weight).shape == linear_statistics(hidden, weight, targets)[1].shape == (0,)
    )
    linear_logprob(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is not None and not weight.grad.any()


def test_a_target_outside_the_vocabulary_is_nan():
    hidden, weight, _, _ = problem(4, 5, 12)
    values = linear_logprob(hidden, weight, torch.tensor([-1, 0, 9, 10]), valid_vocab=10)
    assert values.isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 4)}, r"expected hidden \[T, H\]"),
        ({"weight": torch.ones(6, 5, dtype=torch.bfloat16)}, "must be equal"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "expected 3 targets"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"valid_vocab": 7}, "valid_vocab = 7 must be between 1 and 6"),
    ],
    ids=["width", "dtype", "targets", "temperature", "vocab"],
)
def test_misfits_are_refused(change, message):
    good = {"hidden": torch.ones(3, 5), "weight": torch.ones(6, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))


def test_reverse_kl_refuses_unequal_vocabularies():
    with pytest.raises(ValueError, match="must agree"):
        reverse_kl(torch.ones(3, 5), torch.ones(6, 5), torch.ones(3, 5), torch.ones(7, 5))


def _on_a_rank(vocab, temperature):
    """Value and gradients of this rank's shard, the hidden state's summed over ranks as the plugin does."""
    hidden, weight, targets, upstream = problem(13, 12, vocab)
    other_hidden, other_weight, _, _ = problem(13, 6, vocab, seed=1)
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    local, other_local = shard(weight, rank, size), shard(other_weight, rank, size)
    options = {"temperature": temperature, "group": group, "valid_vocab": vocab}
    results = [
        gradients(lambda h, w: linear_logprob(h, w, targets, **options), hidden, local, upstream=upstream),
        gradients(
            lambda h, w: reverse_kl(h, w, other_hidden, other_local, **options), hidden, local, upstream=upstream
        ),
    ]
    for _, d_hidden, _ in results:
        dist.all_reduce(d_hidden, group=group)
    return *results, linear_statistics(hidden, local, targets, **options)


# 12 columns fill 2 and 4 ranks; 9 leave padding on 2 ranks and a rank without any valid column on 4.
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("vocab", [12, 9])
def test_vocabulary_parallel_equals_one_rank(ranks, world, vocab):
    hidden, weight, targets, upstream = problem(13, 12, vocab)
    other_hidden, other_weight, _, _ = problem(13, 6, vocab, seed=1)
    alone = [
        gradients(lambda h, w: linear_logprob(h, w, targets, temperature=0.7), hidden, weight, upstream=upstream),
        gradients(
            lambda h, w: reverse_kl(h, w, other_hidden, other_weight, temperature=0.7),
            hidden,
            weight,
            upstream=upstream,
        ),
    ]
    answers = ranks(world, _on_a_rank, vocab, 0.7)
    for index, (value, d_hidden, d_weight) in enumerate(alone):
        together = torch.cat([answer[index][2] for answer in answers])
        torch.testing.assert_close(together[:vocab], d_weight, rtol=1e-5, atol=1e-5)
        assert not together[vocab:].any()
        for answer in answers:
            torch.testing.assert_close(answer[index][0], value, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(answer[index][1], d_hidden, rtol=1e-5, atol=1e-5)
    statistics = linear_statistics(hidden, weight, targets, temperature=0.7)
    for answer in answers:
        torch.testing.assert_close(answer[2], statistics, rtol=1e-5, atol=1e-5)
