"""Each kind of source: what it holds, and what it says about wrong input."""

import errno
import hashlib
import os
import shutil
import socket
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ditmoe.data.making.class_names import read_class_names
from ditmoe.data.making.sources.digits import Digits
from ditmoe.data.making.sources.folder import ImageFolder
from ditmoe.data.making.sources.labelled import LabelledFolder
from ditmoe.data.making.sources.npz import Npz
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.making.sources.shapes import MOST_CLASSES, Shapes
from ditmoe.data.making.verify import verify
from ditmoe.data.shards.images import BadImage, centre_crop, open_image, prepare, to_network_range, to_uint8
from ditmoe.data.shards.index import SampleTable, load_index
from ditmoe.data.shards.sample_table import read_table
from ditmoe.model.errors import UserError


def test_digits_are_the_scans_with_ink_0_to_16_as_0_to_255() -> None:
    source = Digits()
    bunch = load_digits()
    assert len(source) == 1797 and source.class_names == tuple("0123456789")
    for number in (0, 5, 1796):
        sample = source.read(number)
        assert sample.image_HWC.shape == (8, 8, 1) and sample.label == bunch.target[number]
        np.testing.assert_array_equal(
            sample.image_HWC[:, :, 0], np.floor(bunch.images[number] * 255 / 16 + 0.5).astype(np.uint8)
        )


def test_shapes_are_a_function_of_seed_and_number() -> None:
    source, again, other = (Shapes(120, 60, 24, seed) for seed in (3, 3, 4))
    for number in (0, 7, 119):
        assert source.read(number).image_HWC.shape == (24, 24, 3)
        np.testing.assert_array_equal(source.read(number).image_HWC, again.read(number).image_HWC)
    assert not np.array_equal(source.read(0).image_HWC, other.read(0).image_HWC)
    # A longer run of the same images begins with the same images.
    np.testing.assert_array_equal(source.read(5).image_HWC, Shapes(900, 60, 24, 3).read(5).image_HWC)


def test_shapes_have_distinct_classes_and_smooth_edges() -> None:
    source = Shapes(MOST_CLASSES, MOST_CLASSES, 32, 0)
    assert len(set(source.class_names)) == MOST_CLASSES == 60
    assert [source.read(number).label for number in (0, 59)] == [0, 59]
    assert len(np.unique(source.read(1).image_HWC.reshape(-1, 3), axis=0)) > 30


@pytest.mark.parametrize("count, classes, size", [(10, 0, 32), (100, 61, 32), (5, 10, 32), (10, 10, 4)])
def test_shapes_refuse_what_cannot_be_drawn(count: int, classes: int, size: int) -> None:
    with pytest.raises(UserError, match=r"--(classes|count|image-size) is"):
        Shapes(count, classes, size, 0)


def make_folder(root: Path) -> Path:
    for number, name in enumerate(["zebra", "ant", "moth"]):
        (root / name).mkdir(parents=True)
        for image in range(3):
            colour = (60 * number, 80 * image, 10)
            suffix = ("png", "jpg", "webp")[image]
            Image.new("RGB", (30 + image, 20), colour).save(root / name / f"{image}.{suffix}")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "README").write_text("no class")
    return root


def test_folder_classes_are_sorted_and_other_files_reported(tmp_path: Path) -> None:
    source = ImageFolder(make_folder(tmp_path / "photos"))
    assert source.class_names == ("ant", "moth", "zebra") and len(source) == 9
    assert [source.read(number).label for number in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    first = source.read(0)
    assert first.metadata == {"source": "ant/0.png"} and first.image_HWC.shape == (20, 30, 3)
    assert "README" in source.remarks()[0] and "ant/notes.txt" in source.remarks()[0]


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos")
    (root / "ant" / "0.png").write_bytes(b"not an image")
    damaged = root / "ant" / "1.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(root / "ant" / "3.png")
    source = ImageFolder(root)
    for number, expected in ((0, "0.png: not a readable"), (1, "1.jpg: undecodable"), (3, "3.png: mode I")):
        with pytest.raises(UserError, match=expected):
            source.read(number)
    (root / "wasp").mkdir()
    with pytest.raises(UserError, match=r"no images .* in the class folders wasp"):
        ImageFolder(root)
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match="no sub-folders"):
        ImageFolder(tmp_path / "flat")


