"""Simulated HBM: exact statistics, caching and splitting, and running out of it.

Sizes round up to 512 bytes. Up to 1 MiB a block comes from a segment of 2 MiB; below 10 MiB from
one of 20 MiB; above, a segment of its own is a multiple of 2 MiB.
"""

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hbm_case import MIB, block, bytes_now, current, device_of_its_own
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_trn


@pytest.fixture(autouse=True)
def own_device() -> Iterator[int]:
    with device_of_its_own() as index:
        yield index


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (31 * MIB, 32 * MIB, 32 * MIB),  # a rest of 1 MiB or less is not split off
        (100 * MIB, 100 * MIB, 100 * MIB),
    ],
)
def test_one_block(nbytes: int, allocated: int, reserved: int) -> None:
    x = block(nbytes)
    assert bytes_now() == (nbytes, allocated, reserved)
    count = int(nbytes > 0)
    assert current("allocation", "active", "segment") == (count, count, count)
    assert torch.trn.memory_allocated() == allocated
    assert torch.trn.memory_reserved() == reserved
    del x
    assert bytes_now() == (0, 0, reserved) and current("allocation", "segment") == (0, count)
    torch.trn.empty_cache()
    assert bytes_now() == (0, 0, 0) and current("segment") == (0,)
    stats = torch.trn.memory_stats()
    for name, amount in (
        ("requested_bytes", nbytes),
        ("allocated_bytes", allocated),
        ("active_bytes", allocated),
        ("reserved_bytes", reserved),
        ("allocation", count),
    ):
        keys = [f"{name}.all.{key}" for key in ("current", "peak", "allocated", "freed")]
        assert [stats[key] for key in keys] == [0, amount, amount, amount], name


def test_freed_blocks_are_cached_split_and_merged() -> None:
    a, b, c = block(4 * MIB), block(8 * MIB), block(2 * MIB)
    assert bytes_now() == (14 * MIB, 14 * MIB, 20 * MIB)
    assert current("inactive_split", "inactive_split_bytes") == (1, 6 * MIB)
    del b
    assert current("inactive_split", "inactive_split_bytes") == (2, 14 * MIB)
    b = block(6 * MIB)  # best fit: the 6 MiB at the end, not the 8 MiB between
    assert current("inactive_split", "inactive_split_bytes") == (1, 8 * MIB)
    del a  # merges with the free 8 MiB after it
    assert current("inactive_split", "inactive_split_bytes") == (1, 12 * MIB)
    a = block(12 * MIB)
    assert current("segment", "inactive_split") == (1, 0) and bytes_now()[1:] == (
        20 * MIB,
        20 * MIB,
    )
    torch.trn.empty_cache()  # nothing to give back
    assert bytes_now()[2] == 20 * MIB
    del a, b, c
    assert current("inactive_split", "segment") == (0, 1)
    torch.trn.empty_cache()
    assert bytes_now() == (0, 0, 0)


def test_views_and_aliases_share_a_block() -> None:
    x = torch.zeros(256, 256, device="trn")
    views = [x[1:], x.t(), x.view(-1), x.detach(), x.expand(3, 256, 256), x.unfold(0, 2, 2)]
    assert torch.trn.memory_allocated() == 256 * 1024
    del x
    assert torch.trn.memory_allocated() == 256 * 1024
    del views
    assert torch.trn.memory_allocated() == 0


def test_peak_follows_temporaries() -> None:
    x = torch.ones(MIB, device="trn")
    y = (x + 1) * 2  # x, x + 1 and the product live at once
    assert torch.trn.max_memory_allocated() == 12 * MIB
    del y
    torch.trn.reset_peak_memory_stats()
    assert torch.trn.max_memory_allocated() == 4 * MIB
    x.add_(1).mul_(2)
    assert torch.trn.max_memory_allocated() == 4 * MIB
    torch._foreach_add([x, x], [x, x])
    assert torch.trn.max_memory_allocated() == 12 * MIB


