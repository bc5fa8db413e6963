"""How an operator's elements become tiles: iteration space, partition rows, contiguous runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from torch_trn.lowering.call import TensorSpec
from torch_trn.memory import Walk

#: Partitions of SBUF and PSUM on every NeuronCore (hardware.md section 1).
PARTITIONS = 128

#: DMA moves at full rate from rows of this size on (hardware.md section 3: >= 4 KiB saturates).
DMA_ROW_BYTES = 8192

#: Rows shorter than this waste most of a descriptor, so small tensors use fewer partitions.
MIN_ROW_BYTES = 512

#: Elements between neighbours up to which a load fetches the gaps too and strides in SBUF;
#: beyond it every element is a descriptor of its own.
MAX_SPREAD = 4

#: Free size that keeps an engine instruction's fixed cost small (hardware.md 2.3: N >= 128).
MIN_FREE = 512


#: (size, stride) of the dims that rows or columns walk, outer first, in elements.
Lines = tuple[tuple[int, int], ...]


class _Lines(TypedDict):
    """The walk of an operand."""

    rows: Lines
    cols: Lines


@dataclass(frozen=True)
class Operand:
    """How one tensor meets the tiles of a Grid.

    kind: "full" (an element per tile element), "row" (the same for all rows), "col" (the same for
        all columns), "one" (a single element).
    run: elements that lie next to each other in HBM, in iteration order.
    spread: distance of neighbours in elements where a load fetches the gaps too, else 1.
    transposed: rows lie along memory, so a tile is loaded in HBM order and transposed on TensorE.
    every: of a col result, rows that share one element (the cost of its stores).
    index: input that holds the row numbers of a gather (or scatter) of this operand: row r lies
        ``index_step`` elements times the r-th number further on; numbers are 0 to
        ``index_limit`` - 1.
    rows, cols: how the Grid's rows and columns walk the tensor; None is a contiguous one (the
        innermost of as many elements as its kind needs).
    offset: of the walk's first element from the tensor's, in elements.
    """

    spec: TensorSpec
    kind: str = "full"
    run: int = 1
    spread: int = 1
    transposed: bool = False
    every: int = 1
    index: int | None = None
    index_step: int = 0
    index_limit: int = 0
    rows: Lines | None = None
    cols: Lines | None = None
    offset: int = 0


@dataclass(frozen=True)
class Grid:
    """An iteration space of `rows` x `cols` elements and the operands' walk through it.

    Where `pieces` is more than 1, each row that the operands walk is cut into that many rows of
    `cols` columns, the last one possibly shorter: row r is piece r % pieces of row r // pieces.
    A flat grid has one such row, cut into `rows` pieces.
    """

    rows: int
    cols: int
    operands: tuple[Operand, ...]
    is_flat: bool = False
    """Rows are arbitrary chunks of one run of elements."""
    pieces: int = 1
    size: int = 0
    """Columns of a row before it was cut (elements of a flat grid); 0: `cols`, or rows x cols."""

    @property
    def numel(self) -> int:
        """Elements of the iteration space, what pads the last piece included."""
        return self.rows * self.cols

    @property
    def length(self) -> int:
        """Columns that the operands walk: those of a row before it is cut."""
        return self.size or (self.numel if self.is_flat else self.cols * self.pieces)


def walk_of(operand: Operand, grid: Grid, pieces: int, width: int) -> Walk:
    """How `operand`'s rows and columns lie in HBM when rows are cut into `pieces` of `width`.

    What all rows (or all columns) share is walked with stride 0.
    """
    if operand.kind == "one":
        return Walk(((PARTITIONS, 0),), ((1, 0),))
    rows, cols = operand.rows, operand.cols
    length = grid.length
    whole = 1 if grid.is_flat else grid.rows // max(grid.pieces, 1)
    if operand.kind == "row":
        return Walk(((PARTITIONS * max(pieces, 1), 0),), cols or ((length, 1),), pieces, width)
    if rows is None:
        step = {"full": length, "col": 1}[operand.kind]
        rows = ((whole, step),) if whole > 1 or not grid.is_flat else ()
    if cols is None or operand.kind == "col":
        cols = ((length, 0 if operand.kind == "col" else 1),)
    return Walk(rows, cols, pieces, width) if pieces > 1 else Walk(rows, cols)


def ceil_div(value: int, by: int) -> int:
    """`value / by` rounded up."""
    return -(-value // by)


def product(sizes: Sequence[int]) -> int:
    """The product of `sizes`, 1 if there are none."""
    result = 1
    for size in sizes:
        result *= size
    return result


def broadcast_strides(spec: TensorSpec, shape: Sequence[int]) -> list[int]:
    """Strides of `spec` when it is broadcast to `shape` (0 where it repeats)."""
    lead = len(shape) - len(spec.shape)
    strides = [0] * max(lead, 0)
    for axis in range(max(-lead, 0), len(spec.shape)):
        size = spec.shape[axis]
        wanted = shape[axis + lead]
        strides.append(0 if size == 1 and wanted != 1 else spec.strides[axis])
    return strides


Dims = list[tuple[int, tuple[int, ...]]]


def merge(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> Dims:
    """Dims as (size, stride per operand), outer first, merged where all operands allow it."""
    dims: Dims = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        step = tuple(steps)
        if dims and all(
            outer == inner * size for outer, inner in zip(dims[-1][1], step, strict=True)
        ):
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    return dims


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Axes from the largest stride to the smallest: the order in which memory is walked."""
    return sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))


