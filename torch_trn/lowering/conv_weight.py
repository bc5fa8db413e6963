"""Gradients of a convolution's weight and bias.

The weight's gradient contracts over pixels, so both operands are turned to have pixels on
partitions: the outer gradient once per block, the input once per tap. With few input channels
several taps are loaded side by side, so that they are turned, and moved past the array, together.
Each block's products accumulate in PSUM and are added up in SBUF.
"""

from __future__ import annotations

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.reduction import reduce_grid
from torch_trn.lowering.run import loop, lower_kernel
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

#: Pixels of one block: 128-pixel tiles that accumulate in PSUM before they go to SBUF.
BLOCK = 2048

BANK = 512


def bias_gradient(
    name: str, core: CoreSpec, shards: int, grad: TensorSpec, out: TensorSpec
) -> Program:
    """Sums of the gradient over images and pixels, a channel in each partition."""
    dims = [dim for dim in range(grad.ndim) if dim != 1]
    kernel = Kernel(core, reduce_grid(grad.shape, dims, [out], [grad]), 1, shards)
    kernel.store(0, kernel.reduce("add", kernel.ins[0], FP32))
    return lower_kernel(kernel, name)


def weight_gradient(
    name: str, core: CoreSpec, shards: int, grad: TensorSpec, x: TensorSpec, w: TensorSpec,
    dw: TensorSpec, groups: int, transposed: bool,
) -> Program:  # fmt: skip
    """dw[a, b, tap] = sum over pixels of outer[a, pixel] x inner[b, pixel + tap]."""
    outer, inner = (x, grad) if transposed else (grad, x)
    b = Builder(core, name.removeprefix("aten::"))
    task = _WeightGradient(b, name, outer, inner, w, dw, groups)
    task.images = ceil_div(task.images, shards)
    task.run()
    return b.build()


