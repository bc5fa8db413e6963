"""Copies of tensors: in memory, to files and back, to the host, to other devices and libraries."""

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torch_trn

CPU, ZERO, ONE = torch.device("cpu"), torch.device("trn", 0), torch.device("trn", 1)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def sample(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(12).view(3, 4) % 5 - 1).to(dtype).to(device)


def reloaded(value: Any, **arguments: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **arguments)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes, whatever the type."""
    a, b = a.cpu(), b.cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_keeps_type_values_and_device(dtype: torch.dtype) -> None:
    x = sample("trn:1", dtype)
    ways = [copy.deepcopy, reloaded]
    if not dtype.is_floating_point or dtype.itemsize > 1:  # torch itself cannot pickle float8
        ways += [copy.copy, lambda x: pickle.loads(pickle.dumps(x))]
    for way in ways:
        y = way(x)
        assert y.device == ONE and same(x, y)
    for y in (x.clone(), x.to("trn:0"), x.cpu(), x.cpu().to("trn"), x.to("trn:2").to("trn:1")):
        assert same(x, y)


def test_deepcopy_and_pickle_keep_what_belongs_to_a_tensor() -> None:
    x = sample("trn:1").requires_grad_()
    (x * 2).sum().backward()
    y = copy.deepcopy(x)
    assert y.requires_grad and torch.equal(y.grad, x.grad) and y.data_ptr() != x.data_ptr()
    with torch.no_grad():
        y[0] = 7.0
    assert x[0].tolist() == [-1.0, 0.0, 1.0, 2.0]
    z = pickle.loads(pickle.dumps(x))
    assert z.requires_grad and torch.equal(z, x)
    parameter = pickle.loads(pickle.dumps(torch.nn.Parameter(x.detach())))
    assert isinstance(parameter, torch.nn.Parameter) and parameter.device == ONE
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(x * 2)


def test_views_keep_sharing_their_storage() -> None:
    x = sample("trn")
    for a, b, c in (
        copy.deepcopy([x, x[1:, ::2], x.t()]),
        reloaded([x, x[1:, ::2], x.t()]),
        reloaded([x, x[1:, ::2], x.t()], map_location="trn:1"),
        reloaded([x, x[1:, ::2], x.t()], map_location="cpu"),
    ):
        assert (b.shape, b.stride(), b.storage_offset()) == ((2, 2), (4, 2), 4)
        assert c.stride() == (1, 4)
        a.fill_(9)
        assert b.tolist() == [[9.0, 9.0]] * 2 and c.tolist() == [[9.0] * 3] * 4


def test_bits_and_odd_shapes_survive() -> None:
    z = torch.tensor([[1 + 2j, 3 - 4j]], device="trn")
    for x in (z.conj(), z.conj().imag, z.mH, z[:, :0], z[0, 0], torch.empty(0, device="trn")):
        for y in (copy.deepcopy(x), reloaded(x), pickle.loads(pickle.dumps(x)), x.to("trn:1")):
            assert torch.equal(y.cpu(), x.cpu()) and y.shape == x.shape and y.is_trn
    channels_last = torch.randn(2, 3, 4, 5, device="trn").to(memory_format=torch.channels_last)
    for y in (copy.deepcopy(channels_last), reloaded(channels_last), channels_last.cpu()):
        assert y.stride() == channels_last.stride() and torch.equal(y.cpu(), channels_last.cpu())


@pytest.mark.parametrize(
    ("start", "map_location", "end"),
    [
        ("trn:0", None, ZERO),
        ("trn:1", None, ONE),
        ("trn:1", "cpu", CPU),
        ("trn:1", "trn:0", ZERO),
        ("trn:1", torch.device("trn", 0), ZERO),
        ("trn:1", "trn", ZERO),
        ("trn:1", {"trn:1": "trn:0"}, ZERO),
        ("trn:1", {"trn:5": "trn:0"}, ONE),
        ("trn:1", lambda storage, tag: storage, CPU),
        ("cpu", "trn:1", ONE),
        ("cpu", "trn", ZERO),
        ("cpu", lambda storage, tag: storage.trn(1), ONE),
        ("cpu", None, CPU),
    ],
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_map_location(start: str, map_location: Any, end: torch.device, new: bool) -> None:
    x = sample(start)
    buffer = io.BytesIO()
    torch.save({"a": x, "b": x[1]}, buffer, _use_new_zipfile_serialization=new)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location=map_location)
    assert loaded["a"].device == loaded["b"].device == end
    assert torch.equal(loaded["a"].cpu(), x.cpu()) and torch.equal(loaded["b"].cpu(), x[1].cpu())
    loaded["a"][1, 0] = 77.0
    assert loaded["b"][0].item() == 77.0


def test_the_current_device_is_the_default_target() -> None:
    with torch.trn.device(2):
        assert reloaded(sample("cpu"), map_location="trn").device.index == 2
        assert reloaded(sample("trn:1")).device == ONE
        assert torch.trn.current_device() == 2


def test_a_file_for_a_device_that_is_absent() -> None:
    text = re.escape(
        "Attempting to deserialize object on TRN device 64 but torch.trn.device_count() is 64. "
        "Please use torch.load with map_location to map your storages to an existing device."
    )
    with pytest.raises(RuntimeError, match=text):
        reloaded(sample("trn"), map_location="trn:64")


def test_a_file_of_a_model_and_its_optimizer(tmp_path: Path) -> None:
    def make(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        device = next(model.parameters()).device
        model(torch.linspace(-1, 1, 20).view(5, 4).to(device)).square().sum().backward()
        optimizer.step()

    model, optimizer = make("trn:1")
    step(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    step(model, optimizer)
    for device in ("cpu", "trn:0", "trn:1"):
        again, its_optimizer = make(device)
        for mapped in (None, device, "cpu"):
            weights, state = torch.load(tmp_path / "checkpoint.pt", map_location=mapped)
            again.load_state_dict(weights)
            its_optimizer.load_state_dict(state)
        assert {p.device for p in again.parameters()} == {torch.device(device)}
        step(again, its_optimizer)
        torch.testing.assert_close(
            [t.cpu() for t in again.state_dict().values()],
            [t.cpu() for t in model.state_dict().values()],
            rtol=1e-6,
            atol=1e-7,
        )
    mapped = torch.load(tmp_path / "checkpoint.pt", map_location="trn:0", mmap=True)[0]
    assert {t.device for t in mapped.values()} == {ZERO}
    meta = torch.nn.Sequential(torch.nn.Linear(4, 3, device="meta"))
    meta.to_empty(device="trn").load_state_dict({k: mapped[k] for k in ("0.weight", "0.bias")})
    assert torch.equal(meta[0].weight.cpu(), mapped["0.weight"].cpu())


def test_loading_leaves_no_memory_behind() -> None:
    x = torch.zeros(1 << 18, device="trn:7")
    amount = torch.trn.memory_allocated(7)
    for _ in range(3):
        del x
        x = pickle.loads(pickle.dumps(torch.zeros(1 << 18, device="trn:7")))
        x = copy.deepcopy(reloaded(x))
        assert torch.trn.memory_allocated(7) == amount == 1 << 20


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages() -> None:
    x = sample("trn:1")
    storage = x.untyped_storage()
    assert storage.device == ONE and storage.nbytes() == 48 and storage.is_trn
    assert bytes(storage.tolist()) == x.cpu().numpy().tobytes()
    other = copy.deepcopy(storage)
    assert other.device == storage.clone().device == ONE and other.tolist() == storage.tolist()
    assert storage.cpu().device == CPU and storage.cpu().tolist() == storage.tolist()
    other.fill_(0)
    assert other.tolist() == [0] * 48 and x[0, 0].item() == -1.0
    other.copy_(storage.cpu())
    assert torch.empty(0, device=ONE).set_(other, 4, (2,), (1,)).tolist() == [3.0, -1.0]
    other.resize_(8)
    assert other.nbytes() == 8 and other.tolist() == storage.tolist()[:8]
    assert torch.UntypedStorage(10, device="trn:1").device == ONE
    assert reloaded(storage, weights_only=False).tolist() == storage.tolist()


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_storages_that_are_not_ours() -> None:
    """Serialisation wraps raw pointers; such a tensor has no block of HBM but has its values."""
    x = torch.tensor([1.0, 2.0, 3.0], device="trn:1")
    y = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    assert y.device == ONE and y.data_ptr() == x.data_ptr()
    assert torch_trn._C.block_of(x) is not None and torch_trn._C.block_of(y) is None
    assert (y + x).tolist() == [2.0, 4.0, 6.0] and y[1:].tolist() == [2.0, 3.0]
    y.mul_(2)
    assert x.tolist() == [2.0, 4.0, 6.0]
    assert torch.add(x, 1, out=y) is y and x.tolist() == [3.0, 5.0, 7.0]
    assert copy.deepcopy(y).tolist() == reloaded(y).tolist() == [3.0, 5.0, 7.0]
    with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
        y.resize_(100)
    with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
        torch.add(torch.ones(100, device="trn:1"), 1, out=y)
    assert y.shape == (3,) and y.tolist() == [3.0, 5.0, 7.0]
    del x
    assert y.tolist() == [3.0, 5.0, 7.0]


def test_numpy_and_dlpack_are_refused_as_on_other_accelerators() -> None:
    x = sample("trn")
    text = re.escape(
        "can't convert trn:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
        "host memory first."
    )
    for call in (x.numpy, lambda: np.asarray(x), lambda: np.add(x, 1)):
        with pytest.raises(TypeError, match=text):
            call()
    assert x.numpy(force=True).tolist() == x.tolist() == x.cpu().numpy().tolist()
    with pytest.raises((ValueError, BufferError), match="trn for Dlpack"):
        torch.from_dlpack(x)
    with pytest.raises((ValueError, BufferError), match="trn for Dlpack"):
        x.__dlpack_device__()
    with pytest.raises((RuntimeError, BufferError)):
        np.from_dlpack(x)
    with pytest.raises(AttributeError, match="Can't get __cuda_array_interface__ on non-CUDA"):
        _ = x.__cuda_array_interface__
    for array in (np.ones(3), np.float64(2.5), [np.int64(1), np.int64(2)]):
        assert torch.equal(torch.as_tensor(array, device="trn").cpu(), torch.as_tensor(array))


def test_share_memory() -> None:
    x = sample("trn")
    assert x.share_memory_() is x and x.is_shared() and x.untyped_storage().is_shared()
    model = torch.nn.Linear(2, 2).trn().share_memory()
    assert model.weight.is_trn and model.weight.is_shared()


def test_pinned_memory() -> None:
    x = torch.arange(6.0)
    assert not x.is_pinned()
    pinned = x.pin_memory()
    assert pinned.is_pinned() and pinned[2:].is_pinned() and pinned.device == CPU
    assert pinned.pin_memory() is pinned and torch.equal(pinned, x)
    assert torch.empty(3, pin_memory=True).is_pinned() and torch.empty(0).pin_memory().numel() == 0
    assert x.untyped_storage().pin_memory().is_pinned()
    assert pinned.to("trn", non_blocking=True).tolist() == x.tolist()
    assert not (pinned + 1).is_pinned() and not pinned.trn().is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        x.trn().pin_memory()
    with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
        torch.empty(3, device="trn", pin_memory=True)
    address = pinned.data_ptr()
    del pinned
    assert not torch.empty(0).is_pinned() and address % 64 == 0


@pytest.mark.parametrize("start", ["cpu", "trn:0", "trn:1"])
@pytest.mark.parametrize("end", ["cpu", "trn:0", "trn:1"])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_copies_between_devices(start: str, end: str, non_blocking: bool) -> None:
    x = sample(start)
    y = x.to(end, non_blocking=non_blocking)
    assert y.device == torch.device(end) and (y is x) == (start == end)
    assert torch.equal(y.cpu(), x.cpu())
    y = x.t()[1:].to(end, torch.float64, non_blocking=non_blocking, copy=True)
    assert y.dtype == torch.float64 and torch.equal(y.cpu(), x.t()[1:].cpu().double())
    target = torch.zeros(4, 3, 2, dtype=torch.int32, device=end)
    target[:, :, 1].copy_(x.t(), non_blocking)
    assert torch.equal(target[..., 1].cpu(), x.t().cpu().int()) and target[..., 0].sum() == 0
    target[..., 0].copy_(x[0, :, None])  # broadcast
    assert torch.equal(target[..., 0].cpu(), x[0, :, None].cpu().int().expand(4, 3))
    flipped = torch.zeros(2, dtype=torch.complex64, device=end)
    flipped.copy_(torch.tensor([1 + 1j, 2 - 3j], device=start).conj(), non_blocking)
    assert flipped.tolist() == [1 - 1j, 2 + 3j]
    flipped.conj().copy_(torch.tensor([1 + 1j, 2 - 3j], device=start))
    assert flipped.tolist() == [1 - 1j, 2 + 3j]
    with pytest.raises(RuntimeError, match="The size of tensor a .* must match|expand"):
        target.copy_(torch.ones(5, device=start))


def test_gradients_cross_devices() -> None:
    x = torch.arange(3.0, requires_grad=True)
    (x.to("trn:0") * 2).to("trn:1").pow(2).cpu().sum().backward()
    assert x.grad.tolist() == [0.0, 8.0, 16.0] and x.grad.device == CPU


def test_meta_and_back() -> None:
    x = sample("trn")
    assert x.to("meta").shape == (3, 4) and x.to("meta").is_meta
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        x.to("meta").to("trn")
