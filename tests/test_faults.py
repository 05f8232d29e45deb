"""Faults, made on purpose: what is learned stays right, what was saved stays good, and the message says what happened.

Run as a script this file is the training command with one fault in it; torchrun starts it in the slow tests.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_stages import SFT, stage

from megatron_mopd import checkpoint, checkpoint_directory, failures, metrics, parallel, provenance, train, watchdog
from megatron_mopd.config import ConfigurationError, Parallel, build_config
from megatron_mopd.files import WriteError
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import Rollout
from megatron_mopd.scoring import Scorer, ScoringError
from megatron_mopd.shards import ShardError
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.trainer import Trainer

HERE = Path(__file__)


def tree(directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A MOPD stage of seconds under ``directory``, whose teachers are under it too."""
    own = {
        "run": {"steps": 4, "id": "run"},
        "rollout": {"prompts_per_step": 8, "lag": 1},
        "checkpoint": {"every": 1, "keep": 9},
        "teachers": {
            "first": {"checkpoint": str(directory / "first" / "checkpoints"), "domains": ["plain"]},
            "second": {"checkpoint": str(directory / "second" / "checkpoints"), "domains": ["loud"]},
        },
    }
    return stage(directory / name, own, changes)


def teach(directory: Path) -> None:
    """Two teachers of random weights that differ."""
    groups = parallel.initialize(Parallel(), 0)
    for seed, name in enumerate(("first", "second")):
        own = tree(directory, name, rollout={"lag": 0}, **SFT) | {"teachers": {}}
        Trainer(build_config(own), dataclasses.replace(groups, seed=100 + seed)).save()


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    ranks(1, teach, root)
    return root


@pytest.fixture
def running(school: Path, groups: Any) -> Callable[..., Any]:
    """Train in this process as the command does; the run's directory."""

    def run(name: str, **changes: Any) -> Path:
        train.run_stage(build_config(tree(school, name, **changes)), groups)
        return school / name

    return run


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Whose weights came out, and every metric of every step but times."""
    identity = checkpoint.read_manifest(run / "checkpoints")["checkpoint_id"]
    return identity, [metrics.untimed(row) for row in metrics.read(run)]


@pytest.fixture(scope="module")
def whole(school: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The outcome of a run that nothing disturbs."""
    groups = parallel.initialize(Parallel(), seed=42)
    train.run_stage(build_config(tree(school, "whole", rollout={"shards": 2})), groups)
    parallel.destroy()
    yield outcome(school / "whole")


# --------------------------------------------------------------------------- teachers


def test_a_teacher_that_returns_nan_changes_nothing(
    running: Any, whole: Any, school: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Scorer.logprobs

    def poisoned(self: Scorer, *args: Any) -> torch.Tensor:
        values = plain(self, *args)
        if checkpoint_directory.latest(school / "nan" / "checkpoints") and len(values) > 2:
            values[2] = float("nan")
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "logprobs", poisoned)
        with pytest.raises(ScoringError, match=r"teacher 'first' gives log-probability nan to token \d of prompt \w+"):
            running("nan", rollout={"shards": 2})
    left = checkpoint_directory.latest(school / "nan" / "checkpoints")
    assert left is not None and left.name == "iter_0000001"
    assert outcome(running("nan", rollout={"shards": 2})) == whole


def rollouts_of(trainer: Trainer) -> list[Rollout]:
    """As many rollouts of two prompts of equal length as are needed to mix them up."""
    drawn = trainer.source.draw(trainer.policy)
    first = next(r for r in drawn if r.prompt.domain == "plain")
    other = first.completion.flip(0) + 1
    prompt = dataclasses.replace(first.prompt, id="another", tokens=(*first.prompt.tokens[:-1], 9))
    return [first, dataclasses.replace(first, prompt=prompt, completion=other)]


