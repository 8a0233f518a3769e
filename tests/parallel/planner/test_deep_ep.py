"""What DeepEP sends, against every choice of experts of every rank's tokens, message by message."""

from collections import Counter
from itertools import combinations
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.count import preset_config
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.dry_run import dry_run
from ditmoe.parallel.planner.estimate import Machine, plan
from ditmoe.parallel.planner.gpus import Gpu
from ditmoe.parallel.planner.links import (
    COLLECTIVE_SECONDS,
    NETWORK_SHARE,
    copies_of_token,
    deep_ep_seconds,
    link_seconds,
)
from ditmoe.parallel.planner.memory import Workload
from ditmoe.parallel.planner.traffic import expert_traffic

CONFIG: Final = preset_config("DiT-S/2-16E2A", 256)
BLOCKS: Final = range(CONFIG.depth)


def gpu_of(gpus_per_node: int, bandwidth: float = 450, node_bandwidth: float = 50) -> Gpu:
    return Gpu("", "", 989, 67, 80, 3350, bandwidth, node_bandwidth, gpus_per_node)


def layout_of(expert: int, copies: int = 1) -> Layout:
    return Layout(1, expert * copies, expert, 1, 1, 2, 3)


def by_counting(experts: int, chosen: int, layout: Layout, gpu: Gpu) -> tuple[float, int]:
    """Seconds until the busiest link or card is done where each rank has one token of each choice, of one GB;
    and how many copies of its tokens a rank makes, the one for itself included."""
    links: Counter[tuple[str, int]] = Counter()
    cards: Counter[tuple[str, int]] = Counter()
    copies, held = 0, experts // layout.expert
    groups = {tuple(layout.expert_ranks(rank)) for rank in range(layout.processes)}
    for ranks in groups:
        machines: dict[int, list[int]] = {}
        for rank in ranks:
            machines.setdefault(rank // gpu.gpus_per_node, []).append(rank)
        for source in ranks:
            own = source // gpu.gpus_per_node
            place = machines[own].index(source)
            for choice in combinations(range(experts), chosen):
                wanted = {ranks[expert // held] for expert in choice}
                copies += len(wanted) * (source == 0)
                for machine, here in machines.items():
                    targets = wanted & set(here)
                    if not targets:
                        continue
                    arrives = source
                    if machine != own:
                        arrives = here[place % len(here)]
                        cards["out", source] += 1
                        cards["in", arrives] += 1
                    for target in targets - {arrives}:
                        links["out", arrives] += 1
                        links["in", target] += 1
    busiest = [max(loads.values(), default=0) for loads in (links, cards)]
    return max(busiest[0] / gpu.bandwidth, busiest[1] / gpu.node_bandwidth) / NETWORK_SHARE, copies


@settings(max_examples=60, deadline=None)
@given(
    held=st.integers(1, 3),
    expert=st.integers(1, 6),
    chosen=st.integers(1, 3),
    copies=st.integers(1, 3),
    gpus_per_node=st.integers(1, 6),
    bandwidths=st.sampled_from([(450, 50), (300, 25), (10, 40)]),
)
def test_an_exchange_costs_what_its_busiest_link_carries(
    held: int, expert: int, chosen: int, copies: int, gpus_per_node: int, bandwidths: tuple[float, float]
) -> None:
    """Also where a group lies unevenly on machines."""
    experts, layout, gpu = held * expert, layout_of(expert, copies), gpu_of(gpus_per_node, *bandwidths)
    if chosen > experts:
        chosen = experts
    tokens = len(list(combinations(range(experts), chosen)))
    expected, made = by_counting(experts, chosen, layout, gpu)
    assert deep_ep_seconds(1e9 * tokens, experts, chosen, layout, gpu) == pytest.approx(expected, rel=1e-9)
    assert tokens * copies_of_token(experts, chosen, expert) == pytest.approx(made, rel=1e-9)


@pytest.mark.parametrize("expert", [2, 4, 8, 16])
def test_it_never_sends_more_than_an_all_to_all(expert: int) -> None:
    """And as much where each rank has one expert: then a token goes to as many ranks as to experts."""
    layout, gpu = layout_of(expert), gpu_of(8)
    plain, deep = Workload("bf16", False), Workload("bf16", False, deep_ep=True)
    assignments = CONFIG.tokens * layout.micro_batch * CONFIG.experts_per_token
    rows = layout.accumulation * len(BLOCKS) * 4 * assignments * 2 * CONFIG.hidden
    sent = expert_traffic(CONFIG, layout, BLOCKS, deep)["DeepEP"]
    share = copies_of_token(CONFIG.experts, CONFIG.experts_per_token, expert) / CONFIG.experts_per_token
    assert sent == pytest.approx(rows * share) and share <= 1
    assert (share == pytest.approx(1)) == (expert == CONFIG.experts)
    found = {kind.deep_ep: plan(CONFIG, layout, kind, Machine(gpu)) for kind in (plain, deep)}
    assert found[True].traffic["all-to-all"] == 0 and found[True].traffic["DeepEP"] == sent
    assert found[True].seconds["all-to-all"] < found[False].seconds["all-to-all"]
    one_way = deep_ep_seconds(rows / 2 / 4 / 3 / len(BLOCKS), CONFIG.experts, 2, layout, gpu)
    starts = layout.accumulation * len(BLOCKS) * 5 * COLLECTIVE_SECONDS
    expected = layout.accumulation * len(BLOCKS) * 4 * one_way + starts
    assert found[True].seconds["all-to-all"] == pytest.approx(expected)


def test_between_machines_a_token_is_sent_once_to_each() -> None:
    """16 experts on two machines: an all-to-all sends each of them one row of two, DeepEP at most one a token."""
    layout, gpu = layout_of(16), gpu_of(8, bandwidth=1e9)
    row = 1e9
    both = 1 - (8 * 7) / (16 * 15)  # not both experts on the sender's machine
    assert deep_ep_seconds(row, 16, 2, layout, gpu) == pytest.approx(both * row / (NETWORK_SHARE * 50e9))
    assert link_seconds("all-to-all", 2 * row, layout, "expert", gpu) == pytest.approx(
        row / (NETWORK_SHARE * 50e9)
    )


def test_a_host_that_stops_for_sizes_costs_a_start_in_each_layer_and_pass() -> None:
    layout, gpu = layout_of(4), gpu_of(8)
    for recompute in (False, True):
        stopping, not_stopping = (
            plan(CONFIG, layout, Workload("bf16", recompute, stops_for_sizes=stops), Machine(gpu))
            for stops in (True, False)
        )
        passes = layout.accumulation * len(BLOCKS) * (1 + recompute)
        assert stopping.seconds["all-to-all"] - not_stopping.seconds["all-to-all"] == pytest.approx(
            passes * COLLECTIVE_SECONDS
        )


def test_compute_hides_at_most_itself() -> None:
    found = plan(CONFIG, layout_of(16), Workload("bf16", False), Machine(gpu_of(1, node_bandwidth=1)))
    assert found.seconds["all-to-all"] > found.seconds["compute"] > 0
    assert found.least_seconds == pytest.approx(found.step_seconds - found.seconds["compute"])
    alone = plan(CONFIG, layout_of(1), Workload("bf16", False), Machine(gpu_of(8)))
    assert alone.least_seconds == alone.step_seconds


def test_a_dry_run_has_no_deep_ep() -> None:
    with pytest.raises(UserError, match="comm_backend = deepep: a dry run"):
        dry_run(CONFIG, ObjectiveConfig(), layout_of(2), Workload("bf16", False, deep_ep=True), 0)
