"""Runs a Program for its values: the other interpreter beside the scheduler.

Instructions run one after the other in program order, on the tiles that their references name:
operands are read through their access patterns, results are rounded to the dtype of the place they
are written to. SBUF, PSUM and scratch in HBM hold NaN (all bits set) until something is written.

>>> execute(program, core, {"in0": x, "out0": y})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.errors import TrnError
from torch_trn.isa import (
    DmaCopy,
    Dropout,
    Engine,
    Indexed,
    NcMatmul,
    NcMatmulMx,
    NcTranspose,
    Rng,
)
from torch_trn.isa.alu import fp8_max_of, operand, rounded
from torch_trn.isa.instruction import Shape
from torch_trn.memory import CORE, Affine, LoopVar, Pool, Space, TileRef, View, Window
from torch_trn.program import Node, Program, Repeat, Step
from torch_trn.unwritten import unwritten
from torch_trn.walk import addresses, strided

__all__ = ["execute"]

#: Slots are padded to a multiple of this many bytes.
_ALIGNMENT = 16


def execute(
    program: Program, core: CoreSpec, tensors: Mapping[str, Tensor], *, cores: int = 1,
    stochastic: bool = False, generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Runs ``program`` on ``cores`` physical cores, one after the other.

    tensors: the caller's tensors (CPU) by the names that HBM pools have for them ("in0", "out0");
        results are written into them. Pools that name none are scratch.
    stochastic: round to bf16, fp16 and fp8 at random (with ``generator``) instead of to nearest.

    Raises:
        TrnError: a step has no meaning (a transfer without an access pattern), touches what lies
            outside its tile or tensor, or gathers with an index out of range.
    """
    lines = {pool: _line(pool, tensors) for pool in program.pools if pool.space == Space.HBM}
    held = {pool: line for pool, line in lines.items() if line is not None}
    for number in range(cores):
        machine = _Machine(program, core, held, stochastic, generator)
        machine.variables[CORE] = number
        machine.body(program.body)
    for pool in _written(program.body):
        if len(pool.of) > 1:
            _hand_back(held[pool], [tensors[name] for name in pool.of])


@dataclass
class _Region:
    """One side of an instruction: the tensor it lives in, and which elements are meant."""

    tensor: Tensor
    index: Tensor | None = None
    valid: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return (self.tensor if self.index is None else self.index).numel()

    def read(self) -> Tensor:
        return self.tensor if self.index is None else self.tensor[self.index]

    def write(self, values: Tensor) -> None:
        if self.index is None:
            if values.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr():
                values = values.clone()  # within one tile: all is read before anything is written
            if values.shape != self.tensor.shape:
                values = values.reshape(self.tensor.shape)
            self.tensor.copy_(values)
        else:
            self.tensor[self.index] = values.reshape(self.index.shape)


