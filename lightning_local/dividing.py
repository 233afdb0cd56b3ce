"""Divides a row of things into contiguous blocks whose largest cost is as small as it can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["additive", "divide"]


def additive(costs: Sequence[float]) -> NDArray[np.float64]:
    """Costs of all blocks of things that each cost something: entry `[i, j]` is that of i to j."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=float))])
    blocks: NDArray[np.float64] = sums[None, 1:] - sums[:-1, None]
    return blocks


def divide(costs: NDArray[np.float64], count: int) -> list[range]:
    """Of the divisions with the smallest largest cost, the one with the smallest sum of squares.

    Args:
        costs: Entry `[i, j]` is the cost of a block of things i to j, both included, `(n, n)`;
            below the diagonal anything.
        count: Number of blocks, at most n; each gets at least one thing.
    """
    n = len(costs)
    costs = np.where(np.tri(n, k=-1, dtype=bool), np.inf, costs)
    # largest[j]: for the first j + 1 things in as many blocks as there have been rounds.
    largest = costs[0].copy()
    for _ in range(count - 1):
        largest = np.maximum(_shifted(largest)[:, None], costs).min(0)
    # Rounding of sums must not forbid the best division itself.
    allowed = np.where(costs <= largest[-1] * (1 + 1e-12), costs, np.inf) ** 2
    squares, starts = allowed[0].copy(), []
    for _ in range(count - 1):
        candidates = _shifted(squares)[:, None] + allowed
        starts.append(candidates.argmin(0))
        squares = candidates.min(0)
    found, stop = [], n
    for start in [*starts[::-1], np.zeros(n, dtype=int)]:
        begin = int(start[stop - 1])
        found.append(range(begin, stop))
        stop = begin
    return found[::-1]


def _shifted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For a block that starts at i: the best of the things before it, of which there must be."""
    return np.concatenate([[np.inf], values[:-1]])
