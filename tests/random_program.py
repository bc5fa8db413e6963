"""Random Programs, from a seed or as hypothesis draws them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from hypothesis import strategies as st

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.memory import Affine, LoopVar, Pool, TileRef
from torch_trn.program import Builder, Program

T = TypeVar("T")
BF16 = torch.bfloat16


class Source(Protocol):
    """What random.Random offers and a RandomProgram asks for."""

    def randint(self, a: int, b: int) -> int: ...
    def choice(self, seq: Sequence[T]) -> T: ...


class Drawn:
    """The same from hypothesis, so that a failing Program shrinks."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def randint(self, a: int, b: int) -> int:
        return self._draw(st.integers(a, b))

    def choice(self, seq: Sequence[T]) -> T:
        return self._draw(st.sampled_from(seq))


class RandomProgram:
    """Loops over random instructions and tiles of pools of random depth."""

    def __init__(
        self, source: Source, core: CoreSpec, *, dma: bool, open_engines: bool = False,
        trips: Sequence[int] = (0, 1, 2, 3, 4), outer: Sequence[int] = (4,),
    ) -> None:  # fmt: skip
        self.rng, self.trips, self.outer, self.open_engines = source, trips, outer, open_engines
        self.builder = b = Builder(core, "random")
        self.kinds = 7 if dma else 4
        parts = (1, 3, 50)
        self.hbm = [b.hbm(name, nbytes=1 << 20, parts=source.choice(parts)) for name in "xy"]
        self.sbuf = [b.sbuf(f"t{i}", free_bytes=2048, slots=source.randint(1, 4)) for i in range(4)]
        self.acc = b.psum("acc", free_bytes=2048, slots=source.randint(1, 4))

    def build(self) -> Program:
        with self.builder.repeat(self.rng.choice(self.outer), "outer") as outer:
            self.statements([outer])
        return self.builder.build()

    def tile(self, pool: Pool, variables: list[LoopVar]) -> TileRef:
        index = Affine(self.rng.randint(0, 3))
        for variable in variables:
            index = index + variable * self.rng.randint(-2, 3)
        return pool[index]

    def statements(self, variables: list[LoopVar]) -> None:
        for _ in range(self.rng.randint(2, 5)):
            kind = self.rng.randint(0, self.kinds - 1)
            if kind == 0 and len(variables) < 3:
                with self.builder.repeat(self.rng.choice(self.trips), f"i{len(variables)}") as i:
                    self.statements([*variables, i])
            else:
                self.statement(kind, variables)

    def statement(self, kind: int, variables: list[LoopVar]) -> None:
        b, rng = self.builder, self.rng
        a, c = (self.tile(rng.choice(self.sbuf), variables) for _ in range(2))
        acc, x, y = (self.tile(pool, variables) for pool in (self.acc, *self.hbm))
        n, rows = rng.randint(1, 512), rng.randint(1, 128)
        if kind == 1:
            b.nc_matmul(acc, stationary=a, moving=c, k=1, m=1, n=n, dtype=BF16)
        elif kind == 2 and self.open_engines:
            with b.any_engine():
                b.tensor_scalar(a, c, op="multiply", n=n)
                b.activation(a, c, op="copy", n=n)
        elif kind == 2:
            b.activation(a, [acc, c], op="exp", n=n)
        elif kind <= 3:
            b.tensor_tensor(a, a, c, op="max", n=n, engine=rng.choice((Engine.GPSIMD, None)))
        elif kind == 4:
            b.load(a, x, rows=rows, row_bytes=4 * n, queue=rng.choice(("load", "other")))
        elif kind == 5:
            b.store(y, c, rows=rows, row_bytes=4 * n)
        else:
            b.copy_hbm(x, y, rows=rows, row_bytes=n)


def seeded(seed: int, core: CoreSpec, *, dma: bool) -> Program:
    """The Program of a seed."""
    return RandomProgram(random.Random(seed), core, dma=dma).build()


@st.composite
def programs(draw: Any, core: CoreSpec, **options: Any) -> Program:
    """Any Program: engines and queues may run away from each other."""
    options.setdefault("dma", True)
    return RandomProgram(Drawn(draw), core, **options).build()


@st.composite
def pipelines(draw: Any, core: CoreSpec) -> Program:
    """Loads, a few passes, stores, in two loops: what bounds it holds all else back."""
    rng = Drawn(draw)
    b = Builder(core, "pipeline")
    x, y = (b.hbm(name, nbytes=1 << 24, parts=rng.choice((1, 7, 640))) for name in "xy")
    t, u = (b.sbuf(name, free_bytes=2048, slots=rng.randint(1, 5)) for name in "tu")
    w = b.sbuf("w", free_bytes=256)
    acc = b.psum("acc", free_bytes=2048, slots=rng.randint(1, 3))
    b.load(w, x, rows=128, row_bytes=256)
    columns = rng.choice((64, 512))
    trips = rng.randint(20, 160)
    with b.repeat(rng.randint(1, 6), "o") as o, b.repeat(trips, "i") as i:
        tile = o * trips + i
        b.load(
            t[tile], x[tile * rng.choice((0, 1, 3))], rows=128, row_bytes=rng.choice((512, 2048))
        )
        with b.repeat(rng.randint(1, 4), "k"):
            b.nc_matmul(
                acc[tile], stationary=w, moving=t[tile], k=128, m=128, n=columns, dtype=BF16
            )
        if rng.choice((False, True)):
            b.activation(u[tile], acc[tile], op="exp", n=rng.randint(64, 512))
        else:
            with b.any_engine():
                b.tensor_copy(u[tile], acc[tile], n=512)
                b.activation(u[tile], acc[tile], op="copy", n=512)
        b.store(y[i + rng.randint(0, 3)], u[tile], rows=rng.choice((16, 128)), row_bytes=1024)
    b.load(t[0], y[rng.randint(0, 700)], rows=128, row_bytes=64, queue="late")
    return b.build()
