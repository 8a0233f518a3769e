"""Moments of features against closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditmoe.sampling.metrics.moments import BLOCK, TILE, Moments


def random_features(count: int, dimension: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((dimension, dimension)) / dimension**0.5
    return shift + scale * (random.standard_normal((count, dimension)) @ mixing)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([0.0, 1.0, 1e4]),
)
@settings(max_examples=40, deadline=None)
def test_moments_of_parts_merge_to_those_of_the_whole(cuts: list[int], seed: int, shift: float) -> None:
    x_NF = random_features(60, 5, seed, shift=shift)
    edges = [0, *sorted(cuts), 60]
    merged = Moments.empty(5)
    for start, stop in pairwise(edges):
        merged = merged.merge(Moments.of(x_NF[start:stop]))
    assert merged.count == 60
    np.testing.assert_allclose(merged.mean_F, x_NF.mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(merged.covariance_FF, np.cov(x_NF.T), rtol=1e-9, atol=1e-10)


def test_merging_keeps_small_variances_beside_large_means() -> None:
    x_NF = 1e8 + np.random.default_rng(0).standard_normal((1000, 2))
    merged = Moments.of(x_NF[:1]).merge(Moments.of(x_NF[1:700])).merge(Moments.of(x_NF[700:]))
    np.testing.assert_allclose(merged.covariance_FF, np.cov((x_NF - 1e8).T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 64, TILE + 44])
def test_neither_pieces_nor_threads_are_in_the_last_digits_of_moments(dimension: int) -> None:
    x_NF = random_features(BLOCK + 300, dimension, 5, shift=3.0).astype(np.float32)
    pieces = [
        [x_NF],
        [x_NF[:0], x_NF[:1], x_NF[1:700], x_NF[700:]],
        [x_NF[first : first + 64] for first in range(0, len(x_NF), 64)],
    ]
    before, found = torch.get_num_threads(), []
    for parts, threads in zip(pieces, (1, 2, 3), strict=True):
        torch.set_num_threads(threads)
        try:
            found.append(Moments.of_stream(parts, dimension))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert other.count == found[0].count == len(x_NF)
        assert (other.mean_F == found[0].mean_F).all()
        assert (other.scatter_FF == found[0].scatter_FF).all()
    assert (found[0].scatter_FF == found[0].scatter_FF.T).all()
    x_NF = x_NF.astype(np.float64)
    np.testing.assert_allclose(found[0].mean_F, x_NF.mean(0), rtol=1e-12)
    expected_FF = np.cov(x_NF.T).reshape(dimension, dimension)
    np.testing.assert_allclose(found[0].covariance_FF, expected_FF, rtol=1e-9, atol=1e-11)
