"""Scored rollouts kept on disk: what a shard holds on any layout, what is kept, what a damaged or full disk does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import stage, taught, teach

from megatron_mopd import batch, in_flight, metrics, parallel, shards
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.records import (
    Policy,
    Prompt,
    Provenance,
    Rollout,
    Sampling,
    ScoredRollout,
    UpdatedRollout,
)
from megatron_mopd.settings import overlay
from megatron_mopd.shards import ShardError
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import StepOutput


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    return stage(directory, changes)


def teach_on_a_rank(root: Path) -> dict[str, Any]:
    """Two teachers; what a stage of MOPD on them needs beside :func:`tree`."""
    teach(root, tree, first=1, second=2)
    return taught(root, "first", first=["plain"], second=["loud"])


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("school")
    return root, ranks(1, teach_on_a_rank, root)[0]


def run_and_read(root: Path, mopd: dict[str, Any], name: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    """A run with shards: each step's header, rollouts and rank-local values, and what the trainer had in its hands."""
    settings = overlay(mopd, overlay({"rollout": {"shards": 9, "lag": 1, "samples_per_prompt": 2}}, changes))
    config = build_config(tree(root / name, **settings))
    trainer = Trainer(config, parallel.initialize(config.parallel, 7))
    seen: list[list[ScoredRollout]] = []
    learn = trainer.learn
    trainer.learn = lambda rollouts: (seen.append(list(rollouts)), learn(rollouts))[1]  # type: ignore[method-assign]
    rows: list[dict[str, Any]] = []
    trainer.run(lambda step, row: rows.append(dict(row)))
    torch.distributed.barrier()
    kept = [shards.read(root / name / shards.FOLDER, step) for step in shards.steps(root / name / shards.FOLDER)]
    groups = trainer.groups
    mine = [in_flight.share(shard.rollouts, groups.dp_rank, groups.dp_size) for shard in kept]
    same = all(
        equal(ours.item, theirs)
        for ours_all, theirs_all in zip(mine, seen, strict=True)
        for ours, theirs in zip(ours_all, theirs_all, strict=True)
    )
    return same, [shard.header for shard in kept], [digest(shard.rollouts) for shard in kept], rows


def equal(one: Any, other: Any) -> bool:
    """Whether two scored rollouts are the same, tensors bit for bit."""
    a, b = (in_flight.pack([[item]]) for item in (one, other))
    return a == b


def digest(rollouts: Sequence[UpdatedRollout]) -> list[tuple[Any, ...]]:
    """What must be there in every shard, as plain values."""
    found = []
    for kept in rollouts:
        assert isinstance(kept.item, ScoredRollout)
        rollout, record = kept.item.rollout, kept.item.rollout.provenance
        assert record is not None
        assert all(len(v) == len(rollout.completion) and v.dtype == torch.float32 for v in kept.per_token.values())
        assert {"advantage", "importance", "ratio", "mask"} <= kept.per_token.keys()
        # The advantage is the teacher's log-probability against the student's at the update.
        student = kept.item.teacher_logprobs - kept.per_token["log_ratio"]
        torch.testing.assert_close(
            kept.per_token["importance"], (student - rollout.behav_logprobs).exp(), rtol=1e-4, atol=1e-5
        )
        found.append((rollout.prompt.id, rollout.sample, rollout.prompt.domain, kept.item.teacher, record.teacher_id))
    return found


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {}), (2, {"tensor": 2}), pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow)],
    ids=["dp2", "tp2", "pp2"],
)
def test_a_shard_holds_the_global_batch_with_its_provenance(
    ranks: Any, school: Any, world: int, layout: dict[str, Any]
) -> None:
    root, mopd = school
    borders = {"model": {"pattern": "M|*E"}} if "pipeline" in layout else {}
    name = f"whole{world}{''.join(layout)}"
    changes = {"parallel": layout, "objective": {"type": "mopd", "minibatches": 2}, **borders}
    answers = ranks(world, run_and_read, root, mopd, name, changes)
    for same, headers, batches, rows in answers:
        assert same and [header["step"] for header in headers] == [1, 2] and len(batches[0]) == 12
        assert (headers, batches) == (answers[0][1], answers[0][2])
        for header, scored, row in zip(headers, batches, rows, strict=True):
            start = json.loads((root / "first" / "checkpoints" / "iter_0000001" / "mopd_manifest.json").read_text())
            assert header["policy"] == {
                "run_id": name,
                "step": header["step"] - 1,
                "initial_id": start["checkpoint_id"],
            }
            assert header["routing"] == {"plain": "first", "loud": "second"}
            assert header["layout"]["world_size"] == world
            assert header["metrics"] == {
                k: pytest.approx(v, nan_ok=True) for k, v in metrics.untimed(row).items() if "guard/" not in k
            }
            assert {(entry[2], entry[3]) for entry in scored} <= {("plain", "first"), ("loud", "second")}
            assert all(entry[4] == header["teachers"][entry[3]]["checkpoint_id"] for entry in scored)
            assert [entry[1] for entry in scored] == [0, 1] * 6
    # Rollouts, order and ids do not depend on the layout: those of the first step are drawn by the same weights.
    plain = ranks(1, run_and_read, root, mopd, f"{name}-alone", {"objective": {"type": "mopd", "minibatches": 2}})[0]
    assert plain[2] == answers[0][2]


