"""A web server that fails in every way, and what comes of a shard that lies on it."""

import hashlib
import io
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.place import Place, open_place
from ditmoe.data.shards.index import ShardEntry
from ditmoe.model.errors import UserError

DATA = bytes(range(256)) * 800
ENTRY = ShardEntry(file="a-00000.tar", samples=1, bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
CUT = 70_001
STALL = 0.4
"""Timeout where the server stalls; elsewhere it is long, because a busy machine stalls by itself."""


class Handler(BaseHTTPRequestHandler):
    """Answers each request as the next entry of the script says; a script that is over means: as it should be."""

    protocol_version = "HTTP/1.1"
    server: "FaultyServer"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        behaviour = self.server.script.pop(0) if self.server.script else good
        try:
            behaviour(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def asked(self, tag: str) -> int | None:
        """First byte of the range that is asked for, when it is still the same file."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found and self.headers.get("If-Range", tag) == tag else None


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def send(handler: Handler, data: bytes, tag: str, upto: int | None = None) -> None:
    """The whole file, or the range that is asked for; only so many bytes of what was announced."""
    start = handler.asked(tag)
    if start is None:
        handler.head(200, len(data), ETag=tag)
        start = 0
    elif start >= len(data):
        handler.head(416, 0)
        return
    else:
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.head(206, len(data) - start, ETag=tag, Content_Range=span)
    handler.wfile.write(data[start:upto])
    handler.close_connection = True


def good(handler: Handler) -> None:
    send(handler, DATA, '"one"')


def truncated(handler: Handler) -> None:
    send(handler, DATA, '"one"', CUT)


def no_range(handler: Handler) -> None:
    handler.head(200, len(DATA))
    handler.wfile.write(DATA)


def no_range_truncated(handler: Handler) -> None:
    handler.head(200, len(DATA))
    handler.wfile.write(DATA[:CUT])
    handler.close_connection = True


def chunked(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(DATA), 50_000):
        part = DATA[start : start + 50_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.wfile.write(b"0\r\n\r\n")


def chunked_truncated(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s" % (len(DATA), DATA[:CUT]))
    handler.close_connection = True


def other_version(handler: Handler) -> None:
    send(handler, DATA[::-1], '"two"', CUT)


def ignores_if_range(handler: Handler) -> None:
    """Sends the rest of another version."""
    start = int(handler.headers["Range"][6:-1])
    handler.head(206, len(DATA) - start, ETag='"two"', Content_Range=f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
    handler.wfile.write(bytes(len(DATA) - start))


def another_range(handler: Handler) -> None:
    handler.head(206, 10, ETag='"one"', Content_Range=f"bytes 0-9/{len(DATA)}")
    handler.wfile.write(DATA[:10])


def wrong_bytes(handler: Handler) -> None:
    send(handler, DATA[:-1] + b"\x77", '"one"')


def wrong_size(handler: Handler) -> None:
    send(handler, DATA + b"more", '"one"')


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(DATA)


def stalls_at_once(handler: Handler) -> None:
    handler.server.ended.wait(20)
    handler.close_connection = True


def stalls_in_the_middle(handler: Handler) -> None:
    truncated(handler)
    handler.server.ended.wait(20)


def resets(handler: Handler) -> None:
    truncated(handler)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True


def babbles(handler: Handler) -> None:
    handler.wfile.write(b"\x00\xffnothing like HTTP\r\n\r\n")
    handler.close_connection = True


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.head(code, 0, **headers)

    answer.__name__ = "_".join([str(code), *headers.values()])
    return answer


def gzipped(handler: Handler) -> None:
    handler.head(200, 5, Content_Encoding="gzip")
    handler.wfile.write(b"12345")


def to(target: str) -> Callable[[Handler], None]:
    return status(302, Location=target)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def place_at(url: str, retries: int = 5, timeout: float = 20) -> tuple[Place, list[float]]:
    """A place that does not wait, and the waits that it would have made."""
    waits: list[float] = []
    return open_place(url, retries=retries, timeout=timeout, cache=None, sleep=waits.append), waits


def contents(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 10**7, 0)
    finally:
        os.close(descriptor)


MENDED: dict[str, tuple[list[Callable[[Handler], None]], list[str | None]]] = {
    "good": ([], [None]),
    "stall before the answer": ([stalls_at_once], [None, None]),
    "stall in the middle": ([stalls_in_the_middle], [None, f"bytes={CUT}-"]),
    "reset in the middle": ([resets], [None, None]),  # what a reset leaves unread is lost, so anything is right
    "truncated": ([truncated], [None, f"bytes={CUT}-"]),
    "truncated, then stall, then 503": (
        [truncated, stalls_at_once, status(503)],
        [None, *[f"bytes={CUT}-"] * 3],
    ),
    "no range": ([no_range_truncated, no_range], [None, None]),
    "range forgotten": ([truncated, no_range], [None, f"bytes={CUT}-"]),
    "chunked": ([chunked], [None]),
    "chunked and truncated": ([chunked_truncated], [None, None]),
    "another version between two tries": ([other_version], [None, f"bytes={CUT}-"]),
    "another version against If-Range": (
        [truncated, ignores_if_range] * 2,
        [None, f"bytes={CUT}-", None, f"bytes={CUT}-", None],
    ),
    "another range": ([truncated, another_range], [None, f"bytes={CUT}-", None]),
    "range refused": ([truncated, status(416)], [None, f"bytes={CUT}-", None]),
    "503": ([status(503), status(500), status(502), status(429)], [None] * 5),
    "hangs up": ([hangs_up], [None, None]),
    "not HTTP": ([babbles], [None, None]),
    "wrong bytes once": ([wrong_bytes], [None, None]),
    "wrong size once": ([wrong_size], [None, None]),
    "redirect": ([to("/elsewhere/b.tar")], [None, None]),
}


@pytest.mark.parametrize("fault", MENDED)
def test_what_passes_is_mended(server: FaultyServer, fault: str) -> None:
    script, ranges = MENDED[fault]
    server.script = list(script)
    place, waits = place_at(server.url + "/data", timeout=STALL if "stall" in fault else 20)
    assert contents(place.open(ENTRY)) == DATA
    found = [headers.get("Range") for _, headers in server.requests]
    assert len(found) == len(ranges)
    if fault != "reset in the middle":
        assert found == ranges
    tries = len(ranges) - (fault == "redirect")
    assert waits == [2.0**number for number in range(tries - 1)]


FINAL: dict[str, tuple[Callable[[Handler], None], int, str]] = {
    "404": (status(404), 1, "answered 404 Not Found"),
    "403": (status(403), 1, "answered 403 Forbidden"),
    "401": (status(401), 1, "answered 401 Unauthorized"),
    "410": (status(410), 1, "answered 410 Gone"),
    "wrong bytes": (wrong_bytes, 2, "checksum mismatch: .*, 2 times"),
    "wrong size": (wrong_size, 2, "has 204,804 bytes, and the index says 204,800, 2 times"),
    "endless": (endless, 2, "has more than the 204,800 bytes that the index says, 2 times"),
    "gzip": (gzipped, 1, "Content-Encoding 'gzip'"),
    "redirect to a file": (to("file:///etc/passwd"), 1, "answered 302 Found, and not to http"),
    "redirect to ftp": (to("ftp://127.0.0.1/x"), 1, "redirects elsewhere than to http"),
    "redirect in a circle": (to("/data/a-00000.tar"), 5, "answered 302 Found, .* or in a circle"),
    "503 for ever": (status(503), 4, r"answered 503 Service Unavailable \(try 4, the last\)"),
    "stall for ever": (stalls_at_once, 4, r"no byte for 0.4 seconds \(try 4, the last\)"),
    "truncated for ever": (no_range_truncated, 4, r"broke off after 70,001 of 204,800 bytes \(try 4, the last\)"),
    "not HTTP for ever": (babbles, 4, r"is not HTTP \(BadStatusLine\) \(try 4, the last\)"),
}


@pytest.mark.parametrize("fault", FINAL)
def test_what_stays_ends_in_one_message(server: FaultyServer, fault: str) -> None:
    behaviour, requests, message = FINAL[fault]
    server.script = [behaviour] * 50
    place, waits = place_at(server.url + "/data", retries=3, timeout=STALL if "stall" in fault else 20)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShardFault, match=message) as raised:
        place.open(ENTRY)
    assert len(server.requests) == requests or (fault == "redirect in a circle" and len(server.requests) < 12)
    assert raised.value.shard == f"{server.url}/data/a-00000.tar"
    assert waits == [1.0, 2.0, 4.0][: min(requests, 4) - 1] or fault == "redirect in a circle"
    assert "\n" not in str(raised.value)
    raised.value.__traceback__ = None
    server.ended.set()
    deadline = time.monotonic() + 20  # the server's own ends are closed by its threads
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= before


HALF_GOOD = [good, truncated, no_range, no_range_truncated, chunked, chunked_truncated, other_version, resets]
USELESS = [hangs_up, babbles, wrong_bytes, wrong_size, status(500), status(416), status(404)]
BEHAVIOURS = st.sampled_from([*HALF_GOOD, *USELESS])


@given(script=st.lists(BEHAVIOURS, max_size=8), retries=st.integers(0, 6))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_faults_gives_the_shard_or_a_fault(
    server: FaultyServer, script: list[Callable[[Handler], None]], retries: int
) -> None:
    server.script, server.requests = list(script), []
    place, waits = place_at(server.url, retries)
    try:
        assert contents(place.open(ENTRY)) == DATA
    except ShardFault as fault:
        assert script and fault.reason
    assert len(server.requests) <= retries + 1
    assert len(waits) == len(server.requests) - 1


def test_waits_are_bounded_and_follow_the_server(server: FaultyServer) -> None:
    soon, date, never = (status(503, Retry_After=value) for value in ("7", "Fri, 01 Jan 2999 00:00:00 GMT", "x"))
    server.script = [soon, date, never, *[status(500)] * 6]
    place, waits = place_at(server.url, retries=9)
    assert contents(place.open(ENTRY)) == DATA
    assert waits == [7.0, 60.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_an_unreachable_server_is_tried_and_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place, waits = place_at(f"http://127.0.0.1:{port}/d", retries=2)
    with pytest.raises(ShardFault, match=rf":{port}/d/a-00000.tar: .*Connection refused \(try 3, the last"):
        place.open(ENTRY)
    assert waits == [1.0, 2.0]


def test_small_files(server: FaultyServer) -> None:
    server.script = [truncated, stalls_in_the_middle, status(503)]
    place, waits = place_at(server.url, timeout=STALL)
    assert place.read("index.json") == DATA
    assert waits == [1.0, 2.0, 4.0]
    server.script = [status(404)]
    with pytest.raises(UserError, match=r"/index.json: answered 404 Not Found") as raised:
        place.read("index.json")
    assert not isinstance(raised.value, ShardFault)


def test_secrets_are_sent_but_not_said(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")  # nobody answers there
    address = server.url.replace("://", "://anna:s%20cret@") + "/a b/?token=sesame"
    place, _ = place_at(address)
    server.script = [to("/moved?token=sesame"), status(404)]
    with pytest.raises(ShardFault) as raised:
        place.open(ENTRY)
    for secret in ("anna", "s%20cret", "s cret", "sesame"):
        assert secret not in str(raised.value) and secret not in place.where("index.json")
    assert [path for path, _ in server.requests] == ["/a%20b/a-00000.tar?token=sesame", "/moved?token=sesame"]
    assert [headers["Authorization"] for _, headers in server.requests] == ["Basic YW5uYTpzIGNyZXQ="] * 2


def test_a_password_is_not_handed_on_to_another_server(server: FaultyServer) -> None:
    server.script = [to(server.url.replace("127.0.0.1", "localhost") + "/x"), status(404)]
    place, _ = place_at(server.url.replace("://", "://anna:secret@"))
    with pytest.raises(ShardFault):
        place.open(ENTRY)
    assert ["Authorization" in headers for _, headers in server.requests] == [True, False]


@pytest.mark.parametrize("address", ["http://", "http:///data", "https://host:port/", "http://u:secret@/x"])
def test_no_address(address: str) -> None:
    with pytest.raises(UserError, match="names no server") as raised:
        place_at(address)
    assert "secret" not in str(raised.value)


def test_nothing_is_left_in_the_cache(server: FaultyServer, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    server.script = [truncated]
    place = open_place(server.url, retries=1, timeout=5, cache=cache, sleep=lambda _: None)
    descriptor = place.open(ENTRY)
    assert os.fstat(descriptor).st_nlink == 0 and not list(cache.iterdir())
    assert contents(descriptor) == DATA
    server.script = [status(404)]
    with pytest.raises(ShardFault):
        place.open(ENTRY)
    assert not list(cache.iterdir())


class FullDisk(io.FileIO):
    def truncate(self, size: int | None = None) -> int:
        return 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_not_the_shards_fault(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place, waits = place_at(server.url)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: FullDisk("/dev/full", "r+"))
    with pytest.raises(UserError, match="No space left on device; name a folder with more space") as raised:
        place.open(ENTRY)
    assert not waits and not isinstance(raised.value, ShardFault)
