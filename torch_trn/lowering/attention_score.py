"""Steps of attention's forward: a block of queries against a block of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch_trn.isa import Engine
from torch_trn.lowering.attention_heads import BANK, Place, chunks_of, load_turned, store_rows
from torch_trn.lowering.attention_mask import NO_MAXIMUM
from torch_trn.lowering.attention_plan import Run
from torch_trn.lowering.layout import PARTITIONS
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef, affine

if TYPE_CHECKING:
    from torch_trn.lowering.attention import Forward


@dataclass
class QueryBlock:
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

    block: QueryBlock
    run: Run
    at: Index
    count: Index

    def __post_init__(self) -> None:
        self.f, self.rows, self.keys = self.block.f, self.block.rows, self.run.keys
        f = self.f
        self.kv = f._slot(self.block.head[0], self.at) if f.kept else self.count
        #: Keys in the loaded block, of which this step may see fewer.
        whole = f.heads.keys - self.run.first * f.block
        self.loaded = min(f.block, whole) if f.kept else self.keys

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
            f._load_block(self.block.head[0], self.kv, self.at * f.block, self.keys)
        query, keys = f.pools["query"][self.block.tile], f.pools["keys"][self.kv]
        for start, width in chunks_of(self.keys, BANK):
            for index, (_, count) in enumerate(chunks_of(h.depth)):
                b.nc_matmul(
                    scores.view(FP32, (1, width), offset=start),
                    stationary=query.view(dtype, (1, self.rows), offset=index * self.rows),
                    moving=keys.view(dtype, (1, width), offset=index * self.loaded + start),
                    k=count, m=self.rows, n=width, dtype=dtype, accumulate=index > 0,
                )  # fmt: skip
        f.mask.add(scores, self.block.head, self.block.query, self.at * f.block, self.count,
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
