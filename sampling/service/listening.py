"""The address of a service, and its server."""

import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from ditmoe.model.errors import UserError

GRACE_SECONDS: Final = 5
"""For replies that are under way when the service ends."""
IDLE_SECONDS: Final = 75
"""After which a connection is closed that no request comes by: later than clients (5 s in httpx) and proxies
(60 s) close theirs, for a request that meets a closing connection is lost."""


@dataclass(frozen=True)
class Listening:
    """A socket that listens, and its address."""

    socket: socket.socket
    address: str
    """Such as `http://127.0.0.1:8000`."""


def is_loopback(host: str) -> bool:
    """Whether an address, or each address of a name, is one of this machine's loopback. UserError: no address."""
    return all(ipaddress.ip_address(found[4][0]).is_loopback for found in _addresses(host, 0))


def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host {host}: no address of this machine: {error}") from error
    return found  # type: ignore[return-value]


@contextmanager
def listen(host: str, port: int) -> Iterator[Listening]:
    """Listen on an address. UserError: it is in use, or not this machine's."""
    family, _, _, _, address = _addresses(host, port)[0]
    # The protocol is named: where asyncio knows that it is TCP, small replies do not wait for a confirmation.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
            made.listen(1024)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error
        name, number = made.getsockname()[:2]
        yield Listening(made, f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}")


def server_of(app: ASGIApp) -> uvicorn.Server:
    """A server with the settings of ours."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=1024,
    )
    return uvicorn.Server(config)


def serve(app: ASGIApp, listening: Listening) -> None:
    """Serve until a signal ends it."""
    sys.stdout.flush()
    server_of(app).run(sockets=[listening.socket])
