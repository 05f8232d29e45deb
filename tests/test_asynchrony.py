"""Rollouts and scores from worlds of their own: the same bits as inline, bounded waits, refused damage."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from small_stages import stage, task, taught, teach

from megatron_mopd import in_flight, parallel, presets, train
from megatron_mopd.asynchrony import contract, signs
from megatron_mopd.asynchrony.directory import Exchange
from megatron_mopd.asynchrony.rollout_world import RolloutWorld
from megatron_mopd.asynchrony.scoring_world import ScoringWorld
from megatron_mopd.asynchrony.waiting import alive, on_first
from megatron_mopd.asynchrony.world import Job, World
from megatron_mopd.asynchrony.worlds_feed import of_training
from megatron_mopd.checkpoint import CheckpointError, read_manifest
from megatron_mopd.config import Asynchrony, Config, ConfigurationError, Parallel, build_config
from megatron_mopd.metrics import read, untimed
from megatron_mopd.parallel import Groups
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling
from megatron_mopd.settings import overlay
from megatron_mopd.sources import RolloutSource
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.trainer import Trainer


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    own = {
        "run": {"id": "same", "steps": 4},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6},
        "batching": {"micro_batch_size": 8},
        "optimizer": {"lr": 3e-3},
        "asynchrony": {"silence_s": 20.0, "standstill_s": 60.0},
    }
    return stage(directory, own, changes)


def teach_on_a_rank(root: Path) -> dict[str, Any]:
    """A student's start and a teacher; what a MOPD stage adds to the tree to use them."""
    teach(root, tree, base=1, expert=4)
    return taught(root, "base", expert=["plain", "loud"])


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, teach_on_a_rank, tmp_path_factory.mktemp("school"))[0]


WORLDS = {"asynchrony": {"mode": "worlds"}}


def of(directory: Path, school: dict[str, Any], *changes: dict[str, Any], steps: int = 4) -> Config:
    settings = overlay(school, {"run": {"dir": str(directory), "steps": steps}})
    for change in changes:
        settings = overlay(settings, change)
    return build_config(tree(directory, **settings))


class Outcome:
    """What became of the worlds beside the training."""

    def __init__(self) -> None:
        self.errors: dict[str, BaseException | None] = {}


@contextmanager
def beside(config: Config, groups: Groups, *kinds: type[World]) -> Iterator[Outcome]:
    """Worlds in threads of this process: of one rank each, so their collectives meet nobody."""
    outcome, threads = Outcome(), []
    for kind in kinds or (RolloutWorld, ScoringWorld):
        world = kind(config, groups)

        def run(world: World = world) -> None:
            try:
                world.run()
                outcome.errors[world.name] = None
            except Exception as error:
                outcome.errors[world.name] = error

        threads.append(threading.Thread(target=run, daemon=True))
    for thread in threads:
        thread.start()
    yield outcome
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.learner.module.named_parameters()}


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    with trainer.feed:
        return [untimed(trainer.step()) for _ in range(count)]


@pytest.mark.parametrize("lag", [0, 2])
def test_worlds_give_the_bits_of_the_inline_run(
    school: dict[str, Any], groups: Groups, tmp_path: Path, lag: int
) -> None:
    changes = {"rollout": {"lag": lag}}
    inline = Trainer(of(tmp_path / "inline", school, changes), groups)
    expected = steps(inline, 4)
    config = of(tmp_path / "worlds", school, changes, WORLDS)
    joined = Trainer(config, groups)
    with beside(config, groups) as outcome:
        found = steps(joined, 4)
    assert found == expected and all(row["grad_norm"] > 0 for row in found)
    for name, value in weights(inline).items():
        assert torch.equal(value, weights(joined)[name]), name
    assert outcome.errors == {"rollout": None, "scoring": None}


