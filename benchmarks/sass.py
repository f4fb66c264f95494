"""What the machine code of a kernel holds: how many of which instruction, in all and in which loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


def find_cuobjdump() -> str | None:
    """On PATH, or from PyPI's nvidia-cuda-cuobjdump, which needs nvidia-cuda-nvdisasm beside it."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    return shutil.which("cuobjdump") or next(map(str, sorted(packages.glob("*/bin/cuobjdump"))), None)


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """HMMA of HMMA.16816.F32.BF16."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch or call goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.kind in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def disassemble(binary: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels of an object or library, by mangled name."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    command = [cuobjdump, "-sass", "-arch", architecture, str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    for line in listing.splitlines():
        if found := _FUNCTION.match(line):
            instructions = kernels[found[1]] = []
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), bool(found[2]), found[3], found[4].strip()))
    return {name: Kernel(instructions) for name, instructions in kernels.items()}


class Kernel:
    """A control-flow graph: blocks are numbered as they lie, block 0 is entered first."""

    def __init__(self, instructions: list[Instruction]):
        assert not [x for x in instructions if x.kind in ("BRX", "JMX", "JMP")], "jumps whose target is not known"
        self.instructions = instructions
        addresses = [x.address for x in instructions]
        starts = {addresses[0]}
        for here, following in pairwise(instructions):
            if here.kind in ("BRA", "CALL", "EXIT", "RET"):
                starts.add(following.address)
            if here.target is not None:
                starts.add(here.target)
        self.starts = sorted(starts)
        places = [addresses.index(start) for start in self.starts] + [len(instructions)]
        self.blocks = [instructions[begin:end] for begin, end in pairwise(places)]
        self.successors = [list(self._successors(number)) for number in range(len(self.blocks))]

    def _block_of(self, address: int) -> int:
        return bisect_right(self.starts, address) - 1

    def _successors(self, number: int) -> Iterator[int]:
        last = self.blocks[number][-1]
        if last.target is not None:
            yield self._block_of(last.target)
        ends = last.kind in ("BRA", "EXIT", "RET") and not last.predicated
        # A branch may have its condition among its operands: BRA P0, or BRA.DIV ~URZ.
        conditional = last.kind == "BRA" and "," in last.operands
        if (not ends or conditional) and number + 1 < len(self.blocks):
            yield number + 1

    @cached_property
    def _dominators(self) -> list[set[int]]:
        """For each block, those that every way to it passes."""
        every = set(range(len(self.blocks)))
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for block, successors in enumerate(self.successors):
            for successor in successors:
                predecessors[successor].append(block)
        dominators = [{0}] + [every] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                new = {block} | set.intersection(every, *(dominators[p] for p in predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    @cached_property
    def loops(self) -> list[set[int]]:
        """The blocks of each natural loop: what reaches a branch back to a block that dominates it, without passing
        that block. Loops with one head are one. A branch to itself, as behind the end of each kernel, is none."""
        loops: dict[int, set[int]] = {}
        for tail, successors in enumerate(self.successors):
            for head in successors:
                if head not in self._dominators[tail] or (head == tail and len(self.blocks[head]) == 1):
                    continue
                body, ahead = loops.setdefault(head, {head}), [tail]
                while ahead:
                    block = ahead.pop()
                    if block not in body:
                        body.add(block)
                        ahead += [p for p, successors in enumerate(self.successors) if block in successors]
        return list(loops.values())

    def count(self, blocks: set[int] | None = None) -> Counter[str]:
        """Instructions by kind."""
        chosen = range(len(self.blocks)) if blocks is None else blocks
        return Counter(x.kind for block in chosen for x in self.blocks[block])

    @cached_property
    def product_loops(self) -> set[int]:
        """The blocks of the innermost loops with matrix products."""
        products = [loop for loop in self.loops if self.count(loop)["HMMA"]]
        return set().union(*(loop for loop in products if not any(other < loop for other in products)))
