"""Stages of every type in one recipe: what is refused, the order, what is skipped, kept, run anew and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_mopd import answering, evaluation, runner
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.files import WriteError
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe import __main__ as command
from megatron_mopd.recipe import anew, graph, quantize, report, schema
from megatron_mopd.recipe.schema import Recipe, load_recipe

SFT = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "run": {"steps": 2}}
TRACES = {"source": {"type": "traces"}, "objective": {"type": "cross_entropy"}, "run": {"steps": 2}}
TEACHERS = {"good": ["plain"], "far": ["loud"]}
STAGES: list[dict[str, Any]] = [
    {"name": "student", "settings": SFT},
    {"name": "good", "initial": "student", "settings": SFT},
    {"name": "far", "initial": "student", "settings": SFT},
    {"name": "preflight", "type": "preflight", "initial": "student", "teachers": TEACHERS},
    {"name": "warm_up", "initial": "student", "after": "preflight", "teachers": TEACHERS, "settings": TRACES},
    {"name": "mopd", "initial": "warm_up", "teachers": TEACHERS, "settings": {"run": {"steps": 2}}},
    {"name": "nvfp4", "type": "quantize", "initial": "mopd", "settings": {"recipe": "ultra-ptq"}},
]
OUTSIDE = {"checkpoint": "elsewhere", "domains": ["quiet"]}
"""A teacher that came as a checkpoint."""
ROLES = {"before": "student", "iterations": ["mopd"], "quantized": "nvfp4", "preflight": "preflight"}


def prompts(domain: str, template: str, split: str = "train", size: int = 30) -> dict[str, Any]:
    return {
        "type": "reasoning_gym",
        "domain": domain,
        "family": "spell_backward",
        "template": template,
        "size": size,
        "split": split,
        "options": {"min_word_len": 3, "max_word_len": 4},
    }


def changed(name: str, **changes: Any) -> list[dict[str, Any]]:
    """The stages with one of them changed; None takes a key out."""
    return [
        {k: v for k, v in (stage | changes).items() if v is not None} if stage["name"] == name else stage
        for stage in STAGES
    ]


def without(*names: str) -> list[dict[str, Any]]:
    return [stage for stage in STAGES if stage["name"] not in names]


def write(path: Path, **changes: Any) -> Path:
    tree = {
        "dir": str(path.parent / "runs"),
        "common": {
            "model": {"pattern": "M*E", "max_sequence_length": 24},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 5},
            "batching": {"micro_batch_size": 8, "sequences_per_step": 8},
            "evaluation": {"final_samples": 4},
            "data": {
                "train": [prompts("plain", "{word}"), prompts("loud", "! {word}")],
                "held_out": [prompts("plain", "{word}", "held_out", 4), prompts("loud", "! {word}", "held_out", 4)],
            },
        },
        "stages": STAGES,
    } | changes
    path.write_text(yaml.safe_dump(tree))
    return path


# --------------------------------------------------------------------------- stages without training


class Fakes:
    """Stands in for the work of every stage: ``done`` lists what ran, ``configs`` with what; leaves what a real one
    leaves, with an identity that depends on what it was given."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.configs: dict[str, Config] = {}
        self.decisions = {"good": "go", "far": "warm_up"}
        self.dies_in: str | None = None

    def _begin(self, config: Config, title: str) -> None:
        self.done.append(title)
        self.configs[title] = config
        if self.dies_in == title:
            raise KeyboardInterrupt

    def train(self, config: Config, groups: Groups, objective: Any, title: str) -> None:
        self._begin(config, title)
        given = [config.model.initial, *(t.checkpoint for t in config.teachers.values())]
        ids = [identity(path) for path in given if path is not None]
        place = config.run.dir / "checkpoints" / "iter_0000002"
        place.mkdir(parents=True)
        (place / ".metadata").touch()
        (place / "metadata.json").write_text("{}")
        made = hashlib.sha256(json.dumps([title, ids, config.optimizer.lr]).encode()).hexdigest()
        model = config.model.model_dump(mode="json", exclude={"initial"})
        (place / "mopd_manifest.json").write_text(json.dumps({"checkpoint_id": made, "model": model}))
        (config.run.dir / "result.json").write_text(json.dumps({"id": made}))

    def preflight(self, config: Config, groups: Groups, title: str) -> None:
        self._begin(config, title)
        entries = {
            name: {"decision": self.decisions[name], "reasons": [f"{name} looks so"], "domains": {}}
            for name in config.teachers
        }
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "preflight.json").write_text(json.dumps({"teachers": entries}))

    def quantize(self, config: Config, settings: Any, groups: Groups, title: str) -> None:
        self._begin(config, title)
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "result.json").write_text(json.dumps({"quantized": {"bits_per_element": 4.5}}))

    def again(self) -> list[str]:
        """What ran since the last call."""
        done, self.done = self.done, []
        return done


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(runner, "run_stage", made.train)
    monkeypatch.setattr("megatron_mopd.preflight.stage.run_stage", made.preflight)
    monkeypatch.setattr(quantize, "run_stage", made.quantize)
    return made


