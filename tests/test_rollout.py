"""Cached decoding against the uncached training forward, on every layout; noise that knows nothing of batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mopd.config import ConfigurationError, Model, Parallel
from megatron_mopd.records import Prompt, Rollout, Sampling

VOCAB = 101  # odd: padded to 102 columns under tensor parallelism
MODEL = Model(pattern="MEM*E-", max_sequence_length=96, override={"init_method_std": 0.2})  # peaked distributions
STOPS = tuple(range(3, VOCAB, 8))
SAMPLED = Sampling(temperature=0.7, max_new_tokens=20, stop_tokens=STOPS)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12, stop_tokens=())

LAYOUTS = [
    pytest.param(2, Parallel(tensor=2), id="tp2"),
    pytest.param(2, Parallel(tensor=2, expert=2), id="tp2-ep2"),
    pytest.param(2, Parallel(expert=2), id="ep2-alltoall"),
    pytest.param(2, Parallel(expert=2, dispatcher="allgather"), id="ep2-allgather"),
    pytest.param(4, Parallel(tensor=2, expert=4), id="tp2-ep4"),
    pytest.param(2, Parallel(pipeline=2), id="pp2"),
    pytest.param(4, Parallel(pipeline=4), id="pp4"),
    pytest.param(4, Parallel(pipeline=2, tensor=2), id="pp2-tp2"),
    pytest.param(4, Parallel(pipeline=2, expert=2), id="pp2-ep2"),
]


def _prompts(count: int) -> list[Prompt]:
    """Ragged prompts: shorter and longer than the convolution's window and one chunk of the scan."""
    random = torch.Generator().manual_seed(7)
    sizes = torch.randint(1, 41, (count,), generator=random).tolist()
    return [
        Prompt(
            id=f"p{i}", domain="d", messages=(), tokens=tuple(torch.randint(0, VOCAB, (n,), generator=random).tolist())
        )
        for i, n in enumerate(sizes)
    ]


def _sampler(
    groups: Any,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    precision: str = "fp32",
    prefill_tokens: int | None = None,
) -> Any:
    from megatron_mopd import student
    from megatron_mopd.rollout import Sampler

    model = student.build_model(MODEL, parallel, groups, VOCAB, precision, mtp=False)
    return Sampler(model, groups, MODEL.max_sequence_length, VOCAB, prefill_tokens)


def _training_logprobs(model: Any, groups: Any, rollouts: list[Rollout], count: int) -> list[Tensor]:
    """Log-probabilities of the completions by the forward that trains: train mode, sequence parallel, no cache.

    The batch has ``count`` rows on every rank: mcore's allgather dispatcher gathers equal shapes.
    """
    from megatron_mopd import batch, pipeline, student
    from mopd_kernels import linear_logprob

    width = MODEL.max_sequence_length
    tokens = torch.zeros(count, width, dtype=torch.int64)
    for row, rollout in zip(tokens, rollouts, strict=False):
        row[: len(rollout.tokens)] = rollout.tokens
    assert model.training

    def scored(_: Any) -> dict[str, Tensor]:
        out = student.forward(model, tokens)
        hidden = student.gather_hidden(out.hidden, groups, model.config).unflatten(0, (width, -1))
        result = {}
        for row, rollout in enumerate(rollouts):
            start = len(rollout.prompt.tokens)
            rows = hidden[start - 1 : start - 1 + len(rollout.completion), row].contiguous()
            result[str(row)] = linear_logprob(
                rows,
                out.output_weight,
                rollout.completion,
                temperature=SAMPLED.temperature,
                group=groups.tp,
                valid_vocab=VOCAB,
            )
        return result

    micro_batch = dataclasses.replace(batch.empty(0), tokens=tokens)
    (values,) = pipeline.tell(pipeline.read(model, [micro_batch], scored, groups), groups)
    return list(values.values())


