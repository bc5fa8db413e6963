"""Autocast on trn casts as on CUDA: torch's lists of operators, the cache, nesting, functions."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.testing._internal.autocast_test_lists import AutocastTestLists
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import torch_trn

LOW = [torch.bfloat16, torch.float16]
LISTS = AutocastTestLists("cpu")
NOT_ON_TRN = {"cudnn_convolution", "cudnn_convolution_transpose"}

Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def cases(*attributes: str) -> list[Any]:
    """(operator, arguments, keyword arguments) of torch's lists, each list with its namespace."""
    params = []
    for attribute in attributes:
        for index, case in enumerate(getattr(LISTS, attribute)):
            name, args, *rest = case
            if name in NOT_ON_TRN or not isinstance(args, tuple):
                continue  # einsum's entry has its arguments in an order of its own
            keywords = next((item for item in rest if isinstance(item, dict)), {})
            function = partial(call, attribute.partition("_")[0], name, *args, **keywords)
            params.append(pytest.param(function, id=f"{name}-{index}"))
    return params


def call(namespace: str, name: str, *args: Any, cast: Callable[[Any], Any], **keywords: Any) -> Any:
    """Call an operator of one of torch's namespaces with its tensors put through `cast`."""
    args, keywords = tree_map(cast, (args, keywords))
    if namespace == "methods":
        return getattr(args[0], name)(*args[1:], **keywords)
    modules = {"nn": torch._C._nn, "linalg": torch._C._linalg, "torch": torch}
    return getattr(modules[namespace], name)(*args, **keywords)


