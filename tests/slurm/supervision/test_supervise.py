"""One attempt under the supervisor, with a queue and steps that the test plays."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.model.errors import UserError
from ditmoe.slurm import supervise
from ditmoe.slurm.attempts import End, record_cancel, record_submission
from ditmoe.slurm.attempts import read_attempts as read
from ditmoe.slurm.check import MARK
from ditmoe.slurm.client import Output, Queue, Unseen
from ditmoe.slurm.heartbeats import Heart, read_terms
from ditmoe.slurm.job_folder import PHASES, Job, JobFolder, training_folder
from ditmoe.slurm.requeue import EXIT_NO_PROGRESS
from ditmoe.slurm.supervise import Supervisor
from ditmoe.slurm.supervision.patience import Shared, Teller
from ditmoe.slurm.supervision.step import Step, TaskFailure, task_failure, user_message
from ditmoe.slurm.supervision.work import is_cancelled

HOSTS = "n[1-3]"


class Slurm:
    """The programs of a queue with three nodes n1 to n3, and n4."""

    def __init__(self) -> None:
        self.orders: list[str] = []
        self.state = "RUNNING"
        self.restarts = 0
        self.excluded = "(null)"
        self.nodes = ("n1", "n2", "n3", "n4")
        self.missing = False
        self.obeys = True

    def __call__(self, command: Sequence[str], seconds: float) -> Output | Unseen:
        if self.missing:
            return Unseen(f"{command[0]} cannot be run: No such file or directory")
        words = " ".join(command)
        if words.startswith("scontrol --oneliner show job"):
            return Output(
                0,
                f"JobId=7 JobState={self.state} Restarts={self.restarts} RunTime=00:01:00 TimeLimit=1-00:00:00"
                f" Partition=ci ExcNodeList={self.excluded}\n",
                "",
            )
        if command[0] == "sinfo":
            return Output(0, "".join(f"{node} idle\n" for node in self.nodes), "")
        self.orders.append(words)
        if "ExcNodeList=" in words and self.obeys:
            self.excluded = words.partition("ExcNodeList=")[2]
        return Output(0, "", "")


class PlayedStep:
    """A step that ends as the test says."""

    failure: TaskFailure | None = None
    words = ""
    message = ""

    def __init__(self, play: Callable[["PlayedStep"], int], environment: Mapping[str, str], ended: Any) -> None:
        self.environment = environment
        self.asked = threading.Event()
        self.killed = threading.Event()
        self.returned: int | None = None
        self._play, self._ended = play, ended
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.returned = self._play(self)
        self._ended()

    @property
    def code(self) -> int | None:
        return self.returned

    def ask_to_stop(self) -> None:
        self.asked.set()

    def kill(self) -> None:
        self.killed.set()
        while self.returned is None:
            time.sleep(0.005)


class Scene:
    """A job of a training run, and its attempts one after the other."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = training_folder(run)
        self.slurm = Slurm()
        self.restart = 0
        self.commands: list[list[str]] = []
        self.checking: Callable[[PlayedStep], int] = lambda step: 0
        """What a check does once it has said its lines."""
        self.supervisor: Supervisor | None = None
        self.store()

    def store(self, **changes: Any) -> None:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "name": "test",
            "verb": "train",
            "arguments": ("train", "c.yaml"),
            "run": str(self.run),
            "nodes": 3,
            "tasks_per_node": 1,
            "gpus_per_node": 0,
            "directory": "/",
            "python": "python",
            "task": ("python",),
            "srun": ("--mpi=none",),
            "limits": PHASES,
            "warning": 60,
            "check": False,
        }
        self.folder.store(Job(**{**values, **changes}))

    def attempt(self, play: Callable[[PlayedStep], int], job: str = "7", check: Sequence[str] = ()) -> int:
        """Make an attempt whose step `play` stands for; the exit code."""

        def start(command: list[str], environment: Any, show: Any, ended: Any, take: Any = None) -> Any:
            self.commands.append(command)
            if take is not None:
                for line in check:
                    take(line)
                return PlayedStep(self.checking, environment, ended)
            return PlayedStep(play, environment, ended)

        environment = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": HOSTS, "SLURM_RESTART_COUNT": str(self.restart)}
        self.supervisor = Supervisor(self.folder, environment, Queue(self.slurm), Teller(), start)
        self.restart += 1
        return self.supervisor.run()

    def state(self, state: str, reason: str = "") -> None:
        (self.run / "state.json").write_text(json.dumps({"state": state, "reason": reason, "time": time.time()}))

    def save(self, step: int) -> None:
        (self.run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)

    def ends(self) -> list[End]:
        ends = [attempt.end for attempt in read(self.folder.path).attempts]
        assert None not in ends
        return [end for end in ends if end is not None]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr("ditmoe.slurm.supervision.follow.REQUEUED_SECONDS", 0.0)
    monkeypatch.setattr("ditmoe.slurm.supervise._ignore_signals", lambda: None)
    monkeypatch.setattr("ditmoe.slurm.supervise.LOCK_SECONDS", 0.0)
    return Scene(tmp_path / "run")


