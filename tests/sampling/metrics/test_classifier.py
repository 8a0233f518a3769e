"""The classifiers that an evaluation trains: good on real digits, kept, and independent of each other."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditmoe.data.crew.making import by_ranks
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.model.errors import UserError
from ditmoe.sampling.metrics.classifier import (
    FEATURE_CLASSIFIER,
    RECOGNISER,
    Classifier,
    ClassifierSettings,
    PlainClassifier,
    ResidualClassifier,
    _Cells,
)
from ditmoe.sampling.metrics.features import describe
from ditmoe.sampling.metrics.quality import class_means
from ditmoe.sampling.metrics.real_statistics import real_statistics
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.metrics.training.classifier import HELD_OUT, Trainings, load_classifier, state_file
from ditmoe.sampling.metrics.training.state import TrainingState
from tests.sampling.small_run import images_of

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ReferenceImages:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack(open_source("digits", seed=0), folder, PackSettings(limits=ShardLimits(samples=500)))
    return images_of(folder)


def test_real_images_come_once_each_in_order(digits: ReferenceImages) -> None:
    batches = list(digits.read_all(100))
    numbers = np.concatenate([batch.number_N for batch in batches])
    assert numbers.tolist() == list(range(1797)) and digits.count == 1797
    assert digits.parts == 4
    assert batches[0].image_NHWC.shape == (100, 8, 8, 1) and batches[0].image_NHWC.dtype == np.uint8
    labels = np.concatenate([batch.label_N for batch in batches])
    assert np.bincount(labels).min() > 170


def test_a_truncated_shard_is_named(digits: ReferenceImages, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(digits.where).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = sorted(folder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:20_000])
    with pytest.raises(UserError, match=shard.name):
        images_of(folder)


def test_recogniser_is_good_on_held_out_digits_and_kept(digits: ReferenceImages, tmp_path: Path) -> None:
    lines: list[str] = []
    recogniser = load_classifier(RECOGNISER, digits, tmp_path, CPU, lines.append)
    assert recogniser.held_out_images == round(1797 * HELD_OUT)
    assert recogniser.held_out_accuracy >= 0.98
    batch = next(digits.read_all(500))
    assert recogniser.recognise(batch.image_NHWC, batch.label_N) >= 0.98
    assert recogniser.recognise(batch.image_NHWC, (batch.label_N + 1) % 10) < 0.05
    assert len(lines) == 2
    again = load_classifier(RECOGNISER, digits, tmp_path, CPU, lines.append)
    assert len(lines) == 2 and again.fingerprint == recogniser.fingerprint
    assert again.held_out_accuracy == recogniser.held_out_accuracy


def test_a_damaged_classifier_is_trained_anew(digits: ReferenceImages, tmp_path: Path) -> None:
    settings = replace(FEATURE_CLASSIFIER, passes=0.2)
    whole = load_classifier(settings, digits, tmp_path, CPU).fingerprint
    stored = next(tmp_path.glob("*.safetensors"))
    content = stored.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1  # a weight, which nothing else would notice
    for damaged in (content[:1000], b"", bytes(flipped)):
        stored.write_bytes(damaged)
        assert load_classifier(settings, digits, tmp_path, CPU).fingerprint == whole
        assert stored.read_bytes() == content


@pytest.mark.parametrize("settings", [FEATURE_CLASSIFIER, RECOGNISER])
def test_what_is_kept_does_not_tell_who_made_it(
    digits: ReferenceImages, tmp_path: Path, settings: ClassifierSettings
) -> None:
    """Neither the threads that the process has, nor how many share the work, nor the size of the batches."""
    settings = replace(settings, passes=0.5)
    before = torch.get_num_threads()
    kept: list[dict[str, bytes]] = []
    try:
        for threads, ranks in ((1, 1), (2, 1), (3, 2)):
            torch.set_num_threads(threads)
            cache = tmp_path / f"{threads}-{ranks}"
            network = load_classifier(settings, digits, cache, CPU)
            workers = [
                FORK.Process(
                    target=real_statistics, args=(digits, network, cache), kwargs=dict(make=by_ranks(rank, ranks))
                )
                for rank in range(ranks)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
                assert worker.exitcode == 0
            class_means(network, digits, cache)
            real_statistics(digits, network, cache).floors()
            assert torch.get_num_threads() == threads
            files = [path for path in cache.rglob("*") if path.is_file()]
            kept.append({str(path.relative_to(cache)): path.read_bytes() for path in files})
    finally:
        torch.set_num_threads(before)
    assert len(kept[0]) == 1 + 2 * digits.parts + 1
    assert kept[0].keys() == kept[1].keys() == kept[2].keys()
    for name in kept[0]:
        assert kept[0][name] == kept[1][name] == kept[2][name], name


def test_features_do_not_depend_on_the_images_beside(digits: ReferenceImages, tmp_path: Path) -> None:
    network = load_classifier(replace(FEATURE_CLASSIFIER, passes=0.1), digits, tmp_path, CPU)
    image_NHWC = next(digits.read_all(200)).image_NHWC
    whole_NF = describe(network, image_NHWC)["features"]
    for size in (1, 7, 64, 100):
        parts = [describe(network, image_NHWC[i : i + size])["features"] for i in range(0, 200, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole_NF)


@pytest.mark.parametrize(("size", "cells"), [(8, 2), (5, 2), (1, 2), (7, 4), (2, 4), (16, 4)])
def test_cells_are_adaptive_average_pooling(size: int, cells: int) -> None:
    x = torch.randn(3, 5, size, size + 1)
    torch.testing.assert_close(_Cells(cells)(x), torch.nn.functional.adaptive_avg_pool2d(x, cells))


def test_training_is_a_function_of_its_settings(digits: ReferenceImages, tmp_path: Path) -> None:
    def train(folder: str, seed: int) -> Classifier:
        settings = replace(FEATURE_CLASSIFIER, passes=1, seed=seed)
        return load_classifier(settings, digits, tmp_path / folder, CPU)

    a, b, c = train("a", 1), train("b", 1), train("a", 2)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    features = a.features(next(digits.read_all(7)).image_NHWC)["features"]
    assert features.shape == (7, FEATURE_CLASSIFIER.dimension) and a.dimension == FEATURE_CLASSIFIER.dimension


def test_the_recogniser_is_not_the_feature_network() -> None:
    assert FEATURE_CLASSIFIER.architecture != RECOGNISER.architecture
    assert FEATURE_CLASSIFIER.seed != RECOGNISER.seed  # the split is drawn by the seed


@pytest.mark.parametrize("make", [PlainClassifier, ResidualClassifier])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (5, 2), (28, 1), (33, 3), (64, 3)])
def test_classifiers_take_any_size_and_channels(make: type, size: int, channels: int) -> None:
    network = make(size, channels, 7, 16).eval()
    features, scores = network(torch.randn(2, channels, size, size))
    assert features.shape == (2, 16) and scores.shape == (2, 7)


@pytest.fixture
def kept_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe.sampling.metrics.training.state.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ditmoe.sampling.metrics.training.state.KEEP_SHARE", 0)


@pytest.mark.usefixtures("kept_at_each_step")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupted_trainings_go_on_and_end_with_the_same_bits(
    digits: ReferenceImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """One after the other, and both at once in threads of their own; each start does a few steps more."""
    both = [replace(FEATURE_CLASSIFIER, passes=0.2), replace(RECOGNISER, passes=0.2)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for settings in both:
        load_classifier(settings, digits, whole, CPU)
    written = 0

    def interrupted_now_and_then(self: TrainingState, *arguments: Any) -> None:
        nonlocal written
        keep(self, *arguments)
        written += 1
        if written % 3 == 0:
            raise KeyboardInterrupt

    keep, before, starts = TrainingState.keep, torch.get_num_threads(), 0
    monkeypatch.setattr(TrainingState, "keep", interrupted_now_and_then)
    try:
        torch.set_num_threads(threads)
        while starts < 20:
            starts += 1
            trainings = Trainings(digits, both, cut, CPU)
            try:
                for settings in both:
                    load_classifier(settings, digits, cut, CPU, trainings=trainings)
                break
            except KeyboardInterrupt:
                continue
    finally:
        torch.set_num_threads(before)
    assert 3 <= starts < 20
    names = sorted(path.name for path in whole.glob("classifier-*"))
    assert len(names) == 2 and sorted(path.name for path in cut.glob("classifier-*")) == names
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("kept_at_each_step")
def test_a_state_that_is_damaged_or_of_another_training_is_passed_over(
    digits: ReferenceImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FEATURE_CLASSIFIER, passes=0.1)
    whole = load_classifier(settings, digits, tmp_path, CPU).fingerprint
    state = state_file(settings, digits, tmp_path, CPU)
    assert not state.exists()
    other = replace(settings, seed=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ditmoe.sampling.metrics.training.classifier._accuracy", interrupted)
        load_classifier(other, digits, tmp_path, CPU)
    kept = state_file(other, digits, tmp_path, CPU).read_bytes()
    for content, word in ((kept, ""), (kept[:-10], "begins anew"), (b"", "begins anew")):
        state.write_bytes(content)
        state.with_suffix(".safetensors").unlink()
        lines: list[str] = []
        assert load_classifier(settings, digits, tmp_path, CPU, lines.append).fingerprint == whole
        assert any(word in line for line in lines) and not any("goes on" in line for line in lines)
        assert not state.exists()


def interrupted(*_: object) -> float:
    raise KeyboardInterrupt
