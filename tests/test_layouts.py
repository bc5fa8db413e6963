"""Sparse, quantized and nested tensors: a clear error, and nothing left behind."""

import gc
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

REFUSED = (
    "{}: sparse, nested and quantized tensors are not supported on trn, since a NeuronCore has "
    "dense memory only. Keep this tensor on the CPU, or call to_dense() (dequantize()) first."
)
RESULT = (
    "{} gives a {} tensor, which trn does not have; run it on the CPU: move its inputs with .cpu() "
    "first."
)

eye = torch.eye(4)


@pytest.fixture(autouse=True)
def quiet_and_clean() -> Iterator[None]:
    """These layouts warn of being beta; a refused call must free what it had made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.trn.memory_allocated(4)
        yield
    gc.collect()  # a caught error holds the frames it went through
    assert torch.trn.memory_allocated(4) == before


def ones(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*size, dtype=dtype, device="trn:4")


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="trn:4")


COO = "aten::_sparse_coo_tensor_with_dims_and_tensors"
CSR = "aten::_sparse_compressed_tensor_unsafe"
MAKING: dict[str, tuple[str, Callable[[], object]]] = {
    "coo": (COO, lambda: torch.sparse_coo_tensor(long(0, 1)[None], ones(2), (4,))),
    "coo by device": (COO, lambda: torch.sparse_coo_tensor([[0]], [1.0], (4,), device="trn:4")),
    "coo from cpu": (COO, lambda: eye.to_sparse().to("trn:4")),
    "csr": (CSR, lambda: torch.sparse_csr_tensor(long(0, 1), long(0), ones(1), (1, 1))),
    "csr by device": (CSR, lambda: torch.sparse_csr_tensor([0, 1], [0], [1.0], device="trn")),
    "csc": (CSR, lambda: torch.sparse_csc_tensor([0, 1], [0], [1.0], device="trn")),
    "bsr": (CSR, lambda: torch.sparse_bsr_tensor([0, 1], [0], [[[1.0]]], device="trn")),
    "by layout": (
        CSR,
        lambda: torch.sparse_compressed_tensor(
            [0, 1], [0], [1.0], layout=torch.sparse_csr, device="trn"
        ),
    ),
    "csr from cpu": (CSR, lambda: eye.to_sparse_csr().to("trn:4")),
    "empty": ("aten::empty", lambda: torch.empty(2, 2, layout=torch.sparse_coo, device="trn")),
    "zeros csr": (CSR, lambda: torch.zeros(2, 2, layout=torch.sparse_csr, device="trn")),
    "zeros_like": ("aten::", lambda: torch.zeros_like(eye.to_sparse(), device="trn")),
    "quantized": ("aten::empty", lambda: torch.empty(2, dtype=torch.qint8, device="trn")),
    "affine": (
        "aten::_empty_affine_quantized",
        lambda: torch._empty_affine_quantized([2], dtype=torch.qint8, device="trn"),
    ),
    "quantized from cpu": (
        "aten::empty_quantized",
        lambda: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8).to("trn:4"),
    ),
    "nested": ("aten::", lambda: torch.nested.nested_tensor([ones(2), ones(3)])),
    "nested by device": (
        "aten::",
        lambda: repr(torch.nested.nested_tensor([[1.0]], device="trn:4")),
    ),
    "nested from cpu": ("aten::", lambda: torch.nested.nested_tensor([eye, eye[:2]]).to("trn:4")),
}


@pytest.mark.parametrize("name", MAKING)
def test_such_a_tensor_cannot_be_made_or_used(name: str) -> None:
    operator, call = MAKING[name]
    with pytest.raises(NotImplementedError) as caught:
        call()
    pattern = re.escape(operator) + r"[\w.]*" + re.escape(REFUSED.format(""))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


RESULTS: dict[str, tuple[str, str, Callable[[torch.Tensor], object]]] = {
    "to_sparse": ("aten::_to_sparse", "Sparse", lambda x: x.to_sparse()),
    "to_sparse_csr": ("aten::_to_sparse_csr", "SparseCsr", lambda x: x.to_sparse_csr()),
    "to_sparse_csc": ("aten::_to_sparse_csc", "SparseCsc", lambda x: x.to_sparse_csc()),
    "to_sparse_bsr": ("aten::_to_sparse_bsr", "SparseBsr", lambda x: x.to_sparse_bsr((2, 2))),
    "to_mkldnn": ("aten::to_mkldnn", "Mkldnn", lambda x: x.to_mkldnn()),
    "quantize": (
        "aten::quantize_per_tensor",
        "quantized",
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ),
    "quantize channels": (
        "aten::quantize_per_channel",
        "quantized",
        lambda x: torch.quantize_per_channel(x, x[0], x[0] * 0, 0, torch.qint8),
    ),
    "quantize dynamically": (
        "aten::quantize_per_tensor_dynamic",
        "quantized",
        lambda x: torch.quantize_per_tensor_dynamic(x, torch.qint8, False),
    ),
    "embedding_bag backward": (
        "aten::_embedding_bag_backward",
        "Sparse",
        lambda x: (
            F.embedding_bag(long(0, 1)[None], x.requires_grad_(), mode="sum", sparse=True)
            .sum()
            .backward()
        ),
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_an_operator_that_would_give_one(name: str) -> None:
    operator, kind, call = RESULTS[name]
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        call(ones(4, 4))
    assert str(caught.value) == RESULT.format(operator, kind)


MIXED: dict[str, Callable[[torch.Tensor], object]] = {
    "sparse.mm": lambda x: torch.sparse.mm(eye.to_sparse(), x),
    "sparse @": lambda x: eye.to_sparse() @ x,
    "@ sparse": lambda x: x @ eye.to_sparse(),
    "@ csr": lambda x: x @ eye.to_sparse_csr(),
    "add": lambda x: x + eye.to_sparse(),
    "copy_": lambda x: x.copy_(eye.to_sparse()),
    "addmm": lambda x: torch.sparse.addmm(x, eye.to_sparse(), x),
    "sampled_addmm": lambda x: torch.sparse.sampled_addmm(eye.to_sparse_csr(), x, x),
    "sparse_mask": lambda x: x.sparse_mask(eye.to_sparse()),
    "quantized copy_": lambda x: x.copy_(torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8)),
    "copy_ to quantized": lambda x: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8).copy_(x),
    "sparse gradient": lambda x: (
        F.embedding(long(0), x.requires_grad_(), sparse=True).sum().backward()
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_one_on_the_cpu_does_not_mix_with_trn(name: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(REFUSED.format(""))):
        MIXED[name](ones(4, 4))


ABSENT: dict[str, Callable[[torch.Tensor], object]] = {
    "_nnz": lambda x: x._nnz(),
    "int_repr": lambda x: x.int_repr(),
    "q_scale": lambda x: x.q_scale(),
    "to_padded_tensor": lambda x: x.to_padded_tensor(0.0),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_operator_of_such_tensors_on_a_dense_one(name: str) -> None:
    """There is no kernel; the error must not speak of the CPU, where the tensor is not."""
    with pytest.raises((NotImplementedError, RuntimeError)) as caught:
        ABSENT[name](ones(4, 4))
    assert f"aten::{name}" in str(caught.value) and "trn" in str(caught.value)
    assert "arguments from the 'CPU' backend" not in str(caught.value)


def test_what_stays_dense_works() -> None:
    x = torch.arange(16.0, device="trn:4").view(4, 4)
    assert not x.is_sparse and not x.is_quantized and not x.is_nested and x.layout == torch.strided
    assert torch.equal(x.to_dense().cpu(), x.cpu())
    fake = torch.fake_quantize_per_tensor_affine(x, 0.5, 0, 0, 10)
    assert torch.equal(fake.cpu(), x.cpu().clamp(0, 5))
    assert torch.equal(eye.to_sparse().to_dense().to("trn:4").cpu(), eye)


def test_jagged_nested_tensors_are_dense_inside() -> None:
    parts = [torch.arange(8.0).view(2, 4), torch.arange(12.0).view(3, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, device="trn:4")
    assert nested.device == torch.device("trn:4")
    assert [torch.equal(a.cpu(), b) for a, b in zip(nested.unbind(), parts, strict=True)] == [
        True,
        True,
    ]
    linear = torch.nn.Linear(4, 2)
    expected = torch.nested.nested_tensor(parts, layout=torch.jagged)
    expected = linear(expected).relu().to_padded_tensor(-1.0)
    result = linear.to("trn:4")(nested).relu().to_padded_tensor(-1.0)
    torch.testing.assert_close(result.detach().cpu(), expected.detach())
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1
    )
    encoder = encoder.to("trn:4").eval()
    mask = torch.zeros(2, 3, dtype=torch.bool, device="trn:4")
    mask[0, 2] = True
    assert encoder(ones(2, 3, 4), src_key_padding_mask=mask).shape == (2, 3, 4)