class _WeightGradient:
    """Builder state of one weight gradient."""

    def __init__(
        self, b: Builder, name: str, outer: TensorSpec, inner: TensorSpec, w: TensorSpec,
        dw: TensorSpec, groups: int,
    ) -> None:  # fmt: skip
        self.b, self.groups, self.images = b, groups, outer.shape[0]
        self.rows, self.cols = w.shape[0] // groups, w.shape[1]
        self.taps = product(w.shape[2:])
        self.pixels = product(outer.shape[2:])
        self.read = product(inner.shape[2:])
        self.dtype = array_dtype(name, outer.dtype)
        self.out = dw
        self.sources: dict[str, Pool] = {
            "outer": b.hbm("grad", nbytes=outer.nbytes), "inner": b.hbm("x", nbytes=inner.nbytes),
            "out": b.hbm("dw", nbytes=dw.nbytes),
        }  # fmt: skip

    def run(self) -> None:
        """Groups, then row tiles of the result, column blocks, images, pixel blocks, taps."""
        b = self.b
        if not (self.images and self.pixels and self.rows and self.cols):
            return
        if self.cols == 1 and self.groups > 1:
            self._depthwise()
            return
        self.together = max(1, min(self.images, BLOCK // self.pixels))
        self.span = self.pixels * self.together
        self.pack = max(1, min(self.taps, BANK // self.cols))
        self.width = min(self.cols * self.pack, BANK)
        self._allocate()
        row_tiles = ceil_div(self.rows, PARTITIONS)
        column_blocks = ceil_div(self.cols, self.width)
        with loop(b, self.groups, "g") as g:
            for first, trips, rows in _pieces(self.rows, PARTITIONS):
                with loop(b, trips, "o") as o:
                    for start, repeats, cols in _pieces(self.cols, min(self.cols, BANK)):
                        with loop(b, repeats, "i") as i:
                            number = (g * row_tiles + (o + first)) * column_blocks + (i + start)
                            for packs, count, packed in _pieces(self.taps, self.pack):
                                self._result(number + packs, rows, cols * packed, count)

    def _allocate(self) -> None:
        b, size = self.b, self.dtype.itemsize
        self.block = min(BLOCK, self.span)
        ratio = max(1.0, self.read / self.pixels) if self.pack == 1 else 1.0
        tiles = ceil_div(self.width, PARTITIONS)
        chunks = ceil_div(self.block, PARTITIONS)
        wide = int(self.block * ratio) + 64
        while 2 * (tiles * wide + self.block) * size > b.sbuf_room_bytes // 2 and self.block > BANK:
            self.block //= 2
            chunks, wide = ceil_div(self.block, PARTITIONS), int(self.block * ratio) + 64
        self.amount = lambda pixels: ceil_div(pixels * self.read, self.pixels)
        self.outer = b.sbuf("outer", free_bytes=self.block * size, slots=2)
        self.inner = b.sbuf("inner", free_bytes=wide * size, slots=2 * tiles)
        self.outer_groups = ceil_div(chunks, BANK // PARTITIONS)
        self.outer_turned = b.sbuf("outer_turned", free_bytes=BANK * size,
                                   slots=2 * self.outer_groups)  # fmt: skip
        self.inner_turned = b.sbuf("inner_turned", free_bytes=BANK * size, slots=4)
        budget = (b.sbuf_room_bytes - 8192) // (4 * self.width)
        self.tap_block = max(1, min(self.taps, budget))
        self.total = b.sbuf("total", free_bytes=self.width * 4, slots=self.tap_block)
        self.result = b.sbuf("result", free_bytes=self.width * self.out.itemsize, slots=2)
        self.turned = b.psum("turned", free_bytes=2048, slots=4)
        self.acc = b.psum("acc", free_bytes=2048, slots=4)

    def _result(self, number: Index, rows: int, cols: int, packs: int) -> None:
        """One [rows, cols] tile of the gradient for each of `packs` packs of taps."""
        b = self.b
        for first, trips, taps in _pieces(packs, self.tap_block):
            with loop(b, trips, "taps") as block:
                with loop(b, taps, "tap") as tap:
                    b.memset(self.total[tap], n=cols, partitions=rows)
                images = ceil_div(self.images, self.together)
                with loop(b, images, "image") as n:
                    image = (number * trips + (block + first)) * images + n
                    for start, repeats, pixels in _pieces(self.span, self.block):
                        with loop(b, repeats, "pixels") as p:
                            at = image * ceil_div(self.span, self.block) + (p + start)
                            self._block(at, rows, cols, pixels, taps)
                with loop(b, taps, "tap") as tap:
                    out = None if self.out.dtype == FP32 else self.out.dtype
                    b.tensor_copy(self.result[tap], self.total[tap], n=cols, partitions=rows,
                                  out_dtype=out)  # fmt: skip
                    # Taps lie innermost in HBM; they are gathered in SBUF before one store.
                    b.store(self.sources["out"], self.result[tap], rows=rows,
                            row_bytes=cols * self.out.itemsize)  # fmt: skip

    def _block(self, at: Index, rows: int, cols: int, pixels: int, taps: int) -> None:
        """One block of pixels: the outer gradient turned once, the input for each tap."""
        b, size = self.b, self.dtype.itemsize
        tiles = ceil_div(cols, PARTITIONS)
        b.load(self.outer[at], self.sources["outer"], rows=rows, row_bytes=pixels * size)
        if self.pack == 1:
            self._load_inner(at, cols, tiles, self.amount(pixels))
        groups = self._groups(pixels, 1)
        for number, group in enumerate(groups):
            self._turn([self.outer[at]], self.outer_turned[at * self.outer_groups + number], rows,
                       group, number)  # fmt: skip
        with loop(b, taps, "tap") as tap:
            place = at if self.pack == 1 else tap
            if self.pack > 1:
                self._load_inner(place, cols, tiles, pixels)
            inner = [self.inner[place * tiles + tile] for tile in range(tiles)]
            waiting: tuple[int, list[int]] | None = None
            for number, group in enumerate(self._groups(pixels, tiles)):
                k = min(PARTITIONS, cols)
                self._turn(
                    inner,
                    self.inner_turned[tap * 2 + number],
                    cols if tiles > 1 else k,
                    group,
                    number,
                )
                if waiting is not None:
                    self._multiply(at, tap, *waiting, rows, cols, tiles)
                waiting = (number, group)
            if waiting is not None:
                self._multiply(at, tap, *waiting, rows, cols, tiles)
            b.tensor_tensor(self.total[tap], self.acc[tap], self.total[tap], op="add", n=cols,
                            partitions=rows)  # fmt: skip

    def _load_inner(self, at: Index, cols: int, tiles: int, pixels: int) -> None:
        """[cols, pixels] of the inner operand, 128 rows a tile."""
        for tile in range(tiles):
            k = min(PARTITIONS, cols - tile * PARTITIONS)
            self.b.load(self.inner[at * tiles + tile], self.sources["inner"], rows=k,
                        row_bytes=pixels * self.dtype.itemsize)  # fmt: skip

    def _groups(self, pixels: int, tiles: int) -> list[list[int]]:
        """128-pixel tiles, as many together as fill a PSUM bank."""
        sizes = [min(PARTITIONS, pixels - at) for at in range(0, pixels, PARTITIONS)]
        together = max(1, BANK // (PARTITIONS * tiles))
        return [sizes[at : at + together] for at in range(0, len(sizes), together)]

    def _turn(
        self, sources: list[TileRef], target: TileRef, cols: int, group: list[int], bank: int
    ) -> None:
        """A bank of 128-pixel tiles of [cols, pixels] (128 cols a source), pixels to partitions."""
        b = self.b
        for n in group:
            for tile, source in enumerate(sources):
                k = min(PARTITIONS, cols - tile * PARTITIONS)
                b.nc_transpose(self.turned[bank], source, partitions=k, n=n, dtype=self.dtype)
        width, parts = len(group) * cols, max(group)
        if bank % 2:
            b.activation(target, self.turned[bank], op="copy", n=width, partitions=parts,
                         dtype=self.dtype)  # fmt: skip
        else:
            b.tensor_copy(target, self.turned[bank], n=width, partitions=parts, dtype=self.dtype)

    def _multiply(
        self, at: Index, tap: Index, number: int, group: list[int], rows: int, cols: int, tiles: int
    ) -> None:
        """outer [pixels, rows] x inner [pixels, cols], for each 128 pixels of a bank."""
        together = max(1, BANK // (PARTITIONS * tiles))
        for index, n in enumerate(group):
            outer = (number * together + index) // (BANK // PARTITIONS)
            self.b.nc_matmul(
                self.acc[tap], stationary=self.outer_turned[at * self.outer_groups + outer],
                moving=self.inner_turned[tap * 2 + number], k=n, m=rows, n=cols, dtype=self.dtype,
                accumulate=True,
            )  # fmt: skip

    def _depthwise(self) -> None:
        """A product per tap on VectorE, its sum over pixels by ScalarE; images added by the DMA."""
        b, size = self.b, self.dtype.itemsize
        rows = self.images * self.groups
        chunk = min(self.pixels, BLOCK)
        chunks = ceil_div(self.pixels, chunk)
        read = ceil_div(self.read, chunks)
        outer = b.sbuf("outer", free_bytes=chunk * size, slots=2)
        inner = b.sbuf("inner", free_bytes=(max(read, chunk) + 64) * size, slots=2)
        part = b.sbuf("product", free_bytes=chunk * 4, slots=2)
        sums = b.sbuf("sums", free_bytes=4 * self.taps * self.rows, slots=2)
        for first, trips, parts in _pieces(rows, PARTITIONS):
            with loop(b, trips, "r") as r:
                row = r + first
                b.memset(sums[row], n=self.taps * self.rows, partitions=parts)
                with loop(b, chunks, "c") as c:
                    at = row * chunks + c
                    b.load(inner[at], self.sources["inner"], rows=parts, row_bytes=read * size)
                    with loop(b, self.rows, "output") as o:
                        place = at * self.rows + o
                        b.load(outer[place], self.sources["outer"], rows=parts,
                               row_bytes=chunk * size)  # fmt: skip
                        with loop(b, self.taps, "tap"):
                            b.tensor_tensor(
                                part[at], outer[place], inner[at], op="multiply", n=chunk,
                                partitions=parts, dtype=self.dtype,
                                out_dtype=None if self.dtype == FP32 else FP32,
                            )  # fmt: skip
                            b.activation(part[at], part[at], op="copy", reduce=sums[row], n=chunk,
                                         partitions=parts)  # fmt: skip
                b.store(
                    self.sources["out"],
                    sums[row],
                    rows=parts,
                    row_bytes=self.taps * self.rows * self.out.itemsize,
                    accumulate=True,
                )


def _pieces(total: int, size: int) -> list[tuple[int, int, int]]:
    full, rest = divmod(total, size)
    found = [(0, full, size)] if full else []
    return found + ([(full, 1, rest)] if rest else [])
