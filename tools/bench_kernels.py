"""The kernels against their peers: ``python tools/bench_kernels.py --suite NAME [--device cpu]``.

Suites are log_ratio and nvfp4. First the tests of what is timed run, and on a GPU a comparison with the truth there; on
red nothing is measured and the exit status is 1. Then every case runs against every peer that imports, interleaved in
one process (bench/timing.py). Times are medians over the rounds; a ratio is the median of the rounds' ratios of the
peer's time to ours. Limits are measured in the same run: a copy of the input, or the matrix products by cuBLAS. A peer
that does not import is quoted with its published time and takes part in no ratio.

On CPU the reference forms run against eager torch and the peers' forms that run there, for ratios of time and peak
memory; times themselves are not kept. The result is a list of rows as JSON with a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rich
import rich.markup
import torch
import torch.distributed as dist
from bench.log_ratio import LOG_RATIO
from bench.nvfp4 import NVFP4
from bench.peer import Peer
from bench.published import PUBLISHED
from bench.report import plot, show
from bench.suite import Case, Suite
from bench.timing import Measured, race
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "kernels" / "results"
SUITES: dict[str, Suite] = {"log_ratio": LOG_RATIO, "nvfp4": NVFP4}
PACKAGES = (
    *("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn"),
    *("torchao", "nvidia-modelopt", "compressed-tensors", "fouroversix"),
)
QUICK = 8  # by how much --quick shortens the batch


def red(patterns: Sequence[str]) -> str | None:
    """What fails among the tests of what is timed, or None; a missing test is a failure."""
    files = []
    for pattern in patterns:
        found = sorted((ROOT / "tests").glob(pattern))
        if not found:
            return f"no test matches tests/{pattern}"
        files += [str(path) for path in found]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--disable-warnings", "-m", "not slow", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


@contextmanager
def world_of_one(device: torch.device) -> Iterator[None]:
    """Megatron's operators want a process group even where there is one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(
    case: Case, tolerance: float, shape: Any, device: torch.device, rounds: int, progress: Progress
) -> dict[str, Any]:
    """A row of the result, less what is the same in all rows."""
    asked = [peer for peer in case.peers if device.type in peer.devices]
    missing = {peer.name: reason for peer in asked if (reason := peer.missing(device.type)) is not None}
    contenders = [Peer("ours", case.ours, "mopd_kernels"), *(peer for peer in asked if peer.name not in missing)]
    if device.type == "cuda":
        contenders.append(case.yardstick)
    dtype = torch.bfloat16 if device.type == "cuda" else case.cpu_dtype
    warmup = max(1, rounds // 5)
    task = progress.add_task(f"{case.name} {shape}", total=warmup + rounds)
    problem = case.problem(shape, dtype, device, case.kept)
    ours, *theirs = race(contenders, problem, rounds, warmup, lambda: progress.advance(task))
    if ours.failed or ours.error is None or not ours.error <= tolerance:
        raise SystemExit(f"{case.name}: {ours.failed or f'error {ours.error} against the truth'}; nothing was kept")
    on_gpu = device.type == "cuda"
    limit = case.share * theirs[-1].median if on_gpu and not theirs[-1].failed else None
    entries = {m.peer.name: entry(m, ours, on_gpu) for m in theirs}
    for peer in asked:
        if peer.name in missing:
            entries[peer.name] = {"unavailable": missing[peer.name]} | published(case, shape, peer.name)
    return {
        "case": case.name,
        "shape": {name: size for name, size in vars(shape).items() if size},
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": ours.median if on_gpu else None,
        "peers": entries,
        "limit_ms": limit,
        "fraction_of_limit": limit / ours.median if limit else None,
        "max_abs_err": ours.error,
        "workspace_bytes": ours.workspace,
    }


def entry(theirs: Measured, ours: Measured, with_times: bool) -> dict[str, Any]:
    """What a row says of a peer that was run here."""
    source = {"source": f"measured: {theirs.peer.source}"}
    if theirs.failed:
        return source | {"failed": theirs.failed}
    pairs = [t / o for t, o in zip(theirs.times, ours.times, strict=True)]
    quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return source | {
        **({"ms": theirs.median} if with_times else {}),
        "ratio": statistics.median(pairs),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "workspace_bytes": theirs.workspace,
        "workspace_ratio": theirs.workspace / ours.workspace if ours.workspace else None,
        "max_abs_err": theirs.error,
    }


def published(case: Case, shape: Any, name: str) -> dict[str, Any]:
    found = PUBLISHED.get((case.name, *vars(shape).values(), name))
    return {} if found is None else {"published_ms": found[0], "source": f"published: {found[1]}"}


def environment(device: torch.device) -> dict[str, Any]:
    """What all rows share."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda} | _installed()
    dirty = _git("status", "--porcelain", "--", "kernels/mopd_kernels", "tools")
    commit = _git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "versions": versions, "commit": commit}
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    cpu = {"cpu": found[1] if found else platform.machine(), "threads": torch.get_num_threads()}
    return {"gpu": None, "versions": versions, "commit": commit, **cpu}


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every row of the suite, or of the cases asked for."""
    on_gpu, rows, suite = device.type == "cuda", [], SUITES[arguments.suite]
    wanted = {suite.untimed.get(name, name) for name in arguments.cases or suite.names}
    shapes = [
        (case, shape.shorter(QUICK) if arguments.quick else shape)
        for case in suite.cases
        for shape in (case.shapes if on_gpu else (case.cpu_shape,))
        if case.name in wanted and shape is not None
    ]
    with world_of_one(device), Progress(transient=True) as progress:
        whole = progress.add_task(arguments.suite, total=len(shapes))
        for case, shape in shapes:
            rows.append(measure(case, suite.tolerance, shape, device, arguments.rounds, progress))
            progress.advance(whole)
            if on_gpu:
                torch.cuda.empty_cache()
    if any(name in suite.untimed for name in arguments.cases or suite.names):
        rows += list(suite.after(rows, device))
    shared = environment(device)
    return [row | shared for row in rows if not arguments.cases or row["case"] in arguments.cases]


def merged(rows: list[dict[str, Any]], path: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """With the other cases that the file holds from the same machine and commit, in the suite's order."""
    new, same = {row["case"] for row in rows}, ("gpu", "commit", "versions")
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [row for row in old if row["case"] not in new and all(row[key] == rows[0][key] for key in same)]
    return sorted([*kept, *rows], key=lambda row: order.index(row["case"]))


def slug(device: torch.device) -> str:
    """The GPU's name as part of a file name; "cpu" without one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="log_ratio")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: ratios of the reference forms")
    parser.add_argument("--json", type=Path, help="where rows and plot go; a whole run has a place in kernels/results")
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=(), help="such as L1,L5 or Q1")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds, after a fifth of them as warm-up")
    parser.add_argument("--quick", action="store_true", help=f"a batch {QUICK} times shorter and 3 rounds, to try out")
    arguments = parser.parse_args(words)
    known = SUITES[arguments.suite].names
    if unknown := [name for name in arguments.cases if name not in known]:
        parser.error(f"--cases {','.join(unknown)}: the cases are {','.join(known)}")
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 3)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        rich.print(
            "There is no CUDA GPU here, so no kernel can be timed. --device cpu measures the reference forms as ratios."
        )
        return 2
    device = torch.device(arguments.device)
    rich.print("Running the tests of what is timed ...")
    suite = SUITES[arguments.suite]
    failure = red(suite.tests) or (suite.wrong_on_device(device) if device.type == "cuda" else None)
    if failure:
        rich.print(rich.markup.escape(failure))
        rich.print("Nothing was measured: the tests of what is timed fail.")
        return 1
    rows = run(arguments, device)
    show(rows)
    out = arguments.json
    if out is None and not arguments.quick and not arguments.cases:
        out = RESULTS / f"{slug(device)}_{arguments.suite}.json"
    if out is not None:
        rows = merged(rows, out, suite.names)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        plot(rows, out.with_suffix(".png"))
        rich.print(f"Written: {out} and {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler that counts memory on CPU announces every start
    logging.disable(logging.WARNING)  # peers' notes on packages that are absent
    warnings.simplefilter("ignore")
    sys.exit(main())
