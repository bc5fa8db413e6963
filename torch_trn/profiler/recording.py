"""What one profile recorded: executed operators and HBM levels, as plain data.

A `Recording` holds the records as integer columns, so a hundred thousand of them cost a few
megabytes and are summed in one pass. Tables and traces are views of it; nothing here touches a
device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from torch_trn import runtime

ENGINE_NAMES = runtime.ENGINES
"""In the order of `busy_ps`."""

BOUNDS = runtime.BOUNDS

RECORD_FIELDS = (
    "entry",
    "device",
    "stream",
    "start_ps",
    "duration_ps",
    "launch_ps",
    "module",
    "stack",
    "sequence",
)
"""The columns of a record. `duration_ps` is launch and kernel: what the core was occupied for."""

_COLUMN = {name: index for index, name in enumerate(RECORD_FIELDS)}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An operator with one set of argument shapes: what all records of it have in common."""

    name: str
    duration_ps: int
    """Of the kernel, without its launch."""
    busy_ps: tuple[int, ...]
    """Of each engine, in the order of `ENGINE_NAMES`."""
    flops: float
    """Multiplies and adds of TensorE."""
    hbm_bytes: int
    bound: str
    host: bool
    """Whether it ran on the host, for want of a Program."""
    host_reason: str = ""
    """Why there is no Program."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the tensors among its arguments, in order."""
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype whose peak its flops are measured against: its first floating one."""
        floating = (dtype for dtype in self.dtypes if dtype.is_floating_point)
        return next(floating, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What one device could do at most; the denominators of MFU, MBU and other shares."""

    flops: Mapping[torch.dtype, float]
    """Operations a second by dtype; dtypes without an entry have that of float32."""
    hbm_bytes_per_s: float
    dma_bytes_per_s: float
    """What DMA can move of that: the rate that memory-bound operators can reach."""

    def seconds_of_flops(self, entry: Entry) -> float:
        """How long the flops of `entry` would take at the peak."""
        return entry.flops / self.flops.get(entry.matmul_dtype, self.flops[torch.float32])


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One profile, finished.

    `columns` is int64 of shape (records, len(RECORD_FIELDS)), ordered by start, then device, then
    stream. `memory` is int64 of shape (events, 3): picoseconds, device, bytes allocated from then
    on. All times are since the profile started.
    """

    columns: "np.ndarray[Any, np.dtype[np.int64]]"
    memory: "np.ndarray[Any, np.dtype[np.int64]]"
    entries: Mapping[int, Entry]
    modules: Sequence[str]
    """Module paths by id; id 0 is none."""
    stacks: Sequence[tuple[str, ...]]
    """Python stacks by id, innermost frame first; id 0 is none."""
    peak: Peak

    def __len__(self) -> int:
        return len(self.columns)

    def column(self, name: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """One column of the records by its name in `RECORD_FIELDS`."""
        return self.columns[:, _COLUMN[name]]

    @cached_property
    def total_ps(self) -> int:
        """The sum of all records' durations."""
        return int(self.column("duration_ps").sum())

    @cached_property
    def elapsed_ps(self) -> int:
        """From the start of the first record to the end of the last; 0 without records."""
        if not len(self):
            return 0
        start_ps = self.column("start_ps")
        return int((start_ps + self.column("duration_ps")).max() - start_ps.min())

    @cached_property
    def busy_ps(self) -> tuple[int, ...]:
        """The sum of all records' busy times, by engine in the order of `ENGINE_NAMES`."""
        ids, calls = np.unique(self.column("entry"), return_counts=True)
        return tuple(
            sum(
                self.entries[int(entry)].busy_ps[engine] * int(count)
                for entry, count in zip(ids, calls, strict=True)
            )
            for engine in range(len(ENGINE_NAMES))
        )


def sorted_columns(
    records: Iterable[tuple[int, ...]], origin_ps: int
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Records as columns, in an order that does not depend on which thread came first.

    Args:
        records: tuples in the order of `RECORD_FIELDS`.
        origin_ps: the clock at the profile's start, from which times count from here on.
    """
    columns = np.array(list(records), dtype=np.int64).reshape(-1, len(RECORD_FIELDS))
    columns[:, _COLUMN["start_ps"]] -= origin_ps
    keys = [columns[:, _COLUMN[name]] for name in ("sequence", "stream", "device", "start_ps")]
    return columns[np.lexsort(keys)]


def sorted_memory(
    events: Iterable[tuple[int, int, int]], origin_ps: int
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """HBM levels (picoseconds, device, bytes) by time; those of one device keep their order."""
    memory = np.array(list(events), dtype=np.int64).reshape(-1, 3)
    memory[:, 0] -= origin_ps
    return memory[np.lexsort((memory[:, 1], memory[:, 0]))]
