"""Worlds that the recipe's command starts beside a stage: the bits of the inline recipe, and one end for all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from scripts import LIMIT, end_of, finish, recipe_command

from megatron_mopd import worlds
from megatron_mopd.checkpoint_directory import read_manifest
from megatron_mopd.config import ConfigurationError
from megatron_mopd.metrics import read, untimed
from megatron_mopd.recipe import __main__ as command
from megatron_mopd.recipe import anew, beside, processes
from megatron_mopd.recipe.schema import SKIPPED, load_recipe

WORLDS = {"asynchrony": {"mode": "worlds"}}
SHOW = "import os; raise SystemExit(int(os.environ['CUDA_VISIBLE_DEVICES'].replace(',', '')))"
INLINE = ("mopd:asynchrony.mode=inline", "again:asynchrony.mode=inline", "worlds=null")


def write(folder: Path, **changes: Any) -> Path:
    """A teacher and a student that learns from it in two stages, with rollouts from worlds of one process each."""
    row = {"domain": "a", "completion": "xx", "verifier": {"kind": "exact", "answer": "xx"}}
    rows = [row | {"messages": [{"role": "user", "content": f"a {i}"}]} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    often = {"objective": {"type": "mopd"}, "run": {"steps": 10}, "checkpoint": {"every": 2}}
    tree = {
        "dir": str(folder / "runs"),
        "processes": 1,
        "common": {
            "model": {"pattern": "M*E", "max_sequence_length": 32},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 4, "lag": 1},
            "batching": {"micro_batch_size": 8, "sequences_per_step": 8},
            "optimizer": {"lr": 5e-3, "warmup_steps": 2},
            "data": {"train": [{"type": "jsonl", "path": str(folder / "train.jsonl")}]},
        },
        "stages": [
            {
                "name": "teacher",
                "settings": {
                    "source": {"type": "dataset"},
                    "objective": {"type": "cross_entropy"},
                    "run": {"steps": 6},
                },
            },
            {"name": "mopd", "teachers": {"teacher": ["a"]}, "settings": often | WORLDS},
            {
                "name": "again",
                "initial": "mopd",
                "teachers": {"teacher": ["a"]},
                "settings": often | WORLDS | {"run": {"steps": 2, "seed": 3}},
            },
        ],
        "worlds": {"rollout": {"processes": 1}, "scoring": {"processes": 1}},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# --------------------------------------------------------------------------- what the section says


def test_worlds_have_the_stage_with_settings_of_their_own(tmp_path: Path) -> None:
    own = ["worlds.rollout.processes=2", "worlds.rollout.settings.parallel.tensor=2"]
    recipe = load_recipe(write(tmp_path), own)
    beside.check(recipe)
    assert recipe.worlds is not None and recipe.worlds.rollout.processes == 2
    for world in ("rollout", "scoring"):
        assert [stage.name for stage in beside.served(recipe, world)] == ["mopd", "again"]
        assert [stage.name for stage in beside.served(recipe, world, until="mopd")] == ["mopd"]
        assert beside.served(recipe, world, until="teacher") == []
        config = beside.config_of(recipe, recipe.stage("mopd", ""), world)
        assert config.parallel.tensor == (2 if world == "rollout" else 1)
        assert config.run.dir == tmp_path / "runs" / "mopd"
        assert config.teachers["teacher"].checkpoint == tmp_path / "runs" / "teacher" / "checkpoints"


def test_the_command_starts_each_world_with_the_words_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    monkeypatch.setenv("DRY_RUN", "1")
    assert command.main([str(path), "worlds.rollout.processes=3", "--until", "mopd"]) == 0
    training, rollout, scoring = capsys.readouterr().out.splitlines()
    assert "megatron_mopd.runner" in training
    for line, world, count in ((rollout, "rollout", 3), (scoring, "scoring", 1)):
        assert f"--nproc_per_node={count} --standalone" in line
        assert line.endswith(f"megatron_mopd.worlds {world} {path} worlds.rollout.processes=3 --until mopd")
    assert command.main([str(path), "--until", "teacher"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "here")
    assert command.main([str(path)]) == 0
    *told, training = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "--nnodes=2" in training
    assert all("to be started beside this" in line and "once this has begun (with --from: " in line for line in told)


def test_a_world_may_have_devices_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path)
    overrides = ["worlds.rollout.devices=[4, 5]"]
    arguments = command.parser().parse_intermixed_args([str(path), *overrides])
    made = command._worlds(load_recipe(path, overrides), arguments, {})
    assert made["rollout"].environment == {"CUDA_VISIBLE_DEVICES": "4,5"} and made["scoring"].environment == {}
    assert made["rollout"].line.startswith(f"CUDA_VISIBLE_DEVICES=4,5 {sys.executable} -m torch.distributed.run ")
    rollout, scoring = beside.by_hand(load_recipe(path, overrides), path, overrides, None)
    assert rollout.startswith("CUDA_VISIBLE_DEVICES=4,5 torchrun ") and scoring.startswith("torchrun ")
    seen = processes.Command(words=[sys.executable, "-c", SHOW], environment={"CUDA_VISIBLE_DEVICES": "4,5"})
    assert processes.run(seen, {}) == 45


BOOSTED = {
    "name": "boosted",
    "settings": {
        "model": {"pattern": "M*E/*E"},
        "objective": {"type": "mtp_boosting"},
        "asynchrony": {"mode": "worlds"},
        "run": {"steps": 2},
    },
}
WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "nobody draws": (
        {"worlds": None},
        [],
        r"worlds in mopd, again, .*no section worlds.*worlds: \{rollout: .*mode to inline.*"
        r"megatron_mopd.worlds rollout .*;.* megatron_mopd.worlds scoring ",
    ),
    "nobody is waited for": ({}, list(INLINE[:2]), "no stage has asynchrony.mode = worlds.*take the"),
    "nobody scores": ({}, ["worlds.scoring=null"], "worlds.scoring: missing, and the stage 'mopd'.*add scoring"),
    "nothing to score": (
        {"stages": [BOOSTED]},
        [],
        "worlds.scoring: no stage .* objective.type = mopd.*take it out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_section_that_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, overrides, message = WRONG[name]
    path = write(tmp_path, **changes)
    assert command.main([str(path), *overrides]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()


def test_no_world_joins_a_run_that_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(anew, "PATIENCE", 0.0)
    monkeypatch.setattr(processes, "run", lambda training, worlds: pytest.fail("started"))
    with anew.alone(tmp_path / "runs"):
        assert command.main([str(path)]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err


# --------------------------------------------------------------------------- which stages a world serves

LEADER: Any = SimpleNamespace(rank=0)


def looked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What each look for a stage finds, of which there is one instead of many."""
    found: list[str | None] = []
    monkeypatch.setattr(worlds, "awaited", lambda groups, look, watches, pause: found.append(look()) or found[-1])
    return found


