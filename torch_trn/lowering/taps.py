"""Linear maps along one dim: which elements, with which weights, each result is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Progression", "Taps", "progressions"]


@dataclass(frozen=True)
class Progression:
    """``count`` taps of one weight: results and sources at regular distances."""

    out: int
    out_step: int
    source: int
    source_step: int
    count: int
    weight: float = 1.0


@dataclass(frozen=True)
class Taps:
    """One dim of a linear map: for each of ``outs`` elements its (source, weight) pairs."""

    ins: int
    outs: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def is_identity(self) -> bool:
        """Whether nothing happens along this dim."""
        return self.ins == len(self.outs) and all(
            taps == ((at, 1.0),) for at, taps in enumerate(self.outs)
        )

    @property
    def selects(self) -> bool:
        """Whether every element is one of the source (or none)."""
        return all(len(taps) <= 1 and all(w == 1.0 for _, w in taps) for taps in self.outs)

    def transposed(self) -> Taps:
        """The map of the gradients."""
        found: list[list[tuple[int, float]]] = [[] for _ in range(self.ins)]
        for out, taps in enumerate(self.outs):
            for source, weight in taps:
                found[source].append((out, weight))
        return Taps(len(self.outs), tuple(_joined(taps) for taps in found))

    def cut(self, first: int, count: int) -> tuple[Taps, int]:
        """The map of some results alone, and the first source they need."""
        outs = self.outs[first : first + count]
        used = [source for taps in outs for source, _ in taps] or [0]
        low = min(used)
        moved = tuple(tuple((s - low, w) for s, w in taps) for taps in outs)
        return Taps(max(used) - low + 1, moved), low


def _joined(taps: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Weights of one source added up."""
    total: dict[int, float] = {}
    for source, weight in taps:
        total[source] = total.get(source, 0.0) + weight
    return tuple(total.items())


def progressions(pairs: Sequence[tuple[int, int, float]]) -> list[Progression]:
    """(result, source, weight) in as few progressions as a period of up to eight finds."""
    best: list[Progression] | None = None
    for period in range(1, 9):
        groups: dict[tuple[int, float], list[tuple[int, int]]] = {}
        for out, source, weight in pairs:
            groups.setdefault((out % period, round(weight, 7)), []).append((out, source))
        exact = {(out, source): weight for out, source, weight in pairs}
        found = [run for group in groups.values() for run in _runs(group, exact)]
        if best is None or len(found) < len(best):
            best = found
        if len(best) <= period:
            break
    return best or []


def _runs(
    group: Sequence[tuple[int, int]], weights: dict[tuple[int, int], float]
) -> Iterator[Progression]:
    """Greedy: as long as both sides keep their distance (a source never goes back)."""
    at = 0
    while at < len(group):
        out, source = group[at]
        steps, end = (1, 0), at + 1
        if end < len(group):
            steps = (group[end][0] - out, group[end][1] - source)
            while end < len(group) and steps[1] >= 0 and steps == _apart(group, end):
                end += 1
        yield Progression(out, steps[0], source, max(steps[1], 0), end - at,
                          weights[out, source])  # fmt: skip
        at = end


def _apart(group: Sequence[tuple[int, int]], at: int) -> tuple[int, int]:
    """How far both sides went to get to ``at``."""
    return group[at][0] - group[at - 1][0], group[at][1] - group[at - 1][1]
