"""Objectives against closed forms worked out token by token in Python's double precision."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.distributed as dist

from megatron_mopd import batch as batching
from megatron_mopd import objective_presets
from megatron_mopd.config import CrossEntropy, Mopd
from megatron_mopd.objectives.cross_entropy import cross_entropy_loss
from megatron_mopd.objectives.mopd import mopd_loss, mopd_objective, mopd_of_logits
from megatron_mopd.objectives.mtp import mtp_cross_entropy
from megatron_mopd.objectives.outcome import group_advantages
from megatron_mopd.predictions import Predictions
from megatron_mopd.records import Counts, MicroBatch, Prompt, Rollout
from mopd_kernels import linear_logprob
from mopd_kernels.testing import exact_logprob, shard

LENGTHS = (8, 0, 5, 11)
SPREADS = (0.2, 0.0, 0.8, 2.0)  # of log c_t per row: the first row agrees, the last strays beyond every bound
WEIGHTS = (1.0, 1.0, 0.5, 2.0)
COUNTS = Counts(tokens=40, sequences=9)  # more than this micro-batch: other ranks hold the rest


def make_batch(prox=True, seed=0):
    """A micro-batch of four rows (one empty) and theta [T]: both signs of A, r_t beyond both clips, c_t beyond its
    bounds."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    draw = lambda scale: torch.randn(tokens, generator=generator) * scale  # noqa: E731
    base = -2.0 + draw(0.3)
    lengths = torch.tensor(LENGTHS)
    spread = torch.tensor(SPREADS).repeat_interleave(lengths)
    batch = MicroBatch(
        tokens=torch.zeros(4, 13, dtype=torch.int64),
        lengths=lengths + 2,
        rows=torch.arange(tokens),
        targets=torch.zeros(tokens, dtype=torch.int64),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        domains=("a", "a", "b", "c"),
        domain_weight=torch.tensor(WEIGHTS).repeat_interleave(lengths),
        behav_logprobs=base + draw(1.0) * spread,
        teacher_logprobs=base + draw(1.0),
        prox_logprobs=base if prox else None,
        outcome_advantage=draw(1.0),
    )
    return batch, base + draw(0.3)


def closed_form(theta, batch, settings, counts):
    """Loss and d loss / d theta of Eq. 3, from its text, in Python floats."""
    theta, behav, teacher = theta.tolist(), batch.behav_logprobs.tolist(), batch.teacher_logprobs.tolist()
    prox = theta if batch.prox_logprobs is None else batch.prox_logprobs.tolist()
    loss, gradient, cu = 0.0, [], batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(cu):
        errors = [math.exp(abs(prox[t] - behav[t])) for t in range(start, stop)]
        threshold = settings.sequence_error_threshold
        dropped = bool(errors) and threshold is not None and sum(errors) / len(errors) > threshold
        for t in range(start, stop):
            a = teacher[t] - prox[t] + settings.outcome_weight * float(batch.outcome_advantage[t])
            if settings.advantage_clip is not None:
                a = min(max(a, -settings.advantage_clip), settings.advantage_clip)
            c = math.exp(prox[t] - behav[t])
            keep = not dropped
            if settings.importance == "icepop":
                keep = keep and settings.importance_low <= c <= settings.importance_high
            elif settings.importance == "clamp":
                c = min(max(c, settings.importance_low), settings.importance_high)
            r = 1.0 if settings.force_on_policy_ratio else math.exp(theta[t] - prox[t])
            bounded = min(max(r, 1 - settings.clip_low), 1 + settings.clip_high)
            share = 1 / counts.tokens if settings.normalization == "token" else 1 / (counts.sequences * (stop - start))
            scale = float(batch.domain_weight[t]) * share * c * keep
            loss -= scale * min(r * a, bounded * a)
            stopped = (a > 0 and r > 1 + settings.clip_high) or (a < 0 and r < 1 - settings.clip_low)
            gradient.append(0.0 if stopped else -scale * r * a)
    return loss, torch.tensor(gradient, dtype=torch.float64)


def run(theta, batch, settings, counts=COUNTS):
    leaf = theta.detach().clone().requires_grad_()
    output = mopd_loss(leaf, batch, settings, counts)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return dataclasses.replace(output, loss=output.loss.detach()), gradient