def sample_and_score(parallel: Parallel, shares: list[int]) -> dict[str, Any]:
    """On one rank: sample ``shares[dp_rank]`` of the requests in batches of 5; score them by the training forward.

    Several ranks read their prompts two by two or one by one; a single rank all of a batch at once.
    """
    from megatron_mopd import parallel as mopd_parallel

    groups = mopd_parallel.initialize(parallel, seed=42)
    sampler = _sampler(groups, parallel, prefill_tokens=60 if groups.world_size > 1 else None)
    requests = [(p, i % 3) for i, p in enumerate(_prompts(sum(shares)))]
    start = sum(shares[: groups.dp_rank])
    mine = requests[start : start + shares[groups.dp_rank]]
    rollouts = sampler.generate(mine, SAMPLED, 11, 4, 5)
    switches = [m.sequence_parallel for m in sampler.model.modules() if hasattr(m, "sequence_parallel")]
    scored = _training_logprobs(sampler.model, groups, rollouts, sum(shares))
    greedy = sampler.generate(mine, GREEDY, 0, 0, 5)
    return {
        "dp_rank": groups.dp_rank,
        "completions": [r.completion.tolist() for r in rollouts],
        "finish": [r.finish for r in rollouts],
        "behav": [r.behav_logprobs for r in rollouts],
        "scored": scored,
        "greedy": [r.completion.tolist() for r in greedy],
        "sequence_parallel": any(switches),
    }


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_layouts_draw_the_same_tokens_and_record_the_training_forwards_logprobs(
    ranks: Any, world: int, parallel: Parallel
) -> None:
    replicas = world // (parallel.tensor * parallel.pipeline)
    shares = [9] if replicas == 1 else [9, 0]  # one rank of an expert group has nothing to do and must still take part
    results = ranks(world, sample_and_score, parallel, shares)
    (single,) = ranks(1, sample_and_score, Parallel(), [9])
    assert len(set(map(len, single["completions"]))) > 3  # ragged completions, so rows were dropped on the way
    assert {"stop", "length"} == set(single["finish"])
    for result in results:
        assert result["sequence_parallel"] == (parallel.tensor > 1)
        for behav, scored in zip(result["behav"], result["scored"], strict=True):
            torch.testing.assert_close(behav, scored, rtol=0, atol=1e-4)
        expected = single if result["dp_rank"] == 0 else {"completions": [], "greedy": []}
        assert result["completions"] == expected["completions"]
        assert result["greedy"] == expected["greedy"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logprobs_equal_the_training_forwards(groups: Any, precision: str) -> None:
    sampler = _sampler(groups, precision=precision)
    rollouts = sampler.generate([(p, 0) for p in _prompts(24)], SAMPLED, 3, 0, 24)
    scored = _training_logprobs(sampler.model, groups, rollouts, 24)
    differences = torch.cat([r.behav_logprobs - s for r, s in zip(rollouts, scored, strict=True)])  # type: ignore[operator]
    assert len(differences) > 100
    if precision == "fp32":
        assert differences.abs().max() < 1e-4
    else:  # the two orders of summation round differently in every layer, and a near tie may choose another expert
        assert differences.abs().median() < 0.05
        assert abs(differences.mean()) < 0.1
    assert all(r.behav_logprobs is not None and r.behav_logprobs.dtype == torch.float32 for r in rollouts)


def test_greedy_cached_equals_greedy_uncached(groups: Any) -> None:
    from megatron_mopd import student

    sampler = _sampler(groups)
    prompts = _prompts(16)
    compared = 0
    for prompt, rollout in zip(prompts, sampler.generate([(p, 0) for p in prompts], GREEDY, 0, 0, 16), strict=True):
        for position, token in enumerate(rollout.completion.tolist()):
            prefix = torch.tensor([[*prompt.tokens, *rollout.completion[:position].tolist()]])
            out = student.forward(sampler.model, prefix)
            logits = (out.hidden[-1, 0] @ out.output_weight.t())[:VOCAB]
            top = logits.topk(2).values
            if top[0] - top[1] >= 1e-4:
                assert token == int(logits.argmax())
                compared += 1
    assert compared > 150


def test_tokens_do_not_depend_on_batch_or_order(groups: Any) -> None:
    sampler = _sampler(groups)
    requests = [(p, s) for p in _prompts(7) for s in range(3)]

    def drawn(requests: list[Any], batch_size: int, seed: int = 5, step: int = 2) -> dict[tuple[str, int], list[int]]:
        rollouts = sampler.generate(requests, SAMPLED, seed, step, batch_size)
        assert [(r.prompt.id, r.sample) for r in rollouts] == [(p.id, s) for p, s in requests]
        return {(r.prompt.id, r.sample): r.completion.tolist() for r in rollouts}

    whole = drawn(requests, 21)
    assert drawn(requests[::-1], 21) == whole
    assert drawn(requests, 4) == whole
    assert drawn(requests[3:5], 1) == {key: whole[key] for key in [("p1", 0), ("p1", 1)]}
    assert whole["p0", 0] != whole["p0", 1]
    assert drawn(requests, 21, seed=6) != whole
    assert drawn(requests, 21, step=3) != whole


@pytest.mark.parametrize("prefill_tokens", [1, 90, 10**6])
def test_reading_prompts_in_parts_gives_the_same_hidden_states(groups: Any, prefill_tokens: int) -> None:
    """One by one, two by two with one left over, and all at once; then on with some of them, twice by one decoder."""
    from megatron_mopd import student
    from megatron_mopd.decoding import Decoder

    model = student.build_model(MODEL, Parallel(), groups, VOCAB, mtp=False).eval()
    prompts = torch.randint(0, VOCAB, (5, 41), generator=torch.Generator().manual_seed(2))
    lengths, kept = torch.tensor([41, 3, 17, 1, 30]), torch.tensor([4, 1, 2])
    more = torch.randint(0, VOCAB, (3, 3), generator=torch.Generator().manual_seed(3))
    widths: list[int] = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: widths.append(output.shape[1]))
    found = []
    with torch.no_grad():
        for decoder in (Decoder(model), Decoder(model, prefill_tokens)):
            decoder.prefill(prompts.flip(0), lengths.flip(0), 3)
            hidden = [decoder.prefill(prompts, lengths, 3)]
            decoder.keep(kept)
            found.append(hidden + [decoder.step(tokens) for tokens in more])
    assert widths[2 + len(more) : -len(more)] == 2 * {1: [1] * 5, 90: [2, 2, 1]}.get(prefill_tokens, [5])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_limits_and_stop_tokens(groups: Any) -> None:
    sampler = _sampler(groups)
    prompts = [*_prompts(6), *[Prompt(id="long", domain="d", messages=(), tokens=(5,) * 90)]]
    rollouts = sampler.generate([(p, s) for p in prompts for s in range(4)], SAMPLED, 0, 0, 64)
    for rollout in rollouts:
        room = min(SAMPLED.max_new_tokens, MODEL.max_sequence_length - len(rollout.prompt.tokens))
        *body, last = rollout.completion.tolist()
        assert not set(body) & set(STOPS)
        assert rollout.finish == ("stop" if last in STOPS else "length")
        assert rollout.finish == "stop" or len(rollout.completion) == room
        assert len(rollout.completion) <= room
        assert rollout.behav_logprobs is not None and len(rollout.behav_logprobs) == len(rollout.completion)
        assert rollout.provenance is None
    assert {r.finish for r in rollouts if r.prompt.id != "long"} == {"stop", "length"}
    assert sampler.generate([], SAMPLED, 0, 0, 8) == []


