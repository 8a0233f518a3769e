"""Images over HTTP: what is asked for, what is refused and how it is told, company, turns, leaving."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe.sampling.drawing.generate import generate
from ditmoe.sampling.network.load import load_model
from ditmoe.sampling.service.counters import Counters
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import SAMPLE_STEPS
from tests.sampling.service.conftest import MARKUP, figure, send, serving, until

ROUTE = "/v1/images/generations"
ASKED = {"model": "digits", "sampler": "heun", "steps": 3, "cfg_scale": 1.5}
ENDLESS = {**ASKED, "steps": 5000, "schedule": "own"}


def images(reply: httpx.Response) -> list[np.ndarray[Any, Any]]:
    assert reply.status_code == 200, reply.text
    return [np.array(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in reply.json()["data"]]


def test_images_are_those_of_the_run(client: httpx.Client, runs: Path) -> None:
    reply = client.post(ROUTE, json={**ASKED, "seed": 7, "labels": [3, "5"], "first": 4})
    expected = generate(
        load_model(runs / "digits", step=3),
        torch.tensor([3, 5]),
        [4, 5],
        SamplerConfig(sampler="heun", steps=3, cfg_scale=1.5, seed=7),
        2,
    )
    for image, known in zip(images(reply), expected.image_NHWC.numpy(), strict=True):
        assert np.abs(image.astype(int) - known[:, :, 0].astype(int)).max() <= 1
    body = reply.json()
    assert [(each["number"], each["label"], each["seed"], each["nfe"]) for each in body["data"]] == [
        (4, 3, 7, 5),
        (5, 5, 7, 5),
    ]
    assert body["step"] == 3 and body["sampler"]["schedule"] == "karras"


@pytest.mark.parametrize("sampler", [None, "dpm-solver++"])
def test_steps_that_are_not_given_are_those_of_the_sampler(client: httpx.Client, sampler: str | None) -> None:
    asked = {name: value for name, value in ASKED.items() if name not in ("steps", "sampler")}
    asked |= {} if sampler is None else {"sampler": sampler}
    few = client.post(ROUTE, json=asked).json()
    steps = SAMPLE_STEPS["dpm-solver++" if sampler else "euler"]
    assert few["sampler"]["steps"] == steps
    assert client.post(ROUTE, json={**asked, "steps": steps}).json()["data"] == few["data"]


def test_an_image_is_the_same_alone_and_in_any_company(client: httpx.Client) -> None:
    """Whole replies, by bytes, while others ask for other things."""

    def ask(number: int) -> Any:
        asked = {
            **ASKED,
            "first": number,
            "cfg_scale": 1.0 + number % 2,
            "sampler": ("heun", "euler")[number // 2 % 2],
        }
        reply = client.post(ROUTE, json=asked)
        assert reply.status_code == 200
        return reply.json()["data"]

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_many_images_are_those_asked_for_one_by_one(client: httpx.Client) -> None:
    together = client.post(ROUTE, json={**ASKED, "n": 9, "class": 2}).json()["data"]
    for number in (0, 4, 8):
        assert client.post(ROUTE, json={**ASKED, "first": number, "class": 2}).json()["data"] == [together[number]]


def test_models_are_listed(client: httpx.Client) -> None:
    listed = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert set(listed) == {"digits", "other"}
    assert listed["digits"]["steps"] == [0, 3] and listed["digits"]["classes"][0] == MARKUP
    assert images(client.post(ROUTE, json={**ASKED, "class": MARKUP}))[0].shape == (8, 8)
    assert {each["id"]: each["loaded"] for each in client.get("/v1/models").json()["data"]}["digits"]


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"steps": "3"}, 400, "steps"),
        ({"steps": 0}, 400, "steps"),
        ({"steps": True}, 400, "steps"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 1.5}, 400, "seed"),
        ({"cfg_scale": "2"}, 400, "cfg_scale"),
        ({"sampler": "magic"}, 400, "sampler"),
        ({"sampler": ["heun"]}, 400, "sampler"),
        ({"sampler": "dlg:heun"}, 400, "sampler"),  # the run has no noise-level classifier
        ({"nonsense": 1}, 400, "nonsense"),
        ({"n": 65}, 400, "n"),
        ({"n": 10, "steps": 10**6}, 400, "steps"),
        ({"class": 10}, 400, "class"),
        ({"class": []}, 400, "class"),
        ({"labels": [1, {}]}, 400, "labels.1"),
        ({"class": "dog"}, 400, "class"),
        ({"labels": [1, 99]}, 400, "labels.1"),
        ({"labels": []}, 400, "labels"),
        ({"class": 1, "labels": [1]}, 400, None),
        ({"labels": [1], "n": 2}, 400, None),
        ({"prompt": "a dog"}, 400, None),
        ({"model": "none"}, 404, "model"),
        ({"model": "../runs/digits"}, 404, "model"),
        ({"model": ".."}, 404, "model"),
        ({"model": "/etc"}, 404, "model"),
        ({"model": "digits/checkpoints/.."}, 404, "model"),
        ({"model": "digits\0"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"step": 4}, 404, "step"),
        ({"cfg_scale": 1e38, "steps": 20}, 400, "sampler"),
    ],
)
def test_errors_name_the_field(
    client: httpx.Client, asked: dict[str, Any], status: int, param: str | None
) -> None:
    reply = client.post(ROUTE, json={**ASKED, **asked})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and error["message"] and error["type"] == "invalid_request_error"


def test_an_unknown_field_is_told_in_plain_words(client: httpx.Client) -> None:
    reply = client.post(ROUTE, json={**ASKED, "expert_parallel": 2, "clas": 1, "dlg": {"skp": 3}})
    assert reply.json()["error"]["message"] == (
        "dlg.skp: no such key; did you mean skip?; expert_parallel: no such key; "
        "clas: no such key; did you mean class?"
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'{"steps": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_refused(client: httpx.Client, body: bytes) -> None:
    reply = client.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_a_checkpoint_that_is_a_pickle_is_not_read(tmp_path: Path, runs: Path) -> None:
    run, mark = write_pickle(tmp_path)
    with serving(run) as client:
        reply = client.post(ROUTE, json={"steps": 2})
        assert (reply.status_code, reply.json()["error"]["param"]) == (503, "model")
        assert figure(client, "ditmoe_failures_total") == 1 and client.get("/health").status_code == 200
    assert not mark.exists()


def write_pickle(folder: Path) -> tuple[Path, Path]:
    """A run whose weights are a pickle, and the file that reading it would make."""
    from ditmoe.parallel.checkpoint.folder import checkpoint_path
    from tests.sampling.small_run import write_run

    run, mark = write_run(folder / "run"), folder / "mark"
    for file in (checkpoint_path(run, 0) / "ema").iterdir():
        file.write_bytes(b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    return run, mark


def test_a_full_queue_says_when_to_come_again_and_who_leaves_is_cancelled(runs: Path) -> None:
    with serving(runs, queue=16, most_passes=10**9) as client:
        assert client.post(ROUTE, json=ASKED).status_code == 200  # the network is loaded

        leaving = [send(client, ROUTE, {**ENDLESS, "n": 8}) for _ in range(2)]
        until(lambda: figure(client, "ditmoe_images_waiting") == 8)  # and eight are under way
        refused = client.post(ROUTE, json={**ASKED, "n": 9})
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        for each in leaving:
            each.close()
        until(lambda: figure(client, "ditmoe_images_waiting") == 0)
        assert client.post(ROUTE, json={**ASKED, "n": 10}).status_code == 200
        assert 'ditmoe_failures_total{reason="cancelled"} 2.0' in client.get("/metrics").text


def test_figures_count_requests_and_images_apart(runs: Path) -> None:
    with serving(runs) as client:
        client.post(ROUTE, json={**ASKED, "n": 6})
        client.post(ROUTE, json={**ASKED, "steps": 0})
        client.get("/made/up/path")
        assert figure(client, "ditmoe_images_total") == 6
        assert figure(client, "ditmoe_evaluations_total") == 30
        assert figure(client, "ditmoe_pass_rows_sum") == 60, "guidance takes two rows"
        assert figure(client, "ditmoe_pass_rows_sum") / figure(client, "ditmoe_pass_rows_count") > 4
        text = client.get("/metrics").text
        assert 'ditmoe_requests_total{route="/v1/images/generations",status="200"} 1.0' in text
        assert 'ditmoe_requests_total{route="/v1/images/generations",status="400"} 1.0' in text
        assert "/made/up" not in text
        assert 'ditmoe_failures_total{reason="rejected"} 1.0' in text
        assert client.get("/ready").json() == {"status": "ok", "runs": 2, "loading": {}}


def test_when_to_come_again_follows_the_rate() -> None:
    counters = Counters()
    assert counters.retry_after(100) == 1
    counters._ends.extend([0.0, 1.0, 2.0])
    assert counters.retry_after(100) == 100 and counters.retry_after(10**9) == 600 and counters.retry_after(0) == 1