def test_a_stage_that_is_over_or_skipped_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, found = load_recipe(write(tmp_path), []), looked(monkeypatch)
    stage, directory = recipe.stage("mopd", ""), tmp_path / "runs" / "mopd"
    directory.mkdir(parents=True)
    for name, content in ((None, ""), ("stage.json", '{"finished": false}'), ("stage.json", '{"finished": true}')):
        if name is not None:
            (directory / name).write_text(content)
        assert worlds._begun(recipe, stage, "rollout", LEADER) is None
    (directory / "stage.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"stage\.json: cannot be read: .*remove it and start the training"):
        worlds._begun(recipe, stage, "rollout", LEADER)
    (directory / "stage.json").unlink()
    (directory / SKIPPED).write_text("{}")  # a warm-up that no teacher needed
    assert worlds._begun(recipe, stage, "rollout", LEADER) is None
    assert found == [None, None, "over", "over"]


def test_a_stage_by_its_name_is_served_as_one_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, served = str(write(tmp_path)), []
    monkeypatch.setattr(worlds, "reported", nullcontext)  # takes down this process's groups
    monkeypatch.setattr(worlds, "serve", lambda recipe, world, stages: served.append([s.name for s in stages]))
    asked = [["--stage", "again"], ["--until", "mopd"], []]
    for words in asked:
        monkeypatch.setattr(sys, "argv", ["worlds", "scoring", path, *words])
        worlds.main()
    assert served == [["again"], ["mopd"], ["mopd", "again"]]
    wrong = {"--stage teacher": "stage teacher does not wait", "--until teacher": "no stage up to teacher waits"}
    for words, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["worlds", "scoring", path, *words.split()])
        with pytest.raises(ConfigurationError, match=f"{message} for a scoring world: set asynchrony.mode = worlds"):
            worlds.main()


# --------------------------------------------------------------------------- programs that end together


def script(text: str) -> processes.Command:
    return processes.Command(words=[sys.executable, "-c", text])


SLEEP = "import time; time.sleep(60)"


def test_a_training_that_ends_ends_its_worlds_and_says_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    start = time.monotonic()
    assert processes.run(script("raise SystemExit(3)"), {"rollout": script(SLEEP)}) == 3
    assert processes.run(script(""), {"rollout": script(SLEEP)}) == 0
    assert time.monotonic() - start < 20


