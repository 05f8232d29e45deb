"""The kernels hold their budgets on sm_90 and sm_100, and the gate that says so tells a kernel that does not."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
TARGETS = (90, 100)
# One of each family: the objective walks over logits and over tiles as the statistics do, and then writes gradients.
CENTRAL = ("logits objective, bf16", "linear objective, bf16", "linear statistics, NVFP4 weight", "NVFP4 rows, bf16")

TOY = '''
import sys

import torch
import triton
import triton.language as tl

import compile_gates
from gates.judge import Budget, Most


@triton.jit
def spilling(x, out, BLOCK: tl.constexpr):
    """Keeps 256 numbers per thread alive, one more than there are registers."""
    at = tl.arange(0, BLOCK)
    z = tl.load(x + at)
    tl.store(out + at, z / tl.sum(tl.exp(z)))


@triton.jit
def narrow(x, out, n, step, BLOCK: tl.constexpr):
    """Its stride is known only at run time, so its loads cannot be wide."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + (start + tl.arange(0, BLOCK)) * step)
    tl.store(out, tl.sum(total))


@triton.jit
def forgotten(out):
    tl.store(out, 1.0)


@triton.jit
def loopless(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def run():
    x = torch.zeros(1 << 13)
    spilling[(1,)](x, x, BLOCK=1 << 13, num_warps=1)
    narrow[(1,)](x, x, 1024, 48, BLOCK=1024)
    forgotten[(1,)](x)
    loopless[(1,)](x, BLOCK=1024)


BUDGETS = (
    *(budget for budget in compile_gates.BUDGETS if budget.kernel == "*"),
    Budget(kernel="toy.spilling", registers=Most(16, "sixteen is plenty"), opcodes={"HGMMA": "must multiply"}),
    Budget(kernel="toy.narrow", block=("BLOCK",), reads=("x",), instructions={"read": Most(0.5, "half of nothing")}),
    Budget(kernel="toy.loopless", block=("LANES",)),
    Budget(kernel="toy.loopless", block=("BLOCK",), reads=("x",), instructions={"write": Most(1, "it must loop")}),
    Budget(kernel="toy.absent"),
)

if __name__ == "__main__":
    import toy

    sys.exit(compile_gates.main(["--json", sys.argv[1]], {"toys": toy.run}, toy.BUDGETS))
'''

# Two targets' worth of a small kernel: a loop over memory, a wait that the assembler moved behind the end, a far exit.
LISTING = """
 Function k:
  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90a
        /*0000*/              @!P0 BRA 0x80 ;                              /* 0x0000000400d88947 */
                                                                           /* 0x000fea0003800000 */
        /*0010*/                   MOV R1, RZ ;
        /*0020*/                   LDG.E.128 R4, desc[UR12][R2.64] ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12+0x24000], R5 ;
        /*0040*/              @!P0 BRA 0x90 ;
        /*0050*/               @P1 LDG.E.U16 R4, desc[UR12][R2.64] ;
        /*0060*/                   BRA.U UP0, 0x20 ;
        /*0070*/              @!P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12+0x24000], R5 ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x50 ;
        /*00c0*/                   BRA 0xc0;
"""


def names_of_cases() -> list[str]:
    sys.path.insert(0, str(TOOLS))
    names = list(importlib.import_module("gates.cases").CASES)
    sys.path.remove(str(TOOLS))
    return names


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(TOOLS))
    yield SimpleNamespace(sass=importlib.import_module("gates.sass"), gates=importlib.import_module("compile_gates"))
    sys.path.remove(str(TOOLS))


def run(command: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """With nothing compiled before, outside the interpreter, on no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TOOLS)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def gates(folder: Path, *cases: str) -> SimpleNamespace:
    """What the tool says of these cases: its exit status, its output, its rows."""
    command = [sys.executable, "tools/compile_gates.py", *cases, "--json", str(folder / "out.json")]
    done = run(command, folder / "cache")
    assert (folder / "out.json").is_file(), done.stderr
    result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return SimpleNamespace(status=done.returncode, output=done.stdout, rows=result["rows"], broken=result["broken"])


def test_central_cases_hold_their_budgets(tmp_path: Path) -> None:
    """One of each family; the slow test compiles every launch."""
    gated = gates(tmp_path, *CENTRAL)
    assert gated.status == 0 and gated.broken == []
    assert {(row["case"], row["target"]) for row in gated.rows} == {(case, t) for case in CENTRAL for t in TARGETS}
    assert f"{len(gated.rows)} launches, 0 breaches" in gated.output
    assert tensor_cores(gated) == {(90, "HGMMA"), (100, "UTCHMMA")}


def tensor_cores(gated: SimpleNamespace) -> set[tuple[int, str]]:
    return {(row["target"], opcode.split(".")[0]) for row in gated.rows for opcode in row["mma"]}


@pytest.mark.slow
def test_every_kernel_is_gated_and_every_budget_used(tmp_path: Path) -> None:
    gated = gates(tmp_path)
    assert gated.broken == []
    assert gated.status == 0
    assert {(row["case"], row["target"]) for row in gated.rows} == {(c, t) for c in names_of_cases() for t in TARGETS}
    assert not any(row["spills"] for row in gated.rows)
    assert f"{len(gated.rows)} launches, 0 breaches" in gated.output
    assert tensor_cores(gated) == {(90, "HGMMA"), (100, "UTCHMMA")}


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    done = run([sys.executable, "tools/compile_gates.py", "logits"], tmp_path)
    assert done.returncode == 2 and "no case 'logits'; known are logits statistics, bf16" in done.stderr


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy.py").write_text(TOY, encoding="utf-8")
    done = run([sys.executable, str(folder / "toy.py"), str(folder / "out.json")], folder / "cache")
    assert (folder / "out.json").is_file(), done.stderr
    result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return SimpleNamespace(status=done.returncode, output=done.stdout, broken=result["broken"])


@pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("kernel", "parts"),
    [
        ("spilling", ["spills ", ", at most 0: a spill turns"]),
        ("spilling", ["registers 255, at most 16: sixteen is plenty"]),
        ("spilling", ["no HGMMA: must multiply"]),
        ("narrow", ["LDG.E in the read loop: loads there must be 128 bits wide"]),
        ("narrow", ["instructions per element (read) ", ", at most 0.5: half of nothing"]),
        ("loopless", ["instructions per element (write) nan, at most 1: it must loop"]),
        ("loopless", ["it has no constant LANES: mend the block of its budget"]),
        ("forgotten", ["no budget of its own"]),
    ],
    ids=["spills", "registers", "opcode", "narrow loads", "instructions", "no loop", "block", "no budget"],
)
def test_breach_names_kernel_number_budget_and_reason(
    toys: SimpleNamespace, kernel: str, parts: list[str], target: int
) -> None:
    assert toys.status == 1
    mine = [line for line in toys.broken if line.startswith(f"toy.{kernel} (toys, sm_{target}): ")]
    assert [line for line in mine if all(part in line for part in parts)], mine
    assert all(line in toys.output.replace("\n", "") for line in mine)


def test_kernels_without_a_case_and_budgets_without_a_launch_are_told(toys: SimpleNamespace) -> None:
    assert any(line.startswith("logits_kernels.statistics_kernel: no case launches it") for line in toys.broken)
    assert any(line.startswith("toy.absent (*, sm_90): a budget, but no launch") for line in toys.broken)


def test_loops_are_read_off_branches(tools: SimpleNamespace) -> None:
    machine = tools.sass.parse(LISTING)
    assert (machine.registers, machine.stack, machine.local, machine.architecture) == (32, 0, 0, "sm_90a")
    wait, inner, outer = machine.loops
    assert [hex(i.address) for i in wait.body] == ["0x90", "0xa0"]
    assert [hex(i.address) for i in inner.body] == ["0x20", "0x30", "0x40", "0x50", "0x60", "0x90", "0xa0", "0xb0"]
    assert (outer.head, len(outer.body)) == (0x10, 10)
    assert inner.bytes("LDG") == 18
    assert [loop.head for loop in machine.innermost(lambda i: i.name == "LDG")] == [0x20]
    assert [loop.head for loop in machine.innermost(lambda i: i.name == "MOV")] == [0x10]
    assert [i.guarded for i in machine.instructions if i.name == "LDG"] == [False, True]
    assert (machine.count("LDG"), machine.count("LDG.E.128"), machine.count("LDG.E.12")) == (2, 1, 0)


def test_a_rare_branch_is_known_by_an_opcode_of_its_blocks(tools: SimpleNamespace) -> None:
    machine = tools.sass.parse(LISTING)
    assert machine.outside("") == machine.instructions == machine.outside("DMUL")
    left = [hex(i.address) for i in machine.outside("SYNCS")]
    assert left == ["0x0", "0x10", "0x50", "0x60", "0x70", "0x80", "0xb0", "0xc0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("REG:32", "REGS:32"), "resource usage of one kernel, found 0"),
        (("code for sm_90a", "code"), "names no architecture"),
        (("BRA.U UP0, 0x20", "BRX R2 -0x20"), "BRX at 0x60: loops of code with computed branches are unknown"),
    ],
    ids=["no resources", "no architecture", "computed branch"],
)
def test_unreadable_machine_code_is_refused(tools: SimpleNamespace, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tools.sass.parse(LISTING.replace(*change))


def test_interpreter_is_refused(tools: SimpleNamespace) -> None:
    def case() -> Any:
        raise AssertionError("nothing may run")

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        tools.gates.gate({"case": case}, 90)
