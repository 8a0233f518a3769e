"""What W&B (offline) and MLflow (files) themselves keep of a run, read back by them; where they are installed."""

import io
import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from ditmoe.launcher.configuration.sections import LoggerName
from ditmoe.launcher.loggers import aside
from ditmoe.launcher.loggers.board import Outcome
from ditmoe.launcher.training.evaluations import StoredEvaluation
from ditmoe.launcher.training.report import Reporter
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.watch.boards import EvaluationBoards

EVALUATION: Final = "evaluation-euler-4"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's account is used, and nothing is sent."""
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(aside, "CLOSE_SECONDS", 120.0)


def train(folder: RunFolder, first: int, outcome: Outcome, loggers: tuple[LoggerName, ...]) -> None:
    with Reporter(folder, 9, first - 1, io.StringIO(), loggers) as reporter:
        reporter.outcome = outcome
        reporter.text("configuration", "model:\n  depth: 3\n")
        for step in (first, first + 1):
            reporter.record(step, {"loss": 0.5 * step, "images": 64 * step, "expert_load": [[0.25, 0.75]]})
        reporter.image("samples", np.full((4, 6, 3), 200, dtype=np.uint8), first + 1)
    assert "goes on without it" not in folder.log.read_text() and "not all was sent" not in folder.log.read_text()


def evaluate(folder: RunFolder, steps: list[int], loggers: tuple[LoggerName, ...]) -> None:
    boards = EvaluationBoards(folder, EVALUATION, loggers)
    for step in steps:
        one = StoredEvaluation("id", 0.0, "w", step, 8, "classifier", "{}", {"fid": 1.5 * step, "recall": 0.25})
        boards.write(one, folder.path / "nowhere.npz")
    boards.close("complete")
    assert boards.problems() == []


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "photos")
    train(folder, 1, "stopped", ("mlflow",))
    train(folder, 2, "complete", ("mlflow",))
    evaluate(folder, [3, 2], ("mlflow",))
    evaluate(folder, [2, 3, 1], ("mlflow",))

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder.boards / "mlruns").resolve().as_uri())
    runs = {
        run.info.run_name: run
        for run in client.search_runs([client.get_experiment_by_name("ditmoe").experiment_id])
    }
    assert set(runs) == {"photos", f"photos {EVALUATION}"}
    training, evaluation = runs["photos"], runs[f"photos {EVALUATION}"]
    assert training.info.status == evaluation.info.status == "FINISHED"
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id

    def history(run: Any, name: str) -> list[tuple[int, float]]:
        return sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, name))

    assert history(training, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert history(training, "expert load - share/block 0/expert 1") == [(1, 0.75), (2, 0.75), (3, 0.75)]
    assert history(evaluation, "evaluation/FID") == [(1, 1.5), (2, 3.0), (3, 4.5)]
    artifacts = folder.boards / "mlruns"
    assert any(path.read_text() == "model:\n  depth: 3\n" for path in artifacts.rglob("configuration.txt"))
    assert len(list(artifacts.rglob("samples 0000000[23].png"))) == 2


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "photos")
    train(folder, 1, "stopped", ("wandb",))
    train(folder, 2, "complete", ("wandb",))
    evaluate(folder, [3, 2], ("wandb",))
    evaluate(folder, [2, 3, 1], ("wandb",))
    runs = defaultdict(list)
    for path in sorted(
        (folder.boards / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        facts, rows = records_of(path)
        runs[facts["run_id"], facts["name"], facts["group"]].append(rows)
    (training, evaluation) = sorted(runs, key=lambda run: len(run[1]))
    assert training[1:] == ("photos", "photos") and evaluation[1:] == (f"photos {EVALUATION}", "photos")
    first, second = ([row for row in rows if "train/loss" in row] for rows in runs[training])
    assert [(row["_step"], row["train/loss"]) for row in first] == [(1, 0.5), (2, 1.0)]
    assert [(row["_step"], row["train/loss"]) for row in second] == [(3, 1.5)], "a resume repeats nothing"
    shown = [row for rows in runs[evaluation] for row in rows if "evaluation/FID" in row]
    assert [(row["progress/step"], row["evaluation/FID"]) for row in shown] == [(3, 4.5), (2, 3.0), (1, 1.5)]
    assert len(list((folder.boards / "wandb").rglob("media/images/samples*.png"))) == 2


def records_of(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What an offline run keeps: facts about it, and the rows of its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    facts, rows = {}, []
    for data in log_of(path):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            facts = {"run_id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append({"_step": record.history.step.num, **row})
    return facts, rows


def log_of(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, each of pieces with a header of 7 bytes."""
    content, place, begun = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield begun
            begun = b""
