"""200 clients at once: no request is lost, images keep their bits, passes are shared, and looking stays quick."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ditmoe.launcher.commands.scoring.reference import make
from ditmoe.sampling.service.client import Client
from tests.sampling.service.conftest import figure, until
from tests.sampling.service.served import Served, processes_of
from tests.sampling.service.test_images import ROUTE
from tests.sampling.small_run import write_digits

CLIENTS = 200
ROUNDS = 3
ASKED = {"model": "digits", "sampler": "heun", "steps": 5}


LOOK = """
import http.client, json, sys, threading, time
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
service, waits = http.client.HTTPConnection(sys.argv[1], timeout=60), []
while not ended.is_set():
    for path in sys.argv[2:]:
        began = time.monotonic()
        service.request("GET", path)
        reply = service.getresponse()
        reply.read()
        waits.append(time.monotonic() - began)
        assert reply.status == 200, path
        time.sleep(0.02)
print(json.dumps(waits))
"""
"""Looks from a process of its own: in that of the clients it would wait for them."""


async def _under_load(address: str) -> list[list[Any]]:
    """What each client got in each round."""
    limits = httpx.Limits(max_connections=CLIENTS + 1)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits, trust_env=False) as http:

        async def draw(client: int) -> list[Any]:
            got = []
            for turn in range(ROUNDS):
                asked = {**ASKED, "first": client % 20, "cfg_scale": 1.0 + turn, "user": f"user {client}"}
                while (reply := await http.post(ROUTE, json=asked)).status_code == 429:
                    await asyncio.sleep(int(reply.headers["Retry-After"]))
                assert reply.status_code == 200, reply.text
                got.append(reply.json()["data"])
            return got

        return await asyncio.gather(*(draw(client) for client in range(CLIENTS)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["draw", "evaluate"])
def test_two_hundred_clients_at_once(
    kind: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a job draws in the service's own process, and while an evaluation's processes have the cores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options: tuple[object, ...] = ()
    if kind == "evaluate":
        reference = tmp_path / "own.safetensors"
        make(str(write_digits(tmp_path / "real")), reference, recogniser=False, cache=tmp_path / "cache")
        options = ("--reference", f"own={reference}", "--processes", 2)
    served = Served(runs, tmp_path / "state", *options)
    address = served.start()
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as http, Client(address) as ours:
        alone = [
            [
                http.post(ROUTE, json={**ASKED, "first": number, "cfg_scale": 1.0 + turn}).json()["data"]
                for turn in range(ROUNDS)
            ]
            for number in range(20)
        ]
        passes, rows = figure(http, "ditmoe_pass_rows_count"), figure(http, "ditmoe_pass_rows_sum")
        scored = {"reference": "own", "recogniser": False, "sampler": "heun"} if kind == "evaluate" else {}
        job_id = ours.give(kind, model="digits", count=5000, steps=100, **scored)
        until(lambda: ours.job(job_id)["progress"]["done"] > 0)
        paths = ("/health", f"/v1/jobs/{job_id}", "/v1/jobs", "/v1/models")
        command = [sys.executable, "-c", LOOK, address.removeprefix("http://"), *paths]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as looking:
            got = asyncio.run(_under_load(address))
            waits = json.loads(looking.communicate()[0])
        assert looking.returncode == 0
        for client, images in enumerate(got):
            assert images == alone[client % 20]
        batch = (figure(http, "ditmoe_pass_rows_sum") - rows) / (figure(http, "ditmoe_pass_rows_count") - passes)
        slowest = float(np.quantile(waits, 0.95))
        print(f"beside {kind}: mean batch {batch:.1f}; p95 of {len(waits)} looks {1000 * slowest:.0f} ms")
        job = ours.job(job_id)
        assert job["status"] == "in_progress" and job["progress"]["done"] < 5000
        assert (len(processes_of(job_id)) > 1) == (kind == "evaluate")
        ours.cancel(job_id)
        assert batch > 4
        assert slowest < 0.1
    served.kill()
