"""Evaluations that follow or accompany a training job, and a sweep as an array, on a real Slurm."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditmoe.launcher.training.evaluations import stored_evaluations
from ditmoe.launcher.watch.boards import written_points
from ditmoe.launcher.watch.records import WATCH_FILE, read_lines
from ditmoe.parallel.checkpoint.folder import checkpoints, step_of
from ditmoe.slurm.attempts import read_attempts
from ditmoe.slurm.heartbeats import read_heartbeats
from ditmoe.slurm.job_folder import job_folders, training_folder
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_digits
from tests.slurm.cluster import Cluster

JOB = ["--nodes", "1", "--tasks-per-node", "1", "--time", "20"]
DRAWN = "--count 8 --steps 1 --no-recogniser --labels balanced --cache cache"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run of 8 steps with a checkpoint every 4, of which one stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {
        "run": {"dir": "run"},
        "launch": {"processes": 1, "device": "cpu", "threads": 1},
        "model": {"depth": 1, "hidden": 16, "heads": 2, "patch": 4},
        "data": {"sources": [{"path": str(write_digits(tmp_path / "digits"))}], "workers": 0},
        "train": {"steps": 8, "batch": 8, "precision": "fp32", "log_every": 1, "checkpoint_every": 4},
        "checkpoint": {"keep_last": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def ditmoe(*arguments: str) -> str:
    done = run_forked([*DITMOE, *arguments], Path("commands"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(cluster: Cluster, jobs: Sequence[str], folder: Path) -> None:
    """Wait for the end of jobs; each must be complete."""

    def outputs() -> str:
        files = sorted(folder.rglob("output-*.txt"))
        return "".join(f"\n== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def over() -> bool:
        states = {job: cluster.job(job)["JobState"] for job in jobs}
        bad = {job: state for job, state in states.items() if state in ("FAILED", "CANCELLED", "TIMEOUT")}
        assert not bad, f"{bad}{outputs()}"
        return set(states.values()) == {"COMPLETED"}

    cluster.wait(over, lambda: f"jobs {jobs}:{outputs()}", 420)


def submitted(told: str) -> list[str]:
    return [line.split()[2].rstrip(":") for line in told.splitlines() if line.startswith("submitted job")]


@pytest.mark.timeout(480)
def test_evaluations_beside_a_training_and_after_it(cluster: Cluster, config: Path) -> None:
    """They write their figures into the run, whose best checkpoint stays."""
    told = ditmoe("submit", "train", str(config), *JOB, "--evaluate", f"{DRAWN} --seed 1")
    jobs = submitted(told)
    assert len(jobs) == 2
    assert cluster.job(jobs[1])["Dependency"].startswith(f"afterok:{jobs[0]}(")
    run = config.with_name("run")
    watch = ditmoe("submit", "evaluate", str(run), "--watch", "--patience", "10", *JOB, *DRAWN.split())
    jobs += submitted(watch)
    ended(cluster, jobs, run)
    followed = [one for one in stored_evaluations(run / "evaluations") if "seed-1-" in one.id]
    assert [(one.step, one.figure("fid") is not None) for one in followed] == [(8, True)]
    lines = [line for line in read_lines(run / "evaluations" / WATCH_FILE) if line["outcome"] == "scored"]
    scored = [line["step"] for line in lines]
    assert scored in ([4, 8], [8])  # the first may be gone before its turn
    (board,) = (run / "tensorboard").glob("evaluation-*")
    assert {step for tag, step in written_points(board) if tag == "evaluation/FID"} == set(scored)
    (mark,) = (run / "evaluations").glob("best-*.json")
    assert json.loads(mark.read_text())["step"] in [step_of(path) for path in checkpoints(run)]
    for folder in job_folders(run):
        (attempt,) = read_attempts(folder.path).attempts
        assert attempt.end is not None and attempt.end.outcome == "complete"
        beats = read_heartbeats(folder.heartbeats, attempt.number)
        assert {beat.phase for beat in beats.values()} == {"ended"}  # without any it would count as hung in time


@pytest.mark.timeout(480)
def test_a_sweep_as_an_array(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """Each element trains a cell, an evaluation follows each, and the table has every cell."""
    sweep = [str(config), "optim.lr=1e-3,1e-2", "train.steps=4", "--dir", "sweep"]
    jobs = submitted(ditmoe("submit", "sweep", *sweep, *JOB, "--evaluate", DRAWN))
    assert len(jobs) == 2
    again = run_forked([*DITMOE, "submit", "sweep", *sweep, *JOB], tmp_path / "again")
    assert again.returncode == 2 and "of this sweep is " in again.stderr, again.stderr
    ended(cluster, [f"{job}_{element}" for job in jobs for element in (0, 1)], tmp_path / "sweep")
    ditmoe("sweep", *sweep, "--table")
    with (tmp_path / "sweep" / "table.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["state"], row["step"], row["evaluated_step"]) for row in rows] == [
        ("1e-3", "complete", "4", "4"),
        ("1e-2", "complete", "4", "4"),
    ]
    assert all(float(row["loss"]) > 0 and float(row["fid"]) > 0 for row in rows)
    folder = training_folder(tmp_path / "sweep" / "optim.lr=1e-3")
    (attempt,) = read_attempts(folder.path).attempts
    assert attempt.end is not None and attempt.end.outcome == "complete"
    assert folder.output(attempt.job).stat().st_size > 0
    assert "complete" in ditmoe("submit", "sweep", *sweep, *JOB)
    assert sys.executable in folder.script.read_text()  # it can be handed in by itself


@pytest.mark.timeout(480)
def test_a_watch_that_is_warned_comes_back(cluster: Cluster, config: Path) -> None:
    """While it waits for a run that does not go on; then the run does, and the watch ends with it."""
    run = config.with_name("run")
    trained = run_forked([*DITMOE, "train", str(config), "train.steps=4"], Path("commands"))
    assert trained.returncode == 0, trained.stderr
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["train"]["steps"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    (job,) = submitted(ditmoe("submit", "evaluate", str(run), "--watch", *JOB, *DRAWN.split()))
    (folder,) = job_folders(run)

    def printed() -> str:
        return folder.output(job).read_text() if folder.output(job).exists() else ""

    cluster.wait(lambda: "waiting for the next checkpoint" in printed(), printed, 200)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.wait(lambda: printed().count("waiting for the next checkpoint") > 1, printed, 200)
    assert "stopped by SIGUSR2; repeat the command to continue" in printed()
    first, _ = read_attempts(folder.path).attempts
    assert first.end is not None and (first.end.outcome, first.end.decision) == ("stopped", "requeue")
    trained = run_forked([*DITMOE, "train", str(config)], Path("commands"))
    assert trained.returncode == 0, trained.stderr
    ended(cluster, [job], run)
    lines = read_lines(run / "evaluations" / WATCH_FILE)
    assert [line["step"] for line in lines if line["outcome"] == "scored"] == [4, 8]
