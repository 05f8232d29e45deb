"""A recipe with every type of stage, run by its command on two processes; one of them is killed at some stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import LIMIT, end_of, finish, recipe_command

from megatron_mopd.recipe import anew
from megatron_mopd.recipe.schema import load_recipe

pytestmark = pytest.mark.slow

TIMES = ("wall_s", "measure_s", "memory_bytes", "versions", "ended")


def rows(domain: str, answer: str, first: int, count: int) -> list[dict[str, Any]]:
    """Tasks that a tiny model learns in seconds: every prompt of a domain has the same answer."""
    return [
        {
            "messages": [{"role": "user", "content": f"{domain} {first + i}"}],
            "domain": domain,
            "completion": answer,
            "verifier": {"kind": "exact", "answer": answer},
        }
        for i in range(count)
    ]


def write(folder: Path) -> Path:
    for name, first, count in (("train", 100, 40), ("held_out", 500, 12)):
        for domain, answer in (("a", "xx"), ("b", "yz")):
            text = "".join(json.dumps(row) + "\n" for row in rows(domain, answer, first, count))
            (folder / f"{name}_{domain}.jsonl").write_text(text)
    a, b = ({"type": "jsonl", "path": str(folder / f"train_{d}.jsonl")} for d in "ab")
    sft = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "run": {"steps": 16}}
    one, other = sft | {"data": {"train": [a]}}, sft | {"data": {"train": [b]}}
    teachers = {"first": ["a"], "second": ["b"]}
    traces = sft | {"source": {"type": "traces", "per_domain": 8}, "run": {"steps": 6}}
    often, slow = {"checkpoint": {"every": 2}}, {"optimizer": {"lr": 1e-4}}
    mopd = often | {"objective": {"type": "mopd"}, "run": {"steps": 8}}
    tree = {
        "dir": str(folder / "runs"),
        "processes": 2,
        "common": {
            "model": {"pattern": "M*E/*E", "max_sequence_length": 32},
            "rollout": {"prompts_per_step": 16, "max_new_tokens": 5, "lag": 1},
            "batching": {"micro_batch_size": 8, "sequences_per_step": 16},
            "optimizer": {"lr": 5e-3, "warmup_steps": 2},
            "evaluation": {"every": 4, "samples": 4, "final_samples": 12},
            "preflight": {"samples": 12, "top_k": 8, "min_shared_mass": 0.9999},
            "data": {
                "train": [a, b],
                "held_out": [{"type": "jsonl", "path": str(folder / f"held_out_{d}.jsonl")} for d in "ab"],
            },
        },
        "stages": [
            {"name": "sft", "settings": sft | {"run": {"steps": 3}}},
            # So slowly that it is still wrong in domain a, which its teacher is right in.
            {"name": "student", "initial": "sft", "settings": sft | often | slow | {"run": {"steps": 4}}},
            {"name": "first", "initial": "student", "settings": one},
            {"name": "second", "initial": "student", "settings": other},
            {"name": "preflight", "type": "preflight", "initial": "student", "teachers": teachers},
            {
                "name": "warm_up",
                "initial": "student",
                "after": "preflight",
                "teachers": teachers,
                "settings": traces,
            },
            {"name": "mopd1", "initial": "warm_up", "teachers": teachers, "settings": mopd},
            {"name": "second2", "initial": "mopd1", "settings": other | {"run": {"steps": 4}}},
            {
                "name": "mopd2",
                "initial": "mopd1",
                "teachers": {"first": ["a"], "second2": ["b"]},
                "settings": mopd,
            },
            {"name": "after", "type": "preflight", "initial": "mopd2", "teachers": teachers},
            {
                "name": "boosted",
                "initial": "mopd2",
                "settings": {
                    "objective": {"type": "mtp_boosting"},
                    "run": {"steps": 4},
                    "checkpoint": {"every": 2, "export": "hugging_face"},
                },
            },
            {
                "name": "nvfp4",
                "type": "quantize",
                "initial": "boosted",
                "settings": {"recipe": "ultra-ptq", "four_over_six": "mse"},
            },
        ],
        "report": {
            "sft": "sft",
            "before": "student",
            "iterations": ["mopd1", "mopd2"],
            "boosted": "boosted",
            "quantized": "nvfp4",
            "preflight": "preflight",
            "preflight_after": "after",
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def ranks_of(path: Path) -> dict[int, int]:
    """Rank -> process of the running recipe."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (
                b"megatron_mopd.runner" in words
                and str(path).encode() in words
                and b"torch.distributed.run" not in words
            ):
                environment = dict(v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v)
                found[int(environment[b"RANK"])] = int(entry.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


def outcome(runs: Path) -> dict[str, Any]:
    """Everything that stages left and that is not a time."""
    found: dict[str, Any] = {}
    for file in sorted(runs.glob("*/*.json")):
        if file.name == "run.json" or file.parent.name == "set_aside":
            continue
        tree = json.loads(file.read_text())
        found[f"{file.parent.name}/{file.name}"] = {k: v for k, v in tree.items() if k not in TIMES}
    for file in sorted(runs.glob("*/checkpoints/iter_*/mopd_manifest.json")):
        found[file.relative_to(runs).as_posix()] = json.loads(file.read_text())["checkpoint_id"]
    for file in sorted(runs.glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[f"{file.parent.name}/metrics"] = [
            {k: v for k, v in line.items() if not k.startswith("time") and k != "wall_s"} for line in lines
        ]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A run that nobody disturbed."""

    path: Path
    outcome: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("recipe")
    path = write(folder)
    said = finish(path)
    return Whole(path=path, outcome=outcome(folder / "runs"), said=said)


def test_the_command_runs_all_stages_and_leaves_report_and_graph(whole: Whole) -> None:
    runs = whole.path.parent / "runs"
    recipe = load_recipe(whole.path, [])
    assert all(json.loads((runs / name / "stage.json").read_text())["finished"] for name in recipe.names)
    assert {"graph.json", "graph.png", "report.json", "report.md"} <= {p.name for p in runs.iterdir()}
    graph = json.loads((runs / "graph.json").read_text())
    kinds = {edge["kind"] for edge in graph["edges"]}
    assert kinds == {"initial", "teacher", "traces", "measured", "decides", "quantized"}
    assert all(node["state"] == "finished" for node in graph["nodes"])
    decisions = json.loads((runs / "preflight" / "preflight.json").read_text())["teachers"]
    assert {entry["decision"] for entry in decisions.values()} <= {"go", "warm_up"}
    assert (runs / "boosted" / "hugging_face" / "model.safetensors").is_file()
    assert (runs / "nvfp4" / "quantized" / "hf_quant_config.json").is_file()
    assert (runs / "warm_up" / "traces" / "traces.jsonl").read_text().count("\n") == 16


def test_a_second_start_keeps_everything(whole: Whole) -> None:
    said = finish(whole.path)
    assert said.count("finished and unchanged, kept") == len(load_recipe(whole.path, []).names)
    assert outcome(whole.path.parent / "runs") == whole.outcome


def test_teachers_that_came_as_checkpoints_teach_like_stages(whole: Whole, tmp_path: Path) -> None:
    """The recipe once more without the stages of its first two teachers, one of which lies in the directory of its run:
    measured, warmed up to and learned from, they give the same students and the same recovery."""
    runs = whole.path.parent / "runs"
    shutil.copytree(runs / "second" / "checkpoints", tmp_path / "second")
    tree = yaml.safe_load(whole.path.read_text())
    given = {
        "first": {"checkpoint": str(runs / "first" / "checkpoints"), "domains": ["a"]},
        "second": {"checkpoint": str(tmp_path / "second"), "domains": ["b"]},
    }
    kept = ("sft", "student", "preflight", "warm_up", "mopd1")
    stages = [stage for stage in tree["stages"] if stage["name"] in kept]
    for stage in stages[2:]:
        stage["settings"] = stage.get("settings", {}) | {"teachers": given}
        del stage["teachers"]
    roles = {"sft": "sft", "before": "student", "iterations": ["mopd1"], "preflight": "preflight"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"dir": str(tmp_path / "runs"), "stages": stages, "report": roles}))
    finish(path)
    again = outcome(tmp_path / "runs")
    same = [name for name in again if name.startswith("mopd1/checkpoints") or name.endswith("preflight.json")]
    assert len(same) == 3 and {name: again[name] for name in same} == {name: whole.outcome[name] for name in same}
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert {row["before"]["teacher"] for row in report["overlap"].values()} == {"first", "second"}
    rows, known = report["distilled"], json.loads((runs / "report.json").read_text())["distilled"]
    gaps = {}
    for domain in ("a", "b"):
        cells = rows[domain]["cells"]
        assert cells["teacher"]["total"] == 12 and cells["teacher"] == known[domain]["cells"]["first_teacher"]
        before, after, goal = (cells[key]["rate"] for key in ("before", "mopd_1", "teacher"))
        gaps[domain] = goal - before
        recovery = (after - before) / gaps[domain] if gaps[domain] > 0 else None  # none to a teacher no better
        assert rows[domain]["recovery"]["value"] == pytest.approx(recovery)
    assert max(gaps.values()) > 0


def has(*names: str) -> Callable[[Path], bool]:
    return lambda directory: any((directory / name).exists() for name in names)


@pytest.mark.parametrize(
    ("stage", "rank", "moment"),
    [
        ("student", 0, has("checkpoints/iter_0000002")),
        ("preflight", 1, has("stage.json")),
        ("warm_up", 0, has("stage.json")),
        ("mopd1", 1, has("checkpoints/iter_0000004")),
        ("boosted", 0, has("checkpoints/iter_0000002")),
        ("nvfp4", 0, has("quantized.partial", "quantized", "stage.json")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_killed_rank_changes_no_digit(whole: Whole, stage: str, rank: int, moment: Callable[[Path], bool]) -> None:
    runs = whole.path.parent / "runs"
    recipe = load_recipe(whole.path, [])
    anew.set_aside(recipe, stage)
    running = recipe_command(whole.path)
    try:
        deadline = time.monotonic() + LIMIT
        while not moment(runs / stage):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(ranks_of(whole.path)[rank], signal.SIGKILL)
    except BaseException:
        running.terminate()
        raise
    said = end_of(running)
    assert running.returncode == 1
    *_, where, again = said.splitlines()
    assert f"{stage} " in where
    assert again == f"Once the reason is removed, go on with: python -m megatron_mopd.recipe {whole.path}"
    assert json.loads((runs / stage / "stage.json").read_text())["finished"] is False
    finish(whole.path)
    assert outcome(runs) == whole.outcome
