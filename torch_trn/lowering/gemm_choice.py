"""A matrix product as a call asks for it, and the plan that is best for it.

Rules name a first plan; where it is far from what the engines could do, the other ways are
scheduled too and the fastest is kept. The choice is made once for each product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import CapacityError
from torch_trn.isa import NcMatmul, NcTranspose
from torch_trn.lowering.gemm import Gemm
from torch_trn.lowering.gemm_block import BANK, Side, Strategy
from torch_trn.lowering.gemm_epilogue import Added, Epilogue
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matrix import Matrix
from torch_trn.lowering.tile import FP32
from torch_trn.program import Builder, Program
from torch_trn.scheduler import schedule

__all__ = ["Product", "array_ps", "program"]

#: A plan within this factor of its bound is taken without looking at others.
GOOD_ENOUGH = 1.02

#: Products that the engines could do in this time are not worth looking for another plan.
SMALL_PS = 2_000_000


@dataclass(frozen=True)
class Product:
    """out = a @ c, ``batch`` times, and what is added to it.

    m, n, batch: this core's share. a and c are multiplied as ``dtypes``.
    """

    a: Matrix
    c: Matrix
    out: Matrix
    m: int
    n: int
    k: int
    batch: int
    dtypes: tuple[torch.dtype, torch.dtype]
    added: Added | None = None
    clipped: bool = False
    """Whether the last core's share is smaller than this."""

    def turned(self) -> Product:
        """The transposed product: c's columns are stationary."""
        added = None if self.added is None else self.added.turned()
        return Product(self.c.turned(), self.a.turned(), self.out.turned(), self.n, self.m, self.k,
                       self.batch, self.dtypes[::-1], added, self.clipped)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which operand is stationary (a, or c where ``swap``), and how the product is tiled."""

    swap: bool = False
    strategy: Strategy = Strategy()


def program(name: str, core: CoreSpec, product: Product) -> Program:
    """The best Program there is for ``product``."""
    if not (product.m and product.n and product.batch):
        return Builder(core, name).build()
    return build(name, core, product, best(core, product))


def build(name: str, core: CoreSpec, product: Product, choice: Choice) -> Program:
    """The Program of one choice."""
    gemm = _planned(name, core, product, choice)
    gemm.run()
    return gemm.b.build()


def _planned(name: str, core: CoreSpec, product: Product, choice: Choice) -> Gemm:
    """The product with its blocks chosen, before its loops are emitted."""
    b = Builder(core, name)
    a, c = product.a.placed(b), product.c.placed(b)
    product = replace(product, a=a, c=c, out=product.out.placed(b))
    task = product.turned() if choice.swap else product
    array = choice.strategy.array_turns
    still, moves = (
        Side(matrix, dtype, not array and _turns_by_dma(core, matrix, dtype))
        for matrix, dtype in zip((task.a.turned(), task.c), task.dtypes, strict=True)
    )
    out = task.out
    by_columns = out.num_rows > 1 and out.col_step != 1 and out.row_step == 1
    gemm = Gemm(b, core, task.m, task.n, task.k, still, moves, out, task.batch,
                turn_output=by_columns, strategy=choice.strategy, clipped=task.clipped)  # fmt: skip
    if task.added is not None:
        Epilogue(gemm, task.added)
    gemm.plan()
    return gemm


@lru_cache(maxsize=4096)
def best(core: CoreSpec, product: Product) -> Choice:
    """The choice whose Program takes the least time on ``core``, of those that are tried.

    One thing after another is changed, and what is faster stays.
    """
    found = rule(core, product)
    bound = _bound_ps(core, product)
    if bound <= SMALL_PS:
        return found
    seen: set[object] = set()
    least = _duration_ps(core, product, found, seen)
    assert least is not None
    for changes in _changes(core, product):
        kept = found
        for change in changes:
            if least <= GOOD_ENOUGH * bound:
                return found
            choice = replace(kept, strategy=replace(kept.strategy, **change))
            if not change:
                choice = replace(kept, swap=not kept.swap)
            duration = _duration_ps(core, product, choice, seen)
            if duration is not None and duration < least:
                least, found = duration, choice
    return found


def _changes(core: CoreSpec, product: Product) -> Iterator[list[dict[str, Any]]]:
    """Groups of fields of a Strategy to try together; an empty one stands for the other operand."""
    yield [{"resident": False}, {"resident": True}, {"resident": True, "rows": 256},
           {"resident": True, "rows": 128}]  # fmt: skip
    yield [{}]
    yield [{"k_tiles": 4}, {"k_tiles": 2}]
    yield [{"waiting": 3}]
    yield [{"banks": 2}]
    if any(_turns_by_dma(core, x, x.dtype) for x in (product.a, product.c)):
        yield [{"array_turns": True}]


def _duration_ps(
    core: CoreSpec, product: Product, choice: Choice, seen: set[object]
) -> int | None:  # fmt: skip
    """How long one choice takes; None where it does not fit, or is one of ``seen``."""
    try:
        gemm = _planned("product", core, product, choice)
    except CapacityError:
        return None
    if (choice.swap, gemm.sizes) in seen:
        return None
    seen.add((choice.swap, gemm.sizes))
    gemm.run()
    return schedule(gemm.b.build(), core).duration_ps


def rule(core: CoreSpec, product: Product) -> Choice:
    """A vector is stationary; so is the narrow operand of a tall product where that pays."""
    m, n, k, out = product.m, product.n, product.k, product.out
    if n == 1 or out.num_cols > 1 and out.col_step != 1 and out.row_step == 1 and m > 1:
        return Choice(swap=True)
    if n > PARTITIONS or m < BANK:
        return Choice()
    dtype = product.dtypes[0]
    turn = array_ps(core, m, PARTITIONS, 1, FP32)
    return Choice(array_ps(core, n, m, k, dtype) + turn < array_ps(core, m, n, k, dtype))


def array_ps(core: CoreSpec, m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """TensorE time of the plain product."""
    total = 0
    for width in (BANK, n % BANK):
        count = n // BANK if width == BANK else 1
        if width and count:
            each = NcMatmul(k=PARTITIONS, m=PARTITIONS, n=width, dtype=dtype).cost(core)
            total += count * each.occupancy_ps
    return total * ceil_div(m, PARTITIONS) * ceil_div(k, PARTITIONS)


def _bound_ps(core: CoreSpec, product: Product) -> int:
    """What no Program of this product can beat: TensorE, or its bytes at the DMA's rate."""
    m, n, k = product.m, product.n, product.k
    array = min(array_ps(core, *shape, k, product.dtypes[0]) for shape in ((m, n), (n, m)))
    bytes_moved = (
        m * k * product.a.dtype.itemsize + k * n * product.c.dtype.itemsize
        + m * n * product.out.dtype.itemsize
    )  # fmt: skip
    for free, matrix, dtype in (
        (m, product.a.turned(), product.dtypes[0]), (n, product.c, product.dtypes[1])
    ):  # fmt: skip
        if Side(matrix, dtype, _turns_by_dma(core, matrix, dtype)).on_array:
            one = NcTranspose(partitions=PARTITIONS, n=PARTITIONS, dtype=dtype).cost(core)
            array += ceil_div(free, PARTITIONS) * ceil_div(k, PARTITIONS) * one.occupancy_ps
    return max(array, bytes_moved * 10**12 // core.dma_bytes_per_s) * product.batch


def _turns_by_dma(core: CoreSpec, matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether the DMA can turn it: 2-byte data, and not on NeuronCore-v2 (arch3)."""
    return core.name != "NeuronCore-v2" and dtype.itemsize == matrix.dtype.itemsize == 2
