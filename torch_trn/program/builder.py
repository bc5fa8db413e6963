"""The Builder: how lowerings write Programs.

A method is named as its instruction; it takes the destination first, then the sources. A tile
argument is a ``TileRef`` (``pool[index]``), or a ``Pool`` for its slot 0; where a list is allowed,
its first member is the streamed operand and the others are small ones (a bias, a per-partition
scalar) that only add dependencies. Whether an operand lies in PSUM follows from its pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias, TypedDict, Unpack

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import CapacityError
from torch_trn.isa import DmaCopy, Engine, Instruction, NcMatmul, NcMatmulMx, NcTranspose
from torch_trn.memory import CORE, Affine, Index, LoopVar, Pool, Space, TileRef, View, affine
from torch_trn.program.elementwise import ElementwiseMethods
from torch_trn.program.nest import Node, Program, Repeat, Step

__all__ = ["Builder"]

Tile: TypeAlias = TileRef | Pool
Tiles: TypeAlias = Tile | Sequence[Tile]


class Transfer(TypedDict, total=False):
    """Optional fields of a DMA, as in ``DmaCopy``."""

    partitions: int | None
    accumulate: bool
    transpose: bool
    index_step: int
    index_limit: int


class Builder(ElementwiseMethods):
    """Collects the steps and pools of one Program for ``core``; ``build`` makes the Program."""

    def __init__(self, core: CoreSpec, name: str) -> None:
        self.core = core
        self.name = name
        self._pools: list[Pool] = []
        self._open: list[list[Node]] = [[]]
        self._variables: list[LoopVar] = []
        self._sbuf_room = core.sbuf_partition_bytes
        self._psum_room = core.psum_banks

    @property
    def sbuf_room_bytes(self) -> int:
        """Bytes per partition of SBUF that no pool has taken yet."""
        return self._sbuf_room

    @property
    def psum_room_banks(self) -> int:
        """PSUM banks that no pool has taken yet."""
        return self._psum_room

    def hbm(
        self, name: str, *, nbytes: int, parts: int = 1, of: Sequence[str] = ()
    ) -> Pool:  # fmt: skip
        """A tensor in HBM of ``nbytes``; ``of`` names the call's tensors it holds (see ``Pool``).

        A read waits for all writes to it before (and the reverse); with ``parts`` > 1, ``t[i]`` is
        the i-th part and only accesses to the same part wait for each other.
        """
        return self._pool(Pool(name, Space.HBM, nbytes, parts, tuple(of)))

    def adopt(self, pool: Pool) -> Pool:
        """Use an HBM tensor of another Program, which runs before or after in the same one."""
        if pool not in self._pools:
            self._pools.append(pool)
        return pool

    def sbuf(self, name: str, *, free_bytes: int, slots: int = 1) -> Pool:
        """``slots`` SBUF tiles of 128 partitions x ``free_bytes``.

        Raises:
            CapacityError: they do not fit beside the pools there are.
        """
        pool = self._pool(Pool(name, Space.SBUF, free_bytes, slots))
        needed = free_bytes * slots
        if needed > self._sbuf_room:
            raise CapacityError(
                name, "SBUF", needed=needed, room=self._sbuf_room,
                capacity=self.core.sbuf_partition_bytes, unit="bytes per partition",
            )  # fmt: skip
        self._sbuf_room -= needed
        return pool

    def psum(self, name: str, *, free_bytes: int, slots: int = 1) -> Pool:
        """``slots`` PSUM tiles of 128 partitions x ``free_bytes``, each in whole banks.

        Raises:
            CapacityError: they do not fit beside the pools there are.
        """
        pool = self._pool(Pool(name, Space.PSUM, free_bytes, slots))
        needed = -(-free_bytes // self.core.psum_bank_bytes) * slots
        if needed > self._psum_room:
            raise CapacityError(
                name, "PSUM", needed=needed, room=self._psum_room,
                capacity=self.core.psum_banks, unit="banks",
            )  # fmt: skip
        self._psum_room -= needed
        return pool

    @contextmanager
    def repeat(self, trips: int, name: str) -> Iterator[LoopVar]:
        """A loop of ``trips`` (0 allowed) over the steps built inside; yields its variable."""
        if trips < 0:
            raise ValueError(f"loop {name} of {self.name}: trips is {trips}, but must be >= 0")
        variable = LoopVar(name, len(self._variables))
        self._variables.append(variable)
        self._open.append([])
        try:
            yield variable
        finally:
            self._variables.pop()
            body = self._open.pop()
        self._open[-1].append(Repeat(variable, trips, tuple(body)))

    @contextmanager
    def any_engine(self) -> Iterator[None]:
        """Makes the instructions built inside one step: the issue pass takes one of them.

        They must do the same to the same tiles, each on another compute engine.

        Raises:
            ValueError: they read or write different tiles, or two are of one engine.
        """
        self._open.append([])
        try:
            yield
        finally:
            steps = self._open.pop()
        self._open[-1].append(self._joined(steps))

    def _joined(self, nodes: list[Node]) -> Step:
        steps = [node for node in nodes if isinstance(node, Step)]
        if not steps or len(steps) < len(nodes):
            raise ValueError(f"any_engine in {self.name}: needs instructions, and no loops")
        first, *others = steps
        engines = [step.instruction.engine_of for step in steps]
        if len(set(engines)) < len(engines) or Engine.DMA in engines:
            names = ", ".join(map(str, engines))
            raise ValueError(
                f"any_engine in {self.name}: instructions are of {names}, but must be of "
                "different compute engines"
            )
        for step in others:
            if (step.writes, step.reads) != (first.writes, first.reads):
                raise ValueError(
                    f"any_engine in {self.name}: {step} and {first} are of different tiles"
                )
        return replace(first, alternatives=tuple(step.instruction for step in others))

    def build(self) -> Program:
        """The Program built so far.

        Raises:
            ValueError: a loop is still open.
        """
        if self._variables:
            raise ValueError(f"program {self.name}: loop {self._variables[-1].name} is still open")
        return Program(self.name, tuple(self._pools), tuple(self._open[0]))

    def nc_matmul(
        self, dst: Tile, *, stationary: Tile, moving: Tile, k: int, m: int, n: int,
        dtype: torch.dtype, accumulate: bool | Index = False, double_row: bool = False,
        tile: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """dst [m, n] (PSUM) = or += stationary [k, m] transposed x moving [k, n] (both SBUF).

        ``accumulate`` may be an index: the instruction adds where that is not zero.
        """
        instruction = NcMatmul(
            k=k, m=m, n=n, dtype=dtype, accumulate=_adds(accumulate), double_row=double_row,
            tile=tile,
        )  # fmt: skip
        self._room_for(dst, n * 4, "nc_matmul")
        self._in_space(dst, Space.PSUM, "nc_matmul", "destination")
        self._in_space(stationary, Space.SBUF, "nc_matmul", "stationary")
        self._in_space(moving, Space.SBUF, "nc_matmul", "moving")
        self._emit(instruction, (dst,), (stationary, moving))

    def nc_matmul_mx(
        self, dst: Tile, *, stationary: Tile, moving: Tile, scales: tuple[Tile, Tile], k: int,
        m: int, n: int, dtype: torch.dtype, accumulate: bool | Index = False,
    ) -> None:  # fmt: skip
        """As nc_matmul with MX operands; ``scales`` are those of stationary and moving."""
        instruction = NcMatmulMx(k=k, m=m, n=n, dtype=dtype, accumulate=_adds(accumulate))
        self._room_for(dst, n * 4, "nc_matmul_mx")
        self._in_space(dst, Space.PSUM, "nc_matmul_mx", "destination")
        for tile, role in ((stationary, "stationary"), (moving, "moving")):
            self._in_space(tile, Space.SBUF, "nc_matmul_mx", role)
        self._emit(instruction, (dst,), (stationary, moving, *scales))

    def nc_transpose(
        self, dst: Tile, src: Tile, *, partitions: int, n: int, dtype: torch.dtype,
        engine: Engine = Engine.TENSOR,
    ) -> None:  # fmt: skip
        """dst [n, partitions] = src [partitions, n] transposed; on TensorE into PSUM."""
        instruction = NcTranspose(partitions=partitions, n=n, dtype=dtype, engine=engine)
        if engine == Engine.TENSOR:
            self._in_space(dst, Space.PSUM, "nc_transpose", "destination")
            self._in_space(src, Space.SBUF, "nc_transpose", "source")
        self._room_for(dst, partitions * dtype.itemsize, "nc_transpose")
        self._emit(instruction, (dst,), (src,))

    def load(
        self, dst: Tile, src: Tile, *, rows: int, row_bytes: int, queue: str = "load",
        index: Tile | None = None, **fields: Unpack[Transfer],
    ) -> None:  # fmt: skip
        """DMA from HBM ``src`` to SBUF ``dst``: ``rows`` runs of ``row_bytes``.

        ``index`` is the SBUF tile of row numbers of a gather.
        """
        self._in_space(src, Space.HBM, "load", "source")
        self._in_space(dst, Space.SBUF, "load", "destination")
        self._dma(dst, src, rows, row_bytes, queue, index, fields)

    def store(
        self, dst: Tile, src: Tile, *, rows: int, row_bytes: int, queue: str = "store",
        index: Tile | None = None, **fields: Unpack[Transfer],
    ) -> None:  # fmt: skip
        """DMA from SBUF ``src`` to HBM ``dst``; ``accumulate`` adds, ``index`` scatters rows."""
        self._in_space(src, Space.SBUF, "store", "source")
        self._in_space(dst, Space.HBM, "store", "destination")
        self._dma(dst, src, rows, row_bytes, queue, index, fields)

    def copy_hbm(
        self, dst: Tile, src: Tile, *, rows: int, row_bytes: int, queue: str = "copy",
        index: Tile | None = None, **fields: Unpack[Transfer],
    ) -> None:  # fmt: skip
        """DMA from HBM to HBM."""
        self._in_space(src, Space.HBM, "copy_hbm", "source")
        self._in_space(dst, Space.HBM, "copy_hbm", "destination")
        self._dma(dst, src, rows, row_bytes, queue, index, fields)

    def copy_sbuf(
        self, dst: Tile, src: Tile, *, rows: int, row_bytes: int, queue: str = "copy",
        index: Tile | None = None, **fields: Unpack[Transfer],
    ) -> None:  # fmt: skip
        """DMA from SBUF to SBUF, e.g. to other partitions."""
        self._in_space(src, Space.SBUF, "copy_sbuf", "source")
        self._in_space(dst, Space.SBUF, "copy_sbuf", "destination")
        self._dma(dst, src, rows, row_bytes, queue, index, fields)

    def _dma(
        self, dst: Tile, src: Tile, rows: int, row_bytes: int, queue: str, index: Tile | None,
        fields: Transfer,
    ) -> None:  # fmt: skip
        target, source = _ref(dst), _ref(src)
        instruction = DmaCopy(
            source=source.pool.space, destination=target.pool.space, rows=rows,
            row_bytes=row_bytes, indirect=index is not None, **fields,
        )  # fmt: skip
        instruction.check(self.core)
        each = -(-rows // instruction.partitions_touched) * row_bytes
        for tile in (target, source):
            if tile.pool.space == Space.SBUF:
                self._room_for(tile, each, f"dma_copy of {rows} rows of {row_bytes} B")
        reads = (source,) if index is None else (source, index)
        self._emit(instruction, (target,), reads, queue)

    def _pass(
        self, kind: type[Any], writes: Sequence[Tile], sources: Sequence[Tiles],
        written_n: int | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """Emits an elementwise instruction; ``written_n`` elements go to ``writes[0]``."""
        reads = [_refs(source) for source in sources]
        destination = _ref(writes[0])
        spaces = tuple(refs[0].pool.space for refs in reads)
        given = {name: value for name, value in fields.items() if value is not None}
        instruction = kind(destination=destination.pool.space, sources=spaces, **given)
        count = instruction.n if written_n is None else written_n
        self._room_for(destination, count * instruction.result_dtype.itemsize, kind.NAME)
        self._emit(instruction, writes, [ref for refs in reads for ref in refs])

    def _emit(
        self, instruction: Instruction, writes: Sequence[Tile], reads: Sequence[Tile],
        queue: str = "",
    ) -> None:  # fmt: skip
        instruction.check(self.core)
        written = tuple(self._known(_ref(tile), instruction.NAME) for tile in writes)
        read = tuple(self._known(_ref(tile), instruction.NAME) for tile in reads)
        self._open[-1].append(Step(instruction, written, read, queue))

    def _known(self, ref: TileRef, name: str) -> TileRef:
        for variable, _ in (term for index in ref.indices() for term in index.terms):
            if variable not in self._variables and variable is not CORE:
                raise ValueError(
                    f"{name} in {self.name}: {ref} uses loop variable {variable.name} "
                    "outside its loop"
                )
        if ref.pool not in self._pools:
            raise ValueError(f"{name} in {self.name}: {ref} is a tile of another Builder")
        return ref

    def _in_space(self, tile: Tile, space: Space, name: str, role: str) -> None:
        pool = _ref(tile).pool
        if pool.space != space:
            raise ValueError(
                f"{name} in {self.name}: {role} {pool.name} is in {pool.space.name}, "
                f"but must be in {space.name}"
            )

    def _room_for(self, tile: Tile, nbytes: int, name: str) -> None:
        pattern, pool = _ref(tile).pattern, _ref(tile).pool
        if isinstance(pattern, View) and pattern.dims is not None:
            last = sum(step * (count - 1) for step, count in pattern.dims)
            nbytes = (pattern.offset.constant + last + 1) * pattern.dtype.itemsize
        if nbytes > pool.nbytes:
            raise ValueError(
                f"{name} in {self.name}: {nbytes} bytes per partition do not fit into "
                f"{pool.name} of {pool.nbytes}"
            )

    def _pool(self, pool: Pool) -> Pool:
        if pool.slots < 1 or pool.nbytes < 0:
            raise ValueError(
                f"{pool.space.name} {pool.name}: {pool.slots} slots of {pool.nbytes} bytes, "
                "but must be at least 1 slot of at least 0 bytes"
            )
        self._pools.append(pool)
        return pool


def _ref(tile: Tile) -> TileRef:
    return tile[0] if isinstance(tile, Pool) else tile


def _refs(tiles: Tiles) -> tuple[TileRef, ...]:
    if isinstance(tiles, (Pool, TileRef)):
        return (_ref(tiles),)
    return tuple(_ref(tile) for tile in tiles)


def _adds(accumulate: bool | Index) -> bool | Affine:
    """Whether a matmul adds: an index that depends on no loop is known at once."""
    if isinstance(accumulate, bool):
        return accumulate
    index = affine(accumulate)
    return index if index.terms else index.constant != 0
