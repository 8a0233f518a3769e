"""Precision and recall in blocks against all distances at once, and the memory that they take."""

import multiprocessing
import resource

import numpy as np
import pytest
import torch

from ditmoe.sampling.metrics.neighbours import (
    LARGEST,
    Manifold,
    peak_bytes,
    precision_recall,
)
from tests.sampling.metrics.test_moments import random_features


def of_sets(real: np.ndarray, drawn: np.ndarray, k: int = 3, block: int = 1024) -> tuple[float, float]:
    manifolds = [Manifold.of(each, k, block=block) for each in (real, drawn)]
    inside = precision_recall(manifolds[0], manifolds[1], block=block)
    return inside.precision, inside.recall


def by_brute_force(real: np.ndarray, drawn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which drawn points are in the manifold of the real ones, and the other way round."""
    real, drawn = real.astype(np.float64), drawn.astype(np.float64)

    def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([np.square(row - y).sum(1) for row in x])

    radii = [np.sort(squared(each, each), axis=1)[:, k] for each in (real, drawn)]
    between = squared(drawn, real)
    return (between <= radii[0]).any(1), (radii[1] >= between.T).any(1)


FORK = multiprocessing.get_context("fork")
SETS = {
    "near": (random_features(300, 6, 1), random_features(257, 6, 2)),
    "float32, many features": tuple(
        random_features(150, 128, seed, shift=30.0).astype(np.float32) for seed in (3, 4)
    ),
    "far from zero": (random_features(200, 3, 5, shift=1e5), random_features(220, 3, 6, shift=1e5)),
    "on a lattice": tuple(
        np.random.default_rng(seed).integers(0, 4, (250, 3)).astype(np.float32) for seed in (7, 8)
    ),
    "copies": (np.repeat(random_features(60, 4, 9), 5, axis=0), np.repeat(random_features(30, 4, 9), 9, axis=0)),
    "one point": (np.ones((90, 2), np.float32), np.ones((70, 2), np.float32)),
    "a few": (random_features(5, 2, 10), random_features(4, 2, 11)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_blocks_of_any_size_count_as_brute_force_does(name: str, block: int) -> None:
    real, drawn = SETS[name]
    if block == 1:
        real, drawn = real[:40], drawn[:30]
    expected = by_brute_force(real, drawn, 3)
    manifolds = [Manifold.of(each, 3, block=block) for each in (real, drawn)]
    inside = precision_recall(manifolds[0], manifolds[1], block=block)
    np.testing.assert_array_equal(inside.drawn_M, expected[0])
    np.testing.assert_array_equal(inside.real_N, expected[1])
    np.testing.assert_array_equal(manifolds[0].holds(drawn, block=block), expected[0])


def test_neither_blocks_nor_threads_are_in_the_radii() -> None:
    points = random_features(900, 40, 12, shift=5.0).astype(np.float32)
    before, found = torch.get_num_threads(), []
    for threads, block in ((1, 1024), (2, 100), (3, 333)):
        torch.set_num_threads(threads)
        try:
            found.append(Manifold.of(points, 3, block=block).radii_N)
        finally:
            torch.set_num_threads(before)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_what_float32_cannot_tell_is_decided_in_float64() -> None:
    """Points 1e-9 apart around one that is 1 away: all are the same in a product of float32."""
    real = np.array([[0.0, 1.0]] + [[i * 1e-9, 0.0] for i in range(40)])
    manifold = Manifold.of(real, 1)
    assert manifold.radii_N[1:] == pytest.approx(1e-18, rel=1e-6)
    drawn = Manifold.of(np.array([[39.5e-9, 0.0], [41e-9, 0.0], [-2.0, -2.0]]), 1)
    assert precision_recall(manifold, drawn).drawn_M.tolist() == [True, False, False]


def test_by_hand() -> None:
    # Five points on a line at 0..4 (k = 1: radius 1 each); drawn ones at 0.5, 10, 10.5.
    precision, recall = of_sets(np.arange(5.0)[:, None], np.array([[0.5], [10.0], [10.5]]), 1)
    assert precision == pytest.approx(1 / 3)
    # Radii of the drawn ones: 9.5, 0.5, 0.5; the first ball reaches all real points.
    assert recall == pytest.approx(1.0)


def test_quality_is_told_from_variety() -> None:
    real = random_features(1500, 4, 6)
    assert min(of_sets(real, random_features(1500, 4, 6) + 1e-9)) == pytest.approx(1.0)
    narrow = real.mean(0) + 0.01 * random_features(300, 4, 7)
    precision, recall = of_sets(real, narrow)
    assert precision > 0.95 and recall < 0.05
    assert of_sets(real, real + 1000) == (0.0, 0.0)


def _measure(connection, real_images: int, drawn_images: int) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    real, drawn = (
        np.random.default_rng(seed).standard_normal((count, 96), dtype=np.float32)
        for seed, count in ((1, real_images), (2, drawn_images))
    )
    of_sets(real[:500], drawn[:500])  # what torch keeps for itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    of_sets(real, drawn)
    connection.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.parametrize(("real", "drawn"), [(8000, 8000), (600, 20_000)])
def test_memory_is_that_of_blocks(real: int, drawn: int) -> None:
    assert peak_bytes(50_000, 50_000, 2048) < LARGEST == 2e9
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_measure, args=(theirs, real, drawn))
    process.start()
    assert ours.poll(100)
    grown = ours.recv()
    process.join(10)
    work = peak_bytes(real, drawn, 96, threads=1) - 4 * 96 * (real + drawn)
    assert grown < work < 4 * max(real, drawn) ** 2 / 3  # all distances at once
