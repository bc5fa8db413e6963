"""The table of a profile: what took the simulated time, and what each operator was bound by.

A sample (group_by="operator"):

    operator               calls    total us    mean us    share  bound      TFLOP/s    MFU ...
    -------------------  -------  ----------  ---------  -------  -------  ---------  -----
    aten::mm                  72     1,234.5      17.15    61.2%  TensorE      10.41  52.9%
    aten::erfinv [host]        1       782.9     782.90    38.8%  Host             -      -
    total                     73     2,017.4      27.64   100.0%               10.41  32.4%
    [host]: 1 operator (1 call, 38.8% of the time) ran on the host; TRN_STRICT=1 forbids that:
      aten::erfinv: no engine computes it
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from torch_trn.config import format_bytes
from torch_trn.profiler.recording import Entry, Recording

GROUPS = ("operator", "shapes", "module", "stack", "device", "bound")
HOST_MARK = " [host]"
_PS_PER_US = 1_000_000
_PS_PER_S = 10**12


@dataclass(kw_only=True)
class Row:
    """The sum of the records with one key. Times include launches."""

    key: str
    calls: int = 0
    total_ps: int = 0
    flops: float = 0.0
    peak_flops_s: float = 0.0
    """Seconds that the flops would take at the peak of their dtypes."""
    hbm_bytes: int = 0
    bound_ps: Counter[str] = field(default_factory=Counter)

    @property
    def mean_ps(self) -> float:
        """Mean duration of a call."""
        return self.total_ps / self.calls if self.calls else 0.0

    @property
    def bound(self) -> str:
        """What the largest part of the time was bound by; of equals the first by name."""
        return min(self.bound_ps, key=lambda name: (-self.bound_ps[name], name), default="")

    @property
    def mfu(self) -> float:
        """The share of TensorE's peak that the flops came to over the whole time."""
        return self.peak_flops_s * _PS_PER_S / self.total_ps if self.total_ps else 0.0

    def mbu(self, hbm_bytes_per_s: float) -> float:
        """The share of HBM's peak that the traffic came to over the whole time."""
        peak_bytes = hbm_bytes_per_s * self.total_ps / _PS_PER_S
        return self.hbm_bytes / peak_bytes if peak_bytes else 0.0

    def add(self, other: "Row") -> None:
        """Count the records of `other` in."""
        self.calls += other.calls
        self.total_ps += other.total_ps
        self.flops += other.flops
        self.peak_flops_s += other.peak_flops_s
        self.hbm_bytes += other.hbm_bytes
        self.bound_ps.update(other.bound_ps)


_SORT_KEYS: dict[str, Callable[[Row], float]] = {
    "total": lambda row: row.total_ps,
    "mean": lambda row: row.mean_ps,
    "calls": lambda row: row.calls,
    "flops": lambda row: row.flops,
    "hbm_bytes": lambda row: row.hbm_bytes,
    "mfu": lambda row: row.mfu,
    "name": lambda row: 0,
}
SORTS = tuple(_SORT_KEYS)


def rows(recording: Recording, *, group_by: str = "operator", sort_by: str = "total") -> list[Row]:
    """The records summed by key, largest first; equal rows, and sort_by="name", by the key.

    Raises:
        ValueError: an unknown `group_by` or `sort_by`, or a grouping by what was not recorded.
    """
    _check_choice("group_by", group_by, GROUPS)
    _check_choice("sort_by", sort_by, SORTS)
    for group, recorded in (("module", recording.modules), ("stack", recording.stacks)):
        if group_by == group and len(recorded) <= 1 and len(recording):
            raise ValueError(
                f"group_by={group!r}: none was recorded; "
                f"profile with torch_trn.profile({group}s=True)"
            )
    key_of = _key_functions(recording)[group_by]
    grouped: dict[str, Row] = {}
    for (entry, *ids), cell in _cells(recording):
        key = key_of(recording.entries[entry], *ids)
        grouped.setdefault(key, Row(key=key)).add(cell)
    sort_key = _SORT_KEYS[sort_by]
    return sorted(grouped.values(), key=lambda row: (-sort_key(row), row.key))


def total_row(recording: Recording) -> Row:
    """The sum of all records."""
    total = Row(key="total")
    for _, cell in _cells(recording):
        total.add(cell)
    return total


