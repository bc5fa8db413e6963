"""Heads of an attention call: sizes, which core owns which, and how their tensors lie in HBM.

A set is the query heads that share one key head (its members). Cores divide the sets or, where that
is more even, the members of every set. Where a whole set has few queries, its members are folded
into one block of queries, so that the keys pass by once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, broadcast_strides, ceil_div
from torch_trn.lowering.run import spread_over
from torch_trn.memory import CORE, Index, Pool, TileRef, Walk, affine
from torch_trn.program import Builder

#: Columns of a PSUM bank in fp32.
BANK = 512

#: Widest head: its product fills one PSUM bank.
MAX_DEPTH = BANK

Dims = tuple[tuple[int, int], ...]
Place = tuple[Index, Index]
"""Number of a set and of a member among those of this core."""


def named(call: OpCall) -> dict[str, object]:
    """The call's arguments by their schema names; a tensor's place is under its name + "#"."""
    base, _, overload = call.name.partition(".")
    schema = torch._C._get_schema(base, overload)
    found: dict[str, object] = {}
    tensors = 0
    for argument, value in zip(schema.arguments, call.args, strict=False):
        found[argument.name] = value
        if isinstance(value, TensorSpec):
            found[f"{argument.name}#"] = tensors
            tensors += 1
        elif isinstance(value, tuple):
            tensors += sum(isinstance(item, TensorSpec) for item in value)
    return found


#: dtypes of queries, keys and values: weights and results have the same.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(name: str, given: dict[str, object], dtype: torch.dtype) -> None:
    """UnsupportedOpError where weights are to be dropped, or cannot be told in ``dtype``."""
    if dtype not in DTYPES:
        short = str(dtype).removeprefix("torch.")
        raise UnsupportedOpError(
            name, f"softmax weights between 0 and 1 are not kept in {short}: use float32, "
            "bfloat16 or float16",
        )  # fmt: skip
    if given.get("dropout_p"):
        raise UnsupportedOpError(
            name, f"dropout_p is {given['dropout_p']}, but the fused Program drops no weights "
            "(0 only): use scaled_dot_product_attention's math backend",
        )  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Sizes of one call and this core's share: ``sets`` x ``members`` heads.

    ``group`` heads of queries belong to each of ``batch`` x ``kv_heads`` sets.
    """

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    causal: bool
    scale: float
    sets: int
    members: int
    shards: int
    folded: bool
    by_members: bool

    @classmethod
    def of(
        cls, name: str, q: TensorSpec, k: TensorSpec, v: TensorSpec, causal: bool,
        scale: object, shards: int, *, split_members: bool = True,
    ) -> Heads:  # fmt: skip
        """From [batch, heads, length, depth] tensors.

        split_members: whether each core may have a part of every set.
        """
        batch, heads, queries, depth = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        if max(depth, v.shape[3]) > MAX_DEPTH:
            raise UnsupportedOpError(
                name, f"a head of {max(depth, v.shape[3])} is wider than a PSUM bank ({MAX_DEPTH} "
                "columns): use more heads or scaled_dot_product_attention's math backend",
            )  # fmt: skip
        group = heads // kv_heads if kv_heads else 0
        sets, members = ceil_div(batch * kv_heads, shards), ceil_div(group, shards)
        # Each query sees as many keys as its number: with one query there is nothing to mask.
        fold = group > 1 and group * queries <= PARTITIONS and not (causal and queries > 1)
        by_members = split_members and not fold and batch * kv_heads * members < sets * group
        if by_members:
            sets = batch * kv_heads
        else:
            members = group
        given = scale if isinstance(scale, int | float) else depth**-0.5 if depth else 1.0
        return cls(batch, kv_heads, group, queries, keys, depth, v.shape[3], causal, float(given),
                   sets, 1 if fold else members, shards, fold, by_members)  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether there is no query at all."""
        return not (self.batch and self.kv_heads and self.group and self.queries)

    @property
    def rows(self) -> int:
        """Queries of one member (of a whole set where its members are folded)."""
        return self.queries * (self.group if self.folded else 1)

    def place(self, number: Index, member: Index) -> Place:
        """Set and member among all, from this core's."""
        if self.shards == 1:
            return number, member
        if self.by_members:
            return number, CORE * self.members + member
        return CORE * self.sets + number, member