def completes(scene: Scene) -> Callable[[PlayedStep], int]:
    def play(step: PlayedStep) -> int:
        scene.save(12)
        scene.state("complete")
        return 0

    return play


def fails(code: int, words: str = "", host: str = "n2") -> Callable[[PlayedStep], int]:
    def play(step: PlayedStep) -> int:
        step.failure = TaskFailure((host,), code, words)
        step.words = words
        return code

    return play


def test_a_job_that_completes(scene: Scene) -> None:
    record_submission(scene.folder.path, "7", 1.0)
    assert scene.attempt(completes(scene)) == 0
    (end,) = scene.ends()
    assert (end.outcome, end.decision, end.step, end.hosts) == ("complete", "done", 12, ("n1", "n2", "n3"))
    assert scene.slurm.orders == []
    srun = ["srun", "--kill-on-bad-exit=1", "--nodes=3", "--ntasks-per-node=1", "--mpi=none", "python"]
    assert scene.commands == [[*srun, "-m", "ditmoe.launcher", "train", "c.yaml"]]
    assert scene.attempt(fails(1)) == 0, "a later job of the chain finds it done"
    assert len(scene.ends()) == 1 and len(scene.commands) == 1


def test_a_users_error(scene: Scene) -> None:
    def play(step: PlayedStep) -> int:
        step.message = "optim.lr = x: expected a number"
        return 2

    assert scene.attempt(play) == 2
    (end,) = scene.ends()
    assert (end.outcome, end.decision) == ("user-error", "stop") and "optim.lr = x" in end.reason
    assert scene.slurm.orders == []
    assert scene.attempt(completes(scene)) == 2, "a requeue from outside starts nothing"
    assert len(scene.commands) == 1
    assert scene.attempt(completes(scene), job="8") == 0, "a new submission does"


def test_an_element_of_an_array_asks_for_itself_alone(scene: Scene) -> None:
    """The SLURM_JOB_ID of the last element is that of the array: its requeue would be that of all cells."""
    environment = {"SLURM_JOB_ID": "7", "DITMOE_JOB": "7_1"}
    assert Supervisor(scene.folder, environment, Queue(scene.slurm), Teller()).job_id == "7_1"


def test_a_signal_is_passed_on_and_the_job_queued_again(scene: Scene) -> None:
    def play(step: PlayedStep) -> int:
        assert scene.supervisor is not None
        scene.supervisor.on_signal(signal.SIGUSR2, None)
        assert step.asked.wait(20)
        scene.save(5)
        scene.state("stopped", "stopped by SIGUSR2 at step 5")
        return 0

    assert scene.attempt(play) == 0
    (end,) = scene.ends()
    assert (end.outcome, end.decision, end.step) == ("stopped", "requeue", 5)
    assert end.reason == "stopped by SIGUSR2 at step 5"
    assert scene.slurm.orders == ["scontrol requeue 7"]
    assert scene.attempt(completes(scene)) == 0
    assert [attempt.step for attempt in read(scene.folder.path).attempts] == [0, 5]


def test_three_attempts_that_bring_nothing(scene: Scene) -> None:
    scene.save(5)
    codes = [scene.attempt(fails(137, "n2: task 1: Killed")) for _ in range(3)]
    assert codes == [137, 137, EXIT_NO_PROGRESS]
    assert [end.decision for end in scene.ends()] == ["requeue", "requeue", "stop"]
    assert "3 attempts in a row" in scene.ends()[-1].reason and "Killed" in scene.ends()[-1].reason
    assert scene.slurm.orders.count("scontrol requeue 7") == 2
    assert scene.attempt(completes(scene)) == EXIT_NO_PROGRESS, "nor does a requeue from outside go on"
    assert scene.attempt(completes(scene), job="9") == 0


