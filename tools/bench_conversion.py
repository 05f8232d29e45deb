"""Conversion against copying the same bytes, on the disk of a directory that you name.

    python tools/bench_conversion.py DIR [--gigabytes 8] [--rounds 5] [--output FILE.json]

Writes a synthetic bf16 checkpoint under DIR, then lets four contenders take turns: the conversion each way, a plain
copy file by file, and a copy of as many files at a time as a conversion works on. Each runs in a process of its own,
reads files that the page cache does not hold, and is done when the disk has its output for good; what it wrote is
deleted before the next one starts. The ratio is ours over the faster copy's speed, round by round, so that what else
the machine does meets all alike; medians are printed. Beside them: the growth of the process's peak memory over what
its imports took, and how fast one thread does each thing that a conversion does with every byte. Needs three times the
checkpoint's size on the disk while it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table

from megatron_mopd import conversion, names
from megatron_mopd.conversion import hugging_face_config, jobs, safetensors_file, weights
from megatron_mopd.conversion.hugging_face import INDEX
from megatron_mopd.conversion.weights import BLOCK, Entry

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h", "vocab_size": 65_536, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 8192, "ssm_state_size": 128, "mamba_num_heads": 64,
    "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 32,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
UNIT = "ME*E-"  # repeated until the checkpoint is large enough
SOURCES = {"hf-to-megatron": "hf", "megatron-to-hf": "megatron", "copy": "hf", "copy, files side by side": "hf"}
COPIES = ("copy", "copy, files side by side")
FILES = 8
"""Of the checkpoint, about, on either side; released ones have more, so that all cores have files to work on."""
TURN = "--turn"
"""First argument of a process that is one contender's turn."""


def synthesize(path: Path, size: int) -> int:
    """Write a Hugging Face directory of about ``size`` bytes in FILES files; returns its bytes."""
    entries: dict[str, Entry] = {}
    repeats = 0
    while sum(entry.size for entry in entries.values()) < size:
        repeats += 1
        config = CONFIG | {"hybrid_override_pattern": UNIT * repeats, "num_hidden_layers": len(UNIT) * repeats}
        model = hugging_face_config.architecture(config, str(path))
        shapes = hugging_face_config.megatron_shapes(model)
        layouts = {
            p.name: names.layout(p, shapes, model.preset.num_query_groups) for p in names.hugging_face_pieces(shapes)
        }
        entries = {name: Entry(layout.shape, torch.bfloat16) for name, layout in layouts.items()}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    total = sum(entry.size for entry in entries.values())
    files: list[list[str]] = [[]]
    for name, entry in entries.items():
        if files[-1] and sum(entries[n].size for n in files[-1]) + entry.size > total / 8:
            files.append([])
        files[-1].append(name)
    noise = memoryview(torch.randn(BLOCK // 2).bfloat16().view(torch.uint8).numpy()).cast("B")
    placed = {}
    for number, members in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        placed |= dict.fromkeys(members, file)
        with open(path / file, "wb") as stream:
            stream.write(safetensors_file.header([(name, entries[name]) for name in members]))
            for name in members:
                for start in range(0, entries[name].size, BLOCK):
                    stream.write(noise[: min(BLOCK, entries[name].size - start)])
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}))
    return total


def turn(name: str, source: Path, target: Path) -> dict[str, float]:
    """One contender's seconds and growth of peak memory in bytes; the whole work of a process."""
    before, begin = _peak(), time.perf_counter()
    if name == "hf-to-megatron":
        conversion.hugging_face_to_megatron(source, target, shards=FILES)
    elif name == "megatron-to-hf":
        size = sum(file.stat().st_size for file in source.rglob("*.distcp"))
        conversion.megatron_to_hugging_face(source, target, largest_shard=size // FILES)
    else:
        target.mkdir()
        workers = 1 if name == "copy" else min(2 * (os.cpu_count() or 1), jobs.WORKERS)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda file: _copy(file, target / file.name), sorted(source.iterdir())))
    return {"seconds": time.perf_counter() - begin, "peak": _peak() - before}


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _peak() -> int:
    """Bytes, of this program alone: getrusage's would know the process that started it, too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget(path: Path) -> None:
    """Let the page cache drop the files under ``path``."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rounds(root: Path, count: int) -> Iterator[dict[str, dict[str, float]]]:
    """Rounds in which every contender has one turn, in an order that moves by one each time."""
    order = list(SOURCES)
    for number in range(count):
        found = {}
        for name in order[number % len(order) :] + order[: number % len(order)]:
            source, target = root / SOURCES[name], root / "out"
            forget(source)
            command = [sys.executable, __file__, TURN, name, str(source), str(target)]
            found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            shutil.rmtree(target)
            os.sync()
        yield found


