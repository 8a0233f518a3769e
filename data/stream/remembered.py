"""What a checkpoint keeps of where its data came from, and which of it later commands open without being told.

A run folder is copied and handed on, so what its checkpoints say is a stranger's word: it may name a folder or an
address to read from, but nothing that starts a program, logs in, or reaches through other file systems. Such a
source is opened only when the user names it. Nor do checkpoints keep what nobody else should read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ditmoe.data.places.place import SCHEME
from ditmoe.data.places.redaction import HIDDEN, PIPE, shown_place, without_secrets
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.model.errors import UserError
from ditmoe.model.settings import message_of

OPENED_UNASKED: Final = (
    "http",
    "https",
    "file",
    "memory",
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
)
"""Kinds of address that a checkpoint may send a command to: files are read from there, nothing else happens."""


def kept_in_checkpoint(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as its checkpoints keep it.

    Local paths of sources are made absolute, so that they are found from other directories. Passwords, queries of
    addresses and commands are left out: only the run's own config.yaml has them.
    """
    kept: dict[str, Any] = without_secrets(config)
    for source in kept["data"]["sources"]:
        if _is_local(source["path"]):
            source["path"] = os.path.abspath(source["path"])
        if source["index"] is not None:
            source["index"] = os.path.abspath(source["index"])
    return kept


@dataclass(frozen=True)
class RememberedData:
    """The section `data` of a checkpoint's configuration."""

    config: DataConfig
    origin: str
    """The checkpoint, for messages."""
    option: str = "--data"
    """With which the user names a source."""

    def source(self, number: int, named: str | None = None, index: Path | None = None) -> SourceConfig:
        """One of the run's sources, to be opened.

        Args:
            named: where the user says that its shards lie; None: where the checkpoint says.
            index: folder of its index, where the user says that it is not with the shards.

        Raises:
            UserError: the user names no place, and the one that is remembered is not opened unasked.
        """
        source = self.config.sources[number]
        if named is not None:
            return source.model_copy(update={"path": named, "index": index_file(index)})
        self._check(source.path)
        return source if index is None else source.model_copy(update={"index": index_file(index)})

    def data(self, named: Sequence[str] = (), **changes: Any) -> DataConfig:
        """All of the run's data, to be opened.

        Args:
            named: where the user says that the shards of each source lie; empty: where the checkpoint says.
            changes: to other keys of the section.

        Raises:
            UserError: as `source`, or `named` has another length than the sources.
        """
        count = len(self.config.sources)
        if named and len(named) != count:
            raise UserError(
                f"{self.option} is given {len(named)} time{'s' if len(named) > 1 else ''}, and {self.origin} was "
                f"trained on {count} source{'s' if count > 1 else ''}; expected one for each, or none"
            )
        sources = tuple(self.source(number, named[number] if named else None) for number in range(count))
        return self.config.model_copy(update={"sources": sources, "cache": self.cache, **changes})

    @property
    def cache(self) -> Path | None:
        """The folder for remote shards, where this machine has it; none is made on a checkpoint's word."""
        cache = self.config.cache
        return cache if cache is not None and cache.is_dir() else None

    def _check(self, path: str) -> None:
        if path.startswith(PIPE):
            problem = "a command, which is never started on a checkpoint's word"
        elif path != shown_place(path) or f"{HIDDEN}@" in path or path.endswith(f"?{HIDDEN}"):
            problem = "an address with a password or a query, which checkpoints do not keep"
        elif (scheme := SCHEME.match(path)) is not None and (
            scheme[2] != "://" or "::" in path or scheme[1].lower() not in OPENED_UNASKED
        ):
            problem = f"{scheme[1]}{scheme[2]}…, which is not opened on a checkpoint's word"
        else:
            return
        raise UserError(
            f"{self.origin}: was trained on {shown_place(path)}: {problem}; name the source with {self.option}"
        )


def remembered_data(config: Mapping[str, Any], origin: str, option: str = "--data") -> RememberedData | None:
    """The data that a checkpoint's configuration names; None: it names none, as for converted weights.

    UserError when it cannot be read.
    """
    stored = config.get("data")
    if stored is None:
        return None
    try:
        return RememberedData(DataConfig.model_validate(stored), origin, option)
    except ValidationError as error:  # its own text quotes values, and with them passwords
        problems = [f"{'.'.join(map(str, each['loc']))}: {message_of(each)}" for each in error.errors()]
        raise UserError(f"{origin}: its section `data` cannot be read: {'; '.join(problems[:3])}") from None


def index_file(folder: Path | None) -> Path | None:
    """The index in a folder that the user names."""
    return None if folder is None else folder / "index.json"


def _is_local(path: str) -> bool:
    return not path.startswith(PIPE) and SCHEME.match(path) is None
