"""Stand-ins for W&B and MLflow, which are extras: they write down what is asked of them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

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
    def log(self, values, step=None):
        write("log", step, {key: getattr(value, "size", value) for key, value in values.items()})
    def define_metric(self, name, step_metric=None): write("axis", name, step_metric)
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
    write("name", options["name"], options["group"], options["job_type"])
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
    def create_run(self, experiment, run_name, tags):
        self.write("create", run_name, *tags.values())
        number = sum(json.loads(line)[0] == "create" for line in open(path))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"r{number}"))
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
