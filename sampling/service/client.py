"""A client of the service, for scripts and notebooks."""

import base64
import io
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
from PIL import Image

from ditmoe.model.errors import UserError
from ditmoe.sampling.service.access import TOKEN_VARIABLE

TRIES: Final = 5
ENDED: Final = ("completed", "failed", "cancelled", "expired")


class Refused(UserError):
    """The service does not do what was asked for."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {error.get('message')}")
        self.status = status
        self.param: str | None = error.get("param")
        """The field that is wrong."""
        self.code: str | None = error.get("code")


class Client:
    """Asks a service. What may be asked again is, where the service is busy or away for a moment."""

    def __init__(
        self, address: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 600.0
    ) -> None:
        """Ask nothing yet.

        Args:
            token: of the service; None: that of the environment, or none.
            timeout: seconds for a reply.
        """
        token = token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The runs, with their checkpoints and classes."""
        data: list[dict[str, Any]] = self._ask("GET", "/v1/models").json()["data"]
        return data

    def images(self, **fields: Any) -> list[Image.Image]:
        """Images, by the fields of the route; `class_` stands for `class`.

        Raises:
            Refused: a field is wrong, or there are no images.
        """
        data = self._ask("POST", "/v1/images/generations", _fields(fields)).json()["data"]
        return [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in data]

    def give(self, kind: str, **fields: Any) -> str:
        """Give a job, `draw` or `evaluate`; its id. However often it is sent, it is one job."""
        reply = self._ask("POST", "/v1/jobs", {"kind": kind, "key": uuid.uuid4().hex, **_fields(fields)})
        return str(reply.json()["id"])

    def jobs(self, limit: int = 50) -> list[dict[str, Any]]:
        """Jobs, newest first."""
        data: list[dict[str, Any]] = self._ask("GET", f"/v1/jobs?limit={int(limit)}").json()["data"]
        return data

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it stands."""
        job: dict[str, Any] = self._ask("GET", f"/v1/jobs/{_part(job_id)}").json()
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job: at its next step where it is in progress."""
        job: dict[str, Any] = self._ask("POST", f"/v1/jobs/{_part(job_id)}/cancel", {}).json()
        return job

    def watch(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The job whenever it changes, until it has ended; goes on when the service was away."""
        failures, last = 0, None
        while True:
            try:
                with self._http.stream("GET", f"/v1/jobs/{_part(job_id)}/events", timeout=60) as reply:
                    if reply.status_code != 200:
                        reply.read()
                        _check(reply)
                    for line in reply.iter_lines():
                        if line.startswith("data: "):
                            job, failures = json.loads(line.removeprefix("data: ")), 0
                            if job != last:
                                last = job
                                yield job
                            if job["status"] in ENDED:
                                return
            except httpx.TransportError:
                failures += 1
                if failures == TRIES:
                    raise
            time.sleep(min(2**failures, 30) / 2)

    def wait(self, job_id: str) -> dict[str, Any]:
        """The job when it has ended. Refused: it did not complete."""
        job: dict[str, Any] = {}
        for job in self.watch(job_id):  # noqa: B007  # the last one
            pass
        if job["status"] != "completed":
            said = "the job has expired" if job["status"] == "expired" else f"the job was {job['status']}"
            message = (job["error"] or {}).get("message") or said
            raise Refused(200, {"message": message, "code": job["status"]})
        return job

    def figures(self, job_id: str) -> dict[str, Any]:
        """The figures of an evaluation."""
        figures: dict[str, Any] = self._ask("GET", f"/v1/jobs/{_part(job_id)}/figures").json()
        return figures

    def image(self, job_id: str, number: int) -> Image.Image:
        """An image of a job."""
        return Image.open(io.BytesIO(self._ask("GET", f"/v1/jobs/{_part(job_id)}/images/{number:d}").content))

    def files(self, job_id: str) -> dict[str, int]:
        """Name → bytes of the files of a job."""
        data = self._ask("GET", f"/v1/jobs/{_part(job_id)}/files").json()["data"]
        return {each["name"]: each["bytes"] for each in data}

    def fetch(self, job_id: str, name: str, to: Path) -> None:
        """Write a file of a job to a path."""
        path = "/".join(_part(part) for part in name.split("/"))
        to.write_bytes(self._ask("GET", f"/v1/jobs/{_part(job_id)}/files/{path}").content)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """A reply; asked again, after the seconds that it names, where the queue is full or nobody answers."""
        for left in reversed(range(TRIES)):
            try:
                reply = self._http.request(method, path, json=body)
            except httpx.TransportError:
                if not left:
                    raise
                time.sleep(2.0 ** (TRIES - 1 - left) / 4)
                continue
            if reply.status_code != 429 or not left:
                break
            time.sleep(min(60, int(reply.headers.get("Retry-After", "1"))))
        return _check(reply)


def _check(reply: httpx.Response) -> httpx.Response:
    """A reply that is none of an error."""
    if reply.status_code >= 400:
        try:
            error = reply.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": reply.text[:200]}
        raise Refused(reply.status_code, error)
    return reply


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removesuffix("_"): value for name, value in given.items()}


def _part(text: str) -> str:
    """A part of a path: what is no part of one is quoted."""
    from urllib.parse import quote

    return quote(text, safe="")
