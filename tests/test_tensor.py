"""Tensors on trn hold what CPU tensors hold: types, bits, lists, layouts in memory, no elements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from both_devices import T, check_on_both

import torch_trn

FACTORIES: dict[str, Callable[[str], Any]] = {
    "tensor": lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
    "scalar tensor": lambda d: torch.tensor(3.5, device=d),
    "empty list": lambda d: torch.tensor([], device=d),
    "zeros": lambda d: torch.zeros(2, 3, device=d),
    "ones": lambda d: torch.ones(2, 0, 3, device=d),
    "full": lambda d: torch.full((2,), 7, device=d),
    "full bool": lambda d: torch.full((2,), True, device=d),
    "arange": lambda d: torch.arange(5, device=d),
    "arange float": lambda d: torch.arange(0, 1, 0.1, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 7, device=d),
    "logspace": lambda d: torch.logspace(0, 2, 3, device=d, dtype=torch.float64),
    "eye": lambda d: torch.eye(3, 2, device=d),
    "tril_indices": lambda d: torch.tril_indices(3, 3, device=d),
    "zeros_like": lambda d: torch.zeros_like(torch.ones(2, 3, device=d).t()),
    "full_like": lambda d: torch.full_like(torch.ones(2, device=d), 2, dtype=torch.int64),
    "new_tensor": lambda d: torch.ones(2, device=d).new_tensor([1, 2]),
    "new_full": lambda d: torch.ones(2, device=d).new_full((3,), 2),
    "new_zeros": lambda d: torch.ones(2, device=d).new_zeros(3, dtype=torch.bool),
    "as_tensor": lambda d: torch.as_tensor([1.0, 2.0], device=d),
    "complex": lambda d: torch.complex(torch.ones(2, device=d), torch.zeros(2, device=d)),
    "polar": lambda d: torch.polar(torch.ones(2, device=d), torch.zeros(2, device=d)),
    "scalar_tensor": lambda d: torch.scalar_tensor(2, device=d),
    "hann_window": lambda d: torch.hann_window(8, device=d),
    "empty_strided": lambda d: torch.empty_strided((2, 3), (1, 2), device=d).fill_(1),
    "empty_permuted": lambda d: torch.empty_permuted((2, 3, 4), (2, 0, 1), device=d).fill_(1),
    "meshgrid": lambda d: torch.meshgrid(torch.arange(2, device=d), indexing="ij"),
    "randn by seed": lambda d: torch.randn(
        40, device=d, generator=torch.Generator(d).manual_seed(5)
    ),
    "randperm by seed": lambda d: torch.randperm(
        40, device=d, generator=torch.Generator(d).manual_seed(5)
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name: str) -> None:
    check_on_both(FACTORIES[name])


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
WIDE = [torch.uint16, torch.uint32, torch.uint64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
COMPLEX = [torch.complex64, torch.complex128, torch.complex32]
VALUES = [[0, 1, 2], [3, -1, 100]]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + WIDE + FP8 + COMPLEX + [torch.bool], ids=str)
def test_types_convert_and_move(dtype: torch.dtype) -> None:
    x = torch.tensor(VALUES).abs().to(dtype)
    y = x.to("trn:2")
    assert y.dtype == dtype and y.element_size() == x.element_size()
    assert y.cpu().tolist() == x.tolist() == y.tolist()
    if dtype not in COMPLEX:
        check_on_both(
            lambda d: torch.tensor(VALUES, dtype=torch.float32, device=d).abs().to(dtype).float()
        )
    check_on_both(lambda d: x.to(d).view(torch.uint8))
    check_on_both(
        lambda d: x.to(d).t().contiguous().float() if dtype not in COMPLEX else x.to(d).t()
    )
    assert y[0, 1].item() == x[0, 1].item() and "trn:2" in repr(y)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + COMPLEX[:2] + [torch.bool], ids=str)
def test_types_compute(dtype: torch.dtype) -> None:
    def run(d: str) -> list[T]:
        x = torch.tensor(VALUES, device=d).to(dtype)
        results = [x + x, x * 2, x == x.flip(0), x.sum(), torch.cat([x, x], 1), x[:, [2, 0]]]
        results += [torch.where(x != 0, x, x + 1), x.t().clone(), x.any(), x.prod(1)]
        if dtype not in COMPLEX:
            results += [x.max(), x.sort(1).values, x > 1, x.cumsum(1)]
        if dtype.is_floating_point or dtype in COMPLEX:
            results += [x @ x.t(), x.abs().sqrt(), x / 3, x.mean()]
        return results

    check_on_both(run)


def test_types_promote() -> None:
    def run(d: str) -> list[T]:
        i, b = torch.tensor([1, 2], device=d), torch.tensor([True, False], device=d)
        h, f = torch.tensor([1.5, 2], device=d).half(), torch.tensor([1.5, 2], device=d)
        z = torch.tensor(2, device=d)
        return [i + b, i + 1.5, i + h, h + f, h + 1, b + 1, b + 1.5, f + 1j, i / 2, i * z, h * z]

    check_on_both(run)


def test_wrapped_numbers_do_not_promote() -> None:
    x = torch.ones(2, dtype=torch.int8, device="trn")
    assert (x + 1000).dtype == torch.int8 and (x * 2.5).dtype == torch.float32
    half = torch.ones(2, dtype=torch.bfloat16, device="trn")
    for y in (half * 3.3, 3.3 * half, half + torch.tensor(2.0), half + torch.tensor(2.0).trn()):
        assert y.dtype == torch.bfloat16
    assert (half + torch.tensor([2.0], device="trn")).dtype == torch.float32
    assert (2**x).tolist() == [2, 2] and (1 - x).tolist() == [0, 0] and (x // 2).tolist() == [0, 0]


def test_lists() -> None:
    def run(d: str) -> list[Any]:
        a, b = torch.arange(4.0, device=d), torch.arange(6.0, device=d).view(2, 3)
        i = torch.tensor([1, 0], device=d)
        results = [
            torch.cat([a, b.view(-1), a[:0]]),
            torch.stack([a, a], 1),
            torch.block_diag(b, b),
        ]
        results += [b[:, i], b[i], b[None, :, i], b[:, None, i[:, None]], b[i, :][..., i]]
        results += torch.broadcast_tensors(b[0], b)
        b = b.clone()
        b[:, i] = b[:, 1:]
        results += torch._foreach_mul([a, b], 2) + torch._foreach_add([a, b], [a, b], alpha=2)
        results += torch._foreach_norm([a, b]) + torch._foreach_addcmul([a], [a], [a], [3.0])
        kept = [a.clone(), b.clone()]
        torch._foreach_add_(kept, [a, b])
        torch._foreach_copy_(kept[:1], [a + 1])
        torch._foreach_zero_([kept[1][0]])
        results += (
            kept + list(torch.unbind(b)) + list(b.split(2, 1)) + [torch.einsum("ij,j->i", b, b[0])]
        )
        results += [torch.linalg.multi_dot([b.t(), b, b.t()]), torch.cdist(b, b)]
        return results + [torch.hstack([a, a])]

    check_on_both(run)
    with pytest.raises((RuntimeError, ValueError), match="expected a non-empty list of Tensors"):
        torch.cat([torch.empty(0, device="trn")][:0])


def test_conjugate_and_negative_bits() -> None:
    def run(d: str) -> list[Any]:
        z = torch.tensor([[1 + 2j, 3 - 4j], [0j, -1j]], device=d)
        c, n = z.conj(), z.conj().imag
        assert c.is_conj() and n.is_neg() and c.data_ptr() == z.data_ptr()
        results = [
            c.clone(),
            n.clone(),
            c.resolve_conj(),
            n.resolve_neg(),
            c + 1,
            n * 2,
            c @ z,
            z @ c.t(),
        ]
        results += [
            c.contiguous(),
            c.abs(),
            c.real,
            z.mH @ z,
            torch.cat([c, z]),
            c[0],
            n[1:],
            c == z,
        ]
        results += [
            torch.empty_like(z).copy_(c),
            torch.view_as_real(c.resolve_conj()),
            c.sum(),
            n.sum(),
        ]
        results += [torch._neg_view(z.real).clone(), c.to(torch.complex128), torch.conj_physical(c)]
        w = z.clone()
        w.conj().mul_(2j)
        w.conj().imag[0] = 5.0
        w.conj()[1].copy_(c[0])
        m = torch.empty(2, 2, dtype=z.dtype, device=d)
        torch.mm(c, z, out=m.conj())
        return [x.clone() for x in results] + [w, m, z.conj().to("cpu").to(d), n.contiguous().to(d)]

    check_on_both(run)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_zero_tensors_become_real_where_they_are_read() -> None:
    def run(d: str) -> list[Any]:
        zero = torch._efficientzerotensor((2, 3), device=d)
        assert zero._is_zerotensor() and zero.data_ptr() == 0
        x = torch.arange(6.0, device=d).view(2, 3)
        results = [zero.clone(), zero + x, x * zero, x.clone().copy_(zero), zero.t().clone()]
        y = x.clone().requires_grad_()
        tangent = torch.func.jvp(lambda x: (x, torch.ones_like(x)), (x,), (x,))[1]
        (y * 2).select(0, 1).sum().backward()
        return results + [y.grad, *tangent]

    check_on_both(run)


def test_channels_last() -> None:
    def run(d: str) -> list[Any]:
        x = torch.arange(120.0, device=d).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
        v = (
            torch.arange(48.0, device=d)
            .view(1, 2, 2, 3, 4)
            .to(memory_format=torch.channels_last_3d)
        )
        w = torch.ones(2, 3, 3, 3, device=d)
        y = torch.nn.functional.max_pool2d(x, 2)
        results = [x, v, x + 1, x.clone(), torch.empty_like(x).fill_(1), x.contiguous(), y, v * 2]
        results += [x.permute(0, 2, 3, 1), x.sum(1), x[:, :2], x.relu_(), x.double()]
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return results + [torch.nn.functional.conv2d(x, w).shape, x.new_empty(2).shape]

    check_on_both(run)
    with torch.no_grad():
        model = torch.nn.Conv2d(3, 4, 3).trn().to(memory_format=torch.channels_last)
        out = model(torch.ones(2, 3, 5, 5, device="trn").to(memory_format=torch.channels_last))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_zero_dim_and_empty() -> None:
    def run(d: str) -> list[Any]:
        s, e = torch.tensor(3.0, device=d), torch.empty(0, 4, device=d)
        results = [
            s + s,
            s.sum(),
            s[None],
            s.view(1, 1),
            s.expand(2),
            s.exp(),
            s.max(),
            s.clone().zero_(),
        ]
        results += [
            e + 1,
            e.sum(),
            e.sum(0),
            e.t(),
            e @ e.t(),
            e.t() @ e,
            torch.cat([e, e]),
            e.any(),
        ]
        results += [
            e.mean(),
            e.view(4, 0),
            e.clone(),
            e.nonzero(),
            e[:, 1:],
            e.softmax(1),
            e.prod(),
        ]
        results += [
            torch.ones(3, device=d)[torch.zeros(3, dtype=torch.bool, device=d)],
            e.sort().values,
        ]
        return results

    check_on_both(run)
    for call in (lambda x: x.max(), lambda x: x.argmin(), lambda x: x.item()):
        with pytest.raises((RuntimeError, IndexError)) as caught:
            call(torch.empty(0, device="trn"))
        with pytest.raises(type(caught.value)) as expected:
            call(torch.empty(0))
        assert str(caught.value) == str(expected.value)
    assert torch_trn._C.block_of(torch.empty(0, device="trn")) is None


def test_values_in_python() -> None:
    x = torch.tensor([[1.5, -2.0], [0.0, 4.0]], device="trn")
    assert x.tolist() == [[1.5, -2.0], [0.0, 4.0]] and x[0, 0].item() == float(x[0, 0]) == 1.5
    assert int(x[1, 1]) == 4 and bool(x[1, 0]) is False and f"{x[0, 1]:.1f}" == "-2.0"
    assert [row.sum().item() for row in x] == [-0.5, 4.0] and len(x) == 2 and 4.0 in x
    assert list(range(5))[torch.tensor(2, device="trn")] == 2
    assert repr(x[0]) == "tensor([ 1.5000, -2.0000], device='trn:0')"
    assert repr(x.new_empty(0)) == "tensor([], device='trn:0')"
    assert x.type() == "torch.trn.FloatTensor" and hash(x) == id(x)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor with more than one value"):
        bool(x)
