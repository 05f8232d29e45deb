"""Pre-flights: numbers against fp64 on whole logits, decisions, conflicts, layouts, files, and the command."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scripts import loaded

from megatron_mopd.config import Config, ConfigurationError, build_config
from megatron_mopd.preflight import numbers
from megatron_mopd.preflight.decide import decide, decisions
from megatron_mopd.preflight_config import Preflight
from megatron_mopd.records import Prompt, Rollout

VOCAB, TOP = 53, 5  # odd: padded under tensor parallelism
TOKENIZER: Any = SimpleNamespace(pad_token=0, tokenizer_sha="tok", template_sha="tem", vocab_size=VOCAB)
LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_ep2_dp2": (4, {"tensor": 2, "expert": 2}),
    "pp2_dp2": (4, {"pipeline": 2}),
}
RATIO = 0.05


# ------------------------------------------------------------------ checkpoints, rollouts, an fp64 reference


def save(root: Path, name: str, seed: int, vocab: int, reads: dict[str, Any], change: Any = None) -> None:
    from megatron_mopd import checkpoint, parallel, student
    from megatron_mopd.config import Model, Parallel

    groups = parallel.initialize(Parallel(), seed=seed)
    model = Model(preset="tiny", pattern="M*E", max_sequence_length=24)
    built = student.build_model(model, Parallel(), groups, vocab)
    with torch.no_grad():
        built.output_layer.weight.mul_(5)  # far from uniform, so that models differ
        if change is not None:
            change(built)
    manifest = reads | {"vocab_size": vocab, "model": model.model_dump(mode="json")}
    checkpoint.save(root / name, 1, built, None, groups, state={}, manifest=manifest)


def opposite(model: Any) -> None:
    """What was likely becomes unlikely."""
    model.output_layer.weight.neg_()


def broken(model: Any) -> None:
    model.output_layer.weight[3, 3] = math.nan


def write_checkpoints(folder: str) -> None:
    from megatron_mopd.config import Tokenizer
    from megatron_mopd.tokenizer import build_tokenizer

    root, reads = Path(folder), {"tokenizer_sha": "tok", "template_sha": "tem"}
    for name, seed, change in (("a", 0, None), ("b", 1, None), ("far", 0, opposite), ("nan", 0, broken)):
        save(root, name, seed, VOCAB, reads, change)
    tokenizer = build_tokenizer(Tokenizer())
    reads = {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha}
    for name, seed, change in (("text_a", 0, None), ("text_b", 1, None), ("text_far", 0, opposite)):
        save(root, name, seed, tokenizer.vocab_size, reads, change)


@pytest.fixture(scope="module")
def root(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    ranks(1, write_checkpoints, str(folder))
    return folder


def configuration(root: Path, teachers: dict[str, tuple[str, list[str]]], **sections: Any) -> Config:
    """``teachers``: name -> checkpoint, domains; several may share a domain. The student is checkpoint a."""
    taken: set[str] = set()
    named: dict[str, Any] = {}
    for name, (checkpoint, domains) in teachers.items():
        named[name] = {"checkpoint": str(root / checkpoint), "domains": [d for d in domains if d not in taken]}
        taken |= set(domains)
    preflight = {"candidates": {name: domains for name, (_, domains) in teachers.items()}}
    preflight |= {"top_k": TOP, "implausible_ratio": RATIO} | sections.pop("preflight", {})
    tree = {
        "run": {"dir": str(root / "run"), "steps": 1},
        "model": {"preset": "tiny", "pattern": "M*E", "max_sequence_length": 24, "initial": str(root / "a")},
        "rollout": {"temperature": 0.8, "max_new_tokens": 6},
        "batching": {"micro_batch_size": 3},
        "teachers": named,
        "preflight": preflight,
    }
    return build_config(tree | sections)


def make_rollouts(count: int = 13) -> list[Rollout]:
    """Interleaved domains, ragged lengths."""
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for i in range(count):
        tokens = torch.randint(1, VOCAB, (3 + i % 4,), generator=generator)
        completion = torch.randint(1, VOCAB, (2 + (5 * i) % 9,), generator=generator)
        domain = ("count", "spell")[i % 2]
        prompt = Prompt(id=f"p{i}", domain=domain, messages=(), tokens=tuple(tokens.tolist()))
        rollouts.append(Rollout(prompt=prompt, sample=0, completion=completion, finish="stop"))
    return rollouts


def measured(config: Config, groups: Any) -> dict[str, Any]:
    """Pairs and settings of ``config`` on this rank's share of :func:`make_rollouts`."""
    from megatron_mopd import checkpoint
    from megatron_mopd.preflight import stage
    from megatron_mopd.preflight.measure import measure
    from megatron_mopd.teachers import TeacherPool

    pool = TeacherPool(config, groups, TOKENIZER)
    student = pool.scorer.build(config.model, "fp32", "model")
    assert config.model.initial is not None
    checkpoint.load_weights(config.model.initial, student, groups)
    own = make_rollouts()[groups.dp_rank :: groups.dp_size]
    return measure(pool, student, own, stage.candidates(config), config.preflight)