def on_trn(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor on trn, if a floating one in `dtype`; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to("trn", dtype if value.is_floating_point() else None)


def dtypes(result: Any) -> set[torch.dtype]:
    return {x.dtype for x in tree_leaves(result) if isinstance(x, Tensor)}


def assert_same(actual: Any, expected: Any) -> None:
    for got, want in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def square() -> Tensor:
    return torch.linspace(-1, 1, 16, device="trn").view(4, 4)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("run", cases("torch_fp16", "nn_fp16", "linalg_fp16", "methods_fp16"))
def test_lower_precision(run: Callable[..., Any], low: torch.dtype) -> None:
    with torch.autocast("trn", dtype=low):
        result = run(cast=on_trn)
        assert dtypes(result) == {low}
        with torch.autocast("trn", enabled=False):
            assert_same(result, run(cast=partial(on_trn, dtype=low)))


@pytest.mark.parametrize("run", cases("torch_fp32", "nn_fp32", "methods_fp32"))
def test_float32(run: Callable[..., Any]) -> None:
    with torch.autocast("trn", dtype=torch.float16):
        result = run(cast=on_trn)
        assert dtypes(result) == {torch.float32}
        with torch.autocast("trn", enabled=False):
            assert_same(result, run(cast=partial(on_trn, dtype=torch.float32)))


@pytest.mark.parametrize("run", cases("torch_need_autocast_promote"))
def test_promotion(run: Callable[..., Any]) -> None:
    with torch.autocast("trn", dtype=torch.float16):
        result = run(cast=on_trn)
        assert dtypes(result) == {torch.float32}
        with torch.autocast("trn", enabled=False):
            assert_same(result, run(cast=partial(on_trn, dtype=torch.float32)))


@pytest.mark.parametrize("name, args, out", LISTS.torch_expect_builtin_promote)
def test_promotion_that_torch_does_anyway(name: str, args: Any, out: torch.dtype) -> None:
    with torch.autocast("trn", dtype=torch.float16):
        result = call("torch", name, *args, cast=on_trn)
    assert result is False if name == "equal" else dtypes(result) == {out}


def test_operators_that_torchs_lists_leave_out(square: Tensor) -> None:
    image = square.view(1, 1, 4, 4)
    with torch.autocast("trn", dtype=torch.bfloat16):
        assert torch.einsum("ij,jk", square, square).dtype == torch.bfloat16
        attended = F.scaled_dot_product_attention(image, image, image)
        assert attended.dtype == torch.bfloat16
        assert F.huber_loss(square.half(), square.half()).dtype == torch.float32
        for mode in ("nearest", "bilinear", "bicubic"):
            assert F.interpolate(image.half(), scale_factor=2, mode=mode).dtype == torch.float32
        assert torch.softmax(square.half(), 0, dtype=torch.float64).dtype == torch.float64
        assert square.half().sum(dtype=torch.float16).dtype == torch.float16
        for cell in (nn.LSTM(4, 3), nn.GRU(4, 3), nn.RNN(4, 3), nn.GRUCell(4, 3)):
            assert dtypes(cell.to("trn")(square)) == {torch.bfloat16}


def test_binary_cross_entropy_is_refused(square: Tensor) -> None:
    x, y = square.sigmoid(), square.sigmoid()
    with torch.autocast("trn"):
        with pytest.raises(RuntimeError) as caught:
            F.binary_cross_entropy(x, y)
        assert str(caught.value).startswith(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast "
            "on trn, as on CUDA. Use binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss"
        )
        assert F.binary_cross_entropy_with_logits(square.half(), y).dtype == torch.float32
        with torch.autocast("trn", enabled=False):
            assert F.binary_cross_entropy(x, y).dtype == torch.float32
    assert F.binary_cross_entropy(x, y).dtype == torch.float32


def test_nesting(square: Tensor) -> None:
    assert (square @ square).dtype == torch.float32
    with torch.autocast("trn", dtype=torch.bfloat16):
        assert (square @ square).dtype == torch.bfloat16
        with torch.autocast("trn", enabled=False):
            assert (square @ square).dtype == torch.float32
            with torch.autocast("trn", dtype=torch.float16):
                assert (square @ square).dtype == torch.float16
        assert (square @ square).dtype == torch.bfloat16
    assert (square @ square).dtype == torch.float32
    assert not torch.is_autocast_enabled("trn")


def test_what_is_not_cast(square: Tensor) -> None:
    with torch.autocast("trn", dtype=torch.bfloat16):
        assert (square.double() @ square.double()).dtype == torch.float64
        assert (square.long() * 2).dtype == torch.int64
        assert torch.mm(square, square, out=torch.empty_like(square)).dtype == torch.float32
        assert (square.clone().addmm_(square, square)).dtype == torch.float32
        assert (square.cpu() @ square.cpu()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (square @ square).dtype == torch.float32
        assert (square.cpu() @ square.cpu()).dtype == torch.bfloat16


def test_default_dtype(square: Tensor) -> None:
    """The same, whichever way autocast is entered."""
    with torch.autocast("trn"):
        general = (square @ square).dtype
    with torch.trn.amp.autocast():
        assert (square @ square).dtype == general == torch.get_autocast_dtype("trn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_other_dtypes_disable_it_with_a_warning(square: Tensor, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match="In trn autocast, but the target dtype is not supported"):
        with torch.autocast("trn", dtype=dtype):
            assert (square @ square).dtype == torch.float32
    assert torch.trn.get_amp_supported_dtype() == LOW
    assert torch.trn.is_bf16_supported()


def test_decorators(square: Tensor) -> None:
    @torch.autocast("trn", dtype=torch.float16)
    def general(x: Tensor) -> Tensor:
        return x @ x

    @torch.trn.amp.autocast(dtype=torch.bfloat16)
    def ours(x: Tensor) -> Tensor:
        return x @ x

    assert general(square).dtype == torch.float16
    assert ours(square).dtype == torch.bfloat16


def casts_of(layer: nn.Module, x: Tensor, calls: int, **options: Any) -> int:
    """How many tensors are cast to bfloat16 while the layer runs `calls` times."""
    with torch_trn.profile() as prof, torch.autocast("trn", dtype=torch.bfloat16, **options):
        for _ in range(calls):
            layer(x)
    casts = ("aten::_to_copy", "aten::copy_")
    return sum(record["name"].startswith(casts) for record in prof.records())


def test_parameters_are_cast_once(square: Tensor) -> None:
    layer = nn.Linear(4, 4).to("trn")
    x = square.bfloat16()
    assert casts_of(layer, x, calls=3) == 2  # weight and bias
    assert casts_of(layer, x, calls=3, cache_enabled=False) == 6
    with torch.no_grad():
        assert casts_of(layer, x, calls=3) in (2, 6)
    layer.requires_grad_(False)
    assert casts_of(layer, x, calls=3) == 6, "only leaves that require a gradient are kept"


def test_the_cache_ends_with_the_block(square: Tensor) -> None:
    layer = nn.Linear(4, 4, bias=False).to("trn")
    with torch.autocast("trn", dtype=torch.bfloat16):
        layer(square)
    with torch.no_grad():
        layer.weight.zero_()
    with torch.autocast("trn", dtype=torch.bfloat16):
        assert layer(square).abs().sum().item() == 0


def loss_and_gradients(device: str, low: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)).to(
        device
    )
    x = torch.linspace(-2, 2, 32).view(4, 8).to(device)
    with torch.autocast(device, dtype=low):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0], device=device))
    assert logits.dtype == low
    loss.backward()
    return [loss.detach().cpu(), *(parameter.grad.cpu() for parameter in model.parameters())]


