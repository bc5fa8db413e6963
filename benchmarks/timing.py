"""Compares two ways of doing the same work, in one run, on a machine that does other things too.

Rounds of the two are interleaved, so that both meet the same load; each side's figure is the median
of its fastest quarter of rounds. What is reported is the ratio or difference of the two.
"""

import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


def seconds_each(first: Work, second: Work, *, rounds: int, repeat: int) -> tuple[float, float]:
    """Seconds of one call of `first` and of `second`: `rounds` rounds of `repeat` calls each."""
    samples: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    for _ in range(rounds):
        for work, into in zip((first, second), samples, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            into.append((time.perf_counter() - start) / repeat)
    fastest = [sorted(times)[: max(1, rounds // 4)] for times in samples]
    return statistics.median(fastest[0]), statistics.median(fastest[1])


def verdict(value: float, limit: float) -> str:
    """How a figure stands to its bar."""
    return "ok" if value <= limit else "ABOVE"
