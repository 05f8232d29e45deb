"""The kernels on hidden states in Triton's interpreter: tiles, chunks, guides and shards. What the operators promise in
every form is in test_linear.py."""

import math

import pytest
import torch
import torch.distributed as dist

from mopd_kernels import (
    METRICS,
    Surrogate,
    Tokens,
    device,
    linear_logprob,
    linear_objective,
    linear_statistics,
    linear_tiles,
    linear_triton,
    surrogate,
)
from mopd_kernels.testing import LargestTensor, assert_no_worse, exact_log_softmax, exact_logprob, shard
from mopd_kernels.vocabulary import VocabularyShard

# numpy says what a GPU does in silence where a guide overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Two row tiles (of 128; 64 in fp32), three column tiles (of 256; 64) and two steps of the sum, each ragged.
SHAPE, SHAPE_FP32 = (150, 72, 601), (70, 40, 131)


def problem(dtype, tokens=None, width=None, vocab=None, spread=2.0, seed=0):
    """hidden [T, H], weight [V, H], targets [T]; logits of standard deviation ``spread``."""
    shape = SHAPE_FP32 if dtype == torch.float32 else SHAPE
    tokens, width, vocab = (a if a is not None else b for a, b in zip((tokens, width, vocab), shape, strict=True))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (spread * torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def known(logprob, targets, teachers=2, seed=0, **changes):
    """What is known of the rows. IcePop's bounds and the clip stop some; no row lies near a bound."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base, rows = logprob.float().detach(), len(targets)
    prox = base + torch.tensor([-0.4, -0.1, 0.1, 0.4])[torch.arange(rows) % 4]
    fields = {
        "targets": targets,
        "behaviour": prox - torch.tensor([0.3, -0.2, 1.9])[torch.arange(rows) % 3],
        "teachers": base + 2 * draw(teachers, rows),
        "weight": draw(rows).abs() / max(rows, 1),
        "teacher_weights": draw(teachers, rows).softmax(0) if teachers > 1 else None,
        "prox": prox,
    }
    return Tokens(**(fields | changes))


def run(hidden, weight, tokens, settings=None, **options):
    """``(objective, d_hidden, d_weight)``."""
    leaves = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    objective = linear_objective(*leaves, tokens, settings, **({"impl": "triton"} | options))
    return objective, *torch.autograd.grad(objective.loss, leaves)


def exact(hidden, weight, tokens, settings=None, temperature=1.0):
    """The same in fp64 by autograd: ``(metrics, log_ratios, d_hidden, d_weight)``."""
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = exact_log_softmax(*leaves, temperature)
    theta = log_p.gather(1, tokens.targets[:, None])[:, 0]
    losses, log_ratios, metrics = surrogate(theta, tokens, settings or Surrogate())
    metrics["entropy"] = -(log_p.exp() * log_p).sum(-1).detach()
    return metrics, log_ratios, *torch.autograd.grad(losses.sum(), leaves)


def assert_equal_results(ours, expected, rtol=1e-5, atol=1e-5, gradient=None):
    """Of two ``run``; ``gradient``: share of the largest gradient that gradients may differ by."""
    for name in METRICS:
        got = ours[0].per_token[name]
        torch.testing.assert_close(
            got, expected[0].per_token[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, other in zip(ours[1:], expected[1:], strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(got, other, rtol=0, atol=(gradient or rtol) * size)


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Every program then walks several tiles, and each row block is a turn through the vocabulary."""
    monkeypatch.setattr(device, "NO_DEVICE", (9, 2))
    monkeypatch.setattr(linear_tiles, "GROUP", 1)


@pytest.fixture
def redone(monkeypatch):
    """Numbers of rows that overflowed, one for each call of the objective."""
    counts = []
    original = linear_triton._redo_overflowed

    def counted(*arguments):
        counts.append(int(arguments[4].overflowed.sum()))
        original(*arguments)

    monkeypatch.setattr(linear_triton, "_redo_overflowed", counted)
    return counts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("prox", [True, False], ids=["prox", "one_forward"])
def test_objective_over_several_tiles_matches_fp64(dtype, prox, redone):
    hidden, weight, targets = problem(dtype)
    theta = exact_logprob(hidden, weight, targets, 0.7)
    tokens = known(theta, targets, teachers=3) if prox else known(theta, targets, teachers=1, prox=None)
    ours, d_hidden, d_weight = run(hidden, weight, tokens, temperature=0.7)
    metrics, log_ratios, *truth = exact(hidden, weight, tokens, temperature=0.7)
    for name, expected in metrics.items():
        got = ours.per_token[name].double()
        torch.testing.assert_close(got, expected.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(ours.log_ratios.double(), log_ratios.double(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.loss, ours.per_token["loss"].sum())
    if prox:
        assert 0 < int(metrics["mask"].sum()) < len(targets) and metrics["clipped"].any()
    _, *plain = run(hidden, weight, tokens, temperature=0.7, impl="reference")
    for value, low, expected, name in zip((d_hidden, d_weight), plain, truth, ("hidden", "weight"), strict=True):
        assert value.dtype == dtype
        # v * x and E are rounded where the reference rounds their product: up to one more ulp of the largest element
        slack = torch.finfo(dtype).eps * float(expected.abs().max())
        assert_no_worse(value, low, expected, max(slack, 2e-6 * float(expected.abs().max())), name)
    assert redone == [0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_statistics_come_from_fp32_accumulators(dtype):
    hidden, weight, targets = problem(dtype, spread=7.0)
    log_p = exact_log_softmax(hidden, weight)
    logits = hidden.double() @ weight.double().T
    assert 25 < float(logits.abs().max()) < 35
    statistics = linear_statistics(hidden, weight, targets, impl="triton")
    truth = log_p.gather(1, targets[:, None])[:, 0]
    assert float((statistics.logprob - truth).abs().max()) < 3e-5
    assert float((statistics.lse - logits.logsumexp(-1)).abs().max()) < 3e-5
    assert float((statistics.entropy + (log_p.exp() * log_p).sum(-1)).abs().max()) < 3e-5
    tokens = known(truth, targets)
    for tokens_, grad in ((tokens, True), (tokens, False)):
        objective = linear_objective(hidden.requires_grad_(grad), weight, tokens_, impl="triton")
        assert float((objective.per_token["logprob"] - truth).abs().max()) < 3e-5


# 44 nats are the bound of bf16 and fp32; fp16 has its own, 2.7.
@pytest.mark.parametrize("off", [40.0, -40.0, 200.0, -200.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_guide_far_off_changes_nothing(dtype, off, redone):
    hidden, weight, targets = problem(dtype, tokens=70, vocab=150)
    theta = exact_logprob(hidden, weight, targets)
    few = torch.arange(70) % 5 == 0
    near = known(theta, targets)
    tokens = known(theta, targets, behaviour=near.behaviour + off * few)
    settings = Surrogate(importance="clamp", importance_low=0.5, importance_high=2.0)
    ours, expected = (run(hidden, weight, tokens, settings, impl=impl) for impl in ("triton", "reference"))
    assert redone == [int(few.sum()) if abs(off) > 44 or dtype == torch.float16 else 0]
    assert all(t.isfinite().all() for t in ours[1:]) and ours[1][few].any()
    assert_equal_results(ours, expected, rtol=2e-5, gradient=4 * torch.finfo(dtype).eps + 4e-6)


def test_every_row_may_overflow(redone):
    hidden, weight, targets = problem(torch.bfloat16, tokens=70, vocab=150)
    near = known(exact_logprob(hidden, weight, targets), targets)
    far = known(near.prox, targets, behaviour=torch.full((70,), -torch.inf), prox=near.prox, weight=near.weight)
    settings = Surrogate(importance="none")
    ours = run(hidden, weight, far, settings)
    assert redone == [70] and not ours[0].per_token["loss"].isfinite().any()  # exp(prox - behaviour) is infinite
    masked = run(hidden, weight, far)
    assert not masked[0].per_token["mask"].any() and not masked[1].any() and not masked[2].any()
    expected = run(hidden, weight, far, impl="reference")
    for name in ("logprob", "entropy", "k3"):
        torch.testing.assert_close(masked[0].per_token[name], expected[0].per_token[name], rtol=2e-5, atol=2e-5)


def test_rows_without_gradient_take_no_part():
    """Masked by IcePop, gated, clipped: exact zeros; what stands in the first two changes no other gradient."""
    hidden, weight, targets = problem(torch.bfloat16)
    gate = torch.arange(len(targets)) % 7 > 0
    tokens = known(exact_logprob(hidden, weight, targets), targets, gate=gate)
    ours, d_hidden, d_weight = run(hidden, weight, tokens)
    stopped = ours.per_token["mask"] == 0
    icepop = (ours.per_token["importance"] > 5) | (ours.per_token["importance"] < 0.2)
    clipped = ours.per_token["clipped"] == 1
    assert torch.equal(stopped, icepop | ~gate) and (icepop & gate).any() and (clipped & ~stopped).any()
    assert not d_hidden[stopped | clipped].any() and d_hidden[~stopped & ~clipped].any(1).all()
    changed = torch.where(stopped[:, None], 100 * hidden.flip(0), hidden)  # far beyond any guide: these overflow
    assert torch.equal(run(changed, weight, tokens)[2], d_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_chunks_change_nothing_and_keep_the_workspace(dtype, monkeypatch):
    rows, columns = (128, 640) if dtype == torch.bfloat16 else (64, 192)  # a tile's rows, V padded to cache lines
    hidden, weight, targets = problem(dtype, tokens=rows + 44)
    tokens, upstream = known(exact_logprob(hidden, weight, targets), targets), torch.randn(len(targets))
    whole = run(hidden, weight, tokens)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole_logprob = torch.autograd.grad(linear_logprob(*leaves, targets, impl="triton"), leaves, upstream)
    monkeypatch.setattr(linear_tiles, "WORKSPACE_BYTES", 1)  # one tile's rows are the least there can be
    with LargestTensor(dtype) as largest:  # not the bytes that the interpreter moves
        chunked = run(hidden, weight, tokens)
        chunked_logprob = torch.autograd.grad(linear_logprob(*leaves, targets, impl="triton"), leaves, upstream)
    assert largest.elements == rows * columns < weight.shape[0] * len(targets)
    assert all(torch.equal(chunked[0].per_token[name], whole[0].per_token[name]) for name in METRICS)
    for ours, expected in zip((*chunked[1:], *chunked_logprob), (*whole[1:], *whole_logprob), strict=True):
        size = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=(torch.finfo(dtype).eps + 1e-6) * size)


@pytest.mark.parametrize(
    ("tokens", "width", "columns", "chunk"),
    [(8192, 4096, 131072, 1024), (16384, 8192, 131072, 1024), (8192, 4096, 32768, 2816), (8192, 16384, 262144, 512)],
    ids=["8192x4096", "16384x8192", "tp4", "vocab262144"],
)
def test_the_workspace_of_a_large_head_stays_under_300_megabytes(tokens, width, columns, chunk):
    hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (tokens, columns))
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    head = linear_tiles.Head.of(hidden, weight, targets, VocabularyShard(columns, None, None), 1.0)
    workspace = linear_tiles.Workspace(head)
    assert {c.stop - c.start for c in workspace.chunks[:-1]} == {chunk} and workspace.chunks[-1].stop == tokens
    exponentials = workspace.of(workspace.chunks[0])
    assert exponentials is not None and exponentials.shape == (chunk, columns)
    sums = 2 * 4 * chunk * columns // workspace.tile.columns
    product = 4 * chunk * min(width, linear_tiles.SLAB)
    scaled = 2 * chunk * width
    assert 2 * exponentials.numel() + sums + max(product, scaled) <= 300e6


def test_nothing_unwritten_leaks(monkeypatch):
    """Padding of NaN, and fresh memory of NaN."""
    hidden, weight, targets = problem(torch.bfloat16)
    upstream = torch.randn(len(targets))
    theta = exact_logprob(hidden, weight, targets)
    tokens = known(theta, targets, behaviour=theta.float() + 300.0 * (torch.arange(len(targets)) % 9 == 0))
    padded = torch.cat([weight, weight.new_full((23, weight.shape[1]), float("nan"))])

    def everything(weight):
        results = list(run(hidden, weight, tokens, valid_vocab=601))
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprob = linear_logprob(*leaves, targets, valid_vocab=601, impl="triton")
        statistics = linear_statistics(hidden, weight, targets, valid_vocab=601, impl="triton")
        results += [logprob.detach(), *torch.autograd.grad(logprob, leaves, upstream), *statistics]
        return [*results[0].per_token.values(), *results[1:]]

    plain = everything(weight)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            result = _original(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        monkeypatch.setattr(owner, name, poisoned)
    for ours, expected in zip(everything(padded), plain, strict=True):
        assert torch.equal(ours[:601] if len(ours) == 624 else ours, expected)
        assert len(ours) < 624 or not ours[601:].any()


def test_a_vocabulary_of_one_and_a_single_row():
    hidden, weight, _ = problem(torch.bfloat16, tokens=1, width=8, vocab=1)
    tokens = known(torch.zeros(1), torch.zeros(1, dtype=torch.int64), teachers=1)
    objective, d_hidden, d_weight = run(hidden, weight, tokens)
    assert abs(float(objective.per_token["logprob"])) < 1e-6 and abs(float(objective.per_token["entropy"])) < 1e-6
    assert float(d_hidden.abs().max()) < 1e-6 and float(d_weight.abs().max()) < 1e-6


def test_any_strides_are_taken():
    hidden, weight, targets = problem(torch.bfloat16, tokens=70, vocab=150)
    tokens = known(exact_logprob(hidden, weight, targets), targets)
    expected = run(hidden, weight, tokens)
    columns_first = [x.T.contiguous().T for x in (hidden, weight)]
    assert_equal_results(run(*columns_first, tokens), expected, rtol=0, atol=0)


def test_main_grad_is_added_to_and_rounded_nowhere():
    """Two calls, onto what was there: the fp32 sum itself, of which autograd's bf16 gradient is a rounding."""
    hidden, weight, targets = problem(torch.bfloat16)
    tokens = known(exact_logprob(hidden, weight, targets), targets)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.full(weight.shape, 0.25)
    for _ in range(2):
        linear_objective(hidden, parameter, tokens, impl="triton").loss.backward()
    once = (parameter.main_grad - 0.25) / 2
    *_, rounded = run(hidden, weight, tokens)
    torch.testing.assert_close(once.to(torch.bfloat16), rounded, rtol=1e-2, atol=1e-6)
    truth = exact(hidden, weight, tokens)[3]
    size = float(truth.abs().max())
    assert float((once - truth).abs().max()) < 4e-3 * size and parameter.grad is None
    assert not torch.equal(once, once.to(torch.bfloat16).float())


# ------------------------------------------------------------------ vocabulary-parallel


def _on_a_rank(vocab, padded):
    """One rank's results, the hidden state's gradient summed over ranks, and its number of gathers."""
    hidden, weight, targets = problem(torch.bfloat16, vocab=vocab)
    theta = exact_logprob(hidden, weight, targets)
    tokens = known(theta, targets, behaviour=theta.float() + 300.0 * (torch.arange(len(targets)) % 9 == 0))
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.cat([weight, weight.new_full((padded - vocab, weight.shape[1]), float("nan"))])
    local = shard(whole, rank, size)
    gathers, gather, workspace = [], VocabularyShard.gather, linear_tiles.WORKSPACE_BYTES

    def counted(self, part):
        gathers.append(tuple(part.shape))
        return gather(self, part)

    VocabularyShard.gather, linear_tiles.WORKSPACE_BYTES = counted, 1
    try:
        objective, d_hidden, d_weight = run(hidden, local, tokens, group=dist.group.WORLD, valid_vocab=vocab)
    finally:
        VocabularyShard.gather, linear_tiles.WORKSPACE_BYTES = gather, workspace
    d_hidden = d_hidden.float()
    dist.all_reduce(d_hidden, group=dist.group.WORLD)
    return objective.per_token, d_hidden, d_weight.float(), gathers


# 601 columns leave NaN padding on the last rank; 260 of 601 leave ranks with a ragged tile, one column short, or none.
@pytest.mark.parametrize(("vocab", "padded"), [(601, 601), (260, 601)], ids=["full", "half"])
@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel_equals_one_rank(ranks, vocab, padded, world):
    hidden, weight, targets = problem(torch.bfloat16, vocab=vocab)
    theta = exact_logprob(hidden, weight, targets)
    overflowing = torch.arange(len(targets)) % 9 == 0
    tokens = known(theta, targets, behaviour=theta.float() + 300.0 * overflowing)
    alone, d_hidden, d_weight = run(hidden, weight, tokens)
    answers = ranks(world, _on_a_rank, vocab, padded)
    together = torch.cat([answer[2] for answer in answers])
    torch.testing.assert_close(together[:vocab], d_weight.float(), rtol=0, atol=8e-3 * float(d_weight.abs().max()))
    assert not together[vocab:].any()
    for per_token, summed, _, gathers in answers:
        # the targets' logits of all rows, the sums of each of two chunks, and once the rows done again
        assert gathers == [(1, 150), (3, 128), (3, 22), (3, int(overflowing.sum()))]
        torch.testing.assert_close(summed, d_hidden.float(), rtol=0, atol=8e-3 * float(d_hidden.abs().max()))
        for name in METRICS:
            assert torch.equal(per_token[name], answers[0][0][name])
            torch.testing.assert_close(per_token[name], alone.per_token[name], rtol=1e-5, atol=1e-5)
