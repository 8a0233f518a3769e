"""Memory of the training state per rank, against sums by hand."""

import pytest

from ditmoe.launcher.dry_run import Parameters, count_parameters, state_memory
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count
from ditmoe.parallel.layout import Layout


def layout(data: int, expert: int, zero: int) -> Layout:
    return Layout(pipe=1, data=data, expert=expert, tensor=1, zero=zero, micro_batch=1, accumulation=1)


def test_parameters_agree_with_the_count() -> None:
    config = ModelConfig(preset="DiT-S/2-8E2A", image_size=32, channels=4, num_classes=1000)
    parameters = count_parameters(config)
    assert parameters.common + parameters.routed == count(config).total
    assert parameters.routed == 12 * 8 * 3 * 384 * 4 * 384


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "ema"),
    [
        (0, 4 * 1400, 4 * 1400, 8 * 1400, 4 * 1400),
        (1, 4 * 1400, 4 * 1400, 12 * 450, 4 * 450),
        (2, 4 * 1400, 4 * 450, 12 * 450, 4 * 450),
        (3, 4 * 450, 4 * 450, 12 * 450, 4 * 450),
    ],
)
def test_state_memory(zero: int, weights: int, gradients: int, optimizer: int, ema: int) -> None:
    """1,000 common and 800 routed parameters on 4 data ranks with 2 expert ranks: 400 experts', held twice."""
    memory = state_memory(Parameters(1000, 800), layout(4, 2, zero), "fp32")
    assert (memory.weights, memory.gradients, memory.optimizer, memory.ema) == (
        weights,
        gradients,
        optimizer,
        ema,
    )
    assert memory.total == weights + gradients + optimizer + ema


def test_bf16_halves_weights_and_gradients() -> None:
    memory = state_memory(Parameters(1000, 0), layout(1, 1, 1), "bf16")
    assert (memory.weights, memory.gradients, memory.optimizer) == (2000, 2000, 12000)