def test_attempts_that_were_cut_off_count(scene: Scene) -> None:
    class BatchScriptIsKilled(BaseException):
        pass

    def play(step: PlayedStep) -> int:
        return 0

    for number in range(3):
        with pytest.raises(BatchScriptIsKilled):
            scene.slurm.state = "RUNNING"
            original = Supervisor._attempt
            try:
                Supervisor._attempt = lambda *_: (_ for _ in ()).throw(BatchScriptIsKilled)  # type: ignore[method-assign]
                scene.attempt(play)
            finally:
                Supervisor._attempt = original  # type: ignore[method-assign]
        assert len(read(scene.folder.path).attempts) == number + 1
    assert scene.attempt(play) == EXIT_NO_PROGRESS
    assert [end.outcome for end in scene.ends()] == ["cut-off"] * 3


def test_a_suspect_is_left_out_and_the_answer_read_back(scene: Scene) -> None:
    scene.attempt(fails(1, "n2: task 1: Exited with exit code 1"))
    assert scene.slurm.orders == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"]
    (end,) = scene.ends()
    assert end.suspects == ("n2",) and end.excluded == ("n2",)
    scene.slurm.orders.clear()
    scene.slurm.obeys = False
    scene.slurm.nodes = ("n1", "n2", "n3", "n4", "n5")
    scene.attempt(fails(1, "n3: task 1: Bus error", "n3"))
    assert scene.slurm.orders[-1] == "scontrol update JobId=7 ExcNodeList=n2,n3"
    assert scene.ends()[1].suspects == ("n3",) and scene.ends()[1].excluded == ("n2",)


def test_a_partition_that_would_have_too_few_nodes(scene: Scene) -> None:
    scene.slurm.nodes = ("n1", "n2", "n3")
    scene.attempt(fails(1))
    assert scene.slurm.orders == ["scontrol requeue 7"]
    assert scene.ends()[0].suspects == ("n2",) and scene.ends()[0].excluded == ()


def report(host: str, *problems: str) -> str:
    return MARK + json.dumps({"host": host, "problems": problems, "group": [], "missing": []})


