"""What datasets are written to holds nothing of anybody else, and loses nothing of anybody else."""

import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
from ditmoe.data.encoding.vae import read_facts
from ditmoe.data.making.filtering import FilterSettings, filter_shards
from ditmoe.data.making.foreign import ForeignSettings, index_foreign
from ditmoe.data.making.ownership import Record, clear, look_through
from ditmoe.data.making.pack import PackSettings, pack, refuse_overlap
from ditmoe.data.making.reshuffle import ReshuffleSettings, reshuffle
from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.making.sources.digits import Digits
from ditmoe.data.making.sources.folder import ImageFolder
from ditmoe.data.making.sources.labelled import LabelledFolder
from ditmoe.data.making.sources.npz import Npz
from ditmoe.data.making.verify import verify
from ditmoe.data.shards.index import load_index
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.storage import files as files_module
from ditmoe.data.storage.files import remove_abandoned, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import temporary_beside

QUICK = PackSettings(count=12, limits=ShardLimits(samples=5))

OTHERS: dict[str, str | None] = {
    "notes.txt": "mine",
    "mine.tar": "mine",
    "digits-00000.tar": "a tar's name, and not ours",
    "samples.npz": "of an evaluation",
    "preview.png": "mine",
    "x.partial": "half a download",
    "index.json.partial": "mine",
    "packing.json": '{"files": "a"}',
    "packing.lock": "of another program",
    "synthesis.json": '{"a": 1}',
    "encoding.json": '{"utf8": true}',
    "index.json": '{"pages": []}',
    "work/x": "mine",
    "encoding/x": "mine",
    "photos/a.png": "mine",
    "linked.npz": None,
}
"""What somebody else may have in a folder; null: a link that leads to nothing."""


