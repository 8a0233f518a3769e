"""The planner's memory of a start: against real processes, and by what it must hold on any layout."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.start_memory import CASES, Case, measure
from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.anatomy import anatomy
from ditmoe.parallel.planner.estimate import Machine, fullest_stage
from ditmoe.parallel.planner.gpus import GPUS
from ditmoe.parallel.planner.memory import RankMemory, Workload, start_of_stage
from ditmoe.parallel.planner.zero import shards

NETWORK = ModelConfig(preset="DiT-S/2-8E2A", image_size=32, channels=4, num_classes=1000)
EVERY = range(NETWORK.depth)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_starts_hold_what_is_planned(case: Case) -> None:
    """Within 10% of the most private pages of any rank: fresh, resumed, and with a copy of a first checkpoint."""
    found = {figure.start: figure.planned / figure.measured for figure in measure(case)}
    assert all(0.9 <= ratio <= 1.1 for ratio in found.values()), found


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 3),
    st.sampled_from(["fp32", "bf16"]),
)
def test_a_start_holds_at_least_the_state_and_each_group_by_its_own_ranks(
    copies: int, expert: int, zero: int, precision: str
) -> None:
    layout = Layout(1, copies * expert, expert, 1, zero, 1, 1)
    workload = Workload(precision, False)
    parts = shards(anatomy(NETWORK).stage(EVERY), layout, workload.zero)
    assert {part.group: part.replicas for part in parts} == {
        "data": layout.data,
        **({"expert copies": copies} if expert > 1 else {}),
    }
    _, memory = fullest_stage(NETWORK, layout, workload)
    state = memory.weights + memory.optimizer + memory.ema
    device = start_of_stage(NETWORK, layout, EVERY, workload, on_cpu=False)
    assert state <= memory.start and device.device <= memory.start
    assert memory.start < 2.6 * (state + memory.gradients), "never several copies of the whole stage"
    cpu = start_of_stage(NETWORK, layout, EVERY, workload, on_cpu=True)
    assert cpu.kept <= cpu.host and device.device <= cpu.host
    # With twice the ranks, no rank starts with more, but for what it must know of the others' files.
    twice = start_of_stage(
        NETWORK, Layout(1, 2 * copies * expert, expert, 1, zero, 1, 1), EVERY, workload, on_cpu=False
    )
    assert twice.device <= 1.001 * device.device


def test_the_verdict_counts_the_start() -> None:
    """A GPU that holds every step but not the start does not fit."""
    size = round(Machine.USABLE * GPUS["h100"].memory_gib * 2**30)
    steps = RankMemory(1, 1, 1, 1, peak=size, start=size)
    assert Machine(GPUS["h100"]).fits(steps)
    assert not Machine(GPUS["h100"]).fits(RankMemory(1, 1, 1, 1, peak=size, start=size + 1))


def test_16_5_billion_parameters_start_in_what_is_left_of_them() -> None:
    """Under ZeRO 3 no rank materialises its stage; of 1,024 ranks' files each gets to know all boxes."""
    large = ModelConfig(preset="DiT-G/2-16E2A", image_size=64, channels=4, num_classes=1000)
    layout, workload = Layout(1, 128, 16, 1, 3, 8, 1), Workload("bf16", False)
    _, memory = fullest_stage(large, layout, workload)
    assert memory.start < 4 * 2**30 < 0.25 * memory.peak
    more = start_of_stage(large, Layout(1, 1024, 16, 1, 3, 1, 1), range(large.depth), workload, on_cpu=False)
    assert 200e6 < more.host < 600e6  # 883,123 boxes were counted
