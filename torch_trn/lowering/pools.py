"""Which pool each value of a Kernel lives in, and how an operand becomes DMA descriptors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch_trn.lowering.extent import Extent
from torch_trn.lowering.layout import PARTITIONS, Operand, ceil_div
from torch_trn.lowering.tile import REDUCING, Step, Value

if TYPE_CHECKING:
    from torch_trn.lowering.kernel import Geometry, Kernel

#: Stages of a kernel: once, once per column chunk, once per tile.
STAGES = ("once", "row", "tile")


@dataclass
class Slot:
    """One pool of full tiles, shared by values that are never alive together."""

    column_bytes: int
    slots: int
    values: list[Value] = field(default_factory=list)


def stage_of(step: Step) -> str:
    """The stage a step belongs to: constants are filled once, row values once per chunk."""
    if step.kind == "memset" and step.outs[0].held is None or step.outs[0].kind == "one":
        return "once"
    return "row" if step.outs[0].kind == "row" else "tile"


def by_stage(kernel: Kernel) -> dict[str, list[Step]]:
    """The kernel's steps in order, by stage."""
    found: dict[str, list[Step]] = {stage: [] for stage in STAGES}
    for step in kernel.steps:
        found[stage_of(step)].append(step)
    return found


def assign(kernel: Kernel, temp_slots: int) -> list[Slot]:
    """Pools of all full values: operands and results double-buffered, temporaries shared."""
    slots: list[Slot] = []
    for value, operand in zip(kernel.ins, kernel.in_operands, strict=True):
        if value.kind == "full":
            size = value.dtype.itemsize * kernel.reals * operand.spread
            slots.append(Slot(size, 2, [value]))
    kept = {id(o.value.root) for o in kernel.outputs if o.mode == "store"}
    last = _last_uses(kernel)
    free: list[Slot] = []
    for number, step in enumerate(kernel.steps):
        for value in {id(v.root): v.root for v in step.ins if v.kind == "full"}.values():
            # A shift reads its source while it writes, at another place.
            made = value.step is not None and value.step.kind != "memset" and step.kind != "shift"
            if made and last[id(value)] == number and id(value) not in kept:
                free.extend(slot for slot in slots if value in slot.values)
        for value in step.outs:
            root = value.root
            if value.kind == "full" and not any(root in slot.values for slot in slots):
                size = root.dtype.itemsize * kernel.reals
                once = step.kind == "memset" and root is value
                count = 1 if once else 2 if id(root) in kept else temp_slots
                _place(root, size, count, slots, [] if once or id(root) in kept else free)
    return slots


def _place(value: Value, size: int, count: int, slots: list[Slot], free: list[Slot]) -> None:
    """Put `value` into a free slot of its size, or into a new one."""
    for slot in free:
        if slot.column_bytes == size:
            free.remove(slot)
            slot.values.append(value)
            return
    slots.append(Slot(size, count, [value]))


def _last_uses(kernel: Kernel) -> dict[int, int]:
    last: dict[int, int] = {}
    for number, step in enumerate(kernel.steps):
        for value in step.ins:
            last[id(value.root)] = number
    for output in kernel.outputs:
        last[id(output.value.root)] = len(kernel.steps)
    return last


def column_bytes(kernel: Kernel, slots: Sequence[Slot]) -> int:
    """SBUF bytes per partition that one column of a tile takes, all pools together."""
    total = sum(slot.column_bytes * slot.slots for slot in slots)
    for value in small_values(kernel):
        if value.kind == "row":
            spread = kernel.in_operands[value.operand].spread if value.operand is not None else 1
            total += 2 * value.dtype.itemsize * kernel.reals * spread
    total += 2 * turned_bytes(kernel)
    if any(step.kind == "stats" for step in kernel.steps):
        total += 4
    if needs_wide(kernel):
        total += 4
    return total


