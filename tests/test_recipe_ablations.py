"""The recipe's ablations: what is varied, what is compared with what, what is written, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_mopd.config import ConfigurationError
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe.schema import Recipe, load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_ablations", ROOT / "tools" / "recipe_ablations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def answered(far: str, prompts: str = "same") -> dict[str, Any]:
    return {"answers": {"near": "1111", "far": far}, "prompts": {"near": "same", "far": prompts}}


def lengths(value: float) -> dict[str, Any]:
    return {"draft_2": {"greedy": {"length": value, "by_prompt": [value], "domains": {}}}}


def test_without_warm_up_the_same_iteration_starts_from_the_student(
    tool: ModuleType, tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path)
    decide(made, near="go", far="warm_up")
    for stage, far in (("student", "0001"), ("mopd1", "0111"), ("far_teacher", "1111")):
        leave(made, stage, answered(far))
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
    assert written == {"domains": {"far": {"teacher": "far_teacher", "answers": answers}}}


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
    leave(made, "boosted", {"acceptance": lengths(1.5)})
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


def test_a_recipe_that_has_not_run_is_named(tool: ModuleType, tmp_path: Path, groups: Groups) -> None:
    with pytest.raises(ConfigurationError, match=r"boosted/before\.json: missing; run the recipe first"):
        tool.mtp_boosting(recipe(tmp_path), groups, Namespace(seeds=3))
    with pytest.raises(ConfigurationError, match="names no roles"):
        tool.mtp_boosting(recipe(tmp_path, report=None), groups, Namespace(seeds=3))
