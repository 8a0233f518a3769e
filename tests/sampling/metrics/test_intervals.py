"""Intervals against figures that are computed anew without each group, and against other images."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ditmoe.model.randomness import generator
from ditmoe.sampling.metrics.frechet import frechet_distance
from ditmoe.sampling.metrics.inception_score import inception_score
from ditmoe.sampling.metrics.intervals import (
    GROUPS,
    frechet_without,
    groups_of,
    inception_score_without,
    interval,
    share_without,
)
from ditmoe.sampling.metrics.kernel import SEED, kernel_distance, unbiased_mmd2
from ditmoe.sampling.metrics.moments import Gaussian, Moments
from ditmoe.sampling.metrics.neighbours import Manifold, precision_recall, recall_without
from tests.sampling.metrics.test_moments import random_features

Draw = Callable[[np.random.Generator], np.ndarray]


def test_groups_are_runs_of_one_length() -> None:
    group_N = groups_of(1003)
    assert (np.diff(group_N) >= 0).all() and np.unique(group_N).tolist() == list(range(GROUPS))
    assert set(np.bincount(group_N).tolist()) == {50, 51}


def test_each_figure_without_a_group_is_that_of_the_rest() -> None:
    drawn, real = random_features(417, 6, 1), random_features(300, 6, 2, scale=1.3, shift=0.2)
    group_N, reference = groups_of(417), Moments.of(real)
    rows = np.split(drawn, [3, 3, 120, 260])  # however they come
    distances = frechet_without(Moments.of(drawn), rows, reference)
    p_NP = np.random.default_rng(0).dirichlet(np.ones(4), 417)
    scores = inception_score_without(p_NP, 1000)
    kid = kernel_distance(drawn, real, subsets=4, images=150, group_N=group_N)
    assert kid.value == kernel_distance(drawn, real, subsets=4, images=150).value and kid.without_G is not None
    single = drawn.astype(np.float32)
    of_real = Manifold.of(real.astype(np.float32), 3)
    recalls = recall_without(of_real, Manifold.of(single, 3), group_N)
    in_blocks = recall_without(of_real, Manifold.of(single, 3), group_N, block=64)
    precisions = share_without(precision_recall(of_real, Manifold.of(single, 3)).drawn_M)
    for group in (0, 7, GROUPS - 1):
        kept = group_N != group
        rest = frechet_distance(Moments.of(drawn[kept]), reference).value
        assert distances[group] == pytest.approx(rest, rel=1e-9)
        assert scores[group] == pytest.approx(inception_score(p_NP[kept], 1000)[0], rel=1e-12)
        inside = precision_recall(of_real, Manifold.of(single[kept], 3))
        assert recalls[group] == in_blocks[group] == inside.recall
        assert precisions[group] == pytest.approx(inside.drawn_M.mean(), rel=1e-12)
    only = kernel_distance(drawn, real, subsets=1, images=150, group_N=group_N)
    random = generator(SEED, "evaluate/kid", 0)
    row_S, other_S = (random.choice(len(each), 150, replace=False) for each in (drawn, real))
    kept = group_N[row_S] != 5
    assert only.without_G is not None
    assert only.without_G[5] == pytest.approx(
        unbiased_mmd2(torch.from_numpy(drawn[row_S][kept]), torch.from_numpy(real[other_S])), rel=1e-10
    )


def test_the_splits_of_the_inception_score_are_those_of_all_images() -> None:
    p_NP = np.random.default_rng(0).dirichlet(np.ones(4), 90)
    found = inception_score_without(p_NP, 40)
    kept = groups_of(90) != 3
    parts = [p_NP[first : first + 40][kept[first : first + 40]] for first in (0, 40, 80)]
    assert found[3] == pytest.approx(np.mean([inception_score(part, 40)[0] for part in parts]), rel=1e-12)


def coverage(
    draw: Draw, figure: Callable[[np.ndarray], tuple[float, np.ndarray]], repeats: int, truth: float | None = None
) -> float:
    """How often the interval holds the figure that is expected of as many images, or another number."""
    values, ends = [], []
    for seed in range(repeats):
        value, without_G = figure(draw(np.random.default_rng(seed)))
        values.append(value)
        ends.append(interval(value, without_G))
    expected = np.mean(values) if truth is None else truth
    return float(np.mean([low <= expected <= high for low, high in ends]))


def test_intervals_of_frechet_distances_cover_the_known_distance_of_gaussians() -> None:
    """Of two Gaussians with the same eigenvectors: |shift|² + Σ(s − t)²."""
    s, t, shift = np.array([1.0, 0.7, 0.5, 1e-3]), np.array([1.3, 0.6, 0.8, 2e-3]), 0.4
    truth = 4 * shift**2 + float(((s - t) ** 2).sum())
    real = Gaussian(None, np.full(4, shift), np.diag(t**2))

    def figure(x_NF: np.ndarray) -> tuple[float, np.ndarray]:
        moments = Moments.of(x_NF)
        return frechet_distance(moments, real).value, frechet_without(moments, [x_NF], real)

    # 0.95 within what 200 repeats tell (a deviation of 0.015); 2,000 images of 4 features have next to no bias.
    assert coverage(lambda random: random.normal(size=(2000, 4)) * s, figure, 200, truth) == pytest.approx(
        0.95, abs=0.046
    )
    # Of few images the distance is biased: the interval is around what is expected of as many, and not too short.
    assert coverage(lambda random: random.normal(size=(60, 4)) * s, figure, 200) > 0.91


def test_intervals_of_the_other_figures_cover_what_is_expected() -> None:
    real = np.random.default_rng(10_000).normal(size=(250, 3)).astype(np.float32)
    manifold = Manifold.of(real, 3)

    def draw(random: np.random.Generator) -> np.ndarray:
        return (1.3 * random.normal(size=(240, 3)) + 0.3).astype(np.float32)

    def kid(x_NF: np.ndarray) -> tuple[float, np.ndarray]:
        found = kernel_distance(x_NF, real, subsets=20, group_N=groups_of(len(x_NF)))
        assert found.without_G is not None
        return found.value, found.without_G

    def precision(x_NF: np.ndarray) -> tuple[float, np.ndarray]:
        inside = precision_recall(manifold, Manifold.of(x_NF, 3))
        return inside.precision, share_without(inside.drawn_M)

    def recall(x_NF: np.ndarray) -> tuple[float, np.ndarray]:
        drawn = Manifold.of(x_NF, 3)
        return precision_recall(manifold, drawn).recall, recall_without(manifold, drawn, groups_of(len(x_NF)))

    def score(x_NF: np.ndarray) -> tuple[float, np.ndarray]:
        p_NP = np.exp(x_NF) / np.exp(x_NF).sum(1, keepdims=True)
        return inception_score(p_NP)[0], inception_score_without(p_NP)

    for figure in (kid, precision, recall, score):
        found = coverage(draw, figure, 100)
        assert 0.9 <= found <= 1, figure.__name__
