"""The kernel benchmark: its opponents are right, its rows are complete, and it refuses what would mislead."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_kernels import linear_objective
from mopd_kernels.testing import exact_log_softmax, exact_logprob, exact_reverse_kl

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "case", "shape", "dtype", "ours_ms", "peers", "limit_ms", "fraction_of_limit", "max_abs_err", "workspace_bytes",
    "gpu", "versions", "commit",
}  # fmt: skip
CPU = torch.device("cpu")
ORDER = ("L1", "L2", "L4", "L7")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules by their short names."""
    sys.path.insert(0, str(ROOT / "tools"))
    names = ("log_ratio", "log_ratio_cases", "peer", "peers", "formulas", "problem", "published", "report", "timing")
    modules = {name: importlib.import_module(f"bench.{name}") for name in names}
    yield SimpleNamespace(kernels=importlib.import_module("bench_kernels"), cases=modules["log_ratio_cases"], **modules)
    sys.path.remove(str(ROOT / "tools"))


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum, so that every row counts differently."""
    weights = torch.linspace(-1.0, 1.5, value.numel(), dtype=value.dtype)
    return list(torch.autograd.grad((value.flatten() * weights).sum(), inputs))


def entropy_of(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("name", ["eager_rows", "verl_rows", "NemoLogprob"])
def test_formulas_on_logits_agree_with_fp64(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bench.formulas.NemoLogprob, "CHUNK", 3)
    (logits,), targets = leaves((7, 50)), torch.arange(7) * 7
    formula = getattr(bench.formulas, name)
    found = formula.apply(logits, targets) if name == "NemoLogprob" else torch.stack(formula(logits, targets))
    log_p = logits.double().log_softmax(-1)
    exact = log_p.gather(1, targets[:, None])[:, 0]
    exact = exact if name == "NemoLogprob" else torch.stack([exact, entropy_of(log_p)])
    assert torch.allclose(found.double(), exact, atol=2e-6)
    for ours, truth in zip(gradients(found, [logits]), gradients(exact, [logits]), strict=True):
        assert torch.allclose(ours, truth.float(), atol=2e-6)


@pytest.mark.parametrize("name", ["NemoHead", "VerlHead"])
def test_formulas_on_hidden_states_agree_with_fp64(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    formula = getattr(bench.formulas, name)
    monkeypatch.setattr(formula, "CHUNK", 3)
    (hidden, weight), targets = leaves((7, 16), (50, 16)), torch.arange(7) * 7
    found = formula.apply(hidden, weight, targets)
    log_p = exact_log_softmax(hidden, weight)
    exact = exact_logprob(hidden, weight, targets)
    if name == "VerlHead":
        found, exact = torch.stack(found), torch.stack([exact, entropy_of(log_p)])
    assert torch.allclose(found.double(), exact, atol=5e-6)
    for ours, truth in zip(gradients(found, [hidden, weight]), gradients(exact, [hidden, weight]), strict=True):
        assert torch.allclose(ours, truth.float(), atol=2e-5)


def test_the_chunked_reverse_kl_agrees_with_fp64(bench: SimpleNamespace) -> None:
    hidden, weight, teacher_hidden, teacher_weight = leaves((7, 16), (50, 16), (7, 16), (50, 16))
    found = bench.formulas.chunked_reverse_kl(hidden, weight, teacher_hidden.detach(), teacher_weight.detach())
    exact = exact_reverse_kl(
        exact_log_softmax(hidden, weight), exact_log_softmax(teacher_hidden.detach(), teacher_weight.detach())
    )
    assert torch.allclose(found.double(), exact, atol=2e-5)
    for ours, truth in zip(gradients(found, [hidden, weight]), gradients(exact, [hidden, weight]), strict=True):
        assert torch.allclose(ours, truth.float(), atol=1e-4)


SURROGATE_PEERS = ("LIGER_SCALED", "EAGER_HEAD", "NEMO_HEAD", "VERL_HEAD")


@pytest.mark.parametrize("name", SURROGATE_PEERS)
@pytest.mark.parametrize("kept", [1.0, 0.5], ids=["all rows", "half the rows"])
def test_peers_form_the_gradient_that_ours_forms(bench: SimpleNamespace, name: str, kept: float) -> None:
    problem = bench.problem.HeadProblem(bench.problem.Shape(12, 60, 16), torch.float32, CPU, kept)
    problem.redraw(seed=3)
    problem.restore()
    mask = linear_objective(problem.hidden, problem.head, problem.tokens).per_token["mask"]
    assert mask.sum() == (12 if problem.tokens.keep is None else problem.tokens.keep.sum()) > 3, "a row was gated away"
    problem.restore()
    bench.cases._head_objective(problem)
    ours = [gradient.clone() for gradient in problem.gradients()]
    problem.restore()
    getattr(bench.peers, name).run(problem)
    for mine, theirs in zip(ours, (problem.hidden.grad, problem.weight.grad), strict=True):
        assert mine.abs().max() > 0
        assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["EAGER", "NEMO", "VERL"])
def test_peers_on_logits_form_the_gradient_that_ours_forms(bench: SimpleNamespace, name: str) -> None:
    problem = bench.problem.LogitProblem(bench.problem.Shape(12, 60), torch.float32, CPU)
    problem.redraw(seed=3)
    problem.restore()
    bench.cases._objective(problem)
    ours = problem.gradients()[0].clone()
    problem.restore()
    getattr(bench.peers, name).run(problem)
    assert ours.abs().max() > 0 and torch.allclose(ours, problem.gradients()[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["EAGER_KL", "NEMO_KL", "LIGER_CHUNKED_KL"])
def test_peers_form_the_reverse_kl_gradient_that_ours_forms(bench: SimpleNamespace, name: str) -> None:
    problem = bench.problem.DivergenceProblem(bench.problem.Shape(12, 60, 16), torch.float32, CPU)
    problem.redraw(seed=3)
    problem.restore()
    bench.cases._reverse_kl(problem)
    ours = (problem.hidden.grad, problem.main_grad.clone() if problem.head.grad is None else problem.head.grad)
    problem.restore()
    getattr(bench.peers, name).run(problem)
    for mine, theirs in zip(ours, (problem.hidden.grad, problem.weight.grad), strict=True):
        assert mine is not None and mine.abs().max() > 0
        assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-3)


def test_a_round_restores_what_a_contender_wrote_over(bench: SimpleNamespace) -> None:
    problem = bench.problem.LogitProblem(bench.problem.Shape(12, 60), torch.float32, CPU)
    problem.redraw(seed=1)
    problem.restore()
    first = problem.logits.detach().clone()
    bench.cases._objective(problem)
    assert not torch.equal(first, problem.logits)
    problem.restore()
    assert torch.equal(first, problem.logits)
    problem.redraw(seed=2)
    problem.restore()
    assert not torch.equal(first, problem.logits)


def test_the_kernels_agree_with_the_reference_in_the_interpreter(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = bench.problem.Shape(5, 300, 32)
    assert bench.log_ratio.wrong_on_device(CPU, shape) is None
    off = dataclasses.replace(bench.cases.CASES[0], ours=lambda problem: bench.cases._statistics(problem) + 1e-3)
    monkeypatch.setattr(bench.log_ratio, "CASES", (off,))
    assert "L1: error" in bench.log_ratio.wrong_on_device(CPU, shape)
    twice = dataclasses.replace(bench.cases.CASES[1], ours=twice_the_gradient(bench.cases._objective))
    monkeypatch.setattr(bench.log_ratio, "CASES", (twice,))
    assert "L2: a gradient" in bench.log_ratio.wrong_on_device(CPU, shape)


def twice_the_gradient(run: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def doubled(problem: Any) -> Tensor:
        value = run(problem)
        if problem.impl == "triton":
            problem.gradient.mul_(2)
        return value

    return doubled


def test_peak_bytes_counts_what_lives_together(bench: SimpleNamespace) -> None:
    def run() -> None:
        first = torch.empty(1 << 20, dtype=torch.int8)
        del first
        _ = torch.empty(3 << 20, dtype=torch.int8), torch.empty(1 << 20, dtype=torch.int8)

    assert bench.timing.peak_bytes(CPU, run) == 4 << 20


def test_rows_of_a_cpu_run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.kernels, "red", lambda patterns: None)
    smaller = bench.problem.Shape(128, 3000, 64)
    cases = [dataclasses.replace(case, cpu_shape=smaller) for case in bench.cases.CASES if case.cpu_shape]
    suite = dataclasses.replace(bench.kernels.SUITES["log_ratio"], cases=tuple(cases))
    monkeypatch.setitem(bench.kernels.SUITES, "log_ratio", suite)
    out = tmp_path / "rows.json"
    assert bench.kernels.main(["--device=cpu", "--quick", "--cases=L4,L8", f"--json={out}"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["case"] for row in rows] == ["L4", "L8"] and out.with_suffix(".png").stat().st_size > 1000
    for row in rows:
        assert set(row) == KEYS | {"cpu", "threads"}
        assert row["ours_ms"] is row["limit_ms"] is row["fraction_of_limit"] is row["gpu"] is None
        assert row["shape"] == {"T": 128 // bench.kernels.QUICK, "V": 3000, "H": 64}
        assert row["max_abs_err"] <= 3e-5 and row["workspace_bytes"] > 0
        assert {"torch", "triton", "liger-kernel", "python"} <= set(row["versions"]) and row["commit"]
        for peer in row["peers"].values():
            assert set(peer) == {
                "source", "ratio", "ratio_quartiles", "workspace_bytes", "workspace_ratio", "max_abs_err"
            }  # fmt: skip
            assert peer["ratio"] > 0 and peer["source"].startswith("measured: ")
    assert {"Liger FSLCE", "eager torch", "verl fused linear"} <= set(rows[0]["peers"])
    assert rows[1]["peers"]["ours, no row masked"]["workspace_ratio"] > 1


def case(bench: SimpleNamespace, *peers: Any, **changes: Any) -> Any:
    chosen = next(case for case in bench.cases.CASES if case.name == "L4")
    return dataclasses.replace(chosen, peers=peers, **changes)


def measured(bench: SimpleNamespace, one: Any, shape: tuple[int, ...] = (12, 60, 16)) -> dict[str, Any]:
    with bench.kernels.Progress(disable=True) as progress:
        return bench.kernels.measure(one, 3e-5, bench.problem.Shape(*shape), CPU, 2, progress)


def test_a_peer_that_does_not_import_is_quoted_and_takes_part_in_no_ratio(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.published.PUBLISHED, ("L4", 12, 60, 16, "absent"), (12.25, "their page, H100"))
    absent = bench.peer.Peer("absent", lambda problem: None, "nowhere", ("no_such_module",))
    other = dataclasses.replace(absent, name="also absent")
    found = measured(bench, case(bench, absent, other))["peers"]
    reason = "no_such_module: No module named 'no_such_module'"
    assert found == {
        "absent": {"unavailable": reason, "published_ms": 12.25, "source": "published: their page, H100"},
        "also absent": {"unavailable": reason},
    }


def test_a_peer_that_fails_is_reported(bench: SimpleNamespace) -> None:
    def run(problem: Any) -> None:
        raise KeyError("no such tile")

    found = measured(bench, case(bench, bench.peer.Peer("broken", run, "somewhere")))["peers"]
    assert found == {"broken": {"source": "measured: somewhere", "failed": "KeyError: 'no such tile'"}}


def test_nothing_is_kept_when_ours_is_wrong(bench: SimpleNamespace) -> None:
    off = case(bench, ours=lambda problem: bench.cases._head_statistics(problem) + 1e-3)
    with pytest.raises(SystemExit, match=r"L4: error .* against the truth; nothing was kept"):
        measured(bench, off)


def test_yardsticks_run_and_a_limit_is_a_share_of_them(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in bench.cases.CASES:
        problem = one.problem(bench.problem.Shape(12, 60, 16), torch.float32, CPU)
        problem.redraw(seed=0)
        assert bench.timing.examine(one.yardstick, problem).failed is None
        assert one.share > 0 and one.peers

    def race(peers: list[Any], *_: Any) -> list[Any]:
        times = {"ours": 2.0, "cuBLAS: logits": 1.5, "peer": 5.0}
        return [bench.timing.Measured(peer, [times[peer.name]] * 3, workspace=8, error=1e-6) for peer in peers]

    monkeypatch.setattr(bench.kernels, "race", race)
    one = case(bench, bench.peer.Peer("peer", lambda problem: None, "somewhere"), share=0.5)
    with bench.kernels.Progress(disable=True) as progress:
        device = SimpleNamespace(type="cuda")
        quiet = dataclasses.replace(one, problem=lambda *_: None)
        row = bench.kernels.measure(quiet, 3e-5, bench.problem.Shape(12, 60, 16), device, 3, progress)
    assert (row["ours_ms"], row["limit_ms"], row["fraction_of_limit"]) == (2.0, 0.75, 0.375)
    assert row["peers"]["peer"]["ms"] == 5.0 and row["peers"]["peer"]["ratio"] == 2.5
    assert row["dtype"] == "bfloat16"


def test_a_part_of_the_suite_joins_the_rest_of_the_same_machine_and_commit(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    def row(name: str, commit: str, time: float) -> dict[str, Any]:
        return {"case": name, "gpu": "H100", "commit": commit, "versions": {}, "ours_ms": time}

    path = tmp_path / "rows.json"
    assert bench.kernels.merged([row("L2", "a", 1.0)], path, ORDER) == [row("L2", "a", 1.0)]
    path.write_text(json.dumps([row("L1", "a", 1.0), row("L2", "a", 1.0), row("L4", "b", 1.0)]), encoding="utf-8")
    found = bench.kernels.merged([row("L7", "a", 2.0), row("L2", "a", 2.0)], path, ORDER)
    assert found == [row("L1", "a", 1.0), row("L2", "a", 2.0), row("L7", "a", 2.0)]


def test_published_times_are_of_cases_and_peers_that_exist(bench: SimpleNamespace) -> None:
    known = {
        (case.name, shape.T, shape.V, shape.H, peer.name)
        for case in bench.cases.CASES
        for shape in case.shapes
        for peer in case.peers
    }
    assert bench.published.PUBLISHED and set(bench.published.PUBLISHED) <= known
    assert all(ms > 0 and "H" in source for ms, source in bench.published.PUBLISHED.values())


@pytest.mark.parametrize("state", ["red", "absent", "green"])
def test_it_refuses_to_measure_on_red(
    bench: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
) -> None:
    (tmp_path / "tests").mkdir()
    if state != "absent":
        body = f"def test_promise():\n    assert {state == 'green'}, 'promise broken'\n"
        (tmp_path / "tests" / "test_promise.py").write_text(body, encoding="utf-8")
    monkeypatch.setattr(bench.kernels, "ROOT", tmp_path)
    suite = dataclasses.replace(bench.kernels.SUITES["log_ratio"], tests=("test_promise.py",))
    monkeypatch.setitem(bench.kernels.SUITES, "log_ratio", suite)
    monkeypatch.setattr(bench.kernels, "run", lambda arguments, device: pytest.fail("measured"))
    out = tmp_path / "rows.json"
    if state == "green":
        assert bench.kernels.red(("test_promise.py",)) is None
        return
    assert bench.kernels.main(["--device=cpu", f"--json={out}"]) == 1
    printed = capsys.readouterr().out
    assert "Nothing was measured" in printed and not out.exists()
    assert ("promise broken" if state == "red" else "no test matches tests/test_promise.py") in printed


def test_every_tested_form_is_in_the_gate(bench: SimpleNamespace) -> None:
    for suite in bench.kernels.SUITES.values():
        for pattern in suite.tests:
            assert list((ROOT / "tests").glob(pattern)), pattern


def test_without_a_gpu_it_says_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.kernels.main([]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "There is no CUDA GPU here" in printed and "--device cpu" in printed


def test_an_unknown_case_is_an_error(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.kernels.main(["--device=cpu", "--cases=L4,L99"])
    assert "--cases L99: the cases are L1," in capsys.readouterr().err