def test_records_say_who_sampled_who_scored_and_under_which_table(ranks: Any, school: Any) -> None:
    root, mopd = school
    ranks(1, run_and_read, root, mopd, "records", {"run": {"steps": 3}})
    shard = shards.read(root / "records" / shards.FOLDER, 3)
    for kept in shard.rollouts:
        assert isinstance(kept.item, ScoredRollout)
        record = kept.item.rollout.provenance
        assert record is not None and record.policy == Policy(**shard.header["policy"] | {"step": 1})  # lag 1
        assert record.tokenizer_sha == shard.header["tokenizer_sha"]
        assert record.template_sha == shard.header["template_sha"]
        assert record.sampling.temperature == 1.0 and record.sampling.max_new_tokens == 5
        assert record.routing_sha and record.routing_sha == shard.rollouts[0].item.rollout.provenance.routing_sha  # type: ignore[union-attr]


def example(domain: str = "plain", n: int = 3, sample: int = 0, dropped: str | None = None) -> ScoredRollout:
    record = Provenance(
        policy=Policy(run_id="r", step=0),
        teacher_id="t",
        tokenizer_sha="",
        template_sha="",
        sampling=Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=(1,)),
        domain=domain,
        seed=0,
    )
    rollout = Rollout(
        prompt=Prompt(id="abc", domain=domain, messages=({"role": "user", "content": "x"},), tokens=(1, 2)),
        sample=sample,
        completion=torch.arange(n),
        finish="stop",
        behav_logprobs=-torch.ones(n),
        provenance=record,
        dropped=dropped,
    )
    return ScoredRollout(rollout=rollout, teacher="first", teacher_logprobs=-torch.ones(n))


def output(*values: tuple[list[float], list[float]]) -> StepOutput:
    """An update that gave these importances and masks, one micro-batch each."""
    pairs = [(batch.empty(0), {"importance": torch.tensor(c), "mask": torch.tensor(m)}) for c, m in values]
    return StepOutput(loss=0.0, mtp_loss=0.0, grad_norm=0.0, mtp_grad_norm=0.0, lr=0.0, per_token=pairs)


def test_every_drop_has_its_reason() -> None:
    """A guard's rollout has no values; one of a mismatched engine has, and no token of it counted."""
    collected = [example(n=2), example(n=3, dropped="repetition"), example(n=1), example(n=2)]
    outputs = [output(([1.0, 1.0], [1.0, 0.0]), ([9.0], [0.0])), output(([1.1, 9.0], [0.0, 0.0]), ([], []))]
    found = shards.updated(collected, outputs, threshold=5.0)
    assert [kept.dropped for kept in found] == [None, "repetition", shards.SEQUENCE_ERROR, shards.SEQUENCE_ERROR]
    assert found[1].per_token == {} and found[0].per_token["mask"].tolist() == [1.0, 0.0]
    assert shards.updated(collected, outputs, threshold=6.0)[3].dropped is None
    with pytest.raises(ValueError, match="values for 5 tokens, the rollouts have 9"):
        shards.updated([*collected, example(n=4)], outputs)


