"""Who wrote the files of a folder: commands that write datasets remove only what one of them has written.

    OUT/packing.json    the record of what is written here: created first, removed when the dataset is finished
    OUT/.packing.0      the claim of the process that writes

A finished dataset has no record. Its index names the shards, whose tars name `ditmoe` as their owner, and the
table with its checksum, as does one whose writer was killed before it took its name; the contact sheet is known by
its form. Anything else belongs to others.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Generic, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from ditmoe.data.making.preview import PREVIEW_FILE, is_contact_sheet
from ditmoe.data.shards.index import INDEX_FILE, DatasetIndex, load_index
from ditmoe.data.shards.sample_table import TABLE_FILE, tables_of_unfinished
from ditmoe.data.shards.writer import OWNER
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import is_partial, make_folder, replacing
from ditmoe.data.storage.parts import CLAIMS_FOLDER
from ditmoe.model.errors import UserError
from ditmoe.model.settings import Settings

CLAIM: Final = ".packing"
"""Name of the claim on a folder that is written to."""
OLD_LOCK_FILE: Final = "packing.lock"
"""What earlier versions left there; empty."""
RECORD_FILE: Final = "packing.json"
PLAN_FILE: Final = "synthesis.json"
"""Lies in a folder of synthetic images: what they depend on. Without an index beside it they are not finished."""
WORK_FOLDER: Final = "work"
"""What a synthesis needs to go on, until it is finished."""
SETTINGS_FILE: Final = "encoding.json"
"""Lies in a folder of latents: what they depend on."""
STATE_FOLDER: Final = "encoding"
"""What an encode needs to go on, until it is finished."""
CLEARING: Final = {"clearing": True}
"""Stands in place of an encode's settings while the folder is being emptied."""

_DESCRIPTIONS: Final = {
    PLAN_FILE: ("checkpoint", "sampler", "count", "classes"),
    SETTINGS_FILE: ("form", "source_sha256", "vae_sha256"),
}
"""File that says what a dataset depends on → keys that it has."""
FINISHED: Final = (INDEX_FILE, TABLE_FILE, PREVIEW_FILE)
"""What every dataset of ours ends with."""
_LARGEST_RECORD: Final = 2**26
_REPLACEMENT: Final = re.compile(r"\.packing-[0-9a-f]{32}/")
"""Name of a folder in which a dataset is made that is to take the place of another."""
_READ_BEFORE_CLEARING: Final = 16
"""Samples that are made before anything is removed: a source at fault mostly is from its first images on."""

Item = TypeVar("Item")


class Record(Settings):
    """What a command is writing into a folder, or removing from it."""

    format: Literal["ditmoe-packing"] = "ditmoe-packing"
    files: tuple[str, ...] = ()
    """Names of files, and of folders with a `/` at the end."""
    stem: str | None = None
    """Of the shards STEM-00000.tar, STEM-00001.tar, …; null: `files` names them."""

    def names(self, entry: str) -> bool:
        """Whether it is of a file or folder of this name."""
        shard = self.stem is not None and re.fullmatch(rf"{re.escape(self.stem)}-\d{{5,}}\.tar", entry)
        return bool(shard) or entry in self.files


class Belongings(NamedTuple):
    """What lies in a folder."""

    ours: list[str]
    """Names of what datasets of ours have written; of folders with a `/` at the end. The index comes first."""
    others: list[str]
    """Names of the rest."""


