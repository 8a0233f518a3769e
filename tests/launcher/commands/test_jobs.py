"""`ditmoe status`, `logs` and `cancel` on a run of this machine, as a user types them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditmoe.slurm.job_folder import training_folder
from tests.forked import DITMOE, run_forked


def make_run(folder: Path, word: str = "stopped") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 40}\n")
    values = {"state": word, "step": 20, "steps": 40, "time": time.time() - 60, "reason": "SIGTERM came"}
    (folder / "state.json").write_text(json.dumps({**values, "host": "here", "job": None}))
    (folder / "log.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    return folder


def test_status_of_one_run_of_all_below_runs_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b", "complete")
    monkeypatch.chdir(tmp_path)
    one = run_forked([*DITMOE, "status", "runs/a"], tmp_path / "out")
    assert one.returncode == 0 and one.stdout.startswith("runs/a: stopped, ended\n  reason        SIGTERM came\n")
    table = run_forked([*DITMOE, "status"], tmp_path / "out").stdout
    assert [line.split()[:3] for line in table.splitlines()[1:3]] == [
        ["runs/a", "stopped", "ended"],
        ["runs/b", "complete", "healthy"],
    ]
    # So does the folder of a sweep stand for its cells, beside a run that is named.
    make_run(tmp_path / "sweep/lr=1")
    named = run_forked([*DITMOE, "status", "sweep", "runs/b"], tmp_path / "out").stdout
    assert [line.split()[0] for line in named.splitlines()[1:3]] == ["sweep/lr=1", "runs/b"]
    data = json.loads(run_forked([*DITMOE, "status", "--json"], tmp_path / "out").stdout)
    assert [(run["run"], run["state"], run["step"]) for run in data] == [
        ("runs/a", "stopped", 20),
        ("runs/b", "complete", 20),
    ]
    # All have ended: it looks once.
    watched = run_forked([*DITMOE, "status", "--watch"], tmp_path / "out")
    assert watched.returncode == 0 and watched.stdout.count("runs/a") == table.count("runs/a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "runs/ has no run; expected run folders"),
        (["status", "absent"], "absent: no run found"),
        (["logs", "absent"], "absent: no run found"),
        (["logs", "a", "--rank", "3"], "a/ranks/rank-3.txt: not found; expected a run of several local ranks"),
        (["cancel", "absent"], "absent: no run found"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    done = run_forked([*DITMOE, *arguments], tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and "Traceback" not in done.stderr


def test_logs_prints_the_end_and_follows_until_the_run_has_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    shown = run_forked([*DITMOE, "logs", str(run), "-n", "2"], tmp_path / "out")
    assert (shown.stdout, shown.stderr) == ("line 98\nline 99\n", f"==> {run / 'log.txt'} <==\n")
    output = training_folder(run).output("7")
    output.parent.mkdir(parents=True)
    output.write_text("of the job\n")
    followed = run_forked([*DITMOE, "logs", str(run), "-f"], tmp_path / "out")
    assert (followed.returncode, followed.stdout) == (0, "of the job\n")


HOLDER = """
import sys
from pathlib import Path
from ditmoe.launcher.local.signals import StopSignal
from ditmoe.launcher.training.run_folder import RunFolder
import time
with RunFolder(Path(sys.argv[1])).lock(), StopSignal() as stop:
    print("held", flush=True)
    while not stop.requested:
        time.sleep(0.02)
    print(stop.name)
"""


def test_cancel_asks_the_process_of_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "training")
    program = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert "training, healthy" in run_forked([*DITMOE, "status", str(run)], tmp_path / "out").stdout
            done = run_forked([*DITMOE, "cancel", str(run)], tmp_path / "out")
            assert done.returncode == 0
            assert f"process {holder.pid} was asked for a checkpoint and its end" in done.stdout
            assert holder.communicate(timeout=60)[0] == f"{signal.Signals.SIGTERM.name}\n"
        finally:
            holder.kill()
    again = run_forked([*DITMOE, "cancel", str(run)], tmp_path / "out")
    assert again.stdout.startswith("nothing of it runs or waits: it is cut off")
