"""SHA-256 of files, which are read once as long as they stay as they are.

A file is known again by its device, inode, size, and the times of its last change and of the last change of these
facts, which no program can set. What was changed a moment ago is read anew: a change within the resolution of the
clock would not show.
"""

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Final, NamedTuple

from ditmoe.data.storage.files import make_folder, open_regular, replacing
from ditmoe.data.storage.progress import show_progress
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable

LARGE: Final = 1 << 26
"""Bytes; digests of larger files are kept in the user's cache, others for this process."""
_MIB: Final = 1 << 20
SETTLED_SECONDS: Final = 60.0
"""Since the last change: more than clocks of machines differ by."""


class _Identity(NamedTuple):
    device: int
    inode: int
    bytes: int
    changed_ns: int
    facts_changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "_Identity":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


_known: dict[str, tuple[_Identity, str]] = {}


def cache_folder() -> Path:
    """What the user's programs keep to be faster: `$XDG_CACHE_HOME/ditmoe`, or `~/.cache/ditmoe`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ditmoe"


def sha256_of(path: str | Path) -> str:
    """The digest of a regular file's bytes, in hexadecimal. OSError when it cannot be read."""
    place = os.path.realpath(path)
    with open_regular(path) as file:
        before = _Identity.of(os.fstat(file.fileno()))
        digest = _remembered(place, before)
        if digest is not None:
            return digest
        digest = digest_of(file, Path(path).name)
        after = _Identity.of(os.fstat(file.fileno()))
    age = time.time() - max(after.changed_ns, after.facts_changed_ns) / 1e9
    if before == after and age > SETTLED_SECONDS:
        _remember(place, after, digest)
    return digest


def digest_of(file: io.BufferedReader, name: str) -> str:
    """The digest of the bytes of an open file, in hexadecimal; how far it is shows where the file is large.

    Args:
        name: of the file, as it is shown.
    """
    size = os.fstat(file.fileno()).st_size
    if size < LARGE:
        return hashlib.file_digest(file, "sha256").hexdigest()
    show = show_progress(f"MiB in the checksum of {printable(name)}", max(1, size // _MIB))
    digest, done = hashlib.sha256(), 0
    while block := file.read(_MIB):
        digest.update(block)
        done += len(block)
        show(done // _MIB)
    show(max(1, size // _MIB))  # that all is done, also where the file has become shorter
    return digest.hexdigest()


def _remembered(place: str, identity: _Identity) -> str | None:
    if place in _known:
        known, digest = _known[place]
        return digest if known == identity else None
    if identity.bytes < LARGE:
        return None
    try:
        stored = json.loads(_file_of(place).read_bytes())
        known, digest = _Identity(*stored["identity"]), stored["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # it is read anew
    if known != identity or not isinstance(digest, str) or len(digest) != hashlib.sha256().digest_size * 2:
        return None
    _known[place] = known, digest
    return digest


def _remember(place: str, identity: _Identity, digest: str) -> None:
    _known[place] = identity, digest
    if identity.bytes < LARGE:
        return
    try:
        make_folder(_file_of(place).parent)
        with replacing(_file_of(place)) as file:
            file.write(json.dumps({"place": place, "identity": identity, "sha256": digest}).encode())
    except (OSError, UserError):
        return  # a cache that cannot be written costs time alone


def _file_of(place: str) -> Path:
    return cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
