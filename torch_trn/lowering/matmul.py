"""The matmul family: mm, bmm, linear, matrix-vector products and their added forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.complexes import refuse_complex
from torch_trn.lowering.gemm_choice import Product, program
from torch_trn.lowering.gemm_epilogue import Added
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div, grid
from torch_trn.lowering.matrix import Matrix
from torch_trn.lowering.pointwise import elementwise
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined, lower_kernel
from torch_trn.lowering.tile import FP32, Scalar
from torch_trn.memory import CORE
from torch_trn.program import Program

#: dtypes that TensorE multiplies (hardware.md section 4); int32 goes through it as fp32.
_ARRAY_DTYPES = frozenset(
    {torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8,
     torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)  # fmt: skip


def array_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype TensorE multiplies `dtype` in; UnsupportedOpError where it cannot."""
    if dtype in _ARRAY_DTYPES:
        return dtype
    if dtype == torch.int32:
        return FP32
    raise UnsupportedOpError(
        name, f"TensorE does not multiply {str(dtype).removeprefix('torch.')}: use a float or int8"
    )


def product(
    name: str, core: CoreSpec, shards: int, a: Matrix, c: Matrix, out: Matrix,
    added: Added | None = None,
) -> Program:  # fmt: skip
    """out = a @ c for the matrices of a batch: the share of one of `shards` physical cores."""
    dtypes = (array_dtype(name, a.dtype), array_dtype(name, c.dtype))
    batch, m, n = out.batch[0], out.num_rows, out.num_cols
    task = Product(a, c, out, m, n, a.num_cols, batch, dtypes, added)
    return program(name.removeprefix("aten::"), core, _share(task, shards))


def _share(task: Product, shards: int) -> Product:
    """This core's part of the batch, the rows or the columns of the result."""
    if shards == 1:
        return task
    m, n, batch = task.m, task.n, task.batch
    if batch >= shards:
        first, sizes = "first_batch", {"batch": ceil_div(batch, shards)}
    elif m >= n or m >= shards * PARTITIONS:
        first, sizes = "first_row", {"m": ceil_div(m, shards)}
    else:
        first, sizes = "first_col", {"n": ceil_div(n, shards)}
    (size,) = sizes.values()
    clipped = size * shards != {"first_batch": batch, "first_row": m, "first_col": n}[first]

    def at(matrix: Matrix) -> Matrix:
        return replace(matrix, **{first: CORE * size})  # type: ignore[arg-type]

    added = task.added
    if added is not None:
        bias = None if added.bias is None else at(added.bias)
        added = replace(added, bias=bias, scales=tuple(at(scale) for scale in added.scales))
    a = task.a if first == "first_col" else at(task.a)
    c = task.c if first == "first_row" else at(task.c)
    return replace(task, a=a, c=c, out=at(task.out), added=added,
                   clipped=clipped, **sizes)  # type: ignore[arg-type]  # fmt: skip


def _added(
    name: str, bias: TensorSpec, out: Matrix, beta: Scalar, alpha: Scalar,
    activation: str | None = None,
) -> Added | None:  # fmt: skip
    """beta x bias + alpha x product; a bias is not even read where beta is 0."""
    found = None
    if beta != 0:
        sizes = (out.batch[0], out.num_rows, out.num_cols)
        found = Matrix.broadcast(name, bias, sizes)
    if found is None and alpha == 1 and activation is None:
        return None
    return Added(found, beta, alpha, activation=activation)


@lowering("aten::mm", "aten::_int_mm", "aten::bmm")
def mm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a @ b, for matrices or batches of them."""
    a, c = call.args[:2]
    out = Matrix.of("out0", call.outs[0])
    return product(call.name, core, shards, Matrix.of("in0", a), Matrix.of("in1", c), out)


@lowering("aten::_foreach_mm")
def foreach_mm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a @ b for each of two lists."""
    left, right = call.args[:2]
    programs = [
        product(
            call.name, core, shards, Matrix.of(f"in{i}", a), Matrix.of(f"in{len(left) + i}", c),
            Matrix.of(f"out{i}", out),
        )
        for i, (a, c, out) in enumerate(zip(left, right, call.outs, strict=True))
    ]  # fmt: skip
    return joined(call.name, core, programs)


