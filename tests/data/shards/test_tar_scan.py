"""The scan of a tar's headers against Python's own reader, on sound archives and on damaged ones."""

import gc
import io
import shutil
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from ditmoe.data.shards.members import Extent
from ditmoe.data.shards.tar_scan import scan, split_name

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
Found = tuple[list[str], list[dict[str, Extent]], str | None]

NAMES = st.lists(
    st.tuples(
        st.text("abcé/ .0\x1b", min_size=1, max_size=8) | st.sampled_from(["x" * 120, "d/" * 60 + "y", "ü" * 90]),
        st.sampled_from([".png", ".cls", ".JSON", ".seg.png", ""]),
    ).map("".join),
    max_size=8,
)


def plain(path: Path) -> Found:
    """The scan, written with `tarfile`, for comparison."""
    keys: list[str] = []
    members: list[dict[str, Extent]] = []
    size, end = path.stat().st_size, 0

    def after() -> str:
        return f"sample {keys[-1]}" if keys else "0 samples"

    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for count, member in enumerate(tar):
                    if member.size < 0 or count > size // 512:
                        return keys, members, "damaged tar: tarfile goes round in circles"
                    end = member.offset_data + -(-member.size // 512) * 512
                    if member.isdir():
                        if member.size:
                            return keys, members, f"damaged tar: the folder {member.name!r} has data"
                        continue
                    if not member.isreg() or member.issparse():
                        return keys, members, f"member {member.name!r} is not a regular file"
                    if member.offset_data + member.size > size:
                        return keys, members, f"truncated tar: the data of {member.name!r} ends after the file"
                    if member.name.rpartition("/")[2].startswith("."):
                        continue
                    key, extension = split_name(member.name)
                    if not keys or keys[-1] != key:
                        keys.append(key)
                        members.append({})
                    if extension in members[-1]:
                        return keys, members, f"member {member.name!r} comes twice"
                    members[-1][extension] = Extent(member.offset_data, member.size)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            return keys, members, f"truncated or damaged tar after {after()}: {error}"
        except (RecursionError, IndexError, MemoryError) as error:  # its faults, not ours
            return keys, members, f"damaged tar: {error!r}"
        file.seek(end)
        if file.read(512) != bytes(512):
            return keys, members, f"truncated or damaged tar after {after()}: no end-of-archive block"
    if not keys:
        return keys, members, "tar without samples"
    if len(set(keys)) != len(keys):
        (twice, _), *_ = Counter(keys).most_common(1)
        return keys, members, f"the key {twice} comes twice"
    return keys, members, None


def found(path: Path) -> Found:
    contents = scan(path)
    return contents.keys, list(contents.members), contents.problem


def write(path: Path, names: list[str], form: int, size: int = 700, **options: object) -> None:
    with tarfile.open(path, "w", format=form, **options) as tar:  # type: ignore[call-overload]
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = (number * 391) % size
            info.mtime = 10**9 + number / 3
            try:
                tar.addfile(info, io.BytesIO(b"\x01" * info.size))
            except ValueError:  # too long for ustar
                continue


FIXTURE = [HealthCheck.function_scoped_fixture]


@given(
    names=NAMES, form=st.sampled_from(FORMATS), options=st.sampled_from([{}, {"pax_headers": {"path": "all.x"}}])
)
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE)
def test_it_finds_what_tarfile_finds(
    tmp_path: Path, names: list[str], form: int, options: dict[str, object]
) -> None:
    write(tmp_path / "a.tar", names, form, **options)
    assert found(tmp_path / "a.tar") == plain(tmp_path / "a.tar")


SOUND = ["a.png", "a.cls", "x" * 120 + ".png", "é.png", "d/e.png", "d/e.cls"]


@given(form=st.sampled_from(FORMATS), kept=st.integers(0, 14_000))
@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURE)
def test_a_truncated_tar_gives_what_came_before(tmp_path: Path, form: int, kept: int) -> None:
    path = tmp_path / "a.tar"
    write(path, SOUND, form)
    path.write_bytes(path.read_bytes()[:kept])
    assert found(path) == plain(path)


@given(
    form=st.sampled_from(FORMATS),
    flips=st.lists(st.tuples(st.integers(0, 9_000), st.integers(1, 255)), min_size=1, max_size=3),
    mended=st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=FIXTURE)
