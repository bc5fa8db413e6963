"""Joins the native device and the simulator: sets the device up, and prices operators for it.

The eager path is native. It comes here once for each operator and set of shapes that it has not
seen, and keeps the answer.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from torch_trn import _C, config, runtime, tile

if TYPE_CHECKING:
    from torch_trn.lowering import OpCall
    from torch_trn.program import Program
    from torch_trn.timeline import Timeline

_calls: dict[int, OpCall] = {}
_reasons: dict[int, str] = {}


def start() -> None:
    """Makes the device, as the settings ask for it, and lets it come here for prices.

    Raises:
        ValueError: a setting has a value that does not exist.
    """
    settings = config.get()
    _configure(runtime.current())
    _C.set_lowering(_price, _has_lowering)
    _C.set_executor(tile.compute)
    _C.set_tile(settings.numerics == "tile")
    _C.set_strict(settings.strict)
    _C.set_debug(settings.debug)
    _set_numerics(settings)
    config.on_change(_apply)


def call_of(entry: int) -> OpCall | None:
    """The call that a cost entry was made for; None for copies between devices."""
    return _calls.get(entry)


def host_reason(entry: int) -> str:
    """Why the operator of a cost entry runs on the host; empty when it does not."""
    return _reasons.get(entry, "")


def timeline_of(entry: int) -> Timeline | None:
    """The spans of a cost entry's kernel, from its start; None when no NeuronCore ran it."""
    traced = _trace(entry)
    return None if traced is None else traced[1]


@cache
def sums_of(entry: int) -> Timeline | None:
    """As `timeline_of`, without spans: it takes moments however long the Program is."""
    call = _calls.get(entry)
    traced = None if call is None else runtime.trace(call, runtime.current(), spans=False)
    return None if traced is None else traced[1]


def program_of(entry: int) -> Program | None:
    """The Program of a cost entry's kernel; None when no NeuronCore ran it."""
    traced = _trace(entry)
    return None if traced is None else traced[0]


@cache
def _trace(entry: int) -> tuple[Program, Timeline] | None:
    call = _calls.get(entry)
    return None if call is None else runtime.trace(call, runtime.current())


def _configure(system: runtime.Runtime) -> None:
    timing = {
        "launch_ps": system.system.launch_ps,
        "dispatch_ps": system.system.dispatch_ps,
        "host_link_bytes_per_s": system.system.host_link_bytes_per_s,
        "host_link_fixed_ps": system.system.host_link_fixed_ps,
        "device_link_bytes_per_s": system.device_link_bytes_per_s,
        "device_link_fixed_ps": system.core.dma_start_ps,
    }
    _C.configure(len(system.cores), system.hbm_bytes, timing)


def _apply(old: config.Config, new: config.Config) -> None:
    """Carries a change of settings to the native side, or forbids it."""

    resolved = runtime.resolve(new, os.environ)
    without = (old.numerics == "none") != (new.numerics == "none")
    if without and _C.is_initialized():
        raise ValueError(
            f"numerics cannot change from {old.numerics!r} to {new.numerics!r}: the device is in "
            "use, and its tensors have values or have none. Call torch_trn.configure before the "
            "first trn tensor, or set TRN_NUMERICS"
        )
    if (old.system, old.lnc) != (new.system, new.lnc):
        if _C.is_in_use():
            raise ValueError(
                f"system and lnc cannot change from ({old.system!r}, {old.lnc}) to "
                f"({new.system!r}, {new.lnc}): the device is in use. Call torch_trn.configure "
                "before the first trn tensor and device count, or set TRN_SYSTEM and TRN_LNC"
            )
        _configure(resolved)
    elif old.hbm_bytes != new.hbm_bytes:
        refused = _C.set_hbm_bytes(resolved.hbm_bytes)
        if refused >= 0:
            raise ValueError(
                f"hbm_bytes cannot become {resolved.hbm_bytes}: trn:{refused} has more reserved. "
                "Free its tensors first"
            )
    _C.set_strict(new.strict)
    _C.set_debug(new.debug)
    _C.set_tile(new.numerics == "tile")
    _set_numerics(new)


def _set_numerics(settings: config.Config) -> None:
    _C.set_numerics(
        settings.numerics == "none",
        settings.data_bytes,
        settings.integer_data_bytes,
        settings.none_item == "nan",
    )


def _has_lowering(name: str) -> bool:
    from torch_trn.lowering import has_lowering

    return has_lowering(name)


def _price(
    entry: int, name: str, args: list[Any], outs: list[torch.Tensor], fresh: list[bool]
) -> tuple[int, int, tuple[int, ...], float, int, int, bool]:
    """What the native side keeps of an operator's cost, in the order it unpacks it."""
    from torch_trn.lowering import OpCall, TensorSpec

    call = OpCall(name, _specs(args), tuple(TensorSpec.of(out) for out in outs), tuple(fresh))
    cost = runtime.price(call, runtime.current())
    _calls[entry] = call
    if cost.host:
        _reasons[entry] = cost.reason
    _print_debug(entry)
    return (
        cost.launch_ps,
        cost.duration_ps,
        cost.busy_ps,
        cost.flops,
        cost.hbm_bytes,
        runtime.BOUNDS.index(cost.bound),
        cost.host,
    )


def _print_debug(entry: int) -> None:
    level = config.get().debug
    traced = _trace(entry) if level >= 2 else None
    if traced is not None:
        print(traced[0])
        if level >= 3:
            print(traced[1])


def _specs(args: Any) -> tuple[Any, ...]:
    """Arguments as the lowerings take them: tensors as specs, lists as tuples."""
    return tuple(_spec(arg) for arg in args)


def _spec(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        from torch_trn.lowering import TensorSpec

        return TensorSpec.of(arg)
    return _specs(arg) if isinstance(arg, list | tuple) else arg
