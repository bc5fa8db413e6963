"""The timeline of a profile: every operator, launch, engine and DMA span, by device and track.

An operator's spans on the engines are those of its Program's Timeline, moved to where its kernel
started; they add up to the operator's busy times. A copy between devices has no Program: it keeps
the DMA engines busy for its whole time. An operator that ran on the host keeps none busy.

A Program is scheduled for the physical core with the largest share of the work, so with LNC=2 what
is shown is what the busier core of the device did.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch_trn.profiler.recording import ENGINE_NAMES, Entry, Recording
from torch_trn.timeline import Timeline

TimelineOf = Callable[[int], Timeline | None]
"""The Timeline of an entry's Program by the entry's id; None if it has no Program."""

OPERATORS, LAUNCH = "operators", "launch"

_Template = tuple[str, str, int, int, str]
"""(track, name, start, end, waited for) of a span of a kernel; times since the kernel's start."""


@dataclass(frozen=True, slots=True)
class ProfileSpan:
    """What one track of a device did from `start_ps` to `end_ps` (since the profile's start)."""

    device: int
    track: str
    """'operators' (or 'operators of stream 3'), 'launch', an engine, or a queue as 'DMA load'."""
    name: str
    start_ps: int
    end_ps: int
    record: int
    """The operator it belongs to: its index in `records()`."""
    waited_for: str = ""


@dataclass(frozen=True)
class ProfileTimeline:
    """All spans of a profile, with the sums that they come to. `str` gives the sums as text."""

    recording: Recording
    timeline_of: TimelineOf

    @property
    def duration_ps(self) -> int:
        """From the start of the first operator to the end of the last."""
        return self.recording.elapsed_ps

    @property
    def busy_ps(self) -> tuple[int, ...]:
        """Busy time by engine, summed over operators and devices, in `ENGINE_NAMES`' order."""
        return self.recording.busy_ps

    @cached_property
    def spans(self) -> tuple[ProfileSpan, ...]:
        """Every span, operator by operator; iterate over the timeline to keep none in memory."""
        return tuple(self)

    def __iter__(self) -> Iterator[ProfileSpan]:
        names = ("entry", "device", "stream", "start_ps", "duration_ps", "launch_ps")
        columns = [self.recording.column(name).tolist() for name in names]
        templates: dict[int, tuple[_Template, ...]] = {}
        for record, (entry, device, stream, start, duration, launch) in enumerate(
            zip(*columns, strict=True)
        ):
            if entry not in templates:
                timeline = self.timeline_of(entry)
                templates[entry] = tuple(
                    _copy_spans(self.recording.entries[entry])
                    if timeline is None
                    else _kernel_spans(timeline)
                )
            name = self.recording.entries[entry].name
            track = f"{OPERATORS} of stream {stream}" if stream else OPERATORS
            yield ProfileSpan(device, track, name, start, start + duration, record)
            if launch:
                yield ProfileSpan(device, LAUNCH, name, start, start + launch, record)
            kernel = start + launch
            for track, span_name, start_ps, end_ps, waited_for in templates[entry]:
                yield ProfileSpan(
                    device, track, span_name, kernel + start_ps, kernel + end_ps, record, waited_for
                )

    def __str__(self) -> str:
        lines = [
            f"{len(self.recording)} operators in {self.duration_ps / 1e6:,.1f} us "
            f"(their sum: {self.recording.total_ps / 1e6:,.1f} us)"
        ]
        lines += [
            f"  {name:8} {busy_ps / 1e6:14,.1f} us busy"
            for name, busy_ps in zip(ENGINE_NAMES, self.busy_ps, strict=True)
        ]
        return "\n".join(lines)


def _kernel_spans(timeline: Timeline) -> Iterator[_Template]:
    for span in timeline.spans:
        engine = str(span.engine)
        track = f"{engine} {span.queue}" if engine == "DMA" else engine
        yield track, span.name, span.start_ps, span.end_ps, span.waited_for


def _copy_spans(entry: Entry) -> Iterator[_Template]:
    """One span per engine that an operator without a Program kept busy."""
    for engine, busy_ps in zip(ENGINE_NAMES, entry.busy_ps, strict=True):
        if busy_ps:
            yield f"{engine} copy" if engine == "DMA" else engine, "dma_copy", 0, busy_ps, ""
