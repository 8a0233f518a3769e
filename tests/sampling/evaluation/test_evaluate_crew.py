"""An evaluation by a crew: the images and figures of one process, whatever befalls the workers."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch

from ditmoe.data.crew.leader import Crew, lead_crew
from ditmoe.data.crew.tasks import Task
from ditmoe.data.making.pack import PackSettings, pack
from ditmoe.data.making.sources.opening import open_source
from ditmoe.data.storage.files import read_object
from ditmoe.launcher.commands.evaluate import command
from ditmoe.launcher.commands.worker import command as worker
from ditmoe.launcher.local.crew_workers import own_address, worker_environments
from ditmoe.model.errors import UserError
from ditmoe.sampling.evaluation.job import Job
from ditmoe.sampling.evaluation.of_crew import made_by, parts_of_stage, request_for
from ditmoe.sampling.evaluation.of_run import EvaluationOptions, evaluate_run, prepare_job
from ditmoe.sampling.evaluation.stages import STAGES
from ditmoe.sampling.metrics.classifier import FEATURE_CLASSIFIER, RECOGNISER
from ditmoe.sampling.settings.config import SamplerConfig
from tests.obedient import Obedient
from tests.sampling.small_run import write_digits, write_run

ALONE = ("processes", "device", "checkpoint")
"""What may differ among the facts of an evaluation."""


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    return EvaluationOptions(
        source=write_run(tmp_path / "run"),
        sampler=SamplerConfig(steps=2, seed=1),
        count=120,
        batch=8,
        chunk=8,
        data=write_digits(tmp_path / "shards"),
        cache=tmp_path / "cache",
    )


def quick_job(options: EvaluationOptions) -> Job:
    """The classifiers learn next to nothing, which is the same whoever computes it."""
    return replace(
        prepare_job(options),
        feature_classifier=replace(FEATURE_CLASSIFIER, passes=1),
        recogniser_classifier=replace(RECOGNISER, passes=0.2),
    )


def eventually(what: Callable[[], Any], seconds: float = 200) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never was"
        time.sleep(0.02)
    return found


def undisturbed(options: EvaluationOptions, threads: int = 1) -> tuple[dict[str, Any], bytes, np.ndarray]:
    """Metrics and samples of one process, which are then put out of sight, and so are those of real images."""
    job = quick_job(options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        metrics = evaluate_run(job)
    finally:
        torch.set_num_threads(before)
    with np.load(job.folder / "samples.npz") as samples:
        found = samples["arr_0"].tobytes(), samples["arr_1"]
    job.folder.rename(job.folder.with_name("undisturbed"))
    assert options.cache is not None
    for folder in options.cache.glob("real-*"):
        folder.rename(options.cache / "away")
    return metrics, *found


def assert_equal(job: Job, metrics: dict[str, Any], expected: tuple[dict[str, Any], bytes, np.ndarray]) -> None:
    assert json.dumps(metrics["results"]) == json.dumps(expected[0]["results"])
    for name, value in expected[0]["evaluation"].items():
        assert name in ALONE or metrics["evaluation"][name] == value, name
    with np.load(job.folder / "samples.npz") as samples:
        assert samples["arr_0"].tobytes() == expected[1]
        np.testing.assert_array_equal(samples["arr_1"], expected[2])


def test_workers_make_every_stage_from_what_they_are_told(options: EvaluationOptions) -> None:
    expected = undisturbed(options)
    job, crew = quick_job(options), Obedient()
    metrics = evaluate_run(job, made_by(cast(Crew, crew), options, job), 2)
    assert_equal(job, metrics, expected)
    assert metrics["evaluation"]["processes"] == 2
    assert (
        job.cache is not None and len(list(job.cache.glob("classifier-*.safetensors"))) == 2
    )  # not trained again
    assert set(crew.stages()) == set(STAGES) and crew.stages() == {
        **dict.fromkeys(("drawn", "described"), 15),
        "real": job.real.parts,
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_crew_that_loses_and_gains_workers_gives_the_same_bits(
    options: EvaluationOptions, tmp_path: Path, threads: int
) -> None:
    expected = undisturbed(options, threads)
    job, crew_folder = quick_job(options), tmp_path / "crew"
    joined: list[subprocess.Popen[bytes]] = []
    killed: list[int] = []
    one = [{"OMP_NUM_THREADS": str(threads)}]

    def disturb() -> None:
        chunks = job.folder / "chunks"
        eventually(lambda: len(list(chunks.glob("*.npz"))) >= 2)
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                if "spawn_main" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)

    with lead_crew(crew_folder, one, host=own_address()) as crew:
        arguments = [sys.executable, "-m", "ditmoe.launcher", "worker", str(crew_folder), "--processes", "1"]
        joined.append(subprocess.Popen([*arguments, "--idle", "0"], env={**os.environ, **one[0]}))
        disturber = threading.Thread(target=disturb)
        disturber.start()
        metrics = evaluate_run(job, made_by(crew, options, job), 2)
        disturber.join()
        eventually(lambda: crew.members() == 2)
    assert_equal(job, metrics, expected)
    assert len(killed) == 1
    assert metrics["evaluation"]["processes"] == 2
    assert joined[0].wait(120) == 0  # nobody leads any more


@pytest.mark.slow
def test_processes_of_the_command_are_a_crew(
    options: EvaluationOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    command(
        options.source,
        count=16,
        processes=2,
        data=str(options.data),
        cache=options.cache,
        recogniser=False,
        batch=8,
        chunk=8,
    )
    out = capsys.readouterr().out
    assert "16 images, ema of step 0" in out
    [folder] = (options.source / "evaluations").iterdir()
    assert read_object(folder / "metrics.json")["evaluation"]["processes"] == 2
    assert not (folder / "ranks").exists() and not list(folder.glob("crew*"))


def test_a_worker_that_sees_other_files_is_refused(options: EvaluationOptions, tmp_path: Path) -> None:
    request = {**request_for(options, quick_job(options)), "stage": "drawn"}
    other = tmp_path / "others"
    pack(open_source("digits", count=None, seed=0), other, PackSettings(count=200))
    request["options"]["data"] = str(other)
    with pytest.raises(
        UserError, match=r"real is .* where this worker looks, expected .*: workers must see the files"
    ):
        Task.of(parts_of_stage, request).parts()


def test_what_goes_not_together_is_refused(
    options: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--processes 0: expected 1 or more, or --crew"):
        command(options.source, processes=0)
    with pytest.raises(UserError, match="--listen lo: workers of other machines join by --crew FOLDER"):
        command(options.source, processes=2, listen="lo")
    for more in ({}, {"watch": True}):
        with pytest.raises(
            UserError, match="--part-limit 5: is of workers that one process leads, and there would"
        ):
            command(options.source, part_limit=5, processes=1, data=str(options.data), cache=options.cache, **more)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--crew .*: one process leads it, and this is one of 2"):
        command(options.source, crew=tmp_path / "crew", data=str(options.data), cache=options.cache)


def test_workers_share_the_cores_and_end_when_nobody_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [list(each) for each in worker_environments(2)] == [["OMP_NUM_THREADS", "DITMOE_WORKERS_HERE"]] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "CUDA_VISIBLE_DEVICES" not in worker_environments(3, gpus=False)[0]
    assert worker_environments(3, gpus=False)[2]["DITMOE_WORKERS_HERE"] == "3"
    assert [each["CUDA_VISIBLE_DEVICES"] for each in worker_environments(None)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in worker_environments(None)] == ["5", "GPU-7"]
    with pytest.raises(UserError, match="--processes 3: each has a GPU to itself, and 2 are found"):
        worker_environments(3)
    worker(tmp_path / "crew", processes=1, idle=0)
    assert "nobody has led this crew" in capsys.readouterr().err
