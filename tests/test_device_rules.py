"""Which devices may meet in one call, and which device a call is on.

A mix raises torch's usual error and never gives a silent result; what CUDA allows is allowed.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subprocess_case import run

T = torch.Tensor
Call = Callable[[T, T, T], Any]
"""Called with a float 4x4 on one device, the same on another one, and the indices [0, 2] there."""

MIXED: dict[str, tuple[str, Call]] = {
    "mm": ("mat2", lambda a, b, i: a @ b),
    "bmm": ("mat2", lambda a, b, i: torch.bmm(a[None], b[None])),
    "linear": ("mat2", lambda a, b, i: F.linear(a, b)),
    "dot": ("tensor", lambda a, b, i: a[0].dot(b[0])),
    "add": ("other", lambda a, b, i: a + b),
    "add in place": ("other", lambda a, b, i: a.add_(b)),
    "compare": ("other", lambda a, b, i: a < b),
    "equal": ("other", lambda a, b, i: torch.equal(a, b)),
    "add into out": ("out", lambda a, b, i: torch.add(a, a, out=b)),
    "mm into out": ("out", lambda a, b, i: torch.mm(a, a, out=b)),
    "sum into out": ("out", lambda a, b, i: torch.sum(a, 0, out=b)),
    "cat": ("tensors", lambda a, b, i: torch.cat([a, b])),
    "stack": ("tensors", lambda a, b, i: torch.stack([a, b])),
    "where": ("other", lambda a, b, i: torch.where(a > 0, a, b)),
    "where by condition": ("self", lambda a, b, i: torch.where(a > 0, b, b)),
    "masked_fill": ("mask", lambda a, b, i: a.masked_fill(b > 0, 1.0)),
    "embedding": ("indices", lambda a, b, i: F.embedding(i, a)),
    "index_select": ("index", lambda a, b, i: a.index_select(0, i)),
    "gather": ("index", lambda a, b, i: a.gather(0, i[None])),
    "scatter": ("index", lambda a, b, i: a.scatter(0, i[None], 1.0)),
    "index_put values": ("values", lambda a, b, i: a.index_put_((a.argmax(1),), b)),
    "layer_norm": ("weight", lambda a, b, i: F.layer_norm(a, (4,), b[0], b[0])),
    "conv1d": ("weight", lambda a, b, i: F.conv1d(a[None], b[None, :, :3].contiguous())),
    "mse_loss": ("target", lambda a, b, i: F.mse_loss(a, b)),
    "cross_entropy": ("target", lambda a, b, i: F.cross_entropy(a[:2], i)),
    "_foreach_add": ("other", lambda a, b, i: torch._foreach_add([a], [b])),
    "clamp": ("min", lambda a, b, i: a.clamp(b)),
}


def on(device: str) -> tuple[T, T]:
    return torch.arange(16.0, device=device).view(4, 4), torch.tensor([0, 2], device=device)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(
    ("first", "second"),
    [("trn:0", "cpu"), ("cpu", "trn:0"), ("trn:0", "trn:1"), ("trn:1", "trn:0")],
)
def test_a_mix_of_devices_is_torchs_usual_error(name: str, first: str, second: str) -> None:
    argument, call = MIXED[name]
    a, _ = on(first)
    b, index = on(second)
    kept = a.clone(), b.clone()
    with pytest.raises(RuntimeError) as caught:
        call(a, b, index)
    pattern = (
        rf"Expected all tensors to be on the same device, but got {argument} is on {second}, "
        rf"different from other tensors on {first} "
        rf"\(when checking argument in method wrapper_trn_\w+\)"
    )
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


def test_indices_of_another_device() -> None:
    a, _ = on("trn:0")
    for wrong, x in (("trn:1", a), ("trn:0", on("cpu")[0])):
        with pytest.raises(RuntimeError, match=f"got indices is on {wrong}"):
            x[torch.tensor([0, 2], device=wrong)]
        with pytest.raises(RuntimeError, match=f"got indices is on {wrong}"):
            x[torch.tensor([0, 2], device=wrong)] = 1.0


def test_a_mix_in_attention_and_in_storage() -> None:
    a, _ = on("trn:0")
    cpu, _ = on("cpu")
    other, _ = on("trn:1")
    with pytest.raises(
        RuntimeError, match="Expected query, key, and value to have the same device"
    ):
        F.scaled_dot_product_attention(a[None], cpu[None], a[None])
    for source in (cpu, other):
        wrong = re.escape(
            f'Attempted to set the storage of a tensor on device "trn:0" to a storage on different '
            f'device "{source.device}".  This is no longer allowed; the devices must match.'
        )
        with pytest.raises(RuntimeError, match=wrong):
            a.clone().set_(source)
        with pytest.raises(RuntimeError, match=wrong):
            a.clone().set_(source.untyped_storage())
    with pytest.raises(RuntimeError, match="Expected a 'trn' device type for generator"):
        torch.randn(2, device="trn", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
        torch.randn(2, generator=torch.Generator("trn"))


ALLOWED: dict[str, Callable[[T, T], T]] = {
    "add": lambda a, s: a + s,
    "add reversed": lambda a, s: s + a,
    "mul in place": lambda a, s: a.clone().mul_(s),
    "pow": lambda a, s: a**s,
    "compare": lambda a, s: a == s,
    "add to double": lambda a, s: a.double() + s,
    "add to int": lambda a, s: a.long() + s,
    "into out": lambda a, s: torch.sub(a, s, out=torch.empty_like(a)),
    "lerp": lambda a, s: torch.lerp(a, a + 1, s),
    "addcmul": lambda a, s: torch.addcmul(a, s, a),
    "where": lambda a, s: torch.where(a > 4, a, s),
    "where by condition": lambda a, s: torch.where(s > 1, a, -a),
    "masked_fill": lambda a, s: a.masked_fill(a > 4, s),
    "index_put": lambda a, s: a.clone().index_put_((torch.tensor([1, 3]),), s.float()),
    "_foreach_add": lambda a, s: torch._foreach_add([a, a], s)[1],
    "_foreach_mul": lambda a, s: torch._foreach_mul([a, a], s)[0],
    "_foreach_div_": lambda a, s: (c := a.clone(), torch._foreach_div_([c], s))[0],
}


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("value", [2.5, 3], ids=["float", "int"])
def test_a_cpu_scalar_may_join_as_on_cuda(name: str, value: float) -> None:
    if name == "lerp" and isinstance(value, int):
        value = 3.0
    scalar = torch.tensor(value)
    expected = ALLOWED[name](on("cpu")[0], scalar)
    result = ALLOWED[name](on("trn:1")[0], scalar)
    assert result.device == torch.device("trn", 1) and result.dtype == expected.dtype
    assert torch.equal(result.cpu(), expected)


def test_a_trn_scalar_may_not_join_cpu_tensors() -> None:
    with pytest.raises(RuntimeError, match="got other is on trn:0, different .* on cpu"):
        on("cpu")[0] + torch.tensor(1.0, device="trn")
    with pytest.raises(RuntimeError, match="got other is on trn:0, different .* on cpu"):
        torch.tensor(1.0).mul_(torch.tensor(2.0, device="trn"))


INDEXING: dict[str, Callable[[T], T]] = {
    "long": lambda a: a[torch.tensor([2, 0])],
    "mask": lambda a: a[torch.tensor([True, False, True, False])],
    "two": lambda a: a[torch.tensor([2, 0]), torch.tensor([1, 1])],
    "slice and long": lambda a: a[1:, torch.tensor([2, 0])],
    "scalar": lambda a: a[torch.tensor(1)],
    "numpy": lambda a: a[torch.tensor([1, 3]).numpy()],
    "list": lambda a: a[[3, 1]],
    "put": lambda a: a.clone().index_put_((torch.tensor([1]),), a[0]),
    "accumulate": lambda a: a.clone().index_put_((torch.tensor([1, 1]),), a[:2], accumulate=True),
    "tensor_split": lambda a: torch.cat(a.tensor_split(torch.tensor([1, 2]))[::-1]),
}


@pytest.mark.parametrize("name", INDEXING)
def test_cpu_tensors_may_index(name: str) -> None:
    expected = INDEXING[name](on("cpu")[0])
    result = INDEXING[name](on("trn:1")[0])
    assert result.device == torch.device("trn", 1) and torch.equal(result.cpu(), expected)


def test_mixed_indices_and_assignment() -> None:
    a, index = on("trn")
    mask = torch.tensor([True, False, False, True])
    assert a[mask, torch.tensor([0, 2], device="trn")].tolist() == [0.0, 14.0]
    a[mask] = torch.tensor(-1.0)
    a[0] = torch.full((4,), 9.0)  # a slice: a copy from the host, not a mix
    assert a[:, 0].tolist() == [9.0, 4.0, 8.0, -1.0] and index.tolist() == [0, 2]


@pytest.mark.parametrize("style", [{"foreach": True}, {"fused": True}, {"foreach": False}, {}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_an_optimizer_may_keep_its_step_on_the_cpu(kind: Any, style: dict[str, bool]) -> None:
    def trained(device: str) -> tuple[list[T], torch.device]:
        parameters = [torch.linspace(-1, 1, n, device=device).requires_grad_() for n in (3, 5)]
        optimizer = kind(parameters, lr=0.1, **style)
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack([(p**2).sum() for p in parameters]).sum().backward()
            optimizer.step()
        step = optimizer.state[parameters[0]]["step"]
        assert step.item() == 3.0
        return [p.detach().cpu() for p in parameters], step.device

    values, device = trained("trn:1")
    expected, _ = trained("cpu")
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
    assert device == torch.device("trn", 1) if style.get("fused") else device.type == "cpu"


def test_an_optimizer_of_parameters_on_two_devices() -> None:
    parameters = [torch.ones(3, device=d).requires_grad_() for d in ("trn:0", "trn:1", "cpu")]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, foreach=True)
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
    optimizer.step()
    assert norm.item() == pytest.approx(6.0) and norm.device == torch.device("trn", 0)
    assert [p.tolist() for p in parameters] == [[0.0] * 3] * 3


def test_foreach_lists_may_span_devices_as_on_cuda() -> None:
    a, b = on("trn:0")[0], on("trn:1")[0]
    results = torch._foreach_add([a, b], [a, b])
    assert [r.device for r in results] == [a.device, b.device]
    assert all(torch.equal(r.cpu(), 2 * a.cpu()) for r in results)


ABSENT = "Invalid trn device index {}: this process has 64 logical NeuronCores, trn:0 to trn:63"
BAD_INDEX: dict[str, Callable[[], Any]] = {
    "empty": lambda: torch.empty(1, device="trn:64"),
    "tensor": lambda: torch.tensor([1.0], device="trn:64"),
    "arange": lambda: torch.arange(3, device="trn:64"),
    "randn": lambda: torch.randn(3, device="trn:64"),
    "to": lambda: torch.ones(1).to("trn:64"),
    "to from trn": lambda: torch.ones(1, device="trn").to("trn:64"),
    "trn()": lambda: torch.ones(1).trn(64),
    "module": lambda: torch.nn.Linear(2, 2).trn(64),
    "set_device": lambda: torch.trn.set_device(64),
    "device": lambda: torch.trn.device("trn:64"),
    "with": lambda: torch.accelerator.device_index(64).__enter__(),
    "accelerator": lambda: torch.accelerator.set_device_index(64),
    "synchronize": lambda: torch.trn.synchronize(64),
    "memory": lambda: torch.trn.memory_allocated("trn:64"),
    "Generator": lambda: torch.Generator("trn:64"),
    "Stream": lambda: torch.Stream("trn:64"),
    "trn.Stream": lambda: torch.trn.Stream("trn:64"),
    "properties": lambda: torch.trn.get_device_properties(64),
    "rng": lambda: torch.trn.get_rng_state(64),
    "storage": lambda: torch.UntypedStorage(4, device="trn:64"),
}


@pytest.fixture
def first_device() -> Iterator[None]:
    yield
    torch.trn.set_device(0)


@pytest.mark.parametrize("name", BAD_INDEX)
def test_an_absent_device_is_an_error(name: str, first_device: None) -> None:
    with pytest.raises(RuntimeError) as caught:
        BAD_INDEX[name]()
    assert str(caught.value).startswith(ABSENT.format(64))
    assert torch.trn.current_device() == 0


def test_an_index_that_torch_wraps_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Invalid trn device index -128") as caught:
        torch.empty(1, device="trn:128")
    hint = "(torch keeps an index in 8 bits, so that 128 becomes -128)"
    assert hint in str(caught.value)


NEVER_WRAPPED: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(1).trn(256),
    "text": lambda: torch.ones(1).trn("trn:256"),
    "keyword": lambda: torch.ones(1).trn(device=256),
    "storage": lambda: torch.ones(1).untyped_storage().trn(256),
    "module": lambda: torch.nn.Linear(1, 1).trn(256),
    "packed": lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(2)]).trn(256),
    "set_device": lambda: torch.trn.set_device("trn:256"),
    "device": lambda: torch.trn.device("trn:256"),
    "memory": lambda: torch.trn.memory_allocated("trn:256"),
}


@pytest.mark.parametrize("name", NEVER_WRAPPED)
def test_an_index_of_256_is_not_the_first_device(name: str, first_device: None) -> None:
    with pytest.raises(RuntimeError) as caught:
        NEVER_WRAPPED[name]()
    assert str(caught.value) == (
        "trn:256 does not exist: torch keeps an index in 8 bits, up to 127"
    )


def test_torch_wraps_the_index_of_a_torch_device_before_anyone_sees_it() -> None:
    """Where this fails, torch has learnt to refuse it and the device's own check may go."""
    assert torch.device("trn:256") == torch.device("trn", 256) == torch.device("trn", 0)


