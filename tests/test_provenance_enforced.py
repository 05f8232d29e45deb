"""Whatever changed hands between two processes of a run stops it before an update, and the message names both sides.

Every case is tried on the trainer: going on with a run that has a batch in flight (lag 1), and starting one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import SFT, stage, taught, teach

from megatron_mopd import checkpoint_directory, exchange, parallel, runner, train, trainer
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import ScoredRollout
from megatron_mopd.settings import overlay
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer
from megatron_mopd.trainer import Trainer


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    own = {
        "run": {"steps": 3},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 3, "lag": 1},
        "batching": {"sequences_per_step": 4},
        "checkpoint": {"every": 1},
    }
    return stage(directory, own, changes)


def teach_on_a_rank(root: Path) -> dict[str, str]:
    """A start, three teachers, and a run of MOPD on two of them with a batch in flight after its first step.

    Returns the checkpoint ids by name.
    """
    groups = teach(root, tree, base=1, first=1, second=2, third=3)
    train.run_stage(exchange.prepare(build_config(mopd(root)), groups), groups)
    return {
        name: checkpoint_directory.read_manifest(root / name / "checkpoints")["checkpoint_id"]
        for name in ("base", "first", "second", "third")
    }


def mopd(root: Path, **changes: Any) -> dict[str, Any]:
    settings = {"run": {"steps": 1}} | taught(root, "base", first=["plain"], second=["loud"])
    return overlay(tree(root / "mopd", **settings), changes)


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("school")
    return root, ranks(1, teach_on_a_rank, root)[0]


@pytest.fixture
def root(school: Any, tmp_path: Path) -> Iterator[Path]:
    """A copy of the school under the same paths as the run knew them, restored after the test."""
    kept = tmp_path / "kept"
    shutil.copytree(school[0], kept)
    yield school[0]
    shutil.rmtree(school[0])
    kept.rename(school[0])


def go_on(settings: dict[str, Any], tokens: str | None = None) -> str:
    """Start the run, or go on with it, to its third step; the message that stops it. No weight has moved by then."""
    updates: list[int] = []
    build = trainer.build_tokenizer
    if tokens is not None:
        trainer.build_tokenizer = lambda config: changed(build(config), tokens)  # type: ignore[assignment]
    try:
        config = build_config(settings | {"run": settings["run"] | {"steps": 3}})
        with pytest.raises((ConfigurationError, ProvenanceError)) as stopped:
            made = Trainer(config, parallel.initialize(config.parallel, 7))
            made.learner.step = lambda *_: updates.append(1)  # type: ignore[method-assign,assignment]
            made.resume()
            made.run()
    finally:
        trainer.build_tokenizer = build
    assert not updates
    return str(stopped.value)


def changed(tokenizer: ChatTokenizer, what: str) -> ChatTokenizer:
    """The tokenizer with another chat template, or with another token content."""
    setattr(tokenizer, what, "f" * 64)
    return tokenizer


def swap(one: Path, other: Path) -> None:
    held = one.with_name(one.name + "-held")
    one.rename(held)
    other.rename(one)
    held.rename(other)


def test_an_unchanged_run_goes_on(ranks: Any, root: Path) -> None:
    assert ranks(1, finish, mopd(root), root)[0] == 3


def finish(settings: dict[str, Any], root: Path) -> int:
    config = build_config(settings | {"run": settings["run"] | {"steps": 3}})
    made = Trainer(config, parallel.initialize(config.parallel, 7))
    assert made.resume() and made.step_index == 1 and len(made.feed.in_flight) == 1
    made.run()
    return made.step_index


def test_a_renamed_teacher(ranks: Any, root: Path, school: Any) -> None:
    settings, ids = mopd(root), school[1]
    settings["teachers"]["premier"] = settings["teachers"].pop("first")
    message = ranks(1, go_on, settings)[0]
    assert (
        f"teacher 'first' (checkpoint {ids['first'][:12]}) is called 'premier' now, with the same checkpoint" in message
    )
    assert "second" not in message and "another run.dir" in message


def forget(root: Path) -> None:
    """Results that say whose checkpoints lie where, as other programs leave none."""
    for name in ("base", "first", "second", "third"):
        (root / name / "result.json").unlink()


def test_two_swapped_directories(ranks: Any, root: Path, school: Any) -> None:
    ids = school[1]
    swap(root / "first" / "checkpoints", root / "second" / "checkpoints")
    message = ranks(1, go_on, mopd(root))[0]  # where the run that made the teacher says what it left
    assert f"teachers.first.checkpoint = {root}/first/checkpoints: holds step 2 of run 'second'" in message
    assert ids["second"][:12] in message and "run 'first' ended there" in message and ids["first"][:12] in message
    assert "swapped" in message
    forget(root)
    message = ranks(1, go_on, mopd(root))[0]  # by what the run itself recorded
    a, b = ids["first"][:12], ids["second"][:12]
    assert (
        f"teacher 'first' was checkpoint {a} and is {b} now, teacher 'second' was {b} and is {a}: it looks" in message
    )
    assert "directories of 'first' and 'second' (teachers.first.checkpoint, teachers.second.checkpoint)" in message


def test_a_new_run_on_swapped_or_replaced_teachers(ranks: Any, root: Path, school: Any) -> None:
    ids = school[1]
    shutil.rmtree(root / "mopd")
    shutil.rmtree(root / "second" / "checkpoints")
    shutil.copytree(root / "third" / "checkpoints", root / "second" / "checkpoints")
    message = ranks(1, go_on, mopd(root))[0]
    assert "teachers.second.checkpoint" in message and "holds step 3 of run 'third'" in message
    assert "run 'second' ended there" in message and ids["second"][:12] in message and ids["third"][:12] in message
    assert not (root / "mopd" / "checkpoints").exists()
    swap(root / "base" / "checkpoints", root / "first" / "checkpoints")
    settings = mopd(root)
    settings["teachers"] = {"third": {"checkpoint": str(root / "third" / "checkpoints"), "domains": ["plain", "loud"]}}
    message = ranks(1, go_on, settings)[0]
    assert "model.initial" in message and "run 'first'" in message and "run 'base' ended there" in message


def test_a_teacher_replaced_by_another_of_its_name(ranks: Any, root: Path, school: Any) -> None:
    ids = school[1]
    forget(root)
    shutil.rmtree(root / "second" / "checkpoints")
    shutil.copytree(root / "third" / "checkpoints", root / "second" / "checkpoints")
    message = ranks(1, go_on, mopd(root))[0]
    assert f"teacher 'second' was checkpoint {ids['second'][:12]} and is {ids['third'][:12]} now" in message
    assert "teachers.second.checkpoint was replaced by another checkpoint of that name" in message
    assert "'first'" not in message


def test_a_domain_moved_to_another_teacher(ranks: Any, root: Path) -> None:
    settings = mopd(root)
    for name, domain in (("first", "loud"), ("second", "plain")):
        settings["teachers"][name]["domains"] = [domain]
    message = ranks(1, go_on, settings)[0]
    assert "teacher 'first'" in message and "domains = ['plain'], this configuration has ['loud']" in message


def test_another_start(ranks: Any, root: Path, school: Any) -> None:
    ids = school[1]
    message = ranks(1, go_on, mopd(root, model={"initial": str(root / "third" / "checkpoints")}))[0]
    assert "initial_id" in message and ids["base"] in message and ids["third"] in message


@pytest.mark.parametrize(("key", "name"), [("template_sha", "chat template"), ("tokenizer_sha", "tokenizer")])
def test_another_template_or_tokenizer(ranks: Any, root: Path, key: str, name: str) -> None:
    """Against the teachers first, then, for a run without them, against its own checkpoint and its start."""
    own = getattr(build_tokenizer(build_config(mopd(root)).tokenizer), key)
    message = ranks(1, go_on, mopd(root), key)[0]
    assert (
        f"teachers.first.checkpoint = {root}/first/checkpoints: its {key} is {own!r}, the student's {'f' * 64!r}"
        in message
    )
    sft = tree(root / "first", **overlay(SFT, {"run": {"id": "first", "seed": 8}}))
    message = ranks(1, go_on, sft, key)[0]
    assert f"was written with the {name} {own[:12]} ({key}), this configuration has {'f' * 12}" in message
    assert "first/checkpoints" in message and "name the tokenizer it was written with" in message
    sft = tree(root / "new", **overlay(SFT, {"model": {"initial": str(root / "base" / "checkpoints")}}))
    message = ranks(1, go_on, sft, key)[0]
    assert f"model.initial = {root}/base/checkpoints: was written with the {name} {own[:12]}" in message


def edit_manifest(root: Path, name: str, **changes: Any) -> None:
    path = checkpoint_directory.resolve(root / name / "checkpoints") / checkpoint_directory.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_teacher_of_another_template(ranks: Any, root: Path) -> None:
    """Between a rollout and its teacher: what the teacher's checkpoint says it reads."""
    edit_manifest(root, "second", template_sha="e" * 64)
    message = ranks(1, go_on, mopd(root))[0]
    assert "teachers.second.checkpoint" in message and f"its template_sha is {'e' * 64!r}" in message