SETTINGS = {
    "eq3": {},
    "asymmetric_clip": {"clip_low": 0.1, "clip_high": 0.28},
    "closed_clip": {"clip_low": 0.0, "clip_high": 0.0},
    "icepop_tight": {"importance_low": 0.8, "importance_high": 1.3},
    "clamp": {"importance": "clamp", "importance_low": 0.8, "importance_high": 1.3},
    "no_bounds": {"importance": "none"},
    "on_policy_ratio": {"force_on_policy_ratio": True},
    "advantage_clip": {"advantage_clip": 0.4},
    "sequence_drop": {"sequence_error_threshold": 2.0},
    "sequence_drop_unmasked": {"sequence_error_threshold": 2.0, "importance": "none"},
    "sequence_mean": {"normalization": "sequence"},
    "outcome": {"outcome_weight": 0.7},
    "outcome_clipped": {"outcome_weight": 0.7, "advantage_clip": 0.4},
    "mimo": objective_presets.MIMO,
    "cascade_2": objective_presets.CASCADE_2,
    "ultra_released": objective_presets.ULTRA_RELEASED,
}


@pytest.mark.parametrize("prox", [True, False], ids=["two_forward", "one_forward"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_match_the_closed_form(name, prox):
    settings = Mopd(**SETTINGS[name])
    batch, theta = make_batch(prox)
    output, gradient = run(theta, batch, settings)
    loss, expected = closed_form(theta.double(), batch, settings, COUNTS)
    assert float(output.loss) == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-8)


def test_the_data_reach_every_branch():
    batch, theta = make_batch()
    advantage = batch.teacher_logprobs - batch.prox_logprobs
    ratio = (theta - batch.prox_logprobs).exp()
    for sign in (advantage > 0, advantage < 0):
        assert (
            (sign & (ratio > 1.28)).any() and (sign & (ratio < 0.8)).any() and (sign & (ratio - 1).abs().lt(0.2)).any()
        )
    settings = Mopd(sequence_error_threshold=2.0)
    output, _ = run(theta, batch, settings)
    importance = output.per_token["importance"]
    assert (importance < 0.8).any() and (importance > 1.3).any()
    kept = [bool(part.any()) for part in output.per_token["mask"].split([n for n in LENGTHS if n])]
    assert True in kept and False in kept


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("mimo", "cascade_2", "ultra_released", "eq3")])
def test_every_setting_changes_the_gradient(name):
    batch, theta = make_batch()
    _, plain = run(theta, batch, Mopd())
    _, changed = run(theta, batch, Mopd(**SETTINGS[name]))
    assert not torch.allclose(plain, changed, rtol=1e-3)


@pytest.mark.parametrize("name", ["eq3", "no_bounds", "sequence_mean", "ultra_released"])
def test_prox_forward_is_not_needed_for_one_optimizer_step(name):
    settings, (batch, theta) = Mopd(**SETTINGS[name]), make_batch(prox=False)
    _, one = run(theta, batch, settings)
    assert torch.equal(run(theta, dataclasses.replace(batch, prox_logprobs=theta), settings)[1], one)
    # A second forward of the same weights may differ in its last bits.
    noisy = dataclasses.replace(batch, prox_logprobs=theta + 1e-7 * torch.linspace(-1, 1, len(theta)))
    error = (run(theta, noisy, settings)[1] - one).norm() / one.norm()
    assert error < 1e-5


def test_without_lag_and_clip_it_is_the_gradient_of_the_sampled_reverse_kl():
    batch, theta = make_batch(prox=False)
    batch = dataclasses.replace(batch, behav_logprobs=theta)
    _, gradient = run(theta, batch, Mopd())
    expected = batch.domain_weight * (theta - batch.teacher_logprobs) / COUNTS.tokens
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_student_equal_to_teacher_has_no_gradient(name):
    batch, theta = make_batch(prox=False)
    batch = dataclasses.replace(batch, teacher_logprobs=theta, outcome_advantage=torch.zeros(len(theta)))
    output, gradient = run(theta, batch, Mopd(**SETTINGS[name]))
    assert not gradient.any() and float(output.loss) == 0.0
    for key in ("advantage", "log_ratio", "k1", "k2", "k3"):
        assert not output.per_token[key].any(), key