def grid(shape: Sequence[int], specs: Sequence[TensorSpec]) -> Grid:
    """The Grid of an elementwise operator over `shape`; `specs[0]` (the result) sets the order."""
    strides = [broadcast_strides(spec, shape) for spec in specs]
    axes = memory_order(shape, strides[0])
    dims = merge([shape[a] for a in axes], [[s[a] for a in axes] for s in strides])
    if not dims:
        return _flat(1 if product(shape) else 0, [(0,)] * len(specs), specs)
    if len(dims) == 1:
        size, steps = dims[0]
        return _flat(size, [(step,) for step in steps], specs)
    found = split(dims, _boundary(dims), specs)
    if any(operand.kind == "row" and operand.transposed for operand in found.operands):
        # A row is never turned: as a full operand this one is.
        return split(dims, len(dims) - 1, specs)
    return found


def _boundary(dims: Dims) -> int:
    """Where rows end and columns begin: the innermost place where a broadcast starts or ends."""
    for at in range(len(dims) - 1, 0, -1):
        outer, inner = dims[at - 1][1], dims[at][1]
        if any((a == 0) != (b == 0) for a, b in zip(outer, inner, strict=True)):
            return at
    at = len(dims) - 1
    while at > 1 and product([size for size, _ in dims[at:]]) < MIN_FREE:
        at -= 1
    return at


def split(dims: Dims, at: int, specs: Sequence[TensorSpec], widen: bool = True) -> Grid:
    """The Grid whose rows are `dims[:at]` and whose columns are `dims[at:]`.

    widen: whether long columns may be cut where rows are few (not if something runs along them).
    """
    operands = []
    for index, spec in enumerate(specs):
        steps = [(size, step[index]) for size, step in dims]
        operands.append(_operand(spec, steps[:at], steps[at:]))
    rows = product([size for size, _ in dims[:at]])
    cols = product([size for size, _ in dims[at:]])
    found = Grid(rows, cols, tuple(operands))
    return _widen(found) if widen else found


