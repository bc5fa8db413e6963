"""Negative log likelihood: one element per row by indirect DMA; the gradient scatters it back."""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
indexed_rows = None
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, Grid, Operand, ceil_div, flat
from torch_trn.lowering.move import fill, mover
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, lower_kernel
from torch_trn.memory import Pool
from torch_trn.program import Builder, Program

_NONE, _MEAN = 0, 1


@lowering("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """loss, total_weight of (log probabilities, target, weight, reduction, ignore_index)."""
    x, target, weight, reduction = call.args[:4]
    ignored = call.arg(4, -100)
    count = target.numel
    rows = [target, x] if weight is None else [target, x, weight]
    outs = list(call.outs[:2])
    walked = flat(count, [outs[0], outs[-1], *rows])
    operands = list(walked.operands)
    # Each row's element is fetched by its target: a descriptor of one element.
    for position in range(3, len(operands)):
        operands[position] = Operand(operands[position].spec, "full", 1, index=0)
    if reduction != _NONE:
        operands[0] = Operand(outs[0], "one")
    operands[1] = Operand(outs[-1], "one")
    kernel = Kernel(core, Grid(walked.rows, walked.cols, tuple(operands), False), 2, 1)
    spot, picked, *weights = kernel.ins
    counted = kernel.binary("not_equal", spot, ignored, torch.float32)
    if weights:
        counted = counted * weights[0]
    loss = kernel.stt(picked, "multiply", -1.0, "multiply", counted)
    if reduction == _NONE:
        kernel.store(0, loss)
    else:
        kernel.total(0, loss)
    if len(call.outs) > 1:
        kernel.total(1, counted)
    return lower_kernel(kernel, call.name)


@lowering("aten::nll_loss_backward", "aten::nll_loss2d_backward")
def nll_loss_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros, then -grad (times weight over total weight) at each row's target."""
    grad, x, target = call.args[:3]
    out = call.outs[0]
    b = mover(core, call.name)
    result = b.hbm("out0", nbytes=out.nbytes)
    fill(b, result, ceil_div(out.nbytes, shards))
    source = b.hbm("grad", nbytes=grad.nbytes)
    count = ceil_div(target.numel, shards)
    if grad.numel == 1 and count:
        # One number for all rows: scaled once, then scattered from SBUF.
        _scatter_constant(b, result, source, target, count, out)
    else:
        indexed_rows(b, result, target, count, out.itemsize, source, scatter=True)
    return b.build()


def _scatter_constant(
    b: Builder, result: Pool, source: Pool, target: TensorSpec, count: int, out: TensorSpec
) -> None:
    """The same value for all rows of `target`, written at their positions."""
    per = max(1, min(64, ceil_div(count, PARTITIONS)))
    numbers = b.hbm("target", nbytes=target.nbytes)
    scale = b.sbuf("scale", free_bytes=4)
    b.load(scale, source, rows=PARTITIONS, row_bytes=out.itemsize)
    index = b.sbuf("index", free_bytes=per * target.itemsize, slots=3)
    tile = b.sbuf("rows", free_bytes=per * 4, slots=3)
    for trips, rows in ((count // (PARTITIONS * per), PARTITIONS * per),
                        (1, count % (PARTITIONS * per))):  # fmt: skip
        if not trips or not rows:
            continue
        parts = min(PARTITIONS, rows)
        n = ceil_div(rows, parts)
        with loop(b, trips, "g") as g:
            b.load(index[g], numbers, rows=parts, row_bytes=n * target.itemsize)
            b.tensor_scalar(tile[g], [index[g], scale], op="not_equal,multiply", n=n,
                            partitions=parts, dtype=torch.int32,
                            out_dtype=None if out.dtype == torch.int32 else out.dtype)  # fmt: skip
            b.store(result, tile[g], rows=rows, row_bytes=out.itemsize, index=index[g])