def needs_wide(kernel: Kernel) -> bool:
    """Whether a step may need a pass for each of its per-row operands (rows share partitions)."""
    return any(
        step.kind in ("act", "act_reduce", "scalar", "stt")
        and any(v.kind == "col" for v in step.ins)
        and any(v.kind == "full" and v.dtype.itemsize < 4 or step.kind == "stt" for v in step.outs)
        for step in kernel.steps
    )


def turned_bytes(kernel: Kernel) -> int:
    """Bytes per element of the tiles that wait to be turned; 0 where nothing is turned."""
    operands = (*kernel.in_operands, *kernel.out_operands)
    return max((max(4, o.spec.itemsize) for o in operands if o.transposed), default=0)


def small_values(kernel: Kernel) -> list[Value]:
    """All values that are not full, operands first."""
    values = [*kernel.ins, *(value.root for step in kernel.steps for value in step.outs)]
    return [value for value in values if value.kind != "full"]


def descriptors(operand: Operand, kind: str, extent: Extent, geometry: Geometry) -> tuple[int, int]:
    """How many runs of how many bytes one tile's worth of an operand is in HBM."""
    step = operand.spread * operand.spec.itemsize
    if kind == "one" or kind == "col" and geometry.spread:
        return extent.parts, operand.spec.itemsize
    if kind == "col":
        run = max(1, min(operand.run, extent.group))
        return extent.parts * ceil_div(extent.group, run), run * step
    rows, width = (1 if kind == "row" else extent.group), extent.width
    if kind == "full" and width == geometry.cols and operand.run >= width:
        rows, width = 1, extent.group * width
    count = ceil_div(width, max(1, min(operand.run, width)))
    return extent.parts * rows * count, ceil_div(width, count) * step


def spread_over(parts: int, rows: int) -> int | None:
    """Partitions that `rows` runs go to; None where that is the DMA's default."""
    return None if min(parts, rows) == min(rows, PARTITIONS) else min(parts, rows)


def slack(kernel: Kernel, columns: int, geometries: Sequence[Geometry]) -> int:
    """Columns beyond `columns` that uneven runs (or a turning DMA) may round a transfer up by."""
    operands = [*kernel.in_operands, *kernel.out_operands]
    if any(operand.transposed for operand in operands):
        return 2 * PARTITIONS
    uneven = any(o.run < columns and columns % o.run for o in operands)
    rounded = math.isqrt(columns) + 1 if uneven else 0
    for geometry in geometries:
        for _, width, _ in geometry.col_segments():
            for operand in operands:
                count = ceil_div(width, max(1, min(operand.run, width)))
                beyond = ceil_div(width, count) * count - width
                rounded = max(rounded, geometry.group * beyond)
    return rounded


def passes(kernel: Kernel) -> dict[int, int]:
    """For each value (by id): the pass over a row in which (col: before which) it is known.

    Operands and what is computed from them alone are known in pass 0; a fold of pass n is known
    before pass n + 1. The steps of a max_sum count as one fold.
    """
    online = {id(step): steps for steps in kernel.online for step in steps}
    known: dict[int, int] = {}
    for step in kernel.steps:
        together = online.get(id(step))
        ins = together[0].ins if together is not None else step.ins
        first = max((known.get(id(value.root), 0) for value in ins), default=0)
        for value in step.outs:
            folded = value.kind == "col" and (step.kind in REDUCING or together is not None)
            late = together is not None and value.kind == "full"
            known[id(value)] = first + (1 if folded or late else 0)
            known[id(value.root)] = known[id(value)]
    return known


def single_pass(kernel: Kernel) -> bool:
    """Whether nothing but col values depends on a fold, so that each element is needed once."""
    known = passes(kernel)
    needed = {id(v.root) for step in kernel.steps for v in step.ins if v.kind == "full"}
    needed |= {id(o.value.root) for o in kernel.outputs}
    full = [v for step in kernel.steps for v in step.outs if v.kind == "full"]
    return all(known[id(v)] == 0 for v in full if id(v) in needed)
