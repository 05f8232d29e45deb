"""One whole MOPD step, ours against the same step on Hugging Face NemotronH, as ratios: ``python tools/bench_step.py``.

A step is rollout (cached sampling), scoring by one teacher of equal size, and update (MOPD loss, AdamW); MTP off.
Model, prompts, batch sizes and completion length are those of the demo's recipe, read from it, with stop tokens off
so that all completions have one length. Both sides use the same number of threads in total. They live in processes of
their own and take turns, so that what else the machine does meets all alike; medians are compared. Ours runs one
process a thread (data parallel over gloo). Hugging Face runs both ways, one process with all threads and
DistributedDataParallel with one thread a process; the faster one counts.

The Hugging Face side must be a fair opponent: in the same run it has to reach 80% of the yardstick that
``bench_hugging_face.py`` describes, or no ratio is printed and the exit status is 1.

Peak memory is resident memory summed over a side's processes: in all (imports counted in each process), and above what
the processes held before their first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rich
import torch
import torch.distributed as dist
from rich.table import Table

from megatron_mopd import presets
from megatron_mopd.config import Config, build_config
from megatron_mopd.settings import merge, overlay, read_yaml

YARDSTICK_FRACTION = 0.8
PHASES = ("rollout", "score", "update")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One competitor: who it is and how the threads are spent."""

    name: str
    kind: str  # "ours" or "hf"
    processes: int
    threads: int  # of each process


def settings(arguments: argparse.Namespace, directory: Path, teacher: Path | None) -> Config:
    """The recipe's common settings, which Hugging Face reads too; without a teacher, those of the teacher itself."""
    common = merge(read_yaml(arguments.recipe)["common"], arguments.overrides)
    data = [source | {"size": 1000} for source in common["data"]["train"]]  # drawing tasks is no part of a step
    preset = presets.PRESETS[common["model"]["preset"]]
    ours = {
        "run": {"dir": str(directory), "steps": 10_000, "precision": "fp32", "seed": 1 if teacher is None else 2},
        "model": {"pattern": preset.pattern.split("/")[0]},
        "evaluation": {"every": 0},
    }
    stage: dict[str, Any] = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
    if teacher is not None:
        domains = [source["domain"] for source in data]
        stage = {"teachers": {"teacher": {"checkpoint": str(teacher), "domains": domains}}}
    return build_config(overlay(common, ours | stage | {"data": {"train": data, "held_out": []}}))


class OurStep:
    """Our trainer's step."""

    def __init__(self, arguments: argparse.Namespace, directory: Path):
        from megatron_mopd import checkpoint, parallel
        from megatron_mopd.trainer import Trainer

        config = settings(arguments, directory / "teacher", None)
        groups = parallel.initialize(config.parallel, config.run.seed)
        Trainer(config, groups).save()
        root = directory / "teacher" / "checkpoints"
        assert checkpoint.latest(root) is not None
        self.trainer = Trainer(settings(arguments, directory / "ours", root), groups)
        source: Any = self.trainer.source
        source.sampling = dataclasses.replace(source.sampling, stop_tokens=())
        self.parameters = sum(p.numel() for p in self.trainer.learner.module.parameters())

    def __call__(self) -> dict[str, float]:
        row = self.trainer.step()
        assert row["rollout/len"] == self.trainer.config.rollout.max_new_tokens, "completions differ in length"
        times = self.trainer.times
        return {"rollout": times["collect"] - times["score"], "score": times["score"], "update": times["update"]}


def hugging_face_step(arguments: argparse.Namespace, directory: Path) -> Any:
    """Imported here, so that our processes do not hold transformers' models too."""
    from bench_hugging_face import HuggingFaceStep

    return HuggingFaceStep(settings(arguments, directory / "hf", directory / "unused"))


def memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def serve(side: Side, arguments: argparse.Namespace, directory: Path, pipe: Connection) -> None:
    """A process of one side: builds, then answers "step" until told to "stop"."""
    logging.disable(logging.WARNING)  # transformers' and mcore's notes on absent CUDA packages
    warnings.simplefilter("ignore")
    torch.set_num_threads(side.threads)
    step: Any = OurStep(arguments, directory) if side.kind == "ours" else hugging_face_step(arguments, directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = memory("VmRSS")
    pipe.send({"parameters": step.parameters})
    while pipe.recv() == "step":
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        phases = step()
        dist.barrier()
        wall, peak = time.perf_counter() - start, memory("VmHWM")
        pipe.send({"wall": wall, "peak": peak, "cpu": time.process_time() - cpu, "growth": peak - before, **phases})
    dist.destroy_process_group()


class Team:
    """The processes of one side, as seen by the referee."""

    def __init__(self, side: Side, arguments: argparse.Namespace, directory: Path):
        self.side, self.parameters = side, 0
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self.pipes, self.processes = [], []
        for rank in range(side.processes):
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(side.processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(side.threads),
            }  # fmt: skip
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(side, arguments, directory, there)))
            self.processes[-1].start()
            there.close()  # so that a process that dies is noticed here
            self.pipes.append(here)

    def receive(self) -> list[dict[str, float]]:
        return [pipe.recv() for pipe in self.pipes]

    def step(self) -> dict[str, float]:
        """Time of the slowest process and memory of all."""
        for pipe in self.pipes:
            pipe.send("step")
        answers = self.receive()
        row = {name: max(a[name] for a in answers) for name in ("wall", *PHASES)}
        return row | {name: sum(a[name] for a in answers) for name in ("cpu", "peak", "growth")}

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send("stop")
        for process in self.processes:
            process.join(timeout=30)
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def teams(sides: Sequence[Side], arguments: argparse.Namespace) -> Iterator[list[Team]]:
    started: list[Team] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for side in sides:  # one after another: importing is work too
                started.append(Team(side, arguments, Path(directory)))
                started[-1].parameters = int(started[-1].receive()[0]["parameters"])
            yield started
        finally:
            for team in started:
                team.close()


