"""Simulated HBM: what is allocated, reserved and free on each device.

The names and the keys of the statistics are those of `torch.cuda.memory`. All figures are of
simulated addresses, so they are the same in every run.
"""

from collections import OrderedDict
from typing import Any

from torch_trn import _C
from torch_trn.config import format_bytes
from torch_trn.trn._utils import Device, device_index

_SUMMARY_ROWS = (
    ("allocated_bytes", "allocated memory"),
    ("active_bytes", "active memory"),
    ("reserved_bytes", "reserved memory"),
    ("inactive_split_bytes", "non-releasable memory"),
    ("allocation", "allocations"),
    ("active", "active allocations"),
    ("segment", "segments"),
    ("inactive_split", "non-releasable allocations"),
)
_SUMMARY_COLUMNS = ("current", "peak", "allocated", "freed")


def memory_stats(device: Device = None) -> "OrderedDict[str, Any]":
    """The allocator's statistics, keyed as `torch.cuda.memory_stats` ('allocated_bytes.all.peak').

    Raises:
        RuntimeError: no such device.
    """
    return OrderedDict(sorted(_C.memory_stats(device_index(device)).items()))


def memory_stats_as_nested_dict(device: Device = None) -> dict[str, Any]:
    """`memory_stats` as nested dictionaries, one level per dot of a key.

    Raises:
        RuntimeError: no such device.
    """
    nested: dict[str, Any] = {}
    for key, value in memory_stats(device).items():
        *path, last = key.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested


def memory_allocated(device: Device = None) -> int:
    """Bytes that live tensors occupy now. Raises RuntimeError: no such device."""
    return _statistic("allocated_bytes.all.current", device)


def max_memory_allocated(device: Device = None) -> int:
    """Most bytes that live tensors occupied since the start or `reset_peak_memory_stats`.

    Raises:
        RuntimeError: no such device.
    """
    return _statistic("allocated_bytes.all.peak", device)


def memory_reserved(device: Device = None) -> int:
    """Bytes that the caching allocator holds now. Raises RuntimeError: no such device."""
    return _statistic("reserved_bytes.all.current", device)


def max_memory_reserved(device: Device = None) -> int:
    """Most bytes that the caching allocator held since the start or `reset_peak_memory_stats`.

    Raises:
        RuntimeError: no such device.
    """
    return _statistic("reserved_bytes.all.peak", device)


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """(free, total) bytes of the device's HBM. Raises RuntimeError: no such device."""
    free_bytes, total_bytes = _C.mem_get_info(device_index(device))
    return int(free_bytes), int(total_bytes)


def empty_cache() -> None:
    """Give cached segments that hold no tensor back to HBM, on every device."""
    _C.empty_cache()


def reset_peak_memory_stats(device: Device = None) -> None:
    """Let every peak start again at the current value. Raises RuntimeError: no such device."""
    _C.reset_peak_memory_stats(device_index(device))


def reset_accumulated_memory_stats(device: Device = None) -> None:
    """Let the sums ('allocated', 'freed', retries, out-of-memory errors) start again at zero.

    Raises:
        RuntimeError: no such device.
    """
    _C.reset_accumulated_memory_stats(device_index(device))


def memory_snapshot(device: Device = None) -> list[dict[str, Any]]:
    """Every segment with its blocks, by simulated address.

    A segment has `address`, `total_size`, `allocated_size` and `blocks`; a block has `address`,
    `size`, `requested_size`, `state` ('active_allocated' or 'inactive') and `operator`, the one
    that allocated it. Sizes are bytes.

    Raises:
        RuntimeError: no such device.
    """
    return list(_C.memory_snapshot(device_index(device)))


def memory_summary(device: Device = None, abbreviated: bool = False) -> str:
    """A table of `memory_stats` to print; `abbreviated` leaves out all but the bytes.

    Raises:
        RuntimeError: no such device.
    """
    # tabulate takes 0.1 s to import, which `import torch` would have to pay.
    from tabulate import tabulate

    index = device_index(device)
    stats = memory_stats(index)
    free_bytes, total_bytes = mem_get_info(index)
    rows = [
        (title, *(_quantity(name, stats.get(f"{name}.all.{column}", 0)) for column in columns))
        for columns in (_SUMMARY_COLUMNS,)
        for name, title in _SUMMARY_ROWS
        if name.endswith("_bytes") or not abbreviated
    ]
    body = tabulate(
        rows,
        headers=("trn:" + str(index), "current", "peak", "total allocated", "total freed"),
        colalign=("left", *("right",) * len(_SUMMARY_COLUMNS)),
        disable_numparse=True,
    )
    return (
        f"{body}\nHBM: {_quantity('_bytes', free_bytes)} free of "
        f"{_quantity('_bytes', total_bytes)}; out-of-memory errors: {stats.get('num_ooms', 0)}, "
        f"allocations tried again after emptying the cache: {stats.get('num_alloc_retries', 0)}"
    )


def _quantity(name: str, value: int) -> str:
    return format_bytes(value) if name.endswith("_bytes") else f"{value:,}"


def _statistic(key: str, device: Device) -> int:
    return int(_C.memory_stats(device_index(device)).get(key, 0))
