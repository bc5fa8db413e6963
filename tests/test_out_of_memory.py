"""Running out of HBM: which error, with which words, and that nothing has changed."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hbm_case import MIB, block, bytes_now, device_of_its_own
from subprocess_case import run

import torch_trn


@pytest.fixture(autouse=True)
def own_device() -> Iterator[int]:
    with device_of_its_own() as index:
        yield index


@pytest.fixture
def small() -> Iterator[int]:
    """A device of 64 MiB."""
    with torch_trn.override(hbm_bytes=64 * MIB):
        yield 64 * MIB
        torch.trn.empty_cache()


MESSAGE = (
    "trn:{device} is out of memory: tried to allocate {asked} of HBM. The NeuronCore has {total}: "
    "{free} free (largest free range {largest}), {allocated} allocated, {reserved} reserved."
    "{holders} Free tensors, use smaller ones, or shard the model over more NeuronCores; "
    "TRN_HBM_BYTES sets another capacity."
)


def test_the_message_of_an_impossible_size(own_device: int) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, device="trn")
    assert str(caught.value) == MESSAGE.format(
        device=own_device,
        asked="4.00 PiB",
        total="24.00 GiB",
        free="24.00 GiB",
        largest="24.00 GiB",
        allocated="0 bytes",
        reserved="0 bytes",
        holders="",
    )
    assert isinstance(caught.value, RuntimeError) and bytes_now() == (0, 0, 0)


def test_the_message_names_the_largest_holders(own_device: int, small: int) -> None:
    kept = [torch.ones(8 * MIB, dtype=torch.uint8, device="trn"), block(16 * MIB)]
    kept += [kept[0] + 1 for _ in range(2)]
    del kept[0]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        kept[0] * 2.5
    assert str(caught.value) == MESSAGE.format(
        device=own_device,
        asked="64.00 MiB",
        total="64.00 MiB",
        free="32.00 MiB",
        largest="12.00 MiB",
        allocated="32.00 MiB",
        reserved="56.00 MiB",
        holders=" Largest holders by operator: aten::add.Tensor 16.00 MiB in 2 blocks, "
        "aten::empty 16.00 MiB in 1 block.",
    )


IMPOSSIBLE = {
    "zeros": lambda x: torch.zeros(1 << 45, device=x.device),
    "randn": lambda x: torch.randn(1 << 45, device=x.device),
    "arange": lambda x: torch.arange(1 << 45, device=x.device),
    "to": lambda x: torch.ones(1).expand(1 << 45).to(x.device),
    "resize_": lambda x: x.resize_(1 << 45),
    "storage resize_": lambda x: x.untyped_storage().resize_(1 << 45),
    "contiguous": lambda x: x[:1].expand(1 << 45).contiguous(),
    "repeat": lambda x: x.repeat(1 << 45),
    "mm": lambda x: x[:1].expand(1 << 22, 1) @ x[:1].expand(1, 1 << 22),
    "add": lambda x: x[:1].expand(1 << 40) + 1,
    "add out": lambda x: torch.add(x[:1].expand(1 << 40), 1, out=x),
    "cat": lambda x: torch.cat([x[:1].expand(1 << 40)] * 2),
    "index": lambda x: x[:1].expand(1 << 36)[None][torch.zeros(100, dtype=torch.long)],
    "foreach": lambda x: torch._foreach_add([x, x[:1].expand(1 << 40)], 1.0),
    "bincount": lambda x: torch.bincount(torch.tensor([1 << 40], device=x.device)),
    "repeat_interleave": lambda x: torch.repeat_interleave(
        torch.tensor([1 << 40], device=x.device)
    ),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_can_never_fit_raises_at_once_and_changes_nothing(name: str) -> None:
    x = torch.arange(4.0, device="trn")
    before = bytes_now()
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^trn:\d+ is out of memory: tried to allocate "
    ):
        IMPOSSIBLE[name](x)
    assert bytes_now() == before and x.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert x.untyped_storage().nbytes() == 16


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_of_memory_comes_before_the_kernel(small: int) -> None:
    x = torch.arange(24 * MIB // 4, dtype=torch.float32, device="trn")
    kept, version = x.cpu(), x._version
    out = torch.full((7,), -1.0, device="trn")
    filler = block(20 * MIB)
    for call in (
        lambda: torch.add(x, 1, out=out),
        lambda: torch.sort(x, out=(out, torch.empty(0, dtype=torch.long, device="trn"))),
        lambda: x.cumsum(0),
        lambda: torch._foreach_add([out, x], 1.0),
        lambda: x.double(),
        lambda: x.index_put((torch.tensor([0]),), x[:1]),
    ):
        before = bytes_now()[:2]
        with pytest.raises(torch.OutOfMemoryError):
            call()
        assert bytes_now()[:2] == before
        assert torch.equal(x.cpu(), kept) and x._version == version
        assert out.shape == (7,) and out.tolist() == [-1.0] * 7
    del filler
    assert torch.equal((x + 1).cpu(), kept + 1)  # free and go on


@pytest.mark.parametrize(
    ("times", "call"),
    [
        (10_000, lambda x: torch.empty(1 << 50, device="trn")),
        (10_000, lambda x: x + 1),
        (10_000, lambda x: x.resize_(1 << 40)),
        (1_000, lambda x: torch._foreach_mul([x[:9], x], 2.0)),
        (30, lambda x: x[x == 0]),  # its size is known only after the kernel ran
    ],
    ids=["empty", "add", "resize_", "foreach", "mask"],
)
def test_thousands_of_times_out_of_memory(
    times: int, call: Callable[[torch.Tensor], object], small: int
) -> None:
    x = torch.zeros(9 * MIB, device="trn")
    with pytest.raises(torch.OutOfMemoryError):
        call(x)
    before, entries = torch.trn.memory_stats(), torch_trn._C.entry_count()
    for _ in range(times):
        try:
            call(x)
        except torch.OutOfMemoryError:
            continue
        pytest.fail("it fitted")
    after = torch.trn.memory_stats()
    for key in after:
        if key.endswith((".current", ".peak")):
            assert after[key] == before[key], key
    assert after["num_ooms"] == before["num_ooms"] + times
    assert torch_trn._C.entry_count() == entries


def test_a_program_may_free_and_go_on(small: int) -> None:
    held = []
    with pytest.raises(torch.OutOfMemoryError):
        while True:
            held.append(block(5 * MIB))
    assert len(held) == 12 and torch.trn.mem_get_info()[1] == small
    del held[::2]
    with pytest.raises(torch.OutOfMemoryError):
        block(20 * MIB)  # enough is free, but in pieces
    assert torch.trn.memory_stats()["num_ooms"] == 2
    held.clear()
    whole = block(small)  # cached segments are given back first
    assert torch.trn.memory_reserved() == torch.trn.memory_allocated() == small
    assert torch.trn.mem_get_info() == (0, small) and whole.numel() == small


def test_a_capacity_that_one_device_refuses_changes_none() -> None:
    x = block(8 * MIB)
    with pytest.raises(ValueError, match="hbm_bytes cannot become 1048576: trn:[0-9]+ has"):
        torch_trn.configure(hbm_bytes=MIB)
    assert {torch.trn.mem_get_info(i)[1] for i in range(64)} == {24 << 30} and x.is_trn


def test_capacity_is_to_the_byte() -> None:
    code = """
