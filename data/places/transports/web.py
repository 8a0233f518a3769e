"""Files from a web server (http, https), with urllib.

Nothing in the environment has a say: no proxy is used, and no file with passwords is read. Redirects stay with
http and https, never lead from https to http, and take a password no further than to the same server.
"""

import base64
import email.utils
import http.client
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http import HTTPStatus
from typing import IO, Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from ditmoe.data.places.transports.base import CHUNK, Broken, Refused, Reply, Stop
from ditmoe.model.errors import UserError

PASSING_CODES: Final = (408, 425, 429)
"""Answers that are worth another try, besides 5xx."""
PATH_CHARACTERS: Final = "/%:@!$&'()*+,;=~-._"
"""Kept as they are in an address that the user wrote."""
CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


class Web:
    """A folder on a web server."""

    def __init__(self, url: str, timeout: float) -> None:
        """UserError when it is no address."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            if not host:
                raise ValueError("it names no server")
            host = host.encode("idna").decode()
        except ValueError as error:  # its text may quote the address, and with it a password
            raise UserError("data.sources: path: an http address that names no server, or no good port") from error
        server = f"[{host}]" if ":" in host else host
        self._base = f"{parts.scheme.lower()}://{server}{'' if port is None else f':{port}'}"
        self._base += quote(parts.path, safe=PATH_CHARACTERS).rstrip("/") + "/"
        self._query = "?" + quote(parts.query, safe=PATH_CHARACTERS + "?") if parts.query else ""
        self._login: str | None = None
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._login = "Basic " + base64.b64encode(login.encode()).decode()
        self._timeout = timeout

    def where(self, name: str) -> str:
        """The file's address, without password and query."""
        return self._base + quote(name)

    @contextmanager
    def open(self, name: str, start: int, tag: str | None, stop: Stop) -> Iterator[Reply]:
        """Ask for the file; the rest of it, where the server can and the file is still the same."""
        request = Request(self.where(name) + self._query)  # noqa: S310 - http or https, whatever was given
        request.add_header("User-Agent", "ditmoe")
        request.add_header("Accept-Encoding", "identity")
        if self._login is not None:
            request.add_unredirected_header("Authorization", self._login)
        if start and tag is not None:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", tag)
        sockets = _Sockets(stop)
        with stop.calling(sockets.shut):
            with self._errors(stop):
                response = _opener(sockets, self._login).open(request, timeout=self._timeout)
            with response:
                first, size = _extent(response.status, response.headers, start)
                new_tag = _tag(response.headers)
                if first and new_tag not in (None, tag):
                    raise Broken("changed on the server between two tries", restart=True)
                yield Reply(first, new_tag or (tag if first else None), size, self._chunks(response, stop))

    def _chunks(self, response: http.client.HTTPResponse, stop: Stop) -> Iterator[bytes]:
        while True:
            with self._errors(stop):
                data = response.read1(CHUNK)
            if not data:
                return
            yield data

    @contextmanager
    def _errors(self, stop: Stop) -> Iterator[None]:
        """Everything that can go wrong on the way, as Broken or Refused."""
        try:
            yield
        except HTTPError as error:
            error.close()
            raise _refusal(error.code, error.headers) from None
        except (OSError, http.client.HTTPException) as error:
            stop.check()  # then it broke because its sockets were shut
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise Refused(f"the server's certificate is not good: {reason.verify_message}") from error
            raise Broken(_describe(reason, self._timeout)) from error


_Connect = Callable[..., http.client.HTTPConnection]


class _Sockets:
    """The connections of one request, for shutting them from another thread."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._sockets: list[socket.socket] = []

    def shut(self) -> None:
        """End whatever waits for them."""
        for each in self._sockets:
            with suppress(OSError):  # not connected any more
                each.shutdown(socket.SHUT_RDWR)

    def watched(self, kind: _Connect) -> _Connect:
        """A kind of connection whose sockets are kept here."""

        def connection(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
            made = kind(*arguments, **options)
            connect = made.connect

            def connect_and_keep() -> None:
                connect()
                self._sockets.append(made.sock)
                self._stop.check()

            made.connect = connect_and_keep  # type: ignore[method-assign]
            return made

        return connection


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https only."""

    def __init__(self, login: str | None) -> None:
        self._login = login

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        fp.close()  # urllib would read all of a redirect's body, be it endless
        new = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if new is None:
            return None
        if new.type not in ("http", "https") or (req.type, new.type) == ("https", "http"):
            raise Refused("redirects elsewhere than to http or https, or from https to http")
        if self._login is not None and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", self._login)
        return new


def _opener(sockets: _Sockets, login: str | None) -> OpenerDirector:
    """urllib with the handlers that are needed, and no others: no proxies, no files, no ftp."""
    http_connection = sockets.watched(http.client.HTTPConnection)
    https_connection = sockets.watched(http.client.HTTPSConnection)

    class Plain(HTTPHandler):
        def http_open(self, req: Request) -> http.client.HTTPResponse:
            return self.do_open(http_connection, req)

    class Secure(HTTPSHandler):
        def https_open(self, req: Request) -> http.client.HTTPResponse:
            return self.do_open(https_connection, req, context=ssl.create_default_context())

    opener = OpenerDirector()
    for handler in (Plain(), Secure(), _Redirects(login), HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


def _extent(status: int, headers: Message, start: int) -> tuple[int, int | None]:
    """Where the answer's first byte lies in the file, and the file's size where it is said."""
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(f"is sent with Content-Encoding {encoding[:20]!r}, which was not asked for")
    if status == HTTPStatus.OK:
        length = headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status != HTTPStatus.PARTIAL_CONTENT or found is None or int(found[1]) != start:
        raise Broken(f"answered {status} with another part than was asked for", restart=True)
    return start, None if found[2] == "*" else int(found[2])


def _tag(headers: Message) -> str | None:
    """What is sent back as If-Range: a strong ETag, else the date of the last change."""
    tag: str | None = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _refusal(code: int, headers: Message) -> Exception:
    phrase = HTTPStatus(code).phrase if code in HTTPStatus.__members__.values() else ""
    answer = f"answered {code} {phrase}".rstrip()
    if code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return Broken(answer, restart=True)
    if code >= 500 or code in PASSING_CODES:
        return Broken(answer, wait=_retry_after(headers.get("Retry-After", "")))
    if 300 <= code < 400:
        return Refused(f"{answer}, and not to http or https, or in a circle")
    return Refused(answer)


def _retry_after(value: str) -> float:
    """Seconds that a server asks to wait: a number, or a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _describe(error: object, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte for {timeout:g} seconds"
    if isinstance(error, OSError):
        return f"the connection failed: {error.strerror or type(error).__name__}"
    return f"the answer broke off or is not HTTP ({type(error).__name__})"
