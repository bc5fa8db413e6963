"""Copies whose sides run along different dims: whole runs to SBUF, reordered there, whole runs out.

A DMA from HBM to HBM would need a descriptor for each element.
"""

from __future__ import annotations

from torch_trn.lowering.layout import PARTITIONS, merge, product
from torch_trn.lowering.move import _ref, blocks
from torch_trn.lowering.part import Part
from torch_trn.memory import Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["permuted"]

#: Runs of so many bytes are worth a descriptor of their own.
GOOD_BYTES = 256

#: Bytes of one partition that a tile may take.
TILE_BYTES = 16384

#: Dims of an access pattern in SBUF (arch2: up to five, one of them the partitions).
SBUF_DIMS = 4


def permuted(
    b: Builder, dst: Pool | TileRef, to: Part, src: Pool | TileRef, source: Part, shards: int,
    name: str,
) -> bool:  # fmt: skip
    """``to`` = ``source`` through SBUF where that takes longer runs; whether it was done."""
    if to.dtype != source.dtype or to.sizes != source.sizes or not to.numel:
        return False
    axes = sorted(range(to.ndim), key=lambda axis: -abs(to.strides[axis]))
    dims = merge([to.sizes[a] for a in axes], [[p.strides[a] for a in axes] for p in (to, source)])
    first = _split(dims, to.dtype.itemsize)
    if first is None:
        return False
    outer, inner = dims[:first], dims[first:]
    width, itemsize = product([size for size, _ in inner]), to.dtype.itemsize
    rows = product([size for size, _ in outer])
    # In SBUF the source's order: its dims by falling stride.
    order = sorted(range(len(inner)), key=lambda i: -inner[i][1][1])
    place = [0] * len(inner)
    step = 1
    for i in reversed(order):
        place[i], step = step, step * inner[i][0]
    came = b.sbuf(f"{name}_in", free_bytes=width * itemsize, slots=2)
    goes = b.sbuf(f"{name}_out", free_bytes=width * itemsize, slots=2)
    walks = (
        Walk(tuple((size, s[1]) for size, s in outer),
             tuple((inner[i][0], inner[i][1][1]) for i in order)),
        Walk(tuple((size, s[0]) for size, s in outer), tuple((size, s[0]) for size, s in inner)),
    )  # fmt: skip
    runs = [_run([(inner[i][0], inner[i][1][1]) for i in order]),
            _run([(size, s[0]) for size, s in inner])]  # fmt: skip
    for block in blocks(b, rows, PARTITIONS, shards):
        b.load(came[block.number],
               _ref(src).window(source.dtype, walks[0], block.count, width, row=block.row,
                                offset=source.offset),
               rows=block.count * (width // runs[0]), row_bytes=runs[0] * itemsize,
               partitions=block.count)  # fmt: skip
        view = came[block.number].view(
            to.dtype, *((p, size) for p, (size, _) in zip(place, inner, strict=True))
        )
        b.tensor_copy(goes[block.number], view, n=width, partitions=block.count, dtype=to.dtype,
                      strided=True)  # fmt: skip
        b.store(_ref(dst).window(to.dtype, walks[1], block.count, width, row=block.row,
                                 offset=to.offset),
                goes[block.number], rows=block.count * (width // runs[1]),
                row_bytes=runs[1] * itemsize, partitions=block.count)  # fmt: skip
    return True


def _run(dims: list[tuple[int, int]]) -> int:
    """Contiguous elements at the end of ``dims``."""
    run = 1
    for size, step in reversed(dims):
        if step != run:
            break
        run *= size
    return run


def _split(dims: list, itemsize: int) -> int | None:
    """The first dim that goes to SBUF's free dimension; None where nothing is won."""
    if len(dims) < 2 or dims[-1][1] == (1, 1) and dims[-1][0] * itemsize >= GOOD_BYTES:
        return None
    best = None
    for first in range(len(dims) - 1, -1, -1):
        inner = dims[first:]
        width = product([size for size, _ in inner])
        if width * itemsize > TILE_BYTES or len(inner) > SBUF_DIMS:
            break
        if any(step < 1 for _, steps in inner for step in steps):
            break
        came = _run(sorted(((n, s[1]) for n, s in inner), key=lambda dim: -dim[1]))
        goes = _run([(n, s[0]) for n, s in inner])
        straight = (
            _run([(n, s[0]) for n, s in inner if s[0] == s[1]]) if inner[-1][1] == (1, 1) else 1
        )
        if min(came, goes) > straight and (best is None or min(came, goes) > best[1]):
            best = (first, min(came, goes))
    return None if best is None else best[0]
