"""Resizing against its definition, pixel by pixel."""

import math

import numpy as np
import pytest
import torch

from ditmoe.sampling.metrics.networks.resize import half_pixel_bilinear, pillow_bicubic, tensorflow_bilinear


def by_pixel(image_HW: np.ndarray, size: int, offset: float) -> np.ndarray:
    """Pixel i of the result lies at (i + offset)·scale − offset of the source, whose edges are repeated."""
    height, width = image_HW.shape
    found = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y = max((i + offset) * height / size - offset, 0.0)
            x = max((j + offset) * width / size - offset, 0.0)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image_HW[top, left] * (1 - x + left) + image_HW[top, right] * (x - left)
            below = image_HW[bottom, left] * (1 - x + left) + image_HW[bottom, right] * (x - left)
            found[i, j] = above * (1 - y + top) + below * (y - top)
    return found


@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, 19), (20, 13, 9), (6, 6, 6), (1, 2, 5), (32, 32, 30)]
)
def test_both_are_their_definition(height: int, width: int, size: int) -> None:
    image_NCHW = np.random.default_rng(size).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    published = tensorflow_bilinear(torch.from_numpy(image_NCHW), size).numpy()
    plain = half_pixel_bilinear(torch.from_numpy(image_NCHW), size).numpy()
    assert published.shape == plain.shape == (2, 3, size, size)
    for n in range(2):
        for c in range(3):
            image_HW = image_NCHW[n, c].astype(np.float64)
            np.testing.assert_allclose(published[n, c], (by_pixel(image_HW, size, 0.0) - 128) / 128, atol=2e-5)
            np.testing.assert_allclose(plain[n, c], by_pixel(image_HW, size, 0.5) / 127.5 - 1, atol=2e-5)


def test_tensorflow_doubles_by_taking_every_other_place() -> None:
    x = torch.tensor([10, 20, 40, 80], dtype=torch.uint8).expand(1, 1, 4, 4)
    row = tensorflow_bilinear(x, 8)[0, 0, 0] * 128 + 128
    assert row.tolist() == [10, 15, 20, 30, 40, 60, 80, 80]


def test_pillow_keeps_what_has_the_size_and_means_what_shrinks() -> None:
    image_NHWC = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pillow_bicubic(image_NHWC, 32), image_NHWC)
    # With antialiasing a checkerboard becomes grey; without, it would stay black or white.
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = pillow_bicubic(np.repeat(board[None, :, :, None], 3, axis=3).astype(np.uint8), 8)
    assert np.abs(small[:, 1:-1, 1:-1].astype(int) - 127).max() <= 3
