"""Tokens and whose they are, names of the host, pages of other sites, bodies that are too large."""

import os
import socket
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from ditmoe.model.errors import UserError
from ditmoe.sampling.service import listening
from ditmoe.sampling.service.access import LARGEST_BODY, TOKEN_VARIABLE, Tokens, read_tokens
from ditmoe.sampling.service.listening import is_loopback, listen
from tests.sampling.service.conftest import figure, send, serving, until

TOKEN = "0123456789abcdef0123"
ROUTE = "/v1/images/generations"


def test_without_the_token_nothing_is_answered(runs: Path) -> None:
    with serving(runs, tokens=Tokens({TOKEN: ""}), loopback=False) as client:
        for path in ("/v1/models", "/v1/runs", "/metrics", "/ready", "/nothing", "/health/../v1/models"):
            for given in ({}, {"Authorization": f"Bearer {TOKEN}0"}, {"Authorization": f"Basic {TOKEN}"}):
                reply = client.get(path, headers=given)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "token"
                assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert client.post(ROUTE, json={"model": "digits", "steps": 1}).status_code == 401
        assert client.get("/v1/models", headers=[("Authorization", b"Bearer \xff")]).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_on_loopback_another_name_is_refused(client: httpx.Client) -> None:
    """A page whose name leads to 127.0.0.1 asks by that name."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 403
    for host in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_are_refused(client: httpx.Client) -> None:
    own = f"{client.base_url.host}:{client.base_url.port}"
    asked = {"model": "digits", "steps": 1}
    for origin in ("http://evil.example", "null", f"http://{own}.evil.example"):
        reply = client.post(ROUTE, json=asked, headers={"Origin": origin})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin")
    assert client.post(ROUTE, json=asked, headers={"Origin": f"http://{own}"}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.post(ROUTE, content=b"{}", headers={"Content-Type": kind}).status_code == 415


def test_bodies_are_bounded(client: httpx.Client) -> None:
    json = {"Content-Type": "application/json"}
    assert client.post(ROUTE, content=b" " * (LARGEST_BODY + 1), headers=json).status_code == 413

    def unending():  # type: ignore[no-untyped-def]
        for _ in range(LARGEST_BODY // 1024 + 2):
            yield b" " * 1024

    assert client.post(ROUTE, content=unending(), headers=json).status_code == 413
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
        raw.sendall(
            f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {10**12}\r\n\r\n".encode()
        )
        assert b" 413 " in raw.recv(1000)
    assert client.get("/health").status_code == 200


def test_replies_are_taken_for_what_they_are(client: httpx.Client) -> None:
    """Names of classes come as JSON, and no browser takes that for a page."""
    reply = client.get("/v1/models")
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert "script-src 'self'" in reply.headers["Content-Security-Policy"]


def test_a_token_is_kept_where_nobody_else_reads(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    os.chmod(file, 0o644)
    with pytest.raises(UserError, match="mode 600"):
        read_tokens(file)
    os.chmod(file, 0o600)
    assert read_tokens(file) == Tokens({TOKEN: ""})
    assert read_tokens(None, {TOKEN_VARIABLE: TOKEN}) == Tokens({TOKEN: ""}) and read_tokens(None, {}) is None
    for bad in ("short", "ü" * 20):
        with pytest.raises(UserError, match="expected at least 16"):
            read_tokens(None, {TOKEN_VARIABLE: bad})
    with pytest.raises(UserError, match="could not be read"):
        read_tokens(tmp_path / "none")


def test_each_user_has_a_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"

    def read(text: str) -> Tokens | None:
        file.write_text(text)
        os.chmod(file, 0o600)
        return read_tokens(file)

    tokens = read(f"# of the group\nann {TOKEN}\n\nbob@x {TOKEN}1\n")
    assert tokens == Tokens({TOKEN: "ann", f"{TOKEN}1": "bob@x"})
    assert tokens.bearer(TOKEN.encode()) == "ann" and tokens.bearer(f"{TOKEN}1".encode()) == "bob@x"
    assert tokens.bearer(f"{TOKEN}2".encode()) is None and tokens.bearer(b"") is None
    for text, problem in (
        (f"ann {TOKEN}\n{TOKEN}1\n", "line 2: expected a user's name"),
        (f"ann {TOKEN} x\n", "line 1: expected a user's name"),
        (f"a/b {TOKEN}\n", "line 1: expected a user's name"),
        (f"ann {TOKEN}\nann {TOKEN}1\n", "line 2: ann has a token already"),
        (f"ann {TOKEN}\nbob {TOKEN}\n", "line 2: its token is ann's"),
        ("ann short\n", "line 1: the token has 5 characters"),
        ("", "the token has 0 characters"),
    ):
        with pytest.raises(UserError, match=problem):
            read(text)


def test_loopback_is_told_from_other_addresses() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("192.0.2.1")
    with listen("127.0.0.1", 0) as first:
        port = first.socket.getsockname()[1]
        with pytest.raises(UserError, match="in use"), listen("127.0.0.1", port):
            pass
    with listen("127.0.0.1", port):
        pass


ANN, BOB = f"{TOKEN}a", f"{TOKEN}b"


def bearing(client: httpx.Client, token: str) -> httpx.Client:
    """Another client of the same service, with a token."""
    return httpx.Client(
        base_url=client.base_url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    )


def test_jobs_are_their_users_alone(runs: Path) -> None:
    """Neither a list, nor an id, a key, an event or a file of another's, whatever name one gives oneself."""
    asked = {"kind": "draw", "count": 2, "model": "digits", "steps": 2, "key": "mine"}
    with (
        serving(runs, tokens=Tokens({ANN: "ann", BOB: "bob"}), loopback=False) as client,
        bearing(client, ANN) as ann,
        bearing(client, BOB) as bob,
    ):
        job_id = ann.post("/v1/jobs", json=asked).json()["id"]
        lines = ann.get(f"/v1/jobs/{job_id}/events").text.splitlines()
        assert '"status": "completed"' in lines[-2] and job_id in lines[-2]
        job = f"/v1/jobs/{job_id}"
        routes = (job, f"{job}/events", f"{job}/files", f"{job}/files/chunks/00000.npz", f"{job}/images/0")
        for route in routes:
            assert ann.get(route).status_code == 200, route
            for other in (bob, client):
                assert other.get(route).status_code == (404 if other is bob else 401), route
        for path in (f"{job}/figures", f"/v1/jobs?after={job_id}"):
            assert bob.get(path).json()["error"]["message"] == "there is no such job", path
        assert bob.post(f"{job}/cancel", json={}).status_code == 404
        assert [each["id"] for each in ann.get("/v1/jobs").json()["data"]] == [job_id]
        assert bob.get("/v1/jobs").json()["data"] == []
        own = bob.post("/v1/jobs", json={**asked, "user": "ann"}).json()["id"]
        assert own != job_id, "a key is a user's own"
        assert ann.post("/v1/jobs", json=asked).json()["id"] == job_id
        assert [each["id"] for each in bob.get("/v1/jobs").json()["data"]] == [own]


