"""Recipes of stages: order, overrides, what is kept, what is refused, and the report at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import loaded
from small_stages import SFT, task

from megatron_mopd import evaluation, parallel, recipe_report, runner
from megatron_mopd.config import ConfigurationError, Parallel
from megatron_mopd.parallel import Groups


def write_recipe(path: Path, **changes: Any) -> Path:
    sft = SFT | {"run": {"steps": 2}}
    tree = {
        "dir": str(path.parent / "runs"),
        "common": {
            "model": {"pattern": "M*E", "max_sequence_length": 24},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 5},
            "batching": {"micro_batch_size": 8, "sequences_per_step": 8},
            "optimizer": {"lr": 1e-3},
            "evaluation": {"every": 1, "samples": 3, "final_samples": 4},
            "data": {
                "train": [task("plain"), task("loud")],
                "held_out": [task("plain", "held_out", 4), task("loud", "held_out", 4)],
            },
        },
        "stages": [
            {"name": "base", "settings": sft},
            {"name": "expert", "initial": "base", "settings": sft},
            {
                "name": "merge",
                "initial": "base",
                "teachers": {"expert": ["plain", "loud"]},
                "settings": {"run": {"steps": 2}},
            },
        ],
    } | changes
    path.write_text(yaml.safe_dump(tree))
    return path


def run(path: Path, groups: Groups, *overrides: str) -> runner.Recipe:
    recipe = runner.load_recipe(path, list(overrides))
    runner.run(recipe, groups)
    return recipe


def stamps(directory: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in directory.glob("*/result.json")}


def test_a_recipe_runs_once_and_ends_in_a_report(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    first = stamps(recipe.dir)
    assert set(first) == {"base", "expert", "merge"}
    last = runner.stage_config(recipe, recipe.stages[-1])
    made = recipe_report.publish(recipe.dir, ["base", "expert", "merge"], last)
    tree = json.loads((recipe.dir / "report.json").read_text())
    expected = {"student_before", "student_after", "teacher", "recovery", "samples"}
    assert set(tree["domains"]["plain"]) == expected | {"reverse_kl_before", "reverse_kl_after"}
    assert tree["domains"]["plain"]["samples"] == 4 and tree["parallel"]["tensor"] == 1 and tree["wall_s"] > 0
    assert {"accuracy.png", "reverse_kl.png", "advantages.png", "rollouts.png", "report.md"} <= {
        p.name for p in recipe.dir.iterdir()
    }
    assert [step for step, _ in made.accuracy_history["plain"]] == [1, 2]
    run(path, groups)  # everything is finished and unchanged
    assert stamps(recipe.dir) == first
    run(path, groups, "batching.micro_batch_size=4")  # how it is cut does not count
    assert stamps(recipe.dir) == first
    run(path, groups, "kernels.impl=reference", "kernels.update=logprob")  # nor by which kernels
    assert stamps(recipe.dir) == first
    with pytest.raises(ConfigurationError, match=r"stage 'merge'.*other settings"):
        run(path, groups, "kernels.update=logits")  # rounded, and for the one objective that takes it
    with pytest.raises(ConfigurationError, match=r"stage 'merge'.*other settings"):
        run(path, groups, "parallel.dispatcher=allgather")  # experts serve any layout, a student's report names its own
    assert stamps(recipe.dir) == first


def test_a_report_without_roles_knows_teachers_that_came_as_checkpoints(groups: Groups, tmp_path: Path) -> None:
    made = runner.load_recipe(write_recipe(tmp_path / "first.yaml"), [])
    runner.run(made, groups, until="expert")
    path = tmp_path / "recipe.yaml"
    base, _, merge = (stage.model_dump(exclude_defaults=True) for stage in made.stages)
    domains = merge.pop("teachers")["expert"]
    merge["settings"]["teachers"] = {"friend": {"checkpoint": str(made.dir / "expert/checkpoints"), "domains": domains}}
    given = runner.load_recipe(write_recipe(path, dir=str(tmp_path / "other"), stages=[base, merge]), [])
    runner.carry_out(given)
    known = json.loads((made.dir / "expert" / "result.json").read_text())["accuracy"]
    again = recipe_report.build(given.dir, ["base", "merge"], runner.stage_config(given, given.stages[-1]))
    assert again.teachers == {"friend": evaluation.from_json(known)} and known.keys() == set(domains)
    assert again.title == "other: one teacher into one student"
    tree = json.loads((given.dir / "report.json").read_text())
    assert {d: row["samples"] for d, row in tree["domains"].items()} == dict.fromkeys(domains, 4)


def test_the_report_says_what_teachers_in_nvfp4_cost_and_save(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    recipe = run(path, groups, "merge:teachers.expert.nvfp4=[output_weight, experts, hidden]")
    last = runner.stage_config(recipe, recipe.stages[-1])
    recipe_report.publish(recipe.dir, ["base", "expert", "merge"], last)
    (row,) = json.loads((recipe.dir / "report.json").read_text())["teacher_nvfp4"].values()
    assert row["parts"] == ["experts", "hidden", "output_weight"] and row["tokens"] > 0
    assert 0 < row["logprob_error_mean"] <= row["logprob_error_max"] and 0 < row["kl"] < row["hidden_kl"] < 0.5
    for memory in ("host_bytes", "device_bytes"):
        assert 0 < row[memory]["after"] < row[memory]["before"]
    text = (recipe.dir / "report.md").read_text()
    assert "## Teachers in NVFP4" in text and "| expert | experts, hidden, output_weight | " in text
    assert f"{row['host_bytes']['before']:,} → {row['host_bytes']['after']:,}" in text
    with pytest.raises(ConfigurationError, match=r"stage 'merge'.*other settings"):
        run(path, groups)


def test_a_changed_stage_is_refused_and_nothing_lost(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    before = stamps(recipe.dir)
    with pytest.raises(ConfigurationError, match=r"stage 'merge'.*other settings"):
        run(path, groups, "merge:optimizer.lr=0.5")
    assert stamps(recipe.dir) == before
    elsewhere = run(path, groups, "merge:optimizer.lr=0.5", f"dir={tmp_path / 'other'}")
    assert set(stamps(elsewhere.dir)) == {"base", "expert", "merge"}


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ([{"name": "merge", "initial": "base"}], "needs 'base'"),
        ([{"name": "a"}, {"name": "a"}], "two stages are named 'a'"),
        ([{"name": "a", "inital": "b"}], "inital: unknown key; did you mean 'initial'"),
        ([], "stages"),
    ],
    ids=["unknown start", "same name", "typo", "no stage"],
)
def test_bad_recipes_are_refused(tmp_path: Path, stages: list[Any], named: str) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", stages=stages)
    with pytest.raises(ConfigurationError, match=named):
        runner.load_recipe(path, [])


def test_a_stopped_stage_goes_on_only_under_its_own_settings(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    recipe = runner.load_recipe(path, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_stage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.run(recipe, groups)
    with pytest.raises(ConfigurationError, match=r"stage 'base'.*other settings"):
        run(path, groups, "optimizer.lr=0.5")
    marker = recipe.dir / "base" / "stage.json"
    whole = marker.read_text()
    marker.write_text(whole[:-9])
    with pytest.raises(ConfigurationError, match=r"base/stage.json: cannot be read: .*; move the directory away"):
        run(path, groups)
    marker.write_text(whole)
    assert set(stamps(run(path, groups).dir)) == {"base", "expert", "merge"}


def test_all_stages_share_one_layout(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigurationError, match=r"stage 'merge': all stages run on one layout"):
        run(path, groups, "merge:parallel.dispatcher=allgather")


def test_a_bad_last_stage_is_found_before_the_first_is_trained(groups: Groups, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigurationError, match=r"stage 'merge'.*lrr"):
        run(path, groups, "merge:optimizer.lrr=1")
    assert not (tmp_path / "runs").exists()


def test_overrides_reach_all_stages_or_one(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml")
    recipe = runner.load_recipe(path, ["optimizer.lr=0.25", "merge:optimizer.lr=0.5", "dir=elsewhere"])
    rates = [runner.stage_config(recipe, stage).optimizer.lr for stage in recipe.stages]
    assert rates == [0.25, 0.25, 0.5] and recipe.dir == Path("elsewhere")


def own_loop(config: str) -> list[float]:
    module = loaded("examples/own_loop.py")
    return module.train(module.load_config(config))


def train_a_teacher(path: Path) -> None:
    recipe = runner.load_recipe(path, [])
    runner.run(recipe.model_copy(update={"stages": recipe.stages[:2]}), parallel.initialize(Parallel(), 1))


def test_a_loop_of_ones_own_gains_mopd(ranks: Any, tmp_path: Path) -> None:
    """The example's student, random, is drawn to its teacher by the example's own loop on two ranks."""
    path = write_recipe(tmp_path / "recipe.yaml")
    ranks(1, train_a_teacher, path)
    recipe = runner.load_recipe(path, [])
    config = runner.stage_config(recipe, recipe.stages[-1]).model_dump(mode="json")
    config["run"]["steps"], config["optimizer"]["lr"], config["rollout"]["prompts_per_step"] = 40, 3e-3, 32
    config["model"]["initial"], config["run"]["seed"] = None, 5  # not the weights its teacher started from
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(config | {"parallel": {"pipeline": 2}}))
    with pytest.raises(ConfigurationError, match=r"parallel\.pipeline = 2: this loop has one stage; set it to 1"):
        own_loop(str(tmp_path / "stages.yaml"))
    gaps = ranks(2, own_loop, str(tmp_path / "own.yaml"))
    assert gaps[0] == gaps[1] and len(gaps[0]) == 40
    assert gaps[0][0] < 0 and sum(gaps[0][-3:]) / 3 > 0.6 * gaps[0][0]  # the gap to the teacher has closed by 40%