@lowering("aten::addmm", "aten::baddbmm", "aten::_addmm_activation")
def addmm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """beta * bias + alpha * (a @ b), with an activation for _addmm_activation."""
    bias, a, c = call.args[:3]
    activation = None
    if call.name.startswith("aten::_addmm_activation"):
        activation = "gelu" if call.arg(5) else "relu"
    out = Matrix.of("out0", call.outs[0])
    added = _added("in0", bias, out, call.arg(3, 1), call.arg(4, 1), activation)
    return product(
        call.name, core, shards, Matrix.of("in1", a), Matrix.of("in2", c), out, added
    )  # fmt: skip


@lowering("aten::addbmm")
def addbmm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """beta * bias + the sum over the batch of a[i] @ b[i]: one product with a longer k."""
    bias, a, c = call.args[:3]
    left = Matrix.of("in1", a).joined_batch(in_rows=False)
    right = Matrix.of("in2", c).joined_batch(in_rows=True)
    out = Matrix.of("out0", call.outs[0])
    added = _added("in0", bias, out, call.arg(3, 1), call.arg(4, 1))
    return product(call.name, core, shards, left, right, out, added)


@lowering("aten::mv")
def mv(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a @ vector."""
    return mm(call, core, shards)


@lowering("aten::addmv")
def addmv(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """beta * bias + alpha * (a @ vector)."""
    bias, a, vector = call.args[:3]
    out = Matrix.of("out0", call.outs[0])
    column = TensorSpec(bias.dtype, (*bias.shape, 1), (*bias.strides, 1))
    added = _added("in0", column, out, call.arg(3, 1), call.arg(4, 1))
    return product(
        call.name, core, shards, Matrix.of("in1", a), Matrix.of("in2", vector), out, added
    )  # fmt: skip


@lowering("aten::linear", "aten::mkldnn_linear")
def linear(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x @ weight.T + bias, the leading dims of x taken together."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2)
    columns = weight.ndim > 1
    weights = Matrix.of("in1", weight, flip=columns)
    out = Matrix.rows_of("out0", call.outs[0], 1 if columns else 0)
    added = _added("in2", bias, out, 1, 1) if isinstance(bias, TensorSpec) else None
    return product(call.name, core, shards, Matrix.rows_of("in0", x, 1), weights, out, added)


@lowering("aten::_scaled_mm")
def scaled_mm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(a * scale_a) @ (b * scale_b) + bias of fp8 operands: scales come with the eviction."""
    a, c, *scales = call.args[:4]
    bias, result_scale = call.arg(4), call.arg(5)
    out = Matrix.of("out0", call.outs[0])
    sizes = (1, out.num_rows, out.num_cols)
    if result_scale is not None:
        raise UnsupportedOpError(call.name, "a scale of the result is not lowered: leave it out")
    given = []
    for index, scale in enumerate(scales, 2):
        known = scale.numel == 1 or scale.shape == ((sizes[1], 1) if index == 2 else (1, sizes[2]))
        if scale.dtype != FP32 or not known:
            raise UnsupportedOpError(
                call.name, f"scales of shape {scale.shape} are not lowered: use one fp32 scale for "
                "each tensor, or one for each row of a and column of b",
            )  # fmt: skip
        spec = TensorSpec(FP32, (), ()) if scale.numel == 1 else scale
        given.append(Matrix.broadcast(f"in{index}", spec, sizes))
    added = Added(scales=tuple(given))
    if isinstance(bias, TensorSpec):
        added = replace(added, bias=Matrix.broadcast("in4", bias, sizes))
    return product(
        call.name, core, shards, Matrix.of("in0", a), Matrix.of("in1", c), out, added
    )  # fmt: skip


@lowering("aten::dot", "aten::vdot")
def dot(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Sum of products: too thin for the array, so VectorE multiplies and adds."""
    a, c = call.args[:2]
    refuse_complex(call)
    walk = grid((a.numel,), [call.outs[0], a, c])
    kernel = Kernel(core, walk, 1, shards)
    kernel.total(0, kernel.ins[0] * kernel.ins[1])
    return lower_kernel(kernel, call.name)


def _addr(t: Any, x: Any, y: Any, z: Any, beta: Scalar = 1, alpha: Scalar = 1) -> Any:
    outer = y * z
    return t.stt(outer, "multiply", alpha, "add", x * beta if beta != 1 else x)


def _as_column(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The vector of rows becomes a column, then addr is elementwise."""
    x, y, z, *rest = call.args
    column = TensorSpec(y.dtype, (*y.shape, 1), (*y.strides, 1))
    return _ADDR(OpCall(call.name, (x, column, z, *rest), call.outs), core, shards)


_ADDR = elementwise(_addr)
lowering("aten::addr")(_as_column)
