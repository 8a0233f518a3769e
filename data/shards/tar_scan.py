"""What lies where in a tar: its headers are read once, and nothing is unpacked.

Python's `tarfile` takes 40 µs per member and can be led astray by a damaged header (sizes below zero, headers that
claim terabytes, endless chains). Here ustar, pax and GNU long names are read by hand, with the same outcome as
`tarfile` on every archive that is sound; whatever is damaged or odd ends the scan with a problem that says so.

Names in an archive are only ever keys and extensions: nothing is extracted and no name becomes a path.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np

from ditmoe.data.shards.members import Contents, Members

BLOCK: Final = 512
"""Bytes of a header, and what members are padded to."""
ZEROS: Final = bytes(BLOCK)
WINDOW: Final = 4096
"""Bytes read at a time: the headers of small members come together."""
RUN: Final = 256
"""Headers whose checksums are computed together."""
MAX_EXTENDED: Final = 2**20
"""Most bytes of a pax or GNU header that says more of the next member."""
REGULAR: Final = b"0\x007"
"""Type bytes of a file: ustar's, that of tars before it, and a contiguous file."""
PAX: Final = b"xX"
PAX_GLOBAL: Final = b"g"
GNU_NAME: Final = b"L"
GNU_LINK: Final = b"K"
EXTENDED: Final = PAX + PAX_GLOBAL + GNU_NAME + GNU_LINK
DIRECTORY: Final = ord("5")
PAX_LENGTH: Final = re.compile(rb"([0-9]{1,20}) ")


class _Damaged(Exception):
    """The archive cannot be read on."""


class _NoHeader(Exception):
    """There is no header here: the archive's end, or damage."""


def split_name(name: str) -> tuple[str, str]:
    """A member's name as (key, extension): split at the first dot of its last part, as webdataset does.

    What cannot be printed in a name is escaped, because keys come in messages.
    """
    name = name if name.isprintable() else ascii(name)[1:-1]
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan(file: int | str | Path) -> Contents:
    """List the samples of a tar: an open descriptor, whose position is left alone, or a path.

    Never raises for what is wrong in the archive: that is its `problem`. OSError when the file cannot be read at
    all.
    """
    if isinstance(file, int):
        return _Scan(file).run()
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _Scan(descriptor).run()
    finally:
        os.close(descriptor)


