"""`torch_trn.estimate`: how long a program takes, how much HBM it needs, and whether that is there.

The program runs once. Where a device has no room, it is given more than it has and the program goes
on, so that the need is known. Whether a program fits is thus what the allocator said, fragmentation
included, and not a comparison of sums.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_trn import _C, config, runtime
from torch_trn.config import format_bytes
from torch_trn.profiler import memory
from torch_trn.profiler.memory import MemoryPeak, Refusal
from torch_trn.profiler.session import profile

_PRETEND_BYTES = 1 << 46
"""What a full device is given: that of `MemoryLog` on the native side."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one run of a program took; of several devices, the one that had no room or the fullest.

    Bytes by category, the operator and module of the peak and the blocks are in `memory`.
    """

    time_us: float
    """Simulated, from the start of the first operator to the end of the last."""
    capacity_bytes: int
    """HBM of one device."""
    memory: MemoryPeak
    refusal: Refusal | None
    """The first allocation that would have been an OutOfMemoryError."""

    @property
    def fits(self) -> bool:
        """Whether no allocation was refused."""
        return self.refusal is None

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were allocated at once."""
        return self.memory.peak_bytes

    @property
    def missing_bytes(self) -> int:
        """How much more than the capacity the peak is.

        0 when the program fits, and when it does not for fragmentation alone.
        """
        return max(0, self.peak_bytes - self.capacity_bytes)

    @property
    def peak_operator(self) -> str:
        """Whose allocation made the peak."""
        return self.memory.operator

    @property
    def peak_module(self) -> str:
        """The module of that operator; empty outside modules."""
        return self.memory.module

    def table(self, *, limit: int = 5) -> str:
        """Time, fit and memory as text, with the `limit` largest blocks.

        Raises:
            ValueError: a `limit` below 0.
        """
        need = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.capacity_bytes)} HBM"
        lines = [f"{self.time_us:,.1f} us, {need}: {'fits' if self.fits else 'does not fit'}"]
        if self.refusal is not None:
            lines.append(_refusal_text(self.refusal, self.missing_bytes))
        return "\n".join((*lines, memory.text(self.memory, limit=limit)))


def estimate(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Estimate:
    """Run `fn(*args, **kwargs)` once and say what it took and whether it fits.

    What does not fit is no error: the devices get more HBM for the time of the run. With
    numerics "none" no values are computed, so a large model costs neither time nor memory here.
    What `fn` returns is dropped. When `fn` leaves more allocated than there is (in an exception's
    frames, too), the capacity cannot be put back; a RuntimeWarning says so.

    Args:
        fn: one step of the program, say. It may make the model too.

    Raises:
        ValueError: `fn` cannot be called.
        RuntimeError: a profile is running.
        Exception: whatever `fn` raises.
    """
    if not callable(fn):
        raise ValueError(
            f"fn is {fn!r}, which cannot be called; pass a function that runs what is to be "
            "estimated, such as torch_trn.estimate(train_step, batch)"
        )
    capacity_bytes = runtime.current().hbm_bytes
    _start_even()
    prof = _GrowingProfile(memory=True)
    try:
        with prof:
            result = fn(*args, **kwargs)
        del result
        return prof.estimate(capacity_bytes)
    finally:
        if prof.refusals():
            _put_back(capacity_bytes)


class _GrowingProfile(profile):
    _grows_hbm = True

    def refusals(self) -> dict[int, Refusal]:
        """The first refusal by device, the first one first; none before the profile's end."""
        if self._recording is None:
            return {}
        return memory.refusals(self._memory_log, self._recording.modules)

    def estimate(self, capacity_bytes: int) -> Estimate:
        """The profile as an estimate."""
        refusal = next(iter(self.refusals().values()), None)
        return Estimate(
            time_us=self.elapsed_us,
            capacity_bytes=capacity_bytes,
            memory=self.memory(None if refusal is None else refusal.device),
            refusal=refusal,
        )


def _start_even() -> None:
    """Let no work and no cached segment from before reach into the estimate."""
    if _C.is_initialized():
        _C.empty_cache()
        for device in range(_C.device_count()):
            _C.synchronize(device)


def _put_back(capacity_bytes: int) -> None:
    """Give all devices the capacity they had, or say which cannot have it."""
    gc.collect()  # what a module or a graph holds in a circle
    _C.empty_cache()
    full = _C.set_hbm_bytes(capacity_bytes)
    if full < 0:
        return
    config.configure(hbm_bytes=_PRETEND_BYTES)
    warnings.warn(
        f"trn:{full} holds {format_bytes(_C.memory_stats(full)['allocated_bytes.all.current'])} "
        f"after the estimate, more than its {format_bytes(capacity_bytes)}, so the devices keep "
        f"a pretended capacity of {format_bytes(_PRETEND_BYTES)}. Make the model and the optimizer "
        "inside the estimated function, or free them and call "
        f"torch_trn.configure(hbm_bytes={capacity_bytes})",
        RuntimeWarning,
        stacklevel=3,
    )


def _refusal_text(refusal: Refusal, missing_bytes: int) -> str:
    where = f" of {refusal.module}" if refusal.module else ""
    why = (
        f"{format_bytes(missing_bytes)} are missing at the peak"
        if missing_bytes
        else "the free HBM is in pieces that are too small"
    )
    return (
        f"no room for {format_bytes(refusal.nbytes)} in {refusal.operator}{where} on "
        f"trn:{refusal.device}; {why}"
    )
