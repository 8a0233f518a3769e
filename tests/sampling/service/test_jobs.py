"""Jobs: durable, resumed, cancelled between steps, watched, fetched; and nobody's name becomes a path."""

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from ditmoe.data.storage.files import make_folder
from ditmoe.launcher.commands.drawing import Drawing, draws_images
from ditmoe.model.errors import UserError
from ditmoe.sampling.service.client import Client, Refused
from ditmoe.sampling.service.jobs.routes import files_of
from ditmoe.sampling.service.jobs.store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobStore,
    TooManyJobs,
)
from ditmoe.sampling.service.requests import options_of
from ditmoe.sampling.settings.config import SamplerConfig
from tests.sampling.service.conftest import serving, until

DRAWN = {"model": "digits", "sampler": "heun", "steps": 3, "seed": 5}
ENDLESS = {"model": "digits", "steps": 20_000, "sampler": "euler"}


@pytest.fixture
def ours(client: httpx.Client) -> Client:
    return Client(str(client.base_url))


def add(store: JobStore, user: str = "a", kind: str = "draw", key: str | None = None) -> Job:
    return store.add(key=key, user=user, kind=kind, request="{}", weights="w", total=10)


def test_a_draw_has_the_images_of_the_images_route(ours: Client, tmp_path: Path) -> None:
    job_id = ours.give("draw", count=70, **DRAWN)
    seen = list(ours.watch(job_id))
    assert seen[-1]["status"] == "completed" and seen[-1]["progress"] == {"done": 70, "total": 70}
    assert seen[-1]["created_at"] <= seen[-1]["started_at"] <= seen[-1]["completed_at"]
    assert seen[-1]["request"]["step"] == 3, "the newest when it was given"
    for number in (0, 63, 64, 69):
        [alone] = ours.images(first=number, **DRAWN)
        assert np.array_equal(np.array(ours.image(job_id, number)), np.array(alone))
    assert set(ours.files(job_id)) == {"chunks/00000.npz", "chunks/00001.npz"}
    ours.fetch(job_id, "chunks/00001.npz", tmp_path / "chunk.npz")
    with np.load(tmp_path / "chunk.npz", allow_pickle=False) as chunk:
        assert chunk["labels"].tolist() == [4, 5, 6, 7, 8, 9]
    assert ours.jobs(1)[0]["id"] == job_id
    with pytest.raises(Refused, match="no figures"):
        ours.figures(job_id)


def test_a_job_is_cancelled_between_steps(ours: Client) -> None:
    job_id = ours.give("draw", count=1000, **ENDLESS)
    until(lambda: ours.job(job_id)["status"] == "in_progress")
    assert ours.cancel(job_id)["id"] == job_id
    with pytest.raises(Refused, match="cancelled"):
        ours.wait(job_id)
    assert ours.cancel(job_id)["status"] == "cancelled", "as often as one likes"
    assert len(ours.images(**DRAWN)) == 1


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"kind": "nonsense"}, 400, "kind"),
        ({"count": 0}, 400, "count"),
        ({"count": "5"}, 400, "count"),
        ({"count": 2_000_000}, 400, "count"),
        ({"count": 10**6, "steps": 10**6}, 400, "steps"),
        ({"class": "dog"}, 400, "class"),
        ({"n": 3}, 400, "n"),
        ({"sampler": "dlg:heun"}, 400, "sampler"),  # the run has no noise-level classifier
        ({"sampler": "dlg:heun", "dlg": {"samples_per_chain": 2000}}, 400, None),
        ({"kind": "evaluate", "labels": "some"}, 400, "labels"),
        ({"model": "../digits"}, 404, "model"),
        ({"step": 17}, 404, "step"),
        ({"key": ""}, 400, "key"),
        ({"kind": "evaluate", "ddpm_timestep": "nearest"}, 400, None),
    ],
)
def test_what_is_wrong_with_a_job_is_told_at_once(
    client: httpx.Client, asked: dict[str, Any], status: int, param: str | None
) -> None:
    reply = client.post("/v1/jobs", json={"kind": "draw", "count": 5, **DRAWN, **asked})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_a_request_that_comes_again_is_one_job(client: httpx.Client) -> None:
    asked = {"kind": "draw", "count": 1, "key": "mine", **DRAWN}
    first, second = (client.post("/v1/jobs", json=asked) for _ in range(2))
    assert first.status_code == second.status_code == 201 and first.json()["id"] == second.json()["id"]