@pytest.mark.parametrize("answered", ["swapped", "a stranger", "too few", "packed otherwise"])
def test_a_teacher_that_answers_for_another_prompt_is_found_out(
    school: Path, groups: Any, monkeypatch: pytest.MonkeyPatch, answered: str
) -> None:
    """Lengths are equal throughout, and so every value would fit somewhere."""
    trainer = Trainer(build_config(tree(school, "mixed")), groups)
    assert trainer.teachers is not None
    pair = rollouts_of(trainer)
    one, two = trainer.teachers.score(pair)  # asked and answered: fine
    assert len(one.teacher_logprobs) == len(two.teacher_logprobs)
    assert not torch.equal(one.teacher_logprobs, two.teacher_logprobs)
    stranger = dataclasses.replace(pair[0], prompt=dataclasses.replace(pair[0].prompt, tokens=(3,) * 8))
    served = {"swapped": pair[::-1], "a stranger": [pair[0], stranger], "too few": pair[:1]}
    plain = TeacherPool._answer

    def mixed(self: TeacherPool, name: str, model: Any, micro_batches: Any) -> Any:
        return plain(self, name, model, self.scorer.pack(served[answered]))

    if answered == "packed otherwise":
        packed = Scorer.pack
        monkeypatch.setattr(Scorer, "pack", lambda self, rollouts: packed(self, rollouts[::-1]))
    else:
        monkeypatch.setattr(TeacherPool, "_answer", mixed)
    said = r"teacher 'first' was asked to score sample 0 of prompt \w+ \(plain\) and answered for " + {
        "a stranger": "a sequence that nobody asked for",
        "too few": "nothing",
    }.get(answered, "prompt another")
    with pytest.raises(ScoringError, match=said):
        trainer.teachers.score(pair)


def test_scores_that_changed_places_on_their_way_never_meet_an_update(school: Path, groups: Any) -> None:
    trainer = Trainer(build_config(tree(school, "places")), groups)
    assert trainer.teachers is not None
    one, two = trainer.teachers.score(rollouts_of(trainer))
    provenance.check([one, two], trainer.policy, 0, trainer.tokenizer, trainer.teachers)

    for asked, answered in ((one.rollout, two), (two.rollout, one)):
        asked = dataclasses.replace(asked, provenance=answered.rollout.provenance)
        item = dataclasses.replace(answered, rollout=asked)
        with pytest.raises(ProvenanceError, match=r"the sha256 of the scored tokens is '\w+', this run expects"):
            provenance.check([item], trainer.policy, 0, trainer.tokenizer, trainer.teachers)


HANGS = """
import time, threading
from megatron_mopd import watchdog
real, time.time = time.time, lambda: real() + 1e9 * (-1) ** int(10 * time.monotonic())
with watchdog.watched(1000, "never said"):
    time.sleep(0.3)
print("passed", threading.active_count(), flush=True)
def stuck_in_here():
    time.sleep(1000)
with watchdog.watched(0.4, "teacher 'x' has not answered"):
    stuck_in_here()
"""


def test_a_watchdog_ends_what_hangs_says_where_and_heeds_no_clock_that_is_set(tmp_path: Path) -> None:
    told = tmp_path / "error.json"
    environment = os.environ | {"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_ERROR_FILE": str(told)}
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stdout.split()[0] == "passed" and int(done.stdout.split()[1]) <= 2
    assert "stuck_in_here" in done.stderr and "never said" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error on rank 3: teacher 'x' has not answered"
    assert "teacher 'x' has not answered" in json.loads(told.read_text())["message"]["extraInfo"]["py_callstack"]


