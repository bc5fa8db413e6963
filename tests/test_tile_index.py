"""Gathers and scatters as Programs, beside CPU ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tile_copy import odd, x
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.errors import TrnError, UnsupportedOpError
from torch_trn.executor import execute
from torch_trn.lowering import OpCall, TensorSpec, lower

aten = torch.ops.aten
F32, BF16, F16, I64, I32, BOOL = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool,
)  # fmt: skip


def spots(limit: int, *shape: int, dtype: torch.dtype = I64, low: int = 0) -> Tensor:
    """Indices with many equal ones."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7919 % (limit - low) + low).to(dtype).reshape(shape)


def distinct(limit: int, count: int) -> Tensor:
    """Indices without equal ones."""
    return torch.randperm(limit, generator=torch.Generator().manual_seed(1))[:count]


def real(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


GATHERS: dict[str, tuple[Any, ...]] = {
    "embedding": (aten.embedding.default, x(50, 12), spots(50, 3, 43)),
    "embedding int32": (aten.embedding.default, x(50, 12), spots(50, 129, dtype=I32)),
    "embedding wide": (aten.embedding.default, x(5, 9000), spots(5, 4)),
    "embedding odd": (aten.embedding.default, odd(50, 12), spots(50, 5)),
    "index_select rows": (aten.index_select.default, x(9, 33), 0, spots(9, 130)),
    "index_select columns": (aten.index_select.default, x(9, 33), 1, spots(33, 130)),
    "index_select middle": (aten.index_select.default, odd(4, 9, 3), 1, spots(9, 7)),
    "index_select number": (aten.index_select.default, x(9, 3), 0, torch.tensor(4)),
    "gather last": (aten.gather.default, x(130, 9), 1, spots(9, 130, 513)),
    "gather few": (aten.gather.default, x(130, 900), 1, spots(900, 129, 1)),
    "gather first": (aten.gather.default, x(9, 130), 0, spots(9, 4, 129)),
    "gather odd": (aten.gather.default, odd(5, 7, 6), 1, spots(7, 3, 20, 4)),
    "take": (aten.take.default, x(5, 26), spots(130, 3, 43, low=-130)),
    "take odd": (aten.take.default, odd(5, 26), spots(130, 129)),
    "index one": (aten.index.Tensor, x(50, 12), [spots(50, 129, low=-50)]),
    "index two": (aten.index.Tensor, x(20, 30, 5), [spots(20, 7, 1, low=-20), spots(30, 9)]),
    "index second": (aten.index.Tensor, x(4, 30, 5), [None, spots(30, 3, 7, low=-30)]),
    "index apart": (aten.index.Tensor, x(4, 30, 5), [spots(4, 6), None, spots(5, 6)]),
    "index last": (aten.index.Tensor, odd(4, 30, 5), [None, None, spots(5, 11)]),
    "index int32": (aten.index.Tensor, x(50, 12), [spots(50, 129, low=-50, dtype=I32)]),
    "index nothing": (aten.index.Tensor, x(50, 12), [spots(50, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERS)
def test_gathers(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*GATHERS[name], cores=cores))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 512, 513])
def test_gathers_beside_the_edges(n: int) -> None:
    for cores in (1, 2):
        for width in (1, n):
            given = (aten.embedding.default, x(7, width), spots(7, n))
            assert_values(*tile_values(*given, cores=cores))
        assert_values(*tile_values(aten.gather.default, x(3, 9), 1, spots(9, 3, n), cores=cores))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, I32, BOOL, torch.complex64], ids=str)
def test_every_dtype_is_gathered(dtype: torch.dtype) -> None:
    table = x(40, 9, dtype=dtype)
    assert_values(*tile_values(aten.embedding.default, table, spots(40, 9)))
    assert_values(*tile_values(aten.gather.default, table, 1, spots(9, 40, 30)))
    assert_values(*tile_values(aten.index.Tensor, table, [spots(40, 5, low=-40), spots(9, 5)]))
    assert_values(
        *tile_values(aten.index_put.default, table, [distinct(40, 9)], x(9, 9, dtype=dtype))
    )


