"""Tars that others made: indexed where they lie, read as they are, and whatever is wrong in them is named."""

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ditmoe.data.encoding.encode import encode
from ditmoe.data.encoding.plan import EncodeSettings, prepare_encoding
from ditmoe.data.encoding.vae import read_facts
from ditmoe.data.making.class_names import read_class_names
from ditmoe.data.making.foreign import ForeignResult, ForeignSettings, index_foreign, remarks
from ditmoe.data.making.ownership import Record, write_record
from ditmoe.data.making.verify import verify
from ditmoe.data.places.reader import Shard
from ditmoe.data.shards.decode import decode_image, decode_label, image_extension
from ditmoe.data.shards.index import LabelRule, load_index
from ditmoe.data.shards.sample_table import read_table
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.launcher.commands.data.group import app
from ditmoe.model.errors import UserError
from tests.data.making.foreign_tars import Named, imagenet, img2dataset, picture, write_tar
from tests.sampling.small_run import images_of

PREFIX = "ignored, no tar with a plain name (letters, digits and ._+=@,%-, a letter or digit first): "


def read_all(folder: Path, index_folder: Path | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Shape and label of every sample, decoded as the index says."""
    index = load_index(index_folder or folder)
    found = []
    for entry in index.shards:
        shard = Shard.at(folder / entry.file, entry)
        for member in range(entry.samples):
            extension = image_extension(shard.extensions(member))
            image = decode_image(extension, shard.read(member, extension) or b"", index)
            found.append((image.shape, decode_label(shard.read(member, index.label.extension), index)))
        shard.close()
    return found


def labels_in(folder: Path) -> list[int]:
    table = read_table(folder, load_index(folder))
    assert table is not None
    return table.label_N.tolist()


def indexed(folder: Path, **settings: object) -> ForeignResult:
    return index_foreign(folder, ForeignSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_imagenet_webdataset_is_read_as_it_is(tmp_path: Path, workers: int) -> None:
    folder = imagenet(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = indexed(folder, image_size=8, workers=workers)
    index = load_index(folder)
    assert result.index == index and result.problems == [] and result.samples_left_out == 0
    assert (index.name, index.image_size, index.channels, index.num_classes, index.crop) == ("in", 8, 3, 5, True)
    assert index.class_names == ("0", "1", "2", "3", "4") and index.label == LabelRule()
    assert [(s.file, s.samples, s.bytes, s.sha256) for s in index.shards] == [
        (name, 4, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(before.items())
    ]
    expected = [(shard + place) % 5 for shard in range(3) for place in range(4)]
    assert read_all(folder) == [((8, 8, 3), label) for label in expected]
    assert labels_in(folder) == expected
    assert not verify(folder).problems
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_img2dataset_with_a_label_and_a_score_inside_the_json(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion")
    result = indexed(folder, image_size=16, label="json:meta.class", score="json:meta.aesthetic", channels=1)
    index = load_index(folder)
    assert result.index == index
    assert index.class_names == ("ant", "cat", "dog")
    assert index.label == LabelRule(extension="json", key="meta.class", by_name=True)
    assert read_all(folder) == [((16, 16, 1), label) for label in (1, 2, 0, 2) * 2]
    table = read_table(folder, index)
    assert table is not None and table.score_N is not None
    np.testing.assert_array_equal(table.score_N, np.array([4, 4.1, np.nan, 4.3, 5, 5.1, np.nan, 5.3], np.float32))
    assert not verify(folder, workers=1).problems
    assert remarks(folder) == [PREFIX + "00000_stats.json, 00001_stats.json"]


def test_text_labels_and_names_from_a_file(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "x")
    names = tmp_path / "names.txt"
    names.write_text("a dog\na cat\na cow\na ant\n\n")
    result = indexed(folder, image_size=16, label="txt", class_names=read_class_names(names))
    assert result.index is not None and result.index.num_classes == 4 and result.index.label.by_name
    assert labels_in(folder) == [1, 0, 3, 0] * 2 and not verify(folder).problems
    # Numbers stay numbers where names of classes are given, unless they are such names.
    number = img2dataset(tmp_path / "n", [3, "1", 0, 2])
    indexed(number, image_size=16, label="json:meta.class", class_names=read_class_names(names))
    assert labels_in(number) == [3, 1, 0, 2] * 2
    named = img2dataset(tmp_path / "s", ["7", "8", "7", "7"])
    result = indexed(named, image_size=16, label="json:meta.class", class_names=("8", "7"))
    assert labels_in(named) == [1, 0, 1, 1] * 2 and not verify(named).problems


def test_classes_may_be_more_than_those_that_occur(tmp_path: Path) -> None:
    folder = imagenet(tmp_path / "in")
    result = indexed(folder, image_size=8, num_classes=7)
    assert result.index is not None and result.index.class_names == tuple("0123456")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_squares_of_one_size_need_no_size(tmp_path: Path, mode: str, channels: int) -> None:
    square = picture("PNG", (11, 11), mode)
    write_tar(tmp_path / "a.tar", [("x", {"png": square, "cls": b"0"})])
    write_tar(tmp_path / "b.tar", [("x", {"png": square, "cls": b"1\n"})])
    result = indexed(tmp_path)
    assert result.index is not None
    assert (result.index.image_size, result.index.channels, result.index.crop) == (11, channels, False)
    assert read_all(tmp_path) == [((11, 11, channels), 0), ((11, 11, channels), 1)]
    with pytest.raises(UserError, match=rf"--channels is {4 - channels}, and the images have {channels}"):
        indexed(tmp_path, channels=4 - channels, overwrite=True)


def test_names_that_look_like_paths_lead_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "in"
    names = ["../../escaped", "/etc/passwd", "a/../../b", "\x1b[2Jred", "latin-\udce9"]
    write_tar(folder / "a.tar", [(name, {"png": picture("PNG"), "cls": b"0"}) for name in names])
    write_tar(folder / "b.tar", [(names[0], {"png": picture("PNG"), "cls": b"none"})])
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = indexed(folder, image_size=8)
    assert result.index is None and len(result.problems) == 1
    assert f"{folder}/b.tar, sample ../../escaped: label is 'none'" in result.problems[0]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert indexed(folder, image_size=8, skip_unreadable=True).samples_left_out == 1
    added = {str(folder / "index.json"), str(folder / "samples.npz")}
    assert {str(path) for path in tmp_path.rglob("*")} - set(before) == added
    assert all(problem.isprintable() for problem in verify(folder).problems)


def test_an_index_elsewhere(tmp_path: Path) -> None:
    folder, out = imagenet(tmp_path / "in"), tmp_path / "indices" / "in"
    indexed(folder, image_size=8, out=out)
    assert not (folder / "index.json").exists() and {p.name for p in out.iterdir()} == {
        "index.json",
        "samples.npz",
    }
    assert not verify(folder, index_folder=out).problems
    assert read_all(folder, out)[0] == ((8, 8, 3), 0)
    result = CliRunner().invoke(app, ["verify", str(folder), "--index", str(out)])
    assert result.exit_code == 0 and "good: 12 images of 8×8×3 in 3 shards, 5 classes" in result.output
    with pytest.raises(UserError, match=r"already holds an index\.json"):
        indexed(folder, image_size=8, out=out)
    with pytest.raises(UserError, match="holds tars of its own"):
        indexed(folder, image_size=8, out=imagenet(tmp_path / "other"))
    with pytest.raises(UserError, match=r"--out is .*x\.json, expected a folder"):
        indexed(folder, image_size=8, out=tmp_path / "x.json")


def faulty(folder: Path) -> Path:
    """Good tars, a cut one, one that is no tar, and a good one with four faulty samples and two good ones."""
    imagenet(folder)
    cut = folder / "imagenet-train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    (folder / "noise.tar").write_bytes(os.urandom(20_000))
    image = picture("PNG")
    samples = [
        ("good", {"png": image, "cls": b"2"}),
        ("unlabelled", {"png": image}),
        ("word", {"png": image, "cls": b"cat"}),
        ("two", {"png": image, "jpg": image, "cls": b"1"}),
        ("none", {"cls": b"1"}),
        ("last", {"png": image, "cls": b"3"}),
    ]
    write_tar(folder / "some.tar", samples)
    write_tar(folder / "first.tar", [("broken", {"png": image[:40], "cls": b"1"}), ("fine", samples[0][1])])
    return folder


def test_every_problem_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = faulty(tmp_path / "in")
    result = indexed(folder, image_size=8)
    assert result.index is None and not (folder / "index.json").exists()
    assert not (folder / "samples.npz").exists()
    found = sorted(problem.replace(f"{folder}/", "") for problem in result.problems)
    for problem, start in zip(
        found,
        [
            "first.tar, sample broken: not a readable",
            "imagenet-train-000001.tar: truncated",
            "noise.tar: ",
            "some.tar, sample none: no image",
            "some.tar, sample two: 2 images",
            "some.tar, sample unlabelled: no label: expected a .cls member",
            "some.tar, sample word: label is 'cat', expected an integer",
        ],
        strict=True,
    ):
        assert problem.startswith(start), problem


def test_what_is_left_out_is_neither_read_nor_reported_again(tmp_path: Path) -> None:
    folder = faulty(tmp_path / "in")
    result = indexed(folder, image_size=8, skip_unreadable=True)
    assert result.index is not None and len(result.problems) == 7 and result.samples_left_out == 5
    assert result.index.left_out == ("imagenet-train-000001.tar", "noise.tar")
    assert [s.file for s in result.index.shards] == [
        "first.tar",
        "imagenet-train-000000.tar",
        "imagenet-train-000002.tar",
        "some.tar",
    ]
    assert labels_in(folder) == [-1, 2, 0, 1, 2, 3, 2, 3, 4, 0, 2, -1, -1, -1, -1, 3]
    report = verify(folder)
    assert report.problems == [] and report.labels.total() == 11
    output = CliRunner().invoke(app, ["verify", str(folder)]).output
    assert "good: 11 images of 8×8×3 in 4 shards, 5 classes; 5 samples left out" in output
    (folder / "new.tar").write_bytes(b"")
    assert [problem.split(": ")[1] for problem in verify(folder).problems] == ["extra"]


def test_verify_compares_the_table_with_the_shards(tmp_path: Path) -> None:
    folder = imagenet(tmp_path / "in")
    indexed(folder, image_size=8)
    path = folder / "imagenet-train-000000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmember("n00/0001.cls")
    changed = bytearray(data)
    changed[member.offset_data] = ord("4")
    path.write_bytes(changed)
    values = json.loads((folder / "index.json").read_text())
    values["shards"][0]["sha256"] = hashlib.sha256(changed).hexdigest()
    (folder / "index.json").write_text(json.dumps(values))
    assert verify(folder).problems == [f"{path}, sample n00/0001: label 4, and samples.npz says 1"]
    (folder / "samples.npz").write_bytes(b"nothing")
    assert "samples.npz: checksum mismatch" in verify(folder).problems[0]


def put(folder: Path, *samples: Named) -> Path:
    write_tar(folder / "a.tar", samples)
    return folder


IMAGE = {"jpg": picture()}
GOOD = ("s", {**IMAGE, "cls": b"1"})
NO_LABEL = ("s", {**IMAGE, "json": b'{"a": 1, "b": 2}', "txt": b"x"})

REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no folder": (lambda f: None, {}, "no such folder"),
    "no tars": (lambda f: f.mkdir(), {}, r"holds no \*\.tar"),
    "tars below": (lambda f: put(f / "sub", GOOD), {}, r"holds no \*\.tar; expected tars right in it"),
    "no good tar": (lambda f: put(f), {}, "none of the 1 tars can be read; .*a.tar: "),
    "no cls": (lambda f: put(f, NO_LABEL), {}, r"sample s: has jpg, json \(keys: a, b\), txt, and no \.cls"),
    "no key": (lambda f: put(f, NO_LABEL), {"label": "json:c"}, r"has jpg, json \(keys: a, b\).*--label json:c"),
    "no txt": (lambda f: put(f, GOOD), {"label": "txt"}, "has cls, jpg, and no label as --label txt says"),
    "label": (lambda f: put(f, GOOD), {"label": "xml"}, "--label is 'xml', expected cls, txt or json:KEY"),
    "label key": (lambda f: put(f, GOOD), {"label": "json:"}, "--label is 'json:', expected json:KEY"),
    "score": (lambda f: put(f, GOOD), {"score": "txt"}, "--score is 'txt', expected json:KEY"),
    "no score": (lambda f: put(f, GOOD), {"score": "json:q"}, "--score json:q: no sample"),
    "not square": (lambda f: put(f, GOOD), {"image_size": None}, "20×12 pixels is not square; give --image-size"),
    "npy": (lambda f: put(f, ("s", {"npy": b"", "cls": b"1"})), {"image_size": None}, "give --image-size and"),
    "palette": (
        lambda f: put(f, ("s", {"png": picture_of_mode("P"), "cls": b"1"})),
        {"image_size": None},
        "mode P, expected grey or RGB; give --image-size",
    ),
    "misnamed": (
        lambda f: put(f, ("s", {"png": picture("JPEG", (9, 9)), "cls": b"1"})),
        {"image_size": None},
        "not a readable PNG image.*; with --image-size images may be in another format",
    ),
    "unfinished pack": (lambda f: (put(f, GOOD) / "packing.lock").touch(), {}, "is being packed"),
    "unfinished pack of now": (lambda f: write_record(put(f, GOOD), Record()), {}, "is being packed"),
    "an index": (lambda f: (put(f, GOOD) / "index.json").touch(), {}, "already holds an index.json"),
    "not our index": (
        lambda f: (put(f, GOOD) / "index.json").touch(),
        {"overwrite": True},
        "an index of ours only",
    ),
    "names and a number": (
        lambda f: put(f, GOOD),
        {"class_names": ("a",), "num_classes": 2},
        "--num-classes is 2",
    ),
    "number of names": (
        lambda f: put(f, ("s", {**IMAGE, "cls": b"cat"})),
        {"num_classes": 2},
        "--num-classes is 2, and the labels are 1 names",
    ),
}


def picture_of_mode(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (9, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_input_is_one_message(tmp_path: Path, case: str) -> None:
    prepare, settings, message = REFUSALS[case]
    folder = tmp_path / "in"
    prepare(folder)
    with pytest.raises(UserError, match=message):
        index_foreign(folder, ForeignSettings(**{"image_size": 8, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "settings", "messages"),
    [
        ([b"1", b"9", b"2"], {"num_classes": 3}, ["label is '9', expected an integer from 0 to 2"]),
        ([b"1", b"200000"], {}, ["expected an integer from 0 to 99,999; more than 100,000 classes"]),
        ([b"1", b"-1", b"2.5", b"cat"], {}, ["'-1'", "'2.5'", "'cat'"]),
        ([b"cat", b"dog", b"3"], {}, ["label is '3', expected a name, as most are"]),
        ([b"cat", b"dog", b"cow"], {"class_names": ("cat", "dog")}, ["'cow', expected one of the 2 class names"]),
        ([b"1", b"", b"\x07"], {}, ["label is ''", r"label is '\x07', expected an integer from 0 on"]),
    ],
)
def test_labels_that_do_not_fit_are_named(
    tmp_path: Path, labels: list[bytes], settings: dict[str, object], messages: list[str]
) -> None:
    put(tmp_path, *((f"s{place}", {**IMAGE, "cls": label}) for place, label in enumerate(labels)))
    result = indexed(tmp_path, image_size=8, **settings)
    assert result.index is None and len(result.problems) == len(messages), result.problems
    for message in messages:
        assert any(message in problem for problem in result.problems), (message, result.problems)
    assert indexed(tmp_path, image_size=8, skip_unreadable=True, **settings).samples_left_out == len(messages)
    assert not verify(tmp_path).problems


def test_scores_must_be_numbers(tmp_path: Path) -> None:
    values = ["1", True, float("nan"), {"x": 1}, 7, None]
    samples = [
        (f"s{place}", {**IMAGE, "cls": b"0", "json": json.dumps({"q": value}).encode()})
        for place, value in enumerate(values)
    ]
    put(tmp_path, *samples, ("bad", {**IMAGE, "cls": b"0", "json": b"["}))
    result = indexed(tmp_path, image_size=8, score="json:q")
    assert [problem.split("sample ")[1][:9] for problem in result.problems] == [
        "s0: score",
        "s1: score",
        "s2: score",
        "s3: score",
        "bad: unde",
    ]


def test_images_of_another_size_are_found_by_the_first_of_each_tar(tmp_path: Path) -> None:
    for name, size in (("a", 11), ("b", 12), ("c", 11)):
        write_tar(tmp_path / f"{name}.tar", [("x", {"png": picture("PNG", (size, size)), "cls": b"0"})])
    result = indexed(tmp_path)
    assert result.problems == [
        f"{tmp_path}/b.tar, sample x: is 12×12×3 where most are 11×11×3; give --image-size to bring all to one"
    ]
    indexed(tmp_path, skip_unreadable=True)
    assert labels_in(tmp_path) == [0, -1, 0] and not verify(tmp_path).problems


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    put(tmp_path, ("s", {**IMAGE, "cls": b"1"}))
    with pytest.raises(UserError, match=r"none of the 1 samples can be used; .*'1', expected an integer"):
        indexed(tmp_path, image_size=8, num_classes=1, skip_unreadable=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.txt", "a\n\nb\n", "the name of class 1 is ''"),
        ("n.txt", "a\nb\na\n", "the name a comes twice, for the classes 0 and 2"),
        ("n.txt", "\n", "expected the name of each class"),
        ("n.json", '{"a": 1}', "expected the name of each class"),
        ("n.json", "[1]", "expected the name of each class"),
        ("n.json", "[", "could not be read"),
        ("n.json", '["a\\n"]', "characters that can be printed"),
    ],
)
def test_class_names_from_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / name)


def test_the_command(tmp_path: Path) -> None:
    folder = faulty(tmp_path / "in")
    runner = CliRunner()
    stopped = runner.invoke(app, ["index", str(folder), "--image-size", "8"])
    assert isinstance(stopped.exception, UserError) and "7 problems, and nothing was written" in str(
        stopped.exception
    )
    assert "some.tar, sample word: label is 'cat'" in stopped.output
    (folder / ".hidden.tar").touch()
    (folder / "sub").mkdir()
    done = runner.invoke(app, ["index", str(folder), "--image-size", "8", "--skip-unreadable", "--name", "x"])
    assert done.exit_code == 0, done.output
    assert PREFIX + ".hidden.tar, sub/" in done.output
    assert "2 shards and 5 samples left out" in done.output
    assert "indexed 11 images to be read as 8×8×3 in 5 classes: 4 shards" in done.output
    assert load_index(folder).name == "x"
    for arguments, message in ((["--channels", "2"], "--channels is 2"), (["--name", "\n"], "--name is")):
        error = runner.invoke(app, ["index", str(folder), *arguments]).exception
        assert isinstance(error, UserError) and message in str(error)


def epoch_of(folder: Path, **source: object) -> tuple[list[str], list[int]]:
    """Keys and labels of one epoch of the stream."""
    config = DataConfig.model_validate({"sources": [{"path": str(folder), **source}], "workers": 0, "lanes": 3})
    dataset = open_dataset(config, 0)
    total = dataset.sources[0].total
    (batch,) = islice(open_stream(dataset, dealing_of(config, start=0, micro_batch=total, ranks=1)), 1)
    assert batch.image_BCHW.shape == (total, 3, 8, 8) and not batch.skips
    return batch.keys, batch.label_B.tolist()


def test_training_reads_photographs_of_any_size_with_labels_by_name(tmp_path: Path) -> None:
    folder, out = img2dataset(tmp_path / "in"), tmp_path / "out"
    index_foreign(folder, ForeignSettings(image_size=8, label="json:meta.class", out=out))
    keys, labels = epoch_of(folder, index=str(out / "index.json"))
    names = {key: load_index(out).class_names[label] for key, label in zip(keys, labels, strict=True)}
    assert sorted(names.items()) == [
        (f"0000{shard}.tar/{place:09d}", name)
        for shard in range(2)
        for place, name in enumerate(("cat", "dog", "ant", "dog"))
    ]


def test_training_scoring_and_encoding_pass_over_what_is_left_out(tmp_path: Path, vae_folder: Path) -> None:
    folder = faulty(tmp_path / "in")
    indexed(folder, image_size=8, skip_unreadable=True)
    expected = [label for label in labels_in(folder) if label >= 0]
    keys, labels = epoch_of(folder)
    assert len(set(keys)) == 11 and sorted(labels) == sorted(expected)
    real = images_of(folder)
    batches = list(real.read_all(4))
    assert real.count == 11 and real.fingerprint != load_index(folder).fingerprint[:16]
    assert np.concatenate([batch.label_N for batch in batches]).tolist() == expected
    assert np.concatenate([batch.number_N for batch in batches]).tolist() == list(range(11))
    encoding = prepare_encoding(folder, tmp_path / "latents", read_facts(vae_folder), EncodeSettings())
    assert encoding.folder.begin(False)
    latents = encode(encoding, torch.device("cpu"))
    assert latents.total == 11 and len(latents.shards) == 4
    assert labels_in(tmp_path / "latents") == expected and not verify(tmp_path / "latents").problems


def test_keys_that_are_paths_elsewhere_are_not_taken_over(tmp_path: Path, vae_folder: Path) -> None:
    keys = ("../../escape", "/etc/cron.d/x", "plain")
    write_tar(tmp_path / "in/0.tar", [(key, {"png": picture("PNG", (8, 8)), "cls": b"0"}) for key in keys])
    write_tar(tmp_path / "in/1.tar", [("n01/0001", {"png": picture("PNG", (8, 8)), "cls": b"0"})])
    indexed(tmp_path / "in", image_size=8)
    encoding = prepare_encoding(tmp_path / "in", tmp_path / "latents", read_facts(vae_folder), EncodeSettings())
    assert encoding.folder.begin(False)
    index = encode(encoding, torch.device("cpu"))
    found = []
    for entry in index.shards:
        with tarfile.open(tmp_path / "latents" / entry.file) as tar:
            found.append(list(dict.fromkeys(name.split(".")[0] for name in tar.getnames())))
    assert found == [["00000000", "00000001", "00000002"], ["n01/0001"]]


def test_files_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    """A README comes first, and a Mac puts a file with its attributes beside each."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture_of = picture("PNG", (8, 8))
    for tar in range(2):
        with tarfile.open(folder / f"{tar}.tar", "w") as archive:
            names = ["README", "__meta__.json", ".DS_Store", "._a.png", "a.png", "._a.cls", "a.cls"]
            for name in [*names, "._b.png", "b.png", "._b.cls", "b.cls", "sub/._c.png", "sub/c.png", "sub/c.cls"]:
                data = picture_of if name.endswith(".png") and "._" not in name else b"1"
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for settings in ({}, {"image_size": 4}, {"check_images": True}, {"skip_unreadable": True}):
        result = indexed(folder, overwrite=True, **settings)
        assert result.problems == [] and result.samples_left_out == 0
        assert result.others == ["README", "__meta__"] * 2
        assert labels_in(folder) == [-1, -1, 1, 1, 1] * 2
    assert verify(folder).problems == []
    done = CliRunner().invoke(app, ["index", str(folder), "--overwrite"])
    assert done.exit_code == 0 and "indexed 6 images" in done.output
    assert "ignored: 4 entries with neither image nor label: README, __meta__, README, __meta__" in done.output


@pytest.mark.parametrize("had_index", [False, True])
def test_one_that_is_killed_between_table_and_index_can_be_repeated(tmp_path: Path, had_index: bool) -> None:
    folder = tmp_path / "in"
    write_tar(folder / "0.tar", [("a", {"png": picture("PNG", (8, 8)), "cls": b"0"})])
    if had_index:
        indexed(folder)
    os.rename(folder / "0.tar", folder / "1.tar")
    write_tar(folder / "0.tar", [(key, {"png": picture("PNG", (8, 8)), "cls": b"1"}) for key in "ab"])
    forked = os.fork()
    if not forked:
        replace = os.replace

        def dies(source: Path, target: Path) -> None:
            if target.name == "index.json":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dies  # type: ignore[assignment]
        indexed(folder, overwrite=had_index)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == -signal.SIGKILL
    assert (folder / "index.json").exists() == had_index
    write_tar(folder / "2.tar", [("c", {"png": picture("PNG", (8, 8)), "cls": b"1"})])
    assert indexed(folder, overwrite=had_index).problems == []
    assert labels_in(folder) == [1, 1, 0, 1]
    (folder / "index.json").unlink()
    (folder / "samples.npz").write_bytes(b"of an evaluation")
    with pytest.raises(UserError, match=r"samples\.npz: is in the way"):
        indexed(folder, overwrite=True)


def test_every_image_can_be_checked_and_what_is_bad_is_left_out_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for tar in range(2):
        samples = [(f"{tar}-{number}", {"png": picture("PNG", (8, 8)), "cls": b"0"}) for number in range(5)]
        samples[2][1]["png"] = b"broken"
        samples[3][1]["png"] = picture("PNG", (9, 9))
        write_tar(folder / f"{tar}.tar", samples)
    assert indexed(folder).problems == []  # the first of each tar is good
    for workers in (0, 2):
        result = indexed(folder, check_images=True, workers=workers, overwrite=True)
        assert result.index is None and len(result.problems) == 4
        assert "0.tar, sample 0-2: " in result.problems[0] and "1.tar, sample 1-2: " in result.problems[1]
        assert "0.tar, sample 0-3: is 9×9×3 where most are 8×8×3" in result.problems[2]
    indexed(folder, check_images=True, skip_unreadable=True, workers=2, overwrite=True)
    assert labels_in(folder) == [0, 0, -1, -1, 0] * 2
    keys, _ = epoch_of(folder)
    assert len(set(keys)) == 6 and images_of(folder).count == 6
    assert sum(len(batch.label_N) for batch in images_of(folder).read_all(4)) == 6
    cropped = indexed(folder, check_images=True, skip_unreadable=True, image_size=8, overwrite=True)
    assert labels_in(folder) == [0, 0, -1, 0, 0] * 2 and len(cropped.problems) == 2


def test_photographs_are_turned_as_their_exif_says_with_a_size_and_without(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: light to the right
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif, quality=95)
    write_tar(tmp_path / "a.tar", [("x", {"jpg": buffer.getvalue(), "cls": b"0"})])
    found = {}
    for size in (None, 16):
        indexed(tmp_path, image_size=size, overwrite=True)
        index = load_index(tmp_path)
        assert index.crop == (size is not None)
        found[size] = decode_image("jpg", buffer.getvalue(), index)
    np.testing.assert_array_equal(found[None], found[16])
    assert found[None][:, 12:].mean() > 240 and found[None][:, :4].mean() < 15