import torch, torch_trn
x = torch.empty(3 << 20, dtype=torch.uint8, device="trn")
y = torch.empty(512, dtype=torch.uint8, device="trn")
for call in (
    lambda: torch.empty(1, dtype=torch.uint8, device="trn"),
    lambda: torch_trn.configure(hbm_bytes=1 << 20),
):
    try:
        call()
    except (torch.OutOfMemoryError, ValueError) as error:
        print(type(error).__name__, error)
"""
    full, refused = run(code, TRN_HBM_BYTES=str(3 * MIB + 512)).splitlines()
    assert full.startswith("OutOfMemoryError trn:0 is out of memory: tried to allocate 1 bytes")
    assert "3.00 MiB: 0 bytes free" in full
    assert refused == (
        "ValueError hbm_bytes cannot become 1048576: trn:0 has more reserved. "
        "Free its tensors first"
    )


def test_another_capacity_from_the_environment() -> None:
    code = """
import torch
print(torch.trn.mem_get_info(), torch.trn.get_device_properties(1).total_memory)
x = torch.ones(512 << 10, device="trn:1")
try:
    x + 1
except torch.OutOfMemoryError as error:
    print(error)
print(x.sum().item())
"""
    text = MESSAGE.format(
        device=1,
        asked="2.00 MiB",
        total="3.00 MiB",
        free="1.00 MiB",
        largest="1.00 MiB",
        allocated="2.00 MiB",
        reserved="2.00 MiB",
        holders=" Largest holders by operator: aten::empty 2.00 MiB in 1 block.",
    )
    lines = run(code, TRN_HBM_BYTES="3MiB", TRN_SYSTEM="trn1.2xlarge").splitlines()
    assert lines == ["(3145728, 3145728) 3145728", text, "524288.0"]
