"""Autograd on trn: gradients are the CPU's, bit for bit, whatever made the graph."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils.checkpoint import checkpoint

Inputs = list[Tensor]
Shapes = tuple[tuple[int, ...], ...]


def leaves(shapes: Shapes, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_()
        for shape in shapes
    ]


def gradients(function: Callable[..., Tensor], shapes: Shapes, device: str) -> Inputs:
    """The result of `function` and the gradients of its inputs, weighted so that none are equal."""
    inputs = leaves(shapes, device)
    result = function(*inputs)
    weights = torch.linspace(-1, 2, result.numel()).view(result.shape).to(device)
    result.backward(weights)
    assert all(x.grad is not None and x.grad.device == x.device for x in inputs)
    return [result.detach().cpu(), *(x.grad.cpu() for x in inputs if x.grad is not None)]


def assert_same(expected: Inputs, actual: Inputs) -> None:
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def in_place_on_a_view(x: Tensor) -> Tensor:
    base = x * 2
    base[1:3, ::2].mul_(x[1:3, ::2].sin()).add_(1)
    base.t()[0].relu_()
    return base


def in_place_after_a_view_was_taken(x: Tensor) -> Tensor:
    base = x * 1
    diagonal = base.diagonal()
    base.mul_(3)
    return diagonal * base.sum()


def slices_written(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    out[0] = y[0] * 2
    out.narrow(0, 2, 1).copy_(y[1:2])
    return out.exp()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "matmul": (lambda a, b: (a @ b).tanh(), ((5, 6), (6, 7))),
    "broadcast": (lambda a, b: a * b + b, ((4, 1, 3), (5, 1))),
    "in place on a view": (in_place_on_a_view, ((4, 4),)),
    "in place after a view was taken": (in_place_after_a_view_was_taken, ((4, 4),)),
    "slices written": (slices_written, ((4, 4), (4, 4))),
    "view chain": (lambda x: (x * 1)[1:].t().reshape(-1)[::2].view(-1, 3).square(), ((5, 6),)),
    "as_strided": (lambda x: x.as_strided((3, 3), (2, 1), 1) * 2, ((4, 4),)),
    "expand": (lambda x: x.expand(3, 4, 5).cos(), ((4, 1),)),
    "unbind and stack": (lambda x: torch.stack([p * p for p in x.unbind(1)]), ((3, 4),)),
    "chunk": (lambda x: torch.cat([c.sin() for c in x.chunk(3, 1)], 1), ((2, 7),)),
    "index with a list": (lambda x: x[[0, 2, 2]] * 3, ((4, 3),)),
    "index with a mask": (lambda x: x[x > 0], ((4, 3),)),
    "index_add": (lambda x, y: x.index_add(0, y[0].argsort(), y), ((3, 2), (2, 2))),
    "max with indices": (lambda x: x.max(1).values * x.amin(1), ((4, 5),)),
    "sort and cumsum": (lambda x: x.sort(1).values.cumsum(1), ((3, 5),)),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4))),
    "solve": (lambda a, b: torch.linalg.solve(a, b), ((4, 4), (4, 2))),
    "complex": (lambda x: torch.view_as_real(torch.fft.fft(x).conj() * 1j), ((6,),)),
    "0-dim": (lambda x: x * x.exp(), ((),)),
    "empty": (lambda x: x.sum(1), ((3, 0),)),
    "CPU scalar tensor": (lambda x: x * torch.tensor(2.5), ((3,),)),
    "to other dtypes": (lambda x: x.double().sin().to(torch.bfloat16).float(), ((5,),)),
    "through the CPU": (lambda x: x.cpu().sin().to(x.device) * x, ((5,),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_the_cpus(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    assert_same(gradients(function, shapes, "cpu"), gradients(function, shapes, "trn"))


@pytest.mark.parametrize("threads", [False, True])
def test_one_graph_over_many_devices(threads: bool) -> None:
    x = torch.arange(16.0, device="trn", requires_grad=True)
    parts = [(x.to(f"trn:{index}") * (index + 1)).square() for index in range(8)]
    total = parts[0]
    for part in parts[1:]:
        total = total.to(part.device) + part
    with torch.autograd.set_multithreading_enabled(threads):
        total.sum().backward()
    assert total.device.index == 7 and x.grad.device.index == 0
    weight = sum((index + 1) ** 2 for index in range(8))
    assert x.grad.tolist() == [2.0 * value * weight for value in range(16)]


def test_backward_runs_on_the_device_of_each_node() -> None:
    seen: list[tuple[int, int]] = []

    class Note(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append((grad.device.index, torch.trn.current_device()))
            return grad

    x = torch.ones(3, device="trn:1", requires_grad=True)
    y = Note.apply(Note.apply(x).to("trn:2"))
    with torch.trn.device(3):
        y.sum().backward()
        assert torch.trn.current_device() == 3
    assert seen == [(2, 2), (1, 1)]


def in_threads(function: Callable[[int], None], count: int = 6) -> None:
    """Runs `function(index)` in so many threads; an error in one of them is raised."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            function(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_share_parameters() -> None:
    weight = torch.full((32,), 2.0, device="trn", requires_grad=True)

    def train(index: int) -> None:
        x = torch.full((32,), float(index), device="trn")
        for _ in range(25):
            (weight * x).sum().backward()

    in_threads(train)
    assert weight.grad is not None and weight.grad.tolist() == 32 * [25.0 * 15]