def _widen(found: Grid) -> Grid:
    """Cut long columns into more rows where the rows alone would leave partitions idle."""
    if found.rows == 0 or found.cols == 0:
        return Grid(0, 0, found.operands)
    pieces = min(ceil_div(PARTITIONS, found.rows), ceil_div(found.cols, MIN_FREE))
    if found.rows >= PARTITIONS or pieces < 2:
        return found
    if turned := [o for o in found.operands if o.transposed]:
        # What is turned is loaded column by column: every piece must have the same columns.
        pieces = next(p for p in range(pieces, 0, -1) if found.cols % p == 0)
        if pieces == 1 or any(len(o.cols or ()) != 1 for o in turned):
            return found
    cols = ceil_div(found.cols, pieces)
    pieces = ceil_div(found.cols, cols)
    operands = tuple(
        replace(o, kind="full", run=min(o.run, cols)) if o.kind == "row" else o
        for o in found.operands
    )
    return Grid(found.rows * pieces, cols, operands, False, pieces, found.cols)


def _operand(spec: TensorSpec, rows: Lines | list, cols: Lines | list) -> Operand:
    row_steps = [step for size, step in rows if size > 1]
    col_steps = [step for size, step in cols if size > 1]
    lines = _Lines(rows=_lines(rows), cols=_lines(cols))
    if not any(col_steps):
        if not any(row_steps):
            return Operand(spec, "one", **lines)
        return Operand(spec, "col", *_run(rows), **lines)
    kind = "full" if any(row_steps) or not row_steps else "row"
    run, spread = _run([*rows, *cols])
    inner = next(step for size, step in reversed(cols) if size > 1 and step)
    transposed = inner > MAX_SPREAD and any(step == 1 for step in row_steps + col_steps)
    return Operand(spec, kind, run, spread, transposed, **lines)


def _lines(dims: Sequence[tuple[int, int]]) -> Lines:
    """Dims of one tensor, neighbours that are one run of equal steps joined."""
    found: list[tuple[int, int]] = []
    for size, step in dims:
        if size == 1:
            continue
        if found and found[-1][1] == step * size:
            found[-1] = (found[-1][0] * size, step)
        else:
            found.append((size, step))
    return tuple(found)


def _run(dims: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Elements next to each other from the innermost dim on, and their distance."""
    steps = [(size, step) for size, step in dims if size > 1]
    while steps and steps[-1][1] == 0:
        steps.pop()
    if not steps:
        return 1, 1
    spread = abs(steps[-1][1])
    if spread > MAX_SPREAD:
        return 1, 1
    run = 1
    for size, step in reversed(steps):
        if abs(step) != run * spread:
            break
        run *= size
    return run, spread


def flat(numel: int, specs: Sequence[TensorSpec]) -> Grid:
    """The Grid of `numel` elements that every operand holds contiguously."""
    return _flat(numel, [(1,)] * len(specs), specs)


def _flat(numel: int, steps: Sequence[tuple[int]], specs: Sequence[TensorSpec]) -> Grid:
    """One merged dim: consecutive chunks go to the partitions."""
    itemsize = max((spec.itemsize for spec in specs), default=1)
    rows = flat_rows(numel, itemsize)
    cols = ceil_div(numel, rows) if rows else 0
    rows = ceil_div(numel, cols) if rows else 0
    operands = []
    for spec, (step,) in zip(specs, steps, strict=True):
        lines = _Lines(rows=(), cols=((numel, step),))
        if step == 0:
            operands.append(Operand(spec, "one", **lines))
        elif abs(step) <= MAX_SPREAD:
            operands.append(Operand(spec, "full", numel, abs(step), **lines))
        else:
            operands.append(Operand(spec, "full", 1, **lines))
    return Grid(rows, cols, tuple(operands), True, max(rows, 1), numel)


def flat_rows(numel: int, itemsize: int) -> int:
    """Partitions for `numel` contiguous elements: all 128 unless rows would be tiny.

    Prefers a count that divides `numel`, so that no row is padded.
    """
    if numel == 0:
        return 0
    rows = min(PARTITIONS, ceil_div(numel * itemsize, MIN_ROW_BYTES))
    for count in range(rows, rows - rows // 4 - 1, -1):
        if numel % count == 0:
            return count
    return rows
