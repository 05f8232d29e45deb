"""Traces of teachers: only right ones, the same on any layout, made once, refused where they are not what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.config import Config, ConfigurationError, build_config
from megatron_mopd.provenance import ProvenanceError

LETTERS = {"a": "first", "b": "second"}  # what a teacher always says, and its domain
LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2}), "ep2": (2, {"expert": 2})}


def rows(domain: str, says: str, count: int = 24, verifier: bool = True) -> list[dict[str, Any]]:
    """Prompts of which every third has another right answer than ``says``."""
    made = []
    for i in range(count):
        message = {"role": "user", "content": f"{domain} {i}"}
        row = {"messages": [message], "domain": domain, "completion": says}
        answer = "z" if i % 3 == 2 else says
        made.append(row | ({"verifier": {"kind": "exact", "answer": answer}} if verifier else {}))
    return made


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def tree(directory: Path, data: Path, **sections: Any) -> dict[str, Any]:
    """A supervised stage on a file's rows."""
    common: dict[str, Any] = {
        "run": {"dir": str(directory), "steps": 1},
        "model": {"pattern": "M*E", "max_sequence_length": 40},
        "data": {"train": [{"type": "jsonl", "path": str(data)}]},
        "source": {"type": "dataset"},
        "objective": {"type": "cross_entropy"},
        "batching": {"micro_batch_size": 8, "sequences_per_step": 8},
        "rollout": {"max_new_tokens": 4, "batch_size": 16},
        "optimizer": {"lr": 5e-3, "warmup_steps": 0},
    }
    return common | sections


def train_teachers(folder: str) -> None:
    """One teacher for each letter, trained until it says nothing else."""
    from megatron_mopd import parallel, train

    root = Path(folder)
    for letter, domain in LETTERS.items():
        data = write_rows(root / f"{letter}.jsonl", rows(domain, letter))
        config = build_config(tree(root / letter, data, run={"dir": str(root / letter), "steps": 25}))
        train.run_stage(config, parallel.initialize(config.parallel, 42))


