"""Speculative decoding: greedy output token for token, the backbone's own distribution, rollback, acceptance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_mopd import parallel, student
from megatron_mopd.config import ConfigurationError, Model, Parallel
from megatron_mopd.decoding import Decoder
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt, Sampling
from megatron_mopd.rollout import Sampler, sampling_mode
from megatron_mopd.speculative import acceptance
from megatron_mopd.speculative.sampling import Completion, SpeculativeSampler

VOCAB = 3  # few tokens, so that a draft of chance is accepted now and then
PATTERNS = ["M*E/*E/*E", "M*-/M*", "*M*EM/*", "M-/-", "ME*-M/ME*-"]


def build(groups: Groups, pattern: str, vocab: int = VOCAB, sharp: float = 8.0, **layout: int) -> Any:
    """A drawn model whose backbone and MTP heads are surer of themselves than drawn ones are, and disagree."""
    settings = Model(pattern=pattern, max_sequence_length=64)
    model = student.build_model(settings, Parallel(**layout), groups, vocab)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("final_norm.weight", "final_layernorm.weight")):
                parameter.mul_(sharp)
    return model


def prompts(count: int, vocab: int = VOCAB, seed: int = 0) -> list[Prompt]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=g).tolist()
    drawn = [tuple(torch.randint(0, vocab, (n,), generator=g).tolist()) for n in lengths]
    domains = ("plain", "loud")
    return [Prompt(id=f"{seed}/{i}", domain=domains[i % 2], messages=(), tokens=t) for i, t in enumerate(drawn)]


def greedy(new: int, stops: tuple[int, ...] = ()) -> Sampling:
    return Sampling(temperature=0.0, max_new_tokens=new, stop_tokens=stops)


# ------------------------------------------------------------------ tentative reading


@pytest.mark.parametrize("pattern", ["M*E/*E", "M*-M/*", "MM/*", "*E*/*"])
def test_states_after_cutting_back_are_those_of_the_uncached_forward(groups: Groups, pattern: str) -> None:
    model = build(groups, pattern, vocab=50)
    g = torch.Generator().manual_seed(1)
    rows, width = 6, 7
    lengths = torch.tensor([7, 1, 3, 5, 2, 7])
    text = [torch.randint(0, 50, (int(n),), generator=g) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
    with sampling_mode(model):
        decoder = Decoder(model, prefill_tokens=14)
        whole = decoder.prefill_whole(padded, lengths, 30)
        assert whole is not None and whole.shape[:2] == (width, rows)
        for count in (3, 1, 5, 4):
            drafted = torch.randint(0, 50, (rows, count), generator=g)
            found = decoder.extend(drafted)
            if count == 5:  # read in two pieces, as a drafter does
                more = torch.randint(0, 50, (rows, 2), generator=g)
                again = decoder.extend(more)
                assert found is not None and again is not None
                drafted, found = torch.cat([drafted, more], 1), torch.cat([found, again])
            assert found is not None
            for row in range(rows):
                together = torch.cat([text[row], drafted[row]]).unsqueeze(0)
                expected = student.forward(model, together).hidden[len(text[row]) :, 0]
                torch.testing.assert_close(found[:, row], expected, rtol=1e-4, atol=1e-5)
            kept = torch.randint(0, drafted.shape[1] + 1, (rows,), generator=g)
            decoder.settle(kept)
            text = [torch.cat([t, d[:n]]) for t, d, n in zip(text, drafted, kept.tolist(), strict=True)]
        order = torch.tensor([4, 0, 3])
        decoder.keep(order)
        final = decoder.extend(torch.tensor([[1], [2], [3]]))
        assert final is not None
        for slot, row in enumerate(order.tolist()):
            together = torch.cat([text[row], torch.tensor([slot + 1])]).unsqueeze(0)
            expected = student.forward(model, together).hidden[-1, 0]
            torch.testing.assert_close(final[0, slot], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ greedy


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_output_is_that_of_plain_decoding_token_for_token(pattern: str) -> None:
    accepted: set[float] = set()
    for seed, draft, stops in ((1, 1, ()), (2, 2, (2,)), (3, 7, (2,)), (4, 7, ())):
        groups = parallel.initialize(Parallel(), seed)
        sampler = Sampler(build(groups, pattern), groups, 28, VOCAB, prefill_tokens=60)
        requests = [(prompt, 0) for prompt in prompts(20, seed=seed)]
        sampling = greedy(22, stops)  # the context ends some rows before their limit
        plain = sampler.generate(requests, sampling, 0, 0, batch_size=12)
        found = SpeculativeSampler(sampler, draft).generate(requests, sampling, 0, 0, batch_size=12)
        for rollout, completion in zip(plain, found, strict=True):
            assert torch.equal(rollout.completion, completion.tokens) and rollout.finish == completion.finish
            assert completion.prompt is rollout.prompt
        accepted |= {c.accepted for c in found if c.accepted is not None}
        parallel.destroy()
    assert min(accepted) < 1.5 < max(accepted) and len(accepted) > 5  # drafts fell and stood


def test_a_drafter_that_is_always_right_gives_its_whole_draft_and_one(groups: Groups) -> None:
    """With the last norms' weights at 0 the first token is the likeliest everywhere, for backbone and drafter."""
    sampler = Sampler(build(groups, "M*E/*E", sharp=0.0), groups, 64, VOCAB)
    for draft, new in ((2, 31), (7, 33)):
        (completion,) = SpeculativeSampler(sampler, draft).generate([(prompts(1)[0], 0)], greedy(new), 0, 0, 4)
        assert completion.tokens.tolist() == [0] * new
        assert completion.accepted == draft + 1 and completion.verifications == (new - 1) / (draft + 1)


