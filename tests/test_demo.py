"""The demo's promises: what its committed results say, what a fresh run says (slow), and that its controls can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import loaded

from megatron_mopd.config import Config
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.records import Counts, MicroBatch
from megatron_mopd.runner import load_recipe, stage_config

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "demo.yaml"
RESULTS = sorted((ROOT / "examples" / "results").glob("demo*/report.json"))


def broken_promises(report: dict[str, Any]) -> list[str]:
    """Bars of the demo: base, specialists, samples, recovery, and specialists that know their own domain only."""
    broken = []
    before = report["matrix"]["student before"]
    for domain, row in report["domains"].items():
        bars = {
            "at least 500 tasks": row["samples"] >= 500,
            "base at most 50%": row["student_before"] <= 0.5,
            "specialist at least 90%": row["teacher"] >= 0.9,
            "recovery at least 80%": row["recovery"] is not None and row["recovery"] >= 0.8,
            "reverse KL falls": row["reverse_kl_after"] < row["reverse_kl_before"],
        }
        broken += [f"{domain}: {bar}" for bar, held in bars.items() if not held]
        for teacher in set(report["teacher_of"].values()) - {report["teacher_of"][domain]}:
            if report["matrix"][teacher][domain] > before[domain] + 0.15:
                broken.append(f"{teacher} gains more than 15 points on {domain}")
    return broken


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_committed_results_hold_what_the_demo_promises(path: Path) -> None:
    assert broken_promises(json.loads(path.read_text())) == []


def test_a_layout_of_each_kind_is_among_the_results() -> None:
    layouts = [json.loads(path.read_text())["parallel"] for path in RESULTS]
    assert {(p["tensor"], p["expert"]) for p in layouts} >= {(1, 1), (1, 2), (2, 1)}


@pytest.mark.parametrize(
    "change", [("student_after", 0.5), ("teacher", 0.89), ("samples", 499), ("student_before", 0.6)]
)
def test_the_bars_can_be_missed(change: tuple[str, float]) -> None:
    report = json.loads(RESULTS[0].read_text())
    row = report["domains"]["reverse"]
    row[change[0]] = change[1]
    row["recovery"] = (row["student_after"] - row["student_before"]) / (row["teacher"] - row["student_before"])
    if change[0] == "student_after":
        assert "reverse: recovery at least 80%" in broken_promises(report)
    assert broken_promises(report)


@pytest.mark.slow
def test_the_demo_holds_its_promises(tmp_path: Path) -> None:
    """The whole demo, from random weights to the table, on two processes; about 6 minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=29533"]
    command += ["-m", "megatron_mopd.runner", str(RECIPE), f"dir={tmp_path / 'demo'}"]
    subprocess.run(command, check=True, timeout=1800, cwd=ROOT)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert broken_promises(report) == []
    assert report["wall_s"] <= 15 * 60


@pytest.fixture(scope="module")
def controls() -> Any:
    return loaded("tools/demo_controls.py")


def test_rotation_leaves_no_domain_its_teacher(controls: Any) -> None:
    recipe = load_recipe(RECIPE, [])
    straight, rotated = recipe.stages[-1].teachers, controls.variants(recipe)["rotated"].teachers
    assert set(rotated) == set(straight) and all(rotated[t] != straight[t] for t in straight)
    assert sorted(chain.from_iterable(rotated.values())) == sorted(chain.from_iterable(straight.values()))
    still = stage_config(recipe, controls.variants(recipe)["no_learning"])
    assert still.optimizer.lr == 0.0 and still.run.steps == stage_config(recipe, recipe.stages[-1]).run.steps


def test_shuffling_moves_advantages_and_nothing_else(controls: Any) -> None:
    config: Config = stage_config(load_recipe(RECIPE, []), load_recipe(RECIPE, []).stages[-1])
    theta = -torch.rand(40)
    batch = MicroBatch(
        tokens=torch.zeros(1, 41, dtype=torch.int64),
        lengths=torch.tensor([41]),
        rows=torch.arange(40),
        targets=torch.zeros(40, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 40]),
        domains=("reverse",),
        domain_weight=torch.ones(40),
        behav_logprobs=theta + 0.01,
        teacher_logprobs=theta + torch.linspace(-1, 1, 40),
    )
    counts = Counts(tokens=40, sequences=1)
    own = mopd_loss(theta, batch, config.objective, counts).per_token  # type: ignore[arg-type]
    moved = controls.shuffled(config)(theta, batch, counts).per_token
    torch.testing.assert_close(moved["advantage"].sort().values, own["advantage"].sort().values)
    assert (moved["advantage"] - own["advantage"]).abs().max() > 0.5
    torch.testing.assert_close(moved["importance"], own["importance"])


def test_controls_are_judged(controls: Any) -> None:
    good = {"recovery": -0.5, "kl_fall_given": 0.4, "kl_fall_true_of_demo": -0.2, "gain_interval": (-0.3, -0.1)}
    assert controls._problems("rotated", good) == []
    for change in ({"kl_fall_given": -0.1}, {"kl_fall_true_of_demo": 0.2}, {"gain_interval": (0.01, 0.1)}):
        assert len(controls._problems("rotated", good | change)) == 1
    for name in ("no_learning", "shuffled"):
        assert controls._problems(name, good) == []
        assert controls._problems(name, good | {"recovery": 0.3}) and controls._problems(
            name, good | {"recovery": None}
        )