@dataclass(frozen=True)
class _Known:
    """What speaks for a file."""

    folder: Path
    record: Record
    index: DatasetIndex | None

    @cached_property
    def shards(self) -> frozenset[str]:
        """Names of the shards that the index lists."""
        return frozenset(() if self.index is None else (shard.file for shard in self.index.shards))

    @cached_property
    def tables(self) -> dict[str, frozenset[str]]:
        """Name of a table → checksums that indices give it, among them those whose writer was killed."""
        tables = {TABLE_FILE: tables_of_unfinished(self.folder)}
        named = None if self.index is None else self.index.samples
        if named is not None:
            tables[named.file] = tables.get(named.file, frozenset()) | {named.sha256}
        return tables

    def owns(self, name: str) -> bool:
        """Whether an entry (a folder with `/` at the end) was written by a program of ours."""
        path = self.folder / name
        if path.is_symlink():  # none is ever made
            return False
        if name.endswith("/"):
            return self.record.names(name) or (name == f"{STATE_FOLDER}/" and _holds_claims_alone(path))
        if not path.is_file():
            return False
        if is_partial(name):
            return True
        if name == OLD_LOCK_FILE:
            return path.stat().st_size == 0
        if name in _DESCRIPTIONS:
            return _describes(path, _DESCRIPTIONS[name])
        if name.endswith(".tar"):
            return (name in self.shards or self.record.names(name)) and is_tar_of_ours(path)
        if self.record.names(name):
            return True
        if name in self.tables:
            return hashlib.sha256(path.read_bytes()).hexdigest() in self.tables[name]
        if self.index is None:
            return False
        if name == INDEX_FILE:
            return True
        return name == PREVIEW_FILE and is_contact_sheet(path, self.index.class_names)