def test_the_current_device(first_device: None) -> None:
    assert torch.trn.current_device() == 0 and torch.ones(1).trn().device.index == 0
    torch.trn.set_device(2)
    assert torch.empty(1, device="trn").device.index == 2
    with torch.trn.device(1):
        assert torch.ones(1).to("trn").device.index == 1
        with torch.trn.device("trn:3"), torch.trn.device(None), torch.trn.device(-1):
            assert torch.empty(0, device="trn").device.index == 3
        with torch.trn.device_of(torch.ones(1, device="trn:5")):
            assert torch.trn.current_device() == 5
        with torch.trn.device_of(torch.ones(1)):
            assert torch.trn.current_device() == 1
    with pytest.raises(ZeroDivisionError), torch.trn.device(7):
        raise ZeroDivisionError
    assert torch.trn.current_device() == 2
    assert (torch.ones(2, device="trn:3") + 1).device.index == 3
    with torch.device("trn:4"):
        assert torch.zeros(1).device == torch.nn.Linear(1, 1).weight.device == torch.device("trn:4")
    with pytest.raises(ValueError, match="expected a trn device, got 'cpu'"):
        torch.trn.set_device("cpu")


def test_torch_accelerator(first_device: None) -> None:
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 64
    assert torch.accelerator.current_accelerator() == torch.device("trn")
    torch.accelerator.set_device_index(3)
    assert torch.accelerator.current_device_index() == torch.trn.current_device() == 3
    with torch.accelerator.device_index(5):
        assert torch.trn.current_device() == 5
        assert torch.accelerator.current_stream().device == torch.device("trn:5")
        torch.accelerator.synchronize()
    assert torch.accelerator.current_device_index() == 3
    with torch.Stream("trn:3") as stream:
        assert torch.accelerator.current_stream() == stream
        torch.ones(4, device="trn") * 2
    torch.accelerator.synchronize("trn:3")


