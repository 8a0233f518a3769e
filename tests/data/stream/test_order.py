"""The order of samples: every source once per epoch, in lanes, at exact ratios, however it is read."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.data.stream.dealing import Dealing, deal
from ditmoe.data.stream.mixture import LONGEST_WINDOW, Mixture, quotas
from ditmoe.data.stream.order import SourceOrder
from ditmoe.model.errors import UserError

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
QUOTAS = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(quota=QUOTAS, lanes=st.integers(1, 12), start=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_every_window_holds_the_ratio_and_numbers_come_in_order(quota: list[int], lanes: int, start: int) -> None:
    mixture = Mixture(quota, lanes)
    positions = np.arange(start, start + 4 * mixture.window)
    source_P, number_P = mixture.split(positions)
    for first in range(3 * mixture.window):
        window = source_P[first : first + mixture.window]
        assert np.bincount(window, minlength=len(quota)).tolist() == quota
    for source in range(len(quota)):
        mine = number_P[source_P == source]
        assert mine.tolist() == list(range(mixture.seen(source, start), mixture.seen(source, start) + len(mine)))


@given(quota=QUOTAS, lanes=st.integers(1, 12), number=st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_lanes_are_counted_in_closed_form(quota: list[int], lanes: int, number: int) -> None:
    mixture = Mixture(quota, lanes)
    positions = np.arange(301 * mixture.window)
    source_P, _ = mixture.split(positions)
    for source in range(len(quota)):
        expected = (positions % lanes)[source_P == source][:number]
        lane, turn = mixture.lane(source, np.arange(number))
        assert lane.tolist() == expected.tolist()
        assert mixture.counts_before(source, number).tolist() == np.bincount(expected, minlength=lanes).tolist()
        assert turn.tolist() == [int((expected[:i] == expected[i]).sum()) for i in range(number)]


@given(
    counts=COUNTS,
    quota=QUOTAS,
    lanes=st.integers(1, 12),
    shuffle=st.integers(1, 10),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_each_sample_comes_once_per_epoch(
    counts: list[int], quota: list[int], lanes: int, shuffle: int, epoch: int, seed: int
) -> None:
    order = SourceOrder(counts, Mixture(quota, lanes), 0, seed, shuffle)
    addresses = order.locate(np.arange(epoch * order.total, (epoch + 1) * order.total))
    assert {address.epoch for address in addresses} == {epoch}
    assert sorted((address.shard, address.member) for address in addresses) == [
        (shard, member) for shard, count in enumerate(counts) for member in range(count)
    ]


@given(counts=COUNTS, lanes=st.integers(1, 12), numbers=st.lists(st.integers(0, 200), max_size=30))
@settings(max_examples=100, deadline=None)
def test_an_address_does_not_depend_on_what_was_asked_before(
    counts: list[int], lanes: int, numbers: list[int]
) -> None:
    mixture = Mixture([1], lanes)
    order = SourceOrder(counts, mixture, 0, 1, 3)
    for number in numbers:
        (address,) = order.locate(np.array([number]))
        assert [address] == SourceOrder(counts, mixture, 0, 1, 3).locate(np.array([number]))


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=9), lanes=st.integers(1, 5), shuffle=st.integers(1, 9)
)
@settings(max_examples=100, deadline=None)
def test_a_lane_needs_the_shards_that_it_announces(counts: list[int], lanes: int, shuffle: int) -> None:
    """So a reader holds at most those of `shuffle` neighbours twice over, and of one more shard, per lane."""
    order = SourceOrder(counts, Mixture([1], lanes), 0, 2, shuffle)
    for address in order.locate(np.arange(order.total)):
        assert address.shard in address.ahead
        assert len(set(address.ahead)) == len(address.ahead)
        inner = sum(sorted(counts)[: max(len(address.ahead) - 2, 0)])  # all but the first and the last lie inside
        assert inner <= 2 * shuffle


@given(counts=COUNTS, lanes=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_stand_ins_reach_every_sample(counts: list[int], lanes: int) -> None:
    order = SourceOrder(counts, Mixture([1], lanes), 0, 0, 4)
    for first in order.locate(np.arange(order.total)):
        shard, found = first, set()
        for _ in counts:
            address = shard
            for _ in range(counts[shard.shard]):
                found.add((address.shard, address.member))
                address = order.instead_of(address, whole_shard=False)
            assert address == shard
            shard = order.instead_of(shard, whole_shard=True)
        assert len(found) == order.total


def test_epochs_seeds_and_sources_differ_and_samples_mix() -> None:
    def sequence(seed: int, source: int, epoch: int) -> list[tuple[int, int]]:
        order = SourceOrder([50] * 8, Mixture([1, 1], 4), source, seed, 64)
        return [(a.shard, a.member) for a in order.locate(np.arange(epoch * 400, (epoch + 1) * 400))]

    first = sequence(0, 0, 0)
    for other in (sequence(0, 0, 1), sequence(1, 0, 0), sequence(0, 1, 0)):
        assert other != first
    assert len({shard for shard, _ in first[:30]}) >= 4


@given(
    lanes=st.integers(1, 48),
    ranks=st.integers(1, 6),
    workers=st.integers(0, 4),
    micro_batch=st.integers(1, 24),
    group=st.integers(1, 24),
    start=st.integers(0, 1000),
)
@settings(max_examples=400, deadline=None)
def test_a_micro_step_is_dealt_whole(
    lanes: int, ranks: int, workers: int, micro_batch: int, group: int, start: int
) -> None:
    dealing = deal(start=start, lanes=lanes, ranks=ranks, workers=workers, micro_batch=micro_batch, group=group)
    steps = 3
    by_rank = [list(islice(dealing.batches(rank), steps)) for rank in range(ranks)]
    for step in range(steps):
        first = start + step * ranks * micro_batch
        dealt = np.concatenate([np.concatenate(by_rank[rank][step]) for rank in range(ranks)])
        assert sorted(dealt.tolist()) == list(range(first, first + ranks * micro_batch))
        for rank in range(ranks):
            rows = np.concatenate(by_rank[rank][step])[dealing.rows()]
            assert rows.tolist() == sorted(rows.tolist()) and len(rows) == micro_batch
            if micro_batch % group == 0:
                groups = (rows - start).reshape(-1, group)
                assert (groups == groups[:, :1] + np.arange(group)).all()


@given(
    readers=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (4, 2), (8, 1)]),
    per_reader=st.integers(1, 4),
    rounds=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_lanes_that_divide_are_read_by_one_process_each(
    readers: tuple[int, int], per_reader: int, rounds: int
) -> None:
    ranks, workers = readers
    lanes = ranks * workers * per_reader
    dealing = deal(
        start=0, lanes=lanes, ranks=ranks, workers=workers, micro_batch=workers * per_reader * rounds, group=1
    )
    assert dealing.readers_per_lane(lanes, workers) == 1


def test_lanes_that_do_not_divide_are_read_by_several() -> None:
    assert Dealing(0, ranks=3, micro_batch=4, chunk=4, parts=1).readers_per_lane(4, workers=1) == 3


@pytest.mark.parametrize(
    "weights, window, expected",
    [
        ([1.0], None, (1,)),
        ([1.0, 5.0], None, (1, 5)),
        ([0.5, 2.5], None, (1, 5)),
        ([0.1, 0.2, 0.7], None, (1, 2, 7)),
        ([1.0, 5.0], 60, (10, 50)),
    ],
)
def test_weights_become_whole_numbers(weights: list[float], window: int | None, expected: tuple[int, ...]) -> None:
    assert quotas(weights, window) == expected


@given(weights=st.lists(st.integers(1, 30).map(lambda n: n / 10), min_size=1, max_size=4))
def test_quotas_are_the_weights(weights: list[float]) -> None:
    chosen = quotas(weights, None)
    exact = [Fraction(repr(weight)) for weight in weights]
    assert [Fraction(count, sum(chosen)) for count in chosen] == [weight / sum(exact) for weight in exact]


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.window = 8 must be a multiple of 6"):
        quotas([1, 5], 8)
    with pytest.raises(UserError, match=f"hold exactly over 1,000,003 samples only.*{LONGEST_WINDOW:,}"):
        quotas([1, 1_000_002], None)


def test_a_source_that_some_lanes_never_see_still_comes_once_per_epoch() -> None:
    """Window 2 and 4 lanes: lanes 0 and 2 read one source, 1 and 3 the other."""
    mixture = Mixture([1, 1], 4)
    order = SourceOrder([5, 5], mixture, 1, 0, 2)
    lane, _ = mixture.lane(1, np.arange(20))
    assert Counter(lane.tolist()) == {1: 10, 3: 10}
    addresses = order.locate(np.arange(10))
    assert len({(address.shard, address.member) for address in addresses}) == 10
