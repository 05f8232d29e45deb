"""The report of a recipe: its numbers, intervals and promises, on stage directories written without training."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_mopd import intervals
from megatron_mopd.config import ConfigurationError
from megatron_mopd.intervals import recovery_gain, recovery_interval
from megatron_mopd.recipe import ablations, outcomes, promises, report, tables, text
from megatron_mopd.recipe.schema import Recipe, Stage, stage_config

TASKS = 1000
DISTILLED = ("reverse", "order", "palindrome", "count")
OTHERS = ("copy", "vowels")
RATES = {
    "sft": (0.31, 0.28, 0.35, 0.22, 0.97, 0.88),
    "student": (0.46, 0.41, 0.44, 0.30, 0.96, 0.87),
    "reverser": (0.98, 0.02, 0.11, 0.04, 0.50, 0.41),
    "orderer": (0.01, 0.93, 0.09, 0.02, 0.40, 0.33),
    "counter": (0.02, 0.03, 0.97, 0.92, 0.44, 0.35),
    "warm_up": (0.47, 0.42, 0.40, 0.45, 0.90, 0.80),
    "mopd1": (0.90, 0.80, 0.88, 0.79, 0.96, 0.865),
    "orderer2": (0.02, 0.95, 0.12, 0.05, 0.42, 0.30),
    "mopd2": (0.96, 0.91, 0.94, 0.88, 0.955, 0.87),
    "boosted": (0.96, 0.91, 0.94, 0.88, 0.955, 0.87),
    "nvfp4": (0.958, 0.905, 0.941, 0.88, 0.953, 0.868),
}
SFT = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
TAUGHT = {"reverser": ["reverse"], "orderer": ["order"], "counter": ["palindrome", "count"]}
TAUGHT_2 = {"reverser": ["reverse"], "orderer2": ["order"], "counter": ["palindrome", "count"]}


def answered(stage: str, domain: str, rates: Mapping[str, tuple[float, ...]] = RATES, tasks: int = TASKS) -> str:
    """Answers with the rate of the table above: the easiest tasks, as every model sees them with some noise."""
    difficulty, noise = np.random.default_rng(abs(hash_of(domain))), np.random.default_rng(abs(hash_of(stage + domain)))
    ease = difficulty.normal(size=tasks) + 0.3 * noise.normal(size=tasks) * (stage not in ("mopd2", "boosted"))
    right = round(tasks * rates[stage][(DISTILLED + OTHERS).index(domain)])
    order = np.argsort(-ease)
    marks = np.array(["0"] * tasks)
    marks[order[:right]] = "1"
    return "".join(marks)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def a_recipe(directory: Path) -> Recipe:
    steps = {"run": {"steps": 60}, "batching": {"sequences_per_step": 8}}
    mopd = {"objective": {"type": "mopd"}, "run": {"steps": 200}}
    train = [
        ("sft", None, {}, SFT | steps),
        ("student", "sft", {}, SFT | steps),
        *((name, "student", {}, SFT | steps) for name in ("reverser", "orderer", "counter")),
        ("warm_up", "student", TAUGHT, SFT | {"source": {"type": "traces"}} | steps),
        ("mopd1", "warm_up", TAUGHT, mopd),
        ("orderer2", "mopd1", {}, SFT | steps),
        ("mopd2", "mopd1", TAUGHT_2, mopd),
        ("boosted", "mopd2", {}, {"objective": {"type": "mtp_boosting"}, "run": {"steps": 80}}),
    ]
    stages: list[dict[str, Any]] = [
        {"name": name, "initial": initial, "teachers": teachers, "settings": settings}
        for name, initial, teachers, settings in train
    ]
    stages.insert(5, {"name": "preflight", "type": "preflight", "initial": "student", "teachers": TAUGHT})
    stages[6]["after"] = "preflight"
    stages.insert(9, {"name": "preflight_refreshed", "type": "preflight", "initial": "mopd1", "teachers": TAUGHT_2})
    stages.insert(11, {"name": "preflight_after", "type": "preflight", "initial": "mopd2", "teachers": TAUGHT_2})
    quantize = {"name": "nvfp4", "type": "quantize", "initial": "boosted", "settings": {"recipe": "ultra-ptq"}}
    roles = {
        "sft": "sft",
        "before": "student",
        "iterations": ["mopd1", "mopd2"],
        "boosted": "boosted",
        "quantized": "nvfp4",
        "preflight": "preflight",
        "preflight_after": "preflight_after",
        "notes": {"copy": "a sibling of reverse", "order": "two words"},
    }
    return Recipe.model_validate({"dir": directory, "stages": [*stages, quantize], "report": roles})


def leave(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def measured(stage: str, rates: Mapping[str, tuple[float, ...]] = RATES) -> dict[str, Any]:
    answers = {domain: answered(stage, domain, rates) for domain in sorted(DISTILLED + OTHERS)}
    return {
        "accuracy": {d: {"correct": marks.count("1"), "total": len(marks)} for d, marks in answers.items()},
        "answers": answers,
        "prompts": {d: hashlib.sha256(d.encode()).hexdigest() for d in answers},
        "measure_s": 9.0,
    }


def acceptance(gain: float) -> dict[str, Any]:
    draw = random.Random(gain)
    tree: dict[str, Any] = {}
    for draft, start in (("draft_2", 1.9), ("draft_7", 2.4)):
        tree[draft] = {}
        for mode, less in (("greedy", 0.0), ("temperature_1", 0.35)):
            by_prompt = [start - less + gain + draw.gauss(0, 0.3) for _ in range(128)]
            length = sum(by_prompt) / 128
            tree[draft][mode] = {"length": length, "by_prompt": [*by_prompt, None], "domains": {}}  # one was too short
    return tree


def preflight(teachers: Mapping[str, list[str]], overlap: float) -> dict[str, Any]:
    def means(domain: str) -> dict[str, Any]:
        share = overlap + 0.03 * (DISTILLED + OTHERS).index(domain)
        return {"overlap": share, "teacher_mass": 0.9, "student_mass": share, "implausible": 0.5 - share / 2}

    entries = {
        name: {
            "domains": {domain: means(domain) | {"reverse_kl": 1.2 - overlap} for domain in domains},
            "decision": "go" if overlap > 0.5 else "warm_up",
            "reasons": [],
        }
        for name, domains in teachers.items()
    }
    return {"teachers": entries, "conflicts": []}


def write_stages(recipe: Recipe, rates: Mapping[str, tuple[float, ...]] = RATES, until: str | None = None) -> None:
    """What a finished run leaves of everything that the report reads."""
    for place, stage in enumerate(recipe.stages):
        directory = recipe.dir / stage.name
        leave(directory / "stage.json", {"fingerprint": "", "finished": True})
        taught = {name: teacher.domains for name, teacher in stage_config(recipe, stage).teachers.items()}
        if stage.type == "preflight":
            overlaps = {"preflight": 0.35, "preflight_refreshed": 0.55, "preflight_after": 0.62}
            leave(directory / "preflight.json", preflight(taught, overlaps[stage.name]))
            leave(directory / "result.json", {"wall_s": 12.0, "memory_bytes": 900_000_000})
            if stage.name == until:
                return
            continue
        result = measured(stage.name, rates) | {"history": [], "wall_s": 40.0 + 17 * place, "seed": 42}
        result |= {"memory_bytes": 1_100_000_000 + place, "parallel": {"tensor": 1}, "versions": {"torch": "2.13.0"}}
        if stage.type == "train":
            result["ended"] = {"run_id": stage.name, "step": 200, "checkpoint_id": weights(stage.name)[stage.name]}
        before: dict[str, Any] = {}
        if taught:
            before = measured(stage.initial or "", rates)
            for tree, kl in ((before, 0.9), (result, 0.04)):
                tree["reverse_kl"] = {t: dict.fromkeys(DISTILLED, kl) for t in taught}
                tree["examples"] = [example(domain, kl) for domain in DISTILLED]
            result["history"] = [
                {"step": step, "accuracy": between(before["accuracy"], result["accuracy"], step / 200)}
                for step in range(20, 220, 20)
            ]
            rows = [{"step": s, "time/evaluate": 0.5} | kl_row(s) for s in range(1, 201)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if stage.name == "boosted":
            before, result["acceptance"] = {"acceptance": acceptance(0.0), "measure_s": 3.0}, acceptance(0.55)
        if stage.type == "quantize":
            result["quantized"] = {"recipe": "ultra-ptq", "bits_per_element": 5.03, "parameters": 1_700_000}
            result["quantized"] |= {"source_bytes": 3_400_000, "stored_bytes": 1_068_875, "groups": []}
        if before:
            leave(directory / "before.json", before)
        leave(directory / "result.json", result)
        if stage.name == until:
            return


def kl_row(step: int) -> dict[str, float]:
    return {f"reverse_kl_k1/{domain}": 0.9 * 0.98**step for domain in DISTILLED}


def example(domain: str, scale: float) -> dict[str, Any]:
    advantages = [-scale * i for i in range(8)]
    return {"domain": domain, "prompt": f"{domain} this", "tokens": [*"answer ", "⏎"], "advantages": advantages}


def between(first: Mapping[str, Any], last: Mapping[str, Any], share: float) -> dict[str, Any]:
    way = 1 - (1 - share) ** 3
    return {
        d: {"correct": round((c["correct"] + way * (last[d]["correct"] - c["correct"])) / 5), "total": c["total"] // 5}
        for d, c in first.items()
    }


def weights(*stages: str) -> dict[str, str]:
    """What an ablation of the finished recipe says it is of."""
    return {stage: hashlib.sha256(stage.encode()).hexdigest() for stage in stages}


def write_ablations(recipe: Recipe) -> None:
    arms = {"before": (0.12,), "without": (0.41,), "with": (0.83,), "teacher": (0.94,)}
    rates = {arm: (0.0,) * 3 + rate + (0.0,) * 2 for arm, rate in arms.items()}
    answers = {arm: answered(arm, "count", rates) for arm in arms}
    domains = {"count": {"teacher": "counter", "answers": answers}}
    domains["palindrome"] = {"teacher": "counter", "answers": {arm: marks[::-1] for arm, marks in answers.items()}}
    of = weights("student", "mopd1", "counter")
    leave(recipe.dir / "ablations" / "warm_up.json", {"weights": of, "domains": domains})
    draw = random.Random(1)
    runs = [
        {
            "lag": lag,
            "form": form,
            "seed": seed,
            "weights": weights("warm_up", "counter"),
            "recovery": None if form == "recomputed" else 0.93 - 0.012 * (1 + worse) * lag**0.5 + draw.gauss(0, 0.015),
            "cosine": 0.97 - (0.02 + 0.03 * worse) * lag**0.7 + draw.gauss(0, 0.004),
        }
        for lag in (0, 1, 4, 8)
        for worse, form in enumerate(("corrected", "recomputed", "uncorrected") if lag else ("corrected",))
        for seed in (1, 2, 3)
    ]
    settings = {"stage": "mopd1", "steps": 80, "prompts": 96, "lr": 2e-4, "samples": 300, "probe": 1536}
    leave(recipe.dir / "ablations" / "staleness.json", {"settings": settings, "runs": runs})
    boosting = [{"seed": s, "before": acceptance(0.0), "after": acceptance(0.5 + 0.02 * s)} for s in (1, 2, 3)]
    runs = [run | {"weights": weights("mopd2")} for run in boosting]
    leave(recipe.dir / "ablations" / "mtp_boosting.json", {"runs": runs})


def tree_of(recipe: Recipe) -> dict[str, Any]:
    configs = {stage.name: stage_config(recipe, stage) for stage in recipe.stages}
    return report.build(outcomes.load(recipe, configs))


@pytest.fixture
def finished(tmp_path: Path) -> Recipe:
    recipe = a_recipe(tmp_path / "recipe")
    write_stages(recipe)
    return recipe


# ------------------------------------------------------------------ intervals


def test_the_bootstrap_draws_the_prompts_and_keeps_models_paired() -> None:
    answers = ["0011", "0111", "0011"]
    drawn = intervals.resampled(answers, draws=20_000)
    assert drawn.shape == (20_000, 3) and (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 1] >= drawn[:, 0]).all(), "a prompt right before is right after, in every resample"
    assert drawn.mean(0) == pytest.approx([0.5, 0.75, 0.5], abs=0.01)
    # variance of a mean of 4 draws with replacement: p (1 - p) / 4
    assert drawn.var(0) == pytest.approx([0.0625, 0.046875, 0.0625], rel=0.05)
    assert (drawn == intervals.resampled(answers, draws=20_000)).all()
    with pytest.raises(ValueError, match=r"answers to \[4, 3\] prompts"):
        intervals.resampled(["0011", "001"])


def test_recovery_intervals_hold_the_true_recovery() -> None:
    """Of 300 experiments on 300 prompts each, about 95% of the intervals hold what the prompts were drawn from."""
    kinds = {"000": 0.05, "001": 0.07, "011": 0.38, "111": 0.44, "010": 0.02, "101": 0.01, "100": 0.02, "110": 0.01}
    start, end, goal = (sum(share for kind, share in kinds.items() if kind[i] == "1") for i in range(3))
    true = (end - start) / (goal - start)
    draw, held = random.Random(5), 0
    for _ in range(300):
        sample = draw.choices(list(kinds), weights=list(kinds.values()), k=300)
        bounds = recovery_interval(*("".join(kind[i] for kind in sample) for i in range(3)), draws=1000)
        assert bounds is not None
        held += bounds[0] <= true <= bounds[1]
    assert 0.91 <= held / 300 <= 0.98


def test_recovery_has_no_interval_where_the_teacher_may_be_no_better() -> None:
    before, teacher = "0" * 50 + "1" * 50, "0" * 49 + "1" * 50 + "0"
    assert intervals.recovery(0.5, 0.6, 0.5) is None and recovery_interval(before, before, teacher) is None
    assert recovery_gain(before, before, before, teacher) is None
    better = "1" * 40 + before[40:]
    assert recovery_interval(before, better, better) == (1.0, 1.0)
    low, high = recovery_gain(before, before, better, better) or (0.0, 0.0)
    assert low == high == 1.0


def test_intervals_of_means_are_students() -> None:
    assert intervals.mean_interval([1.0]) is None
    low, high = intervals.mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    values = [float(i % 2) for i in range(100)]
    low, high = intervals.mean_interval(values) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.959964 * (25 / 99) ** 0.5 / 10)
    assert list(intervals.T95) == sorted(intervals.T95, reverse=True) and intervals.T95[-1] > intervals.Z95


# ------------------------------------------------------------------ the table


def test_the_table_is_what_the_answers_say(finished: Recipe) -> None:
    tree = tree_of(finished)
    assert list(tree["distilled"]) == list(DISTILLED) and list(tree["undistilled"]) == sorted(OTHERS)
    row = tree["distilled"]["order"]
    rates = {key: cell["rate"] for key, cell in row["cells"].items()}
    assert rates == {
        "sft": 0.28,
        "before": 0.41,
        "warm_up_1": 0.42,
        "mopd_1": 0.80,
        "mopd_2": 0.91,
        "boosted": 0.91,
        "quantized": 0.905,
        "teacher": 0.95,
        "first_teacher": 0.93,
    }
    assert row["teacher"] == "orderer2" and row["first_teacher"] == "orderer" and row["refreshed"]
    assert not tree["distilled"]["count"]["refreshed"]
    assert row["recovery"]["value"] == pytest.approx((0.91 - 0.41) / (0.95 - 0.41))
    assert row["recoveries"]["mopd_1"]["value"] == pytest.approx((0.80 - 0.41) / (0.95 - 0.41))
    assert (row["cells"]["before"]["low"], row["cells"]["before"]["high"]) == pytest.approx(intervals.wilson(410, 1000))
    before, later = (answered(stage, "order") for stage in ("student", "mopd2"))
    gained = sum(a == "0" and b == "1" for a, b in zip(before, later, strict=True))
    lost = sum(a == "1" and b == "0" for a, b in zip(before, later, strict=True))
    assert (row["change"]["gained"], row["change"]["lost"]) == (gained, lost) and gained - lost == 500
    low, high = intervals.paired_interval(gained, lost, 1000)
    assert (row["change"]["low"], row["change"]["high"]) == (low, high)
    bounds = recovery_interval(before, later, answered("orderer2", "order"))
    assert (row["recovery"]["low"], row["recovery"]["high"]) == bounds


def test_domains_that_were_not_distilled_are_compared_with_before(finished: Recipe) -> None:
    changes = tree_of(finished)["undistilled"]["copy"]["changes"]
    assert set(changes) == {"warm_up_1", "mopd_1", "mopd_2", "boosted", "quantized"}
    assert changes["mopd_2"]["rate"] == pytest.approx(-0.005) and changes["quantized"]["rate"] == pytest.approx(-0.007)


def test_curves_put_both_iterations_on_one_axis(finished: Recipe) -> None:
    curves = tree_of(finished)["curves"]
    assert [(b["stage"], b["from"], b["to"]) for b in curves["iterations"]] == [("mopd1", 0, 200), ("mopd2", 200, 400)]
    points = curves["accuracy"]["reverse"]
    assert [points[0], points[-1]] == [[0, 470, 1000], [400, 960, 1000]]
    assert [200, 900, 1000] in points and [step for step, _, _ in points] == sorted(step for step, _, _ in points)
    assert curves["reverse_kl_k1"]["order"][200] == [201, pytest.approx(0.9 * 0.98)]


def test_overlap_is_that_of_the_teacher_that_serves_then(finished: Recipe) -> None:
    row = tree_of(finished)["overlap"]["order"]
    assert (row["before"]["teacher"], row["after"]["teacher"]) == ("orderer", "orderer2")
    assert (row["before"]["decision"], row["after"]["decision"]) == ("warm_up", "go")
    assert (row["before"]["overlap"], row["after"]["overlap"]) == pytest.approx((0.38, 0.65))
    assert list(row) == ["before", "preflight_refreshed", "after"]
    refreshed = row["preflight_refreshed"]
    assert (refreshed["student"], refreshed["teacher"]) == ("mopd1", "orderer2")
    assert refreshed["overlap"] == pytest.approx(0.58)
    shown = text.to_markdown(tree_of(finished), {})
    assert "| order | preflight_refreshed | mopd1 | orderer2 | go | 58.0% |" in shown


def test_acceptance_gains_are_paired_by_prompt_and_over_seeds(finished: Recipe) -> None:
    row = tree_of(finished)["acceptance"]["draft_2"]["greedy"]
    first, last = (acceptance(gain)["draft_2"]["greedy"]["by_prompt"][:128] for gain in (0.0, 0.55))
    changes = [b - a for a, b in zip(first, last, strict=True)]
    assert row["gain"]["value"] == pytest.approx(sum(changes) / 128) and row["prompts"] == 128
    assert (row["gain"]["low"], row["gain"]["high"]) == pytest.approx(intervals.mean_interval(changes))
    write_ablations(finished)
    gains = [acceptance(0.5 + 0.02 * s)["draft_2"]["greedy"]["length"] - sum(first) / 128 for s in (1, 2, 3)]
    seeds = tree_of(finished)["acceptance"]["draft_2"]["greedy"]["seeds"]
    assert seeds["values"] == pytest.approx(gains) and seeds["value"] == pytest.approx(sum(gains) / 3)
    assert (seeds["low"], seeds["high"]) == pytest.approx(intervals.mean_interval(gains))


def test_warm_up_and_staleness_are_read_from_the_ablations(finished: Recipe) -> None:
    write_ablations(finished)
    tree = tree_of(finished)
    row = tree["warm_up"]["count"]
    assert row["recovery"]["without"]["value"] == pytest.approx(0.29 / 0.82)
    assert row["recovery"]["with"]["value"] == pytest.approx(0.71 / 0.82)
    assert row["gain"]["value"] == pytest.approx(0.42 / 0.82)
    assert row["gain"]["low"] < row["gain"]["value"] < row["gain"]["high"]
    rows = tree["staleness"]["rows"]
    forms = ["corrected", "recomputed", "uncorrected"]
    assert [(one["lag"], one["form"]) for one in rows][:4] == [(0, "corrected"), *((1, form) for form in forms)]
    assert all(len(one["recovery"]["values"]) == 3 for one in rows if one["form"] != "recomputed")
    assert [one["recovery"] for one in rows if one["form"] == "recomputed"] == [None] * 3
    shown = text.to_markdown(tree, {})
    assert "| 4 | recomputed | not trained |" in shown and "80 steps of mopd1 with 96 prompts" in shown


def test_time_and_memory_of_each_stage(finished: Recipe) -> None:
    tree = tree_of(finished)
    rows = {row["stage"]: row for row in tree["stages"]}
    assert list(rows) == finished.names and rows["preflight"]["wall_s"] == 12.0
    assert rows["mopd1"]["evaluation_s"] == pytest.approx(9 + 9 + 200 * 0.5) and rows["mopd1"]["steps"] == 200
    assert rows["boosted"]["evaluation_s"] == pytest.approx(3 + 9), "speculative decoding before it counts"
    assert rows["sft"]["memory_bytes"] == 1_100_000_000 and tree["seeds"] == [42]
    assert tree["wall_s"] == sum(row["wall_s"] for row in rows.values())
    assert text.memory(rows["sft"]) == "1.10 GB" and text.memory({}) == ""
    assert text.memory(rows["sft"] | {"device_memory_bytes": 40_125_000_000}) == "1.10 GB, device 40.12 GB"


# ------------------------------------------------------------------ promises


def statuses(tree: Mapping[str, Any]) -> dict[str, str]:
    return {promise["name"]: promise["status"] for promise in tree["promises"]}


def test_all_promises_can_be_held(finished: Recipe) -> None:
    write_ablations(finished)
    assert set(statuses(tree_of(finished)).values()) == {"held"}


def test_what_was_not_measured_is_not_held(finished: Recipe) -> None:
    found = statuses(tree_of(finished))
    assert found.pop("warm-up") == found.pop("acceptance") == "not measured"  # both want their ablations
    assert "asynchrony" not in found and set(found.values()) == {"held"}


@pytest.mark.parametrize(
    ("stage", "place", "rate", "missed", "named"),
    [
        ("mopd2", 3, 0.82, "recovery", "count"),
        ("mopd2", 4, 0.91, "other domains", "copy, MOPD 2"),
        ("boosted", 5, 0.82, "other domains", "vowels, boosted"),
        ("nvfp4", 1, 0.85, "quantization", "order"),
    ],
)
def test_promises_can_be_missed(tmp_path: Path, stage: str, place: int, rate: float, missed: str, named: str) -> None:
    recipe = a_recipe(tmp_path / "recipe")
    rates = {name: list(row) for name, row in RATES.items()}
    rates[stage][place] = rate
    write_stages(recipe, {name: tuple(row) for name, row in rates.items()})
    tree = tree_of(recipe)
    assert statuses(tree)[missed] == "missed"
    (promise,) = (p for p in tree["promises"] if p["name"] == missed)
    assert [case["what"] for case in promise["cases"] if not case["held"]] == [named]
    assert "missed" in tables.verdict(tree).plain and missed in tables.verdict(tree).plain


def test_a_change_is_missed_by_its_whole_interval_alone(finished: Recipe) -> None:
    """An interval that reaches below the bar holds the promise, and the case says that it does."""
    tree = tree_of(finished)
    change = {"rate": -0.012, "low": -0.025, "high": 0.001, "gained": 3, "lost": 15}
    tree["undistilled"]["copy"]["changes"]["mopd_2"] = change
    (promise,) = (p for p in promises.check(tree) if p.name == "other domains")
    (case,) = (c for c in promise.cases if c.what == "copy, MOPD 2")
    assert case.held and case.text == "-1.2 points [-2.5, +0.1], lower bound below -2"
    change["high"] = -0.0201
    (promise,) = (p for p in promises.check(tree) if p.name == "other domains")
    assert promise.status == "missed"


def test_ablations_can_miss_their_promises(finished: Recipe) -> None:
    write_ablations(finished)
    folder = finished.dir / "ablations"
    warm_up, staleness, boosting = (json.loads((folder / f"{n}.json").read_text()) for n in ablations.NAMES)
    answers = warm_up["domains"]["palindrome"]["answers"]
    answers["with"] = answers["without"]
    for run in staleness["runs"]:
        if (run["lag"], run["form"]) == (4, "corrected"):
            run["recovery"] -= 0.3
    for run in boosting["runs"]:
        run["after"]["draft_7"] = run["before"]["draft_7"]
    for name, changed in zip(ablations.NAMES, (warm_up, staleness, boosting), strict=True):
        leave(folder / f"{name}.json", changed)
    tree = tree_of(finished)
    found = statuses(tree)
    assert {name for name, status in found.items() if status == "missed"} == {"warm-up", "acceptance", "asynchrony"}
    cases = {case["what"]: case["held"] for p in tree["promises"] if p["name"] == "asynchrony" for case in p["cases"]}
    assert cases == {"lag 1": True, "lag 4": False, "lag 8": True, "cosine at lag 8": True}


def test_a_teacher_that_is_no_better_misses_the_promise(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path / "recipe")
    write_stages(recipe, RATES | {"reverser": (0.46, *RATES["reverser"][1:])})
    tree = tree_of(recipe)
    assert tree["distilled"]["reverse"]["recovery"] == {"value": None, "low": None, "high": None}
    assert statuses(tree)["recovery"] == "missed"
    assert "no better" in next(p for p in tree["promises"] if p["name"] == "recovery")["cases"][0]["text"]


# ------------------------------------------------------------------ what is not there


def test_answers_to_other_prompts_are_refused(finished: Recipe) -> None:
    path = finished.dir / "mopd2" / "result.json"
    tree = json.loads(path.read_text())
    leave(path, tree | {"prompts": tree["prompts"] | {"order": "f" * 64}})
    with pytest.raises(ConfigurationError, match=r"'mopd2'.*different held-out prompts of domain 'order'"):
        tree_of(finished)
    leave(path, {name: value for name, value in tree.items() if name != "answers"})
    with pytest.raises(ConfigurationError, match="has accuracies and no answers"):
        tree_of(finished)


def test_a_recipe_without_roles_is_refused(finished: Recipe) -> None:
    with pytest.raises(ConfigurationError, match="has no report section"):
        outcomes.load(finished.model_copy(update={"report": None}), {})


@pytest.mark.parametrize("until", ["sft", "counter", "preflight", "mopd1", "orderer2", "mopd2", "boosted"])
def test_a_recipe_that_stopped_has_a_report_of_what_is_there(tmp_path: Path, until: str) -> None:
    recipe = a_recipe(tmp_path / "recipe")
    write_stages(recipe, until=until)
    tree = tree_of(recipe)
    if until in ("sft", "mopd1"):
        assert report.publish(recipe, {stage.name: stage_config(recipe, stage) for stage in recipe.stages}) == tree
    missing = recipe.names[recipe.names.index(until) + 1 :]
    assert [line for line in tree["missing"] if line.startswith("stage ")] == [
        f"stage {name}: not finished" for name in missing
    ]
    shown = text.to_markdown(tree, {})
    assert "## Not in this report" in shown and f"- stage {missing[0]}: not finished" in shown
    assert statuses(tree)["recovery"] == ("held" if until in ("mopd2", "boosted") else "not measured")
    assert statuses(tree)["quantization"] == "not measured"
    if until == "mopd1":
        assert tree["distilled"]["order"]["recovery"] is None, "its teacher of the last iteration is not there yet"
        assert tree["distilled"]["count"]["recovery"]["value"] == pytest.approx((0.79 - 0.30) / (0.92 - 0.30))


def test_an_unfinished_stage_does_not_count(finished: Recipe) -> None:
    leave(finished.dir / "nvfp4" / "stage.json", {"fingerprint": "", "finished": False})
    tree = tree_of(finished)
    assert tree["quantized"] is None and "stage nvfp4: not finished" in tree["missing"]


def test_ablations_of_other_weights_are_not_shown(finished: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a recipe that was run anew since, and those of a version that did not say what they are of."""
    write_ablations(finished)
    (finished.dir / "ablations" / "staleness.png").write_bytes(b"")
    folder = finished.dir / "ablations"
    warm_up, staleness = (json.loads((folder / f"{n}.json").read_text()) for n in ("warm_up", "staleness"))
    leave(folder / "warm_up.json", {"domains": warm_up["domains"]})
    staleness["runs"][-1]["weights"]["counter"] = "0" * 64
    leave(folder / "staleness.json", staleness)
    leave(finished.dir / "mopd2" / "stage.json", {"fingerprint": "", "finished": False})
    (finished.dir / "mopd2" / "result.json").unlink()
    monkeypatch.setattr(report.pictures, "figures", lambda tree, examples: iter(()))
    tree = report.publish(finished, {stage.name: stage_config(finished, stage) for stage in finished.stages})
    assert tree["warm_up"] is None and tree["staleness"] is None
    assert "seeds" not in tree["acceptance"]["draft_2"]["greedy"]
    repeat = "; repeat it with make recipe-ablations"
    ours = weights("counter")["counter"][:12]
    assert {line for line in tree["missing"] if "another run" in line} == {
        f"warm-up ablation: ablations/warm_up.json is of another run (it does not say whose weights it is of){repeat}",
        "staleness: ablations/staleness.json is of another run (counter was checkpoint 000000000000 there and is"
        f" {ours} here){repeat}",
        "MTP boosting over seeds: ablations/mtp_boosting.json is of another run (mopd2 was checkpoint"
        f" {weights('mopd2')['mopd2'][:12]} there and is not finished here){repeat}",
    }
    shown = (finished.dir / "report.md").read_text()
    assert "of another run" in shown and "staleness.png" not in shown


