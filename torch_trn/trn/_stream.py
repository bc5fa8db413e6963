"""Streams and events: simulated queues of one device and marks on them.

A stream has a clock, the simulated time at which its work ends; an event remembers one. So
`Event.elapsed_time` is exact and the same in every run.
"""

from types import TracebackType
from typing import Any

import torch

from torch_trn.trn._device import device as device_context
from torch_trn.trn._utils import Device, device_index


class Stream(torch.Stream):
    """An in-order queue of a device; usable as a context manager, as `torch.Stream` is.

    Args:
        device: the device (None: the current one).
        priority: accepted as on other devices; kernels of one core run one after the other.

    Raises:
        RuntimeError: no such device.
    """

    def __new__(cls, device: Device = None, priority: int = 0, **ids: int) -> "Stream":
        if ids:
            return super().__new__(cls, **ids)
        return super().__new__(cls, torch.device("trn", device_index(device)), priority=priority)

    def __repr__(self) -> str:
        return f"torch.trn.Stream(device={self.device}, stream_id={self.stream_id})"


class _EventType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.Event) and instance.device.type == "trn"


class Event(metaclass=_EventType):
    """A mark on a stream; what it makes is a `torch.Event` of the device.

    Not a subclass, because torch refuses those where it takes an event (`elapsed_time`,
    `Stream.record_event`). `elapsed_time` is in simulated milliseconds.

    Args:
        enable_timing: whether `elapsed_time` may be asked.
        blocking, interprocess: accepted as on other devices, without effect.
    """

    def __new__(  # type: ignore[misc]
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> torch.Event:
        return torch.Event(
            "trn", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )


def current_stream(device: Device = None) -> Stream:
    """The stream on which the next operator of a device is queued.

    Raises:
        RuntimeError: no such device.
    """
    return _ours(torch._C._accelerator_getStream(device_index(device)))


def default_stream(device: Device = None) -> Stream:
    """The stream that a device starts with.

    Raises:
        RuntimeError: no such device.
    """
    index = device_index(device)
    return Stream(stream_id=0, device_index=index, device_type=_device_type())


def set_stream(stream: torch.Stream | None) -> None:
    """Make `stream` the current stream of its device, and that device current; None does nothing.

    Prefer `with torch.trn.stream(...)`.
    """
    if stream is not None:
        torch._C._accelerator_setStream(stream)


class StreamContext:
    """Context manager under which a stream, and its device, is current; None changes nothing.

    At the end both that device's stream and the current device are what they were.
    """

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is None:
            return
        self._device = device_context(self.stream.device)
        self._device.__enter__()
        self._before = current_stream(self.stream.device)
        set_stream(self.stream)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.stream is None:
            return
        set_stream(self._before)
        self._device.__exit__(kind, error, traceback)


def stream(stream: torch.Stream | None) -> StreamContext:
    """A context manager under which `stream` is current; None changes nothing."""
    return StreamContext(stream)


def is_current_stream_capturing() -> bool:
    """Whether work is being captured into a graph: never, the device has no capture."""
    return False


def _ours(stream: torch.Stream) -> Stream:
    return Stream(
        stream_id=stream.stream_id,
        device_index=stream.device_index,
        device_type=stream.device_type,
    )


def _device_type() -> int:
    """Torch's number of the device type 'trn', as the constructor of a stream wants it."""
    device_type: Any = torch._C._autograd.DeviceType.PrivateUse1
    return int(device_type.value)
