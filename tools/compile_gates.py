"""Proof without a GPU that the kernels are what they should be: ``python tools/compile_gates.py [CASE ...]``.

Every kernel of mopd_kernels is compiled for sm_90 and sm_100 as its host code launches it (gates/cases.py,
gates/capture.py), its machine code is read (gates/sass.py) and held to :data:`BUDGETS` (gates/judge.py). The exit
status is 1 where a budget is broken or belongs to nothing, where a kernel has none, and where no case launches a
kernel. With cases named only these are compiled, and nothing is said of what they leave out. Neither a GPU nor its
driver is needed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from gates.capture import capture, launchable
from gates.cases import CASES
from gates.judge import TARGETS, Budget, Most, Row, judge
from gates.nvfp4_budgets import NVFP4_BUDGETS
from rich.console import Console
from rich.table import Table

import mopd_kernels

FULL_SM = Most(64, "64 registers let 1024 threads share an SM: 64 KiB in flight there hide the latency of HBM")
REDUCTION = Most(1024, "only a block's reduction goes through shared memory, so it never limits who shares an SM")
EXP2 = Most(1.3, "one exp2 per logit and few per lane: 16 per cycle and SM, 3.7T/s, of 1.4T/s logits in 0.78 ms")
BULK = "tiles must move by bulk copies, which take no registers for addresses or on their way"
AHEAD = "codes and scales must be copied ahead of the products, or each step waits for memory"
WIDE = "narrower accesses need more instructions for the same bytes"
LANES = ("LANES", "VECTOR")
DECODING = (
    "linear_kernels.logit_tiles_kernel",
    "linear_operand_kernels.product_kernel",
    "linear_payload_kernels.payload_kernel",
)

# Per element, an H100 has 9.9 issue slots (132 SMs x 128 lanes x 1.755 GHz) for each byte at 3.0 TB/s.
BUDGETS: tuple[Budget, ...] = (
    Budget(
        kernel="*",
        spills=Most(0, "a spill turns register traffic into memory traffic, in the hottest loop first"),
        shared=Most(227 << 10, "bytes that one block may have on sm_90 and sm_100; with more it is not launched"),
        file=Most(65536, "registers of an SM; a block that needs more is not launched"),
    ),
    Budget(
        kernel="logits_kernels.statistics_kernel",
        registers=FULL_SM,
        shared=REDUCTION,
        block=LANES,
        reads=("logits",),
        instructions={
            "read": Most(10, "of 19.8 issue slots per bf16 logit; the log-sum-exp alone takes 9"),
            "read MUFU": EXP2,
        },
    ),
    Budget(
        kernel="logits_kernels.objective_kernel",
        registers=FULL_SM,
        shared=REDUCTION,
        block=LANES,
        reads=("logits",),
    ),
    Budget(
        kernel="logits_kernels.objective_kernel",
        cases=("logits objective, bf16*", "logits objective, fp32"),
        block=LANES,
        reads=("logits",),
        instructions={"read": Most(10, "the walk of logits_kernels.statistics_kernel"), "read MUFU": EXP2},
    ),
    Budget(
        kernel="logits_kernels.objective_kernel",
        cases=("logits objective, bf16", "*everything", "*V=65536", "*tp=4", "*fp32"),
        block=LANES,
        reads=("logits",),
        instructions={"write": Most(7, "one exp2, two multiplications, a cast: less than the walk before it")},
    ),
    Budget(
        kernel="logits_kernels.scale_kernel",
        registers=FULL_SM,
        block=LANES,
        reads=("gradient",),
        instructions={"write": Most(4.5, "moves 4 bytes per bf16 element and does nothing else")},
    ),
    Budget(kernel="logits_kernels.finish_kernel", registers=FULL_SM),
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("*bf16*", "*fp16*"),
        targets=(90,),
        registers=Most(178, "128 of the accumulator and an epilogue that takes the columns piece by piece"),
        block=("ROWS", "COLUMNS"),
        instructions={
            "tile": Most(17, "4352 issue slots, 7% of the 65536 cycles of a tile's product at H = 4096"),
            "tile MUFU": Most(1.2, "one exp2 per logit: 2048 cycles of a tile, 3% of its product at H = 4096"),
        },
        opcodes={"HGMMA": "the tensor cores of sm_90", "UTMALDG": BULK},
        in_flight="the tensor cores would idle between the steps of a product",
    ),
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("linear statistics, *16",),
        targets=(90,),
        registers=Most(170, "without E to store, the log-sum-exp took 158 to 167"),
    ),
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("*bf16*", "*fp16*"),
        targets=(100,),
        registers=Most(224, "spills begin at 255; the accumulator is in tensor memory, one program fills an SM"),
        block=("ROWS", "COLUMNS"),
        instructions={
            "tile": Most(17, "4352 issue slots, 13% of the 32768 cycles of a tile's product at H = 4096"),
            "tile MUFU": Most(1.2, "one exp2 per logit: 2048 cycles of a tile, 6% of its product at H = 4096"),
        },
        opcodes={"UTCHMMA": "the tensor cores of sm_100 (tcgen05.mma)", "UTMALDG": BULK},
    ),
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("linear objective, bf16", "*everything", "*tp=4"),
        opcodes={"UTMASTG": BULK},
    ),
    Budget(kernel="linear_kernels.logit_tiles_kernel", cases=("*fp32",)),  # no spills
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("*NVFP4 weight", "*NVFP4 hidden"),
        registers=Most(248, "128 of the accumulator and what a step decodes; at 255 spills begin"),
        block=("ROWS", "COLUMNS"),
        instructions={
            "tile": Most(19, "17 as of dense operands, and 2 for the numbers of a step that a thread decodes")
        },
        opcodes={"LDGSTS": AHEAD, "UTMALDG": BULK},
    ),
    Budget(
        kernel="linear_kernels.logit_tiles_kernel",
        cases=("*NVFP4 both*",),
        block=("ROWS", "COLUMNS"),
        instructions={"tile": Most(21, "17 as of dense operands, and 4 to decode both: 96 numbers of a step a thread")},
        opcodes={"LDGSTS": AHEAD},
    ),
    *(
        Budget(
            kernel=kernel,
            cases=("*NVFP4*", "linear payload, *"),
            targets=(target,),
            opcodes={opcode: f"decoded operands are bf16, for the tensor cores of sm_{target}"},
        )
        for kernel in DECODING
        for target, opcode in ((90, "HGMMA"), (100, "UTCHMMA"))
    ),
    Budget(
        kernel="linear_operand_kernels.product_kernel",
        registers=Most(128, "two blocks of 256 threads share an SM: one decodes while the other multiplies"),
        shared=Most(113 << 10, "half of an SM"),
        opcodes={"LDGSTS": AHEAD},
    ),
    Budget(
        kernel="linear_payload_kernels.payload_kernel",
        cases=("*bf16", "*NVFP4 weight"),
        registers=Most(224, "32 of the accumulator, the rest to quantize 32 numbers of a step; at 255 spills begin"),
        block=("ROWS", "COLUMNS"),
        instructions={"tile": Most(40, "of the first 64 columns alone: 0.02 per logit at V = 131072")},
        opcodes={"UTMALDG": BULK},
    ),
    Budget(kernel="linear_payload_kernels.payload_kernel", cases=("*stochastic", "*four over six")),  # no spills
    Budget(
        kernel="linear_kernels.join_tiles_kernel",
        registers=Most(128, "four blocks of 128 threads share an SM, each with 192 bytes per thread in flight"),
        shared=REDUCTION,
        opcodes={"LDG.E.128": WIDE},
    ),
    Budget(
        kernel="linear_kernels.scale_rows_kernel",
        registers=Most(96, "five blocks of 128 threads share an SM, each with 64 elements per thread in flight"),
        block=("ROWS", "COLUMNS"),
        instructions={"tile": Most(8, "of 39 issue slots for the 4 bytes of a bf16 element, 59 from fp32")},
        opcodes={"LDG.E.128": WIDE, "STG.E.128": WIDE},
    ),
    Budget(
        kernel="linear_kernels.target_logits_kernel",
        registers=FULL_SM,
        shared=REDUCTION,
        block=("ROWS", "DEPTH"),
        reads=("hidden", "weight"),
        instructions={"read": Most(9, "of 39 issue slots for two bf16 numbers")},
    ),
    Budget(kernel="linear_kernels.objective_rows_kernel", registers=FULL_SM, shared=REDUCTION),
    Budget(kernel="linear_kernels.subtract_onehot_kernel", registers=FULL_SM),
    Budget(
        kernel="divergence_kernels.statistics_kernel",
        cases=("*bf16", "*fp32", "*NVFP4*"),
        registers=FULL_SM,
        shared=REDUCTION,
        block=LANES,
        reads=("first", "second"),
        instructions={"read": Most(14, "two logits, each within the 9 of logits_kernels.statistics_kernel")},
    ),
    Budget(
        kernel="divergence_kernels.statistics_kernel",
        cases=("*top-k",),
        registers=FULL_SM,
        block=LANES,
        reads=("first",),
        instructions={"read": Most(6, "log-sum-exp alone, without the mean logit")},
    ),
    Budget(
        kernel="divergence_kernels.jsd_sums_kernel",
        registers=FULL_SM,
        shared=REDUCTION,
        block=LANES,
        reads=("student", "teacher"),
        instructions={"read": Most(54, "of 79 issue slots for 8 bytes: three exp2 or log2 of each pair of logits")},
    ),
    Budget(
        kernel="divergence_kernels.gradient_kernel",
        cases=("*_kl, *",),
        registers=FULL_SM,
        block=("BLOCK",),
        reads=("student", "teacher"),
        instructions={"write": Most(13, "of 99 issue slots for 10 bytes")},
    ),
    Budget(
        kernel="divergence_kernels.gradient_kernel",
        cases=("*jsd*",),
        registers=FULL_SM,
        block=("BLOCK",),
        reads=("student", "teacher"),
        instructions={"write": Most(46, "of 99 issue slots for 10 bytes")},
    ),
    Budget(kernel="divergence_kernels.support_kernel", registers=FULL_SM),
    *NVFP4_BUDGETS,
)


def gate(cases: Mapping[str, Callable[[], None]], target: int, budgets: Sequence[Budget] = BUDGETS) -> list[Row]:
    """A row for everything that these cases launch, compiled for ``target``."""
    return [judge(launch, target, budgets) for launch in capture(cases, target)]


def gaps(rows: Sequence[Row], budgets: Sequence[Budget] = BUDGETS) -> list[str]:
    """Kernels that no case launches, and budgets that are about none."""
    forgotten = launchable(mopd_kernels) - {row.kernel for row in rows}
    found = [f"{name}: no case launches it: add one to tools/gates/cases.py" for name in forgotten]
    for budget in budgets:
        for target in budget.targets:
            if not any(budget.about(row.case, row.kernel, target) and row.target == target for row in rows):
                found.append(f"{budget.kernel} ({', '.join(budget.cases)}, sm_{target}): a budget, but no launch")
    return sorted(found)


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(
        "case", "kernel", "target", "regs", "spills", "shared", "instr/elem", "loads", "mma", "budget", "verdict"
    )
    for row in rows:
        table.add_row(
            row.case,
            " -".join((row.kernel, *row.absent)),
            f"sm_{row.target}",
            str(row.registers),
            str(row.spills),
            str(row.shared),
            " ".join(f"{name} {number:.1f}" for name, number in row.instructions.items()),
            words(row.loads),
            words(row.mma),
            row.budget,
            "[red]broken[/]" if row.breaches else "[green]holds[/]",
        )
    console.print(table)


def words(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name} x{number}" for name, number in counts.items())


def main(
    arguments: Sequence[str] | None = None,
    cases: Mapping[str, Callable[[], None]] = CASES,
    budgets: Sequence[Budget] = BUDGETS,
) -> int:
    parser = argparse.ArgumentParser(description="Holds the kernels' machine code to budgets; no GPU.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="compile these alone; all when left out")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write rows and breaches there")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in cases]:
        parser.error(f"no case {unknown[0]!r}; known are {', '.join(cases)}")
    chosen = {name: case for name, case in cases.items() if not options.cases or name in options.cases}
    # Triton's interpreter would compile nothing. Each target has a process of its own: two cores, and a crash is told.
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(len(TARGETS), multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(partial(gate, chosen, budgets=budgets), TARGETS) for row in found]
    console = Console(width=None if sys.stdout.isatty() else 260)
    show(rows, console)
    broken = [f"{row.kernel} ({row.case}, sm_{row.target}): {breach}" for row in rows for breach in row.breaches]
    broken += [] if options.cases else gaps(rows, budgets)
    for line in broken:
        console.print(line, style="red", markup=False, soft_wrap=True)
    versions = {name: version(name) for name in ("triton", "torch")}
    console.print(f"{len(rows)} launches, {len(broken)} breaches; Triton {versions['triton']}")
    if options.json:
        result = {"versions": versions, "rows": [asdict(row) for row in rows], "broken": broken}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
