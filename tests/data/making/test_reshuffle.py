"""The order of samples on the disk: how classes are mixed, and dealt out anew."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.making.foreign import ForeignSettings, index_foreign
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.reshuffle import ReshuffleSettings, class_mix, reshuffle
from ditmoe.data.making.sources.npz import Npz
from ditmoe.data.making.verify import verify
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.index import DatasetIndex, ShardEntry, load_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.data.stream.config import DataConfig
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError
from tests.data.making.foreign_tars import picture, write_tar

runner = CliRunner()


def members_of(folder: Path) -> dict[str, dict[str, bytes | None]]:
    """Key → extension → bytes, of all samples."""
    found: dict[str, dict[str, bytes | None]] = {}
    for entry in load_index(folder).shards:
        shard = Shard.at(folder / entry.file, entry)
        for member, key in enumerate(shard.keys):
            found[key] = {extension: shard.read(member, extension) for extension in shard.extensions(member)}
        shard.close()
    return found


@pytest.fixture
def sorted_tars(tmp_path: Path) -> Path:
    """200 classes of 10 images, 20 classes in each tar, one after the other."""
    image = picture("PNG", (4, 4))
    folder = tmp_path / "sorted"
    folder.mkdir()
    for tar in range(10):
        samples = [
            (
                f"c{label:03d}/{number}",
                {"png": image, "cls": str(label).encode(), "txt": f"{label}-{number}".encode()},
            )
            for label in range(20 * tar, 20 * tar + 20)
            for number in range(10)
        ]
        write_tar(folder / f"{tar:02d}.tar", samples)
    return folder


def test_a_batch_of_sorted_imagenet_has_few_classes() -> None:
    """A thousand classes of 1,280 images, each in a tar of its own."""
    shards = tuple(ShardEntry(file=f"{n}.tar", samples=1280, bytes=1, sha256="0" * 64) for n in range(1000))
    names = tuple(map(str, range(1000)))
    index = DatasetIndex(name="x", image_size=8, channels=3, num_classes=1000, class_names=names, shards=shards)
    label_N = np.repeat(np.arange(1000, dtype=np.int32), 1280)
    mix = class_mix(index, SampleColumns(label_N, None))
    assert mix.poor and 80 < mix.found < 125 and mix.fair == pytest.approx(1000 * (1 - 0.999**256))
    label_N = np.random.default_rng(0).permutation(label_N)
    mix = class_mix(index, SampleColumns(label_N, None))
    assert not mix.poor and mix.found == pytest.approx(mix.fair, rel=0.05)
    label_N[1280:] = -1  # one tar is left, and all that can be used is in it
    assert class_mix(index, SampleColumns(label_N, None)).classes == len(np.unique(label_N[:1280]))


def test_sorted_tars_are_told_with_the_figure_and_dealt_out(
    sorted_tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataConfig.model_fields["lanes"], "default", 4)  # as few as a larger dataset would need
    monkeypatch.setattr(DataConfig.model_fields["shuffle"], "default", 32)
    indexed = runner.invoke(app, ["index", str(sorted_tars)])
    assert indexed.exit_code == 0, indexed.output
    index = load_index(sorted_tars)
    table = read_table(sorted_tars, index)
    assert table is not None
    before = class_mix(index, table)
    fair = 200 * (1 - (1 - 1 / 200) ** 256)
    assert before.fair == pytest.approx(fair) and before.poor and before.found < 0.8 * fair
    assert (
        f"warning: a batch of 256 has {before.found:.0f} of the 200 classes on average, and 145" in indexed.output
    )
    assert f"`ditmoe data reshuffle {sorted_tars} OUT`" in indexed.output

    for name in ("one", "two"):
        result = runner.invoke(
            app, ["reshuffle", str(sorted_tars), str(tmp_path / name), "--shard-samples", "225"]
        )
        assert result.exit_code == 0, result.output
    assert "reshuffled 2,000 samples into 9 shards" in result.output
    assert f"and {fair:.0f} in a fair draw" in result.output
    new = load_index(tmp_path / "one")
    assert [entry.samples for entry in new.shards] == [225] * 8 + [200]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert members_of(tmp_path / "one") == members_of(sorted_tars)
    assert verify(tmp_path / "one").problems == []
    moved = read_table(tmp_path / "one", new)
    assert moved is not None
    after = class_mix(new, moved)
    assert not after.poor and after.found == pytest.approx(fair, rel=0.05)
    reshuffle(sorted_tars, tmp_path / "other", ReshuffleSettings(seed=1))
    assert load_index(tmp_path / "other").fingerprint != new.fingerprint
    again = runner.invoke(app, ["index", str(tmp_path / "one"), "--overwrite"])
    assert again.exit_code == 0 and "warning" not in again.output


def test_what_is_left_out_stays_out_and_scores_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    image = picture("PNG", (4, 4))
    for tar in range(2):
        samples = [
            (f"s{number}", {"png": image, "cls": b"x" if number == 3 else b"1", "json": b'{"q": %d}' % number})
            for number in range(6)
        ]
        write_tar(folder / f"{tar}.tar", samples)
    index_foreign(folder, ForeignSettings(score="json:q", skip_unreadable=True))
    new = reshuffle(folder, tmp_path / "out", ReshuffleSettings())
    table = read_table(tmp_path / "out", new)
    assert table is not None and table.score_N is not None and new.total == 10
    assert sorted(table.score_N.tolist()) == sorted([0.0, 1.0, 2.0, 4.0, 5.0] * 2)
    samples = members_of(tmp_path / "out")  # keys came twice, so numbers stand in their place
    scores = {int(key): int((members["json"] or b"").split(b": ")[1][:-1]) for key, members in samples.items()}
    assert scores == {n: n % 6 for n in range(12) if n % 6 != 3}
    assert verify(tmp_path / "out").problems == []


def test_refusals(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is to be read; choose another folder"):
        reshuffle(digits, digits, ReshuffleSettings(overwrite=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="holds mine, which `ditmoe` did not write"):
        reshuffle(digits, tmp_path / "out", ReshuffleSettings(overwrite=True))
    path = digits / load_index(digits).shards[1].file
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum mismatch"):
        reshuffle(digits, tmp_path / "new", ReshuffleSettings())
    assert not (tmp_path / "new" / "index.json").exists()
    pack(Npz(_npz(tmp_path)), tmp_path / "new", PackSettings(limits=ShardLimits(samples=2)))


def _npz(folder: Path) -> Path:
    np.savez(folder / "x.npz", images=np.zeros((4, 4, 4, 3), np.uint8), labels=np.arange(4))
    return folder / "x.npz"


def test_more_tars_than_may_be_open(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe.data.making.copying._MOST_OPEN", 1)
    reshuffle(digits, tmp_path / "out", ReshuffleSettings())
    assert members_of(tmp_path / "out") == members_of(digits)
    assert Image.open(tmp_path / "out" / "preview.png").width > 100
