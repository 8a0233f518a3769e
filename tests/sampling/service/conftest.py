"""A service of two small runs, in a thread of its own."""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from ditmoe.launcher.commands.serving.child import start_child
from ditmoe.sampling.service.app import Service, ServiceSettings, make_app
from ditmoe.sampling.service.listening import listen, server_of
from tests.markers import change_marker
from tests.sampling.small_run import write_checkpoint, write_run

ROWS = 8
Serving = Callable[..., AbstractContextManager[httpx.Client]]
MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs; one class has markup for its name."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    checkpoint = write_checkpoint(write_run(folder / "digits"), 3)
    names = [MARKUP, *map(str, range(1, 10))]
    change_marker(checkpoint, lambda facts: facts["dataset"].update(class_names=names))
    write_run(folder / "other")
    return folder


@contextmanager
def serving(runs: Path, **settings: object) -> Iterator[httpx.Client]:
    """A client of a service of its own."""
    chosen: dict[str, object] = {"state": runs.parent / uuid.uuid4().hex, "start_child": start_child}
    chosen |= {"device": torch.device("cpu"), "memory": 2**30, "batch": ROWS, **settings}
    service = Service(ServiceSettings(runs=runs, **chosen))  # type: ignore[arg-type]
    with listen("127.0.0.1", 0) as listening:
        server = server_of(make_app(service))
        thread = threading.Thread(target=server.run, args=([listening.socket],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=listening.address, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def send(client: httpx.Client, path: str, asked: object, token: str | None = None) -> socket.socket:
    """Send a request and wait for no reply: closing the socket leaves it."""
    body = json.dumps(asked).encode()
    made = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60)
    bearer = "" if token is None else f"Authorization: Bearer {token}\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{bearer}"
    made.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


def figure(client: httpx.Client, name: str) -> float:
    """The sum of a figure of the service's metrics."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    """Wait for what is sure to come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def client(runs: Path) -> Iterator[httpx.Client]:
    with serving(runs) as made:
        yield made
