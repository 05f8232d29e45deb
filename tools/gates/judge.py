"""What a kernel uses, from its machine code, and whether that is within its budgets.

What a kernel that walks over memory costs per element is read off its loops: the instructions of one pass, whether
their predicates hold or not, over the elements that a thread takes in a pass. Those loops are known by the bytes they
load; "write" loops also store, "read" loops do not. Where one of a kind loads without a guard (the walk over whole
blocks), guarded ones (ragged ends) do not count.

The "tile" of a kernel around a matrix product is one turn of its loop over tiles, product and epilogue, each
instruction counted once, over the elements of a thread's share of a tile; that of a kernel without loops is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from gates.capture import WARP, Launch
from gates.sass import Instruction, Loop, Machine

TARGETS = (90, 100)
MMA = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA")
COPIES = ("LDG", "LDGSTS")  # global memory to registers, and past them to shared memory
WIDTH = 128  # bits of each load in a loop over elements


@dataclass(frozen=True)
class Most:
    limit: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a kernel may use in the cases and on the targets that this is about; all that fit a launch hold."""

    kernel: str  # module.function, or * for what every kernel must hold
    cases: tuple[str, ...] = ("*",)  # patterns
    targets: tuple[int, ...] = TARGETS
    spills: Most | None = None  # bytes of stack and local memory, and instructions that move them
    registers: Most | None = None  # per thread
    file: Most | None = None  # registers of a block
    shared: Most | None = None  # bytes
    block: tuple[str, ...] = ()  # constants of the kernel whose product is the elements of a pass, or of a tile
    scale: int = 1  # elements for each of that product
    rare: str = ""  # an opcode that only a branch has which is hardly ever taken: its basic blocks do not count
    reads: tuple[str, ...] = ()  # arguments of which a pass reads a block
    instructions: Mapping[str, Most] = field(default_factory=dict)  # per element: "read", "write MUFU", "tile", ...
    opcodes: Mapping[str, str] = field(default_factory=dict)  # that must be there, with the reason
    in_flight: str = ""  # the reason why one step's products must not wait for those before (sm_90)

    def about(self, case: str, kernel: str, target: int) -> bool:
        fits = any(fnmatchcase(case, pattern) for pattern in self.cases)
        return fits and self.kernel in ("*", kernel) and target in self.targets

    def __str__(self) -> str:
        numbers = {"regs": self.registers, "shared": self.shared, **self.instructions}
        parts = [f"{name}<={most.limit:g}" for name, most in numbers.items() if most is not None]
        return " ".join([*parts, *self.opcodes])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel of one case on one target: what was found, and where that breaks a budget."""

    case: str
    kernel: str
    target: int
    absent: tuple[str, ...]  # arguments that are None
    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, float]  # per element
    loads: Mapping[str, int]  # opcodes and their number
    mma: Mapping[str, int]
    budget: str
    breaches: tuple[str, ...]


def judge(launch: Launch, target: int, budgets: Sequence[Budget]) -> Row:
    """What one launch uses, held to every budget that is about it."""
    machine = launch.machine
    mine = [budget for budget in budgets if budget.about(launch.case, launch.kernel, target)]
    own = [budget for budget in mine if budget.kernel != "*"]
    breaches = [] if own else ["no budget of its own: add one to BUDGETS in tools/compile_gates.py"]
    if machine.architecture.rstrip("af") != f"sm_{target}":
        breaches.append(f"compiled for {machine.architecture}")
    instructions: dict[str, float] = {}
    for budget in mine:
        found, wrong = per_element(launch, budget)
        instructions |= found
        breaches += wrong + over(launch, budget, found) + missing(machine, budget)
    return Row(
        case=launch.case,
        kernel=launch.kernel,
        target=target,
        absent=launch.absent,
        registers=machine.registers,
        spills=spills(machine),
        shared=launch.shared,
        instructions={name: round(number, 2) for name, number in instructions.items()},
        loads=machine.counts(*COPIES, "UTMALDG"),
        mma=machine.counts(*MMA),
        budget="; ".join(map(str, own)),
        breaches=tuple(dict.fromkeys(breaches)),
    )


def costs(kind: str, body: Sequence[Instruction], elements: float) -> dict[str, float]:
    """Instructions of a body per element: all, and those of the special function unit (exp2, log2, 1/x)."""
    counted = [instruction for instruction in body if instruction.name != "NOP"]
    return {kind: len(counted) / elements, f"{kind} MUFU": sum(i.name == "MUFU" for i in counted) / elements}


def spills(machine: Machine) -> int:
    return machine.stack + machine.local + machine.count("LDL") + machine.count("STL")


def over(launch: Launch, budget: Budget, found: Mapping[str, float]) -> list[str]:
    """Numbers above their limits."""
    machine = launch.machine
    allocated = -(-machine.registers // 8) * 8  # registers come by eights
    numbers = [
        ("spills", spills(machine), budget.spills),
        ("registers", machine.registers, budget.registers),
        ("registers of a block", allocated * WARP * launch.warps, budget.file),
        ("shared memory", launch.shared, budget.shared),
    ]
    numbers += [
        (f"instructions per element ({kind})", found.get(kind, math.nan), most)
        for kind, most in budget.instructions.items()
    ]
    return [
        f"{what} {number:g}, at most {most.limit:g}: {most.reason}"
        for what, number, most in numbers
        if most is not None and not number <= most.limit  # NaN, where no such loop was found, is above any limit
    ]


def missing(machine: Machine, budget: Budget) -> list[str]:
    """What the machine code must have and does not."""
    found = [f"no {name}: {reason}" for name, reason in budget.opcodes.items() if not machine.count(name)]
    if budget.in_flight and not machine.products_overlap():
        found.append(f"each product waits for the one before: {budget.in_flight}")
    return found


def per_element(launch: Launch, budget: Budget) -> tuple[dict[str, float], list[str]]:
    """Instructions per element of each kind (see above), and what is wrong with the loops."""
    unknown = [name for name in budget.block if name not in launch.constants]
    if unknown:
        return {}, [f"it has no constant {', '.join(unknown)}: mend the block of its budget"]
    if not budget.block:
        return {}, []
    elements = budget.scale * math.prod(launch.constants[name] for name in budget.block) / (WARP * launch.warps)
    if not budget.reads:
        turns = [loop for loop in launch.machine.loops if loop.count(*MMA) and loop.count("MUFU")]
        body = turns[0].body if turns else launch.machine.outside(budget.rare)
        return costs("tile", body, elements), []
    size = elements * sum(launch.itemsizes.get(name, 0) for name in budget.reads)
    kinds: dict[str, list[Loop]] = {"read": [], "write": []}
    for loop in launch.machine.innermost(lambda i: i.name in COPIES):
        if loop.bytes(*COPIES) and loop.bytes(*COPIES) % size == 0:  # a multiple where the assembler unrolled it
            kinds["write" if loop.count("STG") else "read"].append(loop)
    found: dict[str, float] = {}
    narrow: list[str] = []
    for kind, loops in kinds.items():
        whole = [loop for loop in loops if not any(i.guarded for i in loop.body if i.name in COPIES)] or loops
        for cost in (costs(kind, loop.body, elements * loop.bytes(*COPIES) / size) for loop in whole):
            found |= {name: max(number, found.get(name, 0.0)) for name, number in cost.items()}
        for load in (i for loop in whole for i in loop.body if i.name in COPIES and i.bits < WIDTH):
            narrow.append(f"{load.opcode} in the {kind} loop: loads there must be {WIDTH} bits wide")
    return found, narrow
