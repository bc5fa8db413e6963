"""The system of this process, and what one operator costs on one of its logical NeuronCores.

`current()` resolves the settings and the variables of the Neuron runtime into a `Runtime`; `price`
lowers a call to a Program and schedules it. Nothing here knows that a torch device exists.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch_trn import chip, config
from torch_trn.chip import CoreSpec, SystemSpec
from torch_trn.errors import LoweringWarning, UnsupportedOpError

# `import torch` comes through here: lowerings and scheduler are imported with the first operator.
if TYPE_CHECKING:
    import torch

    from torch_trn.lowering import OpCall
    from torch_trn.program import Program
    from torch_trn.timeline import Timeline

MAX_DEVICES = 127
"""torch keeps a device index in a signed byte."""

ENGINES = ("TensorE", "VectorE", "ScalarE", "GpSimdE", "DMA")
"""In the order of `isa.Engine`."""

BOUNDS = (*ENGINES, "Launch", "Collective", "Host")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A configured system as one process sees it."""

    system: SystemSpec
    lnc: int
    """Physical cores of one logical core."""
    cores: tuple[int, ...]
    """The logical cores of the instance that are this process's devices: `trn:i` is `cores[i]`."""
    hbm_bytes: int
    """HBM of one logical core."""

    @property
    def core(self) -> CoreSpec:
        """One physical NeuronCore."""
        return self.system.chip.core

    @property
    def device_link_bytes_per_s(self) -> int:
        """Rate of a copy between two logical cores (assumed until links are modelled).

        The smaller of what DMA moves from HBM to HBM and of one NeuronLink port, one way.
        """
        hbm_to_hbm = self.core.dma_bytes_per_s / self.core.dma_hbm_to_hbm_factor
        return int(min(hbm_to_hbm, self.system.chip.link_bytes_per_s / 8))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs. `busy_ps` is by `Engine`, of the physical core with the largest share;
    `flops` and `hbm_bytes` are of all physical cores together."""

    launch_ps: int
    duration_ps: int
    busy_ps: tuple[int, ...]
    flops: float
    hbm_bytes: int
    bound: str
    host: bool
    reason: str = ""
    """Why it runs on the host, if it does."""


def resolve(settings: config.Config, environment: Mapping[str, str]) -> Runtime:
    """The system that `settings` and the Neuron runtime's variables ask for.

    Raises:
        ValueError: a system or LNC that does not exist, or cores that the instance does not have.
    """
    system = chip.system(settings.system)
    lnc = settings.lnc
    if lnc is None and environment.get("NEURON_LOGICAL_NC_CONFIG"):
        lnc = _integer("NEURON_LOGICAL_NC_CONFIG", environment["NEURON_LOGICAL_NC_CONFIG"])
    count = system.logical_cores(lnc)
    return Runtime(
        system=system,
        lnc=lnc or system.chip.default_lnc,
        cores=_visible_cores(count, environment),
        hbm_bytes=settings.hbm_bytes or system.hbm_bytes_per_logical_core(lnc),
    )


def current() -> Runtime:
    """The system of this process; the same object until a setting changes.

    Raises:
        ValueError: as `resolve`.
    """
    global _resolved
    settings = config.get()
    if _resolved is None or _resolved[0] != settings:
        _resolved = (settings, resolve(settings, os.environ))
    return _resolved[1]


_resolved: tuple[config.Config, Runtime] | None = None


def price(call: OpCall, runtime: Runtime) -> Cost:
    """The cost of one call as a kernel of its own on one logical core.

    An operator without a lowering costs the way to the host and back: its arguments leave over
    the host link and its results return. What the host computes meanwhile is not modelled.
    """
    from torch_trn.lowering import lower
    from torch_trn.scheduler import schedule

    try:
        program = lower(call, runtime.core, runtime.lnc)
        timeline = schedule(program, runtime.core)
    except UnsupportedOpError as error:
        return _host_cost(call, runtime, error.reason)
    except Exception as error:  # whatever a lowering may raise
        # A fault of the lowering, not of the user's program, whose values are right all the same.
        warnings.warn(
            f"the lowering of {call.name} failed on {call.args}: {error}. Its time is that of a "
            "Host operator; please report it",
            LoweringWarning,
            stacklevel=2,
        )
        return _host_cost(call, runtime, f"its lowering failed: {error}")
    launch_ps = runtime.system.launch_ps
    loads = dict(zip(BOUNDS, (*timeline.busy_ps, launch_ps), strict=False))
    return Cost(
        launch_ps=launch_ps,
        duration_ps=timeline.duration_ps,
        busy_ps=timeline.busy_ps,
        flops=float(program.flops * runtime.lnc),
        hbm_bytes=(program.hbm_read_bytes + program.hbm_write_bytes) * runtime.lnc,
        bound=max(loads, key=lambda name: loads[name]),
        host=False,
    )


def trace(call: OpCall, runtime: Runtime, *, spans: bool = True) -> tuple[Program, Timeline] | None:
    """The Program and Timeline behind `price`; None for an operator on the host."""
    from torch_trn.lowering import lower
    from torch_trn.scheduler import schedule

    try:
        program = lower(call, runtime.core, runtime.lnc)
        return program, schedule(program, runtime.core, spans=spans)
    except Exception:  # price() has said why
        return None


@lru_cache(maxsize=1024)
def _lowered(call: OpCall, core: CoreSpec, lnc: int) -> Program | None:
    from torch_trn.lowering import lower

    try:
        return lower(call, core, lnc)
    except UnsupportedOpError:
        return None


def program_of(call: OpCall, runtime: Runtime) -> Program | None:
    """The Program of one call with its own numbers; None where it runs on the host."""
    return _lowered(call, runtime.core, runtime.lnc)


def execute(program: Program, runtime: Runtime, tensors: Mapping[str, torch.Tensor]) -> None:
    """Runs a Program on all physical cores of a logical one (see `executor.execute`)."""
    from torch_trn.executor import execute

    execute(program, runtime.core, tensors, cores=runtime.lnc)


def _host_cost(call: OpCall, runtime: Runtime, reason: str) -> Cost:
    results = [out for out, fresh in zip(call.outs, call.fresh, strict=True) if fresh]
    read = sum(spec.nbytes for spec in call.tensors())
    written = sum(spec.nbytes for spec in results or call.outs)
    link = runtime.system
    rate = link.host_link_bytes_per_s
    transfer_ps = sum(-(-nbytes * 10**12 // rate) for nbytes in (read, written) if nbytes)
    return Cost(
        launch_ps=0,
        duration_ps=2 * link.host_link_fixed_ps + transfer_ps,
        busy_ps=(0,) * len(ENGINES),
        flops=0.0,
        hbm_bytes=read + written,
        bound="Host",
        host=True,
        reason=reason,
    )


def _visible_cores(count: int, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The cores that NEURON_RT_VISIBLE_CORES, or else NEURON_RT_NUM_CORES, leaves of `count`."""
    cores = tuple(range(count))
    if environment.get("NEURON_RT_VISIBLE_CORES"):
        cores = _parse_cores(environment["NEURON_RT_VISIBLE_CORES"], count)
    elif environment.get("NEURON_RT_NUM_CORES"):
        wanted = _integer("NEURON_RT_NUM_CORES", environment["NEURON_RT_NUM_CORES"])
        if not 0 <= wanted <= count:
            raise ValueError(
                f"NEURON_RT_NUM_CORES is {wanted}; the instance has {count} logical NeuronCores: "
                f"choose 1 to {count}, or 0 for all"
            )
        cores = cores[: wanted or count]
    if len(cores) > MAX_DEVICES:
        warnings.warn(
            f"the instance has {len(cores)} logical NeuronCores and torch can index {MAX_DEVICES} "
            f"devices in a process: trn:0 to trn:{MAX_DEVICES - 1} exist. Set "
            "NEURON_RT_VISIBLE_CORES to choose others",
            stacklevel=2,
        )
        cores = cores[:MAX_DEVICES]
    return cores


def _parse_cores(text: str, count: int) -> tuple[int, ...]:
    """'0-3,8' as (0, 1, 2, 3, 8)."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last or last >= count:
            raise ValueError(
                f"NEURON_RT_VISIBLE_CORES is {text!r}; the instance has {count} logical "
                f"NeuronCores: give indices from 0 to {count - 1}, such as '0-3' or '0,2,4'"
            )
        cores += range(first, last + 1)
    if len(set(cores)) < len(cores):
        raise ValueError(f"NEURON_RT_VISIBLE_CORES is {text!r}; it names a core twice")
    return tuple(cores)


def _integer(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable} is {text!r}; it must be a whole number") from None
