"""A profile as a Chrome trace, the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each device is a process. Its tracks are, from the top: operators (one per stream), launches, the
four compute engines, one per DMA queue, and a counter of the HBM allocated. The same profile
always gives the same file, byte for byte: times are written from integer picoseconds.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TextIO

from torch_trn.profiler.recording import ENGINE_NAMES, Recording
from torch_trn.profiler.spans import LAUNCH, OPERATORS, ProfileSpan, ProfileTimeline


def write(path: str | Path, timeline: ProfileTimeline, device_names: dict[int, str]) -> None:
    """Write the trace of `timeline` to `path`.

    Args:
        path: the file, overwritten if it exists.
        timeline: the spans of a profile.
        device_names: what to call the devices, by index; others are called by index alone.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write('{"displayTimeUnit":"ns","otherData":{"clock":"simulated"},"traceEvents":[')
        _write_events(file, _events(timeline, device_names))
        file.write("\n]}\n")


def _write_events(file: TextIO, events: Iterator[str]) -> None:
    separator = "\n"
    for event in events:
        file.write(separator + event)
        separator = ",\n"


def _events(timeline: ProfileTimeline, device_names: dict[int, str]) -> Iterator[str]:
    """Spans first; names and order of the tracks, known only then, last: readers allow both."""
    tracks: dict[tuple[int, str], int] = {}
    lanes = _Lanes()
    recording = timeline.recording
    details = _operator_details(recording)
    for span in timeline:
        track = lanes.place(span)
        thread = tracks.setdefault((span.device, track), len(tracks) + 1)
        if span.track.startswith(OPERATORS):
            detail = details[span.record]
        else:
            detail = f',"waited_for":{_json(span.waited_for)}' if span.waited_for else ""
        yield _span_event(span, thread, detail)
    for time_ps, device, nbytes in recording.memory.tolist():
        yield (
            f'{{"ph":"C","pid":{device + 1},"ts":{_microseconds(time_ps)},'
            f'"name":"HBM allocated","args":{{"bytes":{nbytes}}}}}'
        )
    devices = {device for device, _ in tracks} | set(recording.memory[:, 1].tolist())
    for device in sorted(devices):
        name = f"trn:{device} {device_names.get(device, '')}".rstrip()
        yield _name_event("process_name", device, None, {"name": name})
        yield _name_event("process_sort_index", device, None, {"sort_index": device})
    ordered = sorted(tracks, key=lambda key: (key[0], _track_order(key[1])))
    for position, (device, track) in enumerate(ordered, start=1):
        thread = tracks[device, track]
        yield _name_event("thread_name", device, thread, {"name": track})
        yield _name_event("thread_sort_index", device, thread, {"sort_index": position})


def _operator_details(recording: Recording) -> list[str]:
    """What an operator's span says beside its time, by record, as JSON members."""
    by_entry = {
        key: f',"bound":"{e.bound}","flops":{_json(e.flops)},"hbm_bytes":{e.hbm_bytes}'
        for key, e in recording.entries.items()
    }
    by_module = [f',"module":{_json(name)}' if name else "" for name in recording.modules]
    entries, modules = (recording.column(name).tolist() for name in ("entry", "module"))
    return [
        by_entry[entry] + by_module[module] for entry, module in zip(entries, modules, strict=True)
    ]


class _Lanes:
    """Spreads spans of one track that overlap (such as transfers of a DMA queue) over several.

    Spans of one thread of a Chrome trace must lie apart or nest, else viewers drop them.
    """

    def __init__(self) -> None:
        self._ends_ps: dict[tuple[int, str], list[int]] = {}

    def place(self, span: ProfileSpan) -> str:
        """The name of the first lane of the span's track that is free at its start."""
        ends_ps = self._ends_ps.setdefault((span.device, span.track), [])
        for lane, end_ps in enumerate(ends_ps):
            if end_ps <= span.start_ps:
                ends_ps[lane] = span.end_ps
                break
        else:
            lane = len(ends_ps)
            ends_ps.append(span.end_ps)
        return f"{span.track} ({lane + 1})" if lane else span.track


def _track_order(track: str) -> tuple[int, str]:
    if track.startswith(OPERATORS):
        return 0, track
    if track == LAUNCH:
        return 1, track
    return 2 + ENGINE_NAMES.index(track.split()[0]), track


def _span_event(span: ProfileSpan, thread: int, detail: str) -> str:
    return (
        f'{{"ph":"X","pid":{span.device + 1},"tid":{thread},"ts":{_microseconds(span.start_ps)},'
        f'"dur":{_microseconds(span.end_ps - span.start_ps)},"name":{_json(span.name)},'
        f'"args":{{"operator":{span.record}{detail}}}}}'
    )


@cache
def _json(value: str | float) -> str:
    """The JSON of a name or number; the same few come again and again."""
    return json.dumps(value)


def _name_event(kind: str, device: int, thread: int | None, arguments: dict[str, object]) -> str:
    event = {"ph": "M", "pid": device + 1, "name": kind, "args": arguments}
    if thread is not None:
        event["tid"] = thread
    return json.dumps(event, separators=(",", ":"))


def _microseconds(time_ps: int) -> str:
    """Picoseconds as microseconds in JSON, exactly."""
    sign, time_ps = ("-", -time_ps) if time_ps < 0 else ("", time_ps)
    return f"{sign}{time_ps // 1_000_000}.{time_ps % 1_000_000:06d}"