@torch.no_grad()
def log_softmax(path: Path, groups: Any, config: Config, rollouts: list[Rollout]) -> list[torch.Tensor]:
    """fp64 [n, V] log-probabilities of each rollout alone, from whole logits."""
    from megatron_mopd import checkpoint, student

    model = student.build_model(config.model, config.parallel, groups, VOCAB, "fp32", mtp=False)
    checkpoint.load_weights(path, model, groups)
    found = []
    for rollout in rollouts:
        out = student.forward(model, rollout.tokens[None])
        start = len(rollout.prompt.tokens) - 1
        hidden = out.hidden[start : start + len(rollout.completion), 0].double()
        found.append((hidden @ out.output_weight[:VOCAB].double().T / config.rollout.temperature).log_softmax(-1))
    return found


def exact(log_p: list[torch.Tensor], log_q: list[torch.Tensor], rollouts: list[Rollout]) -> dict[str, Any]:
    """The metrics of a pair, token by token in plain Python; p student, q teacher."""
    columns: dict[str, list[float]] = {name: [] for name in numbers.MEANS}
    by_position: dict[int, list[float]] = {}
    for p_rows, q_rows, rollout in zip(log_p, log_q, rollouts, strict=True):
        implausible = False
        for position, (lp, lq, token) in enumerate(zip(p_rows, q_rows, rollout.completion.tolist(), strict=True)):
            shared = sorted(set(lp.topk(TOP).indices.tolist()) & set(lq.topk(TOP).indices.tolist()))
            gap = float(lq[token] - lp[token])
            columns["reverse_kl"].append(float((lp.exp() * (lp - lq)).sum()))
            columns["overlap"].append(len(shared) / TOP)
            columns["teacher_mass"].append(float(lq[shared].exp().sum()))
            columns["student_mass"].append(float(lp[shared].exp().sum()))
            columns["teacher_top_mass"].append(float(lq.topk(TOP).values.exp().sum()))
            columns["student_top_mass"].append(float(lp.topk(TOP).values.exp().sum()))
            columns["teacher_entropy"].append(float(-(lq.exp() * lq).sum()))
            columns["student_entropy"].append(float(-(lp.exp() * lp).sum()))
            columns["gap"].append(gap)
            columns["implausible"].append(float(implausible))
            implausible |= gap < math.log(RATIO)
            by_position.setdefault((position + 1).bit_length() - 1, []).append(gap)
    return {
        **{name: float(np.mean(values)) for name, values in columns.items()},
        "gaps": columns["gap"],
        "by_position": [by_position[i] for i in sorted(by_position)],
    }


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 2e-5 * max(1.0, abs(expected))


# ------------------------------------------------------------------ numbers


