"""torch's own operator samples: values, strides and gradients on trn are the CPU's, bit for bit.

float32 runs every operator of `op_db` with gradients; other dtypes, in-place and `out=` forms run a
seeded part of it. A lowering that fails on a sample is an error here, not a Host span.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning"),
]

SEED = 20
SAMPLES = 3
"""Of each operator, the first ones."""

NO_VALUES = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
"""What they return has no defined values."""

EXCLUDED = {
    "as_strided.partial_views": "its samples are parts of storages, which do not move with a view",
    "chalf": "the CPU cannot compare complex32",
    "jiterator_2inputs_2outputs": "compiles CUDA",
    "jiterator_4inputs_with_extra_args": "compiles CUDA",
    "jiterator_binary": "compiles CUDA",
    "jiterator_binary_return_by_ref": "compiles CUDA",
    "jiterator_unary": "compiles CUDA",
    "sparse.mm.reduce": "sparse",
    "sparse.sampled_addmm": "sparse",
    "to": "its samples name the CPU as the device to go to",
    "to_sparse": "sparse",
}

CPU_ARGUMENTS = {"tensor_split": "split points are read on the host, so they stay on the CPU"}

TOLERANCE = {
    "linalg.lstsq": 1e-5,
    "linalg.lstsq.grad_oriented": 1e-5,
    "nn.functional.linear_cross_entropy.chunked": 1e-2,
    "nn.functional.linear_cross_entropy.chunked_none": 1e-2,
}
"""Where the last bits depend on where memory lies (on the CPU too), or where torch itself computes
in another order on accelerators (which shows in bfloat16)."""


def name_of(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def operators(dtype: torch.dtype, share: float = 1.0, **attributes: bool) -> list[Any]:
    """A seeded share of the operators that the CPU has for `dtype`."""
    able = [
        op
        for op in op_db
        if name_of(op) not in EXCLUDED
        and op.supports_dtype(dtype, "cpu")
        and all(getattr(op, name) == value for name, value in attributes.items())
    ]
    chosen = random.Random(f"{SEED} {dtype}").sample(range(len(able)), round(len(able) * share))
    return [pytest.param(able[index], id=name_of(able[index])) for index in sorted(chosen)]


def seed() -> None:
    """As torch.manual_seed does, which formats the stack three times."""
    torch.default_generator.manual_seed(SEED)
    torch.trn.manual_seed(SEED)


def samples(op: OpInfo, dtype: torch.dtype, grad: bool = False) -> Iterator[SampleInput]:
    """What `op.sample_inputs` gives, without the record of the caller that it adds (0.1 s each)."""
    seed()
    random.seed(SEED)
    yield from islice(op.sample_inputs_func(op, "cpu", dtype, grad), SAMPLES)


def moved(op: OpInfo, sample: SampleInput, device: str) -> tuple[Any, tuple[Any, ...], dict]:
    """The arguments of a sample as new leaves on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            copy = value.detach().to(device, copy=True)
            return copy.requires_grad_(value.requires_grad)
        if isinstance(value, torch.Generator):
            return torch.Generator(device).manual_seed(SEED)
        return torch.device(device) if isinstance(value, torch.device) else value

    args = sample.args if op.name in CPU_ARGUMENTS else tree_map(move, sample.args)
    kwargs = tree_map(move, sample.kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device(device)
    return (
        move(sample.input) if isinstance(sample.input, Tensor) else tree_map(move, sample.input),
        args,
        kwargs,
    )


def result_or_error(run: Callable[[], Any]) -> Any:
    """What `run` returns, or the type of what it raises (a sample may be meant to fail)."""
    try:
        return run()
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
        return type(error)


def forward(op: OpInfo, function: Callable[..., Any], sample: SampleInput, device: str) -> Any:
    tensor, args, kwargs = moved(op, sample, device)
    seed()
    return function(tensor, *args, **kwargs)


def with_gradients(op: OpInfo, sample: SampleInput, device: str) -> tuple[Any, Any]:
    tensor, args, kwargs = moved(op, sample, device)
    seed()
    result = op(tensor, *args, **kwargs)
    outputs = [
        output
        for output in tree_leaves(sample.output_process_fn_grad(result))
        if isinstance(output, Tensor) and output.requires_grad
    ]
    inputs = [
        leaf
        for leaf in tree_leaves((tensor, args, kwargs))
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    grads: Any = ()
    if outputs and inputs:
        total = sum((out.abs() if out.is_complex() else out).sum() for out in outputs)
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result), grads


def check(op: OpInfo, expected: Any, actual: Any) -> None:
    expected, actual = tree_leaves(expected), tree_leaves(actual)
    assert len(actual) == len(expected)
    for want, got in zip(expected, actual, strict=True):
        if not isinstance(want, Tensor):
            assert got == want or (got != got and want != want)
            continue
        assert got.device.type == "trn", f"a result is on {got.device}"
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if want.numel() > 1:
            assert got.stride() == want.stride()
        if name_of(op) not in NO_VALUES:
            tolerance = TOLERANCE.get(name_of(op), 0)
            torch.testing.assert_close(
                got.cpu(), want, rtol=tolerance, atol=tolerance, equal_nan=True
            )


def check_gradients(op: OpInfo, dtype: torch.dtype) -> None:
    for sample in samples(op, dtype, grad=op.supports_autograd):
        expected = result_or_error(lambda: with_gradients(op, sample, "cpu"))  # noqa: B023
        actual = result_or_error(lambda: with_gradients(op, sample, "trn"))  # noqa: B023
        if expected is actual:
            continue
        assert isinstance(expected, tuple), f"the CPU raises {expected}, trn returns {actual}"
        actual = with_gradients(op, sample, "trn") if not isinstance(actual, tuple) else actual
        for want, got in zip(expected, actual, strict=True):
            check(op, want, got)


def check_values(op: OpInfo, function: Callable[..., Any], dtype: torch.dtype) -> None:
    for sample in samples(op, dtype):
        if isinstance(sample.input, Tensor) and sample.broadcasts_input and function is not op:
            continue  # in place, the input would have to grow
        expected = result_or_error(lambda: forward(op, function, sample, "cpu"))  # noqa: B023
        actual = result_or_error(lambda: forward(op, function, sample, "trn"))  # noqa: B023
        if expected is not actual:
            assert not isinstance(actual, type), f"trn raises {actual}, the CPU returns a value"
            check(op, expected, actual)


@pytest.mark.parametrize("op", operators(torch.float32))
def test_float32(op: OpInfo) -> None:
    check_gradients(op, torch.float32)


@pytest.mark.parametrize("op", operators(torch.bfloat16, 0.5, supports_autograd=True))
def test_bfloat16(op: OpInfo) -> None:
    check_gradients(op, torch.bfloat16)


@pytest.mark.parametrize("op", operators(torch.complex64, 0.5, supports_autograd=True))
def test_complex64(op: OpInfo) -> None:
    check_gradients(op, torch.complex64)


@pytest.mark.parametrize("op", operators(torch.float64, 0.3))
def test_float64(op: OpInfo) -> None:
    check_values(op, op, torch.float64)


@pytest.mark.parametrize("op", operators(torch.int64, 0.5))
def test_int64(op: OpInfo) -> None:
    check_values(op, op, torch.int64)


@pytest.mark.parametrize("op", operators(torch.bool, 0.5))
def test_bool(op: OpInfo) -> None:
    check_values(op, op, torch.bool)


@pytest.mark.parametrize(
    "op", [param for param in operators(torch.float32) if param.values[0].inplace_variant]
)
def test_in_place(op: OpInfo) -> None:
    check_values(op, op.inplace_variant, torch.float32)


@pytest.mark.parametrize("op", operators(torch.float32, supports_out=True))
def test_out(op: OpInfo) -> None:
    """Into empty tensors, which grow, and into what the first call returned, which does not."""

    def into_given(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = op(tensor, *args, **kwargs)
        if isinstance(result, bool):
            return result  # equal's out= takes no tensor
        for out in (
            tree_map(lambda leaf: leaf.new_empty(0), result),
            tree_map(lambda leaf: torch.zeros_like(leaf), result),
        ):
            returned = op(tensor, *args, out=out, **kwargs)
            leaves = zip(tree_leaves(returned), tree_leaves(out), strict=True)
            assert returned is None or all(one is two for one, two in leaves)
        return out

    check_values(op, into_given, torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_histc_counts_integers_as_cuda_does(dtype: torch.dtype) -> None:
    # The CPU kernel refuses integers; accelerators divide them without a fraction.
    x = torch.tensor([[0, 1, 1], [5, 7, 9]], dtype=dtype, device="trn")
    assert torch.histc(x, bins=4, min=0, max=7).tolist() == [2 + 1, 0, 1, 1]
    assert torch.histc(x, bins=2).tolist() == [3, 3]
    assert torch.histc(x[0, 1:], bins=2).tolist() == [0, 2]
    assert torch.histc(x, bins=3, min=2, max=3).dtype == dtype
    out = torch.empty(0, dtype=dtype, device="trn")
    assert torch.histc(x, bins=2, min=0, max=9, out=out) is out and out.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="bins must be > 0"):
        torch.histc(x, bins=0)
    with pytest.raises(RuntimeError, match="max must be larger than min"):
        torch.histc(x, bins=2, min=3, max=1)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.histc(x, bins=2, out=torch.empty(2, device="trn"))
