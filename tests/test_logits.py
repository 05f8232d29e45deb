"""mopd_kernels.logits against fp64, alone and vocabulary-parallel; what it reads, writes and refuses."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mopd_kernels import METRICS, Surrogate, Tokens, reference, surrogate
from mopd_kernels.logits import logit_objective, logit_statistics
from mopd_kernels.testing import LargestTensor, assert_no_worse, tokens_around

IMPLS = ("reference", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def small_blocks(patch):
    """Several blocks per row, a ragged one at its end, several chunks of rows: as large vocabularies have them."""
    from mopd_kernels import logits_triton

    one = logits_triton.Launch(warps=1, unroll=1)
    patch.setattr(logits_triton, "STATISTICS", one)
    patch.setattr(logits_triton, "OBJECTIVE", ((600, one), (-1, one._replace(unroll=2))))
    patch.setattr(logits_triton, "FINISH", 8)
    patch.setattr(reference, "CHUNK_ELEMENTS", 3000)


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    small_blocks(monkeypatch)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty and its kin return with NaN
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows, vocab, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator)


def exact_statistics(logits, targets, temperature=1.0):
    """fp64 (logprob, entropy, lse); differentiable."""
    z = logits.double() / temperature
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy, z.logsumexp(-1)


def exact_objective(logits, tokens, factors, temperature=1.0):
    """fp64 (loss, log_ratios, metrics, gradient)."""
    leaf = logits.detach().double().requires_grad_()
    logprob, entropy, _ = exact_statistics(leaf, tokens.targets, temperature)
    losses, log_ratios, metrics = surrogate(logprob, tokens, factors)
    metrics["entropy"] = entropy.detach() if tokens.keep is None else entropy.detach().where(tokens.keep, 0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.sum().detach(), log_ratios, metrics, gradient


def run(logits, tokens, factors=None, upstream=1.0, **options):
    """(objective, gradient) of logits that another operation made."""
    leaf = logits.detach().clone().requires_grad_()
    objective = logit_objective(leaf.view_as(leaf), tokens, factors, **options)
    objective.loss.backward(torch.tensor(upstream))
    return objective, leaf.grad


def assert_equals_exact(objective, gradient, exact, rtol=2e-5, atol=2e-6):
    loss, log_ratios, metrics, d_logits = exact
    torch.testing.assert_close(objective.loss.double(), loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(objective.log_ratios.double(), log_ratios.double(), rtol=2e-5, atol=2e-5)
    assert list(objective.per_token) == list(METRICS)
    for name, value in metrics.items():
        got = objective.per_token[name].double()
        message = lambda m, n=name: f"{n}: {m}"  # noqa: E731
        torch.testing.assert_close(got, value.double(), rtol=5e-5, atol=5e-5, equal_nan=True, msg=message)
    torch.testing.assert_close(gradient.double(), d_logits, rtol=rtol, atol=atol)


# ------------------------------------------------------------------ statistics

# One column; fewer than a block; a whole number of blocks; several and a ragged one; odd rows, so that no load is wide.
SHAPES = [(1, 1), (5, 7), (3, 1024), (9, 1300), (13, 1031)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_match_fp64(impl, dtype, shape):
    temperature = 0.7 if shape[0] > 1 else 1.0
    logits, targets = problem(*shape, DTYPES[dtype])
    ours = logit_statistics(logits, targets, temperature=temperature, impl=impl)
    for value, expected in zip(ours, exact_statistics(logits, targets, temperature), strict=True):
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=4e-6)


def _fused(self, x, y, z):
    """Rounds once, as the GPU's multiply-add does; the interpreter's own rounds twice."""
    return TensorHandle((x.data.astype("f8") * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_logits_lose_nothing(impl, monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_fma", _fused)
    logits, targets = problem(7, 700)
    for huge in (1e4 * logits, logits + 1e4, 3e3 * logits.half()):
        targets[:4] = huge[:4].topk(3).indices[:, 1]
        ours = logit_statistics(huge, targets, temperature=0.9, impl=impl)
        for value, expected in zip(ours[:2], exact_statistics(huge, targets, 0.9)[:2], strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [0.0, -3.5, 2e4])
def test_ties_are_uniform(impl, value):
    statistics = logit_statistics(torch.full((3, 777), value), torch.tensor([0, 500, 776]), impl=impl)
    uniform = torch.full((3,), math.log(777))
    torch.testing.assert_close(statistics.entropy, uniform, rtol=1e-6, atol=0)
    torch.testing.assert_close(-statistics.logprob, uniform, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary_has_no_probability(impl, dtype):
    logits, targets = problem(6, 900, DTYPES[dtype])
    targets[:] = torch.tensor([3, 899, 450, 0, 1, 2])
    logits[0, 4:] = -math.inf  # whole blocks, all but the first columns
    logits[1, :890] = -math.inf
    logits[2, 1::2] = -math.inf
    logits[3, 1:] = -math.inf  # one token left
    logits[4, 1] = -math.inf  # the target itself
    ours = logit_statistics(logits, targets, impl=impl)
    for value, expected in zip(ours, exact_statistics(logits, targets), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=4e-6)
    assert ours.logprob[3] == ours.entropy[3] == 0.0 and ours.logprob[4] == -math.inf
    tokens = tokens_around(exact_statistics(logits, targets)[0].clamp(min=-9), targets)
    objective, gradient = run(logits, tokens, impl=impl)
    assert_equals_exact(objective, gradient, exact_objective(logits, tokens, Surrogate()), 2e-2, 1e-4)
    assert not gradient[logits == -math.inf].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_broken_rows_are_nan_and_alone(impl, inplace):
    logits, targets = problem(5, 300)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    factors = Surrogate(importance="none", advantage_clip=2.0)
    _, sound = run(logits, tokens, factors, impl=impl)
    logits[1, 200] = math.nan
    logits[2] = -math.inf
    logits[3, 10] = math.inf
    broken = torch.tensor([False, True, True, True, False])
    statistics = logit_statistics(logits, targets, impl=impl)
    assert torch.equal(statistics.logprob.isnan(), broken) and torch.equal(statistics.entropy.isnan(), broken)
    objective, gradient = run(logits, tokens, factors, impl=impl, inplace=inplace)
    assert torch.equal(objective.per_token["loss"].isnan(), broken) and objective.loss.isnan()
    assert torch.equal(gradient.isnan().any(-1), broken)
    assert torch.equal(gradient[~broken], sound[~broken])


# ------------------------------------------------------------------ objective

ROWS = 11
SETTINGS = {
    "eq3": ({}, {}),
    "one_forward": ({"prox": None}, {}),
    "three_teachers": ({"teachers": 3}, {"advantage_clip": 0.5}),
    "even_teachers": ({"teachers": 3, "teacher_weights": None}, {}),
    "clamp": ({}, {"importance": "clamp", "importance_low": 0.8, "importance_high": 1.3}),
    "no_bounds": ({}, {"importance": "none", "clip_low": 0.1, "clip_high": 0.05}),
    "on_policy_ratio": ({}, {"force_on_policy_ratio": True}),
    "outcome": ({"outcome": torch.linspace(-1, 1, ROWS)}, {}),
    "gate": ({"gate": torch.arange(ROWS) % 3 > 0}, {}),
    "keep": ({"keep": torch.arange(ROWS) % 4 > 0}, {}),
    "keep_nothing": ({"keep": torch.zeros(ROWS, dtype=torch.bool)}, {}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("name", SETTINGS)
def test_objective_matches_fp64(impl, inplace, name):
    changes, factors = SETTINGS[name]
    logits, targets = problem(ROWS, 700)
    tokens = tokens_around(exact_statistics(logits, targets, 0.8)[0], targets, **changes)
    exact = exact_objective(logits, tokens, Surrogate(**factors), 0.8)
    if tokens.keep is not None:
        logits[~tokens.keep] = math.nan  # never read
    ours = run(logits, tokens, Surrogate(**factors), inplace=inplace, temperature=0.8, impl=impl)
    assert_equals_exact(*ours, exact)
    assert not any(value.requires_grad for value in ours[0].per_token.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 33)], ids=str)
def test_objective_of_any_shape_matches_fp64(impl, shape):
    logits, targets = problem(*shape)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    assert_equals_exact(*run(logits, tokens, impl=impl), exact_objective(logits, tokens, Surrogate()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_no_worse_than_plain_torch(impl, dtype):
    logits, targets = problem(17, 900, DTYPES[dtype])
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    exact = exact_objective(logits, tokens, Surrogate())
    leaf = logits.clone().requires_grad_()
    losses, _, _ = surrogate(leaf.log_softmax(-1).float().gather(1, targets[:, None])[:, 0], tokens, Surrogate())
    losses.sum().backward()
    objective, gradient = run(logits, tokens, impl=impl)
    assert gradient.dtype == DTYPES[dtype]
    assert_no_worse(gradient, leaf.grad, exact[3], 1e-6, "gradient")
    # Statistics stay in fp32: only what is stored is rounded, to nearest.
    assert_equals_exact(objective, exact[3].to(DTYPES[dtype]), (*exact[:3], exact[3].to(DTYPES[dtype]).double()))
    spacing = torch.finfo(DTYPES[dtype]).eps * exact[3].abs() + torch.finfo(DTYPES[dtype]).tiny
    assert ((gradient.double() - exact[3]).abs() <= 0.51 * spacing + 1e-8).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("valid", [1, 600, 701, 1023])
def test_padding_takes_no_part(impl, inplace, valid):
    logits, targets = problem(6, valid)
    padded = F.pad(logits, (0, 1024 - valid), value=math.nan)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets, keep=torch.arange(6) != 2)
    plain, expected = run(logits, tokens, impl=impl)
    objective, gradient = run(padded, tokens, valid_vocab=valid, inplace=inplace, impl=impl)
    torch.testing.assert_close(objective.loss, plain.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient[:, :valid], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient[:, valid:], torch.zeros(6, 1024 - valid))
    statistics = logit_statistics(padded, targets, keep=tokens.keep, valid_vocab=valid, impl=impl)
    torch.testing.assert_close(statistics.entropy, plain.per_token["entropy"], rtol=1e-5, atol=1e-6)
    assert all(value[2] == 0.0 for value in statistics)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_stopped_row_has_a_zero_gradient_whatever_is_in_it(impl):
    logits, targets = problem(4, 500)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets, gate=torch.tensor([True, False, True, True]))
    logits[1, 3] = math.nan
    objective, gradient = run(logits, tokens, Surrogate(importance="none"), impl=impl)
    assert objective.per_token["logprob"].isnan().tolist() == [False, True, False, False]
    assert not gradient[1].any() and gradient[0].any() and not objective.loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_wider_tensor_are_left_alone_around(impl):
    logits, targets = problem(5, 300)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    expected = run(logits, tokens, impl=impl)[1]
    wide = torch.full((5, 321), 7.0)
    leaf = torch.cat([wide[:, :10], logits, wide[:, 310:]], 1).requires_grad_()
    whole = leaf.view_as(leaf)
    logit_objective(whole[:, 10:310], tokens, inplace=True, impl=impl).loss.backward()
    torch.testing.assert_close(leaf.grad[:, 10:310], expected, rtol=1e-6, atol=1e-8)
    assert not leaf.grad[:, :10].any() and not leaf.grad[:, 310:].any()
    assert (leaf.data[:, :10] == 7).all() and (leaf.data[:, 310:] == 7).all()
    assert torch.equal(leaf.data[:, 10:310], leaf.grad[:, 10:310])


# ------------------------------------------------------------------ autograd


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("upstream", "inplace"), [(1.0, True), (1 / 3, True), (1 / 3, False), (0.0, False)])
def test_the_upstream_gradient_scales(impl, dtype, upstream, inplace):
    logits, targets = problem(3, 700, DTYPES[dtype])
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    _, gradient = run(logits, tokens, upstream=upstream, inplace=inplace, impl=impl)
    unit = run(logits, tokens, impl=impl)[1]
    assert torch.equal(gradient, (unit.float() * upstream).to(unit.dtype)) and unit.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_is_refused(impl, inplace):
    logits, targets = problem(3, 50)
    loss = logit_objective(
        logits.requires_grad_() * 1.0, tokens_around(logits[:, 0], targets), inplace=inplace, impl=impl
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through logit_objective: the first gave away"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_stay_where_no_gradient_can_be_asked_for(impl, inplace):
    logits, targets = problem(3, 50)
    tokens, before = tokens_around(logits[:, 0], targets), logits.clone()
    assert not logit_objective(logits, tokens, inplace=inplace, impl=impl).loss.requires_grad
    with torch.no_grad():
        logit_objective(logits.requires_grad_(), tokens, inplace=inplace, impl=impl)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_uses_the_memory_of_the_logits(impl):
    leaf, targets = problem(8, 2048, torch.bfloat16)
    tokens = tokens_around(leaf[:, 0], targets)
    logits = leaf.requires_grad_() * 1.0
    with LargestTensor(torch.float32) as wide:
        loss = logit_objective(logits, tokens, inplace=True, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert wide.elements <= 3000


def test_the_reference_walks_in_chunks(monkeypatch):
    logits, targets = problem(64, 256, torch.bfloat16)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8 * 256)
    with LargestTensor(torch.float32) as wide:
        run(logits, tokens_around(logits[:, 0], targets))
        logit_statistics(logits, targets)
    assert wide.elements == 8 * 256


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_is_seen_by_others_who_saved_the_logits(impl):
    leaf, targets = problem(3, 50)
    logits = leaf.requires_grad_().tanh()  # saves its result for its own backward
    loss = logit_objective(logits, tokens_around(leaf[:, 0], targets), inplace=True, impl=impl).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_recomputation_gives_the_same_gradient(impl, inplace, reentrant, made):
    logits, targets = problem(4, 300)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets)
    expected = run(logits, tokens, impl=impl)[1]
    leaf = logits.clone().requires_grad_()
    make = lambda x: x.view_as(x)  # noqa: E731
    ours = lambda x: logit_objective(x, tokens, inplace=inplace, impl=impl).loss  # noqa: E731
    if made == "inside":
        loss = checkpoint(lambda x: ours(make(x) * 1.0), leaf, use_reentrant=reentrant)
    else:
        loss = checkpoint(ours, make(leaf) * 1.0, use_reentrant=reentrant)
    assert torch.equal(leaf.data, logits)
    if inplace and reentrant and made == "outside":
        with pytest.raises(ValueError, match=r"an input of torch\.utils\.checkpoint"):
            loss.backward()
        return
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(3)}, r"logits is torch.float32 \[3\]: expected \[T, V/tp\]"),
        ({"logits": torch.ones(3, 6).double()}, r"logits is torch.float64 \[3, 6\]: expected"),
        ({"logits": torch.ones(3, 6, dtype=torch.int32)}, r"logits is torch.int32"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets is torch.int64 \[2\]: expected torch.int64 \[3\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"targets is torch.int32 \[3\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "targets is on meta, logits on cpu"),
        ({"targets": torch.tensor([0, 6, 1])}, r"targets\[1\] = 6: targets must lie in \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, -1])}, r"targets\[2\] = -1"),
        ({"targets": torch.tensor([0, 4, 1]), "valid_vocab": 4}, r"targets\[1\] = 4: targets must lie in \[0, 4\)"),
        ({"keep": torch.ones(3)}, r"keep is torch.float32 \[3\]: expected torch.bool \[3\]"),
        ({"temperature": 0.0}, "temperature = 0.0 must be finite and above 0"),
        ({"temperature": math.nan}, "temperature = nan must be finite and above 0"),
        ({"valid_vocab": 7}, "valid_vocab = 7 must be between 1 and 6"),
        ({"impl": "cuda"}, "impl = 'cuda': expected auto, triton or reference"),
        ({"impl": "triton", "logits": torch.ones(6, 3).T}, "rows must be dense; use impl='auto' or 'reference'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_misfits_are_refused(change, message):
    good = {"logits": torch.ones(3, 6), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        logit_statistics(**(good | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.T.contiguous().T, r"strides \(1, 3\) and shape \[3, 6\].*pass logits.contiguous\(\), or inplace"),
        (lambda x: x[:1].expand(3, 6), r"strides \(0, 1\)"),
        (lambda x: x.detach().requires_grad_(), "a leaf and require gradients"),
    ],
    ids=["transposed", "expanded", "leaf"],
)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_what_cannot_be_written_is_refused(make, message, impl):
    tokens = tokens_around(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    logits = make(torch.randn(3, 6).requires_grad_() * 1.0)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        logit_objective(logits, tokens, inplace=True, impl=impl)
    assert torch.equal(logits, before)
    assert logit_objective(logits, tokens, impl=impl).loss.requires_grad


def test_tokens_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"targets is torch.int64 \[4\]: expected torch.int64 \[3\]"):
        logit_objective(torch.ones(3, 6), tokens_around(torch.zeros(4), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_may_hold_any_token_and_no_rows_are_fine(impl):
    logits, targets = problem(3, 50)
    targets[1] = -100
    keep = torch.tensor([True, False, True])
    tokens = tokens_around(logits[:, 0], targets, keep=keep)
    objective, gradient = run(logits, tokens, impl=impl)
    assert not gradient[1].any() and not objective.loss.isnan()
    assert logit_statistics(logits, targets, keep=keep, impl=impl).logprob[1] == 0
    with pytest.raises(ValueError, match=r"targets\[1\] = -100"):
        run(logits, tokens_around(logits[:, 0], targets), impl=impl)
    empty, gradient = run(logits[:0], tokens_around(logits[:0, 0], targets[:0]), impl=impl)
    assert empty.loss == 0 and gradient.shape == (0, 50) and empty.log_ratios.shape == (1, 0)
    assert logit_statistics(logits[:0], targets[:0], impl=impl).lse.shape == (0,)


# ------------------------------------------------------------------ peers


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_agrees_with_the_formulas_of_peers(impl, temperature):
    logits, targets = problem(9, 400)
    ours = logit_statistics(logits, targets, temperature=temperature, impl=impl)
    scaled = logits / temperature
    close = lambda value, expected: torch.testing.assert_close(value, expected, rtol=1e-5, atol=5e-6)  # noqa: E731
    # torch, and verl's FSDP path (verl/utils/torch_functional.py): log-probability as a cross-entropy
    close(-ours.logprob, F.cross_entropy(scaled, targets, reduction="none"))
    # TRL (trl/trainer/utils.py, selective_log_softmax): the target's logit less the log-sum-exp
    close(ours.logprob, scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, -1))
    # TRL's entropy: - sum p log p; verl's: logsumexp - sum p z
    log_p = F.log_softmax(scaled, -1)
    close(ours.entropy, -torch.sum(log_p.exp() * log_p, -1))
    close(ours.entropy, torch.logsumexp(scaled, -1) - torch.sum(F.softmax(scaled, -1) * scaled, -1))


@pytest.mark.parametrize("impl", IMPLS)
def test_with_an_advantage_of_one_the_gradient_is_that_of_cross_entropy(impl):
    logits, targets = problem(9, 400)
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, targets).backward()
    prox = torch.randn(9)
    tokens = Tokens(targets=targets, behaviour=prox, prox=prox, teachers=prox + 1, weight=torch.full((9,), 1 / 9))
    objective, gradient = run(logits, tokens, Surrogate(force_on_policy_ratio=True), impl=impl)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(objective.loss, torch.tensor(-1.0))


# ------------------------------------------------------------------ properties

SEEDS = st.integers(0, 2**31)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=SEEDS, rows=st.integers(1, 5), vocab=st.integers(1, 700), shift=st.floats(-200, 200))
def test_properties_of_the_objective(impl, seed, rows, vocab, shift):
    logits, targets = problem(rows, vocab, seed=seed)
    tokens = tokens_around(exact_statistics(logits, targets)[0], targets, seed=seed)
    objective, gradient = run(logits, tokens, impl=impl)
    close = lambda value, expected: torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-4)  # noqa: E731

    assert gradient.sum(-1).abs().max() <= 1e-5 * (1 + tokens.weight.max())  # rows sum to zero

    shifted, d_shifted = run(logits + shift, tokens, impl=impl)  # the same distribution
    close(shifted.per_token["entropy"], objective.per_token["entropy"])
    close(d_shifted, gradient)

    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))  # the vocabulary renamed
    renamed = Tokens(**{**fields_of(tokens), "targets": order.argsort()[targets]})
    other, d_other = run(logits[:, order], renamed, impl=impl)
    close(other.per_token["logprob"], objective.per_token["logprob"])
    close(d_other, gradient[:, order])

    cut = rows // 2  # rows apart
    halves = [run(logits[part], tokens.select(part), impl=impl) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat([half[1] for half in halves]), gradient)
    close(sum(half[0].loss for half in halves), objective.loss)


def fields_of(tokens):
    return {name: getattr(tokens, name) for name in Tokens.__dataclass_fields__}


# ------------------------------------------------------------------ vocabulary-parallel


def _on_a_rank(vocab, impl, masked):
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        logits, targets = problem(13, vocab)
        tokens = tokens_around(exact_statistics(logits, targets, 0.7)[0], targets, teachers=2, keep=masked)
        rank, size = dist.get_rank(), dist.get_world_size()
        width = -(-vocab // size)
        padded = F.pad(logits, (0, width * size - vocab), value=math.nan)
        if masked is not None:
            padded[~masked] = math.nan
        local = padded[:, rank * width : (rank + 1) * width].clone()
        options = {"temperature": 0.7, "group": dist.group.WORLD, "valid_vocab": vocab, "impl": impl}
        statistics = logit_statistics(local, targets, keep=masked, **options)
        objective, gradient = run(local, tokens, inplace=True, **options)
        new = run(local, tokens, **options)[1]
    assert torch.equal(gradient, new)
    return tuple(statistics), objective.per_token, gradient


# 700 columns fill 2 and 4 ranks; 9 leave padding on 2 ranks and a rank without any valid column on 4.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("world", "vocab", "masked"),
    [(2, 700, None), (2, 9, None), (4, 9, None), (4, 700, torch.arange(13) % 3 > 0)],
    ids=["2", "2-padded", "4-empty", "4-masked"],
)
def test_vocabulary_parallel_equals_one_rank(ranks, impl, world, vocab, masked):
    logits, targets = problem(13, vocab)
    tokens = tokens_around(exact_statistics(logits, targets, 0.7)[0], targets, teachers=2, keep=masked)
    objective, gradient = run(logits, tokens, temperature=0.7, impl=impl)
    statistics = logit_statistics(logits, targets, keep=masked, temperature=0.7, impl=impl)
    answers = ranks(world, _on_a_rank, vocab, impl, masked)
    together = torch.cat([answer[2] for answer in answers], 1)
    torch.testing.assert_close(together[:, :vocab], gradient, rtol=1e-5, atol=1e-7)
    assert not together[:, vocab:].any()
    for answer in answers:
        torch.testing.assert_close(answer[0], tuple(statistics), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer[1], objective.per_token, rtol=1e-5, atol=1e-5)
        for ours, first in zip(answer[0], answers[0][0], strict=True):
            assert torch.equal(ours, first)  # joined in rank order: the same on every rank, to the bit


def _masked_shard(impl):
    """Rank 0's columns are all masked, for one row the other's."""
    logits, targets = problem(3, 8)
    logits[:2, :4] = -math.inf
    logits[2, 4:] = -math.inf
    targets[:2], targets[2] = 5, 1
    local = logits.chunk(2, 1)[dist.get_rank()].clone()
    statistics = logit_statistics(local, targets, group=dist.group.WORLD, impl=impl)
    truth = exact_statistics(logits, targets)
    return max(float((ours - exact).abs().max()) for ours, exact in zip(statistics, truth, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shard_may_be_masked_whole(ranks, impl):
    assert max(ranks(2, _masked_shard, impl)) < 1e-5


def _misfitting_group():
    with pytest.raises(ValueError, match="valid_vocab = 13 must be between 1 and 12, the columns that 2 shards of 6"):
        logit_statistics(torch.ones(3, 6), torch.zeros(3, dtype=torch.int64), group=dist.group.WORLD, valid_vocab=13)


def test_shards_that_do_not_add_up_are_refused(ranks):
    ranks(2, _misfitting_group)
