"""Tokens, names of the host, pages of other sites, bodies that are too large."""

import os
import socket
from pathlib import Path

import httpx
import pytest

from ditmoe.model.errors import UserError
from ditmoe.sampling.service.access import LARGEST_BODY, TOKEN_VARIABLE, read_token
from ditmoe.sampling.service.listening import is_loopback, listen
from tests.sampling.service.conftest import serving

TOKEN = "0123456789abcdef0123"
ROUTE = "/v1/images/generations"


def test_without_the_token_nothing_is_answered(runs: Path) -> None:
    with serving(runs, token=TOKEN, loopback=False) as client:
        for path in ("/", "/v1/models", "/metrics", "/ready", "/nothing", "/health/../v1/models"):
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
        read_token(file)
    os.chmod(file, 0o600)
    assert read_token(file) == TOKEN
    assert read_token(None, {TOKEN_VARIABLE: TOKEN}) == TOKEN and read_token(None, {}) is None
    for bad in ("short", "ü" * 20):
        with pytest.raises(UserError, match="expected at least 16"):
            read_token(None, {TOKEN_VARIABLE: bad})
    with pytest.raises(UserError, match="could not be read"):
        read_token(tmp_path / "none")


def test_loopback_is_told_from_other_addresses() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("192.0.2.1")
    with listen("127.0.0.1", 0) as first:
        port = first.socket.getsockname()[1]
        with pytest.raises(UserError, match="in use"), listen("127.0.0.1", port):
            pass
    with listen("127.0.0.1", port):
        pass
