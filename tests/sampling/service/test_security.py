"""Every route and parameter against what an attacker sends: names that lead elsewhere, wrong types, programs.

Each check is first shown to be able to fail: the name would lead to a secret if it became a path, the pickle would
run if it were opened, the request is answered where it is well meant.
"""

import http.client
import json
import pickle
import shutil
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import torch
from fastapi.routing import APIRoute
from pydantic import BaseModel

from ditmoe.launcher.commands.serving.child import start_child
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_info
from ditmoe.sampling.noise_level.classifier import FACTS_FILE, WEIGHTS_FILE, classifier_folder
from ditmoe.sampling.service.access import LARGEST_BODY, Tokens
from ditmoe.sampling.service.app import Service, ServiceSettings, make_app
from ditmoe.sampling.service.client import Client, Refused
from ditmoe.sampling.service.jobs.evaluators import Evaluators
from ditmoe.sampling.service.jobs.store import JobStore
from ditmoe.sampling.service.page.static_files import static_files
from ditmoe.sampling.service.requests import DrawJob, EvaluationJob, ImageRequest
from tests.sampling.service.conftest import MARKUP, serving, until
from tests.sampling.service.page.conftest import SAMPLES, write_evaluation, write_training
from tests.sampling.small_run import write_noise_classifier, write_run

ROUTE = "/v1/images/generations"
SECRET = b"do not tell"
TOKEN = "0123456789abcdef0123"
OPEN = {"/health", *static_files()}
EVALUATION = "chains"
CHAINS = {"sampler": "dlg:euler", "steps": 2, "dlg": {"samples_per_chain": SAMPLES}}
SMALL = {"model": "digits", "steps": 1, "sampler": "euler"}


