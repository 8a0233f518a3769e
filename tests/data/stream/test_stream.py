"""The stream: the same samples in the same order for every layout, worker count, and start."""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import Dataset, open_dataset
from ditmoe.data.stream.dealing import Dealing, deal
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream


def read(dataset: Dataset, dealing: Dealing, rank: int, steps: int) -> list[Batch]:
    stream = open_stream(dataset, dealing, rank)
    batches = list(islice(stream, steps))
    stream.close()
    return batches


def batches_of(folder: Path, ranks: int, micro_batch: int, start: int = 0, **settings_: object) -> list[Batch]:
    """All ranks' batches of the first 120 positions from `start`, step after step."""
    dataset = open_dataset(DataConfig.model_validate({"sources": [{"path": str(folder)}], **settings_}), 7)
    dealing = dealing_of(dataset.config, start=start, micro_batch=micro_batch, ranks=ranks)
    steps = 120 // (ranks * micro_batch)
    by_rank = [read(dataset, dealing, rank, steps) for rank in range(ranks)]
    return [batch for step in zip(*by_rank, strict=True) for batch in step]


def flat(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[int], list[str]]:
    """All samples by position."""
    image_NCHW = torch.cat([batch.image_BCHW for batch in batches])
    label_N = torch.cat([batch.label_B for batch in batches])
    positions = [position for batch in batches for position in batch.position_B]
    keys = [key for batch in batches for key in batch.keys]
    order = sorted(range(len(positions)), key=positions.__getitem__)
    return image_NCHW[order], label_N[order], [positions[row] for row in order], [keys[row] for row in order]


class Part(NamedTuple):
    """A stretch of a run between two starts, on a layout of its own."""

    ranks: int
    workers: int
    micro_batch: int
    steps: int