def text(
    recording: Recording,
    *,
    group_by: str = "operator",
    sort_by: str = "total",
    limit: int | None = None,
) -> str:
    """The table to print. Rows beyond `limit` are summed into one, so that the column adds up.

    Raises:
        ValueError: see `rows`; also a `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    # tabulate takes 0.1 s to import, which `import torch` would have to pay.
    from tabulate import tabulate

    shown = rows(recording, group_by=group_by, sort_by=sort_by)
    if limit is not None and len(shown) > limit:
        rest = Row(key=f"({len(shown) - limit} more)")
        for row in shown[limit:]:
            rest.add(row)
        shown = [*shown[:limit], rest]
    total = total_row(recording)
    headers = (
        group_by, "calls", "total us", "mean us", "share", "bound",
        "TFLOP/s", "MFU", "HBM bytes", "MBU",
    )  # fmt: skip
    body = tabulate(
        [_texts(row, recording, total.total_ps) for row in (*shown, total)],
        headers=headers,
        colalign=["left" if name in (group_by, "bound") else "right" for name in headers],
        disable_numparse=True,
    )
    return "\n".join([body, *_notes(recording, total.total_ps)])


def _cells(recording: Recording) -> Iterator[tuple[tuple[int, ...], Row]]:
    """The sums over records that agree in (entry, module, stack, device): all that a key reads."""
    if not len(recording):
        return
    names = ("entry", "module", "stack", "device")
    ids = np.stack([recording.column(name) for name in names], axis=1)
    order = np.lexsort(ids.T)
    ids = ids[order]
    starts = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]).any(axis=1)])
    totals_ps = np.add.reduceat(recording.column("duration_ps")[order], starts)
    calls = np.diff(np.r_[starts, len(ids)])
    for key, total_ps, count in zip(ids[starts], totals_ps, calls, strict=True):
        entry = recording.entries[int(key[0])]
        yield (
            tuple(int(part) for part in key),
            Row(
                key="",
                calls=int(count),
                total_ps=int(total_ps),
                flops=entry.flops * int(count),
                peak_flops_s=recording.peak.seconds_of_flops(entry) * int(count),
                hbm_bytes=entry.hbm_bytes * int(count),
                bound_ps=Counter({entry.bound: int(total_ps)}),
            ),
        )


def _key_functions(recording: Recording) -> dict[str, Callable[[Entry, int, int, int], str]]:
    """The text of a row's first column, from the entry and the ids of module, stack and device."""
    return {
        "operator": lambda entry, module, stack, device: _operator(entry),
        "shapes": lambda entry, module, stack, device: f"{_operator(entry)} {_shapes(entry)}",
        "module": lambda entry, module, stack, device: recording.modules[module] or "(no module)",
        "stack": lambda entry, module, stack, device: (
            "\n".join(recording.stacks[stack]) or "(no Python stack)"
        ),
        "device": lambda entry, module, stack, device: f"trn:{device}",
        "bound": lambda entry, module, stack, device: entry.bound,
    }


def _operator(entry: Entry) -> str:
    return entry.name + HOST_MARK if entry.host else entry.name


def _shapes(entry: Entry) -> str:
    return ", ".join(str(list(shape)) for shape in entry.shapes)


def _texts(row: Row, recording: Recording, all_ps: int) -> tuple[str, ...]:
    return (
        row.key,
        f"{row.calls:,}",
        f"{row.total_ps / _PS_PER_US:,.1f}",
        f"{row.mean_ps / _PS_PER_US:,.2f}",
        f"{row.total_ps / all_ps:.1%}" if all_ps else "-",
        "" if row.key == "total" else row.bound,
        f"{row.flops / row.total_ps:.2f}" if row.flops else "-",  # flops per ps are TFLOP/s
        f"{row.mfu:.1%}" if row.flops else "-",
        format_bytes(row.hbm_bytes) if row.hbm_bytes else "-",
        f"{row.mbu(recording.peak.hbm_bytes_per_s):.1%}" if row.hbm_bytes else "-",
    )


def _notes(recording: Recording, all_ps: int) -> list[str]:
    """The lines below the table that say what ran on the host, and why; none if nothing did."""
    host = Row(key="")
    reasons: dict[str, set[str]] = {}
    for (entry_id, *_), cell in _cells(recording):
        entry = recording.entries[entry_id]
        if entry.host:
            host.add(cell)
            reasons.setdefault(entry.name, set()).add(entry.host_reason)
    if not reasons:
        return []
    operators = "1 operator" if len(reasons) == 1 else f"{len(reasons)} operators"
    calls = "1 call" if host.calls == 1 else f"{host.calls:,} calls"
    title = (
        f"{HOST_MARK.strip()}: {operators} ({calls}, {host.total_ps / all_ps:.1%} of the time) ran "
        "on the host; TRN_STRICT=1 forbids that:"
    )
    return [title, *(f"  {name}: {'; '.join(sorted(reasons[name]))}" for name in sorted(reasons))]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choices: {', '.join(choices)}")
