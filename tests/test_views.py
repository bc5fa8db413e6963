"""Views, in-place operators, `out=`, resizing and set_: who shares which memory."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from both_devices import T, check_on_both

VIEWS: dict[str, Callable[[T], T]] = {
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[1],
    "transpose": lambda x: x.t(),
    "permute": lambda x: x[None].permute(2, 0, 1),
    "view": lambda x: x.view(2, 2, 6),
    "reshape": lambda x: x.reshape(-1),
    "expand": lambda x: x[:, None].expand(4, 3, 6),
    "squeeze": lambda x: x[None, :, None].squeeze(),
    "diagonal": lambda x: x.diagonal(1),
    "unfold": lambda x: x.unfold(1, 3, 2),
    "as_strided": lambda x: x.as_strided((3, 3), (2, 5), 1),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split([1, 3])[1],
    "unbind": lambda x: x.unbind(1)[4],
    "view as int": lambda x: x.view(torch.int32),
    "view as bytes": lambda x: x.view(torch.uint8)[:, 4:8],
    "view as complex": lambda x: torch.view_as_complex(x.view(4, 3, 2)),
    "real of complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 3, 2))[1:]),
    "movedim": lambda x: x.view(2, 2, 6).movedim(0, 2),
    "detach": lambda x: x.detach(),
    "alias of view of view": lambda x: x[1:].t()[2:].view(4, 3)[:, 1].unflatten(0, (2, 2)),
    "flatten": lambda x: x.view(2, 2, 6).flatten(1),
    "broadcast_to": lambda x: x[0].broadcast_to(3, 6),
    "tensor_split": lambda x: x.tensor_split(3, 1)[1],
    "nothing": lambda x: x[2:2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory_and_are_written_through(name: str) -> None:
    call = VIEWS[name]
    base = torch.arange(24.0, device="trn").view(4, 6)
    allocated = torch.trn.memory_allocated()
    view = call(base)
    assert torch.trn.memory_allocated() == allocated and view.is_trn
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    expected_base = torch.arange(24.0).view(4, 6)
    expected = call(expected_base)
    assert (view.shape, view.stride(), view.storage_offset(), view.dtype) == (
        (expected.shape, expected.stride(), expected.storage_offset(), expected.dtype)
    )
    assert torch.equal(view.cpu(), expected) and view._is_view() == expected._is_view()
    if not expected.is_complex() and "expand" not in name and "broadcast" not in name:
        view.add_(1), expected.add_(1)
        view.flatten()[:1].zero_(), expected.flatten()[:1].zero_()
        assert torch.equal(base.cpu(), expected_base) and base._version == expected_base._version


def test_in_place() -> None:
    def run(d: str) -> list[Any]:
        x = torch.arange(12.0, device=d).view(3, 4)
        y = x.t()
        address, version = x.data_ptr(), x._version
        assert y.add_(1) is y and y[1:].mul_(2).exp_().shape == (3, 3)
        x[0] = 5.0
        x[:, 1] = x[:, 2]
        x[x > 100] = -1.0
        x[[0, 2], [1, 1]] = torch.tensor([7.0, 8.0], device=d)
        x.index_add_(0, torch.tensor([1], device=d), x[:1].clone())
        x.masked_fill_(x == 7, 9.0).clamp_(max=50).sub_(x.mean(0, keepdim=True)).t_().transpose_(
            0, 1
        )
        x.scatter_(1, torch.tensor([[0], [1], [2]], device=d), 3.0).squeeze_().unsqueeze_(0)
        z = torch.ones(2, dtype=torch.int64, device=d)
        z += 2
        z <<= 1
        with pytest.raises(RuntimeError, match="result type Float can't be cast to"):
            z.add_(1.5)
        assert x.data_ptr() == address and x._version > version
        return [x, y, z, x.zero_()]

    check_on_both(run)


def test_memory_overlap_is_refused_as_on_the_cpu() -> None:
    for d in ("cpu", "trn"):
        x = torch.zeros(1, device=d).expand(4)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            x.add_(1)
        y = torch.arange(5.0, device=d)
        with pytest.raises(RuntimeError, match="some elements of the input tensor and the written"):
            torch.add(y[:-1], 1, out=y[1:])


OUT: dict[str, Callable[[T, T], Any]] = {
    "add": lambda x, out: torch.add(x, x, out=out),
    "scalar": lambda x, out: torch.sub(x, torch.tensor(2.0), out=out),
    "mm": lambda x, out: torch.mm(x, x.t(), out=out),
    "matmul": lambda x, out: torch.matmul(x, x.t(), out=out),
    "cat": lambda x, out: torch.cat([x, x], out=out),
    "sum": lambda x, out: torch.sum(x, 1, out=out),
    "cumsum": lambda x, out: torch.cumsum(x, 1, out=out),
    "index_select": lambda x, out: torch.index_select(x, 0, x[0, :1].long(), out=out),
    "where": lambda x, out: torch.where(x > 2, x, -x, out=out),
    "arange": lambda x, out: torch.arange(7, out=out),
    "nonzero": lambda x, out: torch.nonzero(x, out=out.long() if out.is_floating_point() else out),
    "masked_select": lambda x, out: torch.masked_select(x, x > 3, out=out),
    "linspace": lambda x, out: torch.linspace(0, 1, 9, out=out),
    "stack": lambda x, out: torch.stack([x, x], out=out),
}


@pytest.mark.filterwarnings("ignore:(An output with|The number of elements in the out tensor)")
@pytest.mark.parametrize("size", [(0,), (3,), (40,), (2, 50)], ids=str)
@pytest.mark.parametrize("name", OUT)
def test_out_of_a_wrong_size_is_resized(name: str, size: tuple[int, ...]) -> None:
    def run(d: str) -> list[Any]:
        x = torch.arange(12.0, device=d).view(3, 4)
        out = torch.full(size, -1.0, device=d)
        result = OUT[name](x, out)
        assert result is out or name == "nonzero"
        return [result, out.shape, out.untyped_storage().nbytes()]

    before = torch.trn.memory_allocated(2)
    check_on_both(run)
    assert torch.trn.memory_allocated(2) == before


def test_out_of_the_right_size_keeps_its_memory_and_strides() -> None:
    x = torch.arange(6.0, device="trn").view(2, 3)
    for out in (
        torch.empty(2, 3, device="trn"),
        torch.empty(3, 2, device="trn").t(),
        torch.zeros(4, 6, device="trn")[1:3, ::2],
        torch.empty(2, 3, dtype=torch.float64, device="trn"),
    ):
        address, stride = out.data_ptr(), out.stride()
        assert torch.mul(x, 2, out=out) is out
        assert (out.data_ptr(), out.stride()) == (address, stride)
        assert out.tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    base = torch.zeros(4, 6, device="trn")
    torch.mm(x, x.t(), out=base[1:3, 2:4])
    assert base.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    values, indices = torch.empty(0, device="trn"), torch.empty(0, dtype=torch.long, device="trn")
    torch.sort(x, descending=True, out=(values, indices))
    assert values.tolist() == [[2.0, 1.0, 0.0], [5.0, 4.0, 3.0]] and indices[0].tolist() == [
        2,
        1,
        0,
    ]
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type"):
        torch.mul(x, 2.5, out=torch.empty(2, 3, dtype=torch.long, device="trn"))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_into_a_view_that_has_to_grow() -> None:
    def run(d: str) -> list[Any]:
        base = torch.zeros(10, device=d)
        view = base[2:4]
        torch.add(torch.arange(6.0, device=d), 1, out=view)  # fits into the storage
        grown = base[5:6]
        torch.add(torch.arange(20.0, device=d), 1, out=grown)  # does not: it grows for both
        return [base, view, grown, base.untyped_storage().nbytes(), grown.storage_offset()]

    check_on_both(run)


def test_resize() -> None:
    def run(d: str) -> list[Any]:
        x = torch.arange(6.0, device=d)
        view = x[2:4]
        x.resize_(2, 2)
        first = x.clone()
        x.resize_(3, 4).view(-1)[6:] = 0.0
        y = torch.zeros(2, 3, 4, 5, device=d).resize_(1, 2, 2, 2, memory_format=torch.channels_last)
        z = torch.arange(4.0, device=d)[1:].resize_as_(torch.empty(1, 2, device=d))
        s = torch.arange(4.0, device=d)
        s.untyped_storage().resize_(40)
        s.set_(s.untyped_storage(), 0, (10,), (1,))[4:] = 9.0
        assert x.resize_(3, 4) is x and s.untyped_storage().nbytes() == 40
        return [first, x, view, y, z, s, torch.empty(0, device=d).resize_(0, 3)]

    check_on_both(run)


def test_set() -> None:
    def run(d: str) -> list[Any]:
        source = torch.arange(12.0, device=d)
        a = torch.empty(0, device=d).set_(source[3:7])
        b = torch.empty(0, device=d).set_(source.untyped_storage())
        c = torch.empty(0, device=d).set_(source.untyped_storage(), 2, (2, 2), (4, 1))
        e = torch.ones(3, device=d).set_()
        g = torch.ones(3, device=d)
        g.data = source[:2]
        c.add_(100)
        grown = torch.empty(0, device=d).set_(source.untyped_storage(), 10, (4,), (1,))
        grown.fill_(5)
        return [a, b, c, e, g, source, grown, source.untyped_storage().nbytes()]

    check_on_both(run)


STEPS: list[Callable[[T, T, int, int], T]] = [
    lambda x, y, a, b: x[b:],
    lambda x, y, a, b: x.t() if x.dim() == 2 else x[None],
    lambda x, y, a, b: x.reshape(-1),
    lambda x, y, a, b: x.view(torch.int32).view(torch.float32),
    lambda x, y, a, b: x.as_strided((a,), (b,), 0),
    lambda x, y, a, b: x.select(0, 0),
    lambda x, y, a, b: x.unfold(0, 1, a),
    lambda x, y, a, b: x.clone(),
    lambda x, y, a, b: x.add_(a),
    lambda x, y, a, b: x.zero_() if x.numel() < 5 else x.mul_(0.5),
    lambda x, y, a, b: x.copy_(y),
    lambda x, y, a, b: x.set_(y),
    lambda x, y, a, b: torch.add(y.reshape(-1), 1, out=x),
    lambda x, y, a, b: torch.cat([x.reshape(-1), y.reshape(-1)], out=x.new_empty(0))[:30],
    lambda x, y, a, b: x.resize_(a, b + 1),
    lambda x, y, a, b: x.untyped_storage().resize_(max(a * 64, x.untyped_storage().nbytes())) and x,
]
LEAVES_BYTES_UNSET = len(STEPS) - 2
"""The index of the first step that may make memory without a value in it."""


def outcome(step: Callable[[T, T, int, int], T], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except (RuntimeError, IndexError) as error:
        return str(error)


def facts(x: T) -> tuple[Any, ...]:
    nbytes = x.untyped_storage().nbytes()
    return x.shape, x.stride(), x.storage_offset(), nbytes, x._version


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("growing", [False, True], ids=["values", "growing"])
@pytest.mark.parametrize("seed", range(25))
def test_random_programs_of_views_and_writes(seed: int, growing: bool) -> None:
    """On up to eight tensors that share memory: the same facts, values and errors as on the CPU."""
    choice = random.Random(seed)
    tensors = [[torch.arange(24.0, device=device)] for device in ("cpu", "trn")]
    for _ in range(40):
        number = choice.randrange(len(STEPS) if growing else LEAVES_BYTES_UNSET)
        i, j = (choice.randrange(len(tensors[0])) for _ in range(2))
        a, b = choice.randrange(1, 5), choice.randrange(4)
        expected, result = (outcome(STEPS[number], ts[i], ts[j], a, b) for ts in tensors)
        if isinstance(expected, str) or isinstance(result, str):
            assert result == expected
            continue
        tensors = [(ts + [new])[-8:] for ts, new in zip(tensors, (expected, result), strict=True)]
        for cpu, trn in zip(*tensors, strict=True):
            assert facts(trn) == facts(cpu), number
            assert growing or torch.equal(trn.cpu().nan_to_num(), cpu.nan_to_num()), number


def test_aliases_are_used_again() -> None:
    """A call's CPU alias serves the next call on that memory, whatever its view: all read true."""
    x = torch.arange(12.0, device="trn").view(3, 4)
    expected = torch.arange(12.0).view(3, 4)
    views: dict[str, Callable[[T], T]] = {
        "itself": lambda t: t,
        "turned": lambda t: t.t(),
        "part": lambda t: t[1:, 2],
        "scalar": lambda t: t[2, 3],
        "bits": lambda t: t.view(torch.int32),
        "negated": lambda t: torch._neg_view(t),
        "empty": lambda t: t[3:],
    }
    for _ in range(2):
        for view in views.values():
            assert torch.equal((view(x) + 1).cpu(), view(expected) + 1)
            assert torch.equal((x + x).cpu(), expected + expected)
    x.resize_(5, 4).fill_(2)
    assert (x + 1).tolist() == [[3.0] * 4] * 5
    x.t_().add_(1)
    assert (x * 1).tolist() == [[3.0] * 5] * 4
    with torch.inference_mode():
        y = x + 1
    assert (y + 1).tolist() == [[5.0] * 5] * 4
    z = x.new_ones(3)
    x.set_(z)
    z.add_(1)
    assert (x + 1).tolist() == [3.0, 3.0, 3.0]


def test_threads_read_one_tensor_at_once() -> None:
    """An idle alias goes to one of them; the others make their own."""
    x = torch.arange(64.0, device="trn").view(8, 8)
    sums: list[set[float]] = []

    def read(turned: bool) -> None:
        y = x.t() if turned else x
        sums.append({float((y + 1)[0].sum().item()) for _ in range(300)})

    threads = [threading.Thread(target=read, args=(i % 2 == 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(max, sums)) == [36.0, 36.0, 232.0, 232.0]
    assert all(len(found) == 1 for found in sums)
