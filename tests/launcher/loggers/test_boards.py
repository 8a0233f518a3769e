"""W&B and MLflow beside training: the same names, one run over resumes, and nothing of theirs reaches training.

Stand-ins with the calls that are used are put in place of both libraries, which are extras.
"""

import io
import json
import os
import sys
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

WANDB = """
import json, os, time
path = os.environ["BOARD_CALLS"] + "-wandb"
def write(*call):
    with open(path, "a") as file:
        file.write(json.dumps(call) + "\\n")
class Settings:
    def __init__(self, **settings): pass
class Image:
    def __init__(self, image): self.size = image.size
class Config:
    def update(self, values, allow_val_change): write("config", values)
class Run:
    config = Config()
    last = -1
    def log(self, values, step):
        write("log", step, {key: getattr(value, "size", value) for key, value in values.items()})
    def finish(self, exit_code): write("finish", exit_code)
def login(prompt): return False
def init(**options):
    trouble = os.environ.get("BOARD_TROUBLE")
    if trouble == "hangs":
        time.sleep(600)
    if trouble == "fails":
        raise RuntimeError("the key " + os.environ["WANDB_API_KEY"] + " at https://me:word@host is refused")
    print("a word of the library")
    write("init", options["id"], options["mode"], options["resume"], options["project"])
    return Run()
"""
MLFLOW = """
import json, os, types
path = os.environ["BOARD_CALLS"] + "-mlflow"
class MlflowClient:
    def __init__(self, uri):
        self.path = path
    def write(self, *call):
        with open(path, "a") as file:
            file.write(json.dumps(call) + "\\n")
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): return "1"
    def create_run(self, experiment, run_name):
        self.write("create", run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    def update_run(self, run, status): self.write("update", run, status)
    def get_metric_history(self, run, key):
        calls = [json.loads(line) for line in open(path)]
        found = [call for call in calls if call[0] == "log" and key in call[2]]
        return [types.SimpleNamespace(step=call[1]) for call in found]
    def log_batch(self, run, metrics):
        self.write("log", metrics[0].step, {metric.key: metric.value for metric in metrics})
    def log_image(self, run, image, file): self.write("image", file)
    def log_text(self, run, text, file): self.write("text", file)
    def set_terminated(self, run, status): self.write("end", status)
"""
ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.step = key, value, step
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-ins write what was asked of them."""
    stubs = tmp_path / "stubs"
    for file, content in {
        "wandb/__init__.py": WANDB,
        "mlflow/__init__.py": "",
        "mlflow/tracking.py": MLFLOW,
        "mlflow/entities.py": ENTITIES,
    }.items():
        (stubs / file).parent.mkdir(parents=True, exist_ok=True)
        (stubs / file).write_text(content)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stubs), *filter(None, sys.path)]))
    monkeypatch.setenv("BOARD_CALLS", str(tmp_path / "calls"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


def read(calls: Path, kind: str) -> list[Any]:
    return [json.loads(line) for line in Path(f"{calls}-{kind}").read_text().splitlines()]


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
    assert [set(values) for _, step, values in wandb_figures(wandb)] == [names] * 4
    assert [(step, set(values)) for kind, step, values in mlflow_figures(mlflow)] == [
        (step, names) for step in (1, 2, 3)
    ], "step 2 comes again, and is there once"
    assert [call for call in wandb if call[0] == "log" and call[2] == {"samples": [6, 4]}]
    begun = [call for call in wandb if call[0] == "init"]
    assert begun[0] == begun[1] == ["init", begun[0][1], "offline", "allow", "ditmoe"]
    assert [call[1] for call in wandb if call[0] == "finish"] == [75, 0]
    assert [call for call in mlflow if call[0] == "create"] == [["create", "photos"]]
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
