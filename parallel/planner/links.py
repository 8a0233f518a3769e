"""How long a collective takes on the links between GPUs: by where the ranks of its own group lie on machines.

Ranks fill the machines in order. Within a machine a GPU sends at `Gpu.bandwidth`. Each GPU brings its share of its
machine's network cards, `Gpu.node_bandwidth`, and sends through no other: so a group has the shares of its members
there, and the groups that lie side by side on a machine, which all communicate at once, divide the cards among
them. A ring crosses from each machine to the next one, and is as fast as where it crosses with the fewest shares.
All ranks wait for the slowest group of their kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Final

from ditmoe.parallel.layout import Group, Layout
from ditmoe.parallel.planner.gpus import Gpu

NETWORK_SHARE: Final = 0.75
"""Share of the links' bandwidth that collectives reach."""
COLLECTIVE_SECONDS: Final = 3e-5
"""Start of one collective."""


@dataclass(frozen=True)
class Spread:
    """How the ranks of a group lie on machines."""

    members: tuple[int, ...]
    """How many each machine has that has any, in the order of the machines."""

    @property
    def ranks(self) -> int:
        """All of them."""
        return sum(self.members)

    @property
    def machines(self) -> int:
        """Machines that have any of them."""
        return len(self.members)

    @property
    def fewest(self) -> int:
        """Ranks on the machine that has the fewest of them."""
        return min(self.members)

    @property
    def most(self) -> int:
        """Ranks on the machine that has the most of them."""
        return max(self.members)


def spreads(layout: Layout, group: Group, gpus_per_node: int) -> frozenset[Spread]:
    """The ways in which the groups of a kind lie on machines of so many GPUs, each way once."""
    return _spreads(layout.size(group), layout.stride(group), layout.processes, gpus_per_node)


@lru_cache(maxsize=65536)
def _spreads(size: int, stride: int, processes: int, gpus_per_node: int) -> frozenset[Spread]:
    blocks = processes // (size * stride)
    # Groups are one another's translations: those whose first ranks have the same place on a machine lie alike.
    firsts = {
        (block * size * stride + offset) % gpus_per_node
        for block in range(min(blocks, gpus_per_node))
        for offset in range(min(stride, gpus_per_node))
    }
    return frozenset(
        _spread(range(first, first + size * stride, stride), gpus_per_node) for first in sorted(firsts)
    )


def _spread(ranks: range, gpus_per_node: int) -> Spread:
    return Spread(tuple(_members_of_machines(ranks, gpus_per_node)))


