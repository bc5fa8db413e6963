"""A Program: a loop nest of instructions over tiles. It is what is executed, and what is timed.

Loops stay loops: a 8192-cubed matmul is a page of text, and counts come from trip counts.

>>> b = Builder(core, "scale")
>>> x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
>>> tile = b.sbuf("tile", free_bytes=2048, slots=2)
>>> with b.repeat(4, "m") as m:
...     b.load(tile[m], x, rows=128, row_bytes=2048)
...     b.tensor_scalar(tile[m], tile[m], op="multiply", n=512)
...     b.store(y, tile[m], rows=128, row_bytes=2048)
>>> print(b.build())
program scale: 12 instructions, 0 flops, HBM read 1048576 B, HBM write 1048576 B
hbm x 1048576 B
hbm y 1048576 B
sbuf tile 2 x 2048 B/partition
for m in 4:
    tile[m] = dma_copy(x) rows=128 row_bytes=2048 queue=load
    tile[m] = tensor_scalar(tile[m]) multiply n=512 float32 VectorE
    y = dma_copy(tile[m]) rows=128 row_bytes=2048 queue=store
"""

from torch_trn.program.builder import Builder
from torch_trn.program.nest import Node, Program, Repeat, Step

__all__ = ["Builder", "Node", "Program", "Repeat", "Step"]
