"""The loop nest itself: steps, loops, their counts and their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from torch_trn.isa import DmaCopy, Dropout, Instruction, Rng
from torch_trn.memory import LoopVar, Pool, Space, TileRef

__all__ = ["Node", "Program", "Repeat", "Step"]


@dataclass(frozen=True)
class Step:
    """One instruction with the tiles it reads and writes; ``queue`` names the DMA queue, if any.

    An nc_matmul reads its stationary operand first, then its moving one. ``alternatives`` do the
    same to the same tiles on other engines: the issue pass takes one of them or ``instruction``.
    """

    instruction: Instruction
    writes: tuple[TileRef, ...]
    reads: tuple[TileRef, ...]
    queue: str = ""
    alternatives: tuple[Instruction, ...] = ()

    def __str__(self) -> str:
        written = ", ".join(str(ref) for ref in self.writes)
        read = ", ".join(str(ref) for ref in self.reads)
        queue = f" queue={self.queue}" if self.queue else ""
        text = f"{written} = {self.instruction.NAME}({read}) {self.instruction.attributes}{queue}"
        return " or ".join([text, *map(str, self.alternatives)])


@dataclass(frozen=True)
class Repeat:
    """``body`` run ``trips`` times, with ``variable`` counting from 0."""

    variable: LoopVar
    trips: int
    body: tuple[Node, ...]


Node: TypeAlias = Step | Repeat


@dataclass(frozen=True)
class Program:
    """An immutable loop nest; ``str`` gives its text. Counts are of the whole, expanded Program."""

    name: str
    pools: tuple[Pool, ...]
    body: tuple[Node, ...]

    @cached_property
    def instructions(self) -> int:
        """Number of instructions."""
        return _total(self.body, lambda step: 1)

    @cached_property
    def flops(self) -> int:
        """Multiplies and adds of the PE array."""
        return _total(self.body, lambda step: step.instruction.flops)

    @cached_property
    def draws(self) -> bool:
        """Whether an instruction draws random numbers."""
        return _total(self.body, lambda step: isinstance(step.instruction, Rng | Dropout)) > 0

    @cached_property
    def hbm_read_bytes(self) -> int:
        """Bytes that DMA reads from HBM."""
        return _total(self.body, lambda step: _hbm_bytes(step.instruction)[0])

    @cached_property
    def hbm_write_bytes(self) -> int:
        """Bytes that DMA writes to HBM."""
        return _total(self.body, lambda step: _hbm_bytes(step.instruction)[1])

    def __str__(self) -> str:
        head = (
            f"program {self.name}: {self.instructions} instructions, {self.flops} flops, "
            f"HBM read {self.hbm_read_bytes} B, HBM write {self.hbm_write_bytes} B"
        )
        return "\n".join([head, *map(_pool_line, self.pools), *_lines(self.body, "")])


def _total(body: tuple[Node, ...], measure: Callable[[Step], int]) -> int:
    return sum(
        node.trips * _total(node.body, measure) if isinstance(node, Repeat) else measure(node)
        for node in body
    )


def _hbm_bytes(instruction: Instruction) -> tuple[int, int]:
    """HBM bytes read and written; an accumulating DMA also reads what it adds to."""
    if not isinstance(instruction, DmaCopy):
        return 0, 0
    to_hbm = instruction.destination == Space.HBM
    read = (instruction.source == Space.HBM) + (to_hbm and instruction.accumulate)
    return read * instruction.nbytes, to_hbm * instruction.nbytes


def _pool_line(pool: Pool) -> str:
    if pool.space == Space.HBM:
        parts = f" in {pool.slots} parts" if pool.slots > 1 else ""
        return f"hbm {pool.name} {pool.nbytes} B{parts}"
    return f"{pool.space.name.lower()} {pool.name} {pool.slots} x {pool.nbytes} B/partition"


def _lines(body: tuple[Node, ...], indent: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, Repeat):
            yield f"{indent}for {node.variable.name} in {node.trips}:"
            yield from _lines(node.body, indent + "    ")
        else:
            yield f"{indent}{node}"
