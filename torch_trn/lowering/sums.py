"""Results that fold the rows of a Kernel: sums over rows on TensorE, and totals over everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.emit import Extent
from torch_trn.lowering.kernel import Geometry
from torch_trn.lowering.tile import FP32, Output
from torch_trn.memory import Index, Pool, TileRef

if TYPE_CHECKING:
    from torch_trn.lowering.run import Runner

_MATMUL_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
_BANK = 512


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
        self.chunked = any(g.chunked for g in runner.geometries)
        b = runner.b
        width = max((g.width for g in runner.geometries), default=0)
        if self.rows and width:
            banks = max(1, b.psum_room_banks // len(self.rows))
            for output in self.rows:
                slots = min(-(-width // _BANK), banks)
                self.psum[output.index] = b.psum(f"sum{output.index}", free_bytes=2048, slots=slots)
                if -(-width // _BANK) > banks:
                    self.accumulators[output.index] = b.sbuf(
                        f"partial{output.index}", free_bytes=4 * width
                    )
            widest = max(4, *(o.spec.itemsize for o in runner.kernel.out_operands))
            self.row_out = b.sbuf("sums", free_bytes=widest * min(width, _BANK), slots=2)
        for output in self.totals:
            pool = b.sbuf(f"total{output.index}", free_bytes=8)
            self.accumulators[output.index] = pool
            b.memset(pool, n=1)

    # -- rows in chunks ------------------------------------------------------------------------
    def start_chunks(self, geometry: Geometry, chunks: int) -> bool:
        """Accumulators in SBUF for all columns, one tile per chunk; False if they do not fit."""
        b, width = self.runner.b, geometry.width
        if len(self.rows) * 4 * width * chunks > b.sbuf_room_bytes - 1024:
            return False
        for output in self.rows:
            pool = b.sbuf(f"columns{output.index}", free_bytes=4 * width, slots=chunks)
            self.columns[output.index] = pool
            for chunk in range(chunks):
                b.memset(pool[chunk], n=width, partitions=geometry.parts, engine=Engine.GPSIMD)
        return True

    def add_chunk(self, output: Output, extent: Extent, chunk: Index) -> None:
        """Add one chunk of one tile, on GpSimdE, which has nothing else to do."""
        if output.index not in self.columns:
            self._add_on_tensor_engine(output, extent)
            self.finish_rows(extent.width, accumulate=True)
            return
        place = self.columns[output.index][chunk]
        self.runner.b.tensor_tensor(
            place, place, self.runner.ref(output.value), op="add", n=extent.width,
            partitions=extent.parts, engine=Engine.GPSIMD,
        )  # fmt: skip

    def finish_chunks(self, geometry: Geometry) -> None:
        """Fold the partitions of every chunk and bring its sums to HBM."""
        done = 0
        for trips, width in geometry.col_segments():
            for chunk in range(trips):
                for output in self.rows:
                    if output.index in self.columns:
                        pool = self.columns[output.index]
                        self._finish(output, width, pool[done + chunk], geometry.parts)
            done += trips

    # -- rows held whole -----------------------------------------------------------------------
    def start(self, geometry: Geometry) -> None:
        """Clear what is accumulated in SBUF."""
        for output in self.rows:
            if output.index in self.accumulators:
                pool = self.accumulators[output.index]
                self.runner.b.memset(pool, n=geometry.width, partitions=geometry.parts)

    def add(self, extent: Extent) -> None:
        """Fold one tile."""
        for output in self.rows:
            if output.index in self.accumulators:
                self._add_in_sbuf(output, extent)
            else:
                self._add_on_tensor_engine(output, extent)
        for output in self.totals:
            self._add_total(output, extent)

    def _add_on_tensor_engine(self, output: Output, extent: Extent) -> None:
        """ones [rows, 1] x tile [rows, columns], accumulated in PSUM."""
        runner, pool = self.runner, self.psum[output.index]
        dtype = output.value.dtype if output.value.dtype in _MATMUL_DTYPES else FP32
        for _row in range(extent.group):
            for at in range(0, extent.width, _BANK):
                runner.b.nc_matmul(
                    pool[at // _BANK], stationary=runner.scratches["ones"],
                    moving=runner.ref(output.value), k=extent.parts, m=1,
                    n=min(_BANK, extent.width - at), dtype=dtype, accumulate=True,
                )  # fmt: skip

    def _add_in_sbuf(self, output: Output, extent: Extent) -> None:
        """More columns than PSUM holds: add up in SBUF on GpSimdE, fold partitions at the end."""
        pool = self.accumulators[output.index]
        for _row in range(extent.group):
            self.runner.b.tensor_tensor(
                pool, pool, self.runner.ref(output.value), op="add", n=extent.width,
                partitions=extent.parts, engine=Engine.GPSIMD,
            )  # fmt: skip

    def _add_total(self, output: Output, extent: Extent) -> None:
        b, pool, value = self.runner.b, self.accumulators[output.index], output.value
        ref, parts = self.runner.ref(value), extent.parts
        n = extent.free(value.kind)
        if n > 1:
            if "partial" not in self.runner.scratches:
                self.runner.scratches["partial"] = b.sbuf("partial", free_bytes=4)
            partial = self.runner.scratches["partial"]
            b.tensor_reduce(partial, ref, op=output.op, n=n, dtype=value.dtype, partitions=parts,
                            out_dtype=None if value.dtype == FP32 else FP32)  # fmt: skip
            ref = partial[0]
        b.tensor_tensor(pool, pool, ref, op=output.op, n=1, partitions=parts)

    def finish_rows(self, width: int, accumulate: bool = False) -> None:
        """Bring the sums of one column chunk to HBM."""
        for output in self.rows:
            held = self.accumulators.get(output.index)
            self._finish(output, width, held[0] if held else None, 128, accumulate)

    def _finish(
        self, output: Output, width: int, held: TileRef | None, parts: int, accumulate: bool = False
    ) -> None:
        """From PSUM (or, folding the partitions first, from the SBUF tile `held`) to HBM."""
        runner, b = self.runner, self.runner.b
        operand = runner.kernel.out_operands[output.index]
        pool, row = self.psum[output.index], self.row_out
        assert row is not None
        for at in range(0, width, _BANK):
            size, slot = min(_BANK, width - at), at // _BANK
            if held is not None:
                b.nc_matmul(
                    pool[slot], stationary=runner.scratches["ones"], moving=held, k=parts, m=1,
                    n=size, dtype=FP32,
                )  # fmt: skip
            b.tensor_scalar(
                row[slot], pool[slot], op="multiply", n=size, partitions=1, dtype=FP32,
                out_dtype=None if operand.spec.dtype == FP32 else operand.spec.dtype,
            )  # fmt: skip
            b.store(
                runner.results[output.index], row[slot], rows=1,
                row_bytes=size * operand.spec.itemsize, accumulate=accumulate,
            )  # fmt: skip

    def finish_totals(self, parts: int) -> None:
        """Fold the partitions of the totals, scale, and bring them to HBM."""
        runner, b = self.runner, self.runner.b
        for output in self.totals:
            pool = self.accumulators[output.index]
            runner.across(pool[0], output.op, parts)
            operand = runner.kernel.out_operands[output.index]
            b.tensor_scalar(pool, pool, op="multiply", n=1, partitions=1)
            b.store(runner.results[output.index], pool, rows=1, row_bytes=operand.spec.itemsize)
