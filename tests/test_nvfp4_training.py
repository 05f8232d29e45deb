"""The experiment on training towards a quantized student: its arithmetic, its verdict, a run of it, its result."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from scripts import loaded
from small_stages import SFT, task

from megatron_mopd import plots
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt
from megatron_mopd.runner import load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "examples" / "results").glob("nvfp4_training/*.json"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/nvfp4_training.py")


def made_up(plain: float, aware: float) -> tuple[dict[int, Any], list[Prompt]]:
    """Two seeds of four prompts whose losses are about ``plain`` and ``aware``."""
    prompts = [Prompt(id=f"p{i}", domain="ab"[i % 2], messages=(), tokens=(1,)) for i in range(4)]

    def row(seed: int, i: int, loss: float) -> dict[str, Any]:
        kl = {"original": 0.1 + 0.05 * i, "quantized": 0.1 + 0.05 * i + loss * (1 + 0.1 * ((i + seed) % 2))}
        return {
            "domain": "ab"[i % 2],
            "kl": kl,
            "correct": {"original": True, "quantized": i > 0},
            "logprob_error": 0.2,
        }

    return {
        seed: {
            kind: {p.id: row(seed, i, loss) for i, p in enumerate(prompts)}
            for kind, loss in (("plain", plain), ("aware", aware))
        }
        for seed in (1, 2)
    }, prompts


def test_losses_are_compared_prompt_by_prompt(tool: ModuleType) -> None:
    tree = tool.compare(*made_up(0.02, 0.01))
    one = tree["seeds"]["1"]
    assert one["plain"]["loss"]["mean"] == pytest.approx(0.021) and one["aware"]["loss"]["mean"] == pytest.approx(
        0.0105
    )
    assert tree["saved"]["mean"] == pytest.approx(0.0105) and set(tree["saved_by_domain"]) == {"a", "b"}
    # Per prompt the two seeds differ, their mean does not: over seeds a prompt counts once.
    assert one["saved"]["low"] < one["saved"]["mean"] and tree["saved"]["low"] == pytest.approx(0.0105)
    assert one["plain"]["accuracy"] == {"original": 1.0, "quantized": 0.75}
    assert one["plain"]["accuracy_change"]["mean"] == -0.25
    assert one["quantized_kl_lower_by"]["mean"] == tree["quantized_kl_lower_by"]["mean"] == pytest.approx(0.0105)
    interval = tool.Interval.of([1.0, 2.0, 3.0, 4.0])
    assert interval.high - interval.mean == pytest.approx(1.959964 * (5 / 3 / 4) ** 0.5)


@pytest.mark.parametrize(("plain", "aware", "holds"), [(0.02, 0.01, True), (0.01, 0.02, False), (0.01, 0.01, False)])
def test_the_verdict_can_be_no(tool: ModuleType, plain: float, aware: float, holds: bool) -> None:
    found, sentence = tool.verdict(tool.compare(*made_up(plain, aware)))
    assert found is holds and sentence.startswith("trained for NVFP4, a student loses less" if holds else "no claim")


def test_the_experiment_runs_and_goes_on_where_it_stopped(
    tool: ModuleType, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = SFT | {"run": {"steps": 1}}
    tree = {
        "dir": str(tmp_path / "runs"),
        "common": {
            "model": {"preset": "tiny", "pattern": "ME*", "max_sequence_length": 24},
            "rollout": {"prompts_per_step": 4, "max_new_tokens": 5},
            "batching": {"micro_batch_size": 4, "sequences_per_step": 4},
            "data": {split: [task("plain", split, 30), task("loud", split, 30)] for split in ("train", "held_out")},
        },
        "stages": [
            {"name": "base", "settings": sft},
            {
                "name": "merge",
                "initial": "base",
                "teachers": {"base": ["plain", "loud"]},
                "settings": {"run": {"steps": 2}, "evaluation": {"final_samples": 2}},
            },
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "recipe.yaml", [])
    arguments = tool.parser().parse_args(["recipe.yaml", "--seeds", "1", "--samples", "3"])
    found, holds, _ = tool.run(recipe, arguments, groups)
    row = found["seeds"]["1"]
    # Students that start as their own teacher: what is left is what one step and quantizing did to them.
    assert 0 < row["plain"]["logprob_error"]["mean"] < 0.5 and row["plain"] != row["aware"]
    assert abs(row["plain"]["loss"]["mean"]) < 0.1 and found["settings"]["recipe"] == "ultra-ptq-nvfp4"
    plots.save(tool.picture(found), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    monkeypatch.setattr("megatron_mopd.runner.run_stage", lambda *_: pytest.fail("nothing is trained again"))
    assert tool.run(recipe, arguments, groups) == (found, holds, found["claim"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_results_say_what_their_numbers_say(tool: ModuleType, path: Path) -> None:
    tree = json.loads(path.read_text())
    assert len(tree["seeds"]) >= 3 and path.stem.startswith(tree["settings"]["recipe"])
    assert tool.verdict(tree) == (tree["holds"], tree["claim"])
    assert tree["holds"] or path.stem != tool.parser().get_default("recipe")