def test_results_are_charged_by_their_sizes() -> None:
    """Not by the buffers that CPU kernels keep behind them."""
    x = torch.randn(512, 256, device="trn")
    assert torch.trn.memory_allocated() == 512 * 1024
    losses = [
        F.mse_loss(x, x),
        F.smooth_l1_loss(x, x),
        F.soft_margin_loss(x, x.sign()),
        F.binary_cross_entropy(x.sigmoid(), x.sigmoid()),
    ]
    assert torch.trn.memory_allocated() == 512 * 1024 + 4 * 512
    del losses
    out = torch.native_batch_norm(x, None, None, x[0] * 0, x[0] * 0 + 1, False, 0.1, 1e-5)
    assert torch.trn.memory_allocated() == 2 * 512 * 1024 + 512 * sum(
        t.numel() > 0 for t in out[1:]
    )
    del out
    values = x.sort().values
    assert torch.trn.memory_allocated() == 2 * 512 * 1024
    del values
    picked = x[x > 100]
    assert picked.numel() == 0 and torch.trn.memory_allocated() == 512 * 1024
    chosen = x[x == x]  # its size is known only after the kernel ran
    assert torch.trn.memory_allocated() == 2 * 512 * 1024 and chosen.numel() == x.numel()


def test_growing_a_storage_is_charged() -> None:
    x = block(MIB)
    x.resize_(4 * MIB)
    assert bytes_now()[:2] == (4 * MIB, 4 * MIB)
    x.resize_(8)
    assert bytes_now()[:2] == (4 * MIB, 4 * MIB)  # as on CUDA, a tensor does not shrink its storage
    x.untyped_storage().resize_(0)
    assert bytes_now()[:2] == (0, 0)
    x.untyped_storage().resize_(100)
    assert bytes_now()[:2] == (100, 512)
    out = torch.empty(0, device="trn")
    torch.add(torch.ones(300, device="trn"), 1.0, out=out)
    assert bytes_now()[:2] == (1300, 512 + 1536) and out.tolist() == [2.0] * 300
    x.set_()
    assert bytes_now()[:2] == (1200, 1536)


def test_a_call_that_fails_frees_what_was_reserved_for_it() -> None:
    x, index = torch.ones(300, 40, device="trn"), torch.tensor([1, 999], device="trn")
    before, entries = bytes_now(), torch_trn._C.entry_count()
    for call in (
        lambda: F.embedding(index, x),
        lambda: x[index],
        lambda: x.gather(0, index[None].expand(2, 2)),
        lambda: torch.linalg.cholesky(-torch.eye(40, device="trn")),
        lambda: x @ x,
        lambda: x + x[:7],
        lambda: torch.cat([x, x[0]]),
        lambda: x.view(7),
        lambda: x.double() @ x.t(),
        lambda: x.new_empty(2, 2).copy_(x),
    ):
        for _ in range(20):
            with pytest.raises((RuntimeError, IndexError)):
                call()
    assert bytes_now() == before
    assert torch_trn._C.entry_count() < entries + 20


