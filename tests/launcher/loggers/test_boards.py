"""W&B and MLflow beside training: the same names, one run over resumes, and nothing of theirs reaches training.

Stand-ins are put in place of both libraries, which are extras.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe.launcher.loggers import aside, opening
from ditmoe.launcher.loggers.aside import without_secrets
from ditmoe.launcher.loggers.opening import check_loggers
from ditmoe.launcher.training.report import Reporter
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from tests.launcher.loggers.stand_ins import calls, read

__all__ = ["calls"]


def test_figures_have_the_same_names_and_a_resume_goes_on_with_the_same_run(tmp_path: Path, calls: Path) -> None:
    folder = RunFolder(tmp_path / "photos")
    record = {"loss": 0.5, "images": 64, "mfu": 0.25, "odd (key)": 1, "expert_load": [[0.25, 0.75]]}
    record["sources"] = {"a/b": {"epoch": 1}}
    for first, outcome in ((1, "stopped"), (2, "complete")):
        with Reporter(folder, 9, first - 1, io.StringIO(), ("tensorboard", "wandb", "mlflow")) as reporter:
            reporter.outcome = outcome  # type: ignore[assignment]
            reporter.text("configuration", "model: {}")
            for step in range(first, first + 2):
                reporter.record(step, record)
            reporter.image("samples", np.zeros((4, 6, 3), dtype=np.uint8), first + 1)
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    names = set(board.Tags()["scalars"])
    assert {"train/loss", "speed/MFU - share", "other/odd _key_", "sources/a_b/epoch"} < names
    wandb, mlflow = read(calls, "wandb"), read(calls, "mlflow")
    for found in (wandb_figures(wandb), mlflow_figures(mlflow)):
        assert [(step, set(values)) for kind, step, values in found] == [(step, names) for step in (1, 2, 3)], (
            "step 2 comes again, and is there once"
        )
    assert [call for call in wandb if call[0] == "log" and call[2] == {"samples": [6, 4]}]
    begun = [call for call in wandb if call[0] == "init"]
    assert begun[0] == begun[1] == ["init", begun[0][1], "offline", "allow", "ditmoe"]
    assert [call[1] for call in wandb if call[0] == "finish"] == [75, 0]
    assert [call for call in mlflow if call[0] == "create"] == [["create", "photos"]]
    assert [call for call in wandb if call[0] == "name"] == [["name", "photos", "photos", "train"]] * 2
    assert ["update", "r1", "RUNNING"] in mlflow
    assert [call[1] for call in mlflow if call[0] == "end"] == ["KILLED", "FINISHED"]
    assert "a word of the library" in (folder.boards / "wandb.txt").read_text()


def wandb_figures(calls: list[Any]) -> list[Any]:
    return [call for call in calls if call[0] == "log" and "train/loss" in call[2]]


def mlflow_figures(calls: list[Any]) -> list[Any]:
    return [call for call in calls if call[0] == "log"]


def test_a_logger_that_fails_is_told_once_without_secrets(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARD_TROUBLE", "fails")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    folder, terminal = RunFolder(tmp_path / "run"), io.StringIO()
    with Reporter(folder, 9, terminal=terminal, loggers=("wandb",)) as reporter:
        reporter._aside[0]._process.wait(60)
        for step in (1, 2, 3):
            reporter.record(step, {"loss": 0.5})
    told = [line for line in terminal.getvalue().splitlines() if "wandb" in line]
    assert told == [
        "wandb: RuntimeError: the key … at https://…@host is refused; training goes on without it",
    ]
    assert len([line for line in folder.log.read_text().splitlines() if "wandb" in line]) == 1
    assert not any("0123456789" in path.read_text() for path in (folder.log, folder.stats))
    assert len(folder.stats.read_text().splitlines()) == 3


def test_a_logger_that_hangs_holds_up_nothing(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARD_TROUBLE", "hangs")
    monkeypatch.setattr(aside, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(aside, "MOST_WAITING", 20)
    folder, terminal = RunFolder(tmp_path / "run"), io.StringIO()
    big = {f"figure {number}": 0.5 for number in range(2000)}  # more than a pipe holds
    with Reporter(folder, 99, terminal=terminal, loggers=("wandb",)) as reporter:
        for step in range(1, 41):
            reporter.record(step, big)
        process = reporter._aside[0]._process
    assert process.poll() is not None, "it is not left behind"
    told = [line for line in terminal.getvalue().splitlines() if line.startswith("wandb")]
    assert told == ["wandb: it does not keep up: records are left out there; training goes on without it"]
    assert len(folder.stats.read_text().splitlines()) == 40


def test_a_missing_package_is_one_message_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    check_loggers(("tensorboard",))
    with pytest.raises(UserError, match=r"train\.loggers: mlflow is not installed.*ditmoe\[mlflow\]"):
        check_loggers(("tensorboard", "mlflow"))


def test_secrets_are_left_out_of_messages() -> None:
    environment = {"MLFLOW_TRACKING_TOKEN": "tok-en-12", "HOME": "/home/me", "SHORT_KEY": "a"}
    text = "tok-en-12 of /home/me at https://me:word@host/x?sig=1 in a\nline"
    assert without_secrets(text, environment) == "… of /home/me at https://…@host/x?… in a\\nline"