def look_through(folder: Path) -> Belongings:
    """Separate what is ours in a folder from what is not; hidden files are neither, and stay.

    Raises:
        UserError: the folder, or a file of it, cannot be read.
    """
    try:
        entries = sorted(f"{entry.name}/" if _is_folder(entry) else entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return Belongings([], [])
    except OSError as error:
        raise UserError(f"{folder}: could not be read: {error.strerror or error}") from error
    record = read_record(folder)
    known = _Known(folder, record or Record(), _index_of(folder))
    ours, others = [], []
    for name in entries:
        try:
            owned = known.owns(name)
        except OSError as error:
            if os.path.lexists(folder / name):
                raise UserError(f"{folder / name}: could not be read: {error.strerror or error}") from error
            continue
        if owned or (name == RECORD_FILE and record is not None):
            ours.append(name)
        elif not name.startswith(".") and name != "lost+found/" and os.path.lexists(folder / name):
            others.append(name)
    return Belongings(sorted(ours, key=lambda name: name != INDEX_FILE), others)


def refuse_holding(folder: Path, sources: Iterable[Path]) -> None:
    """UserError when a folder that is to be written holds any of the files and folders that are to be read."""
    home = folder.resolve()
    for source in sources:
        if source.resolve().is_relative_to(home):
            raise UserError(f"{folder}: holds {source}, which is to be read; choose another folder")


def refuse_others(folder: Path) -> list[str]:
    """What is ours in a folder that is to be written. UserError when it holds anything else."""
    ours, others = look_through(folder)
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise UserError(
            f"{folder}: holds {others[0]}{more}, which `ditmoe` did not write there; "
            "choose another folder, or move it elsewhere (nothing was changed)"
        )
    return ours


def clear(folder: Path, planned: Record, keep: Collection[str] = ()) -> None:
    """Remove what is ours from a folder, except `keep`, and record what comes next. The caller holds its claim.

    Raises:
        UserError: it holds something else, or the file system refuses.
    """
    removed = [name for name in refuse_others(folder) if name not in (RECORD_FILE, *keep)]
    # Whoever is killed from here on leaves a record of all that is there, and the next one can go on.
    write_record(folder, planned.model_copy(update={"files": (*planned.files, *removed)}))
    try:
        for name in removed:
            if name.endswith("/"):
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be cleared: {error.strerror or error}") from error
    write_record(folder, planned)


def release(folder: Path) -> None:
    """Remove the record: the dataset is finished."""
    (folder / RECORD_FILE).unlink(missing_ok=True)
    lock = folder / OLD_LOCK_FILE
    if lock.is_file() and not lock.is_symlink() and lock.stat().st_size == 0:
        lock.unlink()


class Place(NamedTuple, Generic[Item]):
    """Where a dataset is to be written, and from what."""

    folder: Path
    samples: Iterator[Item]


@contextmanager
def claimed(
    folder: Path, stem: str, overwrite: bool, samples: Iterable[Item], sources: Iterable[Path] = ()
) -> Iterator[Place[Item]]:
    """Claim `folder` for this process; the body writes a dataset into the place that it is given, the index last.

    Once the first of the new samples are at hand, an unfinished dataset in `folder` is removed. A finished one
    stays until the new one, which is written into a folder within, is finished: a fault in between costs nothing.

    Args:
        stem: of the names of the shards.
        overwrite: whether a finished dataset may be replaced.
        samples: what is written, in order.
        sources: files and folders that the dataset is made from.

    Raises:
        UserError: the folder holds a finished dataset and not `overwrite`, anything that is not ours, or a source;
            another process writes to it; or one of the samples cannot be used.
    """

    def check() -> None:
        refuse_finished(folder, overwrite)
        refuse_others(folder)
        for plan, what in ((PLAN_FILE, "a synthesis"), (SETTINGS_FILE, "an encode")):
            if not overwrite and (folder / plan).exists():
                raise UserError(f"{folder}: holds {what} that is not finished; --overwrite replaces it")

    refuse_holding(folder, sources)
    check()
    try:
        make_folder(folder)
        claims = Claims(folder)
        with claims.taken(CLAIM) as claim:
            if claim is None:
                raise UserError(f"{folder}: another process is writing to it{claims.who(CLAIM)}")
            check()  # another one may have ended since
            remaining = iter(samples)
            first = list(itertools.islice(remaining, _READ_BEFORE_CLEARING))
            planned = Record(files=FINISHED, stem=stem)
            if holds_dataset(folder):
                with _replaced(folder, planned) as within:
                    yield Place(within, itertools.chain(first, remaining))
            else:
                clear(folder, planned)
                yield Place(folder, itertools.chain(first, remaining))
            release(folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from error


@contextmanager
def _replaced(folder: Path, planned: Record) -> Iterator[Path]:
    """A new folder within, for the dataset that takes the place of the one in `folder` when the body has ended."""
    record = read_record(folder)
    abandoned = [name for name in (record.files if record is not None else ()) if _REPLACEMENT.fullmatch(name)]
    name = f".packing-{uuid.uuid4().hex}/"
    # Before it is there: whoever is killed from here on leaves a record of it.
    write_record(folder, Record(files=(name, *abandoned)))
    within = folder / name
    try:
        for old in abandoned:
            shutil.rmtree(folder / old, ignore_errors=True)
        within.mkdir()
        yield within
    except BaseException:
        shutil.rmtree(within, ignore_errors=True)
        release(folder)
        raise
    clear(folder, planned.model_copy(update={"files": (*planned.files, name)}), keep=(name,))
    for path in sorted(within.iterdir(), key=lambda path: path.name == INDEX_FILE):
        path.rename(folder / path.name)
    within.rmdir()


def holds_dataset(folder: Path) -> bool:
    """Whether a finished dataset of ours is there."""
    return _index_of(folder) is not None


def refuse_finished(folder: Path, overwrite: bool) -> None:
    """UserError when a finished dataset of ours is there."""
    if not overwrite and holds_dataset(folder):
        raise UserError(f"{folder}: already holds a packed dataset; --overwrite replaces it")


def is_tar_of_ours(path: Path) -> bool:
    """Whether a tar names `ditmoe` as the owner of its first member, at no time, as no other program does."""
    try:
        with tarfile.open(path, "r:") as tar:
            first = tar.next()
    except (OSError, tarfile.TarError, ValueError):
        return False
    return first is not None and (first.uname, first.gname, first.mtime) == (OWNER, OWNER, 0)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def _holds_claims_alone(folder: Path) -> bool:
    """Whether a folder has nothing in it but claims: another process has just begun to use it."""
    claims = folder / CLAIMS_FOLDER
    if [path for path in folder.iterdir() if path != claims or path.is_symlink() or not path.is_dir()]:
        return False
    return all(name.startswith(".") for name in Claims(claims).listing().others)


def _describes(path: Path, keys: Sequence[str]) -> bool:
    """Whether a JSON file has the keys of a description of a dataset."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and (values == CLEARING or all(key in values for key in keys))


def _index_of(folder: Path) -> DatasetIndex | None:
    """The index of a folder; null: it has none of ours."""
    try:
        return load_index(folder) if (folder / INDEX_FILE).is_file() else None
    except UserError:
        return None


def read_record(folder: Path) -> Record | None:
    """The record of a folder; null: it has none, or a file of that name that is not ours."""
    path = folder / RECORD_FILE
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
            return None
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_record(folder: Path, record: Record) -> None:
    with replacing(folder / RECORD_FILE) as file:
        file.write(record.model_dump_json(indent=1).encode() + b"\n")