def test_a_manifest_that_lies_about_its_weights(ranks: Any, root: Path, school: Any) -> None:
    forget(root)
    edit_manifest(root, "second", checkpoint_id=school[1]["first"])
    message = ranks(1, go_on, mopd(root))[0]
    first, second = school[1]["first"][:12], school[1]["second"][:12]
    assert f"says checkpoint_id {first}, the tensors beside it give {second}" in message


Tamper = Callable[[ScoredRollout], ScoredRollout]


def with_record(item: ScoredRollout, **changes: Any) -> ScoredRollout:
    assert item.rollout.provenance is not None
    record = dataclasses.replace(item.rollout.provenance, **changes)
    return dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, provenance=record))


def go_on_with(settings: dict[str, Any], name: str) -> str:
    """The run goes on, with one rollout of the batch in flight tampered with."""
    config = build_config(settings | {"run": settings["run"] | {"steps": 3}})
    made = Trainer(config, parallel.initialize(config.parallel, 7))
    made.resume()
    updates: list[int] = []
    made.learner.step = lambda *_: updates.append(1)  # type: ignore[method-assign,assignment]
    waiting = made.feed.in_flight[0]
    place = next(i for i, item in enumerate(waiting) if item.rollout.prompt.domain == "plain")  # type: ignore[union-attr]
    waiting[place] = IN_FLIGHT[name][0](waiting[place])  # type: ignore[index,arg-type]
    with pytest.raises(ProvenanceError) as stopped:
        made.run()
    assert not updates
    return str(stopped.value)