def test_training_reads_what_the_scoring_world_holds_to_measure_and_for_nothing_else(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    held_out = {"data": {"held_out": [task("plain", "held_out", 4)]}}
    inline = Trainer(of(tmp_path / "inline", school, held_out), groups)
    joined = Trainer(of(tmp_path / "worlds", school, held_out, WORLDS), groups)
    assert inline.teachers is not None and joined.teachers is not None
    assert joined.teachers.ids == inline.teachers.ids and not joined.teachers._weights
    measured = joined.measure(4)
    assert measured == inline.measure(4) and measured["reverse_kl"] and joined.teachers._weights


def test_a_teacher_that_says_not_who_it_is_is_refused_where_nobody_reads_it(
    school: dict[str, Any], groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(school["teachers"]["expert"]["checkpoint"], copy)
    (manifest,) = copy.glob("*/mopd_manifest.json")
    tree = json.loads(manifest.read_text())
    del tree["checkpoint_id"]
    manifest.write_text(json.dumps(tree))
    moved = {"teachers": {"expert": {"checkpoint": str(copy)}}}
    config = of(tmp_path / "run", school, moved, WORLDS)
    with pytest.raises(ConfigurationError, match=r"teachers.expert.checkpoint = .*lacks checkpoint_id.*scoring world"):
        Trainer(config, groups)
    with caplog.at_level(logging.INFO, logger="megatron_mopd"):  # the way out, as the message says it
        pool = TeacherPool(config, groups, build_tokenizer(config.tokenizer))
    (said,) = re.findall(r"teacher expert: ([0-9a-f]{64}) from", caplog.text)
    manifest.write_text(json.dumps(tree | {"checkpoint_id": said}))
    found = Trainer(config, groups).teachers
    assert found is not None and found.ids == pool.ids


def test_a_run_goes_on_from_its_checkpoint_in_any_mode(school: dict[str, Any], groups: Groups, tmp_path: Path) -> None:
    """Killed after step 2, with batches on their way: the worlds follow the new start; or there are none any more."""
    changes = {"rollout": {"lag": 2}, "checkpoint": {"every": 2}}
    whole = Trainer(of(tmp_path / "whole", school, changes), groups)
    expected = steps(whole, 4)
    config = of(tmp_path / "killed", school, changes, WORLDS)
    with beside(config, groups) as outcome:
        first = Trainer(config, groups)
        rows = [untimed(first.step()) for _ in range(2)]
        first.save()
        assert len(first.feed.in_flight) == 2
        first.step()  # its sign never says that it ended
        again = Trainer(config, groups)
        assert again.resume() and again.step_index == 2 and len(again.feed.in_flight) == 2
        rows += steps(again, 2)
    assert rows == expected and outcome.errors == {"rollout": None, "scoring": None}
    inline = Trainer(of(tmp_path / "killed", school, changes), groups)
    assert inline.resume()
    assert [untimed(inline.step()) for _ in range(2)] == expected[2:]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]) and torch.equal(value, weights(inline)[name]), name