def test_a_shard_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rollouts = [
        UpdatedRollout(item=example(n=2), per_token={"advantage": torch.tensor([0.5, -0.0])}),
        UpdatedRollout(item=example("loud", sample=1, dropped="silence"), dropped="silence"),
        UpdatedRollout(item=example().rollout, per_token={"entropy": torch.tensor([1.0, float("nan"), 0.1])}),
    ]
    shards.save(tmp_path, 12, {"format": shards.FORMAT, "step": 12, "note": 0.1}, rollouts)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_0000012.json", "step_0000012.safetensors"]
    shard = shards.read(tmp_path, 12)
    assert shard.header["note"] == 0.1 and [kept.dropped for kept in shard.rollouts] == [None, "silence", None]
    assert in_flight.pack([shard.rollouts]) == in_flight.pack([rollouts])


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    def fresh() -> tuple[Path, Path]:
        shards.save(tmp_path, 3, {"format": shards.FORMAT, "step": 3}, [UpdatedRollout(item=example())])
        return shards.files(tmp_path, 3)

    header, tensors = fresh()
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1  # one bit of one log-probability
    tensors.write_bytes(bytes(content))
    with pytest.raises(ConfigurationError, match=r"step_0000003.safetensors: damaged: its sha256 .*copy both files"):
        shards.read(tmp_path, 3)
    header, tensors = fresh()
    header.write_text(header.read_text().replace('"first"', '"second"'))  # another teacher's name
    with pytest.raises(ConfigurationError, match=r"step_0000003.json: damaged: its sha256"):
        shards.read(tmp_path, 3)
    for text in ("", "{", "[]", "{}", '{"sha256": 1}', "\x00"):
        header.write_text(text)
        with pytest.raises(ConfigurationError, match=r"step_0000003.json: damaged: .*remove them"):
            shards.read(tmp_path, 3)
    header, tensors = fresh()
    tensors.unlink()
    with pytest.raises(ConfigurationError, match=r"step_0000003.json: damaged: FileNotFoundError"):
        shards.read(tmp_path, 3)
    for step in (4, 5, 9):
        shards.save(tmp_path, step, {"format": shards.FORMAT, "step": step}, [])
    with pytest.raises(ConfigurationError, match=r"step_0000007.json: no such shard; .* holds steps 3 to 5, 9"):
        shards.read(tmp_path, 7)
    with pytest.raises(ConfigurationError, match=r"holds none; set rollout.shards"):
        shards.read(tmp_path / "elsewhere", 7)


def keep_some(root: Path, mopd: dict[str, Any], directory: str, changes: dict[str, Any]) -> list[int]:
    config = build_config(tree(root / directory, **overlay(mopd, changes)))
    trainer = Trainer(config, parallel.initialize(config.parallel, 7))
    trainer.resume()
    trainer.run()
    return shards.steps(root / directory / shards.FOLDER)


def test_the_newest_stay_and_those_that_can_be_replayed(ranks: Any, school: Any) -> None:
    root, mopd = school
    settings = {"rollout": {"shards": 2, "prompts_per_step": 2}, "checkpoint": {"every": 3, "keep": 1}}
    assert ranks(1, keep_some, root, mopd, "kept", overlay(settings, {"run": {"steps": 6}}))[0] == [1, 4, 5, 6]
    header = {step: shards.read(root / "kept" / shards.FOLDER, step).header for step in (1, 4, 5)}
    assert header[1]["weights_sha"] and header[4]["weights_sha"] and header[5]["weights_sha"] is None
    # A run that goes on drops the shard after the checkpoint that made room for the next.
    assert ranks(1, keep_some, root, mopd, "kept", overlay(settings, {"run": {"steps": 8}}))[0] == [1, 7, 8]
    off = {"rollout": {"prompts_per_step": 2}}
    assert ranks(1, keep_some, root, mopd, "none", off)[0] == [] and not (root / "none" / shards.FOLDER).exists()