def test_a_node_that_hangs_in_its_check(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a driver that does not come back: the check is killed, and who has said nothing is named."""
    monkeypatch.setattr(supervise, "CHECK_SECONDS", 0.2)
    scene.store(check=True)

    def hangs(step: PlayedStep) -> int:
        assert step.killed.wait(60)
        return 137

    scene.checking = hangs
    scene.attempt(completes(scene), check=[report("n1"), report("n3")])
    (end,) = scene.ends()
    assert (end.outcome, end.decision, end.suspects) == ("node-check", "requeue", ("n2",))
    assert "n2: gave no answer within 0.2 s" in end.reason and len(scene.commands) == 1


def test_a_signal_during_the_check(scene: Scene) -> None:
    """Nobody is blamed, nothing is started, and the job comes back."""
    scene.store(check=True)

    def signalled(step: PlayedStep) -> int:
        assert scene.supervisor is not None
        scene.supervisor.on_signal(signal.SIGTERM, None)
        assert step.killed.wait(60)
        return 143

    scene.checking = signalled
    scene.attempt(completes(scene), check=[report("n1")])
    (end,) = scene.ends()
    assert (end.outcome, end.decision, end.suspects) == ("stopped", "requeue", ())
    assert end.reason.startswith("SIGTERM came") and len(scene.commands) == 1


def test_a_node_whose_check_fails(scene: Scene) -> None:
    scene.store(check=True)
    lines = [report("n1"), "noise", report("n2", "shows 7 GPUs of 8"), report("n3")]
    scene.attempt(fails(1), check=lines)
    (end,) = scene.ends()
    assert end.outcome == "node-check" and "n2: shows 7 GPUs of 8" in end.reason
    assert end.suspects == end.excluded == ("n2",)
    assert len(scene.commands) == 1 and "ditmoe.slurm.check" in scene.commands[0]
    assert scene.attempt(completes(scene), check=[report("n1"), report("n2"), report("n3")]) == 0
    scene.attempt(fails(1), job="8", check=[report("n1"), report("n3")])
    assert "n2: gave no answer" in scene.ends()[-1].reason and scene.ends()[-1].suspects == ("n2",)


def test_a_node_without_scontrol(scene: Scene) -> None:
    for job in ("7", "8"):
        record_submission(scene.folder.path, job, 1.0)
    scene.slurm.missing = True

    def play(step: PlayedStep) -> int:
        scene.save(5)
        scene.state("stopped", "stopped by SIGTERM at step 5")
        return 0

    assert scene.attempt(play) == 0
    assert scene.ends()[0].decision == "requeue", "job 8 goes on"
    scene.restart = 0

    def later(step: PlayedStep) -> int:
        scene.save(9)
        scene.state("stopped", "stopped by SIGTERM at step 9")
        return 0

    assert scene.attempt(later, job="8") == 1
    end = scene.ends()[1]
    assert end.decision == "stop" and f"sbatch {scene.run}/submit.sbatch" in end.reason
    assert "scontrol cannot be run" in end.reason


def test_a_requeue_from_outside(scene: Scene) -> None:
    def play(step: PlayedStep) -> int:
        scene.slurm.state, scene.slurm.restarts = "COMPLETING", 1
        scene.save(5)
        scene.state("stopped", "stopped by SIGTERM at step 5")
        return 0

    assert scene.attempt(play) == 0
    assert scene.ends()[0].decision == "requeue" and scene.slurm.orders == [], "Slurm has done it"


@pytest.mark.parametrize(
    ("details", "cancelled"),
    [
        ("RUNNING 0 00:01:00 01:00:00", False),
        ("COMPLETING 0 00:01:00 01:00:00", True),
        ("CANCELLED 0 00:01:00 01:00:00", True),
        ("COMPLETING 0 01:00:09 01:00:00", False),
        ("COMPLETING 0 1-01:00:09 1-01:00:00", False),
        ("COMPLETING 0 1-01:00:09 2-00:00:00", True),
        ("COMPLETING 0 1-01:00:09 UNLIMITED", True),
        ("COMPLETING 1 00:01:00 01:00:00", False),
        ("TIMEOUT 0 00:01:00 01:00:00", False),
    ],
)
def test_who_ended_a_job(details: str, cancelled: bool) -> None:
    names = ("JobState", "Restarts", "RunTime", "TimeLimit")
    assert is_cancelled(dict(zip(names, details.split(), strict=True)), 0) == cancelled


@pytest.mark.parametrize("how", ["ditmoe cancel", "scancel"])
def test_a_cancelled_job(scene: Scene, how: str) -> None:
    def play(step: PlayedStep) -> int:
        if how == "scancel":
            scene.slurm.state = "COMPLETING"
        else:
            record_cancel(scene.folder.path, 1.0)
        scene.save(5)
        scene.state("stopped", "stopped by SIGTERM at step 5")
        return 0

    assert scene.attempt(play) == EXIT_STOPPED
    (end,) = scene.ends()
    assert (end.outcome, end.decision, scene.slurm.orders) == ("cancelled", "stop", [])


def test_a_rank_that_falls_silent(scene: Scene) -> None:
    scene.store(limits={**PHASES, "step": 1.0})

    def play(step: PlayedStep) -> int:
        folder = Path(step.environment["DITMOE_HEARTBEATS"])
        assert read_terms(folder).attempt == 1 and read_terms(folder).interval == pytest.approx(0.1)
        with Heart(folder, 0, 2) as first, Heart(folder, 1, 2) as second:
            for number in range(1, 4):
                first.beat("step", number)
                second.beat("step", number)
            first.beat("step", 4)
            assert step.killed.wait(60)
        return 137

    assert scene.attempt(play) == 0
    (end,) = scene.ends()
    assert end.outcome == "hung" and end.decision == "requeue" and end.exit_code is None
    assert f"rank 1 ({os.uname().nodename}) in step 3" in end.reason


def test_a_shared_folder_that_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.store(limits={**PHASES, "save": 1.0})
    opened = threading.Event()

    def hangs(*_: object) -> None:
        opened.wait(60)

    monkeypatch.setattr(supervise, "read_heartbeats", hangs)

    def play(step: PlayedStep) -> int:
        assert step.killed.wait(60)
        opened.set()  # the folder answers again before the end is put on record
        return 137

    assert scene.attempt(play) == 0
    (end,) = scene.ends()
    assert end.outcome == "hung" and "has not answered for" in end.reason and end.suspects == ()
    assert scene.slurm.orders == ["scontrol requeue 7"]


def test_a_disk_that_is_full_before_the_start(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(supervise.Terms, "write", refuses)
    monkeypatch.setattr(os, "pwrite", refuses)
    assert scene.attempt(completes(scene)) == 2
    (end,) = scene.ends()
    assert (end.outcome, end.decision, scene.commands) == ("user-error", "stop", [])
    assert f"{scene.folder.heartbeats}: could not be written: No space left on device" in end.reason


def test_another_supervisor(scene: Scene) -> None:
    with open(scene.folder.path / "lock", "w") as file:
        file.write("job 6 on n9\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="job 6 on n9 works on it"):
            scene.attempt(completes(scene))
    assert read(scene.folder.path).attempts == ()


def test_work_without_checkpoints(tmp_path: Path, scene: Scene) -> None:
    """The files of a dataset's folder are what an attempt brings; it is complete when its program ends well."""
    out = tmp_path / "latents"
    scene.folder = JobFolder(tmp_path / "latents.slurm", tmp_path / "latents.slurm/submit.sbatch")
    scene.store(verb="encode", run=None)

    def some(step: PlayedStep) -> int:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        (out / f"parts/{len(list((out / 'parts').iterdir()))}").touch()
        return 143

    assert [scene.attempt(some) for _ in range(5)] == [143] * 5
    assert {end.decision for end in scene.ends()} == {"requeue"}
    assert scene.attempt(lambda step: 0) == 0
    assert scene.ends()[-1].outcome == "complete"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n2: task 1: Killed\n", (("n2",), 137)),
        ("srun: error: n[1-2]: tasks 0-3: Exited with exit code 2\n", (("n1", "n2"), 2)),
        ("srun: error: n1: tasks 0,2: Segmentation fault (core dumped)\n", (("n1",), 139)),
        ("srun: error: n1: task 0: Out Of Memory\n", (("n1",), None)),
        ("srun: error: Node failure on n2\n", None),
        ("srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\n", None),
        ("error: n2: task 1: Killed\n", None),
    ],
)
def test_what_srun_says_of_tasks(line: str, expected: tuple[tuple[str, ...], int | None] | None) -> None:
    found = task_failure(line)
    assert (found and (found.hosts, found.code)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("error: no such file\nsrun: error: n1: task 0: Killed\n  x\n", "no such file"),
        (
            "error: a.yaml: 2 problems\nerror: a.yaml: 2 problems\n    lr = 'x': wrong\n    lr = 'x': wrong\n"
            "    depth = 0: wrong\n    depth = 0: wrong\nsrun: error: n2: task 1: Exited with exit code 2\n",
            "a.yaml: 2 problems: lr = 'x': wrong; depth = 0: wrong",
        ),
        ("  a warning\nsrun: error: n1: task 0: Killed\n", ""),
    ],
)
def test_the_message_of_a_users_error(text: str, message: str) -> None:
    assert user_message(text.splitlines(keepends=True)) == message