@pytest.fixture(scope="module")
def root(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    ranks(1, train_teachers, str(folder))
    write_rows(folder / "both.jsonl", [row for letter, domain in LETTERS.items() for row in rows(domain, letter)])
    return folder


def stage(root: Path, run: Path, source: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A warm-up on what both teachers write."""
    teachers = {
        letter: {"checkpoint": str(root / letter / "checkpoints"), "domains": [d]} for letter, d in LETTERS.items()
    }
    given = {"source": {"type": "traces", "per_domain": 6, "attempts": 3} | (source or {}), "teachers": teachers}
    return build_config(tree(run, root / "both.jsonl") | given | sections)


def made(config: Config, groups: Any) -> list[Any]:
    from megatron_mopd import traces
    from megatron_mopd.teachers import TeacherPool
    from megatron_mopd.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.tokenizer)
    return traces.of_stage(config, groups, tokenizer, TeacherPool(config, groups, tokenizer))


def made_on_ranks(root: str, run: str, layout: dict[str, int]) -> list[tuple[str, list[int]]]:
    from megatron_mopd import parallel

    config = stage(Path(root), Path(run), parallel=layout)
    found = made(config, parallel.initialize(config.parallel, 42))
    return [(trace.prompt.id, trace.completion.tolist()) for trace in found]


def on_disk(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = (run / "traces" / "traces.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((run / "traces" / "traces.json").read_text())


def test_right_traces_of_each_domains_teacher_are_kept_with_who_wrote_them(
    root: Path, groups: Any, tmp_path: Path
) -> None:
    from megatron_mopd import checkpoint
    from megatron_mopd.data_config import JsonlPrompts
    from megatron_mopd.prompts import load_examples
    from megatron_mopd.tokenizer import build_tokenizer

    config = stage(root, tmp_path / "run")
    found = made(config, groups)
    tokenizer = build_tokenizer(config.tokenizer)
    assert len(found) == 12 and len({trace.prompt.id for trace in found}) == 12
    ids = {letter: checkpoint.read_manifest(root / letter / "checkpoints")["checkpoint_id"] for letter in LETTERS}
    for trace in found:
        letter = {domain: letter for letter, domain in LETTERS.items()}[trace.prompt.domain]
        assert tokenizer.decode(trace.completion.tolist()) == letter and trace.finish == "stop"
        assert trace.prompt.verifier["answer"] == letter  # every third prompt wants "z", which nobody says
        assert trace.behav_logprobs is None and trace.reward is None
        record = trace.provenance
        assert (record.teacher_id, record.policy.initial_id, record.policy.run_id) == (ids[letter], ids[letter], letter)
        assert record.sampling.temperature == 1.0 and record.tokenizer_sha == tokenizer.tokenizer_sha
    written, header = on_disk(tmp_path / "run")
    assert [(row["prompt_id"], row["tokens"]) for row in written] == [
        (trace.prompt.id, trace.completion.tolist()) for trace in found
    ]
    assert {row["teacher"] for row in written} == set(LETTERS)
    counts = header["domains"]
    assert {domain: entry["traces"] for domain, entry in counts.items()} == {"first": 6, "second": 6}
    assert all(6 < entry["tried"] <= 18 for entry in counts.values())
    # The file is a dataset too.
    source = JsonlPrompts(type="jsonl", path=tmp_path / "run" / "traces" / "traces.jsonl")
    examples = load_examples([source], tokenizer, 40)
    assert [e.completion.tolist() for e in examples] == [trace.completion.tolist() for trace in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traces_are_the_same_on_any_layout(ranks: Any, root: Path, tmp_path: Path, layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    (alone,) = ranks(1, made_on_ranks, str(root), str(tmp_path / "alone"), {})
    for found in ranks(world, made_on_ranks, str(root), str(tmp_path / layout), sizes):
        assert found == alone
    assert on_disk(tmp_path / layout)[0] == on_disk(tmp_path / "alone")[0]


def test_a_stage_learns_from_them_and_a_resumed_one_makes_none(
    root: Path, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mopd import traces
    from megatron_mopd.trainer import Trainer

    config = stage(root, tmp_path / "run", data={"train": [{"type": "jsonl", "path": str(root / "both.jsonl")}]})
    first = Trainer(config, groups)
    rows_drawn = first.source.draw(first.policy)
    assert {r.prompt.domain for r in rows_drawn} == {"first", "second"}
    loss = first.step()["loss"]
    before = (tmp_path / "run" / "traces" / "traces.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(traces, "_generate", lambda *_: pytest.fail("traces that are there are made again"))
    again = Trainer(config, groups)
    again.source.draw(again.policy)
    assert again.step()["loss"] == loss
    assert (tmp_path / "run" / "traces" / "traces.jsonl").stat().st_mtime_ns == before


def test_domains_without_a_teacher_are_left_out_with_their_weights(root: Path, groups: Any, tmp_path: Path) -> None:
    from megatron_mopd.trainer import Trainer

    teachers = {"a": {"checkpoint": str(root / "a" / "checkpoints"), "domains": ["first"]}}
    data = {"train": [{"type": "jsonl", "path": str(root / "both.jsonl")}], "weights": {"first": 1, "second": 2}}
    trainer = Trainer(stage(root, tmp_path / "run", teachers=teachers, data=data), groups)
    assert {trace.prompt.domain for trace in trainer.source.items} == {"first"}
    trainer.step()


def test_domains_without_a_teacher_are_replayed_from_the_data_by_weight(
    root: Path, groups: Any, tmp_path: Path
) -> None:
    from megatron_mopd.trainer import Trainer

    teachers = {"a": {"checkpoint": str(root / "a" / "checkpoints"), "domains": ["first"]}}
    data = {"train": [{"type": "jsonl", "path": str(root / "both.jsonl")}], "weights": {"first": 1, "second": 3}}
    replay = {"others": "replay"}
    trainer = Trainer(stage(root, tmp_path / "run", replay, teachers=teachers, data=data), groups)
    traced = [item.provenance is not None for item in trainer.source.items if item.prompt.domain == "first"]
    replayed = [item.provenance is None for item in trainer.source.items if item.prompt.domain == "second"]
    assert traced == [True] * 6 and replayed and all(replayed)
    drawn = [item.prompt.domain for item in trainer.source.stream.take(8)]
    assert (drawn.count("first"), drawn.count("second")) == (2, 6)
    trainer.step()


def test_a_trace_of_another_checkpoint_is_refused_before_its_update(root: Path, groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import provenance
    from megatron_mopd.trainer import Trainer

    trainer = Trainer(stage(root, tmp_path / "run"), groups)
    rollouts = trainer.source.draw(trainer.policy)
    assert trainer.teachers is not None
    provenance.check(rollouts, trainer.policy, 0, trainer.tokenizer, trainer.teachers)
    trainer.teachers.ids["a"] = "another"
    with pytest.raises(ProvenanceError, match="this run expects 'another'"):
        provenance.check(rollouts, trainer.policy, 0, trainer.tokenizer, trainer.teachers)


def test_a_teacher_that_is_right_too_seldom_is_named_with_its_count(root: Path, groups: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        made(stage(root, tmp_path / "run", {"per_domain": 20, "attempts": 2}), groups)
    text = str(error.value)
    assert "teacher 'a' is right on 1" in text and "of 24 prompts of domain 'first', 20 right traces are wanted" in text
    assert "source.per_domain" in text and not (tmp_path / "run" / "traces").exists()


def test_prompts_without_a_verifier_are_refused_or_kept_by_setting(root: Path, groups: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "bare.jsonl", rows("first", "a", verifier=False))
    teachers = {"a": {"checkpoint": str(root / "a" / "checkpoints"), "domains": ["first"]}}
    sections = {"teachers": teachers, "data": {"train": [{"type": "jsonl", "path": str(data)}]}}
    with pytest.raises(ConfigurationError, match=r"has no verifier.*source\.unverified to keep"):
        made(stage(root, tmp_path / "run", **sections), groups)
    kept = made(stage(root, tmp_path / "run", {"unverified": "keep"}, **sections), groups)
    assert len(kept) == 6 and all(trace.finish == "stop" for trace in kept)


def test_a_served_domain_without_prompts_is_refused(root: Path, groups: Any, tmp_path: Path) -> None:
    data = {"train": [{"type": "jsonl", "path": str(root / "a.jsonl")}]}
    with pytest.raises(ConfigurationError, match="no prompt of domain 'second', which teacher 'b' serves"):
        made(stage(root, tmp_path / "run", data=data), groups)


def test_traces_made_from_something_else_or_changed_are_refused(root: Path, groups: Any, tmp_path: Path) -> None:
    made(stage(root, tmp_path / "run"), groups)
    with pytest.raises(ConfigurationError) as error:
        made(stage(root, tmp_path / "run", {"temperature": 0}), groups)
    assert "holds traces made from something else" in str(error.value) and '"temperature": 0.0' in str(error.value)
    file = tmp_path / "run" / "traces" / "traces.jsonl"
    file.write_text(file.read_text().replace('"completion": "a"', '"completion": "q"', 1))
    with pytest.raises(ConfigurationError, match="is not what was written"):
        made(stage(root, tmp_path / "run"), groups)
    (tmp_path / "run" / "traces" / "traces.json").write_text("{")
    with pytest.raises(ConfigurationError, match="traces cannot be read"):
        made(stage(root, tmp_path / "run"), groups)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teachers": {}}, "source.type traces trains on what teachers write; name at least one under teachers"),
        ({"objective": {"type": "mopd"}}, "objective.type mopd scores the student's own rollouts"),
        ({"batching": {}}, "batching.sequences_per_step is needed by a traces stage"),
        ({"source": {"type": "traces", "per_domain": 0}}, "source.per_domain: 0"),
        ({"source": {"type": "dataset", "per_domain": 5}}, "source.per_domain: unknown key"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    teachers = {"a": {"checkpoint": "c", "domains": ["first"]}}
    given = tree(tmp_path, tmp_path / "x.jsonl", source={"type": "traces"}, teachers=teachers)
    build_config(given)
    with pytest.raises(ConfigurationError) as error:
        build_config(given | change)
    assert text in str(error.value)
