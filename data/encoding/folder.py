"""The folder that images are encoded into: whose it is, what is done, and what was asked for.

Several processes, on several machines, share it without a coordinator:

    OUT/packing.json           what is written here (`making/ownership.py`); there first
    OUT/encoding.json          the settings; kept beside the index
    OUT/encoding/claims/       what each process is at: a shard, the index, or the folder itself, to clear or tidy
    it                            alone; each that encodes holds `encoder-…`, which keeps others from that
    OUT/encoding/NAME.tar.json what the index will say of a shard, its labels, and the settings it was made with
    OUT/NAME.tar               takes its name when it is whole and the file above is written: then it is done
    OUT/index.json             written last, by one process; the last to leave removes the record and OUT/encoding
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError

from ditmoe.data.making.ownership import (
    CLEARING,
    FINISHED,
    PLAN_FILE,
    RECORD_FILE,
    SETTINGS_FILE,
    STATE_FOLDER,
    Record,
    clear,
    holds_dataset,
    read_record,
    refuse_holding,
    refuse_others,
    write_record,
)
from ditmoe.data.shards.index import INDEX_FILE, ShardEntry
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import is_partial, make_folder, read_settings, remove_abandoned, replacing
from ditmoe.data.storage.parts import CLAIMS_FOLDER, WAIT_SECONDS, DamagedPart
from ditmoe.model.errors import UserError
from ditmoe.model.settings import Settings

ALONE: Final = "folder"
"""Claim of a process that clears or tidies the folder."""
ENCODER: Final = "encoder-"
"""What the claims of those that encode begin with."""
_BEGIN_SECONDS: Final = 60.0
"""How long one that begins waits for another that is beginning."""


class ShardMark(Settings):
    """What is known of an encoded shard."""

    settings: str
    """Fingerprint of the settings that it was encoded with."""
    entry: ShardEntry
    labels: tuple[int, ...] = Field(min_length=1)
    """Of its samples, in their order."""
    left_out: dict[int, str] = Field(default_factory=dict)
    """Number of an image in the source's shard → why it cannot be used."""


