"""Which blocks each pipeline stage holds: contiguous stretches, balanced by what they cost to compute.

A pipeline runs at the pace of its dearest stage. The embedders come on top of the first stage's blocks and the
final layer on top of the last one's, so equal numbers of blocks are not equal costs.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import macs_of_parts


@lru_cache(maxsize=64)
def stage_blocks(config: ModelConfig, stages: int) -> tuple[range, ...]:
    """The numbers of each stage's blocks, for a complete configuration with at least as many blocks as stages."""
    parts = macs_of_parts(config)
    costs = [parts.block] * config.depth
    costs[0] += parts.embedders
    costs[-1] += parts.final_layer
    return tuple(balanced(costs, stages))


def balanced(costs: Sequence[int], stages: int) -> list[range]:
    """Cut a row of costs into stretches so that the dearest is as cheap as can be, and the others alike.

    Among cuts with the same dearest stretch, the one with the smallest sum of squares; among those, the one with
    fewer items in the earlier stretches: an earlier pipeline stage keeps more micro-batches in memory.

    Args:
        costs: of each item, positive.
        stages: number of stretches, at most that of items.
    """
    assert 1 <= stages <= len(costs), f"{stages} stages for {len(costs)} blocks"
    before = [0, *accumulate(costs)]
    dearest, _ = _best_cut(before, stages, lambda cost: cost, max)

    def square(cost: int) -> float:
        return cost * cost if cost <= dearest else math.inf

    _, ends = _best_cut(before, stages, square, lambda left, right: left + right)
    return [range(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def _best_cut(
    before: Sequence[int],
    stages: int,
    value: Callable[[int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The cut with the least combined value, and the ends of its stretches.

    Args:
        before: sum of the costs before each item, and of all at the end.
        value: of a stretch with this cost.
        combine: of two values.
    """

    @cache
    def first_items(items: int, count: int) -> tuple[float, tuple[int, ...]]:
        """The best cut of the first items into `count` stretches; of equal ones that with the earliest ends."""
        if count == 1:
            return value(before[items]), (items,)
        found = []
        for start in range(count - 1, items):
            so_far, ends = first_items(start, count - 1)
            found.append((combine(so_far, value(before[items] - before[start])), (*ends, items)))
        return min(found)

    return first_items(len(before) - 1, stages)