def test_shards_of_an_abandoned_future_go_first(tmp_path: Path, groups: Groups) -> None:
    config = build_config(
        tree(tmp_path, rollout={"shards": 9}, teachers={"t": {"checkpoint": "x", "domains": ["plain", "loud"]}})
    )
    writer = shards.Shards(config, groups)
    for step in (1, 2, 3, 2):
        writer.write(lambda step=step: {"step": step}, [example(n=1)], [output(([1.0], [1.0]))], {}, lambda: "sha")
    assert shards.steps(tmp_path / shards.FOLDER) == [1, 2]
    none = shards.Shards(config.model_copy(update={"rollout": config.rollout.model_copy(update={"shards": 0})}), groups)
    none.write(lambda: {"step": 2}, [], [], {}, lambda: "sha")  # of what is made anew nothing stays behind
    assert shards.steps(tmp_path / shards.FOLDER) == [1]
    said = none.of_stop(lambda: {"step": 3}, [], "why")
    assert "rollout.shards = 1" in said and shards.steps(tmp_path / shards.FOLDER) == [1]


def test_a_step_that_a_guard_stopped_before_its_update_is_kept(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = {"t": {"checkpoint": "x", "domains": ["plain", "loud"]}}
    writer = shards.Shards(build_config(tree(tmp_path, rollout={"shards": 9}, teachers=teachers)), groups)
    writer.write(lambda: {"step": 1}, [example(n=1)], [output(([1.0], [1.0]))], {}, lambda: "sha")
    assert "--step 1 shows" in writer.of_stop(lambda: {"step": 1}, [example(n=1)], "after its update")
    assert "--step 2 shows" in writer.of_stop(lambda: {"step": 2}, [example(n=2), example().rollout], "the reason")
    first, second = (shards.read(tmp_path / shards.FOLDER, step) for step in (1, 2))
    assert "stopped" not in first.header and first.rollouts[0].per_token
    assert second.header["stopped"] == "the reason" and second.header["metrics"] == {}
    assert [(kept.dropped, kept.per_token) for kept in second.rollouts] == [(shards.STOPPED, {})] * 2
    assert equal(second.rollouts[0].item, example(n=2))

    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save", full)
    said = writer.of_stop(lambda: {"step": 3}, [], "the guard's own words are not lost")
    assert "the rollouts of step 3 could not be written" in said and "No space left on device" in said


def fill_up(root: Path, mopd: dict[str, Any], name: str) -> tuple[str, list[int], int, list[int]]:
    """Two ranks whose disk is full while the shard of step 3 is written; then room is made and the run goes on."""
    changes = {"rollout": {"shards": 9}, "checkpoint": {"every": 2}, "run": {"steps": 4}}
    config = build_config(tree(root / name, **overlay(mopd, changes)))
    groups = parallel.initialize(config.parallel, 7)
    trainer, save = Trainer(config, groups), shards.save

    def full(directory: Path, step: int, header: Any, rollouts: Any) -> Path:
        if step < 3:
            return save(directory, step, header, rollouts)
        shards.files(directory, step)[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    shards.save = full  # type: ignore[assignment]
    try:
        with pytest.raises(ShardError) as failed:
            trainer.run()
    finally:
        shards.save = save
    torch.distributed.barrier()
    left = sorted(p.name for p in (root / name / shards.FOLDER).iterdir())
    assert len(left) == 4, left
    torch.distributed.barrier()
    again = Trainer(config, groups)
    again.resume()
    start = again.step_index
    again.run()
    torch.distributed.barrier()
    return str(failed.value), shards.steps(root / name / shards.FOLDER), start, [again.step_index]


def test_a_full_disk_says_what_is_safe_and_the_step_is_repeated(ranks: Any, school: Any) -> None:
    root, mopd = school
    for message, steps, start, end in ranks(2, fill_up, root, mopd, "full"):
        assert "the rollouts of step 3 could not be written: OSError: [Errno 28] No space left on device" in message
        assert "iter_0000002 is untouched" in message and "rollout.shards = 9" in message and "same command" in message
        assert (steps, start, end) == ([1, 2, 3, 4], 2, [4])


def test_scores_are_part_of_the_content() -> None:
    one = example()
    assert not equal(one, replace(one, teacher_logprobs=one.teacher_logprobs.nextafter(torch.zeros(3))))
