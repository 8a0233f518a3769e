"""What a run says of itself in `state.json`, and to a watcher."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.training import run_folder
from ditmoe.launcher.training.program import telling_checkpoint
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.training.state import STATE, RunState, StateFile
from ditmoe.model.errors import UserError
from ditmoe.slurm.heartbeats import FOLDER_VARIABLE, Terms, read_heartbeats
from tests.forked import DITMOE, run_forked
from tests.small_disk import small_file_system


def told(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / STATE).read_text())
    return values


def test_what_is_told_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    before = time.time()
    state = StateFile(tmp_path, RunState("starting", 0, 40, None))
    assert told(tmp_path)["state"] == "starting" and told(tmp_path)["images"] is None
    state.tell(state="training", step=3, images=48, images_per_second=2.5)
    state.tell(checkpoint_step=3, checkpoint_time=before)
    monkeypatch.setenv("DITMOE_JOB", "123_4")
    assert RunState("starting", 0, 40, None).job == "123_4"  # SLURM_JOB_ID of an element may be the array's
    found = told(tmp_path)
    expected = {"state": "training", "step": 3, "steps": 40, "images": 48, "images_per_second": 2.5, "job": "123"}
    assert found.items() >= expected.items()
    assert found["checkpoint_step"] == 3 and found["pid"] == os.getpid() and found["time"] >= before
    state.fail("the loss is nan")
    assert told(tmp_path)["state"] == "failed" and told(tmp_path)["reason"] == "the loss is nan"
    assert told(tmp_path)["step"] == 3


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    state = StateFile(tmp_path, RunState("starting", 0, 40, None))
    (tmp_path / STATE).unlink()
    (tmp_path / STATE).mkdir()
    with pytest.raises(UserError, match="could not be written"):
        state.tell(step=1)
    state.fail("the disk is what failed")
    assert (tmp_path / STATE).is_dir()


def test_a_full_disk_under_a_file_that_is_replaced(tmp_path: Path) -> None:
    """The message is that of a checkpoint that could not be written, whichever file meets the full disk."""
    with small_file_system(tmp_path / "disk", 1) as run:
        state = StateFile(run, RunState("training", 3, 40, 48))
        with pytest.raises(OSError), (run / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        expected = rf"{run}/state\.json: could not be written \(No space .* is none yet; free some space and"
        with pytest.raises(UserError, match=expected), telling_checkpoint(run):
            state.tell(step=4)
        assert told(run)["step"] == 3


def test_a_supervised_run_waits_for_the_end_of_the_attempt_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begin = time.monotonic()
        with pytest.raises(UserError, match="expected no other"), RunFolder(tmp_path).lock(0.6):
            pass
        assert time.monotonic() - begin >= 0.6
        with pytest.raises(UserError, match="expected no other"), RunFolder(tmp_path).lock():
            pass  # at once: nobody supervises this process
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        monkeypatch.setattr(run_folder, "SUPERVISED_SECONDS", 1e9)
        threading.Timer(0.6, held.close).start()
        with RunFolder(tmp_path).lock():
            pass


CONFIG = """
run: {{dir: {run}}}
launch: {{processes: 2, device: cpu, threads: 1}}
model: {{depth: 1, hidden: 16, heads: 2, patch: 4, experts: 2, experts_per_token: 1}}
data: {{sources: [{{path: {shards}}}], workers: 0}}
train: {{steps: 4, batch: 8, precision: fp32, log_every: 1, checkpoint_every: 2}}
"""


@pytest.mark.timeout(200)
def test_a_watched_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, run, beats = tmp_path / "digits", tmp_path / "run", tmp_path / "beats"
    packed = run_forked([*DITMOE, "data", "pack", "digits", str(shards)], tmp_path / "pack")
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "run.yaml").write_text(CONFIG.format(run=run, shards=shards))
    Terms(5, interval=0.05).write(beats)
    monkeypatch.setenv(FOLDER_VARIABLE, str(beats))
    result = run_forked([*DITMOE, "train", str(tmp_path / "run.yaml")], tmp_path / "train", 2)
    assert result.returncode == 0, result.stderr
    found = read_heartbeats(beats, 5)
    assert {rank: (beat.phase, beat.ranks) for rank, beat in found.items()} == {0: ("ended", 2), 1: ("ended", 2)}
    # Reading and computing of four steps, two saves, the wait for the last one, and the end.
    assert [found[rank].beats for rank in (0, 1)] == [4 * 2 + 2 + 1 + 1] * 2
    state = told(run)
    expected = {"state": "complete", "step": 4, "steps": 4, "images": 32, "checkpoint_step": 4, "reason": ""}
    assert state.items() >= expected.items() and state["images_per_second"] > 0
    monkeypatch.delenv(FOLDER_VARIABLE)
    again = run_forked([*DITMOE, "train", str(tmp_path / "run.yaml")], tmp_path / "train", 2)
    assert again.returncode == 0 and told(run).items() >= expected.items(), again.stderr
