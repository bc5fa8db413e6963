"""The gradient of a convolution's bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_trn.chip import CoreSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand
from torch_trn.lowering.reduction import lies_inner, reduce_grid
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32
from torch_trn.program import Builder, Program

if TYPE_CHECKING:
    from torch_trn.lowering.convolution import Named


def bias_gradient(name: str, core: CoreSpec, shards: int, grad: Named, out: Named) -> Program:
    """Sums of the gradient over images and pixels, a channel in each partition."""
    spec, names = grad.spec, (out.name, grad.name)
    dims = [dim for dim in range(spec.ndim) if dim != 1]
    if not spec.numel:
        return _zero(name, core, out)
    if not lies_inner(spec, dims):
        # Channels lie next to each other: a matmul by ones adds up the partitions.
        found = reduce_grid(spec.shape, [1], (), [spec])
        row = Operand(out.spec, "row", spec.shape[1])
        grid = Grid(found.rows, found.cols, (row, *found.operands))
        kernel = Kernel(core, grid, 1, shards, names)
        kernel.rowsum(0, kernel.ins[0])
        return lower_kernel(kernel, name)
    kernel = Kernel(core, reduce_grid(spec.shape, dims, [out.spec], [spec]), 1, shards, names)
    kernel.store(0, kernel.reduce("add", kernel.ins[0], FP32))
    return lower_kernel(kernel, name)


def _zero(name: str, core: CoreSpec, out: Named) -> Program:
    """Without pixels the gradient is zero."""
    b = Builder(core, name.removeprefix("aten::"))
    spec, count = out.spec, out.spec.numel
    if count:
        tile = b.sbuf("zero", free_bytes=spec.nbytes)
        b.memset(tile, value=0.0, n=count, partitions=1, dtype=spec.dtype)
        target = b.hbm(out.name, nbytes=spec.nbytes)[0]
        b.store(target.matrix(spec.dtype, (1, count), (count, spec.strides[0])), tile, rows=1,
                row_bytes=spec.nbytes)  # fmt: skip
    return b.build()
