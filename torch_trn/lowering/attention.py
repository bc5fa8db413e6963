"""Fused attention, forward: flash attention over blocks of 128 queries and up to 1,024 keys.

Scores lie in PSUM [queries, keys]; their maximum is VectorE's, exp and its sum ScalarE's (one
activation from PSUM); probabilities are turned on TensorE so that keys are on partitions for the
product with V. The scores of a step are issued before the products of the one before, so that
TensorE does not wait for the other engines. Causal masks skip the key blocks above the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.lowering.attention_heads import (
    BANK,
    Heads,
    Operand,
    Place,
    chunks_of,
    load_rows,
    load_turned,
    named,
    refuse_dropout,
    store_rows,
    tiles_of,
    turned_columns,
    turns_on_array,
)
from torch_trn.lowering.attention_mask import NO_MAXIMUM, Mask
from torch_trn.lowering.attention_pipeline import (
    FEW_EXTENTS,
    LONG_STEPS,
    STEPS_TOGETHER,
    Pipeline,
    groups,
)
from torch_trn.lowering.attention_plan import KEY_BLOCK, Run, extents, runs_of
from torch_trn.lowering.call import OpCall
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, TileRef, affine
from torch_trn.program import Builder, Program

#: Keys and values of a head stay in SBUF where they take at most one part of so many.
KEYS_SHARE = 2


@dataclass
class Forward:
    """Builder state of one forward Program."""

    b: Builder
    heads: Heads
    dtype: torch.dtype
    operands: dict[str, Operand]
    mask: Mask
    pools: dict[str, Pool] = field(default_factory=dict)

    def allocate(self, together: int) -> None:
        """All pools; keys and values of ``together`` sets are in flight, twice where they fit."""
        b, h, size = self.b, self.heads, self.dtype.itemsize
        block, rows = min(h.keys, KEY_BLOCK), min(h.rows, PARTITIONS)
        blocks = ceil_div(h.keys, KEY_BLOCK)
        tiles = ceil_div(block, PARTITIONS)
        each = blocks * (turned_columns(block, h.depth) + tiles * h.value_depth) * size * together
        room = b.sbuf_room_bytes // KEYS_SHARE
        self.kept = each <= room
        deep = 2 if 2 * each <= room else 1
        slots = blocks * together * deep if self.kept else 4

        def sbuf(name: str, nbytes: int, slots: int = 2) -> None:
            self.pools[name] = b.sbuf(name, free_bytes=nbytes, slots=slots)

        sbuf("keys", turned_columns(block, h.depth) * size, slots)
        sbuf("values", tiles * h.value_depth * size, slots)
        sbuf("query", turned_columns(rows, h.depth) * size, 4)
        #: A causal step may see a part of its block only, which then must be of whole tiles.
        self.adjacent = self.operands["v"].adjoins() and not h.causal
        self.turns = turns_on_array(b.core, self.dtype)
        if self.turns:
            sbuf("natural", tiles * h.depth * size)
            sbuf("natural_query", h.depth * size, 4)
        # One bank of scores leaves room for a third step in flight: its own work is short.
        lag = 2 if block <= BANK else 1
        self.flow = Pipeline(b, lag)
        sbuf("weights", block * size, lag + 1)
        sbuf("weights_turned", min(tiles, BANK // PARTITIONS) * rows * size, 4)
        sbuf("sum", h.value_depth * 4)
        sbuf("result", h.value_depth * self.operands["out"].dtype.itemsize, 4)
        for name in ("low", "total", "block_total", "rescale", "logsum"):
            sbuf(name, 4, 6)
        self.mask.allocate(block, max(count for _, count, _, _ in self.plan))
        self.pools["scores"] = b.psum("scores", free_bytes=block * 4, slots=2 * lag)
        self.pools["turned"] = b.psum("turned", free_bytes=2048, slots=2)
        self.pools["product"] = b.psum("product", free_bytes=2048, slots=2)

    # -- loops ---------------------------------------------------------------------------------
    def run(self) -> None:
        """All sets of heads of this core."""
        h = self.heads
        if h.empty:
            return
        if not h.keys:
            self._without_keys()
            return
        self.plan = [
            (first, count, rows, runs_of(seen, first * PARTITIONS if h.causal else seen))
            for first, count, rows, seen in extents(h)
        ]
        self.steps = sum(count * sum(run.trips for run in runs) for _, count, _, runs in self.plan)
        members = min(h.members, ceil_div(STEPS_TOGETHER, self.steps))
        sets = min(h.sets, ceil_div(STEPS_TOGETHER, self.steps * h.members))
        self.allocate(sets)
        for first, trips, count in groups(h.sets, sets):
            with loop(self.b, trips, "h") as n:
                self._sets(n * count + first, count, members)

    def _sets(self, number: Index, count: int, members: int) -> None:
        """``count`` sets whose keys are loaded together."""
        for unit in range(count if self.kept else 0):
            for at, (start, keys) in enumerate(chunks_of(self.heads.keys, KEY_BLOCK)):
                self._load_block(number + unit, self._slot(number + unit, at), start, keys)
        for unit in range(count):
            for first, trips, group in groups(self.heads.members, members):
                with loop(self.b, trips, "g") as g:
                    for member in range(group):
                        self._member(number + unit, g * group + (first + member))
                    # The products of a loop's last step belong to its body.
                    if trips > 1:
                        self.flow.drain()
        self.flow.drain()

    def _slot(self, number: Index, at: Index) -> Index:
        return number * ceil_div(self.heads.keys, KEY_BLOCK) + at

    def _load_block(self, number: Index, slot: Index, start: Index, keys: int) -> None:
        b, p, place = self.b, self.pools, self.heads.place(number, 0)
        load_turned(b, p["keys"][slot], p["natural"][slot] if self.turns else None,
                    (p["turned"], 0), self.operands["k"], place, start, keys)  # fmt: skip
        load_rows(b, p["values"][slot], self.operands["v"], place, start, keys,
                  adjacent=self.adjacent)  # fmt: skip

    def _member(self, number: Index, member: Index) -> None:
        """One head, or the folded heads of a set: all its queries."""
        done = 0
        head = number * self.heads.members + member
        for first, count, rows, runs in self.plan:
            each = sum(run.trips for run in runs)

            def block(
                q: Index, rows: int = rows, runs: list[Run] = runs, first: int = first,
                base: Index = head * self.steps + done, each: int = each,
            ) -> Block:  # fmt: skip
                tile = head * ceil_div(self.heads.rows, PARTITIONS) + (q + first)
                return Block(self, (number, member), q + first, tile, base + q * each, rows, runs)

            apart = each > LONG_STEPS and len(self.plan) > FEW_EXTENTS
            self.flow.blocks(block, count, each, "q", apart)
            done += count * each

    def _without_keys(self) -> None:
        """No key at all: results are zero."""
        b, h = self.b, self.heads
        tiles = {name: b.sbuf(name, free_bytes=4 * h.value_depth) for name in ("out", "lse")}
        for name in ("out", "lse") if h.value_depth else ():
            if name not in self.operands:
                continue
            target = self.operands[name]
            b.memset(tiles[name], n=target.width[0], dtype=target.dtype)
            with loop(b, h.sets, "h") as n, loop(b, h.members, "g") as g:
                for first, count, rows in tiles_of(h.rows):
                    with loop(b, count, "q") as q:
                        store_rows(b, target, tiles[name][0], h.place(n, g),
                                   (q + first) * PARTITIONS, rows)  # fmt: skip


@dataclass
class Block:
    """One block of queries of one head against all the keys it sees."""

    f: Forward
    head: Place
    query: Index
    tile: Index
    base: Index
    rows: int
    runs: list[Run]

    def emit(self) -> None:
        """Loads the queries and takes every step but the last one's products."""
        f, p = self.f, self.f.pools
        load_turned(f.b, p["query"][self.tile],
                    p["natural_query"][self.tile] if f.turns else None, (p["turned"], 0),
                    f.operands["q"], f.heads.place(*self.head), self.query * PARTITIONS,
                    self.rows, "query")  # fmt: skip
        for run in self.runs:
            f.flow.steps(partial(self.step, run), run.trips, "k")

    def backwards(self, count: int) -> list[Step]:
        """The last ``count`` steps (or all), the last one first."""
        found = [
            self.step(run, at)
            for run in reversed(self.runs)
            for at in reversed(range(max(0, run.trips - count), run.trips))
        ]
        return found[:count]

    def step(self, run: Run, at: Index) -> Step:
        """The step against the key block ``at`` of ``run``."""
        block = affine(at) + run.first
        return Step(self, run, block, block + self.base)


