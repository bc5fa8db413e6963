"""What filled the HBM when it was fullest: by category, and which operator of which module made it.

A profile with `memory=True` logs every block that is taken or returned, in order, with the operator
and module that did it, and marks those whose purpose is known (`torch_trn.profiler.memory_mark`).
Here the log is replayed. Every block that is live at the peak is in one category, by the first rule
that holds:

1. parameters: parameters and buffers of modules, and other leaf tensors that require a gradient.
2. gradients: what `.grad` of one of those is.
3. optimizer state: tensors in the `state` of an optimizer.
4. activations: made outside backward and live when an operator of a later backward pass takes or
   returns HBM (inputs and targets too), or made in a call of a module and live when it ends. What
   a checkpoint recomputes counts as made outside backward; so does a backward pass that the
   forward of a module itself calls.
5. temporaries: all other blocks. A model that no one calls, steps, or holds at the profile's end
   is among them.

A block is in one category for all its life, so what it becomes later decides what it is at the
peak. The bytes are those of whole blocks, as `torch.trn.memory_allocated` counts them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from torch_trn.config import format_bytes

LogEvent = tuple[int, bool, int, int, int, int, int, str]
"""kind, backward, device, mark, address, bytes, module, operator."""


class EventKind(IntEnum):
    """What a log event says; the native side has the same values."""

    FOUND = 0
    ALLOCATED = 1
    FREED = 2
    MARKED = 3
    MODULE_LEFT = 4
    REFUSED = 5


class Mark(IntEnum):
    """What is known of a marked block. Of several marks the lowest holds."""

    PARAMETER = 1
    GRADIENT = 2
    OPTIMIZER_STATE = 3


ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
_OF_MARK = {
    Mark.PARAMETER: "parameters",
    Mark.GRADIENT: "gradients",
    Mark.OPTIMIZER_STATE: "optimizer state",
}
CATEGORIES = (*_OF_MARK.values(), ACTIVATIONS, TEMPORARIES)


@dataclass(frozen=True, kw_only=True)
class MemoryBlock:
    """A block of HBM that was live at the peak."""

    nbytes: int
    category: str
    """One of `CATEGORIES`."""
    operator: str
    """That allocated it; 'aten::empty' also for copies from the host."""
    module: str
    """Where; empty outside modules and for blocks that were there before the profile."""


@dataclass(frozen=True, kw_only=True)
class MemoryPeak:
    """One device when most of its HBM was allocated, for the first time in a profile.

    The five categories add up to `peak_bytes`.
    """

    device: int
    peak_bytes: int
    operator: str
    """Whose allocation made the peak; empty when the peak was there before the profile."""
    module: str
    """Of that operator; of one in backward, the module whose forward it belongs to."""
    blocks: tuple[MemoryBlock, ...]
    """All live blocks, the largest first."""

    @property
    def parameter_bytes(self) -> int:
        """Parameters and buffers."""
        return self.category_bytes["parameters"]

    @property
    def gradient_bytes(self) -> int:
        """Gradients of parameters."""
        return self.category_bytes["gradients"]

    @property
    def optimizer_state_bytes(self) -> int:
        """Tensors that an optimizer keeps between steps."""
        return self.category_bytes["optimizer state"]

    @property
    def activation_bytes(self) -> int:
        """What forward passes on, or keeps for backward."""
        return self.category_bytes[ACTIVATIONS]

    @property
    def temporary_bytes(self) -> int:
        """Everything else."""
        return self.category_bytes[TEMPORARIES]

    @property
    def category_bytes(self) -> dict[str, int]:
        """Bytes by category, in the order of `CATEGORIES`."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for block in self.blocks:
            sums[block.category] += block.nbytes
        return sums

    @property
    def origin(self) -> str:
        """The operator of the peak and its module as a phrase."""
        if not self.operator:
            return "before the profile"
        return f"in {self.operator}" + (f" of {self.module}" if self.module else "")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The first allocation for which a device had no room."""

    device: int
    nbytes: int
    """What was asked for."""
    operator: str
    module: str


@dataclass(kw_only=True)
class _Life:
    """A block from its allocation to its end, as positions in the log."""

    device: int
    nbytes: int
    start: int
    end: float = math.inf
    operator: str
    module: int
    backward: bool
    mark: int = 0


@dataclass
class _Replay:
    """The log of one profile, read once."""

    lives: list[_Life] = field(default_factory=list)
    peaks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each device: most bytes allocated, and the first position with that many."""
    backward: dict[int, list[int]] = field(default_factory=dict)
    """Of each device: positions of what autograd nodes did."""
    left: dict[int, list[int]] = field(default_factory=dict)
    """Of each module: positions of the ends of its calls."""

    def category(self, life: _Life) -> str:
        """By the rules at the top of this file."""
        if life.mark:
            return _OF_MARK[Mark(life.mark)]
        kept = not life.backward and (
            _within(self.backward.get(life.device, []), life)
            or _within(self.left.get(life.module, []), life)
        )
        return ACTIVATIONS if kept else TEMPORARIES


