"""The recipe's ablations: what is varied, what is compared with what, what is written, and what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from scripts import loaded

from megatron_mopd.config import ConfigurationError
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe import ablations, anew
from megatron_mopd.recipe.schema import Recipe, load_recipe


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/recipe_ablations.py")


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    """Two specialists, of which the pre-flight sends one to the warm-up."""
    prompts = {"type": "reasoning_gym", "family": "spell_backward", "size": 8}
    domains = [{**prompts, "domain": name, "template": f"{name} {{word}}"} for name in ("near", "far")]
    supervised = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
    teachers = {"near_teacher": ["near"], "far_teacher": ["far"]}
    tree: dict[str, Any] = {
        "dir": str(tmp_path),
        "common": {
            "run": {"steps": 2},
            "model": {"preset": "tiny", "max_sequence_length": 32},
            "rollout": {"max_new_tokens": 8},
            "batching": {"sequences_per_step": 4},
            "data": {"train": domains},
        },
        "stages": [
            {"name": "student", "settings": supervised},
            {"name": "near_teacher", "initial": "student", "settings": supervised},
            {"name": "far_teacher", "initial": "student", "settings": supervised},
            {"name": "look", "type": "preflight", "initial": "student", "teachers": teachers},
            {
                "name": "warm",
                "initial": "student",
                "after": "look",
                "teachers": teachers,
                "settings": {"source": {"type": "traces"}, "objective": {"type": "cross_entropy"}},
            },
            {"name": "mopd1", "initial": "warm", "teachers": teachers},
            {"name": "boosted", "initial": "mopd1", "settings": {"objective": {"type": "mtp_boosting"}}},
        ],
        "report": {"before": "student", "iterations": ["mopd1"], "boosted": "boosted"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return load_recipe(path, [])


def leave(recipe: Recipe, stage: str, tree: dict[str, Any], file: str = "result.json") -> None:
    directory = recipe.dir / stage
    directory.mkdir(parents=True, exist_ok=True)
    (directory / file).write_text(json.dumps(tree))


def decide(recipe: Recipe, near: str, far: str) -> None:
    teachers = {"near_teacher": {"decision": near}, "far_teacher": {"decision": far}}
    leave(recipe, "look", {"teachers": teachers}, "preflight.json")


def answered(far: str, prompts: str = "same", stage: str = "") -> dict[str, Any]:
    tree = {"answers": {"near": "1111", "far": far}, "prompts": {"near": "same", "far": prompts}}
    return tree | ended(stage)


def ended(stage: str) -> dict[str, Any]:
    return {"ended": {"run_id": stage, "step": 2, "checkpoint_id": f"weights of {stage}"}}


def lengths(value: float | None) -> dict[str, Any]:
    return {"draft_2": {"greedy": {"length": value, "by_prompt": [value], "domains": {}}}}


def test_without_warm_up_the_same_iteration_starts_from_the_student(
    tool: ModuleType, tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    decide(made, near="go", far="warm_up")
    for stage, far in (("student", "0001"), ("mopd1", "0111"), ("far_teacher", "1111"), ("near_teacher", "0000")):
        leave(made, stage, answered(far, stage=stage))
    ran = []

    def train(config: Any, groups: Groups, title: str) -> None:
        ran.append(config)
        config.run.dir.mkdir(parents=True)
        (config.run.dir / "result.json").write_text(json.dumps(answered("0011")))

    monkeypatch.setattr(tool, "run_unless_finished", train)
    monkeypatch.setattr(tool.origins, "resolved", lambda config: config)
    tool.warm_up(made, groups, Namespace())
    [config] = ran
    assert config.model.initial == tmp_path / "student" / "checkpoints"
    assert config.run.dir == tmp_path / "ablations" / "warm_up" / "without"
    assert (sorted(config.teachers), config.run.steps) == (["far_teacher", "near_teacher"], 2)
    written = json.loads((tmp_path / "ablations" / "warm_up.json").read_text())
    answers = {"before": "0001", "without": "0011", "with": "0111", "teacher": "1111"}
    of = {name: f"weights of {name}" for name in ("student", "mopd1", "near_teacher", "far_teacher")}
    assert written == {"weights": of, "domains": {"far": {"teacher": "far_teacher", "answers": answers}}}
    assert ablations.foreign(made, written) == ""
    leave(made, "student", answered("0001", stage="another student"))
    assert "student was checkpoint weights of s" in ablations.foreign(made, written)


def test_a_warm_up_to_a_teacher_that_came_as_a_checkpoint_is_weighed(
    tool: ModuleType, tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are those that it gave to the recipe's own iteration."""
    made = recipe(tmp_path)
    outside = {"far_teacher": {"checkpoint": "elsewhere", "domains": ["far"]}}

    def from_outside(stage: Any) -> Any:
        kept = {name: domains for name, domains in stage.teachers.items() if name != "far_teacher"}
        settings = stage.settings | ({"teachers": outside} if stage.teachers else {})
        return stage.model_copy(update={"teachers": kept, "settings": settings})

    stages = [from_outside(stage) for stage in made.stages if stage.name != "far_teacher"]
    made = made.model_copy(update={"stages": stages})
    decide(made, near="go", far="warm_up")
    for name, far in (("student", "0001"), ("mopd1", "0111"), ("near_teacher", "0000")):
        leave(made, name, answered(far, stage=name))
    with pytest.raises(ConfigurationError, match=r"mopd1/before\.json: missing"):
        tool.warm_up(made, groups, Namespace())
    leave(made, "mopd1", {"teachers": {"far_teacher": answered("1101")}}, "before.json")

    def train(config: Any, groups: Groups, title: str) -> None:
        config.run.dir.mkdir(parents=True)
        (config.run.dir / "result.json").write_text(json.dumps(answered("0011")))

    monkeypatch.setattr(tool, "run_unless_finished", train)
    monkeypatch.setattr(tool.origins, "resolved", lambda config: config)
    tool.warm_up(made, groups, Namespace())
    written = json.loads((tmp_path / "ablations" / "warm_up.json").read_text())
    answers = {"before": "0001", "without": "0011", "with": "0111", "teacher": "1101"}
    assert written["domains"] == {"far": {"teacher": "far_teacher", "answers": answers}}
    assert set(written["weights"]) == {"student", "mopd1", "near_teacher"}