def stages(root: Path) -> dict[str, float]:
    """GB/s of one thread at each thing that happens to a block: read, hashed, looked through, summed, written."""
    file = max((root / "hf").glob("*.safetensors"), key=lambda f: f.stat().st_size)
    block = memoryview(bytearray(BLOCK))
    count = max(1, min(32, file.stat().st_size // BLOCK - 1))
    forget(root / "hf")
    scratch = root / "scratch"
    with open(file, "rb") as source, open(scratch, "wb") as target:

        def write() -> None:
            for _ in range(count):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())

        found = {
            "read from disk": _rate(lambda: [source.readinto(block) for _ in range(count)], count),  # type: ignore[attr-defined]
            "sha256": _rate(lambda: [hashlib.sha256(block) for _ in range(count)], count),
            "look for NaN": _rate(lambda: [weights.has_nan(block, torch.bfloat16) for _ in range(count)], count),
            "crc32 of a zip archive": _rate(lambda: [zlib.crc32(block) for _ in range(count)], count),
            "write to disk": _rate(write, count),
        }
    scratch.unlink()
    return found


def _rate(work: Callable[[], Any], blocks: int) -> float:
    begin = time.perf_counter()
    work()
    return blocks * BLOCK / (time.perf_counter() - begin) / 1e9


def row(size: int, found: list[dict[str, dict[str, float]]], alone: dict[str, float]) -> dict[str, Any]:
    """All that was measured, as JSON values; speeds in GB/s of weights."""
    fastest = [min(r[name]["seconds"] for name in COPIES) for r in found]
    contenders = {}
    for name in SOURCES:
        ratios = [best / r[name]["seconds"] for best, r in zip(fastest, found, strict=True)]
        contenders[name] = {
            "gb_per_s": size / statistics.median(r[name]["seconds"] for r in found) / 1e9,
            "ratio_to_copy": statistics.median(ratios),
            "ratios": ratios,
            "seconds": [r[name]["seconds"] for r in found],
            "peak_bytes_over_imports": max(r[name]["peak"] for r in found),
        }
    return {
        "case": "conversion",
        "bytes": size,
        "contenders": contenders,
        "one_thread_gb_per_s": alone,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "megatron-mopd")},
    }


def show(result: dict[str, Any]) -> None:
    """Print the row as two tables."""
    table = Table(title=f"{result['bytes'] / 1e9:.2f} GB, {result['cores']} cores; ratio: speed over the faster copy's")
    for column in ("contender", "GB/s", "ratio", "rounds", "peak memory MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, c in result["contenders"].items():
        spread = f"{min(c['ratios']):.2f} to {max(c['ratios']):.2f}"
        peak = f"{c['peak_bytes_over_imports'] / 2**20:.0f}"
        table.add_row(name, f"{c['gb_per_s']:.2f}", f"{c['ratio_to_copy']:.2f}", spread, peak)
    rich.print(table)
    for name, rate in result["one_thread_gb_per_s"].items():
        rich.print(f"{name:<24}{rate:8.2f} GB/s by one thread")


def main() -> None:
    if sys.argv[1:2] == [TURN]:
        name, source, target = sys.argv[2:]
        sys.stdout.write(json.dumps(turn(name, Path(source), Path(target))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to work; everything written there is deleted at the end")
    parser.add_argument("--gigabytes", type=float, default=8, help="of the checkpoint; default %(default)g")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the row")
    given = parser.parse_args()
    root = given.directory / "bench-conversion"
    root.mkdir(parents=True)
    try:
        size = synthesize(root / "hf", round(given.gigabytes * 1e9))
        conversion.hugging_face_to_megatron(root / "hf", root / "megatron", shards=FILES)
        result = row(size, list(rounds(root, given.rounds)), stages(root))
    finally:
        shutil.rmtree(root)
    show(result)
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
