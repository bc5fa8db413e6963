"""Matrix products tile by tile: the Program's values beside those of CPU ATen in fp32 or wider.

Bound: products are summed in fp32 (sums of up to 2^11 terms err by a few roundings of their
magnitude, |a| @ |b|) and the result is rounded once to its dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec, system
from torch_trn.errors import UnsupportedOpError
from torch_trn.executor import execute
from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.lowering.gemm_block import Strategy
from torch_trn.lowering.gemm_choice import Choice, Product, best, build
from torch_trn.lowering.matrix import Matrix
from torch_trn.program import Program

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TRN3 = system("trn3.48xlarge").chip.core
CORES = {"trn1": TRN1, "trn2": TRN2, "trn3": TRN3}
aten = torch.ops.aten

#: Roundings of fp32 that a sum of products may be off by, of the sum of their magnitudes.
SUM_ROUNDINGS = 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(got: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """``got`` is ``exact`` (double) but for fp32 sums of ``magnitude`` and one last rounding."""
    assert got.shape == exact.shape
    allowed = exact.abs() * EPSILON[got.dtype] + magnitude * SUM_ROUNDINGS * EPSILON[F32]
    difference = (got.double() - exact).abs()
    assert bool((difference <= allowed).all()), float((difference / allowed).nan_to_num(9e9).max())


def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    if not dtype.is_floating_point:
        return torch.randint(-8, 8, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def laid(kind: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """A [rows, cols] matrix in some layout."""
    if kind == "rows":
        return random(rows, cols, dtype=dtype)
    if kind == "columns":
        return random(cols, rows, dtype=dtype).t()
    if kind == "sliced":
        return random(rows + 2, 2 * cols + 3, dtype=dtype)[1:-1, 2 : cols + 2]
    if kind == "stepped":
        return random(2 * rows, 3 * cols, dtype=dtype)[::2, ::3]
    if kind == "one row":
        return random(1, cols, dtype=dtype).expand(rows, cols)
    return random(rows, 1, dtype=dtype).expand(rows, cols)


def product_is_right(a: Tensor, b: Tensor, core: CoreSpec, cores: int = 1) -> None:
    function = aten.mm.default if a.dim() == 2 else aten.bmm.default
    (got,), _ = tile_values(function, a, b, core=core, cores=cores)
    close(got, a.double() @ b.double(), a.double().abs() @ b.double().abs())


# -- layouts, sizes, dtypes ------------------------------------------------------------------------
SIZES = [(1, 1, 1), (127, 129, 128), (129, 513, 512), (512, 127, 513), (1, 513, 129), (513, 128, 1),
         (640, 300, 520), (2, 1100, 3)]  # fmt: skip


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_at_tile_edges(size: tuple[int, int, int], core: CoreSpec, cores: int) -> None:
    m, k, n = size
    for dtype in (F32, BF16):
        for left, right in (("rows", "rows"), ("columns", "columns")):
            product_is_right(laid(left, m, k, dtype), laid(right, k, n, dtype), core, cores)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("left", ["rows", "columns", "sliced", "stepped", "one row", "one column"])
def test_layouts(left: str, core: CoreSpec) -> None:
    for right in ("rows", "columns", "sliced", "stepped", "one row", "one column"):
        product_is_right(laid(left, 65, 130, BF16), laid(right, 130, 33, BF16), core)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float8_e5m2], ids=str)
def test_dtypes(dtype: torch.dtype, core: CoreSpec) -> None:
    if dtype.itemsize > 1:
        product_is_right(random(130, 257, dtype=dtype), random(257, 65, dtype=dtype), core)
        return
    for k in (512, 600, 30, 130):
        a, b = random(130, k).to(dtype), random(64, k).to(dtype).t()
        one = torch.ones(())
        (got,), _ = tile_values(aten._scaled_mm.default, a, b, one, one, out_dtype=F32, core=core)
        close(got, a.double() @ b.double(), a.double().abs() @ b.double().abs())


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_integers_are_exact_below_2_to_the_24(core: CoreSpec) -> None:
    a, b = random(70, 300, dtype=torch.int8), random(300, 40, dtype=torch.int8)
    assert_values(*tile_values(aten._int_mm.default, a, b, core=core))
    assert_values(*tile_values(aten.mm.default, a.int(), b.int(), core=core))


def test_what_the_array_does_not_multiply_is_refused() -> None:
    for dtype, name in ((torch.int64, "int64"), (torch.complex64, "complex64")):
        x = TensorSpec.contiguous(dtype, 4, 4)
        with pytest.raises(UnsupportedOpError) as error:
            lower(OpCall("aten::mm", (x, x), (x,)), TRN2, 1)
        assert str(error.value) == (
            f"aten::mm has no NeuronCore lowering: TensorE does not multiply {name}: "
            "use a float or int8"
        )


# -- batches ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_batches(core: CoreSpec, cores: int) -> None:
    for batch in (1, 2, 3):
        for dtype in (F32, BF16):
            a, b = random(batch, 130, 70, dtype=dtype), random(batch, 70, 33, dtype=dtype)
            product_is_right(a, b, core, cores)
            product_is_right(b.transpose(1, 2), a.transpose(1, 2), core, cores)
            product_is_right(a, b[:1].expand(batch, 70, 33), core, cores)
            product_is_right(a[:1].expand(batch, 130, 70), b, core, cores)


def test_a_batch_between_the_rows() -> None:
    a, b = random(70, 3, 130).transpose(0, 1), random(3, 40, 130).transpose(1, 2)
    product_is_right(a, b, TRN2)


# -- added forms -----------------------------------------------------------------------------------
def added_is_right(
    function: Any, bias: Tensor, a: Tensor, b: Tensor, core: CoreSpec, cores: int = 1,
    beta: float = 1, alpha: float = 1,
) -> None:  # fmt: skip
    (got,), _ = tile_values(function, bias, a, b, beta=beta, alpha=alpha, core=core, cores=cores)
    wide, size = (a.double() @ b.double(), a.double().abs() @ b.double().abs())
    if function is aten.addbmm.default:
        wide, size = wide.sum(0), size.sum(0)
    exact = alpha * wide + (beta * bias.double() if beta else 0)
    close(got, exact, abs(alpha) * size + (abs(beta) * bias.double().abs() if beta else 0))


SCALARS = [(1, 1), (0.5, 1), (1, -2.0), (0.25, 3.0), (0, 1), (0, 2.0)]


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (60,), (140, 1), (1, 60), (140, 60), "columns"], ids=str
)
def test_addmm(shape: Any, core: CoreSpec) -> None:
    for dtype in (F32, BF16):
        a, b = random(140, 200, dtype=dtype), random(200, 60, dtype=dtype)
        columns = shape == "columns"
        bias = random(60, 140, dtype=dtype).t() if columns else random(*shape, dtype=dtype)
        for beta, alpha in SCALARS:
            for cores in (1, 2):
                added_is_right(aten.addmm.default, bias, a, b, core, cores, beta, alpha)
    b = random(60, 200).t()
    added_is_right(aten.addmm.default, random(140, 60), random(200, 140).t(), b, core)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_a_tall_product_with_a_bias(core: CoreSpec) -> None:
    # 1200 x 100: c may be stationary, so that the bias is one number for each partition.
    a, b = random(1200, 260, dtype=BF16), random(260, 100, dtype=BF16)
    for shape in ((100,), (1200, 1), (1200, 100)):
        bias = random(*shape, dtype=BF16)
        added_is_right(aten.addmm.default, bias, a, b, core, 1, 0.5, 2.0)


def test_a_bias_of_more_columns_than_stay() -> None:
    a, b, bias = random(3, 20), random(20, 5000), random(5000)
    for cores in (1, 2):
        added_is_right(aten.addmm.default, bias, a, b, TRN2, cores, 0.5, 2.0)


def test_beta_0_does_not_read_the_bias() -> None:
    bias, a, b = torch.full((8,), float("nan")), random(8, 8), random(8, 8)
    added_is_right(aten.addmm.default, bias, a, b, TRN2, beta=0)
    added_is_right(aten.addmv.default, bias, a, b[0].contiguous(), TRN2, beta=0)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_baddbmm_and_addbmm(core: CoreSpec, cores: int) -> None:
    a, b = random(3, 130, 70, dtype=BF16), random(3, 70, 40, dtype=BF16)
    shapes = ((3, 130, 40), (130, 40), (40,), (3, 1, 40), (3, 130, 1), (3, 1, 1), (1,))
    for shape in shapes:
        for beta, alpha in ((1, 1), (0.5, 2.0)):
            bias = random(*shape, dtype=BF16)
            added_is_right(aten.baddbmm.default, bias, a, b, core, cores, beta, alpha)
    for beta, alpha in SCALARS:
        bias = random(130, 40, dtype=BF16)
        added_is_right(aten.addbmm.default, bias, a, b, core, cores, beta, alpha)


def test_in_place_forms() -> None:
    out, a, b = random(130, 40), random(130, 70), random(70, 40)
    assert_values(*tile_values(aten.addmm_.default, out, a, b, beta=0.5, alpha=2.0),
                  rtol=1e-5, atol=1e-4)  # fmt: skip
    assert_values(*tile_values(aten.addmm_.default, random(40, 130).t(), a, b),
                  rtol=1e-5, atol=1e-4)  # fmt: skip
    batch = (random(2, 130, 40), random(2, 130, 70), random(2, 70, 40))
    assert_values(*tile_values(aten.baddbmm_.default, *batch), rtol=1e-5, atol=1e-4)
    assert_values(*tile_values(aten.addmv_.default, random(130), a, random(70)),
                  rtol=1e-5, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("gelu", [False, True])
def test_addmm_activation(gelu: bool) -> None:
    for bias in (random(60, dtype=BF16), random(140, 60, dtype=BF16)):
        a, b = random(140, 64, dtype=BF16) / 8, random(64, 60, dtype=BF16)
        (got,), _ = tile_values(
            aten._addmm_activation.default, bias, a, b, beta=0.5, alpha=2.0, use_gelu=gelu
        )
        plain = 2.0 * (a.float() @ b.float()) + 0.5 * bias.float()
        expected = torch.nn.functional.gelu(plain) if gelu else plain.relu()
        close(got, expected.double(), plain.double().abs() + 1)


# -- vectors, linear, lists, scales ----------------------------------------------------------------
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 600])
def test_mv_and_addmv(rows: int, core: CoreSpec, cores: int) -> None:
    for dtype in (F32, BF16):
        for matrix in (laid("rows", rows, 150, dtype), laid("columns", rows, 150, dtype)):
            for vector in (random(150, dtype=dtype), random(300, dtype=dtype)[::2]):
                (got,), _ = tile_values(aten.mv.default, matrix, vector, core=core, cores=cores)
                close(got, matrix.double() @ vector.double(),
                      matrix.double().abs() @ vector.double().abs())  # fmt: skip
                bias = random(rows, dtype=dtype)
                added_is_right(aten.addmv.default, bias, matrix, vector, core, cores, 0.5, 2.0)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 65), (2, 3, 43)], ids=str)
def test_linear(lead: tuple[int, ...], core: CoreSpec) -> None:
    weight, bias = random(70, 150, dtype=BF16), random(70, dtype=BF16)
    for x in (random(*lead, 150, dtype=BF16), random(*lead, 300, dtype=BF16)[..., :150]):
        for given in (None, bias):
            (got,), _ = tile_values(aten.linear.default, x, weight, given, core=core)
            plus = 0 if given is None else given.double()
            close(got, x.double() @ weight.double().t() + plus,
                  x.double().abs() @ weight.double().t().abs() + plus * 0 + 1)  # fmt: skip


def test_linear_of_a_transposed_batch() -> None:
    x, weight = random(3, 2, 150, dtype=BF16).transpose(0, 1), random(70, 150, dtype=BF16)
    (got,), _ = tile_values(aten.linear.default, x, weight)
    close(got, x.double() @ weight.double().t(), x.double().abs() @ weight.double().t().abs())


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 512, 513, 5000])
def test_dot_and_addr(size: int, core: CoreSpec, cores: int) -> None:
    for dtype in (F32, BF16):
        for x, y in (
            (random(size, dtype=dtype), random(size, dtype=dtype)),
            (random(2 * size, dtype=dtype)[::2], random(9 * size, dtype=dtype)[::9]),
        ):
            for function in (aten.dot.default, aten.vdot.default):
                (got,), _ = tile_values(function, x, y, core=core, cores=cores)
                close(got, x.double() @ y.double(), x.double().abs() @ y.double().abs())
            m, z = random(size, 5, dtype=dtype), random(5, dtype=dtype)
            (got,), _ = tile_values(
                aten.addr.default, m, x, z, beta=0.5, alpha=2.0, core=core, cores=cores
            )
            outer = 2.0 * x.double()[:, None] * z.double()
            close(got, 0.5 * m.double() + outer, 0.5 * m.double().abs() + outer.abs())


def test_lists_of_products() -> None:
    left, right = [random(5, 7), random(130, 9)], [random(7, 3), random(9, 200)]
    got, expected = tile_values(aten._foreach_mm.default, left, right)
    assert_values(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_scaled_mm(core: CoreSpec) -> None:
    fp8 = torch.float8_e4m3fn
    a, b = random(48, 96).to(fp8), random(32, 96).to(fp8).t()
    one, other = torch.tensor(0.5), torch.tensor(3.0)
    (got,), _ = tile_values(aten._scaled_mm.default, a, b, one, other, out_dtype=BF16, core=core)
    close(got, 1.5 * (a.double() @ b.double()), 1.5 * (a.double().abs() @ b.double().abs()))
    bias = random(32, dtype=BF16)
    (got,), _ = tile_values(
        aten._scaled_mm.default, a, b, one, other, bias, out_dtype=BF16, core=core
    )
    size = 1.5 * (a.double().abs() @ b.double().abs()) + bias.double().abs()
    close(got, 1.5 * (a.double() @ b.double()) + bias.double(), size)


def test_scales_of_rows_and_columns() -> None:
    fp8 = torch.float8_e4m3fn
    a, b = random(48, 96).to(fp8), random(32, 96).to(fp8).t()
    rows, cols = torch.rand(48, 1) + 0.5, torch.rand(1, 32) + 0.5
    (got,), _ = tile_values(aten._scaled_mm.default, a, b, rows, cols, out_dtype=BF16)
    both = (rows * cols).double()
    close(got, both * (a.double() @ b.double()), both * (a.double().abs() @ b.double().abs()))


# -- degenerate sizes ------------------------------------------------------------------------------
def test_without_k_the_product_is_zero() -> None:
    assert_values(*tile_values(aten.mm.default, random(130, 0), random(0, 520)))
    assert_values(*tile_values(aten.bmm.default, random(2, 3, 0), random(2, 0, 5)))
    bias = random(7)
    assert_values(*tile_values(aten.addmm.default, bias, random(3, 0), random(0, 7), beta=0.5))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (0, 0, 0)], ids=str)
def test_results_without_elements(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    assert_values(*tile_values(aten.mm.default, random(m, k), random(k, n)))


# -- every schedule --------------------------------------------------------------------------------
STRATEGIES = [
    Strategy(),
    Strategy(resident=True),
    Strategy(resident=False),
    Strategy(banks=1, k_tiles=2),
    Strategy(resident=True, rows=128, waiting=3, array_turns=True),
    Strategy(resident=False, array_turns=True),
]


def by_choice(core: CoreSpec, choice: Choice, a: TensorSpec, b: TensorSpec) -> Program:
    """The Program of a @ b by one choice instead of the best one."""
    out = TensorSpec.contiguous(a.dtype, a.shape[0], b.shape[1])
    matrices = [Matrix.of(name, spec) for name, spec in (("in0", a), ("in1", b), ("out0", out))]
    task = Product(*matrices, *out.shape, a.shape[1], 1, (a.dtype, a.dtype))
    return build("mm", core, task, choice)


def run_choice(core: CoreSpec, choice: Choice, a: Tensor, b: Tensor) -> None:
    """Its values."""
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=a.dtype)
    program = by_choice(core, choice, TensorSpec.of(a), TensorSpec.of(b))
    execute(program, core, {"in0": a, "in1": b, "out0": out})
    close(out, a.double() @ b.double(), a.double().abs() @ b.double().abs())


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_schedule(strategy: Strategy, swap: bool, core: CoreSpec) -> None:
    for left, right in (("rows", "rows"), ("columns", "columns"), ("columns", "rows")):
        a, b = laid(left, 700, 150, BF16), laid(right, 150, 1100, BF16)
        run_choice(core, Choice(swap, strategy), a, b)


@pytest.mark.parametrize("swap", [False, True])
def test_panels_that_are_turned_once_and_copied(swap: bool) -> None:
    # Rows of 8,200 fp32 do not stay, so that later passes read the turned copies.
    a, b = random(1100, 8200), random(600, 8200).t()
    choice = Choice(swap, Strategy(resident=False))
    assert "_turned" in str(by_choice(TRN2, choice, TensorSpec.of(a), TensorSpec.of(b)))
    run_choice(TRN2, choice, a, b)


def test_a_turned_panel_that_fits_is_read_once() -> None:
    for size, copied in ((1536, False), (8192, True)):
        x = TensorSpec.contiguous(F32, size, size)
        text = str(by_choice(TRN2, Choice(), x, x))
        assert ("hbm stationary_turned" in text) is copied
    assert "hbm stationary_turned 268435456 B" in text


def test_the_best_choice_is_made_once() -> None:
    best.cache_clear()
    x = TensorSpec.contiguous(BF16, 300, 300)
    for _ in range(3):
        lower(OpCall("aten::mm", (x, x), (x,)), TRN2, 1)
    assert best.cache_info().misses == 1