def test_threads_with_a_device_each() -> None:
    results: dict[int, float] = {}

    def train(index: int) -> None:
        torch.trn.set_device(index)
        x = torch.full((8,), float(index), device="trn", requires_grad=True)
        for _ in range(20):
            x.grad = None
            (x * x).sum().backward()
        assert x.grad is not None and x.grad.device.index == index
        results[index] = x.grad.sum().item()

    in_threads(train)
    assert results == {index: 16.0 * index for index in range(6)}
    assert torch.trn.current_device() == 0


def test_hooks() -> None:
    calls: list[str] = []
    layer = nn.Linear(2, 2).to("trn")
    x = torch.ones(1, 2, device="trn", requires_grad=True)
    layer.register_full_backward_hook(lambda m, gi, go: calls.append(f"module {gi[0].device}"))
    layer.weight.register_post_accumulate_grad_hook(
        lambda p: calls.append(f"accumulated {tuple(p.grad.shape)}")
    )
    x.register_hook(lambda grad: grad * 10)
    y = layer(x)
    y.retain_grad()
    y.grad_fn.register_hook(lambda gi, go: calls.append("node"))
    y.sum().backward()
    assert calls == ["node", "accumulated (2, 2)", "module trn:0"]
    assert y.grad.tolist() == [[1.0, 1.0]]
    assert torch.equal(x.grad, 10 * layer.weight.sum(0, keepdim=True))


def test_saved_tensor_hooks_move_what_is_saved() -> None:
    packed: list[torch.device] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.device)
        return tensor.cpu()

    x = torch.arange(4.0, device="trn", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to("trn")):
        y = x.exp() * x
    y.sum().backward()
    assert packed == 3 * [torch.device("trn:0")]
    assert torch.equal(x.grad.cpu(), (x.detach().exp() * (1 + x.detach())).cpu())
    z = torch.arange(4.0, device="trn", requires_grad=True)
    with torch.autograd.graph.save_on_cpu(pin_memory=True, device_type="trn"):
        y = z.exp() * z
    y.sum().backward()
    assert torch.equal(z.grad, x.grad)


def test_retain_graph() -> None:
    x = torch.ones(3, device="trn", requires_grad=True)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == 3 * [4.0]
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.backward()


def test_a_saved_tensor_that_was_changed() -> None:
    x = torch.ones(3, device="trn", requires_grad=True)
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[trn"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        x.add_(1)


def test_the_gradient_must_be_on_the_device() -> None:
    x = torch.ones(3, device="trn", requires_grad=True)
    with pytest.raises(RuntimeError, match="expected device trn:0 but got cpu"):
        x.backward(torch.ones(3))
    with pytest.raises(RuntimeError, match="device type 'cpu' to a tensor with device type 'trn'"):
        x.grad = torch.ones(3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_numbers_again(reentrant: bool) -> None:
    def step(device: str, again: bool) -> Inputs:
        torch.manual_seed(3)
        (x,) = leaves(((64,),), device)
        block = nn.Sequential(nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3))
        y = checkpoint(block, x * 2, use_reentrant=reentrant) if again else block(x * 2)
        after = torch.rand(3, device=device)
        y.sum().backward()
        return [y.detach().cpu(), x.grad.cpu(), after.cpu(), torch.rand(3, device=device).cpu()]

    expected = step("cpu", again=False)
    assert_same(expected, step("trn", again=False))
    assert_same(expected, step("trn", again=True))


DOUBLE: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "cubic": (lambda x: x**3, ((5,),)),
    "mlp": (lambda x, w, v: (x @ w).tanh() @ v, ((3, 4), (4, 5), (5, 2))),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)).sin(), ((3, 4),)),
    "softmax": (lambda x: x.softmax(1) * x, ((3, 4),)),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), ((1, 2, 5, 5), (3, 2, 3, 3))),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k), ((1, 4, 8), (1, 4, 8))),
    "index": (lambda x: x[[0, 0, 1]].square(), ((3, 2),)),
}


