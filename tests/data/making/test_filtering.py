"""Filtering keeps the best of each class, as a plain reference does, and copies members byte for byte."""

import json
import math
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ditmoe.data.making.filtering import FilterSettings, choose, filter_shards
from ditmoe.data.making.foreign import ForeignSettings, index_foreign
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.base import SourceImage
from ditmoe.data.making.verify import verify
from ditmoe.data.shards.index import load_index, write_index
from ditmoe.data.shards.sample_table import SampleColumns, read_table, write_table
from ditmoe.data.shards.writer import ShardLimits
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError
from tests.data.making.foreign_tars import img2dataset, write_tar

Members = dict[str, dict[str, bytes]]


class Scored:
    """40 images in 3 classes, image i with the score (7·i mod 40) / 40, every tenth without one."""

    name = "scored"
    channels: int | None = None
    class_names = ("a", "b", "c")

    def __len__(self) -> int:
        return 40

    def read(self, number: int) -> SourceImage:
        metadata = {"source": "test", "number": number, "score": (7 * number % 40) / 40}
        if number % 10 == 9:
            del metadata["score"]
        return SourceImage(np.full((4, 4, 3), number, np.uint8), number % 3, metadata)

    def remarks(self) -> list[str]:
        return []


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    pack(Scored(), tmp_path / "scored", PackSettings(limits=ShardLimits(samples=9)))
    return tmp_path / "scored"


def members_of(folder: Path) -> Members:
    """Key → extension → bytes, in the index's order."""
    found: Members = {}
    for entry in load_index(folder).shards:
        with tarfile.open(folder / entry.file) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def reference(labels: list[int], scores: list[float], keep: str, min_score: float | None) -> list[int]:
    """The numbers that are kept, class by class with sorted lists."""
    kept = []
    for label in set(labels) - {-1}:
        members = [i for i, each in enumerate(labels) if each == label]
        most = max(1, int(Decimal(keep) * len(members)))
        best = sorted((i for i in members if not math.isnan(scores[i])), key=lambda i: (-scores[i], i))[:most]
        kept += [i for i in best if min_score is None or scores[i] >= min_score]
    return sorted(kept)


SCORES = [0.0, 0.25, 0.5, 1.0, -2.5, math.nan]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-1, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.5, math.nan])),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["0.01", "0.1", "0.29", "0.3", "0.5", "0.7", "1", "1.0"]),
    st.sampled_from([None, 0.25, -3.0, 2.0]),
)
def test_the_choice_is_the_plain_one(samples: list[tuple[int, float]], keep: str, min_score: float | None) -> None:
    labels, scores = [label for label, _ in samples], [score for _, score in samples]
    table = SampleColumns(np.array(labels, np.int32), np.array(scores, np.float32))
    chosen, figures = choose(table, 5, FilterSettings(float(keep), min_score))
    expected = reference(labels, scores, keep, min_score)
    assert chosen.tolist() == expected
    for label in range(5):
        kept = [scores[i] for i in expected if labels[i] == label]
        assert (figures[label].samples, figures[label].kept) == (labels.count(label), len(kept))
        assert figures[label].threshold == min(kept) if kept else math.isnan(figures[label].threshold)


def test_a_share_is_not_cut_by_a_floats_error() -> None:
    table = SampleColumns(np.zeros(100, np.int32), np.arange(100, dtype=np.float32))
    for share in (0.07, 0.14, 0.28, 0.29, 0.55, 0.57, 0.58):
        assert len(choose(table, 1, FilterSettings(share))[0]) == round(share * 100)


def test_members_are_copied_as_they_are(tmp_path: Path, scored: Path) -> None:
    before, out = members_of(scored), tmp_path / "best"
    result = filter_shards(scored, out, FilterSettings(keep=0.5, limits=ShardLimits(samples=4)))
    after = members_of(out)
    order = list(before)
    table = read_table(scored, load_index(scored))
    assert table is not None and table.score_N is not None
    expected = reference(table.label_N.tolist(), table.score_N.tolist(), "0.5", None)
    assert list(after) == [order[number] for number in expected] and len(after) == 6 + 6 + 7
    assert after == {key: before[key] for key in after}
    index = load_index(out)
    assert index == result.index and index.name == "scored-filtered" and index.class_names == ("a", "b", "c")
    assert [entry.samples for entry in index.shards] == [4, 4, 4, 4, 3]
    kept = read_table(out, index)
    assert kept is not None and kept.score_N is not None
    np.testing.assert_array_equal(kept.label_N, table.label_N[expected])
    np.testing.assert_array_equal(kept.score_N, table.score_N[expected])
    for label, figures in enumerate(result.classes):
        assert figures.threshold == kept.score_N[kept.label_N == label].min()
        assert figures.without_score == np.isnan(table.score_N[table.label_N == label]).sum()
    assert not verify(out).problems and (out / "preview.png").is_file()
    # The same again is the same to the byte.
    filter_shards(scored, tmp_path / "again", FilterSettings(keep=0.5, limits=ShardLimits(samples=4)))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_tars_of_others_keep_their_label_rule_and_get_keys_that_differ(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "x")
    write_tar(folder / "evil.tar", [("../up", members_of_tar(folder / "00000.tar")["000000001"])])
    index_foreign(folder, ForeignSettings(image_size=8, label="json:meta.class", score="json:meta.aesthetic"))
    filter_shards(folder, tmp_path / "all", FilterSettings(min_score=4.05))
    index = load_index(tmp_path / "all")
    assert index.label.key == "meta.class" and index.crop
    # The same keys in both tars, and one that looks like a path: all become numbers.
    assert list(members_of(tmp_path / "all")) == [f"{n:08d}" for n in (1, 3, 4, 5, 7, 8)]
    assert members_of(tmp_path / "all")["00000005"] == members_of_tar(folder / "00001.tar")["000000001"]
    assert not verify(tmp_path / "all").problems