class _Machine:
    """The memories of one physical core while it runs a Program."""

    def __init__(
        self, program: Program, core: CoreSpec, tensors: Mapping[Pool, Tensor], stochastic: bool,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        self.name = program.name
        self.core = core
        self.stochastic = stochastic
        self.generator = generator
        self.fp8_max = fp8_max_of(core.name)
        self.variables: dict[LoopVar, int] = {}
        self.tensors = tensors
        self.memories: dict[tuple[Pool, int, torch.dtype], Tensor] = {}
        self.scratch: dict[Pool, Tensor] = {}
        self.rows = core.sbuf_partitions
        self.starts: dict[Pool, int] = {}
        """First byte in ``on_chip`` of every pool in SBUF and PSUM."""
        total = 0
        for pool in program.pools:
            if pool.space != Space.HBM:
                self.starts[pool] = total
                total += pool.slots * self.rows * _padded(pool)
        self.on_chip = unwritten(total)

    def body(self, nodes: Sequence[Node]) -> None:
        """Runs steps and loops in program order."""
        for node in nodes:
            if isinstance(node, Repeat):
                for trip in range(node.trips):
                    self.variables[node.variable] = trip
                    self.body(node.body)
            elif isinstance(node.instruction, DmaCopy):
                self.dma(node, node.instruction)
            else:
                self.compute(node)

    def compute(self, step: Step) -> None:
        """One instruction of a compute engine."""
        instruction = step.instruction
        if isinstance(instruction, Indexed) and instruction.base.terms:
            instruction = replace(instruction, base=Affine(instruction.base.at(self.variables)))
        if isinstance(instruction, NcMatmul | NcMatmulMx) and isinstance(
            instruction.accumulate, Affine
        ):
            adds = instruction.accumulate.at(self.variables) != 0
            instruction = replace(instruction, accumulate=adds)
        shapes = instruction.read_shapes(len(step.reads))
        reads = [
            _rows(self.tile(step, ref, shape))
            for ref, shape in zip(step.reads, shapes, strict=True)
        ]
        targets = [
            self.tile(step, ref, shape)
            for ref, shape in zip(
                step.writes, instruction.write_shapes(len(step.writes)), strict=True
            )
        ]
        old = _rows(targets[0]).clone() if instruction.reads_old else None
        if isinstance(instruction, Rng | Dropout):
            results = self.random(instruction, reads)
        else:
            results = instruction.run(reads, old)
        for target, result in zip(targets, results, strict=True):
            if isinstance(instruction, NcTranspose) and instruction.engine == Engine.TENSOR:
                result = result if self.core.pe_transpose_exact else _polluted(result)
            _Region(target).write(self.round(result, target.dtype))

    def random(self, instruction: Rng | Dropout, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shape = (instruction.partitions, instruction.n)
        bits = torch.randint(0, 2**32, shape, dtype=torch.int64, generator=self.generator)
        if isinstance(instruction, Rng):
            return (bits,)
        (rate,) = instruction.numbers(reads)
        return (torch.where(bits.double() / 2**32 < rate, torch.tensor(0.0), operand(reads[0])),)

    def round(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.stochastic or not dtype.is_floating_point or dtype.itemsize >= 4:
            return rounded(values, dtype, fp8_max=self.fp8_max)
        # Random bits below the ones that are kept, then towards zero.
        kept = {torch.bfloat16: 7, torch.float16: 10, torch.float8_e4m3fn: 3}.get(dtype, 2)
        drop = 23 - kept
        words = operand(values).view(torch.int32)
        noise = torch.randint(
            0, 1 << drop, words.shape, dtype=torch.int32, generator=self.generator
        )
        finite = torch.isfinite(values)
        moved = ((words + noise) & ~((1 << drop) - 1)).view(torch.float32)
        return rounded(torch.where(finite, moved, operand(values)), dtype, fp8_max=self.fp8_max)

    # -- transfers -----------------------------------------------------------------------------
    def dma(self, step: Step, copy: DmaCopy) -> None:
        """One DMA: the elements of the source, in order, to those of the destination."""
        source, target = step.reads[0], step.writes[0]
        index = self.indices(step, copy) if copy.indirect else None
        window = next(
            (ref.pattern for ref in (source, target) if isinstance(ref.pattern, Window)), None
        )
        if window is None and not isinstance(source.pattern, View):
            raise TrnError(f"{self.name}: {step} has no access pattern, so it has no values")
        given = self.side(step, source, copy, index, window, False)
        place = self.side(step, target, copy, index, window, True)
        if given.count != place.count:
            raise TrnError(
                f"{self.name}: {step} moves {given.count} elements to {place.count} places"
            )
        mask = _both(given.valid, place.valid)
        values = given.read()
        if mask is None and not copy.accumulate:
            place.write(self.round(values, place.tensor.dtype))
            return
        values, old = values.reshape(-1), place.read().reshape(-1)
        if copy.accumulate:
            values = operand(values) + operand(old)
        values = self.round(values, old.dtype)
        if mask is None:
            place.write(values)
        elif place.index is not None:
            place.tensor[place.index.reshape(-1)[mask]] = values[mask]
        else:
            place.write(torch.where(mask, values, old))

    def side(
        self, step: Step, ref: TileRef, copy: DmaCopy, index: Tensor | None, window: Window | None,
        writes: bool,
    ) -> _Region:  # fmt: skip
        """Where one end of a transfer lies."""
        if isinstance(ref.pattern, Window):
            tensor = self.hbm(ref, ref.pattern.dtype)
            if index is None and (found := self.strided(tensor, ref.pattern, writes)) is not None:
                return _Region(found)
            places, valid = addresses(ref.pattern, self.variables)
            if index is not None:
                places = places + (index * copy.index_step)[:, None]
            _inside(self.name, step, places if valid is None else places[valid], tensor.numel())
            if valid is not None:
                places = torch.where(valid, places, 0)
            return _Region(tensor, places, None if valid is None else valid.reshape(-1))
        parts = copy.partitions_touched
        if isinstance(ref.pattern, View) and ref.pattern.partitions is not None:
            parts = ref.pattern.partitions
        if window is None:
            shape: Shape = (parts, copy.nbytes // parts, torch.uint8)
        else:
            shape = (parts, window.num_rows * window.num_cols // parts, window.dtype)
        return _Region(self.tile(step, ref, shape))

    def strided(self, tensor: Tensor, window: Window, writes: bool) -> Tensor | None:
        """The window as a view of its tensor, where it is one."""
        found = strided(window, self.variables)
        if found is None:
            return None
        sizes, strides, offset = found
        if min(strides, default=0) < 0:
            # A torch view cannot go backwards; a walk can.
            return None
        last = offset + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        if offset < 0 or last >= tensor.numel() or writes and 0 in strides and max(sizes) > 1:
            return None
        return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)

    def indices(self, step: Step, copy: DmaCopy) -> Tensor:
        """The row numbers of a gather or scatter, checked."""
        ref = step.reads[1]
        window = next(
            r.pattern for r in (*step.reads, *step.writes) if isinstance(r.pattern, Window)
        )
        parts = ref.pattern.partitions if isinstance(ref.pattern, View) else None
        parts = parts or min(window.num_rows, self.core.sbuf_partitions)
        tile = self.tile(step, ref, (parts, window.num_rows // parts, torch.int32))
        found = tile.reshape(-1).to(torch.int64)
        walk_rows, valid = window.num_rows, None
        _, valid = addresses(window, self.variables)
        checked = found if valid is None else found[valid.any(1)]
        wrong = (checked < 0) | (checked >= copy.index_limit)
        if copy.index_limit and bool(wrong.any()):
            value = int(checked[wrong][0])
            raise TrnError(
                f"{self.name}: index {value} is out of range 0 to {copy.index_limit - 1} "
                f"(of {walk_rows} rows that {step.instruction.NAME} gathers or scatters)"
            )
        return found if valid is None else torch.where(valid.any(1), found, 0)

    # -- memories ------------------------------------------------------------------------------
    def tile(self, step: Step, ref: TileRef, shape: Shape) -> Tensor:
        """[partitions, free dims...] of a tile, as a view of its memory."""
        parts, count, dtype = shape
        first, offset = 0, 0
        dims: tuple[tuple[int, int], ...] = ((1, count),)
        view, variables = ref.pattern, self.variables
        if isinstance(view, View):
            dtype, first = view.dtype, view.partition.at(variables)
            offset = view.offset.at(variables)
            dims = view.dims or dims
            parts = view.partitions or parts
        pool = ref.pool
        number = ref.index.at(variables) % pool.slots
        slot = self.memories.get((pool, number, dtype))
        if slot is None:
            slot = self.memory(pool, number, dtype)
        width = slot.shape[1]
        sizes, strides, last = [parts], [width], offset
        for step_, size in dims:
            sizes.append(size)
            strides.append(step_)
            last += step_ * (size - 1)
        limit = pool.nbytes // dtype.itemsize
        if not (0 <= offset and last < limit and 0 <= first and first + parts <= self.rows):
            raise TrnError(
                f"{self.name}: {step} reaches element {last} of partition {first + parts - 1} of "
                f"{pool.name}, which has {limit} in each of {self.rows} partitions"
            )
        return slot.as_strided(sizes, strides, slot.storage_offset() + first * width + offset)

    def memory(self, pool: Pool, slot: int, dtype: torch.dtype) -> Tensor:
        """[partitions, elements] of one slot of an on-chip pool, typed; made at its first use."""
        size = _padded(pool)
        start = self.starts[pool] + slot * self.rows * size
        held = self.on_chip[start : start + self.rows * size]
        found = held.view(dtype).view(self.rows, size // dtype.itemsize)
        self.memories[pool, slot, dtype] = found
        return found

    def hbm(self, ref: TileRef, dtype: torch.dtype) -> Tensor:
        """An HBM tensor as a line of elements of ``dtype``."""
        pool = ref.pool
        if pool in self.tensors:
            tensor = self.tensors[pool]
            return tensor if tensor.dtype == dtype else tensor.view(dtype)
        if pool not in self.scratch:
            self.scratch[pool] = unwritten(_padded(pool))
        return self.scratch[pool].view(dtype)


def _padded(pool: Pool) -> int:
    """Bytes of a slot (of one partition of it), so that a view of any dtype fits."""
    return -(-max(pool.nbytes, 1) // _ALIGNMENT) * _ALIGNMENT


def _rows(tile: Tensor) -> Tensor:
    """[partitions, elements]."""
    return tile if tile.dim() == 2 else tile.reshape(tile.shape[0], -1)


def _flat(tensor: Tensor) -> Tensor:
    """From the tensor's first element to its last, as they lie in memory."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))


def _line(pool: Pool, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The elements of a pool's tensors one after the other; None for scratch."""
    names = pool.of or (pool.name,)
    found = [_flat(tensors[name]) for name in names if name in tensors]
    if not found:
        return None
    return found[0] if len(names) == 1 else torch.cat(found)


def _hand_back(line: Tensor, tensors: Sequence[Tensor]) -> None:
    done = 0
    for tensor in tensors:
        flat = _flat(tensor)
        flat.copy_(line[done : done + flat.numel()])
        done += flat.numel()


def _written(body: Sequence[Node]) -> set[Pool]:
    """The HBM pools that a step writes."""
    found: set[Pool] = set()
    for node in body:
        if isinstance(node, Repeat):
            found |= _written(node.body)
        else:
            found |= {ref.pool for ref in node.writes if ref.pool.space == Space.HBM}
    return found


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b


def _inside(name: str, step: Step, places: Tensor, size: int) -> None:
    if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < size):
        raise TrnError(f"{name}: {step} reaches element {int(places.max())} of a tensor of {size}")


def _polluted(turned: Tensor) -> Tensor:
    """A transpose that is a product with the identity: NaN and infinity spoil their row."""
    if not turned.is_floating_point():
        return turned
    values = operand(turned)
    finite = torch.isfinite(values)
    return torch.where(~finite.all(1, keepdim=True) & finite, float("nan"), values)
