"""`ditmoe evaluate --watch` beside a run that trains, as a user starts both."""

import threading
from pathlib import Path

import pytest
import yaml

from ditmoe.launcher.training.progress import read_progress
from ditmoe.launcher.watch.boards import written_points
from ditmoe.launcher.watch.records import WATCH_FILE, read_lines
from ditmoe.parallel.checkpoint.folder import checkpoints, step_of
from tests.forked import DITMOE, run_forked
from tests.sampling.small_run import write_digits


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_watch_beside_training(tmp_path: Path, processes: str) -> None:
    """It begins before the first checkpoint, ends with the run, and training keeps what it has marked."""
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    config = {
        "run": {"dir": str(run)},
        "launch": {"processes": 1, "device": "cpu", "threads": 1},
        "model": {"depth": 1, "hidden": 16, "heads": 2, "patch": 4},
        "data": {"sources": [{"path": str(write_digits(tmp_path / "digits"))}], "workers": 0},
        "train": {"steps": 12, "batch": 8, "precision": "fp32", "log_every": 1, "checkpoint_every": 6},
        "checkpoint": {"keep_last": 1},
    }
    file.write_text(yaml.safe_dump(config))
    run.mkdir()
    arguments = ["evaluate", str(run), "--watch", "--count", "8", "--steps", "1", "--no-recogniser"]
    arguments += [
        "--labels",
        "balanced",
        "--cache",
        str(tmp_path / "cache"),
        "--patience",
        "3",
        "--processes",
        processes,
    ]
    found = []
    watch = threading.Thread(
        target=lambda: found.append(run_forked([*DITMOE, *arguments], tmp_path / "watch")), daemon=True
    )
    watch.start()
    first = run_forked([*DITMOE, "train", str(file), "train.steps=6"], tmp_path / "train")
    assert first.returncode == 0, first.stderr
    watch.join(200)
    (done,) = found
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the run is complete: step 6; 1 of its checkpoints are scored", done
    assert "6           48" in done.stdout and "images, ema of step" not in done.stdout

    assert [line["step"] for line in read_lines(run / "evaluations" / WATCH_FILE)] == [6]
    (board,) = (run / "tensorboard").glob("evaluation-*")
    assert {step for _, step in written_points(board)} == {6}

    # The run goes on; what is marked stays until a better one is found.
    second = run_forked([*DITMOE, "train", str(file)], tmp_path / "train")
    assert second.returncode == 0, second.stderr
    assert [step_of(path) for path in checkpoints(run)] == [6, 12]
    assert read_progress(run).complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "2"], "--every: goes with --watch"),
        (["--patience", "2"], "--patience: goes with --watch"),
        (["--watch", "--step", "3"], "--watch and --step 3: expected one of them"),
        (["--watch", "--grid", "grid.yaml"], "--watch and --grid grid.yaml: expected one of them"),
        (["--watch"], "nowhere: expected the folder of a run"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: list[str], message: str) -> None:
    done = run_forked([*DITMOE, "evaluate", "nowhere", *options], tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_watch_is_started_once(tmp_path: Path) -> None:
    done = run_forked([*DITMOE, "evaluate", str(tmp_path), "--watch"], tmp_path / "out", processes=2)
    assert done.returncode == 2 and "starts the processes of each evaluation itself" in done.stderr
