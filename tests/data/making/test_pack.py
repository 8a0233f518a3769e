"""Packing: round trips, equal bytes, and what is left when it does not finish."""

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ditmoe.data.making.ownership import CLAIM
from ditmoe.data.making.pack import PackSettings, pack, refuse_overlap
from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.making.sources.digits import Digits
from ditmoe.data.making.sources.folder import ImageFolder
from ditmoe.data.making.sources.npz import Npz
from ditmoe.data.making.sources.shapes import Shapes
from ditmoe.data.making.verify import verify
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.index import load_index
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.storage.claims import Claims
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.samples import SampleReader
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import temporary_beside


def read_all(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Key → (image HWC, label) of a packed folder, through the training reader."""
    index = load_index(folder)
    config = DataConfig.model_validate({"sources": [{"path": str(folder)}]})
    arrays = SampleReader(open_dataset(config, seed=0)).read(np.arange(index.total))
    images = arrays.image_BCHW.transpose(0, 2, 3, 1)
    return {
        key.split("/")[1]: (image, int(label))
        for key, image, label in zip(arrays.keys, images, arrays.label_B, strict=True)
    }


@pytest.mark.parametrize("format", ["png", "npy"])
def test_digits_come_back_as_they_were(tmp_path: Path, format: str) -> None:
    source = Digits()
    result = pack(source, tmp_path / "d", PackSettings(format=format, count=300))  # type: ignore[arg-type]
    samples = read_all(tmp_path / "d")
    assert len(samples) == 300 == result.index.total
    for key, (image, label) in samples.items():
        original = source.read(int(key))
        np.testing.assert_array_equal(image, original.image_HWC)
        assert label == original.label
    assert not verify(tmp_path / "d").problems
    with Image.open(result.preview) as preview:
        assert preview.width > 500


def test_shapes_in_jpg_come_back_nearly(tmp_path: Path) -> None:
    source = Shapes(20, 10, 32, seed=5)
    pack(source, tmp_path / "s", PackSettings(format="jpg"))
    for key, (image, label) in read_all(tmp_path / "s").items():
        original = source.read(int(key))
        assert label == original.label
        assert np.abs(image.astype(int) - original.image_HWC).mean() < 4


def test_image_folder_with_a_size(tmp_path: Path) -> None:
    for name, colour in (("b", (200, 0, 0)), ("a", (0, 0, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (50 + number, 40), colour).save(tmp_path / "photos" / name / f"{number}.png")
    source = ImageFolder(tmp_path / "photos")
    with pytest.raises(UserError, match=r"pixels is not square; give --image-size"):
        pack(source, tmp_path / "out", PackSettings())
    index = pack(source, tmp_path / "out", PackSettings(image_size=16)).index
    assert (index.image_size, index.channels, index.class_names) == (16, 3, ("a", "b"))
    for image, label in read_all(tmp_path / "out").values():
        assert (image == [[0, 0, 200], [200, 0, 0]][label]).all()
    pack(source, tmp_path / "grey", PackSettings(image_size=16, channels=1))
    assert load_index(tmp_path / "grey").channels == 1
    with pytest.raises(UserError, match="lies in the source"):
        refuse_overlap(str(tmp_path / "photos"), tmp_path / "photos" / "packed")


def test_npz_with_four_channels_needs_npy(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=image, labels=np.arange(4))
    source = Npz(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x\.npz, number \d: 4 channels"):
        pack(source, tmp_path / "out", PackSettings())
    pack(source, tmp_path / "out", PackSettings(format="npy"))
    for key, (array, label) in read_all(tmp_path / "out").items():
        np.testing.assert_array_equal(array, image[int(key)])
        assert label == int(key)


def test_two_packs_are_equal_to_the_byte_whatever_the_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        settings = PackSettings(limits=ShardLimits(samples=16), workers=workers)
        pack(Shapes(40, 10, 16, seed=2), tmp_path / name, settings)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "index.json",
        "preview.png",
        "samples.npz",
        *(f"shapes-{number:05d}.tar" for number in range(3)),
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_mix_classes_and_keep_their_limits(tmp_path: Path) -> None:
    source = Digits()
    by_bytes = PackSettings(count=200, limits=ShardLimits(samples=1000, bytes=40_000))
    index = pack(source, tmp_path / "d", by_bytes).index
    assert len(index.shards) > 5
    for entry in index.shards:
        assert (tmp_path / "d" / entry.file).stat().st_size == entry.bytes <= 40_000 + 20_480  # tar's last record
    shard = Shard.at(tmp_path / "d" / index.shards[0].file, index.shards[0])
    assert len({shard.read(member, "cls") for member in range(len(shard.keys))}) > 4
    other_seed = pack(source, tmp_path / "e", PackSettings(count=200, seed=1)).index
    assert other_seed.fingerprint != index.fingerprint


def test_webdataset_reads_the_shards(digits: Path) -> None:
    path = str(digits / load_index(digits).shards[0].file)
    samples = list(webdataset.WebDataset([path], shardshuffle=False))
    assert len(samples) == 25
    assert {"__key__", "png", "cls", "json"} <= set(samples[0])
    assert json.loads(samples[0]["json"])["number"] == int(samples[0]["__key__"])


def test_a_packed_folder_is_not_written_over(digits: Path) -> None:
    before = (digits / "index.json").read_bytes()
    with pytest.raises(UserError, match="already holds a packed dataset"):
        pack(Digits(), digits, PackSettings(count=10))
    assert (digits / "index.json").read_bytes() == before
    pack(Digits(), digits, PackSettings(count=10, overwrite=True))
    assert load_index(digits).total == 10
    assert len(list(digits.glob("*.tar"))) == 1


def test_tars_of_others_are_left_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mine.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"holds mine\.tar, which `ditmoe` did not write there"):
        pack(Digits(), tmp_path, PackSettings(count=10, overwrite=True))
    assert (tmp_path / "mine.tar").exists()


def test_an_index_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"pages": []}')
    (tmp_path / "mine.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds index\.json and 1 more, which `ditmoe` did not write"):
            pack(Digits(), tmp_path, PackSettings(count=10, overwrite=overwrite))
    assert (tmp_path / "mine.tar").read_bytes() == b"precious" and (tmp_path / "index.json").exists()


class Killed(Digits):
    """Its worker is killed, as the system does when memory runs out."""

    def read(self, number: int) -> SourceImage:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().read(number)


def test_a_killed_worker_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a reading process was killed"):
        pack(Killed(), tmp_path / "d", PackSettings(count=10, workers=1))
    assert not (tmp_path / "d" / "index.json").exists()


class Interrupted(Digits):
    """Ends in the middle, as Ctrl-C would."""

    def read(self, number: int) -> SourceImage:
        if number == 42:
            raise KeyboardInterrupt
        return super().read(number)


def test_an_unfinished_pack_has_no_index_and_can_be_repeated(tmp_path: Path) -> None:
    settings = PackSettings(limits=ShardLimits(samples=50))
    with pytest.raises(KeyboardInterrupt):
        pack(Interrupted(), tmp_path / "d", settings)
    assert not (tmp_path / "d" / "index.json").exists()
    with pytest.raises(UserError, match="the packing did not finish"):
        load_index(tmp_path / "d")
    # What a kill leaves, which no handler could tidy up: a shard begun, and one too many.
    temporary_beside(tmp_path / "d" / "digits-00007.tar").write_bytes(b"half")
    shutil.copy(tmp_path / "d" / "digits-00000.tar", tmp_path / "d" / "digits-00099.tar")
    pack(Digits(), tmp_path / "d", settings)
    assert not verify(tmp_path / "d").problems
    assert not list((tmp_path / "d").glob("*.partial")) and not list((tmp_path / "d").glob(".*"))


def test_two_processes_do_not_pack_one_folder(tmp_path: Path) -> None:
    with (
        Claims(tmp_path).taken(CLAIM),
        pytest.raises(UserError, match=r"another process is writing to it \(process"),
    ):
        pack(Digits(), tmp_path, PackSettings(count=10))
    pack(Digits(), tmp_path, PackSettings(count=10))
    assert not list(tmp_path.glob(".*"))


def test_unreadable_images_stop_the_pack_or_are_listed(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a" / f"{number}.png")
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"\x89PNG broken")
    source = ImageFolder(tmp_path / "photos")
    with pytest.raises(UserError, match=r"a/1\.png: not a readable .*--skip-unreadable"):
        pack(source, tmp_path / "out", PackSettings())
    result = pack(source, tmp_path / "out", PackSettings(skip_unreadable=True))
    assert result.index.total == 3 and len(result.skipped) == 1 and "a/1.png" in result.skipped[0]
    for number in (0, 2, 3):
        (tmp_path / "photos" / "a" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 4 images could be used"):
        pack(source, tmp_path / "none", PackSettings(skip_unreadable=True))


def test_images_of_different_sizes_are_named(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number, size in enumerate((8, 8, 9)):
        Image.new("RGB", (size, size)).save(tmp_path / "photos" / "a" / f"{number}.png")
    with pytest.raises(UserError, match=r"a/\d\.png: is \d×\d×3 .*give --image-size"):
        pack(ImageFolder(tmp_path / "photos"), tmp_path / "out", PackSettings())


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"packing\.json: could not be written: No space left on device"):
        pack(Digits(), tmp_path / "d", PackSettings(count=10))
    assert not (tmp_path / "d" / "index.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "version is 3, and this program reads versions 1 and 2"),
        ({"format": "other"}, "is not an index of shards"),
        ({"num_classes": 3}, "10 class_names for num_classes = 3"),
        ({"image_size": "big", "channels": 0}, "image_size: .*; channels: "),
        ({"extra": 1}, "extra: no such key"),
        ({"shards": []}, "shards: "),
    ],
)
def test_index_errors(digits: Path, change: dict[str, object], message: str) -> None:
    values = json.loads((digits / "index.json").read_text())
    (digits / "index.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=message):
        load_index(digits)


@pytest.mark.parametrize(
    "file",
    [
        *(
            "../x.tar",
            "/etc/x.tar",
            "a/b.tar",
            "x.zip",
            ".tar",
            "..tar",
            ".x.tar",
            "a..b.tar",
            "-x.tar",
            "host:x.tar",
        ),
        *(f"a{letter}b.tar" for letter in " ;&|<>()$`\\\"'*?[]#~!{}^\n\t\r\0\x1b\u00a0\u202e\u200b\u2028:"),
        "x;touch OWNED;cat digits-00000.tar;.tar",
        "a" * 300 + ".tar",
    ],
)
def test_a_shard_in_the_index_is_a_plain_name(digits: Path, file: str) -> None:
    values = json.loads((digits / "index.json").read_text())
    values["shards"][0]["file"] = file
    (digits / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"plain name of a \.tar file"):
        load_index(digits)


@pytest.mark.parametrize(
    "file", ["digits-00000.tar", "_a.tar", "0.tar", "a+b=c@d,e%20f.g.tar", "Größe-数据.tar", "Gro\u0308sse.tar"]
)
def test_names_of_others_that_are_plain(digits: Path, file: str) -> None:
    values = json.loads((digits / "index.json").read_text())
    values["shards"][0]["file"] = file
    (digits / "index.json").write_text(json.dumps(values))
    assert load_index(digits).shards[0].file == file


@pytest.mark.parametrize("file", ["../samples.npz", "$(touch OWNED).npz", "-o.npz", "samples.tar"])
def test_a_table_in_the_index_is_a_plain_name(digits: Path, file: str) -> None:
    values = json.loads((digits / "index.json").read_text())
    values["samples"]["file"] = file
    (digits / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"plain name of a \.npz file"):
        load_index(digits)


def test_index_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_index(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="could not be read"):
        load_index(tmp_path)
