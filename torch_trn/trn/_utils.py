"""How torch and this package turn what a user calls a device into an index.

The name is torch's: `torch.serialization` looks for `torch.trn._utils._get_device_index`.
"""

from typing import Any

import torch

from torch_trn import _C

Device = torch.device | str | int | None
"""What a function of `torch.trn` takes as a device; None is the current device."""


def _get_device_index(device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """The index that `device` names, without asking whether that device exists.

    An int is its own index. 'trn', and None where `optional`, are the current device. With
    `allow_cpu` the CPU is accepted and gives -1. Torch's deserialisation calls this and then
    compares with `device_count()` itself, for a text about `map_location`.

    Raises:
        ValueError: a device of another type, or None where a device is needed.
    """
    if isinstance(device, int):
        return device
    if device is None:
        if optional:
            return int(_C.current_device())
        raise ValueError("expected a trn device or an index, got None")
    if isinstance(device, str):
        check_index_text(device)
    device = torch.device(device)
    if allow_cpu and device.type == "cpu":
        return -1
    if device.type != "trn":
        raise ValueError(f"expected a trn device, got {str(device)!r}")
    return int(_C.current_device()) if device.index is None else device.index


def device_index(device: Device = None) -> int:
    """The index of an existing device; None and 'trn' are the current one.

    Raises:
        ValueError: a device of another type.
        RuntimeError: no such device; the text names the index and the number of devices.
    """
    index = _get_device_index(device, optional=True)
    count = _C.device_count()
    if 0 <= index < count:
        return index
    raise RuntimeError(
        f"Invalid trn device index {index}: this process has {count} logical NeuronCores, trn:0 to "
        f"trn:{count - 1}{_wrapped_index_hint(index)}"
    )


def check_index_text(device: str) -> None:
    """Refuses 'trn:256' and the like, which torch would turn into another device.

    Raises:
        RuntimeError: the index has no room in the 8 bits that torch keeps of it.
    """
    kind, _, index = device.partition(":")
    if kind == "trn" and index.isdecimal() and int(index) > 127:
        raise RuntimeError(f"trn:{index} does not exist: torch keeps an index in 8 bits, up to 127")


def _wrapped_index_hint(index: int) -> str:
    """Torch keeps an index in 8 bits, so 'trn:128' reaches us as -128: say so."""
    if index >= 0:
        return ""
    return f" (torch keeps indices up to 127 and turns {index + 256} into {index})"