def test_no_name_leads_out_of_a_job(client: httpx.Client, ours: Client, tmp_path: Path) -> None:
    job_id = ours.give("draw", count=1, **DRAWN)
    ours.wait(job_id)
    jobs = f"/v1/jobs/{job_id}"
    for name in ("../../jobs.sqlite", "..%2f..%2fjobs.sqlite", "/etc/passwd", "%2fetc%2fpasswd", "chunks", "%2e"):
        for path in (
            f"{jobs}/files/{name}",
            f"/v1/jobs/{name}",
            f"/v1/jobs/{name}/files",
            f"{jobs}/images/{name}",
        ):
            assert client.get(path).status_code in (400, 404), path
    for number in (-1, 1, 10**30):
        assert client.get(f"{jobs}/images/{number}").status_code in (400, 404)
    for query in ("limit=0", "limit=201", "limit=x", "after=job-none"):
        assert client.get(f"/v1/jobs?{query}").status_code in (400, 404)
    (tmp_path / "own").write_text("x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / ".hidden").write_text("x")
    assert files_of(tmp_path) == {"own": 1}


def test_a_file_is_never_a_page(client: httpx.Client, ours: Client) -> None:
    job_id = ours.give("draw", count=1, **DRAWN)
    ours.wait(job_id)
    reply = client.get(f"/v1/jobs/{job_id}/files/chunks/00000.npz")
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.headers["Content-Disposition"].startswith("attachment")


def test_a_job_is_given_back_when_the_service_ends(runs: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(runs, state=state) as client:
        ours = Client(str(client.base_url))
        first, second = (ours.give("draw", count=500, **ENDLESS) for _ in range(2))
        until(lambda: ours.job(second)["status"] == "in_progress")
        with pytest.raises(UserError, match="another service"):
            JobStore(state)
    store = JobStore(state)
    assert [store.get(each).state for each in (first, second)] == [QUEUED, QUEUED]  # type: ignore[union-attr]
    store.close()


def test_a_checkpoint_that_is_another_now_fails_the_job(runs: Path, tmp_path: Path) -> None:
    store = JobStore(tmp_path / "state")
    request = {"kind": "draw", "count": 2, **DRAWN, "step": 3}
    job = store.add(key=None, user="a", kind="draw", request=json.dumps(request), weights="other-ema", total=2)
    store.close()
    with serving(runs, state=tmp_path / "state") as client, pytest.raises(Refused, match="another checkpoint"):
        Client(str(client.base_url)).wait(job.id)


def test_states_are_kept(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done, waits, stopped = add(store), add(store), add(store)
    for _ in range(3):
        assert store.take("draw").state == IN_PROGRESS  # type: ignore[union-attr]
    assert store.take("draw") is None and store.take("evaluate") is None
    store.progress(done.id, 7)
    store.progress(done.id, 3)
    assert store.get(done.id).done == 7, "never back"  # type: ignore[union-attr]
    store.end(done.id, COMPLETED)
    store.end(done.id, FAILED, "too late")
    store.cancel(stopped.id)
    assert store.cancel(done.id).state == COMPLETED  # type: ignore[union-attr]
    store.close()
    again = JobStore(tmp_path)
    states = {job.id: job.state for job in again.newest(10)}
    assert states == {done.id: COMPLETED, waits.id: QUEUED, stopped.id: CANCELLED}
    assert {job.id for job in again.left} == {waits.id, stopped.id}
    assert [job.id for job in again.newest(10, before=stopped.number)] == [waits.id, done.id]
    again.close()


def test_a_job_that_has_expired_says_so(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither done nor unknown, and without its files; one that runs never does."""
    monkeypatch.setattr("ditmoe.sampling.service.jobs.expiry.LOOK_SECONDS", 0.05)
    state = tmp_path / "state"
    with serving(runs, state=state) as client:
        ours = Client(str(client.base_url))
        kept = ours.give("draw", count=1, key="mine", **DRAWN)
        assert ours.wait(kept)["expires_at"] is None and ours.image(kept, 0)
    with serving(runs, state=state, keep_seconds=3600) as client:
        ours = Client(str(client.base_url))
        begun = time.time()
        assert begun + 3500 < ours.job(kept)["expires_at"] < time.time() + 3601, "told when it is to expire"
        again = ours.wait(ours.give("draw", count=1, **DRAWN))
        assert again["expires_at"] == pytest.approx(again["completed_at"] + 3600, abs=1e-3)
        assert ours.image(kept, 0)
    with sqlite3.connect(state / "jobs.sqlite") as jobs:  # as if the hour had gone by for one of them
        jobs.execute("update jobs set expires = ? where id = ?", [time.time() - 1, kept])
    jobs.close()
    with serving(runs, state=state, keep_seconds=0.0) as client:
        ours = Client(str(client.base_url))
        running = ours.give("draw", count=1000, **ENDLESS)
        until(lambda: ours.job(kept)["status"] == "expired" and not (state / "jobs" / kept).exists())
        assert ours.job(kept)["progress"] == {"done": 1, "total": 1} and kept in str(ours.jobs())
        job = f"/v1/jobs/{kept}"
        for path in (f"{job}/images/0", f"{job}/files", f"{job}/files/chunks/00000.npz", f"{job}/figures"):
            reply = client.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (410, "expired"), path
        with pytest.raises(Refused, match="has expired"):
            ours.wait(kept)
        assert (
            client.post("/v1/jobs", json={"kind": "draw", "count": 1, "key": "mine", **DRAWN}).json()["id"] == kept
        )
        assert ours.image(again["id"], 0), "what was told stays"
        until(lambda: ours.job(running)["status"] == "in_progress")
        assert ours.job(running)["expires_at"] is None
        ours.cancel(running)
        until(lambda: ours.job(running)["status"] == "expired")


def test_what_a_killed_service_had_marked_is_removed(runs: Path, tmp_path: Path) -> None:
    store = JobStore(tmp_path / "state", keep_seconds=0.0)
    job = add(store)
    assert store.take("draw") is not None
    assert store.expire() == [], "it is in progress"
    store.end(job.id, COMPLETED)
    make_folder(store.folder_of(job.id) / "chunks")
    other = store.folder_of("another")
    make_folder(other)
    assert store.expire() == [job.id] and store.expire() == []
    store.close()
    with serving(runs, state=tmp_path / "state"):
        until(lambda: not store.folder_of(job.id).exists())
    assert other.exists()


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = add(store)
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as jobs:
        jobs.execute("alter table jobs drop column expires")
    jobs.close()
    again = JobStore(tmp_path, keep_seconds=5.0)
    cancelled = again.cancel(job.id)
    assert cancelled is not None and cancelled.expires == pytest.approx((cancelled.completed or 0) + 5)
    again.close()


def test_users_take_turns_and_have_a_share(tmp_path: Path) -> None:
    store = JobStore(tmp_path, most_of_user=3)
    for user in ("a", "a", "a", "b", "c"):
        add(store, user)
    with pytest.raises(TooManyJobs, match="3 of your jobs"):
        add(store, "a")
    order = []
    while (job := store.take("draw")) is not None:
        order.append(job.user)
        time.sleep(0.002)
    assert order == ["a", "b", "c", "a", "a"]
    store.close()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    make_folder(tmp_path / "state")
    (tmp_path / "state" / "jobs.sqlite").write_bytes(b"no database, for sure" * 100)
    for _ in range(2):  # and the folder is given back
        with pytest.raises(UserError, match=r"jobs\.sqlite: could not be read"):
            JobStore(tmp_path / "state")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "kar2", "steps": 7, "churn": 3.5, "tweedie": True, "seed": 2**62},
        {"sampler": "ddim", "ddim_eta": 0.5, "cfg_scale": 1e-5, "cfg_channels": 2, "precision": "bf16"},
        {"cfg_scale": 3.0, "cfg_sigma_min": 0.3, "cfg_sigma_max": 2.5, "cache_interval": 4, "cache_order": 2},
        {"sampler": "dlg:kar1", "dlg": {"class_scales": [1.0, 2.5], "tweedie": False, "sigma_min": 0.1}},
        {"sampler": "dlg:euler", "dlg": {"preset": "velocity", "restart_every": 3}},
    ],
)
def test_a_process_is_told_the_very_sampler(settings: dict[str, Any]) -> None:
    config = SamplerConfig.model_validate(settings)
    assert _parsed(options_of(config)).plain() == config.plain()


def _parsed(options: Sequence[str]) -> SamplerConfig:
    """The sampler that a command gets from options."""
    got: list[SamplerConfig] = []
    app = typer.Typer()

    @app.command()
    @draws_images()  # type: ignore[untyped-decorator]
    def command(*, drawing: Drawing) -> None:
        got.append(drawing.config())

    done = CliRunner().invoke(app, list(options))
    assert done.exit_code == 0, done.output
    return got[0]


def test_threads_of_one_store(tmp_path: Path) -> None:
    store = JobStore(tmp_path, most_of_user=1000)
    taken: list[str] = []

    def give_and_take() -> None:
        for _ in range(10):
            add(store)
            job = store.take("draw")
            assert job is not None
            taken.append(job.id)

    threads = [threading.Thread(target=give_and_take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 40
    store.close()