def test_nothing_is_compared_where_no_teacher_needed_the_warm_up(
    tool: ModuleType, tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    decide(made, near="go", far="go")
    monkeypatch.setattr(tool, "run_unless_finished", lambda *_, **__: pytest.fail("trained"))
    tool.warm_up(made, groups, Namespace())
    assert not (tmp_path / "ablations").exists()


def test_answers_to_other_prompts_are_not_compared(tool: ModuleType) -> None:
    results = {"before": answered("0001"), "without": answered("0011", "other"), "with": answered("0111")}
    with pytest.raises(ConfigurationError, match=r"'far'.*'without' answered other prompts.*final_samples"):
        tool.compared(results, {"far_teacher": answered("1111")}, {"far_teacher": ["far"]})


def test_boosting_runs_with_further_seeds_and_counts_the_recipes_own(
    tool: ModuleType, tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    leave(made, "boosted", {"acceptance": lengths(1.0)}, "before.json")
    leave(made, "boosted", {"acceptance": lengths(1.5)} | ended("boosted"))
    leave(made, "mopd1", ended("mopd1"))
    ran = []

    def train(config: Any, groups: Groups, title: str) -> None:
        ran.append(config)
        config.run.dir.mkdir(parents=True)
        for file, value in (("before.json", 1.0), ("result.json", 1.5 + config.run.seed)):
            (config.run.dir / file).write_text(json.dumps({"acceptance": lengths(value)}))

    monkeypatch.setattr(tool, "run_unless_finished", train)
    monkeypatch.setattr(tool.origins, "resolved", lambda config: config)
    tool.mtp_boosting(made, groups, Namespace(seeds=3))
    folder = tmp_path / "ablations"
    assert [(c.run.seed, c.data.shuffle_seed) for c in ran] == [(43, 43), (44, 44)]
    assert [c.run.dir for c in ran] == [folder / "mtp_boosting" / f"seed_{seed}" for seed in (43, 44)]
    runs = json.loads((folder / "mtp_boosting.json").read_text())["runs"]
    assert [(run["seed"], run["after"]["draft_2"]["greedy"]["length"]) for run in runs] == [
        (42, 1.5),
        (43, 44.5),
        (44, 45.5),
    ]
    assert [list(run["weights"]) for run in runs] == [["mopd1", "boosted"], ["mopd1"], ["mopd1"]]


def test_lengths_that_nobody_could_measure_are_shown_as_such(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """No completion of 32 tokens in one of the runs: the gain is that of the others."""
    runs = [{"seed": 1, "before": lengths(1.0), "after": lengths(None)}]
    runs += [{"seed": seed, "before": lengths(1.0), "after": lengths(1.5)} for seed in (2, 3)]
    tool.show_boosting(runs)
    said = capsys.readouterr().out
    assert "1.000 → n/a" in said and "[+0.500, +0.500]" in said


def test_the_command_takes_words_from_a_file_and_the_directory_for_itself(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    (tmp_path / "words.txt").write_text(
        f"# as the recipe was run with\n\ndir={tmp_path / 'other'}\nboosted:run.steps=3\n"
    )
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "recipe.yaml"), f"@{tmp_path / 'words.txt'}", "--only=warm_up"])
    asked: list[Recipe] = []

    def held(recipe: Recipe, *_: Any) -> None:
        asked.append(recipe)
        with pytest.raises(ConfigurationError, match=r"other: process \d+ on .* is running stages there"):
            anew.set_aside(recipe, "student")

    monkeypatch.setattr(anew, "PATIENCE", 0.1)
    monkeypatch.setitem(tool.ABLATIONS, "warm_up", held)
    (tmp_path / "other" / "student").mkdir(parents=True)
    assert tool.main() == 0
    assert asked[0].dir == tmp_path / "other" and asked[0].stage("boosted", "").settings["run"] == {"steps": 3}
    assert made.dir == tmp_path and len(anew.set_aside(asked[0], "student")) == 1  # free again


def test_a_recipe_that_has_not_run_is_named(tool: ModuleType, tmp_path: Path, groups: Groups) -> None:
    with pytest.raises(ConfigurationError, match=r"boosted/before\.json: missing; run the recipe first"):
        tool.mtp_boosting(recipe(tmp_path), groups, Namespace(seeds=3))
    with pytest.raises(ConfigurationError, match="names no roles"):
        tool.mtp_boosting(recipe(tmp_path, report=None), groups, Namespace(seeds=3))


def test_ablations_draw_inline_whatever_the_stage_does(tool: ModuleType, tmp_path: Path) -> None:
    """No world draws for them."""
    worlds = {"asynchrony": {"mode": "worlds", "deterministic": False}}
    stages = yaml.safe_load((recipe(tmp_path).dir / "recipe.yaml").read_text())["stages"]
    stages[-2]["settings"] = worlds
    made = recipe(tmp_path, stages=stages, worlds={"rollout": {"processes": 1}, "scoring": {"processes": 1}})
    config = tool.varied(made, made.stage("mopd1", "").model_copy(update={"initial": None}), "warm_up/without")
    assert config.asynchrony.mode == "inline" and config.run.dir == tmp_path / "ablations" / "warm_up" / "without"
