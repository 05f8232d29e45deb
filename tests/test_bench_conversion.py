"""The benchmark of conversion: its checkpoint converts, its contenders write what they read, its row adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from scripts import loaded


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = loaded("tools/bench_conversion.py")
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "mamba_num_heads": 8, "n_routed_experts": 4}
    monkeypatch.setattr(module, "CONFIG", module.CONFIG | small)
    return module


def test_contenders_move_the_same_bytes_and_ratios_are_to_the_faster_copy(bench: Any, tmp_path: Path) -> None:
    size = bench.synthesize(tmp_path / "hf", 9_000_000)
    weights = {n: t for f in (tmp_path / "hf").glob("*.safetensors") for n, t in load_file(f).items()}
    assert 9_000_000 <= size == sum(t.nbytes for t in weights.values())
    assert 6 <= len(list((tmp_path / "hf").glob("*.safetensors"))) <= 12
    found = {}
    for name, source in bench.SOURCES.items():  # the first writes what the second reads
        target = tmp_path / ("megatron" if name == "hf-to-megatron" else name)
        bench.forget(tmp_path / source)
        found[name] = bench.turn(name, tmp_path / source, target)
        assert found[name]["seconds"] > 0 and found[name]["peak"] >= 0
    for name in ("megatron-to-hf", *bench.COPIES):
        back = {n: t for f in (tmp_path / name).glob("*.safetensors") for n, t in load_file(f).items()}
        assert back.keys() == weights.keys() and all(back[n].equal(t) for n, t in weights.items())
    assert len(list((tmp_path / "megatron/release").glob("*.distcp"))) > 4
    seconds = {"hf-to-megatron": 4.0, "megatron-to-hf": 2.0, "copy": 3.0, "copy, files side by side": 1.0}
    rounds = [{name: {"seconds": s * k, "peak": k} for name, s in seconds.items()} for k in (1, 3, 2)]
    row = json.loads(json.dumps(bench.row(8 * 10**9, rounds, {"sha256": 2.0})))
    assert row["contenders"]["hf-to-megatron"]["ratio_to_copy"] == 0.25
    assert row["contenders"]["megatron-to-hf"]["gb_per_s"] == 2.0 and row["contenders"]["copy"]["ratio_to_copy"] < 0.4
    assert row["contenders"]["copy"]["peak_bytes_over_imports"] == 3
