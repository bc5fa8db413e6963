"""What happens to a product on its way from PSUM to SBUF: scales, a bias, an activation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch_trn.lowering.gemm_block import BANK, Place, segments
from torch_trn.lowering.gemm_plan import Plan
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matrix import Matrix
from torch_trn.lowering.run import loop
from torch_trn.lowering.tile import FP32, Scalar
from torch_trn.memory import Index, Pool, TileRef

__all__ = ["Added", "Epilogue", "Vector"]

#: Columns of a row vector that stay in SBUF for the whole product.
ROW_COLUMNS = 4096

#: Columns of an output tile at most: four PSUM banks.
BLOCK_COLUMNS = 4 * BANK


@dataclass(frozen=True)
class Added:
    """activation(alpha x scales x product + beta x bias); without ``bias`` nothing is added.

    bias, scales: in the shape of the product, repeated (stride 0) where they are smaller.
    """

    bias: Matrix | None = None
    beta: Scalar = 1
    alpha: Scalar = 1
    scales: tuple[Matrix, ...] = ()
    activation: str | None = None

    def turned(self) -> Added:
        """For the transposed product."""
        bias = None if self.bias is None else self.bias.turned()
        return replace(self, bias=bias, scales=tuple(scale.turned() for scale in self.scales))


class Vector:
    """A bias or scale in SBUF: [partitions, 1], [partitions, columns] or a block of a matrix.

    Kinds: "one" (a single number), "parts" (one for each row), "free" (one for each column),
    "full" (a matrix). What does not change between output tiles is loaded once.
    """

    def __init__(self, plan: Plan, matrix: Matrix, factor: Scalar = 1) -> None:
        b = plan.b
        self.plan, self.factor, self.matrix = plan, factor, matrix.placed(b)
        along_rows = matrix.num_rows > 1 and matrix.row_step != 0
        along_cols = matrix.num_cols > 1 and matrix.col_step != 0
        self.kind = ("one", "free", "parts", "full")[along_cols + 2 * along_rows]
        varies = plan.batch > 1 and matrix.batch[1] != 0 or not isinstance(matrix.first_batch, int)
        fits = self.kind != "full" and (self.kind != "free" or plan.n <= ROW_COLUMNS)
        self.stays = fits and not varies
        self.wide = self.kind in ("free", "full")
        columns = (plan.n if self.stays else min(plan.n, BLOCK_COLUMNS)) if self.wide else 1
        slots = 1 if self.stays else 2
        if self.stays and self.kind == "parts":
            slots = ceil_div(plan.m, PARTITIONS)
        name = matrix.name
        self.tile = b.sbuf(name, free_bytes=columns * matrix.dtype.itemsize, slots=slots)
        self.scaled: Pool | None = None
        if factor != 1:
            self.scaled = b.sbuf(f"{name}_scaled", free_bytes=columns * 4, slots=slots)
        if self.stays:
            self._load_once()

    def _load_once(self) -> None:
        plan = self.plan
        if self.kind != "parts":
            self._load(0, Place(0, 0, 0, min(PARTITIONS, plan.m), plan.n if self.wide else 1))
            return
        for piece in segments(plan.m, PARTITIONS):
            with loop(plan.b, piece.count, "t") as t:
                row = t * piece.size + piece.start
                self._load(t + piece.first, Place(0, row, 0, piece.size, 1))

    def _load(self, slot: Index, place: Place) -> None:
        b, matrix = self.plan.b, self.matrix
        size, parts = matrix.dtype.itemsize, place.rows
        columns = place.columns if self.wide else 1
        run = columns if matrix.col_step == 1 else 1
        rows = parts * ceil_div(columns, run)
        tile = self.tile[slot].view(matrix.dtype, (1, columns), partitions=parts)
        window = matrix.window(place.batch, place.row, parts, place.col, columns)
        b.load(tile, window, rows=rows, row_bytes=run * size, partitions=parts, queue=matrix.name)
        if self.scaled is not None:
            scaled = self.scaled[slot].view(FP32, (1, columns))
            b.tensor_scalar(scaled, tile, op="multiply", operands=(self.factor,), n=columns,
                            partitions=parts, dtype=FP32)  # fmt: skip

    def before(self, place: Place, slot: Index) -> None:
        """Load the part that one output tile needs."""
        if not self.stays:
            self._load(slot, place)

    def part(self, place: Place, slot: Index, column: int, width: int) -> TileRef:
        """What stands for `width` columns of an output tile, from its `column` on."""
        tile = self.scaled or self.tile
        dtype = FP32 if self.scaled is not None else self.matrix.dtype
        if self.stays and self.kind == "parts":
            # Row groups are whole tiles of 128 rows but for the last.
            slot = _exact(place.row)
        elif self.stays:
            slot = 0
        offset = (place.col if self.stays else 0) + column if self.wide else 0
        return tile[slot].view(dtype, (1, width if self.wide else 1), offset=offset)


def _exact(row: Index) -> Index:
    """The number of the 128-row tile that begins at `row`."""
    if isinstance(row, int):
        return row // PARTITIONS
    found = row * 1
    terms = tuple((variable, value // PARTITIONS) for variable, value in found.terms)
    return replace(found, constant=found.constant // PARTITIONS, terms=terms)


class Epilogue:
    """Hooks into the evictions of a product."""

    def __init__(self, plan: Plan, added: Added) -> None:
        self.plan, self.added = plan, added
        self.scales = [Vector(plan, scale) for scale in added.scales]
        self.bias = None if added.bias is None else Vector(plan, added.bias, added.beta)
        self.slot: Index = 0
        plan.before, plan.finish = self.before, self.finish

    def before(self, place: Place, tile: Index) -> None:
        """Load what one output tile needs."""
        self.slot = tile
        for vector in (*self.scales, self.bias):
            if vector is not None:
                vector.before(place, tile)

    def finish(self, bank: TileRef, result: TileRef, place: Place, column: int, width: int) -> None:
        """result = activation(alpha x scales x bank + beta x bias)."""
        b, added = self.plan.b, self.added
        dtype = FP32 if self.plan.turn_output else self.plan.out_dtype
        given: dict[str, Any] = {"n": width, "partitions": place.rows, "dtype": FP32}
        out = None if dtype == FP32 else dtype
        per_row: list[TileRef] = []
        for scale in self.scales:
            part = scale.part(place, self.slot, column, width)
            if scale.wide:
                b.tensor_tensor(bank, bank, part, op="multiply", **given)
            else:
                per_row.append(part)
        for part in per_row[1:]:
            b.tensor_scalar(bank, [bank, part], op="multiply", operands=(None,), **given)
        factor: Scalar | None = added.alpha
        small = per_row[:1]
        if small and added.alpha != 1:
            b.tensor_scalar(bank, bank, op="multiply", operands=(added.alpha,), **given)
        if small:
            factor = None
        function = added.activation
        if self.bias is None or not self.bias.wide:
            bias: float | None = 0.0
            if self.bias is not None:
                small, bias = [*small, self.bias.part(place, self.slot, column, width)], None
            plain = "copy" if factor == 1 and bias == 0.0 else "identity"
            b.activation(result, [bank, *small], op=function or plain, scale=factor, bias=bias,
                         out_dtype=out, **given)  # fmt: skip
            return
        part = self.bias.part(place, self.slot, column, width)
        target = bank if function else result
        given["out_dtype"] = None if function else out
        if factor == 1:
            b.tensor_tensor(target, bank, part, op="add", **given)
        else:
            b.scalar_tensor_tensor(target, [bank, *small], part, op="multiply,add",
                                   scalar=factor, **given)  # fmt: skip
        if function:
            given["out_dtype"] = out
            b.activation(result, bank, op=function, **given)
