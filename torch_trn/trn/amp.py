"""Automatic mixed precision, as `torch.cuda.amp`: `torch.amp` with the device filled in."""

import functools
from collections.abc import Callable
from typing import Any

import torch

custom_fwd = functools.partial(torch.amp.custom_fwd, device_type="trn")
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type="trn")


class autocast(torch.amp.autocast_mode.autocast):
    """`torch.autocast('trn', ...)`; matmuls run in `dtype`, bfloat16 if not given."""

    def __init__(
        self,
        enabled: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        cache_enabled: bool = True,
    ) -> None:
        super().__init__("trn", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """`func` run under this autocast: the class is a decorator too."""
        decorated: Callable[..., Any] = super().__call__(func)
        return decorated


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler('trn', ...)`."""

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        super().__init__("trn", init_scale, growth_factor, backoff_factor, growth_interval, enabled)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """The dtypes that autocast can cast to; `torch.autocast` asks for them."""
    return [torch.bfloat16, torch.float16]


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether bfloat16 works: on every NeuronCore, in hardware."""
    return True