def test_the_newest_policy_draws_and_none_that_is_too_old(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    timing = {"rollout": {"lag": 1}, "asynchrony": {"mode": "worlds", "deterministic": False}}
    config = of(tmp_path / "run", school, timing)
    world, trainer = RolloutWorld(config, groups), Trainer(config, groups)
    world.build()
    feed: Any = trainer.feed
    feed._publish(trainer.policy)
    session, found = feed.session, []
    for _ in range(3):
        job = world.find(session)
        found.append(None if job is None else (job.draw, job.step))
        if job is not None:
            world.work(job)
    assert found == [(0, 0), (1, 0), None]  # batch 2 waits: the policy of step 0 would be two steps old
    feed._publish(Policy(run_id="same", step=1))
    assert world.find(session) == Job(session=session, draw=2, step=1)
    (item, *_) = world.exchange.read(session, "drawn", 1)
    assert item.provenance.policy.step == 0 and item.provenance.draw == 1  # type: ignore[union-attr]


def test_weights_change_between_tokens_and_every_token_says_whose_it_is(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    config = of(tmp_path / "run", school)
    trainer = Trainer(config, groups)
    source, model = trainer.source, trainer.learner.module
    assert isinstance(source, RolloutSource)
    plain = source.draw(trainer.policy)

    class Swap:
        """Takes over other weights behind the second token."""

        def __init__(self, name: str) -> None:
            self.parameter, self.step, self.calls = model.get_parameter(name), 0, 0
            self.kept = self.parameter.detach().clone()

        def __call__(self) -> bool:
            self.calls += 1
            if self.calls != 2:
                return False
            with torch.no_grad():
                self.parameter.mul_(1.5)
            self.step = 1
            return True

    for name in ("output_layer.weight", "decoder.layers.0.mixer.A_log", "decoder.layers.0.mixer.conv1d_weight"):
        swap = Swap(name)
        source.seek(0)
        mixed = source.draw(trainer.policy, swap)
        changed = 0
        for old, new in zip(plain, mixed, strict=True):
            assert new.policy_steps is not None and old.behav_logprobs is not None and new.behav_logprobs is not None
            expected = [0, 0, 1, 1, 1, 1][: len(new.completion)]
            assert new.policy_steps.tolist() == expected and new.provenance.policy.step == 0  # type: ignore[union-attr]
            assert torch.equal(new.behav_logprobs[:2], old.behav_logprobs[:2])
            changed += not torch.equal(new.behav_logprobs[2:], old.behav_logprobs[2:])
        assert changed, name
        if (
            name == "output_layer.weight"
        ):  # the memory of the rows does not depend on it, so a plain forward is an oracle
            (packed,) = trainer._minibatches(mixed)
            (after,) = trainer.learner.logprobs(packed)
            for rollout, expected in zip(mixed, after.split([len(r.completion) for r in mixed]), strict=True):
                torch.testing.assert_close(rollout.behav_logprobs[2:], expected[2:], rtol=1e-5, atol=1e-5)  # type: ignore[index]
        with torch.no_grad():
            swap.parameter.copy_(swap.kept)


def test_a_run_with_weights_taken_over_in_flight_keeps_its_promises(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    timing = {"mode": "worlds", "deterministic": False, "in_flight_updates": True}
    config = of(tmp_path / "run", school, {"rollout": {"lag": 2}, "asynchrony": timing})
    trainer, seen = Trainer(config, groups), []
    take = trainer.feed.take
    trainer.feed.take = lambda policy: seen.append((policy.step, take(policy))) or seen[-1][1]  # type: ignore[method-assign]
    with beside(config, groups) as outcome:
        rows = steps(trainer, 4)
    assert all(row["grad_norm"] > 0 for row in rows) and outcome.errors == {"rollout": None, "scoring": None}
    for step, batch in seen:
        for item in batch:
            steps_of_tokens = item.rollout.policy_steps
            assert len(steps_of_tokens) == len(item.rollout.completion)
            assert step - 2 <= int(steps_of_tokens[0]) and int(steps_of_tokens[-1]) <= step


# --------------------------------------------------------------------------- partners that fail


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_signs_of_life_are_counted_whatever_the_clocks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Asynchrony(silence_s=10, standstill_s=100)
    clock, wall = Clock(), Clock()
    monkeypatch.setattr(signs.time, "monotonic", clock)
    monkeypatch.setattr(signs.time, "time", wall)
    watch = signs.Watch(tmp_path, "rollout", settings)
    clock.now = 11
    with pytest.raises(
        signs.WorldError,
        match=r"world was never started .* 11 s .*silence_s = 10.*same command again \(where .* by hand: it, then this",
    ):
        watch.check()
    beacon = signs.Beacon(tmp_path, "rollout", enabled=True)
    beacon.doing("drawing batch 3")
    watch.check()
    for _ in range(5):  # it lives, and the wall clock jumps back and forth by years
        clock.now, wall.now = clock.now + 9, -wall.now + 1e8
        beacon._beats += 1
        beacon._write()
        watch.check()
    clock.now += 11
    with pytest.raises(signs.WorldError, match=r"process \d+\) was last drawing batch 3 and has given no sign"):
        watch.check()
    again = signs.Beacon(tmp_path, "rollout", enabled=True)  # started again
    again.doing("starting")
    watch.check()
    for _ in range(10):
        clock.now += 9
        again._beats += 1
        again._write()
        watch.check()
    clock.now += 9
    again._beats += 100
    again._write()
    clock.now += 9.5
    with pytest.raises(signs.WorldError, match=r"lives, but has been starting for 10\d s .*standstill_s = 100.*hangs"):
        watch.check()
    watch.begin()
    again.__exit__(ValueError, ValueError("no more disk"), None)
    with pytest.raises(signs.WorldError, match="has ended while it was starting: ValueError: no more disk"):
        watch.check()
    later = signs.Watch(tmp_path, "rollout", settings)
    later.check()  # what ended before is of the past: the world may be about to start again
    assert not later.finished and later.life is None


def test_training_ends_when_nobody_draws(school: dict[str, Any], groups: Groups, tmp_path: Path) -> None:
    config = of(tmp_path / "run", school, {"asynchrony": {"mode": "worlds", "silence_s": 0.3, "standstill_s": 0.3}})
    trainer = Trainer(config, groups)
    with pytest.raises(signs.WorldError, match=r"the rollout world was never started .*rollout\.json"), trainer.feed:
        trainer.step()
    left = json.loads((tmp_path / "run" / "exchange" / "training.json").read_text())
    assert left["ended"].startswith("WorldError: the rollout world") and left["doing"] == "waiting for batch 0"


def test_training_gives_signs_before_it_has_built_anything(
    school: dict[str, Any], groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign, seen = tmp_path / "run" / "exchange" / "training.json", []

    def build(*args: Any) -> Any:
        seen.append(json.loads(sign.read_text()))
        raise ConfigurationError("no such model")

    monkeypatch.setattr(train, "Trainer", build)
    with pytest.raises(ConfigurationError):
        train.run_stage(of(tmp_path / "run", school, WORLDS), groups)
    assert seen[0]["doing"] == "starting" and seen[0]["ended"] is None
    assert json.loads(sign.read_text())["ended"] == "ConfigurationError: no such model"


def test_signs_of_an_earlier_start_are_no_beginning(tmp_path: Path) -> None:
    """A file that a killed process left says that it lives; only one that changes counts."""
    killed = signs.Beacon(tmp_path, "training", enabled=True)
    killed.doing("updating at step 3")
    watch = signs.Watch(tmp_path, "training", Asynchrony())
    assert not watch.stirs and watch.life == killed.life
    again = signs.Beacon(tmp_path, "training", enabled=True)
    with again:
        assert watch.stirs
        with again:  # the inner block of two
            pass
        assert not watch.stirs and watch.finished
    assert json.loads((tmp_path / "training.json").read_text())["ended"] == signs.FINISHED


TEACHERS = {"teachers": {"t": {"checkpoint": "nowhere", "domains": ["plain", "loud"]}}}


def blocked_on_a_rank(file: Path) -> list[str]:
    """What this rank is told where the directory of the worlds cannot be made."""
    groups = parallel.initialize(Parallel(), 0)
    own = {"asynchrony": {"mode": "worlds", "directory": str(file)}}
    config = build_config(tree(file.parent, **own, **TEACHERS))
    with pytest.raises(signs.WorldError) as sign, alive(groups, of_training(config, groups)):
        raise AssertionError("nothing can be begun")
    with pytest.raises(signs.WorldError) as session:
        on_first(groups, lambda: Exchange(config).begin("life", 0, 0, {}, {}))
    return [str(sign.value), str(session.value)]


def test_a_directory_that_cannot_be_written_is_said_on_all_ranks(ranks: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    first, second = ranks(2, blocked_on_a_rank, file)
    assert first == second
    for said, name in zip(first, ("training.json", "session.json"), strict=True):
        assert f"{file}/{name}: could not be written: " in said and "asynchrony.directory" in said


def test_a_policy_that_cannot_be_published_says_what_makes_room(
    school: dict[str, Any], groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(of(tmp_path / "run", school, WORLDS, {"rollout": {"lag": 2}}), groups)
    feed: Any = trainer.feed
    feed._publish(trainer.policy)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_mopd.checkpoint_directory.write", full)
    with pytest.raises(CheckpointError, match=r"No space.*set asynchrony.directory .*lower rollout.lag \(2\)") as said:
        feed._publish(Policy(run_id="same", step=1))
    assert "checkpoint.keep" not in str(said.value)


def test_worlds_end_with_the_training_and_with_each_other(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    config = of(tmp_path / "run", school, WORLDS)
    trainer = Trainer(config, groups)

    def fail(*args: Any) -> Any:
        raise FloatingPointError("spoilt")

    trainer.learner.step = fail  # type: ignore[method-assign]
    with beside(config, groups) as outcome, pytest.raises(FloatingPointError), trainer.feed:
        trainer.step()
    for error in outcome.errors.values():
        assert isinstance(error, signs.WorldError) and "the training world has ended" in str(error)
        assert "spoilt" in str(error)


def damaged_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def in_anothers_place(path: Path) -> None:
    path.parent.rename(path.parent.with_name("0000001"))


@pytest.mark.parametrize("harm", [damaged_byte, truncated, in_anothers_place])
@pytest.mark.parametrize("file", [in_flight.TENSORS, in_flight.RECORDS])
def test_a_shard_that_is_not_what_was_written_is_refused_by_its_name(
    tmp_path: Path, harm: Callable[[Path], None], file: str
) -> None:
    config = build_config(tree(tmp_path, teachers={"t": {"checkpoint": "nowhere", "domains": ["plain", "loud"]}}))
    exchange = Exchange(config)
    session = exchange.begin("life", 0, 0, {"run_id": "same"}, {})
    path = exchange.write(session, "drawn", 0, [rollout()])
    assert exchange.draws(session, "drawn") == [0] and len(exchange.read(session, "drawn", 0)) == 1
    harm(path / file)
    draw = exchange.draws(session, "drawn")[0]
    with pytest.raises(ConfigurationError, match=rf"drawn/000000{draw}: this shard is refused.*Start the same command"):
        exchange.read(session, "drawn", draw)
    with pytest.raises(ConfigurationError) as refused:
        exchange.read(session, "drawn", draw)
    assert "older checkpoint" not in str(refused.value)  # the way out of a checkpoint, of which there is none here


def rollout() -> Rollout:
    record = Provenance(
        policy=Policy(run_id="same", step=0),
        teacher_id=None,
        tokenizer_sha="",
        template_sha="",
        sampling=Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=(1,)),
        domain="plain",
        seed=0,
        draw=0,
    )
    return Rollout(
        prompt=Prompt(id="a", domain="plain", messages=(), tokens=(1, 2)),
        sample=0,
        completion=torch.tensor([4, 5, 6]),
        finish="length",
        behav_logprobs=torch.tensor([-1.0, -2.0, -0.5]),
        policy_steps=torch.tensor([0, 0, 1]),
        provenance=record,
    )


def test_policies_per_token_survive_a_shard(tmp_path: Path) -> None:
    (batch,) = in_flight.unpacked(*in_flight.pack([[rollout()]]))
    assert batch[0].policy_steps.tolist() == [0, 0, 1] and batch[0].policy_steps.dtype == torch.int64


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(tree(tmp_path, teachers={"t": {"checkpoint": "nowhere", "domains": ["plain", "loud"]}}))
    exchange = Exchange(config)
    session = exchange.begin("life", 0, 0, {"run_id": "same"}, {})

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    def full_of(path: Path) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("megatron_mopd.checkpoint_directory.write", full)
    with pytest.raises(signs.WorldError, match=r"drawn/0000000: the shard could not be written: .*No space left.*free"):
        exchange.write(session, "drawn", 0, [rollout()])
    assert exchange.draws(session, "drawn") == [] and not list((exchange.folder(session) / "drawn").iterdir())
    monkeypatch.setattr("megatron_mopd.files.shutil.disk_usage", full_of)
    with pytest.raises(signs.WorldError, match=r"the shard could not be written: .*how much is free there is unknown"):
        exchange.write(session, "drawn", 0, [rollout()])


def test_a_world_of_another_configuration_is_refused(school: dict[str, Any], groups: Groups, tmp_path: Path) -> None:
    config = of(tmp_path / "run", school, WORLDS)
    other = of(tmp_path / "run", school, WORLDS, {"rollout": {"max_new_tokens": 5}})
    trainer = Trainer(config, groups)
    ended = pytest.raises(signs.WorldError, match="rollout world has ended")
    with beside(other, groups, RolloutWorld) as outcome, ended, trainer.feed:
        trainer.step()
    assert isinstance(outcome.errors["rollout"], ProvenanceError)
    assert "training began with rollout.max_new_tokens = 6, this world has 5" in str(outcome.errors)


TABLE = {"train": "ultra-ptq"}
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"model": {"max_sequence_length": 32}}, r"model\.max_sequence_length = 24, this world has 32"),
    "layers": ({"model": {"pattern": "M*EM"}}, r"model\.pattern = 'M\*E', this world has 'M\*EM'"),
    "width": ({"model": {"override": {"hidden_size": 96}}}, r"model\.override\.hidden_size = None, this world has 96"),
    "quantization": ({"quantization": TABLE}, r"quantization\.train = None, this world has 'ultra-ptq'"),
    "precision": ({"run": {"precision": "bf16"}}, r"precision = 'fp32', this world has 'bf16'"),
    "temperature": ({"rollout": {"temperature": 0.5}}, r"temperature = 1\.0, this world has 0\.5"),
    "a teacher's layers": (
        {"teachers": {"t": {"model": {"pattern": "MM", "max_sequence_length": 24}}}},
        r"teachers\.t\.model\.pattern = 'M\*E', this world has 'MM'",
    ),
    "a teacher's precision": ({"nvfp4": ("output_weight",)}, r"teacher 't' .* nvfp4 = \[\], .* \['output_weight'\]"),
}


def told(directory: Path, change: dict[str, Any]) -> tuple[Exchange, dict[str, Any]]:
    """What a scoring world of that configuration compares; ``nvfp4`` is that of its teacher."""
    teachers = {"t": {"checkpoint": "nowhere", "domains": ["plain", "loud"]}}
    settings = overlay({"teachers": teachers}, {k: v for k, v in change.items() if k != "nvfp4"})
    config = build_config(tree(directory, **settings))
    precision = presets.resolve_precision(config.run.precision, torch.device("cpu"))
    scorers: Any = SimpleNamespace(ids={"t": "id"}, nvfp4={"t": change.get("nvfp4", ())}, routing={"plain": "t"})
    common = contract.common(config, build_tokenizer(config.tokenizer), precision)
    return Exchange(config), common | contract.of_teachers(config, scorers)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_a_draw_or_a_score_is_refused_with_both_values(tmp_path: Path, name: str) -> None:
    change, message = DIFFERENT[name]
    exchange, ours = told(tmp_path, {})
    exchange.begin("life", 0, 0, {"run_id": "same"}, ours)
    session = exchange.session()
    assert session is not None
    contract.compare(exchange, session, ours)
    with pytest.raises(ProvenanceError, match=rf"session\.json: .*{message}"):
        contract.compare(exchange, session, told(tmp_path, change)[1])


def test_equal_worlds_of_a_quantized_training_agree(tmp_path: Path) -> None:
    """Training's side was in a file, where its table's patterns became lists."""
    exchange, ours = told(tmp_path, {"quantization": TABLE})
    exchange.begin("life", 0, 0, {"run_id": "same"}, ours)
    session = exchange.session()
    assert session is not None
    contract.compare(exchange, session, told(tmp_path, {"quantization": TABLE})[1])


def test_a_session_that_cannot_be_read_says_who_writes_it_anew(tmp_path: Path) -> None:
    exchange, ours = told(tmp_path, {})
    exchange.begin("life", 0, 0, {"run_id": "same"}, ours)
    (exchange.root / "session.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"session\.json: cannot be read: .*; start the training again, which"):
        exchange.session()
    exchange.begin("life", 0, 0, {"run_id": "same"}, ours)
    assert exchange.session() is not None


def test_layout_and_start_of_the_weights_are_a_worlds_own(tmp_path: Path) -> None:
    exchange, ours = told(tmp_path, {})
    exchange.begin("life", 0, 0, {"run_id": "same"}, ours)
    session = exchange.session()
    assert session is not None
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = {"pattern": "M|*E", "initial": "elsewhere", "override": recompute}
    own = {"model": model, "parallel": {"pipeline": 2}}
    contract.compare(exchange, session, told(tmp_path, own)[1])


WRONG = {
    "timing without worlds": ({"asynchrony": {"deterministic": False}}, "mode = inline has no such worlds"),
    "in flight but repeatable": (
        {"asynchrony": {"mode": "worlds", "in_flight_updates": True}},
        "in_flight_updates = true .* set deterministic to false",
    ),
    "limits": ({"asynchrony": {"silence_s": 9, "standstill_s": 3}}, "standstill_s = 3.0 must not be below"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    teachers = {"t": {"checkpoint": "nowhere", "domains": ["plain", "loud"]}}
    with pytest.raises(ConfigurationError, match=message):
        build_config(tree(tmp_path, teachers=teachers, **change))


# --------------------------------------------------------------------------- overlap, and worlds of several ranks

PAUSE = 0.2
"""Seconds added to each of drawing, scoring and updating."""


def slowed(function: Callable[..., Any], pause: float) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        time.sleep(pause)
        return function(*args)

    return run


def median_step(config: Config, groups: Groups, pause: float) -> float:
    """Seconds of a step when the pipeline is full."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (RolloutWorld, ScoringWorld):
            patch.setattr(stage, "work", slowed(stage.work, pause))
        trainer = Trainer(config, groups)
        trainer.learner.step = slowed(trainer.learner.step, pause)  # type: ignore[method-assign]
        seconds = []
        with beside(config, groups), trainer.feed:
            for _ in range(9):
                start = time.monotonic()
                trainer.step()
                seconds.append(time.monotonic() - start)
    return statistics.median(seconds[3:])


@pytest.mark.slow
def test_a_step_takes_as_long_as_its_longest_stage_and_not_as_all(
    school: dict[str, Any], groups: Groups, tmp_path: Path
) -> None:
    changes = {"rollout": {"lag": 2}}
    work = median_step(of(tmp_path / "work", school, changes, WORLDS, steps=9), groups, 0.0)
    pause = max(PAUSE, 2 * work)  # on a busy machine the stages compute longer; what is added must outweigh that
    step = median_step(of(tmp_path / "pauses", school, changes, WORLDS, steps=9), groups, pause)
    assert pause < step < 0.7 * 3 * pause, (work, pause, step)  # one after the other they would take 3 pauses and more


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {}], ids=["tp2", "dp2"])
def test_torchrun_worlds_of_several_ranks_give_the_bits_of_the_inline_run(
    school: dict[str, Any], tmp_path: Path, layout: dict[str, int]
) -> None:
    """Training and rollout on two ranks each. The rollout world is killed and started again on its way."""
    found = []
    for name, mode in (("inline", {}), ("worlds", WORLDS)):
        directory = tmp_path / name
        patient = {"silence_s": 200.0, "standstill_s": 300.0}
        changes = overlay({"rollout": {"lag": 1}, "parallel": layout, "asynchrony": patient}, mode)
        settings = overlay(overlay(school, {"run": {"dir": str(directory), "steps": 6}}), changes)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(directory, **settings)))
        run_worlds(file, directory, with_others=bool(mode))
        found.append((read_manifest(directory / "checkpoints")["checkpoint_id"], [untimed(r) for r in read(directory)]))
    assert found[0] == found[1] and len(found[0][1]) == 6


def run_worlds(file: Path, directory: Path, with_others: bool) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    quiet["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    world = [*torchrun, "megatron_mopd.worlds"]
    training = subprocess.Popen([*torchrun, "megatron_mopd.train", str(file)], **quiet)
    others, started = [], [training]
    try:
        if with_others:
            others.append(subprocess.Popen([*world, "scoring", str(file)], **quiet))
            rollout_world = subprocess.Popen([*world, "rollout", str(file)], **quiet)
            started.append(rollout_world)
            while not list(directory.glob("exchange/session_*/drawn/0000002")):
                assert training.poll() is None and rollout_world.poll() is None
                time.sleep(0.01)
            rank = json.loads((directory / "exchange" / "rollout.json").read_text())["process"]
            os.kill(rank, signal.SIGKILL)  # torchrun ends the other one
            assert rollout_world.wait(timeout=60) != 0 and training.poll() is None
            others.append(subprocess.Popen([*world, "rollout", str(file)], **quiet))
        assert training.wait(timeout=400) == 0
        assert [process.wait(timeout=60) for process in others] == [0] * len(others)
    finally:
        for process in (*started, *others):
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks, which a kill would leave behind
                process.wait(timeout=60)
