"""mopd_kernels.linear against fp64, alone and vocabulary-parallel; where its gradients go."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from mopd_kernels import (
    Head,
    Surrogate,
    Tokens,
    divergence,
    linear_logprob,
    linear_objective,
    linear_statistics,
    logit_objective,
    reference,
    surrogate,
    unsupported_reason,
)
from mopd_kernels.dispatch import resolve
from mopd_kernels.testing import LargestTensor, assert_no_worse, exact_log_softmax, exact_logprob, shard, tokens_around

IMPLS = ("reference", "triton")


def problem(tokens, width, vocab, dtype=torch.float32, seed=0):
    """hidden [T, H], weight [V, H], targets [T], upstream gradient [T]; log-probabilities of a few nats."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (2 * torch.randn(vocab, width, generator=generator) / math.sqrt(width)).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


def gradients(function, hidden, weight, upstream=None):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    value = function(hidden, weight)
    value.backward(upstream)
    return value.detach(), hidden.grad, weight.grad


def exact_objective(hidden, weight, tokens, settings, temperature=1.0, valid_vocab=None):
    """The loss in fp64, for autograd, and its metrics."""
    log_p = exact_log_softmax(hidden, weight, temperature, valid_vocab)
    losses, log_ratios, metrics = surrogate(log_p.gather(1, tokens.targets[:, None])[:, 0], tokens, settings)
    metrics["entropy"] = -(log_p.exp() * log_p).sum(-1).detach()
    if tokens.keep is not None:
        metrics["entropy"] = metrics["entropy"].where(tokens.keep, 0.0)
    return losses.sum(), log_ratios, metrics


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 8, 3), (7, 24, 50), (70, 40, 1031)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_and_gradients_match_fp64(impl, tokens, width, vocab, temperature):
    hidden, weight, targets, upstream = problem(tokens, width, vocab)
    ours = gradients(
        lambda h, w: linear_logprob(h, w, targets, temperature=temperature, impl=impl), hidden, weight, upstream
    )
    truth = gradients(
        lambda h, w: exact_logprob(h, w, targets, temperature), hidden.double(), weight.double(), upstream.double()
    )
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_match_fp64_and_agree_with_logprob(impl):
    hidden, weight, targets, _ = problem(13, 16, 90)
    statistics = linear_statistics(hidden, weight, targets, temperature=0.7, valid_vocab=90, impl=impl)
    log_p = exact_log_softmax(hidden, weight, 0.7)
    torch.testing.assert_close(statistics.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    lse = (hidden.double() @ weight.double().T / 0.7).logsumexp(-1)
    torch.testing.assert_close(statistics.lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.logprob, linear_logprob(hidden, weight, targets, temperature=0.7, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_common_shift_of_the_logits_costs_no_entropy(impl):
    hidden, weight, targets, _ = problem(13, 16, 90)
    lifted = torch.cat([hidden, torch.full((13, 8), 5.0)], dim=1)  # 5 * 8 * 7.5 = 300 on every logit
    weight = torch.cat([weight, torch.full((90, 8), 7.5)], dim=1)
    log_p = exact_log_softmax(lifted, weight)
    entropy = linear_statistics(lifted, weight, targets, impl=impl).entropy
    # A logit of 300 has an ulp of 3e-5.
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4)


SETTINGS = {
    "eq3": ({}, {}),
    "one_forward": ({"prox": None}, {}),
    "three_teachers": ({"teachers": 3}, {"advantage_clip": 0.5}),
    "clamp": ({}, {"importance": "clamp", "importance_low": 0.8, "importance_high": 1.3}),
    "no_bounds": ({}, {"importance": "none"}),
    "on_policy_ratio": ({}, {"force_on_policy_ratio": True}),
    "outcome": ({"outcome": torch.linspace(-1, 1, 37)}, {}),
    "gate": ({"gate": torch.arange(37) % 3 > 0}, {}),
    "keep": ({"keep": torch.arange(37) % 4 > 0}, {}),
    "keep_nothing": ({"keep": torch.zeros(37, dtype=torch.bool)}, {}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SETTINGS)
def test_objective_metrics_and_gradients_match_fp64(impl, name):
    changes, factors = SETTINGS[name]
    hidden, weight, targets, _ = problem(37, 24, 300)
    tokens = tokens_around(exact_logprob(hidden, weight, targets, 0.8), targets, **changes)
    settings = Surrogate(**factors)
    results = {}

    def run(h, w):
        results["ours"] = linear_objective(h, w, tokens, settings, temperature=0.8, impl=impl)
        return results["ours"].loss

    def exact(h, w):
        loss, results["log_ratios"], results["metrics"] = exact_objective(h, w, tokens, settings, 0.8)
        return loss

    ours, truth = gradients(run, hidden, weight), gradients(exact, hidden.double(), weight.double())
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=5e-5, atol=2e-6)
    objective = results["ours"]
    assert objective.per_token.keys() == results["metrics"].keys()
    for metric, expected in results["metrics"].items():
        got = objective.per_token[metric].double()
        torch.testing.assert_close(got, expected.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=metric: f"{n}: {m}")
    torch.testing.assert_close(objective.log_ratios.double(), results["log_ratios"].double(), rtol=2e-5, atol=2e-5)
    assert not objective.loss.isnan() and not any(t.requires_grad for t in objective.per_token.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_no_worse_than_plain_torch(impl, dtype):
    hidden, weight, targets, upstream = problem(33, 24, 50, dtype)
    upstream = upstream.to(torch.float32)

    def plain(h, w):
        return (h @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    truth = gradients(lambda h, w: exact_logprob(h, w, targets), hidden.double(), weight.double(), upstream.double())
    low = gradients(plain, hidden, weight, upstream)
    ours = gradients(lambda h, w: linear_logprob(h, w, targets, impl=impl), hidden, weight, upstream)
    assert ours[1].dtype == ours[2].dtype == dtype
    assert_no_worse(ours[0], low[0], truth[0], 1e-6, "logprob")
    for value, lowp, expected, name in zip(ours[1:], low[1:], truth[1:], ("hidden", "weight"), strict=True):
        assert_no_worse(value, lowp, expected, 1e-3, name)  # single roundings fall here or there: an ulp of 3 is 0.016
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_columns_are_never_read(impl):
    hidden, weight, targets, upstream = problem(7, 8, 12)
    padded = torch.cat([weight, torch.full((4, 8), float("nan"))])
    plain = gradients(lambda h, w: linear_logprob(h, w, targets, impl=impl), hidden, weight, upstream)
    ours = gradients(lambda h, w: linear_logprob(h, w, targets, valid_vocab=12, impl=impl), hidden, padded, upstream)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert torch.equal(ours[2][:12], plain[2]) and not ours[2][12:].any()


def test_only_the_asked_gradients_are_made():
    hidden, weight, targets, upstream = problem(7, 8, 12)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, targets).backward(upstream)
    linear_objective(hidden, weight, tokens).loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_logits_never_exist_whole(monkeypatch):
    hidden, weight, targets, upstream = problem(64, 4, 256)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8 * 256)
    with LargestTensor() as largest:
        gradients(lambda h, w: linear_logprob(h, w, targets), hidden, weight, upstream)
        gradients(lambda h, w: linear_objective(h, w, tokens).loss, hidden, weight)
        linear_statistics(hidden, weight, targets)
    assert largest.elements == 8 * 256


def test_chunks_change_nothing(monkeypatch):
    hidden, weight, targets, _ = problem(64, 8, 256)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)
    run = lambda h, w: linear_objective(h, w, tokens).loss  # noqa: E731
    whole = gradients(run, hidden, weight)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 5 * 256)
    for ours, expected in zip(gradients(run, hidden, weight), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_still_reach_the_leaves(impl):
    hidden, weight, targets, _ = problem(0, 8, 12)
    hidden.requires_grad_(), weight.requires_grad_()
    tokens = tokens_around(torch.empty(0), targets)
    assert linear_statistics(hidden, weight, targets, impl=impl).entropy.shape == (0,)
    (
        linear_logprob(hidden, weight, targets, impl=impl).sum() + linear_objective(hidden, weight, tokens).loss
    ).backward()
    assert hidden.grad is not None and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 4)}, r"expected hidden \[T, H\]"),
        ({"weight": torch.ones(6, 5, dtype=torch.bfloat16)}, "got hidden torch.float32 and weight torch.bfloat16"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"expected int64 \[3\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"targets is torch.int32 \[3\]"),
        ({"targets": torch.tensor([0, 6, 1])}, r"targets\[1\] = 6: targets must lie in \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, -1])}, r"targets\[2\] = -1"),
        ({"temperature": math.inf}, "temperature = inf must be finite"),
        ({"temperature": 0.0}, "temperature = 0.0 must be finite and above 0"),
        ({"valid_vocab": 7}, "valid_vocab = 7 must be between 1 and 6"),
        ({"impl": "cuda"}, "impl = 'cuda': expected auto, triton or reference"),
        ({"impl": "triton"}, "need H to be a multiple of 4"),
        ({"weight": torch.ones(6, 5, device="meta")}, "weight on meta"),
    ],
    ids=[
        "width",
        "dtype",
        "targets",
        "int32",
        "above",
        "below",
        "infinite",
        "temperature",
        "vocab",
        "impl",
        "triton",
        "device",
    ],
)
def test_misfits_are_refused(change, message):
    good = {"hidden": torch.ones(3, 5), "weight": torch.ones(6, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": torch.ones(2, 4)}, r"teachers is torch.float32 \[2, 4\]: expected torch.float32 \[2, 3\]"),
        ({"teachers": torch.ones(0, 3)}, "at least one teacher"),
        ({"teacher_weights": torch.ones(3)}, r"teacher_weights is torch.float32 \[3\]"),
        ({"behaviour": torch.ones(3).double()}, "behaviour is torch.float64"),
        ({"gate": torch.ones(3)}, r"expected torch.bool \[3\]"),
        ({"weight": torch.ones(3, device="meta")}, "weight is on meta, targets on cpu"),
    ],
    ids=["length", "none", "weights", "dtype", "gate", "device"],
)
def test_misfitting_token_fields_are_refused(change, message):
    good = {"targets": torch.zeros(3, dtype=torch.int64)} | {
        name: torch.zeros(3) for name in ("behaviour", "teachers", "weight")
    }
    with pytest.raises(ValueError, match=message):
        Tokens(**(good | change))


