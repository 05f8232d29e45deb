"""``python -m megatron_mopd.doctor``: what this machine will use, and why.

``probe()`` gives the rows as values. A later part of the project adds a function to ``PROBES``; nothing else changes.
Importing this module imports no third-party package, so that it also speaks where some are missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "absent", "acts", "warning", "missing"]

DISTRIBUTION = "megatron-mopd"
REQUIRED_EXTRA = "train"
OPTIONAL_EXTRA = "gpu"
PYTHON = (3, 12)

APEX_BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex"
    " && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)

EFFECTS = {
    "torch": "tensors, autograd, process groups, torchrun",
    "triton": "fused kernels of mopd_kernels on GPUs",
    "megatron-core": "model, parallelism, optimizer, distributed checkpoint; the range this plugin is written against",
    "transformer-engine": "without it, linears, norms, attention and experts are megatron_mopd.local_spec's",
    "mamba-ssm": "without it, Mamba layers run the chunked scan of megatron_mopd.ssd",
    "causal-conv1d": "mamba-ssm's fused convolution; without it, torch's",
    "tensorboard": "run.dir gets TensorBoard events",
}
"""Why a distribution is listed, by name; for the others the extra that asks for it is reason enough."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    ``status``: ok, in use; absent, optional and not there; acts, a stand-in in its place; warning, works, but not as
    meant; missing, required and not there. Example: ``Row("backend", "gloo", "ok", "no CUDA device")``.
    """

    name: str
    value: str
    status: Status
    reason: str


def probe() -> list[Row]:
    """All rows of this machine, in printing order."""
    return [row for part in PROBES for row in part()]


def _python() -> Iterator[Row]:
    wanted = ".".join(map(str, PYTHON))
    here = sys.version_info[:2]
    status: Status = "ok" if here == PYTHON else "warning" if here > PYTHON else "missing"
    reason = {
        "ok": "as in .python-version",
        "warning": f"tested with {wanted}",
        "missing": f"megatron-core needs {wanted}",
    }
    yield Row("python", platform.python_version(), status, reason[status])


def _requirements() -> Iterator[Row]:
    """The distribution's own requirements (setup.py is their only home), compared with what is installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        yield Row(DISTRIBUTION, "not installed", "missing", f"{error}; run: pip install -e '.[{REQUIRED_EXTRA}]'")
        return
    for line in lines:
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": REQUIRED_EXTRA})
        if not (needed or requirement.marker.evaluate({"extra": OPTIONAL_EXTRA})):  # type: ignore[union-attr]
            continue
        why = EFFECTS.get(requirement.name, f"extra {REQUIRED_EXTRA}" if requirement.marker else "base requirement")
        version = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            yield Row(requirement.name, version, "ok", why)
        elif version is None and not needed:
            yield Row(requirement.name, "not installed", "absent", f"{why} (extra {OPTIONAL_EXTRA})")
        else:
            yield Row(requirement.name, version or "not installed", "missing", f"pip install '{wanted}': {why}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _apex() -> Iterator[Row]:
    """NVIDIA's apex by its own features, without importing it: on PyPI another project bears the name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        reason = f"optional; mcore uses transformer-engine's optimizer kernels or torch's. To build: {APEX_BUILD}"
        yield Row("apex", "not installed", "absent", reason)
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        where = spec.origin or ", ".join(map(str, folders))
        yield Row(
            "apex", where, "warning", "another project of that name, which mcore would import; pip uninstall apex"
        )
        return
    extensions = {"amp_C": "fused Adam and gradient norms", "fused_weight_gradient_mlp_cuda": "fp32 weight gradients"}
    found = [f"{name} ({use})" for name, use in extensions.items() if importlib.util.find_spec(name)]
    if found:
        yield Row("apex", _version("apex") or "unknown version", "ok", "mcore uses " + ", ".join(found))
    else:
        yield Row("apex", "without CUDA extensions", "warning", f"mcore can use none of it; to build: {APEX_BUILD}")


def _device() -> Iterator[Row]:
    if importlib.util.find_spec("torch") is None:
        return  # already reported among the requirements
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        reason = f"CUDA {torch.version.cuda}, compute capability {properties.major}.{properties.minor}"
        yield Row("device", f"{count} x {properties.name}", "ok", reason)
        backend, precision = "nccl", "bf16"
        why = "main parameters and gradients in fp32"
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        reason = f"torch ({built}) sees no CUDA device; {torch.get_num_threads()} threads of {len(_cores())} cores"
        yield Row("device", "cpu", "ok", reason)
        backend, precision = "gloo", "fp32"
        why = "results can be compared to the last digits"
    there = dist.is_available() and getattr(dist, f"is_{backend}_available")()
    reason = "parallel.backend auto on this device" if there else f"this torch was built without {backend}"
    yield Row("backend", backend, "ok" if there else "missing", reason)
    yield Row("precision", precision, "ok", f"run.precision auto on this device: {why}")


def _kernels() -> Iterator[Row]:
    """What ``kernels.impl`` auto resolves to here, asked of a bf16 hidden state and weight of usual width."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return  # already reported among the requirements
    import torch

    from mopd_kernels.dispatch import interpreting, resolve, unsupported_reason

    cuda, triton = torch.cuda.is_available(), f"Triton {_version('triton')}"
    sample = torch.empty(1, 64, dtype=torch.bfloat16, device="cuda" if cuda else "cpu")
    chosen = resolve("doctor", "auto", sample, sample)
    status: Status = "ok"
    if chosen == "triton" and interpreting():
        status, reason = "warning", f"{triton}, but in its interpreter, for TRITON_INTERPRET is set; unset it"
    elif chosen == "triton":
        reason = f"{triton} on CUDA; rows must be multiples of 16 bytes, else plain torch runs and the log says so"
    elif cuda:
        status, reason = "warning", f"{triton} cannot take tensors here: {unsupported_reason(sample, sample)}"
    elif interpreting():
        reason = f"plain torch, as there is no CUDA; impl triton runs in {triton}'s interpreter, for tests"
    else:
        reason = (
            f"plain torch, as there is no CUDA; impl triton ({triton}) would need it, or TRITON_INTERPRET=1 for tests"
        )
    yield Row("log-ratio kernels", chosen, status, f"kernels.impl auto: {reason}")


def _cores() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return affinity(0) if affinity else set(range(os.cpu_count() or 1))


def _stand_ins() -> Iterator[Row]:
    """What host and local_spec put in the place of CUDA and of absent packages; imports Megatron-Core."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mcore warns of absent packages, which have rows of their own
        try:
            import torch

            from megatron_mopd import host, local_spec, ssd
        except ImportError as error:
            yield Row("megatron-core import", "failed", "missing", str(error))
            return
    if torch.cuda.is_available():
        yield Row("host", "nothing redirected", "ok", "CUDA is present")
    else:
        yield from (Row(f"host: {r.name}", r.where, "acts", r.reason) for r in host.REMEDIES)
    usable = {
        "transformer-engine": local_spec.have_transformer_engine(),
        "mamba-ssm": local_spec.have_mamba_ssm(),
    }
    for name, there in usable.items():
        if not there and (version := _version(name)) is not None:
            reason = "installed, but Megatron-Core cannot import it; rebuild it for this torch and CUDA"
            yield Row(f"{name} import", version, "warning", reason)
    if all(usable.values()):
        yield Row("local_spec", "mcore's own hybrid_stack_spec", "ok", "transformer-engine and mamba-ssm are present")
        return
    for stand_in, reason in local_spec.STAND_INS.items():
        package = "mamba-ssm" if issubclass(stand_in, ssd.RMSNormGated) else "transformer-engine"
        if not usable[package]:
            yield Row(f"local_spec: {stand_in.__name__}", f"no {package}", "acts", f"stands in for {reason}")


def _memory() -> Iterator[Row]:
    gib = 2**30
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        value = f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free"
        yield Row("host memory", value, "ok", "teachers wait here between their turns on the device")
    if importlib.util.find_spec("torch") is not None:
        import torch

        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            value = f"{free / gib:.1f} of {total / gib:.1f} GiB free"
            yield Row(f"memory of GPU {index}", value, "ok", "student, optimizer, and one teacher at a time")


def _trackers() -> Iterator[Row]:
    version = _version("wandb")
    if version is None:
        yield Row("wandb", "not installed", "absent", "optional; metrics.jsonl and TensorBoard are always written")
    else:
        yield Row("wandb", version, "ok", "used where WANDB_API_KEY or WANDB_MODE is set")


PROBES: tuple[Callable[[], Iterator[Row]], ...] = (
    _python,
    _requirements,
    _apex,
    _device,
    _kernels,
    _memory,
    _trackers,
    _stand_ins,
)
"""Each yields rows of one subject; a new subject is one more function here."""


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table, or with arguments the memory plan they ask for.

    Returns 1 when something required is missing, or when the plan cannot be or does not fit, else 0.
    """
    if arguments:
        try:
            from megatron_mopd.memory import report  # imports third-party packages, which the table must not need
        except ImportError as error:
            sys.stderr.write(f"the memory plan does not import ({error}); run: pip install -e '.[train]'\n")
            return 1
        return report.main(arguments)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of what the device row says
    rows = probe()
    missing = [row.name for row in rows if row.status == "missing"]
    verdict = f"missing: {', '.join(missing)}" if missing else "this machine can train"
    if importlib.util.find_spec("rich") is None:
        for row in rows:
            sys.stdout.write(f"{row.status:8} {row.name}: {row.value} ({row.reason})\n")
        sys.stdout.write(verdict + "\n")
    else:
        _print_table(rows, verdict)
    return 1 if missing else 0


def _print_table(rows: list[Row], verdict: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "absent": "dim", "acts": "cyan", "warning": "yellow", "missing": "bold red"}
    table = Table(title="megatron-mopd on this machine", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("what", max_width=24, overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("value and reason", overflow="fold")
    for row in rows:  # Text, because brackets in values are no markup
        status = Text(row.status, style=colours[row.status])
        table.add_row(Text(row.name), status, Text.assemble((row.value, "bold"), ": ", row.reason))
    console = Console()
    console.print(table)
    console.print(Text(verdict))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
