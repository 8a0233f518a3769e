"""Files from an object store, or anything else that fsspec has a file system for (`s3://`, `gs://`, `memory://`)."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import fsspec

from ditmoe.data.places.redaction import masked, shown_place
from ditmoe.data.places.transports.base import CHUNK, Broken, Ended, Refused, Reply, Stop
from ditmoe.model.errors import UserError

CHUNKS_AHEAD: Final = 4

_Chunks = queue.Queue[bytes | Exception]


class FileSystem:
    """A folder in a file system of fsspec's."""

    def __init__(self, url: str, timeout: float) -> None:
        """UserError when fsspec knows no such file system, or a package for it is not installed."""
        for each in url.split("://")[0].split("::"):  # `simplecache::s3://…` names two
            try:
                fsspec.get_filesystem_class(each)
            except ValueError as error:
                raise UserError(
                    f"data.sources: path: {shown_place(url)}: fsspec knows no {each}://; expected a local folder, "
                    "http(s)://, a file system of fsspec's, or pipe:"
                ) from error
            except ImportError as error:
                raise UserError(
                    f"data.sources: path: {shown_place(url)}: {each}:// needs a package that is not installed: "
                    f"{error}"
                ) from error
        self._url = url
        self._timeout = timeout

    def where(self, name: str) -> str:
        """The file's address, without secrets."""
        return f"{shown_place(self._url).rstrip('/')}/{name}"

    @contextmanager
    def open(self, name: str, start: int, tag: str | None, stop: Stop) -> Iterator[Reply]:
        """Read the file from `start` on, in a thread: few of fsspec's file systems give up by themselves."""
        chunks: _Chunks = queue.Queue(CHUNKS_AHEAD)
        unwanted = threading.Event()

        def wake() -> None:
            with suppress(queue.Full):  # then nobody sleeps
                chunks.put_nowait(Ended())

        threading.Thread(target=self._read, args=(name, start, chunks, unwanted), daemon=True).start()
        try:
            with stop.calling(wake):
                yield Reply(start, None, None, self._chunks(chunks))
        finally:
            unwanted.set()

    def _chunks(self, chunks: _Chunks) -> Iterator[bytes]:
        while True:
            try:
                chunk = chunks.get(timeout=self._timeout)
            except queue.Empty:
                raise Broken(f"no byte for {self._timeout:g} seconds") from None
            if isinstance(chunk, Exception):
                raise chunk
            if not chunk:
                return
            yield chunk

    def _read(self, name: str, start: int, chunks: _Chunks, unwanted: threading.Event) -> None:
        """In the thread: put chunks, then an empty one or what went wrong."""

        def put(item: bytes | Exception) -> None:
            while not unwanted.is_set():
                with suppress(queue.Full):
                    chunks.put(item, timeout=0.1)
                    return

        try:
            # In the process and thread that reads: many of these file systems do not outlive a fork.
            system, root = fsspec.url_to_fs(self._url)
            with system.open(f"{root.rstrip('/')}/{name}", "rb") as file:
                _seek(file, start)
                while not unwanted.is_set():
                    data = file.read(CHUNK)
                    put(data)
                    if not data:
                        return
        except Exception as error:  # each file system has errors of its own
            put(_translated(error))


def _seek(file: Any, start: int) -> None:
    if not start:
        return
    try:
        file.seek(start)
    except Exception as error:
        raise Broken(f"could not be read from the middle: {type(error).__name__}", restart=True) from error


def _translated(error: Exception) -> Exception:
    if isinstance(error, Broken):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Refused("no such file")
    if isinstance(error, PermissionError):
        return Refused(f"may not be read: {masked(str(error))[:300]}")
    return Broken(f"{type(error).__name__}: {masked(str(error))[:300]}")
