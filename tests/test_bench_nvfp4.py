"""The NVFP4 benchmark: its peers compute what ours does, its rows are complete, and it tells when bytes differ."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mopd_kernels import nvfp4
from mopd_kernels.nvfp4 import Format

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(ROOT / "tools"))
    names = ("nvfp4", "nvfp4_peers", "nvfp4_problem", "timing")
    modules = {name: importlib.import_module(f"bench.{name}") for name in names}
    yield SimpleNamespace(kernels=importlib.import_module("bench_kernels"), **modules)
    sys.path.remove(str(ROOT / "tools"))


def test_every_contender_decodes_to_what_it_was_given(bench: SimpleNamespace) -> None:
    for case in bench.nvfp4.CASES:
        problem = case.problem(bench.nvfp4_problem.Matrix(32, 64), torch.bfloat16, CPU)
        problem.redraw(seed=1)
        for run in (case.ours, *(peer.run for peer in case.peers if "cpu" in peer.devices and not peer.missing("cpu"))):
            assert problem.error(run(problem)) < 1.5, case.name
        assert bench.timing.examine(case.yardstick, problem).failed is None


def test_the_limit_is_the_bytes_moved(bench: SimpleNamespace) -> None:
    shares = {case.name: case.share * 4 for case in bench.nvfp4.CASES}
    assert shares == {"Q1": 2.5625, "Q2": 4.0, "Q3": 2.5625, "Q4": 3.125, "Q5": 2.5625}


def test_bytes_that_differ_are_counted(bench: SimpleNamespace) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = nvfp4.quantize(x, Format())
    assert bench.nvfp4.differing(ours, nvfp4.quantize(x, Format())) == 0
    changed = ours.codes.clone()
    changed[3, 4] ^= 1
    assert bench.nvfp4.differing(ours, dataclasses.replace(ours, codes=changed)) == 1
    assert bench.nvfp4.differing(ours, "refused") == 1 and bench.nvfp4.differing("refused", "refused") == 0


def test_a_kernel_that_differs_stops_the_run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: x for name, x in bench.nvfp4.samples(torch.bfloat16).items() if name == "midpoints"}
    monkeypatch.setattr(bench.nvfp4, "samples", lambda dtype: few)
    monkeypatch.setattr(bench.nvfp4, "MODES", ("modelopt",))
    assert bench.nvfp4.wrong_on_device(CPU) is None
    quantize = nvfp4.quantize

    def off(x: torch.Tensor, format: Format, impl: str) -> nvfp4.NVFP4Tensor:
        found = quantize(x, format, impl=impl)  # type: ignore[arg-type]
        return dataclasses.replace(found, codes=found.codes ^ 8) if impl == "triton" else found

    monkeypatch.setattr(bench.nvfp4.nvfp4, "quantize", off)
    assert "midpoints: " in bench.nvfp4.wrong_on_device(CPU)


def test_rows_of_a_cpu_run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.kernels, "red", lambda patterns: None)
    smaller = bench.nvfp4_problem.Matrix(64, 128)
    quick = [dataclasses.replace(case, cpu_shape=smaller) for case in bench.nvfp4.CASES]
    suite = dataclasses.replace(bench.kernels.SUITES["nvfp4"], cases=tuple(quick))
    monkeypatch.setitem(bench.kernels.SUITES, "nvfp4", suite)
    out = tmp_path / "rows.json"
    words = ["--suite=nvfp4", "--device=cpu", "--quick", "--cases=Q3,Q6", f"--json={out}"]
    assert bench.kernels.main(words) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["case"] for row in rows] == ["Q3", "Q6"] and out.with_suffix(".png").stat().st_size > 1000
    assert rows[0]["shape"] == {"R": 64 // bench.kernels.QUICK, "K": 128} and rows[0]["ours_ms"] is None
    assert rows[0]["peers"]["ours, to 6 alone"]["ratio"] > 0
    assert rows[1]["max_abs_err"] == 0 and set(rows[1]["peers"]) == {"torchao", "modelopt", "compressed_tensors"}
    for peer in rows[1]["peers"].values():
        assert peer["differing_bytes"] == 0 and peer["bytes"] > 10_000
