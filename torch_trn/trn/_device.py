"""Which devices there are and which one is current; the simulated clocks."""

from types import TracebackType
from typing import Any

import torch

from torch_trn import _C, runtime
from torch_trn.trn._utils import Device, _get_device_index, device_index


def device_count() -> int:
    """The number of devices: logical NeuronCores of the instance that this process may use.

    Once it was asked for, the system cannot change any more.
    """
    return int(_C.device_count())


def is_available() -> bool:
    """Whether there is a device at all; initialises none and leaves the system open to change."""
    return len(runtime.current().cores) > 0


def is_initialized() -> bool:
    """Whether a device was used in this process (and not only in the one it was forked from)."""
    return bool(_C.is_initialized()) and not _is_in_bad_fork()


def init() -> None:
    """Initialise the devices, which their first use does as well.

    Raises:
        RuntimeError: this process was forked after its parent had initialised them.
    """
    _lazy_init()


def _lazy_init() -> None:
    """`init` under the name by which torch calls it before the first tensor on a device."""
    _C.init()


def _is_in_bad_fork() -> bool:
    """Whether this process was forked after its parent had initialised the devices."""
    return bool(_C.is_in_bad_fork())


def current_device() -> int:
    """The index of this thread's current device."""
    return int(_C.current_device())


def set_device(device: Device) -> None:
    """Make `device` this thread's current device; the index -1 changes nothing.

    Raises:
        RuntimeError: no such device.
    """
    if _get_device_index(device, optional=True) != -1:
        _C.set_device(device_index(device))


def _exchange_device(index: int) -> int:
    """Make the device current and return the one before; the index -1 changes nothing."""
    return current_device() if index == -1 else int(_C.exchange_device(index))


_maybe_exchange_device = _exchange_device


def synchronize(device: Device = None) -> None:
    """Move the simulated host clock to the end of all work on `device`.

    Raises:
        RuntimeError: no such device.
    """
    _C.synchronize(device_index(device))


def host_clock_ps() -> int:
    """This thread's simulated host clock in picoseconds."""
    return int(_C.host_clock_ps())


def stream_clock_ps(device: Device = None) -> int:
    """When the work queued on the device's current stream ends, in simulated picoseconds."""
    return int(_C.stream_clock_ps(device_index(device)))


def can_device_access_peer(device: Device, peer: Device) -> bool:
    """Whether `device` can read HBM of `peer`: all cores of an instance can, but for themselves.

    Raises:
        RuntimeError: no such device.
    """
    return device_index(device) != device_index(peer)


class device:
    """Context manager that makes a device current; None and the index -1 change nothing.

    Raises:
        RuntimeError: no such device.
    """

    def __init__(self, device: Device) -> None:
        none = device is None or _get_device_index(device) == -1
        self.idx = -1 if none else device_index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _exchange_device(self.idx)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _exchange_device(self.prev_idx)


class device_of(device):
    """Context manager that makes the device of a tensor or storage current.

    It changes nothing for one that is not on a `trn` device.
    """

    def __init__(self, obj: Any) -> None:
        device: torch.device = obj.device
        super().__init__(device if device.type == "trn" else -1)
