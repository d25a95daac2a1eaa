"""How long the rest will take, from what has been measured so far, as a range and not before it can be known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

UNSEEN = 2.0  # a shape that was not timed yet may take this much more or less than its number of operations says


class Estimate:
    """Seconds per shape, and from them the range in which the remaining work will lie.

    A shape is (m, p), or (m, p, models) where several models are compared with one matrix. Work is predicted per shape:
    the mean of the times measured on this shape in this process, plus and minus two standard errors (with one
    measurement, plus and minus half of it). A shape not met yet is scaled from the others by models m p min(m, p), the
    growth of a decomposition, and its range is widened by a factor of two both ways. Nothing is predicted before two
    matrices are done.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, ...], list[float]] = {}

    def add(self, shape: tuple[int, ...], seconds: float) -> None:
        """One more matrix of this shape is done."""
        self.seconds.setdefault(tuple(shape), []).append(seconds)

    def remaining(self, shapes: Iterable[tuple[int, ...]]) -> tuple[float, float] | None:
        """(low, high) seconds for these shapes, one after another; None while fewer than two matrices are done."""
        done = [(shape, seconds) for shape, values in self.seconds.items() for seconds in values]
        if len(done) < 2:
            return None
        rate = sum(seconds for _, seconds in done) / sum(_operations(shape) for shape, _ in done)
        low = high = 0.0
        for shape in map(tuple, shapes):
            if shape in self.seconds:
                values = self.seconds[shape]
                mean = statistics.fmean(values)
                error = mean / 2 if len(values) == 1 else 2 * statistics.stdev(values) / len(values) ** 0.5
                low, high = low + max(mean - error, 0), high + mean + error
            else:
                guess = rate * _operations(shape)
                low, high = low + guess / UNSEEN, high + guess * UNSEEN
        return low, high


def in_words(seconds: float) -> str:
    """'42 s', '7 min', '1 h 5 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _operations(shape: tuple[int, ...]) -> float:
    rows, columns, *models = shape
    return float(rows) * columns * min(rows, columns) * math.prod(models)
