"""The log-ratio suite: its cases, what its kernels must equal on the device, and what follows from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from bench.log_ratio_cases import CASES, WORKSPACE_OF
from bench.problem import Shape
from bench.suite import Row, Suite

TOLERANCE = 3e-5  # nats, of a token's value against fp64, |logits| <= 30
GRADIENT_TOLERANCE = 1e-2  # relative, bf16: dZ is rounded to 2^-9
RAGGED = Shape(77, 3000, 128)


def wrong_on_device(device: torch.device, shape: Shape = RAGGED) -> str | None:
    """How the kernels differ from fp64 and from the reference on the device itself, or None."""
    for case in CASES:
        problem = case.problem(shape, torch.bfloat16, device, case.kept)
        problem.impl = "triton"
        problem.redraw(seed=0)
        problem.restore()
        value = case.ours(problem)
        gradients = [gradient.double() for gradient in problem.gradients()]
        rows, truth = problem.truth()
        assert value is not None
        error = float((value[rows].double() - truth).abs().max())
        if not error <= TOLERANCE:
            return f"{case.name}: error {error:.2e} against fp64 exceeds {TOLERANCE:.0e}"
        problem.restore()
        problem.impl = "reference"
        case.reference(problem)
        for gradient, expected in zip(gradients, problem.gradients(), strict=True):
            distance = float((gradient - expected.double()).norm() / expected.double().norm())
            if not distance <= GRADIENT_TOLERANCE:
                return f"{case.name}: a gradient is {distance:.2e} off the reference's"
    return None


def workspace(rows: Sequence[Row], device: torch.device) -> Iterator[Row]:
    """L7: what another row says about memory."""
    for row in rows:
        if row["case"] == WORKSPACE_OF:
            peers = {
                name: {"workspace_bytes": e["workspace_bytes"], "ratio": e["workspace_ratio"], "source": e["source"]}
                for name, e in row["peers"].items()
                if "workspace_ratio" in e
            }
            yield row | {"case": "L7", "peers": peers, "ours_ms": None, "limit_ms": None, "fraction_of_limit": None}


LOG_RATIO = Suite(
    tests=("test_linear*.py", "test_logits*.py", "test_divergence*.py", "test_bench_kernels.py"),
    cases=CASES,
    tolerance=TOLERANCE,
    wrong_on_device=wrong_on_device,
    after=workspace,
    untimed={"L7": WORKSPACE_OF},
)
