"""The service and processes of its jobs are killed and stopped at random: every job ends as if nothing had been.

`DITMOE_KILLS` says how many signals are sent: 25 unless it does.
"""

import json
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from ditmoe.launcher.commands.scoring.reference import make
from ditmoe.sampling.service.client import Client
from ditmoe.sampling.service.jobs.evaluating import MOST_ATTEMPTS
from tests.sampling.service.served import Served, number_of, processes_of
from tests.sampling.small_run import write_digits, write_noise_classifier, write_run

KILLS = number_of("DITMOE_KILLS", 25)
SERVICE_SHARE = 0.4
"""Of the signals; the others go to processes of evaluations."""
LONGEST_REST = 4.0
LONGEST_WAIT = 60.0
"""Seconds at most between two signals, and for images between them."""
CHAINS = {"sampler": "dlg:euler", "steps": 4, "dlg": {"skip": 4, "samples_per_chain": 40, "initial_steps": 4}}
SCORED = {"reference": "own.safetensors", "recogniser": False}
JOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("draw", {"count": 200, "sampler": "heun", "steps": 20, "seed": 5}),
    ("draw", {"count": 130, "sampler": "kar2", "steps": 20, "cfg_scale": 1.5, "class": 3}),
    ("draw", {"count": 120, **CHAINS}),
    ("evaluate", {"count": 320, "sampler": "euler", "steps": 60, **SCORED}),
    ("evaluate", {"count": 200, "sampler": "heun", "steps": 20, "seed": 9, **SCORED}),
)


def made(client: Client, job_id: str, kind: str) -> tuple[list[bytes], str]:
    """All images of a job, and its figures."""
    job = client.job(job_id)
    assert job["status"] == "completed" and job["progress"]["done"] == job["progress"]["total"]
    images = [client.image(job_id, number).tobytes() for number in range(job["progress"]["total"])]
    figures = client.figures(job_id)["results"] if kind == "evaluate" else None
    return images, json.dumps(figures, sort_keys=True)


@dataclass
class Given:
    """Jobs that were given: the place of each in `JOBS`, and its id."""

    client: Client
    runs: Path
    jobs: list[tuple[int, str]] = field(default_factory=list)
    copies: int = 0

    def more(self, kind: str) -> None:
        """All of a kind, of another copy of the run: an evaluation of the same would be there already."""
        self.copies += 1
        name = f"digits-{self.copies}"
        shutil.copytree(self.runs.parent / "run", self.runs / name)
        for place, (of, fields) in enumerate(JOBS):
            if of == kind:
                self.jobs.append((place, self.client.give(kind, model=name, **fields)))

    def unfinished(self, kind: str) -> list[str]:
        found = [job_id for place, job_id in self.jobs if JOBS[place][0] == kind]
        return [job_id for job_id in found if self.client.job(job_id)["status"] != "completed"]

    def images(self) -> int:
        return sum(int(self.client.job(job_id)["progress"]["done"]) for _, job_id in self.jobs)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with a reference, and beside it the run that rounds copy; all of it draws in one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_noise_classifier(write_run(tmp_path / "run"))
    reference = tmp_path / "runs" / "references" / "own.safetensors"
    reference.parent.mkdir(parents=True)
    make(str(write_digits(tmp_path / "digits")), reference, recogniser=False, cache=tmp_path / "cache")
    return tmp_path / "runs"


class Killer:
    """Sends signals, and counts them."""

    def __init__(self, served: Served, log: Path) -> None:
        self._served, self._random, self._log = served, Random(0), log
        self.sent: Counter[str] = Counter()
        self._unanswered: dict[str, tuple[int, int]] = {}
        """Evaluation → its images when its process was last met, and how often since they grew."""

    def rest(self, given: Given) -> None:
        """For a moment; half of the times not before there are more images, where some come soon."""
        if self._random.random() < 0.5:
            before, end = given.images(), time.monotonic() + LONGEST_WAIT
            while given.images() == before and time.monotonic() < end:
                time.sleep(0.3)
        time.sleep(self._random.uniform(0.0, LONGEST_REST))

    def once(self, client: Client, jobs: list[str]) -> None:
        """To the service, which is started again; or to the process of an evaluation, if there is one."""
        number = self._random.choice([signal.SIGKILL, signal.SIGSTOP])
        if self._random.random() >= SERVICE_SHARE:
            for job_id in jobs:
                processes = processes_of(job_id)
                if processes and self._may_meet(job_id, client.job(job_id)["progress"]["done"]):
                    try:
                        self._random.choice(processes).send_signal(number)
                    except psutil.NoSuchProcess:
                        return
                    self._note(f"job process {number.name}")
                    return
        self._served.kill(number)
        self._note(f"service {number.name}")
        self._served.start()

    def _may_meet(self, job_id: str, done: int) -> bool:
        """A job whose process is killed too often without any more images is given up, as it should be."""
        before, times = self._unanswered.get(job_id, (done, 0))
        times = 0 if done > before else times
        if times < MOST_ATTEMPTS - 2:
            self._unanswered[job_id] = done, times + 1
            return True
        return False

    def _note(self, what: str) -> None:
        self.sent[what] += 1
        with self._log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {what}\n")


@pytest.mark.slow
@pytest.mark.timeout(600 + 90 * KILLS)
def test_no_kill_loses_a_job_or_changes_an_image_or_a_figure(runs: Path, tmp_path: Path) -> None:
    served = Served(runs, tmp_path / "calm")
    with Client(served.start()) as client:
        calm = Given(client, runs)
        calm.more("draw")
        calm.more("evaluate")
        known = {}
        for place, job_id in calm.jobs:
            client.wait(job_id)
            known[place] = made(client, job_id, JOBS[place][0])
    served.kill()
    served = Served(runs, tmp_path / "wild")
    killer = Killer(served, tmp_path / "signals.txt")
    with Client(served.start()) as client:
        given = Given(client, runs, copies=calm.copies)
        while sum(killer.sent.values()) < KILLS:
            for kind in ("draw", "evaluate"):
                if not given.unfinished(kind):
                    given.more(kind)
            killer.rest(given)
            killer.once(client, given.unfinished("evaluate"))
        for place, job_id in given.jobs:
            client.wait(job_id)
            assert made(client, job_id, JOBS[place][0]) == known[place], (place, job_id)
        assert {job["id"] for job in client.jobs(200)} == {job_id for _, job_id in given.jobs}
        assert not any(processes_of(job_id) for _, job_id in given.jobs)
    served.kill()
    print(
        f"{sum(killer.sent.values())} signals: {dict(killer.sent)}; {len(given.jobs)} jobs, none lost or changed"
    )