def identity(path: Path) -> str:
    return json.loads(next(path.glob("iter_*/mopd_manifest.json")).read_text())["checkpoint_id"]


def run(path: Path, groups: Groups, *overrides: str, until: str | None = None) -> Recipe:
    recipe = load_recipe(path, list(overrides))
    runner.run(recipe, groups, until)
    return recipe


ALL = [stage["name"] for stage in STAGES]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"process": 2}, "process: unknown key; did you mean 'processes'"),
        ({"processes": 0}, "processes: 0: Input should be greater than 0"),
        ({"stages": changed("mopd", aftr="preflight")}, "aftr: unknown key; did you mean 'after'"),
        ({"stages": changed("nvfp4", type="quantise")}, "type: 'quantise'"),
        ({"stages": changed("nvfp4", initial=None)}, "'nvfp4': a quantize stage works on another stage's weights"),
        ({"stages": changed("nvfp4", teachers={"good": ["plain"]})}, "'nvfp4': a quantize stage has no teachers"),
        ({"stages": changed("nvfp4", settings={"recpe": "ultra-ptq"})}, "'nvfp4': recpe: unknown key; did you mean"),
        ({"stages": changed("nvfp4", settings={})}, "'nvfp4': recipe: missing"),
        ({"stages": changed("nvfp4", settings={"recipe": "ultra-ptk"})}, "did you mean 'ultra-ptq'"),
        ({"stages": changed("nvfp4", settings={"recipe": "ultra-ptq", "four_over_six": 1})}, "four_over_six: 1"),
        ({"stages": changed("preflight", teachers=None)}, "'preflight': a preflight stage measures teachers"),
        ({"stages": changed("mopd", initial="preflight")}, "needs the weights of 'preflight', but a preflight stage"),
        ({"stages": changed("warm_up", initial=None)}, "'warm_up': after = 'preflight' makes it a warm-up"),
        ({"stages": changed("warm_up", teachers=None)}, "'warm_up': after = 'preflight' makes it a warm-up"),
        ({"stages": changed("warm_up", after="far")}, "must be a preflight stage of the same student"),
        ({"stages": changed("warm_up", initial="good")}, "must be a preflight stage of the same student"),
        ({"stages": changed("preflight", teachers={"far": ["loud"]})}, "'preflight' decides nothing on .* 'good'"),
        ({"stages": without("preflight")}, "'warm_up' needs 'preflight', which is no earlier stage"),
        (
            {"stages": changed("mopd", settings={"teachers": {"far": OUTSIDE | {"domains": ["loud"]}}})},
            r"'mopd': settings.teachers.far.checkpoint = elsewhere, but 'far' is a stage of this recipe",
        ),
        (
            {"stages": changed("warm_up", settings=TRACES | {"teachers": {"mine": OUTSIDE}})},
            "'preflight' decides nothing on .* 'mine'",
        ),
        (
            {
                "stages": [
                    *without("warm_up", "mopd", "nvfp4", "preflight"),
                    STAGES[3] | {"settings": {"teachers": {"mine": OUTSIDE}}},
                    STAGES[4] | {"settings": TRACES | {"teachers": {"mine": OUTSIDE | {"checkpoint": "there"}}}},
                ]
            },
            "'mine' is there, and that of 'preflight', which decides on it, is elsewhere",
        ),
        ({"stages": [*STAGES, {"name": "converted"}]}, "'converted': dir has another folder of that name"),
        ({"report": ROLES | {"sftt": "student"}}, "report.sftt: unknown key; did you mean 'sft'"),
        (
            {"report": ROLES | {"before": "studnet"}},
            "report.before: no stage is named 'studnet'; did you mean 'student'",
        ),
        (
            {"report": ROLES | {"quantized": "mopd"}},
            "report.quantized = 'mopd': is a train stage; name a quantize stage",
        ),
        ({"report": ROLES | {"preflight": "good"}}, "report.preflight = 'good': is a train stage; name a preflight"),
        ({"report": ROLES | {"iterations": ["nvfp4"]}}, "report.iterations = 'nvfp4': is a quantize stage"),
        ({"report": ROLES | {"iterations": ["good"]}}, "report.iterations: stage 'good' has no teachers"),
        ({"report": ROLES | {"iterations": []}}, "report.iterations"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = write(tmp_path / "recipe.yaml", **changes)
    with pytest.raises(ConfigurationError, match=named):
        load_recipe(path, [])
    assert not (tmp_path / "runs").exists()


def test_overrides_name_stages_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigurationError, match=r"'mopf:run.steps=3': no stage is named 'mopf'; did you mean 'mopd'"):
        load_recipe(path, ["mopf:run.steps=3"])
    with pytest.raises(ConfigurationError, match="'ultra'"):
        load_recipe(path, ["nvfp4:recipe=ultra"])
    recipe = load_recipe(path, ["processes=4", "nvfp4:four_over_six=mse", "dir=2026-01-01"])
    assert recipe.processes == 4 and recipe.dir == Path("2026-01-01")
    assert schema.quantize_settings(recipe.stages[-1]).four_over_six == "mse"