SCATTERS: dict[str, tuple[Any, ...]] = {
    "scatter": (aten.scatter.src, x(9, 600), 1, distinct(600, 513).expand(9, 513), -x(9, 513)),
    "scatter fewer": (aten.scatter.src, x(9, 60), 0, distinct(9, 3)[:, None].expand(3, 50),
                      -x(4, 55)),
    "scatter value": (aten.scatter.value, x(9, 60), 1, spots(60, 5, 7), 3.5),
    "scatter_ value": (aten.scatter_.value, x(9, 60), 1, spots(60, 5, 7), 3.5),
    "one_hot": (aten.scatter.value, torch.zeros(130, 7, dtype=I64), 1, spots(7, 130, 1), 1),
    "index_copy": (aten.index_copy.default, x(50, 12), 0, distinct(50, 7), -x(7, 12)),
    "index_copy_ last": (aten.index_copy_.default, x(50, 12), 1, distinct(12, 5), -x(50, 5)),
    "index_fill": (aten.index_fill.int_Scalar, x(50, 12), 1, spots(12, 5), -2.5),
    "index_fill tensor": (aten.index_fill.int_Tensor, x(50, 12), 0, spots(50, 5), torch.tensor(9.)),
    "index_put": (aten.index_put.default, x(50, 12), [distinct(50, 20) - 50], -x(20, 12)),
    "index_put_ two": (aten.index_put_.default, odd(9, 7, 5), [distinct(9, 4), spots(7, 4)],
                       -x(4, 5)),
    "index_put broadcast": (aten.index_put.default, x(50, 12), [distinct(50, 20)], x(12)),
    "index_put second": (aten.index_put.default, x(5, 12, 3), [None, distinct(12, 5)],
                         -x(5, 5, 3)),
    "index_put number": (aten.index_put.default, x(50, 12), [spots(50, 20)], torch.tensor(4.0)),
    "max_unpool2d": (aten.max_unpool2d.default, x(2, 3, 2, 4),
                     (torch.arange(8) * 2).reshape(2, 4).expand(2, 3, 2, 4), [4, 8]),
    "max_unpool3d": (aten.max_unpool3d.default, x(5, 2, 2, 4),
                     (torch.arange(16) * 2).reshape(2, 2, 4).expand(5, 2, 2, 4), [2, 4, 8],
                     [1, 2, 2], [0, 0, 0]),
    "put": (aten.put.default, x(5, 26), distinct(130, 33) - 130, -x(33)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCATTERS)
def test_scatters(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*SCATTERS[name], cores=cores))


