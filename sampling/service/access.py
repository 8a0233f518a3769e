"""Who may ask, and as whom: tokens, the Host header, other sites' pages, and how much a body may hold."""

import asyncio
import hmac
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
USER_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_BEARER: Final = "ditmoe.bearer"
"""Key of a request's scope: whose token it bears."""
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
    "Cross-Origin-Resource-Policy": "same-origin",  # a page of another site shows no image of ours
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of clients, and whose each is."""

    user_of: Mapping[str, str]
    """Token → the name of its user; empty where one token is for all."""

    def bearer(self, given: bytes) -> str | None:
        """Whose token it is; None: nobody's. It takes as long for each token, and for none."""
        found = None
        for token, user in self.user_of.items():
            if hmac.compare_digest(given, token.encode()):
                found = user
        return found


def read_tokens(file: Path | None, environment: Mapping[str, str] = os.environ) -> Tokens | None:
    """The tokens of a file, or else that of the environment; None: there is none.

    A file has one token for all, or lines of a user's name and that user's token; lines that begin with # are left
    out.

    Raises:
        UserError: the file cannot be read, others may read it, a token is short or no ASCII, or a line is wrong.
    """
    if file is None:
        token = environment.get(TOKEN_VARIABLE, "").strip()
        return Tokens({_checked(token, TOKEN_VARIABLE): ""}) if token else None
    try:
        mode, text = file.stat().st_mode, file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file}: could not be read: {error}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UserError(f"--token-file {file}: others may read it; expected mode 600 (chmod 600 {file})")
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, words) for number, words in lines if words and not words[0].startswith("#")]
    if [len(words) for _, words in lines] in ([], [1]):
        return Tokens({_checked("".join(lines[0][1]) if lines else "", f"--token-file {file}"): ""})
    found: dict[str, str] = {}
    for number, words in lines:
        where = f"--token-file {file}, line {number}"
        if len(words) != 2 or not USER_NAME.fullmatch(words[0]):
            raise UserError(
                f"{where}: expected a user's name, of at most 64 letters, digits and . _ @ -, and a token; or one "
                "token in the whole file"
            )
        if words[0] in found.values():
            raise UserError(f"{where}: {words[0]} has a token already; expected one for each user")
        if words[1] in found:
            raise UserError(f"{where}: its token is {found[words[1]]}'s; expected one for each user")
        found[_checked(words[1], where)] = words[0]
    return Tokens(found)


def _checked(token: str, where: str) -> str:
    """A token that nobody guesses. UserError."""
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"{where}: the token has {len(token)} characters; expected at least {SHORTEST_TOKEN}, all ASCII, such "
            "as `openssl rand -hex 32` prints"
        )
    return token


@dataclass(frozen=True)
class User:
    """Who asks."""

    name: str
    """What turns and limits go by."""
    sees_all: bool
    """Jobs of others too: on loopback, without tokens, nobody can tell one from another."""

    def sees(self, owner: str) -> bool:
        """Whether a job of this owner is to be shown."""
        return self.sees_all or owner == self.name


def user_of(request: Request, word: str = "") -> User:
    """Who asks: whoever's token it is, or without tokens whoever the client says at its address.

    Args:
        word: what the client calls itself.
    """
    bearer = request.scope.get(_BEARER)
    if bearer is not None:
        return User(f"token {bearer}", sees_all=False)
    address = "" if request.client is None else request.client.host
    return User(f"{address} {word}", sees_all=True)


class Guard:
    """Refuses what must not come through, before anything else looks at a request."""

    def __init__(
        self, app: ASGIApp, tokens: Tokens | None, loopback: bool, open_to_all: Collection[str] = ()
    ) -> None:
        """Stand before an application.

        Args:
            tokens: of which requests must bear one; None: none.
            loopback: the service listens on loopback alone, and so by its names alone: a page of another site
                whose name was bound to 127.0.0.1 names itself.
            open_to_all: further paths that are answered without a token.
        """
        assert loopback or tokens is not None
        self._app, self._tokens, self._loopback = app, tokens, loopback
        self._open = frozenset({*OPEN_TO_ALL, *open_to_all})

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
        if self._tokens is not None and request.url.path not in self._open:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            bearer = self._tokens.bearer(given.strip().encode())
            if scheme.lower() != "bearer" or bearer is None:
                raise ServiceError(
                    401, "Authorization: expected `Bearer` and a token of this service", reason="token"
                )
            request.scope[_BEARER] = bearer


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
