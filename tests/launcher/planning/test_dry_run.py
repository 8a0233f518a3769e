"""Memory of the training state per rank, against sums by hand."""

import pytest

from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.anatomy import Weight, anatomy
from ditmoe.parallel.planner.memory import RankMemory, state_memory
from ditmoe.parallel.planner.zero import ZeroSettings, shards


def layout(data: int, expert: int, zero: int, tensor: int = 1) -> Layout:
    return Layout(pipe=1, data=data, expert=expert, tensor=tensor, zero=zero, micro_batch=1, accumulation=1)


def memory(common: int, routed: int, grid: Layout, number_bytes: int = 4) -> RankMemory:
    weights = [Weight(common, routed=False, split=False)]
    weights += [Weight(routed, routed=True, split=True)] if routed else []
    return state_memory(shards(weights, grid, ZeroSettings(persistence_threshold=10)), grid, number_bytes)


def test_parameters_agree_with_the_count() -> None:
    config = ModelConfig(preset="DiT-S/2-8E2A", image_size=32, channels=4, num_classes=1000)
    weights = list(anatomy(config).stage(range(12)))
    assert sum(weight.numel for weight in weights) == count(config).total
    assert sum(weight.numel for weight in weights if weight.routed) == 12 * 8 * 3 * 384 * 4 * 384


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "ema"),
    [
        (0, 4 * 1400, 4 * 1400, 8 * 1400, 4 * 1400),
        (1, 4 * 1400, 4 * 1400, 8 * 450, 4 * 450),  # AdamW steps the network's own weights, as without ZeRO
        (2, 4 * 1400, 4 * 1400, 8 * 450, 4 * 450),  # its one tensor of each kind is kept whole
        (3, 4 * 450, 4 * 450, 12 * 450, 4 * 450),
    ],
)
def test_state_memory(zero: int, weights: int, gradients: int, optimizer: int, ema: int) -> None:
    """1,000 common and 800 routed parameters on 4 data ranks with 2 expert ranks: 400 experts', held twice."""
    found = memory(1000, 800, layout(4, 2, zero))
    assert (found.weights, found.gradients, found.optimizer, found.ema) == (weights, gradients, optimizer, ema)
    assert found.state == weights + gradients + optimizer + ema


def test_gradients_of_zero_2_are_those_of_the_tensors_that_a_part_touches() -> None:
    weights = [Weight(numel, routed=False, split=False) for numel in (10, 30, 20, 20)]
    grid = layout(4, 1, 2)
    (found,) = shards(weights, grid, ZeroSettings())
    assert found.partition == 20 and found.touched == 40  # the first 20 lie in the first two tensors


def test_bf16_halves_weights_and_gradients() -> None:
    found = memory(1000, 0, layout(1, 1, 1), number_bytes=2)
    assert (found.weights, found.gradients, found.optimizer) == (2000, 2000, 12000)


def test_tensor_ranks_share_out_widths() -> None:
    assert memory(1000, 800, layout(1, 1, 0, tensor=2)).weights == 4 * 1400
