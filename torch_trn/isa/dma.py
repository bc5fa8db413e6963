"""The DMA instruction: descriptors over 16 engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_trn.chip import CoreSpec
from torch_trn.isa.instruction import Cost, Engine, Instruction, bytes_to_ps, require
from torch_trn.memory import Space

__all__ = ["DmaCopy"]


@dataclass(frozen=True, kw_only=True)
class DmaCopy(Instruction):
    """``rows`` contiguous runs of ``row_bytes`` between HBM and SBUF, or within HBM or SBUF.

    The k-th element of the source goes to the k-th of the destination, with a free cast;
    ``accumulate`` adds in fp32. A row is one descriptor (more if over 64 KiB). Eight partitions
    share one DMA engine, so ``partitions`` (default: as many as rows, at most 128) says how many
    engines work; between HBM and HBM descriptors spread over all. A descriptor takes
    max(bytes / sustained rate, ``dma_descriptor_ps`` + bytes / raw rate) of its engine, where an
    engine sustains more alone than as one of all; the core moves no more than ``dma_bytes_per_s``.
    All engines are occupied for the transfer's share of their time; its own queue is held until its
    engines are done; data arrive ``dma_start_ps`` later.

    ``indirect`` (gather, scatter): row r of the HBM window lies ``index_step`` elements times the
    r-th index further on; an index outside 0 to ``index_limit`` - 1 is an error. It costs no more
    (assumed: no cost of descriptors made at run time is published).
    """

    NAME: ClassVar[str] = "dma_copy"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.DMA,)

    source: Space
    destination: Space
    rows: int
    row_bytes: int
    partitions: int | None = None
    accumulate: bool = False
    transpose: bool = False
    indirect: bool = False
    index_step: int = 0
    index_limit: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes moved, one direction counted."""
        return self.rows * self.row_bytes

    @property
    def partitions_touched(self) -> int:
        """SBUF partitions that the transfer reads or writes."""
        return min(self.rows, 128) if self.partitions is None else self.partitions

    def check(self, core: CoreSpec) -> None:
        require(self.rows >= 1, self.NAME, "rows", self.rows, "at least 1")
        require(self.row_bytes >= 1, self.NAME, "row_bytes", self.row_bytes, "at least 1")
        most = min(core.sbuf_partitions, self.rows)
        holds = 1 <= self.partitions_touched <= most
        require(holds, self.NAME, "partitions", self.partitions_touched, f"1 to {most}")

    def cost(self, core: CoreSpec) -> Cost:
        parts = -(-self.row_bytes // core.dma_descriptor_max_bytes)
        descriptors = self.rows * parts
        engines = self._engines(core, descriptors)
        nbytes = -(-self.row_bytes // parts)
        alone = self._descriptor_ps(core, nbytes, core.dma_single_engine_bytes_per_s)
        alone *= -(-descriptors // engines)
        each = self._descriptor_ps(core, nbytes, core.dma_engine_bytes_per_s)
        crossings = 2 if self.source == self.destination == Space.HBM else 1
        shared = max(
            -(-descriptors * each // core.dma_engines),
            bytes_to_ps(self.nbytes, core.dma_engines * core.dma_engine_bytes_per_s),
            bytes_to_ps(self.nbytes * crossings, core.hbm_bytes_per_s),
        )
        queue = max(alone, shared)
        return Cost(shared, queue - shared + core.dma_start_ps, queue, shared)

    @property
    def attributes(self) -> str:
        flags = " accumulate" * self.accumulate + " transpose" * self.transpose
        flags += " indirect" * self.indirect
        spread = f" partitions={self.partitions}" if self.partitions is not None else ""
        return f"rows={self.rows} row_bytes={self.row_bytes}{spread}{flags}"

    def _engines(self, core: CoreSpec, descriptors: int) -> int:
        if self.source == self.destination == Space.HBM:
            return min(core.dma_engines, descriptors)
        partitions_per_engine = core.sbuf_partitions // core.dma_engines
        return -(-self.partitions_touched // partitions_per_engine)

    def _descriptor_ps(self, core: CoreSpec, nbytes: int, bytes_per_s: int) -> int:
        """Time of one descriptor on an engine that sustains ``bytes_per_s``."""
        within = core.dma_descriptor_ps + bytes_to_ps(nbytes, core.dma_engine_raw_bytes_per_s)
        each = max(bytes_to_ps(nbytes, bytes_per_s), within)
        factor = 1.0
        if self.source == self.destination == Space.HBM:
            factor *= core.dma_hbm_to_hbm_factor
        if self.accumulate:
            factor *= core.dma_accumulate_factor
        if self.transpose:
            within_sbuf = self.source == self.destination == Space.SBUF
            factor *= core.dma_sbuf_transpose_factor if within_sbuf else core.dma_transpose_factor
        return round(each * factor)