def test_folder_lays_transparency_over_white_and_obeys_exif(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a" / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.new("RGB", (8, 4)).save(tmp_path / "a" / "turned.jpg", exif=exif)
    source = ImageFolder(tmp_path)
    assert (source.read(0).image_HWC == 255).all()
    assert source.read(1).image_HWC.shape == (8, 4, 3)


def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 100):  # Pillow only warns up to twice its limit
        Image.new("L", (side, side)).save(tmp_path / "bomb.png")
        with open(tmp_path / "bomb.png", "rb") as file, pytest.raises(BadImage, match="decompression bomb"):
            open_image(file, ("PNG",))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
def test_npz(tmp_path: Path, names: tuple[str, str], grey: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 6) if grey else (5, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", **{names[0]: image, names[1]: np.array([0, 2, 1, 2, 0])})
    source = Npz(tmp_path / "x.npz")
    assert source.class_names == ("0", "1", "2") and len(source) == 5
    sample = source.read(3)
    np.testing.assert_array_equal(sample.image_HWC, image[3][..., None] if grey else image[3])
    assert sample.label == 2 and sample.metadata == {"source": "x.npz", "number": 3}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "has no `labels` or `arr_1`; it has images"),
        ({"images": np.zeros((2, 4, 4), np.float32), "labels": np.zeros(2, int)}, "expected uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"expected integers \[2\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "labels go from -1"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "nothing in them"),
        (
            {"images": np.array([{}, {}], dtype=object), "labels": np.zeros(2, int)},
            "pickled objects are never read",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        Npz(tmp_path / "x.npz")


def test_npz_that_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, int))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable"):
        Npz(path)


def test_open_source_names_what_it_accepts(tmp_path: Path) -> None:
    assert open_source("digits", seed=0).name == "digits"
    with pytest.raises(UserError, match=r"not there; a source is `digits`, `shapes`"):
        open_source(str(tmp_path / "nowhere"), seed=0)
    with pytest.raises(UserError, match="--classes is for the source `shapes`"):
        open_source("digits", classes=3, seed=0)


@pytest.mark.parametrize("width, height", [(64, 64), (500, 375), (375, 500), (33, 32), (1000, 40), (5, 9), (8, 8)])
@pytest.mark.parametrize("size", [8, 32])
def test_centre_crop_has_the_size_asked_for(width: int, height: int, size: int) -> None:
    assert centre_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_centre_crop_takes_the_centre_and_halves_exactly() -> None:
    image = np.zeros((16, 32, 1), dtype=np.uint8)
    image[:, 8:24] = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16, 1) // 2
    cropped = prepare(image, 8, None)
    expected = image[:, 8:24, 0].reshape(8, 2, 8, 2).astype(float).mean(axis=(1, 3))
    assert np.abs(cropped[:, :, 0] - expected).max() <= 0.5
    np.testing.assert_array_equal(prepare(image, 16, None), image[:, 8:24])


def test_prepare_converts_channels_and_refuses_a_rectangle_without_a_size() -> None:
    grey = np.full((4, 4, 1), 7, dtype=np.uint8)
    assert (prepare(grey, None, 3) == 7).all() and prepare(grey, None, 3).shape == (4, 4, 3)
    assert prepare(prepare(grey, None, 3), None, 1).shape == (4, 4, 1)
    with pytest.raises(BadImage, match="8×4 pixels is not square"):
        prepare(np.zeros((4, 8, 3), dtype=np.uint8), None, None)