PARTS = st.builds(Part, st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.integers(0, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six small datasets with shards of various sizes."""
    made = []
    for number, (count, samples) in enumerate([(3, 9), (7, 3), (10, 4), (13, 1), (20, 20), (26, 5)]):
        folder = tmp_path_factory.mktemp("folders") / str(number)
        source = Shapes(count, 3, 8, seed=number)
        source.name = f"source-{number}"
        pack(source, folder, PackSettings(format="npy", limits=ShardLimits(samples=samples)))
        made.append(folder)
    return made


class History(NamedTuple):
    """A mixture, how it is read, and what a run does between its starts."""

    chosen: list[int]
    weights: list[int]
    lanes: int
    shuffle: int
    seed: int
    flip: bool
    parts: list[Part]


HISTORIES = st.builds(
    History,
    chosen=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    lanes=st.integers(1, 9),
    shuffle=st.integers(1, 12),
    seed=st.integers(0, 3),
    flip=st.booleans(),
    parts=st.lists(PARTS, min_size=1, max_size=4),
)


@given(history=HISTORIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_run_that_is_killed_and_changed_reads_what_one_process_reads(
    folders: list[Path], history: History
) -> None:
    """Ranks, workers and micro-batch change at every start; what is read beyond the last full step is lost.

    The workers' parts are read here, one after the other; `test_one_sequence_for_every_layout` forks them.
    """
    check_history(folders, history)


@pytest.mark.slow
@given(history=HISTORIES)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_thousand_runs_that_are_killed_and_changed(folders: list[Path], history: History) -> None:
    check_history(folders, history)


def check_history(folders: list[Path], history: History) -> None:
    sources = [
        {"path": str(folders[number]), "weight": weight}
        for number, weight in zip(history.chosen, history.weights, strict=False)
    ]
    lanes, seed = history.lanes, history.seed
    values = {"sources": sources, "lanes": lanes, "shuffle": history.shuffle, "flip": history.flip, "workers": 0}
    config = DataConfig.model_validate(values)
    found: dict[int, tuple[str, int, bytes]] = {}
    position = 0
    for part in history.parts:
        dataset = open_dataset(config, seed)  # anew, as after a kill
        dealing = deal(
            start=position,
            lanes=lanes,
            ranks=part.ranks,
            workers=part.workers,
            micro_batch=part.micro_batch,
            group=1,
        )
        for rank in range(part.ranks):
            for batch in read(dataset, dealing, rank, part.steps):
                for row, key in enumerate(batch.keys):
                    assert batch.position_B[row] not in found
                    label, image = int(batch.label_B[row]), batch.image_BCHW[row].numpy().tobytes()
                    found[batch.position_B[row]] = (key, label, image)
        position += part.steps * part.ranks * part.micro_batch
    assert sorted(found) == list(range(position))
    dataset = open_dataset(config, seed)
    alone = deal(start=0, lanes=lanes, ranks=1, workers=0, micro_batch=max(position, 1), group=1)
    if position:
        (batch,) = read(dataset, alone, 0, 1)
        assert batch.keys == [found[each][0] for each in range(position)]
        assert batch.label_B.tolist() == [found[each][1] for each in range(position)]
        images = [image.numpy().tobytes() for image in batch.image_BCHW]
        assert images == [found[each][2] for each in range(position)]
        check_epochs(dataset, position, batch.keys)


def check_epochs(dataset: Dataset, position: int, keys: list[str]) -> None:
    """Every epoch of every source that is over has each of its samples exactly once."""
    source_P, _ = dataset.mixture.split(np.arange(position))
    for number, source in enumerate(dataset.sources):
        mine = [key for key, of in zip(keys, source_P.tolist(), strict=True) if of == number]
        assert dataset.progress(position)[source.name].images == len(mine)
        for epoch in range(len(mine) // source.total):
            seen = mine[epoch * source.total : (epoch + 1) * source.total]
            assert len(set(seen)) == source.total and len({key.split("-")[1] for key in seen}) == 1


@pytest.mark.parametrize(
    "ranks, micro_batch, workers, lanes, start",
    [
        (1, 120, 0, 1, 0),
        (1, 10, 1, 64, 0),
        (2, 6, 0, 4, 0),
        (4, 5, 2, 8, 0),
        (2, 6, 3, 6, 0),
        (3, 4, 2, 12, 0),
        (2, 5, 0, 3, 37),
        (1, 8, 2, 16, 240),
    ],
)
def test_one_sequence_for_every_layout(
    shapes: Path, ranks: int, micro_batch: int, workers: int, lanes: int, start: int
) -> None:
    """30 samples, so 120 positions are four epochs."""
    order = {"flip": True, "shuffle": 4, "lanes": lanes, "start": start}
    reference = flat(batches_of(shapes, 1, 1, workers=0, **order))  # type: ignore[arg-type]
    found = flat(batches_of(shapes, ranks, micro_batch, workers=workers, **order))  # type: ignore[arg-type]
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
    dataset = open_dataset(config, 0)
    stream = open_stream(dataset, dealing_of(config, start=0, micro_batch=2, ranks=1))
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
        "from ditmoe.data.stream.config import DataConfig\n"
        "from ditmoe.data.stream.dataset import open_dataset\n"
        "from ditmoe.data.stream.stream import dealing_of, open_stream\n"
        f"config = DataConfig.model_validate({{'sources': [{{'path': {str(shapes)!r}}}], 'workers': 2}})\n"
        "dealing = dealing_of(config, start=0, micro_batch=2, ranks=1)\n"
        "stream = open_stream(open_dataset(config, 0), dealing)\n"
        "print(len(next(stream).keys))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", "")


def test_streams_that_are_left_unfinished_keep_no_file_open(folders: list[Path]) -> None:
    def opened() -> list[str]:
        places = (os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if _is_open(each))
        return [place for place in places if place.startswith(str(folders[0]))]

    config = DataConfig.model_validate({"sources": [{"path": str(folders[0])}], "lanes": 4, "workers": 0})
    dealing = deal(start=0, lanes=4, ranks=1, workers=0, micro_batch=2, group=1)
    gc.collect()
    before = len(opened())
    read(open_dataset(config, 0), dealing, 0, 1)
    gc.collect()
    assert len(opened()) == before


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
