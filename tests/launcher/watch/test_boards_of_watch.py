"""Figures of evaluations on the boards that the run has: the same names, each once, whatever is killed."""

from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.loggers.board import Outcome
from ditmoe.launcher.training.evaluations import StoredEvaluation
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch.boards import EvaluationBoards, written_points
from tests.launcher.loggers.stand_ins import calls, read

__all__ = ["calls"]
NAME = "evaluation-euler-4"
LOGGERS = ("tensorboard", "wandb", "mlflow")


def evaluation(step: int, **figures: float) -> StoredEvaluation:
    whole = {"fid": 3.0, "recall": 0.5, "recogniser": {"accuracy": 0.75}, **figures}
    return StoredEvaluation("id", 0.0, "w", step, 8, "classifier", "{}", whole)


def write(folder: RunFolder, steps: list[int], outcome: Outcome = "stopped") -> list[str]:
    boards = EvaluationBoards(folder, NAME, LOGGERS)
    for step in steps:
        boards.write(evaluation(step), folder.path / "nowhere.npz")
    boards.close(outcome)
    return boards.problems()


def logged(called: list[Any]) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of each record, whichever library has it."""
    found = []
    for call in called:
        if call[0] == "log":
            values = dict(call[2])
            found.append((values.pop("progress/step", call[1]), values))
    return found


def test_the_same_names_and_each_figure_once(tmp_path: Path, calls: Path) -> None:
    folder = RunFolder(tmp_path / "photos")
    assert write(folder, [20, 10]) == []  # also where an earlier step comes later
    assert write(folder, [10, 20, 30], "complete") == []
    figures = {"evaluation/FID": 3.0, "evaluation/recall": 0.5, "evaluation/recognised - share": 0.75}
    names = {(name, step) for name in figures for step in (10, 20, 30)}
    assert written_points(folder.tensorboard / NAME) == names
    for kind in ("wandb", "mlflow"):
        assert logged(read(calls, kind)) == [(step, figures) for step in (20, 10, 30)], kind
    wandb, mlflow = read(calls, "wandb"), read(calls, "mlflow")
    assert ["name", f"photos {NAME}", "photos", "evaluation"] in wandb
    assert ["axis", "evaluation/*", "progress/step"] in wandb
    assert len({call[1] for call in wandb if call[0] == "init"}) == 1, "a second start goes on with the run"
    assert [call for call in mlflow if call[0] == "create"] == [["create", f"photos {NAME}"]]
    assert [call[1] for call in mlflow if call[0] == "end"] == ["KILLED", "FINISHED"]
    before = [read(calls, kind) for kind in ("wandb", "mlflow")]
    assert write(folder, [10, 20, 30]) == []
    assert [read(calls, kind) for kind in ("wandb", "mlflow")] == before, "nothing new opens nothing"


def test_a_board_that_fails_is_told_once_and_given_the_figures_at_the_next_start(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setenv("BOARD_TROUBLE", "fails")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    (told,) = write(folder, [10, 20])
    assert told.startswith("wandb: RuntimeError: the key …") and told.endswith("; the watch goes on without it")
    assert [step for step, _ in logged(read(calls, "mlflow"))] == [10, 20]
    monkeypatch.delenv("BOARD_TROUBLE")
    assert write(folder, [10, 20]) == []
    assert [step for step, _ in logged(read(calls, "wandb"))] == [10, 20]
    assert [step for step, _ in logged(read(calls, "mlflow"))] == [10, 20]
    notes = folder.boards / f"wandb-{NAME}.jsonl"
    notes.write_bytes(notes.read_bytes()[:-4])  # as a kill leaves it: what it was about is shown again
    assert write(folder, [10, 20]) == []
    assert logged(read(calls, "wandb"))[-1] == (20, {"evaluation/recognised - share": 0.75})
