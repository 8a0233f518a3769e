"""The stream over shards that lie elsewhere: the same samples in the same order, whatever breaks on the way."""

import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
import torch

from ditmoe.data.stream.config import DataConfig
from ditmoe.data.stream.dataset import open_dataset
from ditmoe.data.stream.stream import Batch, dealing_of, open_stream
from ditmoe.model.errors import UserError

STEPS = 20
"""Of 10 samples; the dataset has 100, so two epochs."""


class Unreliable(BaseHTTPRequestHandler):
    """Serves a folder; every other answer is an error, or ends in the middle."""

    server: "Server"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked.append(name)
        path = self.server.folder / name
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        fault = self.server.chosen.choice(["", "", "503", "cut"]) if name.endswith(".tar") else ""
        if fault == "503":
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Unreliable)
        self.folder = folder
        self.chosen = random.Random(0)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(digits: Path) -> Iterator[Server]:
    serving = Server(digits)
    thread = threading.Thread(target=serving.serve_forever, args=(0.05,))
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries; how long they are is for test_web_place.py."""
    monkeypatch.setattr("ditmoe.data.places.download.LONGEST_WAIT", 0.001)


def read(path: str, ranks: int = 1, workers: int = 0, **source: object) -> list[Batch]:
    sources = [{"path": path, "retries": 20, **source}]
    config = DataConfig.model_validate({"sources": sources, "workers": workers, "lanes": 4, "shuffle": 8})
    dealing = dealing_of(config, start=0, micro_batch=10, ranks=ranks)
    batches = []
    for rank in range(ranks):
        stream = open_stream(open_dataset(config, 3), dealing, rank)
        batches += list(islice(stream, STEPS // ranks))
        stream.close()
    return batches


def flat(batches: list[Batch]) -> tuple[list[str], torch.Tensor]:
    """Keys and images by position."""
    rows = sorted(
        (position, key, image)
        for batch in batches
        for position, key, image in zip(batch.position_B, batch.keys, batch.image_BCHW, strict=True)
    )
    assert [position for position, _, _ in rows] == list(range(10 * STEPS))
    return [key for _, key, _ in rows], torch.stack([image for _, _, image in rows])


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 1)])
def test_a_server_that_fails_all_the_time_gives_the_same_stream(
    server: Server, digits: Path, ranks: int, workers: int
) -> None:
    keys, images = flat(read(str(digits)))
    found_keys, found_images = flat(read(server.url, ranks, workers))
    assert found_keys == keys and torch.equal(found_images, images)
    fetched = [name for name in server.asked if name.endswith(".tar")]
    assert len(fetched) > len(set(fetched)) == 4  # tried again


def test_each_shard_is_fetched_by_one_process(digits: Path, tmp_path: Path) -> None:
    """100 samples in 4 shards and 4 lanes of 25: a lane is a shard, and 2 ranks × 2 workers read one each."""
    log = tmp_path / "fetched"
    command = f"pipe:echo {{}} >> {log}; cat {digits}/{{}}"
    config = DataConfig.model_validate(
        {"sources": [{"path": command}], "workers": 2, "lanes": 4, "shuffle": 8, "cache": str(tmp_path / "cache")}
    )
    dealing = dealing_of(config, start=0, micro_batch=10, ranks=2)
    assert dealing.readers_per_lane(4, 2) == 1
    dataset = open_dataset(config, 3)
    log.write_text("")
    for rank in range(2):
        stream = open_stream(dataset, dealing, rank)
        list(islice(stream, 4))  # 80 of the epoch's 100, and 4 batches are prefetched by each worker
        stream.close()
    fetched = log.read_text().split()
    assert set(fetched) <= {f"digits-0000{number}.tar" for number in range(4)}
    assert len(fetched) <= 2 * 4, fetched  # an epoch and the beginning of the next
    assert not list((tmp_path / "cache").iterdir())


def test_a_shard_that_is_gone_is_skipped_or_stops_the_run(server: Server, digits: Path) -> None:
    keys, _ = flat(read(str(digits)))
    (digits / "digits-00001.tar").unlink()
    skipping = read(server.url, on_error="skip")
    found, _ = flat(skipping)
    assert all(key == other or key.startswith("digits-00001") for key, other in zip(keys, found, strict=True))
    skips = [skip for batch in skipping for skip in batch.skips]
    assert len(skips) == sum(key.startswith("digits-00001") for key in keys) == 50
    assert all("404" in skip.reason and skip.where.endswith("digits-00001.tar") for skip in skips)
    assert server.asked.count("digits-00001.tar") <= 2  # not once for each sample
    with pytest.raises(UserError, match=r"digits-00001.tar: .*404"):
        read(server.url)


def test_an_index_that_is_not_there_is_one_message(server: Server) -> None:
    with pytest.raises(UserError, match=r"nowhere/index.json: .*404"):
        read(f"{server.url}/nowhere")
