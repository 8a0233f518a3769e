"""Pipeline stages: every block on one stage, in order, and the dearest stage as cheap as can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count, macs_of_parts
from ditmoe.parallel.stages import balanced, stage_blocks


def every_cut(items: int, stages: int) -> list[list[range]]:
    """All ways to cut a row, by brute force."""
    cuts = [(0, *inner, items) for inner in combinations(range(1, items), stages - 1)]
    return [[range(a, b) for a, b in pairwise(cut)] for cut in cuts]


@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    blocks, cost = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    first, last = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    stages = data.draw(st.integers(1, blocks))
    costs = [cost] * blocks
    costs[0] += first
    costs[-1] += last

    def rank(cut: list[range]) -> tuple[int, int, list[int]]:
        sums = [sum(costs[item] for item in stretch) for stretch in cut]
        return max(sums), sum(value * value for value in sums), [stretch.stop for stretch in cut]

    assert balanced(blocks, cost, first, last, stages) == min(every_cut(blocks, stages), key=rank)


@pytest.mark.parametrize(("stages", "sizes"), [(1, [28]), (3, [9, 10, 9]), (4, [7] * 4), (8, [3] * 4 + [4] * 4)])
def test_stages_of_a_published_network(stages: int, sizes: list[int]) -> None:
    config = ModelConfig(preset="DiT-XL/2-8E2A", image_size=64, channels=4, num_classes=1000)
    blocks = stage_blocks(config, stages)
    assert [number for stretch in blocks for number in stretch] == list(range(28))
    assert sorted(map(len, blocks)) == sorted(sizes)


def test_parts_add_up() -> None:
    config = ModelConfig(preset="DiT-S/2-8E2A", image_size=32, channels=4, num_classes=1000)
    parts = macs_of_parts(config)
    assert parts.embedders + 12 * parts.block + parts.final_layer == count(config).macs
    # The counts that a formula gives: K of the experts of width 4D, each three products.
    assert parts.routed == 3 * 2 * 4 * 384**2 * config.tokens < parts.block
    assert 0 < parts.final_layer < parts.embedders + parts.final_layer < parts.block