def test_damage_is_found_or_does_not_matter(
    tmp_path: Path, form: int, flips: list[tuple[int, int]], mended: bool
) -> None:
    """With `mended` the headers' checksums are right again, as a hostile archive's would be."""
    path = tmp_path / "a.tar"
    write(path, SOUND, form, size=200)
    data = bytearray(path.read_bytes())
    for at, flip in flips:
        data[at % len(data)] ^= flip
        start = at % len(data) // 512 * 512
        if mended and data[start + 257 : start + 262] == b"ustar":
            block = data[start : start + 512]
            total = sum(block[:148]) + sum(block[156:]) + 256
            data[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    keys, members, problem = found(path)
    known_keys, known_members, known_problem = plain(path)
    if problem is None:
        assert (keys, members, None) == (known_keys, known_members, known_problem)
    elif known_problem is None:
        assert "damaged tar" in problem or "not a regular file" in problem
    else:
        assert len(keys) <= len(known_keys) + 1 and problem.isprintable()


@given(data=st.binary(max_size=3_000), header=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURE)
def test_other_files_are_refused(tmp_path: Path, data: bytes, header: bool) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tarfile.TarInfo("a.png").tobuf() * header + data)
    assert found(path)[2] is not None or plain(path)[2] is None


def hostile(kind: bytes, size: bytes, data: bytes = b"") -> bytes:
    """A header of any type and size with the right checksum, data padded."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf())
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    return bytes(block) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (hostile(b"0", b"\xff" * 11 + b"\x00"), "size of 'a.png' is -256"),
        (hostile(b"0", b"\x80" + b"\x7f" * 11), "truncated tar: the data of 'a.png' ends after"),
        (hostile(b"x", b"\x80\0\0\0" + b"\x7f" * 8), "an extended header of"),
        (hostile(b"x", b"\xff" * 12), "an extended header of -1 bytes"),
        (hostile(b"L", b"00000000000\0") * 5_000, "empty header"),
        (hostile(b"x", b"00000000011\0", b"9 size=-5") * 2, "invalid header"),
        (hostile(b"x", b"00000000013\0", b"11 size=-5\n") + hostile(b"0", b"0" * 11 + b"\0"), "size of .* is -5"),
        (hostile(b"x", b"00000000031\0", b"25 GNU.sparse.major=1.0.\n"), "not a regular file"),
        (hostile(b"g", b"00000000013\0", b"11 size=99\n"), "one size for all members"),
        (hostile(b"S", b"0" * 11 + b"\0"), "'a.png' is not a regular file"),
        (hostile(b"5", b"00000000007\0"), "the folder 'a.png' has 7 bytes of data"),
        (hostile(b"5", b"0" * 11 + b"\0"), "after 0 samples: "),
        (hostile(b"2", b"0" * 11 + b"\0"), "'a.png' is not a regular file"),
        (b"", "empty file"),
        (bytes(1024), "tar without samples"),
    ],
)
def test_hostile_headers_cost_nothing(tmp_path: Path, archive: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive)
    tracemalloc.start()
    contents = scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents.problem is not None
    assert peak < 2**20
    import re

    assert re.search(message, contents.problem), contents.problem


def test_webdatasets_and_gnu_tars_own_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False)
        for number in range(700):
            writer.write({"__key__": f"dir/{number:06d}", "jpg": bytes(number * 7), "cls": b"1"})
        writer.close()
    assert found(path) == plain(path)
    assert len(found(path)[0]) == 700
    tar = shutil.which("tar")
    if tar is None or "GNU" not in subprocess.run([tar, "--version"], capture_output=True, text=True).stdout:
        return
    for name in ("0.png", "0.txt", "é" * 60 + ".png", "n" * 150 + ".png"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    files = sorted(each.name for each in tmp_path.glob("*[gt]"))
    for form in ("gnu", "pax", "ustar", "v7", "oldgnu"):
        short = [name for name in files if len(name.encode()) < 100 or form in ("gnu", "pax", "oldgnu")]
        subprocess.run([tar, f"--format={form}", "-cf", "b.tar", *short], cwd=tmp_path, check=True, timeout=30)
        assert found(tmp_path / "b.tar") == plain(tmp_path / "b.tar")
        assert found(tmp_path / "b.tar")[2] is None


def test_a_descriptor_keeps_its_position_and_members_are_small(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, [f"{number:08d}.{extension}" for number in range(1000) for extension in ("cls", "json", "png")], 1)
    with open(path, "rb") as file:
        file.seek(77)
        gc.collect()
        tracemalloc.start()
        contents = scan(file.fileno())
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert file.tell() == 77
    assert contents.problem is None and len(contents.members) == 1000
    assert kept < 200_000
    assert contents.members.extensions(-1) == ("cls", "json", "png")
    assert contents.members.find(7, "npy") is None
    assert contents.members.find(7, "json") == contents.members[7]["json"]
    assert contents.members[998:] == [contents.members[998], contents.members[999]]
