"""The step benchmark compares like with like and keeps silent when its opponent is not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["rollout.prompts_per_step=8", "rollout.max_new_tokens=4", "batching.micro_batch_size=4"]


@pytest.mark.slow
def test_three_sides_of_one_size_and_no_ratio_below_the_yardstick(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "tools/bench_step.py", "--repetitions=1", "--warmup=1", f"--out={out}", *SMALL]
    # Waiting threads that sleep: the suite may share its cores.
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"}, check=False)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result["sides"]) == ["ours", "HF, 1 process", "HF, DDP"]
    assert result["parameters"] > 500_000
    assert all(side["wall"] > 0 and side["growth"] >= 0 for side in result["sides"].values())
    fit = all(y["measured"] >= 0.8 * y["given"] for y in result["yardstick"].values())
    assert (result["ratio"] is not None) == fit == (done.returncode == 0)
