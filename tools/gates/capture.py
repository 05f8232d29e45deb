"""Compiles what host code launches, for a GPU that is not there, and keeps the machine code.

Kernels are compiled exactly as they would be launched: Triton's own launcher sees the arguments, specialises on their
types, alignment and constants, and stops before the launch. What a kernel would have written is therefore not there;
memory that host code allocates without a value is zeroed, so that what it computes from it is at least the same each
time. Needs no GPU and no driver library.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any
from unittest.mock import patch

import torch
from gates.sass import Machine, read
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mopd_kernels import device, dispatch
from mopd_kernels.nvfp4 import operators as nvfp4_operators

WARP = 32
DEVICES = {90: (9, 132), 100: (10, 148)}  # compute capability and multiprocessors: what host code asks a device for


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel as one case launches it; launches that differ in what is compiled are several."""

    case: str
    kernel: str  # module.function
    constants: Mapping[str, Any]  # constexpr arguments
    itemsizes: Mapping[str, int]  # bytes per element of the tensors among the arguments
    absent: tuple[str, ...]  # arguments that are None
    warps: int
    shared: int  # bytes, dynamic
    machine: Machine


class CompileOnly:
    """What Triton asks of a driver, for a GPU of compute capability ``target / 10`` that is not there."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, WARP)

    def get_current_device(self) -> int:
        return self.target  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class ZeroedMemory(TorchDispatchMode):
    """``torch.empty`` and its kin give zeros."""

    ALLOCATIONS = (
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func.overloadpacket in self.ALLOCATIONS else result


def capture(cases: Mapping[str, Callable[[], object]], target: int) -> list[Launch]:
    """Everything that these cases launch, compiled for ``target`` (90, 100).

    Each case is a function without arguments that calls operators on CPU tensors. Raises RuntimeError for a case that
    launches nothing and under Triton's interpreter.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    launches: list[Launch] = []
    machines: dict[str, Machine] = {}
    for case, run in cases.items():
        with _Named(f"case {case!r}, sm_{target}"), _recording(target) as recorded:
            run()
        if not recorded:
            raise RuntimeError(f"case {case!r} launched no kernel")
        for function, given, compiled in recorded.values():
            if compiled.hash not in machines:
                machines[compiled.hash] = read(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path)
            launches.append(_launch(case, function, given, compiled, machines[compiled.hash]))
    return launches


class _Named:
    """Errors within say where they come from."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"in {self.name}")


def _launch(case: str, function: Any, given: Mapping[str, Any], compiled: Any, machine: Machine) -> Launch:
    return Launch(
        case=case,
        kernel=f"{function.fn.__module__.split('.')[-1]}.{function.fn.__name__}",
        constants={p.name: given[p.name] for p in function.params if p.is_constexpr and p.name in given},
        itemsizes={name: value.element_size() for name, value in given.items() if isinstance(value, Tensor)},
        absent=tuple(name for name, value in given.items() if value is None),
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        machine=machine,
    )


def launchable(package: ModuleType) -> set[str]:
    """The kernels of a package, ``module.function``: its jit functions that no jit function calls."""
    functions, called = set(), set()
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        for function in vars(importlib.import_module(found.name)).values():
            if isinstance(function, JITFunction) and function.fn.__module__ == found.name:
                functions.add((found.name.split(".")[-1], function.fn.__name__))
                called |= {
                    ast.unparse(n.func).split(".")[-1] for n in ast.walk(function.parse()) if isinstance(n, ast.Call)
                }
    return {f"{module}.{name}" for module, name in functions if name not in called}


@contextlib.contextmanager
def _recording(target: int) -> Iterator[dict[str, tuple[Any, dict[str, Any], Any]]]:
    """Within, launches compile and are recorded by the hash of what was compiled, and CPU tensors pass for CUDA's."""
    recorded: dict[str, tuple[Any, dict[str, Any], Any]] = {}  # the function, its arguments, what was compiled
    launch, unsupported_reason = JITFunction.run, dispatch.unsupported_reason

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | {
            k: v for k, v in options.items() if k in self.arg_names
        }
        recorded[compiled.hash] = (self, given, compiled)
        return compiled

    def unsupported_on_cuda(*tensors: Tensor, **options: Any) -> str | None:
        with patch.object(dispatch, "interpreting", lambda: True):  # lifts the check of the device and no other
            return unsupported_reason(*tensors, **options)

    driver.set_active(CompileOnly(target))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(dispatch, "unsupported_reason", unsupported_on_cuda),
        patch.object(nvfp4_operators, "interpreting", lambda: True),
        patch.object(device, "NO_DEVICE", DEVICES[target]),
        ZeroedMemory(),
    ):
        yield recorded
