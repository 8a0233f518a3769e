"""Who may ask: the token, the Host header, other sites' pages, and how much a body may hold."""

import asyncio
import hmac
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ditmoe.model.errors import UserError
from ditmoe.sampling.service.errors import ServiceError

TOKEN_VARIABLE: Final = "DITMOE_SERVICE_TOKEN"  # noqa: S105  # its name
SHORTEST_TOKEN: Final = 16
OPEN_TO_ALL: Final = ("/health",)
"""Answered without a token: nothing of the runs is in it."""
OWN_NAMES: Final = ("localhost", "127.0.0.1", "[::1]", "::1")
LARGEST_BODY: Final = 2**18
BODY_SECONDS: Final = 30.0
SAFE_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:"
    " data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of a file, or else of the environment; None: there is none.

    Raises:
        UserError: the file cannot be read, others may read it, or the token is short or no ASCII.
    """
    if file is not None:
        try:
            mode, token = file.stat().st_mode, file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file}: could not be read: {error}") from error
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(f"--token-file {file}: others may read it; expected mode 600 (chmod 600 {file})")
        where = f"--token-file {file}"
    else:
        token, where = environment.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"{where}: the token has {len(token)} characters; expected at least {SHORTEST_TOKEN}, all ASCII, such "
            "as `openssl rand -hex 32` prints"
        )
    return token


class Guard:
    """Refuses what must not come through, before anything else looks at a request."""

    def __init__(self, app: ASGIApp, token: str | None, loopback: bool) -> None:
        """Stand before an application.

        Args:
            token: that requests must bear; None: none.
            loopback: the service listens on loopback alone, and so by its names alone: a page of another site
                whose name was bound to 127.0.0.1 names itself.
        """
        assert loopback or token is not None
        self._app, self._loopback = app, loopback
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_safely(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))  # type: ignore[call-overload]
                headers += [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check(Request(scope))
        except ServiceError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send_safely)  # type: ignore[arg-type]
            return
        await self._app(scope, receive, send_safely)  # type: ignore[arg-type]

    def _check(self, request: Request) -> None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1:
            raise ServiceError(400, "expected one Host header", reason="host")
        if self._loopback and _name_of(hosts[0]) not in OWN_NAMES:
            raise ServiceError(
                403, "Host: not a name of this machine's loopback; expected localhost or 127.0.0.1", reason="host"
            )
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            raise ServiceError(403, "Origin: a page of another site asks", reason="origin")
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ServiceError(415, "Content-Type: expected application/json", reason="content_type")
        if self._token is not None and request.url.path not in OPEN_TO_ALL:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                raise ServiceError(401, "Authorization: expected `Bearer` and the service's token", reason="token")


def _name_of(host: str) -> str:
    """The name of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


async def read_body(request: Request, most: int = LARGEST_BODY) -> bytes:
    """The body of a request. ServiceError: it is too large, or too slow."""
    too_large = ServiceError(413, f"the body is larger than {most:,} bytes", reason="too_large")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ServiceError(408, f"the body took longer than {BODY_SECONDS:g} s", reason="too_slow") from None
    return b"".join(parts)
