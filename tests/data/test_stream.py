"""The order of samples: once per epoch, and the same for every layout, worker count and start."""

import multiprocessing
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.data.config import DataConfig
from ditmoe.data.index import load_index
from ditmoe.data.order import EpochOrder
from ditmoe.data.stream import Batch, open_stream

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(counts=COUNTS, seed=st.integers(0, 5), width=st.integers(1, 10), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_each_sample_comes_once_per_epoch(counts: list[int], seed: int, width: int, epoch: int) -> None:
    order = EpochOrder(counts, seed, width)
    places = [order.locate(epoch * order.total + offset) for offset in range(order.total)]
    assert {place.epoch for place in places} == {epoch}
    assert sorted((place.shard, place.member) for place in places) == [
        (shard, member) for shard, count in enumerate(counts) for member in range(count)
    ]


@given(counts=COUNTS, width=st.integers(1, 10), positions=st.lists(st.integers(0, 200), max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_place_does_not_depend_on_what_was_asked_before(
    counts: list[int], width: int, positions: list[int]
) -> None:
    order = EpochOrder(counts, 1, width)
    asked = {position: order.locate(position) for position in positions}
    for position, place in asked.items():
        assert EpochOrder(counts, 1, width).locate(position) == place


@given(counts=COUNTS, width=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_only_one_windows_shards_are_needed_at_a_time(counts: list[int], width: int) -> None:
    order = EpochOrder(counts, 2, width)
    shards = [order.locate(position).shard for position in range(order.total)]
    changes = [s for i, s in enumerate(shards) if s not in shards[:i]]  # shards by first use
    for number, shard in enumerate(changes):
        last_use = len(shards) - 1 - shards[::-1].index(shard)
        begun_by_then = len(set(shards[: last_use + 1]))
        assert begun_by_then <= (number // width + 1) * width


def test_epochs_and_seeds_differ_and_samples_mix() -> None:
    order = EpochOrder([50] * 8, 0, 4)
    first, second = ([order.locate(epoch * 400 + offset)[1:] for offset in range(400)] for epoch in (0, 1))
    other = EpochOrder([50] * 8, 1, 4)
    assert first != second and first != [other.locate(offset)[1:] for offset in range(400)]
    assert len({shard for shard, _ in first[:30]}) == 4


def batches_of(folder: Path, ranks: int, micro_batch: int, **settings_: object) -> list[Batch]:
    """All ranks' batches of the first 120 positions from `start`, in the order of positions."""
    start = int(str(settings_.pop("start", 0)))
    config = DataConfig.model_validate({"sources": [{"path": str(folder)}], **settings_})
    streams = [
        open_stream(config, 7, start=start, micro_batch=micro_batch, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    steps = 120 // (ranks * micro_batch)
    return [batch for step in zip(*(islice(s, steps) for s in streams), strict=True) for batch in step]


def flat(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[int], list[str]]:
    return (
        torch.cat([batch.image_BCHW for batch in batches]),
        torch.cat([batch.label_B for batch in batches]),
        [position for batch in batches for position in batch.position_B],
        [key for batch in batches for key in batch.keys],
    )


@pytest.mark.parametrize(
    "ranks, micro_batch, workers, start",
    [(1, 120, 0, 0), (1, 10, 1, 0), (2, 6, 0, 0), (4, 5, 2, 0), (3, 4, 2, 0), (2, 5, 0, 37), (1, 8, 2, 240)],
)
def test_one_sequence_for_every_layout(
    shapes: Path, ranks: int, micro_batch: int, workers: int, start: int
) -> None:
    """30 samples, so 120 positions are four epochs."""
    reference = flat(batches_of(shapes, 1, 1, workers=0, flip=True, shuffle_shards=2, start=start))
    found = flat(batches_of(shapes, ranks, micro_batch, workers=workers, flip=True, shuffle_shards=2, start=start))
    assert found[2] == list(range(start, start + 120)) == reference[2]
    assert found[3] == reference[3]
    assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])


def test_a_batch_holds_what_it_says(shapes: Path) -> None:
    (batch,) = batches_of(shapes, 1, 120, workers=0)
    assert batch.image_BCHW.shape == (120, 3, 16, 16) and batch.image_BCHW.dtype == torch.uint8
    assert batch.label_B.shape == (120,) and batch.label_B.dtype == torch.int64
    assert set(Counter(batch.keys).values()) == {4}
    assert all(key.startswith("shapes-0000") for key in batch.keys)
    for key, label in zip(batch.keys, batch.label_B.tolist(), strict=True):
        assert int(key.split("/")[1]) % 5 == label


def test_flips_are_a_coin_of_the_position(shapes: Path) -> None:
    plain = flat(batches_of(shapes, 1, 10, workers=0))
    flipped = flat(batches_of(shapes, 1, 10, workers=0, flip=True))
    assert plain[3] == flipped[3]
    same = [torch.equal(a, b) for a, b in zip(plain[0], flipped[0], strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 40 < sum(mirrored) < 80


def test_the_global_generator_is_left_alone(shapes: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches_of(shapes, 1, 10, workers=1)
    assert torch.equal(torch.rand(3), expected)


def test_workers_outlive_the_signals_that_ask_a_run_to_stop(shapes: Path) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process, and the run still has a step to end."""
    config = DataConfig.model_validate({"sources": [{"path": str(shapes)}], "workers": 2})
    stream = open_stream(config, 0, start=0, micro_batch=2, rank=0, ranks=1)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    pids = " ".join(str(worker.pid) for worker in workers)
    subprocess.run(f"kill -INT {pids}; kill -TERM {pids}", shell=True, check=True)
    assert [batch.position_B[0] for batch in islice(stream, 40)] == list(range(2, 82, 2))
    assert all(worker.is_alive() for worker in workers)
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_program_that_ends_without_closing_its_stream_ends(shapes: Path) -> None:
    code = (
        "from ditmoe.data.config import DataConfig\n"
        "from ditmoe.data.stream import open_stream\n"
        f"config = DataConfig.model_validate({{'sources': [{{'path': {str(shapes)!r}}}], 'workers': 2}})\n"
        "stream = open_stream(config, 0, start=0, micro_batch=2, rank=0, ranks=1)\n"
        "print(len(next(stream).keys))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", "")


def test_one_shard_open_is_enough(shapes: Path) -> None:
    one = flat(batches_of(shapes, 1, 10, workers=0, shuffle_shards=1))
    for epoch in range(4):
        keys = one[3][epoch * 30 : epoch * 30 + 30]
        assert len(set(keys)) == 30
        assert len({key.split("/")[0] for key in keys[:10]}) == 1
    assert load_index(shapes).total == 30
