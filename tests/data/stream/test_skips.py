"""Samples that cannot be used, under the policy `skip`: nothing moves, and everything is told."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.samples import Skip
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream
from ditmoe.model.errors import UserError

EPOCHS = 3


def config_of(folder: Path, workers: int = 0, **source: object) -> DataConfig:
    values = {"path": str(folder), "on_error": "skip", **source}
    return DataConfig.model_validate({"sources": [values], "workers": workers, "lanes": 4, "shuffle": 8})


def stream_of(config: DataConfig, ranks: int = 1) -> tuple[list[Batch], dict[int, tuple[str, torch.Tensor]]]:
    """Three epochs of 100 samples: the batches, and key and image by position."""
    dealing = dealing_of(config, start=0, micro_batch=10, ranks=ranks)
    batches = []
    for rank in range(ranks):
        stream = open_stream(open_dataset(config, 3), dealing, rank)
        batches += list(islice(stream, EPOCHS * 10 // ranks))
        stream.close()
    return batches, {
        position: (key, image)
        for batch in batches
        for position, key, image in zip(batch.position_B, batch.keys, batch.image_BCHW, strict=True)
    }


def skips_of(batches: list[Batch]) -> list[Skip]:
    return sorted(skip for batch in batches for skip in batch.skips)


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 3), (2, 2), (3, 0)])
def test_a_bad_sample_keeps_its_place_and_moves_no_other(
    digits: Path, rewrite: Callable[..., str], ranks: int, workers: int
) -> None:
    _, whole = stream_of(config_of(digits))
    bad = [
        f"digits-0000{shard}.tar/{rewrite(digits, shard, sample, lambda m: {**m, 'png': b'no picture'})}"
        for shard, sample in ((1, 3), (1, 4), (2, 24))
    ]
    batches, found = stream_of(config_of(digits, workers), ranks)
    assert sorted(found) == list(range(EPOCHS * 100))
    for position, (key, image) in whole.items():
        if key in bad:
            assert found[position][0] not in bad and found[position][0].split("/")[0] == key.split("/")[0]
        else:
            assert found[position][0] == key and torch.equal(found[position][1], image)
    skips = skips_of(batches)
    # The first of two neighbours is replaced by the sample after the second, which is tried and skipped too.
    expected = [key for position in sorted(whole) if (key := whole[position][0]) in bad]
    expected_twice = [each for key in expected for each in ([key, bad[1]] if key == bad[0] else [key])]
    assert [skip.where.removeprefix(f"{digits}/").replace(", sample ", "/") for skip in skips] == expected_twice
    assert all(skip.reason.startswith("not a readable PNG image") for skip in skips)
    assert {skip.epoch for skip in skips} == set(range(EPOCHS))


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 1)])
def test_a_shard_that_vanished_keeps_its_places_and_moves_no_other(digits: Path, ranks: int, workers: int) -> None:
    _, whole = stream_of(config_of(digits))
    (digits / "digits-00002.tar").unlink()
    batches, found = stream_of(config_of(digits, workers), ranks)
    replaced = {position for position, (key, _) in whole.items() if key.startswith("digits-00002")}
    assert len(replaced) == EPOCHS * 25
    for position, (key, _) in whole.items():
        assert (found[position][0] == key) == (position not in replaced)
    stand_ins = [found[position][0] for position in sorted(replaced)]
    assert len(set(stand_ins[:25])) == 25  # not one sample over and over
    skips = skips_of(batches)
    assert {skip.position for skip in skips} == replaced and len(skips) == len(replaced)
    assert all(skip.where == str(digits / "digits-00002.tar") for skip in skips)


def test_a_source_of_nothing_usable_stops(digits: Path) -> None:
    for path in digits.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"neither could any of 1000 others in its place be used"):
        stream_of(config_of(digits))


def test_stopping_is_the_default(digits: Path, rewrite: Callable[..., str]) -> None:
    key = rewrite(digits, 1, 3, lambda m: {**m, "png": b"no picture"})
    with pytest.raises(
        UserError, match=rf"digits-00001.tar, sample {key}: not a readable PNG image.*on_error=skip leaves"
    ):
        stream_of(config_of(digits, on_error="stop"))