IN_FLIGHT: dict[str, tuple[Tamper, str]] = {
    "teacher": (lambda item: dataclasses.replace(item, teacher="second"), "the scoring teacher is 'second'"),
    "checkpoint": (lambda item: with_record(item, teacher_id="e" * 64), "the checkpoint of teacher 'first' is 'eee"),
    "template": (lambda item: with_record(item, template_sha="e"), "the chat template is 'e'"),
    "tokenizer": (lambda item: with_record(item, tokenizer_sha="e"), "the tokenizer is 'e'"),
    "table": (lambda item: with_record(item, routing_sha="e"), "the sha256 of the routing table is 'e'"),
    "scores": (
        lambda item: dataclasses.replace(item, teacher_logprobs=torch.zeros(99)),
        "the number of teacher log-probabilities is 99",
    ),
}


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_a_rollout_in_flight_that_contradicts_the_run(ranks: Any, root: Path, name: str) -> None:
    message = ranks(1, go_on_with, mopd(root), name)[0]
    assert IN_FLIGHT[name][1] in message and "(plain): " in message and "this run expects" in message
    assert "put back what was changed" in message


def test_a_recipe_names_what_was_exchanged(root: Path, school: Any, groups: Groups) -> None:
    """A stage whose fingerprint changed: the message says by what."""
    ids, settings = school[1], mopd(root)
    (root / "mopd" / "stage.json").write_text(json.dumps({"fingerprint": "0" * 64, "finished": False}))

    def refused() -> str:
        with pytest.raises(ConfigurationError) as stopped:
            runner.run_unless_finished(build_config(settings), groups, "merge")
        return str(stopped.value)

    settings["optimizer"]["lr"] = 0.5
    assert "optimizer.lr was 0.001 and is 0.5 now; put them back" in refused()
    settings["optimizer"]["lr"] = 1e-3
    settings["teachers"]["premier"] = settings["teachers"].pop("first")
    assert f"): teacher 'first' (checkpoint {ids['first'][:12]}) is called 'premier' now, with the same" in refused()
    settings = mopd(root)
    swap(root / "first" / "checkpoints", root / "second" / "checkpoints")
    message = refused()
    assert message.startswith("stage 'merge': teachers.first.checkpoint = ")
    assert "holds step 2 of run 'second'" in message and "run 'first' ended there" in message
    forget(root)
    message = refused()
    assert f"'first' was checkpoint {ids['first'][:12]} and is {ids['second'][:12]} now" in message
    assert "directories of 'first' and 'second'" in message
    swap(root / "first" / "checkpoints", root / "second" / "checkpoints")
    settings["model"]["initial"] = str(root / "third" / "checkpoints")
    assert f"model.initial was checkpoint {ids['base'][:12]} and is {ids['third'][:12]} now" in refused()
    (root / "mopd" / "run.json").unlink()
    assert "(000000000000 there, " in refused()  # of an older version: no more is known