# --------------------------------------------------------------------------- order, warm-ups, refusals


def test_stages_run_in_order_and_the_warm_up_serves_those_in_need(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    assert fakes.again() == ALL
    assert set(fakes.configs["warm_up"].teachers) == {"far"} and set(fakes.configs["mopd"].teachers) == {"good", "far"}
    assert fakes.configs["mopd"].model.initial == recipe.dir / "warm_up" / "checkpoints"
    run(path, groups)
    assert fakes.again() == []


def test_a_warm_up_that_nobody_needs_is_skipped_for_good(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    fakes.decisions = {"good": "go", "far": "go"}
    path = write(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    assert fakes.again() == [name for name in ALL if name != "warm_up"]
    said = json.loads((recipe.dir / "warm_up" / "skipped.json").read_text())
    assert said == {"after": "preflight", "initial": "student", "decisions": fakes.decisions}
    assert fakes.configs["mopd"].model.initial == recipe.dir / "student" / "checkpoints"
    run(path, groups)
    assert fakes.again() == []
    nodes = {node["name"]: node["state"] for node in graph.build(recipe)["nodes"]}
    assert nodes["warm_up"] == "skipped" and nodes["mopd"] == "finished"


def test_a_decision_that_changes_is_no_silent_change_of_start(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    fakes.decisions["far"] = "go"
    moved = anew.set_aside(recipe, "preflight")
    assert [source.name for source, _ in moved] == ["preflight", "warm_up", "mopd", "nvfp4"]
    for source, target in moved[1:]:  # as if only the pre-flight had been moved away, by hand
        target.rename(source)
    with pytest.raises(ConfigurationError, match=r"no teacher needs one; start the same command with --from warm_up"):
        run(path, groups)
    fakes.again()
    anew.set_aside(recipe, "warm_up")  # as that command does
    run(path, groups)
    assert fakes.again() == ["mopd", "nvfp4"] and schema.is_skipped(recipe, "warm_up")
    assert fakes.configs["mopd"].model.initial == recipe.dir / "student" / "checkpoints"


def test_a_refused_teacher_stops_the_recipe_before_it_teaches(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    fakes.decisions["far"] = "refuse"
    path = write(tmp_path / "recipe.yaml")
    for _ in range(2):  # the decision is kept, and heeded again
        with pytest.raises(
            ConfigurationError, match=r"'preflight' refuses the teacher 'far' \(far looks so\); 'warm_up'"
        ):
            run(path, groups)
    assert fakes.again() == ["student", "good", "far", "preflight"]


def test_a_refusal_after_the_last_lesson_stops_nothing(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    fakes.decisions = {"good": "go", "far": "refuse"}
    last = {"name": "afterwards", "type": "preflight", "initial": "mopd", "teachers": TEACHERS}
    stages = without("preflight", "warm_up", "mopd", "nvfp4")
    mopd = STAGES[5] | {"initial": "student"}
    run(write(tmp_path / "recipe.yaml", stages=[*stages, mopd, last]), groups)
    assert fakes.again()[-2:] == ["mopd", "afterwards"]


def test_a_warm_up_that_is_needed_and_not_planned_is_said(
    fakes: Fakes, groups: Groups, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [s | {"initial": "student"} if s["name"] == "mopd" else s for s in without("warm_up")]
    run(write(tmp_path / "recipe.yaml", stages=stages), groups)
    assert "preflight: far needs a warm-up (far looks so) and no stage gives one" in capsys.readouterr().out


# --------------------------------------------------------------------------- teachers that came as checkpoints


def external(tmp_path: Path, **changes: Any) -> Path:
    """The recipe whose two teachers are checkpoints: no stage trains them."""
    given = {
        name: {"checkpoint": str(tmp_path / "given" / name), "domains": domains} for name, domains in TEACHERS.items()
    }
    for teacher in given.values():
        finished(Path(teacher["checkpoint"]))

    def from_outside(stage: dict[str, Any]) -> dict[str, Any]:
        if "teachers" not in stage:
            return stage
        kept = {key: value for key, value in stage.items() if key != "teachers"}
        return kept | {"settings": stage.get("settings", {}) | {"teachers": given}}

    stages = [from_outside(stage) for stage in without("good", "far")]
    return write(tmp_path / "recipe.yaml", stages=stages, report=ROLES, **changes)


def finished(root: Path) -> None:
    """A checkpoint with nothing but its identity."""
    (place := root / "iter_0000002").mkdir(parents=True)
    (place / ".metadata").touch()
    (place / "metadata.json").write_text("{}")
    (place / "mopd_manifest.json").write_text(json.dumps({"checkpoint_id": hashlib.sha256(b"given").hexdigest()}))


def test_a_recipe_may_have_external_teachers_alone(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    """They are measured, warmed up to where they need it, and learned from."""
    recipe = run(external(tmp_path), groups)
    assert fakes.again() == [name for name in ALL if name not in TEACHERS]
    assert set(fakes.configs["preflight"].teachers) == set(TEACHERS)
    assert set(fakes.configs["warm_up"].teachers) == {"far"} and set(fakes.configs["mopd"].teachers) == set(TEACHERS)
    assert fakes.configs["mopd"].teachers["far"].checkpoint == tmp_path / "given" / "far"
    assert set(schema.teachers_of(recipe, recipe.stage("mopd", ""))) == set(TEACHERS)


def test_an_external_teacher_is_refused_as_any_other(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    fakes.decisions["far"] = "refuse"
    path = external(tmp_path)
    with pytest.raises(ConfigurationError, match=r"'preflight' refuses the teacher 'far' .*; 'warm_up' would learn"):
        run(path, groups)
    assert fakes.again() == ["student", "preflight"]
    # The same name for another checkpoint, which nobody has measured, is no teacher that was refused.
    tree = yaml.safe_load(path.read_text())
    finished(tmp_path / "given" / "other")
    (mopd,) = (stage for stage in tree["stages"] if stage["name"] == "mopd")
    mopd["settings"] = {
        "run": {"steps": 2},
        "teachers": {"far": {"checkpoint": str(tmp_path / "given/other"), "domains": ["plain", "loud"]}},
    }
    tree["stages"] = [stage for stage in tree["stages"] if stage["name"] != "warm_up"]
    mopd["initial"] = "student"
    path.write_text(yaml.safe_dump(tree))
    run(path, groups)
    assert fakes.again() == ["mopd", "nvfp4"]


def test_teachers_that_no_preflight_measures_are_named(
    fakes: Fakes, groups: Groups, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = {"far2": ["plain", "loud"]}
    late = {"name": "again", "initial": "mopd", "settings": {"run": {"steps": 2}}, "teachers": served}
    refreshed = {"name": "far2", "initial": "mopd", "settings": SFT}
    run(write(tmp_path / "recipe.yaml", stages=[*STAGES, refreshed, late]), groups, until="student")
    said = [line for line in capsys.readouterr().out.splitlines() if "no preflight stage before it" in line]
    assert len(said) == 1 and said[0].startswith("stage again: no preflight stage before it measures far2,")
    look = {"name": "look", "type": "preflight", "initial": "mopd", "teachers": served}
    run(write(tmp_path / "recipe.yaml", stages=[*STAGES, refreshed, look, late]), groups, until="student")
    plain = [*STAGES[:3], STAGES[5] | {"initial": "student"}]  # a recipe that measures nobody has chosen so
    run(write(tmp_path / "recipe.yaml", stages=plain), groups, until="student")
    assert "no preflight stage before it" not in capsys.readouterr().out


def test_until_ends_there_with_a_report_of_what_there_is(
    fakes: Fakes, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Mapping[str, Config]] = []
    monkeypatch.setattr(report, "publish", lambda recipe, configs: published.append(configs))
    recipe = load_recipe(write(tmp_path / "recipe.yaml", report=ROLES), [])
    runner.carry_out(recipe, until="far")
    assert fakes.again() == ["student", "good", "far"] and len(published) == 1
    with pytest.raises(ConfigurationError, match=r"--until: no stage is named 'fare'; did you mean 'far'"):
        runner.carry_out(recipe, until="fare")
    runner.carry_out(recipe)
    assert fakes.again() == ALL[3:] and list(published[1]) == ALL
    assert set(published[1]["warm_up"].teachers) == {"far"}  # as it ran, not as it was planned
    assert (recipe.dir / "graph.png").stat().st_size > 10_000


# --------------------------------------------------------------------------- anew


def test_from_keeps_what_was_there_and_runs_what_depends_on_it(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    recipe = run(path, groups)
    fakes.again()
    old = identity(recipe.dir / "far" / "checkpoints")
    assert anew.dependents(recipe, "far") == ["far", "preflight", "warm_up", "mopd", "nvfp4"]
    assert anew.dependents(recipe, "nvfp4") == ["nvfp4"]
    moved = anew.set_aside(recipe, "far")
    assert [target.relative_to(recipe.dir).as_posix() for _, target in moved] == [
        f"set_aside/1/{name}" for name in ("far", "preflight", "warm_up", "mopd", "nvfp4")
    ]
    assert identity(moved[0][1] / "checkpoints") == old
    run(path, groups, "far:optimizer.lr=0.5")
    assert fakes.again() == ["far", "preflight", "warm_up", "mopd", "nvfp4"]
    assert identity(recipe.dir / "far" / "checkpoints") != old
    assert [target.parent.name for _, target in anew.set_aside(recipe, "nvfp4")] == ["2"]
    assert anew.set_aside(recipe, "nvfp4") == []  # and no third folder for nothing
    assert sorted(p.name for p in (recipe.dir / "set_aside").iterdir()) == ["1", "2"]
    with pytest.raises(ConfigurationError, match=r"--from: no stage is named 'fra'; did you mean 'far'"):
        anew.set_aside(recipe, "fra")


def test_a_directory_that_cannot_be_written_is_named(
    fakes: Fakes, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "recipe.yaml")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/runs/recipe\.lock: the lock of the recipe's dir .*: Not a directory"):
        runner.carry_out(load_recipe(path, [f"dir={tmp_path / 'file' / 'runs'}"]))
    run(path, groups)
    (tmp_path / "runs" / "set_aside").touch()
    monkeypatch.delenv("RANK", raising=False)
    assert command.main([str(path), "--from", "far"]) == 2
    assert "set_aside: what is set aside could not be written: File exists" in capsys.readouterr().err
    assert fakes.again() == ALL and (tmp_path / "runs" / "far" / "result.json").is_file()


def begin_together(path: Path) -> tuple[bool, bool]:
    """Whether the stage is there when this rank comes late, and when it begins to run; the first rank moves slowly."""
    recipe, seen = load_recipe(path, []), []
    move = anew.set_aside

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2)
        return move(*arguments)

    def look(*_: Any) -> None:
        seen.append((recipe.dir / "far").exists())
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anew, "set_aside", slowly)
        patch.setattr(runner, "run", look)
        if torch.distributed.get_rank():
            time.sleep(0.5)
            seen.append((recipe.dir / "far").exists())
        with pytest.raises(InterruptedError):
            runner.carry_out(recipe, begin_at="far")
    return seen[0], seen[-1]


def test_no_rank_reads_what_is_being_set_aside(ranks: Any, tmp_path: Path) -> None:
    """Neither before all have checked the recipe, nor while the first rank moves its stages."""
    path = write(tmp_path / "recipe.yaml")
    (tmp_path / "runs" / "far").mkdir(parents=True)
    assert ranks(2, begin_together, path) == [(False, False), (True, False)]
    assert (tmp_path / "runs" / "set_aside" / "1" / "far").is_dir()


def test_ablations_go_along_with_the_stages_they_are_of(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    boosted = {
        "name": "boosted",
        "initial": "mopd",
        "settings": {"objective": {"type": "mtp_boosting"}, "run": {"steps": 2}},
    }
    stages = [*STAGES[:-1], boosted]
    roles = {"before": "student", "iterations": ["mopd"], "boosted": "boosted"}
    recipe = run(write(tmp_path / "recipe.yaml", stages=stages, report=roles), groups)
    folder = recipe.dir / "ablations"

    def leave() -> None:
        for name in ("warm_up/without", "mtp_boosting/seed_43", "staleness/lag1"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "staleness.json").write_text(json.dumps({"runs": [{"weights": {"warm_up": "1", "far": "2"}}]}))
        (folder / "staleness.png").touch()

    leave()
    moved = [target.relative_to(recipe.dir).as_posix() for _, target in anew.set_aside(recipe, "boosted")]
    assert moved == ["set_aside/1/boosted", "set_aside/1/ablations/mtp_boosting"]
    assert (recipe.dir / "set_aside/1/ablations/mtp_boosting/seed_43").is_dir()
    moved = [target.relative_to(recipe.dir).as_posix() for _, target in anew.set_aside(recipe, "mopd")]
    assert moved == ["set_aside/2/mopd", "set_aside/2/ablations/warm_up"]  # what was stale is not of these weights
    leave()
    moved = [target.name for _, target in anew.set_aside(recipe, "far")]
    assert moved[-5:] == ["warm_up", "staleness.json", "staleness.png", "staleness", "mtp_boosting"]
    assert not list(folder.iterdir())


def test_two_runs_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anew, "PATIENCE", 0.1)
    recipe = load_recipe(write(tmp_path / "recipe.yaml"), [])
    (recipe.dir / "nvfp4").mkdir(parents=True)
    holds = "import sys; from pathlib import Path; from megatron_mopd.recipe.anew import alone\n"
    holds += "with alone(Path(sys.argv[1])):\n    sys.stdout.write('held\\n'); sys.stdout.flush(); sys.stdin.read()\n"
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(recipe.dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    for act in (lambda: anew.set_aside(recipe, "nvfp4"), lambda: runner.carry_out(recipe)):
        with pytest.raises(ConfigurationError, match=rf"process {other.pid} on .* is running stages there"):
            act()
    other.kill()  # however it ends, the directory is free again
    other.wait()
    assert len(anew.set_aside(recipe, "nvfp4")) == 1


# --------------------------------------------------------------------------- what counts as a change


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("preflight.min_overlap=0.5", "preflight"),
        ("nvfp4:four_over_six=mse", "nvfp4"),
        ("nvfp4:recipe=ultra-ptq-nvfp4", "nvfp4"),
        ("rollout.max_new_tokens=4", "student"),
    ],
)
def test_a_changed_setting_is_refused_where_it_counts(
    fakes: Fakes, groups: Groups, tmp_path: Path, override: str, stage: str
) -> None:
    path = write(tmp_path / "recipe.yaml")
    run(path, groups)
    with pytest.raises(ConfigurationError, match=rf"stage '{stage}': .* holds a run with other settings"):
        run(path, groups, override)


def test_settings_beside_the_result_change_nothing(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    run(path, groups)
    fakes.again()
    beside = ["rollout.shards=3", "guards.length.threshold=9", "guards.teacher_timeout=9", "asynchrony.silence_s=9"]
    run(path, groups, *beside, "processes=3")
    assert fakes.again() == []
    with pytest.raises(ConfigurationError, match=r"stage 'student': .* other settings"):
        run(path, groups, "guards.length.action=drop")


# --------------------------------------------------------------------------- quantize, for real


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose one train stage has run: a student to quantize."""
    from megatron_mopd import parallel
    from megatron_mopd.config import Parallel

    stages = [STAGES[0], STAGES[-1] | {"initial": "student"}]
    path = write(tmp_path_factory.mktemp("quantize") / "recipe.yaml", stages=stages)
    run(path, parallel.initialize(Parallel(), seed=42), until="student")
    parallel.destroy()
    return path


def test_a_quantize_stage_leaves_codes_and_answers(trained: Path, groups: Groups) -> None:
    recipe = run(trained, groups)
    directory = recipe.dir / "nvfp4"
    result, before = (json.loads((recipe.dir / s / "result.json").read_text()) for s in ("nvfp4", "student"))
    assert result["prompts"] == before["prompts"]  # so that answers are paired
    assert {d: len(marks) for d, marks in result["answers"].items()} == {"loud": 4, "plain": 4}
    said = result["quantized"]
    assert (said["recipe"], said["layout"], said["four_over_six"]) == ("ultra-ptq", "modelopt", None)
    assert said["source_checkpoint_id"] == identity(recipe.dir / "student" / "checkpoints")
    size = sum(f.stat().st_size for f in (directory / "quantized").glob("*.safetensors"))
    assert said["stored_bytes"] < said["source_bytes"] and 0 < size - said["stored_bytes"] < 20_000  # a header
    assert said["bits_per_element"] == pytest.approx(8 * said["stored_bytes"] / said["parameters"])
    assert {"wall_s", "measure_s", "memory_bytes", "versions", "parallel", "accuracy"} <= result.keys()
    assert {p.name for p in directory.iterdir()} == {"quantized", "result.json", "stage.json"}
    config = json.loads((directory / "quantized" / "config.json").read_text())
    assert config["model_type"] == "nemotron_h" and (directory / "quantized" / "hf_quant_config.json").is_file()


@pytest.mark.parametrize("moment", ["writing", "measuring", "clearing"])
def test_a_quantize_stage_goes_on_where_it_was_killed(
    trained: Path, groups: Groups, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = run(trained, groups)
    whole = json.loads((recipe.dir / "nvfp4" / "result.json").read_text())
    anew.set_aside(recipe, "nvfp4")
    place, name = {
        "writing": (quantize.quantized_checkpoint, "dequantize"),
        "measuring": (answering, "of_checkpoint"),
        "clearing": (quantize.shutil, "rmtree"),
    }[moment]

    def dies(*_: Any, **__: Any) -> None:
        raise ConfigurationError("killed here")

    with monkeypatch.context() as patch, pytest.raises(ConfigurationError, match="killed here"):
        patch.setattr(place, name, dies)
        run(trained, groups)
    assert json.loads((recipe.dir / "nvfp4" / "stage.json").read_text())["finished"] is False
    if moment != "writing":
        assert (recipe.dir / "nvfp4" / "dequantized").is_dir()
    run(trained, groups)
    again = json.loads((recipe.dir / "nvfp4" / "result.json").read_text())
    same = ("answers", "accuracy", "prompts", "quantized")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}
    assert {p.name for p in (recipe.dir / "nvfp4").iterdir()} == {"quantized", "result.json", "stage.json"}


def test_codes_of_other_weights_are_not_measured(trained: Path, groups: Groups) -> None:
    recipe = run(trained, groups)
    directory = recipe.dir / "nvfp4"
    for name in ("stage.json", "result.json"):
        (directory / name).unlink()
    manifest = directory / "quantized" / "mopd_quantization.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source_checkpoint_id": "0" * 64}))
    with pytest.raises(ConfigurationError, match=r"nvfp4/quantized: was made of the weights 000000000000, .* holds"):
        run(trained, groups)
    anew.set_aside(recipe, "nvfp4")


def test_the_stored_values_are_what_is_measured(trained: Path, groups: Groups) -> None:
    """The answers are of the quantized weights, not of the student's: those of a zeroed output layer are all alike."""
    recipe = load_recipe(trained, [])
    seen: list[Path] = []

    def answers(path: Path, config: Config, asked: Any, tokenizer: Any, groups: Groups) -> dict[str, str]:
        seen.append(path)
        return {"plain": "0110", "loud": "1111"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "of_checkpoint", answers)
        anew.set_aside(recipe, "nvfp4")
        run(trained, groups)
    assert seen == [recipe.dir / "nvfp4" / "dequantized"]
    result = json.loads((recipe.dir / "nvfp4" / "result.json").read_text())
    assert evaluation.from_json(result["accuracy"])["plain"].rate == 0.5
    anew.set_aside(recipe, "nvfp4")


# --------------------------------------------------------------------------- the command


def arguments(path: Path, *overrides: str, until: str | None = None) -> Any:
    return SimpleNamespace(recipe=path, overrides=list(overrides), until=until, anew=None)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An environment without torchrun's variables and with those given."""

    def set_to(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    for name in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "DRY_RUN"):
        monkeypatch.delenv(name, raising=False)
    return set_to


def test_the_line_of_one_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", processes=2)
    words = command.torchrun_line(load_recipe(path, []), arguments(path, "mopd:run.steps=3", until="mopd"), {})
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[3:6] == ["--nproc_per_node=2", "--max_restarts=0", "--standalone"]
    assert words[6:] == ["-m", "megatron_mopd.runner", str(path), "mopd:run.steps=3", "--until", "mopd"]


def test_the_line_of_one_of_many_machines(
    tmp_path: Path, outside: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "recipe.yaml", processes=8)
    outside(NNODES="64", NODE_RANK="3", MASTER_ADDR="node0", MAX_RESTARTS="2", DRY_RUN="1")
    assert command.main([str(path), "--until", "mopd"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert {"--nnodes=64", "--nproc_per_node=8", "--rdzv_endpoint=node0:29500", "--rdzv_conf=is_host=0"} <= {*words}
    assert "--max_restarts=2" in words and "--standalone" not in words and words[-2:] == ["--until", "mopd"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "mopdd"], "--from: no stage is named 'mopdd'; did you mean 'mopd'"),
        (["--until", "goood"], "--until: no stage is named 'goood'; did you mean 'good'"),
        (["--from", "mopd", "--until", "good"], "--until good comes before --from mopd"),
        (["mopd:optimizer.lrr=1"], "stage 'mopd': optimizer.lrr: unknown key; did you mean 'lr'"),
    ],
)
def test_a_command_that_cannot_be_meant_starts_nothing(
    tmp_path: Path, outside: Callable[..., None], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert command.main([str(write(tmp_path / "recipe.yaml")), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_machine_without_an_index_is_refused(
    tmp_path: Path, outside: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    outside(NNODES="2")
    assert command.main([str(write(tmp_path / "recipe.yaml"))]) == 2
    assert "NNODES = 2 needs NODE_RANK: set it to the index of this machine" in capsys.readouterr().err


def test_after_a_failure_the_command_says_what_is_safe(
    fakes: Fakes,
    groups: Groups,
    tmp_path: Path,
    outside: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "recipe.yaml")
    fakes.dies_in = "good"
    with pytest.raises(KeyboardInterrupt):
        run(path, groups)
    started: list[list[str]] = []
    monkeypatch.setattr(command.processes, "run", lambda line, worlds: started.append([*line.words]) or -9)
    assert command.main([str(path), "--from", "good", "good:run.steps=2"]) == 137
    said = capsys.readouterr().err
    assert "stopped with signal SIGKILL" in said and "finished and safe: student; good starts from" in said
    assert said.splitlines()[-1] == f"Go on with: python -m megatron_mopd.recipe {path} good:run.steps=2"
    monkeypatch.setattr(
        command.processes, "run", lambda line, worlds: 1
    )  # a setting that cannot work, or a killed rank
    assert command.main([str(path)]) == 1
    again = f"Once the reason is removed, go on with: python -m megatron_mopd.recipe {path}"
    assert capsys.readouterr().err.splitlines()[-1] == again
    assert started[0][-3:] == ["megatron_mopd.runner", str(path), "good:run.steps=2"]
    assert (tmp_path / "runs" / "set_aside" / "1" / "good" / "stage.json").is_file()
    assert os.environ.get("RANK") is None


def test_an_unfinished_stage_goes_on_from_its_newest_checkpoint(fakes: Fakes, groups: Groups, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml")
    recipe = run(path, groups, until="good")
    (recipe.dir / "good" / "stage.json").write_text(json.dumps({"fingerprint": "x", "finished": False}))
    said = command.what_is_safe(recipe, 1, "make recipe")
    assert "finished and safe: student; good goes on after step 2 of 2, its newest checkpoint" in said
    assert said.endswith("go on with: make recipe")