#: Sums of equal indices. Integers in fp32 are exact, so the order of adding does not show.
SUMS: dict[str, tuple[Any, ...]] = {
    "embedding backward": (aten.embedding_dense_backward.default, x(4, 65, 12), spots(50, 4, 65),
                           50, -1, False),
    "embedding backward padded": (aten.embedding_dense_backward.default, x(130, 9), spots(5, 130),
                                  5, 3, False),
    "embedding backward wide": (aten.embedding_dense_backward.default, x(129, 1030),
                                spots(7, 129), 7, -1, False),
    "embedding backward one": (aten.embedding_dense_backward.default, x(300, 1), spots(3, 300), 3,
                               -1, False),
    "index_add": (aten.index_add.default, x(50, 12), 0, spots(50, 130), x(130, 12)),
    "index_add alpha": (aten.index_add_.default, x(50, 12), 0, spots(9, 130), x(130, 12)),
    "index_add last": (aten.index_add.default, x(130, 12), 1, spots(12, 40), x(130, 40)),
    "index_add middle": (aten.index_add.default, odd(5, 12, 3), 1, spots(12, 40), x(5, 40, 3)),
    "index_add int64": (aten.index_add.default, x(5, 3, dtype=I64), 0, spots(5, 40),
                        x(40, 3, dtype=I64)),
    "index_put": (aten.index_put.default, x(50, 12), [spots(50, 260, low=-50)], x(260, 12), True),
    "index_put two": (aten.index_put.default, x(9, 7, 5), [spots(9, 140), spots(7, 140)],
                      x(140, 5), True),
    "index_put_ second": (aten.index_put_.default, x(5, 12, 3), [None, spots(12, 40)],
                          x(5, 40, 3), True),
    "index_put one value": (aten.index_put.default, x(50), [spots(50, 260)], torch.tensor(2.0),
                            True),
    "scatter_add": (aten.scatter_add.default, x(9, 60), 1, spots(60, 9, 513), x(9, 513)),
    "scatter_add tall": (aten.scatter_add.default, x(300, 60), 1, spots(60, 300, 5), x(300, 5)),
    "scatter_add first": (aten.scatter_add_.default, x(9, 60), 0, spots(9, 130, 60), x(130, 60)),
    "scatter_add line": (aten.scatter_add.default, x(60), 0, spots(60, 300), x(300)),
    "scatter reduce add": (aten.scatter.reduce, x(9, 60), 1, spots(60, 9, 5), x(9, 5)),
    "scatter value add": (aten.scatter.value_reduce, x(9, 60), 1, spots(60, 9, 5), 2.0),
    "put": (aten.put.default, x(5, 26), spots(130, 300, low=-130), x(300), True),
    "amax": (aten.scatter_reduce.two, x(9, 60), 1, spots(60, 9, 513), x(9, 513), "amax"),
    "amin": (aten.scatter_reduce.two, x(60), 0, spots(60, 300), x(300), "amin"),
    "amax alone": (aten.scatter_reduce.two, x(60), 0, spots(20, 300), x(300) - 5000, "amax"),
    "index_reduce": (aten.index_reduce.default, x(9, 6), 0, spots(9, 140), x(140, 6), "amin"),
}  # fmt: skip
KEYWORDS: dict[str, dict[str, Any]] = {
    "index_add alpha": {"alpha": -3}, "scatter reduce add": {"reduce": "add"},
    "scatter value add": {"reduce": "add"}, "amax alone": {"include_self": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_equal_indices_add_up(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*SUMS[name], cores=cores, **KEYWORDS.get(name, {})))


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_sums_round_once_for_128_rows(dtype: torch.dtype, core: CoreSpec) -> None:
    grad, index = real(300, 33, dtype=dtype), spots(5, 300)
    got, _ = tile_values(aten.embedding_dense_backward.default, grad, index, 5, -1, False,
                         core=core)  # fmt: skip
    wide = torch.zeros(5, 33, dtype=torch.float64).index_add_(0, index, grad.double())
    size = torch.zeros(5, 33, dtype=torch.float64).index_add_(0, index, grad.double().abs())
    # Three tiles of 128 rows: a rounding each to the dtype, those of fp32 sums beside them.
    bound = 3 * EPSILON[dtype] + 300 * EPSILON[F32]
    assert got[0].dtype == dtype and bool(((got[0].double() - wide).abs() <= bound * size).all())


def test_products_of_equal_indices() -> None:
    given = (aten.scatter_reduce.two, real(9, 60), 1, spots(60, 9, 130), real(9, 130), "prod")
    assert_values(*tile_values(*given), rtol=8 * EPSILON[F32])


def test_an_index_out_of_range_is_named() -> None:
    weight, index, out = x(5, 3), torch.tensor([1, 5]), torch.empty(2, 3)
    specs = (TensorSpec.of(weight), TensorSpec.of(index), -1, False, False)
    program = lower(OpCall("aten::embedding", specs, (TensorSpec.of(out),)), TRN2, 1)
    with pytest.raises(TrnError, match="index 5 is out of range 0 to 4"):
        execute(program, TRN2, {"in0": weight, "in1": index, "out0": out})


def test_masks_have_no_program() -> None:
    mask = TensorSpec.contiguous(BOOL, 4)
    call = OpCall("aten::index.Tensor", (TensorSpec.contiguous(F32, 4), (mask,)),
                  (TensorSpec.contiguous(F32, 2),))  # fmt: skip
    with pytest.raises(UnsupportedOpError, match="depends on data"):
        lower(call, TRN2, 1)


BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": 0}, "mean": {"mode": 1},
    "last offset": {"mode": 0, "include_last_offset": True},
    "weighed": {"mode": 0, "per_sample_weights": real(300)}, "padded": {"mode": 0,
                                                                       "padding_idx": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", BAGS)
def test_embedding_bags(name: str) -> None:
    given = BAGS[name]
    weight, index = real(50, 34), spots(50, 300)
    offsets = torch.tensor([0, 7, 7, 140, 290])
    if given.get("include_last_offset"):
        offsets = torch.cat([offsets, torch.tensor([300])])
    out, bags, sizes, maxima = aten._embedding_bag(weight, index, offsets, **given)
    where = torch.bucketize(torch.arange(300), offsets, right=True) - 1
    bound = {"rtol": 300 * EPSILON[F32], "atol": 1e-5}
    for cores in (1, 2):
        got, _ = tile_values(aten._embedding_bag.default, weight, index, offsets, cores=cores,
                             **given)  # fmt: skip
        assert_values(got[:1], [out], **bound)
        back = (aten._embedding_bag_dense_backward.default, real(5, 34), index, where, sizes,
                maxima, 50, False, given["mode"], given.get("per_sample_weights"),
                given.get("padding_idx", -1))  # fmt: skip
        assert_values(*tile_values(*back, cores=cores), **bound)


def test_a_number_is_scattered_into_a_number() -> None:
    x, index, source = torch.tensor(1.0), torch.tensor(0), torch.tensor(5.0)
    for function in (torch.ops.aten.scatter.src, torch.ops.aten.scatter_add.default):
        got, expected = tile_values(function, x, 0, index, source)
        assert_values(got, expected)
    got, expected = tile_values(torch.ops.aten.gather.default, x, 0, index)
    assert_values(got, expected)