def test_sampling_restores_the_model(groups: Any) -> None:
    sampler = _sampler(groups)
    model = sampler.model
    model.decoder.layers[0].eval()  # a module somebody froze stays as it is
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    sampler.generate([(p, 0) for p in _prompts(3)], SAMPLED, 0, 0, 8)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if isinstance(v, Tensor))
    with pytest.raises(ConfigurationError):
        sampler.generate([(_prompts(1)[0], 0)], Sampling(temperature=-1, max_new_tokens=1, stop_tokens=()), 0, 0, 8)
    assert [m.training for m in model.modules()] == modes


def test_diverged_weights_are_an_error(groups: Any) -> None:
    sampler = _sampler(groups)
    with torch.no_grad():
        sampler.model.output_layer.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="prompt p0"):
        sampler.generate([(_prompts(1)[0], 0)], SAMPLED, 0, 0, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_p": 0.9}, ["top_p = 0.9"]),
        ({"max_new_tokens": 0}, ["max_new_tokens = 0"]),
        ({"temperature": -0.5}, ["temperature = -0.5"]),
    ],
    ids=["top-p", "no-tokens", "temperature"],
)
def test_unfit_sampling_is_refused(groups: Any, change: dict[str, Any], named: list[str]) -> None:
    sampling = Sampling(**({"temperature": 1.0, "max_new_tokens": 4, "stop_tokens": ()} | change))
    with pytest.raises(ConfigurationError) as error:
        _sampler(groups).generate([(_prompts(1)[0], 0)], sampling, 0, 0, 8)
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize("size", [0, 96, 200])
def test_prompt_that_leaves_no_room_is_refused(groups: Any, size: int) -> None:
    prompt = Prompt(id="abc", domain="d", messages=(), tokens=(1,) * size)
    with pytest.raises(ConfigurationError, match=rf"prompt abc .*{size} tokens.*max_sequence_length = 96"):
        _sampler(groups).generate([(prompt, 0)], SAMPLED, 0, 0, 8)


