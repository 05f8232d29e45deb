"""Teachers' own answers to held-out prompts: taken from the run that trained them, or given by their checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_stages import SFT, stage, task, taught, teach

from megatron_mopd import evaluation, parallel, provenance, teacher_accuracy
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.records import Sampling
from megatron_mopd.train import run_stage
from megatron_mopd.trainer import Trainer

HELD_OUT = {"data": {"held_out": [task("plain", "held_out", 9), task("loud", "held_out", 7)]}}
MEASURED = HELD_OUT | {"evaluation": {"final_samples": 9, "batch_size": 4}}
DOMAINS = {"first": ["plain"], "second": ["loud"]}
LAYOUTS = {"one": (1, {}), "dp2": (2, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}


def settings(directory: Path, *changes: Any) -> dict[str, Any]:
    return stage(directory, MEASURED, {"rollout": {"max_new_tokens": 7}}, *changes)  # of a word's five letters and more


def tree_of(root: Path, **runs: Any) -> dict[str, Any]:
    return settings(root, {"optimizer": {"lr": 1e-2 if root.name == "first" else 2e-2}}, runs)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers that are right now and then, and a student; ``given`` holds the first one's checkpoint alone."""
    made = tmp_path_factory.mktemp("runs")
    teach(made, tree_of, first=60, second=60, student=1)
    parallel.destroy()
    shutil.copytree(made / "first" / "checkpoints", made / "given")
    return made


def mopd(root: Path, place: Path, *changes: Any) -> dict[str, Any]:
    """A stage whose first teacher came as a checkpoint; the second lies in the directory of its run."""
    given = {"teachers": {"first": {"checkpoint": str(root / "given")}}}
    return settings(place, taught(root, "student", **DOMAINS), given, {"run": {"steps": 1}}, *changes)


def left(root: Path, name: str) -> dict[str, Any]:
    """What the run of a teacher says of its domains."""
    tree = json.loads((root / name / "result.json").read_text())
    return {key: {d: tree[key][d] for d in DOMAINS[name]} for key in ("accuracy", "answers", "prompts")}


def test_a_stage_leaves_how_good_its_teachers_are(root: Path, groups: Any, tmp_path: Path) -> None:
    run_stage(build_config(mopd(root, tmp_path)), groups)
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["teachers"] == {name: left(root, name) for name in DOMAINS}
    assert [len(marks) for t in before["teachers"].values() for marks in t["answers"].values()] == [9, 7]
    assert set(before["teachers"]["first"]["answers"]["plain"]) == {"0", "1"}
    assert before["prompts"] == {d: sha for t in before["teachers"].values() for d, sha in t["prompts"].items()}
    assert "teachers" not in json.loads((tmp_path / "result.json").read_text())


def measured(root: str, place: str, layout: dict[str, int], nvfp4: list[str]) -> tuple[dict[str, Any], bool]:
    """Both teachers, asked, and whether they score as before."""
    both = {n: {"checkpoint": str(Path(root) / n / "checkpoints"), "nvfp4": nvfp4} for n in DOMAINS}
    config = build_config(mopd(Path(root), Path(place), {"parallel": layout, "teachers": both}))
    groups = parallel.initialize(config.parallel, 42)
    trainer = Trainer(config, groups)
    pool, prompts = trainer.teachers, evaluation.held_out(trainer.held_out, 9)
    assert pool is not None
    sampling = Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=tuple(trainer.tokenizer.stop_tokens))
    rollouts = [
        provenance.sign(rollout, trainer.policy, trainer.tokenizer, sampling, seed=0, draw=-1)
        for rollout in evaluation.sample(trainer.sampler, prompts, sampling, groups, 8)
    ]

    def scores() -> list[list[float]]:
        return [item.teacher_logprobs.tolist() for item in pool.score(rollouts)]

    first = scores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_accuracy, "_left", lambda *_: None)
        found = teacher_accuracy.measure(pool, prompts, config, trainer.tokenizer)
    return found, scores() == first


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_any_layout_they_answer_as_their_runs_did(root: Path, ranks: Any, tmp_path: Path, name: str) -> None:
    world, layout = LAYOUTS[name]
    for found, same in ranks(world, measured, str(root), str(tmp_path), layout, []):
        assert found == {teacher: left(root, teacher) for teacher in DOMAINS} and same


def test_a_teacher_kept_in_few_bits_answers_with_its_checkpoint(root: Path, ranks: Any, tmp_path: Path) -> None:
    [(found, same)] = ranks(1, measured, str(root), str(tmp_path), {}, ["output_weight", "experts", "hidden"])
    assert found == {teacher: left(root, teacher) for teacher in DOMAINS} and same


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The teachers that answer themselves; they are right on everything."""
    names: list[str] = []

    def answers(pool: Any, name: str, prompts: Any, config: Any, tokenizer: Any) -> dict[str, str]:
        names.append(name)
        return {domain: "1" * sum(p.domain == domain for p in prompts) for domain in {p.domain for p in prompts}}

    monkeypatch.setattr(teacher_accuracy, "_answers", answers)
    return names


def test_only_answers_of_these_weights_to_these_prompts_are_taken(
    root: Path, groups: Any, tmp_path: Path, asked: list[str]
) -> None:
    shutil.copytree(root / "second", tmp_path / "second")
    other = {"teachers": {"second": {"checkpoint": str(tmp_path / "second" / "checkpoints")}}}

    def goals(samples: int = 9) -> dict[str, Any]:
        asked.clear()
        trainer = Trainer(build_config(mopd(root, tmp_path / "run", other)), groups)
        return trainer.measure_goals(samples)["teachers"]

    assert goals()["second"] == left(root, "second") and asked == ["first"]
    assert goals(samples=4)["second"]["answers"] == {"loud": "1111"} and asked == ["first", "second"]
    result = tmp_path / "second" / "result.json"
    tree = json.loads(result.read_text())
    result.write_text(json.dumps({name: value for name, value in tree.items() if name != "ended"}))
    assert goals()["second"]["answers"] == {"loud": "1" * 7} and asked == ["first", "second"]
    result.write_text("{")
    with pytest.raises(ConfigurationError, match=r"result\.json.*copy the run's directory again"):
        goals()


def test_no_prompt_no_answer(root: Path, groups: Any, tmp_path: Path, asked: list[str]) -> None:
    held_out = {"data": {"held_out": [task("loud", "held_out", 7)]}}
    trainer = Trainer(build_config(mopd(root, tmp_path, held_out)), groups)
    assert list(trainer.measure_goals(9)["teachers"]) == ["second"] and asked == []
    supervised = settings(tmp_path / "sft", SFT, {"run": {"steps": 1}})
    assert Trainer(build_config(supervised), groups).measure_goals(9) == {}
