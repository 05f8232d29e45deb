"""Two runs' directories side by side: the first step that differs, and in what."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import loaded

from megatron_mopd import run_comparison, run_record, shards
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout, UpdatedRollout
from megatron_mopd.settings import overlay


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/compare_runs.py")


def rollout(step: int, **changes: Any) -> UpdatedRollout:
    record = Provenance(
        policy=Policy(run_id=str(changes.pop("run_id", "r")), step=step - 1),
        teacher_id="t" * 64,
        tokenizer_sha="",
        template_sha="",
        sampling=Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=(1,)),
        domain="plain",
        seed=0,
    )
    plain = Rollout(
        prompt=Prompt(id="abc", domain="plain", messages=({"role": "user", "content": "x"},), tokens=(1, 2)),
        sample=0,
        completion=torch.tensor([5, 6, 1]),
        finish="stop",
        behav_logprobs=torch.tensor([-1.0, -2.0, float("nan")]),
        provenance=record,
    )
    item = ScoredRollout(rollout=plain, teacher="first", teacher_logprobs=torch.tensor([-1.5, -2.5, -3.5]))
    per_token = {"advantage": torch.tensor([0.5, 0.25, 0.125]), "mask": torch.ones(3)}
    return UpdatedRollout(item=dataclasses.replace(item, **changes), per_token=per_token)


SETTINGS = {
    "source": {"type": "dataset"},
    "objective": {"type": "cross_entropy"},
    "batching": {"sequences_per_step": 8},
    "data": {"train": [{"type": "jsonl", "path": "x.jsonl"}]},
}


def leave(directory: Path, steps: int = 4, **settings: Any) -> Path:
    """What a run of ``steps`` leaves, without training; every directory in a folder of its own."""
    tree = overlay(SETTINGS, settings) | {"run": {"dir": str(directory), "steps": steps}}
    tree["model"] = {"initial": str(directory.parent / "base" / "checkpoints")}
    config = build_config(tree)
    teachers = {"first": {"checkpoint_id": "t" * 64, "domains": ["plain"]}}
    manifest = {"initial_id": "i", "tokenizer_sha": "k", "template_sha": "m", "teachers": teachers}
    directory.mkdir(parents=True)
    (directory / run_record.FILE).write_text(json.dumps(run_record.of(config, manifest)))
    rows = [{"step": s, "time/unix": hash(directory) + s, "loss": 1 / s, "grad_norm": 2.0} for s in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 4):
        header = {"format": shards.FORMAT, "step": step, "weights_sha": f"sha of {step}"}
        shards.save(directory / shards.FOLDER, step, header, [rollout(step, run_id=directory.name), rollout(step)])
        place = directory / "checkpoints" / f"iter_{step:07d}"
        place.mkdir(parents=True)
        for name in (".metadata", "metadata.json"):
            (place / name).write_text("{}")
        (place / "mopd_manifest.json").write_text(json.dumps({"checkpoint_id": f"id{step}"}))
    result = {
        "accuracy": {"plain": {"correct": 3, "total": 4}},
        "wall_s": hash(directory) % 97,
        "measure_s": hash(directory) % 89,
        "memory_bytes": hash(directory) % 83,
        "device_memory_bytes": hash(directory) % 79,
        "seed": 0,
        "parallel": {"tensor": 1, "pipeline": 1},
        "versions": {"torch": "2.13.0"},
        "ended": {"run_id": directory.name, "step": 4, "checkpoint_id": "id4"},
    }
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return leave(tmp_path / "x" / "one"), leave(tmp_path / "y" / "two")


def test_equal_runs_are_equal_wherever_they_lie(two: Any, tool: ModuleType, capsys: Any) -> None:
    found = run_comparison.compare(*two)
    assert not found.settings and not found.results and found.step is None
    assert tool.show_all(*two) is False
    out = capsys.readouterr().out
    assert out.startswith("equal: settings, metrics of 4 steps, rollouts of 2 steps, weights of 2 checkpoints, result")


def tampered_shard(directory: Path) -> None:
    scores = torch.tensor([-1.5, -2.5, -3.5]).nextafter(torch.zeros(3))
    scores[0] = -1.5
    header = {"format": shards.FORMAT, "step": 4, "weights_sha": "sha of 4"}
    shards.save(directory / shards.FOLDER, 4, header, [rollout(4), rollout(4, teacher_logprobs=scores)])


CHANGES = {
    "metrics": (
        lambda d: edit(d / "metrics.jsonl", '"loss": 0.5', '"loss": 0.25'),
        2,
        "step 2, metrics: loss 0.5 and 0.25",
    ),
    "shorter": (
        lambda d: (d / "metrics.jsonl").write_text((d / "metrics.jsonl").read_text().rsplit("{", 1)[0]),
        4,
        "step 4 is in {one}/metrics.jsonl only",
    ),
    "one_score": (
        tampered_shard,
        4,
        "step 4, rollouts: rollout 0 of prompt abc (plain), token 1: teacher_logprobs is -2.5 and -2.499999761581421",
    ),
    "another_teacher": (
        lambda d: shards.save(
            d / shards.FOLDER, 2, {"format": 1, "weights_sha": None}, [rollout(2, teacher="second"), rollout(2)]
        ),
        2,
        "step 2, rollouts: rollout 0 of prompt abc (plain): teacher is 'first' and 'second'",
    ),
    "fewer": (
        lambda d: shards.save(d / shards.FOLDER, 2, {"format": 1, "weights_sha": None}, [rollout(2)]),
        2,
        "step 2, rollouts: 2 and 1 rollouts",
    ),
    "weights_after": (
        lambda d: shards.save(d / shards.FOLDER, 2, {"format": 1, "weights_sha": "another"}, [rollout(2), rollout(2)]),
        2,
        "step 2, rollouts: equal rollouts, but the weights after the update have sha256 sha of 2 and another",
    ),
    "checkpoint": (
        lambda d: edit(d / "checkpoints/iter_0000004/mopd_manifest.json", "id4", "id5"),
        4,
        "step 4, checkpoint_id: id4 and id5",
    ),
    "result": (
        lambda d: edit(d / "result.json", '"correct": 3', '"correct": 2'),
        None,
        "result.json: accuracy.plain.correct 3 and 2",
    ),
    "no_result": (lambda d: (d / "result.json").unlink(), None, "result.json is in {one} only"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_first_difference_is_named(name: str, two: Any, tool: ModuleType, capsys: Any) -> None:
    change, step, text = CHANGES[name]
    change(two[1])
    found = run_comparison.compare(*two)
    assert (found.step, found.results) == (step, [text.format(one=two[0])]) and not found.settings
    assert tool.show_all(*two) is True
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (f"first differing step: {step}" if step else lines[0]) and text.format(one=two[0]) in lines


def test_the_earliest_of_all_differences_counts(two: Any) -> None:
    edit(two[1] / "metrics.jsonl", '"loss": 0.25', '"loss": 0.2')
    shards.save(two[1] / shards.FOLDER, 2, {"format": 1, "weights_sha": None}, [rollout(2)])
    found = run_comparison.compare(*two)
    assert found.step == 2 and [text[:7] for text in found.results] == ["step 4,", "step 2,"]


def test_settings_come_first_and_alone_do_not_fail(tmp_path: Path, tool: ModuleType, capsys: Any) -> None:
    one, other = leave(tmp_path / "x" / "one"), leave(tmp_path / "y" / "two", optimizer={"lr": 0.5})
    edit(other / "result.json", '"torch": "2.13.0"', '"torch": "2.14.0"')
    edit(other / run_record.FILE, '"tokenizer_sha": "k"', '"tokenizer_sha": "l"')
    edit(other / run_record.FILE, '"first"', '"premier"')
    assert tool.show_all(one, other) is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "setting optimizer.lr: 2e-06 and 0.5",
        "teacher 'first' (checkpoint tttttttttttt) is called 'premier' now, with the same checkpoint",
        "tokenizer_sha: k and l",
        'version of torch "2.13.0" and "2.14.0"',
        "equal: settings, metrics of 4 steps, rollouts of 2 steps, weights of 2 checkpoints, result.json",
    ]


def test_a_layout_is_a_setting_and_said_once(tmp_path: Path) -> None:
    one, other = leave(tmp_path / "x" / "one"), leave(tmp_path / "y" / "two", parallel={"tensor": 2})
    edit(other / "result.json", '"tensor": 1', '"tensor": 2')
    edit(other / "result.json", '"seed": 0', '"seed": 5')
    found = run_comparison.compare(one, other)
    assert not found.results
    assert found.settings == ["setting parallel.tensor: 1 and 2", "setting run.seed: 0 and 5"]
    for directory in (one, other):
        (directory / run_record.FILE).unlink()  # which a pre-flight does not leave
    assert run_comparison.compare(one, other).settings == found.settings


@pytest.mark.parametrize("domain", ["words_s", "timeline", "seconds", "wall_s", "memory_bytes", "parallel", "seed"])
def test_a_domain_may_be_called_like_a_time(two: Any, domain: str) -> None:
    for directory in two:
        edit(directory / "result.json", '"plain"', json.dumps(domain))
    assert not run_comparison.compare(*two).results
    edit(two[1] / "result.json", '"correct": 3', '"correct": 2')
    edit(two[1] / "metrics.jsonl", '"loss": 1.0', f'"loss": 1.0, "accuracy/{domain}": 0.5')
    step, result = run_comparison.compare(*two).results
    assert step == f"step 1, metrics: accuracy/{domain} missing and 0.5"
    assert result == f"result.json: accuracy.{domain}.correct 3 and 2"


def recipe(directory: Path, *names: str) -> Path:
    for name in names:
        leave(directory / name)
    nodes = [{"name": name} for name in [*names, "planned"]]
    (directory / "graph.json").write_text(json.dumps({"nodes": nodes, "edges": []}))
    return directory


def test_recipes_are_compared_stage_by_stage(tmp_path: Path, tool: ModuleType, capsys: Any) -> None:
    one, other = recipe(tmp_path / "x", "sft", "base", "mopd"), recipe(tmp_path / "y", "sft", "base", "mopd")
    assert tool.show_all(one, other) is False
    edit(other / "base" / "metrics.jsonl", '"loss": 0.5', '"loss": null')
    capsys.readouterr()
    assert tool.show_all(one, other) is True
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["stage sft", "stage base", "stage base", "stage mopd"]
    assert lines[1:3] == ["stage base: first differing step: 2", "stage base: step 2, metrics: loss 0.5 and null"]
    shutil.rmtree(other / "mopd")
    (other / "graph.json").unlink()  # stopped before its first stage was over
    edit(other / "base" / "metrics.jsonl", '"loss": null', '"loss": 0.5')
    assert tool.show_all(one, other) is True
    assert "stages on one side only: mopd" in capsys.readouterr().out


def test_what_is_no_run_or_damaged_is_refused(two: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither the directory of a run"):
        run_comparison.stages(tmp_path / "nowhere")
    (two[1] / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ConfigurationError, match=r"metrics.jsonl:1: not a row"):
        run_comparison.compare(*two)
    shutil.copy(two[0] / "metrics.jsonl", two[1] / "metrics.jsonl")
    (two[1] / shards.FOLDER / "step_0000002.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"step_0000002.safetensors: damaged"):
        run_comparison.compare(*two)
    (two[1] / run_record.FILE).write_text("{}")
    with pytest.raises(ConfigurationError, match=r"run.json: cannot be read"):
        run_comparison.compare(*two)
