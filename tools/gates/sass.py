"""Reads a kernel's machine code: what it holds and moves, and what each of its loops costs.

Registers and stack come from ``cuobjdump --dump-resource-usage``, instructions from ``cuobjdump --dump-sass``; Triton
ships both tools, and neither needs a GPU or its driver. A loop is a natural loop of the control-flow graph: the blocks
from which a branch back to its head can be reached without passing the head again. So waits on barriers that the
assembler moved behind the kernel's end count where they belong, and an outer loop contains its inner ones.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;/]*)")
ENDS = ("EXIT", "RET", "BPT")
INDIRECT = ("BRX", "JMX", "BRXU", "JMXU")
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    guarded: bool
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """Width of a load or store, per thread."""
        return next((BITS[m] for m in self.opcode.split(".")[1:] if m in BITS), 32)

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        return int(self.operands.split(",")[-1].strip(), 16) if self.name == "BRA" else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name == "BRA":
            return self.guarded or "," in self.operands
        return self.guarded or self.name not in ENDS


@dataclass(frozen=True, slots=True)
class Loop:
    head: int
    body: tuple[Instruction, ...]

    @property
    def addresses(self) -> frozenset[int]:
        return frozenset(i.address for i in self.body)

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.body)

    def bytes(self, *names: str) -> int:
        """That a thread moves per pass of the loop by instructions of these names."""
        return sum(i.bits for i in self.body if i.name in names) // 8


class Machine:
    """One compiled kernel."""

    def __init__(self, architecture: str, resources: dict[str, int], instructions: list[Instruction]) -> None:
        self.architecture = architecture  # sm_90a
        self.registers, self.stack, self.local = resources["REG"], resources["STACK"], resources["LOCAL"]
        self.instructions = instructions
        odd = [i for i in instructions if i.name in INDIRECT]
        if odd:
            raise ValueError(
                f"{odd[0].opcode} at {odd[0].address:#x}: loops of code with computed branches are unknown"
            )

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    def count(self, prefix: str) -> int:
        """Instructions whose opcode is ``prefix`` or that with further modifiers."""
        return sum(n for opcode, n in self.opcodes.items() if opcode == prefix or opcode.startswith(prefix + "."))

    def counts(self, *names: str) -> dict[str, int]:
        """Of the opcodes with these names, most frequent first."""
        return {opcode: n for opcode, n in self.opcodes.most_common() if opcode.split(".")[0] in names}

    def products_overlap(self) -> bool:
        """Of sm_90's asynchronous products: whether some wait leaves a group of them in flight, and groups are more
        than single instructions. ptxas makes each wait for itself where it cannot keep their registers apart."""
        groups = sum("gsb0" in i.operands for i in self.instructions if i.name == "HGMMA")
        waits = [i.operands for i in self.instructions if i.opcode.startswith("WARPGROUP.DEPBAR")]
        return 2 * groups <= self.count("HGMMA") and any(not wait.endswith("0x0") for wait in waits)

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, smallest first; those with one head are one."""
        blocks, successors = _blocks(self.instructions)
        dominators = _dominators(successors)
        bodies: dict[int, set[int]] = defaultdict(set)
        for block in dominators:
            for head in successors[block]:
                if head in dominators[block]:
                    bodies[head] |= _reaching(block, head, successors)
        loops = [
            Loop(self.instructions[blocks[head][0]].address, tuple(self._within(blocks, body)))
            for head, body in bodies.items()
        ]
        return sorted(loops, key=lambda loop: len(loop.body))

    def outside(self, opcode: str) -> list[Instruction]:
        """Instructions of basic blocks without this opcode, named by its beginning; all of them for none."""
        if not opcode:
            return self.instructions
        blocks = (self.instructions[slice(*ends)] for ends in _blocks(self.instructions)[0].values())
        return [i for block in blocks if not any(i.opcode.startswith(opcode) for i in block) for i in block]

    def innermost(self, wanted: Callable[[Instruction], bool]) -> list[Loop]:
        """For every wanted instruction that is in a loop the smallest such loop, each once."""
        found, open_ = [], {i.address for i in self.instructions if wanted(i)}
        for loop in self.loops:
            if open_ & loop.addresses:
                found.append(loop)
                open_ -= loop.addresses
        return found

    def _within(self, blocks: dict[int, tuple[int, int]], body: set[int]) -> Iterable[Instruction]:
        for block in sorted(body):
            yield from self.instructions[slice(*blocks[block])]


def read(cubin: bytes, tool: str) -> Machine:
    """Of a cubin with one kernel; ``tool`` is the path of cuobjdump. Raises RuntimeError where that fails."""
    with tempfile.TemporaryDirectory(prefix="sass-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return parse(done.stdout)


def parse(text: str) -> Machine:
    """What cuobjdump prints. Raises ValueError where that is not one kernel."""
    usage = [dict(re.findall(r"(\w+):(\d+)", line)) for line in text.splitlines() if re.match(r"\s*REG:", line)]
    if len(usage) != 1:
        raise ValueError(f"expected the resource usage of one kernel, found {len(usage)}")
    found = (LINE.match(line) for line in text.splitlines())
    instructions = [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4].strip()) for m in found if m]
    architecture = re.search(r"code for (sm_\w+)", text)
    if architecture is None:
        raise ValueError("cuobjdump names no architecture")
    return Machine(architecture[1], {name: int(value) for name, value in usage[0].items()}, instructions)


def _blocks(instructions: list[Instruction]) -> tuple[dict[int, tuple[int, int]], dict[int, list[int]]]:
    """Basic blocks as ranges of instruction numbers, named by their first, and who may follow each."""
    number = {i.address: n for n, i in enumerate(instructions)}
    starts = {0} | {number[i.target] for i in instructions if i.target is not None}
    starts |= {n + 1 for n, i in enumerate(instructions[:-1]) if i.target is not None or not i.falls_through}
    ordered = [*sorted(starts), len(instructions)]
    blocks = {start: (start, end) for start, end in pairwise(ordered)}
    successors = {}
    for start, (_, end) in blocks.items():
        last = instructions[end - 1]
        follow = [number[last.target]] if last.target is not None else []
        successors[start] = follow + ([end] if last.falls_through and end in blocks else [])
    return blocks, successors


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached from the first, the blocks on every way to it."""
    reached, open_ = {0}, [0]
    while open_:
        new = [s for s in successors[open_.pop()] if s not in reached]
        reached.update(new)
        open_ += new
    before: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for follower in successors[block]:
            before[follower].append(block)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new_set = {block} | set.intersection(*(dominators[b] for b in before[block]))
            changed |= new_set != dominators[block]
            dominators[block] = new_set
    return dominators


def _reaching(source: int, head: int, successors: dict[int, list[int]]) -> set[int]:
    """The natural loop of the branch from ``source`` back to ``head``."""
    before: dict[int, list[int]] = defaultdict(list)
    for block, followers in successors.items():
        for follower in followers:
            before[follower].append(block)
    body, open_ = {head}, [source]
    while open_:
        block = open_.pop()
        if block not in body:
            body.add(block)
            open_ += before[block]
    return body
