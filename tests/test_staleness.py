"""The report on the age of rollouts: its runs, the form without correction, its numbers, verdicts and picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from scripts import loaded

from megatron_mopd import gradient_probe, parallel, plots, runner
from megatron_mopd.config import ConfigurationError, Mopd, Parallel
from megatron_mopd.objectives.mopd import mopd_loss
from megatron_mopd.recipe import ablations
from megatron_mopd.records import Counts, MicroBatch


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/staleness.py")


def test_every_lag_is_trained_in_both_forms_and_lag_0_in_its_only_one(tool: ModuleType) -> None:
    found = tool.variants([0, 1, 4, 8], 3)
    assert len(found) == 21 == len({v.name for v in found})
    assert [(v.lag, v.form) for v in found if v.seed == 2] == [
        (8, "corrected"),
        (8, "uncorrected"),
        (4, "corrected"),
        (4, "uncorrected"),
        (1, "corrected"),
        (1, "uncorrected"),
        (0, "corrected"),
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


def test_what_each_form_knows_of_the_age_of_a_token() -> None:
    """Against the gradients of Eq. 3 by hand; bounds so narrow that it masks most of these tokens."""
    settings = Mopd(importance_low=0.9, importance_high=1.1, clip_low=0.01, clip_high=0.01)
    theta = -3 * torch.rand(12, generator=torch.Generator().manual_seed(2))
    counts, batch = Counts(tokens=12, sequences=2), micro_batch()
    assert batch.teacher_logprobs is not None and batch.behav_logprobs is not None
    gradients = {}
    for name, form in gradient_probe.FORMS.items():
        logprobs = theta.clone().requires_grad_()
        output = form(settings)(logprobs, batch, counts)
        output.loss.backward()
        gradients[name] = logprobs.grad
        if name != "corrected":
            assert torch.equal(output.per_token["importance"], torch.ones(12))
            assert output.per_token["mask"].min() == 1
    torch.testing.assert_close(gradients["recomputed"], -(batch.teacher_logprobs - theta) / 12)
    torch.testing.assert_close(gradients["uncorrected"], -(batch.teacher_logprobs - batch.behav_logprobs) / 12)
    logprobs = theta.clone().requires_grad_()
    mopd_loss(logprobs, batch, settings, counts).loss.backward()
    assert torch.equal(gradients["corrected"], logprobs.grad)  # type: ignore[arg-type]
    assert (gradients["corrected"] == 0).sum() > 6


def measured(tool: ModuleType, **changed: float) -> dict[str, Any]:
    """Numbers that keep every promise, but for ``lag_form_what=value``."""
    rows = []
    for variant in tool.variants([0, 4, 8], 3, gradient_probe.FORMS):
        trained = variant.form in tool.TRAINED
        row = dataclasses.asdict(variant) | {"cosine": 0.7 if variant.form == "uncorrected" else 0.8}
        row |= {"recovery": 0.9 + 0.02 * variant.seed if trained else None, "recovery_by_domain": {"a": 0.9}}
        for name, value in changed.items():
            lag, form, what = name.split("_")
            if (f"lag{variant.lag}", variant.form) == (lag, form):
                row[what] = value
        rows.append(row)
    return {"runs": rows, "teachers": {"a": 0.99}}


def test_the_promises_are_checked(tool: ModuleType) -> None:
    assert tool.judge(measured(tool)) == []
    assert tool.judge(measured(tool, lag8_uncorrected_recovery=0.1)) == []  # without correction it may fail
    assert tool.judge(measured(tool, lag8_recomputed_cosine=0.9)) == []
    assert tool.judge(measured(tool, lag4_corrected_recovery=0.89)) == []  # within the spread of lag 0, 0.04
    (failure,) = tool.judge(measured(tool, lag4_corrected_recovery=0.87))
    assert "lag 4, corrected, recovers 5.0 points less than lag 0" in failure and "within 4.0" in failure
    (failure,) = tool.judge(measured(tool, lag8_uncorrected_cosine=0.81))
    assert "lag 8: cosine 0.8000 corrected, 0.8100 not" in failure


def test_the_picture_and_the_table_can_be_drawn(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = measured(tool)
    plots.save(tool.picture(tree), tmp_path / "staleness.png")
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")
    recovery, cosine = tool.picture(tree).axes
    for axes, names in ((recovery, {"corrected", "uncorrected"}), (cosine, set(gradient_probe.FORMS))):
        assert {label for line in axes.lines if not (label := str(line.get_label())).startswith("_")} == names
        assert len(axes.lines) == len(names) * (1 + 3)  # a line and the points of each lag
    tool.show(tree)
    shown = capsys.readouterr()
    assert all(word in shown.out + shown.err for word in ("on-policy", "recomputed", "0.700 0.700 0.700"))


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
    outside = {"teachers": {"friend": {"checkpoint": "elsewhere", "domains": ["loud"]}}}
    stages = [*made.stages[:2], made.stages[2].model_copy(update={"settings": made.stages[2].settings | outside})]
    with pytest.raises(ConfigurationError, match=r"--stage merge: friend came as checkpoints"):
        tool.weights_of(made.model_copy(update={"stages": stages}), options(stage="merge"))
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
    assert [(r["lag"], r["form"]) for r in tree["runs"]] == [*((1, f) for f in gradient_probe.FORMS), (0, "corrected")]
    assert all(-1 < run["cosine"] < 1 for run in tree["runs"])
    assert [run["form"] for run in tree["runs"] if run["recovery"] is None] == ["recomputed"]
    assert not ablations.foreign(made, tree) and set(tree["runs"][0]["weights"]) == {"base", "expert"}
    assert not list((tmp_path / "runs" / "ablations").rglob("policies"))
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
