"""Steps of attention in flight: one step's scores are issued before the products of earlier ones.

Engines run in program order, so a chain of TensorE, VectorE, ScalarE and TensorE again keeps none
of them busy unless the next steps' work stands between its links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.run import loop
from torch_trn.memory import Index
from torch_trn.program import Builder

__all__ = ["FEW_EXTENTS", "LONG_STEPS", "SHORT_STEPS", "STEPS_TOGETHER", "Block", "Chain",
           "Pipeline", "Step", "groups"]  # fmt: skip

#: Steps that follow each other without a loop's end between them, where there are as many.
STEPS_TOGETHER = 8

#: Where extents are more than this, blocks of more steps than this do not overlap with the next
#: one: a Program does not grow by what that would save.
FEW_EXTENTS = 4
LONG_STEPS = 8

#: Up to so many steps, those of some sets of heads go on while the next ones begin.
SHORT_STEPS = 16


class Step(Protocol):
    """One block of scores, in four parts; between them other steps have theirs."""

    def issue(self) -> None:
        """Scores, and what VectorE does to them first."""

    def weigh(self) -> None:
        """The rest of what turns scores into weights."""

    def turn(self) -> None:
        """Work of TensorE on the weights, ``lag`` steps later."""

    def finish(self) -> None:
        """Work of TensorE on what the last part gave, one more step later."""


class Block(Protocol):
    """Steps that follow each other."""

    def emit(self) -> None:
        """Takes all its steps."""

    def backwards(self, count: int) -> Sequence[Step]:
        """Its last ``count`` steps (or all), the last one first."""


@dataclass(frozen=True)
class Chain:
    """A Block that two functions make."""

    emits: Callable[[], None]
    last: Callable[[int], Sequence[Step]]

    def emit(self) -> None:
        """Takes all its steps."""
        self.emits()

    def backwards(self, count: int) -> Sequence[Step]:
        """Its last ``count`` steps (or all), the last one first."""
        return self.last(count)


class Pipeline:
    """The steps in flight: ``lag`` of them wait to be turned, one more to be finished.

    early: turn before the next step is issued, which gives TensorE work while what that step needs
        is still on its way; its own weights then have less time.
    """

    def __init__(self, b: Builder, lag: int, early: bool = False) -> None:
        self.b = b
        self.lag = lag
        self.early = early
        self.waiting: list[Step] = []

    def advance(self, step: Step) -> None:
        """Begins ``step`` and continues those before it."""
        self.waiting.append(step)
        turning = self.waiting[-1 - self.lag] if len(self.waiting) > self.lag else None
        done = self.waiting.pop(0) if len(self.waiting) > self.lag + 1 else None
        if turning is not None and self.early:
            turning.turn()
        step.issue()
        if turning is not None and not self.early:
            turning.turn()
        step.weigh()
        if done is not None:
            done.finish()

    def drain(self) -> None:
        """The work of the steps that are still in flight."""
        for at, step in enumerate(self.waiting):
            if at or len(self.waiting) <= self.lag:
                step.turn()
            if at:
                self.waiting[at - 1].finish()
        if self.waiting:
            self.waiting[-1].finish()
        self.waiting = []

    def steps(self, step: Callable[[Index], Step], trips: int, name: str) -> None:
        """``trips`` like steps: some before the loop, so that it begins with their products."""
        peeled = self.lag + 1
        for at in range(min(trips, peeled)):
            self.advance(step(at))
        if trips > peeled:
            with loop(self.b, trips - peeled, name) as n:
                self.waiting = [step(n + at) for at in range(peeled)]
                self.advance(step(n + peeled))
            self.waiting = [step(trips - peeled + at) for at in range(peeled)]

    def blocks(
        self, block: Callable[[Index], Block], trips: int, each: int, name: str, apart: bool
    ) -> None:
        """``trips`` like blocks of ``each`` steps.

        apart: finish each block before the next, which makes a shorter Program.
        """
        if trips > 1 and apart:
            self.drain()
            with loop(self.b, trips, name) as n:
                block(n).emit()
                self.drain()
            return
        peeled = min(trips, ceil_div(self.lag + 1, each))
        for at in range(peeled):
            block(at).emit()
        if trips > peeled:
            with loop(self.b, trips - peeled, name) as n:
                self._wait_for([block(n + at) for at in range(peeled)])
                block(n + peeled).emit()
            self._wait_for([block(trips - peeled + at) for at in range(peeled)])

    def _wait_for(self, blocks: Sequence[Block]) -> None:
        """The last steps of ``blocks`` are those in flight."""
        found = [step for block in reversed(blocks) for step in block.backwards(self.lag + 1)]
        self.waiting = found[: self.lag + 1][::-1]


def groups(total: int, together: int) -> list[tuple[int, int, int]]:
    """(first, trips, each) of loops over ``total``, ``together`` at a time."""
    full, rest = divmod(total, together)
    found = [(0, full, together)] if full else []
    return found + ([(full * together, 1, rest)] if rest else [])
