"""Devices, sizes and statistics of simulated HBM, for the tests that count its bytes."""

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIB = 1 << 20

_unused_devices = itertools.cycle(range(63, 9, -1))


@contextmanager
def device_of_its_own() -> Iterator[int]:
    """A device that no other test counts on, as the current one: a failed test keeps its tensors.

    It starts without memory, and must be left so.
    """
    index = next(_unused_devices)
    with torch.trn.device(index):
        torch.trn.empty_cache()
        torch.trn.reset_peak_memory_stats()
        torch.trn.reset_accumulated_memory_stats()
        yield index
        gc.collect()  # a caught error holds the frames it went through
        assert torch.trn.memory_allocated() == 0


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="trn")


def current(*names: str) -> tuple[int, ...]:
    stats = torch.trn.memory_stats()
    return tuple(stats[f"{name}.all.current"] for name in names)


def bytes_now() -> tuple[int, ...]:
    return current("requested_bytes", "allocated_bytes", "reserved_bytes")
