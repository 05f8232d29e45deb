"""An update made again from checkpoint and shard: identical to the last bit, and not when anything was touched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import stage, taught, teach

from megatron_mopd import checkpoint_directory, parallel, run_record, shards, train
from megatron_mopd.config import Config, ConfigurationError, build_config
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import ScoredRollout
from megatron_mopd.replay import Replay, replay
from megatron_mopd.settings import overlay

ROOT = Path(__file__).resolve().parent.parent


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    return stage(directory, {"run": {"steps": 4}, "model": {"pattern": "M*E/*E"}}, changes)


def teach_on_a_rank(root: Path) -> dict[str, Any]:
    """A start and a teacher, and the settings of a stage of MOPD on them that can be replayed."""
    teach(root, tree, start=1, teacher=3)
    return taught(root, "start", teacher=["plain", "loud"]) | {
        "rollout": {"shards": 9, "lag": 1, "samples_per_prompt": 2},
        "checkpoint": {"every": 2, "keep": 9},
    }


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("school")
    return root, ranks(1, teach_on_a_rank, root)[0]


def run_on_a_rank(directory: Path, settings: dict[str, Any]) -> Config:
    config = build_config(tree(directory, **settings))
    train.run_stage(config, parallel.initialize(config.parallel, 7))
    return config


def replay_on_a_rank(config: Config, step: int) -> Replay:
    return replay(config, parallel.initialize(config.parallel, 7), step)


def fail_on_a_rank(config: Config, step: int) -> str:
    with pytest.raises((ConfigurationError, ProvenanceError)) as failed:
        replay_on_a_rank(config, step)
    return str(failed.value)


OBJECTIVE = {"type": "mopd", "minibatches": 2, "sequence_error_threshold": 1.5, "outcome_weight": 0.1}


@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {}), (2, {"tensor": 2})], ids=["one", "dp2", "tp2"])
def test_a_replayed_update_is_identical(ranks: Any, school: Any, world: int, layout: dict[str, Any]) -> None:
    root, settings = school
    directory = root / f"run{world}{''.join(layout)}"
    (config, *_) = ranks(world, run_on_a_rank, directory, settings | {"parallel": layout, "objective": OBJECTIVE})
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    before = {file: file.stat().st_mtime_ns for file in directory.rglob("*")}
    for step, weights in ((1, False), (3, False)):
        found = ranks(world, replay_on_a_rank, config, step)
        assert found == [found[0]] * world and not found[0].differences
        assert found[0].compared == ("metrics", "values per token", "weights")
        assert (found[0].weights is not None) is weights and found[0].tokens > 0
        for name in ("loss", "grad_norm"):
            assert found[0].metrics[name] == rows[step - 1][name]
    assert rows[0]["grad_norm"] > 0
    assert before == {file: file.stat().st_mtime_ns for file in directory.rglob("*")}  # nothing is written


def test_the_weights_are_those_that_the_run_wrote(ranks: Any, school: Any) -> None:
    """With a checkpoint after every step its checkpoint_id is known; rollouts that a guard dropped stay dropped."""
    root, settings = school
    one = overlay(settings, {"checkpoint": {"every": 1}, "run": {"steps": 2}})
    (config,) = ranks(1, run_on_a_rank, root / "every", one)
    (found,) = ranks(1, replay_on_a_rank, config, 2)
    written = checkpoint_directory.read_manifest(checkpoint_directory.place(root / "every" / "checkpoints", 2))
    assert found.weights == written["checkpoint_id"] and not found.differences
    # Beside the weights of another step it would not have passed.
    root = root / "every" / "checkpoints"
    for name in ("iter_0000002", "iter_0000001"):
        shutil.copytree(root / name, root / f"{name}.kept")
    shutil.rmtree(root / "iter_0000002")
    shutil.copytree(root / "iter_0000001.kept", root / "iter_0000002")
    (found,) = ranks(1, replay_on_a_rank, config, 2)
    assert [text for text in found.differences if "the weights are not those of" in text]
    shutil.rmtree(root / "iter_0000002")
    shutil.copytree(root / "iter_0000002.kept", root / "iter_0000002")


def tamper(directory: Path, step: int, **changes: Any) -> None:
    """Write the shard again, with sums that fit, after one rollout's scores were replaced."""
    shard = shards.read(directory / shards.FOLDER, step)
    first = shard.rollouts[0]
    item = dataclasses.replace(first.item, **{name: change(first.item) for name, change in changes.items()})
    changed = [dataclasses.replace(first, item=item), *shard.rollouts[1:]]
    shards.save(directory / shards.FOLDER, step, shard.header, changed)


