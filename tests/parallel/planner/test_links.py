"""What collectives cost, on random layouts and machines, against counting the bytes of every link and card."""

from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise, product
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.model.count import preset_config
from ditmoe.model.dit import DiT
from ditmoe.parallel.layout import GROUPS, Group, Layout
from ditmoe.parallel.planner.estimate import Machine, plan
from ditmoe.parallel.planner.gpus import Gpu
from ditmoe.parallel.planner.ledger import KINDS
from ditmoe.parallel.planner.links import COLLECTIVE_SECONDS, NETWORK_SHARE, link_seconds
from ditmoe.parallel.planner.memory import Workload

CONFIG: Final = preset_config("DiT-S/2-8E2A", 256)
BLOCKS: Final = range(CONFIG.depth)


@st.composite
def layouts(draw: st.DrawFn, pipe: int = 5, tensor: int = 4) -> Layout:
    """Also of numbers that divide no machine."""
    expert, copies = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    return Layout(
        pipe=draw(st.integers(1, pipe)),
        data=expert * copies,
        expert=expert,
        tensor=draw(st.integers(1, tensor)),
        zero=1,
        micro_batch=1,
        accumulation=1,
    )


@st.composite
def gpus(draw: st.DrawFn) -> Gpu:
    bandwidth, node_bandwidth = draw(st.sampled_from([(450, 50), (300, 25), (16, 3), (10, 40)]))
    return Gpu("", "", 100, 10, 80, 3000, bandwidth, node_bandwidth, draw(st.integers(1, 9)))


def members(layout: Layout, group: Group) -> list[list[int]]:
    """All groups of a kind: ranks are counted up in the order of the places on the axes, by hand."""
    places = product(range(layout.pipe), range(layout.expert_copies), range(layout.expert), range(layout.tensor))
    found = defaultdict(list)
    for rank, (stage, copy, expert, tensor) in enumerate(places):
        alike = {
            "pipe": (copy, expert, tensor),
            "data": (stage, tensor),
            "tensor": (stage, copy, expert),
            "expert": (stage, copy, tensor),
            "expert copies": (stage, expert, tensor),
        }
        found[alike[group]].append(rank)
    return list(found.values())


def sends(kind: str, ranks: list[int], payload: float) -> list[tuple[int, int, float]]:
    """(from, to, bytes) of all messages of a collective in a group."""
    number = len(ranks)
    if kind == "all-to-all":
        return [(a, b, payload / number) for a in ranks for b in ranks if a != b]
    if kind == "point-to-point":
        return [(a, b, payload) for a, b in pairwise(ranks)]
    turns = 2 if kind == "all-reduce" else 1
    part = turns * payload * (number - 1) / number
    return [(a, b, part) for a, b in zip(ranks, ranks[1:] + ranks[:1], strict=True)]


def by_counting(kind: str, payload: float, layout: Layout, group: Group, gpu: Gpu) -> float:
    """Seconds until the busiest link or card is done, when all groups of the kind communicate at once."""
    links: Counter[tuple[str, int]] = Counter()
    cards: Counter[tuple[str, int]] = Counter()
    for ranks in members(layout, group):
        if len(ranks) == 1:
            continue
        for source, target, size in sends(kind, ranks, payload):
            if source // gpu.gpus_per_node == target // gpu.gpus_per_node:
                links["out", source] += size
                links["in", target] += size
                continue
            ring = kind not in ("all-to-all", "point-to-point")
            for way, end in (("out", source), ("in", target)):
                # A ring is run as several, one through each member's card; other messages leave by their GPU's.
                machine = [rank for rank in ranks if rank // gpu.gpus_per_node == end // gpu.gpus_per_node]
                for card in machine if ring else [end]:
                    cards[way, card] += size / (len(machine) if ring else 1)
                if kind != "all-to-all":
                    links[way, end] += size  # it passes the GPU's own link as well
    busiest = [max(loads.values(), default=0) for loads in (links, cards)]
    return max(busiest[0] / gpu.bandwidth, busiest[1] / gpu.node_bandwidth) / (NETWORK_SHARE * 1e9)


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), gpu=gpus(), kind=st.sampled_from(KINDS), group=st.sampled_from(GROUPS))
def test_a_collective_costs_what_its_busiest_link_carries(
    layout: Layout, gpu: Gpu, kind: str, group: Group
) -> None:
    expected = by_counting(kind, 1e9, layout, group, gpu)
    assert link_seconds(kind, 1e9, layout, group, gpu) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_the_members_of_groups(layout: Layout) -> None:
    for group in GROUPS:
        found = {rank: ranks for ranks in members(layout, group) for rank in ranks}
        assert {rank: list(layout.members(rank, group)) for rank in range(layout.processes)} == found
    for rank in range(layout.processes):
        assert layout.group(rank, "data") == list(layout.members(rank, "data"))


