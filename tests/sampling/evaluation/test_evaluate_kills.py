"""Whatever is killed or stopped of an evaluation by a crew, images and figures are those of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest

from ditmoe.data.storage.files import read_object
from tests.forked import DITMOE
from tests.sampling.small_run import write_digits, write_run

SIGNALS: Final = int(os.environ.get("EVALUATION_SIGNALS", "40"))
"""So many are sent."""
SECONDS: Final = float(os.environ.get("EVALUATION_SECONDS", "inf"))
"""After which no more are sent."""
PAUSE: Final = (0.1, 3.0)
"""Before a signal, s."""
WAITS: Final = 0.15
"""Share of the signals that wait besides until a part has been made since the one before: however slow the machine
is, the work gets on, and all stages of it are hit, while the others hit what is just starting."""
STOPPED: Final = (1.0, 12.0)
"""That a stopped process which nobody replaces stays so before it goes on, or is killed, s."""
ROLES: Final = ("worker", "worker", "worker", "leader", "keeper")
"""In the proportion in which they are hit; a keeper is `ditmoe worker`, which keeps a worker."""
SEEDS: Final = (0, 1)
MARK: Final = "DITMOE_TEST_OF_KILLS"
LEADING: Final = ("-m", "tests.sampling.evaluation.leading")


class Scene:
    """One evaluation after another, led by a program, with the workers of two other programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1"}
        self.lock = threading.Lock()
        self.leader: subprocess.Popen[bytes] | None = None
        self.keepers: list[subprocess.Popen[bytes] | None] = [None, None]
        self.starts: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def start(self, role: str, program: Sequence[str]) -> subprocess.Popen[bytes]:
        self.starts[role] += 1
        with (self.folder / f"{role}.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *program], env=self.environment, stdout=output, stderr=output, cwd=Path.cwd()
            )

    def keep_up(self, program: Sequence[str]) -> bool:
        """Start again what has ended; True: the evaluation is complete."""
        with self.lock:
            for place, keeper in enumerate(self.keepers):
                if keeper is None or keeper.poll() is not None:
                    arguments = ["worker", str(self.folder / "crew"), "--processes=1", "--idle=5"]
                    self.keepers[place] = self.start("keeper", [*DITMOE, *arguments])
            if self.leader is not None and self.leader.poll() == 0:
                self.leader = None
                return True
            if self.leader is None or self.leader.poll() is not None:
                assert self.leader is None or self.leader.returncode < 0, (self.folder / "leader.txt").read_text()
                self.leader = self.start("leader", program)
        return False

    def victims(self, role: str) -> list[psutil.Process]:
        programs = [self.leader, *self.keepers]
        wanted = programs if role == "worker" else [self.leader] if role == "leader" else self.keepers
        found = []
        for program in wanted:
            if program is not None and program.poll() is None:
                with suppress(psutil.Error):
                    process = psutil.Process(program.pid)
                    found += [process] if role != "worker" else list(filter(_is_worker, process.children()))
        return found

    def parts(self) -> int:
        """Of all jobs so far: files that were made, of every stage, without claims and drafts."""
        places = [*self.folder.glob("job-*/evaluations"), *self.folder.glob("cache-job-*")]
        names = (name for place in places for _, _, names in os.walk(place) for name in names)
        return sum(name.endswith((".npz", ".npy", ".json", ".safetensors", ".pt")) for name in names)

    def disturb(self, chance: random.Random, count: int, over: threading.Event) -> None:
        """Send so many signals, every third a SIGSTOP."""
        roles: list[str] = []
        end = time.monotonic() + SECONDS
        while sum(self.sent.values()) < count and time.monotonic() < end and not over.wait(chance.uniform(*PAUSE)):
            waits, before = chance.random() < WAITS, self.parts()
            while waits and self.parts() == before and not over.wait(0.2):
                pass
            roles = roles or chance.sample(ROLES, len(ROLES))
            with self.lock, suppress(psutil.Error):
                victims = self.victims(roles[0])
                if not victims:
                    continue
                victim, role = chance.choice(victims), roles.pop(0)
                stops = sum(self.sent.values()) % 3 == 2
                victim.send_signal(signal.SIGSTOP if stops else signal.SIGKILL)
                self.sent[f"{'SIGSTOP' if stops else 'SIGKILL'} {role}"] += 1
            self.wake_orphans()
            if stops and role != "worker":  # a stopped worker is the crew's own to replace
                over.wait(chance.uniform(*STOPPED))
                with suppress(psutil.Error):
                    victim.send_signal(chance.choice([signal.SIGCONT, signal.SIGKILL]))

    def left(self) -> list[psutil.Process]:
        """Processes of this scene that are still there."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_own = process.environ().get(MARK) == str(self.folder)
                if is_own and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
        return found

    def wake_orphans(self) -> None:
        """Let go on what was stopped while it started, and whose keeper has ended since: it sees that, and ends.

        Nothing can end it before, and it would keep its memory. Later the system itself ends it.
        """
        for process in self.left():
            with suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED and process.ppid() == 1:
                    process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for program in (self.leader, *self.keepers):
            if program is not None:
                program.kill()
                program.wait()


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "spawn_main" in " ".join(process.cmdline())
    return False


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    write_run(tmp_path / "run")
    write_digits(tmp_path / "shards")
    try:
        yield scene
    finally:
        scene.close()
        for process in scene.left():
            with suppress(psutil.Error):
                process.kill()


def program(folder: Path, name: str, seed: int, *crew: str) -> list[str]:
    shutil.copytree(folder / "run", folder / name)
    cache = folder / f"cache-{name}"
    return [*LEADING, str(folder / name), str(folder / "shards"), str(cache), str(seed), *crew]


def outcome(run: Path) -> tuple[dict[str, Any], bytes, bytes]:
    (folder,) = (run / "evaluations").glob("step-*")
    with np.load(folder / "samples.npz") as samples:
        images = samples["arr_0"].tobytes(), samples["arr_1"].tobytes()
    assert not list((folder / "chunks").rglob("*.draft"))
    return read_object(folder / "metrics.json")["results"], *images


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_signals_at_any_moment_change_nothing(scene: Scene) -> None:
    """Signals hit workers, who leads them, and who keeps them; one job follows the other as long as they come."""
    folder, expected = scene.folder, {}
    for seed in SEEDS:
        done = subprocess.run(
            [sys.executable, *program(folder, f"alone-{seed}", seed)], env=scene.environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        expected[seed] = outcome(folder / f"alone-{seed}")
    assert expected[0] != expected[1]
    over, begun, jobs = threading.Event(), time.monotonic(), 0
    disturber = threading.Thread(target=scene.disturb, args=(random.Random(0), SIGNALS, over))
    disturber.start()
    try:
        while disturber.is_alive():
            seed = SEEDS[jobs % len(SEEDS)]
            leading = program(folder, f"job-{jobs}", seed, str(folder / "crew"))
            while not scene.keep_up(leading):
                time.sleep(0.1)
            found = outcome(folder / f"job-{jobs}")
            assert json.dumps(found[0]) == json.dumps(expected[seed][0])
            assert found[1:] == expected[seed][1:]
            jobs += 1
    finally:
        over.set()
        disturber.join()
        told = ", ".join(f"{count} {what}" for what, count in sorted(scene.sent.items()))
        starts = ", ".join(f"{count} starts of a {role}" for role, count in sorted(scene.starts.items()))
        print(f"\n{jobs} evaluations in {time.monotonic() - begun:.0f} s; {told}; {starts}", flush=True)
    scene.close()
    end = time.monotonic() + 60
    while left := scene.left():
        assert time.monotonic() < end, f"left behind: {[process.cmdline() for process in left]}"
        scene.wake_orphans()
        time.sleep(0.2)
    assert sum(scene.sent.values()) == SIGNALS or float("inf") != SECONDS