@dataclass(frozen=True)
class Operand:
    """A [batch, heads, length, width] tensor of the call in HBM."""

    pool: Pool
    dtype: torch.dtype
    lead: Dims
    """(size, stride) of batch and sets."""
    within: Dims
    """That of the members of a set, where the tensor has heads of queries."""
    length: Dims
    width: tuple[int, int]

    @classmethod
    def of(
        cls, b: Builder, heads: Heads, name: str, tensor: str, spec: TensorSpec,
        sizes: Sequence[int] | None = None, *, keys: bool = False, parts: int = 1,
    ) -> Operand:  # fmt: skip
        """``spec`` broadcast to ``sizes``; ``keys`` where it has one head for each set.

        tensor: which of the call's it is, "" for scratch.
        """
        pool = b.hbm(name, nbytes=spec.nbytes, parts=parts, of=(tensor,) if tensor else ())
        strides = broadcast_strides(spec, sizes) if sizes is not None else list(spec.strides)
        shape = tuple(sizes) if sizes is not None else spec.shape
        if len(shape) == 3:
            shape, strides = (*shape, 1), [*strides, 1]
        group = 1 if keys else heads.group
        lead = ((shape[0], strides[0]), (shape[1] // max(group, 1), strides[1] * group))
        within = () if keys else ((group, strides[1]),)
        length: Dims = ((shape[2], strides[2]),)
        if heads.folded and not keys:
            length, within = ((group, strides[1]), *length), ()
        return cls(pool, spec.dtype, lead, within, length, (shape[3], strides[3]))

    def _length(self, count: int) -> Dims:
        """``count`` rows from some row on (all of them where members are folded)."""
        return self.length if len(self.length) > 1 else ((count, self.length[0][1]),)

    def natural(
        self, place: Place, at: Index, rows: int, tiles: int = 1, width: int | None = None,
        first: Index = 0, part: Index = 0, adjacent: bool = False,
    ) -> TileRef:  # fmt: skip
        """Rows ``at``... on partitions: [rows, tiles x width], tiles being 128 rows apart.

        adjacent: a partition's rows are neighbours instead, and tiles one row apart.

        With ``width``, only so many columns from ``first`` on.
        """
        wide = self.width[0] if width is None else width
        step = self.length[-1][1]
        apart = step if adjacent else PARTITIONS * step
        cols: Dims = (*self.within, (tiles, apart), (wide, self.width[1]))
        down: Dims = ((rows, tiles * step),) if adjacent else self._length(rows)
        walk = Walk((*self.lead, *down), cols)
        return self.pool[part].window(
            self.dtype, walk, rows, tiles * wide, row=place[0] * rows,
            col=place[1] * (tiles * wide) if self.within else 0,
            offset=affine(at) * step + affine(first) * self.width[1],
        )  # fmt: skip

    def turned(self, place: Place, at: Index, rows: int, first: int, count: int) -> TileRef:
        """Columns ``first``... on partitions: [count, rows]."""
        walk = Walk((*self.within, (count, self.width[1])), (*self.lead, *self._length(rows)))
        return self.pool[0].window(
            self.dtype, walk, count, rows, row=place[1] * count if self.within else 0,
            col=place[0] * rows, offset=affine(at) * self.length[-1][1] + first * self.width[1],
        )  # fmt: skip

    def runs(self, rows: int, width: int) -> tuple[int, int]:
        """Descriptors and bytes of each for ``rows`` of ``width`` elements."""
        size = self.dtype.itemsize
        together = self.width[1] == 1 or width == 1
        return (rows, width * size) if together else (rows * width, size)

    def adjoins(self) -> bool:
        """Whether its rows lie one after the other, so that one descriptor may span several."""
        return self.width[1] == 1 and self.length[-1][1] == self.width[0]


def tiles_of(rows: int) -> list[tuple[int, int, int]]:
    """(first tile, tiles, rows of each) of the full tiles of 128 rows, then of the rest."""
    full, rest = divmod(rows, PARTITIONS)
    found = [(0, full, PARTITIONS)] if full else []
    return found + ([(full, 1, rest)] if rest else [])


def chunks_of(size: int, by: int = PARTITIONS) -> list[tuple[int, int]]:
    """(first, count) of each ``by`` of ``size``."""
    return [(at, min(by, size - at)) for at in range(0, size, by)]


def load_rows(
    b: Builder, dst: TileRef, source: Operand, place: Place, at: Index, rows: int,
    queue: str = "load", *, part: Index = 0, adjacent: bool = False,
) -> None:  # fmt: skip
    """[rows, width] of HBM with rows on partitions: tile t's columns from t x width on.

    adjacent: of n full tiles, tile t holds rows t, t + n, t + 2n...
    """
    wide = source.width[0]
    for first, tiles, count in tiles_of(rows):
        together = adjacent and tiles > 1
        total, nbytes = source.runs(tiles * count, wide)
        if together:
            total, nbytes = count, tiles * nbytes
        view = dst.view(source.dtype, (1, tiles * wide), offset=first * wide, partitions=count)
        window = source.natural(place, at + first * PARTITIONS, count, tiles, part=part,
                                adjacent=together)  # fmt: skip
        b.load(view, window, rows=total, row_bytes=nbytes, partitions=spread_over(count, total),
               queue=queue)  # fmt: skip


def store_rows(
    b: Builder, target: Operand, src: TileRef, place: Place, at: Index, rows: int,
    accumulate: bool = False, *, part: Index = 0,
) -> None:  # fmt: skip
    """The reverse of ``load_rows``."""
    wide = target.width[0]
    for first, tiles, count in tiles_of(rows):
        total, nbytes = target.runs(tiles * count, wide)
        view = src.view(target.dtype, (1, tiles * wide), offset=first * wide, partitions=count)
        window = target.natural(place, at + first * PARTITIONS, count, tiles, part=part)
        b.store(window, view, rows=total, row_bytes=nbytes, partitions=spread_over(count, total),
                accumulate=accumulate)  # fmt: skip


def turns_on_array(core: CoreSpec, dtype: torch.dtype) -> bool:
    """Whether [rows, depth] is turned on TensorE: the DMA turns 2-byte data, from v3 on."""
    return dtype.itemsize != 2 or core.name == "NeuronCore-v2"


def turned_columns(rows: int, depth: int) -> int:
    """Elements per partition of a [rows, depth] block that is turned: chunks of 128 of depth."""
    return ceil_div(depth, PARTITIONS) * rows


def load_turned(
    b: Builder, dst: TileRef, natural: TileRef | None, turned: tuple[Pool, Index],
    source: Operand, place: Place, at: Index, rows: int, queue: str = "load",
) -> None:  # fmt: skip
    """[rows, depth] of HBM as [depth, rows], chunk by chunk of 128 of depth.

    natural: where it is turned on TensorE, a tile for it as it lies in HBM (loaded here).
    turned: PSUM pool and the slot to begin with.
    """
    depth, dtype = source.width[0], source.dtype
    if natural is not None:
        load_rows(b, natural, source, place, at, rows, queue)
        turn_rows(b, dst, natural, turned, depth, rows, dtype)
        return
    for index, (first, count) in enumerate(chunks_of(depth)):
        total, nbytes = source.runs(rows, count)
        b.load(dst.view(dtype, (1, rows), offset=index * rows, partitions=count),
               source.turned(place, at, rows, first, count), rows=total, row_bytes=nbytes,
               transpose=True, partitions=spread_over(min(count, total), total),
               queue=queue)  # fmt: skip


def turn_rows(
    b: Builder, dst: TileRef, natural: TileRef, turned: tuple[Pool, Index], depth: int, rows: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """[rows, depth] on partitions to [depth, rows], 512 rows to a PSUM bank."""
    pool, slot = turned
    for index, (first, count) in enumerate(chunks_of(depth)):
        for bank, (start, width) in enumerate(chunks_of(rows, BANK)):
            tile = pool[slot + (index * ceil_div(rows, BANK) + bank)]
            for at, part in chunks_of(width):
                source = natural.view(
                    dtype,
                    (1, count),
                    partitions=part,
                    offset=(start + at) // PARTITIONS * depth + first,
                )
                b.nc_transpose(tile.view(dtype, (1, part), offset=at), source, partitions=part,
                               n=count, dtype=dtype)  # fmt: skip
            b.tensor_copy(dst.view(dtype, (1, width), offset=index * rows + start),
                          tile.view(dtype, (1, width)), n=width, partitions=count,
                          dtype=dtype)  # fmt: skip