def test_methods_named_after_the_device() -> None:
    x = torch.arange(3.0)
    y = x.trn(1)
    assert y.is_trn and not x.is_trn and not y.is_cuda and not y.is_cpu
    assert y.device == torch.device("trn", 1) and y.trn(1) is y and y.trn("trn:2").device.index == 2
    assert y.trn().device.index == 0 and torch.equal(y.cpu(), x)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).trn(1)
    assert {t.device for t in model.state_dict().values()} == {torch.device("trn", 1)}
    assert {t.device.type for t in model.cpu().state_dict().values()} == {"cpu"}
    storage = x.untyped_storage().trn()
    assert storage.is_trn and storage.device == torch.device("trn", 0)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]).trn()
    assert packed.is_trn and packed.data.is_trn


@pytest.mark.parametrize(
    ("environment", "count", "names"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "4-6,9"}, 4, "NeuronCores, trn:0 to trn:3"),
        ({"TRN_LNC": "1"}, 127, "NeuronCores, trn:0 to trn:126"),
    ],
)
def test_the_devices_of_another_configuration(
    environment: dict[str, str], count: int, names: str
) -> None:
    code = f"""
import torch
last = torch.ones(2, device="trn:{count - 1}")
print(torch.trn.device_count(), torch.accelerator.device_count(), (last + 1).tolist())
try:
    torch.empty(1, device="trn:{count}")
except RuntimeError as error:
    print(error)
"""
    lines = run(code, **environment).splitlines()
    assert lines[0] == f"{count} {count} [2.0, 2.0]"
    assert lines[1].startswith(
        f"Invalid trn device index {count}: this process has {count} logical {names}."
    )
