"""Every planted fault is found by verification with shard and key, and by the stream that meets it."""

import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditmoe.data.making.verify import verify
from ditmoe.data.shards.index import load_index
from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.left_out import BEFORE_A_RUN
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.model.errors import UserError

Members = dict[str, bytes]


def read_epoch(folder: Path, workers: int = 0) -> None:
    """Read one epoch as training does."""
    config = DataConfig.model_validate({"sources": [{"path": str(folder)}], "workers": workers})
    dataset = open_dataset(config, 0)
    dataset.check_files()
    batches = open_stream(dataset, dealing_of(config, start=0, micro_batch=10, ranks=1))
    for _ in islice(batches, load_index(folder).total // 10):
        pass


def png(mode: str, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def huge_npy() -> bytes:
    """A header that claims 10^12 pixels, and nothing after it."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 1)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def without(members: Members, extension: str) -> Members:
    return {name: data for name, data in members.items() if name != extension}


def replaced(members: Members, **new: bytes) -> Members:
    return {**without(members, "png"), **new}


FAULTS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "missing label": (lambda m: without(m, "cls"), "no label"),
    "missing image": (lambda m: without(m, "png"), "no image: expected one of png"),
    "two images": (lambda m: {**m, "jpg": m["png"]}, "2 images"),
    "label outside": (lambda m: {**m, "cls": b"10"}, r"label 10 is outside the 10 classes"),
    "label negative": (lambda m: {**m, "cls": b"-1"}, "expected an integer from 0 to 9"),
    "label not a number": (lambda m: {**m, "cls": b"cat"}, r"label is 'cat'"),
    "wrong size": (lambda m: replaced(m, png=png("L", 9, 8)), "wrong size: 9×8 pixels, expected 8×8"),
    "wrong channels": (lambda m: replaced(m, png=png("RGB", 8, 8)), "wrong channels: 3, expected 1"),
    "palette": (lambda m: replaced(m, png=png("P", 8, 8)), "wrong channels: mode P, expected 1"),
    "not an image": (lambda m: replaced(m, png=b"nothing"), "not a readable PNG"),
    "empty image": (lambda m: replaced(m, png=b""), "not a readable PNG"),
    "cut image": (lambda m: replaced(m, png=m["png"][:60]), "undecodable image"),
    "misnamed image": (lambda m: replaced(m, jpg=m["png"]), "not a readable JPEG"),
    "pickled npy": (lambda m: replaced(m, npy=npy(np.array([{}], dtype=object))), "a pickle"),
    "npy of floats": (lambda m: replaced(m, npy=npy(np.zeros((8, 8, 1), np.float32))), "float32, expected uint8"),
    "npy of another shape": (lambda m: replaced(m, npy=npy(np.zeros((8, 8), np.uint8))), r"shape \[8, 8\]"),
    "cut npy": (lambda m: replaced(m, npy=npy(np.zeros((8, 8, 1), np.uint8))[:-5]), "undecodable npy"),
    "broken npy": (lambda m: replaced(m, npy=b"\x93NUMPY\x01\x00\x10\x00import os, sys; "), "undecodable npy"),
    "npy bomb": (lambda m: replaced(m, npy=huge_npy()), "wrong size or channels"),
    "only a pickle": (lambda m: replaced(m, pyd=b"cos\nsystem\n(S'false'\ntR."), "no image: .* found .*pyd"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_shard_and_key(digits: Path, rewrite: Callable[..., str], fault: str) -> None:
    change, message = FAULTS[fault]
    key = rewrite(digits, 2, 7, change)
    problems = verify(digits).problems
    assert len(problems) == 1
    with pytest.raises(UserError, match=message) as raised:
        read_epoch(digits)
    advice = f"data.sources.0.on_error=skip leaves out what cannot be used {BEFORE_A_RUN}"
    assert str(raised.value) == f"{problems[0]}; {advice}"
    assert problems[0].startswith(f"{digits}/digits-00002.tar, sample {key}: ")


def test_every_problem_is_listed(digits: Path, rewrite: Callable[..., str]) -> None:
    both = rewrite(digits, 0, 3, lambda m: {**m, "cls": b"77", "png": b"", "json": b"["})
    other = rewrite(digits, 3, 0, lambda m: without(m, "cls"))
    problems = verify(digits, workers=2).problems
    assert [f"sample {both}:" in line for line in problems] == [True, True, True, False]
    assert f"digits-00003.tar, sample {other}: no label" in problems[3]


def test_json_is_checked_but_not_needed(digits: Path, rewrite: Callable[..., str]) -> None:
    rewrite(digits, 0, 0, lambda m: without(m, "json"))
    assert not verify(digits).problems
    rewrite(digits, 0, 1, lambda m: {**m, "json": b"[1]"})
    assert "json is a list, expected an object" in verify(digits).problems[0]
    read_epoch(digits)


def test_a_flipped_bit_fails_the_checksum(digits: Path) -> None:
    path = digits / "digits-00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0x10
    path.write_bytes(data)
    problems = verify(digits).problems
    assert "digits-00001.tar: checksum mismatch" in problems[0]
    assert len(problems) == 2 and "undecodable image" in problems[1]
    with pytest.raises(UserError, match=r"digits-00001\.tar, sample \d+: undecodable image"):
        read_epoch(digits)


@pytest.mark.parametrize("kept", [0, 100, 512, 5_000, 20_333, -20_480 + 512 * 3])
@pytest.mark.parametrize("reindex", [False, True])
def test_a_truncated_tar_is_found_wherever_it_ends(digits: Path, kept: int, reindex: bool) -> None:
    """With `reindex` the index believes the truncated size, so that only the archive itself tells."""
    path = digits / "digits-00001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    if reindex:
        values = json.loads((digits / "index.json").read_text())
        values["shards"][1]["bytes"] = max(path.stat().st_size, 1)
        (digits / "index.json").write_text(json.dumps(values))
    problems = verify(digits).problems
    assert problems and all("digits-00001.tar" in line for line in problems)
    assert any("truncated" in line or "end-of-archive" in line or "samples" in line for line in problems)
    with pytest.raises(UserError, match=r"digits-00001\.tar: "):
        read_epoch(digits)


def test_a_damaged_header_is_not_taken_for_the_end(digits: Path) -> None:
    path = digits / "digits-00001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"ustar", 10_000)
    data[at - 100] ^= 0xFF
    path.write_bytes(data)
    problems = verify(digits).problems
    assert any("truncated or damaged tar after sample" in line for line in problems)
    with pytest.raises(UserError, match="truncated or damaged tar after sample"):
        read_epoch(digits)


def test_missing_and_extra_shards(digits: Path) -> None:
    (digits / "digits-00001.tar").rename(digits / "other.tar")
    assert [line.split(": ", 1)[1][:7] for line in verify(digits).problems] == ["missing", "extra: "]
    with pytest.raises(UserError, match=r"digits-00001\.tar: No such file"):
        read_epoch(digits)


def test_a_wrong_sample_count(digits: Path) -> None:
    values = json.loads((digits / "index.json").read_text())
    values["shards"][0]["samples"], values["samples"] = 24, None
    (digits / "index.json").write_text(json.dumps(values))
    assert "digits-00000.tar: 25 samples, and index.json says 24" in verify(digits).problems[0]
    with pytest.raises(UserError, match=r"digits-00000\.tar: holds 25 samples, and the index says 24"):
        read_epoch(digits)


def test_a_key_that_comes_twice(digits: Path) -> None:
    import tarfile

    path = digits / "digits-00000.tar"
    with tarfile.open(path) as tar:
        first = tar.getmembers()[0]
        data = tar.extractfile(first).read()  # type: ignore[union-attr]
    with tarfile.open(path, "a") as tar:
        tar.addfile(first, io.BytesIO(data))
    assert any(f"the key {first.name[:8]} comes twice" in line for line in verify(digits).problems)


def test_names_in_an_archive_and_an_index_are_fit_to_print(digits: Path) -> None:
    import tarfile

    path = digits / "digits-00000.tar"
    with tarfile.open(path, "a") as tar:
        for name in ("\x1b[2Jred.png", "latin-\udce9.png"):
            tar.addfile(tarfile.TarInfo(name))
    problems = verify(digits).problems
    assert all(problem.isprintable() for problem in problems)
    assert sum(r"sample \x1b[2Jred: no label" in problem for problem in problems) == 1
    values = json.loads((digits / "index.json").read_text())
    values["class_names"][3] = "3\n4"
    (digits / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"class_names: .*'3\\n4' cannot be printed"):
        load_index(digits)


def test_links_and_paths_in_an_archive_lead_nowhere(digits: Path) -> None:
    import tarfile

    path = digits / "digits-00000.tar"
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert any("'x.png' is not a regular file" in line for line in verify(digits).problems)


def test_a_workers_error_arrives_as_itself(digits: Path, rewrite: Callable[..., str]) -> None:
    rewrite(digits, 2, 7, lambda m: {**m, "cls": b"10"})
    with pytest.raises(UserError) as raised:
        read_epoch(digits, workers=2)
    assert "\n" not in str(raised.value) and "label 10 is outside" in str(raised.value)


def test_a_shard_that_vanishes_while_training(digits: Path) -> None:
    config = DataConfig.model_validate(
        {"sources": [{"path": str(digits)}], "workers": 0, "shuffle": 1, "lanes": 1}
    )
    batches = open_stream(open_dataset(config, 0), dealing_of(config, start=0, micro_batch=5, ranks=1))
    next(batches)
    for path in digits.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"\.tar: could not be opened: No such file"):
        for _ in range(20):
            next(batches)


def test_a_good_folder_and_its_histogram(digits: Path) -> None:
    report = verify(digits)
    assert not report.problems and report.labels.total() == 100
    rows = report.histogram()
    assert len(rows) == 10 and rows[3].split()[:2] == ["3", "3"]
