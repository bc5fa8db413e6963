"""The matmul family: mm, bmm, linear, matrix-vector products and their added forms.

Which operand is stationary is chosen by shape: a vector always is (the matrix then moves 512
columns at a time); a narrow result (n <= 128) is computed transposed where that saves
TensorE time even with its output turned back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.isa import NcMatmul
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.gemm import BANK, Gemm, Side
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div, flat, product
from torch_trn.lowering.move import fill
from torch_trn.lowering.pointwise import elementwise
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, Scalar
from torch_trn.memory import Pool, TileRef
from torch_trn.program import Builder, Program

#: dtypes that TensorE multiplies (hardware.md section 4); int32 goes through it as fp32.
_ARRAY_DTYPES = frozenset(
    {torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8,
     torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)  # fmt: skip

#: Bias columns that stay in SBUF for the whole product.
BIAS_COLUMNS = 4096


@dataclass
class Matrix:
    """A matrix argument: its tensor, sizes and strides (in elements)."""

    spec: TensorSpec
    rows: int
    cols: int
    row_step: int
    col_step: int

    @classmethod
    def of(cls, spec: TensorSpec, flip: bool = False) -> Matrix:
        """The last two dims of `spec` (transposed where `flip`); a vector is one column."""
        shape, steps = spec.shape, spec.strides
        if len(shape) < 2:
            return cls(spec, shape[0] if shape else 1, 1, steps[0] if steps else 1, 1)
        found = cls(spec, shape[-2], shape[-1], steps[-2], steps[-1])
        return found.turned() if flip else found

    def turned(self) -> Matrix:
        """The transpose."""
        return Matrix(self.spec, self.cols, self.rows, self.col_step, self.row_step)


def array_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype TensorE multiplies `dtype` in; UnsupportedOpError where it cannot."""
    if dtype in _ARRAY_DTYPES:
        return dtype
    if dtype in (torch.int32, torch.complex64):
        return FP32
    raise UnsupportedOpError(
        name, f"TensorE does not multiply {str(dtype).removeprefix('torch.')}: use a float or int8"
    )


def side(b: Builder, name: str, matrix: Matrix, k_in_rows: bool, dtype: torch.dtype) -> Side:
    """`matrix` as an operand whose k runs along its rows or its columns."""
    source = b.hbm(name, nbytes=matrix.spec.nbytes)
    k_step, free_step = matrix.row_step, matrix.col_step
    k, free = matrix.rows, matrix.cols
    if not k_in_rows:
        k_step, free_step, k, free = free_step, k_step, free, k
    if free == 1 or free_step == 1 and free > 1 and k_step != 1:
        layout = "vector" if free == 1 and k_step == 1 else "k_major"
        return Side(source, dtype, layout)
    if k_step == 1:
        return Side(source, dtype, "k_inner", run=max(k, 1))
    return Side(source, dtype, "k_major" if free_step == 1 else "scattered")