def test_every_number_is_that_of_whole_logits_in_fp64(root: Path, groups: Any) -> None:
    config = configuration(root, {"near": ("b", ["count", "spell"]), "far": ("far", ["spell"])})
    found = measured(config, groups)
    rollouts = make_rollouts()
    log_p = log_softmax(root / "a", groups, config, rollouts)
    values = []
    for name, path, domains in (("near", "b", ["count", "spell"]), ("far", "far", ["spell"])):
        log_q = log_softmax(root / path, groups, config, rollouts)
        assert list(found["teachers"][name]) == domains
        for domain in domains:
            chosen = [i for i, r in enumerate(rollouts) if r.prompt.domain == domain]
            expected = exact([log_p[i] for i in chosen], [log_q[i] for i in chosen], [rollouts[i] for i in chosen])
            metrics = found["teachers"][name][domain]
            for metric in numbers.MEANS:
                assert close(metrics[metric], expected[metric]), (name, domain, metric)
            for who in ("teacher", "student"):
                assert close(metrics[f"{who}_shared"], expected[f"{who}_mass"] / expected[f"{who}_top_mass"])
            values.append([expected[metric] for metric in numbers.MEANS])
            assert metrics["tokens"] == len(expected["gaps"]) and metrics["not_finite"] == 0
            assert 0 <= metrics["disagreement"] < 1e-4
            for q, value in metrics["gap_quantiles"].items():
                assert close(value, float(np.quantile(expected["gaps"], float(q))))
            assert [(b["first"], b["last"]) for b in metrics["gap_by_position"]] == [(0, 0), (1, 2), (3, 6), (7, 14)]
            for entry, gaps in zip(metrics["gap_by_position"], expected["by_position"], strict=True):
                assert entry["tokens"] == len(gaps)
                assert close(entry["quantiles"]["0.25"], float(np.quantile(gaps, 0.25)))
    overlap, implausible = numbers.MEANS.index("overlap"), numbers.MEANS.index("implausible")
    assert 0.05 < values[0][overlap] < 0.95 and 0 < values[0][implausible] < 1  # the reference is no corner case
    log_b, log_f = (log_softmax(root / path, groups, config, rollouts) for path in ("b", "far"))
    spell = [i for i, r in enumerate(rollouts) if r.prompt.domain == "spell"]
    jsd = [jensen_shannon(log_b[i], log_f[i]) for i in spell]
    (conflict,) = found["conflicts"]
    assert conflict["domain"] == "spell" and conflict["teachers"] == ["near", "far"] and conflict["conflicting"]
    assert close(conflict["jsd"], float(torch.cat(jsd).mean()))


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


def test_a_prefix_is_implausible_from_the_token_after_the_one_that_spoils_it() -> None:
    low = math.log(1e-3) - 0.1
    gap = torch.tensor([0.0, low, 0.0, 0.0, low, 0.5, low])
    flags = numbers.implausible_prefixes(gap, torch.tensor([0, 4, 4, 5, 7, 7]), 1e-3)
    assert flags.tolist() == [False, False, True, True, False, False, False]
    assert numbers.implausible_prefixes(torch.empty(0), torch.tensor([0, 0]), 1e-3).tolist() == []