@pytest.mark.parametrize("name", DOUBLE)
def test_double_backward(name: str) -> None:
    function, shapes = DOUBLE[name]

    def second(device: str) -> Inputs:
        inputs = leaves(shapes, device)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            firsts = torch.autograd.grad(
                function(*inputs).square().sum(), inputs, create_graph=True
            )
        total = sum(((grad.cos() * grad).sum() for grad in firsts), torch.zeros((), device=device))
        return [grad.cpu() for grad in torch.autograd.grad(total, inputs)]

    assert_same(second("cpu"), second("trn"))


def test_gradcheck() -> None:
    inputs = tuple(leaves(((3, 4), (4, 2)), "trn", torch.float64))
    assert torch.autograd.gradgradcheck(lambda a, b: (a @ b).sigmoid(), inputs)


def test_custom_function() -> None:
    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(x)
            ctx.factor = factor
            index = x.argmax()
            ctx.mark_non_differentiable(index)
            return x * factor, index

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            assert ctx.needs_input_grad == (True, False) and x.is_trn
            return grad * ctx.factor + x * 0, None

    x = torch.tensor([1.0, 5.0, 2.0], device="trn", requires_grad=True)
    y, index = Scale.apply(x, 3.0)
    y.sum().backward()
    assert (index.item(), x.grad.tolist()) == (1, [3.0, 3.0, 3.0])


def test_an_error_in_backward_reaches_the_caller() -> None:
    class Fail(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise KeyError("from backward")

    x = torch.ones(3, device="trn:1", requires_grad=True)
    for threads in (False, True):
        with torch.autograd.set_multithreading_enabled(threads):
            with pytest.raises(KeyError, match="from backward"):
                Fail.apply(x * 2).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_functional_transforms() -> None:
    def jvp(device: str) -> Tensor:
        x, tangent = (t.detach() for t in leaves(((3, 4), (3, 4)), device))
        with forward_ad.dual_level():
            result = forward_ad.make_dual(x, tangent).tanh() * 2
            return forward_ad.unpack_dual(result).tangent.cpu()

    def hessian(device: str) -> Tensor:
        (x,) = leaves(((4,),), device)
        return torch.func.hessian(lambda v: (v.sin() * v).sum())(x.detach()).cpu()

    def per_sample(device: str) -> Tensor:
        x, w = (t.detach() for t in leaves(((5, 3), (3,)), device))
        return torch.func.vmap(torch.func.grad(lambda w, x: (w @ x).exp()), (None, 0))(w, x).cpu()

    for function in (jvp, hessian, per_sample):
        assert_same([function("cpu")], [function("trn")])


def test_zeros_that_were_never_stored() -> None:
    """Torch keeps some gradients as tensors without memory; reading one gives zeros."""
    x = torch.ones(3, device="trn:1", requires_grad=True)
    for zeros in (
        torch.autograd.grad(x.sgn().sum(), x)[0],
        torch._efficientzerotensor((3,), device="trn:1"),
    ):
        assert zeros._is_zerotensor() and zeros.device == x.device
        assert zeros.tolist() == [0.0, 0.0, 0.0]
        assert (zeros + x).tolist() == [1.0, 1.0, 1.0]
        for copied in (
            zeros.clone(),
            x.detach().clone().copy_(zeros),
            zeros.to("trn:0"),
            zeros * x,
        ):
            assert copied.tolist() == [0.0, 0.0, 0.0]
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            zeros.add_(1)


def test_graphs_free_their_tensors() -> None:
    gc.collect()
    before = torch.trn.memory_allocated()
    x = torch.ones(1024, device="trn", requires_grad=True)
    y = x.exp()
    reference = weakref.ref(y)
    y.sum().backward()
    del y
    gc.collect()
    assert reference() is None
    assert torch.trn.memory_allocated() - before == 2 * 4096  # x and its gradient
    del x
    assert torch.trn.memory_allocated() == before


def test_gradients_move_with_their_module() -> None:
    layer = nn.Linear(2, 3).to("trn")
    layer(torch.ones(1, 2, device="trn")).sum().backward()
    layer.to("cpu")
    assert layer.weight.grad.device.type == "cpu"
    assert layer.weight.grad.tolist() == 3 * [[1.0, 1.0]]
