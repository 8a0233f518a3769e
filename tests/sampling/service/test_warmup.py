"""Networks that are loaded before anybody asks."""

import threading
from pathlib import Path

import pytest

from ditmoe.model.errors import UserError
from ditmoe.sampling.batching.models import Models
from ditmoe.sampling.service import warmup
from tests.sampling.service.conftest import figure, serving, until
from tests.sampling.small_run import write_checkpoint, write_run

ROUTE = "/v1/images/generations"


def test_a_service_is_ready_when_its_networks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loads each newer one; the metrics tell what somebody waited for from what nobody did."""
    monkeypatch.setattr(warmup, "LOOK_SECONDS", 0.05)
    may_load = threading.Event()
    load = Models._load
    monkeypatch.setattr(Models, "_load", lambda *given: may_load.wait(60) and load(*given))
    run = write_run(tmp_path / "runs" / "digits")
    empty = tmp_path / "runs" / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with serving(tmp_path / "runs", load=("digits", "empty")) as client:
        until(lambda: client.get("/ready").json()["loading"] == {"digits": None, "empty": None})
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        may_load.set()
        until(lambda: "digits" not in client.get("/ready").json()["loading"])
        until(lambda: "no checkpoint yet" in str(client.get("/ready").json()["loading"]["empty"]))
        write_checkpoint(empty, 0)
        until(lambda: client.get("/ready").status_code == 200)
        count = 'ditmoe_network_load_seconds_count{reason="%s"} %s'
        assert count % ("warm_up", "2.0") in client.get("/metrics").text
        asked = {"model": "digits", "sampler": "euler", "steps": 1}
        assert client.post(ROUTE, json=asked).status_code == 200
        assert count % ("request", "") not in client.get("/metrics").text, "nobody waited"
        assert figure(client, "ditmoe_images_total") == 1, "a warm-up is no image"
        write_checkpoint(run, 7)
        until(lambda: count % ("warm_up", "3.0") in client.get("/metrics").text)
        assert client.post(ROUTE, json=asked).json()["step"] == 7
        assert client.post(ROUTE, json={**asked, "step": 0, "weights": "ema"}).status_code == 200
        assert client.get("/ready").status_code == 200


def test_a_run_that_is_not_there_is_told_at_once(runs: Path) -> None:
    with (
        pytest.raises(UserError, match="--load none: no such run; there are digits, other"),
        serving(runs, load=("none",)),
    ):
        pass


def test_a_network_that_cannot_be_loaded_is_told(runs: Path) -> None:
    with serving(runs, load=("digits",), memory=10) as client:
        until(lambda: "expected at most" in str(client.get("/ready").json()["loading"].get("digits")))
        assert client.get("/ready").status_code == 503
