"""The picture of a grid."""

import numpy as np
import pytest
from PIL import Image

from ditmoe.model.errors import UserError
from ditmoe.sampling.drawing.picture import image_grid, save_picture


def images(count: int, size: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_enlarged_by_a_whole_factor(channels):
    shown = images(5, 24, channels)
    picture = np.asarray(image_grid(shown, columns=3))
    assert picture.shape == (2 * (72 + 2) + 2, 3 * (72 + 2) + 2, 3)
    cell = picture[2 + 74 : 2 + 74 + 72, 2 + 74 : 2 + 74 + 72]  # row 1, column 1: image 4
    assert np.array_equal(cell[::3, ::3], np.broadcast_to(shown[4], (24, 24, 3)))
    assert np.array_equal(cell, cell[::3, ::3].repeat(3, axis=0).repeat(3, axis=1))
    assert (picture[2 + 74 :, 2 + 2 * 74 :] == 255).all()  # no sixth image


def test_large_images_keep_their_size():
    assert image_grid(images(1, 100, 3), columns=1).size == (104, 104)


def test_captions_are_drawn_and_cut():
    shown = images(4, 64, 1)
    bare = image_grid(shown, columns=2)
    named = image_grid(shown, 2, column_captions=["ß", "a very long name of a class"], row_captions=["η = 0", "1"])
    assert named.height > bare.height and named.width > bare.width
    header = np.asarray(named)[:18]
    assert (header < 128).any()
    assert (header[:, -66 - 4 : -66] == 255).all()  # the long name stays within its column


def test_other_channel_counts():
    with pytest.raises(UserError, match="4 channels"):
        image_grid(images(1, 8, 4), columns=1)


def test_saving_is_whole_or_nothing(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    save_picture(image_grid(images(1, 8, 1), columns=1), path)
    with Image.open(path) as read:
        assert read.size == (68, 68)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be made"):
        save_picture(image_grid(images(1, 8, 1), columns=1), tmp_path / "file" / "grid.png")


def test_each_image_has_its_lines_below_it_and_a_title_stands_over_all():
    shown = images(3, 24, 3)
    picture = np.asarray(
        image_grid(shown, 2, captions=["cat\nseed 1", "", "a very long name of a class"], title="step 7")
    )
    assert picture.shape == (2 + 18 + 2 * (96 + 2 + 30 + 2), 2 + 2 * 98, 3)  # enlarged four times, to 96 pixels
    for number, lines in ((0, 2), (1, 0), (2, 1)):
        row, column = divmod(number, 2)
        y, x = 20 + row * 130, 2 + column * 98
        assert np.array_equal(picture[y : y + 96 : 4, x : x + 96 : 4], shown[number])
        below = picture[y + 98 : y + 128, x : x + 96]
        assert [(part < 128).any() for part in (below[:15], below[15:])] == [lines > 0, lines > 1]
    assert (picture[:18] < 128).any()
    assert (picture[:20, 98:] == 255).all()  # the title begins at the left
