"""Image folders with a list of labels and scores: what is packed of them, and what is said about wrong rows."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.making.verify import verify
from ditmoe.data.shards.index import load_index
from ditmoe.data.shards.sample_table import read_table
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError

ROWS = [
    {"file": "a/0.png", "label": "moth", "score": 0.5, "prompt": "a moth, at dusk"},
    {"file": "1.png", "label": "bee", "score": 0.25, "prompt": "a bee"},
    {"file": "a/2.png", "label": "moth", "prompt": ""},
]
CSV = '\ufefffile,label,score,prompt\na/0.png,moth,0.5,"a moth, at dusk"\n1.png,bee,0.25,a bee\n\na/2.png,moth,,\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "drawn"
    (path / "a").mkdir(parents=True)
    for number, name in enumerate(("a/0.png", "1.png", "a/2.png", "a/unlisted.png")):
        Image.new("RGB", (10, 10), (80 * number, 5, 5)).save(path / name)
    return path


def listed(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"labels.{kind}"
    text = {"csv": CSV, "json": json.dumps(ROWS), "jsonl": "\n\n".join(map(json.dumps, ROWS))}[kind]
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_labels_scores_and_provenance_are_packed(tmp_path: Path, folder: Path, kind: str) -> None:
    source = open_source(str(folder), seed=0, labels=listed(tmp_path, kind))
    assert len(source) == 3 and source.class_names == ("bee", "moth")
    assert source.remarks() == [f"left out: 1 image that {tmp_path}/labels.{kind} does not list"]
    out = tmp_path / "out"
    pack(source, out, PackSettings(seed=3))
    with tarfile.open(out / "drawn-00000.tar") as tar:
        found = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
        }
    assert found["00000000.cls"] == b"1" and found["00000001.cls"] == b"0"
    assert json.loads(found["00000000.json"]) == {
        "source": "a/0.png",
        "score": 0.5,
        "provenance": {"prompt": "a moth, at dusk"},
    }
    assert "score" not in json.loads(found["00000002.json"])
    table = read_table(out, load_index(out))
    assert table is not None and table.score_N is not None
    assert sorted(table.score_N[~np.isnan(table.score_N)].tolist()) == [0.25, 0.5]
    assert not verify(out).problems


def test_numbers_and_names_from_a_file(tmp_path: Path, folder: Path) -> None:
    labels = tmp_path / "l.csv"
    labels.write_text("label,file\n2,1.png\n0,a/0.png\n")
    assert open_source(str(folder), seed=0, labels=labels).class_names == ("0", "1", "2")
    source = open_source(str(folder), seed=0, labels=labels, class_names=("x", "y", "z"))
    assert source.class_names == ("x", "y", "z") and source.read(0).label == 2
    assert source.read(0).metadata == {"source": "1.png"}
    labels.write_text("label,file\nz,1.png\nx,a/0.png\n")
    source = open_source(str(folder), seed=0, labels=labels, class_names=("z", "x", "w"))
    assert [source.read(number).label for number in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "", "its first line is '', expected one column named file"),
        ("l.csv", "file,class\n", "its first line is 'file,class', expected one column named label"),
        ("l.csv", "file,label,x,x\n", "names a column twice"),
        ("l.csv", "file,label\n", "lists no images"),
        ("l.csv", "file,label\n1.png,0\n1.png\n", r"l\.csv, line 3: 1 columns, and the first line has 2"),
        ("l.csv", 'file,label\n"1.png,0\n', r"l\.csv, line 2: unexpected end"),
        ("l.csv", "file,label\n1.png,0\n1.png,1\n", r"l\.csv, line 3: 1\.png comes twice, first in line 2"),
        ("l.csv", "file,label\n/etc/x.png,0\n", r"line 2: file is '/etc/x\.png', which leads out of the folder"),
        ("l.csv", "file,label\na/../../x.png,0\n", "line 2: file is .*, which leads out of the folder"),
        ("l.csv", "file,label\n,0\n", "line 2: file is None, expected the path"),
        ("l.csv", "file,label\n1.png,-1\n", "line 2: label is '-1', expected a number from 0 on, or a name"),
        ("l.csv", "file,label\n1.png,\n", "line 2: label is 'None', expected a number"),
        ("l.csv", "file,label,score\n1.png,0,good\n", "line 2: score is 'good', expected a finite number"),
        ("l.csv", "file,label,score\n1.png,0,nan\n", "line 2: score is 'nan', expected a finite number"),
        ("l.csv", "file,label\n1.png,bee\na/0.png,3\n", "line 3: label is '3', a number, where the first row has"),
        ("l.csv", "file,label\n1.png,3\na/0.png,bee\n", "line 3: label is 'bee', expected a number from 0 to"),
        ("l.csv", "file,label\n1.png,100000\n", "line 2: label is '100000', expected a number from 0 to 99,999"),
        ("l.json", "{", r"l\.json: could not be read"),
        ("l.json", "{}", r"l\.json: is a dict, expected a list of objects"),
        ("l.json", '[{"file": "1.png", "label": 1}, 3]', r"l\.json, entry 2: is a int, expected an object"),
        ("l.json", '[{"file": "1.png", "label": true}]', "entry 1: label is 'True', expected a number"),
        ("l.json", '[{"file": "1.png", "label": 1, "score": true}]', "entry 1: score is 'True'"),
        ("l.json", '[{"file": "1.png", "label": 1, "score": NaN}]', "entry 1: score is 'nan'"),
        ("l.jsonl", '{"file": "1.png", "label": 1}\n[', r"l\.jsonl, line 2: could not be read"),
        ("l.txt", "1.png 3", r"--labels is .*l\.txt, expected a file \.csv, \.json or \.jsonl"),
        ("l.csv", "file,label\n\udce9.png,0\n", "is not UTF-8 text"),
    ],
)
def test_wrong_lists_are_refused_by_file_and_row(
    tmp_path: Path, folder: Path, name: str, text: str, message: str
) -> None:
    labels = tmp_path / name
    labels.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        open_source(str(folder), seed=0, labels=labels)


def test_many_wrong_rows_are_shortened(tmp_path: Path, folder: Path) -> None:
    labels = tmp_path / "l.csv"
    labels.write_text("file,label\n" + "1.png,?-1\n/,0\n" * 30)
    with pytest.raises(UserError) as raised:
        open_source(str(folder), seed=0, labels=labels)
    lines = str(raised.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "and 39 more rows"


def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path: Path, folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"nothing")
    labels = tmp_path / "l.csv"
    labels.write_text("file,label\nbad.png,0\nnone.png,0\n1.png,0\n")
    source = open_source(str(folder), seed=0, labels=labels)
    with pytest.raises(UserError, match=r"l\.csv, line 2: .*bad\.png: not a readable"):
        source.read(0)
    with pytest.raises(UserError, match=r"l\.csv, line 3: .*none\.png: could not be read: No such file"):
        source.read(1)
    assert len(pack(source, tmp_path / "out", PackSettings(skip_unreadable=True)).skipped) == 2


def test_the_command(tmp_path: Path, folder: Path) -> None:
    runner = CliRunner()
    labels, out = listed(tmp_path, "csv"), tmp_path / "out"
    result = runner.invoke(app, ["pack", str(folder), str(out), "--labels", str(labels), "--image-size", "8"])
    assert result.exit_code == 0, result.output
    assert "packed 3 images of 8×8×3 in 2 classes" in result.output
    names = tmp_path / "names.txt"
    names.write_text("bee\nfly\n")
    for arguments, message in (
        (["digits", str(tmp_path / "o"), "--labels", str(labels)], "and digits is no folder"),
        ([str(folder), str(tmp_path / "o"), "--class-names", str(names)], "expected only with --labels"),
        (
            [str(folder), str(tmp_path / "o"), "--labels", str(labels), "--class-names", str(names)],
            "line 2: label is 'moth', expected one of the 2 class names",
        ),
        ([str(folder), str(tmp_path / "o"), "--labels", str(labels), "--classes", "3"], "--classes is for"),
        ([str(folder), str(tmp_path / "o"), "--labels", str(tmp_path / "no.csv")], "could not be read"),
    ):
        error = runner.invoke(app, ["pack", *arguments]).exception
        assert isinstance(error, UserError) and message in str(error), error