def test_a_watchdog_leaves_no_thread_behind() -> None:
    for error in (None, ValueError):
        try:
            with watchdog.watched(100, "never said"):
                if error is not None:
                    raise error
        except ValueError:
            pass
    deadline = time.monotonic() + 10
    while any(thread.name == "watchdog" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scoring_is_watched_by_name(school: Path, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(build_config(tree(school, "watched", guards={"teacher_timeout": 77})), groups)
    assert trainer.teachers is not None
    seen: list[tuple[float, str]] = []
    monkeypatch.setattr(watchdog, "watched", lambda *given: seen.append(given) or nullcontext())
    scored = trainer.teachers.score(trainer.source.draw(trainer.policy))
    trainer.teachers.reverse_kl(trainer.learner.module, scored)
    assert [seconds for seconds, _ in seen] == [77] * len(seen) and len(seen) == 4
    assert "teacher 'first'" in seen[0][1] and "rank 0" in seen[0][1] and "guards.teacher_timeout" in seen[0][1]


# --------------------------------------------------------------------------- disks and clocks


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("victim", ["metrics", "checkpoint", "shards", "result"])
def test_a_full_disk_costs_the_step_it_hit_and_the_same_command_goes_on(
    running: Any, whole: Any, school: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    run, name = school / f"full-{victim}", f"full-{victim}"
    after = {"metrics": 2, "checkpoint": 2, "shards": 2, "result": 4}[victim]
    sync, write = os.fsync, checkpoint_directory.write
    hit = {"metrics": "metrics.jsonl", "shards": "step_0000003", "result": "result.json"}.get(victim, "")

    def fsync(descriptor: int) -> None:
        reached = (run / "checkpoints" / f"iter_{after:07d}").is_dir()
        if reached and hit and hit in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        sync(descriptor)

    def written(file: Path, content: bytes) -> None:
        if victim == "checkpoint" and "iter_0000003" in str(file) and file.name == "mopd_rollouts.json":
            file.write_bytes(content[:10])
            full()
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(checkpoint_directory, "write", written)
        with pytest.raises((WriteError, checkpoint.CheckpointError, ShardError)) as raised:
            running(name, rollout={"shards": 2})
    text = str(raised.value)
    assert os.strerror(errno.ENOSPC) in text and "make room" in text and "start the same command again" in text
    assert isinstance(raised.value, train.RUN_ERRORS)
    left = checkpoint_directory.latest(run / "checkpoints")
    assert left is not None and left.name == f"iter_{after:07d}"
    assert not [p for p in run.rglob("*") if "partial" in p.name]
    assert outcome(running(name, rollout={"shards": 2})) == whole
    assert json.loads((run / "result.json").read_text())["versions"]


def test_a_row_cut_short_by_a_full_disk_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bytes of a row are on the disk and the rest finds no room."""
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        soft, hard = getrlimit(RLIMIT_FSIZE)
        setrlimit(RLIMIT_FSIZE, (writer.path.stat().st_size + 9, hard))
        try:
            with pytest.raises(WriteError, match=r"metrics\.jsonl: the row of step 2 could not be written"):
                writer.write(2, {"loss": 0.25})
        finally:
            setrlimit(RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / metrics.FILE_NAME).read_text().count("\n") == 1
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="the rows up to step 1"):
        metrics.MetricsWriter(tmp_path, resume_step=1)
    monkeypatch.undo()
    with metrics.MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 0.25})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


def test_one_flipped_bit_in_the_rollouts_of_a_checkpoint_is_found(running: Any, whole: Any, groups: Any) -> None:
    run = running("flipped", run={"steps": 2})
    newest = checkpoint_directory.latest(run / "checkpoints")
    assert newest is not None
    config = build_config(tree(run.parent, "flipped"))
    digits = (newest / "mopd_rollouts.json").read_bytes()
    places = {"mopd_rollouts.safetensors": -3, "mopd_rollouts.json": digits.index(b'"tokens": [') + 11}
    for name, position in places.items():
        flip(newest / name, position)
        trainer = Trainer(config, groups)
        before = [p.clone() for p in trainer.learner.module.parameters()]
        with pytest.raises(ConfigurationError, match=rf"{name}: its sha256 is .* remove it and resume an older"):
            trainer.resume()
        assert all(map(torch.equal, before, trainer.learner.module.parameters()))
        flip(newest / name, position)
    flip(newest / "mopd_rollouts.safetensors", -3)
    shutil.rmtree(newest)  # the way out that the message names
    assert outcome(running("flipped"))[0] == whole[0]


def test_a_clock_that_jumps_changes_nothing(running: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jump = time.time, random.Random(3)

    def jumping() -> float:
        return real() + jump.choice([-1e9, -3600.0, 0.0, 7200.0, 1e9])

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(metrics, "time", jumping)
    run = running("clock", run={"steps": 2})
    identity, rows = outcome(running("clock"))
    assert (identity, rows) == whole
    seconds = [row[name] for row in metrics.read(run) for name in row if name in ("time/collect", "time/update")]
    assert len(seconds) == 8 and all(0 < value < 100 for value in seconds)
    assert 0 < json.loads((run / "result.json").read_text())["wall_s"] < 600


# --------------------------------------------------------------------------- one rank fails


def test_the_first_rank_to_fail_is_the_one_that_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    file = tmp_path / "error.json"
    for name, value in (("TORCHELASTIC_ERROR_FILE", str(file)), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"^error on rank 1: teacher 'x' says nan$"), train.reported():
        raise ScoringError("teacher 'x' says nan")
    assert slept == [failures.GRACE] and "says nan" in json.loads(file.read_text())["message"]["message"]
    file.unlink()
    with pytest.raises(RuntimeError, match="closed by peer"), train.reported():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:16534")
    assert slept == [failures.GRACE, failures.PEERS] and not file.exists()
    with pytest.raises(RuntimeError, match="a bug"), train.reported():
        raise RuntimeError("a bug")
    assert len(slept) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit, match=r"^error: it does not fit$"), train.reported():
        raise ConfigurationError("it does not fit")
    assert len(slept) == 2


def torchrun(config: dict[str, Any], file: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Two ranks of this file as a script, which is the training command; ``fault`` is ``KIND PLACE RANK``."""
    file.write_text(yaml.safe_dump(config))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [sys.executable, *launch, str(HERE), str(file)]
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)


def since_the_fault(file: Path) -> float:
    """Seconds from the fault to now, by the clock that all processes share."""
    return time.monotonic() - float(file.with_suffix(".fault").read_text())


@pytest.fixture(scope="module")
def pair(school: Path) -> tuple[str, list[dict[str, Any]]]:
    """The outcome on two ranks that nothing disturbs."""
    done = torchrun(tree(school, "pair"), school / "pair.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(school / "pair")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), [("rollout", 0), ("score", 1), ("update", 0), ("write", 1), ("publish", 0)])
def test_a_rank_killed_at_any_stage_costs_at_most_the_current_step(
    school: Path, pair: Any, place: str, rank: int
) -> None:
    name = f"killed-{place}-{rank}"
    config, file = tree(school, name), school / f"{name}.yaml"
    killed = torchrun(config, file, f"kill {place} {rank}")
    assert killed.returncode != 0 and since_the_fault(file) < failures.PEERS
    assert f"rank      : {rank} (local_rank: {rank})" in killed.stderr.split("Root Cause")[1]
    assert "Signal 9 (SIGKILL)" in killed.stderr.split("Root Cause")[1]
    left = checkpoint_directory.latest(school / name / "checkpoints")
    assert left is not None and left.name in ("iter_0000001", "iter_0000002")
    assert not (school / name / "result.json").exists()
    again = torchrun(config, file)
    assert again.returncode == 0, again.stderr[-3000:]
    assert outcome(school / name) == pair


@pytest.mark.slow
def test_a_teacher_that_hangs_ends_the_run_and_is_named(school: Path, pair: Any) -> None:
    config, file = tree(school, "hung", guards={"teacher_timeout": 4}), school / "hung.yaml"
    hung = torchrun(config, file, "hang score 1")
    assert hung.returncode != 0 and 4 < since_the_fault(file) < failures.PEERS
    said = "teacher 'first' ("
    assert said in hung.stderr.split("Root Cause")[1] and "guards.teacher_timeout" in hung.stderr
    assert "has not answered rank 1 for 4 s" in hung.stderr and "in faulty" in hung.stderr  # where it stands
    assert torchrun(tree(school, "hung"), file).returncode == 0
    assert outcome(school / "hung") == pair


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuse", "crash"])
def test_an_exception_on_one_rank_ends_all_and_is_what_the_user_sees(school: Path, pair: Any, kind: str) -> None:
    config, file = tree(school, kind), school / f"{kind}.yaml"
    done = torchrun(config, file, f"{kind} update 1")
    assert done.returncode != 0 and since_the_fault(file) < failures.PEERS
    expected = {"refuse": "error on rank 1: made on purpose", "crash": "KeyError: 'made on purpose'"}[kind]
    assert expected in done.stderr and "made on purpose" in done.stderr.split("Root Cause")[1]
    assert "Connection closed by peer" not in done.stderr  # the other rank did not speak over it
    assert torchrun(config, file).returncode == 0
    assert outcome(school / kind) == pair


def commit(fault: str, checkpoints: Path, moment: Path) -> None:
    """Put one fault into this process, which notes the ``moment`` of it; it waits until the run has saved a
    checkpoint."""
    from megatron_mopd import rollout, update

    kind, place, rank = fault.split()
    owner, name = {
        "rollout": (rollout._Draw, "__call__"),
        "score": (Scorer, "predictions"),
        "update": (update.Learner, "_forward"),
        "write": (checkpoint, "_write_rest") if rank == "0" else (checkpoint._SynchronousSave, "save"),
        "publish": (checkpoint_directory, "sync"),
    }[place]
    plain = getattr(owner, name)

    def faulty(*args: Any, **options: Any) -> Any:
        due = checkpoint_directory.latest(checkpoints) is not None
        if place == "publish":  # renamed, and the pointer not moved
            due = due and (checkpoints / "iter_0000002").is_dir()
        if not due or os.environ["RANK"] != rank:
            return plain(*args, **options)
        moment.write_text(str(time.monotonic()))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(1000)
        raise ScoringError("made on purpose") if kind == "refuse" else KeyError("made on purpose")

    setattr(owner, name, faulty)


if __name__ == "__main__":
    if os.environ["FAULT"]:
        given = Path(sys.argv[1])
        run = Path(yaml.safe_load(given.read_text())["run"]["dir"])
        commit(os.environ["FAULT"], run / "checkpoints", given.with_suffix(".fault"))
    train.main()
