"""examples/recipe.yaml with fewer steps: every stage runs, distillation recovers what teachers can, warm-up helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_mopd.recipe.schema import load_recipe, stage_config

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "recipe.yaml"
PAIR = ("rank", "tenths")  # built for poor overlap
STEPS = {
    "sft": 120,
    "student": 10,
    "orderer": 50,
    "flipper": 10,
    "ranker": 60,
    "tenther": 60,
    "warm_up": 24,
    "mopd1": 45,
    "orderer2": 30,
    "mopd2": 60,
    "boosted": 10,
}
# Answers of flip and late have four times the tokens of the others: so few steps learn neither, and are cheap without.
SHORT = [
    "evaluation.final_samples=200",
    "evaluation.every=0",
    "preflight.samples=48",
    *(f"{name}:run.steps={steps}" for name, steps in STEPS.items()),
    *(f"{name}:data.weights={{order: 1.0, flip: 0.4, late: 0.4}}" for name in ("sft", "student")),
    *(f"{name}:rollout.prompts_per_step=256" for name in ("mopd1", "mopd2")),
    *(f"{name}:data.weights={{flip: 0.1, order: 2.0, rank: 1.0, tenths: 1.0}}" for name in ("mopd1", "mopd2")),
    "warm_up:source.per_domain=256",
    "boosted:rollout.prompts_per_step=32",
]


def start(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short recipe's directory, its warm-up weighed."""
    made = tmp_path_factory.mktemp("recipe")
    words = [str(RECIPE), f"dir={made}", *SHORT]
    start("-m", "megatron_mopd.recipe", *words)
    start("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *ablations(words))
    start("-m", "megatron_mopd.recipe", *words)
    return made


def ablations(words: list[str]) -> list[str]:
    return ["tools/recipe_ablations.py", *words, "--only=warm_up"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_recipe_is_one_that_can_be_proved() -> None:
    """Every claim of the report has a stage that it can be read from, on the same 1,000 prompts of each domain."""
    recipe = load_recipe(RECIPE, [])
    assert recipe.report is not None and None not in recipe.report.model_dump().values()
    assert len(recipe.report.iterations) == 2
    taught = {d for name in recipe.report.iterations for own in recipe.stage(name, "").teachers.values() for d in own}
    configs = [stage_config(recipe, stage) for stage in recipe.stages]
    held_out = {(source.domain, source.size) for c in configs for source in c.data.held_out if source.type != "jsonl"}
    assert held_out == {(domain, 1000) for domain in (*taught, "late")} and len(taught) == 4
    assert {c.evaluation.final_samples for c in configs} == {1000}
    assert recipe.report.notes.keys() == {"late"}


def test_every_teacher_is_measured_before_it_teaches() -> None:
    recipe = load_recipe(RECIPE, [])
    measured: set[str] = set()
    for stage in recipe.stages:
        if stage.type == "preflight":
            measured |= stage.teachers.keys()
        assert stage.teachers.keys() <= measured, stage.name


def test_the_short_form_changes_every_training_stage() -> None:
    recipe = load_recipe(RECIPE, SHORT)
    trained = {stage.name for stage in recipe.stages if stage.type == "train"}
    assert trained == STEPS.keys()
    full = {stage.name: stage_config(load_recipe(RECIPE, []), stage).run.steps for stage in recipe.stages}
    assert all(steps <= full[name] for name, steps in STEPS.items())


@pytest.mark.slow
def test_every_stage_has_run(directory: Path) -> None:
    recipe = load_recipe(RECIPE, SHORT)
    for name in recipe.names:
        assert read(directory / name / "stage.json")["finished"], name
    assert {path.name for path in directory.glob("report.*")} == {"report.json", "report.md"}
    report = read(directory / "report.json")
    assert report["missing"] == [f for f in report["missing"] if "ablations" in f]
    assert report["quantized"]["source"] == "boosted" and report["acceptance"]


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teachers(directory: Path) -> None:
    """Where a teacher is far better than the student: surely a third of the way, and two thirds in the mean."""
    rows = read(directory / "report.json")["distilled"]
    gaps = {d: r["cells"]["teacher"]["rate"] - r["cells"]["before"]["rate"] for d, r in rows.items()}
    wide = [domain for domain, gap in gaps.items() if gap > 0.2]
    assert set(wide) >= {"order", *PAIR}, gaps
    recovered = {domain: rows[domain]["recoveries"]["mopd_2"] for domain in wide}
    assert min(found["low"] for found in recovered.values()) > 1 / 3, recovered
    assert fmean(found["value"] for found in recovered.values()) > 2 / 3, recovered


@pytest.mark.slow
def test_the_warm_up_is_for_the_pair_and_helps_it(directory: Path) -> None:
    decided = {t: e["decision"] for t, e in read(directory / "preflight" / "preflight.json")["teachers"].items()}
    assert [decided[teacher] for teacher in ("ranker", "tenther")] == ["warm_up", "warm_up"], decided
    refreshed = read(directory / "preflight_refreshed" / "preflight.json")["teachers"]
    assert "orderer2" in refreshed and "refuse" not in {entry["decision"] for entry in refreshed.values()}
    gains = {domain: read(directory / "report.json")["warm_up"][domain]["gain"] for domain in PAIR}
    assert min(gain["low"] for gain in gains.values()) >= 0.1, gains
