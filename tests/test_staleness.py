"""The report on the age of rollouts: its runs, the form without correction, its numbers, verdicts and picture."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from megatron_mopd import parallel, plots, runner
from megatron_mopd.config import ConfigurationError, Mopd, Parallel
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.records import Counts, MicroBatch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("staleness", ROOT / "tools" / "staleness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_lag_runs_in_both_forms_and_lag_0_in_its_only_one(tool: ModuleType) -> None:
    found = tool.variants([0, 1, 4, 8], 3)
    assert len(found) == 21 == len({v.name for v in found})
    assert [(v.lag, v.corrected) for v in found if v.seed == 2] == [
        (8, True),
        (8, False),
        (4, True),
        (4, False),
        (1, True),
        (1, False),
        (0, True),
    ]


def micro_batch() -> MicroBatch:
    g = torch.Generator().manual_seed(1)
    return MicroBatch(
        tokens=torch.zeros(2, 8, dtype=torch.int64),
        lengths=torch.tensor([8, 8]),
        rows=torch.arange(12),
        targets=torch.zeros(12, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 6, 12]),
        domains=("a", "b"),
        domain_weight=torch.ones(12),
        behav_logprobs=-3 * torch.rand(12, generator=g),
        teacher_logprobs=-3 * torch.rand(12, generator=g),
    )


def test_without_correction_old_tokens_count_as_if_they_were_new(tool: ModuleType) -> None:
    settings = Mopd(importance_low=0.9, importance_high=1.1)  # so narrow that Eq. 3 masks most of these tokens
    theta = -3 * torch.rand(12, generator=torch.Generator().manual_seed(2))
    counts, batch = Counts(tokens=12, sequences=2), micro_batch()
    gradients = {}
    for name in ("corrected", "uncorrected"):
        logprobs = theta.clone().requires_grad_()
        output = getattr(tool, name)(settings)(logprobs, batch, counts)
        output.loss.backward()
        gradients[name] = logprobs.grad
        if name == "uncorrected":
            assert torch.equal(output.per_token["importance"], torch.ones(12))
            assert output.per_token["mask"].min() == 1
    assert batch.teacher_logprobs is not None
    torch.testing.assert_close(gradients["uncorrected"], -(batch.teacher_logprobs - theta) / 12)
    logprobs = theta.clone().requires_grad_()
    mopd_loss(logprobs, batch, settings, counts).loss.backward()
    assert torch.equal(gradients["corrected"], logprobs.grad)  # type: ignore[arg-type]
    assert (gradients["corrected"] == 0).sum() > 6


def runs(tool: ModuleType, **changed: float) -> dict[str, Any]:
    """Numbers that keep every promise, but for ``lag_form_what=value``."""
    rows = []
    for variant in tool.variants([0, 4, 8], 3):
        row = dataclasses.asdict(variant) | {"recovery": 0.9 + 0.02 * variant.seed, "recovery_by_domain": {"a": 0.9}}
        row["cosine"] = 1.0 if not variant.lag else 0.8 if variant.corrected else 0.7
        for name, value in changed.items():
            lag, form, what = name.split("_")
            if (f"lag{variant.lag}", "yes" if variant.corrected else "no") == (lag, form):
                row[what] = value
        rows.append(row)
    return {"runs": rows, "teachers": {"a": 0.99}}


def test_the_promises_are_checked(tool: ModuleType) -> None:
    assert tool.judge(runs(tool)) == []
    assert tool.judge(runs(tool, lag8_no_recovery=0.1)) == []  # without correction it may fail: that is the point
    assert tool.judge(runs(tool, lag4_yes_recovery=0.89)) == []  # within the spread of lag 0, 0.04
    (failure,) = tool.judge(runs(tool, lag4_yes_recovery=0.87))
    assert "lag 4, corrected, recovers 5.0 points less than lag 0" in failure and "within 4.0" in failure
    (failure,) = tool.judge(runs(tool, lag8_no_cosine=0.81))
    assert "lag 8: cosine 0.8000 corrected, 0.8100 not" in failure


def test_the_picture_and_the_table_can_be_drawn(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = runs(tool)
    plots.save(tool.picture(tree), tmp_path / "staleness.png")
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")
    figure = tool.picture(tree)
    recovery, cosine = figure.axes
    assert [line.get_label() for line in recovery.lines if not line.get_label().startswith("_")] == [
        "uncorrected",
        "corrected",
    ]
    assert len(cosine.lines) == 2 * (1 + 3)  # a line and the points of each lag
    tool.show(tree)
    shown = capsys.readouterr()
    assert "on-policy" in shown.out + shown.err


def source(domain: str, template: str, split: str, size: int) -> dict[str, Any]:
    options = {"min_word_len": 3, "max_word_len": 4}
    common = {"type": "reasoning_gym", "family": "spell_backward", "options": options}
    return common | {"domain": domain, "template": template, "size": size, "split": split}


def recipe(tmp_path: Path) -> Path:
    sft = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "run": {"steps": 2}}
    domains = (("plain", "{word}"), ("loud", "! {word}"))
    tree = {
        "dir": str(tmp_path / "runs"),
        "common": {
            "model": {"pattern": "M*E", "max_sequence_length": 24},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 5},
            "batching": {"micro_batch_size": 8, "sequences_per_step": 8},
            "optimizer": {"lr": 1e-2},
            "evaluation": {"final_samples": 4},
            "data": {
                "train": [source(name, template, "train", 30) for name, template in domains],
                "held_out": [source(name, template, "held_out", 4) for name, template in domains],
            },
        },
        "stages": [
            {"name": "base", "settings": sft},
            {"name": "expert", "initial": "base", "settings": sft},
            {"name": "merge", "initial": "base", "teachers": {"expert": ["plain", "loud"]}, "settings": sft | RUN},
        ],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


RUN = {"source": {"type": "rollout"}, "objective": {"type": "mopd"}}


def test_runs_of_a_recipe_leave_what_its_report_reads_and_go_on(tool: ModuleType, tmp_path: Path) -> None:
    made = runner.load_recipe(recipe(tmp_path), [])
    for name in ("base", "expert"):
        groups = parallel.initialize(Parallel(), 0)
        runner.run_unless_finished(runner.stage_config(made, made.stage(name, "")), groups, name)
    with pytest.raises(ConfigurationError, match="--stage expert: its objective is cross_entropy"):
        tool.configuration(made, tool.variants([1], 1)[0], options(stage="expert"))
    chosen = options(stage="merge")
    tool.work(made, chosen)
    result = tmp_path / "runs" / "expert" / "result.json"

    def teacher_is_right(count: int) -> None:
        answers = dict.fromkeys(("plain", "loud"), "1" * count + "0" * (4 - count))
        result.write_text(json.dumps(json.loads(result.read_text()) | {"answers": answers}))

    teacher_is_right(0)
    with pytest.raises(ConfigurationError, match=r"no teacher of stage 'merge' .* is better than the student"):
        tool.gather(made, chosen)
    teacher_is_right(4)
    tree = tool.gather(made, chosen)
    assert [(r["lag"], r["corrected"], r["seed"]) for r in tree["runs"]] == [(1, True, 0), (1, False, 0), (0, True, 0)]
    corrected, uncorrected, fresh = tree["runs"]
    assert -1 <= uncorrected["cosine"] < 1 and 0 < corrected["cosine"] < 1 and fresh["cosine"] == 1
    assert set(tree["teachers"]) == {"plain", "loud"} and tree["settings"]["steps"] == 4
    files = sorted((tmp_path / "runs" / "ablations").rglob("staleness.json"))
    before = [file.stat().st_mtime_ns for file in files]
    tool.work(made, chosen)  # nothing is left to do
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 3
    tool.work(made, options(stage="merge", samples=3))
    assert all(a < file.stat().st_mtime_ns for a, file in zip(before, files, strict=True))
    assert json.loads(files[0].read_text())["seed"] == 0
    parallel.destroy()


def options(**changed: Any) -> argparse.Namespace:
    values = {"steps": 4, "prompts": 8, "lr": 1e-2, "samples": 4, "probe": 8, "lags": [0, 1], "seeds": 1}
    return argparse.Namespace(**values | {"share": (0, 1)} | changed)
