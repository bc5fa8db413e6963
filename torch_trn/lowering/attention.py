"""Fused attention, forward: flash attention over blocks of 128 queries and up to 1,024 keys.

Scores lie in PSUM [queries, keys]; their maximum is VectorE's, exp and its sum ScalarE's (one
activation from PSUM); probabilities are turned on TensorE so that keys are on partitions for the
product with V. Two heads go through the stages together, so that no engine waits for the chain of
the other. Causal masks skip key blocks above the diagonal; grouped heads share their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

#: Keys of one step (two PSUM banks of scores).
KEY_BLOCK = 1024

BANK = 512

#: Above this many queries, causal extents are rounded up to a bank of keys.
FINE_QUERIES = 1024

#: Causal extents of one head at most, so that a Program does not grow with the length.
MAX_EXTENTS = 32


@dataclass
class Shape:
    """Sizes of one call: heads are batch x heads of the queries."""

    heads: int
    group: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    causal: bool

    @classmethod
    def of(cls, q: TensorSpec, k: TensorSpec, v: TensorSpec, causal: bool, shards: int) -> Shape:
        """From [batch, heads, length, depth] tensors; heads are what cores divide."""
        batch, heads, queries, depth = q.shape
        group = max(1, heads // max(k.shape[1], 1))
        share = ceil_div(batch * heads, shards)
        return cls(share, min(group, max(share, 1)), queries, k.shape[2], depth, v.shape[3], causal)

    def extents(self) -> Iterator[tuple[int, int, int, int]]:
        """(first query block, blocks, queries each, keys they see)."""
        full, rest = divmod(self.queries, PARTITIONS)
        if not self.causal:
            if full:
                yield 0, full, PARTITIONS, self.keys
            if rest:
                yield full, 1, rest, self.keys
            return
        step = 1 if self.queries <= FINE_QUERIES else BANK // PARTITIONS
        step *= max(1, ceil_div(full, step * MAX_EXTENTS))
        for first in range(0, full, step):
            count = min(step, full - first)
            yield first, count, PARTITIONS, min(self.keys, (first + count) * PARTITIONS)
        if rest:
            yield full, 1, rest, self.keys


def turned_columns(rows: int, depth: int) -> int:
    """Elements per partition that `load_turned` writes at most: whole rows, evenly spread."""
    parts = max(1, min(rows, depth, PARTITIONS))
    return max(PARTITIONS, rows, depth, ceil_div(rows, parts) * depth)


def load_turned(
    b: Builder, dst: TileRef, natural: TileRef, bank: TileRef, source: Pool, rows: int, depth: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """[rows, depth] of HBM as [depth, rows]: turned by the DMA where it can, else on TensorE."""
    size = dtype.itemsize
    if size == 2 and b.core.name != "NeuronCore-v2":
        b.load(dst, source, rows=rows, row_bytes=depth * size, transpose=True,
               partitions=spread_over(min(depth, PARTITIONS, rows), rows))  # fmt: skip
        return
    b.load(natural, source, rows=rows, row_bytes=depth * size)
    for at in range(0, rows, BANK):
        width = min(BANK, rows - at)
        for start in range(0, width, PARTITIONS):
            b.nc_transpose(bank, natural, partitions=min(PARTITIONS, width - start),
                           n=min(depth, PARTITIONS), dtype=dtype)  # fmt: skip
        b.tensor_copy(dst, bank, n=width, partitions=min(depth, PARTITIONS), dtype=dtype)


@dataclass
class Forward:
    """Builder state of one forward Program."""

    b: Builder
    shape: Shape
    dtype: torch.dtype
    sources: dict[str, Pool]
    out_dtype: torch.dtype
    bias: TensorSpec | None = None
    dropout: bool = False
    units: int = 2
    pools: dict[str, Pool] = field(default_factory=dict)

    def allocate(self) -> None:
        """All pools; keys and values of as many heads as are in flight."""
        b, s, size = self.b, self.shape, self.dtype.itemsize
        block = min(s.keys, KEY_BLOCK)
        blocks = ceil_div(s.keys, KEY_BLOCK)
        apart = self.units if s.group < self.units else 1
        tiles = ceil_div(block, PARTITIONS)
        each = blocks * (turned_columns(block, s.depth) + tiles * s.value_depth) * size
        deep = 2 if 2 * apart * each <= b.sbuf_room_bytes // 2 else 1
        self.kept = apart * each * deep <= b.sbuf_room_bytes * 2 // 3
        slots = blocks * apart * deep if self.kept else 2 * self.units
        u = self.units

        def sbuf(name: str, nbytes: int, slots: int) -> None:
            self.pools[name] = b.sbuf(name, free_bytes=nbytes, slots=slots)

        turned_bytes = turned_columns(block, s.depth) * size
        sbuf("keys", turned_bytes, slots)
        sbuf("values", tiles * s.value_depth * size, slots)
        sbuf("query", turned_columns(min(s.queries, PARTITIONS), s.depth) * size, 2 * u)
        self.turns = size != 2 or b.core.name == "NeuronCore-v2"
        if self.turns:
            sbuf("natural", tiles * s.depth * size, 2)
        sbuf("weights", block * size, 2 * u)
        sbuf("weights_turned", tiles * PARTITIONS * size, 2 * u)
        if self.bias is not None or self.dropout:
            sbuf("extra", block * 4, u)
        sbuf("sum", s.value_depth * 4, 2 * u)
        sbuf("result", s.value_depth * self.out_dtype.itemsize, 2 * u)
        for name in ("low", "total", "block_low", "block_total", "rescale", "inverse", "logsum"):
            sbuf(name, 4, 2 * u)
        if s.causal:
            self.mask_keys = PARTITIONS if s.queries <= FINE_QUERIES else BANK
            sbuf("mask", self.mask_keys * 4, 1)
            b.memset(self.pools["mask"], n=self.mask_keys)
            b.affine_select(self.pools["mask"], self.pools["mask"], n=self.mask_keys,
                            op="greater_equal")  # fmt: skip
        banks = ceil_div(block, BANK)
        self.pools["scores"] = b.psum("scores", free_bytes=2048, slots=banks * u)
        self.pools["turned"] = b.psum("turned", free_bytes=2048, slots=2)
        self.pools["product"] = b.psum("product", free_bytes=2048, slots=u)

    # -- loops ---------------------------------------------------------------------------------
    def run(self) -> None:
        """All heads, `units` at a time."""
        s = self.shape
        if not (s.heads and s.queries):
            return
        self.allocate()
        shared = s.group >= self.units
        per = s.group if shared else self.units
        full, rest = divmod(s.heads, per)
        for first, trips, heads in ((0, full, per), (full, 1, rest)):
            if not trips or not heads:
                continue
            with loop(self.b, trips, "h") as h:
                self._heads(h + first, heads, shared)

    def _heads(self, number: Index, heads: int, shared: bool) -> None:
        """Heads that are loaded together: a group with its keys, or a few with a key set each."""
        sets = 1 if shared else heads
        if self.kept:
            for unit in range(sets):
                self._load_keys(number * sets + unit)
        pairs, rest = divmod(heads, self.units) if shared else (1, 0)
        width = self.units if shared else heads
        for first, trips, units in ((0, pairs, width), (pairs, 1, rest)):
            if not trips or not units:
                continue
            with loop(self.b, trips, "g") as g:
                for start, count, queries, keys in self.shape.extents():
                    with loop(self.b, count, "q") as q:
                        tile = (number * pairs + (g + first)) * ceil_div(
                            self.shape.queries, PARTITIONS) + (q + start)  # fmt: skip
                        self._query_block(number, tile, units, queries, keys, shared)

    def _load_keys(self, number: Index) -> None:
        blocks = ceil_div(self.shape.keys, KEY_BLOCK)
        for at in range(blocks):
            keys = min(KEY_BLOCK, self.shape.keys - at * KEY_BLOCK)
            self._load_block(number * blocks + at, keys)

    def _load_block(self, slot: Index, keys: int) -> None:
        s, b, p = self.shape, self.b, self.pools
        natural = p["natural"][slot] if self.turns else p["keys"][slot]
        load_turned(b, p["keys"][slot], natural, p["turned"][0], self.sources["k"], keys,
                    s.depth, self.dtype)  # fmt: skip
        b.load(p["values"][slot], self.sources["v"], rows=keys,
               row_bytes=s.value_depth * self.dtype.itemsize)  # fmt: skip

    def _query_block(
        self, number: Index, tile: Index, units: int, queries: int, keys: int, shared: bool
    ) -> None:
        b, s, p = self.b, self.shape, self.pools
        for unit in range(units):
            slot = tile * units + unit
            natural = p["natural"][slot] if self.turns else p["query"][slot]
            load_turned(b, p["query"][slot], natural, p["turned"][1], self.sources["q"], queries,
                        s.depth, self.dtype)  # fmt: skip
        blocks = ceil_div(keys, KEY_BLOCK)
        between, last = [(1, blocks - 2)] * (blocks > 2), [(blocks - 1, 1)] * (blocks > 1)
        for first, trips in ((0, 1), *between, *last):
            seen = min(KEY_BLOCK, keys - first * KEY_BLOCK)
            ends = (first == 0, first == blocks - 1)
            with loop(b, trips, "k") as k:
                self._key_block(number, tile, (k + first, blocks), units, (queries, seen), shared,
                                ends)  # fmt: skip

    def _key_block(
        self, number: Index, tile: Index, block: tuple[Index, int], units: int,
        sizes: tuple[int, int], shared: bool, ends: tuple[bool, bool],
    ) -> None:  # fmt: skip
        """One key block (its number, of how many) for all heads in flight, stage by stage."""
        s, (at, blocks), (queries, seen) = self.shape, block, sizes
        whole = ceil_div(s.keys, KEY_BLOCK)
        width = ceil_div(min(s.keys, KEY_BLOCK), BANK)
        plans: list[list[Callable[[], None]]] = []
        for unit in range(units):
            home = number * (1 if shared else units) + (0 if shared else unit)
            kv: Index = home * whole + at
            if not self.kept:
                kv = tile * (units * blocks) + (at * units + unit)
                self._load_block(kv, seen)
            slot = tile * units + unit
            plans.append(_Step(self, slot, kv, unit * width, queries, seen, *ends).stages())
        for emit in (emit for stage in zip(*plans, strict=True) for emit in stage):
            emit()


@dataclass
class _Step:
    """One query block against one key block, for one head."""

    f: Forward
    slot: Index
    kv: Index
    bank: int
    queries: int
    keys: int
    first: bool
    last: bool

    def stages(self) -> list[Callable[[], None]]:
        """What to emit, in order; heads in flight are interleaved between the stages."""
        return [self.scores, self.maximum, self.exponentials, self.turn, self.product, self.finish]

    def _widths(self) -> list[tuple[int, int]]:
        return [(i, min(BANK, self.keys - i * BANK)) for i in range(ceil_div(self.keys, BANK))]

    def ref(self, name: str) -> TileRef:
        """This head's tile of a pool."""
        return self.f.pools[name][self.slot]

    def scores(self) -> None:
        """Q K^T, masked on the diagonal."""
        f = self.f
        b, p, depth = f.b, f.pools, f.shape.depth
        for i, width in self._widths():
            for at in range(0, depth, PARTITIONS):
                b.nc_matmul(p["scores"][self.bank + i], stationary=self.ref("query"),
                            moving=p["keys"][self.kv], k=min(PARTITIONS, depth - at),
                            m=self.queries, n=width, dtype=f.dtype, accumulate=at > 0)  # fmt: skip
        if f.shape.causal and self.last:
            bank = p["scores"][self.bank + (self.keys - 1) // BANK]
            b.tensor_tensor(bank, bank, p["mask"], op="add", n=min(f.mask_keys, self.keys),
                            partitions=self.queries)  # fmt: skip
        if f.bias is not None:
            size = f.bias.itemsize
            b.load(self.ref("extra"), f.sources["bias"], rows=self.queries,
                   row_bytes=self.keys * size)  # fmt: skip
            for i, width in self._widths():
                bank = p["scores"][self.bank + i]
                b.tensor_tensor(bank, bank, self.ref("extra"), op="add", n=width,
                                partitions=self.queries)  # fmt: skip

    def maximum(self) -> None:
        """-max of the scores, joined with the blocks before."""
        f, parts = self.f, self.queries
        banks = [f.pools["scores"][self.bank + i] for i, _ in self._widths()]
        given, name = {"n": 1, "partitions": parts}, "low" if self.first else "block_low"
        f.b.tensor_reduce(self.ref(name), banks, op="max", n=self.keys, partitions=parts)
        f.b.tensor_scalar(self.ref(name), self.ref(name), op="multiply", **given)  # type: ignore[arg-type]
        if not self.first:
            f.b.tensor_tensor(self.ref("block_low"), self.ref("block_low"), self.ref("low"),
                              op="min", **given)  # type: ignore[arg-type] # fmt: skip
            f.b.activation(self.ref("rescale"), [self.ref("block_low"), self.ref("low")],
                           op="exp", **given)  # type: ignore[arg-type] # fmt: skip
            f.b.tensor_copy(self.ref("low"), self.ref("block_low"), **given)  # type: ignore[arg-type]

    def exponentials(self) -> None:
        """exp(scale * scores - max) and its row sums, straight from PSUM."""
        f, parts = self.f, self.queries
        banks = [f.pools["scores"][self.bank + i] for i, _ in self._widths()]
        total = self.ref("total" if self.first else "block_total")
        out = None if f.dtype == FP32 else f.dtype
        f.b.activation(self.ref("weights"), [*banks, self.ref("low")], op="exp", reduce=total,
                       n=self.keys, partitions=parts, dtype=FP32, out_dtype=out)  # fmt: skip
        if not self.first:
            f.b.scalar_tensor_tensor(self.ref("total"), [self.ref("total"), self.ref("rescale")],
                                     total, op="multiply,add", n=1, partitions=parts)  # fmt: skip
        if f.dropout:
            f.b.rng(self.ref("extra"), n=self.keys, partitions=parts)
            f.b.scalar_tensor_tensor(self.ref("weights"), self.ref("extra"), self.ref("weights"),
                                     op="is_ge,multiply", n=self.keys, partitions=parts,
                                     dtype=f.dtype)  # fmt: skip

    def turn(self) -> None:
        """Keys onto partitions, four 128 x 128 blocks to a PSUM bank."""
        f, b = self.f, self.f.b
        for i, width in self._widths():
            bank = f.pools["turned"][i]
            blocks = ceil_div(width, PARTITIONS)
            full, rest = divmod(width, PARTITIONS)
            for trips, n in [(full, PARTITIONS)] * bool(full) + [(1, rest)] * bool(rest):
                with loop(b, trips, "t"):
                    b.nc_transpose(bank, self.ref("weights"), partitions=self.queries, n=n,
                                   dtype=f.dtype)  # fmt: skip
            copy = b.tensor_copy if i % 2 == 0 else _scalar_copy(b)
            copy(self.ref("weights_turned"), bank, n=blocks * self.queries,
                 partitions=min(width, PARTITIONS), dtype=f.dtype)  # fmt: skip

    def product(self) -> None:
        """P V, accumulated over the key block in PSUM."""
        f = self.f
        full, rest = divmod(self.keys, PARTITIONS)
        bank = f.pools["product"][self.bank]
        for trips, k in ((full, PARTITIONS), (1, rest)):
            if not trips or not k:
                continue
            with loop(f.b, trips, "k"):
                f.b.nc_matmul(bank, stationary=self.ref("weights_turned"),
                              moving=f.pools["values"][self.kv], k=k, m=self.queries,
                              n=f.shape.value_depth, dtype=f.dtype, accumulate=True)  # fmt: skip

    def finish(self) -> None:
        """Join the block's product; after the last block divide by the sum and store."""
        f, b, n, parts = self.f, self.f.b, self.f.shape.value_depth, self.queries
        bank = f.pools["product"][self.bank]
        if not self.first:
            b.scalar_tensor_tensor(self.ref("sum"), [self.ref("sum"), self.ref("rescale")], bank,
                                   op="multiply,add", n=n, partitions=parts)  # fmt: skip
        elif not self.last:
            b.tensor_copy(self.ref("sum"), bank, n=n, partitions=parts)
        if not self.last:
            return
        source = bank if self.first else self.ref("sum")
        out = None if f.out_dtype == FP32 else f.out_dtype
        b.reciprocal(self.ref("inverse"), self.ref("total"), n=1, partitions=parts)
        b.tensor_scalar(self.ref("result"), [source, self.ref("inverse")], op="multiply", n=n,
                        partitions=parts, dtype=FP32, out_dtype=out)  # fmt: skip
        b.store(f.sources["out"], self.ref("result"), rows=parts,
                row_bytes=n * f.out_dtype.itemsize)  # fmt: skip
        if "lse" in f.sources:
            b.activation(self.ref("logsum"), self.ref("total"), op="log", n=1, partitions=parts)
            b.tensor_tensor(self.ref("logsum"), self.ref("logsum"), self.ref("low"),
                            op="subtract", n=1, partitions=parts)  # fmt: skip
            b.store(f.sources["lse"], self.ref("logsum"), rows=parts, row_bytes=4)


def _scalar_copy(b: Builder) -> Callable[..., None]:
    return lambda dst, src, **given: b.activation(dst, src, op="copy", **given)


@lowering(
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)  # fmt: skip
def attention(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """softmax(q k^T * scale + bias) v and the log of its row sums."""
    q, k, v = call.args[:3]
    bias = next((a for a in call.args[3:] if isinstance(a, TensorSpec)), None)
    causal = next((a for a in call.args[3:] if isinstance(a, bool)), False)
    dropout = any(isinstance(a, float) and a > 0 for a in call.args[3:5])
    b = Builder(core, call.name.removeprefix("aten::"))
    names = {"q": q, "k": k, "v": v, "out": call.outs[0]}
    if len(call.outs) > 1 and call.outs[1].numel:
        names["lse"] = call.outs[1]
    if bias is not None:
        names["bias"] = bias
    sources = {name: b.hbm(name, nbytes=spec.nbytes) for name, spec in names.items()}
    dtype = array_dtype(call.name, q.dtype)
    shape = Shape.of(q, k, v, causal, shards)
    Forward(b, shape, dtype, sources, call.outs[0].dtype, bias, dropout).run()
    return b.build()