def test_a_teacher_that_came_as_a_checkpoint_is_a_teacher(tmp_path: Path) -> None:
    """Its domain is distilled, its overlap is shown, and its accuracy is what it answered to the last iteration that
    has it; until one is finished that is missing."""
    recipe = a_recipe(tmp_path / "recipe")
    entry = {"reverser": {"checkpoint": "elsewhere/reverser", "domains": ["reverse"]}}

    def with_external(stage: Stage) -> Stage:
        if "reverser" not in stage.teachers:
            return stage
        teachers = {name: domains for name, domains in stage.teachers.items() if name != "reverser"}
        return stage.model_copy(update={"teachers": teachers, "settings": stage.settings | {"teachers": entry}})

    stages = [with_external(stage) for stage in recipe.stages if stage.name != "reverser"]
    recipe = recipe.model_copy(update={"stages": stages})
    write_stages(recipe)
    tree = tree_of(recipe)
    assert set(tree["distilled"]) == set(DISTILLED) and set(tree["undistilled"]) == set(OTHERS)
    row = tree["distilled"]["reverse"]
    assert row["cells"]["teacher"] is None and row["recovery"] is None
    assert row["change"]["rate"] == pytest.approx(0.5)
    assert tree["overlap"]["reverse"]["before"]["teacher"] == "reverser"
    assert "reverser" in next(row for row in tree["stages"] if row["stage"] == "mopd1")["teachers"]
    (promise,) = (p for p in tree["promises"] if p["name"] == "recovery")
    assert promise["status"] == "not measured" and len(promise["cases"]) == 3
    assert promise["absent"] == "missing: reverse"
    lost = "accuracy of teacher reverser: it came as a checkpoint, and no finished iteration had it answer"
    assert any(missing.startswith(lost) for missing in tree["missing"])
    assert "| (reverser) |  | +50.0 [" in text.to_markdown(tree, {})
    for iteration, domain_rates in (("mopd1", RATES | {"reverser": (0.5,) * 6}), ("mopd2", RATES)):
        answers = {
            name: {"reverse": value["reverse"]}
            for name, value in measured("reverser", domain_rates).items()
            if name != "measure_s"
        }
        before = json.loads((recipe.dir / iteration / "before.json").read_text())
        leave(recipe.dir / iteration / "before.json", before | {"teachers": {"reverser": answers}})
    tree = report.publish(recipe, {stage.name: stage_config(recipe, stage) for stage in recipe.stages})
    row = tree["distilled"]["reverse"]
    assert row["cells"]["teacher"]["rate"] == pytest.approx(0.98) and not row["refreshed"]
    assert row["recovery"]["value"] == pytest.approx((0.96 - 0.46) / (0.98 - 0.46))
    assert next(p for p in tree["promises"] if p["name"] == "recovery")["status"] == "held"
    assert "98.0% [96.9, 98.7] (reverser) | **96.2%" in (recipe.dir / "report.md").read_text()
    answers["prompts"] = {"reverse": "others"}
    leave(recipe.dir / "mopd2" / "before.json", before | {"teachers": {"reverser": answers}})
    with pytest.raises(ConfigurationError, match="answered different held-out prompts of domain 'reverse'"):
        tree_of(recipe)


