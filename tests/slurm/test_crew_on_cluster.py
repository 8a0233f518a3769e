"""One evaluation, shared by workers on two nodes of a real Slurm, which come, go, die and stop meanwhile."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest
from distributed import Client

from ditmoe.data.crew.certificate import crew_security
from ditmoe.data.storage.files import read_object
from ditmoe.slurm.attempts import Attempt, read_attempts
from ditmoe.slurm.heartbeats import read_heartbeats
from ditmoe.slurm.job_folder import JobFolder, parts_made, tally_of, workers_folder
from tests.forked import DITMOE
from tests.sampling.small_run import write_digits, write_run
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(2400)  # a worker that is stopped is missed after two minutes
ASKED: Final = ("--count=320", "--chunk=8", "--batch=8", "--steps=150", "--reference=shards")


class Scene:
    """A run, its crew, and the commands that work for it; all in one folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.crew = cluster, folder, folder / "crew"
        self.environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        self.started: list[subprocess.Popen[str]] = []
        write_digits(folder / "shards")

    def ditmoe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *DITMOE, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done

    def evaluate(self, run: str, *more: str) -> subprocess.Popen[str]:
        write_run(self.folder / run)
        command = [sys.executable, *DITMOE, "evaluate", run, *ASKED, f"--cache=cache-{run}", *more]
        with (self.folder / f"{run}.txt").open("w") as output:
            started = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=output, text=True
            )
        self.started.append(started)
        return started

    def workers(self, number: int, *more: str) -> tuple[JobFolder, str]:
        """The job folder of new workers, and the job."""
        done = self.ditmoe("submit", "workers", "crew", "--processes=1", "--no-check", "--idle=1", *more)
        assert done.returncode == 0, done.stderr
        folder = workers_folder(self.crew, number)
        return folder, read_attempts(folder.path).submissions[-1].job

    def wait(self, what: Callable[[], Any], name: str, seconds: float = 600) -> Any:
        end = time.monotonic() + seconds
        while not (found := what()):
            outputs = [*self.folder.glob("*.txt"), *self.crew.glob("slurm/*/output-*.txt")]
            told = "\n".join(f"{path}:\n{path.read_text()}" for path in outputs)
            assert time.monotonic() < end, f"waited for {name}\n{told}"
            time.sleep(0.1)
        return found

    def processes(self, job: str, is_wanted: Callable[[Sequence[str]], bool]) -> list[psutil.Process]:
        """Processes of a job's tasks, seen from outside of its nodes."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                is_own = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if is_own and variables.get("SLURM_JOB_ID") == job and is_wanted(process.cmdline()):
                    found.append(process)
        return found

    def results(self, run: str) -> tuple[str, bytes, bytes]:
        (folder,) = (self.folder / run / "evaluations").glob("step-*")
        with np.load(folder / "samples.npz") as samples:
            images = samples["arr_0"].tobytes(), samples["arr_1"].tobytes()
        return json.dumps(read_object(folder / "metrics.json")["results"]), *images


@pytest.fixture
def scene(cluster: Cluster, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(cluster, tmp_path)
    yield scene
    for process in scene.started:
        process.kill()
        process.wait()


def is_worker(command: Sequence[str]) -> bool:
    return any("spawn_main" in word for word in command)


def is_keeper(command: Sequence[str]) -> bool:
    return "worker" in command and "ditmoe.launcher" in command and "srun" not in command[0]


def test_two_nodes_share_an_evaluation_whatever_becomes_of_their_workers(cluster: Cluster, scene: Scene) -> None:
    alone = scene.evaluate("alone", "--processes=1")
    assert scene.wait(lambda: alone.poll() is not None, "the undisturbed evaluation") and alone.returncode == 0

    # Workers that are there before anybody leads.
    first, job = scene.workers(1, "--nodes=2")
    cluster.wait_for_state(job, "RUNNING")
    scene.wait(lambda: len(beats(first)) == 2 and all("waits" in each for each in beats(first)), "waiting workers")
    leader = scene.evaluate("shared", "--crew=crew", "--processes=0")
    for rank in range(2):
        scene.wait(lambda rank=rank: tally_of(first.path, rank).exists(), f"a part of node {rank}")
    assert leader.poll() is None

    # One that is stopped on the one node, and is missed after two minutes; one that is killed on the other.
    stopped, killed = scene.wait(lambda: pair(scene.processes(job, is_worker)), "two workers")
    stopped.send_signal(signal.SIGSTOP)
    killed.kill()

    # More of them on the way, whose keeper is killed: the job comes back, and they work on.
    added, added_job = scene.workers(2, "--nodes=1")
    scene.wait(lambda: parts_made(added.path), "a part of the worker that was added")
    assert leader.poll() is None
    before = parts_made(added.path)
    [keeper] = scene.processes(added_job, is_keeper)
    keeper.kill()
    told = scene.ditmoe("status", "crew").stdout
    assert f"job {job} RUNNING on n1, n2" in told and "process" in told.splitlines()[0]

    # Strangers, one with the certificate of another crew, one with none.
    address = read_object(scene.crew / "scheduler.json")["address"]
    with pytest.raises(OSError, match="TLS certificate does not match"):
        Client(address, security=crew_security(scene.folder / "others"), timeout=10, set_as_default=False)
    host, _, port = address.removeprefix("tls://").rpartition(":")
    stranger = ssl.create_default_context()
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    connection = socket.create_connection((host, int(port)), timeout=30)
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"), connection:
        stranger.wrap_socket(connection).recv(1)

    # Others that are cancelled at once do no harm.
    third, third_job = scene.workers(3, "--nodes=1")
    cancelled = scene.ditmoe("cancel", str(third.path))
    assert cancelled.returncode == 0, cancelled.stderr
    scene.wait(lambda: has_ended(cluster, third, third_job), "the end of the workers that were cancelled", 120)
    said = "cancelled"
    scene.wait(lambda: said in line_of(third, scene.ditmoe("status", "crew").stdout), "the word of their end", 120)

    assert scene.wait(lambda: leader.poll() is not None, "the end of the evaluation") and leader.returncode == 0
    assert scene.results("shared") == scene.results("alone")
    assert not psutil.pid_exists(stopped.pid) or stopped.status() == psutil.STATUS_ZOMBIE

    # The killed keeper's job has been queued again, and its worker has come back; both jobs end when nobody leads.
    scene.wait(lambda: len(read_attempts(added.path).attempts) == 2, "the second attempt")
    assert read_attempts(added.path).attempts[0].end.outcome == "failed"  # type: ignore[union-attr]
    assert read_attempts(added.path).attempts[1].step >= before >= 1  # type: ignore[operator]
    for each in (job, added_job):
        assert cluster.wait_for_state(each, "COMPLETED", "FAILED", seconds=600) == "COMPLETED"
    told = scene.ditmoe("status", "crew").stdout
    assert "nobody leads it" in told and told.count("complete: the program completed its work") == 2
    assert said in line_of(third, told)
    assert f"join {address}" in scene.ditmoe("logs", str(first.path)).stdout


def has_ended(cluster: Cluster, workers: JobFolder, job: str) -> bool:
    """Whether Slurm or the record says so. Workers that were cancelled before they began have no attempt."""
    attempts = read_attempts(workers.path).attempts
    return cluster.state(job) == "CANCELLED" or (bool(attempts) and attempts[-1].end is not None)


def line_of(workers: JobFolder, told: str) -> str:
    """What `ditmoe status` says of one job of workers; empty: nothing."""
    return next((line for line in told.splitlines() if line.split()[:1] == [workers.path.name]), "")


def beats(folder: JobFolder) -> list[str]:
    with suppress(OSError):
        return [beat.doing for beat in read_heartbeats(folder.heartbeats, 1).values()]
    return []


def pair(workers: list[psutil.Process]) -> list[psutil.Process] | None:
    return workers if len(workers) == 2 else None


def test_an_evaluation_that_leads_as_a_job_goes_on_after_its_end_on_another_node(
    cluster: Cluster, scene: Scene
) -> None:
    """Its node is lost with all that ran there: a job elsewhere succeeds it once that is sure."""
    write_run(scene.folder / "run")
    workers, job = scene.workers(1, "--nodes=1", "--sbatch=nodelist=n2", "--idle=5")
    asked = ["--crew=crew", "--processes=0", "--cache=cache", *ASKED]
    options = ["--no-check", "--sbatch=nodelist=n1"]
    done = scene.ditmoe("submit", "evaluate", "run", *asked, *options)
    assert done.returncode == 0, done.stderr
    (folder,) = (scene.folder / "run" / "slurm").glob("evaluate-*")
    leader = read_attempts(folder).submissions[0].job
    scene.wait(lambda: parts_made(workers.path) >= 3, "parts")
    assert cluster.job(leader)["NodeList"] == "n1" and cluster.job(job)["NodeList"] == "n2"
    cluster.kill_node("n1")
    cluster.run("scontrol", "update", f"jobid={leader}", "reqnodelist=", check=False)
    scene.wait(lambda: cluster.state(leader) == "PENDING", "the loss of the node")
    made = parts_made(workers.path)
    cluster.run("scontrol", "update", f"jobid={leader}", "reqnodelist=n2")
    state = cluster.wait_for_state(leader, "COMPLETED", "FAILED", seconds=500)
    assert state == "COMPLETED", (folder / f"output-{leader}.txt").read_text()
    assert parts_made(workers.path) > made
    assert "waiting for a sign that it is dead" in (folder / f"output-{leader}.txt").read_text()
    alone = scene.evaluate("alone", "--processes=1")
    assert alone.wait(600) == 0
    assert scene.results("run") == scene.results("alone")


def test_workers_that_wait_are_not_hung_and_those_that_are_come_back(cluster: Cluster, scene: Scene) -> None:
    """Nobody leads at all: what gives a sign of life each second may wait for as long as it likes."""
    folder, job = scene.workers(1, "--nodes=2", "--idle=30", "--limit=step=15s")

    def attempt(number: int) -> Attempt | None:
        attempts = read_attempts(folder.path).attempts
        return attempts[number - 1] if len(attempts) >= number else None

    def counts(number: int) -> list[int]:
        with suppress(OSError):
            return [beat.beats for beat in read_heartbeats(folder.heartbeats, number).values()]
        return []

    scene.wait(lambda: len(counts(1)) == 2 and min(counts(1)) > 50, "signs of life")
    assert read_attempts(folder.path).attempts[0].end is None
    first, _ = scene.processes(job, is_keeper)
    first.send_signal(signal.SIGSTOP)
    scene.wait(lambda: attempt(2), "a second attempt")
    end = read_attempts(folder.path).attempts[0].end
    assert end is not None and end.outcome == "hung" and "write nothing any more" in end.reason

    # The warning before the time limit, with more time left: nothing was made, so the third attempt is the last.
    scene.wait(lambda: len(counts(2)) == 2 and min(counts(2)) > 2, "signs of life again")
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    scene.wait(lambda: attempt(3), "a third attempt")
    end = read_attempts(folder.path).attempts[1].end
    assert end is not None and end.outcome == "stopped" and "SIGUSR2" in end.reason
    told = scene.ditmoe("cancel", "crew")
    assert told.returncode == 0 and f"job {job} (workers-1) has ended" in told.stdout, told.stderr
    assert not cluster.run("squeue", "-h")


def test_the_environment_names_no_rank_to_workers(cluster: Cluster, scene: Scene) -> None:
    """A task of srun is a rank; a worker below it is none, whatever it computes on."""
    _, job = scene.workers(1, "--nodes=2", "--idle=5")
    scene.evaluate("run", "--crew=crew", "--processes=0")
    workers = scene.wait(lambda: pair(scene.processes(job, is_worker)), "two workers")
    for worker in workers:
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(worker.environ())
    assert os.getpid() not in [worker.pid for worker in workers]