def test_a_teacher_that_prefers_a_token_raises_it():
    logits = torch.zeros(1, 4, requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    batch, _ = make_batch(prox=False)
    for token in (0, 1):
        row = dataclasses.replace(
            batch,
            targets=torch.tensor([token]),
            cu_seqlens=torch.tensor([0, 1]),
            domain_weight=torch.ones(1),
            behav_logprobs=torch.full((1,), math.log(0.25)),
            teacher_logprobs=teacher[:, token],
        )
        theta = logits.log_softmax(-1)[:, token]
        (gradient,) = torch.autograd.grad(mopd_loss(theta, row, Mopd(), Counts(tokens=1, sequences=1)).loss, logits)
        stepped = (logits - gradient).log_softmax(-1)[0, 0]
        assert stepped > math.log(0.25)  # sampled or not, token 0 gains


@pytest.mark.parametrize("shift", [200.0, -200.0])
def test_huge_ratios_of_masked_tokens_leave_no_nan(shift):
    batch, theta = make_batch()
    prox = theta - 200  # r_t overflows; c_t overflows or vanishes, so no token counts
    output, gradient = run(theta, dataclasses.replace(batch, prox_logprobs=prox, behav_logprobs=prox + shift), Mopd())
    assert float(output.loss) == 0.0 and not gradient.any() and not output.per_token["mask"].any()


def test_an_empty_micro_batch_keeps_the_graph_alive():
    theta = torch.zeros(0, requires_grad=True)
    for settings in SETTINGS.values():
        output = mopd_loss(theta, batching.empty(0), Mopd(**settings), COUNTS)
        output.loss.backward()
        assert output.loss.item() == 0.0


def test_per_token_values_are_detached_and_named():
    batch, theta = make_batch()
    output, _ = run(theta, batch, Mopd())
    log_ratio = batch.teacher_logprobs - batch.prox_logprobs
    gap = (batch.teacher_logprobs - theta).double()
    expected = {
        "log_ratio": log_ratio,
        "advantage": log_ratio,
        "ratio": (theta - batch.prox_logprobs).exp(),
        "importance": (batch.prox_logprobs - batch.behav_logprobs).exp(),
        "k1": -gap,
        "k2": gap**2 / 2,
        "k3": gap.exp() - 1 - gap,
    }
    assert set(output.per_token) == {*expected, "mask", "clipped"}
    for name, value in output.per_token.items():
        assert value.dtype == torch.float32 and not value.requires_grad and len(value) == len(theta)
        if name in expected:
            torch.testing.assert_close(value, expected[name].float(), rtol=1e-4, atol=1e-6)
    ratio, advantage = output.per_token["ratio"], output.per_token["advantage"]
    stopped = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    assert torch.equal(output.per_token["clipped"].bool(), stopped & output.per_token["mask"].bool())


@pytest.mark.parametrize("missing", ["behav_logprobs", "teacher_logprobs", "outcome_advantage"])
def test_missing_values_are_named(missing):
    batch, theta = make_batch()
    with pytest.raises(ValueError, match=missing):
        mopd_loss(theta, dataclasses.replace(batch, **{missing: None}), Mopd(outcome_weight=0.5), COUNTS)


def test_a_misfit_of_tokens_is_refused():
    batch, theta = make_batch()
    with pytest.raises(ValueError, match="one per completion token"):
        mopd_loss(theta[1:], batch, Mopd(), COUNTS)


def test_cross_entropy_is_the_weighted_mean_over_global_tokens():
    batch, theta = make_batch()
    leaf = theta.clone().requires_grad_()
    output = cross_entropy_loss(leaf, batch, CrossEntropy(), COUNTS)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    torch.testing.assert_close(gradient, -batch.domain_weight / COUNTS.tokens)
    assert float(output.loss) == pytest.approx(
        float(-(batch.domain_weight.double() * theta).sum() / COUNTS.tokens), rel=1e-5
    )
    assert torch.equal(output.per_token["nll"], -theta)


# ---------------------------------------------------------------- from hidden states


def vocabulary_problem(vocab=9, width=6):
    generator = torch.Generator().manual_seed(3)
    batch, _ = make_batch()
    hidden = torch.randn(sum(LENGTHS), width, generator=generator)
    weight = 0.3 * torch.randn(vocab, width, generator=generator)
    targets = torch.randint(vocab, (sum(LENGTHS),), generator=generator)
    theta = linear_logprob(hidden, weight, targets)
    moved = {f: getattr(batch, f) - batch.prox_logprobs + theta for f in ("behav_logprobs", "teacher_logprobs")}
    prox = theta + 0.3 * torch.randn(len(theta), generator=generator)
    return dataclasses.replace(batch, targets=targets, prox_logprobs=prox, **moved), hidden, weight


def of_logprobs(predictions, batch, settings, counts):
    return mopd_loss(predictions.logprobs(batch.targets), batch, settings, counts)


@pytest.mark.parametrize("form", [mopd_objective, mopd_of_logits])
@pytest.mark.parametrize("prox", [True, False], ids=["two_forward", "one_forward"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_form_gives_loss_gradients_and_metrics_of_the_log_probabilities(name, prox, form):
    settings, (batch, hidden, weight) = Mopd(**SETTINGS[name]), vocabulary_problem()
    batch = batch if prox else dataclasses.replace(batch, prox_logprobs=None)
    results = []
    for run_form in (of_logprobs, form):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        # A head without padding at a temperature, whose loss a loop divides by 4 micro-batches.
        output = run_form(Predictions(*leaves, temperature=0.9, grad_scale=0.25), batch, settings, COUNTS)
        (output.loss / 4).backward()
        results.append((output.loss.detach(), *(leaf.grad for leaf in leaves), output.per_token))
    (*expected, metrics), (*got, per_token) = results
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-7)
    assert per_token.keys() == metrics.keys() | {"entropy"} and metrics["mask"].any()
    for key, truth in metrics.items():
        torch.testing.assert_close(per_token[key], truth, rtol=1e-5, atol=1e-6)
    log_p = (hidden.double() @ weight.double().T / 0.9).log_softmax(-1)
    torch.testing.assert_close(per_token["entropy"].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [mopd_objective, mopd_of_logits])
def test_every_form_of_an_empty_micro_batch_keeps_the_graph_alive(form):
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    for settings in SETTINGS.values():
        output = form(Predictions(hidden, weight), batching.empty(0), Mopd(**settings), COUNTS)
        output.loss.backward()
        assert output.loss.item() == 0.0 and not weight.grad.any()


# ---------------------------------------------------------------- outcome


def rollout(prompt, sample, reward):
    record = Prompt(id=prompt, domain="d", messages=(), tokens=(1, 2))
    return Rollout(prompt=record, sample=sample, completion=torch.tensor([3]), finish="stop", reward=reward)


def test_group_advantages_are_standardised_within_a_draw():
    rollouts = [
        rollout("p", 0, 1.0),
        rollout("p", 1, 0.0),
        rollout("p", 2, 0.0),
        rollout("q", 0, 1.0),
        rollout("q", 1, 1.0),
    ]
    mean, deviation = 1 / 3, math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    assert group_advantages(rollouts) == pytest.approx([(1 - mean) / deviation] + [-mean / deviation] * 2 + [0, 0])


def test_a_prompt_drawn_twice_makes_two_groups():
    rollouts = [rollout("p", 0, 1.0), rollout("p", 1, 0.0), rollout("p", 0, 1.0), rollout("p", 1, 1.0)]
    half = math.sqrt(0.5)
    assert group_advantages(rollouts) == pytest.approx([half, -half, 0, 0])


def test_group_advantages_refuse_singles_and_missing_rewards():
    with pytest.raises(ValueError, match="samples_per_prompt"):
        group_advantages([rollout("p", 0, 1.0), rollout("q", 0, 1.0)])
    with pytest.raises(ValueError, match="no reward"):
        group_advantages([rollout("p", 0, 1.0), rollout("p", 1, None)])


# ---------------------------------------------------------------- MTP


def mtp_problem(prompt_lengths=(3, 1), depths=2, vocab=11, width=5):
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(
            prompt=Prompt(id=str(n), domain="d", messages=(), tokens=tuple(range(1, n + 1))),
            sample=0,
            completion=torch.randint(vocab, (size,), generator=generator),
            finish="stop",
        )
        for n, size in zip(prompt_lengths, (4, 2), strict=True)
    ]
    (packed,) = batching.pack(rollouts, 2, 0)
    length = packed.tokens.shape[1]
    hidden = [torch.randn(length, 2, width, generator=generator) for _ in range(depths)]
    return packed, hidden, torch.randn(vocab, width, generator=generator), rollouts


def test_mtp_predicts_completion_tokens_two_and_more_ahead():
    packed, hidden, weight, rollouts = mtp_problem()
    expected = 0.0
    for depth, states in enumerate(hidden):
        for row, item in enumerate(rollouts):
            tokens, start = item.tokens.tolist(), len(item.prompt.tokens)
            for position in range(start, len(tokens)):
                source = position - 2 - depth
                if source >= 0:
                    target = torch.tensor([tokens[position]])
                    expected -= float(exact_logprob(states[source, row][None], weight, target)) / COUNTS.tokens
    output = mtp_cross_entropy([h.flatten(0, 1) for h in hidden], weight, packed, COUNTS)
    assert float(output.loss) == pytest.approx(expected / len(hidden), rel=1e-5)
    assert set(output.per_token) == {"mtp_nll_0", "mtp_nll_1"}
    # The short prompt leaves its first completion token out of reach of both depths, its second out of the last one's.
    assert [int((v == 0).sum()) for v in output.per_token.values()] == [1, 2]


def test_mtp_predicts_what_mcore_rolls_its_labels_to():
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    packed, hidden, weight, rollouts = mtp_problem()
    mask = torch.zeros_like(packed.tokens)
    for row, item in enumerate(rollouts):
        mask[row, len(item.prompt.tokens) : len(item.tokens)] = 1
    labels, _ = roll_tensor(packed.tokens)
    mask, _ = roll_tensor(mask)
    expected = 0.0
    for states in hidden:
        (labels, _), (mask, _) = roll_tensor(labels), roll_tensor(mask)
        logits = (states.double() @ weight.double().T).transpose(0, 1)  # [b, s, V]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        expected += float((nll * mask.flatten()).sum()) / COUNTS.tokens / len(hidden)
    output = mtp_cross_entropy([h.flatten(0, 1) for h in hidden], weight, packed, COUNTS)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_mtp_trains_heads_only_and_only_used_rows():
    packed, hidden, weight, _ = mtp_problem()
    flat = [h.flatten(0, 1).requires_grad_() for h in hidden]
    weight.requires_grad_()
    mtp_cross_entropy(flat, weight, packed, COUNTS).loss.backward()
    assert weight.grad is None
    for depth, states in enumerate(flat):
        used = (packed.rows - (1 + depth) * 2).clamp(min=-1)
        untouched = torch.ones(len(states), dtype=torch.bool)
        untouched[used[used >= 0]] = False
        assert states.grad is not None and not states.grad[untouched].any() and states.grad[~untouched].any()


def test_mtp_of_an_empty_micro_batch_and_of_no_heads():
    hidden = torch.zeros(1, 5, requires_grad=True)
    loss = mtp_cross_entropy([hidden], torch.ones(11, 5), batching.empty(0), COUNTS).loss
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None
    with pytest.raises(ValueError, match="no MTP heads"):
        mtp_cross_entropy([], torch.ones(11, 5), batching.empty(0), COUNTS)


# ---------------------------------------------------------------- several ranks


def _loss_on_a_rank(settings):
    batch, hidden, weight = vocabulary_problem()
    local = shard(weight, dist.get_rank(), dist.get_world_size())
    logprob = linear_logprob(hidden, local, batch.targets, group=dist.group.WORLD, valid_vocab=len(weight))
    output, gradient = run(logprob, batch, Mopd(**settings))
    return output.loss, gradient


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradient_do_not_depend_on_tensor_parallelism(ranks, world):
    batch, hidden, weight = vocabulary_problem()
    output, gradient = run(linear_logprob(hidden, weight, batch.targets), batch, Mopd())
    assert gradient.any()
    for loss, other in ranks(world, _loss_on_a_rank, {}):
        torch.testing.assert_close(loss, output.loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_shares_of_micro_batches_add_up(name):
    settings, (batch, theta) = Mopd(**SETTINGS[name]), make_batch()
    whole, gradient = run(theta, batch, settings)
    loss, parts = 0.0, []
    for row in range(len(LENGTHS)):
        start, stop = batch.cu_seqlens[row : row + 2].tolist()
        flat = {f: getattr(batch, f)[start:stop] for f in ("rows", "targets", "domain_weight", "behav_logprobs")}
        flat |= {f: getattr(batch, f)[start:stop] for f in ("teacher_logprobs", "prox_logprobs", "outcome_advantage")}
        one = dataclasses.replace(batch, cu_seqlens=torch.tensor([0, stop - start]), **flat)
        output, part = run(theta[start:stop], one, settings)
        loss, parts = loss + float(output.loss), [*parts, part]
    assert loss == pytest.approx(float(whole.loss), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-6, atol=1e-9)
