"""`torch.trn`: the device as `torch.cuda` is for CUDA (devices, streams, memory, random, amp).

`torch_trn` registers this package with torch; afterwards `torch.trn` is it.
"""

import sys
from typing import Any

from torch_trn.trn import _utils as _utils
from torch_trn.trn import amp, memory, methods, parameters, random
from torch_trn.trn._device import _exchange_device as _exchange_device
from torch_trn.trn._device import _is_in_bad_fork as _is_in_bad_fork
from torch_trn.trn._device import _lazy_init as _lazy_init
from torch_trn.trn._device import _maybe_exchange_device as _maybe_exchange_device
from torch_trn.trn._device import (
    can_device_access_peer,
    current_device,
    device,
    device_count,
    device_of,
    host_clock_ps,
    init,
    is_available,
    is_initialized,
    set_device,
    stream_clock_ps,
    synchronize,
)
from torch_trn.trn._properties import (
    DeviceProperties,
    get_device_capability,
    get_device_name,
    get_device_properties,
)
from torch_trn.trn._stream import (
    Event,
    Stream,
    StreamContext,
    current_stream,
    default_stream,
    is_current_stream_capturing,
    set_stream,
    stream,
)
from torch_trn.trn.amp import get_amp_supported_dtype, is_bf16_supported
from torch_trn.trn.memory import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_snapshot,
    memory_stats,
    memory_stats_as_nested_dict,
    memory_summary,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
)
from torch_trn.trn.random import _get_generator as _get_generator
from torch_trn.trn.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)

# `import torch.trn.amp` would otherwise load a second copy of the file under that name.
for _module in (_utils, amp, memory, random):
    sys.modules[_module.__name__.replace("torch_trn.trn", "torch.trn")] = _module
del _module


def __getattr__(name: str) -> Any:
    """What other device modules keep as variables, and what changes here without a call."""
    if name == "_initialized":  # asked by torch.utils.checkpoint before it saves random states
        return is_initialized()
    if name == "default_generators":
        return random.default_generators()
    raise AttributeError(f"module 'torch.trn' has no attribute {name!r}")


__all__ = [
    "DeviceProperties",
    "Event",
    "Stream",
    "StreamContext",
    "amp",
    "can_device_access_peer",
    "current_device",
    "current_stream",
    "default_generators",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "host_clock_ps",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_current_stream_capturing",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory",
    "memory_allocated",
    "memory_reserved",
    "memory_snapshot",
    "memory_stats",
    "memory_stats_as_nested_dict",
    "memory_summary",
    "methods",
    "parameters",
    "random",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "stream_clock_ps",
    "synchronize",
]
