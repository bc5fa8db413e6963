"""Results that fold the rows of a Kernel: sums over rows on TensorE, and totals over everything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.extent import Extent
from torch_trn.lowering.fold import NEUTRAL
from torch_trn.lowering.kernel import Geometry
from torch_trn.lowering.layout import PARTITIONS
from torch_trn.lowering.tile import FP32, Output, Step
from torch_trn.memory import CORE, Index, Pool, TileRef, Window, affine

if TYPE_CHECKING:
    from torch_trn.lowering.run import Runner

_BANK = 512

#: Partitions that VectorE transposes at once.
_SQUARE = 32


class Sums:
    """Accumulators of a Runner's "rowsum" and "total" outputs."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.rows = [o for o in runner.kernel.outputs if o.mode == "rowsum"]
        self.totals = [o for o in runner.kernel.outputs if o.mode == "total"]
        self.psum: dict[int, Pool] = {}
        self.accumulators: dict[int, Pool] = {}
        self.columns: dict[int, Pool] = {}
        self.row_out: Pool | None = None
        b = runner.b
        width = max((g.width for g in runner.geometries), default=0)
        spread = any(g.spread for g in runner.geometries)
        if self.rows and width:
            banks = max(1, b.psum_room_banks // len(self.rows))
            for output in self.rows:
                runner.ones(output.value.dtype)
                slots = min(-(-width // _BANK), banks)
                self.psum[output.index] = b.psum(f"sum{output.index}", free_bytes=2048, slots=slots)
                if -(-width // _BANK) > banks or spread:
                    self.accumulators[output.index] = b.sbuf(
                        f"partial{output.index}", free_bytes=4 * width
                    )
            widest = max(4, *(o.spec.itemsize for o in runner.kernel.out_operands))
            self.row_out = b.sbuf("sums", free_bytes=widest * min(width, _BANK), slots=2)
        for output in self.totals:
            pool = b.sbuf(f"total{output.index}", free_bytes=8)
            self.accumulators[output.index] = pool
            b.memset(pool, n=1, value=NEUTRAL[output.op])

    # -- rows in chunks ------------------------------------------------------------------------
    def start_chunks(self, geometry: Geometry, chunks: int) -> bool:
        """Accumulators in SBUF for all columns, one tile per chunk; False if they do not fit."""
        b, width = self.runner.b, geometry.width
        fits = len(self.rows) * 4 * width * chunks <= b.sbuf_room_bytes - 1024
        if not fits and not geometry.spread:
            return False
        for output in self.rows:
            pool = b.sbuf(f"columns{output.index}", free_bytes=4 * width, slots=chunks)
            self.columns[output.index] = pool
            for chunk in range(chunks):
                b.memset(pool[chunk], n=width, partitions=geometry.parts, engine=Engine.GPSIMD)
        return True

    def add_chunk(
        self, output: Output, extent: Extent, chunk: Index, tile: Index, geometry: Geometry
    ) -> None:
        """Add one chunk of one tile, on GpSimdE, which has nothing else to do."""
        runner = self.runner
        if output.index not in self.columns:
            # No room for all columns: this tile's sum is added to what HBM holds.
            self._add_on_tensor_engine(output, extent, 0)
            self._finish(output, extent.width, extent.col, None, extent.parts, geometry,
                         accumulate=True)  # fmt: skip
            return
        place = self.columns[output.index][chunk]
        for part in extent.parts_of():
            target = place.view(FP32, (1, part.width), offset=part.start)
            source = runner.emitter.at(output.value, runner.ref, "full", part, FP32)
            runner.b.tensor_tensor(
                target, target, source, op="add", n=part.width, partitions=part.parts,
                engine=Engine.GPSIMD,
            )  # fmt: skip

    def clear_rows(self, geometry: Geometry) -> None:
        """Zeros in HBM for sums that are added up there."""
        runner, b = self.runner, self.runner.b
        row = self.row_out
        assert row is not None
        b.memset(row[0], n=row.nbytes // 4, partitions=1)
        for output in self.rows:
            for at in range(0, geometry.cols, _BANK):
                size = min(_BANK, geometry.cols - at)
                extent = geometry.extent(1, 1, size, 1, 0, at)
                operand = runner.grid.operands[output.index]
                pool = runner.results[output.index]
                place = runner.single_window(operand, "row", pool, extent, geometry)
                source = row[0].view(operand.spec.dtype, (1, size), partitions=1)
                b.store(place, source, rows=1, row_bytes=size * operand.spec.itemsize)

    def finish_chunks(self, geometry: Geometry) -> None:
        """Fold the partitions of every chunk and bring its sums to HBM."""
        done, col = 0, 0
        for trips, width, short in geometry.col_segments():
            for chunk in range(trips):
                for output in self.rows:
                    if output.index in self.columns:
                        held = self.columns[output.index][done + chunk]
                        extent = geometry.extent(
                            geometry.parts, 1, width, 1, 0, col + chunk * width, short
                        )
                        if geometry.spread:
                            self._store_spread(output, held, extent, geometry)
                        else:
                            self._finish(output, width, extent.col, held, geometry.parts, geometry)
            done += trips
            col += trips * width

    # -- rows held whole -----------------------------------------------------------------------
    def start(self, geometry: Geometry) -> None:
        """Clear what is accumulated in SBUF."""
        for output in self.rows:
            if output.index in self.accumulators and geometry.width:
                pool = self.accumulators[output.index]
                self.runner.b.memset(pool, n=geometry.width)

    def add(self, extent: Extent, tile: Index, geometry: Geometry) -> None:
        """Fold one tile, the `tile`-th of its columns."""
        for output in self.rows:
            if output.index in self.accumulators:
                self._add_in_sbuf(output, extent)
            else:
                self._add_on_tensor_engine(output, extent, tile)
        for output in self.totals:
            self.add_total(output, extent)

    def _add_on_tensor_engine(self, output: Output, extent: Extent, tile: Index) -> None:
        """ones [rows, 1] x tile [rows, columns], accumulated in PSUM from the first tile on."""
        runner, pool = self.runner, self.psum[output.index]
        value = output.value
        ones = runner.ones(value.dtype)
        for row in range(extent.group):
            for at in range(0, extent.width, _BANK):
                size = min(_BANK, extent.width - at)
                start = row * extent.width + at
                runner.b.nc_matmul(
                    pool[at // _BANK], stationary=ones,
                    moving=runner.ref(value).view(value.dtype, (1, size), offset=start),
                    k=extent.parts, m=1, n=size, dtype=value.dtype,
                    accumulate=affine(tile) if row == 0 else True,
                )  # fmt: skip

    def _add_in_sbuf(self, output: Output, extent: Extent) -> None:
        """More columns than PSUM holds: add up in SBUF on GpSimdE, fold partitions at the end."""
        runner, pool = self.runner, self.accumulators[output.index]
        for row in range(extent.group):
            for part in replace(extent, group=1).parts_of():
                piece = replace(part, start=part.start + row * extent.width)
                target = pool[0].view(FP32, (1, part.width), offset=part.start)
                source = runner.emitter.at(output.value, runner.ref, "full", piece, FP32)
                runner.b.tensor_tensor(target, target, source, op="add", n=part.width,
                                       partitions=part.parts, engine=Engine.GPSIMD)  # fmt: skip

    def add_total(self, output: Output, extent: Extent) -> None:
        """Fold one tile into a total's accumulators, one in each partition."""
        b, pool, value = self.runner.b, self.accumulators[output.index], output.value
        emitter, ref = self.runner.emitter, self.runner.ref
        for part in extent.parts_of():
            n = part.free(value.kind)
            source = emitter.at(value, ref, value.kind, part, FP32)
            if n > 1:
                if "partial" not in self.runner.scratches:
                    self.runner.scratches["partial"] = b.sbuf("partial", free_bytes=4)
                partial = self.runner.scratches["partial"]
                source = emitter.at(value, ref, value.kind, part, value.dtype)
                b.tensor_reduce(partial, source, op=output.op, n=n, dtype=value.dtype,
                                partitions=part.parts,
                                out_dtype=None if value.dtype == FP32 else FP32)  # fmt: skip
                source = partial[0]
            parts = 1 if value.kind in ("row", "one") else part.parts
            b.tensor_tensor(pool, pool, source, op=output.op, n=1, partitions=parts)

    def finish_rows(self, width: int, col: Index, geometry: Geometry) -> None:
        """Bring the sums of one column chunk to HBM."""
        extent = geometry.extent(geometry.parts, 1, width, 1, 0, col)
        for output in self.rows:
            held = self.accumulators.get(output.index)
            if geometry.spread and held is not None:
                self._store_spread(output, held[0], extent, geometry)
            else:
                self._finish(output, width, extent.col, held[0] if held else None, 128, geometry)
            if held is not None:
                self.runner.b.memset(held, n=width)

    def _store_spread(
        self, output: Output, held: TileRef, extent: Extent, geometry: Geometry
    ) -> None:
        """Sums of rows that lie across the partitions are in place already."""
        runner, b = self.runner, self.runner.b
        operand = runner.grid.operands[output.index]
        b.tensor_scalar(held, held, op="multiply", operands=(output.scale,), n=extent.width,
                        partitions=extent.parts)  # fmt: skip
        whole = runner.window(operand, "row", runner.results[output.index], extent, geometry)
        window = whole.pattern
        assert isinstance(window, Window)
        mine = CORE * geometry.parts if runner.kernel.shards > 1 else affine(0)
        walk = replace(window.walk, rows=((1, 0),))
        place = replace(whole, pattern=replace(window, walk=walk, row=mine))
        b.store(place, held.view(FP32, (1, extent.width)), rows=extent.parts,
                row_bytes=extent.width * operand.spec.itemsize)  # fmt: skip

    def _finish(
        self, output: Output, width: int, col: Index, held: TileRef | None, parts: int,
        geometry: Geometry, accumulate: bool = False,
    ) -> None:  # fmt: skip
        """From PSUM (or, folding the partitions first, from the SBUF tile `held`) to HBM."""
        runner, b = self.runner, self.runner.b
        operand = runner.grid.operands[output.index]
        pool, row = self.psum[output.index], self.row_out
        target = runner.results[output.index]
        assert row is not None
        for at in range(0, width, _BANK):
            size, slot = min(_BANK, width - at), at // _BANK
            if held is not None:
                b.nc_matmul(
                    pool[slot], stationary=runner.ones(FP32),
                    moving=held.view(FP32, (1, size), offset=at), k=parts, m=1, n=size, dtype=FP32,
                )  # fmt: skip
            dtype = operand.spec.dtype
            b.tensor_scalar(
                row[slot], pool[slot], op="multiply", operands=(output.scale,), n=size,
                partitions=1, dtype=FP32, out_dtype=None if dtype == FP32 else dtype,
            )  # fmt: skip
            extent = replace(geometry.extent(1, 1, size, 1), col=affine(col) + at)
            b.store(
                runner.single_window(operand, "row", target, extent, geometry),
                row[slot].view(dtype, (1, size), partitions=1), rows=1,
                row_bytes=size * operand.spec.itemsize, accumulate=accumulate,
            )  # fmt: skip

    def finish_totals(self, parts: int) -> None:
        """Fold the partitions of the totals, scale, and bring them to HBM."""
        runner, b = self.runner, self.runner.b
        for output in self.totals:
            pool = self.accumulators[output.index]
            self.across(pool[0], FP32, output.op, parts)
            operand = runner.kernel.out_operands[output.index]
            dtype = operand.spec.dtype
            result = pool[0].view(dtype, (1, 1))
            b.tensor_scalar(result, pool, op="multiply", operands=(output.scale,), n=1,
                            partitions=1, out_dtype=None if dtype == FP32 else dtype)  # fmt: skip
            place = runner.results[output.index][0].matrix(dtype, (1, 0), offset=operand.offset)
            if runner.kernel.shards > 1:
                window = place.pattern
                assert isinstance(window, Window)
                place = replace(place, pattern=replace(window, row=affine(CORE)))
            b.store(place, result, rows=1, row_bytes=operand.spec.itemsize)

    # -- across the partitions -----------------------------------------------------------------
    def across(
        self, ref: TileRef, dtype: torch.dtype, op: str, parts: int, everywhere: bool = False
    ) -> None:
        """Fold [parts, 1] over the partitions, leaving the result in one or in all of them."""
        runner, b = self.runner, self.runner.b
        across, ones = runner.scratches["across"], runner.ones(FP32)
        to = parts if everywhere else 1
        wide = ref
        if dtype.itemsize >= 4 and not dtype.is_floating_point:
            self._across_whole(ref, dtype, op, parts, everywhere)
            return
        if dtype != FP32:
            wide = self._wide()[0]
            b.tensor_copy(wide, ref.view(dtype, (1, 1)), n=1, partitions=parts, dtype=dtype,
                          out_dtype=FP32)  # fmt: skip
        if op == "add":
            b.nc_matmul(across, stationary=ones, moving=wide, k=parts, m=to, n=1, dtype=FP32)
        else:
            self._turned(across, wide, parts)
            b.tensor_reduce(wide, self._line(across), op=op, n=parts, partitions=1)
            if not everywhere:
                return
            b.nc_matmul(across, stationary=ones, moving=wide, k=1, m=to, n=1, dtype=FP32)
        given: dict[str, Any] = {"n": 1, "partitions": to}
        if dtype == FP32:
            b.tensor_copy(ref, across, **given)
        else:
            b.tensor_copy(ref.view(dtype, (1, 1)), across, dtype=FP32, out_dtype=dtype, **given)

    def _across_whole(
        self, ref: TileRef, dtype: torch.dtype, op: str, parts: int, everywhere: bool
    ) -> None:
        """Whole numbers cross by DMA: TensorE would round them to fp32."""
        runner, b = self.runner, self.runner.b
        if "whole" not in runner.scratches:
            runner.scratches["whole"] = b.sbuf("whole", free_bytes=8 * PARTITIONS)
        line, size = runner.scratches["whole"][0], dtype.itemsize
        row, column = line.view(dtype, (1, parts), partitions=1), ref.view(
            dtype, (1, 1), partitions=parts)  # fmt: skip
        b.copy_sbuf(row, column, rows=parts, row_bytes=size)
        b.tensor_reduce(ref.view(dtype, (1, 1)), row, op=op, n=parts, partitions=1, dtype=dtype,
                        engine=Engine.GPSIMD)  # fmt: skip
        if everywhere:
            one = ref.view(dtype, (0, parts), partitions=1)
            b.copy_sbuf(row, one, rows=1, row_bytes=size * parts)
            b.copy_sbuf(column, row, rows=parts, row_bytes=size)

    def _wide(self) -> Pool:
        if "across_wide" not in self.runner.scratches:
            self.runner.scratches["across_wide"] = self.runner.b.sbuf("across_wide", free_bytes=4)
        return self.runner.scratches["across_wide"]

    def _line(self, across: Pool) -> Pool:
        """Where `_turned` leaves a column as a row."""
        exact = self.runner.kernel.core.pe_transpose_exact
        return across if exact else self.runner.scratches["line"]

    def _turned(self, across: Pool, ref: TileRef, parts: int) -> None:
        """[parts, 1] as [1, parts]."""
        runner, b = self.runner, self.runner.b
        if runner.kernel.core.pe_transpose_exact:
            b.nc_transpose(across, ref, partitions=parts, n=1, dtype=FP32)
            return
        # A product with the identity would spread infinities; VectorE turns 32 partitions at once.
        if "line" not in runner.scratches:
            runner.scratches["line"] = b.sbuf("line", free_bytes=4 * 128)
        line = runner.scratches["line"][0]
        for at in range(0, parts, _SQUARE):
            size = min(_SQUARE, parts - at)
            b.nc_transpose(
                line.view(FP32, (1, size), offset=at), ref.view(FP32, (1, 1), partition=at),
                partitions=size, n=1, dtype=FP32, engine=Engine.VECTOR,
            )  # fmt: skip

    def across_stats(self, step: Step, geometry: Geometry) -> None:
        """Mean and variance of a row from those of its parts in the partitions."""
        runner, b, parts = self.runner, self.runner.b, geometry.parts
        mean, var = (
            runner.ref(value).view(FP32, (1, 1), offset=value.place) for value in step.outs
        )
        across, shares = runner.scratches["across"], runner.scratches[shares_name(geometry)]
        apart = runner.scratches["apart"]
        given: dict[str, Any] = {"n": 1, "partitions": parts}
        joined: dict[str, Any] = {"k": parts, "m": parts, "n": 1, "dtype": FP32}
        b.nc_matmul(across, stationary=shares, moving=mean, **joined)
        # (own mean - mean)^2 + own variance, weighted.
        b.tensor_tensor(apart, mean, across, op="subtract", **given)
        b.scalar_tensor_tensor(var, [apart, apart], var, op="multiply,add", scalar=None, **given)
        b.tensor_copy(mean, across, **given)
        b.nc_matmul(across, stationary=shares, moving=var, **joined)
        b.tensor_copy(var, across, **given)


def shares_name(geometry: Geometry) -> str:
    """The scratch tile that `make_shares` fills."""
    return f"share {geometry.parts}x{geometry.cols}+{geometry.last}"


def make_shares(runner: Runner, geometry: Geometry) -> None:
    """[128, 128]: in each partition's row, what part of a spread row it holds."""
    b, name = runner.b, shares_name(geometry)
    last = geometry.last or geometry.cols
    total = (geometry.parts - 1) * geometry.cols + last
    if name in runner.scratches:
        return
    pool = b.sbuf(name, free_bytes=4 * PARTITIONS)
    runner.scratches[name] = pool
    b.memset(pool, n=PARTITIONS, value=geometry.cols / total)
    if last != geometry.cols:
        b.affine_select(pool, pool, n=PARTITIONS, op="is_lt", fill=last / total, channel=1,
                        base=1 - geometry.parts, steps=((0, PARTITIONS),))  # fmt: skip