def test_a_note_on_a_domain_that_nobody_measured_is_missed(finished: Recipe) -> None:
    assert finished.report is not None
    roles = finished.report.model_copy(update={"notes": {"late": "a sibling"}})
    tree = tree_of(finished.model_copy(update={"report": roles}))
    assert "report.notes.late: no stage is measured on this domain" in tree["missing"]


# ------------------------------------------------------------------ files


def test_the_files_tell_the_story_first(finished: Recipe) -> None:
    write_ablations(finished)
    for name in ("graph.png", "ablations/staleness.png"):
        (finished.dir / name).write_bytes(b"")
    configs = {stage.name: stage_config(finished, stage) for stage in finished.stages}
    tree = report.publish(finished, configs)
    assert json.loads((finished.dir / "report.json").read_text()) == json.loads(json.dumps(tree))
    shown = (finished.dir / "report.md").read_text()
    assert shown.startswith("# recipe: 3 teachers into one student, 2 iterations\n")
    headings = [line for line in shown.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Promises" and shown.index("| domain | SFT | before | warm-up | MOPD 1 |") < 600
    assert "| **92.6% [" in shown and "95.0% [93.5, 96.2] (orderer2)" in shown
    assert "order: orderer2, refreshed from orderer, which had 93.0% [91.2, 94.4]." in shown
    assert "| +50.0 [" in shown and "\n\norder: two words\n\n## Promises" in shown
    assert "\n\ncopy: a sibling of reverse\n\n## Warm-up" in shown
    pictures = {path.name for path in finished.dir.glob("*.png")}
    assert pictures == {
        "recovery.png",
        "curves.png",
        "reverse_kl.png",
        "other_domains.png",
        "overlap.png",
        "warm_up.png",
        "acceptance.png",
        "rollouts.png",
        "time.png",
        "graph.png",
    }
    assert all(f"]({name})" in shown for name in pictures | {"ablations/staleness.png"})
    assert all((finished.dir / name).stat().st_size > 5000 for name in pictures - {"graph.png"})
    assert not list(finished.dir.glob("*.partial"))


def test_tables_of_markdown_are_rectangular(finished: Recipe) -> None:
    write_ablations(finished)
    blocks = text.to_markdown(tree_of(finished), {}).split("\n\n")
    found = [{line.count("|") for line in block.splitlines()} for block in blocks if block.startswith("|")]
    assert len(found) == 9 and all(len(widths) == 1 for widths in found)


def test_the_terminal_fits_in_100_columns_and_cuts_no_number(finished: Recipe) -> None:
    write_ablations(finished)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tables.show(tree_of(finished), console)
    shown = console.export_text()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100
    assert "…" not in shown and "6 of 6 promises held" in shown
    for expected in (
        "92.6%",
        "[89.9, 95.1]",
        "89.1–92.6",
        "orderer2*",
        "orderer → orderer2",
        "5.030 bits",
        "1.10 GB",
        "copy: a sibling of reverse",
    ):
        assert expected in shown