def measured_on_ranks(root: str, layout: dict[str, int], micro_batch: int) -> dict[str, Any]:
    from megatron_mopd import parallel

    teachers = {"near": ("b", ["count", "spell"]), "far": ("far", ["spell"])}
    config = configuration(Path(root), teachers, parallel=layout, batching={"micro_batch_size": micro_batch})
    return measured(config, parallel.initialize(config.parallel, 42))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (world > 2)) for name, (world, _) in LAYOUTS.items()]
)
def test_layout_and_micro_batches_change_nothing(ranks: Any, root: Path, layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    (alone,) = ranks(1, measured_on_ranks, str(root), {}, 13)
    results = ranks(world, measured_on_ranks, str(root), sizes, 2)
    assert all(found == results[0] for found in results)
    same_numbers(results[0], alone)


def same_numbers(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same_numbers(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            same_numbers(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert abs(found - expected) <= 1e-4, where
    else:
        assert found == expected, where


# ------------------------------------------------------------------ decisions


def judged(config: Config, groups: Any) -> dict[str, tuple[str, list[str]]]:
    found = measured(config, groups)
    return {name: decide(domains, config.preflight) for name, domains in found["teachers"].items()}


def test_the_student_itself_may_go_and_its_opposite_needs_a_warm_up(root: Path, groups: Any) -> None:
    config = configuration(root, {"twin": ("a", ["count"]), "same": ("a", ["count"]), "far": ("far", ["spell"])})
    found = measured(config, groups)
    twin, far = found["teachers"]["twin"]["count"], found["teachers"]["far"]["spell"]
    assert twin["overlap"] == 1 and abs(twin["reverse_kl"]) < 1e-6 and twin["implausible"] == 0
    assert twin["gap_quantiles"]["0.05"] == twin["gap_quantiles"]["0.95"] == 0
    (conflict,) = found["conflicts"]
    assert abs(conflict["jsd"]) < 1e-6 and not conflict["conflicting"]
    assert twin["teacher_mass"] < 0.99 and abs(twin["teacher_shared"] - 1) < 1e-6  # not all mass, and yet the same
    assert far["overlap"] < 0.1 and far["teacher_mass"] < 0.1 and far["implausible"] > 0.3
    assert decide(found["teachers"]["twin"], config.preflight) == ("go", [])
    decision, reasons = decide(found["teachers"]["far"], config.preflight)
    assert decision == "warm_up" and f"spell: overlap of the likeliest tokens {far['overlap']:.3f}, below" in reasons[0]
    assert "preflight.min_overlap = 0.3" in reasons[0]


def test_a_teacher_that_scores_the_same_tokens_otherwise_is_refused(
    root: Path, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mopd.scoring import Scorer

    asked, real = [], Scorer.logprobs

    def depending_on_order(self: Scorer, model: Any, micro_batches: Any, weight: Any = None) -> torch.Tensor:
        asked.append([mb.tokens.shape[0] for mb in micro_batches])
        scored = real(self, model, micro_batches, weight)
        scored[0] -= 0.25  # the first token of the last rollout
        return scored

    monkeypatch.setattr(Scorer, "logprobs", depending_on_order)
    config = configuration(root, {"near": ("b", ["count"])}, preflight={"max_disagreement": 0.2})
    decision, reasons = judged(config, groups)["near"]
    assert decision == "refuse"
    assert reasons == ["count: disagreement of repeated scoring 0.25 nats, above preflight.max_disagreement = 0.2"]
    assert asked == [[2, 2, 2, 1]]  # 3, 3, 1 the first time
    lenient = config.preflight.model_copy(update={"max_disagreement": 0.3, "min_overlap": 0.0, "min_shared_mass": 0.0})
    assert decide(measured(config, groups)["teachers"]["near"], lenient)[0] != "refuse"


def test_a_teacher_that_gives_no_numbers_is_refused_and_leaves_json(root: Path, groups: Any) -> None:
    found = measured(configuration(root, {"nan": ("nan", ["count"]), "near": ("b", ["spell"])}), groups)
    metrics = found["teachers"]["nan"]["count"]
    assert metrics["not_finite"] == metrics["tokens"] > 0 and metrics["reverse_kl"] is None
    json.dumps(found, allow_nan=False)
    decision, reasons = decide(found["teachers"]["nan"], Preflight())
    assert decision == "refuse" and f"{metrics['tokens']} of {metrics['tokens']} tokens have no finite" in reasons[0]
    assert found["teachers"]["near"]["spell"]["reverse_kl"] > 0


def test_the_worst_domain_decides_and_only_its_reasons_are_given() -> None:
    good = {"overlap": 0.9, "teacher_shared": 0.99, "student_shared": 0.98, "implausible": 0.01}
    good |= {"disagreement": 1e-4, "not_finite": 0, "tokens": 10}
    poor, bad = good | {"student_shared": 0.5, "implausible": 0.7}, good | {"disagreement": 0.2, "overlap": 0.0}
    assert decide({"x": good, "y": good}, Preflight()) == ("go", [])
    assert decide({"x": good, "y": poor}, Preflight()) == (
        "warm_up",
        [
            "y: shared part of the student's mass on its likeliest tokens 0.500, below preflight.min_shared_mass = 0.9",
            "y: share of implausible prefixes 0.700, above preflight.max_implausible = 0.5",
        ],
    )
    decision, reasons = decide({"x": bad, "y": poor}, Preflight())
    assert decision == "refuse" and len(reasons) == 1 and reasons[0].startswith("x: disagreement")
    assert decide({"x": good | {"disagreement": None}}, Preflight())[0] == "refuse"
    # On the threshold is good enough.
    edge = good | {"overlap": 0.3, "teacher_shared": 0.9, "implausible": 0.5, "disagreement": 0.1}
    assert decide({"x": edge}, Preflight()) == ("go", [])


def test_decisions_are_read_back_or_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no pre-flight has been finished there"):
        decisions(tmp_path)
    file = tmp_path / "preflight.json"
    file.write_text(json.dumps({"teachers": {"a": {"decision": "go"}, "b": {"decision": "warm_up"}}}))
    assert decisions(tmp_path) == decisions(file) == {"a": "go", "b": "warm_up"}
    file.write_text(json.dumps({"teachers": {"a": {"decision": "perhaps"}}}))
    with pytest.raises(ConfigurationError, match="perhaps"):
        decisions(tmp_path)
    file.write_text('{"teachers": [')
    with pytest.raises(ConfigurationError, match="is no result of a pre-flight"):
        decisions(tmp_path)


# ------------------------------------------------------------------ the command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve prompts in two domains, without verifiers."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "domain": ("x", "y")[i % 2]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tool() -> Any:
    return loaded("tools/preflight.py")


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight", *map(str, arguments)])
    tool().main()


SETTINGS = ("model.max_sequence_length=24", "rollout.max_new_tokens=5", "preflight.top_k=8", "preflight.samples=5")


def test_the_command_measures_checkpoints_that_share_a_domain(
    root: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--student", root / "text_a", "--prompts", prompts, "--output", tmp_path / "out"]
    given += ["--teacher", f"twin={root / 'text_a'}:x,y", "--teacher", f"far={root / 'text_far'}:y"]
    run_tool(monkeypatch, *given, *SETTINGS, "preflight.min_shared_mass=0.8")
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert decisions(tmp_path / "out") == {"twin": "go", "far": "warm_up"}
    assert set(found["teachers"]["twin"]["domains"]) == {"x", "y"} and set(found["teachers"]["far"]["domains"]) == {"y"}
    assert found["student"] == found["teachers"]["twin"]["checkpoint_id"] != found["teachers"]["far"]["checkpoint_id"]
    assert found["prompts"] == {"side": "train", "number": {"x": 5, "y": 5}}
    assert found["conflicts"][0]["teachers"] == ["twin", "far"] and found["thresholds"]["min_shared_mass"] == 0.8
    assert (tmp_path / "out" / "preflight.png").read_bytes().startswith(b"\x89PNG")
    shown = capfd.readouterr().out
    assert "warm up" in shown and "Jensen-Shannon" in shown and "far: warm up: y: overlap" in shown
    assert json.loads((tmp_path / "out" / "result.json").read_text())["wall_s"] > 0
    with pytest.raises(SystemExit, match="is there already and is not overwritten"):
        run_tool(monkeypatch, *given, *SETTINGS)


def run_stage_on_ranks(root: str, prompts: str, output: str, layout: dict[str, int]) -> dict[str, Any]:
    from megatron_mopd import parallel
    from megatron_mopd.preflight import stage

    teachers = {"near": ("text_b", ["x", "y"])}
    config = configuration(
        Path(root),
        teachers,
        run={"dir": output, "steps": 1},
        model={"preset": "tiny", "pattern": "M*E", "max_sequence_length": 24, "initial": str(Path(root) / "text_a")},
        data={"train": [{"type": "jsonl", "path": prompts}]},
        preflight={"prompts": "train"},
        parallel=layout,
    )
    return stage.run_stage(config, parallel.initialize(config.parallel, 42), "here")


def test_a_stage_samples_the_same_rollouts_on_two_ranks(ranks: Any, root: Path, prompts: Path, tmp_path: Path) -> None:
    (alone,) = ranks(1, run_stage_on_ranks, str(root), str(prompts), str(tmp_path / "one"), {})
    both = ranks(2, run_stage_on_ranks, str(root), str(prompts), str(tmp_path / "two"), {})
    assert both[0] == both[1] == json.loads((tmp_path / "two" / "preflight.json").read_text())
    same_numbers(both[0], alone)
    assert alone["teachers"]["near"]["domains"]["x"]["tokens"] > 6


def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    root: Path, prompts: Path, tmp_path: Path, groups: Any
) -> None:
    from megatron_mopd.preflight import stage

    model = {"preset": "tiny", "pattern": "M*E", "max_sequence_length": 24, "initial": str(root / "text_a")}
    base: dict[str, Any] = {"run": {"dir": str(tmp_path / "out"), "steps": 1}, "model": model}
    base |= {"data": {"train": [{"type": "jsonl", "path": str(prompts)}]}}
    for changes, text in (
        ({"preflight": {"prompts": "train", "top_k": 200}}, "preflight.top_k = 200: the vocabulary has 101 tokens"),
        ({"preflight": {"prompts": "held_out"}}, "data.held_out has no prompt of domain 'x'"),
        ({"model": {k: v for k, v in model.items() if k != "initial"}}, "model.initial: missing"),
    ):
        sections = base | {"preflight": {"prompts": "train"}} | changes
        with pytest.raises(ConfigurationError) as error:
            stage.run_stage(configuration(root, {"near": ("text_b", ["x"])}, **sections), groups, "t")
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["math=dir"], "expected NAME=DIR:DOMAIN"),
        (["=dir:x"], "expected NAME=DIR:DOMAIN"),
        (["a=dir:x", "a=other:y"], "two teachers are called 'a'"),
    ],
)
def test_a_teacher_given_wrongly_is_named(given: list[str], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        tool().teachers_of(given)


def test_a_configuration_may_have_more_domains_than_teachers(root: Path, tmp_path: Path) -> None:
    held_out = {"type": "reasoning_gym", "domain": "z", "family": "spell_backward", "size": 3}
    file = tmp_path / "run.yaml"
    tree = {"run": {"dir": "r", "steps": 9}, "data": {"train": [held_out]}, "objective": {"type": "mopd"}}
    file.write_text(json.dumps(tree))  # which is YAML too
    text = ["--student", root / "a", "--config", file, "--output", tmp_path / "o", "--teacher", f"t={root / 'b'}:x,y"]
    found = tool().configuration(tool().parser().parse_args([*map(str, text), "preflight.samples=7"]))
    assert found.teachers["t"].domains == ["x", "y"] and found.preflight.samples == 7
    assert found.preflight.candidates == {"t": ["x", "y"]} and found.run.dir == tmp_path / "o"


def test_a_candidate_that_serves_nothing_must_be_measured_on_something(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"teachers\.idle\.domains is empty"):
        configuration(root, {"near": ("b", ["count"]), "idle": ("b", [])})
    with pytest.raises(ConfigurationError, match=r"preflight\.candidates\.nera: no teacher of this name; did you mean"):
        configuration(root, {"near": ("b", ["count"])}, preflight={"candidates": {"nera": ["x"]}})


def test_a_picture_is_drawn_of_numbers_that_are_none(tmp_path: Path, root: Path, groups: Any) -> None:
    from megatron_mopd.preflight import plot, table

    config = configuration(root, {"nan": ("nan", ["count"]), "near": ("b", ["count"])})
    found = measured(config, groups)
    teachers = {}
    for name, domains in found["teachers"].items():
        decision, reasons = decide(domains, config.preflight)
        teachers[name] = {"domains": domains, "decision": decision, "reasons": reasons}
    bounds = ("min_shared_mass", "min_overlap", "max_implausible", "max_disagreement", "max_conflict")
    thresholds = {name: getattr(config.preflight, name) for name in bounds}
    result = {"student": "s" * 64, "teachers": teachers, "conflicts": found["conflicts"], "thresholds": thresholds}
    result |= {"top_k": TOP, "sampling": {"temperature": 1.0}}
    assert found["conflicts"][0]["jsd"] is None and found["conflicts"][0]["conflicting"]
    plot.save(plot.preflight(result), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    shutil.rmtree(tmp_path)
    assert len(list(table.parts(result, "t"))) > 2
