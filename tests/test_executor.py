"""The executor: access patterns, rounding, what is not written, what is out of bounds."""

from __future__ import annotations

import pytest
import torch
from tile_case import TRN1, TRN2

from torch_trn.chip import CoreSpec
from torch_trn.errors import TrnError
from torch_trn.executor import execute
from torch_trn.memory import CORE, Walk
from torch_trn.program import Builder, Program

F32, BF16 = torch.float32, torch.bfloat16


def scale(core: CoreSpec, rows: int, cols: int, by: float, cores: int = 1) -> Program:
    """y = x * by, 128 rows at a time, rows divided between the cores."""
    b = Builder(core, "scale")
    walk = Walk(((rows, cols),), ((cols, 1),))
    x, y = b.hbm("in0", nbytes=4 * rows * cols), b.hbm("out0", nbytes=4 * rows * cols)
    tile = b.sbuf("tile", free_bytes=4 * cols, slots=2)
    share = -(-rows // cores)
    with b.repeat(-(-share // 128), "r") as r:
        row = CORE * share + r * 128
        block = tile[r].view(F32, (1, cols))
        b.load(block, x[0].window(F32, walk, 128, cols, row=row), rows=128, row_bytes=4 * cols)
        b.tensor_scalar(block, block, op="multiply", operands=(by,), n=cols)
        b.store(y[0].window(F32, walk, 128, cols, row=row), block, rows=128, row_bytes=4 * cols)
    return b.build()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_rows_beyond_the_tensor_are_not_moved(rows: int) -> None:
    x, y = torch.randn(rows, 7), torch.zeros(rows + 1, 7)
    execute(scale(TRN2, rows, 7, 3.0), TRN2, {"in0": x, "out0": y[:rows]})
    assert torch.equal(y[:rows], x * 3.0) and not y[rows].any()


def test_two_cores_share_the_rows() -> None:
    x, y = torch.randn(256, 8), torch.full((256, 8), -1.0)
    execute(scale(TRN2, 256, 8, 2.0, cores=2), TRN2, {"in0": x, "out0": y}, cores=1)
    assert torch.equal(y[:128], x[:128] * 2.0) and torch.equal(y[128:], torch.full((128, 8), -1.0))
    execute(scale(TRN2, 256, 8, 2.0, cores=2), TRN2, {"in0": x, "out0": y}, cores=2)
    assert torch.equal(y, x * 2.0)


def test_what_nobody_wrote_reads_as_nan() -> None:
    b = Builder(TRN2, "unwritten")
    out = b.hbm("out0", nbytes=16)
    tile = b.sbuf("tile", free_bytes=16)
    b.store(out[0].matrix(F32, (1, 4), (4, 1)), tile, rows=1, row_bytes=16)
    y = torch.zeros(4)
    execute(b.build(), TRN2, {"out0": y})
    assert y.isnan().all()


def product(core: CoreSpec, dtype: torch.dtype, accumulate: bool) -> Program:
    """out = a.t() @ b with k in two halves of 128."""
    b = Builder(core, "product")
    size = dtype.itemsize
    a, c = b.hbm("in0", nbytes=256 * 96 * size), b.hbm("in1", nbytes=256 * 200 * size)
    out = b.hbm("out0", nbytes=96 * 200 * 4)
    left = b.sbuf("left", free_bytes=96 * size, slots=2)
    right = b.sbuf("right", free_bytes=200 * size, slots=2)
    psum, result = b.psum("psum", free_bytes=800), b.sbuf("result", free_bytes=800)
    with b.repeat(2, "k") as k:
        b.load(left[k], a[0].matrix(dtype, (128, 96), (96, 1), offset=k * (128 * 96)), rows=128,
               row_bytes=96 * size)  # fmt: skip
        b.load(right[k], c[0].matrix(dtype, (128, 200), (200, 1), offset=k * (128 * 200)),
               rows=128, row_bytes=200 * size)  # fmt: skip
        b.nc_matmul(psum, stationary=left[k], moving=right[k], k=128, m=96, n=200, dtype=dtype,
                    accumulate=k if accumulate else False)  # fmt: skip
    b.tensor_copy(result, psum, n=200, partitions=96)
    b.store(out[0].matrix(F32, (96, 200), (200, 1)), result, rows=96, row_bytes=800)
    return b.build()


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_psum_is_replaced_first_and_added_to_later(dtype: torch.dtype) -> None:
    a, b = torch.randn(256, 96).to(dtype), torch.randn(256, 200).to(dtype)
    both, last = torch.empty(96, 200), torch.empty(96, 200)
    execute(product(TRN2, dtype, True), TRN2, {"in0": a, "in1": b, "out0": both})
    execute(product(TRN2, dtype, False), TRN2, {"in0": a, "in1": b, "out0": last})
    torch.testing.assert_close(both, a.float().t() @ b.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(last, a[128:].float().t() @ b[128:].float(), rtol=1e-5, atol=1e-4)


def test_sums_of_the_array_run_down_its_columns() -> None:
    # 1 + 2^-24 is 1 in fp32, 2^-24 added up first is not: only one order gives exactly 1.
    a, b = torch.full((256, 96), 2.0**-24), torch.ones(256, 200)
    a[0] = 1.0
    out = torch.empty(96, 200)
    execute(product(TRN2, F32, False), TRN2, {"in0": a, "in1": b, "out0": out})
    assert torch.equal(out, torch.full((96, 200), 128 * 2.0**-24))
    execute(product(TRN2, F32, True), TRN2, {"in0": a, "in1": b, "out0": out})
    assert torch.equal(out, torch.full((96, 200), 1.0 + 128 * 2.0**-24))


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_a_transpose_by_the_identity_spreads_nan(core: CoreSpec) -> None:
    b = Builder(core, "turn")
    x, y = b.hbm("in0", nbytes=64), b.hbm("out0", nbytes=64)
    tile, turned = b.sbuf("tile", free_bytes=16), b.psum("turned", free_bytes=16)
    result = b.sbuf("result", free_bytes=16)
    b.load(tile, x[0].matrix(F32, (4, 4), (4, 1)), rows=4, row_bytes=16)
    b.nc_transpose(turned, tile, partitions=4, n=4, dtype=F32)
    b.tensor_copy(result, turned, n=4, partitions=4)
    b.store(y[0].matrix(F32, (4, 4), (4, 1)), result, rows=4, row_bytes=16)
    source, out = torch.arange(16.0).reshape(4, 4), torch.empty(4, 4)
    source[1, 2] = float("nan")
    execute(b.build(), core, {"in0": source, "out0": out})
    assert torch.equal(out[:2], source.t()[:2]) and torch.equal(out[3], source.t()[3])
    assert int(out[2].isnan().sum()) == (4 if core is TRN1 else 1)


def gather(limit: int) -> Program:
    b = Builder(TRN2, "gather")
    table, index = b.hbm("in0", nbytes=40 * 12), b.hbm("in1", nbytes=5 * 8)
    out = b.hbm("out0", nbytes=5 * 12)
    rows, tile = b.sbuf("rows", free_bytes=8), b.sbuf("tile", free_bytes=12)
    b.load(rows, index[0].matrix(torch.int64, (5, 1), (1, 1)), rows=5, row_bytes=8)
    b.load(tile, table[0].matrix(F32, (5, 0), (3, 1)), rows=5, row_bytes=12,
           index=rows[0].view(torch.int64, (1, 1)), index_step=3, index_limit=limit)  # fmt: skip
    b.store(out[0].matrix(F32, (5, 3), (3, 1)), tile, rows=5, row_bytes=12)
    return b.build()


def test_gather_by_rows() -> None:
    table, index, out = torch.randn(40, 3), torch.tensor([7, 0, 39, 7, 1]), torch.empty(5, 3)
    execute(gather(40), TRN2, {"in0": table, "in1": index, "out0": out})
    assert torch.equal(out, table[index])


def test_an_index_out_of_range_is_an_error() -> None:
    table, index, out = torch.randn(40, 3), torch.tensor([7, 0, 40, 7, 1]), torch.empty(5, 3)
    with pytest.raises(TrnError) as error:
        execute(gather(40), TRN2, {"in0": table, "in1": index, "out0": out})
    assert str(error.value) == (
        "gather: index 40 is out of range 0 to 39 (of 5 rows that dma_copy gathers or scatters)"
    )


def test_stochastic_rounding_is_right_on_average() -> None:
    b = Builder(TRN2, "round")
    x, y = b.hbm("in0", nbytes=4 * 4096), b.hbm("out0", nbytes=2 * 4096)
    wide, narrow = b.sbuf("wide", free_bytes=128), b.sbuf("narrow", free_bytes=64)
    b.load(wide, x[0].matrix(F32, (128, 32), (32, 1)), rows=128, row_bytes=128)
    b.tensor_copy(narrow, wide, n=32, out_dtype=BF16)
    b.store(y[0].matrix(BF16, (128, 32), (32, 1)), narrow, rows=128, row_bytes=64)
    source, out = torch.full((4096,), 1.0 + 2.0**-9), torch.empty(4096, dtype=BF16)
    execute(b.build(), TRN2, {"in0": source, "out0": out})
    assert torch.equal(out, torch.ones(4096, dtype=BF16))
    execute(b.build(), TRN2, {"in0": source, "out0": out}, stochastic=True,
            generator=torch.Generator().manual_seed(0))  # fmt: skip
    above = int((out == 1.0 + 2.0**-7).sum())
    assert int((out == 1.0).sum()) + above == 4096 and 900 < above < 1150


def test_a_window_may_go_backwards() -> None:
    b = Builder(TRN2, "back")
    x, y = b.hbm("in0", nbytes=24), b.hbm("out0", nbytes=24)
    b.copy_hbm(
        y[0].matrix(F32, (3, 2), (2, 1)), x[0].matrix(F32, (3, -2), (2, 1), offset=4), rows=3,
        row_bytes=8,
    )  # fmt: skip
    source, out = torch.arange(6.0).reshape(3, 2), torch.empty(3, 2)
    execute(b.build(), TRN2, {"in0": source, "out0": out})
    assert torch.equal(out, source.flip(0))