def test_a_world_that_fails_ends_the_training(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    worlds = {"rollout": script("print('drawing', flush=True); raise SystemExit(5)"), "scoring": script(SLEEP)}
    assert processes.run(script(SLEEP), worlds) == 5
    said = capfd.readouterr()
    assert "rollout: drawing\n" in said.err and "the rollout world ended with status 5" in said.out


def test_a_world_that_fails_with_the_training_is_not_blamed(capfd: pytest.CaptureFixture[str]) -> None:
    training = script("import time; time.sleep(1); raise SystemExit(4)")
    assert processes.run(training, {"rollout": script("raise SystemExit(5)")}) == 4
    assert "world ended" not in capfd.readouterr().out


def started(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> list[subprocess.Popen[bytes]]:
    """The programs that are started, in order; ``then`` is called with the number of each before the next."""
    made, original = [], subprocess.Popen

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        made.append(original(*args, **options))
        then(len(made))
        return made[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    return made


def test_a_world_that_cannot_be_started_leaves_no_training_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = started(monkeypatch, lambda count: None)
    worlds = {"rollout": script(SLEEP), "scoring": processes.Command(words=["/no/such/program"])}
    with pytest.raises(FileNotFoundError):
        processes.run(script(SLEEP), worlds)
    assert len(made) == 2 and all(child.returncode == -signal.SIGTERM for child in made)


def test_a_signal_while_programs_are_started_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the second runs and is not yet among those who are told of signals; the third never starts."""
    made = started(monkeypatch, lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 2 else None)
    worlds = {"rollout": script(SLEEP), "scoring": script(SLEEP)}
    assert processes.run(script(SLEEP), worlds) == -signal.SIGTERM
    assert len(made) == 2 and all(child.returncode == -signal.SIGTERM for child in made)


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel tells a child")
def test_worlds_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    said = "import os, pathlib, time; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(60)"
    files = [tmp_path / name for name in ("training", "rollout")]
    training, rollout = (script(said.format(str(file))) for file in files)
    command = get_context("fork").Process(target=processes.run, args=(training, {"rollout": rollout}))
    command.start()
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
    command.kill()
    command.join()
    wait_until(lambda: not any(is_alive(int(file.read_text())) for file in files))


def wait_until(done: Callable[[], bool], limit: float = 30.0) -> None:
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """A zombie, which nobody has asked for its end, is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --------------------------------------------------------------------------- the whole command


def processes_of(path: Path) -> list[int]:
    """Everything that still works for the recipe."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def outcome(runs: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """Weights and metrics of both stages."""
    stages = [runs / name for name in ("mopd", "again")]
    return [(read_manifest(s / "checkpoints")["checkpoint_id"], [untimed(row) for row in read(s)]) for s in stages]


def rank_of(world: str) -> Callable[[subprocess.Popen[str], Path], None]:
    """kill -9 of a world's only rank."""

    def harm(running: subprocess.Popen[str], runs: Path) -> None:
        os.kill(json.loads((runs / "mopd" / "exchange" / f"{world}.json").read_text())["process"], signal.SIGKILL)

    return harm


def terminated(running: subprocess.Popen[str], runs: Path) -> None:
    running.send_signal(signal.SIGTERM)


def interrupted(running: subprocess.Popen[str], runs: Path) -> None:
    """Ctrl-C, which a terminal sends to all of the command's programs."""
    os.killpg(running.pid, signal.SIGINT)


@pytest.mark.slow
def test_a_stage_with_worlds_has_the_bits_of_the_inline_one_whatever_ends_it_on_its_way(tmp_path: Path) -> None:
    (tmp_path / "inline").mkdir()
    (tmp_path / "worlds").mkdir()
    finish(write(tmp_path / "inline"), *INLINE)
    expected = outcome(tmp_path / "inline" / "runs")
    path, runs = write(tmp_path / "worlds"), tmp_path / "worlds" / "runs"
    running = recipe_command(path)  # killed when its worlds begin to wait for a stage of theirs
    assert running.stdout is not None and any("stage mopd: waiting" in line for line in running.stdout)
    running.kill()
    running.wait()
    wait_until(lambda: processes_of(path) == [], 60)
    ends = [(rank_of("rollout"), 2), (terminated, 4), (rank_of("training"), 6), (interrupted, 8)]
    for harm, step in ends:
        running = recipe_command(path)
        try:
            deadline = time.monotonic() + LIMIT
            while not (runs / "mopd" / "checkpoints" / f"iter_{step:07d}").is_dir():
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            harm(running, runs)
        except BaseException:
            running.terminate()
            raise
        said = end_of(running)
        assert running.returncode != 0 and "rollout: " in said and "scoring: " in said, said[-4000:]
        assert "mopd goes on after step" in said, said[-4000:]
        assert ("the rollout world ended with status" in said) == (step == 2), said[-4000:]
        assert processes_of(path) == []
    finish(path)
    found = outcome(runs)
    assert found == expected and [len(rows) for _, rows in found] == [10, 2]
    assert finish(path).count("finished and unchanged, kept") == 3