def check_snapshot(live: dict[int, torch.Tensor]) -> None:
    """Blocks tile their segments, hold what is asked for, and add up to the statistics."""
    segments = torch.trn.memory_snapshot()
    end, active = 0, {}
    for segment in segments:
        assert segment["address"] >= end and segment["device"] == torch.trn.current_device()
        end = segment["address"]
        states = []
        for part in segment["blocks"]:
            assert part["address"] == end and part["size"] > 0
            end += part["size"]
            states.append(part["state"])
            if part["state"] == "active_allocated":
                active[part["address"]] = part
        assert end == segment["address"] + segment["total_size"]
        assert ("inactive", "inactive") not in zip(states, states[1:], strict=False)
        assert segment["allocated_size"] == sum(
            p["size"] for p in segment["blocks"] if p["state"] == "active_allocated"
        )
    for tensor in live.values():
        where = torch_trn._C.block_of(tensor)
        if tensor.numel() == 0:
            assert where is None
            continue
        part = active.pop(where[0])
        rounded = -(-tensor.numel() // 512) * 512
        assert part["requested_size"] == tensor.numel() and part["operator"] == "aten::empty"
        assert part["size"] == rounded or (
            rounded > MIB and rounded < part["size"] <= rounded + MIB
        )
    assert not active
    requested = sum(t.numel() for t in live.values())
    assert bytes_now() == (
        requested,
        sum(s["allocated_size"] for s in segments),
        sum(s["total_size"] for s in segments),
    )
    assert current("allocation", "segment") == (
        sum(t.numel() > 0 for t in live.values()),
        len(segments),
    )


def check_books(steps: list[tuple[int, int]]) -> None:
    """Allocates and frees at random; every tenth step or so empties the cache."""
    live: dict[int, torch.Tensor] = {}
    for number, (nbytes, what) in enumerate(steps):
        if what < 40 and live:
            del live[sorted(live)[what % len(live)]]
        elif what > 90:
            torch.trn.empty_cache()
        else:
            live[number] = block(nbytes)
        check_snapshot(live)
    live.clear()
    torch.trn.empty_cache()
    assert bytes_now() == (0, 0, 0) and torch.trn.memory_snapshot() == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40 * MIB), st.integers(0, 99)), max_size=60))
def test_any_sequence_keeps_the_books(steps: list[tuple[int, int]]) -> None:
    check_books(steps)


def test_a_long_sequence_keeps_the_books() -> None:
    choice = random.Random(7)
    scales = (300, 4096, MIB, 12 * MIB)
    check_books(
        [(choice.randrange(1 + choice.choice(scales)), choice.randrange(100)) for _ in range(800)]
    )


def test_summary_and_nested_statistics(own_device: int) -> None:
    x = block(3 * MIB)
    text = torch.trn.memory_summary()
    rows = [line.split("  ") for line in text.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert cells[f"trn:{own_device}"] == ["current", "peak", "total allocated", "total freed"]
    assert cells["allocated memory"] == ["3.00 MiB", "3.00 MiB", "3.00 MiB", "0 B"]
    assert cells["reserved memory"][0] == "20.00 MiB" and cells["allocations"][0] == "1"
    assert text.endswith(
        "HBM: 23.98 GiB free of 24.00 GiB; out-of-memory errors: 0, allocations tried again after "
        "emptying the cache: 0"
    )
    assert "allocations " not in torch.trn.memory_summary(abbreviated=True).split("HBM")[0]
    nested = torch.trn.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["peak"] == x.numel() and nested["num_ooms"] == 0


def test_torch_accelerator_memory() -> None:
    accelerator = torch.accelerator
    block(3 * MIB)
    kept = block(MIB)
    assert accelerator.memory_allocated() == MIB
    assert accelerator.max_memory_allocated() == 3 * MIB
    assert accelerator.memory_reserved() == accelerator.max_memory_reserved() == 22 * MIB
    assert accelerator.get_memory_info() == torch.trn.mem_get_info()
    assert torch.trn.mem_get_info() == ((24 << 30) - 22 * MIB, 24 << 30)
    ours, theirs = torch.trn.memory_stats(), accelerator.memory_stats()
    assert ours.items() <= theirs.items()
    accelerator.reset_peak_memory_stats()
    assert accelerator.max_memory_allocated() == MIB
    accelerator.reset_accumulated_memory_stats()
    assert accelerator.memory_stats()["allocated_bytes.all.allocated"] == 0
    accelerator.empty_cache()
    assert accelerator.memory_reserved() == 2 * kept.numel()


def test_training_leaves_nothing_behind() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 4, 3),
        torch.nn.BatchNorm1d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(24, 3),
    ).to("trn")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    x = torch.randn(5, 2, 8, device="trn")
    amounts = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(5, device="trn") % 3).backward()
        optimizer.step()
        amounts.append(torch.trn.memory_allocated())
    assert amounts == [amounts[0]] * 4
    del model, optimizer, x