def test_a_training_step() -> None:
    actual = loss_and_gradients("trn", torch.bfloat16)
    assert dtypes(actual) == {torch.float32}
    expected = loss_and_gradients("cpu", torch.bfloat16)
    # The CPU's list leaves layer_norm in bfloat16, CUDA's and so ours computes it in float32.
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.01)


def test_gradients_have_the_dtype_of_their_parameters(square: Tensor) -> None:
    weight = square.clone().requires_grad_()
    half = square.half().requires_grad_()
    with torch.autocast("trn", dtype=torch.bfloat16):
        (weight @ half).sum().backward()
    assert (weight.grad.dtype, half.grad.dtype) == (torch.float32, torch.float16)


def test_checkpointing_with_autocast() -> None:
    layer = nn.Linear(4, 4).to("trn")
    seen: list[torch.dtype] = []

    def block(x: Tensor) -> Tensor:
        y = layer(x)
        seen.append(y.dtype)
        return y

    x = torch.ones(2, 4, device="trn", requires_grad=True)
    with set_checkpoint_early_stop(False):
        with torch.autocast("trn", dtype=torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=False)
        y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_custom_functions(square: Tensor) -> None:
    seen: list[Any] = []

    class Product(Function):
        @staticmethod
        @torch.trn.amp.custom_fwd
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        @torch.trn.amp.custom_bwd
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            a, b = ctx.saved_tensors
            seen.append((torch.is_autocast_enabled("trn"), torch.get_autocast_dtype("trn")))
            return grad @ b.t(), a.t() @ grad

    class Exact(Function):
        @staticmethod
        @torch.trn.amp.custom_fwd(cast_inputs=torch.float32)
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            seen.append((a.dtype, b.dtype, torch.is_autocast_enabled("trn")))
            return a @ b

        @staticmethod
        @torch.trn.amp.custom_bwd
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            seen.append(torch.is_autocast_enabled("trn"))
            return grad, grad

    x = square.clone().requires_grad_()
    half = square.half().requires_grad_()
    with torch.autocast("trn", dtype=torch.bfloat16):
        product, exact = Product.apply(x, x), Exact.apply(half, half)
    assert (product.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    product.sum().backward()
    assert seen.pop() == (True, torch.bfloat16)
    exact.sum().backward()
    assert seen == [(torch.float32, torch.float32, False), False]


def test_threads_have_their_own_state(square: Tensor) -> None:
    results: list[torch.dtype] = []
    with torch.autocast("trn"):
        thread = threading.Thread(target=lambda: results.append((square @ square).dtype))
        thread.start()
        thread.join()
    assert results == [torch.float32]