def put(folder: Path, name: str) -> None:
    path, text = folder / name, OTHERS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.symlink_to("nowhere")
    else:
        path.write_text(text)


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """All that lies in a folder, by path."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Some images with scores."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{number}.png")
    rows = [f"{number}.png,a,{number}" for number in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["file,label,score", *rows]))
    source = LabelledFolder(tmp_path / "images", tmp_path / "list.csv", None)
    pack(source, tmp_path / "scored", PackSettings())
    return tmp_path / "scored"


@pytest.fixture
def makers(scored: Path, shapes: Path, vae_folder: Path) -> dict[str, Callable[[Path, bool], object]]:
    """What writes datasets: (folder, overwrite)."""

    def encode(out: Path, overwrite: bool) -> None:
        prepare_encoding(shapes, out, read_facts(vae_folder), EncodeSettings()).folder.begin(overwrite)

    return {
        "pack": lambda out, overwrite: pack(Digits(), out, PackSettings(count=5, overwrite=overwrite)),
        "filter": lambda out, overwrite: filter_shards(scored, out, FilterSettings(overwrite=overwrite)),
        "encode": encode,
    }


@pytest.mark.parametrize("maker", ["pack", "filter", "encode"])
def test_what_others_have_in_the_folder_is_named_and_stays(
    makers: dict[str, Callable[[Path, bool], object]], tmp_path: Path, maker: str
) -> None:
    pack(Digits(), tmp_path / "dataset", QUICK)
    for number, name in enumerate(OTHERS):
        for finished in (False, True):
            out = tmp_path / f"out-{number}-{finished}"
            if finished:
                if name.split(".")[0] in ("index", "samples", "preview", "digits-00000"):
                    continue  # of the dataset itself
                shutil.copytree(tmp_path / "dataset", out)
            put(out, name)
            before = contents(out)
            for overwrite in (False, True):
                with pytest.raises(UserError) as refused:
                    makers[maker](out, overwrite)
                if overwrite or not finished:
                    assert f"holds {name.split('/')[0]}" in str(refused.value)
                else:
                    assert "already holds a packed dataset" in str(refused.value)
                assert contents(out) == before


@pytest.mark.parametrize("maker", ["pack", "filter", "encode"])
def test_a_dataset_of_ours_is_replaced_on_request_with_nothing_left(
    makers: dict[str, Callable[[Path, bool], object]], tmp_path: Path, maker: str
) -> None:
    out = tmp_path / "out"
    pack(Digits(), out, QUICK)
    (out / ".DS_Store").write_text("of the system")
    old = set(contents(out)) - {".DS_Store"}
    makers[maker](out, True)
    makers[maker](tmp_path / "new", False)
    assert contents(out) == {**contents(tmp_path / "new"), ".DS_Store": b"of the system"}
    assert old - set(contents(out))


def test_tars_that_were_only_indexed_are_not_ours(
    digits: Path, tmp_path: Path, rewrite: Callable[..., str]
) -> None:
    rewrite(digits, 0, 0, lambda members: members)  # now written by another program
    before = contents(digits)
    with pytest.raises(UserError, match=r"holds digits-00000\.tar, which `ditmoe` did not write"):
        pack(Digits(), digits, PackSettings(count=5, overwrite=True))
    assert contents(digits) == before


def test_a_table_that_the_index_does_not_know_is_not_ours(digits: Path) -> None:
    np.savez(digits / "samples.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    before = contents(digits)
    with pytest.raises(UserError, match=r"holds samples\.npz"):
        pack(Digits(), digits, PackSettings(count=5, overwrite=True))
    with pytest.raises(UserError, match=r"samples\.npz: is in the way, and no index\.json names it"):
        index_foreign(digits, ForeignSettings(overwrite=True))
    (digits / "index.json").unlink()
    del before["index.json"]
    with pytest.raises(UserError, match=r"samples\.npz: is in the way, and no index\.json names it"):
        index_foreign(digits, ForeignSettings())
    assert contents(digits) == before


def test_an_index_of_tars_is_replaced_with_its_table(digits: Path) -> None:
    (digits / "index.json").unlink()
    (digits / "samples.npz").unlink()
    index_foreign(digits, ForeignSettings())
    first = contents(digits)
    index_foreign(digits, ForeignSettings(overwrite=True))
    assert contents(digits) == first


def test_a_source_in_the_folder_stays(tmp_path: Path, scored: Path, shapes: Path, vae_folder: Path) -> None:
    home = tmp_path / "e"
    home.mkdir()
    np.savez(home / "samples.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    before = contents(home)
    with pytest.raises(UserError, match=r"holds .*samples\.npz, which is to be read"):
        refuse_overlap(str(home / "samples.npz"), home)
    with pytest.raises(UserError, match=r"holds samples\.npz, which `ditmoe` did not write"):
        pack(Npz(home / "samples.npz"), home, PackSettings())
    (home / "list.csv").write_text("file,label")
    before = contents(home)
    with pytest.raises(UserError, match=r"holds .*list\.csv, which is to be read"):
        refuse_overlap(str(tmp_path / "images"), home, home / "list.csv")
    assert contents(home) == before
    # Shards that are links into the folder that is to be replaced.
    links = tmp_path / "links"
    shutil.copytree(scored, links)
    for path in links.glob("*.tar"):
        path.unlink()
        path.symlink_to(scored / path.name)
    before = contents(scored)
    with pytest.raises(UserError, match=r"holds .*\.tar, which is to be read"):
        filter_shards(links, scored, FilterSettings(overwrite=True))
    linked = tmp_path / "linked"
    linked.symlink_to(shapes)
    with pytest.raises(UserError, match="is where the images are"):
        prepare_encoding(shapes, linked, read_facts(vae_folder), EncodeSettings())
    assert contents(scored) == before


def test_one_that_is_killed_while_it_clears_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack(Digits(), tmp_path / "dataset", QUICK)
    unlink = Path.unlink
    for deadly in range(1, 8):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "dataset", out)
        calls = 0

        def dies(path: Path, missing_ok: bool = False, deadly: int = deadly) -> None:
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dies)
            pack(Digits(), out, PackSettings(count=5, overwrite=True))
        pack(Digits(), out, PackSettings(count=5, overwrite=True))
        assert load_index(out).total == 5 and not verify(out).problems
        assert sorted(contents(out)) == ["digits-00000.tar", "index.json", "preview.png", "samples.npz"]


def test_one_that_is_killed_while_it_replaces_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack(Digits(), out, QUICK)
    old = contents(out)

    class Killed(BaseException):
        """Nothing runs after it."""

    rename = Path.rename
    for deadly in range(1, 5):
        calls = 0

        def dies(path: Path, target: Path, deadly: int = deadly) -> Path:
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise Killed
            return rename(path, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "rename", dies)
            pack(Digits(), out, PackSettings(count=5, overwrite=True))
        assert not (out / "index.json").exists() and look_through(out).others == []
        pack(Digits(), out, QUICK)
        assert contents(out) == old

    for _ in range(2):  # while the new one is made: the old one is whole, and a later one removes what was left
        process = multiprocessing.get_context("fork").Process(
            target=_pack_until, args=(out, PackSettings(count=60, overwrite=True), 30)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert {name: data for name, data in contents(out).items() if "packing" not in name} == old
        assert not verify(out).problems
    with pytest.raises(UserError, match="already holds a packed dataset"):
        pack(Digits(), out, QUICK)
    pack(Digits(), out, PackSettings(count=5, overwrite=True))
    assert sorted(os.listdir(out)) == ["digits-00000.tar", "index.json", "preview.png", "samples.npz"]


def _png(brightness: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), brightness).save(buffer, format="PNG")
    return buffer.getvalue()


def _pack_until(out: Path, settings: PackSettings, last: int) -> None:
    """Pack, in a process that is killed when it reads its image number `last`."""

    class Killing(Digits):
        reads = 0

        def read(self, number: int) -> SourceImage:
            self.reads += 1
            if self.reads == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(number)

    pack(Killing(), out, settings)


def test_the_record_is_there_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Digits):
        reads = 0

        def read(self, number: int) -> SourceImage:
            self.reads += 1
            if self.reads == 20:
                raise KeyboardInterrupt
            return super().read(number)

    with pytest.raises(KeyboardInterrupt):
        pack(Stopped(), tmp_path / "d", PackSettings(count=30))
    record = json.loads((tmp_path / "d" / "packing.json").read_text())
    assert record["stem"] == "digits" and "samples.npz" in record["files"]
    assert look_through(tmp_path / "d").others == []
    (tmp_path / "d" / "mine").touch()
    with pytest.raises(UserError, match="holds mine, which"):
        clear(tmp_path / "d", Record())


def test_an_old_dataset_stays_when_the_new_source_is_at_fault(digits: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"broken")
    before = contents(digits)
    for skip, message in ((False, "--skip-unreadable"), (True, "none of the 1 images could be used")):
        with pytest.raises(UserError, match=message):
            pack(ImageFolder(tmp_path / "photos"), digits, PackSettings(overwrite=True, skip_unreadable=skip))
        assert contents(digits) == before
    for number in range(40):
        (tmp_path / "photos" / "a" / f"{number}.png").write_bytes(_png(number))
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"broken")  # whatever its place in the shuffled order
    for seed in range(4):
        with pytest.raises(UserError, match="--skip-unreadable"):
            pack(ImageFolder(tmp_path / "photos"), digits, PackSettings(overwrite=True, seed=seed))
        assert contents(digits) == before
    shard = scored / load_index(scored).shards[-1].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum mismatch"):
        filter_shards(scored, digits, FilterSettings(overwrite=True))
    with pytest.raises(UserError, match="checksum mismatch"):
        reshuffle(scored, digits, ReshuffleSettings(overwrite=True))
    assert contents(digits) == before


def test_temporary_files_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("mine")
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first.name != second.name
        first.write(b"1")
        second.write(b"2")
    assert contents(tmp_path) == {"a.partial": b"mine", "a": b"1"}
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.partial": b"mine", "a": b"1"}


def test_only_what_killed_writers_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "ABANDONED_SECONDS", -1.0)
    abandoned = temporary_beside(tmp_path / "a")
    abandoned.touch()
    (tmp_path / ".ditmoe-mine.partial").touch()
    with replacing(tmp_path / "a") as file:
        remove_abandoned(tmp_path)
        assert sorted(contents(tmp_path)) == sorted([Path(file.name).name, ".ditmoe-mine.partial"])
        monkeypatch.setattr(files_module, "ABANDONED_SECONDS", 600.0)
        abandoned.touch()
        remove_abandoned(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(["a", abandoned.name, ".ditmoe-mine.partial"])
