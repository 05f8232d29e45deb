"""Each guard is made to fire on purpose, on rollouts built for it and in a real run; others stay quiet."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import stage

from megatron_mopd import guard_config, guard_measures, parallel, replay, rollout_view, shards
from megatron_mopd.config import Parallel, build_config
from megatron_mopd.guards import NAMES, GuardError, Guards, Item, dropped
from megatron_mopd.metrics import read, untimed
from megatron_mopd.records import Prompt, Rollout, ScoredRollout
from megatron_mopd.settings import ConfigurationError, overlay
from megatron_mopd.train import run_stage
from megatron_mopd.trainer import Trainer

OFF = {name: {"action": "off"} for name in NAMES}


def settings(**given: Any) -> guard_config.Guards:
    """Only the guards that are named."""
    named = {name: {"action": "warn", **value} if name in OFF else value for name, value in given.items()}
    return guard_config.Guards.model_validate(overlay(OFF, named))


def guards_of(
    given: guard_config.Guards, tmp_path: Path, domains: Sequence[str] = ("a", "b"), lag: int = 0, scored: bool = True
) -> Guards:
    return Guards(given, domains, scored=scored, lag=lag, group=None, device=torch.device("cpu"), checkpoints=tmp_path)


def rollout(
    domain: str = "a",
    completion: Sequence[int] = (1, 2, 3, 4),
    finish: Any = "stop",
    logprob: float = -1.0,
    teacher: Sequence[float] | None = None,
) -> ScoredRollout:
    n = len(completion)
    plain = Rollout(
        prompt=Prompt(id="p", domain=domain, messages=(), tokens=(7,)),
        sample=0,
        completion=torch.tensor(completion),
        finish=finish,
        behav_logprobs=torch.full((n,), logprob),
    )
    values = torch.tensor(teacher) if teacher is not None else logprob - 0.5 - torch.arange(n) / n
    return ScoredRollout(rollout=plain, teacher="t", teacher_logprobs=values.float())


# --------------------------------------------------------------------------- what is measured


def repeated_by_definition(tokens: Sequence[int], n: int) -> int:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return sum(
        any(grams.count(grams[i]) > 1 for i in range(max(0, t - n + 1), min(t + 1, len(grams))))
        for t in range(len(tokens))
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 100_000])
def test_repeated_tokens_are_those_of_the_definition(n: int, vocabulary: int) -> None:
    g = torch.Generator().manual_seed(n)
    lengths = (0, 1, n, n, n + 1, 3 * n, 0, 60, 2)
    completions = [torch.randint(0, vocabulary, (length,), generator=g) for length in lengths]
    found = guard_measures.repeated_tokens(completions, n).tolist()
    assert found == [repeated_by_definition(tokens.tolist(), n) for tokens in completions]
    assert found == [int(guard_measures.repeated_tokens([tokens], n)) for tokens in completions]


def test_a_loop_is_all_repetition_and_prose_is_none() -> None:
    assert guard_measures.repeated_tokens([torch.tensor([5, 6, 7] * 20), torch.arange(1000)], 8).tolist() == [60, 0]
    assert not guard_measures.repeated_tokens([torch.arange(9)] * 5, 8).any()  # what others say too is no repetition
    assert guard_measures.repeated_tokens([], 8).tolist() == []


def test_measures_are_those_of_all_tokens_of_a_domain() -> None:
    rollouts = [
        rollout("a", (1, 2), logprob=-1.0, teacher=(-1.5, -3.0)),
        rollout("a", (3,) * 6, "length", logprob=-2.0, teacher=(-2.0,) * 6),
        rollout("b", (1,), logprob=-4.0, teacher=(-1.0,)),
    ]
    found = guard_measures.measure(rollouts, ("a", "b", "c"), lambda domain: 3, lambda sums, extremes: None)
    a, b, c = found["a"], found["b"], found["c"]
    assert (a.rollouts, a.length, a.repetition, a.truncation) == (2, 4.0, 6 / 8, 0.5)
    assert (a.entropy, a.gap, a.spread) == (14 / 8, 2.5 / 8, 1.5)
    assert (b.gap, b.spread, b.mute) == (3.0, 0.0, False)  # of one token nothing can be said
    assert (c.rollouts, c.entropy, c.gap, c.mute) == (0, None, None, False)  # nothing was asked of its teacher


# --------------------------------------------------------------------------- each guard by itself

HEALTHY = [rollout("a"), rollout("b")]
FIRES: dict[str, tuple[dict[str, Any], list[ScoredRollout], float]] = {
    "length": ({"threshold": 2.0}, [rollout("a", range(9)), rollout("a", range(2, 18))], 12.5 / 4),
    "repetition": ({"threshold": 0.5}, [rollout("a", (5, 6) * 20)], 1.0),
    "truncation": ({"threshold": 0.5}, [rollout("a", finish="length")], 1.0),
    "entropy": ({"threshold": 0.1}, [rollout("a", logprob=-0.05)], 0.05),
    "silence": ({"threshold": 0.01}, [rollout("a", teacher=(-1.0,) * 4)], 0.0),
}


def feed(guards: Guards, steps: int, rollouts: Sequence[Item], first: int = 1, **row: float) -> list[Any]:
    """Some steps on the same rollouts: what was admitted and what was reviewed."""
    return [
        (guards.admit(rollouts, step), guards.review({f"x/{k}": v for k, v in row.items()}))
        for step in range(first, first + steps)
    ]


@pytest.mark.parametrize("name", FIRES)
def test_each_guard_fires_after_its_patience_and_is_said_once_a_crossing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    given, bad, value = FIRES[name]
    guards = guards_of(settings(reference_steps=2, **{name: {"patience": 3, **given}}), tmp_path)
    with caplog.at_level(logging.WARNING):
        feed(guards, 4, HEALTHY)
        feed(guards, 2, [*bad, rollout("b")], 5)
        assert not caplog.records
        _, row = feed(guards, 3, [*bad, rollout("b")], 7)[-1]
        assert len(caplog.records) == 1
        feed(guards, 1, HEALTHY, 10)
        feed(guards, 4, [*bad, rollout("b")], 11)
        assert len(caplog.records) == 2
    message = caplog.records[0].getMessage()
    assert f"guard {name} of domain 'a'" in message and f"guards.{name}.threshold = {given['threshold']:g}" in message
    assert "at step 7" in message and "since step 5" in message
    assert row[f"guard/{name}/a"] == pytest.approx(value)
    assert set(row) == {f"guard/{name}/a", f"guard/{name}/b"}
    assert not any(dropped(item) for item in guards.admit([*bad, *HEALTHY], 15))


@pytest.mark.parametrize("name", FIRES)
def test_drop_takes_the_rollouts_at_fault_alone(tmp_path: Path, name: str) -> None:
    given, bad, _ = FIRES[name]
    guards = guards_of(settings(reference_steps=1, **{name: {"patience": 2, "action": "drop", **given}}), tmp_path)
    feed(guards, 1, HEALTHY)
    mixed = [*bad, *bad, rollout("a"), rollout("b")] if name == "repetition" else [*bad, rollout("b")]
    (one, _), (two, row) = feed(guards, 2, mixed, 2)
    assert not any(map(dropped, one))
    wanted = [name] * len(bad) * (2 if name == "repetition" else 1)
    assert [dropped(item) for item in two] == wanted + [None] * (len(mixed) - len(wanted))
    assert row["guard/dropped/a"] == len(wanted) and row["guard/dropped/b"] == 0
    assert [item.rollout.completion.tolist() for item in two] == [item.rollout.completion.tolist() for item in mixed]
    assert not any(map(dropped, guards.admit(HEALTHY, 4)))


def saved(directory: Path, *steps: int) -> None:
    """Checkpoints, as far as guards look at them."""
    for step in steps:
        whole = directory / f"iter_{step:07d}"
        whole.mkdir()
        (whole / ".metadata").touch()
        (whole / "metadata.json").touch()


STOPS = {**{name: (given, bad) for name, (given, bad, _) in FIRES.items()}, "masked": ({"threshold": 0.4}, HEALTHY)}


def stop(guards: Guards, bad: Sequence[Item], first: int, masked: float = 0.0) -> str:
    """What the guard says that ends the run in the second of two bad steps."""
    row = {f"importance/masked_frac/{domain}": masked if domain == "a" else 0.0 for domain in ("a", "b")}
    guards.admit([*bad, rollout("b")], first)
    guards.review(row)
    with pytest.raises(GuardError) as stopped:
        guards.admit([*bad, rollout("b")], first + 1)
        guards.review(row)
    return str(stopped.value)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("name", STOPS)
def test_stop_names_what_happened_and_where_to_go_on(tmp_path: Path, name: str, lag: int) -> None:
    """The update that makes step 7 learns from what the weights of step 6 - lag drew."""
    given, bad = STOPS[name]
    own = {name: {"patience": 2, "action": "stop", **given}}
    guards = guards_of(settings(reference_steps=1, **own), tmp_path, lag=lag)
    feed(guards, 6, HEALTHY)
    saved(tmp_path, *range(1, 8))
    text = stop(guards, bad, 7, masked=0.9)
    for part in (f"guard {name} of domain 'a'", "at step 8", "since step 7", "threshold = ", "drop or warn"):
        assert part in text
    # Of a teacher that falls silent and of masks the weights that drew are innocent.
    good = 6 if name in ("silence", "masked") else 6 - lag - 1
    away = ", ".join(f"iter_{step:07d}" for step in range(good + 1, 8))
    assert f"last good checkpoint is {tmp_path / f'iter_{good:07d}'}, for the weights of step {good + 1}" in text
    assert f"take {away} away and the same command goes on from it" in text


def test_of_several_reasons_the_earliest_weights_decide_and_a_good_newest_stays(tmp_path: Path) -> None:
    given = {"patience": 2, "action": "stop"}
    both = settings(silence={"threshold": 0.01, "reference": 1.0, **given}, truncation={"threshold": 0.5, **given})
    mute = rollout("a", finish="length", teacher=(-1.0,) * 4)
    saved(tmp_path, 1, 2)
    text = stop(guards_of(both, tmp_path), [mute], 4)
    assert "guard silence" in text and "guard truncation" in text
    assert f"last good checkpoint is {tmp_path / 'iter_0000002'}, from which the same command goes on" in text
    text = stop(guards_of(both, tmp_path, lag=1), [mute], 4)
    assert f"last good checkpoint is {tmp_path / 'iter_0000001'}, for the weights of step 2 and later" in text
    assert "take iter_0000002 away" in text
    # While there are no older weights the first ones draw, and no checkpoint is before them.
    text = stop(guards_of(both, tmp_path, lag=5), [mute], 4)
    assert f"{tmp_path} holds no good checkpoint of this run, for the first weights may be at fault" in text
    assert "take iter_0000001, iter_0000002 away and the same command starts from its beginning" in text


def test_masked_is_read_off_the_update_and_drop_pauses_the_domain_for_a_step(tmp_path: Path) -> None:
    guards = guards_of(settings(masked={"threshold": 0.4, "patience": 2, "action": "drop"}), tmp_path)
    seen = []
    for step in range(1, 9):
        admitted = guards.admit(HEALTHY, step)
        seen.append([dropped(item) for item in admitted] == ["masked", None])
        shares = {f"importance/masked_frac/{d}": s for d, s in (("a", 0.5), ("b", 0.0))}
        row = guards.review({k: v for k, v in shares.items() if not (seen[-1] and k.endswith("a"))})
        assert ("guard/masked/a" in row) != seen[-1]
    assert seen == [False, False, True, False, False, True, False, False]
    stopping = guards_of(settings(masked={"threshold": 0.4, "patience": 1, "action": "stop"}), tmp_path)
    stopping.admit(HEALTHY, 1)
    with pytest.raises(GuardError, match=r"guard masked of domain 'b': 90\.0% of the tokens are masked at step 1"):
        stopping.review({"importance/masked_frac/a": 0.1, "importance/masked_frac/b": 0.9})


def test_entropy_is_exact_where_the_objective_measures_it(tmp_path: Path) -> None:
    guards = guards_of(settings(reference_steps=1, entropy={"threshold": 0.5, "patience": 1}), tmp_path, ("a",))
    guards.admit([rollout("a", logprob=-9.0)], 1)
    assert guards.review({"entropy/a": 2.0}) == {}  # the reference
    guards.admit([rollout("a", logprob=-9.0)], 2)
    assert guards.review({"entropy/a": 1.5}) == {"guard/entropy/a": 0.75}
    guards.admit([rollout("a", logprob=-9.0)], 3)
    assert guards.review({"entropy/b": 1.5}) == {}  # none of its tokens met the update


SILENT: dict[str, tuple[list[Item], str]] = {
    "none scored": ([rollout("a").rollout, rollout("b")], "no token of its rollouts (1) was scored"),
    "constant": ([rollout("a", teacher=(-4.615,) * 4), rollout("b")], "the same log-probability to every token"),
    "own": ([rollout("a", teacher=(-1.000001,) * 4), rollout("b")], "are the student's own"),
    "faint": ([rollout("a", teacher=(-1.002, -1.003, -1.0, -1.002)), rollout("b")], "as far from the student's"),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_teacher_is_silent_in_each_of_these_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    rollouts, said = SILENT[kind]
    given = {"threshold": 0.01, "patience": 4, "reference": 1.0}
    guards = guards_of(settings(silence=given), tmp_path)
    with caplog.at_level(logging.WARNING):
        feed(guards, 4, rollouts)
    (record,) = caplog.records
    assert "guard silence of domain 'a'" in record.getMessage() and said in record.getMessage()
    unscored = guards_of(settings(silence=given), tmp_path, ("a",), scored=False)
    assert feed(unscored, 9, [rollout("a").rollout])[-1][1] == {}  # a run without teachers expects none


def test_a_domain_that_was_not_drawn_accuses_no_teacher_and_keeps_its_count(tmp_path: Path) -> None:
    given = {"threshold": 0.01, "patience": 3, "reference": 1.0, "action": "stop"}
    guards = guards_of(settings(silence=given), tmp_path)
    mute = [rollout("a", teacher=(-1.0,) * 4), rollout("b")]
    feed(guards, 2, mute)
    for _, row in feed(guards, 20, [rollout("b")], 3):
        assert set(row) == {"guard/silence/b"}
    with pytest.raises(GuardError, match=r"domain 'a'.* at step 23; .* is crossed since step 1 \(patience 3\)"):
        guards.admit(mute, 23)


def test_nothing_left_to_learn_from_ends_the_run(tmp_path: Path) -> None:
    guards = guards_of(settings(truncation={"action": "drop", "patience": 1}), tmp_path, ("a",))
    with pytest.raises(GuardError, match=r"none of the 2 rollouts of step 1.*truncation of a.*No checkpoint"):
        guards.admit([rollout("a", finish="length")] * 2, 1)


def test_a_value_that_is_no_number_is_beyond_every_threshold(tmp_path: Path) -> None:
    given = {"threshold": 0.5, "patience": 1, "reference": 1.0, "action": "stop"}
    guards = guards_of(settings(entropy=given), tmp_path, ("a",))
    guards.admit([rollout("a")], 1)
    with pytest.raises(GuardError, match="entropy is nan"):
        guards.review({"entropy/a": math.nan})


def test_state_goes_through_json_and_a_resumed_guard_fires_in_the_same_step(tmp_path: Path) -> None:
    given = settings(reference_steps=2, length={"patience": 3, "action": "drop"}, entropy={}, silence={}, masked={})
    whole, first = guards_of(given, tmp_path), guards_of(given, tmp_path)
    long = [rollout("a", range(30)), rollout("b")]
    feed(whole, 3, HEALTHY)
    expected = feed(whole, 4, long, 4)
    feed(first, 3, HEALTHY)
    found = feed(first, 2, long, 4)
    second = guards_of(given, tmp_path)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += feed(second, 2, long, 6)
    assert [row for _, row in found] == [row for _, row in expected]
    assert [[dropped(i) for i in items] for items, _ in found] == [[dropped(i) for i in items] for items, _ in expected]
    assert dropped(found[-1][0][0]) == "length"


# --------------------------------------------------------------------------- settings


def test_a_domains_settings_lie_over_the_common_ones() -> None:
    given = guard_config.Guards.model_validate(
        {
            "length": {"threshold": 3.0, "patience": 7},
            "domains": {"a": {"length": {"action": "stop"}, "masked": {"action": "drop"}}},
        }
    )
    own = given.of("a").length
    assert (own.threshold, own.patience, own.action) == (3.0, 7, "stop")
    assert given.of("a").masked.action == "drop" and given.drops
    assert (given.of("b").length.action, given.of("b").masked.action) == ("warn", "warn")
    assert not guard_config.Guards().drops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": {}}, "guards.lengths: unknown key; did you mean 'length'"),
        ({"length": {"action": "halt"}}, "guards.length.action: 'halt'"),
        ({"domains": {"a": {"truncation": {"threshold": 2}}}}, "guards.domains.a.truncation.threshold: 2"),
        ({"domains": {"nowhere": {}}}, "guards.domains.nowhere: no such domain"),
        ({"teacher_timeout": 0}, "guards.teacher_timeout: 0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(groups: Any, tmp_path: Path, change: Any, message: str) -> None:
    dataset = {
        "source": {"type": "dataset"},
        "objective": {"type": "cross_entropy"},
        "batching": {"sequences_per_step": 4},
    }
    with pytest.raises(ConfigurationError, match=message):
        Trainer(build_config(tree(tmp_path, guards=change, **dataset) | {"teachers": {}}), groups)


# --------------------------------------------------------------------------- a real run


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    """A MOPD stage of seconds; teachers are named by whoever needs them."""
    own = {
        "run": {"steps": 4, "id": "run"},
        "rollout": {"prompts_per_step": 8},
        "teachers": {
            "first": {"checkpoint": str(directory / "first" / "checkpoints"), "domains": ["plain"]},
            "second": {"checkpoint": str(directory / "second" / "checkpoints"), "domains": ["loud"]},
        },
    }
    return stage(directory / "run", own, changes)


def school(directory: Path, groups: Any) -> None:
    """Two teachers of random weights that differ."""
    for seed, name in enumerate(("first", "second")):
        own = tree(directory, run={"dir": str(directory / name), "seed": 100 + seed})
        own |= {"teachers": {}, "source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
        own["batching"] |= {"sequences_per_step": 4}
        Trainer(build_config(own), dataclasses.replace(groups, seed=100 + seed)).save()


@pytest.fixture
def taught(groups: Any, tmp_path: Path) -> Path:
    school(tmp_path, groups)
    return tmp_path


def test_a_run_stops_with_the_last_good_checkpoint_and_saves_nothing_new(groups: Any, taught: Path) -> None:
    change = {"truncation": {"threshold": 0.1, "patience": 3, "action": "stop"}}
    kept = {"checkpoint": {"every": 1, "keep": 9}, "rollout": {"shards": 9}}
    config = build_config(tree(taught, guards={"domains": {"plain": change}}, **kept))
    crossed = r"guards\.domains\.plain\.truncation\.threshold = 0\.1 .* since step 1"
    with pytest.raises(GuardError, match=crossed) as stopped:
        run_stage(config, groups)
    assert f"python tools/show_rollout.py {taught / 'run'} --step 3" in str(stopped.value)
    run = taught / "run"
    assert [p.name for p in sorted((run / "checkpoints").glob("iter_*"))] == ["iter_0000001", "iter_0000002"]
    rows = read(run)
    assert [row["step"] for row in rows] == [1, 2]  # the row of the step that was stopped is not a step of the run
    assert rows[0]["guard/truncation/plain"] > 0.1 and "guard/truncation/loud" in rows[0]
    assert not (run / "result.json").exists()
    # What it stopped at can be looked at; there is no update of it to repeat, and a run that goes on replaces it.
    shard = shards.read(run / shards.FOLDER, 3)
    assert shards.steps(run / shards.FOLDER) == [1, 2, 3] and len(shard.rollouts) == 8
    assert "guard truncation of domain 'plain'" in shard.header["stopped"] and shard.header["policy"]["step"] == 2
    (why,) = {reason for kept in shard.rollouts for reason in rollout_view.of(kept, str).uncounted}
    assert why == "a guard stopped the run before the update"
    kept = shard.rollouts[0]
    assert isinstance(kept.item, ScoredRollout) and kept.item.rollout.behav_logprobs is not None
    gaps = kept.item.teacher_logprobs - kept.item.rollout.behav_logprobs
    assert rollout_view.of(kept, str).advantages == tuple(gaps.tolist()) and gaps.abs().min() > 0
    with pytest.raises(ConfigurationError, match="before the update of step 3, so there is nothing to repeat"):
        replay.replay(config, groups, 3)
    run_stage(config.model_copy(update={"guards": guard_config.Guards()}), groups)
    again = shards.read(run / shards.FOLDER, 3)
    assert shards.steps(run / shards.FOLDER) == [1, 2, 3, 4] and "stopped" not in again.header
    assert all(kept.per_token and kept.dropped is None for kept in again.rollouts)
    drawn = [[shards.rollout(kept).completion.tolist() for kept in one.rollouts] for one in (shard, again)]
    assert drawn[0] == drawn[1]


def test_dropped_rollouts_leave_the_update_and_its_denominator(groups: Any, taught: Path) -> None:
    """The update on what guards left is the one on a batch that never had the rest."""
    cut = {"domains": {"plain": {"truncation": {"threshold": 0.1, "patience": 1, "action": "drop"}}}}
    trainers = [Trainer(build_config(tree(taught, guards=g)), groups) for g in (cut, {})]
    collected = trainers[0].feed.take(trainers[0].policy)
    assert any(item.rollout.finish == "length" for item in collected if isinstance(item, ScoredRollout))
    marked = trainers[0].guards.admit(collected, 1)
    left = [item for item in marked if dropped(item) is None]
    assert 0 < len(left) < len(collected) and {dropped(item) for item in marked} == {"truncation", None}
    one, two = trainers[0].learn(marked)[0], trainers[1].learn(left)[0]
    shared = {k: v for k, v in untimed(one).items() if not k.startswith("rollout/")}
    assert shared == {k: v for k, v in untimed(two).items() if not k.startswith("rollout/")}
    assert one["rollout/sequences"] == len(collected)  # what was sampled is measured whole
    a, b = (dict(t.learner.module.named_parameters()) for t in trainers)
    assert all(torch.equal(a[name], b[name]) for name in a)


def drop_on(root: Path, minibatches: int) -> dict[str, Any]:
    """A run in which a whole domain is dropped, which on two ranks with two prompts leaves some of them nothing."""
    groups = parallel.initialize(Parallel(), 7)
    always = {"threshold": 1e9, "reference": 1.0, "patience": 1, "action": "drop"}
    config = build_config(
        tree(
            root,
            run={"dir": str(root / f"run{groups.world_size}{minibatches}")},
            rollout={"prompts_per_step": 2, "max_new_tokens": 5},
            objective={"type": "mopd", "minibatches": minibatches},
            guards={"domains": {"plain": {"silence": always}}},
        )
    )
    trainer = Trainer(config, groups)
    rows: list[Any] = []
    kept: list[int] = []
    learn = trainer.learn
    trainer.learn = lambda rollouts: kept.append(sum(dropped(i) is None for i in rollouts)) or learn(rollouts)
    trainer.run(lambda step, row: rows.append(untimed(row)))
    state = {name: p.detach().clone() for name, p in trainer.learner.module.named_parameters()}
    return {"rows": rows, "weights": state, "state": trainer.guards.state_dict(), "kept": kept}


@pytest.fixture(scope="module")
def shared_school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guards")
    ranks(1, school_on_a_rank, root)
    return root


def school_on_a_rank(root: Path) -> None:
    school(root, parallel.initialize(Parallel(), 0))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_ranks_decide_alike_and_one_may_be_left_without_tokens(
    ranks: Any, shared_school: Path, minibatches: int
) -> None:
    (single,) = ranks(1, drop_on, shared_school, minibatches)
    pair = ranks(2, drop_on, shared_school, minibatches)
    assert pair[0]["rows"] == pair[1]["rows"] and pair[0]["state"] == pair[1]["state"]
    for row, alone in zip(pair[0]["rows"], single["rows"], strict=True):
        assert row["guard/dropped/plain"] == alone["guard/dropped/plain"] and row["guard/dropped/loud"] == 0
        for name in alone:
            assert row[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    assert all(row["guard/dropped/plain"] for row in single["rows"]) and all(single["kept"])
    assert 0 in pair[0]["kept"] + pair[1]["kept"]
    for name, value in single["weights"].items():
        torch.testing.assert_close(pair[0]["weights"][name], value, rtol=1e-3, atol=1e-4)


def test_guards_that_warn_change_no_digit_and_guards_that_drop_resume_bit_for_bit(groups: Any, taught: Path) -> None:
    def run(name: str, guards: dict[str, Any], stop: int | None = None) -> tuple[list[Any], dict[str, Any]]:
        config = build_config(tree(taught, run={"dir": str(taught / name)}, guards=guards, checkpoint={"every": 2}))
        rows: list[Any] = []
        for last in (stop, None) if stop else (None,):
            trainer = Trainer(config, groups)
            trainer.resume()
            rows = [row for row in rows if row["step"] <= trainer.step_index]

            def report(step: int, row: Any, last: int | None = last, rows: list[Any] = rows) -> None:
                rows.append({"step": step} | untimed(row))
                if step == last:
                    raise KeyboardInterrupt

            try:
                trainer.run(report)
            except KeyboardInterrupt:
                continue
            state = {n: p.detach().clone() for n, p in trainer.learner.module.named_parameters()}
        return rows, state

    def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
        return all(torch.equal(one[name], two[name]) for name in one)

    off, weights = run("off", OFF)
    warned, also = run("warned", {})
    assert same(weights, also)
    assert [{k: v for k, v in row.items() if not k.startswith("guard/")} for row in warned] == off
    cut = {"truncation": {"threshold": 0.2, "patience": 2, "action": "drop"}}
    given = {"domains": {"plain": cut}}
    whole, one = run("whole", given)
    again, two = run("again", given, stop=3)
    assert whole == again and same(one, two) and not same(one, weights)
    assert [row["guard/dropped/plain"] > 0 for row in whole] == [False, True, True, True]