def test_the_networks_range_and_back() -> None:
    import torch

    image = torch.arange(256, dtype=torch.uint8)
    assert to_network_range(image).aminmax() == (-1.0, 1.0)
    assert torch.equal(to_uint8(to_network_range(image)), image)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_damaged_exif_is_an_error_of_the_file_and_says_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.webp", exif=exif)
    data = (tmp_path / "a" / "x.webp").read_bytes()
    source = ImageFolder(tmp_path)
    assert source.read(0).image_HWC.shape == (8, 8, 3)
    (tmp_path / "a" / "x.webp").write_bytes(data.replace(b"MM\0*", b"XM\0*"))
    with pytest.raises(UserError, match=r"a/x\.webp: damaged EXIF data: not a TIFF file"):
        source.read(0)
    # Pillow warns of this one and goes on, as do we.
    (tmp_path / "a" / "x.webp").write_bytes(
        data.replace(b"\x01\x12\x00\x03\x00\x00\x00\x01", b"\x01\x12\x00\x03\x00\x00\x99\x01")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.read(0).image_HWC.shape == (8, 8, 3)


def test_a_thin_image_is_not_blown_up(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="1×65000 pixels are too thin to bring the short side to 256"):
        prepare(np.zeros((65_000, 1, 3), np.uint8), 256, None)
    assert prepare(np.zeros((300, 1, 3), np.uint8), 32, None).shape == (32, 32, 3)


def test_a_link_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "ant" / "again").symlink_to(".")
    source = ImageFolder(root)
    assert len(source) == 9
    assert source.remarks()[0].startswith("left out: README, ant/again, ant/notes.txt (not a .jpg, ")
    assert source.remarks()[0].endswith(" or .bmp file in a class folder, hidden, or there twice)")


def test_images_of_systems_and_of_links_into_the_source_are_no_images_of_it(tmp_path: Path) -> None:
    """Thumbnails would be learned as photographs, and a link to the parent labels one class as another."""
    root = make_folder(tmp_path / "photos")
    outside = make_folder(tmp_path / "elsewhere") / "ant"
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "ant/.thumbnails", "moth/@eaDir", "moth/deep/.cache"):
        shutil.copytree(outside, root / name)
    (root / "moth" / "up").symlink_to("..")
    (root / "moth" / "out").symlink_to(outside)
    (root / "zebra" / "other").symlink_to(root / "ant")
    (root / "zoo").symlink_to(tmp_path)
    (root / "same").symlink_to("ant")
    source = ImageFolder(root)
    assert source.class_names == ("ant", "moth", "zebra")
    by_class = Counter(source.read(number).label for number in range(len(source)))
    assert by_class == {0: 3, 1: 6, 2: 3}
    files = {source.read(number).metadata["source"] for number in range(len(source))}
    assert not any(part.startswith((".", "@")) for file in files for part in Path(file).parts)
    passed_over = {".ipynb_checkpoints", "@eaDir", "ant/.thumbnails", "moth/deep/.cache", "moth/up", "same", "zoo"}
    assert passed_over <= set(source._ignored)
    (root / "zebra" / "out").symlink_to(outside)
    with pytest.raises(UserError, match=r"zebra/out and a folder of the class moth are one folder, .*/ant"):
        ImageFolder(root)


def test_a_folder_that_cannot_be_read_ends_the_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "photos")
    (root / "ant" / "deep").mkdir()
    (root / "ant" / "list.csv").write_text("file,label\n0.png,1\n")
    scandir = os.scandir

    def refuses(path: str) -> object:
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(UserError, match=r"ant/deep: could not be read: Permission denied"):
        ImageFolder(root)
    with pytest.raises(UserError, match=r"ant/deep: could not be read: Permission denied"):
        LabelledFolder(root / "ant", root / "ant" / "list.csv").remarks()