def test_models_that_cached_decoding_does_not_know_are_refused(groups: Any) -> None:
    sampler = _sampler(groups)
    request = (_prompts(1)[0], 0)
    sampler.model.position_embedding_type = "rope"
    with pytest.raises(ConfigurationError, match="position_embedding_type = 'rope'"):
        sampler.generate([request], SAMPLED, 0, 0, 8)
    sampler.model.position_embedding_type = "none"
    sampler.model.decoder.layers[1] = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match="not Identity"):
        sampler.generate([request], SAMPLED, 0, 0, 8)


def test_noise_is_uniform_and_independent() -> None:
    from megatron_mopd.drawing import row_keys, uniforms

    prompts = [Prompt(id=f"{i:064x}", domain="d", messages=(), tokens=(1,)) for i in range(200)]
    keys = row_keys(1, 2, [(p, s) for p in prompts for s in range(5)], torch.device("cpu"))
    assert len(keys.unique()) == 1000
    noise = torch.stack([uniforms(keys, position) for position in range(100)])  # [position, row]
    assert noise.min() >= 0 and noise.max() < 1
    # Kolmogorov-Smirnov distance of 100,000 draws: 1.95 / sqrt(n) is passed once in a thousand.
    ordered = noise.flatten().sort().values
    distance = (ordered - (torch.arange(1, ordered.numel() + 1) / ordered.numel())).abs().max()
    assert distance < 1.95 / math.sqrt(noise.numel())
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())
    # The definition in plain integers, so that noise stays the same on every machine and version.
    key = int(keys[3]) % 2**64
    x = (key + 6 * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    assert noise[5, 3].item() == ((x ^ (x >> 31)) >> 11) / 2**53


def draw_many(parallel: Parallel, temperature: float) -> dict[str, Any]:
    """On one rank: many draws from one peaked distribution whose padding columns would win."""
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd.drawing import Head

    groups = mopd_parallel.initialize(parallel, seed=42)
    width = 5  # per rank; of 10 columns 7 are valid, or of 20 columns 7: two ranks hold nothing but padding
    whole = torch.linspace(-2, 2, width * groups.tp_size).unsqueeze(1).repeat(1, 3)
    whole[7:] = 30.0
    head = Head(whole[groups.tp_rank * width :][:width], groups.tp, 7)
    noise = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # an even grid: frequencies are exact
    tokens, logprobs = head.draw(torch.full((20000, 3), 0.5), temperature, noise)
    logits = (whole[:7, 0] * 1.5).double()
    return {"tokens": tokens, "logprobs": logprobs, "expected": (logits / (temperature or 1.0)).log_softmax(0)}


@pytest.mark.parametrize(("world", "parallel"), [(2, Parallel(tensor=2)), (4, Parallel(tensor=4))], ids=["tp2", "tp4"])
def test_draws_follow_the_softmax_over_the_valid_vocabulary(ranks: Any, world: int, parallel: Parallel) -> None:
    results = ranks(world, draw_many, parallel, 0.7)
    for result in results:
        assert torch.equal(result["tokens"], results[0]["tokens"])
        assert torch.equal(result["logprobs"], results[0]["logprobs"])
        frequencies = torch.bincount(result["tokens"], minlength=7) / 20000
        assert len(frequencies) == 7
        torch.testing.assert_close(frequencies.double(), result["expected"].exp(), rtol=0, atol=1e-4)
        torch.testing.assert_close(result["logprobs"].double(), result["expected"][result["tokens"]], rtol=0, atol=1e-6)
    for result in ranks(world, draw_many, parallel, 0.0):
        assert set(result["tokens"].tolist()) == {6}
        torch.testing.assert_close(result["logprobs"][0].double(), result["expected"][6], rtol=0, atol=1e-6)


def test_edges_of_the_noise_never_reach_an_impossible_token(groups: Any) -> None:
    """Noise 0 and the largest below 1, with vanishing probabilities at both ends of the vocabulary."""
    from megatron_mopd.drawing import Head

    weight = torch.tensor([[-2000.0], [0.0], [1.0], [-2000.0], [50.0]])
    head = Head(weight, groups.tp, 4)
    noise = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = head.draw(torch.ones(2, 1), 1.0, noise)
    assert tokens.tolist() == [1, 2]
    assert logprobs.isfinite().all()