def lower(item: ScoredRollout) -> torch.Tensor:
    """The teacher's log-probabilities with the second one a thousandth of a nat lower."""
    changed = item.teacher_logprobs.clone()
    changed[1] -= 1e-3
    return changed


def test_one_changed_log_probability_is_found(ranks: Any, school: Any) -> None:
    root, settings = school
    directory = root / "tampered"
    (config,) = ranks(1, run_on_a_rank, directory, overlay(settings, {"run": {"steps": 3}}))
    kept = directory / shards.FOLDER
    originals = {file: file.read_bytes() for file in kept.iterdir()}
    content = bytearray(originals[kept / "step_0000003.safetensors"])
    content[-3] ^= 1
    (kept / "step_0000003.safetensors").write_bytes(bytes(content))
    assert "step_0000003.safetensors: damaged: its sha256" in ranks(1, fail_on_a_rank, config, 3)[0]
    (kept / "step_0000003.safetensors").write_bytes(originals[kept / "step_0000003.safetensors"])

    tamper(directory, 3, teacher_logprobs=lower)  # with sums that fit
    (found,) = ranks(1, replay_on_a_rank, config, 3)
    texts = found.differences
    assert texts[0].startswith("loss was ") and any(text.startswith("grad_norm was ") for text in texts)
    assert [t for t in texts if "token 1: " in t] and [t for t in texts if t.startswith("the weights ")]

    tamper(directory, 3, teacher_logprobs=lambda item: item.teacher_logprobs[:-1])
    assert "the number of teacher log-probabilities is" in ranks(1, fail_on_a_rank, config, 3)[0]
    tamper(directory, 3, teacher_logprobs=lambda item: item.teacher_logprobs, teacher=lambda item: "another")
    message = ranks(1, fail_on_a_rank, config, 3)[0]
    assert (
        "the number of teacher" in message or "the scoring teacher is 'another', this run expects 'teacher'" in message
    )


def test_what_is_missing_is_named_with_what_is_there(ranks: Any, school: Any) -> None:
    root, settings = school
    directory = root / "missing"
    (config,) = ranks(1, run_on_a_rank, directory, overlay(settings, {"run": {"steps": 3}}))
    assert "holds steps 1 to 3" in ranks(1, fail_on_a_rank, config, 9)[0]
    message = ranks(1, fail_on_a_rank, config, 2)[0]
    assert "checkpoint 1, which is not there; it holds steps 2 to 3" in message
    assert "shards of steps 1 to 3. Steps that can be replayed: 1, 3;" in message
    other = build_config(tree(directory, **overlay(settings, {"run": {"steps": 3}, "parallel": {"tensor": 2}})))
    assert "(here tensor = 2, not 1, world_size = 2, not 1)" in ranks(2, fail_on_a_rank, other, 3)[0]
    lagging = build_config(tree(directory, **overlay(settings, {"run": {"steps": 3}, "rollout": {"lag": 0}})))
    assert "sampled by the policy of step 1, updated at step 2" in ranks(1, fail_on_a_rank, lagging, 3)[0]


@pytest.mark.slow
def test_the_tool_replays_a_directory_a_configuration_and_a_stage(ranks: Any, school: Any, tmp_path: Path) -> None:
    root, settings = school
    directory = root / "tool"
    ranks(1, run_on_a_rank, directory, overlay(settings, {"run": {"steps": 1}}))
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    done = tool(str(moved), "--step", "1")
    assert done.returncode == 0, done.stderr
    assert "identical: metrics, values per token, weights; the weights are those of checkpoint" in done.stdout
    tamper(moved, 1, teacher_logprobs=lower)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"dir": str(tmp_path), "stages": [{"name": "moved"}]}))
    done = tool(str(recipe), "--stage", "moved", "--step", "1")
    assert done.returncode == 1 and "different: metrics, values per token, weights were compared" in done.stdout
    assert "loss was " in done.stdout
    assert run_record.read(moved)["settings"]["run"]["dir"] == str(directory)
    configuration = tmp_path / "config.yaml"
    configuration.write_text(json.dumps(tree(directory, **overlay(settings, {"run": {"steps": 1}}))))
    for arguments, text in (
        ((str(recipe), "--step", "1"), "has the stages moved; name one"),
        ((str(configuration), "--step", "1", "--stage", "x"), "is no recipe; leave it out"),
        ((str(configuration), "--step", "4"), "step_0000004.json: no such shard"),
        ((str(tmp_path), "--step", "1"), "run.json: no such file"),
    ):
        done = tool(*arguments)
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/replay.py"), *arguments], capture_output=True, text=True, check=False
    )