def _members_of_machines(ranks: range, gpus_per_node: int) -> Iterator[int]:
    """How many of the ranks each machine has that has any."""
    if ranks.step >= gpus_per_node:
        yield from (1 for _ in ranks)
        return
    for start in range(0, ranks[-1] + 1, gpus_per_node):
        # Members below a rank: the first is below it, and every `step`-th after that.
        below = [max(0, -(-(edge - ranks.start) // ranks.step)) for edge in (start, start + gpus_per_node)]
        found = min(below[1], len(ranks)) - below[0]
        if found > 0:
            yield found


def link_seconds(kind: str, payload: float, layout: Layout, group: Group, gpu: Gpu) -> float:
    """Time that the collectives of a step take on the links, their starts left out.

    Args:
        kind: as in `ditmoe.parallel.planner.ledger.KINDS`.
        payload: bytes that each rank puts into them or gets out of them.
        group: the kind of group that each of them joins.

    Returns:
        The seconds of the slowest group of the kind; 0 for groups of one rank.
    """
    if layout.size(group) == 1:
        return 0.0
    seconds = {
        "all-reduce": lambda spread: _ring(2 * payload, spread, gpu),
        "all-gather": lambda spread: _ring(payload, spread, gpu),
        "reduce-scatter": lambda spread: _ring(payload, spread, gpu),
        "all-to-all": lambda spread: _exchange(payload, spread, gpu),
        "point-to-point": lambda spread: _hop(payload, spread, gpu),
    }[kind]
    return max(map(seconds, spreads(layout, group, gpu.gpus_per_node)))


def _ring(payload: float, spread: Spread, gpu: Gpu) -> float:
    """Every rank sends all parts but one to its neighbour; the group's members on a machine share the crossing."""
    bandwidth = gpu.bandwidth
    if spread.machines > 1:
        bandwidth = min(bandwidth, spread.fewest * gpu.node_bandwidth)
    return payload * (spread.ranks - 1) / spread.ranks / (NETWORK_SHARE * bandwidth * 1e9)


def _exchange(payload: float, spread: Spread, gpu: Gpu) -> float:
    """Every rank has as much for each other one: what stays on the machine and what leaves it go side by side."""
    inside = payload * (spread.most - 1) / spread.ranks / gpu.bandwidth
    outside = payload * (spread.ranks - spread.fewest) / spread.ranks / gpu.node_bandwidth
    return max(inside, outside) / (NETWORK_SHARE * 1e9)


def _hop(payload: float, spread: Spread, gpu: Gpu) -> float:
    """From a rank to its neighbour; the stages go at the pace of those on different machines, if any are."""
    bandwidth = gpu.bandwidth if spread.machines == 1 else min(gpu.bandwidth, gpu.node_bandwidth)
    return payload / (NETWORK_SHARE * bandwidth * 1e9)


def copies_of_token(experts: int, chosen: int, groups: int) -> float:
    """Of so many alike groups of the experts, those that a token goes to: mean, where all choices are as likely.

    Args:
        experts: in all.
        chosen: different ones that a token is sent to.
    """
    held = experts // groups
    return groups * _share_reached(experts, chosen, held)


def _share_reached(experts: int, chosen: int, held: int) -> float:
    """Share of the tokens that go to at least one of `held` of the experts."""
    return 1 - comb(experts - held, chosen) / comb(experts, chosen)


def deep_ep_seconds(row: float, experts: int, chosen: int, layout: Layout, gpu: Gpu) -> float:
    """Time on the links of one exchange by DeepEP, its start left out, where all choices of experts are as likely.

    A token is sent once to each rank that has any of its experts, not once for each expert. To another machine it
    is sent once, to the rank that has the sender's place there, which passes it on to the others that want it.
    Results come back the same way: what a machine's ranks give a token is summed there before it leaves.

    Args:
        row: bytes of all tokens of a rank, each once.
        experts: in all, of which each rank of an expert group holds as many.
        chosen: different ones that each token is sent to.
    """
    if layout.expert == 1:
        return 0.0
    held = experts // layout.expert
    ways = spreads(layout, "expert", gpu.gpus_per_node)
    return max(row * _deep_ep(spread, experts, chosen, held, gpu) for spread in ways) / (NETWORK_SHARE * 1e9)


def _deep_ep(spread: Spread, experts: int, chosen: int, held: int, gpu: Gpu) -> float:
    """Time for each byte of a row, at the full bandwidth: of the busiest link or card, in either direction."""
    by_rank = _share_reached(experts, chosen, held)
    by_machine = [_share_reached(experts, chosen, held * count) for count in spread.members]
    slowest = 0.0
    for machine, count in enumerate(spread.members):
        others = [number for number in range(spread.machines) if number != machine]
        strangers = sum(spread.members[number] for number in others)
        for place in range(count):
            # Ranks of other machines whose tokens come in here.
            senders = sum(len(range(place, spread.members[number], count)) for number in others)
            link_out = (count - 1) * by_rank * (1 + senders)
            link_in = by_rank * (count - 1 + strangers - senders)
            card_out = sum(by_machine[number] for number in others)
            card_in = senders * by_machine[machine]
            link, card = max(link_out, link_in), max(card_out, card_in)
            slowest = max(slowest, link / gpu.bandwidth, card / gpu.node_bandwidth)
    return slowest
