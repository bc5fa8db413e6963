"""Why the operators that took most of a profile took their time, as text.

A sample:

    1. aten::mm [512, 1024], [1024, 4096]: 1 call, 55.0 us, 9.0% of the time, bound by DMA. Its
       launch is 11.5 us. Its kernel of 43.5 us keeps busy: TensorE 62.8%, VectorE 11.6%, ScalarE
       10.1%, DMA 78.7%. DMA, the busiest, waits 8.0 us (18.3%) for the data of result and has
       nothing left to do for the last 1.3 us (3.0%). It moves 21.00 MiB of HBM at 506.4 GB/s, 69.8%
       of the usable 725.0 GB/s. TensorE does 98.77 TFLOP/s, 62.8% of its peak.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from torch_trn.config import format_bytes
from torch_trn.profiler.recording import ENGINE_NAMES, Entry, Peak, Recording
from torch_trn.timeline import Timeline

TimelineOf = Callable[[int], Timeline | None]
"""The Timeline of an entry's Program by the entry's id, without spans; None without a Program."""

_US = 1_000_000
_CAUSES = 3
"""So many of the things that an engine waited for are named, the longest first."""
_SHAPES = 4
"""So many shapes are printed; a foreach operator has hundreds."""
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """All records of one entry together."""

    key: int
    entry: Entry
    calls: int
    total_ps: int
    launch_ps: int


def text(recording: Recording, timeline_of: TimelineOf, *, limit: int = 5) -> str:
    """A paragraph for each of the `limit` operators (with their shapes) that took most time.

    Raises:
        ValueError: a `limit` below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    groups = _groups(recording)
    lines = []
    for rank, group in enumerate(groups[:limit], start=1):
        sentences = _sentences(group, recording, timeline_of(group.key))
        head = f"{rank}. "
        lines.append(
            textwrap.fill(
                head + " ".join(sentences), width=_WIDTH, subsequent_indent=" " * len(head),
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip
    return "\n".join(lines)


def _groups(recording: Recording) -> list[_Calls]:
    """The records by entry, those with the longest total first; equal ones by name and id."""
    entries, duration_ps, launch_ps = (
        recording.column(name) for name in ("entry", "duration_ps", "launch_ps")
    )
    groups = []
    for key in np.unique(entries).tolist():
        own = entries == key
        groups.append(
            _Calls(
                key=key, entry=recording.entries[key], calls=int(own.sum()),
                total_ps=int(duration_ps[own].sum()), launch_ps=int(launch_ps[own].sum()),
            )
        )  # fmt: skip
    return sorted(groups, key=lambda group: (-group.total_ps, group.entry.name, group.key))


def _sentences(group: _Calls, recording: Recording, timeline: Timeline | None) -> Iterator[str]:
    entry, calls = group.entry, group.calls
    shapes = ", ".join(str(list(shape)) for shape in entry.shapes[:_SHAPES])
    if len(entry.shapes) > _SHAPES:
        shapes += f" and {len(entry.shapes) - _SHAPES} more"
    each = f", {_us(group.total_ps / calls)} each" if calls > 1 else ""
    yield (
        f"{entry.name}{' ' * bool(shapes)}{shapes}: {calls:,} call{'s' * (calls > 1)}, "
        f"{_us(group.total_ps)}{each}, {group.total_ps / max(recording.total_ps, 1):.1%} of the "
        f"time, bound by {entry.bound}."
    )
    if entry.host:
        yield f"No NeuronCore ran it: {entry.host_reason}. Its time is that of its way over PCIe."
        return
    if group.launch_ps:
        yield f"Its launch is {_us(group.launch_ps / calls)}."
    if not entry.duration_ps:
        return
    busy = [
        f"{name} {busy_ps / entry.duration_ps:.1%}"
        for name, busy_ps in zip(ENGINE_NAMES, entry.busy_ps, strict=True)
        if busy_ps
    ]
    if busy:
        yield f"Its kernel of {_us(entry.duration_ps)} keeps busy: {', '.join(busy)}."
    if timeline is not None and busy:
        yield _waits(timeline)
    yield from _rates(entry, recording.peak)
    if timeline is not None and timeline.limiter_ps:
        share = timeline.limiter_ps / timeline.duration_ps
        yield f"Of TensorE's time the power limiter takes {_us(timeline.limiter_ps)} ({share:.1%})."


def _waits(timeline: Timeline) -> str:
    """What kept the engine with most to do from doing it."""
    busiest = max(range(len(ENGINE_NAMES)), key=lambda engine: timeline.busy_ps[engine])
    name, idle_ps = ENGINE_NAMES[busiest], dict(timeline.idle_ps[busiest])
    end_ps = idle_ps.pop("end", 0)
    longest = sorted(idle_ps.items(), key=lambda item: (-item[1], item[0]))

    def time(ps: int) -> str:
        return f"{_us(ps)} ({ps / timeline.duration_ps:.1%})"

    waited = [f"{time(ps)} for {_cause(cause)}" for cause, ps in longest[:_CAUSES]]
    if longest[_CAUSES:]:
        waited.append(f"{time(sum(ps for _, ps in longest[_CAUSES:]))} for other things")
    parts = [f"waits {', '.join(waited)}"] if waited else ["never waits"]
    if end_ps:
        parts.append(f"has nothing left to do for the last {time(end_ps)}")
    return f"{name}, the busiest, {' and '.join(parts)}."


def _cause(cause: str) -> str:
    """'the data of x' for 'tile x'; see `Timeline.idle_ps`."""
    kind, _, pool = cause.partition(" ")
    names: Mapping[str, str] = {
        "tile": f"the data of {pool}",
        "slot": f"a free slot of {pool}",
        "queue": "the few engines of a transfer's partitions",
    }
    return names[kind]


def _rates(entry: Entry, peak: Peak) -> Iterator[str]:
    if entry.hbm_bytes:
        rate, usable = entry.hbm_bytes * 10**12 / entry.duration_ps, peak.dma_bytes_per_s
        yield (
            f"It moves {format_bytes(entry.hbm_bytes)} of HBM at {rate / 1e9:.1f} GB/s, "
            f"{rate / usable:.1%} of the usable {usable / 1e9:.1f} GB/s."
        )
    if entry.flops:
        rate = entry.flops / entry.duration_ps  # flops per ps are TFLOP/s
        share = peak.seconds_of_flops(entry) * 10**12 / entry.duration_ps
        yield f"TensorE does {rate:.2f} TFLOP/s, {share:.1%} of its peak."


def _us(ps: float) -> str:
    return f"{ps / _US:,.1f} us"
