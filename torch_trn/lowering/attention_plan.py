"""Which queries meet which keys: causal masks skip blocks, and like blocks become loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch_trn.lowering.attention_heads import BANK, Heads, tiles_of
from torch_trn.lowering.layout import PARTITIONS, ceil_div

#: Keys of one step (two PSUM banks of scores).
KEY_BLOCK = 1024

#: Bytes per partition for each key of a block, at most: of deeper heads blocks are half as long.
KEY_BYTES = 8

#: Up to this many queries, causal extents are those of each block of 128.
FINE_QUERIES = 1024

#: Causal extents of one head at most, so that a Program does not grow with the length.
MAX_EXTENTS = 32


def extents(h: Heads) -> Iterator[tuple[int, int, int, int]]:
    """(first query block, blocks, queries each, keys they see)."""
    full, rest = divmod(h.rows, PARTITIONS)
    step = max(full, 1)
    if h.causal:
        step = 1 if h.queries <= FINE_QUERIES else BANK // PARTITIONS
        step *= max(1, ceil_div(full, step * MAX_EXTENTS))
    for first in range(0, full, step):
        count = min(step, full - first)
        seen = (first + count) * PARTITIONS if h.causal else h.keys
        yield first, count, PARTITIONS, min(h.keys, seen)
    if rest:
        yield full, 1, rest, min(h.keys, h.queries) if h.causal else h.keys


@dataclass(frozen=True)
class Run:
    """``trips`` key blocks in a row of ``keys`` each, from block ``first`` on, all alike."""

    first: int
    trips: int
    keys: int
    start: bool
    end: bool
    masked: int
    """Columns at the end of the block that the causal mask touches."""


def key_block(h: Heads, itemsize: int) -> int:
    """Keys of one step."""
    deep = ceil_div(max(h.depth, h.value_depth), PARTITIONS) * itemsize > KEY_BYTES
    return max(PARTITIONS, KEY_BLOCK // 2) if deep else KEY_BLOCK


def runs_of(seen: int, masked_from: int, block: int) -> list[Run]:
    """The key blocks of ``seen`` keys; keys from ``masked_from`` on are hidden from some query."""
    blocks = ceil_div(seen, block)
    found: list[Run] = []
    for at in range(blocks):
        keys = min(block, seen - at * block)
        masked = min(keys, max(0, at * block + keys - masked_from))
        run = Run(at, 1, keys, at == 0, at == blocks - 1, masked)
        last = found[-1] if found else None
        alike = last and (last.keys, last.start, last.end, last.masked) == (
            keys, run.start, run.end, masked)  # fmt: skip
        if last and alike:
            found[-1] = Run(last.first, last.trips + 1, keys, last.start, last.end, masked)
        else:
            found.append(run)
    return found


@dataclass(frozen=True)
class Segment:
    """``trips`` blocks of ``rows`` queries from block ``first`` on, against one key block."""

    first: int
    trips: int
    rows: int
    keys: int
    """Keys of the block that these queries see."""
    hidden: int
    """Columns at their end that the causal mask touches."""
    closes: bool
    """Whether it is the last key block that these queries see."""


@dataclass(frozen=True)
class Keys:
    """``trips`` key blocks of ``keys`` from block ``first`` on, and the queries that see them."""

    first: int
    trips: int
    keys: int
    segments: tuple[Segment, ...]

    @property
    def steps(self) -> int:
        """Query blocks of one key block."""
        return sum(segment.trips for segment in self.segments)


def keys_of(h: Heads, width: int) -> list[Keys]:
    """All key blocks of up to ``width`` keys."""
    full, rest = divmod(h.keys, width)
    if not h.causal:
        blocks = ceil_div(h.keys, width)
        runs = [(0, blocks - 1, width)] if blocks > 1 else []
        runs.append((blocks - 1, 1, rest or width))
        return [
            Keys(first, trips, keys, tuple(
                Segment(at, count, rows, keys, 0, first == blocks - 1)
                for at, count, rows in tiles_of(h.rows)
            ))
            for first, trips, keys in runs
        ]  # fmt: skip
    step = max(1, ceil_div(full, MAX_EXTENTS))
    found = [
        Keys(at, min(step, full - at), width, _causal(h, at, min(step, full - at), width, width))
        for at in range(0, full, step)
    ]
    if rest:
        found.append(Keys(full, 1, rest, _causal(h, full, 1, width, rest)))
    return found


def _causal(h: Heads, block: int, trips: int, width: int, keys: int) -> tuple[Segment, ...]:
    """The queries that see ``trips`` key blocks from ``block`` on."""
    start, per = block * width // PARTITIONS, width // PARTITIONS
    full, rest = divmod(h.rows, PARTITIONS)
    tiles = full + bool(rest)
    if h.folded:
        # One query each, which sees the first key only.
        return (Segment(0, 1, h.rows, keys, 0, False),) if block == 0 else ()
    if start >= tiles:
        return ()
    final = block * width + keys >= min(h.keys, h.queries) and trips == 1
    found: list[Segment] = []
    diagonal = min(tiles, start + per * trips)
    if trips == 1:
        # The first to be issued sees all keys, so that it writes all of dK and dV.
        for at in reversed(range(start, diagonal)):
            before = (at - start) * PARTITIONS
            seen = keys if at == diagonal - 1 else min(keys, before + PARTITIONS)
            rows = PARTITIONS if at < full else rest
            found.append(Segment(at, 1, rows, seen, max(0, seen - before), True))
    else:
        found += [
            Segment(start + at, count, rows, keys, keys, False)
            for at, count, rows in tiles_of(min(h.rows, diagonal * PARTITIONS) - start * PARTITIONS)
        ]
    if diagonal < tiles:
        found += [
            Segment(diagonal + at, count, rows, keys, 0, final)
            for at, count, rows in tiles_of(h.rows - diagonal * PARTITIONS)
        ]
    return tuple(found)
