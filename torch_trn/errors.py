"""The errors a caller may want to catch. Wrong settings are plain ValueErrors."""

from __future__ import annotations

__all__ = ["CapacityError", "LoweringWarning", "TrnError", "UnsupportedOpError"]


class TrnError(RuntimeError):
    """Any failure of the simulated device that is not a wrong argument."""


class UnsupportedOpError(TrnError):
    """An operator that no NeuronCore Program exists for; it runs on the host instead.

    Args:
        name: the operator's schema name, e.g. ``aten::sort``.
        reason: why there is no Program, for the person who reads the profile.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} has no NeuronCore lowering: {reason}")
        self.name = name
        self.reason = reason


class LoweringWarning(UserWarning):
    """A lowering failed on a call it should know; the operator is accounted for as Host."""


class CapacityError(TrnError):
    """A tile that does not fit into SBUF or PSUM.

    Args:
        tile: name of the tile (pool) that was asked for.
        space: ``SBUF`` or ``PSUM``.
        needed: what the tile needs, in ``unit``.
        room: what is left, in ``unit``.
        capacity: what the core has in all, in ``unit``.
        unit: ``bytes per partition`` for SBUF, ``banks`` for PSUM.
    """

    def __init__(
        self, tile: str, space: str, *, needed: int, room: int, capacity: int, unit: str
    ) -> None:
        super().__init__(
            f'{space} tile "{tile}" needs {needed} {unit}, but {room} of {capacity} are left: '
            "use fewer slots or a smaller free size"
        )
        self.tile = tile
        self.space = space
        self.needed = needed
        self.room = room
        self.capacity = capacity