def test_a_masked_row_may_hold_any_token():
    hidden, weight, targets, _ = problem(4, 8, 12)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)
    masked = tokens_around(
        exact_logprob(hidden, weight, targets),
        torch.cat([targets[:3], torch.tensor([-100])]),
        keep=torch.tensor([True, True, True, False]),
    )
    loss = linear_objective(hidden, weight, masked).loss
    torch.testing.assert_close(loss, linear_objective(hidden, weight, tokens).per_token["loss"][:3].sum())
    with pytest.raises(ValueError, match=r"targets\[3\] = -100"):
        linear_objective(hidden, weight, tokens_around(tokens.behaviour, masked.targets))


def test_what_triton_does_not_take_has_a_reason():
    assert unsupported_reason(torch.ones(3, 8), torch.ones(5, 8)) is None
    assert "torch.float64" in str(unsupported_reason(torch.ones(3, 8).double()))
    assert "multiple of 8" in str(unsupported_reason(torch.ones(3, 4).bfloat16(), torch.ones(5, 4).bfloat16()))
    assert "rows must be dense" in str(unsupported_reason(torch.ones(8, 3).T))
    shifted = torch.ones(25)[1:].view(3, 8)
    assert "off a 16-byte boundary" in str(unsupported_reason(shifted, torch.ones(5, 8)))
    assert unsupported_reason(shifted, torch.ones(5, 8), tiled=False) is None


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)])
def test_tiles_are_taken_by_hopper_and_blackwell_alone(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    pair = torch.ones(3, 8), torch.ones(5, 8)
    reason = unsupported_reason(*pair)
    assert (reason is None) == taken
    if not taken:
        assert f"compute capability {capability[0]}.{capability[1]}" in reason and "9.x, 10.x" in reason
        with pytest.raises(ValueError, match=r"cannot run: compute capability .* use impl='auto' or 'reference'"):
            resolve("linear_objective", "triton", *pair)
    assert unsupported_reason(pair[0]) is None and unsupported_reason(*pair, tiled=False) is None


def test_a_reason_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    kept = [torch.ones(33)[1:].view(4, 8) for _ in range(3)]  # three addresses
    for tensor in kept:
        assert resolve("said once", "auto", tensor, tensor) == "reference"
    assert len(caplog.records) == 1 and "16-byte boundary" in caplog.text


@pytest.mark.parametrize("impl", IMPLS)
def test_a_clipped_token_has_no_gradient_however_large_its_ratio(impl):
    """exp(theta - prox) is infinite in fp32 for the third token, its loss is not."""
    hidden, weight, targets, _ = problem(9, 8, 20)
    base = exact_logprob(hidden, weight, targets).float()
    far = torch.where(torch.arange(9) == 2, -200.0, base)
    tokens = tokens_around(base, targets, prox=far, behaviour=far)
    results = {}

    def run(h, w):
        results["ours"] = linear_objective(h, w, tokens, impl=impl)
        return results["ours"].loss

    loss, d_hidden, d_weight = gradients(run, hidden, weight)
    assert results["ours"].per_token["clipped"][2] == 1 and loss.isfinite()
    assert not d_hidden[2].any() and d_hidden.isfinite().all() and d_weight.isfinite().all() and d_weight.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_rounds_nothing(impl):
    hidden, weight, targets, _ = problem(9, 8, 20)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)

    def run(h, w, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return linear_objective(h, w, tokens, impl=impl).loss

    plain, cast = (gradients(lambda h, w, e=e: run(h, w, e), hidden, weight) for e in (False, True))
    for expected, ours in zip(plain, cast, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_stopped_row_takes_no_part_whatever_is_in_it(impl):
    """A gate or an upstream gradient of zero stops a row whose hidden state is NaN, as it stops any other."""
    hidden, weight, targets, upstream = problem(9, 8, 20)
    gate = torch.arange(9) != 3
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets, gate=gate)
    upstream = upstream.where(gate, 0.0)
    broken = hidden.clone()
    broken[3] = math.nan
    for run, given in (
        (lambda h, w: linear_objective(h, w, tokens, impl=impl).loss, None),
        (lambda h, w: linear_logprob(h, w, targets, impl=impl), upstream),
    ):
        _, d_hidden, d_weight = gradients(run, broken, weight, given)
        _, expected_hidden, expected_weight = gradients(run, hidden, weight, given)
        assert torch.equal(d_hidden, expected_hidden) and torch.equal(d_weight, expected_weight)
        assert not d_hidden[3].any() and d_weight.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_code_may_call_the_operators(impl):
    hidden, weight, targets, _ = problem(9, 8, 20)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)

    def run(h, w):
        straight = linear_objective(2 * h, w, tokens, impl=impl).loss + linear_logprob(h, w, targets, impl=impl).sum()
        from_logits = logit_objective(h @ w.T, tokens, inplace=True, impl=impl).loss
        kl = divergence("forward_kl", Head(h, w), Head(hidden.flip(0), weight), weight_grad=True, impl=impl).value
        return straight + from_logits + kl.sum()

    for ours, expected in zip(
        gradients(torch.compile(run, backend="aot_eager"), hidden, weight), gradients(run, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_mode_gives_the_same_values(impl):
    hidden, weight, targets, _ = problem(9, 8, 20)
    tokens = tokens_around(exact_logprob(hidden, weight, targets), targets)
    runs = (
        lambda: linear_objective(hidden, weight, tokens, impl=impl),
        lambda: logit_objective(hidden @ weight.T, tokens, impl=impl),
    )
    for run in runs:
        expected = run()
        with torch.inference_mode():
            ours = run()
        for name, value in expected.per_token.items():
            assert torch.equal(ours.per_token[name], value), name


# ------------------------------------------------------------------ main_grad


def parameter(weight, *, hook=True, **attributes):
    """A parameter as mcore's DDP leaves it, with the hook that adds ``grad`` unless it was added already."""
    leaf = torch.nn.Parameter(weight.clone())
    leaf.main_grad = torch.full(weight.shape, 0.5)
    leaf.calls = 0
    for name, value in attributes.items():
        setattr(leaf, name, value)
    if hook:
        leaf.grad_added_to_main_grad = False

        def reduce(p):
            p.calls += 1
            if p.grad is not None and (not p.grad_added_to_main_grad or getattr(p, "zero_out_wgrad", False)):
                p.main_grad.add_(p.grad)
            p.grad, p.grad_added_to_main_grad = None, False

        leaf.register_post_accumulate_grad_hook(reduce)
    return leaf


def objective_of(hidden, weight, **options):
    with torch.no_grad():
        base = linear_statistics(hidden.detach(), weight, options["targets"]).logprob
    return linear_objective(hidden, weight, tokens_around(base, options.pop("targets")), **options).loss


CASES = {
    "objective": lambda h, w, t: objective_of(h, w, targets=t),
    "logprob": lambda h, w, t: linear_logprob(h, w, t).mean(),
    "reentrant_recompute": lambda h, w, t: checkpoint(lambda x: objective_of(x, w, targets=t), h, use_reentrant=True),
    "recompute": lambda h, w, t: checkpoint(lambda x: objective_of(x, w, targets=t), h, use_reentrant=False),
    "recompute_inside": lambda h, w, t: objective_of(
        checkpoint(lambda x: 2 * x.tanh(), h, use_reentrant=False), w, targets=t
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_main_grad_gets_the_gradient_once_per_micro_batch(impl, name, dtype, monkeypatch):
    """Forward twice, then backward twice, as the stages of a pipeline order it; autograd's sum is the truth."""
    monkeypatch.setattr("mopd_kernels.linear.choose", lambda *_: impl)
    parts = [problem(9, 8, 20, dtype, seed) for seed in (0, 1)]
    weight = parts[0][1]
    fused, plain = parameter(weight), torch.nn.Parameter(weight.clone())
    results = []
    for leaf in (fused, plain):
        hiddens = [part[0].clone().requires_grad_() for part in parts]
        losses = [CASES[name](h, leaf, part[2]) for h, part in zip(hiddens, parts, strict=True)]
        for loss in losses:
            loss.backward()
        results.append(hiddens)
    assert fused.grad is None and fused.calls == 2
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(fused.main_grad - 0.5, plain.grad.float(), rtol=tolerance, atol=tolerance)
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours.grad, expected.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_recomputation_trains_a_weight_on_frozen_hidden_states(impl):
    """Nothing but main_grad waits for the recomputation then."""
    hidden, weight, targets, _ = problem(9, 8, 20)
    fused, plain = parameter(weight), torch.nn.Parameter(weight.clone())
    for leaf in (fused, plain):
        checkpoint(
            lambda h, w=leaf: objective_of(h, w, targets=targets, impl=impl), hidden, use_reentrant=False
        ).backward()
    assert fused.calls == 1 and plain.grad.any()
    torch.testing.assert_close(fused.main_grad - 0.5, plain.grad, rtol=1e-6, atol=1e-6)


def test_no_gradient_touches_main_grad():
    hidden, weight, targets, _ = problem(9, 8, 20)
    leaf = parameter(weight)
    with torch.no_grad():
        objective_of(hidden, leaf, targets=targets)
        linear_logprob(hidden, leaf, targets)
    hidden.requires_grad_()
    objective_of(hidden, leaf.detach(), targets=targets).backward()
    objective_of(hidden, leaf.requires_grad_(False), targets=targets).backward()
    assert torch.equal(leaf.main_grad, torch.full_like(weight, 0.5)) and leaf.calls == 0


def test_a_tied_weight_keeps_the_gradient_of_its_other_use():
    hidden, weight, targets, _ = problem(9, 8, 20)
    tied, plain = parameter(weight, zero_out_wgrad=True), torch.nn.Parameter(weight.clone())
    for leaf in (tied, plain):
        (objective_of(hidden, leaf, targets=targets) + leaf[targets].square().sum()).backward()
    torch.testing.assert_close(tied.main_grad - 0.5, plain.grad, rtol=1e-6, atol=1e-6)


def test_a_main_grad_without_mcores_hook_is_added_to():
    hidden, weight, targets, _ = problem(9, 8, 20)
    leaf, plain = parameter(weight, hook=False), torch.nn.Parameter(weight.clone())
    for each in (leaf, plain):
        objective_of(hidden, each, targets=targets).backward()
    assert leaf.grad is None
    torch.testing.assert_close(leaf.main_grad - 0.5, plain.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["main_grad", "autograd"])
def test_the_upstream_gradient_scales_or_is_refused(kind):
    hidden, weight, targets, _ = problem(9, 8, 20)
    leaf = parameter(weight) if kind == "main_grad" else torch.nn.Parameter(weight.clone())
    plain = torch.nn.Parameter(weight.clone())
    (4 * objective_of(hidden, plain, targets=targets)).backward()
    (4 * objective_of(hidden, leaf, targets=targets, grad_scale=4.0)).backward()
    got = leaf.main_grad - 0.5 if kind == "main_grad" else leaf.grad
    torch.testing.assert_close(got, plain.grad, rtol=1e-5, atol=1e-6)
    if kind == "main_grad":
        with pytest.raises(RuntimeError, match=r"brought 3\.0; pass grad_scale=3\.0"):
            (3 * objective_of(hidden, leaf, targets=targets)).backward()
        loss = objective_of(hidden, leaf, targets=targets)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()


@pytest.mark.parametrize("micro_batches", [3, 7, 10])
def test_a_scale_that_fp32_rounds_is_the_one_told(micro_batches):
    """mcore divides the loss by its number of micro-batches."""
    hidden, weight, targets, _ = problem(9, 8, 20)
    leaf, plain = parameter(weight), torch.nn.Parameter(weight.clone())
    for each in (leaf, plain):
        (objective_of(hidden, each, targets=targets, grad_scale=1 / micro_batches) / micro_batches).backward()
    torch.testing.assert_close(leaf.main_grad - 0.5, plain.grad, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"but backward brought 0\.3334"):
        (0.3334 * objective_of(hidden, leaf, targets=targets, grad_scale=1 / 3)).backward()


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan])
def test_a_scale_that_cannot_be_undone_is_refused(scale):
    hidden, weight, targets, _ = problem(9, 8, 20)
    with pytest.raises(ValueError, match=f"grad_scale = {scale} must be finite and not 0"):
        objective_of(hidden, weight, targets=targets, grad_scale=scale)


def test_a_main_grad_in_low_precision_is_refused():
    hidden, weight, targets, _ = problem(9, 8, 20)
    leaf = parameter(weight, main_grad=torch.zeros(20, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="grad_reduce_in_fp32"):
        objective_of(hidden, leaf, targets=targets)


# ------------------------------------------------------------------ vocabulary-parallel


def _on_a_rank(vocab, impl):
    """Values and gradients of this rank's shard, the hidden state's summed over ranks as the plugin does."""
    hidden, weight, targets, upstream = problem(13, 12, vocab)
    tokens = tokens_around(exact_logprob(hidden, weight, targets, 0.7), targets, teachers=2)
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    local = shard(weight, rank, size)
    chunk, reference.CHUNK_ELEMENTS = (
        reference.CHUNK_ELEMENTS,
        5 * len(local),
    )  # three chunks on every rank, also where a shard is all padding
    options = {"temperature": 0.7, "group": group, "valid_vocab": vocab, "impl": impl}
    per_token = {}

    def run(h, w):
        objective = linear_objective(h, w, tokens, **options)
        per_token.update(objective.per_token)
        return objective.loss

    results = [
        gradients(lambda h, w: linear_logprob(h, w, targets, **options), hidden, local, upstream),
        gradients(run, hidden, local),
    ]
    reference.CHUNK_ELEMENTS = chunk
    for _, d_hidden, _ in results:
        dist.all_reduce(d_hidden, group=group)
    return *results, (tuple(linear_statistics(hidden, local, targets, **options)), per_token)


# 12 columns fill 2 and 4 ranks; 9 leave padding on 2 ranks and a rank without any valid column on 4.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("vocab", [12, 9])
def test_vocabulary_parallel_equals_one_rank(ranks, impl, world, vocab):
    (alone,) = ranks(1, _on_a_rank, vocab, impl)
    answers = ranks(world, _on_a_rank, vocab, impl)
    for index in (0, 1):
        value, d_hidden, d_weight = alone[index]
        together = torch.cat([answer[index][2] for answer in answers])
        torch.testing.assert_close(together[:vocab], d_weight, rtol=1e-5, atol=1e-5)
        assert not together[vocab:].any()
        for answer in answers:
            torch.testing.assert_close(answer[index][0], value, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(answer[index][1], d_hidden, rtol=1e-5, atol=1e-5)
    for answer in answers:
        torch.testing.assert_close(answer[2], alone[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer[2], answers[0][2], rtol=0, atol=0)
