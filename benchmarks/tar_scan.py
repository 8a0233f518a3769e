"""The scan of a tar's headers, and the same with Python's `tarfile`; and fetching a shard from a local web server.

    python benchmarks/tar_scan.py [--samples 1000] [--repeats 15] [--folder /tmp]

Shards of three members per sample (cls, json, and an image of so many bytes). Of the repeats the fastest is shown:
the files are in the page cache, and whatever else the machine does only adds.
"""

import argparse
import hashlib
import os
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from webdataset.writer import TarWriter

from ditmoe.data.places.place import open_place
from ditmoe.data.shards.index import ShardEntry
from ditmoe.data.shards.tar_scan import scan


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def write(path: Path, samples: int, size: int) -> None:
    with open(path, "wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for number in range(samples):
            image = number.to_bytes(4, "big") * (size // 4)
            writer.write({"__key__": f"{number:08d}", "cls": b"3", "json": b'{"source": "x"}', "png": image})
        writer.close()


def plain(path: Path) -> dict[str, tuple[int, int]]:
    """The least that can be done with tarfile: where each member lies."""
    with tarfile.open(path, "r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def fastest(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def kept(function: Callable[[], object]) -> int:
    tracemalloc.start()
    result = function()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return size


def fetch_speed(folder: Path, size: int, repeats: int) -> float:
    """Bytes per second of whole shards, checksum included; the server is a thread of the same process."""
    data = os.urandom(2**20) * (size // 2**20)
    (folder / "big.tar").write_bytes(data)
    entry = ShardEntry(file="big.tar", samples=1, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = open_place(f"http://127.0.0.1:{server.server_port}", retries=0, timeout=30, cache=folder)
        seconds = fastest(lambda: os.close(place.open(entry)), repeats)
        server.shutdown()
    return len(data) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name) / "a.tar"
        print("bytes per image   tarfile   scan   (µs per member)   kept: tarfile   scan   (bytes per sample)")
        for size in (300, 8_192, 30_000, 150_000):
            write(path, options.samples, size)
            assert [extent for sample in scan(path).members for extent in sample.values()] == [
                *plain(path).values()
            ]
            slow, fast = (fastest(partial(each, path), options.repeats) for each in (plain, scan))
            members = 3 * options.samples / 1e6
            memory = [kept(partial(each, path)) / options.samples for each in (plain, scan)]
            print(
                f"{size:15,d} {slow / members:9.1f} {fast / members:6.1f} {memory[0]:32,.0f} {memory[1]:6,.0f}",
                flush=True,
            )
        print(f"fetched over http: {fetch_speed(Path(name), 128 * 2**20, 3) / 2**20:,.0f} MiB/s")


if __name__ == "__main__":
    main()