SRUN = """#!/bin/bash
trap 'echo asked; exit 0' USR2
trap 'exit 143' TERM
echo "srun: error: n2: task 3: Exited with exit code 2" >&2
echo "srun: error: n1: task 0: Killed" >&2
echo "error: no such file" >&2
for line in {1..60}; do echo "  a traceback of another task" >&2; done
echo started
[ "$1" = fail ] && exit 137
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(("how", "returned", "code"), [("fail", 137, 2), ("ask", 0, 0), ("kill", 143, 2)])
def test_a_real_step(tmp_path: Path, how: str, returned: int, code: int) -> None:
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    ended, lines, shown = threading.Event(), [], []
    step = Step(["bash", str(srun), how], os.environ, shown.append, ended.set, lines.append)
    while not lines or len(shown) < 3:
        time.sleep(0.01)
    if how == "ask":
        step.ask_to_stop()
    elif how == "kill":
        step.kill()
    assert ended.wait(20)
    assert (step.returned, step.code) == (returned, code)
    assert step.message == "no such file: a traceback of another task"
    assert step.words == "n2: task 3: Exited with exit code 2"


def test_a_step_has_ended_once_its_last_words_are_read(tmp_path: Path) -> None:
    """Otherwise the exit code of srun would stand for that of the first task that failed: a user's error."""
    srun = tmp_path / "srun"
    srun.write_text('echo noise >&2; echo "srun: error: n2: task 3: Exited with exit code 2" >&2; exit 137\n')
    step = Step(["bash", str(srun)], os.environ, lambda line: time.sleep(0.4), lambda: None)
    while step.returned is None:
        time.sleep(0.005)
    assert (step.returned, step.code) == (137, 2)


def test_patience() -> None:
    shared, opened = Shared(), threading.Event()
    assert shared.ask(lambda: 3, 10) == 3
    with pytest.raises(ValueError, match="told"):
        shared.ask(lambda: int("told"), 10)
    with pytest.raises(TimeoutError):
        shared.ask(opened.wait, 0.05)
    begun = []
    with pytest.raises(TimeoutError):
        shared.ask(lambda: begun.append(1), 0.05)
    assert begun == []
    opened.set()
    assert shared.ask(lambda: 4, 10) == 4


def test_the_program_itself(tmp_path: Path) -> None:
    """Ends with the message of what it cannot do, and the user's exit code."""
    found = subprocess.run(
        [sys.executable, "-m", "ditmoe.slurm.supervise", str(tmp_path / "job")],
        env={**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2 and "job.json: cannot be read" in found.stderr
    assert "Traceback" not in found.stderr