@cache
def elements(routed: bool) -> int:
    """Of the network's routed experts, or of all else."""
    with torch.device("meta"):
        named = DiT(CONFIG).named_parameters()
    return sum(tensor.numel() for name, tensor in named if (".moe.experts." in name) == routed)


@pytest.mark.parametrize("expert", [1, 2, 4, 8])
@pytest.mark.parametrize("copies", [1, 3, 4, 16])
def test_a_plan_prices_experts_by_the_ranks_that_hold_their_copies(expert: int, copies: int) -> None:
    """With ZeRO 1 gradients are summed in fp32 and weights gathered once a step, nothing of it beside compute."""
    layout = Layout(1, expert * copies, expert, 1, 1, 4, 1)
    gpu = Gpu("", "", 989, 67, 80, 3350, 450, 50, 8)
    found = plan(CONFIG, layout, Workload("bf16", recompute=False), Machine(gpu)).seconds["ZeRO and gradients"]
    numbers: dict[Group, int] = {"data": elements(routed=False)}
    numbers["data" if expert == 1 else "expert copies"] = elements(routed=True) // expert + (
        numbers["data"] if expert == 1 else 0
    )
    crossed = [group for group in numbers if layout.size(group) > 1]
    expected = sum(
        by_counting(kind, size * numbers[group], layout, group, gpu) + COLLECTIVE_SECONDS
        for group in crossed
        for kind, size in {"all-reduce": 4, "all-gather": 2}.items()
    )
    own_sums = 2 * COLLECTIVE_SECONDS if layout.processes > 1 else 0
    assert found == pytest.approx(expected + own_sums, rel=1e-4)  # padding


@pytest.mark.parametrize(("pipe", "neighbours"), [(2, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("data", [3, 8])
def test_a_stage_between_two_others_sends_both_ways(pipe: int, neighbours: int, data: int) -> None:
    layout, gpu = Layout(pipe, data, 1, 1, 1, 4, 6), Gpu("", "", 989, 67, 80, 3350, 450, 50, 8)
    found = plan(CONFIG, layout, Workload("bf16", recompute=False), Machine(gpu)).seconds["between stages"]
    one_way = 2 * layout.micro_batch * (CONFIG.tokens + 1) * CONFIG.hidden
    hop = by_counting("point-to-point", neighbours * one_way, layout, "pipe", gpu)
    assert found == pytest.approx(layout.accumulation * (hop + 4 * COLLECTIVE_SECONDS))


def test_copies_on_all_machines_share_no_card() -> None:
    """Experts dealt over a machine: each group of copies has one rank there, and one rank's share of the cards."""
    gpu = Gpu("", "", 989, 67, 80, 3350, 450, 50, 8)
    layout = Layout(1, 64, 8, 1, 1, 1, 1)
    of_copies = link_seconds("all-gather", 8e9, layout, "expert copies", gpu)
    of_all = link_seconds("all-gather", 8e9, layout, "data", gpu)
    assert of_copies / of_all == pytest.approx(8 * (7 / 8) / (63 / 64))
