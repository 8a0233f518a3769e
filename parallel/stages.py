"""Which blocks each pipeline stage holds: contiguous stretches, balanced by what they cost to compute.

A pipeline runs at the pace of its dearest stage. The embedders come on top of the first stage's blocks and the
final layer on top of the last one's, so equal numbers of blocks are not equal costs.
"""

from functools import lru_cache
from heapq import heapify, heapreplace
from itertools import accumulate

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import macs_of_parts


@lru_cache(maxsize=64)
def stage_blocks(config: ModelConfig, stages: int) -> tuple[range, ...]:
    """The numbers of each stage's blocks, for a complete configuration with at least as many blocks as stages."""
    parts = macs_of_parts(config)
    return tuple(balanced(config.depth, parts.block, parts.embedders, parts.final_layer, stages))


def balanced(blocks: int, cost: int, first: int, last: int, stages: int) -> list[range]:
    """Cut equal blocks into stretches so that the dearest is as cheap as can be, and the others alike.

    Among cuts with the same dearest stretch, the one with the smallest sum of squares; among those, the one with
    fewer blocks in the earlier stretches: an earlier pipeline stage keeps more micro-batches in memory.

    Each stretch begins with one block, and each further block goes to the stretch that is cheapest by then, the
    latest of equals: as all blocks cost the same, no other way leaves any sum of convex costs smaller.

    Args:
        blocks: number of them.
        cost: of a block, positive.
        first: what the first stretch costs beside its blocks, not negative.
        last: what the last one costs beside them.
        stages: number of stretches, at most that of blocks.
    """
    assert 1 <= stages <= blocks, f"{stages} stages for {blocks} blocks"
    size = [1] * stages
    beside = [first, *[0] * (stages - 2), last] if stages > 1 else [first + last]
    cheapest = [(beside[stage] + cost, -stage) for stage in range(stages)]
    heapify(cheapest)
    for _ in range(blocks - stages):
        so_far, stage = cheapest[0]
        size[-stage] += 1
        heapreplace(cheapest, (so_far + cost, stage))
    ends = list(accumulate(size))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