def test_tokens_beyond_the_end_of_a_completion_do_not_count(groups: Groups) -> None:
    sampler = Sampler(build(groups, "M*E/*E", sharp=0.0), groups, 64, VOCAB)
    (completion,) = SpeculativeSampler(sampler, 7).generate([(prompts(1)[0], 0)], greedy(11), 0, 0, 4)
    assert (completion.verifications, completion.accepted) == (2, 5.0)  # 8 and 2 of the 8 that follow
    (stopped,) = SpeculativeSampler(sampler, 7).generate([(prompts(1)[0], 0)], greedy(11, (0,)), 0, 0, 4)
    assert stopped.tokens.tolist() == [0] and stopped.finish == "stop" and stopped.accepted is None


# ------------------------------------------------------------------ sampling


def exact(model: Any, prompt: Prompt, length: int, temperature: float, vocab: int) -> dict[tuple[int, ...], float]:
    """The probability of every completion of ``length`` tokens, from uncached forwards in fp64."""
    every = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    tokens = torch.cat([torch.tensor(prompt.tokens).expand(len(every), -1), every], dim=1)
    with sampling_mode(model):
        hidden = student.forward(model, tokens).hidden[len(prompt.tokens) - 1 : -1]
    logprobs = (hidden.double() @ model.output_layer.weight[:vocab].double().T / temperature).log_softmax(-1)
    chosen = logprobs.gather(2, every.t().unsqueeze(2)).squeeze(2).sum(0).exp()
    return {tuple(row): float(p) for row, p in zip(every.tolist(), chosen, strict=True)}


@pytest.mark.parametrize(("draft", "temperature"), [(2, 1.0), (3, 0.7)])
def test_sampled_completions_have_the_distribution_of_the_backbone(
    groups: Groups, draft: int, temperature: float
) -> None:
    """Pearson's chi-square over completions of 4 tokens, those expected less than 8 times taken together; the bound is
    its 99.9% quantile after Wilson and Hilferty."""
    vocab, length, size = 3, 4, 4000
    model = build(groups, "M*E/*E", vocab=vocab, sharp=1.5)
    sampler = Sampler(model, groups, 32, vocab)
    prompt = Prompt(id="p", domain="plain", messages=(), tokens=(0, 2, 1))
    expected = exact(model, prompt, length, temperature, vocab)
    assert sum(expected.values()) == pytest.approx(1) and max(expected.values()) > 2 / 81  # far from uniform
    sampling = Sampling(temperature=temperature, max_new_tokens=length, stop_tokens=())
    found = SpeculativeSampler(sampler, draft).generate([(prompt, i) for i in range(size)], sampling, 5, 0, size)
    drawn = [tuple(c.tokens.tolist()) for c in found]
    rounds = [c.verifications for c in found]
    assert len(set(rounds)) > 1  # some drafts stood, some fell
    cells: dict[Any, tuple[float, int]] = {}
    for text, p in expected.items():
        cell = text if size * p >= 8 else "rare"
        often, seen = cells.get(cell, (0.0, 0))
        cells[cell] = (often + size * p, seen + drawn.count(text))
    assert sum(seen for _, seen in cells.values()) == size and len(cells) > 15
    chi_square = sum((seen - often) ** 2 / often for often, seen in cells.values())
    share = 2 / (9 * (len(cells) - 1))
    assert chi_square < (len(cells) - 1) * (1 - share + 3.09 * share**0.5) ** 3


def test_a_drafted_completion_depends_on_its_own_noise_alone(groups: Groups) -> None:
    sampler = SpeculativeSampler(Sampler(build(groups, "M*E/*E"), groups, 40, VOCAB), 3)
    sampling = Sampling(temperature=1.0, max_new_tokens=20, stop_tokens=(2,))
    requests = [(prompt, k) for prompt in prompts(6) for k in range(2)]
    together = sampler.generate(requests, sampling, 1, 2, 12)
    apart = sampler.generate(requests[::-1], sampling, 1, 2, 5)[::-1]
    other = sampler.generate(requests, sampling, 1, 3, 18)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(together, apart, strict=True))
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(together, other, strict=True))