def _array_ps(core: CoreSpec, m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """TensorE time of the plain product."""
    total = 0
    for width in (BANK, n % BANK):
        count = n // BANK if width == BANK else 1
        if width and count:
            each = NcMatmul(k=PARTITIONS, m=PARTITIONS, n=width, dtype=dtype).cost(core)
            total += count * each.occupancy_ps
    return total * ceil_div(m, PARTITIONS) * ceil_div(k, PARTITIONS)


def swaps(core: CoreSpec, m: int, n: int, k: int, dtype: torch.dtype, out: Matrix) -> bool:
    """Whether the second matrix should be the stationary one."""
    if n == 1:
        return True
    if out.col_step != 1 and out.row_step == 1 and m > 1:
        return True
    if n > PARTITIONS or m < BANK:
        return False
    turn = _array_ps(core, m, PARTITIONS, 1, FP32)
    return _array_ps(core, n, m, k, dtype) + turn < _array_ps(core, m, n, k, dtype)


@dataclass
class Added:
    """What is added to a product: beta * bias + alpha * product."""

    spec: TensorSpec
    beta: Scalar = 1
    alpha: Scalar = 1


def lower_product(
    name: str, core: CoreSpec, a: Matrix, c: Matrix, out: Matrix, *, batch: int = 1,
    added: Added | None = None, activation: str | None = None,
) -> Program:  # fmt: skip
    """out = a @ c, `batch` times, on one physical core."""
    dtype = array_dtype(name, a.spec.dtype)
    m, n, k = a.rows, c.cols, a.cols
    if a.spec.dtype.is_complex:
        n, k = 2 * n, 2 * k
    b = Builder(core, name.removeprefix("aten::"))
    swap = swaps(core, m, n, k, dtype, out)
    left, right = side(b, "a", a, False, dtype), side(b, "b", c, True, dtype)
    result = b.hbm("out", nbytes=out.spec.nbytes)
    out_dtype = FP32 if out.spec.dtype.is_complex else out.spec.dtype
    natural = n == 1 or out.row_step == 1 and out.col_step != 1 if swap else out.col_step == 1
    gemm = Gemm(
        b, core, n if swap else m, m if swap else n, k,
        right if swap else left, left if swap else right, result, out_dtype, batch,
        turn_output=swap and not natural, out_run=1 << 30 if natural or swap else 1,
    )  # fmt: skip
    if not (m and n and batch):
        return b.build()
    if not k:
        # The result is zero, or the bias.
        fill(b, result, batch * m * n * out_dtype.itemsize)
        return b.build()
    if added is not None or activation is not None:
        _Epilogue(gemm, added, activation, swap, (m, n)).attach()
    gemm.plan()
    gemm.run()
    return b.build()


class _Epilogue:
    """Adds a bias and applies an activation on the way from PSUM to SBUF."""

    def __init__(
        self, gemm: Gemm, added: Added | None, activation: str | None, swap: bool,
        shape: tuple[int, int],
    ) -> None:  # fmt: skip
        self.gemm, self.added, self.activation, self.swap = gemm, added, activation, swap
        self.m, self.n = shape
        self.bias: Pool | None = None
        self.source: Pool | None = None

    def attach(self) -> None:
        """Allocate and load what stays, and hook into the product's evictions."""
        gemm, added = self.gemm, self.added
        gemm.finish = self.finish
        if added is None:
            return
        b, spec = gemm.b, added.spec
        size = spec.itemsize
        self.source = b.hbm("bias", nbytes=spec.nbytes)
        self.kind = self._kind(spec)
        if self.kind == "full":
            gemm.before = self.load_tile
            self.bias = b.sbuf("bias", free_bytes=4 * BANK * 4, slots=2)
        elif self.kind == "one":
            self.bias = b.sbuf("bias", free_bytes=size)
            b.load(self.bias, self.source, rows=PARTITIONS, row_bytes=size)
        elif self.kind == "parts":
            self.bias = b.sbuf("bias", free_bytes=size, slots=1)
            rows = min(PARTITIONS, spec.numel)
            b.load(self.bias, self.source, rows=rows, row_bytes=size)
        elif spec.numel <= BIAS_COLUMNS:
            self.bias = b.sbuf("bias", free_bytes=spec.nbytes)
            parts = min(PARTITIONS, gemm.m)
            b.load(self.bias, self.source, rows=parts, row_bytes=spec.nbytes)
        else:
            gemm.before = self.load_row
            self.bias = b.sbuf("bias", free_bytes=4 * BANK * 4, slots=2)

    def _kind(self, spec: TensorSpec) -> str:
        if spec.numel == 1:
            return "one"
        if spec.numel == self.m * self.n * self.gemm.batch and self.m > 1 and self.n > 1:
            return "full"
        along_n = spec.shape[-1] == self.n and spec.numel == self.n
        return "free" if along_n != self.swap else "parts"

    def load_tile(self, parts: int, columns: int) -> None:
        """The part of a full matrix that one output tile adds."""
        assert self.added and self.bias and self.source
        size = self.added.spec.itemsize // (2 if self.added.spec.dtype.is_complex else 1)
        self.gemm.b.load(self.bias, self.source, rows=parts, row_bytes=columns * size)

    def load_row(self, parts: int, columns: int) -> None:
        """The part of a long bias that one output tile adds, in every partition."""
        self.load_tile(parts, columns)

    def finish(self, bank: TileRef, result: TileRef, parts: int, width: int) -> None:
        """result = activation(alpha * bank + beta * bias)."""
        b, gemm = self.gemm.b, self.gemm
        dtype = FP32 if gemm.turn_output else gemm.out_dtype
        given: dict[str, Any] = {"n": width, "partitions": parts, "dtype": FP32}
        if dtype != FP32:
            given["out_dtype"] = dtype
        if self.bias is None:
            b.activation(result, bank, op=self.activation or "copy", **given)
            return
        assert self.added
        plain = self.added.alpha == 1 and self.added.beta == 1
        if self.kind in ("one", "parts"):
            b.activation(result, [bank, self.bias[0]], op=self.activation or "identity", **given)
            return
        if plain:
            b.tensor_tensor(result, bank, self.bias, op="add", **given)
        else:
            b.scalar_tensor_tensor(result, bank, self.bias, op="multiply,add", **given)
        if self.activation:
            b.activation(result, result, op=self.activation, n=width, partitions=parts, dtype=dtype)


def _share(batch: int, m: int, n: int, shards: int) -> tuple[int, int, int]:
    """(batch, m, n) of the largest of `shards` shares."""
    if shards == 1:
        return batch, m, n
    if batch >= shards:
        return ceil_div(batch, shards), m, n
    if m >= n or m >= shards * PARTITIONS:
        return batch, ceil_div(m, shards), n
    return batch, m, ceil_div(n, shards)


def matrices(
    name: str, core: CoreSpec, shards: int, a: Matrix, c: Matrix, out: Matrix, batch: int = 1,
    added: Added | None = None, activation: str | None = None,
) -> Program:  # fmt: skip
    """`lower_product` of this core's share."""
    batch, a.rows, c.cols = _share(batch, a.rows, c.cols, shards)
    return lower_product(name, core, a, c, out, batch=batch, added=added, activation=activation)


@lowering("aten::mm", "aten::_int_mm", "aten::_foreach_mm")
def mm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a @ b."""
    a, c = call.args[:2]
    return matrices(call.name, core, shards, Matrix.of(a), Matrix.of(c), Matrix.of(call.outs[0]))


@lowering("aten::bmm")
def bmm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a[i] @ b[i]."""
    a, c = call.args[:2]
    return matrices(
        call.name, core, shards, Matrix.of(a), Matrix.of(c), Matrix.of(call.outs[0]), a.shape[0]
    )


@lowering("aten::addmm", "aten::baddbmm", "aten::_addmm_activation")
def addmm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """beta * bias + alpha * (a @ b), with an activation for _addmm_activation."""
    bias, a, c = call.args[:3]
    added = Added(bias, call.arg(3, 1), call.arg(4, 1)) if call.arg(3, 1) != 0 else None
    activation = None
    if call.name.startswith("aten::_addmm_activation"):
        activation = "gelu" if call.arg(5) else "relu"
    batch = a.shape[0] if a.ndim == 3 else 1
    return matrices(
        call.name, core, shards, Matrix.of(a), Matrix.of(c), Matrix.of(call.outs[0]), batch,
        added, activation,
    )  # fmt: skip


@lowering("aten::addbmm")
def addbmm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """beta * bias + the sum over the batch of a[i] @ b[i]: one product with a longer k."""
    bias, a, c = call.args[:3]
    left, right = Matrix.of(a), Matrix.of(c)
    left.cols *= a.shape[0]
    right.rows *= a.shape[0]
    added = Added(bias, call.arg(3, 1), call.arg(4, 1)) if call.arg(3, 1) != 0 else None
    return matrices(call.name, core, shards, left, right, Matrix.of(call.outs[0]), added=added)


@lowering("aten::mv", "aten::addmv")
def mv(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a @ vector, plus a bias for addmv."""
    added = None
    args = call.args
    if call.name.startswith("aten::addmv"):
        added = Added(args[0], call.arg(3, 1), call.arg(4, 1)) if call.arg(3, 1) != 0 else None
        args = args[1:]
    a, vector = args[:2]
    return matrices(
        call.name, core, shards, Matrix.of(a), Matrix.of(vector), Matrix.of(call.outs[0]),
        added=added,
    )  # fmt: skip


@lowering("aten::linear", "aten::mkldnn_linear")
def linear(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x @ weight.T + bias, the leading dims of x taken together."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2)
    out = call.outs[0]
    rows = product(x.shape[:-1])
    step = x.strides[-2] if x.ndim > 1 else x.shape[-1]
    a = Matrix(x, rows, x.shape[-1], step, x.strides[-1] if x.ndim else 1)
    flat_out = Matrix(out, rows, out.shape[-1], out.shape[-1], 1)
    added = Added(bias) if isinstance(bias, TensorSpec) else None
    weights = Matrix.of(weight, flip=True) if weight.ndim > 1 else Matrix(
        weight, weight.shape[0], 1, weight.strides[0], 1)  # fmt: skip
    return matrices(call.name, core, shards, a, weights, flat_out, added=added)


@lowering("aten::_scaled_mm")
def scaled_mm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(a * scale_a) @ (b * scale_b) of fp8 operands: the scales go into the eviction."""
    a, c = call.args[:2]
    return matrices(
        call.name, core, shards, Matrix.of(a), Matrix.of(c), Matrix.of(call.outs[0]),
        activation="copy",
    )  # fmt: skip


@lowering("aten::dot", "aten::vdot")
def dot(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Sum of products: too thin for the array, so VectorE multiplies and adds."""
    a, c = call.args[:2]
    grid = flat(a.numel, [call.outs[0], a, c])
    kernel = Kernel(core, grid, 1, shards)
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