@dataclass(frozen=True)
class EncodeFolder:
    """One folder, and the settings that its latents shall have."""

    path: Path
    settings: dict[str, Any]
    """Everything that the latents depend on, as plain data."""
    shards: tuple[str, ...]
    """Names of the tars."""
    sources: tuple[Path, ...] = ()
    """Files and folders that are read."""

    @property
    def fingerprint(self) -> str:
        """Of the settings (first 16 hex digits of SHA-256)."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def claims(self) -> Claims:
        """Who is at what."""
        return Claims(self.path / STATE_FOLDER / CLAIMS_FOLDER)

    @property
    def finished(self) -> bool:
        """Whether the index is written."""
        return (self.path / INDEX_FILE).exists()

    def begin(self, overwrite: bool) -> bool:
        """Make the folder this encode's: a new one, or one that was begun with the same settings.

        Args:
            overwrite: replace a finished dataset of ours, or an encode with other settings that nobody is at.

        Returns:
            Whether there is something left to do.

        Raises:
            UserError: the folder holds something else, or others are encoding into it with other settings.
        """
        refuse_holding(self.path, self.sources)
        deadline = time.monotonic() + _BEGIN_SECONDS
        while True:
            stored = self._stored()
            if stored == self.settings and not (self.finished and overwrite):
                self._resume()
                return not self.finished
            self._refuse(stored, overwrite)
            make_folder(self.path)
            with self._alone() as alone:
                if alone:
                    # Looked at again: another process may have begun since.
                    if self._stored() == stored:
                        self._clear()
                    continue
            # One that is clearing, or has just begun, is waited for; one that is at other latents is not.
            settled = stored not in (None, CLEARING) and stored == self._stored()
            if settled or time.monotonic() > deadline:
                raise UserError(f"{self.path}: other processes are encoding into it; wait for them, or stop them")
            time.sleep(WAIT_SECONDS)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Encode in the body: nobody clears the folder meanwhile. The last to leave a finished one tidies up.

        Raises:
            UserError: somebody is clearing it, or cleared it for other settings, since `begin`.
        """
        deadline = time.monotonic() + _BEGIN_SECONDS
        with self.claims.taken(f"{ENCODER}{uuid.uuid4().hex}"):
            # Whoever is alone there when this is claimed does not know of it. One that tidies is done at once.
            while self.claims.holder(ALONE) is not None and time.monotonic() < deadline:
                time.sleep(WAIT_SECONDS)
            if self.claims.holder(ALONE) is not None or self._stored() != self.settings:
                raise UserError(f"{self.path}: another process has begun to encode into it anew")
            yield
        self._tidy()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep others from the folder for the body; False where somebody encodes, or is alone there already."""
        with self.claims.taken(ALONE) as claim:
            yield claim is not None and not self.claims.any_held(ENCODER)

    def write_mark(self, mark: ShardMark) -> None:
        """Write down a shard that is about to take its name."""
        with replacing(self._mark_path(mark.entry.file)) as file:
            file.write(mark.model_dump_json().encode() + b"\n")

    def read_mark(self, shard: str) -> ShardMark:
        """What was written down of a finished shard.

        Raises:
            DamagedPart: shard or mark are not whole.
            UserError: nothing was written down, so that the shard is somebody else's, or it has other settings.
        """
        path, mark_path = self.path / shard, self._mark_path(shard)
        try:
            mark = ShardMark.model_validate_json(mark_path.read_bytes())
            size = path.stat().st_size
        except FileNotFoundError as error:
            if not path.exists():
                raise DamagedPart(path, error) from error
            raise UserError(
                f"{mark_path}: could not be read ({error}); delete {path}, it is encoded again"
            ) from None
        except (OSError, ValidationError) as error:
            raise DamagedPart(path, error) from error
        if mark.settings != self.fingerprint:
            raise UserError(
                f"{path}: was encoded with settings {mark.settings}, expected {self.fingerprint}; "
                "delete it, it is encoded again"
            )
        if mark.entry.file != shard or size != mark.entry.bytes:
            raise DamagedPart(path, f"{size:,} bytes, and {mark_path} says {mark.entry.bytes:,}")
        return mark

    def _mark_path(self, shard: str) -> Path:
        return self.path / STATE_FOLDER / f"{shard}.json"

    def _stored(self) -> dict[str, Any] | None:
        """The settings that the folder was begun with; None: it never was."""
        return read_settings(self.path / SETTINGS_FILE)

    @property
    def _record(self) -> Record:
        """What an encode writes."""
        return Record(files=(*FINISHED, SETTINGS_FILE, f"{STATE_FOLDER}/", *self.shards))

    def _resume(self) -> None:
        """Take up an encode with the same settings, at whatever point it was left."""
        if self.finished:
            self._tidy()  # the last one to leave may have been killed before it could
        else:
            remove_abandoned(self.path)
            if read_record(self.path) is None:  # of a version that kept none
                write_record(self.path, self._record)

    def _tidy(self) -> None:
        """Remove what a finished encode no longer needs, unless others are still at it."""
        record = read_record(self.path)
        if not self.finished or record is None:
            return
        state = self.path / STATE_FOLDER
        with self._alone() as alone:
            if alone and self.finished:
                try:
                    for name in os.listdir(self.path):
                        if is_partial(name):
                            (self.path / name).unlink(missing_ok=True)
                    if record.names(f"{STATE_FOLDER}/"):
                        shutil.rmtree(state)
                    (self.path / RECORD_FILE).unlink(missing_ok=True)
                except OSError as error:
                    if error.errno == errno.ENOTEMPTY:
                        return  # another process has just come, and will tidy when it leaves
                    raise UserError(f"{self.path}: could not be tidied: {error.strerror or error}") from error

    def _refuse(self, stored: dict[str, Any] | None, overwrite: bool) -> None:
        """UserError where what is there shall stay, or is not ours."""
        if stored != CLEARING and not overwrite and holds_dataset(self.path):
            other = f" ({self._difference(stored)})" if stored is not None else ""
            raise UserError(f"{self.path}: already holds a packed dataset{other}; --overwrite replaces it")
        refuse_others(self.path)
        if (self.path / PLAN_FILE).exists() and not self.finished and not overwrite:
            raise UserError(f"{self.path}: holds a synthesis that is not finished; --overwrite replaces it")
        if stored is not None and stored != CLEARING and not overwrite:
            raise UserError(
                f"{self.path}: an encode with other settings was begun here ({self._difference(stored)}); "
                "--overwrite begins anew"
            )

    def _difference(self, stored: dict[str, Any] | None) -> str:
        stored = stored or {}
        keys = [key for key in {**self.settings, **stored} if stored.get(key) != self.settings.get(key)]
        changes = [f"{key} was {stored.get(key)!r}, now {self.settings.get(key)!r}" for key in keys]
        return "; ".join(changes) or "the same settings"

    def _clear(self) -> None:
        """Empty the folder of what is ours, and write the settings down."""
        # Who is killed in the midst leaves nothing that could be taken for begun or finished.
        if (self.path / SETTINGS_FILE).exists():
            self._write_settings(CLEARING)
        clear(self.path, self._record, keep=(SETTINGS_FILE, f"{STATE_FOLDER}/"))
        self._write_settings(CLEARING)
        try:
            for path in (self.path / STATE_FOLDER).iterdir():
                if path.suffix == ".json" or is_partial(path.name):
                    path.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: could not be cleared: {error.strerror or error}") from error
        self._write_settings(self.settings)

    def _write_settings(self, settings: dict[str, Any]) -> None:
        with replacing(self.path / SETTINGS_FILE) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