def _within(positions: list[int], life: _Life) -> bool:
    """Whether one of the sorted positions is strictly inside the life of a block."""
    index = bisect_right(positions, life.start)
    return index < len(positions) and positions[index] < life.end


def _replay(log: Iterable[LogEvent]) -> _Replay:
    replay = _Replay()
    live: dict[tuple[int, int], _Life] = {}
    levels: dict[int, int] = {}
    for position, event in enumerate(log):
        kind, backward, device, mark, address, nbytes, module, operator = event
        if backward:
            replay.backward.setdefault(device, []).append(position)
        if kind in (EventKind.FOUND, EventKind.ALLOCATED):
            life = _Life(
                device=device, nbytes=nbytes, start=position, operator=operator, module=module,
                backward=backward,
            )  # fmt: skip
            replay.lives.append(life)
            live[device, address] = life
            levels[device] = levels.get(device, 0) + nbytes
            if levels[device] > replay.peaks.get(device, (0, 0))[0]:
                replay.peaks[device] = levels[device], position
        elif kind == EventKind.FREED:
            live.pop((device, address)).end = position
            levels[device] -= nbytes
        elif kind == EventKind.MARKED and (device, address) in live:
            marked = live[device, address]
            marked.mark = min(mark, marked.mark or mark)
        elif kind == EventKind.MODULE_LEFT and module:
            replay.left.setdefault(module, []).append(position)
    return replay


def peaks(log: Sequence[LogEvent], modules: Sequence[str]) -> dict[int, MemoryPeak]:
    """The peak of each device that held a block.

    Args:
        log: of the profile, in order.
        modules: module paths by id.
    """
    replay = _replay(log)
    return {
        device: _peak(replay, device, log[position], position, modules)
        for device, (_, position) in sorted(replay.peaks.items())
    }


def _peak(
    replay: _Replay, device: int, event: LogEvent, position: int, modules: Sequence[str]
) -> MemoryPeak:
    blocks = [
        MemoryBlock(
            nbytes=life.nbytes,
            category=replay.category(life),
            operator=life.operator,
            module=modules[life.module],
        )
        for life in replay.lives
        if life.device == device and life.start <= position < life.end
    ]
    during = event[0] != EventKind.FOUND
    return MemoryPeak(
        device=device,
        peak_bytes=sum(block.nbytes for block in blocks),
        operator=event[7] if during else "",
        module=modules[event[6]] if during else "",
        blocks=tuple(sorted(blocks, key=lambda block: -block.nbytes)),
    )


def refusals(log: Sequence[LogEvent], modules: Sequence[str]) -> dict[int, Refusal]:
    """The first refusal of each device that refused, in the order of the refusals."""
    found: dict[int, Refusal] = {}
    for kind, _, device, _, _, nbytes, module, operator in log:
        if kind == EventKind.REFUSED and device not in found:
            found[device] = Refusal(
                device=device, nbytes=nbytes, operator=operator, module=modules[module]
            )
    return found


def fullest(by_device: Mapping[int, MemoryPeak]) -> MemoryPeak:
    """The highest peak, of equals that of the first device; an empty one without any."""
    empty = MemoryPeak(device=0, peak_bytes=0, operator="", module="", blocks=())
    return max(by_device.values(), key=lambda peak: peak.peak_bytes, default=empty)


def text(peak: MemoryPeak, *, limit: int) -> str:
    """A peak to read: bytes by category, then the `limit` largest blocks.

    Raises:
        ValueError: a `limit` below 0.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}; it must be 0 or more blocks to show")
    # tabulate takes 0.1 s to import.
    from tabulate import tabulate

    counts = dict.fromkeys(CATEGORIES, 0)
    for block in peak.blocks:
        counts[block.category] += 1
    rows = [
        (category, format_bytes(nbytes), _share(nbytes, peak.peak_bytes), f"{counts[category]:,}")
        for category, nbytes in peak.category_bytes.items()
    ]
    rows.append(("total", format_bytes(peak.peak_bytes), _share(1, 1), f"{len(peak.blocks):,}"))
    body = tabulate(
        rows,
        headers=("category", "bytes", "share", "blocks"),
        colalign=("left", "right", "right", "right"),
        disable_numparse=True,
    )
    lines = [f"trn:{peak.device} at its peak, {peak.origin}:", body]
    shown = peak.blocks[:limit]
    if shown:
        largest = tabulate(
            [(format_bytes(b.nbytes), b.category, b.operator, b.module) for b in shown],
            headers=("largest", "category", "operator", "module"),
            colalign=("right", "left", "left", "left"),
            disable_numparse=True,
        )
        lines += ["", *(line.rstrip() for line in largest.splitlines())]
    return "\n".join(lines)


def _share(nbytes: int, total_bytes: int) -> str:
    return f"{nbytes / total_bytes:.1%}" if total_bytes else "-"