# ------------------------------------------------------------------ layouts and measurement


def on_a_layout(layout: dict[str, int], pattern: str, share: bool) -> tuple[list[Any], dict[str, Any]]:
    groups = parallel.initialize(Parallel(**layout), 1)
    sampler = Sampler(build(groups, pattern, vocab=6, **layout), groups, 48, 6)
    mine = prompts(9, vocab=6)
    own = [(p, 0) for p in mine[groups.dp_rank :: groups.dp_size]] if share else [(p, 0) for p in mine]
    texts: list[Any] = []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, max_new_tokens=14, stop_tokens=(5,))
        found: list[Completion] = SpeculativeSampler(sampler, 3).generate(own, sampling, 0, 0, 4)
        texts.append({c.prompt.id: (c.tokens.tolist(), c.finish, c.verifications) for c in found})
    sampling = Sampling(temperature=1.0, max_new_tokens=14, stop_tokens=(5,))
    return texts, acceptance.measure(sampler, mine, sampling, groups, 4, drafts=(2,), min_tokens=5)


@pytest.fixture(scope="module")
def alone(ranks: Any) -> tuple[list[Any], dict[str, Any]]:
    return ranks(1, on_a_layout, {}, "ME*E/*E", False)[0]


@pytest.mark.parametrize(
    ("world", "layout", "pattern"),
    [
        (2, {"tensor": 2}, "ME*E/*E"),
        (2, {"expert": 2}, "ME*E/*E"),
        (2, {"pipeline": 2}, "ME|*E/*E"),
        pytest.param(4, {"tensor": 2, "expert": 2}, "ME*E/*E", marks=pytest.mark.slow),
    ],
    ids=["tp2", "ep2", "pp2", "tp2ep2"],
)
def test_completions_and_acceptance_are_the_same_on_every_layout(
    ranks: Any, alone: Any, world: int, layout: dict[str, int], pattern: str
) -> None:
    expected, measured = alone
    together: list[dict[str, Any]] = [{}, {}]
    for texts, found in ranks(world, on_a_layout, layout, pattern, True):
        assert found == measured
        for known, own in zip(together, texts, strict=True):
            known |= own
    assert together == expected


def test_acceptance_leaves_short_completions_out_and_pairs_the_rest(groups: Groups) -> None:
    model = build(groups, "M*E/*E")
    sampler, held_out = Sampler(model, groups, 64, VOCAB), prompts(16)
    sampling = Sampling(temperature=1.0, max_new_tokens=16, stop_tokens=(2,))
    before = acceptance.measure(sampler, held_out, sampling, groups, 16, min_tokens=6)
    assert list(before) == ["draft_2", "draft_7"] and list(before["draft_2"]) == ["greedy", "temperature_1"]
    long = [len(r.completion) >= 6 for r in sampler.generate([(p, 0) for p in held_out], greedy(16, (2,)), 0, -1, 16)]
    for modes in before.values():
        assert [value is not None for value in modes["greedy"]["by_prompt"]] == long and 1 < sum(long) < 16
        domains = modes["greedy"]["domains"]
        assert sum(entry["completions"] for entry in domains.values()) == sum(long)
        kept = [value for value in modes["greedy"]["by_prompt"] if value is not None]
        assert modes["greedy"]["length"] == pytest.approx(sum(kept) / len(kept)) and min(kept) >= 1
    none = acceptance.measure(sampler, held_out[:3], sampling, groups, 4, drafts=(2,), min_tokens=50)
    assert none["draft_2"]["greedy"]["length"] is None
    raised = {
        d: {m: {"by_prompt": [v and v + 1 + 0.1 * i for i, v in enumerate(e["by_prompt"])]} for m, e in modes.items()}
        for d, modes in before.items()
    }
    found = acceptance.gains(before, raised)["draft_7"]["greedy"]
    low, high = found["interval"]
    added = [1 + 0.1 * i for i, counted in enumerate(long) if counted]
    assert found["prompts"] == sum(long) and found["gain"] == pytest.approx(sum(added) / len(added))
    assert low < found["gain"] < high
    assert acceptance.gains(before, before)["draft_2"]["greedy"]["gain"] == 0
    with pytest.raises(ValueError, match="15 after"):
        acceptance.gains(before, {d: {m: {"by_prompt": [1.0] * 15} for m in modes} for d, modes in before.items()})


def test_what_cannot_draft_is_refused(groups: Groups) -> None:
    sampler = Sampler(build(groups, "M*E"), groups, 40, VOCAB)
    with pytest.raises(ConfigurationError, match="the model has 0 MTP blocks"):
        SpeculativeSampler(sampler, 2).generate([(prompts(1)[0], 0)], greedy(4), 0, 0, 1)
    with pytest.raises(ConfigurationError, match="draft = 0"):
        SpeculativeSampler(sampler, 0)
