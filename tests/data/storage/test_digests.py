"""A file's digest is never that of what it was before."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ditmoe.data.storage import digests, progress
from ditmoe.data.storage.digests import sha256_of

OLD = 1_600_000_000


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that are read, in a cache of their own; what is 8 bytes or more is large."""
    found: list[str] = []
    original = digests.digest_of

    def counted(file: Any, name: str) -> Any:
        found.append(name)
        return original(file, name)

    monkeypatch.setattr(digests, "digest_of", counted)
    monkeypatch.setattr(digests, "LARGE", 8)
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process begins."""
    monkeypatch.setattr(digests, "_known", {})


def test_a_file_is_read_once_by_all_processes(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"0123456789")
    small.write_bytes(b"0123")
    for path in (large, small):
        assert sha256_of(path) == sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read) == 2
    forget(monkeypatch)
    assert sha256_of(large) == hashlib.sha256(b"0123456789").hexdigest() and len(read) == 2
    sha256_of(small)
    assert len(read) == 3, "small files are cheap to read"


def test_another_file_of_the_name_is_read_whatever_its_size_and_time(tmp_path: Path, read: list[str]) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"0123456789")
    os.utime(path, (OLD, OLD))
    first = sha256_of(path)
    with path.open("r+b") as file:  # in place, with the time of the last change put back
        file.write(b"9")
    os.utime(path, (OLD, OLD))
    assert sha256_of(path) == hashlib.sha256(b"9123456789").hexdigest() != first
    other.write_bytes(b"8123456789")
    os.utime(other, (OLD, OLD))
    os.replace(other, path)
    assert sha256_of(path) == hashlib.sha256(b"8123456789").hexdigest()
    assert len(read) == 3


def test_what_changed_a_moment_ago_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60.0)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    sha256_of(path)
    sha256_of(path)
    assert len(read) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "odd", ["", "{", "[]", '{"identity": [1], "sha256": "0"}', '{"identity": 3}', "damaged digest"]
)
def test_a_damaged_cache_costs_time_alone(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    expected = sha256_of(path)
    (file,) = (tmp_path / "cache" / "ditmoe" / "digests").iterdir()
    if odd == "damaged digest":
        odd = json.dumps({**json.loads(file.read_text()), "sha256": "short"})
    file.write_text(odd)
    forget(monkeypatch)
    assert sha256_of(path) == expected and len(read) == 2
    # One that cannot be written, too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    forget(monkeypatch)
    assert sha256_of(path) == expected
    with pytest.raises(OSError, match="No such file"):
        sha256_of(tmp_path / "none")


def test_a_large_file_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    large, small = tmp_path / "weights.pt", tmp_path / "small"
    large.write_bytes(bytes(range(256)) * 10_000)  # 2.4 MiB
    small.write_bytes(b"0123")
    assert sha256_of(large) == hashlib.sha256(large.read_bytes()).hexdigest()
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("MiB in the checksum of weights.pt: ") for line in lines)
    assert all(any(f": {done} of 2, " in line for line in lines) for done in (1, 2))
    sha256_of(small)
    assert not capfd.readouterr().err
