"""The gallery: words for figures, real images by their numbers, and the ones nearest to drawn images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditmoe.data.shards.index import load_index
from ditmoe.data.stream.config import SourceConfig
from ditmoe.sampling.evaluation.gallery.real import pick
from ditmoe.sampling.evaluation.gallery.sheets import Sheets, sheet_of
from ditmoe.sampling.evaluation.gallery.words import figure_words
from ditmoe.sampling.metrics.neighbours import nearest
from ditmoe.sampling.metrics.reference import open_reference
from ditmoe.sampling.metrics.references.image_sets import NpzImages
from tests.sampling.small_run import images_of, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.mark.parametrize(
    ("fid", "words"),
    [
        (3.1, "cannot be told from real ones"),
        (5, "is small but can be measured"),
        (12.3, "This is 4.1 times the floor: as a set, drawn images differ clearly"),
        (300, "far from real ones"),
    ],
)
def test_a_figure_is_told_beside_its_floor(fid: float, words: str) -> None:
    result: dict[str, Any] = {"fid": fid, "fid_floor": 3.0, "fid_ratio": fid / 3, "fid_floor_images_per_half": 500}
    (told,) = figure_words(result | {"drawn_images": 1000, "kid": None})
    assert told.name == "FID" and told.value == f"{fid:.4g}" and words in told.meaning
    assert "Two halves of 500 real images each are 3 apart" in told.meaning and "Only" not in told.meaning
    (few,) = figure_words(result | {"drawn_images": 100})
    assert "Only 100 images were drawn, and fewer images read higher" in few.meaning
    (alone,) = figure_words({"fid": fid, "fid_floor": None, "fid_ratio": None})
    assert "No floor is known" in alone.meaning and "times" not in alone.meaning


def test_all_figures_have_words() -> None:
    result = {
        "kid": 0.01,
        "kid_floor": 0.0,
        "kid_floor_deviation": 0.002,
        "precision": 0.82,
        "precision_floor": 0.9,
        "recall": 0.7,
        "recall_floor": None,
        "inception_score": 9.0,
        "inception_score_real": 10.0,
        "recogniser": {"accuracy": 0.988, "held_out_accuracy": 0.997},
    }
    told = {each.name: each for each in figure_words(result)}
    assert list(told) == ["KID", "Precision", "Recall", "Inception Score", "Recognised"]
    assert "82% of drawn images" in told["Precision"].meaning and "it is 90%" in told["Precision"].meaning
    assert "halves" not in told["Recall"].meaning and "Real images get 10" in told["Inception Score"].meaning
    assert told["Recognised"].value == "98.8%" and "99.7%" in told["Recognised"].meaning


def test_the_nearest_are_those_of_all_distances() -> None:
    random = np.random.default_rng(0)
    others = random.normal(size=(50, 7)).astype(np.float32)
    points = np.concatenate([others[[3, 40]], random.normal(size=(4, 7)).astype(np.float32)])
    distances = np.linalg.norm(points.astype(np.float64)[:, None] - others.astype(np.float64), axis=2)
    for block in (7, 1024):
        found, places = nearest(points, others, 3, block=block)
        assert np.array_equal(places, distances.argsort(1)[:, :3])
        np.testing.assert_allclose(found, np.sort(distances, 1)[:, :3], rtol=1e-12, atol=1e-12)
        assert places[:2, 0].tolist() == [3, 40] and found[:2, 0].tolist() == [0, 0]
    assert nearest(points, others[:2], 3)[1].shape == (6, 2)


def test_real_images_are_picked_by_their_numbers(digits: Path, tmp_path: Path) -> None:
    whole = next(images_of(digits).read_all(500))
    # Of some classes, whose numbers are others than the places in the shards.
    some = open_reference(SourceConfig(path=str(digits), max_per_class=7))
    chosen = list(some.read_all(500))
    numbers = np.concatenate([batch.number_N for batch in chosen])
    images = np.concatenate([batch.image_NHWC for batch in chosen])
    labels = np.concatenate([batch.label_N for batch in chosen])
    assert some.count == 70 < load_index(digits).total
    found = pick(some, [0, 33, 69])
    assert sorted(found) == [0, 33, 69]
    for number, (image_HWC, label) in found.items():
        place = int(np.flatnonzero(numbers == number)[0])
        assert np.array_equal(image_HWC, images[place]) and label == labels[place]
    np.savez(tmp_path / "x.npz", arr_0=whole.image_NHWC)
    of_file = pick(NpzImages(tmp_path / "x.npz"), [299, 4])
    assert sorted(of_file) == [4, 299] and np.array_equal(of_file[299][0], whole.image_NHWC[299])


def test_sheets_have_columns_for_a_phone_and_take_images_of_all_classes() -> None:
    sheets = Sheets(tuple(map(str, range(5))), 8, 1)
    image_NHWC = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    sheets.add(image_NHWC, np.arange(40) % 4, chunk=3)
    picture = sheets.sheet(0)
    assert picture is not None and picture.size == (6 * 50 - 2, 2 * 50 - 2) and picture.mode == "LA"
    assert sheets.sheet(4) is None and sheet_of([]) is None
    assert [label for label, _ in sheets.some(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [label for label, _ in sheets.some(2)] == [0, 2]
    assert [(shown.chunk, shown.row) for _, shown in sheets.some(4)] == [(3, 0), (3, 1), (3, 2), (3, 3)]