def yardstick(threads: int) -> dict[str, dict[str, float]]:
    """The Hugging Face side's speed at the yardstick's shape, now, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("bench_hugging_face.py")), f"--threads={threads}", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compete(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm-up, then ``repetitions`` rounds in which every side makes one step; medians over the rounds."""
    n = arguments.threads
    sides = [
        Side(name="ours", kind="ours", processes=n, threads=1),
        Side(name="HF, 1 process", kind="hf", processes=1, threads=n),
        Side(name="HF, DDP", kind="hf", processes=n, threads=1),
    ]
    with teams(sides, arguments) as competitors:
        sizes = {team.side.name: team.parameters for team in competitors}
        if len(set(sizes.values())) != 1:
            raise SystemExit(f"the sides are not of one size, nothing was compared: {sizes}")
        yard = [yardstick(n)]
        rows: dict[str, list[dict[str, float]]] = {team.side.name: [] for team in competitors}
        for turn in range(arguments.warmup + arguments.repetitions):
            for team in competitors[turn % 3 :] + competitors[: turn % 3]:
                row = team.step()
                rows[team.side.name] += [row] if turn >= arguments.warmup else []
        yard.append(yardstick(n))
    rollout = settings(arguments, Path(), None).rollout
    tokens = rollout.prompts_per_step * rollout.max_new_tokens
    results = {name: {key: statistics.median(r[key] for r in kept) for key in kept[0]} for name, kept in rows.items()}
    for name, result in results.items():
        result["tokens_per_s"] = tokens / result["wall"]
        result["walls"] = [row["wall"] for row in rows[name]]
    averages = {
        name: {"measured": statistics.mean(y[name]["measured"] for y in yard), "given": yard[0][name]["given"]}
        for name in yard[0]
    }
    return {"parameters": next(iter(sizes.values())), "sides": results, "yardstick": averages}


def judge(result: dict[str, Any]) -> dict[str, float] | None:
    """Ours over the faster Hugging Face side; None when that side fell short of the yardstick."""
    if any(y["measured"] < YARDSTICK_FRACTION * y["given"] for y in result["yardstick"].values()):
        return None
    ours, *theirs = result["sides"].values()
    best = max(theirs, key=lambda side: side["tokens_per_s"])
    return {
        "tokens_per_s": ours["tokens_per_s"] / best["tokens_per_s"],
        "peak_memory": ours["peak"] / best["peak"],
        "memory_of_the_step": ours["growth"] / best["growth"],
        **{f"{phase}_speed": best[phase] / ours[phase] for phase in PHASES},
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"One MOPD step, {result['parameters']:,} parameters, medians")
    for column in ("", "tokens/s", *(f"{phase} s" for phase in PHASES), "CPU s", "peak MiB", "step MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, side in result["sides"].items():
        memories = [f"{side[key] / 2**20:.0f}" for key in ("peak", "growth")]
        seconds = [f"{side[key]:.3f}" for key in (*PHASES, "cpu")]
        table.add_row(name, f"{side['tokens_per_s']:.0f}", *seconds, *memories)
    rich.print(table)
    for name, y in result["yardstick"].items():
        rich.print(f"Hugging Face yardstick, {name}: {y['measured']:,.0f} tokens/s of {y['given']:,.0f}")
    if result["ratio"] is None:
        rich.print(f"No ratio: the Hugging Face side is below {YARDSTICK_FRACTION:.0%} of its yardstick in this run.")
        return
    for name, value in result["ratio"].items():
        rich.print(f"ours / Hugging Face, {name}: {value:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("examples/demo.yaml"), help="whose common settings to take")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.max_new_tokens=64")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side in total")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before measuring")
    parser.add_argument("--repetitions", type=int, default=7, help="measured rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_step.json"))
    arguments = parser.parse_args()
    result = compete(arguments)
    result["ratio"] = judge(result)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result |= {
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "rollout": settings(arguments, Path(), None).rollout.model_dump(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "commit": commit,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    return 0 if result["ratio"] else 1


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