@pytest.fixture(scope="module")
def folder(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of which one was evaluated, and secrets beside all that is served."""
    folder = tmp_path_factory.mktemp("besieged")
    shutil.copytree(runs, folder / "runs")
    write_training(folder / "runs" / "digits")
    evaluation = write_evaluation(folder / "runs" / "digits", EVALUATION, CHAINS, 2.0, 10.0)
    (evaluation / "gallery").mkdir()
    shutil.copy(
        folder / "runs" / "digits" / "samples" / "preview-step-00000010.png",
        evaluation / "gallery" / "class-00003.png",
    )
    (folder / "runs" / "references").mkdir()
    for place in (folder, folder / "runs", folder / "state", folder / "state" / "jobs", evaluation.parent):
        place.mkdir(exist_ok=True)
        (place / "secret").write_bytes(SECRET)
    return folder


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, str]:
    """A draw that was done, and an evaluation that was."""
    state = folder / "state"
    with serving(folder / "runs", state=state) as client:
        ours = Client(str(client.base_url))
        draw = ours.give("draw", count=2, **SMALL)
        ours.wait(draw)
    store = JobStore(state)
    request = {"kind": "evaluate", "count": 40, **SMALL, "step": 3}
    job = store.add(key=None, user="a", kind="evaluate", request=json.dumps(request), weights="w", total=40)
    assert store.take("evaluate") is not None
    store.set(job.id, folder=str(folder / "runs" / "digits" / "evaluations" / EVALUATION))
    store.end(job.id, "completed")
    store.close()
    return {"draw": draw, "evaluate": job.id}


@pytest.fixture(scope="module")
def besieged(folder: Path, jobs: dict[str, str]) -> Iterator[httpx.Client]:
    with serving(folder / "runs", state=folder / "state") as client:
        yield client


@pytest.fixture(scope="module")
def routes(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[APIRoute]:
    """All routes of the program, as it has them."""
    state = tmp_path_factory.mktemp("routes") / "state"
    service = Service(ServiceSettings(runs, torch.device("cpu"), 2**30, state, start_child))
    try:
        guard: Any = make_app(service)
        found = [route for route in guard._app._app.routes if isinstance(route, APIRoute)]
    finally:
        service.close()
    assert {"/v1/jobs/{job_id}/files/{name:path}", ROUTE, "/health"} <= {route.path for route in found}
    return found


def parameters(route: APIRoute) -> list[str]:
    return [part[1:-1].removesuffix(":path") for part in route.path.split("/") if part.startswith("{")]


def path_of(route: APIRoute, values: dict[str, str]) -> str:
    path = route.path.replace(":path}", "}")
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def well_meant(route: APIRoute, jobs: dict[str, str]) -> dict[str, str]:
    """A value of each parameter of a path with which the route has an answer."""
    static = next(path for path in static_files() if path != "/").removeprefix("/page/")
    known = {
        "job_id": jobs["evaluate" if route.path.endswith("/figures") else "draw"],
        "number": "0",
        "name": static if route.path.startswith("/page/") else "chunks/00000.npz",
        "run": "digits",
        "evaluation": EVALUATION,
        "step": "10",
        "label": "3",
    }
    return {name: known[name] for name in parameters(route)}


UPWARDS: Final = (
    "secret",
    "../secret",
    "../../secret",
    "../../../secret",
    "../../jobs/secret",
    "../../../../secret",
)
OTHERS: Final = (
    "..",
    ".",
    "/etc/passwd",
    "//etc/passwd",
    "~",
    "secret\0",
    "....//secret",
    "..\\secret",
    "file:///etc/passwd",
    "jobs.sqlite",
    "../jobs.sqlite",
    "../../jobs.sqlite",
    "' or 1=1 --",
    "%00",
    "a" * 3000,
    "\u202e",
    MARKUP,
)


def forms(name: str) -> Iterator[str]:
    """As it may stand in a path."""
    yield urllib.parse.quote(name, safe="/")
    yield urllib.parse.quote(name, safe="")
    yield urllib.parse.quote(urllib.parse.quote(name, safe=""), safe="")
    yield "".join(f"%{byte:02x}" for byte in name.encode())


class Raw:
    """Asks for paths as they stand: a client that resolves their dots would spoil the attack."""

    def __init__(self, client: httpx.Client) -> None:
        self._http = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)

    def get(self, path: str) -> tuple[int, bytes]:
        self._http.request("GET", path)
        reply = self._http.getresponse()
        return reply.status, reply.read()


def test_the_secrets_can_be_reached_by_a_path(folder: Path, jobs: dict[str, str]) -> None:
    """If names became paths, these would lead to secrets, from every folder that is served."""
    state, run = folder / "state", folder / "runs" / "digits"
    for base in (
        state / "jobs" / jobs["draw"],
        state / "jobs",
        state,
        run,
        run / "evaluations",
        run / "evaluations" / EVALUATION,
    ):
        assert any((base / name).is_file() and (base / name).read_bytes() == SECRET for name in UPWARDS), base


def test_no_name_of_any_route_leads_elsewhere(
    besieged: httpx.Client, routes: list[APIRoute], jobs: dict[str, str]
) -> None:
    tried, raw = 0, Raw(besieged)
    for route in routes:
        if "GET" not in route.methods or not parameters(route):
            continue
        good = well_meant(route, jobs)
        assert raw.get(path_of(route, good))[0] == 200, f"{route.path}: it has an answer"
        for name in good:
            for hostile in (*UPWARDS, *OTHERS):
                for form in forms(hostile):
                    status, content = raw.get(path_of(route, {**good, name: form}))
                    assert SECRET not in content and b"root:" not in content, (route.path, form)
                    assert status in (400, 404, 405), (route.path, name, form, status)
                    tried += 1
    assert tried > 1500


@pytest.mark.parametrize("action", ["cancel"])
def test_no_name_of_a_post_leads_elsewhere(besieged: httpx.Client, routes: list[APIRoute], action: str) -> None:
    posts = {route.path for route in routes if "POST" in route.methods}
    assert posts == {ROUTE, "/v1/jobs", "/v1/jobs/{job_id}/cancel"}, "a new one wants a test here"
    for hostile in (*UPWARDS, *OTHERS):
        for form in forms(hostile):
            reply = besieged.post(f"/v1/jobs/{form}/{action}", json={})
            assert reply.status_code in (400, 404, 405), form


def test_queries_are_checked(besieged: httpx.Client, routes: list[APIRoute], jobs: dict[str, str]) -> None:
    """Each of each route, by every value that is none; none of them makes the service fail."""
    tried = 0
    for route in routes:
        good = path_of(route, well_meant(route, jobs))
        for parameter in route.dependant.query_params:
            numeric = parameter.alias != "after"
            for value in (
                "-1",
                "x",
                "1.5",
                "",
                "9" * 40,
                "NaN",
                "0x10",
                "'",
                "../secret",
                "%00",
                "[]",
                "true",
                MARKUP,
            ):
                reply = besieged.get(good, params={parameter.alias: value})
                assert reply.status_code in ((400,) if numeric else (400, 404)), (
                    route.path,
                    parameter.alias,
                    value,
                )
                assert SECRET not in reply.content
                tried += 1
    assert tried > 80


def fields_of(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """All fields, those of sections too, as clients name them."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from ((name, *inner) for inner in fields_of(section))
        yield (field.alias or name,)


WRONG: Final[tuple[Any, ...]] = (
    [],
    {},
    [[]],
    {"a": 1},
    "x" * 2000,
    "",
    "../secret",
    "\0",
    "\ud7ff",
    True,
    -1,
    1.5,
    1e300,
    2**70,
    -(2**70),
    MARKUP,
    "{{7*7}}",
    "$(id)",
    "`id`",
    "--help",
)


@pytest.mark.parametrize("kind", [ImageRequest, DrawJob, EvaluationJob])
def test_every_field_is_strict(besieged: httpx.Client, kind: type[BaseModel]) -> None:
    """Of wrong types and wild values none makes the service fail, and what is refused names the field."""
    base: dict[str, Any] = dict(SMALL)
    route = ROUTE
    if kind is not ImageRequest:
        route, base = "/v1/jobs", {**SMALL, "kind": "draw" if kind is DrawJob else "evaluate", "count": 1}
    assert besieged.post(route, json=base).status_code in (200, 201)
    refused, wrong = 0, []
    for names in fields_of(kind):
        for value in WRONG:
            given: Any = value
            for name in reversed(names[1:]):
                given = {name: given}
            asked = {**base, names[0]: given}
            if kind is not ImageRequest and names[0] not in ("count", "kind", "model"):
                asked["model"] = "none"  # no job comes of it
            reply = besieged.post(route, json=asked)
            error = reply.json().get("error", {"param": None, "message": ""})
            if reply.status_code not in (200, 400, 404, 429):
                wrong.append((names, value, reply.status_code, error))
            elif reply.status_code == 400:
                refused += 1
                if names[0] not in (error["param"] or "") + error["message"]:
                    wrong.append((names, value, 400, error))
    assert not wrong, "\n".join(map(str, wrong))
    assert refused > 10 * len(list(fields_of(kind)))


def test_every_route_wants_the_token(runs: Path, routes: list[APIRoute], jobs: dict[str, str]) -> None:
    with serving(runs, tokens=Tokens({TOKEN: ""}), loopback=False) as client:
        wanted = 0
        for route in routes:
            path = path_of(route, well_meant(route, jobs))
            for method in route.methods:
                for given in (
                    {},
                    {"Authorization": f"Bearer {TOKEN[:-1]}"},
                    {"Authorization": f"Bearer {TOKEN} x"},
                ):
                    reply = client.request(method, path, headers=given, json={} if method == "POST" else None)
                    assert reply.status_code == (200 if path in OPEN else 401), (method, path)
                    wanted += path not in OPEN
        assert wanted > 60
        for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE"):
            assert client.request(method, "/v1/jobs").status_code == 401


def test_bodies_of_every_route_are_bounded(
    besieged: httpx.Client, routes: list[APIRoute], jobs: dict[str, str]
) -> None:
    """And none is read that is not asked for."""
    for route in routes:
        for method in route.methods:
            path = path_of(route, well_meant(route, jobs))
            with socket.create_connection(
                (besieged.base_url.host, besieged.base_url.port or 0), timeout=60
            ) as raw:
                head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                raw.sendall(f"{head}Content-Length: {LARGEST_BODY + 1}\r\n\r\n".encode())
                reads = method == "POST" and not path.endswith("/cancel")
                assert raw.recv(1000).startswith(b"HTTP/1.1 413" if reads else b"HTTP/1.1 200"), (method, path)


def test_every_reply_is_taken_for_what_it_is(
    besieged: httpx.Client, routes: list[APIRoute], jobs: dict[str, str]
) -> None:
    """A class is called as a script is: its name comes as JSON, which no browser shows as a page."""
    found = 0
    for route in routes:
        if "GET" not in route.methods:
            continue
        path = path_of(route, well_meant(route, jobs))
        reply = besieged.get(path)
        kind = reply.headers["Content-Type"].partition(";")[0]
        assert reply.headers["X-Content-Type-Options"] == "nosniff", path
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"], path
        assert "'unsafe" not in reply.headers["Content-Security-Policy"], path
        if MARKUP.encode() in reply.content or MARKUP in json.dumps(reply.text):
            found += 1
            assert kind == "application/json", path
        assert kind != "text/html" or path == "/"
    assert found >= 2, "the name is told: by the models, and by the run"
    reply = besieged.post(ROUTE, json={**SMALL, "class": MARKUP})
    assert reply.json()["data"][0]["class"] == MARKUP and reply.headers["Content-Type"] == "application/json"
    wrong = besieged.post(ROUTE, json={**SMALL, "class": f"{MARKUP}!"})
    assert MARKUP in wrong.json()["error"]["message"] and wrong.headers["Content-Type"] == "application/json"


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle, and what it would make: shown by opening it once."""
    mark = tmp_path / "mark"
    data = pickle.dumps(Bomb(mark))
    pickle.loads(data)
    assert mark.is_dir(), "it is a program that would run"
    mark.rmdir()
    return data, mark


@pytest.mark.parametrize("part", ["weights", "torch.save", "marker"])
def test_a_checkpoint_that_is_a_pickle_is_not_opened(tmp_path: Path, bomb: tuple[bytes, Path], part: str) -> None:
    data, mark = bomb
    run = write_run(tmp_path / "runs" / "run")
    with serving(tmp_path / "runs", state=tmp_path / "calm") as client:
        assert client.post(ROUTE, json={"steps": 1}).status_code == 200, "it was a run"
    weights = list((checkpoint_path(run, 0) / "ema").iterdir())
    assert weights
    if part == "marker":
        weights = [file for file in checkpoint_path(run, 0).iterdir() if file.is_file()]
    for file in weights:
        if part == "torch.save":
            torch.save({"x": Bomb(mark)}, file)
        else:
            file.write_bytes(data)
    shutil.rmtree(run / "shared-weights", ignore_errors=True)
    with serving(tmp_path / "runs", state=tmp_path / "state") as client:
        reply = client.post(ROUTE, json={"steps": 1})
        assert reply.status_code in (404, 503), reply.text
        assert client.get("/v1/models").status_code == 200 and client.get("/health").status_code == 200
        if part != "marker":
            ours = Client(str(client.base_url))
            with pytest.raises(Refused):
                ours.wait(ours.give("draw", count=1, steps=1))
    assert not mark.exists()


def test_nothing_else_that_lies_about_is_unpickled(tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    """A noise-level classifier, a chunk of a job, the state of a chain, a file of statistics."""
    data, mark = bomb
    run = write_run(tmp_path / "runs" / "digits")
    write_noise_classifier(run)
    chains = {**SMALL, "sampler": "dlg:euler", "dlg": {"skip": 1, "samples_per_chain": 2, "initial_steps": 2}}
    state, references = tmp_path / "state", tmp_path / "runs" / "references"
    with serving(tmp_path / "runs", state=state, evaluators=Evaluators(folder=references)) as client:
        ours = Client(str(client.base_url))
        job_id = ours.give("draw", count=2, **chains)
        ours.wait(job_id)
        assert ours.image(job_id, 1).size == (8, 8)
        chunk = state / "jobs" / job_id / "chunks" / "00000.npz"
        np.savez(chunk, images=np.array([Bomb(mark)], dtype=object))
        with pytest.raises(Refused, match="not there"):
            ours.image(job_id, 0)
        chunk.write_bytes(data)
        with pytest.raises(Refused, match="not there"):
            ours.image(job_id, 0)
        for name in (WEIGHTS_FILE, FACTS_FILE):
            (classifier_folder(read_info(checkpoint_path(run, 0))) / name).write_bytes(data)
        reply = client.post(ROUTE, json=chains)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "sampler")
        references.mkdir()
        for name in ("a.pkl", "b.npz", "c.safetensors"):
            (references / name).write_bytes(data)
        listed = client.get("/v1/evaluators").json()["references"]
        assert listed == ["b.npz", "c.safetensors"]
        for name in listed:
            given = ours.give("evaluate", count=1, reference=name, **SMALL)
            with pytest.raises(Refused, match="never opened"):
                ours.wait(given)
        until(lambda: client.get("/health").status_code == 200)
    assert not mark.exists()