class _Scan:
    """One pass over a tar's headers."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._window = b""
        self._window_start = 0
        self._offset = 0
        """Where the next header should be."""
        self._good_numbers = b""
        """Number fields that were found sound last: they are mostly the same in all headers."""
        self._names: list[str] = []
        """What extended headers say of the next member's name; the first of them has the last word."""
        self._member_size: int | None = None
        """What a pax header says of the next member's size; the first has the last word."""
        self._extended = False
        """An extended header came, so a member has to follow."""
        self._global_name: str | None = None
        self.keys: list[str] = []
        self.members = Members()

    def run(self) -> Contents:
        problem = None
        try:
            self._read_headers()
        except _Damaged as error:
            problem = str(error)
        except _NoHeader as error:
            at_zeros = self._read(self._offset, BLOCK) == ZEROS  # as at the real end
            if at_zeros and not self._extended:
                problem = self._problem_of_all()
            else:
                reason = error if self._extended or self._offset == 0 else "no end-of-archive block"
                problem = f"truncated or damaged tar after {self._after()}: {reason}"
        return Contents(self.keys, self.members, problem)

    def _problem_of_all(self) -> str | None:
        if not self.keys:
            return "tar without samples"
        if len(set(self.keys)) != len(self.keys):
            (twice, _), *_ = Counter(self.keys).most_common(1)
            return f"the key {twice} comes twice"
        return None

    def _read_headers(self) -> None:
        """Read on until there is no header, or one that ends the scan; that is raised."""
        while True:
            headers = self._run_of_headers()
            sound = _sound(headers)
            for header in headers[:sound]:
                self._check_numbers(header)
                if header[156] in EXTENDED:
                    self._read_extended(header)
                else:
                    self._read_member(header)
            if not headers or sound < len(headers):
                self._no_header()

    def _run_of_headers(self) -> list[bytes]:
        """Blocks that should be headers, each where the one before says; none where there is no block of data.

        Only a member's size is needed to find the next, so checksums are left to be computed together.
        """
        headers = []
        offset = self._offset
        for _ in range(1 if self._extended else RUN):  # after a pax header the size may be another
            header = self._block(offset)
            if len(header) < BLOCK or (header[0] == 0 and header == ZEROS):
                break
            headers.append(header)
            if header[156] not in REGULAR:
                break
            try:
                size = _number(header[124:136])
            except ValueError:
                break
            if not 0 <= size <= self._size:
                break
            offset += BLOCK + _padded(size)
        return headers

    def _no_header(self) -> None:
        """Say why there is no header at the offset."""
        if self._offset > self._size:  # what came before is there, but not the padding after it
            raise _Damaged(f"truncated or damaged tar after {self._after()}: unexpected end of data")
        header = self._block(self._offset)
        if not header:
            raise _NoHeader("empty header" if self._offset else "empty file")
        if len(header) < BLOCK:
            raise _NoHeader("truncated header")
        if header == ZEROS:
            raise _NoHeader("end of file header")
        raise _NoHeader("bad checksum")

    def _check_numbers(self, header: bytes) -> None:
        """The fields that are not needed have to be numbers too, or this is no header."""
        numbers = header[100:124] + header[136:148] + header[329:345]
        if numbers != self._good_numbers:
            try:
                for start, stop in ((0, 8), (8, 16), (16, 24), (24, 36), (36, 44), (44, 52)):
                    _number(numbers[start:stop])
                _number(header[124:136])
            except ValueError:
                raise _NoHeader("invalid header") from None
            self._good_numbers = numbers

    def _read_member(self, header: bytes) -> None:
        name = _text(header[:100])
        kind = header[156]
        if kind == 0 and name.endswith("/"):  # a folder, in tars before ustar
            kind = DIRECTORY
        if header[345]:
            name = f"{_text(header[345:500])}/{name}"
        if self._names or self._global_name is not None:
            name = (*self._names, self._global_name or "")[0]
        if kind not in REGULAR and kind != DIRECTORY:
            raise _Damaged(f"member {name!r} is not a regular file")
        size = self._number_of_bytes(header) if self._member_size is None else self._member_size
        if kind == DIRECTORY:  # as GNU tar writes of a folder; nothing is in it
            if size:
                raise _Damaged(f"damaged tar: the folder {name!r} has {size} bytes of data")
            self._pass_on(self._offset + BLOCK)
            return
        if size < 0:
            raise _Damaged(f"damaged tar: the size of {name!r} is {size}")
        data = self._offset + BLOCK
        if data + size > self._size:
            raise _Damaged(f"truncated tar: the data of {name!r} ends after the file")
        if name.rpartition("/")[2].startswith("."):  # such as ._a.jpg of a Mac; webdataset skips them too
            self._pass_on(data + _padded(size))
            return
        key, extension = split_name(name)
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self.members.begin()
        if not self.members.add(extension, data, size):
            raise _Damaged(f"member {name!r} comes twice")
        self._pass_on(data + _padded(size))

    def _pass_on(self, offset: int) -> None:
        """To the next header; what extended headers said of this member is done with."""
        self._offset = offset
        if self._extended:
            self._names, self._member_size, self._extended = [], None, False

    def _read_extended(self, header: bytes) -> None:
        """A header that says more of the next member, or (pax, global) of all."""
        size = self._number_of_bytes(header)
        if not 0 <= size <= MAX_EXTENDED:
            raise _Damaged(f"truncated or damaged tar after {self._after()}: an extended header of {size} bytes")
        self._extended = True
        data = self._read(self._offset + BLOCK, _padded(size))
        self._offset += BLOCK + _padded(size)
        if len(data) < _padded(size):
            raise _NoHeader("empty header")
        kind = header[156]
        if kind in GNU_NAME:
            self._names.append(_text(data))
        elif kind not in GNU_LINK:
            self._read_pax(_pax_records(data, self._after()), kind in PAX_GLOBAL)

    def _read_pax(self, records: dict[str, str], is_global: bool) -> None:
        name = records["path"].rstrip("/") if "path" in records else None
        if any(keyword.startswith("GNU.sparse.") for keyword in records):
            name = records.get("GNU.sparse.name", name or "after " + self._after())
            raise _Damaged(f"member {name!r} is not a regular file")
        if is_global and "size" in records:
            raise _Damaged(f"damaged tar: one size for all members after {self._after()}")
        if is_global:
            self._global_name = self._global_name if name is None else name
            return
        name = self._global_name if name is None else name
        if name is not None:
            self._names.append(name)
        if "size" in records and self._member_size is None:
            try:
                self._member_size = int(records["size"])
            except ValueError:
                raise _Damaged(f"damaged tar: a member's size is {records['size'][:40]!r}") from None

    def _number_of_bytes(self, header: bytes) -> int:
        try:
            return _number(header[124:136])
        except ValueError:
            raise _NoHeader("invalid header") from None

    def _block(self, offset: int) -> bytes:
        """The block at `offset`; shorter, or empty, at the file's end."""
        start = offset - self._window_start
        if not 0 <= start <= len(self._window) - BLOCK:
            self._window = self._read(offset, WINDOW)
            self._window_start = offset
            start = 0
        return self._window[start : start + BLOCK]

    def _read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; less only at the file's end."""
        if not 0 <= offset < self._size:
            return b""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and offset + len(data) < self._size:  # network file systems may return less
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _after(self) -> str:
        return f"sample {self.keys[-1]}" if self.keys else "0 samples"


def _sound(headers: list[bytes]) -> int:
    """How many of the headers, from the first on, have the checksum that they say; its bytes count as blanks."""
    if not headers:
        return 0
    claimed = []
    for header in headers:
        try:
            claimed.append(_number(header[148:156]))
        except ValueError:
            break
    if not claimed:
        return 0
    bytes_NB = np.frombuffer(b"".join(headers[: len(claimed)]), dtype=np.uint8).reshape(-1, BLOCK)
    sum_N = bytes_NB.sum(axis=1, dtype=np.int64) - bytes_NB[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    for number, (said, found) in enumerate(zip(claimed, sum_N.tolist(), strict=True)):
        if said != found and said != found - 256 * _high_bytes(headers[number]):
            return number
    return len(claimed)


def _high_bytes(header: bytes) -> int:
    """Bytes that old tars of Sun and NeXT summed as negative."""
    return sum(byte > 127 for byte in header[:148] + header[156:])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    """A name, up to the first NUL. Bytes that are not UTF-8 become lone surrogates, as everywhere in Python."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """A number field: octal digits, or GNU's binary. ValueError when it is neither."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0o377:
        return int.from_bytes(field[1:], "big") - (1 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0]
    return int(digits if digits.isdigit() else digits.decode("ascii").strip() or "0", 8)


def _pax_records(data: bytes, after: str) -> dict[str, str]:
    """Records "LENGTH KEYWORD=VALUE\\n", where LENGTH counts all of it; zeros end them."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        match = PAX_LENGTH.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _Damaged(f"truncated or damaged tar after {after}: invalid header")
        keyword, equals, value = data[match.end() : end - 1].partition(b"=")
        if not keyword or not equals:
            raise _Damaged(f"truncated or damaged tar after {after}: invalid header")
        records[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records