def test_turns_and_limits_go_by_the_token(runs: Path) -> None:
    """Whoever bears one token is one user by any name, and holds up nobody who bears another."""
    asked = {"model": "digits", "sampler": "euler", "steps": 20_000, "schedule": "own", "n": 20}
    with (
        serving(
            runs, tokens=Tokens({ANN: "ann", BOB: "bob"}), loopback=False, queue=20, most_passes=10**9
        ) as client,
        bearing(client, ANN) as ann,
    ):
        leaving = [send(client, ROUTE, {**asked, "user": "first"}, ANN)]
        until(lambda: figure(ann, "ditmoe_images_waiting") == 12)  # and eight are under way
        refused = ann.post(ROUTE, json={**asked, "user": "second"})
        assert refused.status_code == 429 and "12 of your images wait" in refused.json()["error"]["message"]
        leaving.append(send(client, ROUTE, {**asked, "user": "first"}, BOB))
        until(lambda: figure(ann, "ditmoe_images_waiting") == 32)  # his are not refused
        for each in leaving:
            each.close()
        until(lambda: figure(ann, "ditmoe_images_waiting") == 0)


def test_a_connection_is_kept_for_longer_than_clients_keep_theirs(
    client: httpx.Client, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request meets one that is just being closed, and is lost."""
    assert listening.IDLE_SECONDS > 60  # those of proxies and of libraries
    connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)
    connection.connect()
    connection.auto_open = 0  # type: ignore[assignment]  # no other in its place
    with closing(connection):
        ask_for_health(connection)
        # The seconds are heeded: of another service this one has closed its connection by then.
        monkeypatch.setattr(listening, "IDLE_SECONDS", 1)
        with serving(runs) as short, closing(HTTPConnection(short.base_url.host, short.base_url.port)) as other:
            other.connect()
            ask_for_health(other)
            begin = time.monotonic()
            assert other.sock.recv(1) == b""
            assert time.monotonic() - begin > 0.5
        ask_for_health(connection)


def ask_for_health(connection: HTTPConnection) -> None:
    connection.request("GET", "/health")
    reply = connection.getresponse()
    assert (reply.status, reply.read()) == (200, b'{"status":"ok"}')