def members_of_tar(path: Path) -> Members:
    found: Members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def test_samples_that_are_left_out_stay_out(tmp_path: Path, scored: Path) -> None:
    index = load_index(scored)
    table = read_table(scored, index)
    assert table is not None
    label_N = table.label_N.copy()
    label_N[:5] = -1
    write_index(
        scored, index.model_copy(update={"samples": write_table(scored, SampleColumns(label_N, table.score_N))})
    )
    filter_shards(scored, tmp_path / "o", FilterSettings())
    assert not set(list(members_of(scored))[:5]) & set(members_of(tmp_path / "o"))


def test_refusals(tmp_path: Path, scored: Path, digits: Path, rewrite: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="digits: has no quality scores"):
        filter_shards(digits, tmp_path / "o", FilterSettings(0.5))
    with pytest.raises(UserError, match="is the folder that is filtered"):
        filter_shards(scored, scored, FilterSettings(0.5, overwrite=True))
    for keep in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(UserError, match=r"--keep is .*, expected a share above 0 and up to 1"):
            filter_shards(scored, tmp_path / "o", FilterSettings(keep))
    with pytest.raises(UserError, match=r"no sample would be kept: the best score is 0\.975, and --min"):
        filter_shards(scored, tmp_path / "o", FilterSettings(min_score=2))
    with pytest.raises(UserError, match="already holds a packed dataset"):
        filter_shards(scored, digits, FilterSettings(0.5))
    assert not (tmp_path / "o").exists()
    rewrite(scored, 1, 0, lambda members: {**members, "json": b"{ }"}, reindex=False)
    values = json.loads((scored / "index.json").read_text())
    values["shards"][1]["bytes"] = (scored / values["shards"][1]["file"]).stat().st_size
    (scored / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"scored-00001\.tar: checksum mismatch"):
        filter_shards(scored, tmp_path / "o", FilterSettings(0.5))
    assert not (tmp_path / "o" / "index.json").exists()
    (scored / "scored-00002.tar").unlink()
    with pytest.raises(UserError, match=r"scored-00002\.tar: No such file"):
        filter_shards(scored, tmp_path / "o", FilterSettings(0.5))


def test_the_command(tmp_path: Path, scored: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["filter", str(scored), str(tmp_path / "o"), "--keep", "0.5", "--name", "best"])
    assert result.exit_code == 0, result.output
    assert "    0  a          7 of        14  score ≥ 0.25  (2 without a score)" in result.output
    assert "kept 19 samples of 40 in 1 shard" in result.output
    assert load_index(tmp_path / "o").name == "best"
    result = runner.invoke(
        app, ["filter", str(scored), str(tmp_path / "o"), "--by", "score", "--min-score", "0.96", "--overwrite"]
    )
    assert "kept 1 sample of 40 in 1 shard" in result.output and "2 classes kept nothing" in result.output
    for arguments, message in (
        ([], "neither --keep nor --min-score"),
        (["--keep=1", "--name= "], "--name is ' '"),
    ):
        error = runner.invoke(app, ["filter", str(scored), str(tmp_path / "x"), *arguments]).exception
        assert isinstance(error, UserError) and message in str(error)


def test_the_index_may_lie_elsewhere(tmp_path: Path, scored: Path) -> None:
    filter_shards(scored, tmp_path / "expected", FilterSettings(keep=0.5))
    (tmp_path / "elsewhere").mkdir()
    for name in ("index.json", "samples.npz"):
        (scored / name).rename(tmp_path / "elsewhere" / name)
    filter_shards(scored, tmp_path / "out", FilterSettings(keep=0.5), tmp_path / "elsewhere")
    assert members_of(tmp_path / "out") == members_of(tmp_path / "expected")
    with pytest.raises(UserError, match="is the folder that is filtered"):
        filter_shards(scored, tmp_path / "elsewhere", FilterSettings(keep=0.5), tmp_path / "elsewhere")
