"""`ditmoe submit` on a real Slurm, as a user calls it: the job does what the verb does on one machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ditmoe.parallel.checkpoint.folder import newest_checkpoint
from ditmoe.slurm.attempts import read_attempts, record_cancel
from ditmoe.slurm.job_folder import dataset_folder, training_folder
from ditmoe.slurm.submission.snapshot import take_snapshot
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_digits, write_run
from tests.slurm.cluster import ROOT, Cluster

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 4, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1, flip: true}}
parallel: {{expert: 4, zero: 1}}
train: {{steps: 24, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 4}}
optim: {{lr: 1.0e-3}}
"""
pytestmark = pytest.mark.timeout(600)  # a job is several starts of Python, one after the other

COMPARED = ("step", "images", "loss", "balance_loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the program that may be edited: an entry of PYTHONPATH."""
    take_snapshot(tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def submit(cluster: Cluster, checkout: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ditmoe submit …` of the checkout, from a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()

    def run(*arguments: str, code: Path = checkout) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *DITMOE, "submit", *arguments],
            cwd=folder,
            env={**cluster.environment, "PYTHONPATH": str(code), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run


def curve(run: Path) -> list[dict[str, Any]]:
    """What decides a run, step by step."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in COMPARED} for line in lines]


def told(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("output-*.txt")))


def job_of(folder: Path, number: int = -1) -> str:
    return read_attempts(folder).submissions[number].job


def test_a_submitted_run_is_what_was_submitted_and_has_the_curve_of_local_processes(
    cluster: Cluster, submit: Callable[..., Any], checkout: Path, shards: Path, tmp_path: Path
) -> None:
    """The checkout is edited and spoilt while the job waits; it is cancelled midway and started again by hand."""
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(run="run", shards=shards))
    asked = ("train", str(config), "--nodes=2", "--tasks-per-node=2", "--time=10", "--sbatch=hold")
    done = submit(*asked)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "here" / "run"
    folder = training_folder(run)
    job = job_of(folder.path)
    assert done.stdout.startswith(f"submitted job {job}: 2 nodes × 2 tasks\n")
    assert str(folder.script) in done.stdout

    second = submit(*asked)
    assert second.returncode == 2 and f"job {job} is PENDING (JobHeldUser); expected none" in second.stderr
    shutil.rmtree(checkout / "ditmoe" / "model")
    (checkout / "ditmoe" / "launcher" / "training" / "trainer.py").write_text("raise SystemExit('edited')\n")
    config.write_text("seed: 7\n")

    cluster.run("scontrol", "release", job)
    cluster.wait(lambda: newest_checkpoint(run) is not None, lambda: f"a checkpoint\n{told(folder.path)}", 150)
    record_cancel(folder.path, time.time())
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for_state(job, "FAILED", seconds=90)  # by the code of a run that was stopped before its end
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "an empty queue", 30)
    reached = len(curve(run))
    assert 4 <= reached < 24, told(folder.path)

    again = cluster.run("env", "-C", "/", "sbatch", "--parsable", str(folder.script)).strip()
    cluster.run("scontrol", "release", again)
    local = tmp_path / "local"
    config.write_text(CONFIG.format(run=local, shards=shards))
    alone = run_forked([*DITMOE, "train", str(config)], tmp_path / "output", 4)
    assert alone.returncode == 0, alone.stderr
    state = cluster.wait_for_state(again, "COMPLETED", "FAILED", "TIMEOUT", seconds=200)
    assert state == "COMPLETED", told(folder.path)
    assert curve(run) == curve(local)


def synthesis(out: str, run: Path, *more: str) -> Sequence[str]:
    return (
        "synthesize",
        out,
        "--from",
        str(run),
        "--count=6",
        "--score=none",
        "--steps=2",
        "--shard-samples=2",
        *more,
    )


def test_a_synthesis_as_a_job_has_the_bytes_of_a_local_one(
    cluster: Cluster, submit: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "small")
    done = submit(*synthesis("drawn", run, "--nodes=2"))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "here" / "drawn"
    folder = dataset_folder(out)
    local = tmp_path / "drawn"
    alone = run_forked([*DITMOE, "data", *synthesis(str(local), run, "--processes=1")], tmp_path / "output")
    assert alone.returncode == 0, alone.stderr
    state = cluster.wait_for_state(job_of(folder.path), "COMPLETED", "FAILED", seconds=200)
    assert state == "COMPLETED", told(folder.path)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in local.iterdir()) and any(name.endswith(".tar") for name in names)
    assert all((out / name).read_bytes() == (local / name).read_bytes() for name in names if name.endswith(".tar"))


def test_what_slurm_refuses_is_told_in_its_words(
    cluster: Cluster, submit: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    done = submit(*synthesis("drawn", write_run(tmp_path / "small"), "--partition=nowhere"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch: ") and "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr
    folder = dataset_folder(tmp_path / "here" / "drawn")
    assert not read_attempts(folder.path).submissions and not cluster.run("squeue", "-h")
    assert os.access(folder.script, os.R_OK) and not (tmp_path / "here" / "drawn").exists()


def test_the_code_of_this_repository_is_what_tests_submit(checkout: Path) -> None:
    assert (checkout / "ditmoe/launcher/cli.py").read_bytes() == (ROOT / "launcher/cli.py").read_bytes()
