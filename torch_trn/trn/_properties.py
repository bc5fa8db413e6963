"""What a device is: its name, and the numbers of the chip behind it."""

from dataclasses import dataclass

import torch

from torch_trn import _C, runtime
from torch_trn.trn._utils import Device, device_index


@dataclass(frozen=True, kw_only=True)
class DeviceProperties:
    """One logical NeuronCore. Rates are of the whole logical core (all its physical ones).

    The figures are those of `torch_trn.chip`, where each carries its source, but for
    `total_memory`, which the setting `hbm_bytes` replaces.
    """

    name: str
    system: str
    chip: str
    core: str
    lnc: int
    physical_cores: int
    total_memory: int
    """HBM in bytes."""
    hbm_bytes_per_s: float
    sbuf_bytes: int
    psum_bytes: int
    peak_flops: float
    """Dense bfloat16 operations a second of TensorE."""
    peak_flops_fp32: float
    major: int
    """Generation of the NeuronCore (3 is NeuronCore-v3)."""
    minor: int = 0


def get_device_properties(device: Device = None) -> DeviceProperties:
    """The properties of a device; None is the current one.

    Raises:
        RuntimeError: no such device.
    """
    index = device_index(device)
    current = runtime.current()
    system, core, lnc = current.system, current.core, current.lnc
    return DeviceProperties(
        name=f"{core.name} of {system.name}" + (f" (LNC={lnc})" if lnc > 1 else ""),
        system=system.name,
        chip=system.chip.name,
        core=core.name,
        lnc=lnc,
        physical_cores=lnc,
        total_memory=int(_C.mem_get_info(index)[1]),
        hbm_bytes_per_s=core.hbm_bytes_per_s * lnc,
        sbuf_bytes=core.sbuf_bytes * lnc,
        psum_bytes=core.psum_bytes * lnc,
        peak_flops=core.peak_flops(torch.bfloat16) * lnc,
        peak_flops_fp32=core.peak_flops(torch.float32) * lnc,
        major=_generation(core.name),
    )


def get_device_name(device: Device = None) -> str:
    """The name of a device, such as 'NeuronCore-v3 of trn2.48xlarge (LNC=2)'.

    Raises:
        RuntimeError: no such device.
    """
    return get_device_properties(device).name


def get_device_capability(device: Device = None) -> tuple[int, int]:
    """The generation of the device's NeuronCore as (major, minor): (3, 0) is NeuronCore-v3.

    Raises:
        RuntimeError: no such device.
    """
    properties = get_device_properties(device)
    return properties.major, properties.minor


def _generation(core_name: str) -> int:
    """3 from 'NeuronCore-v3'; 0 for a core that is not numbered."""
    digits = core_name.rpartition("-v")[2]
    return int(digits) if digits.isdecimal() else 0
