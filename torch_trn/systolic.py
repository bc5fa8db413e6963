"""The PE array, cell by cell and cycle by cycle: slow, and the check of everything faster.

Every cell holds two weights, one in use and one being loaded. In each cycle it takes a moving value
from its left neighbour and a partial sum from the one above, adds the product, and passes both on:
results travel from cell to cell, never through memory. Row p is fed p cycles after row 0, so that a
partial sum meets the matching value in every row.

    cycle      0    1    2
    row 0     x00  x01  x02  ->  cells (0, 0) (0, 1) ...     w00 x00
    row 1          x10  x11  ->  cells (1, 0) (1, 1) ...   + w10 x10   one cycle later, one row down

A load of weights follows the same wave: cell (p, j) gets its new weight p + j cycles after cell
(0, 0), into the half that the matmul before the last has left. So a load hides behind the matmul
before it; a matmul starts as soon as the sequencer issues it and the left edge has taken the one
before, which comes out as the max(64, n) cycles of `isa.NcMatmul`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Run", "SystolicArray"]

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """What a sequence of matmuls gave, and when, in cycles of the array."""

    results: tuple[Matrix, ...]
    """[m, n] of each."""
    starts: tuple[int, ...]
    """When its first moving value enters row 0."""
    ends: tuple[int, ...]
    """When its last result has left the array."""


@dataclass(frozen=True)
class _Job:
    stationary: Matrix
    moving: Matrix
    start: int


class SystolicArray:
    """``rows`` x ``columns`` cells that take a new matmul every ``min_interval`` cycles at most."""

    def __init__(self, rows: int = 128, columns: int = 128, min_interval: int = 64) -> None:
        self.rows = rows
        self.columns = columns
        self.min_interval = min_interval

    def run(self, products: Sequence[tuple[Matrix, Matrix]]) -> Run:
        """(stationary [k, m], moving [k, n]) pairs, back to back.

        Raises:
            ValueError: an operand does not fit the array, or k differs between the two.
        """
        for stationary, moving in products:
            self._check(stationary, moving)
        cells, waiting, issued = _Cells(self.rows, self.columns), list(products), -self.min_interval
        cycle = 0
        while waiting or cells.busy:
            if waiting and cells.edge_is_free and cycle >= issued + self.min_interval:
                cells.start(_Job(*waiting.pop(0), cycle))
                issued = cycle
            cells.step(cycle)
            cycle += 1
        starts = tuple(job.start for job in cells.jobs)
        return Run(tuple(cells.results), starts, tuple(cells.ends))

    def _check(self, stationary: Matrix, moving: Matrix) -> None:
        k, m = stationary.shape
        if k != moving.shape[0]:
            raise ValueError(f"stationary has k = {k}, moving {moving.shape[0]}; both must agree")
        if k > self.rows or m > self.columns:
            raise ValueError(
                f"a stationary operand of {k} x {m} does not fit an array of "
                f"{self.rows} x {self.columns}"
            )


class _Cells:
    """The registers of all cells."""

    def __init__(self, rows: int, columns: int) -> None:
        shape = (rows, columns)
        self.jobs: list[_Job] = []
        self.weights = np.zeros((2, *shape), np.float32)
        self.owner = np.full((2, *shape), -1)
        """Whose weight each half holds."""
        self.values = np.zeros(shape, np.float32)
        self.sums = np.zeros(shape, np.float32)
        self.job = np.full(shape, -1)
        """Whose value a cell holds; -1 for none."""
        self.place = np.zeros(shape, np.int64)
        """Which of its moving columns that is."""
        self.fed: list[NDArray[np.int64]] = []
        """Of each job: moving values that each row has taken."""
        self.results: list[Matrix] = []
        self.ends: list[int] = []
        self.row, self.column = np.indices(shape)

    @property
    def edge_is_free(self) -> bool:
        """Whether row 0 has taken all of the latest moving operand."""
        return not self.jobs or bool(self.fed[-1][0] == self.jobs[-1].moving.shape[1])

    @property
    def busy(self) -> bool:
        """Whether a value is still to be fed or on its way."""
        waiting = any(
            (fed < job.moving.shape[1]).any() for job, fed in zip(self.jobs, self.fed, strict=True)
        )
        return waiting or bool((self.job >= 0).any())

    def start(self, job: _Job) -> None:
        """A matmul is issued: its weights and its moving operand begin to enter."""
        self.jobs.append(job)
        self.fed.append(np.zeros(len(self.values), np.int64))
        shape = (job.stationary.shape[1], job.moving.shape[1])
        self.results.append(np.full(shape, np.nan, np.float32))
        self.ends.append(0)

    def step(self, cycle: int) -> None:
        """One cycle: results leave at the bottom, everything moves on, the left edge is fed."""
        self._load(cycle)
        above = np.vstack([np.zeros((1, self.sums.shape[1]), np.float32), self.sums[:-1]])
        self.values = np.hstack([np.zeros((len(self.values), 1), np.float32), self.values[:, :-1]])
        self.job = np.hstack([np.full((len(self.job), 1), -1), self.job[:, :-1]])
        self.place = np.hstack([np.zeros((len(self.place), 1), np.int64), self.place[:, :-1]])
        self._feed(cycle)
        half = self.job % 2
        weight = np.where(half == 0, self.weights[0], self.weights[1])
        owner = np.where(half == 0, self.owner[0], self.owner[1])
        assert ((owner == self.job) | (self.job < 0)).all(), "a weight was replaced while in use"
        product = weight * self.values
        self.sums = np.where(self.job >= 0, above + product, np.float32(0))
        self._drain(cycle)

    def _load(self, cycle: int) -> None:
        """Weights that reach their cell in this cycle: just before the first value that needs
        them, into the half that nobody uses any more."""
        for number, job in enumerate(self.jobs):
            wave = self.row + self.column == cycle - job.start
            if not wave.any():
                continue
            k, m = job.stationary.shape
            padded = np.zeros(wave.shape, np.float32)
            padded[:k, :m] = job.stationary
            self.weights[number % 2][wave] = padded[wave]
            self.owner[number % 2][wave] = number

    def _feed(self, cycle: int) -> None:
        for number, job in enumerate(self.jobs):
            k, n = job.moving.shape
            rows = np.arange(len(self.values))
            place = cycle - job.start - rows
            fed = rows[(place >= 0) & (place < n)]
            self.job[fed, 0] = number
            self.place[fed, 0] = place[fed]
            self.fed[number][fed] += 1
            inside = fed[fed < k]
            self.values[inside, 0] = job.moving[inside, place[inside]]

    def _drain(self, cycle: int) -> None:
        for column in range(self.sums.shape[1]):
            number = int(self.job[-1, column])
            if number < 0:
                continue
            result = self.results[number]
            if column < result.shape[0]:
                result[column, int(self.place[-1, column])] = self.sums[-1, column]
            self.ends[number] = max(self.ends[number], cycle + 1)