@pytest.mark.parametrize("kind", ["pipe", "socket", "broken link", "loop"])
def test_what_is_named_like_an_image_and_is_none_is_missed_by_name(tmp_path: Path, kind: str) -> None:
    root = make_folder(tmp_path / "photos")
    path = root / "ant" / "0.png"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        folder = os.open(root / "ant", os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{folder}/0.png")  # paths of sockets are short
        os.close(folder)
    else:
        path.symlink_to("nowhere" if kind == "broken link" else "0.png")
    source = ImageFolder(root)
    assert len(source) == 9
    with pytest.raises(UserError, match=r"ant/0\.png: could not be read: "):
        source.read(0)
    (tmp_path / "list.csv").write_text("file,label\n0.png,1\n")
    with pytest.raises(UserError, match=r"0\.png: could not be read: "):
        LabelledFolder(root / "ant", tmp_path / "list.csv").read(0)


@pytest.mark.parametrize("name", ["index.json", "samples.npz", "digits-00001.tar"])
def test_a_pipe_in_a_dataset_does_not_hang(digits: Path, name: str) -> None:
    (digits / name).unlink()
    os.mkfifo(digits / name)
    try:
        problems = "\n".join(verify(digits).problems)
    except UserError as error:
        problems = str(error)
    assert f"{name}: could not be read: " in problems and "regular file" in problems


def test_class_names_of_an_npz_can_be_printed(tmp_path: Path) -> None:
    arrays = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.arange(2)}
    np.savez(tmp_path / "x.npz", **arrays, class_names=np.array(["a", "b\x1b[2J"]))
    with pytest.raises(UserError, match=r"x\.npz: the class name 'b\\x1b\[2J' cannot be printed"):
        Npz(tmp_path / "x.npz")


def test_names_of_every_script_are_names_and_forms_of_one_are_one(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos")
    shutil.copytree(root / "ant", root / "日本\u3000語")
    shutil.copytree(root / "ant", root / "cafe\u0301")
    source = ImageFolder(root)
    assert source.class_names == ("ant", "café", "moth", "zebra", "日本\u3000語")
    assert "cafe\u0301" in source.read(4).metadata["source"]  # where it lies stays as it is
    shutil.copytree(root / "ant", root / "café")
    with pytest.raises(UserError, match=r"two class folders are called café"):
        ImageFolder(root)


def test_labels_match_class_names_in_any_form(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text("file,label\na.png,cafe\u0301\nb.png,café\n")
    assert LabelledFolder(tmp_path, tmp_path / "list.csv").class_names == ("café",)
    (tmp_path / "names.txt").write_text("cafe\u0301\nx\u3000y\n")
    names = read_class_names(tmp_path / "names.txt")
    assert names == ("café", "x\u3000y")
    source = LabelledFolder(tmp_path, tmp_path / "list.csv", names)
    assert [source.read(number).label for number in range(2)] == [0, 0]


def broken_archives(folder: Path) -> dict[str, bytes]:
    """Files named .npz that are none, or not of arrays."""
    plain = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.arange(2)}
    np.save(folder / "one.npy", plain["images"])
    made = {"an npy by that name": (folder / "one.npy").read_bytes(), "empty": b"", "text": b"no archive"}
    for name, members in {
        "a member that is no array": {"images": b"text", "labels.npy": b"\x93NUMPY"},
        "a header that is no header": {"images.npy": b"\x93NUMPY\x01\x00\x04\x00{{{{"},
        "nothing in a member": {"images.npy": b""},
    }.items():
        with zipfile.ZipFile(folder / "x.zip", "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        made[name] = (folder / "x.zip").read_bytes()
    np.savez(folder / "good.npz", **plain)
    good = (folder / "good.npz").read_bytes()
    encrypted = bytearray(good)
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := good.find(start, place + 1)) >= 0:
            encrypted[place + flags] |= 1
    made["encrypted"] = bytes(encrypted)
    packed = bytearray(good)
    for start, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = -1
        while (place := good.find(start, place + 1)) >= 0:
            packed[place + method] = 97
    made["packed in an unknown way"] = bytes(packed)
    made["truncated"] = good[:-40]
    return made


def test_a_broken_npz_is_one_message(tmp_path: Path) -> None:
    for case, data in broken_archives(tmp_path).items():
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(UserError, match=r"x\.npz: not a readable \.npz file: ") as refused:
            Npz(tmp_path / "x.npz")
        assert "\n" not in str(refused.value), case


def test_a_broken_table_is_one_message(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    index = load_index(digits)
    for case, data in broken_archives(tmp_path / "cases").items():
        (digits / "samples.npz").write_bytes(data)
        table = SampleTable(sha256=hashlib.sha256(data).hexdigest())
        with pytest.raises(UserError, match=r"samples\.npz: could not be read: "):
            read_table(digits, index.model_copy(update={"samples": table}))
            pytest.fail(case)