@dataclass
class Step:
    """One query block against one key block; ``count`` numbers all steps of the core."""

    block: Block
    run: Run
    at: Index
    count: Index

    def __post_init__(self) -> None:
        self.f, self.rows, self.keys = self.block.f, self.block.rows, self.run.keys
        f = self.f
        self.kv = f._slot(self.block.head[0], self.at) if f.kept else self.count
        #: Keys in the loaded block, of which this step may see fewer.
        whole = f.heads.keys - self.run.first * KEY_BLOCK
        self.loaded = min(KEY_BLOCK, whole) if f.kept else self.keys

    def ref(self, name: str, before: int = 0) -> TileRef:
        """This step's tile of a pool (or that of the step before)."""
        return self.f.pools[name][self.count - before]

    def issue(self) -> None:
        """Scores and their maximum."""
        self.scores()
        self.maximum()

    def scores(self) -> None:
        """Q K^T, scaled and masked where ScalarE cannot do that on the way to exp."""
        f, dtype = self.f, self.f.dtype
        b, h, scores = f.b, f.heads, self.ref("scores")
        if not f.kept:
            f._load_block(self.block.head[0], self.kv, self.at * KEY_BLOCK, self.keys)
        query, keys = f.pools["query"][self.block.tile], f.pools["keys"][self.kv]
        for start, width in chunks_of(self.keys, BANK):
            for index, (_, count) in enumerate(chunks_of(h.depth)):
                b.nc_matmul(
                    scores.view(FP32, (1, width), offset=start),
                    stationary=query.view(dtype, (1, self.rows), offset=index * self.rows),
                    moving=keys.view(dtype, (1, width), offset=index * self.loaded + start),
                    k=count, m=self.rows, n=width, dtype=dtype, accumulate=index > 0,
                )  # fmt: skip
        f.mask.add(scores, self.block.head, self.block.query, self.at * KEY_BLOCK, self.count,
                   self.rows, self.keys, self.run.masked)  # fmt: skip

    def maximum(self) -> None:
        """low = -max of the scaled scores so far."""
        f, low, factor = self.f, self.ref("low"), self.f.mask.factor
        f.b.tensor_reduce(low, self.ref("scores"), op="max", n=self.keys, partitions=self.rows)
        if self.run.start:
            # Short chains are many: GpSimdE has time for their small steps, VectorE has not.
            engine = Engine.GPSIMD if self.run.end else None
            f.b.tensor_scalar(low, low, op="multiply,min", operands=(-factor, NO_MAXIMUM),
                              engine=engine, n=1, partitions=self.rows)  # fmt: skip
            return
        old = self.ref("low", 1)
        f.b.scalar_tensor_tensor(
            low, low, old, op="multiply,min", scalar=-factor, n=1, partitions=self.rows
        )

    def weigh(self) -> None:
        """exp(scale * scores - max) and its row sums, straight from PSUM; exp(old - new max)."""
        f = self.f
        block_total = self.ref("total" if self.run.start else "block_total")
        if not self.run.start:
            f.b.activation(self.ref("rescale"), [self.ref("low", 1), self.ref("low")], op="exp",
                           scale=-1.0, bias=None, n=1, partitions=self.rows)  # fmt: skip
        f.b.activation(self.ref("weights"), [self.ref("scores"), self.ref("low")], op="exp",
                       scale=f.mask.factor, bias=None, reduce=block_total, n=self.keys,
                       partitions=self.rows, dtype=FP32,
                       out_dtype=None if f.dtype == FP32 else f.dtype)  # fmt: skip

    def turn(self) -> None:
        """Keys onto partitions, four 128 x 128 blocks to a PSUM bank."""
        f, b, dtype, rows = self.f, self.f.b, self.f.dtype, self.rows
        weights = self.ref("weights")
        for bank, (start, width) in enumerate(chunks_of(self.keys, BANK)):
            tile, parts = f.pools["turned"][bank], chunks_of(width)
            for at, (first, n) in enumerate(parts):
                source = weights.view(dtype, (1, n), offset=start + first)
                if f.adjacent and n == PARTITIONS:
                    tiles = self.keys // PARTITIONS
                    source = weights.view(dtype, (tiles, n), offset=(start + first) // n)
                b.nc_transpose(tile.view(dtype, (1, rows), offset=at * rows), source,
                               partitions=rows, n=n, dtype=dtype)  # fmt: skip
            n, count = len(parts) * rows, min(width, PARTITIONS)
            target = f.pools["weights_turned"][self.count * 2 + bank]
            if bank == 0 and self.keys > BANK:
                b.activation(target, tile, op="copy", n=n, partitions=count, dtype=dtype)
            else:
                b.tensor_copy(target, tile, n=n, partitions=count, dtype=dtype)

    def product(self) -> None:
        """P V, accumulated over the key block in PSUM."""
        f, wide, rows, dtype = self.f, self.f.heads.value_depth, self.rows, self.f.dtype
        values = f.pools["values"][self.kv]
        for index, (_, count) in enumerate(chunks_of(self.keys)):
            bank, at = divmod(index, BANK // PARTITIONS)
            turned = f.pools["weights_turned"][self.count * 2 + bank]
            f.b.nc_matmul(
                self.ref("product"), stationary=turned.view(dtype, (1, rows), offset=at * rows),
                moving=values.view(dtype, (1, wide), offset=index * wide), k=count, m=rows, n=wide,
                dtype=dtype, accumulate=index > 0,
            )  # fmt: skip

    def finish(self) -> None:
        """P V, joined with the blocks before; after the last divide by the sum and store."""
        self.product()
        f, b, n, rows = self.f, self.f.b, self.f.heads.value_depth, self.rows
        product, total = self.ref("product"), self.f.pools["sum"][self.block.tile]
        if not self.run.start:
            b.scalar_tensor_tensor(self.ref("total"), [self.ref("total", 1), self.ref("rescale")],
                                   self.ref("block_total"), op="multiply,add", scalar=None,
                                   n=1, partitions=self.rows)  # fmt: skip
            b.scalar_tensor_tensor(
                total, [total, self.ref("rescale")], product, op="multiply,add", scalar=None, n=n,
                partitions=rows,
            )  # fmt: skip
        elif not self.run.end:
            b.tensor_copy(total, product, n=n, partitions=rows)
        if not self.run.end:
            return
        source = product if self.run.start else total
        out, result = f.operands["out"], f.pools["result"][self.block.tile]
        if f.mask.hides_rows:
            self._settle()
        b.tensor_scalar(
            result, [source, self.ref("total")], op="divide", operands=(None,), n=n,
            partitions=rows, out_dtype=None if out.dtype == FP32 else out.dtype,
        )  # fmt: skip
        place, at = f.heads.place(*self.block.head), self.block.query * PARTITIONS
        store_rows(b, out, result, place, at, rows)
        if "lse" in f.operands:
            logsum = self.ref("logsum")
            b.activation(logsum, self.ref("total"), op="log", n=1, partitions=rows)
            b.tensor_tensor(logsum, logsum, self.ref("low"), op="subtract", engine=Engine.GPSIMD,
                            n=1, partitions=rows)  # fmt: skip
            store_rows(b, f.operands["lse"], logsum, place, at, rows)

    def _settle(self) -> None:
        """A row without a key: its sum becomes 1 and its maximum 0, as in the CPU kernel."""
        low, total = self.ref("low"), self.ref("total")
        self.f.b.scalar_tensor_tensor(low, total, low, op="is_gt,multiply", scalar=0.0,
                                      n=1, partitions=self.rows)  # fmt: skip
        self.f.b.scalar_tensor_tensor(total, total, total, op="is_equal,add", scalar=0.0,
                                      n=1, partitions=self.rows)  # fmt: skip


@lowering(
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)  # fmt: skip
def attention(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """softmax(q k^T * scale + bias) v and the log of its row sums."""
    given = named(call)
    q, k, v = call.args[:3]
    refuse_dropout(call.name, given)
    causal = bool(given.get("is_causal"))
    heads = Heads.of(call.name, q, k, v, causal, given.get("scale"), shards)
    b = Builder(core, call.name.removeprefix("aten::"))
    operands = {
        "q": Operand.of(b, heads, "q", "in0", q),
        "k": Operand.of(b, heads, "k", "in1", k, keys=True),
        "v": Operand.of(b, heads, "v", "in2", v, keys=True),
        "out": Operand.of(b, heads, "out", "out0", call.outs[0]),
    }
    if len(call.outs) > 1 and call.outs[1].numel and call.outs[1].ndim == 3:
        operands["lse"] = Operand.of(b, heads, "lse", "out1", call.outs[1])
    mask = Mask.of(b, heads, given, core)
    Forward(b, heads, array_dtype(call.name, q.dtype), operands, mask).run()
    return b.build()
